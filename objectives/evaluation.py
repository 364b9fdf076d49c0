"""The staged evaluation of one set of params on some windows.

Owns the stages and the cache between trials. A trial pays only for the stages whose inputs it changed, and its
numbers are the same to the last bit whatever ran before and however little the cache holds. Knows nothing of trials,
search spaces, studies or devices.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

from forecasters import ExactForecaster, Forecaster, ForecastError
from objectives.aggregation import Aggregate, Draw, parse
from objectives.bars import timestamp_text
from objectives.exact import exact_points
from objectives.metrics import Measurement, measurement_of, relative_errors
from objectives.windows import Windows

STAGES: tuple[str, ...] = ("encode", "draw", "aggregate")


class Evaluator:
    """Measures params with one forecaster, and keeps what later params can use again. One a worker; not for threads.

    cache_bytes: bound on what is kept between chunks (encoded windows and draws); 0 keeps nothing.
    chunk_size: windows in a forward and between rungs. It decides the last bits of every number, so compare
    measurements of one chunk size only.
    max_num_samples: draw this many at once, since smaller counts are prefixes; larger counts still work.
    exact: no samples but what any number of them tends to; params then name no number of samples.
    """

    def __init__(
        self,
        forecaster: Forecaster,
        *,
        cache_bytes: int,
        chunk_size: int = 10,
        max_num_samples: int | None = None,
        exact: bool = False,
    ) -> None:
        self.forecaster = forecaster
        self.chunk_size = chunk_size
        self.exact = exact
        self.max_num_samples = max_num_samples or 0
        self.seconds = dict.fromkeys(STAGES, 0.0)  # spent so far, by stage, measurements that were broken off too
        self._cache = _Cache(cache_bytes)

    @property
    def cached_bytes(self) -> int:
        """What is kept now, never above `cache_bytes`."""
        return self._cache.nbytes

    def measure(
        self,
        windows: Windows,
        params: Mapping[str, Any],
        *,
        passes: Sequence[int] = (0,),
        on_rung: Callable[[int, float], None] | None = None,
    ) -> Measurement:
        """The errors of these params on these windows.

        params: the model's encode and draw params and `aggregate` (default: mean); others are not looked at.
        passes: every number has seeds of its own; errors are averaged over them.
        on_rung: called with windows done and their mae after every chunk but the last; what it raises ends the
        measurement and passes through.
        Raises ForecastError naming the symbol; ValueError for an unknown aggregate.
        """
        seconds = dict.fromkeys(STAGES, 0.0)
        return measurement_of(windows, self._points(windows, params, passes, on_rung, seconds), seconds)

    def forecast(self, windows: Windows, params: Mapping[str, Any], *, pass_number: int = 0) -> np.ndarray:
        """The point forecasts of these params with the seeds of one pass, float64 [W, H], price.

        Raises what `measure` raises.
        """
        return self._points(windows, params, (pass_number,), None, dict.fromkeys(STAGES, 0.0))[0]

    def _points(
        self,
        windows: Windows,
        params: Mapping[str, Any],
        passes: Sequence[int],
        on_rung: Callable[[int, float], None] | None,
        seconds: dict[str, float],
    ) -> np.ndarray:
        """Point forecasts of every pass, [R, W, H]; `seconds` are added to."""
        plan = _Plan.of(self.forecaster, params, at_least=self.max_num_samples)
        aggregate = parse(params.get("aggregate", "mean"))
        seeds = [windows.seeds(pass_number) for pass_number in passes]
        points = np.full((len(passes), *windows.actuals.shape), np.nan)
        done: list[int] = []
        for chunk in windows.chunks(self.chunk_size):
            if done and on_rung is not None:
                on_rung(len(done), float(relative_errors(windows, points)[:, done].mean()))
            rows = list(chunk)
            points_of = self._exact_points if self.exact else self._sampled_points
            took = dict.fromkeys(STAGES, 0.0)
            # All passes of a chunk before the next: a cache that holds one chunk's encoding is enough.
            for place, row_seeds in enumerate(seeds):
                asked = _Chunk(windows=windows, indices=chunk, seeds=tuple(row_seeds[row] for row in chunk))
                points[place, rows] = points_of(asked, plan, aggregate, took)
            for total in (seconds, self.seconds):
                for stage in STAGES:
                    total[stage] += took[stage]
            bad = ~np.isfinite(points[:, rows]).all(axis=(0, 2))
            _check(windows, chunk, int(bad.argmax()) if bad.any() else None)
            done += rows
        return points

    def _sampled_points(
        self, chunk: _Chunk, plan: _Plan, aggregate: Aggregate, seconds: dict[str, float]
    ) -> np.ndarray:
        """Points of the chunk's windows, [W, H], from the samples that params ask for."""
        encode_key = self._encode_key(chunk, plan)
        key = (*encode_key, tuple(plan.draw_params.items()), plan.count is None, chunk.seeds)
        draw = self._cache.get(key)
        if not isinstance(draw, Draw) or (plan.count is not None and plan.count > draw.count):
            with _naming(chunk.windows.symbol):
                encoded = self._encoded(encode_key, chunk, plan, seconds)
                with _timed(seconds, "draw"):
                    samples = self.forecaster.draw(encoded, plan.asked, chunk.seeds)
                    draw = Draw(samples)
            self._cache.put(encode_key, encoded)  # after its use: what Kronos looked up has made it larger
            expected = (len(chunk.indices), draw.count if plan.drawn is None else plan.drawn, chunk.windows.horizon)
            if samples.shape != expected:
                raise ValueError(f"{self.forecaster.model} drew {list(samples.shape)} and not {list(expected)}")
        with _timed(seconds, "aggregate"):
            _check(chunk.windows, chunk.indices, draw.non_finite_window(plan.count))
            points = draw.aggregate(aggregate, plan.count)
        self._cache.put(key, draw)  # after its use: sorting has made it larger
        return points

    def _exact_points(self, chunk: _Chunk, plan: _Plan, aggregate: Aggregate, seconds: dict[str, float]) -> np.ndarray:
        """Points of the chunk's windows, [W, H], without samples."""
        key = self._encode_key(chunk, plan)
        with _naming(chunk.windows.symbol):
            encoded = self._encoded(key, chunk, plan, seconds)
            with _timed(seconds, "draw"):
                answer = cast(ExactForecaster, self.forecaster).exact(encoded, plan.draw_params, chunk.seeds)
            self._cache.put(key, encoded)
            with _timed(seconds, "aggregate"):
                return exact_points(answer, aggregate)

    def _encode_key(self, chunk: _Chunk, plan: _Plan) -> tuple[Hashable, ...]:
        # Whole chunks, not windows, are kept: then no window is ever in a batch of other company.
        return (
            self.forecaster.fingerprint,
            tuple(plan.encode_params.items()),
            chunk.windows.horizon,
            chunk.windows.digest(chunk.indices),
        )

    def _encoded(self, key: Hashable, chunk: _Chunk, plan: _Plan, seconds: dict[str, float]) -> Any:
        encoded: Any = self._cache.get(key)
        if encoded is None:
            with _timed(seconds, "encode"):
                contexts = chunk.windows.contexts(chunk.indices)
                encoded = self.forecaster.encode(contexts, plan.encode_params, chunk.windows.horizon)
            self._cache.put(key, encoded)
        return encoded


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Windows that are always computed together."""

    windows: Windows
    indices: Sequence[int]
    seeds: tuple[int, ...]  # one a window


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Params by stage, with the number of samples apart."""

    encode_params: Mapping[str, Any]
    draw_params: Mapping[str, Any]  # without the number of samples
    count_name: str | None  # what the model calls the number of samples, where params have it
    count: int | None  # samples to use; None: all that the model draws by default
    drawn: int | None  # samples to draw

    @classmethod
    def of(cls, forecaster: Forecaster, params: Mapping[str, Any], *, at_least: int) -> _Plan:
        stages = forecaster.params
        count_name = stages.num_samples if stages.num_samples in params else None
        count = None if count_name is None else int(params[count_name])
        return cls(
            encode_params={name: params[name] for name in stages.encode if name in params},
            draw_params={name: params[name] for name in stages.draw if name in params and name != count_name},
            count_name=count_name,
            count=count,
            drawn=None if count is None else max(count, at_least),
        )

    @property
    def asked(self) -> dict[str, Any]:
        """The draw params to draw with."""
        return {**self.draw_params, **({self.count_name: self.drawn} if self.count_name else {})}


def _check(windows: Windows, chunk: Sequence[int], bad: int | None) -> None:
    """Raises ForecastError if a window of the chunk, by its place there, is bad."""
    if bad is not None:
        origin = timestamp_text(windows.timestamps[chunk[bad]])
        raise ForecastError(f"{windows.symbol}: the forecast for {origin} is NaN or infinite")


@contextlib.contextmanager
def _naming(symbol: str) -> Iterator[None]:
    """A forecaster knows no symbols; whoever reads its error needs one."""
    try:
        yield
    except ForecastError as error:
        raise ForecastError(f"{symbol}: {error}") from error


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] += time.perf_counter() - start


# --- cache -------------------------------------------------------------------------------------------------


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


class _Cache:
    """The entries used last, as many as fit. One that alone is too large is not kept."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._entries: OrderedDict[Hashable, tuple[_Sized, int]] = OrderedDict()  # with its size when it was put

    def get(self, key: Hashable) -> _Sized | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: Hashable, entry: _Sized) -> None:
        """Keep it as the one used last, at the size that it has now."""
        if key in self._entries:
            self.nbytes -= self._entries.pop(key)[1]
        size = entry.nbytes
        if size > self.limit:
            return
        self._entries[key] = (entry, size)
        self.nbytes += size
        while self.nbytes > self.limit:
            _, (_, dropped) = self._entries.popitem(last=False)
            self.nbytes -= dropped
