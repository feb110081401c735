"""Certified radii: never beyond the true distance to the boundary, not far below it, and true for the program that runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import nonexpansive
from nonexpansive.errors import BadInput, Refused
from nonexpansive.nn import GradientFlow, MaxMin
from nonexpansive.nn.classifier import Classifier, flow_classifier
from nonexpansive.nn.flow import observe
from nonexpansive.robust import certify_classifier, estimated_radii

SHAPE = (3, 8, 8)


def small(classes: int = 5, blocks: int = 2, **settings: object) -> Classifier:
    """A flow classifier in evaluation mode with offsets that are not zero."""
    torch.manual_seed(0)
    model = flow_classifier(SHAPE, classes, [{"unshuffle": 2, "channels": 16, "kernels": [3] * blocks}], **settings)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def images(count: int = 16) -> Tensor:
    return torch.rand((count, *SHAPE), generator=torch.Generator().manual_seed(1))


def test_of_a_linear_classifier_it_is_the_distance_to_the_nearest_boundary():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 7)).eval()
    head, x = model[1], images()
    prediction, radius = certify_classifier(model, SHAPE).radii(x)
    weight, z = head.weight.detach().double(), model.double()(x.double()).detach()
    for n in range(len(x)):
        i = int(z[n].argmax())
        distance = min(float((z[n, i] - z[n, j]) / (weight[i] - weight[j]).norm()) for j in range(7) if j != i)
        assert prediction[n] == i
        assert distance * (1 - 1e-6) <= radius[n] < distance


@pytest.mark.parametrize("arithmetic", [None, torch.float32, torch.float64])
def test_it_is_the_formula_less_what_rounding_may_do(arithmetic):
    model = small().to(arithmetic or torch.float32)
    made = certify_classifier(model, SHAPE, arithmetic=arithmetic)
    x = images()
    rows, bias = (p.detach().double() for p in (model.head.weight, model.head.bias))  # normalised in the model's type
    with torch.no_grad():
        z = torch.nn.functional.linear(model.double().features(x.double()), rows, bias)
    estimate, radius = estimated_radii(z, rows, made.lipschitz), made.radii(x).radius
    assert bool((radius <= estimate * (1 + 1e-12)).all())
    if arithmetic == torch.float32:
        assert bool((radius[estimate > 0.02] > estimate[estimate > 0.02] - 0.02).all()) and bool((radius > 0).any())
    else:
        assert torch.allclose(radius, estimate, rtol=1e-6, atol=1e-9)


def test_without_a_last_linear_layer_margins_count_over_the_root_of_two():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), GradientFlow(nn.Linear(5, 5), "tanh")).eval()
    made = certify_classifier(model, SHAPE)
    assert not made.head and made.lipschitz == nonexpansive.certify(model, SHAPE).lipschitz
    estimate = estimated_radii(model.double()(images().double()), None, made.lipschitz)
    assert torch.allclose(made.radii(images()).radius, estimate, rtol=1e-6)


def test_the_last_layer_is_found_in_nested_sequentials():
    model = small()
    nested = nn.Sequential(nn.Sequential(*model.features), nn.Sequential(nn.Identity(), model.head)).eval()
    ours, theirs = certify_classifier(model, SHAPE), certify_classifier(nested, SHAPE)
    assert theirs.head
    assert torch.equal(ours.radii(images()).radius, theirs.radii(images()).radius)


def test_a_steep_network_has_proportionally_smaller_radii():
    model = small()
    steep = nn.Sequential(nonexpansive.nn.Scale(4.0), *model.features, model.head).eval()
    made = certify_classifier(steep, SHAPE)
    assert made.lipschitz == 4.0
    radius, four = certify_classifier(model, SHAPE).radii(images()).radius, made.radii(images() / 4).radius
    assert torch.allclose(4 * four, radius, rtol=1e-6)


def test_ties_and_numbers_that_are_none_certify_nothing():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()
    with torch.no_grad():
        model[1].weight[1] = model[1].weight[0]
        model[1].bias[:] = torch.tensor([1e3, 1e3, 0.0])
    made, x = certify_classifier(model, SHAPE), images(3)
    assert bool((made.radii(x).radius == 0).all())
    with torch.no_grad():
        model[1].bias[1] = 0.0
    made = certify_classifier(model, SHAPE)
    x[0, 0, 0, 0], x[1, 0, 0, 0] = torch.nan, torch.inf
    assert (made.radii(x).radius > 0).tolist() == [False, False, True]


def test_rows_that_are_alike_do_not_limit_the_radius():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval()
    with torch.no_grad():
        model[1].weight[1] = model[1].weight[0]
        model[1].bias[:] = torch.tensor([1.0, 0.0])
    assert bool((certify_classifier(model, SHAPE).radii(images()).radius > 1e12).all())


def test_what_a_float32_program_cannot_resolve_is_not_certified_for_it():
    """Margins of 1e-4 beside offsets of 1e6: float32 gives ties, so that the exact map's radius is not the program's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()
    with torch.no_grad():
        model[1].weight.mul_(1e-4)
        model[1].bias[:] = 1e6
    x = images()
    exact, program = (certify_classifier(model, SHAPE, arithmetic=a).radii(x) for a in (None, torch.float32))
    assert bool((exact.radius > 0).any())
    assert bool((model(x).argmax(1) != exact.prediction)[exact.radius > 0].any())
    assert bool((program.radius == 0).all())


@pytest.mark.parametrize("settings", [{}, {"symmetrised": True}, {"symmetrised": True, "shifts": [1]}])
def test_the_rounding_that_is_subtracted_covers_that_of_the_program(settings):
    model = small(blocks=4, **settings)
    exact, program = certify_classifier(model, SHAPE), certify_classifier(model, SHAPE, arithmetic=torch.float32)
    x = images(64)
    off = (program.logits(x).double() - exact.logits(x)).abs().amax(1)
    lost, certain = exact.radii(x).radius - program.radii(x).radius, program.radii(x).radius > 0
    assert bool(certain.any()) and bool((off > 0).all())
    assert bool((off[certain] <= lost[certain]).all())  # the rows of the last layer are of norm 1
    # the rounding of a program could be far larger than it is: all that each flow may add by itself is taken off
    with torch.inference_mode():
        flows = [error for _, error in program._run(x)[0] if bool(error.isfinite().all())]
    assert len(flows) == 4
    allowed = torch.stack(flows).sum(0)
    assert bool((lost[certain] >= 0.99 * allowed[certain]).all())


def test_the_sizes_that_count_are_those_of_every_view():
    made = certify_classifier(small(symmetrised=True, shifts=[1]), SHAPE, arithmetic=torch.float32)
    x = images() * torch.linspace(0.2, 1, SHAPE[-1])  # darker on one side, so that views differ within the network
    given: dict[int, list[Tensor]] = {}
    views = made._reference.features[1]
    for k, layer in enumerate(views.inner):
        layer.register_forward_pre_hook(lambda _, inputs, k=k: given.setdefault(k, []).append(inputs[0]))
    with torch.inference_mode():
        met, _ = made._run(x)
        assert len(met) == 1 + len(views.inner) + 2  # centring, each layer of the views, their mean, the last layer
        for k, inputs in list(given.items()):
            assert len(inputs) == 6
            layer, (size, error) = views.inner[k], met[1 + k]
            assert bool((torch.stack([y.flatten(1).norm(dim=1) for y in inputs]) <= size).all())
            if isinstance(layer, GradientFlow):
                each = torch.stack([observe(layer, y, made._unit)[1] for y in inputs])
                assert bool((each <= error).all()) and bool((each < 0.999 * error).any())
            else:
                assert bool(error.isinf().all())


def test_of_a_symmetric_picture_views_cost_what_one_costs():
    """All views are alike, so the mean is the network itself, and must not pay less for rounding."""
    x = images(64)
    x = (x + x.flip(-1)) / 2
    radius = {}
    for symmetrised in (False, True):
        model = small(blocks=4, symmetrised=symmetrised)
        for arithmetic in (None, torch.float32):
            radius[symmetrised, arithmetic] = certify_classifier(model, SHAPE, arithmetic=arithmetic).radii(x).radius
    certain = radius[True, torch.float32] > 0
    torch.testing.assert_close(radius[True, None], radius[False, None], rtol=1e-9, atol=1e-12)
    assert bool(certain.any()) and bool((radius[True, torch.float32] <= radius[False, torch.float32])[certain].all())


def test_views_cost_a_float32_program_next_to_nothing():
    """The mean over views is taken apart like the layers it is taken of: the sizes are known for each of them."""
    x, lost = images(64), []
    for symmetrised in (False, True):
        model = small(blocks=4, symmetrised=symmetrised)
        exact, program = (certify_classifier(model, SHAPE, arithmetic=a).radii(x).radius for a in (None, torch.float32))
        lost.append((exact - program)[program > 0].amin())
    assert lost[1] < 1.3 * lost[0]


def test_a_parametrized_network_is_left_as_it_is():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), MaxMin(), parametrizations.weight_norm(nn.Linear(16, 4)))
    model.eval()
    before = model(images())
    made = certify_classifier(model, SHAPE, arithmetic=torch.float32)
    assert made.head and type(model[3]).__name__ == "ParametrizedLinear"
    assert torch.equal(model(images()), before)
    assert torch.equal(
        made._copy.head.weight, model[3].weight.double()
    )  # the float32 values, not the formula anew in float64


def test_batches_make_no_difference():
    made = certify_classifier(small(), SHAPE, arithmetic=torch.float32)
    whole, parts = made.radii(images(11)), made.radii(images(11), batch=3)
    assert torch.equal(whole.prediction, parts.prediction)
    assert torch.allclose(whole.radius, parts.radius, rtol=1e-9, atol=1e-12)


def test_what_is_no_classifier_or_no_image_is_refused():
    with pytest.raises(Refused, match="at least two logits"):
        certify_classifier(nn.Sequential(nn.Conv2d(3, 3, 3)).eval(), SHAPE)
    with pytest.raises(Refused, match="no rule is registered"):
        certify_classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Softmax(1)), SHAPE)
    with pytest.raises(Refused, match="training mode"):
        certify_classifier(small().train(), SHAPE)
    made = certify_classifier(small(), SHAPE)
    with pytest.raises(BadInput, match="certificate is for"):
        made.radii(torch.rand(1, 3, 9, 8))
    with pytest.raises(BadInput, match="divide by 255"):
        made.radii(torch.zeros(1, *SHAPE, dtype=torch.uint8))
    with pytest.raises(BadInput, match="no images"):
        made.radii(torch.zeros(0, *SHAPE))
