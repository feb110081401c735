"""The experiments, as configs that ship with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from nonexpansive.errors import BadInput


def shipped(name: str | Path) -> Path:
    """The path of a config: a file of that name, or the shipped one called so (without ``.toml``). Raises BadInput."""
    path = Path(name)
    if path.is_file():
        return path
    folder = Path(str(resources.files(__name__)))
    names = sorted(entry.stem for entry in folder.glob("*.toml"))
    if str(name) in names:
        return folder / f"{name}.toml"
    raise BadInput(f"{name}: no such file, and no shipped config is called so (there are {', '.join(names)})")
