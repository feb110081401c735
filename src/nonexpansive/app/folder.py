"""A folder of files: each by itself, and one that fails does not stop the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from nonexpansive.app.output import IMAGE_SUFFIXES, check_writable, out, write_json
from nonexpansive.errors import BadInput, NonexpansiveError

Work = Callable[[Path, Path, str], dict[str, Any]]
"""``work(file, output, name)`` makes the one into the other, as ``name`` in what it prints, and says what it did."""


def one_by_one(
    command: str,
    done: str,
    source: Path,
    output: Path,
    work: Work,
    *,
    figure: Path | None,
    json_file: Path | None,
    arrays: Collection[str] = (),
    read: Iterable[Path] = (),
) -> None:
    """Do ``work`` on every picture of the folder ``source``, and every file that ends in one of ``arrays``, into the folder ``output``:
    a picture gives one of its name, an array an array, ``.npy``, which rounds nothing.

    Raises BadInput at the end, with all that failed; if everything did, as the first did. ``read``: files that may not be written.
    """
    began = time.perf_counter()
    if figure is not None:
        raise BadInput("--figure shows one picture: give one file, not a folder")
    if json_file is not None:
        check_writable(json_file, suffixes=(".json",))
    pairs = _pairs(source, output, arrays, read)
    results: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    first: Exception | None = None
    for number, (path, target) in enumerate(pairs, 1):
        try:
            results.append(work(path, target, f"[{number}/{len(pairs)}] {path.name}"))
        except Exception as error:  # whatever is wrong with one file
            why = str(error) if isinstance(error, NonexpansiveError) else f"{type(error).__name__}: {error}"
            first, failed[path.name] = first or error, why
            out.print(f"{path.name}: {why}", markup=False)
    if first is not None and not results:
        raise first
    if json_file is not None:
        write_json(json_file, {"command": command, "files": results, "failed": failed})
    summary = f"{done} {len(results)} of {len(pairs)} files into {output} ({time.perf_counter() - began:.1f} s in all)"
    if failed:
        raise BadInput(f"{summary}; these failed:\n" + "\n".join(f"{name}: {why}" for name, why in failed.items()))
    out.print(summary, markup=False)


def _pairs(source: Path, output: Path, arrays: Collection[str], read: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Each file of a folder that can be read, and where its result goes. Refuses what could not be written, or is ``read`` too."""
    if output.exists() and not output.is_dir():
        raise BadInput(f"{source} is a folder, so the output must be one: {output} is a file")
    if not output.exists() and not output.parent.is_dir():
        raise BadInput(f"output {str(output)!r}: there is no directory {str(output.parent)!r}; make it first")
    files = sorted(path for path in source.iterdir() if path.suffix.lower() in (*IMAGE_SUFFIXES, *arrays))
    if not files:
        others = f" and no {', '.join(arrays)}" if arrays else ""
        raise BadInput(f"folder {str(source)!r} holds no pictures ({', '.join(IMAGE_SUFFIXES)}){others}")
    pairs = [(path, output / (f"{path.stem}.npy" if path.suffix.lower() in arrays else path.name)) for path in files]
    names = [target.name for _, target in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadInput(
            f"several inputs would be written to {', '.join(twice)}: rename them, or restore them one by one"
        )
    output.mkdir(exist_ok=True)
    for path, target in pairs:
        check_writable(target, inputs=(path, *read), suffixes=(*IMAGE_SUFFIXES, ".npy"))
    return pairs
