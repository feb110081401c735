"""Bounds near an image: no perturbation makes a margin fall further, and where no neuron changes its sign they are exact."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nonexpansive.nn.majorant
from nonexpansive.errors import Refused
from nonexpansive.nn import AdaptiveSteps, GradientFlow, MaxMin
from nonexpansive.nn.classifier import Centre, Channels, Classifier, Symmetrised, flow_classifier
from nonexpansive.nn.linear import homogeneous
from nonexpansive.nn.majorant import Majorant, trace
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


@pytest.mark.parametrize("part", ["penalty", "curvature", "constant", "slopes", "longer step"])
def test_a_bound_with_an_error_is_caught(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The perturbations above find out each of these: neurons that change their sign at no cost, ..."""
    net, x, rows = problem("dense")
    zero, reach = torch.zeros(len(x), dtype=torch.float64), 1.0
    module = nonexpansive.nn.majorant
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
    if name != "substeps":  # which are many, so that the bound is coarse
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
    [{"sorting": False}, {"activation": "leaky_relu"}, {"sorting": False, "symmetrised": True, "shifts": [1]}],
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

    for model, name in ((smooth, "Tanh"), (heun, "heun"), (pooled, "AvgPool2d")):
        made = certify_classifier(model, SHAPE)
        assert made.only_global is not None and name in made.only_global
        with pytest.raises(Refused, match=name):
            made.radii(images(2), local=True)
    with pytest.raises(Refused, match="Own"):
        trace(Own(nn.Flatten()), images(2))


def test_the_program_loses_its_rounding_here_too() -> None:
    model, x, _ = trained(sorting=False)
    exact, program = (
        certify_classifier(model, SHAPE, arithmetic=a).radii(x, local=True).radius for a in (None, torch.float32)
    )
    assert bool((program <= exact).all()) and bool((program[exact > 0.02] < exact[exact > 0.02]).all())


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
def test_training_makes_margins_fall_more_slowly(precision: torch.dtype) -> None:
    model, x, y = trained(sorting=False)
    model.train().requires_grad_(True)

    def lost() -> float:
        with torch.no_grad():
            return float((model(x, y, 0.2) - model(x)).sum(1).mean())

    before = lost()
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(15):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(x, y, 0.2).float() / 0.2, y)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        optimiser.step()
    assert lost() < before - 0.02 * 0.2


def test_a_linear_classifier_gains_nothing() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    made = certify_classifier(model, SHAPE)
    assert made.only_global is None
    assert torch.allclose(made.radii(images(9)).radius, made.radii(images(9), local=True).radius, rtol=1e-9)
