"""Set studies aside and bring them back: a retired study keeps its trials under another name and is not resumed."""

from __future__ import annotations

import time

from storage import study_rows
from storage.commands import command
from storage.retrying import RetryingStorage
from studies.config import ConfigError
from studies.study import ASIDE, list_studies

MAX_NAME = 512  # characters of a study's name in Optuna's table


def retire(storage: RetryingStorage, name: str) -> str:
    """Set a study aside: it keeps its trials under another name and is not gone on with. Returns that name.

    Raises KeyError where there is no such study, ConfigError where it cannot have another name.
    """
    if ASIDE in name:
        undo = command(f"studies retire --undo {name}")
        raise ConfigError(f"study {name} is retired already; bring it back with: {undo}")
    aside = f"{name}{ASIDE}{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    if len(aside) > MAX_NAME:
        raise ConfigError(
            f"{len(name)} characters are too long a name to retire: {aside[:40]}.. would exceed {MAX_NAME}"
        )
    if not study_rows.rename_study(storage, name, aside):
        raise KeyError(name)
    return aside


def retired_names(storage: RetryingStorage, name: str) -> list[str]:
    """The retired studies of this name, which may be a retired one's, oldest first."""
    names = [study.name for study in list_studies(storage, retired=True)]
    return [each for each in names if name in (each, each.partition(ASIDE)[0])]


def unretire(storage: RetryingStorage, name: str) -> str:
    """Bring a retired study back under its own name; of several that had this name the newest. Returns the name.

    Raises KeyError where there is no such study, ConfigError where another study has the name now.
    """
    if not (found := retired_names(storage, name)):
        raise KeyError(name)
    before = found[-1].partition(ASIDE)[0]
    if not study_rows.rename_study(storage, found[-1], before):
        words = f"studies retire {before}"
        raise ConfigError(f"there is a study {before} already; set it aside first with: {command(words)}")
    return before
