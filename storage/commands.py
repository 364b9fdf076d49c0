"""Commands as messages suggest them, so that they can be given as they are: with the settings file of this process."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "STUDIES_CONFIG"  # names the settings file of a process and, with it, of its children


@contextmanager
def suggested_with(config: Path | None) -> Iterator[None]:
    """Within the block commands are suggested with this --config; None: with none."""
    before = os.environ.pop(VARIABLE, None)
    if config is not None:
        os.environ[VARIABLE] = str(config)
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def command(words: str) -> str:
    """A command that goes on where this process is: "studies list" with the --config that it was given."""
    config = os.environ.get(VARIABLE)
    return f"{words} --config {shlex.quote(config)}" if config else words


def this_command() -> str:
    """The command line of this process, to be given again; a URL in it is without its password."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    shown = [re.sub(r"(://[^:/@]*):.*@", r"\1@", re.sub(r"password=[^&]*&?", "", word)) for word in words]
    return shlex.join(shown)
