"""Laws of the gradient flows: exact adjoints, the formula that they state, a step that follows the weights, and refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cases import METHODS, Difference, Shape, flow_linears, pairs, stretch
from nonexpansive import ButcherTableau, certify, norm_bound
from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.rounding import UNIT
from nonexpansive.nn import (
    AdaptiveSteps,
    CappedStep,
    ClippedRamps,
    Flows,
    GradientFlow,
    Lifted,
    LipschitzStep,
    MaximalStep,
    Rescale,
    Resolvent,
    SignedRamps,
    WeaklyConvexRamps,
    project,
)
from nonexpansive.nn import linear as layers
from nonexpansive.nn.control import CONTROLS
from nonexpansive.nn.flow import LIPSCHITZ, observe
from nonexpansive.nn.linear import FEW, affine, chain_length, homogeneous
from nonexpansive.nn.models import Denoiser

LINEARS = list(flow_linears())
linears = pytest.mark.parametrize(("name", "make", "shape"), LINEARS, ids=[name for name, _, _ in LINEARS])
Make = Callable[[], nn.Module]


def flow(**options: object) -> GradientFlow:
    torch.manual_seed(0)
    return GradientFlow(nn.Linear(4, 6), "relu", **options).eval()  # type: ignore[arg-type]


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


@linears
def test_the_adjoint_is_exact(name: str, make: Make, shape: Shape) -> None:
    torch.manual_seed(0)
    linear = make().double().eval()
    x = torch.randn(3, *shape, dtype=torch.float64)
    t, pullback = affine(linear, x)
    assert torch.allclose(t, linear(x), rtol=1e-12, atol=1e-12)
    s = torch.randn_like(t)
    image, pullback_ = homogeneous(linear, x)
    assert torch.allclose(image, linear(x) - linear(torch.zeros_like(x)), rtol=1e-12, atol=1e-12)
    for scale in (1.0, -0.3, torch.tensor(0.7, dtype=torch.float64)):
        for back in (pullback, pullback_):
            assert torch.allclose((image * s).sum() * scale, (x * back(s, scale)).sum(), rtol=1e-10, atol=1e-12)
            with torch.no_grad():  # where convolutions of few channels go another way
                assert torch.allclose((image * s).sum() * scale, (x * back(s, scale)).sum(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("channels", range(1, FEW + 2))
@pytest.mark.parametrize(
    "geometry", [{}, {"stride": (2, 3)}, {"dilation": (1, 2), "padding": (2, 0)}, {"kernel_size": (1, 4), "stride": 2}]
)
def test_adjoints_column_by_column_are_the_same_ones(
    channels: int, geometry: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strides that leave pixels unreached included; on the CPU without gradients, for few channels, and not where the moved images need
    more memory than the output."""
    gathered: list[int] = []
    written = layers._gathered
    monkeypatch.setattr(layers, "_gathered", lambda *a: gathered.append(1) or written(*a))
    torch.manual_seed(0)
    options = {"kernel_size": 3, "padding": 1, **geometry}
    x = torch.randn(2, channels, 11, 12, dtype=torch.float64)
    for filters in (6 * channels, channels):
        gathered.clear()
        conv = nn.Conv2d(channels, filters, **options).double()  # type: ignore[arg-type]
        t, pullback = affine(conv, x)
        expected = pullback(t, 0.3)
        assert torch.allclose(t, conv(x), rtol=1e-12, atol=1e-12) and not gathered
        with torch.no_grad():
            t_, pullback = affine(conv, x)
            assert torch.allclose(t_, t, rtol=1e-12, atol=1e-12)
            assert torch.allclose(pullback(t, 0.3), expected, rtol=1e-12, atol=1e-12)
        assert bool(gathered) == (channels <= FEW and filters > channels)
        gathered.clear()
        with torch.no_grad():
            t, pullback = affine(conv.bfloat16(), x.bfloat16())
            pullback(t)
        assert not gathered


@linears
def test_a_step_is_what_is_stated_and_its_gradient_too(name: str, make: Make, shape: Shape) -> None:
    """x - hAᵀσ(Ax + b) with A as a dense matrix, in both modes; gradients for x and the weights by finite differences."""
    torch.manual_seed(0)
    block = GradientFlow(make(), "tanh", shape=shape).double().eval()
    x = torch.randn(2, *shape, dtype=torch.float64)
    size = math.prod(shape)
    columns = (
        homogeneous(block.linear, torch.eye(size, dtype=torch.float64).reshape(size, *shape))[0].detach().flatten(1)
    )
    b = block.linear(torch.zeros_like(x[:1])).detach().flatten(1)
    h, n = block.step()
    assert n == 1
    expected = x.flatten(1) - h * torch.tanh(x.flatten(1) @ columns + b) @ columns.T
    assert torch.allclose(block(x).flatten(1), expected, rtol=1e-10, atol=1e-12)

    direction = torch.randn_like(x)
    parameter = next(block.linear.parameters(), None)
    y = x.clone().requires_grad_()
    grads = torch.autograd.grad((block(y) * direction).sum(), [y, *([parameter] if parameter is not None else [])])
    turn = torch.randn_like(x)
    with torch.no_grad():
        ahead, behind = block(x + 1e-6 * turn), block(x - 1e-6 * turn)
        assert torch.allclose(
            (grads[0] * turn).sum(), ((ahead - behind) * direction).sum() / 2e-6, rtol=1e-6, atol=1e-8
        )
        if parameter is not None:  # the step h, which is chosen and not differentiated, has to stand still
            turn = torch.randn_like(parameter)
            h, values = block.step()[0], []
            for sign in (1, -1):
                shifted = copy.deepcopy(block)
                next(shifted.linear.parameters()).add_(sign * 1e-6 * turn)
                shifted.step()
                values.append((shifted._integrate(x, h, 1) * direction).sum())
            assert torch.allclose((grads[1] * turn).sum(), (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-7)


def outcome(network: nn.Module, x: Tensor, *level: float) -> list[Tensor]:
    """The output, and the gradients of x and of the weights."""
    x = x.clone().requires_grad_()
    y = network(x, *level)
    network.zero_grad()
    y.square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in network.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("columns", "chain"), [(1023, None), (1024, 256 + 4), (1030, 206 + 5), (1031, None), (4096, 256 + 16)]
)
def test_products_with_many_columns_are_summed_in_chunks(columns: int, chain: int | None) -> None:
    linear, x = nn.Linear(columns, 3).double().eval(), torch.rand(2, columns, dtype=torch.float64)
    t, pullback = affine(linear, x)
    torch.testing.assert_close(t, linear(x))
    torch.testing.assert_close(pullback(t), t @ linear.weight)
    torch.testing.assert_close(homogeneous(linear, x)[0], x @ linear.weight.T)
    torch.testing.assert_close(affine(linear, x[0])[0], linear(x[0]))
    assert chain_length(linear) == chain
    assert chain_length(linear.train()) is None  # where it is one product, which is quicker
    assert torch.equal(affine(linear, x)[0], linear(x))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_sum_in_chunks_keeps_what_one_sum_may_round_away(compiled: bool) -> None:
    """2²⁴ and 3,840 ones: each chunk is exact in float32, and so is the sum of the chunks. One sum may stay at 2²⁴ for long."""
    linear, x = nn.Linear(4096, 64).eval(), torch.ones(3, 4096)
    nn.init.ones_(linear.weight)
    nn.init.zeros_(linear.bias)
    x[:, :256] = 0
    x[:, 0] = 2.0**24

    def product(x: Tensor) -> Tensor:
        return affine(linear, x)[0]

    with torch.no_grad():
        t = (torch.compile(product, backend="aot_eager") if compiled else product)(x)
    assert bool((t == 2**24 + 3840).all())


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("method", METHODS)
def test_recomputing_changes_neither_outputs_nor_gradients(method: str, control: str) -> None:
    plain, thrifty = flow(method=method, control=control), Flows([flow(method=method, control=control)], 1)
    for mode in (True, True, False):
        for one, other in zip(outcome(plain.train(mode), X), outcome(thrifty.train(mode), X), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("recompute", [1, 2, 3, 9])
def test_recomputing_several_flows_at_once_is_the_same_too(recompute: int) -> None:
    """The estimates of the norms move on by one, as without: the second computation takes the steps of the first."""
    torch.manual_seed(0)
    plain = Denoiser(1, 4, 5, activation="clipped_ramps", hidden="frame", scales=[1, 2]).double()
    thrifty = Denoiser(1, 4, 5, activation="clipped_ramps", hidden="frame", scales=[1, 2], recompute=recompute).double()
    thrifty.load_state_dict(plain.state_dict())
    x = torch.rand(2, 1, 12, 12, dtype=torch.float64)
    for mode in (True, True, False):
        results = [outcome(network.train(mode), x, 0.1) for network in (plain, thrifty)]
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
    for one, other in zip(plain.state_dict().values(), thrifty.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_recomputing_keeps_one_input_of_so_many() -> None:
    kept = []
    x = torch.randn(1, 4, 32, 32)
    for recompute in (0, 1, 2, 5):
        torch.manual_seed(0)
        flows = Flows([GradientFlow(nn.Conv2d(4, 4, 3, padding=1)) for _ in range(10)], recompute)
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: (s.update({t.data_ptr(): t.numel() if t.shape == x.shape else 0}), t)[1], lambda t: t
        ):
            flows(x.requires_grad_())
        kept.append(sum(sizes.values()) / x.numel())
    assert kept == [20, 10, 5, 2]


@pytest.mark.parametrize("recompute", [-1, 1.5, "all"])
def test_the_number_of_flows_to_recompute_is_checked(recompute: object) -> None:
    with pytest.raises(BadInput, match="number of flows"):
        Flows([], recompute)  # type: ignore[arg-type]


def test_what_cannot_be_recomputed_is_refused() -> None:
    linear = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
    for member in (nn.ReLU(), GradientFlow(linear), Lifted(nn.ReLU(), 2), Resolvent(nn.Linear(2, 2))):
        Flows([member])
        with pytest.raises(BadInput, match="cannot recompute"):
            Flows([member], 1)


def test_recomputing_goes_through_hooks_and_subclasses() -> None:
    class Half(GradientFlow):
        def forward(self, x: Tensor, *level: Tensor | float) -> Tensor:
            return super().forward(x, *level) / 2

    torch.manual_seed(0)
    linear, seen = nn.Linear(3, 3), list[int]()
    flows = Flows([Half(linear), GradientFlow(linear)], 2)
    flows[1].register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(2, 3)
    assert torch.equal(flows(x.requires_grad_()), flows[1](flows[0](x)))
    assert seen


def test_weights_that_change_before_they_are_used_again_are_noticed() -> None:
    flows = Flows([flow(control="rescale")], 1).eval()
    y = flows(X.clone().requires_grad_())
    with torch.no_grad():
        next(flows.parameters()).mul_(1.5)
    with pytest.raises(RuntimeError, match="other weights than before"):
        y.sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_a_longer_step_would_break_the_bound(method: str) -> None:
    """The bound on the step is sharp for r = 1: what is certified is not certified by waste."""
    torch.manual_seed(0)
    block = GradientFlow(nn.Linear(4, 4), "identity", method=method).double().eval()
    h, _ = block.step()
    if block.tableau.radius == 1 and method == "euler":
        with torch.no_grad():
            x, d = pairs((4,))
            d = torch.linalg.svd(block.linear.weight)[2][:1].expand_as(d)  # type: ignore[arg-type]
            assert stretch(lambda z: block._integrate(z, 1.01 * h, 1), x, d).max() > 1.009
    assert stretch(block, *pairs((4,))).max() <= 1 + 1e-9


# ------------------------------------------------------------------------------------------------- the step follows the weights


def expected_step(block: GradientFlow) -> float:
    return MaximalStep().safe_step(norm_bound(block.linear), 1.0, block.tableau)[0]


def test_the_step_follows_every_change_of_the_weights() -> None:
    block = flow()
    weight = block.linear.weight
    with torch.no_grad():
        weight.mul_(3)
        block(X)
        assert block.step()[0] == expected_step(block)
        weight[0, 0] = 100.0
        assert block.step()[0] == expected_step(block)
        weight.data = torch.ones(6, 4)
        assert block.step()[0] == expected_step(block)
        block.linear.weight = nn.Parameter(5 * torch.ones(6, 4))
        assert block.step()[0] == expected_step(block)
        block.linear = nn.Linear(4, 2)
        assert block.step()[0] == expected_step(block)
    block.activation = nn.LeakyReLU(2.0)
    assert block.step()[0] == pytest.approx(expected_step(block) / 2)
    block.activation = nn.ReLU()
    block.load_state_dict({name: 7 * t for name, t in block.state_dict().items()})
    assert block._step is not None
    assert block.step()[0] == expected_step(block)
    optimiser = torch.optim.SGD(block.parameters(), lr=10.0)
    block(X).square().sum().backward()
    optimiser.step()
    assert block.step()[0] == expected_step(block)


def test_the_step_follows_weights_in_memory_that_was_used_before() -> None:
    """Twice assigned, a weight may lie where it lay at first, with the count of changes that it had."""
    block = GradientFlow(nn.Linear(64, 64, bias=False)).eval()
    weight = block.linear.weight
    for _ in range(6):
        block(torch.randn(2, 64))
        weight.data = weight.data * 1.5
        weight.data = weight.data * 1.5
        assert block.step()[0] == expected_step(block)
    block.linear.bfloat16()
    block.linear.float()
    assert block.step()[0] == expected_step(block)
    place = block.linear.weight.data_ptr()
    block.linear.weight.data = torch.ones(64, 64)
    others = [torch.empty(64, 64) for _ in range(100)]
    assert place not in [other.data_ptr() for other in others]  # it is not given to others before the change is seen


def test_the_step_follows_a_weight_that_is_no_parameter() -> None:
    block = flow()
    weight = block.linear.weight.detach().clone()
    del block.linear.weight
    block.linear.weight = weight
    assert certify(block, (4,)).nonexpansive
    block.linear.weight.mul_(3)
    assert block.step()[0] == expected_step(block)
    block.linear.weight = 2 * weight
    assert block.step()[0] == expected_step(block)


def test_the_step_follows_the_settings_of_the_layers() -> None:
    block = GradientFlow(nn.Linear(4, 6), nn.LeakyReLU(0.1)).eval()
    first = block.step()[0]
    block.activation.negative_slope = 4.0
    assert block.step()[0] == pytest.approx(first / 4)
    block = GradientFlow(nn.Conv1d(1, 1, 3, padding=1)).eval()
    first = block.step()[0]
    block.linear.stride = (2,)
    block.linear.padding = (0,)
    assert block.step()[0] == expected_step(block) != first
    block = flow(alpha=1.0)
    first = block.step()[0]
    block.control.alpha = 0.5
    assert block.step()[0] == pytest.approx(first / 2)


def test_the_step_follows_what_a_cached_parametrization_stands_for() -> None:
    class Same(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 1.0 * weight

    block = GradientFlow(nn.Linear(4, 6))
    parametrize.register_parametrization(block.linear, "weight", Same())
    block.eval()
    with parametrize.cached(), torch.no_grad():
        block(X)
        block.linear.parametrizations.weight.original.mul_(3)
        block(X)
    assert block.step()[0] == expected_step(block)


def test_a_step_is_not_chosen_anew_where_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    for control in CONTROLS:
        block = flow(control=control)
        block(X)
        with monkeypatch.context() as patch:
            patch.setattr(GradientFlow, "settle", lambda self: pytest.fail("chosen anew"))
            block(X)


def test_writes_behind_torch_are_seen_by_eval_and_by_certify() -> None:
    block = flow()
    block.linear.weight.data.mul_(10)  # changes no count
    assert certify(block, (4,)).nonexpansive
    assert block.step()[0] == expected_step(block)
    block.linear.weight.data.mul_(10)
    assert block.eval().step()[0] == expected_step(block)


def test_a_functional_call_steps_by_the_weights_that_it_is_given() -> None:
    """Also where the tensors of one call take the place of those of the call before."""
    block = flow()
    own = block(X)
    for scale in (1.0, 2.0, 3.0, 30.0):
        twin = copy.deepcopy(block)
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(scale)
        weights = {name: (scale * p).detach() for name, p in block.named_parameters()}
        assert torch.equal(torch.func.functional_call(block, weights, (X,)), twin(X))
        del weights
    assert torch.equal(block(X), own)


def test_transforms_over_the_weights_are_refused_and_over_the_input_work() -> None:
    block = flow()
    weights = {name: p.detach() for name, p in block.named_parameters()}
    with pytest.raises(Refused, match="transform"):
        torch.func.grad(lambda w: torch.func.functional_call(block, w, (X,)).sum())(weights)
    jacobian = torch.func.jacrev(lambda z: block(z[None])[0])(X[0])
    assert float(torch.linalg.matrix_norm(jacobian, 2)) <= 1 + 1e-6
    assert torch.allclose(torch.func.vmap(lambda z: block(z[None])[0])(X), block(X), atol=1e-6)


def test_weights_of_inference_mode_have_no_count_of_changes_and_are_read_each_time() -> None:
    with torch.inference_mode():
        block = flow()
        assert block.linear.weight.is_inference()
        block.linear.weight.mul_(10)
        block(X)
        assert block.step()[0] == expected_step(block)
    usual = flow()
    with torch.inference_mode():
        assert torch.equal(usual(X), usual(X))
        padded = GradientFlow(nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect")).eval()
        assert padded(torch.randn(2, 1, 5)).shape == (2, 1, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_conversion_settles_the_step_for_the_converted_weights(dtype: torch.dtype) -> None:
    block = flow(alpha=0.5)
    before = block(X)
    converted = copy.deepcopy(block).to(dtype)
    assert converted._step is not None
    certificate = certify(converted, (4,))
    assert certificate.averaged is not None and certificate.averaged <= 0.5
    tolerance = {torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    assert torch.allclose(converted(X.to(dtype)).float(), before, atol=tolerance)
    training = converted.train()(X.to(dtype))
    assert torch.isfinite(training).all()


def test_a_copy_has_a_step_of_its_own() -> None:
    block = flow()
    twin = copy.deepcopy(block)
    with torch.no_grad():
        twin.linear.weight.mul_(10)
    assert twin.step()[0] == expected_step(twin)
    assert block.step()[0] == expected_step(block) != twin.step()[0]
    shallow = copy.copy(block)
    assert shallow.step() == block.step()


def test_a_module_without_data_can_be_put_in_evaluation_mode() -> None:
    with torch.device("meta"):
        empty = GradientFlow(nn.Linear(4, 6)).eval()
    with pytest.raises(Refused, match="without data"):
        certify(empty, (4,))
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(flow().state_dict())
    assert torch.equal(filled(X), flow()(X))


def test_compiled_and_exported_blocks_run_the_settled_step() -> None:
    block = flow()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(X), block(X))
        block.linear.weight.mul_(4)
        block.eval()
        assert torch.equal(compiled(X), block(X))
        block.load_state_dict({name: 2 * t for name, t in block.state_dict().items()})
        assert torch.equal(compiled(X), block(X))
        block.linear.weight.mul_(4)  # not seen inside a compiled graph, but certifying settles it
        certify(block, (4,))
        assert torch.equal(compiled(X), block(X))
    exported = torch.export.export(block, (X,)).module()
    assert torch.equal(exported(X), block(X))
    torch._dynamo.reset()


def test_autocast_leaves_the_power_iteration_in_full_precision() -> None:
    one, other = flow().train(), flow().train()
    one(X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = other(X)
    assert torch.equal(one.control.vector, other.control.vector)
    assert torch.isfinite(y).all()
    frozen = flow().train().requires_grad_(False)
    assert not frozen(X).requires_grad
    assert not torch.equal(frozen.control.vector, flow().control.vector)


# ------------------------------------------------------------------------------------------------------------------- refusals


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Returned(nn.Module):
    """A linear module that returns its input itself, which an activation in place would overwrite."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def norm_bound(self, shape: Shape | None) -> float:
        return 1.0


def test_what_breaks_the_theory_is_refused_when_the_block_is_built() -> None:
    linear = nn.Linear(4, 4)
    for sigma in ("gelu", "silu", nn.LeakyReLU(-0.1)):
        with pytest.raises(Refused, match="decreases"):
            GradientFlow(linear, sigma)
    for method in ("midpoint", "heun3", "dopri5"):
        with pytest.raises(Refused, match="radius 0"):
            GradientFlow(linear, method=method)
    with pytest.raises(Refused, match="Resolvent"):
        GradientFlow(linear, method="implicit_euler")
    with pytest.raises(Refused, match="inplace=False"):
        GradientFlow(Returned(), nn.ReLU(inplace=True), shape=(4,))
    with pytest.raises(Refused, match="MaxPool1d"):
        GradientFlow(nn.MaxPool1d(2))
    with pytest.raises(Refused, match="Doubled"):
        GradientFlow(Doubled(2, 2, 3))
    with pytest.raises(Refused, match="Softmax"):
        GradientFlow(linear, nn.Softmax(1))
    for control in ("rescale", "capped"):
        with pytest.raises(Refused, match="plain weight"):
            GradientFlow(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), control=control)
        with pytest.raises(Refused, match="plain weight"):
            GradientFlow(Difference(), control=control, shape=(4,))
    with pytest.raises(BadInput, match="shape"):
        GradientFlow(Difference())
    with pytest.raises(BadInput, match="block already"):
        GradientFlow(linear, control=GradientFlow(nn.Linear(3, 3)).control)
    for wrong in ({"control": "maximum"}, {"method": "eulr"}, {"alpha": 0.0}, {"alpha": 1.5}, {"activation": "rele"}):
        with pytest.raises(BadInput):
            GradientFlow(linear, **wrong)  # type: ignore[arg-type]


def test_what_is_changed_afterwards_is_refused_when_it_is_certified() -> None:
    def altered(change: Callable[[GradientFlow], object]) -> GradientFlow:
        block = flow()
        change(block)
        return block

    for change, word in [
        (lambda b: b.train(), "training mode"),
        (lambda b: b.activation.register_forward_hook(lambda m, i, o: 2 * o), "hooks"),
        (lambda b: b.linear.register_forward_pre_hook(lambda m, i: None), "hooks"),
        (lambda b: setattr(b.activation, "forward", torch.square), "of its own"),
        (lambda b: setattr(b, "_integrate", lambda *a: a[0]), "of its own"),
        (lambda b: setattr(b.activation, "inplace", True), "inplace"),
        (lambda b: setattr(b, "activation", nn.SiLU()), "decreases"),
        (lambda b: b.linear.bias.data.fill_(math.nan), "NaN"),
        (lambda b: b.linear.weight.data.fill_(math.inf), "finite"),
    ]:
        with pytest.raises(Refused, match=word):
            certify(altered(change), (4,))
    with pytest.raises(Refused, match="shape"):
        certify(flow(), (5,))
    scaled = nn.Linear(4, 4)
    parametrize.register_parametrization(scaled, "weight", nn.Dropout())
    with pytest.raises(Refused, match="parametrization in training mode"):
        certify(scaled, (4,))
    assert certify(scaled.eval(), (4,)).lipschitz > 0


def test_a_flow_notices_what_changes_while_its_step_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's write, after the bound has read the weights: counted, so the next call must see it."""
    from nonexpansive.nn import flow as module

    def late(linear: nn.Module) -> float:
        norm = sound(linear)
        with torch.no_grad():
            linear.weight.mul_(10.0)  # type: ignore[operator, union-attr]
        monkeypatch.setattr(module, "sound_norm", sound)
        return norm

    block, sound = flow(), module.sound_norm
    monkeypatch.setattr(module, "sound_norm", late)
    stale = block.settle()
    assert block.step() != stale and block.step() == block.settle()


@pytest.mark.parametrize("kind", [np.float64, np.float32, Fraction])
def test_a_setting_that_is_a_number_of_another_kind_is_looked_at_too(kind: Callable[[float], Any]) -> None:
    block = GradientFlow(nn.Linear(4, 4), nn.LeakyReLU(kind(0.5))).double().eval()
    before = block.step()
    block.activation.negative_slope = kind(20.0)
    assert block.step() != before and block.step() == block.settle()


def test_a_learned_slope_below_zero_is_refused_by_eval() -> None:
    block = GradientFlow(nn.Linear(3, 3), nn.PReLU())
    with torch.no_grad():
        block.activation.weight.fill_(-0.1)  # type: ignore[operator, union-attr]
    with pytest.raises(Refused, match="decreases"):
        block.eval()
    steep = GradientFlow(nn.Linear(3, 3), nn.PReLU()).eval()
    with torch.no_grad():
        steep.activation.weight.fill_(4.0)  # type: ignore[operator, union-attr]
    assert certify(steep, (3,)).nonexpansive
    assert stretch(steep.double(), *pairs((3,))).max() <= 1 + 1e-9


def test_a_method_named_euler_is_not_believed() -> None:
    """Its coefficients are: a tableau of the user's by the name of another has the radius of its own."""
    kutta = ButcherTableau("euler", [[0, 0, 0], [0.5, 0, 0], [-1, 2, 0]], [1 / 6, 2 / 3, 1 / 6])
    block = GradientFlow(nn.Linear(3, 3), "identity", method=kutta).double().eval()
    assert block.tableau.radius == pytest.approx(0.5)
    assert stretch(block, *pairs((3,))).max() <= certify(block, (3,)).lipschitz + 1e-9


@pytest.mark.parametrize("method", ["euler", "rk4", "ssp33", "heun"])
@pytest.mark.parametrize("factor", [1.3, 4.0])
@pytest.mark.parametrize("count", [1, 3])
def test_a_control_that_steps_too_far_proves_no_more_than_is_true(method: str, factor: float, count: int) -> None:
    """L above 1 and no α; of Euler's step on a quadratic exactly hL‖A‖² - 1, and never less than the slope that is found."""

    class Reckless(MaximalStep):
        def safe_step(self, norm: float, lipschitz: float, tableau: ButcherTableau) -> tuple[float, int]:
            return factor * super().safe_step(norm, lipschitz, tableau)[0], count

    torch.manual_seed(0)
    block = GradientFlow(nn.Linear(4, 6), "identity", control=Reckless(), method=method).eval()
    proved = certify(block, (4,))
    assert proved.lipschitz > 1.0 and proved.averaged is None and "too long" in proved.rule
    found = stretch(block.double(), *pairs((4,))).max()
    assert found <= proved.lipschitz * (1 + 1e-9)
    if method == "euler":
        assert proved.lipschitz == pytest.approx((2 * factor - 1) ** count, rel=1e-4)
        assert found > 1.0
    if factor < 2 and count == 1:
        less = certify(flow(control=Reckless(0.5)), (4,))
        assert less.averaged == pytest.approx(0.5 * factor, abs=1e-6) and less.lipschitz == 1.0


# ------------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_constraint_the_step_stays_and_the_proof_goes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make = [
        GradientFlow(nn.Conv1d(2, 3, 3, padding=1), control=name, alpha=0.4) for name in ("maximal", "unconstrained")
    ]
    make[1].load_state_dict({**make[1].state_dict(), **make[0].state_dict()})
    held, free = (block.to(dtype) for block in make)
    x = torch.randn(4, 2, 9, dtype=dtype)
    assert torch.allclose(held(x), free(x), atol=0.01)  # to begin with the same, but for the estimates of ‖A‖
    step = float(free.control.size)
    with torch.no_grad():
        for block in (held, free):
            block.linear.weight.mul_(3)
    assert free(x).norm() > 1.2 * held(x).norm() and float(free.control.size) == step
    assert certify(held.eval(), (2, 9)).averaged == pytest.approx(0.4, abs=1e-5)
    assert free.eval().step() == (step, 1)
    free.control.size.mul_(0.5)  # seen, as any change of the weights is
    assert free.step() == (step / 2, 1)
    free.control.size.mul_(2)
    proved = certify(free, (2, 9))
    assert proved.averaged is None and proved.lipschitz == pytest.approx(9 * 0.8 - 1, rel=0.03)
    again = GradientFlow(nn.Conv1d(2, 3, 3, padding=1), control="unconstrained", alpha=0.4).to(dtype).eval()
    again.load_state_dict(free.state_dict())
    assert torch.equal(again(x), free(x))


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_without_a_constraint_a_decreasing_activation_is_certified_for_what_it_is(method: str) -> None:
    torch.manual_seed(0)
    linear = nn.Conv1d(2, 6, 3, padding=1)
    ramps = SignedRamps(6, 2)
    with torch.no_grad():
        ramps.mixture += torch.tensor([[0.3], [-0.3]])  # between its thresholds, σ decreases
    for control in ("maximal", "adaptive", "capped", "rescale"):
        with pytest.raises(Refused, match="decreases"):
            GradientFlow(copy.deepcopy(linear), ramps, control=control)
    flow = GradientFlow(linear, ramps, method=method, control="unconstrained").double().eval()
    proved = certify(flow, (2, 9))
    assert proved.averaged is None and "σ decreases" in proved.rule
    found = 0.0
    for size in (0.1, 0.2, 0.4):
        for _ in range(10):
            jacobian = torch.func.jacrev(lambda x: flow(x[None])[0])(size * torch.randn(2, 9).double())
            found = max(found, torch.linalg.matrix_norm(jacobian.detach().reshape(18, 18), 2).item())
    assert 1.05 < found <= proved.lipschitz
    assert method != "euler" or proved.lipschitz < 1.6 * found  # not by the triangle inequality, which has 1 + hL‖A‖²
    single = copy.deepcopy(flow).float()
    x = torch.randn(20, 2, 9)
    apart = (single(x).double() - flow(x.double())).flatten(1).norm(dim=1)
    error = certify(single, (2, 9), arithmetic=torch.float32).error
    assert all(float(d) <= error(float(size)) for d, size in zip(apart, x.flatten(1).norm(dim=1), strict=True))


def test_a_free_step_is_that_of_the_weights_with_which_training_begins() -> None:
    torch.manual_seed(0)
    block, empty = (GradientFlow(nn.Conv2d(16, 16, 3, padding=1), control="unconstrained") for _ in range(2))
    with torch.no_grad():
        block.linear.weight.normal_(std=0.1)
        empty.linear.weight.zero_()
    for made in (block, empty):
        made(torch.randn(1, 16, 4, 4))
    assert certify(block.eval(), (16, 8, 8)).lipschitz < 1.3  # an estimate from below, but not the first guess
    assert float(empty.control.size) == 0.0  # of no weights at all there is no largest step
    with torch.no_grad():
        empty.linear.weight.copy_(block.linear.weight)
    empty(torch.randn(1, 16, 4, 4))
    assert certify(empty.eval(), (16, 8, 8)).lipschitz < 1.3


@pytest.mark.parametrize("lipschitz", [1.01, 1.5, 4.0])
@pytest.mark.parametrize("kind", ["relu", "signed", "weakly convex", "falls more than it rises"])
def test_a_step_that_may_stretch_does_so_by_no_more_than_is_wanted(kind: str, lipschitz: float) -> None:
    """And where the slopes are all that they may be, by as much: no longer step would do."""

    class Steep(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(x > 0, x, 3 * -x)  # 1 above 0 and -3 below

        def slope_range(self) -> tuple[float, float]:
            return -3.0, 1.0

    torch.manual_seed(1)
    ramps = {"signed": SignedRamps, "weakly convex": WeaklyConvexRamps}.get(kind)
    sigma = ramps(6, 2) if ramps else "relu" if kind == "relu" else Steep()
    if ramps:
        with torch.no_grad():
            sigma.mixture += torch.tensor([0.4, -0.4, 0.0])[: len(sigma.mixture), None]
    flow = GradientFlow(nn.Conv1d(2, 6, 3, padding=1), sigma, control=LipschitzStep(lipschitz))
    with torch.no_grad():
        flow.linear.weight.mul_(3)
    training, _ = flow._chosen()
    flow = flow.double().eval()
    assert float(torch.as_tensor(training).detach()) == pytest.approx(flow.step()[0], rel=0.1), (
        "the step with which it was trained"
    )
    proved = certify(flow, (2, 9))
    assert proved.averaged is None and not proved.proximal
    assert lipschitz * (1 - 1e-5) < proved.lipschitz <= lipschitz
    found = 0.0
    for size in (0.1, 0.3, 1.0, 3.0):
        for _ in range(10):
            jacobian = torch.func.jacrev(lambda x: flow(x[None])[0])(size * torch.randn(2, 9).double())
            found = max(found, torch.linalg.matrix_norm(jacobian.detach().reshape(18, 18), 2).item())
    assert found <= proved.lipschitz
    if kind in ("relu", "falls more than it rises"):
        dense = GradientFlow(
            nn.Linear(2, 2, bias=False), copy.deepcopy(flow.activation), control=LipschitzStep(lipschitz)
        )
        with torch.no_grad():
            dense.linear.weight.copy_(torch.eye(2))
        dense.double().eval()
        x = torch.tensor([[-1.0, 1.0]]).double()
        jacobian = torch.func.jacrev(lambda x: dense(x[None])[0])(x[0])
        assert torch.linalg.matrix_norm(jacobian, 2).item() == pytest.approx(lipschitz, rel=1e-5)
        assert torch.linalg.matrix_norm(torch.eye(2) - 1.001 * (torch.eye(2) - jacobian), 2).item() > lipschitz


def test_only_eulers_step_may_stretch_and_by_a_number_above_1() -> None:
    flow = GradientFlow(nn.Linear(3, 4), method="heun", control=LipschitzStep(2.0))
    for mode in (True, False):
        with pytest.raises(Refused, match="Euler"):
            flow.train(mode)(torch.zeros(1, 3))
    for wrong in (1.0, 0.5, math.inf, math.nan):
        with pytest.raises(BadInput, match="above 1"):
            LipschitzStep(wrong)


def test_steps_of_an_optimiser_keep_the_constant() -> None:
    torch.manual_seed(0)
    model = Denoiser(1, 4, 3, activation="weakly_convex_ramps", lipschitz=3.0)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(6):
        optimiser.zero_grad()
        model(torch.rand(4, 1, 12, 12), 0.1).square().mean().neg().backward()
        optimiser.step()
    assert 2.9 < certify(model.eval(), (1, 12, 12)).lipschitz <= 3
    assert certify(copy.deepcopy(model).double().eval(), (1, 12, 12)).lipschitz <= 3


OPTIMISED = [
    lambda: MaximalStep(), lambda: MaximalStep(0.4), lambda: AdaptiveSteps(), lambda: AdaptiveSteps(0.4),
    lambda: Rescale(), lambda: Rescale(0.4, span=2.0), lambda: CappedStep(0.4),
]  # fmt: skip


@pytest.mark.parametrize("control", range(len(OPTIMISED)))
@pytest.mark.parametrize("activation", ["relu", "prelu", "ramps"])
def test_steps_of_an_optimiser_keep_the_constraint(control: int, activation: str) -> None:
    torch.manual_seed(control)
    flows = []
    for _ in range(2):
        sigma = ClippedRamps(3) if activation == "ramps" else activation
        flows.append(GradientFlow(nn.Conv1d(2, 3, 3, padding=1), sigma, control=OPTIMISED[control]()))
    model = nn.Sequential(*flows)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    try:
        for seed in range(4):
            x = torch.randn(8, 2, 6, generator=torch.Generator().manual_seed(seed))
            optimiser.zero_grad()
            model(x).square().mean().neg().backward()  # towards a map that expands
            optimiser.step()
            project(model)
        for _ in range(5):  # the estimate of the norm, which is warm-started, settles
            project(model)
        certificates = [certify(block.eval(), (2, 6)) for block in flows]
    except Refused as refusal:  # a learned slope may have left the constraint, and is found out
        assert activation == "prelu" and "decreases" in str(refusal)
        return
    for block, certificate in zip(flows, certificates, strict=True):
        assert certificate.lipschitz <= 1
        if block.control.alpha < 1:
            assert certificate.averaged is not None and certificate.averaged <= block.control.alpha
        assert stretch(copy.deepcopy(block).double(), *pairs((2, 6))).max() <= 1 + 1e-6
        if isinstance(block.control, Rescale):  # and its weights were brought back, but for what the estimate missed
            safe = block.control.largest(norm_bound(block.linear), block._steepest, block.tableau)
            assert safe >= 0.9 * block.control.span


# ------------------------------------------------------------------------------------------------------------ rounding observed

OBSERVED = [
    pytest.param(lambda: nn.Linear(1, 1), (1,), {"activation": "identity"}, id="one number"),
    pytest.param(lambda: nn.Conv2d(4, 4, 1, groups=4), (4, 3, 3), {"activation": "identity"}, id="pointwise"),
    pytest.param(lambda: nn.Linear(12, 20), (12,), {}, id="linear"),
    pytest.param(lambda: nn.Conv2d(3, 8, 3, padding=1), (3, 7, 6), {}, id="zeros"),
    pytest.param(lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), (3, 7, 6), {}, id="circular"),
    pytest.param(lambda: nn.Conv2d(4, 8, 3, padding=1, stride=2, groups=2), (4, 7, 6), {}, id="stride"),
    pytest.param(lambda: nn.Conv1d(3, 5, 5, padding="same", padding_mode="reflect"), (3, 16), {}, id="reflect"),
    pytest.param(lambda: nn.Conv2d(3, 8, 3, padding=1), (3, 7, 6), {"method": "rk4"}, id="rk4"),
    pytest.param(lambda: nn.Conv2d(3, 8, 3, padding=1), (3, 7, 6), {"method": "ssp33"}, id="ssp33"),
    pytest.param(lambda: nn.Conv2d(3, 8, 3, padding=1), (3, 7, 6), {"activation": "tanh"}, id="tanh"),
    pytest.param(lambda: nn.Conv2d(3, 8, 3, padding=1), (3, 7, 6), {"control": "adaptive"}, id="substeps"),
]


@pytest.mark.parametrize(("make", "shape", "options"), OBSERVED)
def test_the_rounding_at_samples_that_are_seen(make, shape, options):
    """Above that of the float32 program, and below the certificate's for samples of their size; between samples it changes by at
    most the certificate's slope."""
    torch.manual_seed(0)
    flow = GradientFlow(make(), **options)
    with torch.no_grad():
        flow.linear.weight.mul_(3)
    flow.eval()
    double = copy.deepcopy(flow).double()
    assert double.step() == flow.step()
    worst = certify(flow, shape, arithmetic=torch.float32).error
    x = torch.randn(64, *shape)
    near = x + 0.03 * torch.randn_like(x)
    with torch.inference_mode():
        program, exact = flow(x).double(), double(x.double())
        seen, beside = (observe(double, y.double(), UNIT[torch.float32])[1] for y in (x, near))
    off = (program - exact).flatten(1).norm(dim=1)
    sizes = x.double().flatten(1).norm(dim=1)
    assert bool((off > 0).all()) and bool((off <= seen).all())
    assert bool((seen <= (worst.slope * sizes + worst.constant) * (1 + 1e-6)).all())
    if flow.linear.weight[0].numel() > 1:  # where there are sums, they are smaller than they could be
        assert bool((seen < 0.7 * (worst.slope * sizes + worst.constant)).all())
    moved = (x - near).double().flatten(1).norm(dim=1)
    assert bool(((seen - beside).abs() <= LIPSCHITZ * worst.slope * moved).all())
    with torch.inference_mode():
        far = observe(double, 1000 * x.double(), UNIT[torch.float32])[1]
    assert bool((far - seen <= LIPSCHITZ * worst.slope * 999 * sizes).all())


class Substeps(MaximalStep):
    """``count`` steps that are each the largest."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def safe_step(self, norm: float, lipschitz: float, tableau: ButcherTableau) -> tuple[float, int]:
        return super().safe_step(norm, lipschitz, tableau)[0], self.count


def test_rounding_adds_up_over_substeps() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(12, 20).double(), torch.randn(7, 12).double()
    one, three = (GradientFlow(linear, control=Substeps(count)).eval() for count in (1, 3))
    with torch.inference_mode():
        value, total = observe(three, x, UNIT[torch.float32])
        each = []
        for _ in range(3):
            x, error = observe(one, x, UNIT[torch.float32])
            each.append(error)
    assert torch.equal(value, x)
    assert bool((total >= torch.stack(each).sum(0)).all()) and bool((total <= 1.001 * torch.stack(each).sum(0)).all())


def test_a_program_that_sums_one_by_one_stays_within_what_was_seen():
    """A step written out, every sum taken entry by entry in float32, the largest first, so that small ones are lost."""
    torch.manual_seed(0)
    flow = GradientFlow(nn.Linear(200, 30)).eval()
    with torch.no_grad():
        flow.linear.weight.copy_(torch.rand(30, 200) * 1e-4).select(1, 0).fill_(1.0)
        flow.linear.bias.fill_(0.5)
    double = copy.deepcopy(flow).double()
    weight, (h, n) = flow.linear.weight.detach(), flow.step()
    assert n == 1
    x = torch.rand(200)
    x[0] = 1.0
    t = torch.stack([sum(row[1:] * x[1:], row[0] * x[0]) + 0.5 for row in weight])
    scaled = weight * -h
    program = x + sum(scaled[i] * t[i] for i in range(30))
    with torch.inference_mode():
        off = (program.double() - double(x.double()[None])[0]).norm()
        seen = observe(double, x.double()[None], UNIT[torch.float32])[1]
    assert float(off) <= float(seen) < 200 * float(off)
