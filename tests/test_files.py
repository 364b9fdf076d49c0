"""A file that is replaced whole: its content, its mode and owner, and nothing left beside it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from storage.files import replace_file


def test_content_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, "text with ä\n")
    assert path.read_bytes() == "text with ä\n".encode()
    replace_file(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("mode", "umask", "expected"), [(0o644, 0o022, 0o644), (0o644, 0o077, 0o600), (0o600, 0o022, 0o600)]
)
def test_mode_is_as_asked_less_the_umask(tmp_path: Path, mode: int, umask: int, expected: int) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o666)
    before = os.umask(umask)
    try:
        replace_file(path, "new", mode=mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == expected


def test_owner_is_set_before_the_file_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    given: list[tuple[int, int, bool]] = []
    monkeypatch.setattr(os, "fchown", lambda descriptor, user, group: given.append((user, group, path.exists())))
    replace_file(path, "new")
    assert given == []
    replace_file(path.with_name("other"), "new", owner=(7, 8))
    path.unlink()
    replace_file(path, "new", owner=(7, 8))
    assert given == [(7, 8, True), (7, 8, False)]


@pytest.mark.parametrize("durable", [False, True])
def test_durable_content_and_name_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool) -> None:
    path = tmp_path / "file"
    synced: list[tuple[str, bool]] = []

    def fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        synced.append((kind, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    replace_file(path, "new", durable=durable)
    assert synced == ([("file", False), ("folder", True)] if durable else [])


@pytest.mark.parametrize("call", ["fchown", "fsync", "replace"])
def test_failure_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt if call == "fsync" else OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises((OSError, KeyboardInterrupt)):
            replace_file(path, "new", owner=(os.getuid(), os.getgid()), durable=True)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_symbolic_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "file"
    target.write_text("kept")
    path.symlink_to(target)
    replace_file(path, "new")
    assert (target.read_text(), path.read_text(), path.is_symlink()) == ("kept", "new", False)


def test_link_planted_as_the_temporary_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Known:
        hex = "known"

    monkeypatch.setattr("storage.files.uuid.uuid4", Known)
    target = tmp_path / "target"
    target.write_text("kept")
    (tmp_path / ".file.known.tmp").symlink_to(target)
    with pytest.raises(FileExistsError):
        replace_file(tmp_path / "file", "new")
    assert target.read_text() == "kept"
    assert not (tmp_path / "file").exists()
