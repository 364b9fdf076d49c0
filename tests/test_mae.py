"""The staged evaluation: its numbers by hand, its caches, its rungs, and that nothing leaks from a target."""

import itertools
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forecasters
from forecasters import Bars, Forecaster, ForecastError
from forecasters.toto_model import TOTO
from objectives.bars import PRICE_NAMES, bars_fingerprint, read_bars
from objectives.evaluation import STAGES, Evaluator
from objectives.metrics import Measurement, measure_no_change
from objectives.windows import SeedKind, Windows, now, split
from studies.demo import demo_bars

TINY = Path(forecasters.__file__).parent / "checkpoints" / "toto-tiny"
PARAMS = {"context_length": 64, "num_samples": 32, "aggregate": "trimmed_mean_10"}


@dataclass(frozen=True, kw_only=True)
class PlainEncoded:
    last: np.ndarray  # [W]
    spread: np.ndarray  # [W]
    horizon: int

    @property
    def nbytes(self) -> int:
        return self.last.nbytes + self.spread.nbytes


class Plain:
    """A random walk with the volatility of the context, in numpy: keeps the contract and counts its calls."""

    model = "toto"
    params = TOTO.params
    fingerprint = "plain"
    free_draw_horizon = 10**9

    def __init__(self, company: float = 0.0) -> None:
        self.company = company  # how much a forecast depends on who else is in the batch, as on a GPU
        self.forwards = 0
        self.draws: list[dict[str, Any]] = []

    def encode(self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int) -> PlainEncoded:
        self.forwards += 1
        tails = [context.close[-params.get("context_length", 100) :] for context in contexts]
        last = np.array([tail[-1] for tail in tails])
        spread = np.array([np.diff(np.log(tail)).std() for tail in tails])
        return PlainEncoded(last=last + self.company * last.sum(), spread=spread, horizon=horizon)

    def draw(self, encoded: Any, params: Mapping[str, Any], seeds: Sequence[int]) -> np.ndarray:
        self.draws.append(dict(params))
        shape = (params.get("num_samples", 50), encoded.horizon)
        steps = np.array([np.random.default_rng(seed).standard_normal(shape) for seed in seeds])  # [W, S, H]
        return encoded.last[:, None, None] * np.exp(encoded.spread[:, None, None] * steps.cumsum(axis=2))


class Given(Plain):
    """Answers with these points, every sample the same."""

    def __init__(self, points: Mapping[int, list[float]]) -> None:
        super().__init__()
        self.points = points  # by the last close of the window

    def draw(self, encoded: Any, params: Mapping[str, Any], seeds: Sequence[int]) -> np.ndarray:
        count = params.get("num_samples", 4)
        rows = [self.points[int(last)] for last in encoded.last]
        return np.repeat(np.array(rows, dtype=float)[:, None, :], count, axis=1)


@pytest.fixture(scope="module")
def bars(tmp_path_factory: pytest.TempPathFactory) -> Bars:
    return read_bars(demo_bars(tmp_path_factory.mktemp("data"))[0])[0]


def validation(bars: Bars, horizon: int = 1) -> Windows:
    return split(bars, symbol="SP500", horizon=horizon).validation


def comparable(measured: Measurement) -> dict[str, Any]:
    values = asdict(measured)
    del values["seconds"], values["latency_s"]  # the only parts that may differ
    return values


# --- metrics ---------------------------------------------------------------------------------------------------


def small_windows() -> Windows:
    close = np.array([1.0, 1.0, 10.0, 12.0, 20.0, 16.0, 16.0, 25.0])
    times = np.datetime64("2024-01-01", "ns") + np.arange(8) * np.timedelta64(1, "D")
    bars = Bars(timestamps=times, open=close, high=close, low=close, close=close, volume=None)
    return Windows(symbol="A", bars=bars, origins=(3, 5), horizon=2)


def test_metrics_by_hand() -> None:
    # Targets (12, 20) after 10 and (16, 16) after 20.
    forecaster = Given({10: [11, 17], 20: [20, 13]})
    measured = Evaluator(forecaster, cache_bytes=0).measure(small_windows(), {})
    # Errors: 1, 3 -> mean 2 over 10; 4, 3 -> 3.5 over 20. No change: 2, 10 -> 6 over 10; 4, 4 -> 4 over 20.
    assert measured.errors == pytest.approx((0.2, 0.175))
    assert measured.mae == pytest.approx(0.1875)
    assert measured.price_mae == pytest.approx(11 / 4)
    assert measured.mae_percent == pytest.approx(100 * 11 / 64)
    assert measured.no_change_mae == pytest.approx(0.4)
    assert measure_no_change(small_windows()) == measured.no_change_mae
    assert measured.skill == pytest.approx(1 - 0.1875 / 0.4)
    assert measured.windows == 2
    assert tuple(measured.seconds) == STAGES
    assert all(seconds >= 0 for seconds in measured.seconds.values())


def test_no_skill_where_no_price_moved() -> None:
    windows = small_windows()
    still = replace(windows, bars=replace(windows.bars, close=np.full(8, 10.0)))
    measured = Evaluator(Given({10: [11, 10]}), cache_bytes=0).measure(still, {})
    assert (measured.mae, measured.no_change_mae, measured.skill) == (0.05, 0.0, 0.0)


@pytest.mark.parametrize("horizon", [1, 7])
@pytest.mark.parametrize("chunk_size", [1, 7, 30, 100])
def test_errors_are_in_origin_order(bars: Bars, horizon: int, chunk_size: int) -> None:
    windows = validation(bars, horizon)
    measured = Evaluator(Plain(), cache_bytes=0, rung=chunk_size).measure(windows, {**PARAMS, "aggregate": "mean"})
    errors = []
    for origin, seed in zip(windows.origins, windows.seeds(0), strict=True):
        tail = bars.close[origin - 64 : origin]
        steps = np.random.default_rng(seed).standard_normal((32, horizon))
        points = (tail[-1] * np.exp(np.diff(np.log(tail)).std() * steps.cumsum(axis=1))).mean(axis=0)
        errors.append(np.abs(points - bars.close[origin : origin + horizon]).mean() / tail[-1])
    np.testing.assert_allclose(measured.errors, errors, rtol=1e-12)
    assert measured.mae == pytest.approx(np.mean(errors), rel=1e-12)


# --- rungs -----------------------------------------------------------------------------------------------------


def test_rungs_come_after_every_chunk_but_the_last(bars: Bars) -> None:
    windows = validation(bars)
    rungs: list[tuple[int, float]] = []
    forecaster = Plain()
    measured = Evaluator(forecaster, cache_bytes=0, rung=8).measure(
        windows, PARAMS, on_rung=lambda done, mae: rungs.append((done, mae))
    )
    assert [done for done, _ in rungs] == [8, 16, 24]
    order = list(itertools.chain.from_iterable(windows.chunks(8)))
    for done, mae in rungs:
        assert mae == pytest.approx(np.mean([measured.errors[index] for index in order[:done]]), rel=1e-12)
    rungs.clear()
    Evaluator(Plain(), cache_bytes=0, rung=30).measure(
        windows, PARAMS, on_rung=lambda done, mae: rungs.append((done, mae))
    )
    assert rungs == []


def test_what_a_rung_raises_ends_the_work_and_leaves_a_good_cache(bars: Bars) -> None:
    class Pruned(Exception):
        pass

    def prune(done: int, mae: float) -> None:
        if done == 20:
            raise Pruned

    forecaster = Plain()
    evaluator = Evaluator(forecaster, cache_bytes=1 << 20)
    with pytest.raises(Pruned):
        evaluator.measure(validation(bars), PARAMS, on_rung=prune)
    assert forecaster.forwards == 2  # the third chunk was never begun
    measured = evaluator.measure(validation(bars), PARAMS)
    assert forecaster.forwards == 3
    assert comparable(measured) == comparable(Evaluator(Plain(), cache_bytes=0).measure(validation(bars), PARAMS))


@pytest.mark.parametrize("batch", [1, 4, 5, 8, 16, 20, 30, 100])
def test_the_batch_of_a_forward_is_not_the_rung(bars: Bars, batch: int) -> None:
    def measured(batch: int | None, stop: int | None = None) -> tuple[list[tuple[int, float]], dict[str, Any], Plain]:
        class Pruned(Exception):
            pass

        def report(done: int, mae: float) -> None:
            rungs.append((done, mae))
            if done == stop:
                raise Pruned

        rungs: list[tuple[int, float]] = []
        forecaster = Plain()
        evaluator = Evaluator(forecaster, cache_bytes=1 << 20, rung=8, batch=batch)
        if stop:
            with pytest.raises(Pruned):
                evaluator.measure(windows, PARAMS, on_rung=report)
            rungs.clear()
        return (
            rungs,
            comparable(evaluator.measure(windows, PARAMS, on_rung=report if stop is None else None)),
            forecaster,
        )

    windows = validation(bars)
    rungs, whole, forecaster = measured(batch)
    each_chunk, same, _ = measured(None)
    assert whole == same  # these forecasts do not depend on their batch
    left = 30 // batch * batch if 30 % batch else 30 - batch  # what is done before the last batch
    assert rungs == [one for one in each_chunk if one[0] <= left], "nothing can be spared once all is done"
    assert forecaster.forwards == -(-30 // batch)
    _, again, forecaster = measured(batch, stop=16 if left >= 16 else None)
    assert again == whole
    assert forecaster.forwards == -(-30 // batch)  # the batches that were done were the same ones


def test_what_is_pruned_costs_no_further_batch(bars: Bars) -> None:
    def prune(done: int, mae: float) -> None:
        raise InterruptedError

    for batch, forwards in ((5, 2), (10, 1), (20, 1)):
        forecaster = Plain()
        with pytest.raises(InterruptedError):
            Evaluator(forecaster, cache_bytes=0, rung=10, batch=batch).measure(validation(bars), PARAMS, on_rung=prune)
        assert forecaster.forwards == forwards


# --- forecasts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("model", ["toto", "kronos"])
def test_a_forecast_of_now_is_that_made_later_for_the_same_bar(bars: Bars, model: str, exact: bool) -> None:
    params = {
        "toto": {"context_length": 128, "num_samples": 32, "aggregate": "mean"},
        "kronos": {"max_context": 64, "clip": 2.0, "temperature": 0.5, "top_k": 8, "top_p": 0.9, "sample_count": 16},
    }[model]
    forecaster = forecasters.load(model, checkpoint=f"{model}-tiny")

    def forecast(known: Any) -> list[list[float]]:
        evaluator = Evaluator(forecaster, cache_bytes=0, exact=exact)
        return evaluator.forecast(known, params, kind=SeedKind.SERVED).tolist()

    served = forecast(now(bars.slice(0, 700), symbol="SP500"))
    assert np.isfinite(served).all()
    later = Windows(symbol="SP500", bars=bars.slice(0, 720), origins=(700,), horizon=1)
    assert forecast(later) == served
    after = np.arange(720) >= 700
    garbage = {name: np.where(after, 9e4, getattr(later.bars, name)) for name in PRICE_NAMES}
    assert forecast(replace(later, bars=replace(later.bars, **garbage))) == served
    known = replace(later.bars, close=np.where(np.arange(720) >= 699, 2 * later.bars.close, later.bars.close))
    assert forecast(replace(later, bars=known)) != served


def test_samples_are_those_that_points_are_made_of(bars: Bars) -> None:
    windows, evaluator = validation(bars, 3), Evaluator(Plain(), cache_bytes=1 << 20, max_num_samples=64)
    params = {**PARAMS, "aggregate": "mean"}
    samples = evaluator.samples(windows, params, pass_number=2, kind=SeedKind.SERVED)
    assert samples.shape == (30, 32, 3)
    points = evaluator.forecast(windows, params, pass_number=2, kind=SeedKind.SERVED)
    np.testing.assert_allclose(samples.mean(axis=1), points, rtol=1e-12)
    assert not np.allclose(evaluator.forecast(windows, params, pass_number=2), points, rtol=1e-6)  # a study's seeds
    with pytest.raises(ValueError, match="draws no samples"):
        Evaluator(Plain(), cache_bytes=0, exact=True).samples(windows, params)


def test_a_forecast_of_now_that_is_not_finite_says_so(bars: Bars) -> None:
    class Lost(Plain):
        def draw(self, encoded: Any, params: Mapping[str, Any], seeds: Sequence[int]) -> np.ndarray:
            return super().draw(encoded, params, seeds) * np.nan

    evaluator, contexts = Evaluator(Lost(), cache_bytes=0), now(bars.slice(0, 200), symbol="SP500")
    for ask in (evaluator.forecast, evaluator.samples):
        with pytest.raises(ForecastError, match="SP500: the forecast for the bar after 1999-10-18 is NaN or infinite"):
            ask(contexts, PARAMS, kind=SeedKind.SERVED)


# --- latency ---------------------------------------------------------------------------------------------------


def test_latency_is_of_windows_that_were_computed(bars: Bars) -> None:
    class Slow(Plain):
        def encode(self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int) -> PlainEncoded:
            time.sleep(0.02)
            return super().encode(contexts, params, horizon)

    windows, evaluator = validation(bars), Evaluator(Slow(), cache_bytes=1 << 20)
    first = evaluator.measure(windows, PARAMS).latency_s
    assert first is not None
    assert 0.002 <= first < 0.02  # 20 ms for ten windows
    assert evaluator.measure(windows, PARAMS).latency_s is None  # the cache answered
    assert evaluator.measure(windows, PARAMS, passes=[1]).latency_s is None  # drawn anew, and not encoded
    more = replace(windows, origins=(windows.origins[0] - 1, *windows.origins))
    both = evaluator.measure(more, PARAMS, passes=range(5)).latency_s
    assert both is not None
    assert both >= 0.002  # of the pass that encoded, not of five that share it


# --- passes ----------------------------------------------------------------------------------------------------


def test_errors_are_averaged_over_passes(bars: Bars) -> None:
    windows, evaluator = validation(bars), Evaluator(Plain(), cache_bytes=0, rung=7)
    single = [evaluator.measure(windows, PARAMS, passes=[number]) for number in (3, 4, 8)]
    together = evaluator.measure(windows, PARAMS, passes=[3, 4, 8])
    assert together.errors == pytest.approx(np.mean([one.errors for one in single], axis=0))
    assert together.price_mae == pytest.approx(np.mean([one.price_mae for one in single]))
    assert together.mae == pytest.approx(np.mean(together.errors))
    assert [one.sampling_error for one in single] == [None] * 3
    assert len({one.mae for one in single}) == 3


def test_the_sampling_error_is_that_of_repeating_with_other_seeds(bars: Bars) -> None:
    windows, evaluator = validation(bars), Evaluator(Plain(), cache_bytes=0, rung=30)
    repeated = [evaluator.measure(windows, PARAMS, passes=[2 * number, 2 * number + 1]) for number in range(200)]
    seen = np.std([one.mae for one in repeated], ddof=1)
    told = np.sqrt(np.mean([(one.sampling_error or 0) ** 2 for one in repeated]))
    assert told == pytest.approx(seen, rel=0.2)  # the standard deviation of 200 is known to 5 %


def test_passes_share_an_encoding_in_a_cache_that_holds_no_second_one(bars: Bars) -> None:
    forecaster = Plain()
    chunk_bytes = 2 * 10 * 8  # two float64 a window
    Evaluator(forecaster, cache_bytes=chunk_bytes, rung=10).measure(validation(bars), PARAMS, passes=range(5))
    assert (forecaster.forwards, len(forecaster.draws)) == (3, 15)


# --- caches ----------------------------------------------------------------------------------------------------


def test_a_trial_pays_only_for_what_it_changed(bars: Bars) -> None:
    forecaster = Plain()
    evaluator = Evaluator(forecaster, cache_bytes=1 << 24, max_num_samples=64)

    def cost(windows: Windows, passes: Sequence[int] = (0,), **changed: Any) -> tuple[int, int]:
        forwards, draws = forecaster.forwards, len(forecaster.draws)
        evaluator.measure(windows, {**PARAMS, **changed}, passes=passes)
        return forecaster.forwards - forwards, len(forecaster.draws) - draws

    windows = validation(bars)
    assert cost(windows) == (3, 3)
    assert {draw["num_samples"] for draw in forecaster.draws} == {64}
    assert cost(windows) == (0, 0)
    assert cost(windows, aggregate="median") == (0, 0)
    assert cost(windows, num_samples=64) == (0, 0)
    assert cost(windows, samples_per_batch=16) == (0, 0)  # no param of ours
    assert cost(windows, passes=[1]) == (0, 3)
    assert cost(windows, num_samples=100) == (0, 3)  # more than was foreseen
    assert cost(windows, num_samples=99) == (0, 0)
    assert cost(windows, context_length=32) == (3, 3)
    assert cost(windows) == (0, 0)
    assert cost(replace(windows, symbol="OTHER")) == (0, 3)  # the same contexts, other seeds
    assert cost(replace(windows, horizon=2)) == (3, 3)
    # Rows appended later leave every context as it was.
    assert cost(replace(windows, bars=windows.bars.slice(0, windows.origins[-1] + 1))) == (0, 0)
    touched = replace(windows.bars, volume=windows.bars.close)
    assert cost(replace(windows, bars=touched)) == (3, 3)


@pytest.mark.parametrize("horizon", [1, 5])
@pytest.mark.parametrize("max_num_samples", [None, 48, 128])
@pytest.mark.parametrize("cache_bytes", [0, 9_000, 1 << 24])
def test_equal_params_give_equal_bits_whatever_ran_before(
    bars: Bars, cache_bytes: int, max_num_samples: int | None, horizon: int
) -> None:
    windows = validation(bars, horizon)
    trials = [
        {"context_length": length, "num_samples": count, "aggregate": name}
        for length in (32, 64)
        for count in (16, 48, 128)
        for name in ("mean", "median", "winsorized_mean_10", "mean_plus_std_1")
    ]
    # A forecast that depends on its batch shows whether any window was ever in other company.
    fresh = [comparable(Evaluator(Plain(company=1e-6), cache_bytes=0).measure(windows, params)) for params in trials]
    evaluator = Evaluator(Plain(company=1e-6), cache_bytes=cache_bytes, max_num_samples=max_num_samples)
    order = [*range(len(trials)), *range(len(trials))]
    random.Random(0).shuffle(order)
    for index in order:
        assert comparable(evaluator.measure(windows, trials[index])) == fresh[index]
        assert evaluator._cache.nbytes <= cache_bytes
    assert (evaluator._cache.nbytes == 0) == (cache_bytes == 0)


@pytest.mark.parametrize("size", [160, 10 * 32 * 8 + 160])  # an encoding; one and a draw of 32 samples
def test_the_cache_drops_what_was_used_longest_ago(bars: Bars, size: int) -> None:
    windows = replace(validation(bars), origins=validation(bars).origins[:10])
    forecaster = Plain()
    evaluator = Evaluator(forecaster, cache_bytes=2 * size)

    def forwards(length: int) -> int:
        before = forecaster.forwards
        evaluator.measure(windows, {"context_length": length, "num_samples": 32})
        return forecaster.forwards - before

    assert [forwards(length) for length in (10, 20, 10, 30, 10, 20)] == [1, 1, 0, 1, 0, 1]


def test_an_entry_too_large_is_used_and_not_kept(bars: Bars) -> None:
    forecaster = Plain()
    evaluator = Evaluator(forecaster, cache_bytes=1000)  # the encodings fit, no draw does
    for _ in range(2):
        evaluator.measure(validation(bars), PARAMS)
    assert (forecaster.forwards, len(forecaster.draws)) == (3, 6)
    assert evaluator._cache.nbytes == 3 * 160


def test_the_digest_of_contexts_is_made_once(bars: Bars, monkeypatch: pytest.MonkeyPatch) -> None:
    from objectives import windows as module

    calls = []
    original = bars_fingerprint
    monkeypatch.setattr(module, "bars_fingerprint", lambda bars: calls.append(1) or original(bars))
    windows, evaluator = validation(bars), Evaluator(Plain(), cache_bytes=1 << 20)
    for name in ("mean", "median", "p10"):
        evaluator.measure(windows, {**PARAMS, "aggregate": name})
    assert len(calls) == 3  # chunks, not chunks times trials


def test_without_a_sample_count_the_model_chooses(bars: Bars) -> None:
    forecaster = Plain()
    evaluator = Evaluator(forecaster, cache_bytes=1 << 20, max_num_samples=64)
    evaluator.measure(validation(bars), PARAMS)  # draws 64, which must not be taken for the model's own 50
    by_default = evaluator.measure(validation(bars), {"context_length": 64})
    assert forecaster.draws[-1] == {}
    explicit = evaluator.measure(validation(bars), {"context_length": 64, "num_samples": 50})
    assert comparable(by_default) == comparable(explicit)


# --- errors ----------------------------------------------------------------------------------------------------


class Broken(Plain):
    """Window 4 of every chunk has a NaN as its 21st sample."""

    def draw(self, encoded: Any, params: Mapping[str, Any], seeds: Sequence[int]) -> np.ndarray:
        samples = super().draw(encoded, params, seeds)
        if samples.shape[1] > 20:
            samples[4, 20] = np.nan
        return samples


@pytest.mark.parametrize("max_num_samples", [None, 64])
def test_a_non_finite_forecast_names_symbol_and_origin(bars: Bars, max_num_samples: int | None) -> None:
    windows = validation(bars)
    evaluator = Evaluator(Broken(), cache_bytes=1 << 20, max_num_samples=max_num_samples)
    origin = str(windows.timestamps[windows.chunks(10)[0][4]])[:10]
    with pytest.raises(ForecastError, match=f"SP500: the forecast for {origin} is NaN or infinite"):
        evaluator.measure(windows, PARAMS)
    # A sample that these params do not use must not decide by what was drawn before.
    assert evaluator.measure(windows, {**PARAMS, "num_samples": 20}).windows == 30


def test_a_sum_that_overflows_is_no_forecast() -> None:
    forecaster = Given({10: [1e308, 17], 20: [20, 13]})
    with np.errstate(over="ignore"), pytest.raises(ForecastError, match="A: the forecast for 2024-01-04 is NaN or inf"):
        Evaluator(forecaster, cache_bytes=0).measure(small_windows(), {})


def test_a_forecasters_own_error_gets_the_symbol(bars: Bars) -> None:
    class Refusing(Plain):
        def encode(self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int) -> PlainEncoded:
            raise ForecastError("horizon too long")

    with pytest.raises(ForecastError, match=r"^SP500: horizon too long$"):
        Evaluator(Refusing(), cache_bytes=0).measure(validation(bars), PARAMS)


def test_an_unknown_aggregate_costs_no_forward(bars: Bars) -> None:
    forecaster = Plain()
    with pytest.raises(ValueError, match="unknown aggregate 'mode'"):
        Evaluator(forecaster, cache_bytes=0).measure(validation(bars), {**PARAMS, "aggregate": "mode"})
    assert forecaster.forwards == 0


def test_samples_of_another_shape_are_a_defect(bars: Bars) -> None:
    class Short(Plain):
        def draw(self, encoded: Any, params: Mapping[str, Any], seeds: Sequence[int]) -> np.ndarray:
            return super().draw(encoded, params, seeds)[:, :-1]

    with pytest.raises(ValueError, match=r"toto drew \[10, 31, 1\] and not \[10, 32, 1\]"):
        Evaluator(Short(), cache_bytes=0).measure(validation(bars), PARAMS)


# --- leaks -----------------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=["plain", pytest.param("toto-tiny", marks=pytest.mark.skipif(not TINY.exists(), reason="no toto-tiny"))],
)
def forecaster(request: pytest.FixtureRequest) -> Forecaster:
    if request.param == "plain":
        return Plain()
    return forecasters.load("toto", checkpoint="toto-tiny")


@pytest.mark.parametrize("horizon", [1, 7])
def test_a_jump_at_the_target_changes_no_forecast_for_it(bars: Bars, forecaster: Forecaster, horizon: int) -> None:
    windows = replace(validation(bars, horizon), origins=validation(bars, horizon).origins[::6])
    params = {"context_length": 128, "num_samples": 64}

    def points(bars: Bars, origin: int) -> np.ndarray:
        """All samples of the forecast for one origin."""
        one = Windows(symbol="SP500", bars=bars, origins=(origin,), horizon=horizon)
        encoded = forecaster.encode(one.contexts([0]), {"context_length": 128}, horizon)
        return forecaster.draw(encoded, {"num_samples": 64}, one.seeds(0))

    for origin in windows.origins:
        later = np.arange(len(bars)) >= origin
        jumped = replace(bars, **{name: np.where(later, 9e4, getattr(bars, name)) for name in PRICE_NAMES})
        assert np.array_equal(points(jumped, origin), points(bars, origin))
        # And the measurement sees the jump only as a target.
        one = Windows(symbol="SP500", bars=jumped, origins=(origin,), horizon=horizon)
        measured = Evaluator(forecaster, cache_bytes=0).measure(one, params)
        expected = np.abs(points(bars, origin).mean(axis=1) - 9e4).mean() / bars.close[origin - 1]
        assert measured.mae == pytest.approx(expected, rel=1e-12)
        # The bar before is known: a jump there must show.
        known = replace(bars, close=np.where(np.arange(len(bars)) >= origin - 1, 9e4, bars.close))
        assert not np.array_equal(points(known, origin), points(bars, origin))
