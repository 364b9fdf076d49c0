"""Which configurations a symbol has in use, as the promoted files say them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forecasters.models import MODELS
from storage import configs
from studies import space as spaces
from studies.config import Config
from studies.ensembles import members_of
from studies.evidence import ENSEMBLE, INCUMBENT, MEMBER, STORED
from studies.space import Space


def configurations_in_use(
    config: Config, symbol: str, model: str, space: Space
) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """The configurations in use that this model can measure: the incumbent, or its part of one that is an ensemble, and
    the model's stored one.

    Raises ConfigFileError.
    """
    found: dict[str, dict[str, Any]] = {}
    notes = []
    for label, folder in ((INCUMBENT, "best"), (STORED, model)):
        record = configs.read(config.hyperparams.dir, folder, symbol)
        if record is None or record.key != config.search.key:
            continue
        said, metadata = record.config, record.metadata
        if record.model == ENSEMBLE:
            part = next((one for one in members_of(record) if one.model == model), None)
            if part is None:
                continue
            label, said, metadata = MEMBER, part.config, part.metadata
        elif record.model != model:
            continue
        try:
            params = spaces.from_promoted(said, metadata, space)
        except ValueError as error:
            notes.append(f"{record.path}: cannot be measured: {error}")
            continue
        if params not in found.values():
            found[label] = params
            notes += lost_notes(record.path, model, said, metadata)
    return found, tuple(notes)


def lost_notes(path: Path, model: str, said: Mapping[str, Any], metadata: Mapping[str, Any]) -> list[str]:
    """A line on what the forecasts of a file rest on and cannot be reproduced here; none where nothing is lost.

    said: what the file's `config` says of this model.
    """
    foreign = MODELS[model].foreign(said, metadata)
    if foreign is None or not foreign.lost:
        return []
    return [f"{path}: is measured without what has no meaning here: {', '.join(foreign.lost)}"]
