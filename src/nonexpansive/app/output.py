"""Results on the disk: whole or not at all, and never upon an input."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nonexpansive.errors import BadInput

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")

_DISK = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "the file is too large"}


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` (same suffix), which replaces it when the block ends well: the name then holds
    the whole new file. After an error, a full disk or a kill it still holds the old one, or nothing.

    Raises ``BadInput`` where the disk is full or the place cannot be written; other errors of the block pass through.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem[:100]}.", suffix=target.suffix)
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


def check_writable(
    path: str | Path, inputs: Iterable[str | Path] = (), suffixes: Collection[str] = IMAGE_SUFFIXES
) -> None:
    """Raises ``BadInput``, before any work, if ``path`` cannot be written later: its directory is missing or not writable, it is
    a directory or a device, its suffix is not one of ``suffixes``, or it is one of the ``inputs`` (also through a link).
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise BadInput(f"output {str(path)!r}: the name must end in one of {', '.join(suffixes)}")
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise BadInput(f"output {str(path)!r}: there is no directory {str(target.parent)!r}; make it first")
    if target.exists() and not target.is_file():
        raise BadInput(f"output {str(path)!r} exists and is not a file: give another name")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise BadInput(f"output {str(path)!r}: no permission to write in {str(target.parent)!r}")
    if target.exists() and not os.access(target, os.W_OK):
        raise BadInput(f"output {str(path)!r} exists and is write-protected: give another name")
    for other in map(Path, inputs):
        if target == Path(os.path.realpath(other)) or (target.exists() and other.exists() and target.samefile(other)):
            raise BadInput(f"output {str(path)!r} is the input {str(other)!r}, which is never overwritten: give another name")


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as strict JSON (RFC 8259), whole or not at all.

    Dataclasses become objects, paths strings, tensors and arrays lists or numbers. JSON has no number for what is not
    finite: those become the strings "Infinity", "-Infinity" and "NaN", which ``float`` takes back.
    """
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and torch
        return _plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form")
