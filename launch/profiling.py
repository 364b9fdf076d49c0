"""`--profile`: seconds by stage beside the network's work, and the share of what this machine's matrix product does."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from launch.output import say
from launch.views.tables import NOTHING, Column, Table, duration, numbers, percent_share, terminal
from objectives.evaluation import Evaluator

UNITS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What processes spent."""

    seconds: Mapping[str, float]  # by stage, over all processes
    flop: Mapping[str, float] = field(default_factory=dict)  # of stages that run a network
    rate: float | None = None  # of a matrix product in one process, FLOP/s


def joined(profiles: Sequence[Profile]) -> Profile:
    """All of them together, with the mean of their rates."""
    seconds, flop = Counter[str](), Counter[str]()
    for one in profiles:
        seconds.update(one.seconds)
        flop.update(one.flop)
    rates = [one.rate for one in profiles if one.rate]
    return Profile(seconds=dict(seconds), flop=dict(flop), rate=sum(rates) / len(rates) if rates else None)


def work_of(evaluators: Iterable[Evaluator]) -> dict[str, float]:
    """The operations of these evaluators so far, by stage."""
    total = Counter[str]()
    for one in evaluators:
        total.update(one.work.flop if one.work else {})
    return dict(total)


def write(folder: Path, name: str, profile: Profile) -> None:
    """Keep what one process spent, for `read`."""
    (folder / f"profile-{name}.json").write_text(json.dumps(asdict(profile)) + "\n")


def read(folder: Path) -> Profile:
    """What all processes of a run wrote; a process that was killed wrote nothing."""
    return joined([Profile(**json.loads(path.read_text())) for path in sorted(folder.glob("profile-*.json"))])


def table(profile: Profile) -> Table:
    """One row a stage, the longest first."""
    total = sum(profile.seconds.values())
    stages = sorted(profile.seconds, key=lambda stage: -profile.seconds[stage])

    def speed(stage: str) -> float | None:
        flop, seconds = profile.flop.get(stage), profile.seconds[stage]
        return flop / seconds if flop and seconds else None

    def share(stage: str) -> str:
        return percent_share(found / profile.rate) if (found := speed(stage)) and profile.rate else NOTHING

    return Table(
        columns=[
            Column(heading="stage", cells=stages),
            numbers("time", [duration(profile.seconds[stage]) for stage in stages]),
            numbers("share", [percent_share(profile.seconds[stage] / total if total else 0.0) for stage in stages]),
            numbers("work", [_flop(profile.flop.get(stage)) for stage in stages]),
            numbers("rate", [f"{text}/s" if (text := _flop(speed(stage))) != NOTHING else text for stage in stages]),
            numbers("of matrix product", [share(stage) for stage in stages]),
        ],
        keep_empty=True,
    )


def _flop(value: float | None) -> str:
    if not value:
        return NOTHING
    size, unit = next((one for one in UNITS if value >= one[0]), UNITS[-1])
    return f"{value / size:.1f} {unit}"


def show_profile(profile: Profile, *, plain: bool = False) -> None:
    """Print it as a table on stderr, since stdout has the results."""
    console = Console(stderr=True, highlight=False, color_system=None if plain else "auto")
    console.print("\ntime of all processes by stage", style="bold")
    console.print(terminal(table(profile), console.width))
    if profile.rate:
        say(f"a product of large matrices runs at {_flop(profile.rate)}/s in one process")
