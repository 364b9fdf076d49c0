"""Files that are only ever replaced whole: a reader sees the old content or the new one, never a part of it."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def replace_file(
    path: Path, content: str | bytes, *, mode: int = 0o644, owner: tuple[int, int] | None = None, durable: bool = False
) -> None:
    """Write a file beside `path` and rename it onto it; nothing is left beside it, whatever goes wrong.

    mode: less the umask. owner: user and group id that the file is given to before it appears. durable: the content
    and the name have reached the disk when this returns, so that a loss of power leaves one of the two files.
    Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    # Exclusive: as root this follows no link that another user may have planted.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if owner:
                os.fchown(descriptor, *owner)
            if durable:
                os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in this folder survive a loss of power. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
