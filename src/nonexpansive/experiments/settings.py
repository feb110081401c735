"""What an experiment is, read from TOML: its settings, and tables of rows such as ``[[runs]]``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nonexpansive.atomic import atomic
from nonexpansive.errors import BadInput
from nonexpansive.train.config import apply_overrides, load_toml, read

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A network of an experiment: its ``name``, the ``config`` of its training (a file, or a shipped one), what is ``set`` in that."""

    name: str
    config: str
    set: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The name of its folder among the results."""
        return self.name.replace(" ", "-")


def require_named(runs: Sequence[Entry]) -> None:
    """Raises BadInput unless there are runs, with names that differ."""
    if not runs or len({entry.name for entry in runs}) < len(runs):
        raise BadInput("a comparison needs [[runs]], one or more, each with a name of its own")


def load(cls: type[T], path: Path | str, rows: Mapping[str, type] = {}, overrides: Iterable[str] = ()) -> T:
    """The settings ``cls`` in a file, after ``overrides`` such as ``attacked=50``; ``rows``: what the tables ``[[name]]`` hold.

    Raises BadInput, naming what is wrong.
    """
    values = apply_overrides(load_toml(path), overrides)
    values.pop("kind", None)
    made = {
        key: tuple(read(kind, row, f"{key}[{i}]") for i, row in enumerate(values.pop(key, [])))
        for key, kind in rows.items()
    }
    return cls(**vars(read(cls, {**values, **made}, "experiment")))


def wanted(only: Iterable[str], names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are in ``only``, or all where that is empty. Raises BadInput for one that is not there."""
    only = list(only)
    if unknown := [name for name in only if name not in names]:
        raise BadInput(f"no run {unknown[0]!r} in this experiment; there are {', '.join(names)}")
    return [name for name in names if not only or name in only]


class Ledger:
    """What was measured, in a file, a line as soon as it is there: a killed measurement goes on behind the last whole line.

    ``asked`` says what is measured; lines of a file that was asked for something else are dropped. Values are plain JSON.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        self.path, self.values = path, dict[str, Any]()
        lines = [json.dumps({"asked": asked}, sort_keys=True)]
        kept = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if kept[:1] == lines:
            for line in kept[1:]:
                with suppress(ValueError, TypeError):  # the last line of a process that was killed
                    key, value = json.loads(line)
                    self.values[key] = value
                    lines.append(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def add(self, key: str, value: Any) -> Any:
        """Keep the value, and give it back."""
        self.values[key] = value
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, value]) + "\n")
        return value
