"""What it costs a search to be watched: one run, in turns with all of it and with none.

`python -m benchmarks.watching [--rounds 12] [--phase 10]`, about nine minutes.

Two studies of Toto on two CPU workers, on a terminal of its own: its trials all cost the same. While it is on there are
the live table, the reads of the database that it shows, and the notes, plots and images for the dashboard; while it is
off there is none of it. A round is four phases, on, off, off, on, so that what changes slowly cancels out: a sampler
that knows more trials, other work on the machine. For each round: trials a second, and CPU time a trial of the
supervisor, the workers and the server together, off by on and on by off: above 1 is what watching costs; and, steadier
than these, how much of all CPU time the threads took that read, write and draw, without the server's part. Notes are
written at most every so many seconds of the clock, of which half are off here, so while it is on they are written twice
as often.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import private, recording
from storage.progress import study_progress

SETTINGS = """
data.symbols = ["SP500", "NASDAQ"]
[toto]
checkpoint = "toto-tiny"
"""
ENDLESS = 100_000  # trials a study
WARM_UP = 200  # trials, before the first phase
ROUND = (True, False, False, True)
CLOCK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(roots: list[int]) -> float:
    """Of these processes, those below them, and those of theirs that have ended."""
    parents: dict[int, int] = {}
    spent: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        pid = int(stat.parent.name)
        parents[pid], spent[pid] = int(fields[1]), sum(map(int, fields[11:15]))

    def below(pid: int) -> bool:
        while pid and pid not in roots:
            pid = parents.get(pid, 0)
        return pid != 0

    return sum(ticks for pid, ticks in spent.items() if below(pid)) / CLOCK


def watched_run(folder: Path, rounds: int, phase_s: float) -> dict[str, Any]:
    """Search in this process and its workers until the rounds are over; trials, seconds and CPU seconds by phase."""
    from launch import cli, places
    from launch.views import live, notes
    from storage import embedded
    from studies import config as configuration

    is_on = threading.Event()

    watching = [0.0]  # CPU seconds, of the threads that read, write and draw

    def only_while_on(cls: Any, name: str) -> None:
        method = getattr(cls, name)

        def timed(self: Any) -> None:
            if is_on.is_set():
                began = time.thread_time()
                method(self)
                watching[0] += time.thread_time() - began

        setattr(cls, name, timed)

    only_while_on(notes.NoteWriter, "__call__")  # it also calls the view, which reads the database
    only_while_on(live.LiveView, "_draw")
    server = embedded.start(folder / private.SERVER)
    postmaster = int((server.data_dir / "cluster" / "postmaster.pid").read_text().split("\n", 1)[0])
    storage = places.open_storage(configuration.load(folder / "studies.toml"), start=True)
    phases: list[dict[str, Any]] = []

    def reading() -> dict[str, float]:
        done = sum(each.done for each in study_progress(storage).values())
        cpu = cpu_seconds([os.getpid(), postmaster])
        return {"trials": done, "seconds": time.perf_counter(), "cpu": cpu, "watching": watching[0]}

    def measure() -> None:
        is_on.set()
        while reading()["trials"] < WARM_UP:
            time.sleep(0.5)
        for on in ROUND * rounds:
            is_on.set() if on else is_on.clear()
            before = reading()
            time.sleep(phase_s)
            after = reading()
            phases.append({"on": on, **{name: after[name] - before[name] for name in before}})
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=measure, daemon=True).start()
    words = ["--config", str(folder / "studies.toml"), "--cpus", "2", "--models", "toto", "--trials", str(ENDLESS)]
    try:
        cli.launch_workers(words, standalone_mode=False)
    except SystemExit as ended:
        if ended.code != 130:
            raise
    return {"phases": phases, "postgres": private.postgres(storage)}


def on_a_terminal(command: list[str]) -> str:
    """Run a command whose stderr is a terminal; what it wrote to stdout."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160", "LINES": "40"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment) as process:
        os.close(theirs)
        kept = bytearray()

        def drain() -> None:
            try:
                while read := os.read(ours, 65536):
                    kept.extend(read)
                    del kept[:-4000]  # the last words, for an error
            except OSError:  # the terminal's last user has gone
                return

        reader = threading.Thread(target=drain)
        reader.start()
        said, _ = process.communicate()
        reader.join()
    os.close(ours)
    if process.returncode:
        raise RuntimeError(f"{command}: exit {process.returncode}: {kept.decode(errors='replace')}")
    return said


def compared(phases: list[dict[str, Any]]) -> dict[str, float]:
    """What a round says."""

    def of(on: bool, upper: str, lower: str) -> float:
        chosen = [phase for phase in phases if phase["on"] is on]
        return sum(phase[upper] for phase in chosen) / sum(phase[lower] for phase in chosen)

    return {
        "trials a second, off / on": of(False, "trials", "seconds") / of(True, "trials", "seconds"),
        "CPU a trial, on / off": of(True, "cpu", "trials") / of(False, "cpu", "trials"),
        "watching's own CPU / all": of(True, "watching", "cpu"),
        "trials a second": of(False, "trials", "seconds"),
    }


def main() -> None:
    parser = recording.parser("watching", __doc__)
    parser.add_argument("--rounds", type=recording.at_least_one, default=12, help="of four phases")
    parser.add_argument("--phase", type=float, default=10.0, metavar="SECONDS", help="of a phase")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.pop("OPTUNA_STORAGE", None)
    if options.one is not None:
        print(json.dumps(watched_run(options.one, options.rounds, options.phase)))
        return
    with private.folder() as folder:
        (folder / "studies.toml").write_text(private.SETTINGS + SETTINGS)
        config = ["--config", str(folder / "studies.toml")]
        studies = str(Path(sys.executable).parent / "studies")
        subprocess.run([studies, "demo-data", *config], check=True, stdout=subprocess.DEVNULL)
        asked = ["--one", str(folder), "--rounds", str(options.rounds), "--phase", str(options.phase)]
        with private.server(folder):
            said = on_a_terminal([sys.executable, "-m", "benchmarks.watching", *asked])
    found = json.loads(said.splitlines()[-1])
    rounds = [compared(found["phases"][at : at + len(ROUND)]) for at in range(0, len(found["phases"]), len(ROUND))]
    names = list(rounds[0])
    rows = [[number, *each.values()] for number, each in enumerate(rounds, start=1)]
    columns = {name: [each[name] for each in rounds] for name in names}
    rows.append(["mean", *map(statistics.fmean, columns.values())])
    if len(rounds) > 1:
        errors = [statistics.stdev(values) / len(values) ** 0.5 for values in columns.values()]
        rows.append(["its standard error", *errors])
    recording.table("a search, watched and not", ("round", *names), rows)
    delattr(options, "one")  # how it calls itself
    recording.write(options, {"rounds": rounds, "phases": found["phases"]}, postgres=found["postgres"])


if __name__ == "__main__":
    main()
