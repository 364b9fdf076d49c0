"""The portfolio: what other symbols confirmed best, from the evidence that is stored of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from evidence_builder import evidence, measured_configuration
from places import Place

from storage import slots, study_rows
from studies import config as configuration
from studies import portfolio
from studies import space as spaces
from studies.evidence import MeasuredConfiguration, to_json
from studies.study import DEFINITION, METRIC, StudyRun

AS_OF = "2026-03-19"
KRONOS = {"top_k": 16, "top_p": 1.0, "sample_count": 320, "max_context": 128, "clip": 5.0}
DEFAULT = {**KRONOS, "temperature": 1.0}


def definition(symbol: str, **changes: Any) -> dict[str, Any]:
    windows = {"horizon": 1, "validation": 30, "test": 20, "min_context": 128, "rung": 10}
    found = {"symbol": symbol, "model": "kronos", "as_of": AS_OF, "metric": METRIC, "objective": "sampled"}
    return {**found, "windows": windows, "checkpoint": "c", **changes}


def run_of(symbol: str = "BTCUSD", *, model: str = "kronos", **changes: Any) -> StudyRun:
    """What a portfolio asks of a study."""
    study = SimpleNamespace(symbol=symbol, as_of=AS_OF, definition=definition(symbol, model=model))
    fields = {name: cast(Any, None) for name in StudyRun.__dataclass_fields__}
    space = spaces.make(model, configuration.load())
    return StudyRun(**{**fields, "study": study, "space": space, "pool": "all", "pool_days": 10.0, **changes})


def measured(temperature: float, mae: float, **fields: Any) -> MeasuredConfiguration:
    """A configuration by its temperature; errors are noise that all share for the most part, but for low ones."""
    params = {**KRONOS, "temperature": temperature}
    values = {"seed": 5, "wobble": 0.45 if temperature < 0.1 else 0.1 * temperature, **fields}
    return measured_configuration(mae, params=params, model="kronos", trial=0, **values)


def put(place: Place, symbol: str, maes: Mapping[float, float], *, default: bool = True, **changes: Any) -> None:
    """A confirmed study of another symbol, with these MAEs by temperature; that of the default is 0.01."""
    found = definition(symbol, **changes)

    def fill(connection: Any, study_id: int) -> None:
        slots.add(connection, study_id, slots.CONFIRMATION, 0, label="confirmation", params={})

    name = f"{symbol}/{found['model']}@{found['as_of']}"
    study_id = study_rows.create_study(place.storage, name, {DEFINITION: found}, METRIC, fill)
    candidates = [measured(temperature, mae) for temperature, mae in maes.items()]
    if default:
        candidates.append(replace(measured(1.0, 0.01), source="default"))
    slot = slots.claim(place.storage, study_id, worker="w:1", lease_s=60)
    assert slot is not None
    assert slots.finish(place.storage, slot, result=to_json(evidence(*candidates)))


def temperatures(place: Place, **changes: Any) -> list[float]:
    return [params["temperature"] for params in portfolio.read(place.storage, run_of(**changes))]


def test_what_beats_the_default_elsewhere_best_first(place: Place) -> None:
    assert temperatures(place) == []
    put(place, "ETHUSD", {0.1: 0.009, 0.2: 0.0095, 0.3: 0.011})
    assert temperatures(place) == [0.1, 0.2]  # one symbol alone: by its own evidence
    for symbol in ("SOLUSD", "AAVEUSD", "XRPUSD"):
        put(place, symbol, {0.1: 0.0098, 0.2: 0.0090, 0.4: 0.0097})
    assert temperatures(place) == [0.2, 0.4, 0.1] or temperatures(place) == [0.2, 0.1, 0.4]


def test_a_lucky_accident_of_one_symbol_is_not_believed(place: Place) -> None:
    """What one symbol measured by far the best is shrunk towards what such configurations gain elsewhere."""
    put(place, "ETHUSD", {0.05: 0.0093, 0.2: 0.0094})
    assert temperatures(place) == [0.05, 0.2]
    for symbol, own in {"SOLUSD": 0.06, "AAVEUSD": 0.07, "XRPUSD": 0.08, "LTCUSD": 0.09}.items():
        put(place, symbol, {own: 0.0100, 0.2: 0.0094})
    assert temperatures(place)[0] == 0.2


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "exact"}, {"checkpoint": "other"}, {"metric": "other"}, {"windows": {"horizon": 5}},
        {"pnl": {"strategy": "simple"}}, {"as_of": "2026-01-19"}, {"model": "toto"}, {"symbol": "BTCUSD"},
    ],
)  # fmt: skip
def test_only_comparable_studies_of_other_symbols_count(place: Place, changes: dict[str, Any]) -> None:
    symbol = changes.pop("symbol", "ETHUSD")
    put(place, symbol, {0.1: 0.009}, **changes)
    assert temperatures(place) == []
    put(place, "XRPUSD", {0.3: 0.009})
    assert temperatures(place) == [0.3]


def test_without_a_default_to_compare_with_there_is_nothing(place: Place) -> None:
    put(place, "ETHUSD", {0.1: 0.009}, default=False)  # as results of before were
    assert temperatures(place) == []


def test_the_settings_say_who_is_pooled(place: Place) -> None:
    put(place, "ETHUSD", {0.1: 0.009})
    put(place, "SP500", {0.3: 0.009})
    assert temperatures(place, pool="none") == []
    assert temperatures(place, pool={"crypto": "*USD"}) == [0.1]
    assert temperatures(place, symbol="NASDAQ", pool={"crypto": "*USD"}) == [0.3]
    assert set(temperatures(place, pool="all")) == {0.1, 0.3}


def test_a_model_whose_grid_is_measured_needs_none(place: Place) -> None:
    put(place, "ETHUSD", {0.1: 0.009}, model="toto")
    assert portfolio.read(place.storage, run_of(model="toto")) == []
