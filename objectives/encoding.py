"""The encodings that batches of windows need: from memory, from what this host keeps between runs, or from the network.

Owns what is computed together. Knows nothing of seeds, samples, aggregates or errors.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from forecasters import Encoded, Forecaster, KeepableForecaster, SharingForecaster, StackingForecaster
from objectives.aggregation import Draw
from objectives.keeping import Keeping, Store
from objectives.keys import keyed
from objectives.windows import Contexts
from objectives.work import WorkCounter

COUNTED = 16  # windows that are encoded again to be counted: a forward of fewer does work for as many


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Windows that are always computed together, w of them."""

    contexts: Contexts
    indices: Sequence[int]
    seeds: tuple[int, ...]  # one a window
    keys: tuple[str, ...]  # which prices are asked for
    alone: bool  # a single window, as forecasts are served

    @property
    def lengths(self) -> list[int]:
        """Of each window the bars of its context."""
        return [self.contexts.origins[index] for index in self.indices]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Params by stage, with the number of samples apart."""

    encode_params: Mapping[str, Any]
    draw_params: Mapping[str, Any]  # without the number of samples
    count_name: str | None  # what the model calls the number of samples, where params have it
    count: int | None  # samples to use; None: all that the model draws by default
    drawn: int | None  # samples to draw

    @classmethod
    def of(cls, forecaster: Forecaster, params: Mapping[str, Any], *, at_least: int) -> Plan:
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


class Encoder:
    """The first stage of a forecaster, with what is remembered of it.

    Where a forecaster shares forwards, a window is answered by that of its group, which depends on the series and its
    length and not on what is asked for; else whole batches are encoded together and kept together: then no window is
    ever in a batch of other company. Either way a number's last bits are the same whatever was asked before.
    """

    def __init__(self, forecaster: Forecaster, cache: Cache, *, store: Store | None, work: WorkCounter | None) -> None:
        self._forecaster, self._cache, self._work = forecaster, cache, work
        self._shares = isinstance(forecaster, SharingForecaster)  # once: a protocol of methods takes 60 us to look at
        self.keeping = Keeping(forecaster, store) if store and isinstance(forecaster, KeepableForecaster) else None
        self.stages: Any = self.keeping or keyed(forecaster)  # of a `forecasters.KeyedForecaster`

    def encodings(self, batch: Batch, plan: Plan) -> list[tuple[Sequence[str], tuple[Hashable, ...]]]:
        """The encodings that answer the batch's keys: of each which keys, and what to keep it under."""
        contexts = batch.contexts
        whole = (
            self._forecaster.fingerprint,
            tuple(plan.encode_params.items()),
            contexts.horizon,
            contexts.digest(batch.indices),
            batch.alone,
            len(contexts.bars) if self._groups(batch, plan) is not None else None,
        )
        if self.stages.answers_together(plan.encode_params):
            return [(batch.keys, whole)]
        return [((key,), (*whole, key)) for key in batch.keys]

    def encoded(
        self, cache_key: tuple[Hashable, ...], batch: Batch, plan: Plan, key: str, seconds: dict[str, float]
    ) -> Any:
        """The encoding that answers this key; adds to the seconds of "encode". Raises ForecastError."""
        encoded: Any = self._cache.get(cache_key)
        if encoded is None:
            groups = self._groups(batch, plan)
            with timed(seconds, "encode"):
                contexts = batch.contexts.contexts(batch.indices)
                if groups is not None:
                    encoded = self._gathered(batch, plan, key, groups)
                elif batch.alone and cache_key[-1] == key and isinstance(self._forecaster, StackingForecaster):
                    # Whatever is asked for: a forward of one series reads all weights, and four rows cost no more.
                    stacked = self._forecaster.encode_stacked(contexts, plan.encode_params, batch.contexts.horizon)
                    for other, one in stacked.items():
                        self._cache.put((*cache_key[:-1], other), one)
                    encoded = stacked[key]
                else:
                    encoded = self.stages.encode(contexts, plan.encode_params, batch.contexts.horizon, key)
            self._cache.put(cache_key, encoded)
            if self._work is not None and groups is None:
                few = batch.contexts.contexts(batch.indices[:COUNTED])
                asked = (few, plan.encode_params, batch.contexts.horizon, key)
                self._work.add("encode", len(batch.indices), lambda: asked, self._encode, again=len(few))
        return encoded

    def names(self, batch: Batch, plan: Plan, key: str) -> Sequence[bytes] | None:
        """What decides each window's encoding, as names; None where encodings of such a batch are not kept."""
        if self.keeping is None or batch.alone:
            return None
        contexts, params = batch.contexts, plan.encode_params
        if (groups := self._groups(batch, plan)) is None:
            return self.keeping.names(contexts.contexts(batch.indices), params, contexts.horizon, key)
        words = {
            group: self.keeping.name_of_group(contexts.bars, group, params, contexts.horizon, key)
            for group in sorted(set(groups))
        }
        if None in words.values():
            return None
        lengths = zip(groups, batch.lengths, strict=True)
        return [b"%s %d" % (words[group], length) for group, length in lengths]

    def apart(self, batch: Batch, plan: Plan) -> bool:
        """Whether each window is encoded by itself, so that no bits depend on what else is in its batch."""
        return self.keeping is not None and self.keeping.one_by_one and self._groups(batch, plan) is None

    def _encode(self, asked: tuple[Any, ...]) -> Encoded:
        return self.stages.encode(*asked)

    def encode_one(self, batch: Batch, plan: Plan, key: str) -> Encoded:
        """The first window of the batch, encoded again for itself."""
        contexts = batch.contexts.contexts(batch.indices[:1])
        return self.stages.encode(contexts, plan.encode_params, batch.contexts.horizon, key)

    def _groups(self, batch: Batch, plan: Plan) -> list[int] | None:
        if batch.alone or not self._shares:
            return None
        contexts = batch.contexts
        return cast(SharingForecaster, self._forecaster).groups_of(
            contexts.bars, batch.lengths, plan.encode_params, contexts.horizon
        )

    def _gathered(self, batch: Batch, plan: Plan, key: str, groups: Sequence[int]) -> Any:
        """The batch from the groups of its windows, of which those that are not there yet are encoded."""
        forecaster, contexts, found = cast(SharingForecaster, self._forecaster), batch.contexts, {}
        name = (forecaster.fingerprint, tuple(plan.encode_params.items()), contexts.horizon, key)
        name = (*name, contexts.series_digest)
        for group in sorted(set(groups)):
            found[group] = self._cache.get((*name, group))
            if found[group] is None:
                asked = (contexts.bars, group, plan.encode_params, contexts.horizon, key)
                found[group] = (self.keeping or forecaster).encode_group(*asked)
                self._cache.put((*name, group), found[group])
                if self._work is not None:
                    self._work.add("encode", 1, partial(tuple, asked), lambda words: forecaster.encode_group(*words))
        return forecaster.gathered(found, batch.lengths, len(contexts.bars))


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the seconds spent within to those of a stage."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] += time.perf_counter() - start


class Cache:
    """The entries used last, as many as fit. One that alone is too large is not kept."""

    def __init__(self, limit: int) -> None:
        """limit: bytes."""
        self.limit = limit
        self.nbytes = 0
        # With its size when it was put
        self._entries: OrderedDict[Hashable, tuple[Encoded | Draw, int]] = OrderedDict()

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
