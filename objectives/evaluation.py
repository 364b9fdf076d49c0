"""The staged evaluation of one set of params on some contexts or windows.

Owns the stages and what is remembered between trials. A trial pays only for the stages whose inputs it changed, and its
numbers are the same to the last bit whatever ran before and however little the cache holds. Knows nothing of trials,
search spaces, studies or devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from forecasters import KEYS, Forecaster, ForecastError
from objectives.aggregation import Draw, parse
from objectives.encoding import Batch, Cache, Encoder, Plan, timed
from objectives.exact import exact_points
from objectives.keeping import Store
from objectives.keys import KeyForecasts, key_forecasts
from objectives.metrics import Measurement, measurement_of, over_passes, price_errors
from objectives.points import KeptPoints
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
    store: what encodings are kept in between runs, of forecasters whose encodings can be; None: nowhere.
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
        store: Store | None = None,
    ) -> None:
        self.forecaster = forecaster
        self.work = work
        self.rung = rung
        self.batch = batch or rung
        self.exact = exact or not forecaster.params.num_samples
        self.max_num_samples = max_num_samples or 0
        self.seconds = dict.fromkeys(STAGES, 0.0)  # spent so far, by stage, measurements that were broken off too
        self.fresh, self.fresh_s = 0, 0.0  # windows whose bars were encoded so far, and the seconds to their points
        self._cache = Cache(cache_bytes)
        self._encoder = Encoder(forecaster, self._cache, store=store, work=work)
        self.keeping, self._keyed = self._encoder.keeping, self._encoder.stages
        self.kept_points: KeptPoints | None = None
        if self.keeping is not None and store is not None:
            self.kept_points = KeptPoints(self._encoder.names, self.keeping.drawn_by, store)

    @property
    def restored(self) -> int:
        """Windows so far of which the store had the encoding or points."""
        found = self.kept_points.found if self.kept_points else 0
        return found + (self.keeping.restored if self.keeping else 0)

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
        on_rung: called with the number of windows done and their mae at every multiple of `rung`, as soon as the batch
        that reaches it is done, while windows are left; what it raises ends the measurement and passes through.
        Raises ForecastError naming the symbol; ValueError for an unknown aggregate.
        """
        before, fresh, fresh_s = dict(self.seconds), self.fresh, self.fresh_s
        by_pass = np.full((len(passes), len(windows)), np.nan)
        order: list[int] = []
        for indices in self.batches(windows):
            by_pass[:, indices] = self.batch_errors(windows, params, indices, passes=passes)
            first = (len(order) // self.rung + 1) * self.rung
            order += indices
            if on_rung is None or len(order) == len(windows):
                continue
            for done in range(first, len(order) + 1, self.rung):
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
        self,
        windows: Windows,
        params: Mapping[str, Any],
        indices: Sequence[int],
        *,
        passes: Sequence[int],
        ahead: bool = True,
    ) -> np.ndarray:
        """Each window's error, price, float64 [R, w], for one of `batches`: what `measure` is made of, bit for bit.

        ahead: draw for later params too, which may ask for more samples. Raises what `measure` raises.
        """
        plan = Plan.of(self.forecaster, params, at_least=self.max_num_samples if ahead else 0)
        found = self._answers(windows, indices, (windows.key,), plan, passes, SeedKind.STUDY, self._points(params))
        return price_errors(windows, indices, found[windows.key])

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
        plan = Plan.of(self.forecaster, params, at_least=self.max_num_samples)
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
        plan = Plan.of(self.forecaster, params, at_least=self.max_num_samples)
        for indices in self.batches(contexts):
            for key, answers in self._answers(contexts, indices, keys, plan, (pass_number,), kind, answer).items():
                found[key].update(zip(indices, answers[0], strict=True))
        return {key: np.stack([of_key[index] for index in range(len(contexts))]) for key, of_key in found.items()}

    def _answers(
        self,
        contexts: Contexts,
        indices: Sequence[int],
        keys: Sequence[str],
        plan: Plan,
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
            asked = Batch(contexts=contexts, indices=indices, seeds=of_batch, keys=tuple(keys), alone=alone)
            seconds, restored = dict.fromkeys(STAGES, 0.0), self.restored
            answers.append(answer(asked, plan, seconds))
            for stage in STAGES:
                self.seconds[stage] += seconds[stage]
            # Else the cache or the store answered, and what was saved is no latency.
            if seconds["encode"] and self.restored == restored:
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

        def sampled(batch: Batch, plan: Plan, seconds: dict[str, float]) -> dict[str, np.ndarray]:
            points = {}
            for key, (cache_key, draw) in self._draws(batch, plan, seconds).items():
                with timed(seconds, "aggregate"):
                    _check(batch.contexts, batch.indices, draw.non_finite_window(plan.count))
                    points[key] = draw.aggregate(aggregate, plan.count)
                self._cache.put(cache_key, draw)  # after its use: sorting has made it larger
            return points

        def exact(batch: Batch, plan: Plan, seconds: dict[str, float]) -> dict[str, np.ndarray]:
            points, exactly = {}, self._keyed.exact_keys
            for keys, encode_key in self._encoder.encodings(batch, plan):
                with _naming(batch.contexts.symbol):
                    encoded = self._encoder.encoded(encode_key, batch, plan, keys[0], seconds)
                    with timed(seconds, "draw"):
                        answers = exactly(encoded, plan.draw_params, batch.seeds, keys)
                    self._count_draw(batch, plan, exactly, plan.draw_params, keys)
                    self._cache.put(encode_key, encoded)
                    with timed(seconds, "aggregate"):
                        points |= {key: exact_points(each, aggregate) for key, each in zip(keys, answers, strict=True)}
            return points

        answer, kept = exact if self.exact else sampled, self.kept_points
        asked = f"{aggregate.name}{' exact' if self.exact else ''}"

        def found(batch: Batch, plan: Plan, seconds: dict[str, float]) -> dict[str, np.ndarray]:
            if kept is None:
                return answer(batch, plan, seconds)
            with timed(seconds, "aggregate"):
                points = kept.find(batch, plan, asked)
                lacking = np.any([np.isnan(of_key).any(axis=1) for of_key in points.values()], axis=0)
            missing: list[int] = np.flatnonzero(lacking).tolist()
            if not missing:
                return points
            if len(missing) < len(batch.indices) and self._encoder.apart(batch, plan):
                seeds = tuple(batch.seeds[place] for place in missing)
                part = replace(batch, indices=[batch.indices[place] for place in missing], seeds=seeds)
                for key, new in answer(part, plan, seconds).items():
                    points[key][missing] = new
            else:
                points = answer(batch, plan, seconds)
            with timed(seconds, "aggregate"):
                kept.note(batch, plan, asked, points)
            return points

        return lambda batch, *rest: shrunk(found(batch, *rest), params, batch.contexts, batch.indices)

    def _samples(self, batch: Batch, plan: Plan, seconds: dict[str, float]) -> dict[str, np.ndarray]:
        """The samples that params ask for, [w, S, H], by key."""
        found = self._draws(batch, plan, seconds)
        for cache_key, draw in found.values():
            self._cache.put(cache_key, draw)
        return {key: draw.samples(plan.count) for key, (_, draw) in found.items()}

    def _draws(self, batch: Batch, plan: Plan, seconds: dict[str, float]) -> dict[str, tuple[Hashable, Draw]]:
        """By key samples of a batch, at least as many as params ask for, and what to keep them under."""
        found: dict[str, tuple[Hashable, Draw]] = {}
        for keys, encode_key in self._encoder.encodings(batch, plan):
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
                encoded = self._encoder.encoded(encode_key, batch, plan, keys[0], seconds)
                with timed(seconds, "draw"):
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

    def _count_draw(
        self, batch: Batch, plan: Plan, draw: Callable[..., object], params: Mapping[str, Any], keys: Sequence[str]
    ) -> None:
        if self.work is not None:
            count, seeds = len(batch.indices), batch.seeds[:1]
            self.work.add(
                "draw",
                count,
                lambda: self._encoder.encode_one(batch, plan, keys[0]),
                lambda one: draw(one, params, seeds, keys),
            )


# Of a batch, [w, ...] by key; adds to the seconds by stage.
_Answer = Callable[[Batch, Plan, dict[str, float]], dict[str, np.ndarray]]


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
