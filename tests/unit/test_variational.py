from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nonexpansive.restore import variational
from nonexpansive.restore.physics import Boundary, blur, degrade, kernel
from nonexpansive.restore.variational import total_variation, tune, tv_deblur, tv_denoise


def picture(channels: int = 3, batch: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Flat patches."""
    coarse = torch.rand(batch, channels, 3, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return torch.nn.functional.interpolate(coarse, (16, 14), mode="nearest")


def noisy(x: Tensor, level: float) -> Tensor:
    return x + level * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)


def psnr(x: Tensor, clean: Tensor) -> float:
    return -10 * math.log10(float((x - clean).square().mean()))


def test_total_variation_of_an_edge() -> None:
    x = torch.zeros(2, 3, 8, 6)
    x[0, 0, :, 3:] = 3  # an edge seen in two channels counts once: √(3² + 4²) for each of 8 rows
    x[0, 1, :, 3:] = 4
    x[1, 2, 2, 1] = 1  # a point: two single differences and one corner of √2
    torch.testing.assert_close(total_variation(x), torch.tensor([40.0, 2 + math.sqrt(2)]))


@pytest.mark.parametrize("size", [(5, 4), (1, 4), (4, 1), (1, 1), (2, 2)])
def test_differences_and_their_adjoint(size: tuple[int, int]) -> None:
    x, p = torch.randn(2, 3, *size).double(), torch.randn(2, 2, 3, *size).double()
    d, dt = variational._gradient(x), variational._adjoint(p)
    torch.testing.assert_close((d * p).sum(), (x * dt).sum())
    spectrum = torch.fft.rfft2(variational._adjoint(d))
    torch.testing.assert_close(spectrum, torch.fft.rfft2(x) * variational._squared_symbol(size))


def subgradient_gap(x: Tensor, descent: Tensor, weight: float) -> float:
    """x minimises f + weight·TV only if no direction lowers it: the best relative decrease over random small moves."""
    generator = torch.Generator().manual_seed(2)
    base = weight * total_variation(x)
    best = 0.0
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(30):
            move = size * torch.randn(x.shape, generator=generator, dtype=x.dtype)
            lower = float(base - weight * total_variation(x + move) + (descent * move).sum())
            best = max(best, lower / float(base))
    return best


@pytest.mark.parametrize("channels", [1, 3])
def test_denoising_is_exact_to_its_accuracy(channels: int) -> None:
    y = noisy(picture(channels), 0.1)
    exact = tv_denoise(y, 0.1, 1e-6, 5000)
    assert exact.accuracy <= 1e-6
    assert subgradient_gap(exact.image, y - exact.image, 0.1) < 1e-9
    for tolerance in (1e-2, 1e-3, 1e-4):
        rough = tv_denoise(y, 0.1, tolerance)
        distance = float((rough.image - exact.image).square().mean().sqrt())
        assert distance - 1e-6 <= rough.accuracy <= tolerance


def test_denoising_known_answers() -> None:
    flat = torch.full((1, 3, 6, 7), 0.3)
    torch.testing.assert_close(tv_denoise(flat, 0.5).image, flat)
    y = torch.rand(1, 1, 6, 7).double()
    torch.testing.assert_close(tv_denoise(y, 100.0, 1e-9, 5000).image, y.mean().expand_as(y))
    torch.testing.assert_close(tv_denoise(y, 1e-9).image, y, atol=1e-6, rtol=0)
    step = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 1, 4).double()
    # each side has two pixels, so it moves by half the weight
    expected = torch.tensor([0.05, 0.05, 0.95, 0.95]).view(1, 1, 1, 4).double()
    torch.testing.assert_close(tv_denoise(step, 0.1, 1e-9, 5000).image, expected)


def test_a_batch_is_solved_picture_by_picture() -> None:
    y = noisy(picture(batch=3, dtype=torch.float32), 0.1)
    both = tv_denoise(y, 0.1)
    assert both.image.dtype == torch.float32 and both.accuracy <= 5e-4
    assert torch.equal(both.image, torch.cat([tv_denoise(one[None], 0.1).image for one in y]))


def test_denoising_agrees_with_deepinv_in_grey() -> None:
    tv = pytest.importorskip("deepinv.models").TVDenoiser(n_it_max=1000, crit=1e-9, tau=0.1)
    y = noisy(picture(1), 0.1)  # in colour deepinv treats the channels apart
    torch.testing.assert_close(tv_denoise(y, 0.1, 1e-6, 5000).image, tv(y, ths=0.1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("boundary", ["circular", "valid"])
def test_deblurring_minimises_its_objective(boundary: Boundary) -> None:
    pytest.importorskip("deepinv")
    x = picture()
    blurring = blur(kernel("motion:5,30").double(), (3, 16, 14), boundary)
    y = degrade(x, blurring, 0.02, seed=3)
    weight = 5e-3
    exact = tv_deblur(y, blurring, weight, 1e-6, 3000)
    assert exact.accuracy <= 1e-6
    assert subgradient_gap(exact.image, blurring.A_adjoint(y - blurring.A(exact.image)), weight) < 1e-4
    normal = tv_deblur(y, blurring, weight)
    assert normal.accuracy <= 2e-4
    assert float(blurring.crop(normal.image - exact.image).square().mean().sqrt()) < 3e-3
    assert psnr(blurring.crop(normal.image), blurring.crop(x)) > psnr(y, blurring.crop(x)) + 4


def test_deblurring_by_the_identity_is_denoising() -> None:
    pytest.importorskip("deepinv")
    y = noisy(picture(), 0.1)
    denoised = tv_denoise(y, 0.1, 1e-6, 5000).image
    for boundary in ("circular", "valid"):
        identity = blur(torch.ones(1, 1, dtype=torch.float64), (3, 16, 14), boundary)
        torch.testing.assert_close(tv_deblur(y, identity, 0.1, 1e-7, 3000).image, denoised, atol=1e-5, rtol=0)


def test_tuning_finds_the_best_weight() -> None:
    x = picture(batch=2)
    y = noisy(x, 0.1)
    pairs = [(x[:1], y[:1]), (x[1:], y[1:])]

    def solve(y: Tensor, weight: float) -> Tensor:
        return tv_denoise(y, weight).image

    weight, best = tune(solve, pairs, 0.02, 0.5, 0.1)
    quality = {w: sum(psnr(solve(b, w), a) for a, b in pairs) / 2 for w in (weight / 1.5, weight, weight * 1.5)}
    assert quality[weight] == pytest.approx(best, abs=1e-4) and best == pytest.approx(max(quality.values()), abs=1e-4)
    for low, high, some in ((0, 1, pairs), (1, 0.5, pairs), (0.1, 1, [])):
        with pytest.raises(ValueError, match="range"):
            tune(solve, some, low, high)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_bad_weights_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        tv_denoise(torch.zeros(1, 1, 4, 4), weight)


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        tv_denoise(torch.zeros(1, 4, 4), 0.1)
