"""What the dashboard's notes, plots and images cost a search: the same run with and without them, in turns.

    python -m benchmarks.notes [--pairs 3] [--trials 100]

The demonstration's four studies on two CPU workers. Prints, for each pair of runs, the ratio of their times from the
first trial's begin to the last trial's end and of the CPU time of the supervisor and its workers; and the CPU time that
writing took in the supervisor, during the search and after it, by that of the whole run: what other work on the machine
moves least.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click

SETTINGS = """
[data]
dir = "bars"
[toto]
checkpoint = "toto-tiny"
[kronos]
checkpoint = "kronos-tiny"
[storage]
data_dir = "postgres"
[workers]
log_dir = "logs"
[hyperparams]
dir = "hyperparams"
[promotion]
results_dir = "results"
"""


def one_run(folder: Path, trials: int, *, with_notes: bool) -> dict[str, float]:
    """Search in this process and its workers; seconds by what they are of."""
    from launch import cli, notes
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
    efforts = database.efforts(cli.open_storage(configuration.load(folder / "studies.toml"))).values()
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "wall": max(effort.last for effort in efforts) - min(effort.first for effort in efforts),
        "cpu": sum(usage.ru_utime + usage.ru_stime for usage in spent),
        **writing,
    }


def run(trials: int, *, with_notes: bool) -> dict[str, float]:
    """The same in a process and a database of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o711)  # root's private server runs as another user
        (folder / "studies.toml").write_text(SETTINGS)
        studies = [str(Path(sys.executable).parent / "studies")]
        config = ["--config", str(folder / "studies.toml")]
        subprocess.run([*studies, "demo-data", *config], check=True, stdout=subprocess.DEVNULL)
        command = [sys.executable, "-m", "benchmarks.notes", "--one", name, "--trials", str(trials)]
        try:
            ended = subprocess.run(
                [*command, *([] if with_notes else ["--without"])], check=True, capture_output=True, text=True
            )
        finally:
            subprocess.run([*studies, "stop", *config], check=True, stdout=subprocess.DEVNULL)
        return json.loads(ended.stdout.splitlines()[-1])


@click.command()
@click.option("--pairs", default=3, show_default=True)
@click.option("--trials", default=100, show_default=True)
@click.option("--one", type=click.Path(path_type=Path), hidden=True)
@click.option("--without", is_flag=True, hidden=True)
def main(pairs: int, trials: int, one: Path | None, without: bool) -> None:
    if one is not None:
        print(json.dumps(one_run(one, trials, with_notes=not without)))
        return
    print("wall on/off  CPU on/off  writing during the search  after it")
    for pair in range(pairs):
        order = (True, False) if pair % 2 == 0 else (False, True)
        found: dict[bool, Any] = {on: run(trials, with_notes=on) for on in order}
        on, off = found[True], found[False]
        ratios = f"{on['wall'] / off['wall']:11.3f}  {on['cpu'] / off['cpu']:10.3f}"
        writing = f"{on['during'] / on['cpu']:25.2%}  {on['after'] / on['cpu']:8.2%}"
        print(f"{ratios}  {writing}  ({on['wall']:.1f} s, {on['cpu']:.1f} CPU s)", flush=True)


if __name__ == "__main__":
    os.environ.pop("OPTUNA_STORAGE", None)
    main()
