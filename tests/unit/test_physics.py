from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nonexpansive.errors import BadInput, Refused
from nonexpansive.restore.likelihood import Poisson
from nonexpansive.restore.operators import forward_model
from nonexpansive.restore.physics import Blurring, Boundary, blur, degrade, image_shape, kernel, noise_level

pytest.importorskip("deepinv")

SPECS = [
    "gaussian:1.6",
    "gaussian:0.05",
    "disk:3.5",
    "disk:0.2",
    "box:9",
    "motion:15,30",
    "motion:0,0",
    "shake:27,seed=3",
]
SHAPES = [(3, 3), (4, 4), (2, 5), (9, 8), (1, 1), (5, 2)]


def centroid(k: torch.Tensor) -> tuple[float, float]:
    """Of the kernel's mass, from the centre k[h//2, w//2]."""
    rows, columns = (torch.arange(n).double() - n // 2 for n in k.shape)
    return float((k.double().sum(1) * rows).sum()), float((k.double().sum(0) * columns).sum())


@pytest.mark.parametrize("spec", SPECS)
def test_kernels_are_averages_about_their_centre(spec: str) -> None:
    k = kernel(spec)
    assert k.dtype == torch.float32 and k.ndim == 2 and k.shape[0] % 2 == k.shape[1] % 2 == 1
    assert (k >= 0).all() and abs(k.double().sum() - 1) < 1e-6
    if not spec.startswith("shake"):
        assert max(map(abs, centroid(k))) < 1e-6
        torch.testing.assert_close(k, k.flip(0, 1))


def test_kernels_have_their_size() -> None:
    assert kernel("gaussian:1.6").shape == (11, 11)
    i = torch.arange(-5, 6).double()
    assert abs(float((kernel("gaussian:1.6").double().sum(0) * i**2).sum()) - 1.6**2) < 0.05
    assert torch.equal(kernel("box:3"), torch.full((3, 3), 1 / 9))
    disk = kernel("disk:10").double()
    assert abs(float(1 / disk.max()) - math.pi * 100) < 1  # each whole pixel has 1/area
    assert kernel("motion:15,0").shape == (1, 17) and kernel("motion:15,90").shape == (17, 1)
    up_right = kernel("motion:9,45")
    assert up_right[0, -1] + up_right[1, -2] > 0 and up_right[0, 0] == 0  # anticlockwise: row 0 is the top
    assert torch.equal(kernel("shake:15,seed=3"), kernel("shake:15,3"))
    assert not torch.equal(kernel("shake:15,seed=3"), kernel("shake:15,seed=4"))


@pytest.mark.parametrize(
    "spec",
    ["", "gaussian", "gaussian:", "gaussian:x", "gaussian:-1", "gaussian:nan", "gaussian:1,2", "gaussian:1e9", "disk:0",
     "box:4", "box:2.5", "box:99999", "motion:15", "motion:-1,0", "motion:5,inf", "shake:9", "shake:9,seed=x",
     "shake:9,seed=-1", "shake:8,seed=1", "nonsense:1", "missing.npy", "file.txt"],
)  # fmt: skip
def test_bad_specs_are_refused(spec: str) -> None:
    with pytest.raises(BadInput, match="kernel"):
        kernel(spec)


def test_kernel_files(tmp_path: Path) -> None:
    values = np.arange(6.0).reshape(2, 3)
    np.save(tmp_path / "k.npy", values)
    np.savetxt(tmp_path / "k.csv", values, delimiter=",")
    Image.fromarray((values * 10).astype(np.uint8)).save(tmp_path / "k.png")
    Image.fromarray((values * 1000).astype(np.uint16)).save(tmp_path / "k.tiff")
    for name in ("k.npy", "k.csv", "k.png", "k.tiff"):
        torch.testing.assert_close(kernel(str(tmp_path / name)), torch.from_numpy(values / 15).float())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[1, np.nan]]), "NaN"),
        (np.array([[1.0, -1e-9]]), "negative"),
        (np.zeros((3, 3)), "zero everywhere"),
        (np.ones(3), "matrix"),
        (np.ones((0, 3)), "matrix"),
        (np.ones((1, 2000)), "at most"),
        (np.ones((2, 2), complex), "real"),
        (np.array([["a", "b"]]), "real"),
        (np.array([[{}]]), "read"),  # a pickle
    ],
)
def test_bad_kernel_files_are_refused(tmp_path: Path, values: np.ndarray, message: str) -> None:
    np.save(tmp_path / "k.npy", values, allow_pickle=True)
    with pytest.raises(BadInput, match=message):
        kernel(str(tmp_path / "k.npy"))


def test_damaged_kernel_files_are_refused(tmp_path: Path) -> None:
    for name in ("k.npy", "k.csv", "k.png"):
        (tmp_path / name).write_bytes(b"\x93NUMPY nonsense")
        with pytest.raises(BadInput, match="read"):
            kernel(str(tmp_path / name))
    Image.new("RGB", (3, 3)).save(tmp_path / "colour.png")
    with pytest.raises(BadInput, match="grey"):
        kernel(str(tmp_path / "colour.png"))


def test_a_huge_scale_does_not_overflow(tmp_path: Path) -> None:
    np.save(tmp_path / "k.npy", np.full((9, 9), 1e308))
    torch.testing.assert_close(kernel(str(tmp_path / "k.npy")), torch.full((9, 9), 1 / 81))


def random_blur(size: tuple[int, int], boundary: Boundary, dtype: torch.dtype = torch.float64) -> Blurring:
    k = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return blur((k / k.sum()).to(dtype), (3, 11, 10), boundary)


@pytest.mark.parametrize("boundary", ["circular", "valid"])
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adjoint_and_norm(size: tuple[int, int], boundary: Boundary, dtype: torch.dtype) -> None:
    blurring = random_blur(size, boundary, dtype)
    x, y = torch.randn(2, *blurring.image_shape, dtype=dtype), torch.randn(2, *blurring.data_shape, dtype=dtype)
    ax, aty = blurring.A(x), blurring.A_adjoint(y)
    assert ax.shape == y.shape and aty.shape == x.shape and ax.dtype == aty.dtype == dtype
    scale = float(ax.norm() * y.norm() + x.norm() * aty.norm())
    assert abs(float((ax * y).sum() - (x * aty).sum())) <= (1e-14 if dtype == torch.float64 else 1e-6) * scale
    if dtype == torch.float64:
        basis = torch.eye(110, dtype=dtype).view(110, 1, 11, 10).repeat(1, 3, 1, 1)
        matrix = blurring.A(basis)[:, 0].flatten(1)
        true = float(torch.linalg.svdvals(matrix)[0])
        assert true <= blurring.norm * (1 + 1e-14)
        if boundary == "circular":
            assert blurring.norm <= true * (1 + 1e-13)
    assert blurring.lipschitz >= blurring.norm**2


@pytest.mark.parametrize("size", SHAPES)
def test_valid_is_deepinvs_valid_and_the_crop_of_circular(size: tuple[int, int]) -> None:
    from deepinv.physics import Blur

    circular, valid = random_blur(size, "circular"), random_blur(size, "valid")
    x = torch.randn(2, *valid.image_shape, dtype=torch.float64)
    oracle = Blur(filter=valid.kernel[None, None], padding="valid")
    torch.testing.assert_close(valid.A(x), oracle.A(x))
    torch.testing.assert_close(valid.A(x), valid.crop(circular.A(x)))
    y = torch.randn(2, *valid.data_shape, dtype=torch.float64)
    torch.testing.assert_close(valid.A_adjoint(y), oracle.A_adjoint(y))
    torch.testing.assert_close(valid.crop(valid.start(y)), y)
    assert image_shape(valid.data_shape, valid.kernel, "valid") == valid.image_shape


@pytest.mark.parametrize("boundary", ["circular", "valid"])
@pytest.mark.parametrize("size", [(3, 5), (4, 2)])
def test_a_point_becomes_the_kernel_in_place(size: tuple[int, int], boundary: Boundary) -> None:
    blurring = random_blur(size, boundary)
    point = torch.zeros(1, 3, 11, 10, dtype=torch.float64)
    point[..., 5, 5] = 1
    expected = torch.zeros_like(point)
    h, w = size
    top, left = 5 - h // 2, 5 - w // 2
    expected[..., top : top + h, left : left + w] = blurring.kernel
    torch.testing.assert_close(blurring.A(point), blurring.crop(expected))


def test_symbol_is_that_of_the_circular_map() -> None:
    blurring = random_blur((4, 3), "circular")
    x = torch.randn(1, *blurring.image_shape, dtype=torch.float64)
    torch.testing.assert_close(torch.fft.rfft2(blurring.A(x)), torch.fft.rfft2(x) * blurring.symbol())
    assert random_blur((4, 3), "circular", torch.float32).symbol().dtype == torch.complex64


@pytest.mark.parametrize("tau", [1e-2, 1.0, 50.0])
def test_prox_solves_its_equation(tau: float) -> None:
    blurring = random_blur((4, 5), "circular")
    z, y = torch.randn(2, 2, *blurring.image_shape, dtype=torch.float64)
    x = blurring.prox(z, y, tau)
    slope = blurring.A_adjoint(blurring.A(x) - y) + (x - z) / tau
    torch.testing.assert_close(slope, torch.zeros_like(x), atol=1e-11, rtol=0)
    with pytest.raises(ValueError, match="positive"):
        blurring.prox(z, y, 0)
    with pytest.raises(Refused, match="circular"):
        random_blur((4, 5), "valid").prox(z, y, tau)


def test_bad_kernels_and_shapes_are_refused() -> None:
    with pytest.raises(BadInput, match="larger than the picture"):
        blur(torch.ones(3, 12) / 36, (3, 11, 10))
    with pytest.raises(BadInput, match="boundary"):
        blur(torch.ones(3, 3) / 9, (3, 11, 10), "reflect")  # pyright: ignore[reportArgumentType]
    for bad in (torch.zeros(3, 3), -torch.ones(3, 3), torch.full((3, 3), math.nan)):
        with pytest.raises(BadInput, match="finite"):
            blur(bad, (3, 11, 10))
    with pytest.raises(BadInput, match="matrix"):
        blur(torch.ones(3), (3, 11, 10))
    blurring = random_blur((3, 3), "valid")
    for shape in ((3, 11, 10), (1, 3, 10, 11), (1, 1, 11, 10)):
        with pytest.raises(ValueError, match="expected"):
            blurring.A(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected"):
        blurring.A_adjoint(torch.zeros(1, 3, 11, 10, dtype=torch.float64))


@pytest.mark.parametrize(("text", "level"), [("1%", 0.01), ("0.01", 0.01), (" 2.55/255 ", 0.01), ("0", 0), ("100%", 1)])
def test_noise_levels(text: str, level: float) -> None:
    assert noise_level(text) == pytest.approx(level)


@pytest.mark.parametrize("text", ["", "x", "10", "-1%", "nan", "inf", "1/0", "1%/255", "1/2/3", "200%"])
def test_bad_noise_levels_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"2\.55/255"):
        noise_level(text)


@pytest.mark.parametrize("boundary", ["circular", "valid"])
def test_degrade(boundary: Boundary) -> None:
    blurring = blur(kernel("box:3"), (3, 64, 64), boundary)
    x = torch.rand(1, 3, 64, 64)
    noise = degrade(x, blurring, 0.1, seed=1) - blurring.A(x)
    assert abs(float(noise.std()) - 0.1) < 0.004 and abs(float(noise.mean())) < 0.004
    expected = 0.1 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(noise, expected, atol=1e-6, rtol=0)
    assert torch.equal(degrade(x, blurring, 0.1, seed=1), degrade(x, blurring, 0.1, seed=1))
    torch.testing.assert_close(degrade(x, blurring, 0.0), blurring.A(x))
    assert degrade(torch.ones_like(x), blurring, 0.1).max() > 1.1  # not clipped
    with pytest.raises(BadInput, match="finite"):
        degrade(x, blurring, -0.1)
    for noise in (np.float32(0.1), torch.tensor(0.1)):
        torch.testing.assert_close(degrade(x, blurring, noise, seed=1), degrade(x, blurring, 0.1, seed=1))
    with pytest.raises(BadInput, match="one number"):
        degrade(x, blurring, torch.ones(2))


def test_photons_have_the_mean_and_variance_of_their_gain() -> None:
    blurring = blur(kernel("box:3"), (1, 128, 128))
    x = torch.full((1, 1, 128, 128), 0.5)
    for noise in (0.0, 0.1):
        photons = Poisson(0.02, noise=noise)
        y = degrade(x, blurring, photons, seed=2)
        assert abs(float(y.mean()) - 0.5) < 0.005  # six standard deviations of the mean
        assert float(y.var()) == pytest.approx(0.02 * 0.5 + noise**2, rel=0.06)
        assert torch.equal(y, degrade(x, blurring, photons, seed=2))
        assert not torch.equal(y, degrade(x, blurring, photons, seed=3))
    counts = degrade(x, blurring, Poisson(0.02)) / 0.02
    torch.testing.assert_close(counts, counts.round(), atol=1e-4, rtol=0)


def test_noise_is_only_where_something_is_measured() -> None:
    inpainting = forward_model("inpaint", (3, 32, 32), keep=0.3)
    x = torch.rand(2, 3, 32, 32) + 0.1
    known = inpainting.A(x) != 0
    noisy = degrade(x, inpainting, 0.1)
    assert not bool(noisy[~known].any()) and float((noisy - x)[known].std()) == pytest.approx(0.1, rel=0.1)
    mri = forward_model("mri", (1, 32, 32))
    spectrum, clean = degrade(x[:, :1], mri, 0.1), mri.A(x[:, :1])
    assert not bool(spectrum[..., 0].any()) and bool((spectrum != clean)[..., 16].all())


def test_importing_does_not_need_deepinv() -> None:
    code = "import sys; sys.modules['deepinv'] = None; import nonexpansive.restore.variational"
    subprocess.run([sys.executable, "-c", code], check=True)
