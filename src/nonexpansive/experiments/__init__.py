"""The experiments, as configs that ship with the package: of trainings, and of comparisons between what they train."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from nonexpansive.errors import BadInput


def shipped(name: str | Path, folder: str = "") -> Path:
    """The path of a config: a file of that name, or the shipped one called so (without ``.toml``). Raises BadInput.

    ``folder``: "" for trainings, "comparisons" for comparisons.
    """
    path = Path(name)
    if path.is_file():
        return path
    if str(name) in (names := listed(folder)):
        return _folder(folder) / f"{name}.toml"
    raise BadInput(f"{name}: no such file, and no shipped config is called so (there are {', '.join(names)})")


def listed(folder: str = "") -> list[str]:
    """The names of the shipped configs."""
    return sorted(entry.stem for entry in _folder(folder).glob("*.toml"))


def _folder(folder: str) -> Path:
    return Path(str(resources.files(__name__))) / folder
