"""Photographs, patches and the denoising task."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from nonexpansive.errors import BadInput
from nonexpansive.train.config import Run
from nonexpansive.train.data import Patches, PhotoFolder, generator, prefetch, read_names
from nonexpansive.train.tasks import DenoiseTask, build_task


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for index, extension in enumerate(("png", "tif", "png")):
        pixels = random.integers(0, 256, (40 + index, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.{extension}")
    (tmp_path / "notes.txt").write_text("not a photograph")
    return tmp_path


def photos(count: int = 3, channels: int = 3) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (channels, 40, 52), generator=random, dtype=torch.uint8) for _ in range(count)]


def task(seed: int = 0, **settings) -> DenoiseTask:
    return DenoiseTask(photos(), photos(1), patch=16, levels=(10, 25), seed=seed, **settings)


def test_folder_reads_colour_and_grey(folder: Path) -> None:
    colour, grey = PhotoFolder(folder, 3), PhotoFolder(folder, 1)
    assert colour.names == ["0.png", "1.tif", "2.png"] and colour[1].shape == (3, 41, 50)
    luma = (colour[0].double() * torch.tensor([0.2989, 0.5870, 0.1140]).double()[:, None, None]).sum(0).round()
    assert torch.equal(grey[0][0].double(), luma)


def test_folder_selects_and_excludes_by_name(folder: Path) -> None:
    (folder / "names").write_text("0\n2.png\n")
    names = read_names(folder / "names")
    assert names == read_names(str(folder / "names")) == {"0", "2"}
    assert PhotoFolder(folder, select=names).names == ["0.png", "2.png"]
    assert PhotoFolder(folder, exclude=names).names == ["1.tif"]
    assert PhotoFolder(folder, limit=2).names == ["0.png", "1.tif"]
    with pytest.raises(BadInput, match=r"missing.*'9'"):
        PhotoFolder(folder, select={"0", "9"})


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 256, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert PhotoFolder(tmp_path)[0][0].tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\nrubbish"])
def test_unreadable_photograph_is_named(folder: Path, content: bytes) -> None:
    (folder / "broken.png").write_bytes(content)
    with pytest.raises(BadInput, match=r"broken\.png: not a readable image"):
        PhotoFolder(folder)


def test_decompression_bomb_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    with pytest.raises(BadInput, match=r"0\.png"):
        PhotoFolder(folder)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        PhotoFolder(tmp_path / "none")
    with pytest.raises(BadInput, match="no photograph"):
        PhotoFolder(tmp_path)


def test_patches_are_all_places_and_symmetries() -> None:
    photo = torch.arange(3 * 3, dtype=torch.uint8).reshape(1, 3, 3)
    patches = Patches([photo], 2)
    seen = {tuple(patches.draw(generator("test", index)).flatten().tolist()) for index in range(600)}
    assert len(seen) == 4 * 8  # 4 places, 8 symmetries, no two alike
    whole = {tuple(Patches([photo], 3).draw(generator("test", index)).flatten().tolist()) for index in range(200)}
    assert len(whole) == 8


def test_photograph_smaller_than_a_patch(folder: Path) -> None:
    with pytest.raises(BadInput, match=r"0\.png is 40x50, smaller than a patch of 41x41"):
        Patches(PhotoFolder(folder), 41)


def test_batch_is_a_pure_function_of_seed_step_and_row() -> None:
    whole = task().batch(7, range(8))
    task().batch(3, range(2))
    for parts in zip(whole, task().batch(7, range(4)), task().batch(7, range(4, 8)), strict=True):
        assert torch.equal(parts[0], torch.cat(parts[1:]))
    for other in (task().batch(8, range(8)), task(seed=1).batch(7, range(8))):
        assert not any(torch.equal(a, b) for a, b in zip(whole, other, strict=True))


def test_batch_adds_unclipped_noise_of_the_stated_level() -> None:
    clean, noisy, sigma = task(sigma=(20.0, 50.0)).batch(0, range(64))
    assert clean.min() >= 0 and clean.max() <= 1 and noisy.min() < 0 and noisy.max() > 1
    assert (sigma >= 20 / 255).all() and (sigma <= 50 / 255).all() and sigma.std() > 5 / 255
    noise = (noisy - clean) / sigma[:, None, None, None]
    count = noise.numel()
    assert abs(noise.mean().item()) < 5 / math.sqrt(count)
    assert abs(noise.square().mean().item() - 1) < 5 * math.sqrt(2 / count)


class Identity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == noisy.shape[:1]
        return noisy * self.weight


def test_loss_balances_levels_and_photographs_and_validation_is_fixed() -> None:
    problem = task(sigma=(25.0, 25.0))
    batch = problem.batch(0, range(32))
    squares = (batch[1] - batch[0]).square().mean((1, 2, 3))
    torch.testing.assert_close(problem.loss(Identity(), batch), squares.sqrt().mean() / (25 / 255) ** 0.75)
    of_squares = task(sigma=(25.0, 25.0), loss="mse").loss(Identity(), batch)
    torch.testing.assert_close(of_squares, squares.mean() / (25 / 255) ** 1.5)
    with torch.no_grad():
        metrics = problem.validate(Identity())
    assert tuple(metrics) == problem.metrics == ("psnr", "psnr_10", "psnr_25")
    assert abs(metrics["psnr_25"] + 20 * math.log10(25 / 255)) < 0.3
    with torch.no_grad():
        assert metrics == task(seed=5).validate(Identity())


def test_task_from_a_run(folder: Path) -> None:
    (folder / "train").mkdir()
    for file in folder.glob("*.*"):
        if file.suffix != ".txt":
            file.rename(folder / "train" / file.name)
    (folder / "tests").write_text("0 1")
    data = {"validation": "train", "exclude": "tests", "channels": 1, "patch": 8}
    run = Run.from_dict({"task": "denoise", "model": {"name": "any"}, "data": data})
    problem = build_task(run, folder)
    assert isinstance(problem, DenoiseTask)
    assert problem.batch(0, range(2))[0].shape == (2, 1, 8, 8)
    assert [photo.shape for photo in problem.held_out] == [(1, 42, 50)]


def test_prefetch_keeps_order_and_passes_errors() -> None:
    assert list(prefetch(lambda step: step**2, range(3, 6))) == [(3, 9), (4, 16), (5, 25)]
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda step: 1 // (2 - step), range(5)))


def test_a_batch_takes_milliseconds() -> None:
    """A step of 16 to 32 patches of 64x64 takes 100 ms or more; the data is to stay under a twentieth of that."""
    problem = DenoiseTask(photos(), photos(1), patch=32)
    times = []
    for step in range(10):
        start = time.perf_counter()
        problem.batch(step, range(32))
        times.append(time.perf_counter() - start)
    assert min(times) < 0.02
