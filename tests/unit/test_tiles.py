"""Tiles are the very map of the whole picture, within the memory that is given."""

from __future__ import annotations

import math

import pytest
import torch

from cases import denoiser, norms
from nonexpansive import certify
from nonexpansive.errors import BadInput
from nonexpansive.nn.models import Denoiser
from nonexpansive.restore.steps import AtLevel
from nonexpansive.restore.tiles import Tiled, bytes_per_pixel


def tiled(model: Denoiser, side: int) -> Tiled:
    """In tiles of that side, a multiple of the model's alignment."""
    border = Tiled(model, math.inf).layout()[1]
    result = Tiled(model, bytes_per_pixel(model) * (side + 2 * border + 0.5) ** 2)
    assert result.layout() == (side, border)
    return result


MODELS = [
    {"blocks": 1, "factor": 1},
    {"blocks": 1, "factor": 2},
    {"blocks": 1, "factor": 3, "features": 9, "activation": "linear_spline"},
    {"blocks": 2, "factor": 1, "activation": "tanh"},
    {"blocks": 2, "factor": 1, "features": 1, "hidden": "frame", "scales": [1, 2], "activation": "pooled_ramps"},
    {"blocks": 1, "factor": 1, "activation": "relu", "method": "heun", "kernel": 5},
    {"blocks": 1, "factor": 1, "activation": "relu", "control": "adaptive", "alpha": 0.3},
]


@pytest.mark.parametrize("config", MODELS, ids=str)
@pytest.mark.parametrize(("height", "width"), [(40, 41), (23, 60), (37, 5)])
def test_tiles_are_the_whole(
    config: dict[str, object], height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = denoiser(**config).double().eval()  # type: ignore[arg-type]
    if config.get("control") == "adaptive":
        with torch.no_grad():
            for p in model.lifted.inner.parameters():  # type: ignore[union-attr]
                p.mul_(2.5)
        assert any(flow.step()[1] > 1 for flow in model.lifted.inner)  # type: ignore[union-attr]
    f = model.alignment
    side = f * math.ceil(model.reach / f)
    x = torch.rand(2, 1, height, width, dtype=torch.float64)
    split = tiled(model, side)
    monkeypatch.setattr(Tiled, "whole", lambda self, shape: False)
    level = torch.tensor([0.05, 0.2], dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(split(x, level), model(x, level), rtol=0, atol=1e-13)


@pytest.mark.parametrize("config", MODELS, ids=str)
def test_nothing_from_beyond_the_reach_matters(config: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = denoiser(**config).double().eval()  # type: ignore[arg-type]
    size = 2 * model.reach + 3
    x = torch.rand(1, 1, 3, size, dtype=torch.float64)
    y = x.clone()
    y[..., -1] += 1
    with torch.no_grad():
        moved = (model(x, 0.1) - model(y, 0.1)).abs().amax((0, 1, 2)).nonzero().flatten()
    assert size - 1 - int(moved.min()) <= model.reach


def test_the_certificate_is_that_of_the_whole() -> None:
    model = denoiser(blocks=1, factor=1, features=2).eval()
    split = AtLevel(tiled(model, 4), 0.1)
    whole, parts = certify(AtLevel(model, 0.1), (1, 40, 30)), certify(split, (1, 40, 30))
    assert (parts.lipschitz, parts.averaged) == (whole.lipschitz, whole.averaged)
    assert "80 tiles of 4 pixels with a border of 3" in parts.rule
    assert certify(split, (1, 5, 5)).rule == whole.rule


def test_the_error_of_tiles_is_bounded() -> None:
    torch.manual_seed(0)
    model = denoiser(blocks=1, factor=1, features=2).eval()
    split = AtLevel(tiled(model, 4), 0.1)
    certificate = certify(split, (1, 40, 30), arithmetic=torch.float32)
    assert certificate.error(1.0) > certify(AtLevel(model, 0.1), (1, 40, 30), arithmetic=torch.float32).error(1.0)
    x = torch.randn(3, 1, 40, 30) * torch.tensor([1e-3, 1.0, 1e4]).reshape(-1, 1, 1, 1)
    with torch.no_grad():
        program = split(x).double()
        truth = AtLevel(model, 0.1).double()(x.double())
    for error, size in zip(norms(program - truth).tolist(), norms(x.double()).tolist(), strict=True):
        assert error <= certificate.error(size)


def test_memory_bounds_the_tiles() -> None:
    model = denoiser(blocks=1).eval()
    memory = 200 * bytes_per_pixel(model) * 32
    side, border = Tiled(model, memory).layout()
    assert (side + 2 * border) ** 2 * bytes_per_pixel(model) <= memory
    with pytest.raises(BadInput, match="at least 0 MB"):
        Tiled(model, bytes_per_pixel(model) * (3 * border - 1) ** 2)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(BadInput, match="bytes above 0"):
            Tiled(model, wrong)


def test_a_batch_that_does_not_fit_goes_one_by_one() -> None:
    model = denoiser(blocks=1, factor=1, features=2).eval()
    x, seen = torch.rand(3, 1, 20, 21), []
    forward = model.forward

    def watched(noisy: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        seen.append(tuple(noisy.shape))
        return forward(noisy, sigma)

    model.forward = watched  # type: ignore[method-assign]
    split = Tiled(model, 2.5 * 420 * bytes_per_pixel(model))
    levels = torch.tensor([0.05, 0.1, 0.2])
    with torch.no_grad():
        for sigma in (levels, 0.1, torch.tensor(0.1), torch.tensor([0.1])):
            seen.clear()
            torch.testing.assert_close(split(x, sigma), forward(x, sigma))
            assert seen == [(1, 1, 20, 21)] * 3
        seen.clear()
        split(x[:2], 0.1)
    assert seen == [(2, 1, 20, 21)]


def test_a_level_keeps_its_digits_where_a_batch_is_split() -> None:
    model = denoiser(blocks=1, factor=1, features=2).double().eval()
    x, split = torch.rand(2, 1, 20, 21, dtype=torch.float64), Tiled(model, 1.5 * 420 * bytes_per_pixel(model))
    with torch.no_grad():
        torch.testing.assert_close(split(x, 0.1), model(x, 0.1), rtol=0, atol=1e-14)


def test_tiles_are_for_evaluation() -> None:
    model = denoiser(blocks=1, factor=1).train()
    split = Tiled(model, bytes_per_pixel(model) * 13**2)
    with pytest.raises(BadInput, match=r"\.eval\(\)"):
        split(torch.rand(1, 1, 40, 40), 0.1)
    model.eval()
    x = torch.rand(1, 1, 40, 40, requires_grad=True)
    split(x, 0.1).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
