"""Which configurations a symbol has in use, as the promoted files say them."""

from __future__ import annotations

from typing import Any

from storage import configs
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
            if lost := spaces.lost(model, record.config, record.metadata):
                notes.append(f"{record.path}: is measured without what has no meaning here: {', '.join(lost)}")
    return found, tuple(notes)
