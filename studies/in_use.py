"""Which configurations a symbol has in use, as the promoted files say them."""

from __future__ import annotations

from typing import Any

from forecasters.models import MODELS
from storage import configs
from storage.configs import Record
from studies import space as spaces
from studies.config import Config
from studies.evidence import INCUMBENT, STORED
from studies.space import Space


def configurations_in_use(
    config: Config, symbol: str, model: str, space: Space
) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """The configurations in use that this model can measure: the incumbent and the model's stored one."""
    found: dict[str, dict[str, Any]] = {}
    notes = []
    for label, folder in ((INCUMBENT, "best"), (STORED, model)):
        record = configs.read(config.hyperparams.dir, folder, symbol)
        if record is None or record.model != model or record.key != config.search.key:
            continue
        try:
            params = spaces.from_promoted(record.config, record.metadata, space)
        except ValueError as error:
            notes.append(f"{record.path}: cannot be measured: {error}")
            continue
        if params not in found.values():
            found[label] = params
            notes += lost_notes(record)
    return found, tuple(notes)


def lost_notes(record: Record) -> list[str]:
    """A line on what the forecasts of a file rest on and cannot be reproduced here; none where nothing is lost."""
    foreign = MODELS[record.model].foreign(record.config, record.metadata)
    if foreign is None or not foreign.lost:
        return []
    return [f"{record.path}: is measured without what has no meaning here: {', '.join(foreign.lost)}"]
