"""The live table, in real pseudo-terminals of several sizes, and what a run says where there is none."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pynvml
import pyte
import pytest
from places import RunPlace as Place
from processes import wait_until_gone, workers_of
from pyte.screens import HistoryScreen
from ray_nodes import Nodes, with_ray
from rich.console import Console

from launch.devices import DeviceSlot, cpu_slot
from launch.supervisor import Child
from launch.views import live
from launch.views.live_table import RunState, StudyLine, WorkerLine, render
from launch.views.run_watcher import GpuMemory, Rates, RunWatcher
from storage import embedded, slots, study_rows

INCUMBENT = {"season": 2, "context_length": 100, "num_samples": 48, "aggregate": "quantile_0.90"}
HIDE_CURSOR = b"\x1b[?25l"


class Terminal:
    """A command in a terminal of its own: its controlling one, with a screen that an emulator keeps."""

    def __init__(
        self, command: Sequence[str], environment: dict[str, str], *, columns: int, lines: int = 40, stdout: Any = None
    ) -> None:
        self.master, slave = pty.openpty()
        self.screen = HistoryScreen(columns, lines, history=2000)
        self.stream = pyte.ByteStream(self.screen)
        self.written = b""
        self._lock = threading.Lock()
        self._size(columns, lines)
        self.process = subprocess.Popen(
            command,
            env={**environment, "TERM": "xterm-256color"},
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: (  # its terminal's, and hung up with it
                fcntl.ioctl(0, termios.TIOCSCTTY, 0),
                signal.signal(signal.SIGHUP, signal.SIG_DFL),
            ),
        )
        os.close(slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns: int, lines: int) -> None:
        with self._lock:
            self._size(columns, lines)
            self.screen.resize(lines, columns)

    def show(self, text: str) -> None:
        """What another program writes."""
        with self._lock:
            self.stream.feed(text.encode())

    def _read(self) -> None:
        while True:
            try:
                if not select.select([self.master], [], [], 0.1)[0]:
                    continue
                data = os.read(self.master, 65536)
            except (OSError, ValueError):  # the other side is closed, or this one was
                return
            if not data:
                return
            with self._lock:
                self.written += data
                self.stream.feed(data)

    def hang_up(self) -> None:
        master, self.master = self.master, -1
        self._reader.join(0.3)
        os.close(master)

    def lines(self) -> list[str]:
        """What is on the screen."""
        with self._lock:
            return [line.rstrip() for line in self.screen.display]

    def everything(self) -> list[str]:
        """What scrolled off the screen, and what is on it."""
        with self._lock:
            above = ["".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top]
            return [line.rstrip() for line in (*above, *self.screen.display)]

    def wait_for(self, found: Callable[[list[str]], Any], seconds: float = 60) -> list[str]:
        """The screen, as soon as it is so."""
        deadline = time.monotonic() + seconds
        while not found(lines := self.lines()):
            assert time.monotonic() < deadline, "\n".join(lines)
            assert self.process.poll() is None, "\n".join(lines)
            time.sleep(0.05)
        return lines

    def end(self, code: int) -> list[str]:
        assert self.process.wait(timeout=120) == code, "\n".join(self.everything())
        self._reader.join(5)
        return self.everything()


started: list[Terminal] = []


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    """A test that fails leaves no run behind."""
    yield
    while started:
        terminal = started.pop()
        if terminal.process.poll() is None:
            terminal.process.terminate()
            terminal.process.wait(30)
        if terminal.master >= 0:
            terminal.hang_up()


def launch(place: Place, *words: str, columns: int = 80, lines: int = 40) -> Terminal:
    command = place.command("launch-workers", "--cpus", "2", *words)
    started.append(Terminal(command, place.environment, columns=columns, lines=lines))
    return started[-1]


STUDY = re.compile(r"(NASDAQ|SP500)/naive\S* +(\d+)/(\d+) .*")
WORKER = re.compile(
    r"([01])( cpu)? +((NASDAQ|SP500)/naive\S* +)?(trial \d+/\d+|confirmation(?: \d+%)?|waiting|done)\b.*"
)
BAR = re.compile(r"[━╸╺]+  (\d+)/(\d+)  .* left")


def matches(lines: list[str], pattern: re.Pattern[str]) -> list[re.Match[str]]:
    return [found for line in lines if (found := pattern.fullmatch(line))]


def is_drawn(lines: list[str]) -> bool:
    """Whether the whole table is there, once, with trials done."""
    table = (matches(lines, WORKER), matches(lines, STUDY), matches(lines, BAR))
    return tuple(map(len, table)) == (2, 2, 1) and table[2][0][1] != "0"


def assert_heading(lines: list[str]) -> None:
    (heading,) = [line for line in lines if line.startswith("study ")]
    assert heading.split("  ")[0] == "study"
    assert heading.split()[1:] == ["trials", "best", "incumbent", "improvement", "remaining"]


def assert_ended(terminal: Terminal, lines: list[str], trials: int) -> None:
    """The end is told once, nothing of the table is left on the screen, and the cursor is there."""
    ends = [line for line in lines if re.match(rf"(NASDAQ|SP500)/naive\S* +finished +{trials}/{trials} ", line)]
    assert len(ends) == 2, "\n".join(lines)
    assert matches(terminal.lines(), BAR) == []
    assert not any(re.match("(worker|study) +(study|task|trials)", line) for line in lines[-terminal.screen.lines :])
    assert HIDE_CURSOR not in terminal.written
    assert not terminal.screen.cursor.hidden


@pytest.mark.slow
def test_a_run_on_a_terminal(place: Place) -> None:
    place.slow_down(0.1)
    place.put_promoted("SP500", INCUMBENT, model="naive")
    terminal = launch(place, "--trials", "50")
    lines = terminal.wait_for(is_drawn)
    text = "\n".join(lines)
    assert [found[1] for found in matches(lines, WORKER)] == ["0", "1"], text
    assert [found[1] for found in matches(lines, STUDY)] == ["NASDAQ", "SP500"], text
    assert matches(lines, BAR)[0][2] == "100"
    assert_heading(lines)
    assert all(line == "" for line in lines[lines.index(matches(lines, BAR)[0][0]) + 1 :]), text

    killed = workers_of(terminal.process.pid)[0]
    os.kill(killed, signal.SIGKILL)
    text = "".join(terminal.wait_for(lambda now: any("was killed by SIGKILL" in line for line in now)))
    assert re.search(r"worker \d \(cpu\) was killed by SIGKILL; restarting in 1 s; see \S+/worker-\d.log", text)
    assert_ended(terminal, terminal.end(0), 50)
    place.assert_exact(50, "SP500", "NASDAQ")


@pytest.mark.slow
def test_a_terminal_changes_its_size_and_the_run_is_stopped_and_interrupted(place: Place) -> None:
    place.put_promoted("SP500", INCUMBENT, model="naive")
    place.slow_down(0.1)
    terminal = launch(place, "--trials", "2000", columns=120, lines=30)
    terminal.wait_for(is_drawn)
    for columns, lines in ((50, 30), (90, 12), (40, 24), (200, 50)):
        terminal.resize(columns, lines)
        time.sleep(1.5)  # it is drawn anew every second
        terminal.wait_for(is_drawn)
    assert_heading(terminal.lines())
    terminal.process.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    terminal.show("\r\n[1]+  Stopped\r\n$ fg\r\n")
    terminal.process.send_signal(signal.SIGCONT)
    time.sleep(1.5)
    terminal.wait_for(is_drawn)
    os.write(terminal.master, b"\x03")
    terminal.wait_for(lambda now: "stopping after the trials in progress; press Ctrl-C again to stop at once" in now)
    lines = terminal.end(130)
    assert len([line for line in lines if re.match(r"(NASDAQ|SP500)/naive\S* +running +\d+/2000 ", line)]) == 2
    assert matches(terminal.lines(), BAR) == []
    assert HIDE_CURSOR not in terminal.written
    assert "studies: 2 new" in lines


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_a_clean_terminal(place: Place) -> None:
    text = Place.SETTINGS.replace("[windows]", "[windows]\nvalidation = 300").replace(
        "[64, 128, 256]", "[1000000, 1200000]"
    )
    (place.folder / "studies.toml").write_text(text.replace("lease_s = 2.0", "lease_s = 30.0"))
    terminal = launch(place, "--trials", "500")
    place.wait_for("select count(*) from trials where state = 'RUNNING'", 2)
    terminal.wait_for(lambda now: len(matches(now, WORKER)) == 2)
    for _ in range(2):
        os.write(terminal.master, b"\x03")
        time.sleep(0.5)
    lines = terminal.end(130)
    said = [line for line in lines if line]
    stopping = said.index("stopping after the trials in progress; press Ctrl-C again to stop at once")
    assert "".join(said[stopping + 1 :]) == place.suggested(
        "stopped before the end; go on with: launch-workers --cpus 2 --trials 500"
    )
    assert HIDE_CURSOR not in terminal.written
    place.wait_for("select count(*) from trials where state = 'RUNNING'", 0, seconds=0)


def test_a_run_stops_politely_when_its_terminal_hangs_up(place: Place) -> None:
    place.slow_down(0.1)
    terminal = launch(place, "--trials", "2000")
    terminal.wait_for(is_drawn)
    workers = workers_of(terminal.process.pid)
    terminal.hang_up()
    assert terminal.process.wait(30) == 130
    wait_until_gone(workers, 1)
    place.wait_for("select count(*) from trials where state in ('RUNNING', 'FAIL')", 0, seconds=0)
    place.wait_for("select count(*) from slots where state = 'busy'", 0, seconds=0)


@pytest.mark.slow
def test_under_nohup_a_run_outlives_its_terminal(place: Place) -> None:
    place.slow_down(0.1)
    command = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]
    command += place.command("launch-workers", "--cpus", "2", "--trials", "100")
    terminal = Terminal(command, place.environment, columns=80)
    started.append(terminal)
    terminal.wait_for(is_drawn)
    terminal.hang_up()  # what is written from now on fails with EIO
    assert terminal.process.wait(120) == 0
    place.assert_exact(100, "SP500", "NASDAQ")


@pytest.mark.slow
def test_a_run_goes_on_when_nobody_reads_what_it_says(place: Place) -> None:
    place.slow_down(0.1)
    run = place.launch("--trials", "60")
    assert run.stderr is not None
    run.stderr.readline()
    run.stderr.close()
    place.wait_for_trials(5)
    os.kill(workers_of(run.pid)[0], signal.SIGKILL)  # so that there is something to say
    assert run.stdout is not None
    shown = run.stdout.read()
    assert run.wait(120) == 0
    assert len(re.findall(r"finished +60/60 ", shown)) == 2
    place.assert_exact(60, "SP500", "NASDAQ")


@pytest.mark.slow
def test_no_control_characters_on_a_plain_terminal_or_in_a_pipe(place: Place) -> None:
    terminal = launch(place, "--trials", "20", "--plain")
    lines = terminal.end(0)
    assert re.findall(rb"[^\x20-\x7e\r\n]", terminal.written) == []
    assert len([line for line in lines if re.match(r"(NASDAQ|SP500)/naive\S* +finished +20/20 ", line)]) == 2
    place.environment["FORCE_COLOR"] = ""
    piped = place.run("launch-workers", "--cpus", "1", "--trials", "24")
    assert re.findall(r"[^\x20-\x7e\n]", piped.stdout + piped.stderr) == []
    assert len(re.findall(r"finished +24/24 ", piped.stdout)) == 2


@pytest.mark.slow
def test_a_server_that_is_away_is_told_and_waited_for(place: Place, own_server: embedded.PrivateServer) -> None:
    place.slow_down(0.1)
    # A server that is not the run's own.
    place.environment |= {"OPTUNA_STORAGE": own_server.url, "PGPASSFILE": str(own_server.passfile)}
    terminal = launch(place, "--trials", "100", columns=100)
    terminal.wait_for(is_drawn)
    embedded.stop(own_server.data_dir)
    terminal.wait_for(lambda now: any("the database has not answered for " in line for line in now))
    embedded.start(own_server.data_dir)
    terminal.wait_for(is_drawn)
    assert_ended(terminal, terminal.end(0), 100)


@pytest.mark.slow
@with_ray
def test_a_run_on_a_ray_cluster_has_the_same_table(place: Place, nodes: Nodes) -> None:
    node = nodes.add()
    command = place.command("launch-workers", "--ray", nodes.address, "--cpus", "2", "--trials", "300")
    started.append(Terminal(command, place.environment, columns=100))
    started[-1].wait_for(is_drawn)
    assert_ended(started[-1], started[-1].end(0), 300)
    place.assert_exact(300, "SP500", "NASDAQ")
    nodes.lose(node)


# --- the table alone ------------------------------------------------------------------------------------------


def state(workers: int, studies: int, *, active: int = 2, other_workers: int = 0) -> RunState:
    def worker(n: int) -> WorkerLine:
        study, task = f"SYM{n}/toto@2026-03-19", f"trial {n}/100"
        return WorkerLine(number=n, device=f"gpu {n}", study=study, task=task, rate=0.3, memory="12.3/80 GiB")

    def study(n: int) -> StudyLine:
        return StudyLine(
            name=f"SYM{n}/kronos@2026-03-19T00:00:00Z",
            done=n % 101,
            budget=100,
            parked=0,
            open=100 - n % 101,
            best=0.012345,
            incumbent=0.0125,
            rate=0.1 if n < active else None,
            active=n < active,
        )

    return RunState(
        workers=[worker(n) for n in range(workers)],
        studies=[study(n) for n in range(studies)],
        other_workers=other_workers,
        rate=1.5,
    )


def drawn(table: Any, columns: int, lines: int) -> list[str]:
    console = Console(width=columns, height=lines, color_system=None, force_terminal=True)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().split("\n")[:-1]]


@pytest.mark.parametrize(("workers", "studies"), [(1, 1), (2, 4), (8, 500), (64, 500), (64, 1), (1, 60)])
def test_the_table_fits_every_terminal(workers: int, studies: int) -> None:
    shown = state(workers, studies, other_workers=3)
    for columns in (20, 40, 60, 80, 132, 200):
        for lines in (2, 5, 8, 12, 24, 50, 90):
            table = drawn(render(shown, columns, lines), columns, lines)
            assert len(table) < max(2, lines)
            assert all(len(line) <= columns for line in table)
            assert f"{shown.done}/{shown.budget}" in table[-1]


def test_what_has_no_room_is_counted() -> None:
    table = drawn(render(state(2, 500), 80, 24), 80, 24)
    assert [line.split("/")[0] for line in table if line.startswith("SYM")] == ["SYM0", "SYM1"]
    assert table[-3].startswith("and 498 other studies: 4 done, 490 in progress, 4 not started")
    table = drawn(render(state(64, 2, other_workers=1), 80, 24), 80, 24)
    workers = [int(line.split()[0]) for line in table if line[:1].isdigit()]
    (others,) = [line for line in table if "more workers" in line]
    assert workers == list(range(len(workers)))
    assert others == f"and {64 - len(workers)} more workers and 1 worker of other runs"


def test_wide_terminals_say_more() -> None:
    wide, narrow, narrowest = (drawn(render(state(2, 2), columns, 40), columns, 40) for columns in (120, 44, 40))
    assert wide[0].split("  ")[0] == "worker"
    assert "VRAM" in wide[0]
    assert "SYM0/toto@2026-03-19" in wide[1]
    assert "VRAM" not in narrow[0]
    assert narrow[1].split() == ["0", "gpu", "0", "SYM0/toto", "trial", "0/100", "18.0/min"]
    assert narrowest[1].split() == ["0", "SYM0/toto", "trial", "0/100", "18.0/min"]


def test_tasks_of_workers_and_states_of_studies(place: Place) -> None:
    storage = place.storage

    def fill(connection: Any, study_id: int) -> None:
        slots.add(connection, study_id, slots.BASELINE, 0, label="incumbent", params={})
        slots.raise_budget(connection, study_id, 3)
        slots.add(connection, study_id, slots.CONFIRMATION, 0, params={})

    names = ("A/toto@2026-03-19", "B/toto@2026-03-19")
    first, second = (study_rows.create_study(storage, name, {}, "mae", fill) for name in names)
    gpu = DeviceSlot(device="cuda:0", environment={"CUDA_VISIBLE_DEVICES": "1"})
    process: Any = SimpleNamespace()
    host = os.uname().nodename
    children = [
        Child(number=0, device_slot=cpu_slot(), log=place.folder, process=process, name=f"{host}:1"),
        Child(number=1, device_slot=gpu, log=place.folder, process=process, name="node7:2"),
        Child(number=2, device_slot=cpu_slot(), log=place.folder, exit_status=1),
        Child(number=3, device_slot=cpu_slot(), log=place.folder, crash_times=[0.0], start_at=time.monotonic() + 3.0),
        Child(number=4, device_slot=cpu_slot(), log=place.folder, exit_status=0, name=f"{host}:5"),
    ]
    watch = RunWatcher(storage, {first: names[0], second: names[1]})
    watch.children = children
    claimed = slots.claim(storage, first, worker=f"{host}:1", lease_s=60)
    assert claimed is not None
    shown = watch.read()
    assert [(line.device, line.study, line.task) for line in shown.workers] == [
        ("cpu", names[0], "incumbent"),
        ("gpu 1 on node7", "", "starting"),
        ("cpu", "", "failed"),
        ("cpu", "", "restarting in 3 s"),
        ("cpu", "", "done"),
    ]
    assert [(line.name, line.done, line.budget, line.active) for line in shown.studies] == [
        (names[0], 0, 3, True),
        (names[1], 0, 3, False),
    ]
    assert (shown.other_workers, shown.rate) == (0, None)

    slots.finish(storage, claimed, result={"validation": {"mae": 0.0125}})
    for worker in (f"{host}:1", "elsewhere:9"):
        assert slots.claim(storage, first, worker=worker, lease_s=60) is not None
    children[0].name = f"{host}:11"  # it was killed and is there again, its slot is not free yet
    shown = watch.read()
    assert (shown.workers[0].study, shown.workers[0].task) == ("", "starting")
    assert shown.other_workers == 1
    assert shown.studies[0].incumbent == 0.0125
    assert (shown.studies[0].state, shown.studies[1].state) == ("-", "-")


def test_rates_are_of_late_and_of_long_enough() -> None:
    rates = Rates()
    rates.add(0.0, {"a": 0, "b": 0})
    assert rates.of("a", 0.0) is None
    for second in range(1, 1001):  # 1 a second at first, then 10; b once in 100 s
        rates.add(float(second), {"a": second if second <= 500 else 500 + 10 * (second - 500), "b": second // 100})
    assert rates.of("a", 0.0) == pytest.approx(10.0)
    assert rates.of("b", 0.0) == pytest.approx(0.01, rel=0.1)
    assert rates.of("b", 995.0) == pytest.approx(1 / 5)  # only what was seen since
    assert rates.of("c", 0.0) is None


def test_gpu_memory_is_read_beside_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [("GPU-8f6d-11", 1536), ("GPU-77aa-22", None), ("GPU-55bb-33", 2048)]  # the last is split by MIG

    def used(index: int, version: int) -> Any:
        if (mib := gpus[index][1]) is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(used=mib * 2**20, total=80 * 2**30)

    def mig_mode(index: int) -> list[int]:
        if index == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(index == 2), 0]

    driver_answers = threading.Event()
    monkeypatch.setattr(pynvml, "nvmlInit", driver_answers.wait)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(gpus))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda index: gpus[index][0])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMigMode", mig_mode)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", used)
    memory = GpuMemory()
    assert memory.of("0") == ""  # not known yet, and not waited for
    driver_answers.set()
    deadline = time.monotonic() + 30
    while memory.of("0") != "1.5/80 GiB":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert memory.of("GPU-8f6d") == "1.5/80 GiB"
    assert memory.of("1") == memory.of("2") == memory.of("GPU-55bb") == memory.of("MIG-1") == ""
    memory.end()
    memory._reader.join(5)
    assert not memory._reader.is_alive()


def test_no_driver_no_gpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    memory = GpuMemory()
    assert memory.of("0") == ""
    memory._reader.join(5)
    assert not memory._reader.is_alive()
    assert memory.of("0") == ""


def test_lines_are_said_from_a_signal_handler_in_the_middle_of_another(capfd: pytest.CaptureFixture[str]) -> None:
    shown = live.LiveView(SimpleNamespace(), {})  # pyright: ignore[reportArgumentType] - it is not asked to read
    previous = signal.signal(signal.SIGALRM, lambda *_: shown.say("from the handler"))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        with shown:
            for number in range(2000):
                shown.say(f"line {number} \x1b[2J")
                time.sleep(0.0001)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if line != "from the handler"] == [f"line {number}  [2J" for number in range(2000)]
    assert "from the handler" in lines


def test_one_slow_read_delays_nothing_two_in_a_row_do(monkeypatch: pytest.MonkeyPatch) -> None:
    now, durations = 100.0, [0.5, 0.1, 0.5, 0.5]

    def read() -> None:
        nonlocal now
        now += durations.pop(0)

    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: now))
    shown = live.LiveView(SimpleNamespace(), {})  # pyright: ignore[reportArgumentType] - its reads are ours
    monkeypatch.setattr(shown._watcher, "read", read)
    pauses = []
    while durations:
        shown()
        pauses.append(round(shown._next_read_at - now, 6))
        before, now = len(durations), shown._next_read_at - 0.01
        shown()
        assert len(durations) == before  # not yet
        now = shown._next_read_at
    assert pauses == [live.REPORT_S] * 3 + [0.5 / live.READ_SHARE]
