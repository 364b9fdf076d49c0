"""Every aggregate against a plain formula, and the work that aggregates share against none shared."""

import math
import random

import numpy as np
import pytest
import scipy.stats

from forecasters import ForecastError
from objectives.aggregation import KEPT_COUNTS, Aggregate, Draw, parse

W, S, H = 3, 200, 5


def heavy_samples(windows: int = W, samples: int = S, horizon: int = H, seed: int = 0) -> np.ndarray:
    """Prices with Student tails, as a forecaster draws them."""
    generator = np.random.default_rng(seed)
    return 1000 + 20 * generator.standard_t(3, size=(windows, samples, horizon))


def per_step(formula, samples: np.ndarray) -> np.ndarray:
    """A formula of a plain list of samples, at every window and step."""
    return np.array(
        [[formula(list(samples[w, :, h])) for h in range(samples.shape[2])] for w in range(samples.shape[0])]
    )


def trimmed(values: list[float], f: float) -> float:
    k = math.floor(len(values) * f)
    kept = sorted(values)[k : len(values) - k]
    return math.fsum(kept) / len(kept)


def lower(values: list[float], f: float) -> float:
    kept = sorted(values)[: max(1, math.floor(len(values) * (1 - f)))]
    return math.fsum(kept) / len(kept)


def upper(values: list[float], f: float) -> float:
    kept = sorted(values)[min(math.floor(len(values) * f), len(values) - 1) :]
    return math.fsum(kept) / len(kept)


def winsorized(values: list[float], f: float) -> float:
    return float(scipy.stats.mstats.winsorize(np.array(values), limits=(f, f)).mean())


FORMULAS = {
    "mean": lambda v: math.fsum(v) / len(v),
    "": lambda v: math.fsum(v) / len(v),
    " Mean ": lambda v: math.fsum(v) / len(v),
    "median": np.median,
    "p10": lambda v: np.quantile(v, 0.1),
    "P90": lambda v: np.quantile(v, 0.9),
    "trimmed_mean_5": lambda v: trimmed(v, 0.05),
    "trimmed_mean_0.05": lambda v: trimmed(v, 0.05),
    "trimmed_mean_25": lambda v: trimmed(v, 0.25),
    "trimmed_mean_0": lambda v: math.fsum(v) / len(v),
    "trimmed_mean_49.9": lambda v: trimmed(v, 0.499),
    "Lower_Trimmed_Mean_20": lambda v: lower(v, 0.2),
    "lower_trimmed_mean_1": min,  # a literal 1 is 100 %: at least one stays
    "lower_trimmed_mean_0": lambda v: math.fsum(v) / len(v),
    "upper_trimmed_mean_20": lambda v: upper(v, 0.2),
    "upper_trimmed_mean_100": max,
    "upper_trimmed_mean_1": max,
    "winsorized_mean_10": lambda v: winsorized(v, 0.1),
    "winsorized_mean_0.25": lambda v: winsorized(v, 0.25),
    "winsorized_mean_0": lambda v: math.fsum(v) / len(v),
    "quantile_0.30": lambda v: np.quantile(v, 0.3),
    "quantile_85": lambda v: np.quantile(v, 0.85),
    "quantile_0": min,
    "quantile_1": max,
    "mean_minus_std_0.5": lambda v: np.mean(v) - 0.5 * np.std(v),
    "mean_plus_std_2": lambda v: np.mean(v) + 2 * np.std(v),
    "mean_quantile_mix_0.5_0.3": lambda v: 0.3 * np.mean(v) + 0.7 * np.quantile(v, 0.5),
    "mean_quantile_mix_25_7": lambda v: np.mean(v),  # the weight is clipped to [0, 1]
    "mean_quantile_mix_25_-1": lambda v: np.quantile(v, 0.25),
    "quantile_plus_std_0.4_0.1": lambda v: np.quantile(v, 0.4) + 0.1 * np.std(v),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("count", [1, 2, 3, 16, 199, 200])
def test_an_aggregate_is_its_formula(name: str, count: int) -> None:
    samples = heavy_samples()
    points = Draw(samples).aggregate(name, count)
    assert points.shape == (W, H)
    assert points.dtype == np.float64
    np.testing.assert_allclose(points, per_step(FORMULAS[name], samples[:, :count]), rtol=1e-12)


@pytest.mark.parametrize("name", ["trimmed_mean_5", "winsorized_mean_5"])
def test_sixteen_samples_have_no_five_per_cent(name: str) -> None:
    draw = Draw(heavy_samples(samples=16))
    assert (draw.aggregate(name) == draw.aggregate("mean")).all()


def test_a_robust_mean_is_robust_to_one_wild_sample() -> None:
    samples = heavy_samples()
    samples[:, 7] = -1e15  # a running sum over it would lose all but one digit
    expected = per_step(lambda v: trimmed(v, 0.1), samples)
    np.testing.assert_allclose(Draw(samples).aggregate("trimmed_mean_10"), expected, rtol=1e-12)


# --- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "aggregate"),
    [
        (["mean", "", "  MEAN\n"], Aggregate(kind="mean")),
        (["p10", "quantile_10", "quantile_0.10", "quantile_.1"], Aggregate(kind="quantile", numbers=(0.1,))),
        (["trimmed_mean_5", "trimmed_mean_0.05"], Aggregate(kind="trimmed_mean", numbers=(0.05,))),
        (["lower_trimmed_mean_1", "lower_trimmed_mean_100"], Aggregate(kind="lower_trimmed_mean", numbers=(1.0,))),
        (["quantile_plus_std_50_1"], Aggregate(kind="quantile_plus_std", numbers=(0.5, 1.0))),
        (["mean_quantile_mix_50_9"], Aggregate(kind="mean_quantile_mix", numbers=(0.5, 1.0))),
    ],
)
def test_names_that_mean_the_same_are_equal(names: list[str], aggregate: Aggregate) -> None:
    for name in [*names, aggregate.name]:
        assert parse(name) == aggregate


@pytest.mark.parametrize("name", FORMULAS)
def test_the_canonical_name_parses_to_itself(name: str) -> None:
    assert parse(parse(name).name) == parse(name)


@pytest.mark.parametrize(
    "name",
    [
        "mode",
        "means",
        "mean_5",
        "median_5",
        "p50",
        "trimmed_mean",
        "trimmed_mean_1_0",
        "quantile",
        "quantile_plus_std_1",
    ],
)
def test_an_unknown_name_is_told_the_forms(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"unknown aggregate '{name}'; there are mean, median, p10, p90, trimmed_mean_F"
    ):
        Draw(heavy_samples()).aggregate(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trimmed_mean_50", "50% of each end leaves nothing"),
        ("trimmed_mean_0.5", "below 50 %"),
        ("trimmed_mean_1", "100% of each end"),
        ("winsorized_mean_50", "below 50 %"),
        ("quantile_101", "101 is not a fraction"),
        ("quantile_-0.1", "-0.1 is not a fraction"),
        ("lower_trimmed_mean_x", "'x' is not a number"),
        ("quantile_", "'' is not a number"),
        ("quantile_nan", "'nan' is not a number"),
        ("mean_plus_std_inf", "'inf' is not a number"),
        ("mean_plus_std_-1", "below 0"),
    ],
)
def test_a_bad_number_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse(name)
    assert repr(name) in str(caught.value)


# --- axes ------------------------------------------------------------------------------------------------------


def test_fewer_samples_than_steps_are_not_transposed() -> None:
    samples = heavy_samples(windows=1, samples=32, horizon=64)
    points = Draw(samples).aggregate("median")
    assert points.shape == (1, 64)
    np.testing.assert_allclose(points[0], np.median(samples[0], axis=0), rtol=1e-12)


@pytest.mark.parametrize("shape", [(10,), (10, 4), (1, 2, 3, 4), (0, 5, 1), (2, 0, 1), (2, 5, 0)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="windows, samples, horizon"):
        Draw(np.ones(shape))


@pytest.mark.parametrize("count", [0, -1, S + 1])
def test_more_samples_than_there_are(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} of {S} samples"):
        Draw(heavy_samples()).aggregate("mean", count)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_points_are_float64(dtype: type) -> None:
    samples = heavy_samples().astype(dtype)
    for name in ("mean", "median", "winsorized_mean_10"):
        assert (Draw(samples).aggregate(name) == Draw(samples.astype(np.float64)).aggregate(name)).all()


# --- what is shared --------------------------------------------------------------------------------------------

SHAPES = [(W, S, H), (10, 512, 1), (1, 512, 1), (1, 300, 64), (10, 4096, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_bits_alone_together_and_from_a_larger_draw(shape: tuple[int, int, int]) -> None:
    samples = heavy_samples(*shape)
    counts = [16, 64, shape[1] // 2, shape[1] - 1, shape[1]]
    alone = {(name, count): Draw(samples[:, :count].copy()).aggregate(name) for name in FORMULAS for count in counts}
    order = random.Random(1)
    for _ in range(2):
        draw = Draw(samples)
        asked = [*alone, *alone]
        order.shuffle(asked)
        for name, count in asked:
            assert np.array_equal(draw.aggregate(name, count), alone[name, count])
            assert np.array_equal(draw.aggregate(parse(name), count), alone[name, count])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mean_does_not_depend_on_strides_or_company(shape: tuple[int, int, int]) -> None:
    samples = heavy_samples(*shape)
    expected = Draw(samples).aggregate("mean")
    layouts = [
        np.asfortranarray(samples),
        np.ascontiguousarray(samples[::-1])[::-1],
        samples.swapaxes(1, 2).copy().swapaxes(1, 2),
    ]
    for layout in layouts:
        assert np.array_equal(Draw(layout).aggregate("mean"), expected)
    for window in range(shape[0]):
        assert np.array_equal(Draw(samples[window : window + 1]).aggregate("mean")[0], expected[window])


def test_the_callers_array_is_neither_changed_nor_watched() -> None:
    samples = heavy_samples(horizon=1)
    before = samples.copy()
    draw = Draw(samples)
    draw.aggregate("median")
    assert np.array_equal(samples, before)
    samples[:] = 0
    for name in ("mean", "median"):
        assert np.array_equal(Draw(before).aggregate(name), draw.aggregate(name))


def test_memory_is_bounded() -> None:
    draw = Draw(heavy_samples())
    full = W * S * H * 8
    assert draw.nbytes == full
    draw.aggregate("mean")
    draw.aggregate("mean_plus_std_1")
    assert draw.nbytes == full  # neither needs an order
    for count in range(S, S - 20, -1):
        draw.aggregate("median", count)
    assert full < draw.nbytes <= (1 + KEPT_COUNTS) * full


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_samples_are_refused_only_where_used(value: float) -> None:
    samples = heavy_samples()
    samples[2, 100, 3] = value
    draw = Draw(samples)
    with pytest.raises(ForecastError, match="window 2 has NaN or infinite samples"):
        draw.aggregate("median")
    with pytest.raises(ForecastError):
        draw.aggregate("mean", 101)
    assert draw.non_finite_window(101) == 2
    # One that was never asked for must not fail a trial that a smaller draw would pass.
    assert draw.non_finite_window(100) is None
    assert np.isfinite(draw.aggregate("median", 100)).all()
