"""MaxMin: what it computes, its derivatives by every route, and its memory format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nonexpansive.errors import BadInput
from nonexpansive.nn import MaxMin

PAIRS = MaxMin()


def reference(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat((torch.where(a >= b, a, b), torch.where(a >= b, b, a)), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 4), (2, 6, 5), (2, 4, 3, 3), (2, 4, 2, 3, 2)])
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0] = x[0].clamp(0, 0)  # ties, of zeros of both signs
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for f in (PAIRS, reference):
        z = x.clone().requires_grad_()
        y = f(z)
        y.backward(g)
        results.append((y.detach(), z.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_derivatives_of_every_kind() -> None:
    x = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(PAIRS, z, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(PAIRS, z)
    func = torch.func
    assert torch.equal(func.vmap(lambda v: PAIRS(v[None])[0])(x), PAIRS(x))
    assert torch.equal(func.vmap(lambda v: PAIRS(v[None])[0], 2)(x.movedim(0, 2)), PAIRS(x))
    assert torch.equal(func.jacrev(PAIRS)(x), func.jacfwd(PAIRS)(x))
    assert torch.equal(func.vmap(func.grad(lambda v: PAIRS(v[None]).square().sum()))(x), 2 * x)


def test_channels_last_stays() -> None:
    x = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    y = PAIRS(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (g,) = torch.autograd.grad(y, x, torch.ones(2, 4, 3, 3))  # of another format than x
    assert g.is_contiguous(memory_format=torch.channels_last) and bool((g == 1).all())


def test_odd_channels_are_refused() -> None:
    with pytest.raises(BadInput, match="must be even"):
        PAIRS(torch.zeros(2, 3))
