"""The promoted files under kills, full disks and many writers: no crash or race loses or tears one."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_configs import FOLDERS, everything, files, kronos, predecessor, promote, put, replaced, toto

from storage import configs, history
from storage.configs import ConfigFileError

REPOSITORY = Path(__file__).parent.parent

# --- many writers

COUNTER = """
import pathlib, sys
from storage import configs, history
root, done = pathlib.Path(sys.argv[1]), 0
while done < 10:
    record = configs.read(root, "best", "NVDA")
    count = record.metadata["count"] if record else 0
    content = dict(symbol="NVDA", model="toto", config={}, validation={}, metadata={"count": count + 1})
    try:
        history.write(root, "NVDA", content, ("toto", "best"), expected_digest=record.digest if record else None)
    except history.ConcurrentWrite:
        continue
    done += 1
"""


@pytest.fixture
def counters(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = [
        subprocess.Popen([sys.executable, "-c", COUNTER, tmp_path], cwd=REPOSITORY, stderr=subprocess.PIPE)
        for _ in range(6)
    ]
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_concurrent_promotions_lose_no_update(tmp_path: Path, counters: list[subprocess.Popen[bytes]]) -> None:
    errors = [process.communicate(timeout=60)[1] for process in counters]
    assert errors == [b""] * 6
    record = configs.read(tmp_path, "best", "NVDA")
    assert record
    assert record.metadata["count"] == 60
    assert [json.loads(content)["metadata"]["count"] for content in replaced(tmp_path)] == list(range(1, 60))


# Kills a child that does `action` in a copy of `template`, after each of its system calls in turn, from the first one
# to the last. The copies are left as the children left them: {out}/0, {out}/1, ...
KILLER = """
import ctypes, os, pathlib, shutil, signal, sys
from storage import history
template, out, action = sys.argv[1:]
template, out, action = pathlib.Path(template), pathlib.Path(out), compile(action, "action", "exec")
TRACEME, SYSCALL, SETOPTIONS, SYSGOOD_EXITKILL, REFUSED = 0, 24, 0x4200, 0x100001, 77
ptrace = ctypes.CDLL(None, use_errno=True).ptrace
ptrace.argtypes, ptrace.restype = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p), ctypes.c_long

os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])  # the two take turns: one core is faster than two

def killed_after(calls, root):
    pid = os.fork()
    if pid == 0:
        if ptrace(TRACEME, 0, None, None):
            os._exit(REFUSED)
        os.kill(os.getpid(), signal.SIGSTOP)  # counting begins
        try:
            exec(action, {"history": history, "root": root})
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    def stopped():
        status = os.waitpid(pid, 0)[1]
        if not os.WIFSTOPPED(status):
            code = os.waitstatus_to_exitcode(status)
            if code:
                sys.exit(code)
            return False
        return True
    stopped()
    assert ptrace(SETOPTIONS, pid, None, SYSGOOD_EXITKILL) == 0
    ptrace(SYSCALL, pid, None, None)
    stopped()  # the rest of kill(2)
    for _ in range(calls):
        for _ in "before", "after":
            assert ptrace(SYSCALL, pid, None, None) == 0
            if not stopped():
                return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True

calls = 0
while True:
    root = out / str(calls)
    shutil.copytree(template, root) if template.exists() else root.mkdir()
    if not killed_after(calls, root):
        break
    calls += 1
print(calls)
"""
ROLLBACK = "history.rollback(root, 'NVDA')"


@pytest.fixture
def attack(scratch: Path) -> Iterator[Callable[[Path, str], list[Path]]]:
    """`attack(template, action)`: what an action killed after each of its system calls leaves of the template.

    The last of the folders is of an action that was not killed. In memory: a thousand children sync forty files each.
    """
    if sys.platform != "linux":
        pytest.skip("ptrace is called as on Linux")
    folder = scratch / uuid.uuid4().hex

    def run(template: Path, action: str) -> list[Path]:
        out = folder / str(len(list(folder.iterdir())))
        out.mkdir()
        killer = [sys.executable, "-c", KILLER, str(template), str(out), action]
        done = subprocess.run(killer, cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode == 77:
            pytest.skip("this machine does not permit ptrace, which is needed to kill at a system call")
        assert (done.returncode, done.stderr) == (0, "")
        return [out / str(calls) for calls in range(int(done.stdout) + 1)]

    folder.mkdir()
    yield run
    shutil.rmtree(folder)


def writing(content: dict[str, Any]) -> str:
    return f"history.write(root, 'NVDA', {content!r}, ({content['model']!r}, 'best', 'optimized_compiled'))"


def check_whole(root: Path, old: dict[str, bytes], new: dict[str, bytes]) -> bool:
    """Every file is the old or the new one, `best` new only where all are, all old ones exist. Whether it happened."""
    now = files(root)
    for folder in FOLDERS:
        assert now.get(folder) in (old.get(folder), new.get(folder))
    assert set(old.values()) <= {*now.values(), *everything(root / "history").values()}
    happened = now.get("best") == new["best"]
    if happened:
        assert now == new
    return happened


def check_tidy(root: Path) -> None:
    assert not [path for path in root.rglob("*") if path.name.endswith(".tmp")]
    assert (root / ".locks" / ".gitignore").read_bytes() == b"*\n"


def check_walks_back(root: Path, states: list[dict[str, bytes]]) -> None:
    """Rolling back goes through these states, newest first, and no further."""
    for state in reversed(states):
        history.rollback(root, "NVDA")
        assert files(root) == state
        check_tidy(root)
    with pytest.raises(ConfigFileError, match="nothing left"):
        history.rollback(root, "NVDA")


def goes_on(root: Path, states: list[dict[str, bytes]], present: dict[str, bytes]) -> None:
    """The next writer, in one copy a write and in the other a rollback, works as if nothing had ever been killed."""
    other = root.with_name(f"{root.name}-other")
    shutil.copytree(root, other)
    dry = history.rollback(other, "NVDA", dry_run=True) if states else None
    check_walks_back(other, states)
    assert dry is None or dry.remaining == len(states) - 1

    promote(root, toto(99))
    check_tidy(root)
    record = configs.read(root, "kronos", "NVDA")
    assert (record.raw if record else None) == (json.loads(present["kronos"]) if "kronos" in present else None)
    check_walks_back(root, [*states, present] if present else states)


def distinct(roots: list[Path]) -> list[Path]:
    """One of each state: most system calls change nothing, and the next writer sees no more than the files."""
    found = {}
    for root in roots:
        paths = {str(path.relative_to(root)): path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")}
        times = re.compile(r"\d{4}-?\d\d-?\d\dT\d\d:?\d\d:?\d\dZ")
        found[times.sub("", repr(sorted(paths.items())))] = root
    return list(found.values())


def history_of(root: Path, *contents: dict[str, Any]) -> list[dict[str, bytes]]:
    """The states of the files before each promotion and after the last."""
    states = [files(root)]
    for content in contents:
        promote(root, content)
        states.append(files(root))
    return states


def test_writer_killed_at_any_system_call(attack: Callable[[Path, str], list[Path]], tmp_path: Path) -> None:
    template = tmp_path / "template"
    predecessor(template)
    *states, old = history_of(template, toto(1))
    roots = attack(template, writing(kronos(2)))
    new = files(roots[-1])
    outcomes = []
    for root in roots:
        now = files(root)
        happened = check_whole(root, old, new)
        outcomes.append("new" if happened else "old" if now == old else "between")
    assert outcomes == sorted(outcomes, key=["old", "between", "new"].index)  # one way, never back
    assert min(outcomes.count(outcome) for outcome in ("old", "between", "new")) > 5
    for root in distinct(roots):
        happened = files(root) == new
        goes_on(root, [*states, old] if happened else states, new if happened else old)


def test_first_writer_killed_at_any_system_call(attack: Callable[[Path, str], list[Path]], tmp_path: Path) -> None:
    roots = attack(tmp_path / "nothing", writing(toto(1)))
    new = files(roots[-1])
    happened = [check_whole(root, {}, new) for root in roots]
    assert 5 < sum(happened) < len(happened) - 5
    for root in distinct(roots):
        goes_on(root, [], new if files(root) == new else {})


def test_rollback_killed_at_any_system_call(attack: Callable[[Path, str], list[Path]], tmp_path: Path) -> None:
    template = tmp_path / "template"
    *states, restored, old = history_of(template, toto(0), toto(1), kronos(2))
    states = states[1:]  # before the first there was no file
    roots = attack(template, ROLLBACK)
    assert files(roots[-1]) == restored
    happened = [check_whole(root, old, restored) for root in roots]
    assert 5 < sum(happened) < len(happened) - 5
    for root in distinct(roots):
        done = files(root) == restored
        goes_on(root, states if done else [*states, restored], restored if done else old)


@pytest.mark.slow
def test_recovery_killed_at_any_system_call(attack: Callable[[Path, str], list[Path]], tmp_path: Path) -> None:
    """The writer after a killed one is killed too, wherever it is in taking back what the first one left."""
    template = tmp_path / "template"
    _, *states, old = history_of(template, toto(1), kronos(2), kronos(3))
    crashed = tmp_path / "crashed"
    shutil.copytree(template, crashed)
    promote(crashed, kronos(4))
    put(crashed, old["best"])  # as if killed before the last rename
    roots = attack(crashed, writing(toto(5)))
    new = files(roots[-1])
    assert new["kronos"] == old["kronos"]
    between = {**old, **{folder: content for folder, content in files(crashed).items() if folder != "best"}}
    for root in roots:
        now = files(root)
        for folder in FOLDERS:
            assert now[folder] in (old[folder], between[folder], new[folder])
        assert set(old.values()) <= {*now.values(), *everything(root / "history").values()}
        happened = now["best"] == new["best"]
        assert now == new if happened else now["best"] == old["best"]
    for root in distinct(roots):
        happened = files(root) == new
        goes_on(root, [*states, old] if happened else states, new if happened else old)


@pytest.mark.parametrize("act", ["write", "rollback"])
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO])
def test_failure_at_any_call_leaves_all_old_or_all_new(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str, fault: int
) -> None:
    """A disk that is full from some call on, so that nothing new can be made; any one call that fails."""
    template = tmp_path / "template"
    _, *states, old = history_of(template, toto(0), toto(1), kronos(2))
    real = {name: getattr(os, name) for name in ("open", "mkdir", "fsync", "replace", "rename", "unlink")}
    left = 0

    def failing(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            makes = name == "mkdir" or (name == "open" and args[1] & os.O_CREAT)
            if fault == errno.EIO or makes or (name == "fsync" and stat.S_ISREG(os.fstat(args[0]).st_mode)):
                left -= 1
                if left == -1 or (left < 0 and fault == errno.ENOSPC):
                    raise OSError(fault, os.strerror(fault))
            return real[name](*args, **options)

        return call

    folder = scratch / uuid.uuid4().hex
    failed = []
    while not failed or left < 0:
        root = folder / str(len(failed))
        shutil.copytree(template, root)
        failed.append(root)
        left = len(failed) - 1
        message = None
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, failing(name))
            try:
                promote(root, toto(3)) if act == "write" else history.rollback(root, "NVDA")
            except ConfigFileError as error:
                message = str(error)
        if message is not None:
            assert os.strerror(fault) in message
            assert "\n" not in message
            assert files(root) == old or fault == errno.EIO
    new = files(failed[-1])
    assert new["best"] != old["best"]
    assert len(failed) > (10 if fault == errno.ENOSPC else 35)
    for root in distinct(failed):
        happened = check_whole(root, old, new)
        assert files(root) == (new if happened else old)
        past = [*states, old] if act == "write" else states[:-1]
        goes_on(root, past if happened else states, new if happened else old)
    shutil.rmtree(folder)


ROLLER = """
import pathlib, sys
from storage import configs, history
root, done = pathlib.Path(sys.argv[1]), 0
while done < 8:
    try:
        history.rollback(root, "NVDA")
    except configs.ConfigFileError as error:
        assert "nothing left" in str(error), error
        continue
    done += 1
"""
PROMOTER = """
import json, pathlib, sys
from storage import history
root, name, model = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
for version in range(12):
    content = dict(symbol="NVDA", model=model, config={"version": f"{name}-{version}"}, validation={})
    history.write(root, "NVDA", content, (model, "best", "optimized_compiled"))
"""


def test_promotions_and_rollbacks_at_once_are_never_mixed(tmp_path: Path) -> None:
    commands = [(PROMOTER, "a", "toto"), (PROMOTER, "b", "kronos"), (ROLLER,), (ROLLER,)]
    processes = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path, *rest], cwd=REPOSITORY, stderr=subprocess.PIPE)
        for code, *rest in commands
    ]
    try:
        assert [process.communicate(timeout=60)[1] for process in processes] == [b""] * 4
    finally:
        for process in processes:
            process.kill()
            process.wait()
    remaining = 24 - 16 - 1  # the very first has nothing before it
    kept = [path.read_bytes() for path in (tmp_path / "history" / "NVDA").glob("*/promoted.json")]
    assert len(set(kept)) == len(kept) == 24
    while True:
        now = files(tmp_path)
        model = json.loads(now["best"])["model"]
        assert now["best"] == now["optimized_compiled"] == now[model]
        if not remaining:
            break
        remaining -= 1
        assert history.rollback(tmp_path, "NVDA").remaining == remaining
    with pytest.raises(ConfigFileError, match="nothing left"):
        history.rollback(tmp_path, "NVDA")
