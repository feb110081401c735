"""The shipped models: they load offline, prove what they claim, and do their job on the photograph that ships with them."""

from __future__ import annotations

import os
from functools import partial
from importlib import resources

import pytest
import torch

import nonexpansive
from nonexpansive.checkpoint import DEFAULTS
from nonexpansive.nn.models import Denoiser, ImageDenoiser, ProximalDenoiser
from nonexpansive.robust import Evaluation, certify_classifier, evaluate, pixels, require_sound, search
from nonexpansive.robust.attacks import pgd
from nonexpansive.train import load_images

denoisers = [name for name in nonexpansive.models() if name.startswith("denoiser")]


def photograph(channels):
    """A part of the one that ships, (1, channels, 160, 160)."""
    images = pytest.importorskip(
        "nonexpansive.app.images", reason="reading a picture needs the extra nonexpansive[app]"
    )
    photo = resources.files("nonexpansive") / "photographs" / "astronaut.png"
    part = images.read_image(str(photo)).tensor[None, :, 100:260, 180:340]
    return part if channels == 3 else part.mean(1, keepdim=True)


def test_every_task_has_its_default():
    assert set(DEFAULTS.values()) <= set(nonexpansive.models())


@pytest.mark.parametrize("name", denoisers)
def test_it_is_what_it_promises_to_be_at_every_size(name):
    model = nonexpansive.load(name)
    assert not model.training
    for size in ((64, 64), (31, 45)):
        certificate = nonexpansive.certify(model, (model.channels, *size))
        if isinstance(model, ProximalDenoiser):
            assert certificate.proximal and certificate.lipschitz <= 10.001
            assert model.convex == (certificate.averaged is not None)
            assert certificate.averaged is None or (certificate.averaged <= 0.5 and certificate.nonexpansive)
            continue
        assert isinstance(model, Denoiser)
        if model.lipschitz is not None:
            assert certificate.averaged is None and not certificate.proximal
            assert certificate.lipschitz <= model.lipschitz <= 3
            continue
        assert certificate.lipschitz <= 1
        assert certificate.averaged is not None
        assert certificate.averaged <= 0.9 + 1e-9


def _pulled_back(model, x, sigma, cotangent):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x, sigma), x, cotangent)[0]


@pytest.mark.parametrize("name", ["denoiser-grey-convex", "denoiser-grey-proximal"])
def test_training_solves_finely_enough_for_its_gradient(name):
    """In training mode the weights' gradient is within 2 % of that of the exact solution, at the noisiest levels, which are the hardest."""
    model = nonexpansive.load(name).train()
    resolvent, x = model.lifted.inner, photograph(1)[..., :48, :48]
    sigma = torch.tensor([15 / 255, 50 / 255])
    torch.manual_seed(0)
    y = x + sigma[:, None, None, None] * torch.randn(2, *x.shape[1:])

    def gradient(tolerance):
        resolvent.tolerance = tolerance
        loss = (model(y, sigma) - x).square().sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    tolerance = resolvent.tolerance
    for _ in range(20):  # until the estimate of the norm, which moves in training, stands
        gradient(0.1)
    exact = gradient(1e-4)
    assert (gradient(tolerance) - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("name", denoisers)
@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_gradient_ascent_finds_no_larger_constant(name, sigma):
    model = nonexpansive.load(name).double()
    L = nonexpansive.certify(model, (model.channels, 24, 24)).lipschitz
    if isinstance(model, ProximalDenoiser):
        model.tolerance = 1e-10
    torch.manual_seed(0)
    x = torch.rand(1, model.channels, 24, 24, dtype=torch.float64)
    v = torch.randn_like(x)
    for _ in range(12):  # the power method on the Jacobian: Jv by a central difference, Jᵀu by a pullback
        v = 1e-6 * v / v.norm()
        with torch.no_grad():
            image = (model(x + v, sigma) - model(x - v, sigma)) / 2
        assert image.norm() <= L * v.norm() * (1 + 1e-8)
        v = _pulled_back(model, x, sigma, image)


@pytest.mark.parametrize("name", denoisers)
def test_it_denoises(name):
    model = nonexpansive.load(name)
    assert isinstance(model, ImageDenoiser)
    clean = photograph(model.channels)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for sigma, gain in ((15 / 255, 5.0), (25 / 255, 7.0), (50 / 255, 9.0)):
        with torch.no_grad():
            restored = model(clean + sigma * noise, sigma)
        psnr = -10 * (restored - clean).square().mean().log10()
        assert psnr > -20 * torch.tensor(sigma).log10() + gain


classifiers = [name for name in nonexpansive.models() if name.startswith("classifier")]


@pytest.mark.parametrize("name", classifiers)
def test_gradient_ascent_finds_no_larger_constant_of_a_classifiers_features(name):
    model = nonexpansive.load(name)
    L = nonexpansive.certify(model.features, model.shape).lipschitz
    assert L <= 1 or name != DEFAULTS["classify"]
    model, x = model.double(), torch.rand(1, *model.shape, dtype=torch.float64)
    v = torch.randn_like(x)
    for _ in range(12):
        v = 1e-6 * v / v.norm()
        with torch.no_grad():
            image = (model.features(x + v) - model.features(x - v)) / 2
        assert image.norm() <= L * v.norm() * (1 + 1e-8)
        v = torch.func.vjp(model.features, x)[1](image)[0]


@pytest.mark.parametrize("arithmetic", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", classifiers)
def test_no_attack_succeeds_within_a_certified_radius(name, arithmetic):
    """PGD at each image's own radius, the larger where there are two, over 1,000 test images; set NONEXPANSIVE_DATA to their folder."""
    if "NONEXPANSIVE_DATA" not in os.environ:
        pytest.skip("needs the data set: set NONEXPANSIVE_DATA to a folder that holds it, such as cifar10.npz")
    header, _ = nonexpansive.checkpoint.read(nonexpansive.checkpoint.path_of(name))
    images = load_images(header.training["run"]["data"]["source"], "test", os.environ["NONEXPANSIVE_DATA"])[:1000]
    model = nonexpansive.load(name).requires_grad_(False)
    made = certify_classifier(nonexpansive.load(name).to(arithmetic), model.shape, arithmetic=arithmetic)
    evaluation = evaluate(made, images.images, images.labels, batch=32, local=made.only_global is None)
    sure = evaluation.certified > 0
    x, y = pixels(images.images)[sure], images.labels[sure]
    attacks = [partial(pgd, restart=k, steps=20) for k in range(2)]
    found = search(model, x, y, evaluation.certified[sure], attacks)
    require_sound(made, Evaluation(y, evaluation.prediction[sure], evaluation.radius[sure]), found)
