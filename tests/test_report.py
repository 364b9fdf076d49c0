"""The report: one page that opens from disk without a network, and the same as Markdown."""

from __future__ import annotations

import json
import os
import re
import resource
import threading
from pathlib import Path

import optuna
import optuna_dashboard
import pytest
from browser import Tab
from places import StudyPlace as Place
from places import last_bars

from launch import cli
from launch.views import figures
from launch.views.monitor import TITLE
from storage import slots
from studies.forecasting import Forecasts
from studies.study import Study

ASIDE = "</script><script>document.title = 'taken'</script> | `rm`"  # an error's text, which is not the page's


def park_two(place: Place, study: Study) -> None:
    place.storage.transaction(lambda c: slots.raise_budget(c, study.study_id, 8))
    slots.park_study(place.storage, study.study_id, ASIDE)


def report(place: Place, *words: str) -> tuple[str, str]:
    """The page and the Markdown."""
    page, tables = place.folder / "report.html", place.folder / "report.md"
    done = place.invoke(cli.studies, "report", "--output", str(page), "--markdown", str(tables), *words)
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == [str(page), str(tables)]
    return page.read_text(), tables.read_text()


def table_after(tables: str, heading: str) -> list[dict[str, str]]:
    """The rows of the first table after a heading of the Markdown."""
    lines = tables.split(f"## {heading}\n\n", 1)[1].split("\n\n", 1)[0].splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_what_monitor_found_since_the_promotion_is_in_the_report_and_the_note(place: Place, study: Study) -> None:
    assert place.invoke(cli.promote).exit_code == 0
    promoted = json.loads(place.promoted_file("SP500").read_text())
    page, tables = report(place)
    assert TITLE not in page + tables
    with Forecasts(place.config(), storage=place.storage, environment={}) as forecasts:
        for count in range(380, 400):
            place.write("SP500.csv", last_bars("SP500", 400)[: count + 1])
            assert not forecasts.ask(["SP500"]).refused
    place.write("SP500.csv", last_bars("SP500", 400))
    for words in (("settle",), ("monitor",)):
        ended = place.invoke(cli.studies, *words)
        assert ended.exit_code == 0, ended.output
    (found,) = json.loads(place.invoke(cli.studies, "monitor", "--json").stdout)
    readings = {one["name"]: one for one in found["readings"]}
    assert readings["MAE"]["reference"] == promoted["metadata"]["selection_value"]
    page, tables = report(place)
    assert TITLE in page
    (row,) = table_after(tables, TITLE)
    assert (row["symbol"], row["n"], row["advice"]) == ("SP500", "20", found["advice"])
    assert row["MAE"] == f"{100 * readings['MAE']['value']:.4f} %"
    note = optuna_dashboard.get_note(optuna.load_study(study_name=study.name, storage=place.storage))
    panel = note.split(f"## {TITLE}", 1)[1].replace("\u00a0", " ")
    assert found["advice"] in panel
    assert row["MAE"] in panel
    assert f"{readings['MAE']['needed']:,}" in panel
    assert place.invoke(cli.promote).exit_code == 0  # which rewrites the note
    note = optuna_dashboard.get_note(optuna.load_study(study_name=study.name, storage=place.storage))
    assert f"## {TITLE}" in note


def test_tables_say_what_promote_says_and_what_was_measured(place: Place, study: Study) -> None:
    row = json.loads(place.invoke(cli.promote, "--json", "--dry-run").stdout)[0]
    _, tables = report(place)
    (decided,) = table_after(tables, "Decisions")
    assert (decided["symbol"], decided["study"]) == ("SP500", study.name)
    assert decided["improvement"] == f"{100 * row['improvement']:+.2f} %"
    interval = f"{100 * row['improvement_low']:+.2f} to {100 * row['improvement_high']:+.2f} %"
    assert decided["95 % interval"] == interval
    assert decided["p"] == f"{row['p_value']:.3f}"
    assert (decided["decision"], decided["reason"]) == ("to be promoted", "improved")
    (listed,) = table_after(tables, "Studies")
    best = place.storage.get_best_trial(study.study_id)
    assert (listed["study"], listed["state"]) == (study.name, "finished")
    assert listed["search best"] == f"{100 * (best.value or 0):.4f} %"
    result = place.result(study)
    confirmed = [f"{100 * one['confirmation']['mae']:.4f} %" for one in result["candidates"]]
    assert all(mae in tables for mae in confirmed)
    assert "## Parked work" not in tables

    assert place.invoke(cli.promote).exit_code == 0
    _, tables = report(place)
    (used,) = [one for one in table_after(tables, "Configuration in use") if one["symbol"] == "SP500"]
    trial = row_trial(place)
    assert used["study"] == (study.name if trial is None else f"{study.name}, trial {trial}")
    evidence = {"improvement": decided["improvement"], "95 % interval": interval, "skill": decided["skill"]}
    assert {name: used[name] for name in evidence} == evidence
    assert (used["reason"], used["before it"]) == ("improved", "`toto num_samples=48 aggregate=quantile_0.90`")
    (decided,) = table_after(tables, "Decisions")
    assert decided["reason"] == f"unchanged since {used['promoted at'][:10]}"
    assert {name: decided[name] for name in evidence} == evidence

    path = place.promoted_file("SP500")
    content = json.loads(path.read_text())
    content["metadata"]["improvement_interval"] = ["a", None]
    path.write_text(json.dumps(content))
    _, tables = report(place)
    (used,) = [one for one in table_after(tables, "Configuration in use") if one["symbol"] == "SP500"]
    assert (used["reason"], used["improvement"]) == ("improved", evidence["improvement"])
    assert used["95 % interval"] == "-"


def row_trial(place: Place) -> int:
    return json.loads((place.folder / "hyperparams" / "best" / "SP500.json").read_text())["metadata"]["trial"]


def test_from_disk_in_a_browser(place: Place, study: Study, tab: Tab, monkeypatch: pytest.MonkeyPatch) -> None:
    park_two(place, study)
    shares = {"aggregate": 0.8, "num_samples": 0.2}  # eight trials are too few for real ones
    monkeypatch.setattr("studies.importance.importances", lambda storage, name: (shares, None))
    page, _ = report(place)
    requests: list[str] = []
    tab.page.on("request", lambda request: requests.append(request.url))
    path = (place.folder / "report.html").as_uri()
    tab.open(path, "Forecast studies")
    for figure in tab.page.locator(".figure").all():
        figure.scroll_into_view_if_needed()  # drawn when it comes near
    for text in (study.name, "Forecast vs. actual", "Error by window", "Optimization history", "Parameter importance"):
        found = tab.page.get_by_text(text).first
        found.scroll_into_view_if_needed()
        found.wait_for()
    tab.page.get_by_text(ASIDE).first.wait_for()  # shown as it is
    assert tab.page.title() == "Forecast studies"
    assert tab.page.locator(".js-plotly-plot").count() == 5  # the improvements and four of the study
    assert requests == [path]  # nothing else is loaded
    assert page.count("plotly.js v") == 1
    tab.check()


def test_parked_work_is_in_the_table(place: Place, study: Study) -> None:
    park_two(place, study)
    page, tables = report(place)
    parked = table_after(tables, "Parked work")
    assert [row["work"] for row in parked] == ["trial 6", "trial 7"]
    assert parked[0]["error"] == ASIDE.replace("|", "\\|").replace("<", "&lt;")
    assert ASIDE not in page
    assert "Parameter importance" in page  # of the confirmed grid, as there are too few trials
    assert "parameter importance: " not in page


def test_before_anything_is_confirmed(place: Place, tab: Tab) -> None:
    study = place.open().study
    page, tables = report(place)
    assert "parameter importance: 0 complete trials; 20 are needed to tell" in page
    (row,) = table_after(tables, "Decisions")
    assert row["reason"] == "not confirmed"
    assert row["next step"] == f"`{place.suggested('launch-workers --symbols SP500 --models toto')}`"
    assert f"## {study.name}" in tables
    tab.open((place.folder / "report.html").as_uri(), "not confirmed")
    tab.check()


def test_json_in_the_page_cannot_end_its_element() -> None:
    from launch.views.report import _embedded

    figure = figures.best_so_far({0: 0.01})
    assert figure is not None
    figure.update_layout(title={"text": "</script><!-- & -->"})
    embedded = str(_embedded(figure))
    assert not set("<>&") & set(embedded)
    assert json.loads(embedded)["layout"]["title"]["text"] == "</script><!-- & -->"


def test_errors_are_one_line(place: Place, tmp_path: Path) -> None:
    nothing = place.invoke(cli.studies, "report", "--output", str(tmp_path / "r.html"))
    assert nothing.exit_code == 1
    assert "no study yet" in nothing.stderr
    place.open()
    blocked = place.invoke(cli.studies, "report", "--output", str(tmp_path / "absent" / "r.html"))
    assert blocked.exit_code == 1
    assert len(blocked.stderr.splitlines()) == 1
    assert "absent/r.html: No such file or directory; name another file with --output" in blocked.stderr
    for page, reason in (
        (tmp_path, "directory"),
        (Path("/proc/r.html"), "No such file"),
        (Path("/dev/full"), "No space"),
    ):
        unwritable = place.invoke(cli.studies, "report", "--output", str(page))
        assert unwritable.exit_code in (1, 2)
        assert reason in unwritable.stderr.splitlines()[-1]
        assert "Traceback" not in unwritable.stderr
    unknown = place.invoke(cli.studies, "report", "--symbols", "NONE")
    assert unknown.exit_code == 1
    assert "NONE: no study" in unknown.stderr


def test_a_report_that_finds_no_room_leaves_the_last_one_and_no_other_file(place: Place, tmp_path: Path) -> None:
    place.open()
    page = tmp_path / "pages" / "report.html"
    page.parent.mkdir()
    page.write_text("the last one")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))  # of a page of five
    try:
        failed = place.invoke(cli.studies, "report", "--output", str(page))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failed.exit_code == 1
    assert failed.stderr == f"error: {page}: File too large; name another file with --output or --markdown\n"
    assert [(path.name, path.read_text()) for path in page.parent.iterdir()] == [("report.html", "the last one")]


def test_what_is_no_file_is_written_to_and_not_replaced(place: Place, tmp_path: Path) -> None:
    """As root the device would be gone for every program."""
    place.open()
    pipe, link, target = tmp_path / "pipe", tmp_path / "link.html", tmp_path / "target.html"
    os.mkfifo(pipe)
    link.symlink_to(target)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    written = place.invoke(cli.studies, "report", "--output", str(link), "--markdown", str(pipe))
    assert written.exit_code == 0, written.output
    reader.join(10)
    assert read[0].startswith("# Forecast studies")
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert "<html" in target.read_text()
