"""`python -m benchmarks.faults`: a search that ends with exactly its budget, whatever is killed meanwhile.

The real commands on a private server. At random moments of the run (of its count of finished trials), in random order:
workers are killed, workers are frozen past their lease, the server is stopped and crashed and is away for a second or
more, the supervisor is killed and the same command given again. Then the database is compared with what the workers
said in their logs and with every trial measured anew in one undisturbed process. tests/test_faults.py runs a short one.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text

from benchmarks import private, recording
from launch.worker import RunPlan
from objectives.bars import read_bars
from storage import database, embedded, retrying, slots
from storage.progress import study_progress
from storage.retrying import RetryingStorage
from studies import evaluators
from studies import study as studying
from studies.series import Series, demo_bars

LEASE_S = 2.0
DEATHS_BORNE = 2  # of one worker in one supervisor's life: the third makes it give the device up
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
ACKNOWLEDGED = re.compile(r" I (?P<study>\S+) #(?P<number>\d+) (?P<state>complete|pruned) .*?mae=(?P<mae>\S+)")
SETTINGS = """
workers.lease_s = {lease_s}
[windows]
validation = {validation}
min_context = 64
[search]
models = ["{model}"]
trials = {trials}
[naive]
num_samples = [64, 128, 256, 512]
[toto]
checkpoint = "toto-tiny"
context_length = [128, 256]
num_samples = [64, 128, 256, 512]
aggregates = ["mean", "median", "trimmed_mean_10", "quantile_0.30", "quantile_0.45", "quantile_0.55"]
"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run and what to do to it."""

    model: str = "toto"
    workers: int = 8
    studies: int = 4
    trials: int = 100  # of each study
    validation: int = 400  # windows a trial is measured on: more make it slower
    worker_kills: int = 20
    freezes: int = 5
    server_stops: int = 3
    server_crashes: int = 2
    supervisor_kills: int = 2

    def faults(self) -> list[str]:
        return (
            ["worker kill"] * self.worker_kills
            + ["freeze"] * self.freezes
            + ["server stop"] * self.server_stops
            + ["server crash"] * self.server_crashes
            + ["supervisor kill"] * self.supervisor_kills
        )


@dataclass(kw_only=True)
class Result:
    """What was done and what came of it. `wrong` says in words what should not be; empty: all is as it should."""

    seconds: float = 0.0
    dealt: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    postgres: str = ""  # version

    def expect(self, name: str, found: int, wanted: int) -> None:
        self.numbers[name] = found
        if found != wanted:
            self.wrong.append(f"{name}: {found} instead of {wanted}")


class Run:
    """One launch-workers under attack, in a folder of its own."""

    def __init__(self, plan: Plan, folder: Path, url: str, seed: int, say: Callable[[str], None]) -> None:
        self.plan, self.folder, self.say = plan, folder, say
        self.random = random.Random(seed)
        self.settings = folder / "studies.toml"
        settings = SETTINGS.format(model=plan.model, trials=plan.trials, validation=plan.validation, lease_s=LEASE_S)
        self.settings.write_text(private.SETTINGS + settings, encoding="utf-8")
        cut_bars(folder / "bars", plan.studies, bars=plan.validation + 600)
        self.server = folder / private.SERVER
        self.storage = database.open_storage(url, wait_s=60)
        self.deaths: Counter[int] = Counter()  # by worker number, in this supervisor's life
        self.frozen: set[int] = set()
        self.timers: list[threading.Timer] = []  # that thaw them
        self.launch()

    def launch(self) -> None:
        """The same command, whenever it is given."""
        command = Path(sys.executable).parent / "launch-workers"
        words = [str(command), "--cpus", str(self.plan.workers), "--config", str(self.settings)]
        with (self.folder / "said.txt").open("ab") as said:
            self.supervisor = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        self.deaths.clear()

    def finished(self) -> int:
        return sum(progress.done for progress in study_progress(self.storage).values())

    def wait_for(self, what: str, ready: Callable[[], Any], seconds: float = 120) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := ready()):
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not in {seconds:.0f} s; {self.said()}")
            time.sleep(0.05)
        return found

    def said(self) -> str:
        return (self.folder / "said.txt").read_text()[-2000:]

    # --- the faults

    def deal(self) -> Counter[str]:
        """Cause every fault of the plan, each at its number of finished trials."""
        total = self.plan.studies * self.plan.trials
        faults = self.plan.faults()
        self.random.shuffle(faults)
        moments = sorted(self.random.randrange(1, int(0.7 * total)) for _ in faults)
        dealt: Counter[str] = Counter()
        for moment, fault in zip(moments, faults, strict=True):
            self.wait_for(f"{moment} trials", lambda moment=moment: self.finished() >= moment)
            done = self.finished()
            if done >= total:
                break  # what was not dealt shows in the counts
            time.sleep(self.random.uniform(0, 0.3))  # not right after a trial's end
            self.say(f"{done}/{total} trials: {fault}")
            getattr(self, fault.replace(" ", "_"))()
            dealt[fault] += 1
        return dealt

    def victim(self) -> tuple[int, int]:
        """Pid and number of a random worker that has its device yet."""

        def choose() -> tuple[int, int] | None:
            living = [
                (pid, number)
                for pid, number in workers_of(self.supervisor.pid).items()
                if pid not in self.frozen and self.deaths[number] < DEATHS_BORNE
            ]
            return self.random.choice(living) if living else None

        return self.wait_for("a worker to attack", choose)

    def worker_kill(self) -> None:
        pid, number = self.victim()
        os.kill(pid, signal.SIGKILL)
        self.deaths[number] += 1

    def freeze(self) -> None:
        """Past the lease, while the other faults go on."""
        pid, _ = self.victim()
        self.frozen.add(pid)
        os.kill(pid, signal.SIGSTOP)

        def thaw() -> None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            self.frozen.discard(pid)

        timer = threading.Timer(LEASE_S + self.random.uniform(0.7, 2.0), thaw)
        self.timers.append(timer)
        timer.start()

    def server_stop(self) -> None:
        embedded.stop(self.server)
        self.bring_back_server()

    def server_crash(self) -> None:
        pid = int((self.server / "cluster" / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, signal.SIGQUIT)
        self.bring_back_server()

    def bring_back_server(self) -> None:
        time.sleep(self.random.uniform(1.0, 2.0))
        embedded.start(self.server)

    def supervisor_kill(self) -> None:
        self.supervisor.kill()
        self.supervisor.wait()
        self.launch()

    # --- from start to end

    def __call__(self) -> Result:
        result, began = Result(), time.monotonic()
        try:
            dealt = self.deal()
            status = self.supervisor.wait(timeout=300)
            result.seconds = time.monotonic() - began
        finally:
            for timer in self.timers:
                timer.join()
            if self.supervisor.poll() is None:
                self.supervisor.terminate()
                self.supervisor.wait(timeout=60)
        result.dealt = {fault: dealt[fault] for fault in dict.fromkeys(self.plan.faults())}
        for fault, count in Counter(self.plan.faults()).items():
            if dealt[fault] != count:
                result.wrong.append(f"{fault}: {dealt[fault]} of {count} dealt before the run was over")
        result.expect("exit status", status, 0)
        if status:
            result.wrong.append(self.said())
        self.check(result)
        return result

    def check(self, result: Result) -> None:
        """Compare the database with the plan, with the logs and with an undisturbed measurement."""
        total = self.plan.studies * self.plan.trials
        studies = {study.name: study for study in studying.list_studies(self.storage)}
        trials = {
            name: optuna.load_study(study_name=name, storage=self.storage).get_trials(deepcopy=False)
            for name in studies
        }
        everything = [trial for found in trials.values() for trial in found]
        ended = [trial for trial in everything if trial.state in FINISHED]
        result.expect("studies", len(studies), self.plan.studies)
        result.expect("finished trials", len(ended), total)
        result.expect("RUNNING trials", sum(trial.state == TrialState.RUNNING for trial in everything), 0)
        result.numbers["failed trials"] = sum(trial.state == TrialState.FAIL for trial in everything)

        said = acknowledged(self.folder / "logs")
        result.numbers["acknowledged trials"] = len(said)
        lost = [line for line in said if not is_there(line, trials)]
        result.expect("lost trials", len(lost), 0)

        statement = text("select state, claim from slots where stage = :stage")
        rows = self.storage.transaction(lambda c: c.execute(statement, {"stage": slots.TRIAL}).all())
        claims = Counter(trial.system_attrs[retrying.CLAIM_ATTR] for trial in ended)
        result.expect("slots done", sum(row.state == "done" for row in rows), total)
        result.expect("slots done twice", len(ended) - len(claims), 0)
        result.expect("trials without a slot", len(set(claims) - {row.claim for row in rows}), 0)
        result.expect("parked slots", sum(p.parked for p in study_progress(self.storage).values()), 0)
        result.expect("open slots", sum(p.open for p in study_progress(self.storage).values()), 0)

        compared, other = remeasure(self.storage, self.folder, self.plan.model, trials)
        result.expect("trials measured anew", compared, total)
        result.expect("trials with another number then", other, 0)


def cut_bars(folder: Path, count: int, *, bars: int) -> None:
    """Write bars of `count` symbols: pieces of the packaged indices, one after the other."""
    with tempfile.TemporaryDirectory() as whole:
        paths = demo_bars(whole)
        folder.mkdir()
        for n in range(count):
            path = paths[n % len(paths)]
            header, *lines = path.read_text().splitlines()
            end = len(lines) - bars * (n // len(paths))
            piece = [header, *lines[end - bars : end], ""]
            (folder / f"{path.stem}{n // len(paths)}.csv").write_text("\n".join(piece))


def workers_of(pid: int) -> dict[int, int]:
    """Pid and number of the workers that this supervisor started."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                variables = (entry / "environ").read_bytes().split(b"\0")
                if b"launch.worker" in words and f"STUDIES_SUPERVISOR_PID={pid}".encode() in variables:
                    found[int(entry.name)] = int(words[-2])
    return found


def acknowledged(logs: Path) -> list[Mapping[str, str]]:
    """What the workers said they had finished."""
    lines = [line for path in sorted(logs.glob("*/worker-*.log")) for line in path.read_text().splitlines()]
    return [match.groupdict() for line in lines if (match := ACKNOWLEDGED.search(line))]


def is_there(line: Mapping[str, str], trials: Mapping[str, list[FrozenTrial]]) -> bool:
    """Whether an acknowledged trial is in the database, in its state and with its value."""
    for trial in trials.get(line["study"], ()):
        if trial.number == int(line["number"]):
            return trial.state.name.lower() == line["state"] and f"{trial.value:.6g}" == line["mae"]
    return False


def remeasure(
    storage: RetryingStorage, folder: Path, model: str, trials: Mapping[str, list[FrozenTrial]]
) -> tuple[int, int]:
    """Measure every finished trial's params here, undisturbed: how many, and how many have another number or report."""
    import torch

    job = RunPlan.read(sorted((folder / "logs").iterdir())[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    forecaster = evaluators.load_forecaster(job.config, model, device="cpu")
    evaluator = evaluators.evaluator_of(job.config, forecaster, cache_bytes=2**30)
    compared = other = 0
    for study in studying.list_studies(storage):
        bars, _ = read_bars(Path(job.series[study.symbol]))
        series = Series(symbol=study.symbol, path=Path(job.series[study.symbol]), bars=bars)
        run = studying.start(storage, job.config, study, series, evaluator.forecaster.fingerprint)
        known: dict[str, tuple[float, dict[int, float]]] = {}
        for trial in trials[study.name]:
            if trial.state not in FINISHED:
                continue
            key = json.dumps(trial.params, sort_keys=True)
            if key not in known:
                reports: dict[int, float] = {}
                params = run.space.complete(trial.params)
                mae = evaluator.measure(
                    run.split.validation, params, passes=studying.SEARCH_PASSES, on_rung=reports.__setitem__
                ).mae
                known[key] = mae, reports
            mae, reports = known[key]
            same = all(reports[step] == value for step, value in trial.intermediate_values.items())
            last = reports[max(trial.intermediate_values)] if trial.state == TrialState.PRUNED else mae
            compared += 1
            other += not (same and trial.value == last)
    torch.set_num_threads(threads)
    return compared, other


@contextmanager
def private_environment() -> Iterator[None]:
    """No storage of the caller's: what is attacked here is always our own."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith(("PG", "OPTUNA_", "STUDIES_"))]:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run(plan: Plan, folder: Path, *, seed: int, say: Callable[[str], None] = lambda line: None) -> Result:
    """Run the plan in an empty folder that the server's user can pass through."""
    with private_environment(), private.server(folder) as server:
        attacked = Run(plan, folder, server.url, seed, say)
        try:
            result = attacked()
            result.postgres = private.postgres(attacked.storage)
            return result
        finally:
            attacked.storage.engine.dispose()


def main() -> None:
    parser = recording.parser("faults", __doc__)
    parser.add_argument("--seed", type=int, default=None, help="of the moments and victims; default: another each time")
    parser.add_argument("--model", choices=("toto", "naive"), default="toto", help="what is searched; default: toto")
    args = parser.parse_args()
    if args.seed is None:
        args.seed = random.randrange(10**6)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    plan = Plan(model=args.model)
    with private.folder() as folder:
        result = run(plan, folder, seed=args.seed, say=lambda line: print(line, file=sys.stderr))
    counts = {**result.dealt, **result.numbers}
    recording.table(f"seed {args.seed}, {result.seconds:.0f} s", ("what", "count"), counts.items())
    figures = {name: value for name, value in asdict(result).items() if name != "postgres"}
    recording.write(args, {"plan": asdict(plan), **figures}, postgres=result.postgres)
    for line in result.wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    sys.exit(1 if result.wrong else 0)


if __name__ == "__main__":
    main()
