"""Bad input is one line that names what to mend, exit 1 (2 for usage), and nothing is made."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import click
import numpy as np
import optuna
import places
import pytest
from click.testing import CliRunner, Result
from evidence_builder import evidence
from safetensors.numpy import load_file, save_file
from sqlalchemy import text

import forecasters
from launch import cli
from storage import slots, study_rows
from storage.progress import free_counts, stage_results, study_progress
from studies import config as configuration
from studies import retiring
from studies import study as studying
from studies.evaluators import checkpoint_fingerprint
from studies.evidence import to_json
from studies.series import read_series

TINY = Path(forecasters.__file__).parent / "checkpoints" / "toto-tiny"


class CommandPlace(places.Place):
    """For commands in this process, and what they refuse."""

    SETTINGS = (
        places.FOLDERS + '[search]\nmodels = ["toto"]\n'
        '[kronos]\ncheckpoint = "kronos-tiny"\n[toto]\ncheckpoint = "toto-tiny"\n'
    )
    BARS: ClassVar[Mapping[str, int]] = {"SP500": 300}

    @property
    def bars(self) -> list[str]:
        """The lines of a real price file, header first."""
        return places.last_bars("SP500", 300)

    def launch(self, *words: str, url: str | None = None) -> Result:
        return self.invoke(cli.launch_workers, "--cpus", "1", *words, url=url)

    def refused(self, result: Result, *words: str, code: int = 1) -> str:
        """Asserts one line with these words, that exit status, and that nothing was made."""
        assert result.exit_code == code, result.output + repr(result.exception)
        lines = [line for line in result.stderr.splitlines() if line.startswith(("error:", "Error:"))]
        assert len(lines) == 1, result.stderr
        for word in words:
            assert word in lines[0]
        assert "Traceback" not in result.output
        assert result.stdout == ""
        assert studying.list_studies(self.storage) == []
        assert not (self.folder / "logs").exists()
        return lines[0]


Place = CommandPlace


def with_cell(lines: list[str], row: int, column: int, value: str) -> list[str]:
    cells = lines[row - 1].split(",")
    cells[column] = value
    return [*lines[: row - 1], ",".join(cells), *lines[row:]]


@pytest.mark.parametrize("value", ["", "nan", "0", "-3.5", "n/a", "inf"])
def test_a_price_that_is_none_names_file_and_row(place: Place, value: str) -> None:
    place.write("SP500.csv", with_cell(place.bars, 57, 4, value))
    place.refused(place.launch(), "SP500.csv", "row 57", "close")


def test_no_close_column(place: Place) -> None:
    place.write("SP500.csv", ["timestamp,open", "2024-01-01,3"])
    place.refused(place.launch(), "SP500.csv", "no close column")


def test_too_few_bars(place: Place) -> None:
    place.write("SP500.csv", place.bars[:150])
    place.refused(place.launch(), "SP500", "149 bars", "178")


def test_a_missing_folder_and_a_missing_symbol(place: Place) -> None:
    place.refused(place.launch("--data-dir", str(place.folder / "none")), "none", "--data-dir")
    place.refused(place.launch("--symbols", "BTCUSD"), "BTCUSD", "SP500")


@pytest.mark.parametrize("symbol", ["../x", "a/b", "sp500", ".hidden", "SP 500"])
def test_what_is_no_symbol(place: Place, symbol: str) -> None:
    place.refused(place.launch("--symbols", symbol), repr(symbol), code=2)


def test_a_file_that_is_no_price_series_is_passed_over_with_a_line(place: Place) -> None:
    place.write("data_summary.csv", ["symbol,rows", "SP500,300"])
    place.write("NOTES.csv", ["a,b", "1,2"])
    series, notes = read_series(configuration.load(place.settings), [])
    assert [item.symbol for item in series] == ["SP500"]
    assert [note for note in notes if "data_summary.csv" in note]
    assert [note for note in notes if "NOTES.csv" in note and "neither a time nor a close column" in note]


def test_repeated_timestamps_keep_the_last_and_are_said_once(place: Place) -> None:
    cells = place.bars[-1].split(",")
    place.write("SP500.csv", [*place.bars, ",".join([*cells[:4], "9999", cells[5]])])
    series, notes = read_series(configuration.load(place.settings), [])
    assert series[0].bars.close[-1] == 9999
    assert len([note for note in notes if "repeat a timestamp" in note]) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--models", "totto"], ["totto", "toto"]),
        (["--trials", "0"], ["--trials"]),
        (["--trials", "1000001"], ["--trials", "1000000"]),  # not more: where it is taken, each is a row
        (["--gpus", "0", "--cpus", "1"], ["exclude each other"]),
        (["--gpus", "x"], ["--gpus", "'x'"]),
        (["--symbols", ","], ["--symbols"]),
        (["--nonsense"], ["--nonsense"]),
    ],
)
def test_usage(place: Place, words: list[str], said: list[str]) -> None:
    place.refused(place.launch(*words), *said, code=2)


def test_usage_of_other_commands(place: Place) -> None:
    place.refused(place.invoke(cli.promote, "--min-improvement", "nan"), "--min-improvement", "nan", code=2)
    place.refused(place.invoke(cli.promote, "--max-p", "nan"), "--max-p", code=2)
    for option in ("--output", "--markdown"):
        place.refused(place.invoke(cli.studies, "report", option, str(place.folder)), option, "directory", code=2)


def test_too_many_trials_in_the_settings(place: Place) -> None:
    place.settings.write_text(place.settings.read_text().replace("[search]", "[search]\ntrials = 1000001"))
    place.refused(place.launch(), "[search] trials", "1000000")


def test_a_gpu_that_is_not_there(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    place.refused(place.invoke(cli.launch_workers, "--gpus", "7"), "--gpus 7", "no such GPU")


def test_an_unknown_aggregate_in_the_settings(place: Place) -> None:
    place.settings.write_text(place.settings.read_text().replace("[toto]", '[toto]\naggregates = ["meen"]'))
    place.refused(place.launch(), "[toto] aggregates", "meen")


def test_databases_that_cannot_be_used(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.refused(place.launch(url="postgresql://u:hunter2@127.0.0.1:1/d"), "refused")
    assert "hunter2" not in place.refused(place.launch(url="postgresql://u:hunter2@h:54x32/d"), "PORT")
    assert "hunter2" not in place.refused(place.launch(url="postgresql://u:hunter2@h:99999/d"), "65535")
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    wrong = place.launch(url=place.url.replace("studies@", "studies:hunter3@"))
    line = place.refused(wrong, "password authentication failed")
    assert "hunter" not in line


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.unembed.weight"]
    save_file(tensors, folder / "model.safetensors")


def extra_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "surplus": np.zeros(3, np.float32)}, folder / "model.safetensors")


def wrong_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.unembed.bias": np.zeros(3, np.float32)}, folder / "model.safetensors")


def pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncated, "model.safetensors"),
        (missing_tensor, "unembed.weight"),
        (extra_tensor, "surplus"),
        (wrong_shape, "unembed.bias"),
        (pickle, "safetensors"),
    ],
)
def test_checkpoints_that_do_not_fit(place: Place, damage: Callable[[Path], None], said: str) -> None:
    folder = place.folder / "weights"
    shutil.copytree(TINY, folder)
    damage(folder)
    place.settings.write_text(place.settings.read_text().replace("toto-tiny", "./weights"))
    place.refused(place.launch(), said)


def test_a_hub_that_cannot_be_reached_says_how_to_name_a_folder(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    place.settings.write_text(place.settings.read_text().replace("toto-tiny", "Datadog/Toto-Open-Base-1.0"))
    place.refused(place.launch(), "Datadog/Toto-Open-Base-1.0", "folder")


def test_a_corrupt_promoted_file_is_left_as_it_is(place: Place) -> None:
    path = place.folder / "hyperparams" / "best" / "SP500.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"symbol": "SP500", ')
    place.refused(place.launch(), "best/SP500.json")
    assert path.read_text() == '{"symbol": "SP500", '


def test_a_log_folder_that_cannot_be_made_is_said_before_a_study_is(place: Place) -> None:
    (place.folder / "file").touch()
    text = place.settings.read_text().replace('log_dir = "logs"', 'log_dir = "file/logs"')
    place.settings.write_text(text)
    place.refused(place.launch(), "[workers] log_dir", "file is not a folder")
    (place.folder / "closed").mkdir(mode=0o500)
    place.settings.write_text(text.replace("file/logs", "closed/logs"))
    if not os.access(place.folder / "closed", os.W_OK):  # root writes everywhere
        place.refused(place.launch(), "[workers] log_dir", "closed cannot be written to")


def test_promote_before_any_study(place: Place) -> None:
    place.refused(place.invoke(cli.promote), place.suggested("launch-workers"))
    place.refused(place.invoke(cli.promote, "--min-improvement", "2"), "--min-improvement", code=2)


def open_study(place: Place) -> studying.Study:
    """A study as launch-workers opens it, unfinished."""
    config = configuration.load(place.settings)
    series, _ = read_series(config, [])
    checkpoint = checkpoint_fingerprint(config, "toto")
    (opened,) = studying.open_studies(place.storage, config, series, ["toto"], {"toto": checkpoint})
    return opened.study


def mismatch(place: Place) -> str:
    result = place.launch()
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert not (place.folder / "logs").exists()
    return line


def test_changed_history_under_an_unfinished_study(place: Place) -> None:
    study = open_study(place)
    place.write("SP500.csv", with_cell(place.bars, 20, 4, "1234.5"))
    line = mismatch(place)
    assert study.name in line
    assert "the bars up to its last bar" in line
    assert "studies retire" in line
    # Rows that are appended change nothing: the study goes on at the bars it was opened on.
    later = "2019-01-02," + place.bars[-1].split(",", 1)[1]
    place.write("SP500.csv", [*place.bars, later])
    assert open_study(place) == study


def test_a_study_whose_last_bar_is_gone_names_the_file(place: Place) -> None:
    study = open_study(place)
    place.write("SP500.csv", place.bars[:-1])
    line = mismatch(place)
    assert "SP500.csv" in line
    assert study.name in line


def test_what_was_parked_is_confirmed_anew_when_it_is_tried_again(place: Place) -> None:
    study = open_study(place)
    slots.park_study(place.storage, study.study_id, "no memory", parked_s=0)
    done = {"r": json.dumps(to_json(evidence()))}
    place.storage.transaction(
        lambda c: c.execute(text("update slots set state = 'done', result = cast(:r as jsonb) where stage = 2"), done)
    )
    assert free_counts(place.storage, [study.study_id]) == {}
    assert open_study(place) == study
    progress = study_progress(place.storage)[study.study_id]
    assert (progress.parked, progress.open) == (0, 101)  # 100 trials and the confirmation
    assert stage_results(place.storage, study.study_id, slots.CONFIRMATION) == {}


def test_changed_search_space_under_an_existing_study(place: Place) -> None:
    open_study(place)
    place.settings.write_text(place.settings.read_text().replace("[toto]", "[toto]\nnum_samples = [64]"))
    assert "search space" in mismatch(place)


def test_retire_makes_room_for_a_new_study(place: Place) -> None:
    study = open_study(place)
    place.settings.write_text(place.settings.read_text().replace("[toto]", "[toto]\nnum_samples = [64]"))
    result = place.invoke(cli.studies, "retire", study.name)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{study.name}~")
    fresh = open_study(place)
    assert fresh.name == study.name
    assert fresh.study_id != study.study_id
    assert place.invoke(cli.studies, "retire", "NONE/toto@2020-01-01").exit_code == 1


def test_a_retired_study_is_shown_and_brought_back(place: Place) -> None:
    study = open_study(place)
    retired = place.invoke(cli.studies, "retire", study.name).stdout.strip()
    missing = place.invoke(cli.studies, "show", study.name)
    assert (missing.exit_code, f"studies show {retired}" in missing.stderr) == (1, True)
    shown = json.loads(place.invoke(cli.studies, "show", retired, "--json").stdout)
    assert (shown["study"], shown["budget"]) == (retired, 100)
    assert json.loads(place.invoke(cli.studies, "list", "--json").stdout) == []
    again = place.invoke(cli.studies, "retire", retired)
    assert (again.exit_code, "retired already" in again.stderr) == (1, True)

    fresh = open_study(place)
    refused = place.invoke(cli.studies, "retire", "--undo", study.name)
    assert (refused.exit_code, f"there is a study {study.name} already" in refused.stderr) == (1, True)
    assert {one.name for one in studying.list_studies(place.storage, retired=True)} == {retired}
    place.storage.delete_study(fresh.study_id)
    assert place.invoke(cli.studies, "retire", "--undo", study.name).stdout.strip() == study.name
    assert [one.study_id for one in studying.list_studies(place.storage)] == [study.study_id]
    nothing = place.invoke(cli.studies, "retire", "--undo", study.name)
    assert (nothing.exit_code, "no study" in nothing.stderr) == (1, True)


def test_a_name_that_is_too_long_to_retire(place: Place) -> None:
    name = f"SP500/toto@{'1' * 490}"
    study_rows.create_study(place.storage, name, {}, "mae", lambda *_: None)
    result = place.invoke(cli.studies, "retire", name)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "512" in result.stderr


def test_a_list_of_some_studies(place: Place) -> None:
    study = open_study(place)

    def listed(*words: str) -> list[str]:
        return [row["study"] for row in json.loads(place.invoke(cli.studies, "list", "--json", *words).stdout)]

    assert listed("--symbols", "SP500", "--models", "toto", "--newest") == [study.name]
    assert listed("--symbols", "NASDAQ") == listed("--models", "kronos") == []
    assert "no such study" in place.invoke(cli.studies, "list", "--symbols", "NASDAQ").stderr
    assert place.invoke(cli.studies, "list", "--models", "totto").exit_code == 2


def test_a_copy_made_with_optuna_is_not_gone_on_with(place: Place) -> None:
    study = open_study(place)
    retired = retiring.retire(place.storage, study.name)
    names = {"from_study_name": retired, "to_study_name": study.name}
    optuna.copy_study(from_storage=place.storage, to_storage=place.storage, **names)
    for result in (place.launch(), place.invoke(cli.studies, "confirm", study.name, "--cpus", "1")):
        assert (result.exit_code, f"studies retire {study.name}" in result.stderr) == (1, True)
        assert len(result.stderr.splitlines()) == 1


def test_list_and_show(place: Place) -> None:
    empty = place.invoke(cli.studies, "list", "--json")
    assert json.loads(empty.stdout) == []
    study = open_study(place)
    (row,) = json.loads(place.invoke(cli.studies, "list", "--json").stdout)
    assert (row["study"], row["state"], row["done"], row["budget"]) == (study.name, "running", 0, 100)
    assert study.name in place.invoke(cli.studies, "list").stdout
    shown: dict[str, Any] = json.loads(place.invoke(cli.studies, "show", study.name, "--json").stdout)
    assert shown["definition"]["as_of"] == study.as_of
    assert study.name in place.invoke(cli.studies, "show", study.name).stdout
    missing = place.invoke(cli.studies, "show", "NONE/toto@2020-01-01")
    assert missing.exit_code == 1
    assert missing.stderr.endswith(f"see: {place.suggested('studies list')}\n")


def test_url_hides_the_password(place: Place, database_server: Any) -> None:
    password = database_server.passfile.read_text().strip().rsplit(":", 1)[1]
    url = place.url.replace("studies@", f"studies:{password}@")
    for words in (["url"], ["url", "--export"]):
        result = place.invoke(cli.studies, *words, url=url)
        assert result.exit_code == 0
        assert password not in result.output
        assert "postgresql://studies@127.0.0.1" in result.stdout


def test_the_private_server_is_started_used_and_stopped(
    place: Place, scratch: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = scratch / "private"
    place.settings.write_text(place.settings.read_text() + f'[storage]\ndata_dir = "{folder}"\n')

    def studies(*words: str) -> Result:
        return CliRunner().invoke(cli.studies, [*words, "--config", str(place.settings)], env=dict(os.environ))

    before = studies("list")
    assert before.exit_code == 1
    assert place.suggested("launch-workers") in before.stderr
    assert not folder.exists()
    exported = studies("url", "--export").stdout.splitlines()
    assert exported[0].startswith("export OPTUNA_STORAGE=postgresql://studies@127.0.0.1:")
    assert exported[1] == f"export PGPASSFILE={folder / 'pgpass'}"
    assert studies("list", "--json").stdout == "[]\n"

    alone = studies("url", "--host", "db.lan")
    assert alone.exit_code == 1
    assert alone.stderr.startswith("error: [storage] listen is 127.0.0.1, which lets no other host in")
    place.settings.write_text(place.settings.read_text() + 'listen = "0.0.0.0"\n')
    here = studies("url")
    assert here.stdout.startswith("postgresql://studies@127.0.0.1:")
    assert f"'{place.suggested('studies stop')}' and the next start apply it" in caplog.text
    caplog.clear()
    assert studies("stop").stdout == "stopped\n"
    there = studies("url", "--host", "db.lan")
    assert there.stdout.startswith("postgresql://studies@db.lan:")
    assert caplog.text == there.stderr == ""
    assert studies("stop").stdout == "stopped\n"
    assert studies("stop").stdout == "not running\n"


COMMANDS = [cli.launch_workers, cli.promote, *cli.studies.commands.values()]


def ask(command: click.Command, option: str) -> str:
    """What a command prints for an option, called as from a shell."""
    is_part = command in cli.studies.commands.values()
    result = CliRunner().invoke(cli.studies if is_part else command, [*([str(command.name)] * is_part), option])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_help_with_an_example(command: click.Command) -> None:
    text = ask(command, "--help")
    assert command.help
    assert "--config" in text
    assert "STUDIES_CONFIG" in text
    assert f"studies {command.name}" in text or f"\n  {command.name} " in text


@pytest.mark.parametrize("command", [cli.studies, *COMMANDS], ids=lambda command: command.name)
def test_every_command_knows_h_and_version(command: click.Command) -> None:
    assert ask(command, "-h") == ask(command, "--help")
    assert ask(command, "--version") == f"forecast-studies, version {version('forecast-studies')}\n"


def test_the_help_of_studies_lists_each_command_once_under_a_heading() -> None:
    lines = ask(cli.studies, "--help").splitlines()
    first = lines.index("Look at and keep studies:")
    headings = ("Use and watch:", "Learn:", "The server and the machine:")
    assert all(heading in lines for heading in headings)
    listed = [line.split()[0] for line in lines[first + 1 :] if line and line not in headings]
    assert listed[:2] == ["list", "show"]
    assert sorted(listed) == sorted(cli.studies.commands)
    assert "Commands:" not in lines
