"""What a search begins with for a symbol of some volatility, and that nothing else of the study changes by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from places import StudyPlace, last_bars

from forecasters import Bars
from forecasters.models import MODELS
from studies import config as configuration
from studies import space as spaces
from studies.starts import daily_volatility, volatility_class, volatility_starts


class Place(StudyPlace):
    """The last bars of an index whose returns are six times what they were: 0.4 to 0.8 % a day become 2.5 to 5 %."""

    BARS: ClassVar[Mapping[str, int]] = {}

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder, url)
        cells = [line.split(",") for line in last_bars("SP500", 400)[1:]]
        first = float(cells[0][4])
        self.write("SP500.csv", ["timestamp,close", *(f"{c[0]},{first * (float(c[4]) / first) ** 6}" for c in cells)])


def bars(sigma: float, *, count: int = 2000, hours: int = 24) -> Bars:
    """A bar every so many hours, with this standard deviation of a bar's log return in the last 1,000 bars."""
    moves = np.random.default_rng(0).normal(size=count)
    moves[:-999] *= 9  # older bars are not looked at
    moves *= sigma / moves[-999:].std(ddof=1)
    closes = 100 * np.exp(np.cumsum(moves - moves.mean()))
    times = np.datetime64("2020-01-01", "ns") + np.arange(count) * np.timedelta64(hours, "h")
    return Bars(timestamps=times, open=closes, high=closes, low=closes, close=closes, volume=None)


def test_volatility_is_that_of_a_day_over_the_last_thousand_bars() -> None:
    assert daily_volatility(bars(0.03)) == pytest.approx(0.03)
    assert daily_volatility(bars(0.01, hours=6)) == pytest.approx(0.02)
    assert [volatility_class(one) for one in (0.024, 0.025, 0.0359, 0.036)] == [
        "stable", "medium", "medium", "volatile"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sigma", "toto", "kronos"),
    [
        (0.01, [("mean", 512)], [(0.35, 0.95, 0, 128, 320)]),
        (0.03, [("mean", 2048), ("trimmed_mean_5", 2048)], [(0.25, 0.9, 0, 256, 256), (0.3, 1.0, 48, 256, 256)]),
        (0.05, [("trimmed_mean_5", 2048), ("trimmed_mean_10", 2048), ("median", 4096)],
         [(0.2, 0.85, 0, 320, 320), (0.25, 0.9, 0, 256, 320)]),
    ],
)  # fmt: skip
def test_each_class_has_points_within_the_space(
    sigma: float, toto: list[tuple[object, ...]], kronos: list[tuple[object, ...]]
) -> None:
    config = configuration.load()
    names = {
        "toto": ("aggregate", "num_samples"),
        "kronos": ("temperature", "top_p", "top_k", "sample_count", "max_context"),
    }
    for model, expected in (("toto", toto), ("kronos", kronos)):
        space = spaces.make(model, config)
        found = volatility_starts(config, space, bars(sigma))
        assert [tuple(params[name] for name in names[model]) for params in found.values()] == expected
        assert all(space.contains(params) for params in found.values())
        assert all(params.get("clip", 3.0) == 3.0 for params in found.values())
    assert volatility_starts(config, spaces.make("naive", config), bars(sigma)) == {}


def test_a_point_is_moved_into_the_space_or_left_out_where_a_name_or_a_0_is_missing(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        "[toto]\naggregates = ['median']\nnum_samples = [100, 5000, 3000]\ncontext_length = [512, 8192]\n"
        "[kronos]\ntop_k = [12, 40]\ntemperature = [0.1, 0.2]\nclip = [1.0, 2.1]"
    )
    config = configuration.load(tmp_path / "c.toml")
    found = volatility_starts(config, spaces.make("toto", config), bars(0.05))
    assert found == {"volatile 1": {"aggregate": "median", "num_samples": 5000, "context_length": 512}}
    space = spaces.make("kronos", config)
    assert volatility_starts(config, space, bars(0.05)) == {}  # a top_k of 0 is every token, not nearly 12
    (point,) = volatility_starts(config, space, bars(0.03)).values()
    assert (point["top_k"], point["temperature"], point["clip"]) == (40, 0.2, 2.0)
    assert space.contains(point)
    assert not MODELS["kronos"].counts("top_p", point)


def test_a_new_search_begins_with_them_after_what_is_in_use_and_within_the_budget(place: Place) -> None:
    place.put("best", {"num_samples": 128, "aggregate": "median"})
    opened = place.open(starts="volatility", trials=4).study
    place.finish(opened, trials=4)
    trials = place.trials(opened)
    assert [trials[number].user_attrs.get("label") for number in range(4)] == ["incumbent", "volatile 1", None, None]
    assert trials[1].params == {"aggregate": "trimmed_mean_10", "num_samples": 128}
    assert len(trials) == 4


def test_they_never_exceed_the_budget_and_are_no_part_of_the_definition(place: Place) -> None:
    place.put("best", {"num_samples": 64, "aggregate": "mean"})
    opened = place.open(starts="volatility", trials=2)
    place.finish(opened.study, trials=2)
    assert [t.user_attrs["label"] for t in place.trials(opened.study).values()] == ["incumbent", "volatile 1"]
    resumed = place.open(starts="none", trials=3)  # the same study, as its numbers mean the same
    assert (resumed.study.name, resumed.state) == (opened.study.name, "raised")
    assert resumed.study.definition == opened.study.definition
