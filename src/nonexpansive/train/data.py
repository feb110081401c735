"""Photographs and the patches drawn from them.

Everything random is a pure function of (purpose, seed, step, row), `row` being a sample's index in the global batch: a
run resumes exactly without saving any random state, and N processes draw the very samples that one would.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nonexpansive.errors import BadInput

T = TypeVar("T")

EXTENSIONS = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
LUMA = np.array([0.2989, 0.5870, 0.1140])


def key(purpose: str, *counters: int) -> int:
    """A seed in [0, 2⁶³) that depends on nothing but its arguments."""
    digest = hashlib.blake2b(repr((purpose, *counters)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(purpose: str, *counters: int) -> torch.Generator:
    """A CPU generator at the start of the stream that `purpose` and the counters name."""
    return torch.Generator().manual_seed(key(purpose, *counters))


def read_photo(path: Path, channels: int) -> Tensor:
    """An image file as uint8 (channels, H, W); grey is round(0.2989 R + 0.5870 G + 0.1140 B). Raises `BadInput`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8 instead of scaling them
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                elif image.mode in ("I", "F"):
                    raise BadInput(f"{path}: {image.mode} pixels have no known range, expected 8 or 16 bits")
                pixels = np.asarray(image.convert("RGB"))
    except BadInput:
        raise
    # Pillow's decoders raise whatever their format's parser does: all of it means an unreadable file
    except Exception as error:
        raise BadInput(f"{path}: not a readable image ({error})") from error
    if channels == 1:
        pixels = np.rint(pixels @ LUMA).astype(np.uint8)[..., None]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def read_names(path: Path | str) -> set[str]:
    """The names in a text file, separated by white space, without their extensions. Raises `BadInput`."""
    try:
        return {_stem(name) for name in Path(path).read_text(encoding="utf-8").split()}
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not a readable list of names ({error})") from error


class PhotoFolder(Sequence[Tensor]):
    """The PNG, JPEG and TIFF photographs of one folder, in order of name, each uint8 (channels, H, W).

    `select` keeps only the named ones, all of which must be there; `exclude` drops the named ones; both compare names
    without extension. `limit` keeps the first so many. Raises `BadInput`: no folder, no photograph, an unreadable file.
    """

    def __init__(
        self,
        path: Path | str,
        channels: int = 3,
        select: set[str] | None = None,
        exclude: set[str] | None = None,
        limit: int | None = None,
    ) -> None:
        path = Path(path)
        if not path.is_dir():
            raise BadInput(f"{path}: no such folder of photographs")
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in EXTENSIONS and file.is_file())
        if select is not None:
            if missing := sorted(select - {file.stem for file in files}):
                raise BadInput(f"{path}: {len(missing)} of the selected photographs are missing: {missing[:5]}")
            files = [file for file in files if file.stem in select]
        files = [file for file in files if file.stem not in (exclude or ())][:limit]
        if not files:
            raise BadInput(f"{path}: no photograph to read (PNG, JPEG or TIFF)")
        self.names = [file.name for file in files]
        self.photos = [read_photo(file, channels) for file in files]

    def __len__(self) -> int:
        return len(self.photos)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        return self.photos[index]


class Patches:
    """Square patches of photographs: a uniform photograph, place and symmetry of the square (the 8 flips and turns)."""

    def __init__(self, photos: Sequence[Tensor], patch: int) -> None:
        names = getattr(photos, "names", range(len(photos)))
        for name, photo in zip(names, photos, strict=True):
            if min(photo.shape[-2:]) < patch:
                height, width = photo.shape[-2:]
                raise BadInput(f"photograph {name} is {height}x{width}, smaller than a patch of {patch}x{patch}")
        self.photos, self.patch = photos, patch

    def draw(self, random: torch.Generator) -> Tensor:
        """One patch, uint8 (C, patch, patch): a view of its photograph, drawn with five uniform numbers."""
        which, top, left, turn, flip = torch.rand(5, generator=random, dtype=torch.float64).tolist()
        photo, size = self.photos[int(which * len(self.photos))], self.patch
        row, column = (int(u * (n - size + 1)) for u, n in zip((top, left), photo.shape[-2:], strict=True))
        patch = photo[:, row : row + size, column : column + size]
        patch = torch.rot90(patch, int(4 * turn), (1, 2))
        return patch.transpose(1, 2) if flip < 0.5 else patch


def prefetch(batch: Callable[[int], T], steps: range, ahead: int = 2) -> Generator[tuple[int, T], None, None]:
    """(step, batch(step)) for each step in order, computed up to `ahead` steps early by one background thread."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="data")
    waiting: deque[tuple[int, Future[T]]] = deque()
    upcoming = iter(steps)

    def submit() -> None:
        for step in upcoming:
            waiting.append((step, pool.submit(batch, step)))
            return

    try:
        for _ in range(ahead):
            submit()
        while waiting:
            step, future = waiting.popleft()
            result = future.result()
            submit()
            yield step, result
    finally:
        pool.shutdown(cancel_futures=True)


def _stem(name: str) -> str:
    path = Path(name)
    return path.stem if path.suffix.lower() in EXTENSIONS else path.name
