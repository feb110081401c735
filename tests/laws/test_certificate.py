"""Laws of the certificates, over the whole registry: no bound is below what can be found, and what they say holds of what runs."""

from __future__ import annotations

import copy
import json
import math
from decimal import Decimal

import pytest
import torch
from torch import Tensor, nn

from cases import AFFINE, CASES, COMPOSED, FLOWS, LAYERS, Case, attack, norms, pairs, stretch, violation
from nonexpansive import Certificate, certify
from nonexpansive.nn import GradientFlow, Resolvent

SLACK = 1e-8  # float64's own rounding in a quotient of differences

every = pytest.mark.parametrize("case", CASES, ids=str)
rounding = pytest.mark.parametrize("case", [case for case in CASES if case.rounds], ids=str)


def exact(module: nn.Module) -> nn.Module:
    """The map itself: in float64, solvers run to the end."""
    module = copy.deepcopy(module).double()
    for child in module.modules():
        if isinstance(child, Resolvent):
            child.tolerance = 1e-12
    return module


@every
def test_no_pair_of_points_violates_the_bounds(case: Case) -> None:
    module = case.build()
    certificate = certify(module, case.shape)
    module = exact(module)
    x, d = pairs(case.shape)
    with torch.no_grad():
        assert tuple(module(x).shape[1:]) == certificate.codomain
    assert stretch(module, x, d).max() <= certificate.lipschitz * (1 + SLACK) + SLACK
    assert attack(module, x, d).max() <= certificate.lipschitz * (1 + SLACK) + SLACK
    if (alpha := certificate.averaged) is not None:
        if alpha > 1e-9:
            assert violation(module, x, d, alpha).max() <= SLACK / alpha
        assert attack(module, x, d, 1 - alpha).max() <= alpha * (1 + SLACK) + SLACK


@every
def test_a_proximal_map_is_the_gradient_of_a_convex_function(case: Case) -> None:
    """Its Jacobian is symmetric, with eigenvalues in [0, L]; whatever is certified as one, is one."""
    module = case.build()
    certificate = certify(module, case.shape)
    if not certificate.proximal:
        assert "proximal" not in case.name or "half-quadratic" in case.name
        return
    module = exact(module)
    for size in (0.01, 0.3, 3.0):
        x = (size * torch.randn(1, *case.shape, dtype=torch.float64)).requires_grad_()
        y = module(x).flatten()
        rows = [torch.autograd.grad(y[i], x, retain_graph=True)[0].flatten() for i in range(len(y))]
        jacobian = torch.stack(rows)
        assert (jacobian - jacobian.T).abs().max() < 1e-7
        eigenvalues = torch.linalg.eigvalsh((jacobian + jacobian.T) / 2)
        assert eigenvalues[0] > -1e-7 and eigenvalues[-1] <= certificate.lipschitz * (1 + SLACK) + 1e-7


@every
def test_growth_bounds_the_size_of_the_output(case: Case) -> None:
    module = case.build()
    certificate = certify(module, case.shape)
    x = torch.cat([pairs(case.shape, 8)[0] * scale for scale in (0.0, 1e-3, 1.0, 100.0)])
    with torch.no_grad():
        sizes = norms(exact(module)(x))
    bounds = torch.tensor([certificate.growth(float(u)) for u in norms(x)], dtype=torch.float64)
    assert (sizes <= bounds * (1 + 1e-12) + 1e-300).all()


@rounding
def test_error_bounds_the_rounding_of_the_float32_program(case: Case) -> None:
    module = case.build(torch.float32)
    certificate = certify(module, case.shape, arithmetic=torch.float32)
    assert certificate.arithmetic == "float32"
    x = torch.cat(
        [pairs(case.shape, 8, i)[0] * scale for i, scale in enumerate((1e-20, 1e-9, 1e-3, 1.0, 1.0, 100.0))]
    ).float()
    with torch.no_grad():
        program, truth = module(x).double(), exact(module)(x.double())
    for error, size in zip(norms(program - truth).tolist(), norms(x.double()).tolist(), strict=True):
        assert error <= certificate.error(size)


def test_error_is_a_useful_bound() -> None:
    """Not merely a bound: a small net's is within some hundred roundings of its size."""
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), GradientFlow(nn.Linear(8, 8), "relu")).eval()
    error = certify(module, (8,), arithmetic=torch.float32).error
    assert error.slope < 1000 * 2**-24
    assert certify(module, (8,)).error(1.0) == 0


@pytest.mark.parametrize("case", [case for case in AFFINE if "spectral" not in case.name], ids=str)
def test_norms_of_affine_layers_are_those_of_their_matrix(case: Case) -> None:
    module = case.build()
    matrix = jacobian(module, torch.zeros(case.shape, dtype=torch.float64))
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    bound = certify(module, case.shape).lipschitz
    assert norm <= bound * (1 + 1e-12)
    assert bound <= norm * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("case", [case for case in LAYERS if "MaxPool" in case.name], ids=str)
def test_norms_of_max_pooling_are_reached(case: Case) -> None:
    """A spike is the largest entry of every window that it is in."""
    module, largest = case.build(), 0.0
    for i in range(math.prod(case.shape)):
        spike = torch.zeros(math.prod(case.shape), dtype=torch.float64)
        spike[i] = 1.0
        matrix = jacobian(module, spike.reshape(case.shape))
        largest = max(largest, float(torch.linalg.matrix_norm(matrix, 2)))
    bound = certify(module, case.shape).lipschitz
    assert largest <= bound * (1 + 1e-12)
    assert bound <= largest * (1 + 1e-12)


def jacobian(module: nn.Module, x: Tensor) -> Tensor:
    """The dense matrix of the derivative at x."""
    matrix = torch.func.jacrev(lambda x: module(x[None])[0])(x)
    return matrix.detach().reshape(-1, x.numel())


@pytest.mark.parametrize("case", [*LAYERS, *FLOWS[::10], *COMPOSED], ids=str)
def test_a_certificate_is_plain_json_and_prints_bounds(case: Case) -> None:
    certificate = certify(case.build(), case.shape)
    plain = certificate.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    printed = [line for line in str(certificate).splitlines() if "L ≤" in line]
    for line, (depth, part) in zip(printed, certificate.walk(), strict=True):
        assert line.startswith("  " * depth)
        assert line.endswith("  prox") == part.proximal
        numbers = line.rpartition("]  L ≤ ")[2].removesuffix("  prox").split()
        assert float(numbers[0]) >= part.lipschitz
        assert (part.averaged is None) == (len(numbers) == 1)
        if part.averaged is not None:
            assert float(numbers[-1]) >= part.averaged
            assert Decimal(numbers[-1]) <= Decimal(part.averaged) * Decimal("1.000001")


@pytest.mark.parametrize("case", [*LAYERS, *FLOWS[::10], *COMPOSED], ids=str)
def test_copies_are_the_same_and_independent(case: Case) -> None:
    module = case.build()
    certificate, x = certify(module, case.shape), pairs(case.shape, 4)[0]
    with torch.no_grad():
        before = module(x)
        twin = copy.deepcopy(module)
        assert certify(twin, case.shape) == certificate
        assert torch.equal(twin(x), before)
        for p in twin.parameters():
            p.mul_(3).add_(0.1)
        assert torch.equal(module(x), before)
        assert certify(module, case.shape) == certificate
        twin.load_state_dict(module.state_dict())
        assert certify(twin, case.shape) == certificate
        assert torch.equal(twin(x), before)


def test_the_certificate_of_a_composition_is_an_associative_value() -> None:
    torch.manual_seed(0)
    parts = [certify(GradientFlow(nn.Linear(3, 3), alpha=a).eval(), (3,)) for a in (0.3, 0.5, 0.9)]
    one, other = parts[0].then(parts[1]).then(parts[2]), parts[0].then(parts[1].then(parts[2]))
    assert isinstance(one, Certificate)
    assert one.averaged == pytest.approx(other.averaged, rel=1e-14)
    assert one.lipschitz == other.lipschitz == 1
    assert hash(one) != hash(parts[0])
