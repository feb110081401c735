"""What a user gets: text on the console, results on the disk, whole or not at all and never upon an input."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from nonexpansive.atomic import atomic
from nonexpansive.errors import BadInput

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


def check_writable(
    path: str | Path, inputs: Iterable[str | Path] = (), suffixes: Collection[str] = IMAGE_SUFFIXES
) -> None:
    """Raises ``BadInput``, before any work, if ``path`` cannot be written later: its directory is missing or not
    writable, it is a directory or a device, its suffix is not one of ``suffixes``, or it is one of the ``inputs`` (also
    through a link).
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
            raise BadInput(f"output {str(path)!r} is the input, which is never overwritten: give another name")


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
    if hasattr(value, "tolist") and not isinstance(value, type):  # numpy and torch
        return _plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form")
