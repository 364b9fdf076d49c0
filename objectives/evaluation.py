"""The staged evaluation of one set of params on some contexts or windows.

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
from typing import Any, cast

import numpy as np

from forecasters import KEYS, Encoded, ExactKeyedForecaster, Forecaster, ForecastError, StackingForecaster
from objectives.aggregation import Draw, parse
from objectives.exact import exact_points
from objectives.keys import KeyForecasts, key_forecasts, keyed
from objectives.metrics import Measurement, measurement_of, over_passes, price_errors
from objectives.quantiles import shrunk
from objectives.windows import Contexts, SeedKind, Windows
from objectives.work import WorkCounter

STAGES: tuple[str, ...] = ("encode", "draw", "aggregate")


class Evaluator:
    """Measures params with one forecaster, and keeps what later params can use again. One a worker; not for threads.

    cache_bytes: bound on what is kept between batches (encoded windows and draws); 0 keeps nothing.
    rung: windows between two reports of progress; it decides the order in which windows are computed.
    batch: windows in a forward of the network, in that order, by default those of a rung. Rung and batch decide the
    last bits of every number, so compare measurements of equal ones only. Neither has to be a multiple of the other.
    max_num_samples: draw this many at once, since smaller counts are prefixes; larger counts still work.
    exact: no samples but what any number of them tends to; params then name no number of samples. A model without
    samples is always exact.
    work: counts the network's operations by stage, beside `seconds`; None: nobody does.
    """

    def __init__(
        self,
        forecaster: Forecaster,
        *,
        cache_bytes: int,
        rung: int = 10,
        batch: int | None = None,
        max_num_samples: int | None = None,
        exact: bool = False,
        work: WorkCounter | None = None,
    ) -> None:
        self.forecaster, self._keyed = forecaster, keyed(forecaster)
        self.work = work
        self.rung = rung
        self.batch = batch or rung
        self.exact = exact or not forecaster.params.num_samples
        self.max_num_samples = max_num_samples or 0
        self.seconds = dict.fromkeys(STAGES, 0.0)  # spent so far, by stage, measurements that were broken off too
        self.fresh, self.fresh_s = 0, 0.0  # windows whose bars were encoded so far, and the seconds to their points
        self._cache = _Cache(cache_bytes)

    def measure(
        self,
        windows: Windows,
        params: Mapping[str, Any],
        *,
        passes: Sequence[int] = (0,),
        on_rung: Callable[[int, float], None] | None = None,
    ) -> Measurement:
        """Measure the errors of these params on these windows, with the seeds of a study.

        params: the model's encode and draw params and `aggregate` (default: mean); others are not looked at.
        passes: every number has seeds of its own; errors are averaged over them.
        on_rung: called with the number of windows done and their mae at every multiple of `rung` below the number of
        windows, as soon as the batch that reaches it is done; what it raises ends the measurement and passes through.
        Raises ForecastError naming the symbol; ValueError for an unknown aggregate.
        """
        before, fresh, fresh_s = dict(self.seconds), self.fresh, self.fresh_s
        by_pass = np.full((len(passes), len(windows)), np.nan)
        order: list[int] = []
        for indices in self.batches(windows):
            by_pass[:, indices] = self.batch_errors(windows, params, indices, passes=passes)
            reached = range((len(order) // self.rung + 1) * self.rung, len(windows), self.rung)
            order += indices
            for done in reached:
                if on_rung is not None and done <= len(order):
                    on_rung(done, float((by_pass / windows.last_closes)[:, order[:done]].mean()))
        return measurement_of(
            windows,
            *over_passes(by_pass),
            passes=len(passes),
            seconds={stage: spent - before[stage] for stage, spent in self.seconds.items()},
            latency_s=(self.fresh_s - fresh_s) / (self.fresh - fresh) if self.fresh > fresh else None,
        )

    def batches(self, contexts: Contexts) -> list[list[int]]:
        """The indices of the windows that are always computed together, in the order in which `measure` takes them."""
        order = [index for chunk in contexts.chunks(self.rung) for index in chunk]
        return [order[start : start + self.batch] for start in range(0, len(order), self.batch)]

    def batch_errors(
        self, windows: Windows, params: Mapping[str, Any], indices: Sequence[int], *, passes: Sequence[int]
    ) -> np.ndarray:
        """Each window's error, price, float64 [R, w], for one of `batches`: what `measure` is made of, bit for bit.

        Raises what `measure` raises.
        """
        return price_errors(windows, indices, self.batch_points(windows, params, indices, passes=passes))

    def batch_points(
        self, windows: Windows, params: Mapping[str, Any], indices: Sequence[int], *, passes: Sequence[int]
    ) -> np.ndarray:
        """The point forecasts that `batch_errors` are the errors of, price, float64 [R, w, H].

        Raises what `measure` raises.
        """
        return self.batch_key_points(windows, params, indices, (windows.key,), passes=passes)[windows.key]

    def batch_key_points(
        self,
        windows: Windows,
        params: Mapping[str, Any],
        indices: Sequence[int],
        keys: Sequence[str],
        *,
        passes: Sequence[int],
        kind: SeedKind = SeedKind.STUDY,
    ) -> dict[str, np.ndarray]:
        """By key what `batch_points` are of these windows' `of_key`, bit for bit.

        Where a model answers keys together, all of them cost one encoding and one draw. kind: whose seeds.
        Raises what `measure` raises.
        """
        plan = _Plan.of(self.forecaster, params, at_least=self.max_num_samples)
        return self._answers(windows, indices, keys, plan, passes, kind, self._points(params))

    def forecast(
        self, contexts: Contexts, params: Mapping[str, Any], *, pass_number: int = 0, kind: SeedKind = SeedKind.STUDY
    ) -> np.ndarray:
        """The point forecasts of these params with the seeds of one pass, float64 [W, H], price.

        kind: whose seeds. Bars that have not come yet need SeedKind.SERVED, with which the forecast is the same to the
        last bit when these origins are asked for again later. Raises what `measure` raises, and ValueError where a
        study's seeds are not known yet.
        """
        return self._joined(contexts, params, (contexts.key,), pass_number, kind, self._points(params))[contexts.key]

    def forecast_keys(
        self,
        contexts: Contexts,
        params: Mapping[str, Any],
        keys: Sequence[str] = KEYS,
        *,
        pass_number: int = 0,
        kind: SeedKind = SeedKind.SERVED,
    ) -> KeyForecasts:
        """The point forecasts of several prices of a bar at every origin: as they are scored, and as they are served.

        keys: names of `forecasters.KEYS`. Of each, `scored` is what `forecast` says of `contexts.of_key`, bit for bit;
        where a model answers keys together (Kronos; Toto by variates), all of them cost one encoding and one draw.
        For quantiles, ask again with another `aggregate`: it is made of the draws that are kept. For paths of Kronos,
        `samples` of two keys are joint: the same sample of both is one path; those of Toto are independent.
        kind: by default seeds from the last context bar, so that a replay later gives the same numbers.
        Raises what `forecast` raises.
        """
        return key_forecasts(self._joined(contexts, params, keys, pass_number, kind, self._points(params)))

    def samples(
        self, contexts: Contexts, params: Mapping[str, Any], *, pass_number: int = 0, kind: SeedKind = SeedKind.STUDY
    ) -> np.ndarray:
        """The samples that `forecast` makes its points of, float64 [W, S, H], price.

        S is the number of samples that params ask for, else the model's own. Raises what `forecast` raises, and
        ValueError where this evaluator is exact.
        """
        if self.exact:
            raise ValueError("an exact evaluator draws no samples")
        return self._joined(contexts, params, (contexts.key,), pass_number, kind, self._samples)[contexts.key]

    def _joined(
        self,
        contexts: Contexts,
        params: Mapping[str, Any],
        keys: Sequence[str],
        pass_number: int,
        kind: SeedKind,
        answer: _Answer,
    ) -> dict[str, np.ndarray]:
        """The answers of one pass in the order of the origins, [W, ...], by key."""
        found: dict[str, dict[int, np.ndarray]] = {key: {} for key in keys}
        plan = _Plan.of(self.forecaster, params, at_least=self.max_num_samples)
        for indices in self.batches(contexts):
            for key, answers in self._answers(contexts, indices, keys, plan, (pass_number,), kind, answer).items():
                found[key].update(zip(indices, answers[0], strict=True))
        return {key: np.stack([of_key[index] for index in range(len(contexts))]) for key, of_key in found.items()}

    def _answers(
        self,
        contexts: Contexts,
        indices: Sequence[int],
        keys: Sequence[str],
        plan: _Plan,
        passes: Sequence[int],
        kind: SeedKind,
        answer: _Answer,
    ) -> dict[str, np.ndarray]:
        """The answers of every pass for one batch, [R, w, ...], by key."""
        # All passes of a batch before the next: a cache that holds one batch's encoding is enough.
        answers = []
        for pass_number in passes:
            seeds = contexts.seeds(pass_number, kind)
            of_batch = tuple(seeds[index] for index in indices)
            alone = kind is SeedKind.SERVED and len(indices) == 1
            asked = _Batch(contexts=contexts, indices=indices, seeds=of_batch, keys=tuple(keys), alone=alone)
            seconds = dict.fromkeys(STAGES, 0.0)
            answers.append(answer(asked, plan, seconds))
            for stage in STAGES:
                self.seconds[stage] += seconds[stage]
            if seconds["encode"]:  # else the cache answered, and what was saved is no latency
                self.fresh += len(indices)
                self.fresh_s += sum(seconds.values())
        joined = {key: np.stack([each[key] for each in answers]) for key in keys}
        for values in joined.values():
            bad = ~np.isfinite(values).all(axis=(0, *range(2, values.ndim)))
            _check(contexts, indices, int(bad.argmax()) if bad.any() else None)
        return joined

    def _points(self, params: Mapping[str, Any]) -> _Answer:
        """What answers with points, [w, H]. Raises ValueError for an unknown aggregate."""
        aggregate = parse(params.get("aggregate", "mean"))

        def sampled(batch: _Batch, plan: _Plan, seconds: dict[str, float]) -> dict[str, np.ndarray]:
            points = {}
            for key, (cache_key, draw) in self._draws(batch, plan, seconds).items():
                with _timed(seconds, "aggregate"):
                    _check(batch.contexts, batch.indices, draw.non_finite_window(plan.count))
                    points[key] = draw.aggregate(aggregate, plan.count)
                self._cache.put(cache_key, draw)  # after its use: sorting has made it larger
            return points

        def exact(batch: _Batch, plan: _Plan, seconds: dict[str, float]) -> dict[str, np.ndarray]:
            points, exactly = {}, cast(ExactKeyedForecaster, self._keyed).exact_keys
            for keys, encode_key in self._encodings(batch, plan):
                with _naming(batch.contexts.symbol):
                    encoded = self._encoded(encode_key, batch, plan, keys[0], seconds)
                    with _timed(seconds, "draw"):
                        answers = exactly(encoded, plan.draw_params, batch.seeds, keys)
                    self._count_draw(batch, plan, exactly, plan.draw_params, keys)
                    self._cache.put(encode_key, encoded)
                    with _timed(seconds, "aggregate"):
                        points |= {key: exact_points(each, aggregate) for key, each in zip(keys, answers, strict=True)}
            return points

        answer = exact if self.exact else sampled
        return lambda batch, *rest: shrunk(answer(batch, *rest), params, batch.contexts, batch.indices)

    def _samples(self, batch: _Batch, plan: _Plan, seconds: dict[str, float]) -> dict[str, np.ndarray]:
        """The samples that params ask for, [w, S, H], by key."""
        found = self._draws(batch, plan, seconds)
        for cache_key, draw in found.values():
            self._cache.put(cache_key, draw)
        return {key: draw.samples(plan.count) for key, (_, draw) in found.items()}

    def _draws(self, batch: _Batch, plan: _Plan, seconds: dict[str, float]) -> dict[str, tuple[Hashable, Draw]]:
        """By key samples of a batch, at least as many as params ask for, and what to keep them under."""
        found: dict[str, tuple[Hashable, Draw]] = {}
        for keys, encode_key in self._encodings(batch, plan):
            asked = (*encode_key, tuple(plan.draw_params.items()), plan.count is None, batch.seeds)
            lacking = []
            for key in keys:
                draw = self._cache.get((*asked, key))
                if isinstance(draw, Draw) and (plan.count is None or plan.count <= draw.count):
                    found[key] = ((*asked, key), draw)
                else:
                    lacking.append(key)
            if not lacking:
                continue
            with _naming(batch.contexts.symbol):
                encoded = self._encoded(encode_key, batch, plan, keys[0], seconds)
                with _timed(seconds, "draw"):
                    samples = self._keyed.draw_keys(encoded, plan.asked, batch.seeds, lacking)
                    for key, of_key in zip(lacking, samples, strict=True):
                        found[key] = ((*asked, key), Draw(of_key))
                self._count_draw(batch, plan, self._keyed.draw_keys, plan.asked, lacking)
            self._cache.put(encode_key, encoded)  # after its use: what Kronos looked up has made it larger
            count = samples[0].shape[1] if plan.drawn is None else plan.drawn
            expected = (len(batch.indices), count, batch.contexts.horizon)
            if samples[0].shape != expected:
                raise ValueError(f"{self.forecaster.model} drew {list(samples[0].shape)} and not {list(expected)}")
        return found

    def _encodings(self, batch: _Batch, plan: _Plan) -> list[tuple[Sequence[str], tuple[Hashable, ...]]]:
        """The encodings that answer the batch's keys: of each which keys, and what to keep it under."""
        whole = self._encode_key(batch, plan)
        if self._keyed.answers_together(plan.encode_params):
            return [(batch.keys, whole)]
        return [((key,), (*whole, key)) for key in batch.keys]

    def _encode_key(self, batch: _Batch, plan: _Plan) -> tuple[Hashable, ...]:
        # Whole batches, not windows, are kept: then no window is ever in a batch of other company.
        return (
            self.forecaster.fingerprint,
            tuple(plan.encode_params.items()),
            batch.contexts.horizon,
            batch.contexts.digest(batch.indices),
            batch.alone,
        )

    def _encoded(
        self, cache_key: tuple[Hashable, ...], batch: _Batch, plan: _Plan, key: str, seconds: dict[str, float]
    ) -> Any:
        """The encoding that answers this key."""
        encoded: Any = self._cache.get(cache_key)
        if encoded is None:
            with _timed(seconds, "encode"):
                contexts = batch.contexts.contexts(batch.indices)
                if batch.alone and cache_key[-1] == key and isinstance(self.forecaster, StackingForecaster):
                    # Whatever is asked for: a forward of one series reads all weights, and four rows cost no more.
                    stacked = self.forecaster.encode_stacked(contexts, plan.encode_params, batch.contexts.horizon)
                    for other, one in stacked.items():
                        self._cache.put((*cache_key[:-1], other), one)
                    encoded = stacked[key]
                else:
                    encoded = self._keyed.encode(contexts, plan.encode_params, batch.contexts.horizon, key)
            self._cache.put(cache_key, encoded)
            if self.work is not None:
                self.work.add("encode", len(batch.indices), lambda: None, lambda _: self._encode_one(batch, plan, key))
        return encoded

    def _encode_one(self, batch: _Batch, plan: _Plan, key: str) -> Encoded:
        contexts = batch.contexts.contexts(batch.indices[:1])
        return self._keyed.encode(contexts, plan.encode_params, batch.contexts.horizon, key)

    def _count_draw(
        self, batch: _Batch, plan: _Plan, draw: Callable[..., object], params: Mapping[str, Any], keys: Sequence[str]
    ) -> None:
        if self.work is not None:
            count, seeds = len(batch.indices), batch.seeds[:1]
            self.work.add(
                "draw",
                count,
                lambda: self._encode_one(batch, plan, keys[0]),
                lambda one: draw(one, params, seeds, keys),
            )


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Windows that are always computed together, w of them."""

    contexts: Contexts
    indices: Sequence[int]
    seeds: tuple[int, ...]  # one a window
    keys: tuple[str, ...]  # which prices are asked for
    alone: bool  # a single window, as forecasts are served


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


# Of a batch, [w, ...] by key; adds to the seconds by stage.
_Answer = Callable[[_Batch, _Plan, dict[str, float]], dict[str, np.ndarray]]


def _check(contexts: Contexts, batch: Sequence[int], bad: int | None) -> None:
    """Raises ForecastError if a window of the batch, by its place there, is bad."""
    if bad is not None:
        origin = contexts.origin_text(batch[bad])
        raise ForecastError(f"{contexts.symbol}: the forecast for {origin} is NaN or infinite")


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


class _Cache:
    """The entries used last, as many as fit. One that alone is too large is not kept."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._entries: OrderedDict[Hashable, tuple[Encoded | Draw, int]] = (
            OrderedDict()
        )  # with its size when it was put

    def get(self, key: Hashable) -> Encoded | Draw | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: Hashable, entry: Encoded | Draw) -> None:
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
