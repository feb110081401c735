"""Files that appear whole or not at all, and folders that one process at a time writes to."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nonexpansive.errors import BadInput

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is too large",
}


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` (same suffix), which replaces it when the block ends well: the name then holds
    the whole new file. After an error, a full disk or a kill it still holds the old one, or nothing.

    Raises ``BadInput`` where the disk is full or the place cannot be written; other errors of the block pass through.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    if target.exists() and not target.is_file():
        raise BadInput(f"{str(path)!r} is no file that could be replaced by a new one: name a file")
    temporary: Path | None = None
    stem = target.stem.encode(errors="ignore")[:100].decode(errors="ignore")  # names are limited in bytes
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{stem}.", suffix=target.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_directory(target.parent)
    except OSError as error:
        if temporary is None or error.errno in _DISK:
            reason = _DISK.get(error.errno or 0, error.strerror)
            raise BadInput(f"{str(path)!r} was not written, what it held before is untouched: {reason}") from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds a folder while the block runs, against other processes that would hold it. However this process ends, that ends with it;
    nothing is written. Where the system or the disk knows no such locks, it does nothing.

    Raises ``BadInput`` where the folder is held already.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BadInput(
                    f"another process is at work in {str(folder)!r}: wait for its end, or choose another folder"
                ) from error
        yield
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    return mask


def _sync_directory(directory: Path) -> None:
    with suppress(OSError):  # not every system lets a directory be opened; the file itself is safe already
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
