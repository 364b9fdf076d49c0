"""Point forecasts kept between runs: what thousands of samples of a window came to is eight bytes a step.

Of a window, an aggregate, a number of samples and a seed 32 bytes of one step. The next night's confirmation asks for
most of them again: its grid is the same, and of its windows all but one are. Found is what would be computed, to the
last bit. Knows nothing of how windows are named, of errors or of where and how long things are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np

from objectives import aggregation, exact
from objectives.encoding import Batch, Plan
from objectives.keeping import Store

MOST_BATCHES = 16  # in memory: those of a confirmation come one after the other
MOST_POINTS = 4096  # of a window, the last ones used: every night's search of Kronos asks for other ones
TAG, SEED = 16, 8  # bytes

Question = tuple[bytes, tuple[int, ...]]  # how points are made of draws, and each window's seed


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of one key of a batch's windows."""

    names: Sequence[bytes]  # in the store
    stored: Sequence[dict[bytes, bytes]]  # of each window, by question and seed
    noted: dict[Question, bytes] = field(default_factory=dict)  # and not stored yet, of all windows


class KeptPoints:
    """Points by window, from a store and for it. What was noted last reaches it with `flush`."""

    def __init__(
        self, names: Callable[[Batch, Plan, str], Sequence[bytes] | None], drawn_by: str, store: Store
    ) -> None:
        """names: what decides each window's encoding, None where that is not kept. drawn_by: what decides its draws."""
        self._names, self._store = names, store
        code = [Path(str(module.__file__)).read_text() for module in (aggregation, exact)]
        self._made_by = hashlib.sha256(json.dumps([drawn_by, version("scipy"), *code]).encode()).hexdigest()
        self._batches: OrderedDict[Hashable, Known | None] = OrderedDict()
        self._tags: dict[Hashable, bytes] = {}
        self.found = self.asked = 0  # points of windows

    def find(self, batch: Batch, plan: Plan, asked: str) -> dict[str, np.ndarray]:
        """The points of every key, float64 [w, H], NaN where they are not known. asked: how they are made of draws."""
        points, horizon = {}, batch.contexts.horizon
        unknown = np.full(horizon, np.nan).tobytes()
        for key in batch.keys:
            tag, seeds = question = self._question(batch, plan, key, asked)
            data, known = unknown * len(seeds), self._known(batch, plan, key)
            if known is not None:
                self.asked += len(seeds)
                pairs = zip(known.stored, seeds, strict=True)
                data = known.noted.get(question) or b"".join(
                    table.get(tag + seed.to_bytes(SEED, "little"), unknown) for table, seed in pairs
                )
            points[key] = np.frombuffer(data, "<f8").reshape(len(seeds), horizon).copy()
            there = ~np.isnan(points[key][:, 0])
            self.found += int(there.sum())
            if known is not None and there.all():
                known.noted[question] = data  # what was used last stays
        return points

    def note(self, batch: Batch, plan: Plan, asked: str, points: Mapping[str, np.ndarray]) -> None:
        """Keep the points, float64 [w, H], of every key."""
        for key, of_key in points.items():
            if (known := self._known(batch, plan, key)) is not None:
                known.noted[self._question(batch, plan, key, asked)] = of_key.astype("<f8").tobytes()

    def flush(self) -> None:
        """Put what is new into the store."""
        for known in self._batches.values():
            self._put(known)

    def _known(self, batch: Batch, plan: Plan, key: str) -> Known | None:
        contexts = batch.contexts
        of = (contexts.digest(batch.indices), len(contexts.bars), contexts.horizon, batch.alone, key)
        of = (*of, tuple(plan.encode_params.items()))
        if of not in self._batches:
            self._batches[of] = self._read(self._names(batch, plan, key), TAG + SEED + 8 * contexts.horizon)
            if len(self._batches) > MOST_BATCHES:
                self._put(self._batches.popitem(last=False)[1])
        self._batches.move_to_end(of)
        return self._batches[of]

    def _read(self, encodings: Sequence[bytes] | None, size: int) -> Known | None:
        """size: of a window's point with its question and seed, in bytes."""
        if encodings is None:
            return None
        names = [hashlib.blake2b(b"points", key=name, digest_size=32).digest() for name in encodings]
        return Known(names=names, stored=self._tables(names, size))

    def _tables(self, names: Sequence[bytes], size: int) -> list[dict[bytes, bytes]]:
        found = []
        for record in self._store.get(names):
            parts = [record[start : start + size] for start in range(0, len(record), size)] if record else []
            found.append({part[: TAG + SEED]: part[TAG + SEED :] for part in parts})
        return found

    def _question(self, batch: Batch, plan: Plan, key: str, asked: str) -> Question:
        words = (asked, tuple(sorted(plan.draw_params.items())), plan.count, key)
        if words not in self._tags:
            if len(self._tags) > MOST_POINTS:
                self._tags.clear()
            text = json.dumps([*words, self._made_by], default=float)
            self._tags[words] = hashlib.blake2b(text.encode(), digest_size=TAG).digest()
        return self._tags[words], batch.seeds

    def _put(self, known: Known | None) -> None:
        if known is None or not known.noted:
            return
        (_, seeds), data = next(iter(known.noted.items()))
        size = len(data) // len(seeds)
        now = self._tables(known.names, TAG + SEED + size)  # others have put theirs meanwhile
        for (tag, seeds), data in known.noted.items():
            for number, (table, seed) in enumerate(zip(now, seeds, strict=True)):
                place = tag + seed.to_bytes(SEED, "little")
                table.pop(place, None)
                table[place] = data[number * size : (number + 1) * size]
        known.noted.clear()
        for table, other in zip(now, known.stored, strict=True):
            for place in list(table)[: max(0, len(table) - MOST_POINTS)]:
                del table[place]
            other.update(table)
        tables = zip(known.names, now, strict=True)
        self._store.put({name: b"".join(b"".join(item) for item in table.items()) for name, table in tables})
