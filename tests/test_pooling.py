"""Evidence pooled over symbols: against cases computed by hand, and a simulation in which the truth is known."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from arch.bootstrap import StationaryBootstrap, optimal_block_length

from objectives.bootstrap import mean_errors
from studies.pooling import Improvement, Measured, Pool, SymbolErrors

WINDOWS = 250


def random_errors(rng: np.random.Generator, *, gain: float = 0.0, like: np.ndarray | None = None) -> np.ndarray:
    """Errors whose mean is lower by `gain` on the log scale, in expectation; of windows as hard as those of `like`."""
    hard = np.abs(rng.standard_t(5, WINDOWS)) + 0.05 if like is None else like
    return hard * np.exp(rng.normal(0, 0.15, WINDOWS) - gain)


def one_symbol(rng: np.random.Generator, gains: list[float], *, kind: str = "grid") -> SymbolErrors:
    hard = np.abs(rng.standard_t(5, WINDOWS)) + 0.05
    measured = [
        Measured(model="toto", family=number, kind=kind, errors=random_errors(rng, gain=gain, like=hard))
        for number, gain in enumerate(gains)
    ]
    return SymbolErrors(references={"toto": random_errors(rng, like=hard)}, measured=measured)


def own(symbol: SymbolErrors, place: int = 0) -> tuple[float, float]:
    """The gain that a symbol measured, and its variance."""
    reference, errors = symbol.references["toto"], symbol.measured[place].errors
    series = reference / reference.mean() - errors / errors.mean()
    return math.log(reference.mean() / errors.mean()), float(mean_errors(series[None])[0]) ** 2


def half_width(found: Improvement) -> float:
    """Of its interval, on the log scale."""
    low, high = (-math.log1p(-end) for end in found.interval)
    return (high - low) / 2


def test_one_symbol_falls_back_to_its_own_evidence() -> None:
    symbol = one_symbol(np.random.default_rng(1), [0.03])
    found = Pool([symbol]).improvement(0, 0, None)
    assert found.symbols == 1
    assert (
        found.value
        == found.own
        == pytest.approx(1 - symbol.measured[0].errors.mean() / symbol.references["toto"].mean())
    )
    assert half_width(found) == pytest.approx(1.96 * math.sqrt(own(symbol)[1]), rel=1e-4)


def test_two_symbols_by_hand() -> None:
    """DerSimonian and Laird (1986), and the posterior of a normal mean, written out for two."""
    rng = np.random.default_rng(2)
    symbols = [one_symbol(rng, [gain]) for gain in (0.00, 0.20)]
    (g1, v1), (g2, v2) = map(own, symbols)
    w1, w2 = 1 / v1, 1 / v2
    fixed = (w1 * g1 + w2 * g2) / (w1 + w2)
    q = w1 * (g1 - fixed) ** 2 + w2 * (g2 - fixed) ** 2
    between = (q - 1) / (w1 + w2 - (w1**2 + w2**2) / (w1 + w2))
    assert between > 0
    s1, s2 = 1 / (v1 + between), 1 / (v2 + between)
    mean = (s1 * g1 + s2 * g2) / (s1 + s2)
    share = between / (between + v1)
    posterior = share * g1 + (1 - share) * mean
    variance = share * v1 + (1 - share) ** 2 / (s1 + s2) + 2 * ((1 - share) * (g1 - mean)) ** 2
    pool = Pool(symbols)
    found = pool.improvement(0, 0, None)
    assert pool.gain(0, 0) == pytest.approx(posterior)
    assert found.value == pytest.approx(1 - math.exp(-posterior))
    assert half_width(found) == pytest.approx(1.96 * math.sqrt(variance), rel=1e-4)
    assert found.p_value == pytest.approx(NormalDist().cdf(-posterior / math.sqrt(variance)), rel=1e-4)
    assert found.symbols == 2


def test_equal_symbols_share_one_gain() -> None:
    """Where nothing differs between symbols but what chance explains, each is believed to be the mean of all."""
    rng = np.random.default_rng(46)
    symbols = [one_symbol(rng, [0.02]) for _ in range(8)]
    gains, variances = np.array([own(symbol) for symbol in symbols]).T
    mean = np.average(gains, weights=1 / variances)
    assert ((gains - mean) ** 2 / variances).sum() < len(symbols) - 1
    assert [Pool(symbols).gain(k, 0) for k in range(8)] == pytest.approx([mean] * 8)


def test_a_configuration_of_one_symbol_is_pooled_with_its_kind() -> None:
    """Each symbol's own best trial is another configuration: what they have in common is that they were chosen."""
    rng = np.random.default_rng(4)
    symbols = []
    for number in range(6):
        shared = one_symbol(rng, [0.0])
        errors = random_errors(rng, gain=0.05)
        trial = Measured(model="toto", family=f"of {number}", kind="own trial", errors=errors)
        symbols.append(SymbolErrors(references=shared.references, measured=[*shared.measured, trial]))
    pool = Pool(symbols)
    found = [pool.improvement(k, 1, None) for k in range(6)]
    assert [one.symbols for one in found] == [6] * 6
    assert np.ptp([one.value for one in found]) < np.ptp([one.own for one in found])


def test_fewer_samples_are_worth_what_they_are_worse_by_at_the_symbol() -> None:
    """A number of samples only adds noise: the largest is pooled, and the others keep their distance to it."""
    rng = np.random.default_rng(5)
    symbols = []
    for number in range(4):
        hard = np.abs(rng.standard_t(5, WINDOWS)) + 0.05
        most = random_errors(rng, gain=0.03, like=hard)
        members = [Measured(model="toto", family="mean", kind="grid", errors=most, samples=4096)]
        if number == 0:
            members.insert(0, Measured(model="toto", family="mean", kind="in use", errors=most * 1.02, samples=32))
        symbols.append(SymbolErrors(references={"toto": random_errors(rng, like=hard)}, measured=members))
    found = Pool(symbols).improvement(0, 1, 0)
    assert found.value == found.own == pytest.approx(1 - 1 / 1.02)
    assert found.symbols == 4


def test_models_are_compared_through_their_references() -> None:
    """What one model gains over another is pooled too, between the configurations that every symbol measured."""
    rng = np.random.default_rng(6)
    symbols = []
    for _ in range(10):
        hard = np.abs(rng.standard_t(5, WINDOWS)) + 0.05
        references = {"toto": random_errors(rng, like=hard), "kronos": random_errors(rng, gain=-0.10, like=hard)}
        measured = [
            Measured(model="toto", family="a", kind="grid", errors=random_errors(rng, gain=0.01, like=hard)),
            Measured(model="kronos", family="a", kind="grid", errors=random_errors(rng, gain=-0.07, like=hard)),
        ]
        symbols.append(SymbolErrors(references=references, measured=measured))
    pool = Pool(symbols)
    values = [pool.improvement(k, 1, 0) for k in range(10)]
    truth = 1 - math.exp(0.08)
    assert np.mean([one.value for one in values]) == pytest.approx(truth, abs=0.01)
    assert np.std([one.value for one in values]) < 0.5 * np.std([one.own for one in values])
    assert all(one.interval[0] < truth < one.interval[1] for one in values)


def test_standard_errors_are_those_of_the_stationary_bootstrap() -> None:
    rng = np.random.default_rng(6)
    shocks = rng.normal(size=(2, WINDOWS + 50))
    series = np.zeros_like(shocks)
    for time in range(1, shocks.shape[1]):
        series[:, time] = 0.5 * series[:, time - 1] + shocks[:, time]
    series = series[:, 50:]
    for row, found in zip(series, mean_errors(series), strict=True):
        block = math.ceil(optimal_block_length(row)["stationary"].iloc[0])
        bootstrap = StationaryBootstrap(block, row, seed=1)
        assert found == pytest.approx(bootstrap.apply(np.mean, 4000).std(), rel=0.05)


def test_errors_that_are_no_numbers_are_refused() -> None:
    good = np.ones(WINDOWS)
    for bad in (np.full(WINDOWS, np.nan), np.zeros(WINDOWS)):
        with pytest.raises(ValueError, match="finite, and above 0"):
            Pool(
                [
                    SymbolErrors(
                        references={"toto": good}, measured=[Measured(model="toto", family=1, kind="grid", errors=bad)]
                    )
                ]
            )


def test_the_interval_covers_the_truth() -> None:
    """Configurations whose true gains are known, at symbols between which they differ much, little or not at all."""
    rng = np.random.default_rng(7)
    hits = []
    for symbols, differing in ((2, 0.02), (5, 0.02), (12, 0.0), (12, 0.01), (12, 0.03), (24, 0.02)):
        for _ in range(96 // symbols):
            means = rng.normal(0, 0.03, 6)
            truth = means + rng.normal(0, differing, (symbols, 6))
            pool = Pool([one_symbol(rng, gains.tolist()) for gains in truth])
            for k in range(symbols):
                for place in range(1, 6):
                    low, high = pool.improvement(k, place, 0).interval
                    hits.append(low <= -math.expm1(truth[k, 0] - truth[k, place]) <= high)
    assert 0.92 <= np.mean(hits) <= 0.97
