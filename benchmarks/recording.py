"""How every benchmark is asked, shown and recorded: `python -m benchmarks.NAME [--json FILE]`.

Knows the machine and the versions; what the figures mean is the benchmark's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = ("forecast-studies", "torch", "numpy", "optuna")


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options of `benchmarks.NAME`, with --json; what it prints of itself is its module's docstring."""
    found = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument(
        "--json",
        type=_results_file,
        metavar="FILE",
        help=f"also write machine, versions, date, options and figures there: benchmarks/results/{name}.json",
    )
    return found


def _results_file(text: str) -> Path:
    """Refused before anything is measured, not after an hour."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror}") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path}: cannot be written; name a file")
    return path


def at_least_one(text: str) -> int:
    """A number of repeats and the like."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def write(options: argparse.Namespace, figures: Any, *, device: str = "cpu", **versions: str) -> None:
    """Write the results file where --json asks for one.

    figures: anything that is JSON. device: what torch computed on. versions: of what else was measured, such as the
    server. Of a path among the options only its last part is kept: the rest is a machine's own.
    """
    if options.json is None:
        return
    asked = {name: value for name, value in vars(options).items() if name != "json"}
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(device),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
            **versions,
        },
        "options": {name: value.name if isinstance(value, Path) else value for name, value in asked.items()},
        "figures": figures,
    }
    options.json.write_text(json.dumps(content, indent=1) + "\n")


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures are of."""
    system = f"{platform.system()} {platform.machine()}"
    known = {"cpu": cpu_name(), "cores": os.cpu_count(), "memory_gib": memory_gib(), "system": system}
    if not device.startswith("cuda"):
        return known
    import torch  # not every benchmark needs it

    return {**known, "gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table, its first column to the left and the others to the right."""
    shape = Table(title=title, title_justify="left", box=None)
    for number, name in enumerate(columns):
        shape.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        shape.add_row(*map(shown, row))
    Console(width=1000).print(shape)  # no cell is cut: a narrow terminal wraps whole rows


def per_cent(value: float | None, *, sign: bool = False) -> str:
    return "-" if value is None else f"{100 * value:{'+' if sign else ''}.1f} %"


def shown(value: object) -> str:
    """A cell: four digits that count, "-" for None."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
