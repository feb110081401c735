"""The shipped models: they load offline, prove what they claim, and do their job on the photograph that ships with them."""

from __future__ import annotations

from importlib import resources

import pytest
import torch

import nonexpansive
from nonexpansive.checkpoint import DEFAULTS
from nonexpansive.nn.models import Denoiser

denoisers = [name for name in nonexpansive.models() if name.startswith("denoiser")]


def test_every_task_has_its_default():
    assert set(DEFAULTS.values()) <= set(nonexpansive.models())


@pytest.mark.parametrize("name", denoisers)
def test_it_is_averaged_at_every_size(name):
    model = nonexpansive.load(name)
    assert not model.training
    for size in ((64, 64), (31, 45)):
        certificate = nonexpansive.certify(model, (model.channels, *size))
        assert certificate.lipschitz <= 1
        assert certificate.averaged is not None
        assert certificate.averaged <= 0.9 + 1e-9


@pytest.mark.parametrize("name", denoisers)
@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_gradient_ascent_finds_no_expansion(name, sigma):
    model = nonexpansive.load(name).double()
    torch.manual_seed(0)
    x = torch.rand(1, model.channels, 24, 24, dtype=torch.float64)
    v = torch.randn_like(x)
    for _ in range(12):  # the power method on the Jacobian: Jv by a central difference, Jᵀu by a pullback
        v = 1e-6 * v / v.norm()
        with torch.no_grad():
            image = (model(x + v, sigma) - model(x - v, sigma)) / 2
        assert image.norm() <= v.norm() * (1 + 1e-8)
        v = torch.func.vjp(lambda y: model(y, sigma), x)[1](image)[0]


@pytest.mark.parametrize("name", denoisers)
def test_it_denoises(name):
    images = pytest.importorskip(
        "nonexpansive.app.images", reason="reading a picture needs the extra nonexpansive[app]"
    )
    photo = resources.files("nonexpansive") / "photographs" / "astronaut.png"
    model = nonexpansive.load(name)
    assert isinstance(model, Denoiser)
    clean = images.read_image(str(photo)).tensor[None, :, 100:260, 180:340]
    clean = clean if model.channels == 3 else clean.mean(1, keepdim=True)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for sigma, gain in ((15 / 255, 5.0), (25 / 255, 7.0), (50 / 255, 9.0)):
        with torch.no_grad():
            restored = model(clean + sigma * noise, sigma)
        psnr = -10 * (restored - clean).square().mean().log10()
        assert psnr > -20 * torch.tensor(sigma).log10() + gain
