"""Exact aggregates against draws, quadrature and closed forms."""

from pathlib import Path

import numpy as np
import pytest
from scipy.special import stdtr
from scipy.stats import t as student

from forecasters import Bars, Expectation, ForecastError, StudentMixture, toto
from forecasters.toto_sampling import mixture_samples
from objectives import aggregation, exact
from objectives.aggregation import Draw
from objectives.exact import exact_points

GOLDENS = Path(__file__).parent / "goldens"
NAMES = (
    *("mean", "median", "p10", "p90", "quantile_35", "trimmed_mean_10", "trimmed_mean_0", "trimmed_mean_45"),
    *("lower_trimmed_mean_20", "lower_trimmed_mean_0", "upper_trimmed_mean_20", "winsorized_mean_5"),
    *("mean_minus_std_0.5", "mean_plus_std_1", "mean_quantile_mix_0.3_0.6", "quantile_plus_std_0.4_0.25"),
)
DRAWS = 40_000
BATCHES = 40


def mixture(df: tuple[float, float] = (9, 40)) -> StudentMixture:
    """Two windows, three steps, five components far apart and near, at a price level."""
    rng = np.random.default_rng(3)
    shape = (2, 3, 5)
    return StudentMixture(
        probs=rng.dirichlet(np.ones(5), shape[:2]),
        df=rng.uniform(*df, shape),
        loc=rng.normal(100, 2, shape),
        scale=rng.uniform(0.2, 2, shape),
    )


def z_scores(samples: np.ndarray, name: str, points: np.ndarray) -> np.ndarray:
    """(aggregate of all samples [W, N, H] - points) over a standard error known from batches of them."""
    batches = np.split(samples, BATCHES, axis=1)
    spread = np.std([Draw(batch).aggregate(name) for batch in batches], axis=0, ddof=1) / BATCHES**0.5
    return (Draw(samples).aggregate(name) - points) / spread


def test_every_form_has_a_limit():
    assert exact._LIMITS.keys() == aggregation._FORMS.keys()
    assert {aggregation.parse(name).kind for name in NAMES} == exact._LIMITS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_draws_tend_to_it(name: str):
    mix = mixture()
    uniforms = np.random.default_rng(8).random((2, DRAWS, 3, 3))
    samples = mixture_samples(mix.probs, mix.df, mix.loc, mix.scale, uniforms, uniforms.shape[1])
    assert np.abs(z_scores(samples, name, exact_points(mix, name))).max() < 4


@pytest.mark.parametrize(
    "name", [name for name in NAMES if "std" not in name]
)  # some df are so near 2 that none settles
def test_totos_own_draws_tend_to_it(name: str):
    forecaster = toto.load(str(GOLDENS / "toto-a"))
    closes = 100 + np.cumsum(np.random.default_rng(1).normal(0, 1, 96))
    days = np.datetime64("2024-01-01", "ns") + np.arange(96) * np.timedelta64(1, "D")
    bars = Bars(timestamps=days, open=closes, high=closes, low=closes, close=closes, volume=None)
    encoded = forecaster.encode([bars, bars.slice(0, 70)], {"context_length": 96}, 2)
    samples = forecaster.draw(encoded, {"num_samples": DRAWS}, [5, 6])
    points = exact_points(forecaster.exact(encoded, {}, []), name)
    assert np.abs(z_scores(samples, name, points)).max() < 4


def test_beyond_the_first_patch_there_is_no_mixture():
    forecaster = toto.load(str(GOLDENS / "toto-a"))
    closes = np.linspace(100, 110, 40)
    days = np.datetime64("2024-01-01", "ns") + np.arange(40) * np.timedelta64(1, "D")
    bars = Bars(timestamps=days, open=closes, high=closes, low=closes, close=closes, volume=None)
    with pytest.raises(ForecastError, match="first 16 steps"):
        forecaster.exact(forecaster.encode([bars], {"context_length": 40}, 17), {}, [])


def test_one_component_has_the_quantiles_of_student():
    probs, df, loc, scale = (np.full((1, 1, 1), value) for value in (1.0, 3.5, 7.0, 0.25))
    one = StudentMixture(probs=probs, df=df, loc=loc, scale=scale)
    for q in (0.001, 0.1, 0.5, 0.73, 0.999):
        np.testing.assert_allclose(exact_points(one, f"quantile_{q}"), student.ppf(q, 3.5, 7, 0.25), rtol=1e-12)


def test_quantiles_invert_the_distribution():
    mix = mixture((2.001, 200))
    for q in (1e-6, 0.03, 0.5, 0.97):
        x = exact_points(mix, f"quantile_{q}")[..., None]
        np.testing.assert_allclose((mix.probs * stdtr(mix.df, (x - mix.loc) / mix.scale)).sum(-1), q, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("trimmed_mean_10", 0.1, 0.9), ("lower_trimmed_mean_25", 0.0, 0.75), ("upper_trimmed_mean_25", 0.25, 1.0)],
)
def test_trimmed_means_are_integrals_of_the_quantile_function(name: str, low: float, high: float):
    mix = mixture((4, 20))
    nodes, weights = np.polynomial.legendre.leggauss(400)
    # u = low + (high - low) v**4 ... denser at both ends, where the quantile function is steep
    v = (nodes + 1) / 2
    smooth = v**3 * (10 - 15 * v + 6 * v * v)
    slope = 30 * v**2 * (1 - v) ** 2
    values = [exact_points(mix, f"quantile_{low + (high - low) * s}") for s in smooth]
    integral = sum(value * w * d / 2 for value, w, d in zip(values, weights, slope, strict=True))
    np.testing.assert_allclose(exact_points(mix, name), integral, rtol=1e-6)


def test_limits_that_are_infinite_are_refused():
    for name in ("quantile_0", "quantile_100", "lower_trimmed_mean_1", "upper_trimmed_mean_1", "quantile_plus_std_0_1"):
        with pytest.raises(ValueError, match="exact value"):
            exact_points(mixture(), name)
    np.testing.assert_array_equal(exact_points(mixture(), "mean_quantile_mix_0_1"), exact_points(mixture(), "mean"))


def test_moments_that_do_not_exist_are_refused():
    with pytest.raises(ForecastError, match="no standard deviation"):
        exact_points(mixture((1.5, 2)), "mean_plus_std_1")
    with pytest.raises(ForecastError, match="no mean"):
        exact_points(mixture((0.5, 1)), "trimmed_mean_0")
    assert np.isfinite(exact_points(mixture((0.5, 1)), "median")).all()


def test_of_an_expectation_there_is_only_the_mean():
    points = np.array([[1.0], [2.0]])
    expectation = Expectation(points=points, mass=np.ones(2), bound=np.zeros((2, 1)))
    np.testing.assert_array_equal(exact_points(expectation, "mean"), points)
    with pytest.raises(ValueError, match="only the mean"):
        exact_points(expectation, "median")
