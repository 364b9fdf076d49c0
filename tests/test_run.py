"""Whole runs with real processes, signals and Postgres: launch-workers, promote, and what kills cannot break."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from conftest import execute
from optuna.trial import FrozenTrial, TrialState
from places import SLOW_TRIALS, patch_python
from places import RunPlace as Place
from processes import wait_until_gone, workers_of

from launch.results import EXIT_PARKED
from launch.views import listing
from launch.worker import EXIT_INTERRUPTED
from storage import database, embedded, postgres, slots
from storage.data_dir import remembered
from storage.progress import parked_slots, read_confirmations, study_progress
from studies import study as studying

SETTINGS = Place.SETTINGS


def test_search_promote_and_nothing_left_to_do(place: Place) -> None:
    place.search("toto")
    place.put_promoted("SP500", {"num_samples": 48, "aggregate": "quantile_0.90", "samples_per_batch": 16})
    said = place.run("launch-workers", "--cpus", "2", "--trials", "15").stderr
    assert "each confirmation needs at most 90 x 4 = 360 encodings with toto" in said.splitlines()
    place.assert_exact(15, "SP500", "NASDAQ")

    rows = {row["symbol"]: row for row in json.loads(place.run("promote", "--json").stdout)}
    assert (rows["NASDAQ"]["decision"], rows["NASDAQ"]["reason"]) == ("promoted", "first")
    row = rows["SP500"]
    assert (row["decision"], row["reason"]) == ("promoted", "improved")
    assert row["improvement_own"] == pytest.approx((row["incumbent_mae"] - row["best_mae"]) / row["incumbent_mae"])
    assert row["incumbent_mae"] != 0.5  # measured here, on the same windows, not read from the file

    promoted = json.loads((place.folder / "hyperparams/best/SP500.json").read_text())
    (study,) = [study for study in studying.list_studies(place.storage) if study.symbol == "SP500"]
    result = read_confirmations(place.storage, [study.study_id])[study.study_id].result
    assert result is not None
    candidates = result["candidates"]
    trials = {t.number: t for t in place.trials("SP500") if t.state == TrialState.COMPLETE}
    of_trials = [(trials[one["trial"]], one) for one in candidates if "trial" in one]
    assert len(of_trials) >= 5
    assert all(one["params"].items() >= trial.params.items() for trial, one in of_trials)
    assert [trial.value for trial, _ in of_trials] == [one["validation"]["mae"] for _, one in of_trials]
    names = ("num_samples", "aggregate")
    (chosen,) = [one for one in candidates if all(one["params"][name] == promoted["config"][name] for name in names)]
    assert promoted["metadata"]["trial"] == chosen.get("trial")
    assert promoted["confirmation"]["pct_return_mae"] == chosen["confirmation"]["mae"] == row["best_mae"]
    assert promoted["validation"]["pct_return_mae"] == chosen["validation"]["mae"]
    assert promoted["metadata"]["selection_metric"] == "confirmation.pct_return_mae"
    assert promoted["config"]["num_samples"] % promoted["config"]["samples_per_batch"] == 0
    assert promoted["model"] == "toto"
    counts = {"val_window": 30, "confirmation_window": 40, "test_window": 20, "forecast_horizon": 1}
    assert promoted["windows"] == counts
    assert promoted["metadata"]["previous_mae"] == row["incumbent_mae"]
    for folder in ("toto", "optimized_compiled"):
        assert json.loads((place.folder / f"hyperparams/{folder}/SP500.json").read_text()) == promoted
    assert len(list((place.folder / "hyperparams/history/SP500").glob("*/best.json"))) == 1

    files = {path: path.read_bytes() for path in (place.folder / "hyperparams").rglob("*.json")}
    again = place.run("launch-workers", "--cpus", "2", "--trials", "15")
    assert "nothing to do" in again.stderr
    rows = place.promote()
    assert {(row["decision"], row["reason"]) for row in rows} == {("kept", "unchanged")}
    assert {path: path.read_bytes() for path in (place.folder / "hyperparams").rglob("*.json")} == files

    # A raised budget goes on with the same studies, and is confirmed anew.
    place.run("launch-workers", "--cpus", "2", "--trials", "18", "--symbols", "SP500")
    place.assert_exact(18, "SP500")
    place.assert_exact(15, "NASDAQ")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sampled", "exact"])
def test_both_models_compete_on_the_same_windows(place: Place, objective: str) -> None:
    place.search("toto")
    # What clips the last close too often is not chosen, however low its error: here any of Kronos' may be.
    place.settings.write_text("promotion.max_clipped = 0.99\n" + place.settings.read_text())
    kronos = {"temperature": 0.15, "top_p": 0.82, "top_k": 16, "sample_count": 208, "max_context": 192, "clip": 1.8}
    place.put_promoted("SP500", kronos, model="kronos")
    place.run("launch-workers", "--cpus", "2", "--models", "both", "--trials", "6", "--objective", objective)
    for model in ("toto", "kronos"):
        place.assert_exact(6, "SP500", "NASDAQ", model=model)
    counts = {"toto": "num_samples", "kronos": "sample_count"}
    for model, name in counts.items():
        assert all((name in t.params) is (objective == "sampled") for t in place.trials("SP500", model))

    rows = {row["symbol"]: row for row in place.promote()}
    studies = {study.name: study for study in studying.list_studies(place.storage)}
    for row in rows.values():
        assert [pair["model"] for pair in row["pairs"]] == ["toto"]
        assert studies[row["study"]].definition["objective"] == objective
    # The settings say toto alone, so promote considered toto alone; asked for both, the better one is promoted.
    for row in place.promote("--models", "both", "--dry-run"):  # pooled: the lowest own error need not decide
        maes = {pair["model"]: pair["mae"] for pair in row["pairs"]}
        assert set(maes) == {"toto", "kronos"}
        assert row["model"] in maes
        assert row["best_mae"] >= maes[row["model"]]
    # By each symbol's own errors the lowest decides.
    both = ("--models", "both", "--on", "confirmation")
    rows = {row["symbol"]: row for row in place.promote(*both)}
    row = rows["SP500"]
    confirmed = {pair["model"]: pair["mae"] for pair in row["pairs"]}
    assert set(confirmed) == {"toto", "kronos"}
    assert confirmed[row["model"]] == min(confirmed.values()) == row["best_mae"]
    files = {
        folder: json.loads((place.folder / f"hyperparams/{folder}/NASDAQ.json").read_text())
        for folder in ("best", "toto", "kronos")
    }
    assert files["kronos"]["model"] == "kronos"
    assert files["toto"]["model"] == "toto"
    assert files["best"] == files[files["best"]["model"]]
    assert [row["written"] for row in place.promote(*both)] == [[], []]


@pytest.mark.slow
def test_an_incumbent_of_the_other_model_is_compared_where_it_was_measured(place: Place) -> None:
    place.search("toto")
    kronos = {"temperature": 0.4, "top_p": 0.95, "top_k": 0, "sample_count": 96, "max_context": 128, "clip": 1.0}
    place.put_promoted("SP500", kronos, model="kronos")
    place.run("launch-workers", "--cpus", "1", "--models", "toto", "--trials", "4", "--symbols", "SP500")
    (row,) = place.promote()
    assert (row["decision"], row["reason"]) == ("kept", "not comparable")  # no study has measured it yet
    place.run("launch-workers", "--cpus", "1", "--models", "kronos", "--trials", "4", "--symbols", "SP500")
    (row,) = place.promote("--models", "toto")
    assert row["incumbent_model"] == "kronos"
    assert row["incumbent_mae"] > 0
    assert row["improvement_own"] == pytest.approx((row["incumbent_mae"] - row["best_mae"]) / row["incumbent_mae"])


@pytest.mark.slow
def test_sampled_and_exact_never_mix(place: Place) -> None:
    place.search("toto")
    place.run("launch-workers", "--cpus", "1", "--trials", "3", "--symbols", "SP500")
    refused = place.run("launch-workers", "--cpus", "1", "--symbols", "SP500", "--objective", "exact", code=1)
    assert "objective" in refused.stderr
    assert "studies retire" in refused.stderr


def test_equal_params_give_equal_bits_on_any_worker(place: Place) -> None:
    # A space of two cells makes every trial a repeat, of both workers and in any order of warm and cold caches.
    text = SETTINGS.replace("[64, 128, 256]", "[64, 128]").replace(
        'aggregates = ["mean", "median", "trimmed_mean_10", "quantile_0.30"]', 'aggregates = ["median"]'
    )
    (place.folder / "studies.toml").write_text(text.replace("[search]", "[search]\nprune_worst = 0.0"))
    place.search("toto")
    place.start_together(2)
    place.run("launch-workers", "--cpus", "2", "--trials", "60", "--symbols", "SP500")
    values, workers = defaultdict(set), defaultdict(set)
    for trial in place.trials("SP500"):
        values[tuple(trial.params.items())].add(trial.value)
        workers[tuple(trial.params.items())].add(trial.user_attrs["worker"])
    assert len(values) == 2
    assert all(len(found) == 1 for found in values.values())
    assert any(len(found) == 2 for found in workers.values())


def test_kill_9_of_everything_then_the_same_command(place: Place) -> None:
    place.slow_down(0.05)
    supervisor = place.launch("--trials", "30")
    place.wait_for_trials(12)
    workers = workers_of(supervisor.pid)
    assert len(workers) == 2
    for pid in (supervisor.pid, *workers):
        os.kill(pid, signal.SIGKILL)
    supervisor.communicate()
    wait_until_gone(workers)
    place.run("launch-workers", "--cpus", "2", "--trials", "30")
    place.assert_exact(30, "SP500", "NASDAQ")


@pytest.mark.slow
def test_workers_that_are_killed_are_replaced(place: Place) -> None:
    place.slow_down(0.05)
    supervisor = place.launch("--trials", "40")
    for at in (5, 25):
        place.wait_for_trials(at)
        os.kill(workers_of(supervisor.pid)[0], signal.SIGKILL)
        time.sleep(0.5)
    _, said = supervisor.communicate(timeout=120)
    assert supervisor.returncode == 0
    assert "was killed by SIGKILL" in said
    place.assert_exact(40, "SP500", "NASDAQ")


FULL_DISK = """
import sys
if "launch.worker" in sys.orig_argv:
    import os
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
"""


@pytest.mark.slow
def test_a_full_disk_under_the_logs_ends_no_run(place: Place) -> None:
    place.environment |= patch_python(place.folder / "full", FULL_DISK)
    ended = place.run("launch-workers", "--cpus", "2", "--trials", "6", "--symbols", "SP500")
    place.assert_exact(6, "SP500")
    assert "Traceback" not in ended.stderr
    assert "worker " not in ended.stderr  # none was restarted


# A supervisor that is process 1 of its namespace, whose worker is process 51 however many threads began before it.
SAME_PROCESS_ID = """
import os
if os.getpid() == 1:
    import subprocess
    begin = subprocess.Popen.__init__
    def begin_as_51(self, command, *words, **options):
        if "launch.worker" in command:
            with open("/proc/sys/kernel/ns_last_pid", "w") as last:
                last.write("50")
        begin(self, command, *words, **options)
    subprocess.Popen.__init__ = begin_as_51
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs process namespaces")
def test_workers_of_equal_host_and_process_id_are_told_apart(place: Place) -> None:
    code = SLOW_TRIALS.format(seconds=0.5) + SAME_PROCESS_ID
    place.environment |= patch_python(place.folder / "same", code)
    command = place.command("launch-workers", "--cpus", "1", "--trials", "4", "--symbols", "SP500")
    # As two pods: each supervisor is process 1 of its namespace.
    pod = ["unshare", "--pid", "--fork", "--kill-child", *command]
    pods = [subprocess.Popen(pod, env=place.environment, stderr=subprocess.DEVNULL) for _ in range(2)]
    place.wait_for("select count(*) from slots where state = 'busy'", 2)
    names = place.storage.transaction(
        lambda c: c.exec_driver_sql("select worker from slots where state = 'busy'").scalars().all()
    )
    assert len({name.rpartition("-")[0] for name in names}) == 1, names  # HOST:PID
    assert len(set(names)) == 2
    workers = workers_of(1)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    assert [pod.wait(timeout=60) for pod in pods] == [0, 0]
    place.assert_exact(4, "SP500")
    # The living worker kept its slot.
    assert [trial.state for trial in place.trials("SP500")].count(TrialState.FAIL) == 1


def test_workers_do_not_outlive_a_killed_supervisor(place: Place) -> None:
    place.slow_down(0.05)
    supervisor = place.launch("--trials", "200")
    place.wait_for_trials(3)
    workers = workers_of(supervisor.pid)
    assert len(workers) == 2
    supervisor.kill()
    supervisor.communicate()
    wait_until_gone(workers)
    states = {trial.state for symbol in ("SP500", "NASDAQ") for trial in place.trials(symbol)}
    assert TrialState.RUNNING not in states


def test_a_first_signal_lets_the_trials_finish(place: Place) -> None:
    place.slow_down(0.05)
    supervisor = place.launch("--trials", "500")
    place.wait_for_trials(3)
    workers = workers_of(supervisor.pid)
    supervisor.send_signal(signal.SIGINT)
    _, said = supervisor.communicate(timeout=20)
    assert supervisor.returncode == 130
    assert "stopping after the trials in progress" in said
    wait_until_gone(workers, 1)
    for symbol in ("SP500", "NASDAQ"):
        assert {trial.state for trial in place.trials(symbol)} <= {TrialState.COMPLETE, TrialState.PRUNED}
    busy = [study for study, now in study_progress(place.storage).items() if now.done + now.open < now.budget]
    assert busy == []
    (again,) = [line.partition("go on with: ")[2] for line in said.splitlines() if "go on with: " in line]
    words = place.command("launch-workers", "--cpus", "2", "--trials", "500")
    assert shlex.split(again) == [Path(words[0]).name, *words[1:]]


def end_by_two_signals(supervisor: subprocess.Popen[str], workers: list[int]) -> None:
    """The first is waited out, the second ends everything."""
    supervisor.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert supervisor.poll() is None
    supervisor.send_signal(signal.SIGINT)
    began = time.monotonic()
    supervisor.communicate(timeout=60)
    assert time.monotonic() - began < 2  # and not only when the server is back
    assert supervisor.returncode == 130
    wait_until_gone(workers, 0.1)


def test_a_second_signal_ends_at_once(place: Place) -> None:
    # A trial of half a minute, so that only the second signal can end it.
    text = SETTINGS.replace("[windows]", "[windows]\nvalidation = 300").replace("[64, 128, 256]", "[1000000, 1200000]")
    (place.folder / "studies.toml").write_text(text.replace("lease_s = 2.0", "lease_s = 30.0"))
    supervisor = place.launch("--trials", "500")
    running = "select count(*) from trials where state = 'RUNNING'"
    place.wait_for(running, 2)
    workers = workers_of(supervisor.pid)
    end_by_two_signals(supervisor, workers)
    place.wait_for(running, 0, seconds=0)
    place.wait_for("select count(*) from slots where state = 'busy'", 0, seconds=0)


def with_a_server_of_its_own(place: Place, folder: Path) -> Path:
    del place.environment["OPTUNA_STORAGE"]
    (place.folder / "studies.toml").write_text(f'{SETTINGS}[storage]\ndata_dir = "{folder}"\n')
    return folder


def logged_trials(place: Place) -> int:
    """As the workers' logs have it, which can be read without a server."""
    return "".join(log.read_text() for log in place.folder.glob("logs/*/worker-*.log")).count(" #")


def wait_for_logged_trials(place: Place, count: int) -> None:
    deadline = time.monotonic() + 60
    while logged_trials(place) < count:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.05)


def signal_postmaster(server: Path, number: signal.Signals) -> None:
    os.kill(int((server / "cluster" / "postmaster.pid").read_text().split("\n", 1)[0]), number)


def pg_ctl_stop(server: Path, mode: str, *, wait: bool = True) -> None:
    """Stop the server with Postgres' own command.

    wait: else a server that the run has started again by then would seem not to have ended.
    """
    place = remembered(server)
    assert place
    assert place.binaries
    command = [place.binaries / "pg_ctl", "stop", "-w" if wait else "-W", "-m", mode]
    owner = postgres.owner_of(place.cluster)
    done = postgres.run(command, owner, place.cluster, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr


def port_of(server: Path) -> int:
    place = remembered(server)
    assert place
    return place.port


def progress_on(server: Path) -> list[tuple[str, int]]:
    """State and finished trials of each study."""
    running = embedded.start(server)
    opened = database.open_storage(f"{running.url}?passfile={running.passfile}", wait_s=10)
    found = [(progress.state, progress.done) for progress in study_progress(opened).values()]
    opened.engine.dispose()
    return found


def turn_away(listening: socket.socket) -> None:
    """Close each connection, as a program that is no database would."""
    with listening, contextlib.suppress(OSError):
        while True:
            listening.accept()[0].close()


@pytest.mark.slow
def test_whatever_ends_the_private_server_the_run_starts_it_again(place: Place, scratch: Path) -> None:
    place.slow_down(0.05)
    server = with_a_server_of_its_own(place, scratch / f"ended-{os.getpid()}")
    supervisor = place.launch("--trials", "60")
    ends = [
        lambda: signal_postmaster(server, signal.SIGKILL),
        lambda: signal_postmaster(server, signal.SIGQUIT),
        lambda: pg_ctl_stop(server, "immediate", wait=False),
    ]
    try:
        for end in ends:
            wait_for_logged_trials(place, logged_trials(place) + 4)
            end()
        wait_for_logged_trials(place, logged_trials(place) + 4)
        port = port_of(server)
        with embedded._starting(server):  # until then the run cannot start it again
            pg_ctl_stop(server, "fast")
            stranger = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=turn_away, args=[stranger], daemon=True).start()
        _, said = supervisor.communicate(timeout=100)
        stranger.shutdown(socket.SHUT_RDWR)
        assert supervisor.returncode == 0, said
        assert said.count("the private server had ended; started it again") == len(ends) + 1
        assert port_of(server) != port
        assert progress_on(server) == [("finished", 60)] * 2
    finally:
        supervisor.kill()
        embedded.stop(server)


@pytest.mark.slow
def test_studies_stop_ends_a_run_which_goes_on_later(place: Place, scratch: Path) -> None:
    server = with_a_server_of_its_own(place, scratch / f"stopped-{os.getpid()}")
    place.slow_down(0.05)
    supervisor = place.launch("--trials", "20")
    try:
        wait_for_logged_trials(place, 6)
        workers = workers_of(supervisor.pid)
        assert place.run("studies", "stop").stdout == "stopped\n"
        _, said = supervisor.communicate(timeout=20)
        assert supervisor.returncode == EXIT_INTERRUPTED
        *_, reason, suggestion = said.splitlines()
        assert reason == "'studies stop' stopped the private server, so this run ends"
        assert suggestion.startswith("stopped before the end; go on with: launch-workers --cpus 2")
        assert said.count("server") == 1
        wait_until_gone(workers)
        assert embedded.running(server) is None
        place.run("launch-workers", "--cpus", "2", "--trials", "20")
        assert progress_on(server) == [("finished", 20)] * 2
    finally:
        supervisor.kill()
        embedded.stop(server)


def test_a_second_signal_ends_at_once_without_a_server(place: Place, scratch: Path) -> None:
    server = with_a_server_of_its_own(place, scratch / f"away-{os.getpid()}")
    supervisor = place.launch("--trials", "5000")
    try:
        wait_for_logged_trials(place, 2)
        workers = workers_of(supervisor.pid)
        with embedded._starting(server):  # so that the run cannot start it again
            pg_ctl_stop(server, "fast")
            os.kill(workers[0], signal.SIGKILL)  # what it held can be freed only when the server is back
            time.sleep(2)
            assert len(workers_of(supervisor.pid)) == 2  # started again all the same
            end_by_two_signals(supervisor, workers)
    finally:
        supervisor.kill()
        embedded.stop(server)


@pytest.mark.slow
def test_two_runs_at_once_on_an_empty_database(place: Place, database_server: Any) -> None:
    name = f"empty_{os.getpid()}"
    execute(database_server.url, f"create database {name}")
    url = database_server.url.rsplit("/", 1)[0] + "/" + name
    place.environment["OPTUNA_STORAGE"] = url
    both = [place.launch("--trials", "12") for _ in range(2)]  # each makes the tables and the studies
    for supervisor in both:
        _, said = supervisor.communicate(timeout=120)
        assert supervisor.returncode == 0, said
        assert "restarting" not in said
    place.storage.engine.dispose()
    place.storage = database.open_storage(url, wait_s=10, create=False)
    place.assert_exact(12, "SP500", "NASDAQ")
    place.storage.engine.dispose()
    execute(database_server.url, f"drop database {name} with (force)")


def test_a_frozen_worker_loses_its_slot_and_goes_on(place: Place) -> None:
    place.slow_down(0.1)
    supervisor = place.launch("--trials", "30")
    place.wait_for_trials(4)
    frozen = workers_of(supervisor.pid)[0]

    def trials() -> list[FrozenTrial]:
        return [trial for symbol in ("SP500", "NASDAQ") for trial in place.trials(symbol)]

    freezes = 0
    while not any(trial.state == TrialState.FAIL for trial in trials()):  # or it was frozen between two trials
        freezes += 1
        os.kill(frozen, signal.SIGSTOP)
        time.sleep(2.8)  # past its lease of 2 s
        os.kill(frozen, signal.SIGCONT)
        time.sleep(0.2)
    supervisor.communicate(timeout=120)
    assert supervisor.returncode == 0
    place.assert_exact(30, "SP500", "NASDAQ")
    lost, *more = [trial for trial in trials() if trial.state == TrialState.FAIL]
    assert len(more) < freezes
    assert lost.datetime_complete is not None
    later = [trial for trial in trials() if trial.datetime_start and trial.datetime_start > lost.datetime_complete]
    assert lost.user_attrs["worker"] in {trial.user_attrs["worker"] for trial in later}


@pytest.mark.slow
def test_no_password_in_files_or_command_lines(place: Place, database_server: Any) -> None:
    password = database_server.passfile.read_text().strip().rsplit(":", 1)[1]
    url = place.environment["OPTUNA_STORAGE"].replace("studies@", f"studies:{password}@")
    place.environment = {**place.environment, "OPTUNA_STORAGE": url, "PGPASSFILE": "/dev/null"}
    supervisor = place.launch("--trials", "30")
    place.wait_for_trials(5)
    lines = [path.read_bytes() for pid in workers_of(supervisor.pid) for path in [Path(f"/proc/{pid}/cmdline")]]
    out, said = supervisor.communicate(timeout=120)
    assert supervisor.returncode == 0
    assert lines
    assert not [line for line in lines if password.encode() in line]
    assert password not in out + said
    written = [path for path in place.folder.rglob("*") if path.is_file() and password.encode() in path.read_bytes()]
    assert written == []
    for study in studying.list_studies(place.storage):
        assert password not in json.dumps(dict(study.definition))


# Seven attempts find no memory: one trial tries 10, 5, 3, 2 and 1 window, the next two 1 window only.
SHORT_OF_MEMORY = """
import sys
if "launch.worker" in sys.orig_argv:
    import torch
    from forecasters.toto import Toto
    prefill, tried = Toto._prefill, []
    def limited(self, rows, *others):
        tried.append(len(rows))
        print("prefill of", len(rows), file=sys.stderr)
        if len(tried) <= 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total of 8 GiB.")
        return prefill(self, rows, *others)
    Toto._prefill = limited
"""


@pytest.mark.slow
def test_a_slot_that_fails_three_times_is_parked_and_tried_again_by_a_later_run(place: Place) -> None:
    place.search("toto")
    patched = patch_python(place.folder / "patched", SHORT_OF_MEMORY)
    environment, place.environment = place.environment, {**place.environment, **patched}
    words = ("launch-workers", "--cpus", "1", "--trials", "8", "--symbols", "SP500")
    said = place.run(*words, code=EXIT_PARKED).stderr
    error = "SP500: out of memory on cpu with one window of 256 points, wanting 9.00 GiB more"
    (study,) = studying.list_studies(place.storage)
    assert said.splitlines()[-2:] == [
        f"{study.name}: 1 parked, the first with: {error}",
        "parked work is tried again a day later, or at once with --retry-parked",
    ]
    sizes = [line for path in place.folder.glob("logs/*/worker-0.log") for line in path.read_text().splitlines()]
    sizes = [int(line.split()[-1]) for line in sizes if line.startswith("prefill of")]
    assert sizes[:8] == [30, 15, 8, 4, 2, 1, 1, 1]
    assert set(sizes[8:]) == {1}  # what did not fit once is not tried again
    states = [trial.state for trial in place.trials("SP500")]
    assert states[:3] == [TrialState.FAIL] * 3
    assert len(states) == 3 + 7
    shown = listing.details(place.storage, study.name, place.folder / "hyperparams")
    assert shown is not None
    assert shown.to_json()["parked"] == [{"stage": slots.TRIAL, "slot": 0, "error": error}]
    assert (shown.row.done, shown.row.budget) == (7, 8)
    assert f"trial, slot 0: {error}" in place.run("studies", "show", study.name).stdout

    place.environment = environment
    said = place.run(*words, code=EXIT_PARKED).stderr
    assert "nothing to do: 1 study finished at the newest bar, 1 but for parked work" in said
    place.run(*words, "--retry-parked")
    place.assert_exact(8, "SP500")
    assert parked_slots(place.storage, study.study_id) == []


@pytest.mark.slow
def test_a_study_that_fails_five_times_in_a_row_is_parked(place: Place) -> None:
    text = SETTINGS.replace("[naive]", "[naive]\nseason = 1000")  # more bars than there are
    (place.folder / "studies.toml").write_text(text)
    words = ("launch-workers", "--cpus", "1", "--trials", "8", "--symbols", "SP500")
    for run, more in enumerate(([], ["--retry-parked"]), start=1):  # the second tries all of it again
        ended = place.run(*words, *more, code=EXIT_PARKED)
        (study,) = studying.list_studies(place.storage)
        lines = ended.stderr.splitlines()
        assert lines[-2].startswith(f"{study.name}: 9 parked, the first with: SP500: ")
        assert "Traceback" not in ended.stderr
        assert len([line for line in lines if "9 parked" in line]) == 1
        assert [trial.state for trial in place.trials("SP500")] == [TrialState.FAIL] * 5 * run
        first, *others = parked_slots(place.storage, study.study_id)
        assert (first.stage, first.number) == (slots.TRIAL, 0)
        assert {item.error for item in others} == {f"5 failures in a row: {first.error}"}
        assert len(others) == 8  # seven trials and the confirmation
    (row,) = listing.rows(place.storage)
    assert (row.done, row.budget, row.parked) == (0, 8, 9)
