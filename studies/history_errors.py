"""Every candidate configuration's error at every origin of a symbol, measured once and kept in files.

What replays of any dates and rules read. Origins are measured in blocks that begin at fixed bars, so that a number is
the same whoever asks for which dates. Knows nothing of rules, databases or commands.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from objectives.bars import bars_fingerprint
from objectives.evaluation import Evaluator
from objectives.metrics import no_change_errors
from objectives.windows import Windows
from storage.files import replace_file
from studies.evidence import Source
from studies.series import Series

SEARCH, FRESH = (0,), (1, 2)  # passes whose seeds the search and the confirmation measure with
BLOCK = 120  # origins measured together


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A configuration that is tried at every date."""

    params: Mapping[str, Any]
    source: Source
    clipped: np.ndarray | None = None  # [T], whether the last close before each origin is one that it clips


@dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """Every candidate's error at every origin of one symbol and model."""

    symbol: str
    model: str
    checkpoint: str
    series: Series
    first: int  # origin of the first column
    candidates: Sequence[Candidate]
    search: np.ndarray  # [C, W], with the seeds of a search
    fresh: np.ndarray  # [C, W], with those of a confirmation
    no_change: np.ndarray  # [W]


def measure_history(
    evaluator: Evaluator,
    series: Series,
    origins: range,
    candidates: Sequence[Candidate],
    *,
    horizon: int,
    min_context: int,
    folder: Path,
    progress: Callable[[int], None] = lambda windows: None,
) -> History:
    """Measure every candidate at these origins, block by block; what an earlier call left in `folder` is not repeated.

    progress: called with the number of windows that are done, as they are. Raises ForecastError and OSError.
    """
    model = evaluator.forecaster.model
    found = []
    for windows in _blocks(series, origins, horizon, min_context):
        path = folder / f"{_key(evaluator, windows, candidates)}.npz"
        block = _read(path, len(candidates), len(windows))
        if block is None:
            block = np.stack(
                [
                    [evaluator.measure(windows, one.params, passes=passes).errors for one in candidates]
                    for passes in (SEARCH, SEARCH if evaluator.exact else FRESH)
                ]
            )
            _write(path, block)
        wanted = [place for place, origin in enumerate(windows.origins) if origin in origins]
        found.append((block[:, :, wanted], no_change_errors(windows)[wanted]))
        progress(len(wanted))
    errors = np.concatenate([errors for errors, _ in found], axis=2)
    return History(
        symbol=series.symbol,
        model=model,
        checkpoint=evaluator.forecaster.fingerprint,
        series=series,
        first=origins.start,
        candidates=candidates,
        search=errors[0],
        fresh=errors[1],
        no_change=np.concatenate([no_change for _, no_change in found]),
    )


def _blocks(series: Series, origins: range, horizon: int, min_context: int) -> Iterator[Windows]:
    """The blocks that have these origins, whole where the bars allow it."""
    stop = len(series.bars) - horizon + 1
    for start in range(origins.start // BLOCK * BLOCK, origins.stop, BLOCK):
        asked = range(max(start, min_context), min(start + BLOCK, stop))
        bars = series.bars.slice(0, min(start + BLOCK + horizon, len(series.bars)))
        yield Windows(symbol=series.symbol, bars=bars, origins=tuple(asked), horizon=horizon)


def _key(evaluator: Evaluator, windows: Windows, candidates: Sequence[Candidate]) -> str:
    """What the errors of a block are of."""
    asked = {
        "fingerprint": evaluator.forecaster.fingerprint,
        "bars": bars_fingerprint(windows.bars),
        "origins": [windows.origins[0], windows.origins[-1]],
        "symbol": windows.symbol,
        "horizon": windows.horizon,
        "batch": [evaluator.rung, evaluator.batch],
        "exact": evaluator.exact,
        "candidates": [dict(one.params) for one in candidates],
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return f"{windows.symbol}-{evaluator.forecaster.model}-{windows.origins[0]}-{digest[:16]}"


def _read(path: Path, candidates: int, windows: int) -> np.ndarray | None:
    """Errors as `_write` left them, [2, C, W]; None where there are none or they are damaged."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            errors = kept["errors"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return errors if errors.shape == (2, candidates, windows) else None


def _write(path: Path, errors: np.ndarray) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, errors=errors)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content.getvalue())
