"""What is kept of Kronos' windows between runs: what draws of one step have read, and nothing of the network's caches.

Of a window 4 KiB, and 4 KiB for each first token that was ever drawn and 28 bytes for each pair (of vocabularies of
1,024): the caches they come from are megabytes. Lossless: little-endian fp32 as the networks answered.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np
import torch

from forecasters.kronos_encoded import COLUMNS, TABLE_BYTES, EncodedBars, KeptWindow, RowTable, Window

HEAD = struct.Struct("<4i")  # bars, first tokens that there are, first tokens and pairs that are known
MOST_ROWS = 64  # first tokens of a window: where more are drawn, most draws meet new ones


def known(encoded: EncodedBars, s1_size: int, s2_size: int) -> list[int]:
    """How many rows of the tables are each window's; 0 where nothing was drawn yet, or too much to keep."""
    size, found = s1_size * s2_size, []
    for w in range(len(encoded.windows)):
        rows = encoded.s2_logits.count(w * s1_size, (w + 1) * s1_size)
        found.append(rows + encoded.values.count(w * size, (w + 1) * size) if rows <= MOST_ROWS else 0)
    return found


def records(encoded: EncodedBars, places: Sequence[int], s1_size: int, s2_size: int) -> list[bytes]:
    """What is kept of the windows at these places."""
    size, found = s1_size * s2_size, []
    for w in places:
        window = encoded.windows[w]
        tokens, logits = encoded.s2_logits.of(w * s1_size, (w + 1) * s1_size)
        codes, values = encoded.values.of(w * size, (w + 1) * size)
        logits_first = window.s1_logits.numpy()
        numbers = [window.mean, window.scale, logits_first, logits, values]
        found.append(
            HEAD.pack(window.length, len(logits_first), len(tokens), len(codes))
            + b"".join(each.astype("<i4").tobytes() for each in (tokens, codes))
            + b"".join(each.astype("<f4").tobytes() for each in numbers)
        )
    return found


def restored(
    kept: Sequence[bytes | None],
    fresh: Callable[[Sequence[int]], Sequence[Window]],
    s1_size: int,
    s2_size: int,
) -> EncodedBars:
    """Windows for one step, those of records that there are and the others `fresh`, which encodes those at places."""
    missing = [w for w, record in enumerate(kept) if record is None]
    windows: dict[int, Window | KeptWindow] = dict(zip(missing, fresh(missing) if missing else (), strict=True))
    tables: tuple[list[np.ndarray], ...] = ([], [], [], [])
    for w, record in enumerate(kept):
        if record is None:
            continue
        length, vocabulary, rows, pairs = HEAD.unpack_from(record)
        tokens, codes = np.split(np.frombuffer(record, "<i4", rows + pairs, HEAD.size).astype(np.int64), [rows])
        numbers = np.frombuffer(record, "<f4", offset=HEAD.size + 4 * (rows + pairs)).astype(np.float32)
        columns = len(COLUMNS)
        ends = np.cumsum([columns, columns, vocabulary, rows * s2_size])
        mean, scale, first, logits, values = np.split(numbers, ends)
        windows[w] = KeptWindow(
            length=length,
            mean=mean,
            scale=scale,
            s1_logits=torch.from_numpy(first),
            encode=lambda w=w: fresh([w])[0],
        )
        found = (tokens + w * s1_size, logits.reshape(rows, -1), codes + w * s1_size * s2_size, values.reshape(pairs, -1))
        for table, each in zip(tables, found, strict=True):
            if len(each):
                table.append(each)

    def table(keys: list[np.ndarray], rows: list[np.ndarray]) -> RowTable:
        if not keys:
            return RowTable(TABLE_BYTES)
        return RowTable(TABLE_BYTES, np.concatenate(keys), torch.from_numpy(np.concatenate(rows)))

    return EncodedBars(
        windows=[windows[w] for w in range(len(kept))],
        horizon=1,
        s2_logits=table(*tables[:2]),
        values=table(*tables[2:]),
    )
