"""PooledRamps: the gradient of a convex function with a Hessian in [0, 1], rounded as stated; a flow with it is averaged."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from nonexpansive import certify
from nonexpansive.errors import Refused
from nonexpansive.math.activation import slopes
from nonexpansive.nn import GradientFlow
from nonexpansive.nn.pooled import FLOOR, PACE, PooledRamps, SignedRamps, WeaklyConvexRamps

LEVELS = [None, 0.0, 0.3, 3.0]


def scrambled(
    channels: int = 5, groups: int = 3, ramps: int = 2, scale: float = 1.0, kind: type[PooledRamps] = PooledRamps
) -> PooledRamps:
    module = kind(channels, groups, ramps)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return module.double().eval()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("groups", "scale"), [(1, 1.0), (3, 0.3), (3, 4.0), (7, 2.0)])
def test_its_jacobian_is_symmetric_and_in_the_unit_interval(groups: int, scale: float, level: float | None) -> None:
    module = scrambled(groups=groups, scale=scale)
    assert (slopes(module).low, slopes(module).high) == (0, 1)
    generator = torch.Generator().manual_seed(0)
    steepest = 0.0
    for size in (0.0, 1e-5, 0.01, 0.1, 1.0, 30.0) * 4:
        z = size * torch.randn(5, generator=generator, dtype=torch.float64)
        jacobian = torch.func.jacrev(lambda z: module(z[None], level)[0])(z)
        assert (jacobian - jacobian.T).abs().max() < 1e-12
        eigenvalues = torch.linalg.eigvalsh(jacobian)
        assert eigenvalues[0] >= -1e-12
        assert eigenvalues[-1] <= 1 + 1e-12
        steepest = max(steepest, eigenvalues[-1].item())
    assert level == 0 or steepest > 0.5  # the bound is one that is met


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("groups", "scale"), [(1, 0.3), (3, 0.3), (3, 1.0), (7, 2.0)])
def test_with_signs_its_jacobian_lies_in_the_stated_interval(groups: int, scale: float, training: bool) -> None:
    module = scrambled(groups=groups, scale=scale, kind=SignedRamps).train(training)
    stated, found = slopes(module), []
    generator = torch.Generator().manual_seed(0)
    for size in (0.0, 1e-5, 0.01, 0.1, 1.0, 30.0) * 8:
        z = size * torch.randn(5, generator=generator, dtype=torch.float64)
        jacobian = torch.func.jacrev(lambda z: module(z[None], 0.7)[0])(z)
        assert (jacobian - jacobian.T).abs().max() < 1e-12 * scale.__ceil__() * 10
        found += torch.linalg.eigvalsh(jacobian).tolist()
    assert stated.low - 1e-12 <= min(found) and max(found) <= stated.high + 1e-12
    assert (
        min(found) < 0.1 * stated.low or stated.low > -1e-9
    )  # near z = 0 all thresholds are above r: the Hessian is the sum of all
    assert scale < 1 or min(found) < 0


@pytest.mark.parametrize("kind", [PooledRamps, SignedRamps, WeaklyConvexRamps])
def test_the_slopes_stated_of_float32_tables_hold_of_the_exact_function(kind: type[PooledRamps]) -> None:
    for scale in [0.03 * k for k in range(1, 12)]:
        module = scrambled(scale=scale, kind=kind).float()
        stated, exact = slopes(module), copy.deepcopy(module).double()
        jacobian = torch.func.jacrev(lambda z, exact=exact: exact(z[None], 1e3)[0])(
            torch.zeros(5).double()
        )  # no ramp is at its end
        assert stated.low <= jacobian.diagonal().min() and jacobian.diagonal().max() <= stated.high


@pytest.mark.parametrize("kind", [PooledRamps, SignedRamps, WeaklyConvexRamps])
def test_it_is_the_gradient_of_the_stated_function(kind: type[PooledRamps]) -> None:
    module, level = scrambled(kind=kind), 0.7
    w, pool, c = module.tables()
    tau = (PACE * module.log_threshold + nn.functional.softplus(PACE * module.sensitivity) * math.log(level)).exp()
    if isinstance(module, WeaklyConvexRamps):
        p, n = c[:2], -c[2:]
        tau = torch.cat([tau, (PACE * module.returns).sigmoid() * p / n.clamp_min(1e-6) * tau])

    def potential(z: torch.Tensor) -> torch.Tensor:
        r = (pool @ z.square() + FLOOR).sqrt()
        huber = torch.where(r < tau, r.square() / 2, tau * (r - tau / 2))
        return (w * z.square()).sum() / 2 + (c * huber).sum()

    z = 0.3 * torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(module(z[None], level)[0], torch.func.grad(potential)(z))
    own = torch.func.grad(lambda z: module.potential(z[None], level)[0])(z)
    torch.testing.assert_close(module(z[None], level)[0], own)


@pytest.mark.parametrize("kind", [PooledRamps, SignedRamps, WeaklyConvexRamps, partial(WeaklyConvexRamps, modulus=0.0)])
@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 4, 6)])
def test_its_derivative_is_that_of_automatic_differentiation(kind: type[PooledRamps], shape: tuple[int, ...]) -> None:
    module, level = scrambled(kind=kind, scale=0.5), torch.tensor([0.05, 0.7, 3.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    for size in (0.0, 1e-5, 0.03, 0.3, 30.0):
        z, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        _, expected = torch.func.jvp(lambda z: module(z, level), (size * z,), (v,))
        torch.testing.assert_close(module.derivative(size * z, level)(v), expected)


@pytest.mark.parametrize("modulus", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_weak_convexity_holds_whatever_the_parameters(modulus: float, scale: float) -> None:
    torch.manual_seed(0)
    met = 0.0
    for seed in range(8):
        module = WeaklyConvexRamps(5, 3, modulus=modulus)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(scale * torch.randn(p.shape))
            module.mixture[0].add_(0.3 * seed)  # hardly any rise: what falls is seen
            if module.falls is not None:
                module.falls[0].sub_(1.0)
        module, found = module.double().eval(), []
        stated = slopes(module)
        assert stated.low == -modulus
        for size in (0.0, 1e-5, 0.01, 0.1, 1.0, 30.0) * 2:
            jacobian = torch.func.jacrev(lambda z, m=module: m(z[None], 0.7)[0])(size * torch.randn(5).double())
            found += torch.linalg.eigvalsh(jacobian).tolist()
        assert stated.low - 1e-12 <= min(found) and max(found) <= stated.high + 1e-12
        met = min(met, min(found))
    assert met <= -0.3 * modulus  # the bound is one that is felt


@pytest.mark.parametrize("scale", [0.0, 0.3, 2.0])
def test_a_weakly_convex_potential_is_not_negative(scale: float) -> None:
    module = scrambled(scale=scale, kind=WeaklyConvexRamps)
    z = torch.randn(400, 5, generator=torch.Generator().manual_seed(3)).double() * torch.logspace(-5, 5, 400)[:, None]
    with torch.no_grad():
        for level in LEVELS:
            assert (module.potential(z, level) >= 0).all()
            assert ((module(z, level) * z).sum(1) >= -1e-12 * z.square().sum(1)).all()  # it never pushes outwards


def test_a_modulus_that_is_not_below_1_is_an_error() -> None:
    for settings in ({"modulus": 1.0}, {"modulus": -0.1}, {"modulus": math.nan}, {"rise": 0.0}):
        with pytest.raises(ValueError, match="modulus"):
            WeaklyConvexRamps(4, 2, **settings)


def test_a_group_of_one_channel_clips() -> None:
    module = PooledRamps(4, 4, 1, threshold=0.2).double().eval()
    with torch.no_grad():
        module.shares.fill_(-60.0)
        module.shares[1:].diagonal().fill_(60.0)
    t = torch.linspace(-1, 1, 101, dtype=torch.float64)[:, None].expand(-1, 4)
    torch.testing.assert_close(module(t, 2.0), t.clamp(-0.4, 0.4), atol=1e-6, rtol=0)


def test_channels_are_axis_one_and_levels_one_each() -> None:
    module, levels = scrambled(), torch.tensor([0.0, 0.5, 2.0])
    t = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    flat = torch.stack([module(x.flatten(1).T, float(level)).T for x, level in zip(t, levels, strict=True)])
    for shape in ((3, 5, 4, 6), (3, 5, 24), (3, 5, 2, 3, 4)):
        torch.testing.assert_close(module(t.reshape(shape), levels), flat.reshape(shape))
    for bad in (t[:, :2], t[0, 0, 0]):
        with pytest.raises(ValueError, match="5 channels"):
            module(bad)
    with pytest.raises(ValueError, match="one level"):
        module(t, torch.ones(2))


@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 3, 2)])
def test_gradients(shape: tuple[int, ...]) -> None:
    module = scrambled(scale=0.3)
    t = (0.1 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def run(t: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (t, 0.8))

    assert torch.autograd.gradcheck(run, (t, *module.parameters()), fast_mode=len(shape) == 4)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("channels", [5, 96])
@pytest.mark.parametrize("kind", [PooledRamps, SignedRamps, WeaklyConvexRamps])
def test_it_rounds_as_stated(kind: type[PooledRamps], channels: int, scale: float) -> None:
    assert math.isinf(slopes(PooledRamps(3, 1)).ulps)  # not known before the thresholds are
    module = copy.deepcopy(scrambled(channels, 3, scale=scale, kind=kind)).float()
    for level, size in ((None, 1.0), (1e-4, 0.01), (0.03, 1e-3), (10.0, 30.0)):
        t = size * torch.randn(500, channels, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            error = (module(t, level).double() - copy.deepcopy(module).double()(t.double(), level)).abs()
        assert bool((error <= slopes(module).ulps * 2.0**-24 * t.double().abs()).all())


def test_a_module_that_is_no_number_is_refused() -> None:
    module = scrambled()
    with torch.no_grad():
        module.shares[0, 0] = math.nan
    with pytest.raises(Refused, match="not finite"):
        slopes(module)


@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_a_flow_with_it_is_averaged(alpha: float) -> None:
    """‖Tx - Ty‖² ≤ ‖x - y‖² - ((1-α)/α)‖(I - T)x - (I - T)y‖², also where gradient ascent looks for the contrary."""
    torch.manual_seed(0)
    flow = GradientFlow(nn.Conv2d(2, 5, 3, padding=1), scrambled(scale=2.0).float(), alpha=alpha).double().eval()
    certificate = certify(flow, (2, 5, 4))
    assert certificate.averaged is not None
    assert certificate.averaged <= alpha

    def excess(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        difference, moved = x - y, flow(x) - flow(y)
        rest = difference - moved
        return (moved.square().sum() + (1 - alpha) / alpha * rest.square().sum()) / difference.square().sum()

    x, y = (torch.randn(1, 2, 5, 4, dtype=torch.float64).mul(0.3).requires_grad_() for _ in range(2))
    optimiser = torch.optim.Adam([x, y], lr=0.03, maximize=True)
    for _ in range(60):
        value = excess(x, y)
        assert value <= 1 + 1e-9
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
