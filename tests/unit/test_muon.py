"""Muon: what it makes of a matrix, how far a step goes, and that it is indifferent to the scale of weights and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nonexpansive.train.muon import WIDEST, FourierMuon, Muon, orthogonalised


@pytest.mark.parametrize("shape", [(8, 8), (5, 40), (40, 5), (1, 7)])
def test_singular_values_come_near_1_and_directions_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    assert s.min() > 0.01 * s.max()  # smaller ones would need more steps
    out = orthogonalised(3.7 * matrix)
    assert torch.linalg.svdvals(out).min() > 0.5 and torch.linalg.svdvals(out).max() < 1.3
    assert (u.T @ out @ v.T).diagonal().min() > 0.5  # each singular direction is kept, with its sign


@pytest.mark.parametrize("layer", [nn.Linear(6, 9, bias=False), nn.Conv2d(4, 6, 3, bias=False)])
def test_a_step_changes_a_matrix_by_the_learning_rate(layer: nn.Module) -> None:
    torch.manual_seed(0)
    (weight,) = layer.parameters()
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    Muon([weight], lr=0.03).step()
    # a little less than the rate, where the step is not at right angles to the weight, whose norm is kept
    assert 0.02 < float((weight.detach() - before).norm() / before.norm()) < 0.0301
    assert float(weight.detach().norm()) == pytest.approx(float(before.norm()), rel=1e-5)


def test_scales_of_weight_and_gradient_do_not_matter() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 7), torch.randn(3, 5, 7)
    ends = []
    for size, steep in ((1.0, 1.0), (4.0, 0.25)):
        weight = nn.Parameter(start * size)
        optimiser = Muon([weight])
        for g in gradients:
            weight.grad = g * steep
            optimiser.step()
        ends.append(weight.detach() / size)
    torch.testing.assert_close(*ends)


def test_it_solves_a_regression_that_needs_both_kinds_of_parameter() -> None:
    torch.manual_seed(0)
    x, true = torch.randn(256, 6), nn.Linear(6, 3)
    y, model = true(x).detach(), nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.mul_(true.weight.norm() / model.weight.norm())  # which Muon leaves as it is
    optimiser = Muon([model.weight], [model.bias], lr=0.3)
    for step in range(400):
        for group in optimiser.param_groups:
            group["lr"] = 0.3 * (1 - step / 400)
        loss = (model(x) - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 1e-3


@pytest.mark.parametrize("rank", [1, 3])
def test_directions_that_a_matrix_does_not_have_stay_small(rank: int) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(40, rank) @ torch.randn(rank, 90)
    s = torch.linalg.svdvals(orthogonalised(matrix))
    assert s[rank - 1] > 0.5 and s[0] < 1.4 and s[rank] < 0.5
    assert not orthogonalised(torch.zeros(3, 5)).any()


@pytest.mark.parametrize("kernel", [(3, 3), (4, 4), (5,), (1, 3), (2, 3, 3)])
@pytest.mark.parametrize("size", [(6, 4), (4, 7), (3, WIDEST + 1)])
def test_fourier_muon_makes_the_convolution_orthogonal_at_each_frequency(size: tuple, kernel: tuple) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(*size, *kernel, dtype=torch.float64))
    out = FourierMuon([weight]).direction(weight.detach())
    assert out.shape == weight.shape and not out.is_complex()
    symbol = torch.fft.fftn(out, dim=tuple(range(2, out.ndim))).flatten(2).permute(2, 0, 1)
    s = torch.linalg.svdvals(symbol)
    assert s.max() < 1.3 and s.quantile(0.1) > 0.5  # a few began too small for five steps


def test_fourier_muon_takes_other_weights_as_muon_does() -> None:
    torch.manual_seed(0)
    for shape in ((6, 9), (6, 4, 1, 1), (WIDEST + 1, WIDEST + 2, 3, 3)):
        weight = nn.Parameter(torch.randn(shape))
        torch.testing.assert_close(FourierMuon([weight]).direction(weight), Muon([weight]).direction(weight))
