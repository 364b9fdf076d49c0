"""What the dashboard's notes, plots and images cost a search: the same run with and without them, in turns.

`python -m benchmarks.notes [--pairs 3] [--trials 100]`, about a minute a pair.

The demonstration's four studies on two CPU workers. Prints, for each pair of runs, the ratio of their times from the
first trial's begin to the last trial's end and of the CPU time of the supervisor and its workers; and the CPU time that
writing took in the supervisor, during the search and after it, by that of the whole run: what other work on the machine
moves least.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import private, recording

SETTINGS = """
[toto]
checkpoint = "toto-tiny"
[kronos]
checkpoint = "kronos-tiny"
"""
COLUMNS = {
    "wall, on / off": "wall on/off",
    "CPU, on / off": "CPU on/off",
    "during / CPU": "writing during the search",
    "after / CPU": "after it",
    "wall, s": "s",
    "CPU, s": "CPU s",
}


def one_run(folder: Path, trials: int, *, with_notes: bool) -> dict[str, Any]:
    """Search in this process and its workers; seconds by what they are of."""
    from launch import cli, notes, places
    from storage import database
    from studies import config as configuration

    writing = {"during": 0.0, "after": 0.0}
    write = notes.Keeper.write

    def timed(self: notes.Keeper) -> None:
        when = "after" if threading.current_thread() is threading.main_thread() else "during"
        began = time.thread_time()
        if with_notes:
            write(self)
        writing[when] += time.thread_time() - began

    notes.Keeper.write = timed  # type: ignore[method-assign]
    words = ["--config", str(folder / "studies.toml"), "--cpus", "2", "--trials", str(trials)]
    try:
        cli.launch_workers(words, standalone_mode=False)
    except SystemExit as ended:
        if ended.code:
            raise
    storage = places.open_storage(configuration.load(folder / "studies.toml"))
    efforts = database.efforts(storage).values()
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "wall": max(effort.last for effort in efforts) - min(effort.first for effort in efforts),
        "cpu": sum(usage.ru_utime + usage.ru_stime for usage in spent),
        "postgres": private.postgres(storage),
        **writing,
    }


def run(trials: int, *, with_notes: bool) -> dict[str, Any]:
    """The same in a process and a database of its own."""
    with private.folder() as folder:
        (folder / "studies.toml").write_text(private.SETTINGS + SETTINGS)
        studies = [str(Path(sys.executable).parent / "studies")]
        config = ["--config", str(folder / "studies.toml")]
        subprocess.run([*studies, "demo-data", *config], check=True, stdout=subprocess.DEVNULL)
        command = [sys.executable, "-m", "benchmarks.notes", "--one", str(folder), "--trials", str(trials)]
        try:
            ended = subprocess.run(
                [*command, *([] if with_notes else ["--without"])], check=True, capture_output=True, text=True
            )
        finally:
            subprocess.run([*studies, "stop", *config], check=True, stdout=subprocess.DEVNULL)
        return json.loads(ended.stdout.splitlines()[-1])


def compared(on: dict[str, Any], off: dict[str, Any]) -> dict[str, float]:
    """What a pair of runs says."""
    return {
        "wall, on / off": on["wall"] / off["wall"],
        "CPU, on / off": on["cpu"] / off["cpu"],
        "during / CPU": on["during"] / on["cpu"],
        "after / CPU": on["after"] / on["cpu"],
        "wall, s": on["wall"],
        "CPU, s": on["cpu"],
    }


def main() -> None:
    parser = recording.parser("notes", __doc__)
    parser.add_argument("--pairs", type=recording.at_least_one, default=3, help="of runs, with and without")
    parser.add_argument("--trials", type=recording.at_least_one, default=100, help="of a study")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--without", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.pop("OPTUNA_STORAGE", None)
    if options.one is not None:
        print(json.dumps(one_run(options.one, options.trials, with_notes=not options.without)))
        return
    pairs, postgres = [], ""
    for pair in range(options.pairs):
        order = (True, False) if pair % 2 == 0 else (False, True)
        found = {on: run(options.trials, with_notes=on) for on in order}
        pairs.append(compared(found[True], found[False]))
        postgres = found[True]["postgres"]
    shares = ("during / CPU", "after / CPU")
    rows = [
        [number, *(recording.per_cent(each[key]) if key in shares else each[key] for key in COLUMNS)]
        for number, each in enumerate(pairs, start=1)
    ]
    recording.table(f"notes, {options.trials} trials a study", ("pair", *COLUMNS.values()), rows)
    for name in ("one", "without"):  # how it calls itself
        delattr(options, name)
    recording.write(options, pairs, postgres=postgres)


if __name__ == "__main__":
    main()
