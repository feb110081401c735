"""Bounds near an image: no perturbation makes a margin fall further, and where no neuron changes its sign they are exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nonexpansive.nn.majorant as module
from nonexpansive.errors import Refused
from nonexpansive.math.certificate import Shape
from nonexpansive.nn import AdaptiveSteps, GradientFlow, MaxMin
from nonexpansive.nn.classifier import Centre, Channels, Classifier, Symmetrised, flow_classifier
from nonexpansive.nn.descent import converted, descend
from nonexpansive.nn.linear import homogeneous
from nonexpansive.nn.majorant import Choice, Majorant, trace
from nonexpansive.robust import Evaluation, certify_classifier, require_sound, search

SHAPE = (3, 8, 8)


def flows(*layers: nn.Module) -> nn.Sequential:
    """Layers in float64 and evaluation mode, with offsets that are not zero."""
    net = nn.Sequential(*layers)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("bias"):
                p.add_(0.2 * torch.randn_like(p))
    return net.double().eval().requires_grad_(False)


def conv(channels: int, hidden: int, **settings: object) -> nn.Conv2d:
    return nn.Conv2d(channels, hidden, 3, padding=1, **settings)  # type: ignore[arg-type]


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {
    "relu": lambda: flows(GradientFlow(conv(3, 9)), nn.Flatten()),
    "deep": lambda: flows(*(GradientFlow(conv(3, 7)) for _ in range(5)), nn.Flatten()),
    "leaky": lambda: flows(*(GradientFlow(conv(3, 7), nn.LeakyReLU(0.2)) for _ in range(3)), nn.Flatten()),
    "dense": lambda: flows(nn.Flatten(), *(GradientFlow(nn.Linear(192, 100)) for _ in range(3))),
    "MaxMin": lambda: flows(
        nn.PixelUnshuffle(2), GradientFlow(conv(12, 12)), MaxMin(), GradientFlow(conv(12, 12)), MaxMin(),
        GradientFlow(conv(12, 12)), MaxMin(), nn.Flatten(),
    ),
    "channels": lambda: flows(
        Centre([0.4] * 3), Channels(8), GradientFlow(conv(8, 8)), nn.PixelUnshuffle(2), Channels(10),
        GradientFlow(conv(10, 20)), Channels(5), GradientFlow(conv(5, 5)), nn.Flatten(),
    ),
    "views": lambda: flows(
        Symmetrised(nn.Sequential(GradientFlow(conv(3, 9)), nn.Identity(), GradientFlow(conv(3, 9)), nn.Flatten()), [1, 2])
    ),
    "substeps": lambda: flows(*(GradientFlow(conv(3, 9), control=AdaptiveSteps(span=30.0)) for _ in range(2)), nn.Flatten()),
    "strided, circular": lambda: flows(
        GradientFlow(conv(3, 9, stride=2)), GradientFlow(conv(3, 9, padding_mode="circular")), nn.Flatten()
    ),
    "short steps": lambda: flows(*(GradientFlow(conv(3, 9), alpha=0.6) for _ in range(3)), nn.Flatten()),
}  # fmt: skip


def images(count: int) -> Tensor:
    return torch.rand((count, *SHAPE), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def size(t: Tensor) -> Tensor:
    return t.flatten(1).norm(dim=1)


def problem(name: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network, images, and for each the functional of the features that is a margin."""
    torch.manual_seed(0)
    net, x = NETWORKS[name](), images(6)
    return net, x, torch.randn((6, net(x[:1]).shape[1]), generator=torch.Generator().manual_seed(2)).double()


def largest_excess(net: nn.Module, x: Tensor, rows: Tensor, bound: Majorant, reach: float) -> float:
    """Of the fall of a margin over its bound, for perturbations of many sizes: random ones, those against the gradient and between, and
    all that are met in ascending the excess from there."""
    x, rows, bound = (
        x.repeat(4, 1, 1, 1),
        rows.repeat(4, 1),
        Majorant(*(part.repeat(4, *(1,) * (part.ndim - 1)) for part in bound)),
    )

    def excess(delta: Tensor) -> Tensor:
        fall, r = ((net(x) - net(x + delta)) * rows).sum(1), size(delta)
        linear = (bound.linear * delta).flatten(1).sum(1)
        return fall - (linear + bound.rounding * r + bound.curvature * r * r + bound.constant)

    scale = reach * torch.tensor([0.1, 0.7, 1.3, 6.0], dtype=torch.float64).repeat_interleave(6)[:, None, None, None]
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
    delta = scale * direction / size(direction)[:, None, None, None]
    start = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((net(start) * rows).sum(), start)
    against = -scale * gradient / size(gradient)[:, None, None, None]
    worst = -torch.inf
    for moved in (delta, against, (delta + against) / 2):
        for _ in range(40):
            moved = moved.detach().requires_grad_()
            value = excess(moved)
            worst = max(worst, float(value.detach().max()))
            (ascent,) = torch.autograd.grad(value.sum(), moved)
            moved = moved + 0.1 * scale * ascent / size(ascent).clamp_min(1e-30)[:, None, None, None]
    return worst


@pytest.mark.parametrize("reach", [0.03, 0.3, 3.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_perturbation_makes_a_margin_fall_further(name: str, reach: float) -> None:
    net, x, rows = problem(name)
    if name == "substeps":
        assert max(flow.step()[1] for flow in net if isinstance(flow, GradientFlow)) > 1
    zero = torch.zeros(len(x), dtype=torch.float64)
    bound = trace(net, x).majorant(rows, zero + reach, zero)
    assert largest_excess(net, x, rows, bound, reach) <= 1e-12
    assert float(bound.rounding.max()) < 1e-9 * float(size(rows).max())


def arbitrary(choices: list[Any], scale: float) -> list[Any]:
    """Choices of the same kind that have nothing to do with the network."""

    def noise(t: Tensor) -> Tensor:
        return scale * torch.randn_like(t)

    def some(chosen: Any) -> Any:
        if isinstance(chosen, list):
            return arbitrary(chosen, scale)
        if isinstance(chosen, Tensor):
            return noise(chosen)
        lam = None if chosen.lam is None else chosen.lam * (2 * torch.randn_like(chosen.lam)).exp()
        seen = None if chosen.seen is None else torch.rand_like(chosen.seen) - 0.1  # which is not to matter
        return Choice(noise(chosen.w), noise(chosen.omega), lam, seen)

    return [some(chosen) for chosen in choices]


@pytest.mark.parametrize("scale", [0.01, 0.3])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_a_bound_whatever_is_chosen(name: str, scale: float) -> None:
    net, x, rows = problem(name)
    met, zero, reach = trace(net, x), torch.zeros(len(x), dtype=torch.float64), 0.3
    choices = met.choices(rows, zero + reach)
    usual = met.majorant(rows, zero + reach, zero, choices)
    bound = met.majorant(rows, zero + reach, zero, arbitrary(choices, scale))
    assert not torch.allclose(bound.constant, usual.constant, rtol=0.1)
    assert largest_excess(net, x, rows, bound, reach) <= 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_descent_finds_larger_radii_which_are_radii_too(name: str) -> None:
    net, x, rows = problem(name)
    met, zero = trace(net, x), torch.zeros(len(x), dtype=torch.float64)
    margin, reach = size(rows) * 0.3, zero + 0.4
    usual = met.majorant(rows, reach, zero).radius(margin, zero)
    rough = trace(copy.deepcopy(net).float(), x.float(), sound=False)
    found = descend(rough, rows.float(), margin.float(), reach.float(), 12)
    bound = met.majorant(rows, reach, zero, converted(found, torch.float64))
    radius = bound.radius(margin, zero)
    assert bool((radius >= usual * (1 - 1e-4)).all())
    if name == "channels":  # what layers that drop channels may choose is not descended on
        assert float(radius.sum()) > 0.98 * float(usual.sum())
    elif name != "substeps":
        assert float(radius.sum()) > 1.02 * float(usual.sum()), float(radius.sum() / usual.sum())
    assert largest_excess(net, x, rows, bound, 0.4) <= 1e-12


@pytest.mark.parametrize("second", [1.0, 0.0, -1e-6, -1e-3])
def test_no_q_makes_the_norm_of_weighted_neurons_too_small(second: float) -> None:
    """A negative q_k would take its own ratio out of the maximum."""
    linear = nn.Linear(2, 2, bias=False).double().requires_grad_(False)
    linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.9, 0.436]]))
    one, A = torch.ones(1, dtype=torch.float64), linear.weight
    overlaps, square = module._overlaps(linear, False), float(torch.linalg.matrix_norm(A, 2)) ** 2
    layer = module._Bent(
        lambda t: t @ A.T, lambda s, scale=1.0: s @ A * scale, square, 1.0, 0.0, 0 * A[:1], 0.0, 0.0, one, 0.0, overlaps
    )
    chosen = Choice(0 * A[:1], lam=0.05 * one, seen=torch.tensor([[1.0, second]], dtype=torch.float64))
    lam, weights, share = layer._weights(torch.ones_like(A[:1]), one, chosen)
    assert torch.allclose(weights, torch.tensor(0.05, dtype=torch.float64))
    assert bool(share * lam * square >= 0.05 * square * (1 - 1e-13))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e30, 0.0])
def test_a_choice_that_breaks_the_arithmetic_costs_the_radius_and_proves_nothing(wrong: float) -> None:
    net, x, rows = problem("deep")
    met, zero = trace(net, x), torch.zeros(len(x), dtype=torch.float64)
    for part in ("w", "omega", "lam", "seen"):
        choices = met.choices(rows, zero + 0.1)
        usual = met.majorant(rows, zero + 0.1, zero, choices).radius(0.1 * size(rows), zero)
        setattr(choices[2], part, getattr(choices[2], part) * 0 + wrong)
        radius = met.majorant(rows, zero + 0.1, zero, choices).radius(0.1 * size(rows), zero)
        assert not bool((radius > usual * (1.01 if part in ("w", "omega", "seen") and wrong == 0 else 1)).any())


def test_what_neurons_cost_is_differentiated_as_it_is() -> None:
    """p = max(0, u/2 - 2λ|z|)²/4λ where s is the best slope: either of the two parabolas alone has another derivative."""
    torch.manual_seed(0)
    z = torch.randn(50, 1, dtype=torch.float64)
    u, lam = torch.randn(50, 1, dtype=torch.float64), 0.1 + torch.rand(50, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda u, lam: module._relaxed(u, z, lam)[1], (u.requires_grad_(), lam.requires_grad_())
    )


def test_descent_goes_where_the_network_can_be_run() -> None:
    """A map of one's own that knows float64 alone, and a float64 network whose float32 copy would take other steps."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.offset = torch.randn(9, 192) / 20, nn.Parameter(torch.zeros(9))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix.T + self.offset

        def norm_bound(self, shape: Shape | None = None) -> float:
            return float(torch.linalg.matrix_norm(self.matrix, 2)) * 1.001

        def absolute_norm_bound(self) -> float:
            return float(torch.linalg.matrix_norm(self.matrix.abs(), 2)) * 1.001

        def terms(self) -> tuple[int, int]:
            return 192, 9

    torch.manual_seed(0)
    head = nn.Linear(192, 3)
    fixed = Fixed()
    flows = (GradientFlow(fixed, shape=(192,)), GradientFlow(nn.Linear(192, 9), control=AdaptiveSteps(span=8.0)))
    fixed.matrix = fixed.matrix.double()
    for flow in flows:
        with torch.inference_mode():
            made = certify_classifier(nn.Sequential(nn.Flatten(), flow, head).double().eval(), SHAPE)
        fine, rough = made.radii(images(4), local=True).radius, made.radii(images(4)).radius
        assert bool((fine >= rough).all()) and bool((fine > rough).any())


@pytest.mark.parametrize("part", ["penalty", "curvature", "constant", "slopes", "longer step"])
def test_a_bound_with_an_error_is_caught(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The perturbations above find out each of these: neurons that change their sign at no cost, ..."""
    net, x, rows = problem("dense")
    zero, reach = torch.zeros(len(x), dtype=torch.float64), 1.0
    relaxed = module._relaxed
    if part == "penalty":
        monkeypatch.setattr(module, "_relaxed", lambda *a: (relaxed(*a)[0], zero))
    if part == "slopes":
        monkeypatch.setattr(module, "_relaxed", lambda *a: (1 - relaxed(*a)[0], relaxed(*a)[1]))
    if part == "longer step":
        whole = module._Bent
        monkeypatch.setattr(
            module, "_Bent", lambda apply, transpose, square, h, *a: whole(apply, transpose, square, h / 2, *a)
        )
    bound = trace(net, x).majorant(rows, zero + reach, zero)
    bound = bound._replace(**{part: zero} if part in ("curvature", "constant") else {})
    assert largest_excess(net, x, rows, bound, reach) > 1e-3


LINEAR: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "linear": (lambda: nn.Linear(20, 12), (20,)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 5, padding=2), (2, 9)),
    "conv2d": (lambda: conv(3, 9), (3, 5, 6)),
    "conv2d, even": (lambda: nn.Conv2d(2, 4, (4, 2), padding=(2, 0)), (2, 5, 6)),
    "conv2d, padded by more than it reaches": (lambda: nn.Conv2d(2, 3, 2, padding=3), (2, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(1, 2, (1, 2, 3), padding=(0, 1, 1)), (1, 2, 4, 3)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_the_norm_of_weighted_neurons_is_bounded_by_their_overlaps(name: str) -> None:
    """max_k (|AAᵀ|Λq)_k/q_k is never below ‖Λ^½A‖², near it for few neurons or overlaps of one sign, and the row's ‖a_k‖² for one."""
    torch.manual_seed(0)
    make, shape = LINEAR[name]
    linear = make().double()
    identity = torch.eye(int(np.prod(shape)), dtype=torch.float64).reshape(-1, *shape)
    columns = homogeneous(linear, identity)[0].detach()  # (inputs, m, ...)
    some = torch.rand(5, *columns.shape[1:], dtype=torch.float64) < torch.tensor([1, 0.5, 0.1, 0.03, 0]).reshape(
        5, *(1,) * (columns.ndim - 1)
    )
    weights = some * torch.rand(some.shape, dtype=torch.float64) ** 4

    def exact(weights: Tensor, columns: Tensor) -> Tensor:
        return torch.stack([torch.linalg.matrix_norm((columns * w.sqrt()).flatten(1), 2) ** 2 for w in weights])

    overlaps = module._overlaps(linear, False)
    assert overlaps is not None
    norms, q = exact(weights, columns), torch.rand_like(weights) + 0.01
    bounds = []
    for _ in range(4):
        bound, q = module._weighted(overlaps, weights, q)
        assert bool((q > 0).all())
        assert bool((bound >= norms * (1 - 1e-13)).all()) and float(bound[-1]) == 0
        bounds.append(bound)
    assert bool((bounds[-1] <= bounds[0] * (1 + 1e-3)).all())

    linear.weight.data.abs_()  # type: ignore[union-attr, operator]
    columns = homogeneous(linear, identity)[0].detach()
    overlaps = module._overlaps(linear, False)
    assert overlaps is not None
    one = torch.zeros_like(weights[:1])
    k = tuple(n // 2 for n in one.shape)
    one[k] = 3.0
    bound, q = module._weighted(overlaps, one, torch.ones_like(one))
    bound, q = module._weighted(overlaps, one, q)
    assert float(bound) >= float(exact(one, columns)) * (1 - 1e-13)
    if "more" not in name:
        assert float(bound) <= 3.0 * float(linear.weight[k[1]].detach().norm() ** 2) * (1 + 1e-6)  # type: ignore[index, operator]
    for _ in range(40):
        bound, q = module._weighted(overlaps, weights, q.expand_as(weights))
    norms = exact(weights, columns)
    assert bool((bound >= norms * (1 - 1e-13)).all())
    if name == "linear":  # no border
        assert bool((bound <= norms * (1 + 1e-3)).all())


def test_overlaps_are_not_guessed_of_other_layers() -> None:
    for linear in (
        conv(4, 4, stride=2), conv(4, 4, dilation=2), conv(4, 4, groups=2), conv(4, 4, padding_mode="circular"),
        nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding="same"),
    ):  # fmt: skip
        assert module._overlaps(linear.double(), False) is None


def weights_met(name: str, reach: float) -> list[tuple[module._Bent, Tensor, Tensor, Tensor]]:
    """Each layer of a network as it was met, and the λ, λ_k and ρ that were chosen there."""
    net, x, rows = problem(name)
    chosen: list[tuple[module._Bent, Tensor, Tensor, Tensor]] = []

    class Watched(module._Bent):  # type: ignore[misc]
        def _weights(self, u: Tensor, reach: Tensor, choice: Choice) -> tuple[Tensor, Tensor, Tensor]:
            lam, weights, share = super()._weights(u, reach, choice)
            chosen.append((self, lam, weights, share * (lam * self.square)))
            return lam, weights, share

    met = trace(net, x)
    parts = [Watched(*part) if isinstance(part, module._Bent) else part for part in met.parts]
    zero = torch.zeros(len(x), dtype=torch.float64)
    met._replace(parts=parts).majorant(rows, zero + reach, zero)
    return chosen


@pytest.mark.parametrize("reach", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("name", ["relu", "dense", "channels", "strided, circular"])
def test_rho_is_no_smaller_than_the_norm(name: str, reach: float) -> None:
    chosen = weights_met(name, reach)
    for layer, lam, weights, rho in chosen:
        shape = layer.transpose(weights).shape[1:]
        columns = layer.apply(torch.eye(int(np.prod(shape)), dtype=torch.float64).reshape(-1, *shape))
        exact = torch.stack([torch.linalg.matrix_norm((columns * w.sqrt()).flatten(1), 2) ** 2 for w in weights])
        assert bool((rho >= exact).all()) and bool((rho <= lam * layer.square * (1 + 1e-8)).all())
        assert bool((weights <= lam.reshape(-1, *(1,) * (weights.ndim - 1))).all())
    if name == "relu" and reach < 1:  # hardly a neuron may change its sign
        assert all(float((rho / (lam * layer.square)).mean()) < 0.7 for layer, lam, _, rho in chosen)


@pytest.mark.parametrize("share", [1.0, 0.8])
def test_a_neuron_is_paid_for_whatever_it_does(share: float) -> None:
    """u(Δ - sd) ≤ λ_k d² + p_k for every d, and with less than λ_k it would not be so."""
    torch.manual_seed(0)
    count = 400
    u, z = (torch.randn(count, 1, dtype=torch.float64) for _ in range(2))
    reach = torch.rand(count, dtype=torch.float64) * 2
    zero = torch.zeros(count, dtype=torch.float64)
    layer = module._Bent(lambda t: t, lambda s, scale=1.0: s * scale, 1.0, 1.0, 0.0, z, 0.0, 0.0, zero)
    lam, weights, _ = layer._weights(u, reach, Choice(torch.zeros_like(u)))
    slope, penalty = module._relaxed(u, z, lam)
    d = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    gained = u * ((z + d).relu() - z.relu() - slope * d)
    over = gained - share * weights * d**2 - penalty[:, None]
    assert bool((over <= 1e-12).all()) == (share == 1)
    assert 0.1 < float((weights[:, 0] < lam).double().mean()) < 0.9


LAYERS: dict[str, Callable[[], tuple[nn.Module, Shape]]] = {
    "flow": lambda: (GradientFlow(conv(3, 9)), SHAPE),
    "leaky flow": lambda: (GradientFlow(conv(3, 9), nn.LeakyReLU(0.3)), SHAPE),
    "short flow": lambda: (GradientFlow(nn.Linear(20, 30), alpha=0.7), (20,)),
    "dropping": lambda: (Channels(2), SHAPE),
    "appending": lambda: (Channels(5), SHAPE),
    "MaxMin": lambda: (MaxMin(), (8, 3, 3)),
    "unshuffling": lambda: (nn.PixelUnshuffle(2), SHAPE),
    "views": lambda: (Symmetrised(nn.Sequential(GradientFlow(conv(3, 9)), Channels(2)), [1]), SHAPE),
}


@pytest.mark.parametrize("curvature", [0.0, 0.5, 50.0])
@pytest.mark.parametrize("name", LAYERS)
def test_of_one_layer_whatever_is_asked_of_its_output(name: str, curvature: float) -> None:
    """U bounds the fall as a function of the output's deviation, so what is pulled back must bound U of it, with nothing to spare where
    w and ω are what the samples do: at the deviation that they are taken from, and at none."""
    torch.manual_seed(0)
    layer, shape = LAYERS[name]()
    layer = flows(layer)[0]
    count, x = 12, torch.randn((12, *shape), dtype=torch.float64)
    zero, reach = torch.zeros(count, dtype=torch.float64), torch.linspace(0.05, 3, count, dtype=torch.float64)
    met = trace(layer, x)
    v = torch.randn(met.output.shape, dtype=torch.float64)
    w = torch.randn(x.shape, dtype=torch.float64)
    w = w * (reach / size(w)).reshape(-1, *(1,) * (x.ndim - 1))
    seen, _ = module._push(met.parts, w)
    outer = Majorant(v, zero, zero + curvature, zero)
    inner = module._pull(met.parts, seen, outer, reach, zero)

    def value(u: Majorant, delta: Tensor) -> Tensor:
        return (
            (u.linear * delta).flatten(1).sum(1)
            + u.rounding * size(delta)
            + u.curvature * size(delta) ** 2
            + u.constant
        )

    def excess(delta: Tensor) -> Tensor:
        return value(outer, layer(x + delta) - met.output) - value(inner, delta)

    for scale in (0.0, 0.3, module.TILT, 1.0, 5.0, -1.0):
        delta = scale * w + 0.0 * x
        for _ in range(60):
            delta = delta.detach().requires_grad_()
            over = excess(delta)
            assert bool((over <= 1e-11 * (1 + curvature)).all()), (scale, float(over.detach().max()))
            (ascent,) = torch.autograd.grad(over.sum(), delta)
            length = (0.05 * reach / size(ascent).clamp_min(1e-30)).reshape(-1, *(1,) * (x.ndim - 1))
            delta = delta + ascent * length
    # κ‖δ'‖² loses little where the layer is an isometry along w
    if name in ("unshuffling", "appending", "dropping"):
        assert torch.allclose(excess(module.TILT * w), zero, atol=1e-7 * (1 + curvature))


def test_what_the_exact_map_may_be_elsewhere_is_covered() -> None:
    """``near``: the sample that the exact map has is not quite the one that was traced."""
    torch.manual_seed(0)
    net, x = flows(GradientFlow(conv(3, 9)), nn.Flatten()), images(6)
    rows, zero = torch.randn((6, 192), dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    off = 1.0
    apart, bound = 0.0, trace(net, x).majorant(rows, zero + 0.02, zero + off)
    plain = trace(net, x).majorant(rows, zero + 0.02, zero)
    start = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((net(start) * rows).sum(), start)
    for _ in range(60):
        moved = torch.randn_like(x)
        true = x + off * moved / size(moved)[:, None, None, None]
        delta = -0.02 * gradient / size(gradient)[:, None, None, None]
        fall = ((net(true) - net(true + delta)) * rows).sum(1)
        assert bool((fall <= bound.within(0.02)).all())
        apart = max(apart, float((fall - plain.within(0.02)).max()))
    assert apart > 0  # without it there is no bound


def test_what_a_layer_of_ones_own_rounds_away_is_covered() -> None:
    """Of such a layer Aa is had as (Aa + b) - b, in which a large b leaves little of a small a."""

    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.full((1,), 1.5 * 2.0**33))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.bias

        def norm_bound(self, shape: Shape | None = None) -> float:
            return 1.0

        def absolute_norm_bound(self) -> float:
            return 1.0

        def terms(self) -> tuple[int, int]:
            return 1, 1

    flow = GradientFlow(Offset(), shape=(1,)).double().eval().requires_grad_(False)
    x, one, row = torch.zeros(1, 1).double(), torch.ones(1).double(), 1.4 * 2.0**-19
    bound = trace(nn.Sequential(flow), x).majorant(torch.tensor([[row]]).double(), one, 0 * one)
    assert bound.rounding is not None
    assert float(bound.within(1.0) + bound.rounding) >= row * abs(flow.step()[0] - 1)  # x ↦ x - h(x + b) there


def test_the_bound_covers_its_own_rounding() -> None:
    """Against the same network in extended precision, with offsets so large that float64 resolves little of the images."""
    if np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps:
        pytest.skip("needs a long double of more than 53 bits")
    torch.manual_seed(0)
    net, count = flows(GradientFlow(nn.Linear(30, 40)), GradientFlow(nn.Linear(30, 40))), 12
    with torch.no_grad():
        for flow in net:
            flow.linear.bias.copy_(1e9 * torch.randn(40).double())
    x, rows = torch.randn(count, 30, dtype=torch.float64), torch.randn(count, 30, dtype=torch.float64)

    def exact(y: np.ndarray) -> list[np.ndarray]:
        at = [y]
        for flow in net:
            a, b = (np.asarray(p.detach().numpy(), np.longdouble) for p in (flow.linear.weight, flow.linear.bias))
            at.append(at[-1] - np.longdouble(flow.step()[0]) * np.maximum(at[-1] @ a.T + b, 0) @ a)
        return at

    here = exact(np.asarray(x.numpy(), np.longdouble))
    copies = [x, net[0](x), net(x)]
    near = torch.stack(
        [
            torch.from_numpy(np.linalg.norm((a - b.numpy()).astype(np.float64), axis=1))
            for a, b in zip(here, copies, strict=True)
        ]
    ).amax(0)
    wrong = 0
    for reach in (1e-8, 1e-4, 1.0):
        bound = trace(net, x).majorant(rows, torch.full((count,), reach, dtype=torch.float64), near)
        linear = np.asarray(bound.linear.numpy(), np.longdouble)
        for scale in (-1.0, 0.3, 1.0, 10.0):
            delta = (
                scale * reach * np.asarray(torch.nn.functional.normalize(-bound.linear, dim=1).numpy(), np.longdouble)
            )
            fall = ((here[-1] - exact(here[0] + delta)[-1]) * np.asarray(rows.numpy(), np.longdouble)).sum(1)
            r = np.linalg.norm(delta.astype(np.float64), axis=1)
            bare = (linear * delta).sum(1)
            assert (
                fall <= bare + bound.rounding.numpy() * r + bound.curvature.numpy() * r * r + bound.constant.numpy()
            ).all()
            wrong += int((fall > bare + bound.curvature.numpy() * r * r).sum())
    assert wrong > 0


def test_the_multiplier_is_the_best_one_at_every_price() -> None:
    torch.manual_seed(0)
    u, z = torch.randn(20, 300, dtype=torch.float64), torch.randn(20, 300, dtype=torch.float64)
    u[0] = -u[0].abs()  # nothing to bound
    z[1] = 0
    z[2:8] += z[2:8].sign()
    for reach in (1e-4, 1e-2, 1.0, 100.0):
        price = torch.full((20,), reach**2, dtype=torch.float64)
        lam = module._multiplier(u, z, price)

        def cost(lam: Tensor, price: Tensor = price) -> Tensor:
            return price * lam + module._relaxed(u, z, lam)[1]

        assert bool(lam.isfinite().all()) and bool((lam > 0).all())
        for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
            assert bool((cost(lam) <= cost(factor * lam) * (1 + 1e-5))[1:].all())
    quiet = module._multiplier(-u[:3].float().abs(), z[:3].float(), torch.full((3,), 1e-3))
    assert bool(quiet.isfinite().all()) and bool((quiet > 0).all())


@pytest.mark.parametrize("name", NETWORKS)
def test_it_bounds_more_sharply_than_the_lipschitz_constant(name: str) -> None:
    """At a small radius, on networks that are not trained, hence with many neurons near 0; in the end to the slope itself."""
    net, x, rows = problem(name)
    zero = torch.zeros(len(x), dtype=torch.float64)
    start = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((net(start) * rows).sum(), start)

    def fall(r: float) -> float:
        """Per unit of distance."""
        bound = trace(net, x).majorant(rows, zero + r, zero)
        return float((size(bound.linear) + bound.curvature * r + bound.constant / r).sum())

    slope, steepest = float(size(gradient).sum()), float(size(rows).sum())
    assert slope * (1 - 1e-9) <= fall(1e-4)
    assert fall(1e-9) < (1.3 if name == "substeps" else 1.01) * slope  # substeps are many, so that the bound is coarse
    if name != "substeps":
        assert fall(1e-4) < 1.05 * slope and fall(1e-2) < min(1.4 * slope, 0.9 * steepest)


def test_where_no_neuron_changes_its_sign_the_radius_is_the_distance_of_the_boundary() -> None:
    """All neurons far from 0, on either side: the network is affine around each image, and the certified radius exact."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), *(GradientFlow(nn.Linear(192, 60)) for _ in range(3)), nn.Linear(192, 4))
    with torch.no_grad():
        for layer in net[1:4]:
            layer.linear.bias += 1000 * layer.linear.weight.norm(dim=1) * torch.randn(60).sign()
        net[-1].bias -= net(images(8).float()).mean(0)  # boundaries near the images
    net, x = net.double().eval().requires_grad_(False), images(8)
    made = certify_classifier(net, SHAPE)
    coarse, fine = made.radii(x), made.radii(x, local=True)
    z, jacobian = net(x), torch.func.vmap(torch.func.jacrev(lambda t: net(t[None])[0]))(x).flatten(2)
    for n, i in enumerate(fine.prediction.tolist()):
        true = min(float((z[n, i] - z[n, j]) / (jacobian[n, i] - jacobian[n, j]).norm()) for j in range(4) if j != i)
        assert true * (1 - 1e-3) <= fine.radius[n] <= true * (1 + 1e-12)
    assert bool((fine.radius > 1.2 * coarse.radius).any())


def trained(**settings: object) -> tuple[Classifier, Tensor, Tensor]:
    """A small classifier of noisy patterns after a short training, its images and labels: its margins lie near its radii."""
    torch.manual_seed(0)
    model = flow_classifier(SHAPE, 5, [{"unshuffle": 2, "channels": 16, "kernels": [3, 3, 3]}], **settings)  # type: ignore[arg-type]
    patterns = torch.rand(5, *SHAPE)
    y = torch.arange(300) % 5
    x = (patterns[y] + 0.4 * torch.randn(300, *SHAPE)).clamp(0, 1)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(60):
        rows = torch.arange(50) + 50 * (step % 6)
        loss = torch.nn.functional.cross_entropy(model(x[rows]) / 0.2, y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval().requires_grad_(False), x[:60], y[:60]


@pytest.mark.parametrize("arithmetic", [None, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    "settings",
    [
        {"sorting": False},
        {"activation": "leaky_relu"},
        {"sorting": False, "symmetrised": True, "shifts": [1]},
        {"sorting": False, "dense": [24, 24]},
    ],
)
def test_radii_near_images_are_larger_and_no_attack_succeeds_within_them(
    settings: dict[str, object], arithmetic: torch.dtype | None
) -> None:
    model, x, y = trained(**settings)
    made = certify_classifier(model, SHAPE, arithmetic=arithmetic)
    coarse, fine = made.radii(x), made.radii(x, local=True)
    assert torch.equal(coarse.prediction, fine.prediction)
    assert bool((fine.radius >= coarse.radius).all())
    if "activation" not in settings:
        assert float(fine.radius.sum()) > 1.02 * float(coarse.radius.sum())
    evaluation = Evaluation(y, *fine)
    assert (evaluation.certified > 0).float().mean() > 0.5
    require_sound(made, evaluation, search(model, x, y, evaluation.certified, "pgd"))


def test_a_layer_with_no_such_bound_is_named() -> None:
    smooth = nn.Sequential(nn.Flatten(), GradientFlow(nn.Linear(192, 9), "tanh"), nn.Linear(192, 3)).eval()
    heun = nn.Sequential(nn.Flatten(), GradientFlow(nn.Linear(192, 9), method="heun"), nn.Linear(192, 3)).eval()
    pooled = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 3)).eval()

    class Own(nn.Sequential):
        pass

    steep = nn.Sequential(nn.Flatten(), GradientFlow(nn.Linear(192, 9), control="unconstrained"), nn.Linear(192, 3))
    steep(images(2).float())
    with torch.no_grad():
        steep[1].linear.weight *= 2
    for model, name in ((steep.eval(), "longer than 2"), (smooth, "Tanh"), (heun, "heun"), (pooled, "AvgPool2d")):
        made = certify_classifier(model, SHAPE)
        assert made.only_global is not None and name in made.only_global
        with pytest.raises(Refused, match=name):
            made.radii(images(2), local=True)
    flow = GradientFlow(nn.Linear(192, 9)).double()
    with pytest.raises(Refused, match="training mode"):
        trace(flow.train(), images(2).flatten(1))
    with pytest.raises(Refused, match="float64"):
        trace(flow.eval().float(), images(2).flatten(1).float())
    with pytest.raises(Refused, match="Own"):
        trace(Own(nn.Flatten()), images(2))


def test_the_program_loses_its_rounding_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = trained(sorting=False)
    speeds: list[Tensor] = []
    radius = Majorant.radius
    monkeypatch.setattr(Majorant, "radius", lambda self, left, speed: speeds.append(speed) or radius(self, left, speed))
    exact, program = (
        certify_classifier(model, SHAPE, arithmetic=a).radii(x, local=True).radius for a in (None, torch.float32)
    )
    assert bool((program <= exact).all()) and bool((program[exact > 0.02] < exact[exact > 0.02]).all())
    # what a float32 program may add grows with the distance, by the slopes of its layers' errors
    made = certify_classifier(model, SHAPE, arithmetic=torch.float32)
    slopes = sum(part.error.slope for part in made._program.features)
    assert slopes > 1e-5 and all(bool((speed < 1e-9).all()) for speed in speeds[: len(speeds) // 2])
    assert all(bool((speed > slopes).all()) for speed in speeds[-len(speeds) // 3 :])
    one, nothing = torch.ones(2), torch.zeros(2)
    bound = Majorant(torch.full((2, 4), 1.0), nothing, one, nothing)
    assert torch.allclose(
        radius(bound, one, torch.tensor([0.0, 1.0])).float(), torch.tensor([2**0.5 - 1, 13**0.5 / 2 - 1.5])
    )


@pytest.mark.parametrize("settings", [{"sorting": False}, {}, {"activation": "leaky_relu", "sorting": False}])
def test_in_training_it_is_the_same_bound_with_the_estimates_of_the_norms(settings: dict[str, object]) -> None:
    model, x, y = trained(**settings)
    with torch.no_grad():
        model.train()
        for flow in model.modules():
            if isinstance(flow, GradientFlow):
                for _ in range(500):
                    flow.control.squared_norm(flow.linear, homogeneous)
        raised, plain = model(x, y, 0.1), model(x)
        model.eval()
        rival = plain.scatter(1, y[:, None], -torch.inf).argmax(1)
        rows = model.head.weight[y] - model.head.weight[rival]
        double = copy.deepcopy(model).double()
        fall = (
            trace(double.features, x.double())
            .majorant(rows.double(), torch.full((len(x),), 0.1, dtype=torch.float64))
            .within(0.1)
        )
    change = (raised - plain).gather(1, rival[:, None])[:, 0]
    assert torch.allclose(
        change, (fall - 0.1 * size(rows)).float(), atol=0.04 * 0.1
    )  # the bound on ‖A‖ is for any size
    others = torch.ones_like(plain, dtype=torch.bool).scatter(1, rival[:, None], False)
    assert torch.allclose(raised[others], plain[others], atol=1e-5) and float(change.mean()) < 0


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_training_can_descend_on_the_bound(precision: torch.dtype) -> None:
    model, x, y = trained(sorting=False)
    model.train().requires_grad_(True)

    def fall() -> Tensor:
        """Less what the Lipschitz constant allows."""
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            return (model(x, y, 0.2).float() - model(x).float()).sum(1).mean()

    before, optimiser = fall().item(), torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(15):
        optimiser.zero_grad()
        fall().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        optimiser.step()
    assert fall().item() < before - 0.05 * 0.2


def test_a_linear_classifier_gains_nothing() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    made = certify_classifier(model, SHAPE)
    assert made.only_global is None
    assert torch.allclose(made.radii(images(9)).radius, made.radii(images(9), local=True).radius, rtol=1e-9)
