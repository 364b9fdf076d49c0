"""What is kept of Kronos' windows between runs: what draws of one step have read, and nothing of the networks' caches.

Of a window 4 KiB, then 4 KiB for each first token that was ever drawn and 28 bytes for each pair (of vocabularies of
1,024 tokens); the caches that these come from are megabytes. A draw that meets another token encodes its window again.
Lossless: fp32 as the networks answered.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from forecasters import Bars
from forecasters.compilation import Graphs
from forecasters.kronos_encoded import COLUMNS, TABLE_BYTES, EncodedBars, KeptWindow, RowTable, Window
from forecasters.kronos_network import KronosNetwork
from forecasters.numerics import COMMON, surroundings

HEAD = struct.Struct("<4i")  # bars, first tokens that there are, first tokens and pairs that are known
MOST_ROWS = 64  # first tokens of a window: where more are drawn, most draws meet new ones


class KeptTables:
    """The part of Kronos that makes it a `forecasters.KeepableForecaster`."""

    network: KronosNetwork
    graphs: Graphs

    @property
    def device(self) -> torch.device:
        return self.network.norm.weight.device

    @property
    def surroundings(self) -> str:
        own = ("", "_encoded", "_exact", "_kept", "_network", "_tree")
        return surroundings(self.device, *(f"forecasters.kronos{name}" for name in own), *COMMON)

    @property
    def drawn_by(self) -> str:
        return surroundings(self.device, "forecasters", "forecasters.kronos_sampling", "forecasters.kronos_tree")

    @property
    def keeps(self) -> bool:
        return self.device.type == "cpu" and not self.graphs.on

    @property
    def one_by_one(self) -> bool:
        return self.keeps

    def company(self, contexts: Sequence[Bars], params: Mapping[str, Any], horizon: int) -> str | None:
        """None but on a CPU, where windows are encoded one by one, for one step."""
        del contexts, params
        return "" if self.keeps and horizon == 1 else None

    def read(self, bars: Bars, params: Mapping[str, Any]) -> Bars:
        return bars.slice(max(0, len(bars) - int(params["max_context"])), len(bars))

    def known(self, encoded: EncodedBars) -> Sequence[int]:
        """How many rows of the tables are each window's; 0 where nothing was drawn yet, or too much to keep."""
        found = []
        for w in range(len(encoded.windows)):
            tokens, pairs = self._ranges(w)
            rows = encoded.s2_logits.count(*tokens)
            found.append(rows + encoded.values.count(*pairs) if rows <= MOST_ROWS else 0)
        return found

    def records(self, encoded: EncodedBars, places: Sequence[int]) -> list[bytes]:
        found = []
        for w in places:
            window, (tokens, pairs) = encoded.windows[w], self._ranges(w)
            first, logits = encoded.s2_logits.of(*tokens)
            codes, values = encoded.values.of(*pairs)
            numbers = (window.mean, window.scale, window.s1_logits.numpy(), logits, values)
            parts = [HEAD.pack(window.length, len(window.s1_logits), len(first), len(codes))]
            parts += [each.astype("<i4").tobytes() for each in (first, codes)]
            parts += [each.astype("<f4").tobytes() for each in numbers]
            found.append(b"".join(parts))
        return found

    def restored(
        self,
        records: Sequence[bytes | None],
        contexts: Sequence[Bars],
        params: Mapping[str, Any],
        horizon: int,
        key: str,
    ) -> EncodedBars:
        """Windows without a record are encoded."""

        def fresh(places: Sequence[int]) -> Sequence[Any]:
            forecaster: Any = self
            return forecaster.encode([contexts[place] for place in places], params, horizon, key).windows

        missing = [w for w, record in enumerate(records) if record is None]
        windows: dict[int, Window | KeptWindow] = dict(zip(missing, fresh(missing) if missing else (), strict=True))
        tables: tuple[list[np.ndarray], ...] = ([], [], [], [])
        for w, record in enumerate(records):
            if record is None:
                continue
            length, vocabulary, rows, pairs = HEAD.unpack_from(record)
            first, codes = np.split(np.frombuffer(record, "<i4", rows + pairs, HEAD.size).astype(np.int64), [rows])
            numbers = np.frombuffer(record, "<f4", -1, HEAD.size + 4 * (rows + pairs)).astype(np.float32)
            sizes = (len(COLUMNS), len(COLUMNS), vocabulary, rows * self.network.config.s2_size)
            mean, scale, s1_logits, logits, values = np.split(numbers, np.cumsum(sizes))
            windows[w] = KeptWindow(
                length=length,
                mean=mean,
                scale=scale,
                s1_logits=torch.from_numpy(s1_logits),
                encode=lambda w=w: fresh([w])[0],
            )
            shift = [start for start, _ in self._ranges(w)]
            tables_of = (logits.reshape(rows, self.network.config.s2_size), values.reshape(pairs, len(COLUMNS)))
            parts = (first + shift[0], tables_of[0], codes + shift[1], tables_of[1])
            for table, part in zip(tables, parts, strict=True):
                table += [part] if len(part) else []
        return EncodedBars(
            windows=[windows[w] for w in range(len(records))],
            horizon=horizon,
            s2_logits=_table(*tables[:2]),
            values=_table(*tables[2:]),
        )

    def _ranges(self, window: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The keys of a window in the two tables."""
        tokens = self.network.config.s1_size
        pairs = tokens * self.network.config.s2_size
        return (window * tokens, (window + 1) * tokens), (window * pairs, (window + 1) * pairs)


def _table(keys: list[np.ndarray], rows: list[np.ndarray]) -> RowTable:
    if not keys:
        return RowTable(TABLE_BYTES)
    return RowTable(TABLE_BYTES, np.concatenate(keys), torch.from_numpy(np.concatenate(rows)))
