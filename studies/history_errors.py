"""Every candidate configuration's error at every origin of a symbol, measured once and kept in files.

What replays of any dates and rules read. Origins are measured in blocks that begin at fixed bars, so that a number is
the same whoever asks for which dates. Knows nothing of rules, databases or commands.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from forecasters import CLOSE
from forecasters.models import MODELS
from objectives.bars import bars_fingerprint
from objectives.evaluation import Evaluator
from objectives.metrics import no_change_errors
from objectives.windows import Windows
from storage.files import replace_file
from studies.candidates import grid, shared_knobs
from studies.config import Config
from studies.evidence import Source
from studies.series import Series
from studies.space import Space, default, most_samples
from studies.study import clipped_share

SEARCH, FRESH = (0,), (1, 2)  # passes whose seeds the search and the confirmation measure with
BLOCK = 480  # origins measured together, of which Toto's patches of 64 let 7 share a forward


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A configuration that is tried at every date."""

    params: Mapping[str, Any]
    source: Source


@dataclass(frozen=True, kw_only=True)
class Block:
    """Origins that are measured together, and the file that keeps what was measured."""

    windows: Windows
    path: Path


@dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """Every candidate's error at every origin of one symbol and model."""

    symbol: str
    model: str
    checkpoint: str
    series: Series
    min_context: int
    first: int  # origin of the first column
    candidates: Sequence[Candidate]
    search: np.ndarray  # [C, W], with the seeds of a search
    fresh: np.ndarray  # [C, W], with those of a confirmation
    no_change: np.ndarray  # [W]
    _clipped: dict[tuple[int, int], float | None] = field(default_factory=dict, init=False, repr=False)

    def clipped(self, place: int, end: int) -> float | None:
        """What `StudyRun.clipped` says of a candidate where the bars end at bar `end`."""
        if (place, end) not in self._clipped:
            closes, params = self.series.bars.close[:end], self.candidates[place].params
            self._clipped[place, end] = clipped_share(self.model, closes, params, min_context=self.min_context)
        return self._clipped[place, end]


def candidates_of(
    config: Config, space: Space, sample: Sequence[Mapping[str, Any]], in_use: Mapping[str, Any] | None = None
) -> list[Candidate]:
    """What a replay tries in place of a sampler: the default, and the grid of what shares its draws, else a sample.

    sample: configurations of the space, taken where nothing shares its draws. in_use: what a replay begins with.
    """
    first = default(space, config)
    shared = shared_knobs(space)
    if not shared:
        count = MODELS[space.model].params.num_samples
        most = {count: most_samples(space.model, config)} if count in space.knobs else {}
        others: list[Mapping[str, Any]] = [{**params, **most} for params in sample]
    else:
        others = [{**first, **values} for values in grid(space, shared)]
    found = [Candidate(params=first, source="default")]
    found += [Candidate(params=params, source="grid") for params in others if params != first]
    return found + ([Candidate(params=in_use, source="in use")] if in_use is not None else [])


def blocks(
    config: Config,
    series: Series,
    origins: range,
    candidates: Sequence[Candidate],
    *,
    model: str,
    checkpoint: str,
    folder: Path,
) -> list[Block]:
    """The blocks that have these origins, whole where the bars allow it. checkpoint: the fingerprint of the weights."""
    horizon, found = config.windows.horizon, []
    stop = len(series.bars) - horizon + 1
    for start in range(origins.start // BLOCK * BLOCK, origins.stop, BLOCK):
        asked = range(max(start, config.windows.min_context), min(start + BLOCK, stop))
        bars = series.bars.slice(0, min(start + BLOCK + horizon, len(series.bars)))
        key = config.search.key
        windows = Windows(symbol=series.symbol, bars=bars, origins=tuple(asked), horizon=horizon, key=key)
        about = {
            "fingerprint": checkpoint,
            "bars": bars_fingerprint(bars),
            "origins": [asked.start, asked.stop],
            "horizon": horizon,
            "together": BLOCK,
            "search": [config.search.rung, config.search.batch_size(model), config.search.objective],
            "candidates": [dict(one.params) for one in candidates],
            **({} if key == CLOSE else {"key": key}),
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        found.append(Block(windows=windows, path=folder / f"{series.symbol}-{model}-{asked.start}-{digest[:16]}.npz"))
    return found


def measure(evaluator: Evaluator, block: Block, candidates: Sequence[Candidate]) -> None:
    """Measure every candidate at a block's origins and keep the errors. Raises ForecastError and OSError."""
    errors = [
        [evaluator.measure(block.windows, one.params, passes=passes).errors for one in candidates]
        for passes in (SEARCH, SEARCH if evaluator.exact else FRESH)
    ]
    content = io.BytesIO()
    np.savez_compressed(content, errors=np.array(errors))
    block.path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(block.path, content.getvalue())


def read(block: Block, candidates: Sequence[Candidate]) -> np.ndarray | None:
    """Errors as `measure` kept them, [2, C, W], of the search and fresh; None where there are none or not whole."""
    try:
        with np.load(block.path, allow_pickle=False) as kept:
            errors = kept["errors"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return errors if errors.shape == (2, len(candidates), len(block.windows)) else None


def join(
    series: Series,
    origins: range,
    candidates: Sequence[Candidate],
    found: Sequence[Block],
    *,
    model: str,
    checkpoint: str,
    min_context: int,
) -> History:
    """The history of blocks that are measured. Raises LookupError where one is not."""
    errors, no_change = [], []
    for block in found:
        kept = read(block, candidates)
        if kept is None:
            raise LookupError(f"{block.path}: not measured")
        wanted = [place for place, origin in enumerate(block.windows.origins) if origin in origins]
        errors.append(kept[:, :, wanted])
        no_change.append(no_change_errors(block.windows)[wanted])
    search, fresh = np.concatenate(errors, axis=2)
    return History(
        symbol=series.symbol,
        model=model,
        checkpoint=checkpoint,
        series=series,
        min_context=min_context,
        first=origins.start,
        candidates=candidates,
        search=search,
        fresh=fresh,
        no_change=np.concatenate(no_change),
    )
