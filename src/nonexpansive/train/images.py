"""Labelled images by name: the data sets of torchvision, scikit-learn's digits, an .npz, a folder of images by class.

All give uint8 images of one size with their labels and the names of the classes, checked before anything is trained or measured.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nonexpansive.errors import BadInput
from nonexpansive.train.data import generator, read_photo

Split = Literal["train", "test"]


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """``images`` uint8 (N, C, H, W), C 1 or 3; ``labels`` int64 (N,) in [0, K); ``classes``: the K names.

    Raises BadInput, saying what is wrong and what to do, where that does not hold.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8:
            raise BadInput(f"images of type {self.images.dtype}: store whole numbers from 0 to 255 (uint8)")
        if self.images.ndim != 4 or self.images.shape[1] not in (1, 3) or self.images.numel() == 0:
            raise BadInput(
                f"images of shape {tuple(self.images.shape)}: (N, C, H, W) with C = 1 or 3 is expected, N ≥ 1"
            )
        if self.labels.shape != self.images.shape[:1]:
            raise BadInput(
                f"{len(self.images)} images with labels of shape {tuple(self.labels.shape)}: one label an image"
            )
        if self.labels.dtype != torch.int64:
            raise BadInput(f"labels of type {self.labels.dtype}: store whole numbers, the indices of the classes")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise BadInput(f"labels from {low} to {high} for {len(self.classes)} classes: number them from 0")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        return tuple(self.images.shape[1:])

    def __getitem__(self, index: Tensor | slice) -> LabelledImages:
        return replace(self, images=self.images[index], labels=self.labels[index])

    def among(self, classes: Sequence[str]) -> LabelledImages:
        """The same images, their labels numbered as in ``classes``: by name, or by number where one side knows no names but "0", "1", ...
        Raises BadInput for a class that is not there, and for names that cannot be told apart."""
        theirs = tuple(classes)
        if theirs == self.classes:
            return self
        unknown = [name for name in self.classes if name not in theirs]
        numbered = _numbered(self.classes) and len(self.classes) <= len(theirs)
        if unknown and (numbered or (_numbered(theirs) and len(self.classes) == len(theirs))):
            return replace(self, classes=theirs)
        if unknown:
            known = ", ".join(theirs[:20]) + (", ..." if len(theirs) > 20 else "")
            raise BadInput(f"class {unknown[0]!r} is none of the {len(theirs)} that the classifier knows: {known}")
        if len(set(theirs)) < len(theirs) or len(set(self.classes)) < len(self.classes):
            raise BadInput(
                "classes of one name cannot be matched with those of the classifier: give each a name of its own"
            )
        number = torch.tensor([theirs.index(name) for name in self.classes])
        return replace(self, labels=number[self.labels], classes=theirs)

    def divided(self, fraction: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
        """(the larger part, the held-out ``fraction``), drawn by ``seed``. Raises BadInput where either would be empty."""
        held = round(fraction * len(self))
        if not 0 < held < len(self):
            raise BadInput(
                f"a fraction {fraction:g} of {len(self)} images cannot be held out: nothing would be left in a part"
            )
        order = torch.randperm(len(self), generator=generator("validation split", seed))
        return self[order[held:]], self[order[:held]]


def load_images(source: str | Path, split: Split, root: Path | str = ".") -> LabelledImages:
    """The ``split`` ("train" or "test") of a data set.

    ``source`` is a name ("cifar10", "cifar100", "mnist", "fashion-mnist": files already in the folder ``root``, otherwise
    torchvision's download into it; "digits": scikit-learn's 8x8 digits, which need no files), an .npz, or a folder of images
    with a folder for each class (in ``train/`` and ``test/``), both relative to ``root``.

    An .npz holds uint8 arrays x_train, y_train, x_test, y_test, images (N, H, W), (N, H, W, C) or (N, C, H, W), and optionally
    ``classes``, their names. For a name, root/NAME.npz is taken first, if it is there. Raises BadInput.
    """
    if split not in ("train", "test"):
        raise BadInput(f"split {split!r}: there are 'train' and 'test'")
    root, name = Path(root), str(source)
    if name in NAMED:
        stored = root / f"{name}.npz"
        return _npz(stored, split, CLASSES.get(name)) if stored.is_file() else NAMED[name](root, split)
    path = root / name
    if path.suffix == ".npz":
        return _npz(path, split, None)
    if path.is_dir():
        return _folder(path, split)
    raise BadInput(f"{source}: no data set of that name ({', '.join(NAMED)}), and {path} is no .npz file and no folder")


# ------------------------------------------------------------------------------------------------------------------ sources

CLASSES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "mnist": tuple(map(str, range(10))),
    "fashion-mnist": (
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    ),
}  # fmt: skip


def _numbered(classes: Sequence[str]) -> bool:
    return list(classes) == [str(i) for i in range(len(classes))]


def _npz(path: Path, split: Split, classes: Sequence[str] | None) -> LabelledImages:
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = (f"x_{split}", f"y_{split}")
            if missing := [key for key in keys if key not in file]:
                raise BadInput(f"{path}: holds no {' and no '.join(missing)}, only {', '.join(file.files)}")
            images, labels = (file[key] for key in keys)
            if "classes" in file:
                classes = [str(name) for name in file["classes"]]
            elif classes is None:  # as many as the labels of both splits tell
                both = [file[key] for key in ("y_train", "y_test") if key in file]
                most = max(
                    (int(each.max(initial=0)) for each in both if np.issubdtype(each.dtype, np.integer)), default=0
                )
                classes = [str(i) for i in range(most + 1)]
    except BadInput:
        raise
    except Exception as error:  # whatever zip and numpy make of a damaged file
        raise BadInput(f"{path}: not a readable .npz of arrays ({error})") from error
    try:
        return _labelled(images, labels, classes)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error


def _labelled(images: np.ndarray, labels: np.ndarray, classes: Sequence[str] | None) -> LabelledImages:
    if images.dtype != np.uint8:
        raise BadInput(f"images of type {images.dtype}: store whole numbers from 0 to 255 (uint8)")
    if not np.issubdtype(labels.dtype, np.integer):
        raise BadInput(f"labels of type {labels.dtype}: store whole numbers, the indices of the classes")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim == 4 and images.shape[-1] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    labels = labels.astype(np.int64).reshape(-1)
    if classes is None:
        classes = [str(i) for i in range(int(labels.max(initial=0)) + 1)]
    return LabelledImages(
        torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels), tuple(map(str, classes))
    )


def _idx(folder: Path, stem: str) -> np.ndarray | None:
    """The array of a file in MNIST's format, plain or compressed; None if it is not there."""
    for path, opened in ((folder / stem, open), (folder / f"{stem}.gz", gzip.open)):
        if path.is_file():
            try:
                with opened(path, "rb") as file:
                    content = file.read()
                sizes = np.frombuffer(content, ">i4", content[3], 4)
                return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(sizes).copy()
            except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
                raise BadInput(f"{path}: damaged, or no file of MNIST's format ({error}); fetch it again") from error
    return None


def _mnist(name: str, torchvision_name: str) -> Callable[[Path, Split], LabelledImages]:
    def read(root: Path, split: Split) -> LabelledImages:
        stem = "train" if split == "train" else "t10k"
        for folder in (root, root / name, root / torchvision_name / "raw"):
            images, labels = _idx(folder, f"{stem}-images-idx3-ubyte"), _idx(folder, f"{stem}-labels-idx1-ubyte")
            if images is not None and labels is not None:
                return _labelled(images, labels, CLASSES[name])
        return _torchvision(torchvision_name, CLASSES[name])(root, split)

    return read


def _torchvision(name: str, classes: Sequence[str] | None = None) -> Callable[[Path, Split], LabelledImages]:
    def read(root: Path, split: Split) -> LabelledImages:
        from torchvision import datasets

        if not root.is_dir():
            raise BadInput(
                f"there is no folder {str(root)!r}: name the one that holds {name}, or make it, to download that into it"
            )
        try:
            data: Any = getattr(datasets, name)(root, train=split == "train", download=True)
        except Exception as error:  # no network, a damaged archive, a folder that cannot be written
            raise BadInput(f"{name} is not in {root} and could not be downloaded there ({error})") from error
        return _labelled(np.asarray(data.data), np.asarray(data.targets), classes or data.classes)

    return read


DIGITS_TESTED = 360
"""Of the 1,797 digits, so many are the test split."""


def _digits(root: Path, split: Split) -> LabelledImages:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    order = torch.randperm(len(images), generator=generator("digits")).numpy()
    chosen = order[:DIGITS_TESTED] if split == "test" else order[DIGITS_TESTED:]
    return _labelled(images[chosen], digits.target[chosen], [str(i) for i in range(10)])


def _folder(path: Path, split: Split) -> LabelledImages:
    from torchvision.datasets import ImageFolder

    folder = path / split
    try:
        found = ImageFolder(str(folder))
    except (OSError, FileNotFoundError) as error:
        raise BadInput(f"{folder}: a folder of images for each class is expected there ({error})") from error
    images = [read_photo(Path(file), 3) for file, _ in found.samples]
    for (file, _), image in zip(found.samples, images, strict=True):
        if image.shape != images[0].shape:
            sizes = [f"{i.shape[-1]}x{i.shape[-2]}" for i in (image, images[0])]
            raise BadInput(f"{file} is {sizes[0]}, but the first image is {sizes[1]}: bring all to one size first")
    return LabelledImages(torch.stack(images), torch.tensor(found.targets), tuple(found.classes))


NAMED: dict[str, Callable[[Path, Split], LabelledImages]] = {
    "cifar10": _torchvision("CIFAR10", CLASSES["cifar10"]),
    "cifar100": _torchvision("CIFAR100"),
    "mnist": _mnist("mnist", "MNIST"),
    "fashion-mnist": _mnist("fashion-mnist", "FashionMNIST"),
    "digits": _digits,
}
"""The data sets that have a name."""
