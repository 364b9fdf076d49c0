"""The dashboard: what is written for it, what a browser shows of it, and that its server outlasts the database's."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import optuna_dashboard
import pytest
from browser import Tab
from places import INCUMBENT
from places import StudyPlace as Place
from served import served

from launch import cli
from launch.views import facts, notes
from storage import board, database, embedded, slots
from storage.progress import study_progress
from studies import working
from studies.study import Study

BIN = Path(sys.executable).parent
ASIDE = "<script>alert(1)</script> | `rm`"  # an error's text, which is not the page's


def attributes(place: Place, study: Study) -> dict[str, Any]:
    return place.storage.get_study_user_attrs(study.study_id)


def plots_of(place: Place, study: Study) -> dict[str, Any]:
    """The stored figures by id, each of which must be JSON."""
    attrs = place.storage.get_study_system_attrs(study.study_id)
    chunks: dict[str, dict[int, str]] = {}
    for key, value in attrs.items():
        if key.startswith(board.PLOT):
            name, number = key.removeprefix(board.PLOT).rsplit(":", 1)
            chunks.setdefault(name, {})[int(number)] = value
    return {name: json.loads("".join(parts[n] for n in range(len(parts)))) for name, parts in chunks.items()}


def images_of(place: Place, study: Study) -> list[dict[str, Any]]:
    attrs = place.storage.get_study_system_attrs(study.study_id)
    return [json.loads(value) for key, value in attrs.items() if key.startswith(board.ARTIFACT)]


def note_of(place: Place, study: Study) -> str:
    study_there = optuna.load_study(study_name=study.name, storage=place.storage)
    return optuna_dashboard.get_note(study_there).replace("\u00a0\u00a0\u00a0", "").replace("\u00a0", " ")


# --- what is written ------------------------------------------------------------------------------------------


def test_a_study_says_how_it_stands_as_it_goes(place: Place, folder: Path) -> None:
    place.put("best", INCUMBENT)
    study = place.open().study
    run, evaluator = place.run(study), place.evaluator()
    clock = working.StageClock(place.storage, [evaluator])
    for _ in range(3):
        slot = slots.claim(place.storage, study.study_id, worker="host:1", lease_s=60)
        assert slot is not None
        working.work(place.storage, run, slot, evaluator, attrs={"worker": "host:1"}, clock=clock)
    notes.update(place.storage, folder, [study])
    note = note_of(place, study)
    assert note.startswith(f"# SP500 with toto, bars up to {study.as_of}\n")
    assert "running: 2 of 6 trials" in note
    assert "The confirmation comes first." in note
    assert "`launch-workers --symbols SP500 --models toto`" in note
    best = place.storage.get_best_trial(study.study_id)
    assert f"{100 * (best.value or 0):.4f} %" in note
    assert set(plots_of(place, study)) == {"studies-best-so-far"}
    assert images_of(place, study) == []

    result = place.finish(study)
    notes.update(place.storage, folder, [study])
    note = note_of(place, study)
    assert "finished: 6 of 6 trials" in note
    assert "`promote --symbols SP500`" in note
    for one in (*result["candidates"], result["baselines"]["incumbent"], result["no_change"]):
        assert f"{100 * one['confirmation']['mae']:.4f} %" in note
        assert f"{100 * one['test']['mae']:.4f} %" in note
    confirmed = min(result["candidates"], key=lambda one: one["confirmation"]["mae"])
    of_trials = [f"| trial {one['trial']} |" for one in result["candidates"] if one["source"] == "trial"]
    assert of_trials
    assert [row for row in of_trials if row not in note] == []
    improvement = 1 - confirmed["confirmation"]["mae"] / result["baselines"]["incumbent"]["confirmation"]["mae"]
    assert f"{100 * improvement:+.2f} %" in note
    assert f"improvement {100 * improvement:+.2f} %" in attributes(place, study)["confirmed"]
    assert set(plots_of(place, study)) == {"studies-best-so-far", "studies-error-by-window", "studies-forecast"}
    (image,) = images_of(place, study)
    assert f"(/artifacts/{study.study_id}/{image['artifact_id']})" in note
    assert (folder / image["artifact_id"]).read_bytes().startswith(b"\x89PNG")


def test_what_is_written_twice_is_written_once(place: Place, folder: Path, study: Study) -> None:
    notes.update(place.storage, folder, [study])
    before = place.storage.get_study_system_attrs(study.study_id)
    files = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    errors: list[BaseException] = []

    def again() -> None:
        storage = database.open_storage(place.url, wait_s=10, create=False)
        try:
            for _ in range(5):
                notes.update(storage, folder, [study])
        except BaseException as error:  # noqa: BLE001 - shown by the main thread
            errors.append(error)
        storage.engine.dispose()

    hosts = [threading.Thread(target=again) for _ in range(3)]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join()
    assert errors == []
    assert place.storage.get_study_system_attrs(study.study_id) == before
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == files


def test_what_people_put_there_stays(place: Place, folder: Path, study: Study) -> None:
    theirs = optuna.load_study(study_name=study.name, storage=place.storage)
    folder.mkdir()
    store = optuna.artifacts.FileSystemArtifactStore(folder)
    upload = place.folder / "mine.png"
    upload.write_bytes(b"png")
    mine = optuna.artifacts.upload_artifact(artifact_store=store, file_path=str(upload), study_or_trial=theirs)
    figure = notes.plots(facts_of(place, study))["forecast"]
    optuna_dashboard.save_plotly_graph_object(theirs, figure, graph_object_id="mine")
    theirs.set_user_attr("owner", "me")
    optuna_dashboard.save_note(theirs, "a remark " * 1000)
    version = place.storage.get_study_system_attrs(study.study_id)[board.NOTE_VERSION]

    notes.update(place.storage, folder, [study])
    (ours,) = [image["artifact_id"] for image in images_of(place, study) if image["artifact_id"] != mine]
    assert "mine" in plots_of(place, study)
    assert attributes(place, study)["owner"] == "me"
    assert "a remark" not in note_of(place, study)
    assert place.storage.get_study_system_attrs(study.study_id)[board.NOTE_VERSION] == version + 1

    # Tried anew, the study has no confirmation: what showed one goes, and its image with it.
    place.storage.transaction(lambda c: slots.reopen(c, study.study_id, slots.CONFIRMATION, params={}))
    notes.update(place.storage, folder, [study])
    assert set(plots_of(place, study)) == {"mine", "studies-best-so-far"}
    assert [image["artifact_id"] for image in images_of(place, study)] == [mine]
    assert {path.name for path in folder.iterdir()} == {mine}
    assert ours != mine
    assert "confirmed" not in attributes(place, study)


def facts_of(place: Place, study: Study) -> facts.StudyFacts:
    return facts.gather(place.storage, study, study_progress(place.storage)[study.study_id])


def test_a_decision_stays_while_its_confirmation_does(place: Place, folder: Path, study: Study) -> None:
    settings = place.folder / "studies.toml"
    settings.write_text(settings.read_text() + f'[storage]\nartifacts_dir = "{folder}"\n')
    row = json.loads(place.invoke(cli.promote, "--json", "--dry-run").stdout)[0]
    assert "decision" not in attributes(place, study)  # a dry run writes nothing
    assert place.invoke(cli.promote).exit_code == 0
    decision = attributes(place, study)["decision"]
    assert decision.startswith("promoted on 20")
    assert f"improved (improvement {100 * row['improvement']:+.2f} %" in decision
    assert decision in note_of(place, study)
    notes.update(place.storage, folder, [study])  # as a later run does
    assert attributes(place, study)["decision"] == decision
    assert "`launch-workers --symbols SP500`" in note_of(place, study)
    assert place.invoke(cli.promote).exit_code == 0  # a second time: what put it in use stays to be seen
    said = attributes(place, study)["decision"]
    assert "unchanged since 20" in said
    assert f"improved (improvement {100 * row['improvement']:+.2f} %, 95 % interval" in said
    assert f"skill {100 * row['skill']:+.2f} %" in said
    assert said in note_of(place, study)
    shown = " ".join(place.invoke(cli.studies, "show", study.name).stdout.split())
    assert f"in use promoted on 20{said.split('promoted on 20')[1]}" in shown
    place.storage.transaction(
        lambda c: slots.reopen(c, study.study_id, slots.CONFIRMATION, params={"incumbent": row_params(place, study)})
    )
    place.finish(study)
    notes.update(place.storage, folder, [study])
    assert attributes(place, study)["decision"] == facts.UNDECIDED
    assert "None yet." in note_of(place, study)


def row_params(place: Place, study: Study) -> Mapping[str, Any]:
    return place.trials(study)[0].params | {"context_length": 256}


def test_what_is_parked_is_told_without_meaning_anything(place: Place, folder: Path) -> None:
    study = place.open().study
    slots.park_study(place.storage, study.study_id, ASIDE)
    notes.update(place.storage, folder, [study])
    note = note_of(place, study)
    assert "## Parked work" in note
    assert "`<script>alert(1)</script> / 'rm'`" in note
    assert "and 2 more; see `studies show" in note  # 7 slots: 6 trials and the confirmation
    assert f"0 of {Place.TRIALS} trials, 7 parked" in attributes(place, study)["progress"]


def test_a_folder_that_takes_no_image_costs_the_image_only(place: Place, study: Study) -> None:
    blocked = place.folder / "file"
    blocked.write_text("")
    said: list[str] = []
    keeper = notes.NoteWriter(
        place.storage, blocked / "artifacts", [study], report=lambda: None, say=said.append, log=blocked
    )
    keeper.write()
    keeper.write()
    assert len(said) == 1
    assert "[storage] artifacts_dir" in said[0]
    assert "## Confirmation" in note_of(place, study)
    assert images_of(place, study) == []


def test_a_study_that_is_deleted_meanwhile_is_no_error(place: Place, folder: Path, study: Study) -> None:
    found = facts_of(place, study)
    place.storage.delete_study(study.study_id)
    notes.update(place.storage, folder, [study])
    put = {"note": "n", "plots": notes.plots(found), "attributes": {"a": "b"}, "image": None, "folder": folder}
    assert not board.put(place.storage, study.study_id, **put)


def test_only_what_moved_is_written_during_a_run(
    place: Place,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = place.open().study
    written: list[list[str]] = []
    monkeypatch.setattr(notes, "update", lambda storage, folder, studies: written.append([s.name for s in studies]))
    reports: list[int] = []
    keeper = notes.NoteWriter(
        place.storage, folder, [study], report=lambda: reports.append(1), say=print, log=folder / "log"
    )
    keeper()
    assert (len(reports), written) == (1, [])  # a run's first seconds are its own
    keeper.write()
    place.finish(study)
    keeper.write()
    keeper.write()
    assert written == [[], [study.name], []]


def test_a_study_is_noted_as_it_is_finished_and_not_when_all_are(
    place: Place, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notes, "FINISHED_EVERY_S", 0.0)
    study = place.open().study
    written: list[list[str]] = []
    monkeypatch.setattr(notes, "update", lambda storage, folder, studies: written.append([s.name for s in studies]))
    keeper = notes.NoteWriter(place.storage, folder, [study], report=lambda: None, say=print, log=folder / "log")
    keeper()
    place.finish(study)
    keeper()
    keeper()
    assert written == [[], [study.name], []]


def test_a_finished_study_that_cannot_be_noted_is_not_drawn_again_and_again(
    place: Place, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notes, "FINISHED_EVERY_S", 0.0)
    study = place.open().study
    tries: list[Any] = []

    def broken(*words: Any) -> None:
        tries.append(words)
        raise ValueError("a figure without end")

    monkeypatch.setattr(notes, "update", broken)
    said: list[str] = []
    log = place.folder / "log"
    keeper = notes.NoteWriter(place.storage, folder, [study], report=lambda: None, say=said.append, log=log)
    place.finish(study)
    for _ in range(5):
        keeper()
    assert len(tries) == len(said) == 1


# --- what is shown --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_in_a_browser(place: Place, folder: Path, study: Study, tab: Tab) -> None:
    notes.update(place.storage, folder, [study])
    (image,) = images_of(place, study)
    with served(place, folder) as address:
        tab.open(f"{address}/dashboard", study.name)  # the list
        tab.page.get_by_text("Direction: MINIMIZE").wait_for()
        tab.check()

        page = f"{address}/dashboard/studies/{study.study_id}"
        tab.open(page, "Forecast vs. actual")  # its plots
        for title in ("Error by window", "Optimization history"):
            tab.page.get_by_text(title).first.wait_for()
        tab.page.get_by_text("6 of 6 trials").first.wait_for()  # its attributes
        picture = tab.page.locator(f"img[src*='{image['artifact_id']}']").first
        picture.scroll_into_view_if_needed()
        assert picture.evaluate("async (img) => { await img.decode(); return img.naturalWidth }") == 1000
        drawn = tab.page.locator("[id$='studies-forecast'] .scatterlayer .trace")
        assert drawn.count() == 7  # band, best and incumbent of both parts, and the closes
        tab.check()

        tab.open(f"{page}/note", f"SP500 with toto, bars up to {study.as_of}")  # its note
        tab.page.get_by_text("promote --symbols SP500").wait_for()
        assert tab.page.locator("table").count() == 3
        shown = tab.page.locator("img[alt='Forecast vs. actual']")
        assert shown.evaluate("async (img) => { await img.decode(); return img.naturalWidth }") == 1000
        tab.check()


def test_what_an_error_says_does_nothing_in_a_browser(place: Place, folder: Path, tab: Tab) -> None:
    study = place.open().study
    slots.park_study(place.storage, study.study_id, ASIDE)
    notes.update(place.storage, folder, [study])
    tab.page.on("dialog", lambda dialog: tab.complaints.append(dialog.message))
    with served(place, folder) as address:
        tab.open(f"{address}/dashboard/studies/{study.study_id}/note", "<script>alert(1)</script>")
        tab.check()


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_an_image_that_another_machine_has_is_said_to_be_there(place: Place, folder: Path, study: Study) -> None:
    notes.update(place.storage, folder, [study])
    (image,) = images_of(place, study)
    (folder / image["artifact_id"]).unlink()
    with served(place, folder) as address:
        status, line = get(f"{address}/artifacts/{study.study_id}/{image['artifact_id']}")
    assert status == 404
    assert "another machine may have it" in line


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture
def own_place(scratch: Path, tmp_path: Path) -> Iterator[list[str]]:
    """The command with a private server of its own and a free port."""
    settings = tmp_path / "studies.toml"
    settings.write_text(f'[storage]\ndata_dir = "{scratch / tmp_path.name}"\nartifacts_dir = "artifacts"\n')
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    yield [str(BIN / "studies"), "dashboard", "--config", str(settings), "--port", str(port)]
    embedded.stop(scratch / tmp_path.name)


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_line(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.readline()


def test_the_dashboard_outlasts_its_database_and_ends_on_ctrl_c(
    own_place: list[str], scratch: Path, tmp_path: Path
) -> None:
    data, port = scratch / tmp_path.name, own_place[-1]
    process = subprocess.Popen(own_place, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert wait_for_line(process) == f"http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
        address = f"http://127.0.0.1:{port}/api/studies"
        assert get(address) == (200, '{"study_summaries": []}')
        password = next(data.glob("*pass*")).read_text().strip().rsplit(":", 1)[-1]
        assert len(password) > 8
        assert password not in Path(f"/proc/{process.pid}/cmdline").read_text()

        embedded.stop(data)
        answers: list[tuple[int, str]] = []
        asking = threading.Thread(target=lambda: answers.append(get(address)))
        asking.start()  # waits for the server
        time.sleep(1)
        assert answers == []
        embedded.start(data)
        asking.join()
        assert answers == [(200, '{"study_summaries": []}')]
        assert get(address)[0] == 200

        taken = subprocess.run(own_place, capture_output=True, text=True, timeout=60, check=False)
        assert (taken.returncode, taken.stdout) == (1, "")
        assert taken.stderr == f"error: 127.0.0.1:{port}: Address already in use; name another with --host and --port\n"

        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=10)
        assert (process.returncode, rest) == (130, "")
    finally:
        process.kill()
        process.communicate()


def test_a_database_that_stays_away_is_one_line_and_no_traceback(
    own_place: list[str], scratch: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "studies.toml"
    settings.write_text(settings.read_text() + "wait_s = 0.5\n")
    process = subprocess.Popen(own_place, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        wait_for_line(process)
        embedded.stop(scratch / tmp_path.name)
        assert get(f"http://127.0.0.1:{own_place[-1]}/api/studies")[0] == 500
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=10)
        assert len(said.splitlines()) == 1
        assert "no answer for" in said
    finally:
        process.kill()
        process.communicate()


def test_plain_optuna_dashboard_works_too(place: Place, folder: Path, study: Study) -> None:
    settings = place.folder / "studies.toml"
    settings.write_text(settings.read_text() + f'[storage]\nartifacts_dir = "{folder}"\n')
    notes.update(place.storage, folder, [study])
    (image,) = images_of(place, study)
    exported = dict(
        line.removeprefix("export ").split("=", 1)
        for line in place.invoke(cli.studies, "url", "--export").stdout.splitlines()
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        BIN / "optuna-dashboard",
        exported["OPTUNA_STORAGE"],
        "--artifact-dir",
        exported["STUDIES_ARTIFACTS_DIR"],
    ]
    process = subprocess.Popen([*map(str, command), "--port", str(port)], stderr=subprocess.PIPE, env=dict(os.environ))
    try:
        wait_for_port(port)
        status, found = get(f"http://127.0.0.1:{port}/api/studies/{study.study_id}")
        assert status == 200
        assert {plot["id"] for plot in json.loads(found)["plotly_graph_objects"]} == set(plots_of(place, study))
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port}/artifacts/{study.study_id}/{image['artifact_id']}"
        ) as answer:
            assert answer.read() == (folder / image["artifact_id"]).read_bytes()
    finally:
        process.kill()
        process.communicate()
