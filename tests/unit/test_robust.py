"""Attacks and certificates on a small classifier of scikit-learn's digits: they meet, and neither may lie."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nonexpansive
from nonexpansive.errors import BadInput, Diverging
from nonexpansive.nn.classifier import Classifier, flow_classifier
from nonexpansive.nn.flow import GradientFlow
from nonexpansive.robust import (
    ATTACKS,
    EPSILONS,
    CertifiedClassifier,
    Curve,
    Evaluation,
    Found,
    certify_classifier,
    evaluate,
    nearest,
    require_sound,
    search,
)
from nonexpansive.robust.attacks import apgd, apgd_targeted, fab, pgd, square

SHAPE = (1, 8, 8)
FAST = (partial(pgd, restart=0), partial(pgd, restart=1))


@dataclasses.dataclass(frozen=True)
class Trained:
    model: Classifier
    made: CertifiedClassifier
    images: Tensor
    labels: Tensor
    evaluation: Evaluation


@pytest.fixture(scope="module")
def digits() -> Trained:
    datasets = pytest.importorskip("sklearn.datasets", reason="the digits are those of scikit-learn")
    data = datasets.load_digits()
    images, labels = (torch.from_numpy(a) for a in (data.images * 255 / 16, data.target))
    images = images.round().to(torch.uint8)[:, None]
    torch.manual_seed(0)
    model = flow_classifier(SHAPE, 10, [{"unshuffle": 2, "channels": 16, "kernels": [3, 3]}])
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(120):
        rows = torch.randint(0, 1600, (128,))
        z = model(images[rows] / 255) - 0.5 * F.one_hot(labels[rows], 10)
        loss = F.cross_entropy(z / 0.1, labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    made = certify_classifier(model, SHAPE)
    held, names = images[1600:1648], labels[1600:1648]
    return Trained(model, made, held, names, evaluate(made, held, names, batch=20))


def attacked(trained: Trained, epsilons: Tensor, attack: object = FAST) -> Found:
    return search(trained.model, trained.images / 255, trained.labels, epsilons, attack)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"channel": 8}, "no channel"),
        ({"unshuffle": 3}, "divisor"),
        ({"channels": 8, "kernels": [2]}, "must be odd"),
        ({"channels": 7, "kernels": [3]}, "must be even"),
        ({"channels": 8, "neurons": 0, "kernels": [3]}, "neurons must be at least 1"),
    ],
)
def test_stages_that_cannot_be_built_are_refused(stage: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        flow_classifier((1, 8, 8), 3, [stage])


def test_dense_flows_follow_the_last_stage() -> None:
    """Each with its own number of neurons, on all that the last stage gives; none, and the network is the one without."""
    stage: dict[str, object] = {"unshuffle": 2, "channels": 8, "kernels": [3]}
    model = flow_classifier((1, 8, 8), 3, [stage], sorting=False, dense=[6, 4])
    linears = [flow.linear for flow in model.modules() if isinstance(flow, GradientFlow)]
    assert [tuple(linear.weight.shape) for linear in linears] == [(8, 8, 3, 3), (6, 128), (4, 128)]
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    shapes = [p.shape for p in flow_classifier((1, 8, 8), 3, [stage], sorting=False).parameters()]
    assert shapes == [p.shape for p in flow_classifier((1, 8, 8), 3, [stage], sorting=False, dense=[]).parameters()]
    for wrong in ([6, 0], [2.5], [True], "ab", 5, [-1], [float("nan")]):
        with pytest.raises(BadInput, match="how many neurons"):
            flow_classifier((1, 8, 8), 3, [stage], dense=wrong)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="cannot pair"):
        flow_classifier((1, 5, 5), 3, [], dense=[4])


def test_it_learned_and_is_certified(digits: Trained) -> None:
    assert digits.evaluation.correct.float().mean() > 0.8
    assert digits.evaluation.certified.median() > 0.2
    assert bool((digits.evaluation.certified[~digits.evaluation.correct] == 0).all())


@pytest.mark.parametrize("part", [FAST, (apgd,), (partial(apgd_targeted, rank=1),), (partial(fab, rank=1),)])
def test_no_attack_succeeds_within_a_certified_radius(digits: Trained, part: object) -> None:
    if part is not FAST:
        pytest.importorskip("pyautoattack", reason="needs the extra nonexpansive[attack]")
    found = attacked(digits, 0.999 * digits.evaluation.certified, part)
    right = digits.evaluation.certified > 0
    assert bool((found.distance[right] > digits.evaluation.radius[right]).all())
    require_sound(digits.made, digits.evaluation, found)


def test_radii_near_the_images_are_asked_for_those_that_are_right(digits: Trained) -> None:
    near = evaluate(digits.made, digits.images, digits.labels, batch=20, local=True)
    prediction, radius = digits.made.radii(digits.images / 255, local=True)
    right, global_radius = near.correct, digits.evaluation.radius
    assert torch.equal(near.prediction, prediction) and torch.equal(near.radius[~right], global_radius[~right])
    assert torch.allclose(near.radius[right], radius[right], rtol=1e-9)
    assert bool((near.radius >= global_radius).all()) and bool((near.radius > 1.05 * global_radius).any())


def test_an_attack_beyond_the_radius_succeeds(digits: Trained) -> None:
    found = attacked(digits, 4 * digits.evaluation.certified)
    right = digits.evaluation.certified > 0
    assert found.distance[right].isfinite().float().mean() > 0.9
    with torch.no_grad():
        assert bool((digits.model(found.image).argmax(1) != digits.labels)[found.distance.isfinite()].all())


def test_a_lipschitz_constant_that_is_too_low_is_caught(digits: Trained) -> None:
    wrong = dataclasses.replace(digits.made, lipschitz=digits.made.lipschitz / 3)
    evaluation = evaluate(wrong, digits.images, digits.labels)
    with pytest.raises(Diverging, match="the certificate is wrong"):
        require_sound(wrong, evaluation, attacked(digits, 0.999 * evaluation.certified))


def test_pairwise_norms_that_are_too_small_are_caught(digits: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    true = torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda *a, **k: true(*a, **k) / 3)
    evaluation = evaluate(digits.made, digits.images, digits.labels)
    monkeypatch.undo()
    with pytest.raises(Diverging, match="the certificate is wrong"):
        require_sound(digits.made, evaluation, attacked(digits, 0.999 * evaluation.certified))


def test_a_norm_bound_that_is_too_low_is_caught(digits: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the bound of one layer, which nothing but its use shows."""
    steep = nn.Sequential(nonexpansive.nn.Scale(3.0), *digits.model.features, digits.model.head).eval()
    images = digits.images / 255 / 3
    true = nonexpansive.math.certificate._RULES[nonexpansive.nn.Scale]
    monkeypatch.setitem(
        nonexpansive.math.certificate._RULES,
        nonexpansive.nn.Scale,
        lambda module, shape, unit: dataclasses.replace(true(module, shape, unit), lipschitz=1.0),
    )
    made = certify_classifier(steep, SHAPE)
    evaluation = evaluate(made, images, digits.labels)
    found = search(steep, images, digits.labels, 0.999 * evaluation.certified, FAST)
    with pytest.raises(Diverging, match="the certificate is wrong"):
        require_sound(made, evaluation, found)


@pytest.fixture(scope="module")
def linear() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A linear classifier with all classes equally far apart, grey images whose nearest boundary lies well within [0, 1], their
    classes, and the distance of that boundary."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).eval()
    with torch.no_grad():
        nn.init.orthogonal_(
            model[1].weight, gain=100.0
        )  # so steep that the cross-entropy sees the strongest rival alone
    x = 0.5 + 0.05 * torch.randn(12, *SHAPE)
    prediction, radius = certify_classifier(model, SHAPE).radii(x)
    assert radius.max() < 1
    return model, x, prediction, radius


PARTS = [partial(pgd, restart=0), partial(pgd, restart=1), apgd, partial(apgd_targeted, rank=1), partial(fab, rank=1)]


@pytest.mark.parametrize("part", PARTS, ids=["pgd", "pgd on margins", "apgd", "apgd-t", "fab-t"])
def test_each_attack_reaches_the_boundary_of_a_linear_classifier(linear, part) -> None:
    if getattr(part, "func", part) is not pgd:
        pytest.importorskip("pyautoattack", reason="needs the extra nonexpansive[attack]")
    model, x, y, distance = linear
    found = search(model, x, y, 1.02 * distance, (part,))
    assert bool((found.distance > distance).all()) and bool((found.distance < 1.021 * distance).all())


def test_the_ensemble_breaks_all_of_a_linear_classifier(linear) -> None:
    pytest.importorskip("pyautoattack", reason="needs the extra nonexpansive[attack]")
    model, x, y, distance = linear
    found = search(model, x, y, 1.02 * distance, "auto")
    assert bool((found.distance < 1.021 * distance).all())


def test_square_needs_no_gradient(linear) -> None:
    pytest.importorskip("pyautoattack", reason="needs the extra nonexpansive[attack]")
    model, x, y, distance = linear
    level = 4 * float(distance.max())
    found = search(opaque(model), x, y, (level,), (square,))
    assert found.distance.isfinite().float().mean() > 0.5
    assert bool((found.distance[found.distance.isfinite()] <= level).all())


def opaque(model: nn.Module) -> nn.Module:
    """The same function without any gradient."""

    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.detach())

    return Opaque()


def test_what_was_found_is_an_image_within_its_distance(digits: Trained) -> None:
    epsilon = torch.full((48,), 0.8)
    found, x = attacked(digits, epsilon), digits.images / 255
    assert bool(((found.image >= 0) & (found.image <= 1)).all())
    distance = (found.image.double() - x.double()).flatten(1).norm(dim=1)
    hit = found.distance.isfinite()
    assert hit.sum() > 24
    assert torch.allclose(distance[hit], found.distance[hit], rtol=1e-12)
    assert bool((distance <= 0.8).all())


def test_a_success_counts_at_every_larger_epsilon(digits: Trained) -> None:
    x, y = digits.images / 255, digits.labels
    found = search(digits.model, x, y, (0.3, 0.6), FAST[:1])
    alone = search(digits.model, x, y, (0.6,), FAST[:1])
    curve = Curve.of("attacked", found.distance, (0.0, 0.3, 0.6, 1.0))
    assert list(curve.counts) == sorted(curve.counts, reverse=True)
    assert curve.counts[2] <= int((alone.distance > 0.6).sum()) + 1
    assert curve.counts[0] == int(digits.evaluation.correct.sum())


def test_the_nearest_adversary_of_a_linear_classifier_is_at_its_boundary(linear) -> None:
    pytest.importorskip("pyautoattack", reason="needs the extra nonexpansive[attack]")
    model, x, y, distance = linear
    found = nearest(model, x, y)
    ratio = found.distance / distance  # up to the float32 rounding of what lies on the boundary
    assert ratio.min() > 1 - 1e-4 and ratio.max() < 1 + 1e-3
    assert bool((model(x.lerp(found.image, 1.001)).argmax(1) != y).all())


def test_attacks_repeat_by_seed_and_leave_no_trace(digits: Trained) -> None:
    x, y = digits.images[:2] / 255, digits.labels[:2]
    state = torch.get_rng_state()
    one, two = (search(digits.model, x, y, (0.5,), (partial(pgd, restart=1),)) for _ in range(2))
    assert torch.equal(one.image, two.image) and torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in digits.model.parameters())
    assert all(p.grad is None or not p.grad.isnan().any() for p in digits.model.parameters())


def test_pgd_crosses_the_ball_several_times() -> None:
    """On a loss without slope in sight PGD still moves about: its steps add up to five diameters."""
    x, y, seen = torch.full((1, *SHAPE), 0.5), torch.tensor([0]), []

    def predict(points: Tensor) -> Tensor:
        seen.append(points.detach())
        turn = points.flatten(1)[:, :1] * (-1) ** len(seen)  # the gradient turns about at every step
        return torch.cat([turn, -turn], 1) * 0 + torch.cat([turn, torch.zeros_like(turn)], 1)

    pgd(predict, x, y, torch.tensor([0.1]), restart=0)
    assert len(seen) == 101
    assert max(float((p - x).norm()) for p in seen) <= 0.1 * (1 + 1e-5)
    assert sum(float((a - b).norm()) for a, b in zip(seen[1:], seen[:-1], strict=True)) > 0.5


def test_attacks_refuse_what_they_cannot_use(digits: Trained) -> None:
    x, y = digits.images[:2] / 255, digits.labels[:2]
    with pytest.raises(BadInput, match="no attack 'hope'; there are pgd, auto"):
        search(digits.model, x, y, (0.5,), "hope")
    with pytest.raises(BadInput, match=r"\[0, 1\]"):
        search(digits.model, x * 2, y, (0.5,), "pgd")
    with pytest.raises(BadInput, match="training mode"):
        search(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), x, y, (0.5,), "pgd")
    assert set(ATTACKS) == {"pgd", "auto"}


def test_a_curve_counts_what_is_strictly_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy", reason="intervals need scipy, of the extras nonexpansive[app] and [attack]")
    curve = Curve.of("c", torch.tensor([0.0, 0.5, 0.25, torch.inf]), (0.5, 0.0, 0.25, 0.5))
    assert curve.epsilons == (0.0, 0.25, 0.5) and curve.counts == (3, 2, 1)
    assert curve.accuracy == (0.75, 0.5, 0.25)
    assert curve.area == pytest.approx(0.5)
    low, high = curve.intervals[1]  # by the tables of Clopper and Pearson
    assert (low, high) == (pytest.approx(0.0676, abs=1e-4), pytest.approx(0.9324, abs=1e-4))
    assert len(EPSILONS) == 43 and EPSILONS[0] == 0 and EPSILONS[-1] == 1
    for bad in ((), (-0.1,), (float("nan"),)):
        with pytest.raises(BadInput):
            Curve.of("c", torch.ones(3), bad)


def test_evaluation_refuses_other_labels(digits: Trained) -> None:
    with pytest.raises(BadInput, match="classifier of 10 classes"):
        evaluate(digits.made, digits.images, digits.labels + 5)
    with pytest.raises(BadInput, match="one label an image"):
        evaluate(digits.made, digits.images, digits.labels[:3])
    with pytest.raises(BadInput, match="one label an image"):  # which would compare each with every other
        evaluate(digits.made, digits.images, digits.labels[:, None])


def test_a_layer_that_overwrites_its_input_does_not_change_the_images() -> None:
    net = nn.Sequential(nn.Hardtanh(inplace=True), nn.Flatten(), nn.Linear(4, 3)).double().eval()
    x = torch.full((1, 1, 2, 2), 5.0, dtype=torch.float64)
    for arithmetic in (None, torch.float64):
        made = certify_classifier(net, (1, 2, 2), arithmetic=arithmetic)
        made.radii(x)
        made.logits(x)
        assert bool((x == 5).all())
