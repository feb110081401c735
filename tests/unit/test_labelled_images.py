"""Labelled images from every source, and the task of classifying them: what is refused, what a batch is, what the loss is."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nonexpansive.errors import BadInput, Refused
from nonexpansive.nn.models import build
from nonexpansive.train import ClassifyData, ClassifyTask, LabelledImages, Run, build_task, load_images
from nonexpansive.train.images import CLASSES, DIGITS_TESTED, NAMED
from nonexpansive.train.tasks import augmented

torch.set_num_threads(1)


def random_images(
    count: int = 30, shape: tuple[int, ...] = (1, 6, 6), classes: int = 3, seed: int = 0
) -> LabelledImages:
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, *shape), generator=random, dtype=torch.uint8)
    labels = torch.arange(count) % classes
    return LabelledImages(images, labels, tuple(f"class {i}" for i in range(classes)))


# ------------------------------------------------------------------------------------------------------------------ the value


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"images": torch.zeros(3, 1, 4, 4)}, "uint8"),
        ({"images": torch.zeros(3, 4, 4, dtype=torch.uint8)}, "C = 1 or 3"),
        ({"images": torch.zeros(3, 2, 4, 4, dtype=torch.uint8)}, "C = 1 or 3"),
        ({"images": torch.zeros(0, 1, 4, 4, dtype=torch.uint8), "labels": torch.zeros(0, dtype=torch.int64)}, "N ≥ 1"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "one label an image"),
        ({"labels": torch.zeros(3)}, "whole numbers"),
        ({"labels": torch.tensor([0, 1, 2])}, "labels from 0 to 2 for 2 classes"),
        ({"labels": torch.tensor([-1, 0, 1])}, "labels from -1"),
    ],
)
def test_what_is_no_set_of_labelled_images_is_refused(changes: dict[str, Any], says: str) -> None:
    fields = {
        "images": torch.zeros(3, 1, 4, 4, dtype=torch.uint8),
        "labels": torch.zeros(3, dtype=torch.int64),
        "classes": ("a", "b"),
    }
    LabelledImages(**fields)
    with pytest.raises(BadInput, match=says):
        LabelledImages(**(fields | changes))


def test_division_is_a_partition_that_the_seed_decides() -> None:
    images = random_images(50)
    parts = images.divided(0.2, seed=3)
    assert [len(part) for part in parts] == [40, 10]
    together = torch.cat([part.images for part in parts]).flatten(1)
    assert torch.equal(together.unique(dim=0), images.images.flatten(1).unique(dim=0))
    again, other = images.divided(0.2, seed=3), images.divided(0.2, seed=4)
    assert all(
        torch.equal(p.images, q.images) and torch.equal(p.labels, q.labels) for p, q in zip(parts, again, strict=True)
    )
    assert not torch.equal(parts[1].images, other[1].images)
    for fraction in (0.001, 0.999):
        with pytest.raises(BadInput, match="cannot be held out"):
            images.divided(fraction, 0)


# ---------------------------------------------------------------------------------------------------------------- the sources


def written_npz(path: Path, **changes: Any) -> Path:
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "x_train": random.integers(0, 256, (9, 5, 4, 3), dtype=np.uint8),
        "y_train": np.arange(9, dtype=np.uint8).reshape(9, 1) % 3,
        "x_test": random.integers(0, 256, (3, 5, 4, 3), dtype=np.uint8),
        "y_test": np.arange(3),
    } | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_an_npz_is_read_in_each_layout(tmp_path: Path) -> None:
    last = np.load(written_npz(tmp_path / "a.npz"))["x_train"]
    images = load_images("a.npz", "train", tmp_path)
    assert images.shape == (3, 5, 4) and images.classes == ("0", "1", "2")
    assert torch.equal(images.images, torch.from_numpy(last).permute(0, 3, 1, 2))
    assert images.labels.tolist() == [0, 1, 2] * 3
    assert len(load_images("a.npz", "test", tmp_path)) == 3
    written_npz(tmp_path / "first.npz", x_train=np.ascontiguousarray(last.transpose(0, 3, 1, 2)))
    assert torch.equal(load_images("first.npz", "train", tmp_path).images, images.images)
    written_npz(tmp_path / "grey.npz", x_train=last[..., 0], classes=np.array(["x", "y", "z"]))
    grey = load_images("grey.npz", "train", tmp_path)
    assert torch.equal(grey.images, images.images[:, :1]) and grey.classes == ("x", "y", "z")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x_train": np.zeros((9, 5, 4, 3))}, "uint8"),
        ({"y_train": np.zeros(9)}, "whole numbers"),
        ({"y_train": None}, "no y_train"),
        ({"y_train": np.zeros(8, dtype=np.int64)}, "one label an image"),
        ({"x_train": np.zeros((9, 5, 4, 2), dtype=np.uint8)}, "C = 1 or 3"),
        ({"classes": np.array(["a", "b"])}, "for 2 classes"),
    ],
)
def test_a_wrong_npz_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    written_npz(tmp_path / "wrong.npz", **changes)
    with pytest.raises(BadInput, match=says) as refusal:
        load_images("wrong.npz", "train", tmp_path)
    assert "wrong.npz" in str(refusal.value)


def test_a_damaged_npz_is_refused(tmp_path: Path) -> None:
    path = written_npz(tmp_path / "cut.npz")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BadInput, match=r"cut\.npz: not a readable"):
        load_images("cut.npz", "train", tmp_path)


def test_classes_of_both_splits_count_where_there_are_no_names(tmp_path: Path) -> None:
    x = np.zeros((4, 5, 5), np.uint8)
    np.savez(tmp_path / "own.npz", x_train=x, y_train=np.array([0, 1, 2, 3]), x_test=x, y_test=np.array([0, 1, 2, 2]))
    assert load_images("own.npz", "test", tmp_path).classes == load_images("own.npz", "train", tmp_path).classes


def test_labels_are_renumbered_by_name() -> None:
    x = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    images = LabelledImages(x, torch.tensor([0, 1, 1]), ("dog", "cat"))
    there = images.among(("bird", "cat", "dog"))
    assert there.labels.tolist() == [2, 1, 1] and there.classes == ("bird", "cat", "dog")
    with pytest.raises(BadInput, match="'dog' is none of the 2"):
        images.among(("bird", "cat"))
    # without names, by number
    numbered = replace(images, classes=("0", "1")).among(("bird", "cat", "dog"))
    assert numbered.labels.tolist() == [0, 1, 1] and numbered.classes == ("bird", "cat", "dog")
    with pytest.raises(BadInput, match="none of the 1"):
        replace(images, classes=("0", "1")).among(("bird",))
    assert images.among(("0", "1")).labels.tolist() == [0, 1, 1]  # the classifier knows none
    with pytest.raises(BadInput, match="'dog' is none of the 3"):
        images.among(("0", "1", "2"))
    # of one name, but of one order
    twice = replace(images, classes=("crane", "crane"))
    assert twice.among(("crane", "crane")).labels.tolist() == [0, 1, 1]
    with pytest.raises(BadInput, match="a name of its own"):
        twice.among(("crane", "bird"))


def test_labels_that_are_no_numbers_are_told_as_such(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x_train=np.zeros((4, 5, 5), np.uint8), y_train=np.zeros(4))
    with pytest.raises(BadInput, match="labels of type float64"):
        load_images("own.npz", "train", tmp_path)


def test_a_named_set_is_taken_from_an_npz_of_that_name_first(tmp_path: Path) -> None:
    written_npz(tmp_path / "cifar10.npz")
    images = load_images("cifar10", "test", tmp_path)
    assert len(images) == 3 and images.classes == CLASSES["cifar10"]


def idx(array: np.ndarray) -> bytes:
    """A uint8 array in MNIST's file format: two zeros, the type 8, the number of axes, their sizes in big-endian, the values."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.mark.parametrize("folder", [".", "fashion-mnist", "FashionMNIST/raw"])
@pytest.mark.parametrize("compressed", [False, True])
def test_files_of_mnist_are_found_where_they_lie(tmp_path: Path, folder: str, compressed: bool) -> None:
    images = np.arange(2 * 5 * 7, dtype=np.uint8).reshape(2, 5, 7)
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for stem, array in (("images-idx3", images), ("labels-idx1", np.array([9, 0], dtype=np.uint8))):
        path = tmp_path / folder / f"t10k-{stem}-ubyte{'.gz' if compressed else ''}"
        path.write_bytes(gzip.compress(idx(array)) if compressed else idx(array))
    found = load_images("fashion-mnist", "test", tmp_path)
    assert torch.equal(found.images[:, 0], torch.from_numpy(images))
    assert [found.classes[i] for i in found.labels] == ["ankle boot", "T-shirt/top"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\x08\x03",
        gzip.compress(idx(np.zeros((2, 3, 3), np.uint8)))[:-9],
        gzip.compress(b"")[:10] + b"\xff" * 20,
    ],
    ids=[
        "empty",
        "header alone",
        "cut short",
        "no deflated stream",
    ],  # the compressed bytes hold the time, and workers must agree on names
)
def test_a_damaged_file_of_mnist_is_refused(tmp_path: Path, content: bytes) -> None:
    name = "train-images-idx3-ubyte" + (".gz" if content[:2] == b"\x1f\x8b" else "")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"{name}: damaged"):
        load_images("mnist", "train", tmp_path)


def test_a_set_that_is_not_there_and_cannot_be_had_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets", reason="needs torchvision, of the extra nonexpansive[app]")

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    for name in ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST"):
        monkeypatch.setattr(datasets, name, offline)
    for name in set(NAMED) - {"digits"}:
        with pytest.raises(BadInput, match="could not be downloaded"):
            load_images(name, "train", tmp_path)


def test_torchvisions_sets_keep_their_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets", reason="needs torchvision, of the extra nonexpansive[app]")

    class Stored:
        classes = ("bee", "tank")

        def __init__(self, root: Path, train: bool, download: bool) -> None:
            assert (root, download) == (tmp_path, True)
            self.data, self.targets = (
                np.full((4 if train else 2, 8, 8, 3), 7, np.uint8),
                [1, 0, 1, 0][: 4 if train else 2],
            )

    monkeypatch.setattr(datasets, "CIFAR100", Stored)
    images = load_images("cifar100", "train", tmp_path)
    assert images.classes == Stored.classes and images.labels.tolist() == [1, 0, 1, 0] and images.shape == (3, 8, 8)
    assert len(load_images("cifar100", "test", tmp_path)) == 2


def test_the_digits_need_no_files_and_their_splits_are_apart(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn, which ships the digits")
    train, test = (load_images("digits", split, tmp_path / "nowhere") for split in ("train", "test"))
    assert (len(train), len(test)) == (1797 - DIGITS_TESTED, DIGITS_TESTED) and train.shape == (1, 8, 8)
    everything = torch.cat((train.images, test.images)).flatten(1)
    from sklearn.datasets import load_digits

    whole = torch.from_numpy(np.rint(load_digits().images * (255 / 16)).astype(np.uint8)).flatten(1)  # type: ignore
    ordered = [torch.tensor(sorted(map(tuple, images.tolist()))) for images in (everything, whole)]
    assert torch.equal(*ordered)


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="needs torchvision, of the extra nonexpansive[app]")
    for split, count in (("train", 2), ("test", 1)):
        for label, name in enumerate(("ant", "bee")):
            folder = tmp_path / "insects" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((4, 6, 3), 100 * label + i, np.uint8)).save(folder / f"{i}.png")
    images = load_images("insects", "train", tmp_path)
    assert images.classes == ("ant", "bee") and images.labels.tolist() == [0, 0, 1, 1] and images.shape == (3, 4, 6)
    assert images.images[:, 0, 0, 0].tolist() == [0, 1, 100, 101]
    assert len(load_images(str(tmp_path / "insects"), "test")) == 2
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(tmp_path / "insects" / "train" / "bee" / "2.png")
    with pytest.raises(BadInput, match="6x5, but the first image is 6x4"):
        load_images("insects", "train", tmp_path)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for name in ("empty", "insects/train"):  # no class, and no split, of that name in it
        with pytest.raises(BadInput, match="a folder of images for each class"):
            load_images(name, "train", tmp_path)


def test_unknown_names_and_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no data set of that name \(cifar10"):
        load_images("imagenet", "train", tmp_path)
    with pytest.raises(BadInput, match="'train' and 'test'"):
        load_images("digits", "validation", tmp_path)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------------ the task


def make_task(size: int = 8, **data: Any) -> ClassifyTask:
    return ClassifyTask(random_images(20), random_images(10, seed=1), ClassifyData(**data), size, seed=5)


def test_a_batch_is_a_pure_function_and_equal_over_shares() -> None:
    task, other = (make_task(crop=2, flip=True, erase=(0.1, 0.3)) for _ in range(2))
    for step in (0, 2, 7):
        images, labels = task.batch(step, range(8))
        other.batch(step + 1, range(8))
        assert all(torch.equal(a, b) for a, b in zip((images, labels), other.batch(step, range(8)), strict=True))
        shares = [task.batch(step, range(first, first + 2)) for first in range(0, 8, 2)]
        assert torch.equal(torch.cat([share[0] for share in shares]), images)
        assert torch.equal(torch.cat([share[1] for share in shares]), labels)
    assert not torch.equal(task.batch(0, range(8))[0], task.batch(1, range(8))[0])


def test_each_epoch_shows_each_image_once() -> None:
    task = make_task()
    rows = [task.batch(step, range(8)) for step in range(5)]  # two epochs of 20
    shown = torch.cat([images for images, _ in rows]).mul(255).round().to(torch.uint8).flatten(1)
    labels = torch.cat([labels for _, labels in rows])
    place = {tuple(image): i for i, image in enumerate(task.train.images.flatten(1).tolist())}
    order = [place[tuple(image)] for image in shown.tolist()]
    assert sorted(order[:20]) == sorted(order[20:]) == list(range(20))
    assert order[:20] != order[20:]
    assert torch.equal(labels, task.train.labels[torch.tensor(order)])


def test_values_are_in_the_unit_interval() -> None:
    images, _ = make_task().batch(0, range(8))
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1


def test_shifts_and_mirrors_are_those_of_their_random_numbers() -> None:
    images = random_images(200, (3, 5, 6)).images
    random = torch.rand(200, 8, generator=torch.Generator().manual_seed(2))
    changed = augmented(images, random, ClassifyData(crop=2, flip=True))
    seen = set()
    for before, after, u in zip(images, changed, random, strict=True):
        down, right = int(u[1] * 5) - 2, int(u[2] * 5) - 2
        before = F.pad(before, [2] * 4)[:, 2 + down : 7 + down, 2 + right : 8 + right]
        assert torch.equal(after, before.flip(-1) if u[0] < 0.5 else before)
        seen.add((down, right))
    assert len(seen) == 25


def test_erasure_blackens_one_rectangle_of_the_share_that_was_asked_for_in_half_of_the_images() -> None:
    images = torch.full((400, 1, 40, 40), 200, dtype=torch.uint8)
    random = torch.rand(400, 8, generator=torch.Generator().manual_seed(3))
    black = (augmented(images, random, ClassifyData(erase=(0.1, 0.2))) == 0)[:, 0]
    hit = black.flatten(1).any(1)
    assert torch.equal(hit, random[:, 7] < 0.5)
    for rectangle in black[hit]:
        rows, columns = rectangle.any(1).nonzero(), rectangle.any(0).nonzero()
        height, width = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
        assert int(rectangle.sum()) == height * width
        assert 0.08 <= height * width / 1600 <= 0.22  # the sides are rounded to whole pixels
        assert 1 / 3.8 <= height / width <= 3.8
    assert not (images == 0).any()  # the originals are left alone


class Logits(torch.nn.Module):
    """A network that gives these logits."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values

    def forward(self, x: Tensor) -> Tensor:
        return self.values[: len(x)]


def test_the_losses_are_their_formulas() -> None:
    random = torch.Generator().manual_seed(4)
    z, y = torch.randn(8, 3, generator=random), torch.randint(3, (8,), generator=random)
    batch = torch.zeros(8, 1, 6, 6), y
    xi, tau = 0.7, 0.3
    expected = torch.zeros(())
    for row, label in zip(z, y.tolist(), strict=True):
        behind = row.clone()
        behind[label] -= xi
        expected += tau * (torch.log(torch.exp(behind / tau).sum()) - behind[label] / tau) / 8
    torch.testing.assert_close(make_task(margin=xi, temperature=tau).loss(Logits(z), batch), expected)
    hinge = torch.zeros(())
    for row, label in zip(z, y.tolist(), strict=True):
        hinge += sum(max(0.0, xi - float(row[label]) + float(row[j])) for j in range(3) if j != label) / 3 / 8
    torch.testing.assert_close(make_task(loss="multi_margin", margin=xi).loss(Logits(z), batch), hinge)
    plain = make_task().loss(Logits(z), batch)
    torch.testing.assert_close(plain, F.cross_entropy(z, y))


def test_with_a_radius_the_loss_takes_the_bounds_near_the_images() -> None:
    torch.manual_seed(1)
    stages = [{"unshuffle": 2, "channels": 8, "kernels": [3]}]
    net = build("flow_classifier", shape=[1, 6, 6], classes=3, stages=stages, sorting=False)
    batch = torch.rand(8, 1, 6, 6), torch.arange(8) % 3
    plain, near = (make_task(near=radius).loss(net, batch) for radius in (0.0, 0.1))
    torch.testing.assert_close(near, F.cross_entropy(net(*batch, 0.1), batch[1]), rtol=1e-3, atol=1e-4)
    assert float(near.detach()) < float(plain.detach())  # a rival counts less where the margin falls more slowly
    near.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    with pytest.raises(Refused, match="known through Conv2d"):
        make_task(near=0.1).loss(
            build("paper_classifier", shape=[1, 8, 8], classes=3), (torch.rand(2, 1, 8, 8), batch[1][:2])
        )
    with pytest.raises(BadInput, match="near"):
        ClassifyData(near=-1.0)


def test_validation_counts_what_is_right_and_what_is_right_with_a_radius() -> None:
    torch.manual_seed(1)
    net = build(
        "flow_classifier", shape=[1, 6, 6], classes=3, stages=[{"unshuffle": 2, "channels": 4, "kernels": [3]}]
    ).eval()
    held_out = random_images(600, seed=1)
    with torch.no_grad():
        z = net(held_out.images / 255)
    rows = net.head.weight.detach()  # type: ignore[union-attr, operator]
    best, answer = z.max(1)
    radii = torch.stack(
        [((best - z[:, j]) / (rows[answer] - rows[j]).norm(dim=1)).where(answer != j, torch.inf) for j in range(3)]
    )
    right = answer == held_out.labels
    shares = []
    for radius in (0.0, 0.02, 0.1, 5.0):
        task = ClassifyTask(random_images(), held_out, ClassifyData(radius=radius), 8)
        with torch.no_grad():
            metrics = task.validate(net)
        assert metrics["clean"] == pytest.approx(float(right.float().mean()), abs=2 / 600)
        assert metrics["certified"] == pytest.approx(
            float((right & (radii.amin(0) > radius)).float().mean()), abs=2 / 600
        )
        assert metrics["certified_3"] <= metrics["certified_2"] <= metrics["certified"] <= metrics["clean"]
        shares.append(metrics["certified"])
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[2] and shares[3] == 0


def test_a_run_decides_the_task_and_what_the_data_decide_of_the_model(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x, y = random.integers(0, 256, (40, 8, 8), dtype=np.uint8), np.arange(40) % 4
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=x, y_test=y, classes=np.array(list("abcd")))
    values = {
        "task": "classify",
        "model": {"name": "flow_classifier"},
        "data": {"source": "set.npz", "validation": 0.25, "limit": 20},
        "train": {"batch": 10},
    }
    task = build_task(Run.from_dict(values), tmp_path)
    assert isinstance(task, ClassifyTask)
    assert (len(task.train), len(task.held_out), task.size) == (20, 10, 10)
    assert task.model_settings == {"shape": [1, 8, 8], "classes": ["a", "b", "c", "d"]}
    values["data"] |= {"limit": 31}  # type: ignore[operator]
    with pytest.raises(BadInput, match="only 30 images are left"):
        build_task(Run.from_dict(values), tmp_path)


def test_images_held_out_must_be_of_the_same_size() -> None:
    with pytest.raises(BadInput, match=r"\(1, 6, 6\), those held out \(1, 6, 7\)"):
        ClassifyTask(random_images(), random_images(shape=(1, 6, 7)), ClassifyData(), 8)
