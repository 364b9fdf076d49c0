"""A forecaster that asks a store before it runs its network, and tells the store what it computed.

Owns what a window is kept under: everything that decides its bits, so that what is found is, to the last bit, what
would be computed. Knows nothing of where and how long it is kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from forecasters import CLOSE, Bars, KeepableForecaster
from objectives.bars import bars_fingerprint

FREE, BOUND = b"free", b"bound"  # whether a window's bits depend on its place in a batch

_log = logging.getLogger("encodings")


class Store(Protocol):
    """Bytes by key, which may be gone at any time; never others than were put. Raises nothing."""

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]: ...

    def put(self, values: Mapping[bytes, bytes]) -> None: ...


class Keeping:
    """The stages of a forecaster of every price of a bar, whose encodings are kept; see `forecasters.KeyedForecaster`.

    Where windows share a forward, its size may decide their bits, and where it does, a batch of which a window is
    missing is encoded whole, with the bits that it has without a store; else the few that are missing are encoded
    alone. Where even their places decide (MKL with some numbers of threads), the whole batch is the key. Both are found
    out once for each shape, and kept too.
    """

    def __init__(self, forecaster: KeepableForecaster, store: Store) -> None:
        self._forecaster, self._store = forecaster, store
        self.restored = 0  # windows that came from the store
        self.asked = 0  # windows, all that were asked for
        self._trusted, self._answers = True, dict[bytes, bytes]()
        # What is in the store of an encoding: its keys, and how much was known of each window.
        self._kept: WeakKeyDictionary[Any, tuple[list[bytes], list[int]]] = WeakKeyDictionary()

    def __str__(self) -> str:
        return f"{self.restored} of {self.asked} windows came from the encodings kept on this host"

    @property
    def drawn_by(self) -> str:
        return self._forecaster.drawn_by

    def answers_together(self, params: Mapping[str, Any]) -> bool:
        return self._forecaster.answers_together(params)

    def encode(self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int, key: str = CLOSE) -> Any:
        forecaster = self._forecaster
        company, keys = self._company_and_keys(contexts, params, horizon, key)
        self.asked += len(contexts)
        if keys is None:
            return forecaster.encode(contexts, params, horizon, key)
        found, encoded = self._store.get(keys), None
        there = sum(record is not None for record in found)
        if company and there < len(contexts) <= 2 * there - 2:
            self._complete(found, keys, contexts, params, horizon, key, company)
        if there and self._trusted:
            encoded = forecaster.restored(found, contexts, params, horizon, key)
        if encoded is not None:
            self.restored += there
            counts = list(forecaster.known(encoded))
            self._kept[encoded] = keys, [n if found[place] is not None else 0 for place, n in enumerate(counts)]
            return encoded
        encoded = forecaster.encode(contexts, params, horizon, key)
        if self._trusted and self._agrees(forecaster.records(encoded, range(len(contexts))), found):
            self._kept[encoded] = keys, [int(record is not None) for record in found]
            self._keep(encoded)
        return encoded

    def names(
        self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int, key: str
    ) -> Sequence[bytes] | None:
        """What each window is kept under; None where these are not kept."""
        return self._company_and_keys(contexts, params, horizon, key)[1]

    @property
    def one_by_one(self) -> bool:
        return self._forecaster.one_by_one

    def name_of_group(self, bars: Bars, group: int, params: Mapping[str, Any], horizon: int, key: str) -> bytes | None:
        """What a group of `encode_group` is kept under; None where it is not."""
        forecaster: Any = self._forecaster
        if not forecaster.keeps:
            return None
        reach = forecaster.reach(group, len(bars))
        return _named([*self._asked(params, horizon, key), reach, bars_fingerprint(bars.slice(0, max(reach)))])

    def encode_group(self, bars: Bars, group: int, params: Mapping[str, Any], horizon: int, key: str) -> Any:
        """See `forecasters.SharingForecaster`. A group is kept as one record."""
        forecaster: Any = self._forecaster
        name = self.name_of_group(bars, group, params, horizon, key)
        if name is None:
            return forecaster.encode_group(bars, group, params, horizon, key)
        count = len(forecaster.lengths(group, len(bars)))
        self.asked += count
        (found,) = self._store.get([name])
        if found is not None:
            self.restored += count
            size = len(found) // count
            records = [found[start : start + size] for start in range(0, len(found), size)]
            return forecaster.restored(records, (), params, horizon, key)
        encoded = forecaster.encode_group(bars, group, params, horizon, key)
        self._store.put({name: b"".join(forecaster.records(encoded, range(count)))})
        return encoded

    def draw_keys(
        self, encoded: Any, params: Mapping[str, Any], seeds: Sequence[int], keys: Sequence[str]
    ) -> np.ndarray:
        samples = self._forecaster.draw_keys(encoded, params, seeds, keys)
        self._keep(encoded)
        return samples

    def exact_keys(self, encoded: Any, params: Mapping[str, Any], seeds: Sequence[int], keys: Sequence[str]) -> Any:
        forecaster: Any = self._forecaster
        answers = forecaster.exact_keys(encoded, params, seeds, keys)
        self._keep(encoded)
        return answers

    def _keep(self, encoded: Any) -> None:
        """Put what is known by now and was not when it was put last."""
        if encoded not in self._kept:
            return
        keys, before = self._kept[encoded]
        now = list(self._forecaster.known(encoded))
        if grown := [place for place, count in enumerate(now) if count > before[place]]:
            records = self._forecaster.records(encoded, grown)
            self._store.put({keys[place]: record for place, record in zip(grown, records, strict=True)})
            self._kept[encoded] = keys, now

    def _complete(
        self,
        found: list[bytes | None],
        keys: Sequence[bytes],
        contexts: Sequence[Bars],
        params: Mapping[str, Any],
        horizon: int,
        key: str,
        company: str,
    ) -> None:
        """Encode the few windows that are missing beside one that is not, where that is known to give the same bits."""
        places = [place for place, record in enumerate(found) if record is None]
        places.append(next(place for place, record in enumerate(found) if record is not None))
        few = [contexts[place] for place in places]
        if not self._same_in_few(contexts, few, params, horizon, key, company):
            return
        records = self._forecaster.records(self._forecaster.encode(few, params, horizon, key), range(len(few)))
        if self._agrees(records, [found[place] for place in places]):
            new = dict(zip(places[:-1], records, strict=False))
            self._store.put({keys[place]: record for place, record in new.items()})
            for place, record in new.items():
                found[place] = record

    def _agrees(self, computed: Sequence[bytes], found: Sequence[bytes | None]) -> bool:
        """Whether windows computed beside a missing one are what the store has; else it is not asked again."""
        if all(kept is None or kept == record for record, kept in zip(computed, found, strict=True)):
            return True
        self._trusted = False
        _log.warning("what is computed here differs in its last bits from kept encodings: they are not used")
        return False

    # -- keys ----------------------------------------------------------------------------------------------------------

    def _asked(self, params: Mapping[str, Any], horizon: int, key: str) -> list[Any]:
        forecaster = self._forecaster
        of = "" if forecaster.answers_together(params) else key
        return [forecaster.fingerprint, forecaster.surroundings, sorted(params.items()), horizon, of]

    def _company_and_keys(
        self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int, key: str
    ) -> tuple[str, list[bytes] | None]:
        company = self._forecaster.company(contexts, params, horizon)
        if company is None or not self._trusted:
            return "", None
        return company, self._keys(contexts, params, horizon, key, company)

    def _keys(
        self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int, key: str, company: str
    ) -> list[bytes]:
        asked = [*self._asked(params, horizon, key), company]
        windows = [bars_fingerprint(self._forecaster.read(bars, params)) for bars in contexts]
        if company and len(contexts) > 1 and not self._free_of_places(contexts, params, horizon, key, asked):
            asked.append(windows)
        base = _named(asked)
        return [hashlib.blake2b(window.encode(), key=base, digest_size=32).digest() for window in windows]

    def _same_in_few(
        self,
        contexts: Sequence[Bars],
        few: Sequence[Bars],
        params: Mapping[str, Any],
        horizon: int,
        key: str,
        company: str,
    ) -> bool:
        """Whether as many windows as these few have, in a forward of their own, the bits that a batch's have."""
        forecaster, count = self._forecaster, len(few)
        own = forecaster.company(few, params, horizon)
        question = _named(["few", *self._asked(params, horizon, key), company, own, count])
        answer = self._answer(question)
        if answer is None:
            last = range(len(contexts) - count, len(contexts))
            whole = forecaster.records(forecaster.encode(contexts, params, horizon, key), last)
            apart = forecaster.encode([contexts[place] for place in last], params, horizon, key)
            answer = self._noted(question, FREE if whole == forecaster.records(apart, range(count)) else BOUND)
        return answer == FREE

    def _free_of_places(
        self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int, key: str, asked: Sequence[Any]
    ) -> bool:
        """Whether a batch of this shape answers the same with its windows moved on by one place."""
        question = _named(["places", asked[0], asked[1], asked[-1]])
        answer = self._answer(question)
        if answer is None:
            every = range(len(contexts))
            first, moved = (
                self._forecaster.records(self._forecaster.encode(each, params, horizon, key), every)
                for each in (contexts, [contexts[-1], *contexts[:-1]])
            )
            answer = self._noted(question, FREE if [first[-1], *first[:-1]] == moved else BOUND)
        return answer == FREE

    def _answer(self, question: bytes) -> bytes | None:
        return self._answers.get(question) or self._store.get([question])[0]

    def _noted(self, question: bytes, answer: bytes) -> bytes:
        """Here too: where the disk is full, nobody is to find it out with every batch."""
        self._answers[question] = answer
        self._store.put({question: answer})
        return answer


def _named(asked: Sequence[Any]) -> bytes:
    return hashlib.blake2b(json.dumps(asked, default=float).encode(), digest_size=32).digest()
