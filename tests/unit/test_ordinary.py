"""DnCNN: of the published size, saved and loaded like any model, and certified as no more than it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nonexpansive import certify, checkpoint
from nonexpansive.errors import BadInput, Refused
from nonexpansive.nn.models import build
from nonexpansive.nn.ordinary import DnCNN

torch.set_num_threads(1)
SMALL = {"channels": 1, "features": 4, "layers": 4}


def settled(**settings: int) -> DnCNN:
    """A small DnCNN in evaluation mode, whose batch-norms have seen pictures."""
    torch.manual_seed(0)
    net = DnCNN(**settings)
    for _ in range(3):
        net(torch.rand(4, settings["channels"], 12, 12), 0.15)
    return net.eval().requires_grad_(False)


def test_it_has_the_published_size_and_predicts_the_noise() -> None:
    net = build("dncnn")
    assert sum(p.numel() for p in net.parameters()) == 670_531
    small = settled(**SMALL)
    x = torch.rand(2, 1, 12, 12)
    assert torch.allclose(small(x, 0.1) - x, small.residual.inner(x), atol=1e-6)
    last = small.residual.inner[-1]
    nn.init.zeros_(last.weight)  # type: ignore[arg-type]
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    assert torch.equal(small(x, 0.1), x)


def test_its_certificate_bounds_its_jacobian_at_every_size() -> None:
    net = settled(**SMALL).double()
    for n in (6, 9):
        certificate = certify(net, (1, n, n))
        assert certificate.averaged is None and certificate.lipschitz > 1
        x = torch.rand(1, 1, n, n, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda y: net(y, 0.1), x).reshape(n * n, n * n)
        assert float(torch.linalg.matrix_norm(jacobian, 2)) <= certificate.lipschitz
    program = certify(settled(**SMALL), (1, 8, 8), arithmetic=torch.float32)
    assert program.error.slope > 0


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="at least 1 feature"):
        DnCNN(layers=1)
    net = DnCNN(**SMALL)
    with pytest.raises(BadInput, match="images"):
        net(torch.rand(1, 3, 8, 8), 0.1)
    with pytest.raises(Refused, match="normalises by the batch"):
        certify(net, (1, 8, 8))
    with pytest.raises(Refused, match="images of shape"):
        certify(net.eval(), (3, 8, 8))
    net.residual = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(Refused, match="replaced"):
        certify(net, (1, 8, 8))


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    net = settled(**SMALL)
    checkpoint.save(tmp_path / "net.safetensors", net, "dncnn", SMALL, {})
    x = torch.rand(1, 1, 16, 16)
    assert torch.allclose(checkpoint.load(tmp_path / "net.safetensors")(x, 0.1), net(x, 0.1), atol=1e-6)


def test_its_layers_pass_the_noise_on_from_the_start() -> None:
    """A linear map of the features before the last layer finds a tenth of the noise; of a wholly random start's no more than
    chance, 33 columns for 2,304 rows, finds."""
    net = DnCNN(channels=1, features=32, layers=20)
    noise = 0.15 * torch.randn(4, 1, 24, 24)
    with torch.no_grad():
        features = net.residual.inner[:-1](0.5 + noise).permute(0, 2, 3, 1).reshape(-1, 32)  # type: ignore[index]
    features = torch.cat((features, torch.ones(len(features), 1)), 1).double()
    target = noise.reshape(-1, 1).double()
    left = target - features @ torch.linalg.lstsq(features, target).solution
    assert float(left.square().mean()) < 0.93 * float(target.square().mean())
