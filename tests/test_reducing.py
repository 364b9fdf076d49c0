"""Fewer samples: their cost against theory, the promise kept on what was not measured, and the promotion of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
from click.testing import Result
from places import StudyPlace

from forecasters import Bars, Forecaster, naive
from launch import cli
from objectives.evaluation import Evaluator
from objectives.windows import Windows, recent_origins
from studies import reducing
from studies.reducing import SampleCost

SIGMA = 0.01  # scale of a bar's relative move, and of a sample's


class Place(StudyPlace):
    """One symbol with Toto in use."""

    SETTINGS: ClassVar[str] = StudyPlace.SETTINGS.replace("num_samples = [64, 128]", "num_samples = [64, 128, 512]")
    BARS: ClassVar[Mapping[str, int]] = {"SP500": 600}

    def reduce(self, *words: str, code: int = 0) -> Result:
        ended = self.invoke(cli.studies, "reduce", *words)
        assert ended.exit_code == code, ended.output
        return ended


def place_invoke(place: Place, *words: str) -> Any:
    return json.loads(place.reduce("--json", *words).stdout)


class Drawing(naive.Naive):
    """Samples the last close with independent relative moves of the kind that the bars have."""

    free_draw_horizon = sys.maxsize

    def __init__(self, tails: float | None) -> None:
        super().__init__()
        self.tails = tails  # degrees of freedom of Student's t; None: normal

    def draw(self, encoded: Any, params: Mapping[str, Any], seeds: Sequence[int]) -> np.ndarray:
        rows = [moves(np.random.Generator(np.random.Philox(key=s)), params["num_samples"], self.tails) for s in seeds]
        return np.exp(encoded.seasons[:, -1])[:, None, None] * (1 + np.stack(rows))[..., None]


def moves(random: np.random.Generator, count: int, tails: float | None) -> np.ndarray:
    """One after another from the stream, so that fewer are the first of more."""
    return SIGMA * (random.standard_normal(count) if tails is None else random.standard_t(tails, count))


def windows(count: int, tails: float | None, seed: int) -> Windows:
    """Of bars whose moves are independent."""
    returns = moves(np.random.default_rng(seed), count + 300, tails)
    closes = 100 * np.cumprod(1 + returns - returns.mean())
    times = np.datetime64("1990-01-01", "ns") + np.arange(len(closes)) * np.timedelta64(1, "D")
    bars = Bars(timestamps=times, open=closes, high=closes, low=closes, close=closes, volume=None)
    return recent_origins(bars, count, symbol="X")


def costs(found: Windows, tails: float | None, aggregate: str, counts: Sequence[int]) -> list[SampleCost]:
    """Against the exact answer, which is the last close by symmetry."""
    exact = np.abs(found.actuals[:, 0] - found.last_closes) / found.last_closes
    params = {"season": 1, "context_length": 2, "num_samples": counts[0], "aggregate": aggregate}
    evaluator = Evaluator(cast(Forecaster, Drawing(tails)), cache_bytes=1 << 28, rung=250, max_num_samples=counts[0])
    return reducing.costs_of(evaluator, found, params, counts[1:], exact=exact, max_cost=0.01)[0]


@pytest.mark.parametrize(
    ("tails", "aggregate", "constant"),
    [
        # (c / 2N)(s / sigma)^2, with s = sigma; the constants c of a normal, and for t4 what its density at 0 makes.
        (None, "mean", 1.0),
        (None, "median", np.pi / 2),
        (4, "mean", 1.5),  # variance 2, density 0.375, mean |error| 1: the cost is 2 / N x 0.375
        (4, "median", 1 / (4 * 0.375**2) * 0.75),
    ],
)
def test_the_cost_of_samples_is_that_of_theory(tails: float | None, aggregate: str, constant: float) -> None:
    for one in costs(windows(3000, tails, seed=5), tails, aggregate, [128, 64, 32]):
        expected = constant / (2 * one.samples)
        assert abs(one.cost - expected) < 1.2 * one.width, (one, expected)  # 1.96 / 1.645: a 95 % interval
        assert one.width < expected / 2  # and it is one that could fail


def test_the_promise_is_kept_where_nothing_was_measured() -> None:
    """The true cost of N normal samples is 1 / 2N: 50 is the fewest that cost less than 1 %."""
    found = []
    for seed in range(12):
        measured = costs(windows(250, None, seed), None, "mean", [256, 128, 96, 64, 48, 32])
        found.append(reducing.smallest(measured, 256, 0.01))
    assert sum(samples is not None and samples < 50 for samples in found) <= 2  # 5 % of 12, and its chance
    assert sum(samples is not None for samples in found) >= 10  # a rule that refuses would keep it too


def test_no_number_behind_one_that_fails_is_taken() -> None:
    found = [SampleCost(samples=n, cost=b, bound=b) for n, b in [(512, 0.1), (256, 0.001), (128, 0.02), (64, 0.001)]]
    assert reducing.smallest(found, 512, 0.01) == 256
    assert reducing.smallest(found, 256, 0.01) is None  # that in use is no reduction


def test_fewer_samples_are_shown_and_nothing_is_written(place: Place) -> None:
    place.put("best", {"num_samples": 512, "aggregate": "mean", "samples_per_batch": 128})
    before = place.promoted_file("SP500").read_bytes()
    ended = place.reduce("--max-cost", "0.2")
    assert "--apply promotes them" in ended.stderr
    assert "exact" in ended.stdout
    (row,) = place_invoke(place, "--max-cost", "0.2")
    assert row["reduced"] == row["costs"][-1]["samples"] == 8
    assert (row["before"], row["after"]) == ({"total": 512, "at_once": 128}, {"total": 8, "at_once": 8})
    assert row["written"] == []
    assert place.promoted_file("SP500").read_bytes() == before
    assert not (place.folder / "hyperparams" / "history").exists()


def test_apply_is_a_promotion_that_can_be_rolled_back(place: Place) -> None:
    metadata = {"study": "SP500/toto@2018-12-31", "trial": 7, "fixed": {"context_length": 200}, "note": "kept"}
    config = {"num_samples": 512, "aggregate": "mean", "samples_per_batch": 128, "mine": 1}
    place.put_promoted("SP500", config, metadata=metadata)
    before = place.promoted_file("SP500").read_bytes()
    (row,) = place_invoke(place, "--max-cost", "0.1", "--apply")
    assert row["written"]
    files = [json.loads(Path(path).read_text()) for path in row["written"]]
    assert [Path(path).parent.name for path in row["written"]] == ["toto", "best", "optimized_compiled"]
    assert files[0] == files[1] == files[2]
    assert files[0]["config"] == {**config, "num_samples": row["reduced"], "samples_per_batch": row["after"]["at_once"]}
    said = files[0]["metadata"]
    assert (said["study"], said["trial"], said["note"]) == ("SP500/toto@2018-12-31", 7, "kept")
    assert (said["reason"], said["previous_config"], said["fixed"]) == (
        "fewer samples", config, {"context_length": 200}
    )  # fmt: skip
    # The errors are those of what the file says, measured now.
    evaluator = place.evaluator()
    split = place.run(place.open().study).split
    params = {"aggregate": "mean", "num_samples": row["reduced"], "context_length": 200}
    assert files[0]["validation"]["pct_return_mae"] == evaluator.measure(split.validation, params).mae
    assert said["previous_mae"] > 0
    assert said["improvement"] == pytest.approx(1 - said["selection_value"] / said["previous_mae"])

    rolled = place.invoke(cli.promote, "--rollback", "SP500")
    assert rolled.exit_code == 0, rolled.output
    assert place.promoted_file("SP500").read_bytes() == before


def test_a_file_that_was_replaced_meanwhile_stays(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.put("best", {"num_samples": 512, "aggregate": "mean"})
    measure = reducing.costs_of

    def replacing(*words: Any, **options: Any) -> Any:
        place.put("best", {"num_samples": 256, "aggregate": "median"})
        return measure(*words, **options)

    monkeypatch.setattr(reducing, "costs_of", replacing)
    ended = place.reduce("--max-cost", "0.1", "--apply", code=1)
    assert "SP500.json was replaced meanwhile; run the command again" in ended.stderr
    assert json.loads(place.promoted_file("SP500").read_text())["config"]["num_samples"] == 256
    assert not (place.folder / "hyperparams" / "toto").exists()


def test_what_cannot_be_reduced_is_one_line(place: Place) -> None:
    assert "best: no promoted file of toto; promote one first" in place.reduce(code=1).stderr
    assert (
        f"{place.promoted_file('SP500')}: no promoted file; promote"
        in place.reduce("--symbols", "SP500", code=1).stderr
    )
    place.put("best", {"num_samples": 64, "aggregate": "mean"}, model="kronos")
    assert (
        "is of kronos; the models asked for are toto"
        in place.reduce("--symbols", "SP500", "--models", "toto", code=1).stderr
    )
    place.put("best", {"num_samples": 0, "aggregate": "mean"})
    ended = place.reduce(code=1)
    assert ended.stderr.splitlines()[-2].endswith("cannot be measured: num_samples 0 is not a whole number above 0")
    place.put("best", {"num_samples": 64, "aggregate": "mean"})
    place.settings.write_text(
        place.settings.read_text().replace("confirmation = 60", "confirmation = 5\nvalidation = 5")
    )
    assert "has 5 windows before test and needs 20 to bound a cost" in place.reduce(code=1).stderr
    for line in place.reduce("--max-cost", "1", code=2).stderr.splitlines()[-1:]:
        assert "--max-cost" in line
