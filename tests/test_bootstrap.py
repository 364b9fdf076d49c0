"""The stationary block bootstrap beside arch's, which draws and measures a series at a time."""

from __future__ import annotations

import numpy as np
import pytest
from arch.bootstrap import StationaryBootstrap, optimal_block_length

from objectives.bootstrap import block_lengths, resampled_indices


@pytest.mark.parametrize("count", [4, 7, 20, 41, 250, 1001])
def test_block_lengths_are_those_of_arch(count: int) -> None:
    shocks = np.random.default_rng(count).standard_t(4, size=(60, count))
    series = np.zeros_like(shocks)
    for row, memory in enumerate(np.linspace(-0.6, 0.95, len(series))):
        for bar in range(count):
            series[row, bar] = (memory * series[row, bar - 1] if bar else 0.0) + shocks[row, bar]
    if count <= 20:  # arch looks for lags that such series do not have
        assert ((lengths := block_lengths(series)) > 0).all()
        assert (lengths <= np.ceil(count / 3)).all()
        return
    theirs = optimal_block_length(series.T)["stationary"].to_numpy()
    assert block_lengths(series) == pytest.approx(theirs, rel=1e-9)


def test_what_does_not_vary_has_no_block_length() -> None:
    assert not np.isfinite(block_lengths(np.ones((1, 60)))).any()
    assert block_lengths(np.array([[1.0, 2.0, 3.0]])) == [1]


@pytest.mark.parametrize("block", [1, 7.5])
def test_blocks_are_as_long_as_asked_and_begin_anywhere(block: float) -> None:
    count, repetitions = 50, 4000
    indices = resampled_indices(count, block, repetitions, seed=3)
    assert indices.shape == (repetitions, count)
    assert np.bincount(indices.ravel(), minlength=count) / indices.size == pytest.approx(1 / count, rel=0.08)
    goes_on = ((indices[:, 1:] - indices[:, :-1]) % count == 1).mean()
    assert goes_on == pytest.approx(1 - 1 / block * (1 - 1 / count), abs=0.01)  # a new block may happen to follow
    assert (indices == resampled_indices(count, block, repetitions, seed=3)).all()


def test_means_are_spread_as_with_arch() -> None:
    series = np.random.default_rng(1).normal(size=80).cumsum()
    theirs = StationaryBootstrap(6, series, seed=1).apply(np.mean, 4000).std()
    assert series[resampled_indices(80, 6, 4000, seed=1)].mean(axis=1).std() == pytest.approx(theirs, rel=0.05)
