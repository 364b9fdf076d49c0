"""`python -m benchmarks.faults`: a search that ends with exactly its budget, whatever goes wrong meanwhile.

The real commands on a private server, or through a PgBouncer. At random moments of the run (of its count of finished
trials), in random order: workers and their supervisor are killed, workers are frozen past their lease, the server
stops, crashes and is shut down at once, is read-only, times statements out, has a full disk and a name that does not
resolve. The last fourth of the faults comes while confirmations are done in shares. Then the database is compared with
what the workers said in their logs, and with every trial and confirmation measured anew in one undisturbed process.
tests/test_faults.py runs a short one.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import optuna

from benchmarks import exactness, private, recording
from benchmarks.attacked import LEASE_S, AttackedRun, methods
from benchmarks.exactness import Result
from benchmarks.pgbouncer import PROGRAM, PgBouncer
from studies.demo import INDICES, demo_bars

# During 400 trials. Only a private server is started again by its run, and only some runs have a PgBouncer.
MIX: Mapping[str, int] = {
    "worker kill": 24,
    "freeze": 8,
    "supervisor kill": 2,
    "server stop": 2,
    "server crash": 2,
    "server quit": 2,
    "PgBouncer restart": 2,
    "DNS away": 2,
    "read-only": 2,
    "statement timeout": 2,
    "full disk": 2,
}
FULL_DISK, QUIT, RESTART = "full disk", "server quit", "PgBouncer restart"
DISK_MIB = 512  # of the server, where it can be filled
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

    faults: Mapping[str, int]  # by kind
    model: str = "toto"
    workers: int = 8
    studies: int = 4
    trials: int = 100  # of each study
    validation: int = 400  # windows a trial is measured on: more make it slower
    pgbouncer: bool = False  # workers connect through one


def mix(count: int, *, through_pgbouncer: bool) -> dict[str, int]:
    """At least `count` faults of all kinds."""
    left_out = QUIT if through_pgbouncer else RESTART
    wanted = {kind: number for kind, number in MIX.items() if kind != left_out}
    scale = count / sum(wanted.values())
    return {kind: math.ceil(number * scale) for kind, number in wanted.items()}


def cut_bars(folder: Path, count: int, *, bars: int) -> None:
    """Write bars of `count` symbols: pieces of the packaged indices, one after the other."""
    with tempfile.TemporaryDirectory() as whole:
        paths = demo_bars(whole, INDICES)
        folder.mkdir()
        for n in range(count):
            path = paths[n % len(paths)]
            header, *lines = path.read_text().splitlines()
            end = len(lines) - bars * (n // len(paths))
            piece = [header, *lines[end - bars : end], ""]
            (folder / f"{path.stem}{n // len(paths)}.csv").write_text("\n".join(piece))


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


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A new folder with a disk of its own; False where this user may not make one."""
    folder.mkdir(mode=0o711)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=0711", "none", str(folder)],
        stderr=subprocess.DEVNULL,
        check=False,
    )
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)


def run(plan: Plan, folder: Path, *, seed: int, say: Callable[[str], None] = lambda line: None) -> tuple[Result, str]:
    """Run the plan in an empty folder that the server's user can pass through. Returns the server's version too."""
    cut_bars(folder / "bars", plan.studies, bars=plan.validation + 600)
    settings = SETTINGS.format(model=plan.model, trials=plan.trials, validation=plan.validation, lease_s=LEASE_S)
    rng, result = random.Random(seed), Result(seed=seed)
    with ExitStack() as stack:
        stack.enter_context(private_environment())
        faults = dict(plan.faults)
        if FULL_DISK in faults and not stack.enter_context(small_disk(folder / private.SERVER)):
            result.left_out.append(FULL_DISK)
            del faults[FULL_DISK]
        server = stack.enter_context(private.server(folder))
        bouncer = None
        if plan.pgbouncer:
            bouncer = PgBouncer(folder / "pgbouncer", server, pool_size=plan.workers)
            stack.callback(bouncer.stop)
        attacked = AttackedRun(
            folder,
            server,
            settings,
            workers=plan.workers,
            rng=rng,
            pgbouncer=bouncer,
        )
        stack.callback(attacked.end)
        began = time.monotonic()
        dealt = deal(plan, faults, attacked, say)
        status = attacked.supervisor.wait(timeout=1800)
        result.seconds = round(time.monotonic() - began, 1)
        dealt["supervisor kill"] += attacked.replaced
        result.dealt = {fault: dealt[fault] for fault in faults}
        for fault, count in faults.items():
            if dealt[fault] < count:
                result.wrong.append(f"{fault}: {dealt[fault]} of {count} dealt before the run was over")
        result.wrong += attacked.wrong
        result.expect("exit status", status, 0)
        if status:
            result.wrong.append(attacked.said())
        exactness.check(result, attacked.storage, folder, model=plan.model, studies=plan.studies, trials=plan.trials)
        return result, private.postgres(attacked.storage)


def deal(plan: Plan, faults: Mapping[str, int], attacked: AttackedRun, say: Callable[[str], None]) -> Counter[str]:
    """Cause every fault: the last fourth while shares of confirmations are under way, the others at numbers of trials.

    Returns how many of each kind there were.
    """
    total = plan.studies * plan.trials
    order = [fault for fault, count in sorted(faults.items()) for _ in range(count)]
    attacked.random.shuffle(order)
    late = order[: len(order) // 4]
    order = order[len(late) :]
    moments = sorted(attacked.random.randrange(1, int(0.7 * total)) for _ in order)
    attacked.hold_shares(True)
    cause, dealt, began = methods(list(faults)), Counter[str](), time.monotonic()
    for moment, following, fault in zip(moments, [*moments[1:], total], order, strict=True):
        attacked.wait_for(f"{moment} trials", lambda moment=moment: attacked.finished() >= moment)
        done = attacked.finished()
        if done >= total:
            break  # what was not dealt shows in the counts
        attacked.hold_trials(True)  # a fault takes a second or two: a fast machine would be done before the last
        time.sleep(attacked.random.uniform(0, 0.2))  # not right after a trial's end
        say(f"{time.monotonic() - began:.0f} s, {done}/{total} trials: {fault}")
        cause[fault](attacked)
        dealt[fault] += 1
        attacked.hold_trials(attacked.finished() >= following)  # the faults are behind
    attacked.hold_trials(False)
    attacked.wait_for("all trials", lambda: attacked.finished() >= total)
    for fault in late:
        attacked.wait_for("shares", attacked.shares_under_way)
        time.sleep(attacked.random.uniform(0, 0.5))
        say(f"{time.monotonic() - began:.0f} s, confirming: {fault}")
        cause[fault](attacked)
        dealt[fault] += 1
    attacked.hold_shares(False)
    return dealt


def seeds(text: str) -> range:
    """ "3" or "1-10"."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def main() -> None:
    parser = recording.parser("faults", __doc__)
    parser.add_argument("--seeds", type=seeds, default=None, metavar="1-10",
                        help="of moments and victims, a run each; default: another each time")  # fmt: skip
    parser.add_argument("--model", choices=("toto", "naive"), default="toto", help="what is searched; default: toto")
    parser.add_argument("--trials", type=recording.at_least_one, default=400, help="in all; default: 400")
    parser.add_argument("--faults", type=recording.at_least_one, default=50, help="in all; default: 50")
    parser.add_argument("--validation", type=recording.at_least_one, default=400,
                        help="windows a trial is measured on; default: 400")  # fmt: skip
    parser.add_argument("--workers", type=recording.at_least_one, default=8, help="default: 8")
    parser.add_argument("--pgbouncer", action="store_true", help="workers connect through a PgBouncer, restarted too")
    args = parser.parse_args()
    if args.pgbouncer and PROGRAM is None:
        sys.exit("no pgbouncer here; on Debian: apt-get install pgbouncer")
    chosen = args.seeds or seeds(str(random.randrange(10**6)))
    args.seeds = f"{chosen[0]}-{chosen[-1]}"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    studies = max(4, args.trials // 1000)
    plan = Plan(
        faults=mix(args.faults, through_pgbouncer=args.pgbouncer),
        model=args.model,
        workers=args.workers,
        studies=studies,
        trials=-(-args.trials // studies),
        validation=args.validation,
        pgbouncer=args.pgbouncer,
    )
    results, version = [], ""
    for seed in chosen:
        with private.folder() as folder:
            result, version = run(plan, folder, seed=seed, say=lambda line: print(line, file=sys.stderr))
        results.append(result)
        counts = {**result.dealt, **result.numbers}
        recording.table(f"seed {seed}, {result.seconds:.0f} s", ("what", "count"), counts.items())
        for line in result.wrong:
            print(f"WRONG: {line}", file=sys.stderr)
        # After each run: the ones before are kept if a later one cannot end.
        recording.write(args, {"plan": asdict(plan), "runs": [asdict(one) for one in results]}, postgres=version)
    exact = sum(not result.wrong for result in results)
    print(f"{exact} of {len(results)} runs exact, {sum(sum(one.dealt.values()) for one in results)} faults")
    sys.exit(0 if exact == len(results) else 1)


if __name__ == "__main__":
    main()
