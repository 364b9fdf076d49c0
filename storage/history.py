"""Promotions and rollbacks of the promoted files, each a step that is kept and can be undone.

Owns the files' history and their locks; configs.py says what a file holds. Knows nothing of which model is better.

Each write and each rollback is a step: its folder `history/{SYMBOL}/{number}-{time}/`, complete and on the disk before
the first file is replaced, holds `step.json` (what it replaces, as digests), `{folder}.json` (what each folder holds
before it) and `promoted.json` (what is written). The last file replaced, `best` where it is among them, decides whether
the step has happened. One whose writer was killed before that is taken back by the next writer, and named `-void`.
A folder that a step does not mention is left alone when the step is undone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from storage.configs import (
    CHOSEN,
    KEYS,
    ConfigFileError,
    Record,
    damaged,
    digest_of,
    file_path,
    is_model,
    parse,
    plain_errors,
    read_bytes,
)
from storage.files import sync_folder

FIRST_MODELS = ("toto", "kronos")  # every step names them, in this order: earlier versions read no step without them
UNCHECKED = "unchecked"  # `expected_digest` of a writer that replaces whatever is there
_LOCK_TIMEOUT_S = 30.0
_STEP = re.compile(r"(\d+)-\d{8}T\d{6}Z(-void)?")


class ConcurrentWrite(ConfigFileError):
    """Another process has replaced the file since it was read."""


class NothingLeft(ConfigFileError):
    """No promotion of a symbol is left to be undone."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a rollback put back, or would."""

    symbol: str
    model: str | None  # that `best` names again; None: the file that was replaced cannot be read
    promoted_at: str  # UTC time of the promotion that is undone
    step: Path  # its folder in the history; what is put back is from there
    restored: tuple[Path, ...]  # files that hold again what they held
    removed: tuple[Path, ...]  # files that are gone again: before the promotion there were none
    mismatch: Path | None  # the file of `model`, if it is then missing or holds another configuration than `best`
    kept: Path | None  # the step of the history with what was rolled back; None: nothing is written
    remaining: int  # promotions that can still be rolled back


@dataclass(frozen=True, kw_only=True)
class _Step:
    path: Path
    action: str  # "promotion" or "rollback"
    time: str
    undoes: tuple[str, ...]  # names of the steps that a rollback undoes
    before: Mapping[str, str | None]  # digest of each folder's file before the step; None: there was none
    after: Mapping[str, str | None]  # the same after it, of the folders that it changes

    def content(self, folder: str) -> bytes | None:
        """What the folder held before the step. Raises ConfigFileError where that is no longer what was kept."""
        if self.before[folder] is None:
            return None
        path = self.path / f"{folder}.json"
        content = read_bytes(path)
        if content is None or digest_of(content) != self.before[folder]:
            raise ConfigFileError(f"{path}: missing or changed since; put back what it was, or move {self.path} away")
        return content


def write(
    root: Path,
    symbol: str,
    payload: Mapping[str, Any],
    folders: Sequence[str],
    *,
    expected_digest: str | None = UNCHECKED,
) -> None:
    """Replace a symbol's file in each of `folders`, `best` last; what they held goes to the history first.

    `payload` has at least symbol, model, config and validation. `expected_digest` is that of `best` as the caller
    read it, None for "there was none". A crash leaves each file old or new, never torn, and `best` new only where all
    are; the next writer takes back what is new beside an old `best`. A full disk changes nothing.
    Side effects: a step in `history/{SYMBOL}/` unless every file holds the payload already; a lock file in `.locks`.
    Raises ConcurrentWrite if `best` is not what the caller read, ConfigFileError if a file cannot be written, and
    ValueError for a payload that is incomplete or holds NaN or infinity. On ConcurrentWrite nothing is changed.
    """
    best = file_path(root, "best", symbol)
    for folder in folders:
        file_path(root, folder, symbol)
    content = _encoded(symbol, payload)
    with plain_errors(best), _writing(root, symbol, expected_digest):
        state = _state(root, symbol)
        changes = _changes(state, dict.fromkeys(folders, content))
        if changes:
            _take(root, symbol, "promotion", state, changes)


def rollback(root: Path, symbol: str, *, dry_run: bool = False, expected_digest: str | None = UNCHECKED) -> Restored:
    """Undo the last promotion that replaced `best`: each file it replaced holds what it held, byte by byte.

    So does the file of the model that `best` then names, even where a later promotion within that model replaced it:
    readers that take the model from `best` and its parameters from the model's folder get what they got. What is
    replaced here goes to the history too. Again and again it leads back to the first file that `best` held; promotions
    that left `best` alone are not undone. `dry_run` writes nothing and takes no lock. `expected_digest` as of `write`.
    Raises NothingLeft, ConcurrentWrite if `best` is not what the caller read, ConfigFileError if a file cannot be read
    or written, and ValueError for what is no symbol. A crash leaves what one during `write` does.
    """
    best = file_path(root, "best", symbol)
    with plain_errors(best):
        if dry_run:
            return _roll_back(root, symbol, dry_run=True)
        if not _steps(root, symbol):  # a misspelt symbol leaves no lock file behind
            raise _nothing_left(symbol)
        with _writing(root, symbol, expected_digest):
            return _roll_back(root, symbol, dry_run=False)


def standing(root: Path, symbol: str) -> tuple[datetime | None, Record | None]:
    """Since when `best` holds what it holds, if the history says so, and the record that a rollback would put back.

    Raises ConfigFileError for a history that cannot be read.
    """
    best = file_path(root, "best", symbol)
    with plain_errors(best):
        digest = digest_of(read_bytes(best))
        times = [step.time for step in _taken(root, symbol) if step.after.get("best", "") == digest]
        content = None
        with suppress(NothingLeft):
            content = _read_step(_roll_back(root, symbol, dry_run=True).step).content("best")
    since = datetime.fromisoformat(times[-1]) if times else None
    return since, parse(best, "best", symbol, content) if content else None


# --- writing


def _encoded(symbol: str, payload: Mapping[str, Any]) -> bytes:
    """The file's bytes: the keys that readers know first and in their order, then the others."""
    missing = [key for key in ("symbol", "model", "config", "validation") if key not in payload]
    if missing or payload["symbol"] != symbol:
        raise ValueError(f"payload of {symbol}: {', '.join(missing) + ' missing' if missing else 'of another symbol'}")
    ordered = {key: payload[key] for key in (*KEYS, *payload) if key in payload}
    try:
        return (json.dumps(ordered, indent=2, allow_nan=False) + "\n").encode()
    except (ValueError, TypeError) as error:
        raise ValueError(f"payload of {symbol}: {error}") from error


def _state(root: Path, symbol: str) -> dict[str, bytes | None]:
    """What each folder holds for the symbol, in the order in which files are replaced; one left out holds nothing."""
    paths = {folder: file_path(root, folder, symbol) for folder in _folders(root)}
    named = (*FIRST_MODELS, *CHOSEN)
    return {folder: read_bytes(path) for folder, path in paths.items() if folder in named or path.is_file()}


def _folders(root: Path) -> list[str]:
    """The folders of promoted files, in the order in which files are replaced."""
    try:
        with os.scandir(root) as entries:
            models = [entry.name for entry in entries if is_model(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        models = []
    return _ordered([*FIRST_MODELS, *models, *CHOSEN])


def _ordered(folders: Iterable[str]) -> list[str]:
    """Each folder once, in the order in which files are replaced. Raises ValueError for what is no folder."""
    wanted = set(folders)
    others = sorted(wanted.difference(FIRST_MODELS, CHOSEN))
    if unknown := [folder for folder in others if not is_model(folder)]:
        raise ValueError(f"{unknown[0]!r} is not a folder of promoted files")
    return [folder for folder in (*FIRST_MODELS, *others, *CHOSEN) if folder in wanted]


def _changes(state: Mapping[str, bytes | None], wanted: Mapping[str, bytes | None]) -> dict[str, bytes | None]:
    """Of what is wanted, what differs from the state, in the order in which files are replaced."""
    return {folder: wanted[folder] for folder in _ordered(wanted) if wanted[folder] != state.get(folder)}


def _take(
    root: Path,
    symbol: str,
    action: str,
    state: Mapping[str, bytes | None],
    changes: Mapping[str, bytes | None],
    undoes: Sequence[str] = (),
) -> Path:
    """Make these changes a step of the history, then make them. Returns the step's folder."""
    temporaries = _prepared(root, symbol, changes)  # before the step: a full disk then changes nothing
    now = datetime.now(UTC)
    description = {
        "symbol": symbol,
        "action": action,
        "time": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "undoes": list(undoes),
        "before": {folder: digest_of(state.get(folder)) for folder in _ordered([*state, *changes])},
        "after": {folder: digest_of(content) for folder, content in changes.items()},
    }
    files = {f"{folder}.json": content for folder, content in state.items() if content is not None}
    if action == "promotion":
        files["promoted.json"] = next(content for content in changes.values() if content is not None)
    files["step.json"] = (json.dumps(description, indent=2) + "\n").encode()

    history = root / "history" / symbol
    taken = _steps(root, symbol)
    number = _number(taken[-1]) + 1 if taken else 1
    step = history / f"{number:04d}-{now:%Y%m%dT%H%M%SZ}"
    unnamed = history / f".{step.name}.tmp"
    _make_folder(unnamed)
    for name, content in files.items():
        _create(unnamed / name, content)
    sync_folder(unnamed)
    unnamed.replace(step)
    for parent in (history, history.parent, root):
        sync_folder(parent)
    _replace(root, symbol, changes, temporaries)
    return step


def _prepared(root: Path, symbol: str, changes: Mapping[str, bytes | None]) -> dict[str, Path]:
    """The new content of each folder's file in a temporary file beside it, on the disk."""
    temporaries = {}
    for folder, content in changes.items():
        if content is not None:
            temporaries[folder] = _temporary(root, folder, symbol)
            _make_folder(temporaries[folder].parent)
            _create(temporaries[folder], content)
    return temporaries


def _replace(root: Path, symbol: str, changes: Mapping[str, bytes | None], temporaries: Mapping[str, Path]) -> None:
    for folder in changes:
        path = _target(root, folder, symbol)
        if folder in temporaries:
            temporaries[folder].replace(path)
        else:
            path.unlink(missing_ok=True)
        sync_folder(path.parent)


def _temporary(root: Path, folder: str, symbol: str) -> Path:
    """The lock makes one name enough."""
    return _target(root, folder, symbol).with_name(f".{symbol}.json.tmp")


def _target(root: Path, folder: str, symbol: str) -> Path:
    """The file itself: where somebody made a link of it, the link stays and what it leads to is replaced."""
    return Path(os.path.realpath(file_path(root, folder, symbol)))


def _create(path: Path, content: bytes) -> None:
    """Write and sync a new file. Not replace_file: several files are on the disk before the first is renamed."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)  # less the umask: others read it
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def _make_folder(folder: Path) -> None:
    """Make a folder where there is none, and see its name on the disk."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


# --- the history


def _steps(root: Path, symbol: str) -> list[Path]:
    """The folders of a symbol's steps, void ones too, oldest first."""
    history = root / "history" / symbol
    found = history.iterdir() if history.is_dir() else ()
    return sorted((path for path in found if _STEP.fullmatch(path.name)), key=lambda path: (_number(path), path.name))


def _number(step: Path) -> int:
    return int(step.name.partition("-")[0])


def _read_step(path: Path) -> _Step:
    description = path / "step.json"
    try:
        raw = json.loads(description.read_bytes())
        step = _Step(
            path=path,
            action=raw["action"],
            time=raw["time"],
            undoes=tuple(raw["undoes"]),
            before={folder: raw["before"][folder] for folder in _ordered([*raw["before"], *raw["after"]])},
            after={folder: raw["after"][folder] for folder in _ordered(raw["after"])},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(description, f"not a step of the history ({error!r})") from error
    if not step.after:
        raise damaged(description, "not a step of the history (it changes nothing)")
    return step


def _taken(root: Path, symbol: str) -> list[_Step]:
    return [_read_step(path) for path in _steps(root, symbol) if not path.name.endswith("-void")]


def _leftover(step: _Step, state: Mapping[str, bytes | None]) -> dict[str, bytes | None] | None:
    """What takes the newest step back if it has not happened; None if it has.

    It has not where the file that is replaced last is what it was: its writer was killed, or that file was put back
    by hand. Files that someone else replaced since are left alone.
    """
    last = list(step.after)[-1]
    if digest_of(state.get(last)) != step.before[last]:
        return None
    left = [folder for folder, digest in step.after.items() if digest_of(state.get(folder)) == digest]
    return {folder: step.content(folder) for folder in left}


def _recover(root: Path, symbol: str) -> None:
    """Remove what a killed or failed writer left, and take back the step that it did not finish. Safe to repeat."""
    for folder in _folders(root):
        _temporary(root, folder, symbol).unlink(missing_ok=True)
    for unnamed in (root / "history" / symbol).glob(".*.tmp"):
        shutil.rmtree(unnamed)
    newest = next((path for path in reversed(_steps(root, symbol)) if not path.name.endswith("-void")), None)
    if newest is None:
        return
    back = _leftover(_read_step(newest), _state(root, symbol))
    if back is not None:
        _replace(root, symbol, back, _prepared(root, symbol, back))
        newest.rename(newest.with_name(f"{newest.name}-void"))
        sync_folder(newest.parent)


def _roll_back(root: Path, symbol: str, *, dry_run: bool) -> Restored:
    state = _state(root, symbol)
    steps = _taken(root, symbol)
    if dry_run and steps and (back := _leftover(steps[-1], state)) is not None:  # what the lock's holder has done
        state = {**state, **back}
        steps.pop()
    standing: list[_Step] = []  # promotions of `best` that are not undone
    for step in steps:
        if step.action == "rollback":
            standing = [other for other in standing if other.path.name not in step.undoes]
        elif "best" in step.after:
            standing.append(step)

    wanted: dict[str, bytes | None] = {}
    undone: list[_Step] = []
    while standing:
        step = standing.pop()
        undone.append(step)
        wanted.update({folder: step.content(folder) for folder in step.after})
        if wanted["best"] != state["best"]:  # else it was put back by hand: go on to the step before
            break
    best = wanted.get("best")
    if best is None or best == state["best"]:
        raise _nothing_left(symbol)
    named = _read_if_whole(root, "best", symbol, best)
    model = named.model if named else None
    mismatch = None
    if named and model and is_model(model):
        if model in undone[-1].before:
            wanted[model] = undone[-1].content(model)
        if model in wanted or model in state:
            own = _read_if_whole(root, model, symbol, wanted.get(model, state.get(model)))
            if own is None or (own.model, own.config) != (model, named.config):
                mismatch = file_path(root, model, symbol)
    changes = _changes(state, wanted)
    names = [step.path.name for step in undone]
    kept = None if dry_run else _take(root, symbol, "rollback", state, changes, undoes=names)
    return Restored(
        symbol=symbol,
        model=model,
        promoted_at=undone[-1].time,
        step=undone[-1].path,
        restored=tuple(file_path(root, folder, symbol) for folder, content in changes.items() if content is not None),
        removed=tuple(file_path(root, folder, symbol) for folder, content in changes.items() if content is None),
        mismatch=mismatch,
        kept=kept,
        remaining=sum(step.before["best"] is not None for step in standing),
    )


def _nothing_left(symbol: str) -> NothingLeft:
    return NothingLeft(f"{symbol}: nothing left to roll back to; no promotion in its history replaced a file")


def _read_if_whole(root: Path, folder: str, symbol: str, content: bytes | None) -> Record | None:
    try:
        return None if content is None else parse(file_path(root, folder, symbol), folder, symbol, content)
    except ConfigFileError:
        return None


# --- one writer at a time


@contextmanager
def _writing(root: Path, symbol: str, expected_digest: str | None) -> Iterator[None]:
    """Be the symbol's only writer, on files without anything half done. Raises ConcurrentWrite."""
    with _locked(root, symbol):
        _recover(root, symbol)  # what a killed writer left
        best = file_path(root, "best", symbol)
        if expected_digest not in (UNCHECKED, digest_of(read_bytes(best))):
            raise ConcurrentWrite(f"{best} was replaced meanwhile; run the command again")
        try:
            yield
        except BaseException:
            _recover(root, symbol)  # what this one could not finish
            raise


@contextmanager
def _locked(root: Path, symbol: str) -> Iterator[None]:
    """Serialise the writers of a symbol; the lock dies with its holder."""
    locks = root / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    ignore = locks / ".gitignore"  # promoted files are committed, locks are not
    if not ignore.exists() or ignore.stat().st_size == 0:  # empty: its writer was killed
        ignore.write_text("*\n")
    lock = FileLock(locks / f"{symbol}.lock", timeout=_LOCK_TIMEOUT_S, poll_interval=0.01, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigFileError(f"{symbol}: another process is writing its files; try again") from error
    try:
        yield
    finally:
        lock.release()
