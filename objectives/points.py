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
from pathlib import Path

import numpy as np

from objectives import aggregation, exact
from objectives.encoding import Batch, Plan
from objectives.keeping import Store

MOST_BATCHES = 128  # whose windows' names are in memory
MOST_WINDOWS = 512  # whose points are in memory at a time: the batches of a confirmation come one after the other
TAG, SEED = 16, 8  # bytes

Table = dict[bytes, bytes]  # of a window the points by question and seed


class KeptPoints:
    """Points by window, from a store and for it. What was noted last reaches it with `flush`."""

    def __init__(
        self, names: Callable[[Batch, Plan, str], Sequence[bytes] | None], drawn_by: str, store: Store
    ) -> None:
        """names: what decides the encoding of each window, None where that is not kept. drawn_by: what decides draws
        beside it.
        """
        self._names, self._store = names, store
        code = [Path(str(module.__file__)).read_text() for module in (aggregation, exact)]
        self._made_by = hashlib.sha256(json.dumps([drawn_by, *code]).encode()).hexdigest()
        self._named: OrderedDict[Hashable, list[bytes] | None] = OrderedDict()  # of batches, the latest ones
        self._windows: OrderedDict[bytes, Table] = OrderedDict()
        self._new: set[bytes] = set()  # windows of which the store lacks something
        self.found = self.asked = 0

    def find(self, batch: Batch, plan: Plan, asked: str) -> dict[str, np.ndarray] | None:
        """The points of every key, float64 [w, H], where all are known. asked: how they are made of draws."""
        points = {}
        for key in batch.keys:
            tables = self._tables(self._names_of(batch, plan, key), batch.contexts.horizon)
            if tables is None:
                return None
            places = self._places(batch, plan, key, asked)
            self.asked += len(tables)
            known = [table.get(place) for table, place in zip(tables, places, strict=True)]
            if None in known:
                return None
            points[key] = np.frombuffer(b"".join(known), "<f8").reshape(len(tables), -1)  # pyright: ignore[reportArgumentType, reportCallIssue]
            self.found += len(tables)
        return points

    def note(self, batch: Batch, plan: Plan, asked: str, points: Mapping[str, np.ndarray]) -> None:
        """Keep the points, float64 [w, H], of every key."""
        for key, of_key in points.items():
            names = self._names_of(batch, plan, key)
            tables, places = self._tables(names, batch.contexts.horizon), self._places(batch, plan, key, asked)
            if names is not None and tables is not None:
                for table, place, row in zip(tables, places, of_key.astype("<f8"), strict=True):
                    table[place] = row.tobytes()
                self._new.update(names)

    def flush(self) -> None:
        """Put what is new into the store."""
        self._put(list(self._new))

    def _names_of(self, batch: Batch, plan: Plan, key: str) -> list[bytes] | None:
        contexts = batch.contexts
        asked = (contexts.digest(batch.indices), len(contexts.bars), contexts.horizon, batch.alone, key)
        asked = (*asked, tuple(plan.encode_params.items()))
        if asked not in self._named:
            names = self._names(batch, plan, key)
            own = None if names is None else [_own(name) for name in names]
            self._named[asked] = own
            if len(self._named) > MOST_BATCHES:
                self._named.popitem(last=False)
        return self._named[asked]

    def _tables(self, names: Sequence[bytes] | None, horizon: int) -> list[Table] | None:
        if names is None:
            return None
        size = TAG + SEED + 8 * horizon
        lacking = [name for name in names if name not in self._windows]
        for name, record in zip(lacking, self._store.get(lacking) if lacking else (), strict=True):
            parts = [(record or b"")[start : start + size] for start in range(0, len(record or b""), size)]
            self._windows[name] = {part[: TAG + SEED]: part[TAG + SEED :] for part in parts}
        for name in names:
            self._windows.move_to_end(name)
        if len(self._windows) > MOST_WINDOWS + len(names):
            old = list(self._windows)[: len(self._windows) - max(MOST_WINDOWS, len(names))]
            self._put([name for name in old if name in self._new])
            for name in old:
                del self._windows[name]
        return [self._windows[name] for name in names]

    def _places(self, batch: Batch, plan: Plan, key: str, asked: str) -> list[bytes]:
        question = json.dumps([asked, sorted(plan.draw_params.items()), plan.count, key, self._made_by], default=float)
        tag = hashlib.blake2b(question.encode(), digest_size=TAG).digest()
        return [tag + seed.to_bytes(SEED, "little") for seed in batch.seeds]

    def _put(self, names: Sequence[bytes]) -> None:
        if names:
            records = {name: b"".join(b"".join(item) for item in self._windows[name].items()) for name in names}
            self._store.put(records)
            self._new.difference_update(names)


def _own(name: bytes) -> bytes:
    """Another name than that of the window's encoding."""
    return hashlib.blake2b(b"points", key=name, digest_size=32).digest()
