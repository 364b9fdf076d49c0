"""The rows and the details that `studies list` and `studies show` print, and how they read in a narrow terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from evidence_builder import evidence, measured_configuration, unmeasured
from optuna.trial import TrialState, create_trial
from rich.console import Console

from launch.views import decisions, listing, tables
from launch.views.facts import confirmation_table
from launch.views.listing import StudyRow
from launch.views.tables import Column, Table, terminal
from storage import configs, database, slots, study_rows
from storage.retrying import RetryingStorage
from studies import importance
from studies import promoting as promote
from studies import study as studying
from studies.evidence import MeasuredConfiguration, params_text, to_json
from studies.promoted_file import InUse

DEFINITION = {
    "no_change_mae": 0.0125,
    "bars": "b" * 32,
    "checkpoint": "c" * 64,
    "windows": {"horizon": 1, "validation": 30},
}
NAME = "BTCUSD/toto@2026-03-19"


@pytest.fixture
def storage(database_url: str) -> Iterator[RetryingStorage]:
    storage = database.open_storage(database_url, wait_s=10, create=False)
    yield storage
    storage.engine.dispose()


def make(
    storage: RetryingStorage,
    name: str = NAME,
    *,
    trials: int = 0,
    baseline: float | None = None,
    clipped: float | None = None,
) -> int:
    """A study with so many complete trials, their values rising from 0.010, and a measured incumbent.

    clipped: the share that every trial says it clips.
    """

    def fill(connection: Any, study_id: int) -> None:
        slots.add(connection, study_id, slots.BASELINE, 0, label="incumbent", params={"aggregate": "mean"})
        slots.raise_budget(connection, study_id, max(trials, 1))
        slots.add(connection, study_id, slots.CONFIRMATION, 0, label="confirmation", params={})

    study_id = study_rows.create_study(storage, name, {"definition": DEFINITION}, "pct_return_mae", fill)
    slot = claim(storage, study_id)
    result = None if baseline is None else {"params": {"aggregate": "mean"}, "validation": {"mae": baseline}}
    slots.finish(storage, slot, result=result)
    study = optuna.load_study(study_name=name, storage=storage)
    knobs = {
        "num_samples": optuna.distributions.CategoricalDistribution([64, 128, 256]),
        "temperature": optuna.distributions.FloatDistribution(0.05, 0.4),
    }
    for number in range(trials):
        params = {"num_samples": [64, 128, 256][number % 3], "temperature": 0.06 + 0.3 * number / trials}
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                value=0.01 + number * 1e-5,
                params=params,
                distributions=knobs,
                user_attrs={} if clipped is None else {"clipped": clipped},
            )
        )
        slots.finish(storage, claim(storage, study_id), seconds={"encode": 3.0, "idle": 1.0})
    return study_id


def claim(storage: RetryingStorage, study_id: int) -> slots.Slot:
    slot = slots.claim(storage, study_id, worker="host:1", lease_s=60)
    assert slot is not None
    return slot


def confirmation(incumbent: MeasuredConfiguration) -> dict[str, Any]:
    """The result of a confirmation of three candidates, the second of them the best."""
    maes = {0: 0.0121, 7: 0.0119, 3: 0.0120}
    candidates = [
        measured_configuration(mae, validation=0.01, test=mae + 0.001, trial=trial, no_change_mae=1.0)
        for trial, mae in maes.items()
    ]
    return to_json(evidence(*candidates, incumbent=incumbent))


INCUMBENT = measured_configuration(0.0125, validation=0.0113, test=0.0126, params={"aggregate": "mean"})


def test_a_search_under_way(storage: RetryingStorage) -> None:
    make(storage, trials=4, baseline=0.0111)
    (row,) = listing.rows(storage)
    assert (row.study, row.symbol, row.model, row.as_of) == (NAME, "BTCUSD", "toto", "2026-03-19")
    assert (row.state, row.done, row.budget, row.parked, row.parked_reason) == ("running", 4, 4, 0, None)
    assert (row.best_mae, row.incumbent_mae) == (0.01, 0.0111)
    assert row.improvement == pytest.approx((0.0111 - 0.01) / 0.0111)
    assert row.skill == pytest.approx(1 - 0.01 / 0.0125)
    confirmed = (row.confirmed_mae, row.confirmed_incumbent_mae, row.confirmed_improvement, row.confirmed_skill)
    assert confirmed == (None, None, None, None)


def test_confirmed_numbers_are_compared_on_their_own_windows(storage: RetryingStorage) -> None:
    study_id = make(storage, trials=4, baseline=0.0111)
    slots.finish(storage, claim(storage, study_id), result=confirmation(INCUMBENT))
    (row,) = listing.rows(storage)
    assert row.state == "finished"
    assert (row.best_mae, row.incumbent_mae) == (0.01, 0.0113)  # what is in use may be another since the baselines
    assert row.improvement == pytest.approx((0.0113 - 0.01) / 0.0113)
    assert (row.confirmed_mae, row.confirmed_incumbent_mae) == (0.0119, 0.0125)
    assert row.confirmed_improvement == pytest.approx((0.0125 - 0.0119) / 0.0125)
    assert row.confirmed_skill == pytest.approx(1 - 0.0119)  # of the same candidate
    assert listing.rows(storage, [study_id]) == [row]
    assert listing.rows(storage, []) == []


def test_an_incumbent_that_could_not_be_confirmed(storage: RetryingStorage) -> None:
    study_id = make(storage, trials=4, baseline=0.0111)
    broken = unmeasured("out of memory on cuda:0", params={"aggregate": "mean"})
    slots.finish(storage, claim(storage, study_id), result=confirmation(broken))
    (row,) = listing.rows(storage)
    assert (row.incumbent_mae, row.confirmed_incumbent_mae, row.confirmed_improvement) == (0.0111, None, None)
    assert row.confirmed_mae == 0.0119
    assert "incumbent: out of memory on cuda:0" in shown(storage)


def test_a_study_that_is_opened_during_the_listing(storage: RetryingStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    make(storage)
    read = study_rows.best_values

    def opened_meanwhile(*words: Any) -> Any:
        make(storage, NAME.replace("BTCUSD", "AAPL"))
        return read(*words)

    monkeypatch.setattr(study_rows, "best_values", opened_meanwhile)
    assert [row.study for row in listing.rows(storage)] == [NAME]


def test_a_copy_made_with_optuna_has_no_work(storage: RetryingStorage) -> None:
    make(storage, trials=2)
    copy = NAME.replace("BTCUSD", "AAPL")
    optuna.copy_study(from_study_name=NAME, from_storage=storage, to_storage=storage, to_study_name=copy)
    (row, other) = listing.rows(storage)
    assert (row.study, row.state, row.done, row.budget, row.best_mae) == (copy, "no work", 0, 0, 0.01)
    assert other.state == "running"
    details = listing.details(storage, copy, Path("absent"))
    assert details is not None
    assert details.to_json()["trials"] == {"complete": 2}
    assert "no work" in shown(storage, name=copy)


def test_what_is_selected(storage: RetryingStorage) -> None:
    for symbol, model, day in [("A", "toto", 18), ("A", "toto", 19), ("A", "kronos", 17), ("B", "toto", 18)]:
        make(storage, f"{symbol}/{model}@2026-03-{day}")
    studies = studying.list_studies(storage)

    def names(**words: Any) -> list[str]:
        return [study.name.replace("@2026-03-", " ") for study in listing.Selection(**words).of(studies)]

    assert names() == ["A/kronos 17", "A/toto 18", "A/toto 19", "B/toto 18"]
    assert names(newest=True) == ["A/kronos 17", "A/toto 19", "B/toto 18"]
    assert names(symbols=["A"], models=["toto"]) == ["A/toto 18", "A/toto 19"]
    assert names(study_ids=[studies[1].study_id], newest=True) == ["A/toto 18"]


def test_parked_slots_and_their_reasons(storage: RetryingStorage) -> None:
    study_id = make(storage, baseline=None)
    for _ in range(slots.MAX_FAILURES):
        slots.fail(storage, claim(storage, study_id), "BTCUSD: samples are not finite [/bold]")
    slots.park_study(storage, study_id, "5 failures in a row")
    (row,) = listing.rows(storage)
    assert (row.state, row.parked) == ("parked", 2)
    assert row.parked_reason == "BTCUSD: samples are not finite [/bold]"
    assert (row.best_mae, row.incumbent_mae, row.improvement, row.skill) == (None, None, None, None)
    details = listing.details(storage, NAME, Path("absent"))
    assert details is not None
    printed = details.to_json()
    assert [(one["stage"], one["slot"], one["error"]) for one in printed["parked"]] == [
        (slots.TRIAL, 0, row.parked_reason),
        (slots.CONFIRMATION, 0, "5 failures in a row"),
    ]
    assert printed["confirmation"] is None
    text = shown(storage)
    assert "trial, slot 0: BTCUSD: samples are not finite [/bold]" in text
    assert "none recorded yet" in text


def shown(storage: RetryingStorage, width: int = 80, *, name: str = NAME) -> str:
    details = listing.details(storage, name, Path("absent"))
    assert details is not None
    json.dumps(details.to_json())
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(listing.render(details, width))
    text = captured.get()
    assert all(len(line.rstrip()) <= width for line in text.split("\n"))
    return text


def test_importances_and_seconds(storage: RetryingStorage) -> None:
    study_id = make(storage, trials=importance.NEEDED, baseline=0.0111)
    slots.finish(storage, claim(storage, study_id), result=confirmation(INCUMBENT))
    found, missing = importance.importances(storage, NAME)
    assert found is not None
    assert missing is None
    assert list(found) == ["temperature", "num_samples"]  # the values rise with the temperature alone
    assert sum(found.values()) == pytest.approx(1)
    assert found["temperature"] > 0.8
    text = shown(storage)
    assert re.search(r"encode +1 min +75.0 %\n *idle +20 s +25.0 %", text)
    assert re.search(r"temperature +\d\d\.\d %", text)
    assert re.search(r"trial 7 +1.1900 % +\+4.80 % +\+98.81 % +1.2900 % +-2.38 % ", text)
    assert re.search(r"trial 0 +1.0000 % +\+11.50 % +\+20.00 %", text)
    assert "20/20 trials (20 complete)" in text


def test_too_few_trials_have_no_importances(storage: RetryingStorage) -> None:
    make(storage, trials=importance.NEEDED - 1)
    assert importance.importances(storage, NAME) == (None, "19 complete trials; 20 are needed to tell")
    assert "19 complete trials; 20 are needed to tell" in shown(storage)


def test_a_name_that_is_none(storage: RetryingStorage) -> None:
    assert listing.details(storage, NAME, Path("absent")) is None


def row(number: int, **changes: Any) -> StudyRow:
    values: dict[str, Any] = {
        "study": f"SYMBOL{number}/kronos@2026-03-19T00:00:00Z", "symbol": f"SYMBOL{number}", "model": "kronos",
        "as_of": "2026-03-19T00:00:00Z", "state": "finished", "done": 100, "budget": 100, "parked": 0,
        "parked_reason": None, "incumbent_mae": 0.0125, "best_mae": 0.0119, "improvement": 0.048, "skill": 0.02,
        "confirmed_incumbent_mae": 0.0131, "confirmed_mae": 0.0129, "confirmed_improvement": 0.0153,
        "confirmed_skill": -0.01,
    }  # fmt: skip
    return StudyRow(**(values | changes))


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120, 240])
def test_no_line_is_wider_than_the_terminal_and_every_study_is_there(width: int) -> None:
    rows = [row(number) for number in range(20)] + [row(20, state="running", parked=3)]
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(terminal(listing.table(rows), width))
    lines = captured.get().rstrip("\n").split("\n")
    assert all(len(line.rstrip()) <= width for line in lines)
    head, lines = lines[: -len(rows)], lines[-len(rows) :]
    assert [line.split("/")[0] for line in lines] == [f"SYMBOL{number}" for number in range(21)]
    if width >= 80:
        assert all("+1.53 %" in line for line in lines)  # what was confirmed is what matters most
        assert "running (3 parked)" in lines[-1]
    if width == 240:
        (line,) = head
        searched = ["search incumbent", "search best", "search improvement", "search skill"]
        confirmed = ["confirmed incumbent", "confirmed best", "confirmed improvement", "confirmed skill"]
        assert re.split("  +", line.strip()) == ["study", "state", "trials", *searched, *confirmed]
    if width == 80:
        assert len(head) == 2  # "confirmed" above "improvement"


@pytest.mark.parametrize("width", [60, 80, 100, 120, 240])
def test_the_best_of_a_search_stands_beside_its_own_skill_alone(width: int) -> None:
    shown = terminal(listing.table([row(number) for number in range(3)]), width)
    headings = [str(column.header).replace("\n", " ").strip() for column in shown.columns]
    groups = [heading.split()[0] for heading in headings if heading not in ("study", "state", "trials")]
    assert groups == sorted(groups, reverse=True)  # those of the search, then the confirmed ones
    assert set(groups) <= {"search", "confirmed"}
    assert {"confirmed improvement", "confirmed skill"} <= set(headings)
    assert ("search best" in headings) == ("search skill" in headings) == (width >= 100)


def test_studies_that_differ_in_their_last_bar_keep_their_names() -> None:
    rows = [row(1), row(1, study="SYMBOL1/kronos@2026-03-20T00:00:00Z")]
    console = Console(width=60, color_system=None)
    with console.capture() as captured:
        console.print(terminal(listing.table(rows), 60))
    assert "2026-03-19" in captured.get()
    assert "2026-03-20" in captured.get()


def test_columns_that_say_nothing_are_left_out() -> None:
    columns = [Column(heading="a", cells=["1"]), Column(heading="b", cells=["-"])]
    assert len(terminal(Table(columns=columns), 80).columns) == 1
    whole = Table(columns=columns, keep_empty=True)
    assert len(terminal(whole, 4).columns) == 2  # there is room for both
    assert len(terminal(whole, 3).columns) == 1


def test_a_table_in_markdown_says_the_same() -> None:
    table = Table(
        columns=[
            Column(heading="name", cells=["a|b", "<c>"]),
            Column(heading="MAE", cells=["1.5000 %", "-"], right=True),
            Column(heading="configuration", cells=["x=`1`|2", "-"], code=True),
        ]
    )
    assert tables.markdown(table).splitlines() == [
        "| name | MAE | configuration |",
        "| --- | ---: | --- |",
        "| a\\|b | 1.5000 % | `x='1'/2` |",
        "| &lt;c> | - | - |",
    ]
    head, _, first, _ = tables.markdown(table, spaced=True).splitlines()
    gap = 3 * "\u00a0"
    assert head == f"| name | {gap}MAE | {gap}configuration |"
    assert first.split(" | ")[1] == f"{gap}1.5000\u00a0%"


DECIDED = promote.SymbolDecision(
    symbol="BTCUSD", study="BTCUSD/kronos@2026-03-19", model="kronos", incumbent_model="toto", incumbent_mae=0.012345,
    best_mae=0.0119, improvement=0.0361, improvement_low=0.012, improvement_high=0.0843, p_value=0.0213,
    improvement_own=0.025, pooled_symbols=12,
    improvement_validation=0.05, improvement_test=-0.01, skill=0.0123, test_mae=0.013, incumbent_test_mae=0.0131,
    windows=250, decision="kept", reason="below the threshold", next=None, path=None, written=(), pairs=(),
)  # fmt: skip


IN_USE = InUse(
    study="BTCUSD/kronos@2026-03-02", trial=7, promoted_at="2026-03-02T10:11:12Z", reason="first", improvement=0.02,
    improvement_low=-0.0012, improvement_high=0.0401, p_value=0.03, improvement_own=0.0299, pooled_symbols=11,
    improvement_validation=0.1, improvement_test=0.0077, skill=-0.02, worse_than_no_change=True, previous_model="toto",
    previous_config={"aggregate": "mean"},
)  # fmt: skip
UNCHANGED = replace(
    DECIDED, reason="unchanged", in_use=IN_USE, improvement=None, improvement_low=None, improvement_high=None,
    p_value=None, improvement_own=None, pooled_symbols=1, improvement_validation=None, improvement_test=None,
    worse_than_no_change=True,
)  # fmt: skip


def test_an_unchanged_configuration_shows_the_evidence_that_put_it_in_use() -> None:
    (cells,) = decisions.table([UNCHANGED]).rows
    evidence = ("+2.00 %", "-0.12 to +4.01 %", "0.030", "+2.99 %", "11", "+10.00 %", "+0.77 %")
    assert cells[4:11] == evidence
    assert cells[-3:] == ("+1.23 %", "kept", "unchanged since 2026-03-02; worse than no change")
    assert decisions.in_use_text(IN_USE) == (
        "promoted on 2026-03-02 from BTCUSD/kronos@2026-03-02, trial 7: first; worse than no change (improvement "
        "+2.00 %, 95 % interval -0.12 to +4.01 %, pooled over 11 symbols, +2.99 % on its own, skill -2.00 %); before "
        "it toto with aggregate=mean"
    )
    (cells,) = decisions.table([replace(UNCHANGED, in_use=None)]).rows
    assert cells[-1] == "unchanged; worse than no change"


@pytest.mark.parametrize("content", [{}, {"improvement": True, "improvement_interval": ["a", 1], "study": 3}])
def test_a_promoted_file_that_says_nothing_readable_is_no_error(content: dict[str, Any]) -> None:
    record = configs.parse(
        Path("f"), "best", "BTCUSD", json.dumps({"model": "m", "config": {}, "metadata": content}).encode()
    )
    found = InUse.of(record)
    assert {value for name, value in vars(found).items() if name != "worse_than_no_change"} == {None}
    assert decisions.in_use_text(found) == ""


def test_the_share_of_clipped_closes_is_a_column_where_it_is_known(storage: RetryingStorage) -> None:
    study_id = make(storage, trials=3, baseline=0.0111, clipped=0.1234)
    clips = replace(measured_configuration(0.012, validation=0.01, test=0.013, trial=0), clipped=0.0567)
    slots.finish(storage, claim(storage, study_id), result=to_json(evidence(clips, incumbent=INCUMBENT)))
    text = shown(storage)
    assert re.search(r"trial 0 +1.0000 % +\+11.50 % +\+20.00 % +12.3 %", text)
    assert re.search(r"trial 0 +1.2000 % +\+4.00 % +\+4.00 % +5.7 %", text)
    assert "clipped" not in [column.heading for column in confirmation_table(evidence(INCUMBENT)).columns]


@pytest.mark.parametrize("width", [40, 80, 120, 240])
def test_a_decision_and_its_reason_are_on_one_line_at_any_width(width: int) -> None:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(terminal(decisions.table([DECIDED]), width))
    *head, line = captured.get().splitlines()
    assert max(map(len, [*head, line])) <= width
    cells = re.split("  +", line.strip())
    assert (cells[0], *cells[-2:]) == ("BTCUSD", "kept", "below the threshold")
    if width >= 80:
        assert {"+1.20 to +8.43 %", "+1.23 %"} <= {*cells}  # interval and skill
    if width >= 120:
        assert {"+3.61 %", "+2.50 %", "12"} <= {*cells}
    if width == 240:
        errors, interval = ("1.2345 %", "1.1900 %", "+3.61 %"), "+1.20 to +8.43 %"
        numbers = (*errors, interval, "0.021", "+2.50 %", "12", "+5.00 %", "-1.00 %", "+1.23 %")
        assert cells == ["BTCUSD", DECIDED.study, *numbers, "kept", "below the threshold"]


def test_numbers_for_people() -> None:
    assert [tables.rate(x) for x in (None, 0.0, 12.34, 0.5, 0.001)] == ["-", "-", "12.3/s", "30.0/min", "3.6/h"]
    spans = (None, 0.4, 9.96, 59.4, 59.6, 90, 3600 * 3 + 1200, 3600 * 50, float("inf"))
    said = ["-", "0.4 s", "10 s", "59 s", "1 min", "2 min", "3 h 20 min", "2 d 2 h", "-"]
    assert [tables.duration(x) for x in spans] == said
    assert (tables.percent_gain(-0.0123), tables.percent_gain(None)) == ("-1.23 %", "-")
    assert (tables.percent_error(0.0123456), tables.percent_interval(0.01, None)) == ("1.2346 %", "-")
    assert params_text({"temperature": 2.4000000000000004, "top_k": 16}) == "temperature=2.4 top_k=16"
    assert params_text({}) == ""
