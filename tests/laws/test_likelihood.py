"""Laws of the data terms: gradients are those of the values, slopes stay within the bound that enters certificates, noise is as stated."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nonexpansive.errors import BadInput, Refused
from nonexpansive.restore.likelihood import Gaussian, Likelihood, Poisson

numbers = st.floats(1e-3, 2.0)
LIKELIHOODS = st.one_of(
    st.just(Gaussian(0.1)),
    st.builds(Poisson, numbers, numbers),
    st.builds(Poisson, numbers, st.just(0.0), numbers),
    st.builds(Poisson, numbers, numbers, numbers),
)


def draw(seed: int, of: Likelihood) -> tuple[Tensor, Tensor]:
    """Points of both signs, and data with zeros and (where noise allows it) negative ones among them."""
    generator = torch.Generator().manual_seed(seed)
    u = 2 * torch.randn(3, 40, generator=generator, dtype=torch.float64)
    y = (torch.randn(3, 40, generator=generator, dtype=torch.float64) + 0.5) * 2
    return u, y if isinstance(of, Gaussian) or of.noise else y.clamp_min(0)


@given(LIKELIHOODS, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_gradient_is_that_of_the_value(likelihood: Likelihood, seed: int) -> None:
    u, y = draw(seed, likelihood)
    u.requires_grad_()
    (expected,) = torch.autograd.grad(likelihood.value(u, y).sum(), u)
    scale = likelihood.smoothness(y) * 4 + 10
    assert (likelihood.gradient(u, y) - expected).abs().max() < 1e-10 * scale


@given(LIKELIHOODS, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_slopes_lie_between_zero_and_the_bound(likelihood: Likelihood, seed: int) -> None:
    u, y = draw(seed, likelihood)
    step = torch.logspace(-6, 1, 40, dtype=torch.float64)
    for low in (u, torch.zeros_like(u), -step.expand_as(u)):
        rise = likelihood.gradient(low + step, y) - likelihood.gradient(low, y)
        bound = likelihood.smoothness(y)
        assert (rise >= -1e-9 * (1 + bound)).all()  # convex
        assert (rise <= bound * step * (1 + 1e-9) + 1e-9 * (1 + bound)).all()


def test_the_bound_is_reached() -> None:
    y = torch.tensor([[0.3, 1.7]], dtype=torch.float64)
    noise = Poisson(0.1, 0.2)
    slope = noise.gradient(torch.zeros(1, 2).double(), y) - noise.gradient(torch.full((1, 2), -1.0).double(), y)
    assert slope.max() == pytest.approx(noise.smoothness(y), rel=1e-12) == pytest.approx(1.7 / 0.2**2)


@given(st.one_of(LIKELIHOODS, st.builds(Poisson, numbers)), st.integers(0, 1000), st.floats(0.05, 20))
@settings(max_examples=80, deadline=None)
def test_the_proximal_map_of_the_conjugate_solves_its_equation(likelihood: Likelihood, seed: int, sigma: float) -> None:
    """By Moreau: with q = prox_{σφ*}(w) and p = (w - q)/σ, q = φ'(p)."""
    w, y = draw(seed, likelihood)
    q = likelihood.conjugate(w, y, sigma)
    p = (w - q) / sigma
    if isinstance(likelihood, Poisson) and likelihood.background + likelihood.noise == 0:
        assert (p >= -1e-12).all()
        free = p > 1e-6
        assert (1 - y / p - q)[free].abs().max() < 1e-5
        assert ((1 - q)[~free] >= -1e-6).all() or bool((y[~free] > 0).any())
    else:
        assert (likelihood.gradient(p, y) - q).abs().max() < 1e-7 * (1 + likelihood.smoothness(y))


def test_noise_is_as_it_is_stated() -> None:
    u = torch.full((1, 200_000), 0.4, dtype=torch.float64)
    for likelihood, variance in ((Gaussian(0.2), 0.04), (Poisson(0.05, 0.1), 0.025), (Poisson(0.05, 0.1, 0.2), 0.065)):
        y = likelihood.sample(u, torch.Generator().manual_seed(3))
        assert torch.equal(y, likelihood.sample(u, torch.Generator().manual_seed(3)))
        assert float(likelihood.signal(y).mean()) == pytest.approx(0.4, abs=0.003)
        assert float(y.var()) == pytest.approx(variance, rel=0.03)
        assert likelihood.spread(y) == pytest.approx(math.sqrt(variance), rel=0.03)


def test_what_has_no_bound_or_no_meaning_is_refused() -> None:
    with pytest.raises(Refused, match="primal-dual"):
        Poisson(0.1).smoothness(torch.ones(1, 2))
    assert Poisson(0.1).value(torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2)).isinf().all()
    for gain, background, noise in (
        (0.0, 1.0, 0.0),
        (-1.0, 1.0, 0.0),
        (math.nan, 0.0, 0.0),
        (1.0, -0.1, 0.0),
        (1.0, 0.0, math.inf),
    ):
        with pytest.raises(BadInput):
            Poisson(gain, background, noise)
    with pytest.raises(BadInput):
        Gaussian(-0.1)
