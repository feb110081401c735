"""Norm bounds against dense singular values: never below, and tight where that is promised."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math import bounds
from nonexpansive.math.bounds import absolute_norm_bound, norm_bound, norm_estimate, terms

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SVD_SLACK = 1 + 1e-13  # the reference's own rounding
KINDS = ("normal", "normal", "positive", "ones", "delta", "rank one", "sparse", "alternating", "zero")

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def dense(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The matrix of the linear part, by pushing the identity through the layer's own forward in float64."""
    layer, n = copy.deepcopy(layer).double(), math.prod(shape)
    with torch.no_grad():
        columns = layer(torch.eye(n, dtype=torch.float64).view(n, *shape)) - layer(torch.zeros(1, *shape).double())
    return columns.flatten(1).T


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix)[0]) if matrix.numel() else 0.0


def absolute(layer: nn.Module) -> nn.Module:
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.abs_()
    return layer


def fill(weight: Tensor, kind: str, generator: torch.Generator) -> None:
    with torch.no_grad():
        weight.normal_(generator=generator)
        if kind == "positive":
            weight.abs_()
        elif kind == "ones":
            weight.fill_(1.0)
        elif kind == "delta":
            weight.copy_(
                (torch.arange(weight.numel()) == int(1e6 * abs(weight.flatten()[0])) % weight.numel()).view_as(weight)
            )
        elif kind == "rank one":
            weight.copy_(weight.flatten(1)[:, 0].view(-1, *[1] * (weight.ndim - 1)) * weight[:1])
        elif kind == "sparse":
            weight.mul_(weight.abs() > 1)
        elif kind == "alternating":
            index = sum(
                torch.arange(k).view([-1 if i == j else 1 for j in range(weight.ndim)])
                for i, k in enumerate(weight.shape)
            )
            weight.copy_(1.0 - 2.0 * (index % 2))
        elif kind == "zero":
            weight.zero_()


def random_case(draw: random.Random) -> tuple[nn.Module, tuple[int, ...]] | None:
    """Any dimension, padding mode and size, stride, groups, dilation, odd and even kernels, also beyond the image."""
    d = draw.choice((1, 1, 2, 2, 2, 3))
    groups = draw.choice((1, 1, 1, 2, 3))
    inputs, outputs = groups * draw.choice((1, 1, 2, 3)), groups * draw.choice((1, 1, 2, 3))
    kernel = [draw.randint(1, (9, 5, 3)[d - 1]) for _ in range(d)]
    stride = [1] * d if draw.random() < 0.4 else [draw.choice((1, 1, 2, 3)) for _ in range(d)]
    dilation = [draw.choice((1, 1, 1, 2, 3)) for _ in range(d)]
    size = [draw.randint(1, (20, 8, 5)[d - 1]) for _ in range(d)]
    spans = [e * (k - 1) for e, k in zip(dilation, kernel, strict=True)]
    padding: str | list[int] = [s // 2 if draw.random() < 0.5 else draw.randint(0, s + 1) for s in spans]
    options = {"stride": stride, "dilation": dilation, "groups": groups}
    if draw.random() < 0.25:
        extra = [draw.randint(0, max(pair) - 1) for pair in zip(stride, dilation, strict=True)]
        layer = TRANSPOSED[d - 1](inputs, outputs, kernel, padding=padding, output_padding=extra, **options)
    else:
        if stride == [1] * d and draw.random() < 0.25:
            padding = draw.choice(("same", "valid"))
        mode = draw.choice(("zeros", "zeros", "circular", "reflect", "replicate"))
        layer = CONVOLUTIONS[d - 1](inputs, outputs, kernel, padding=padding, padding_mode=mode, **options)
    fill(layer.weight, draw.choice(KINDS), torch.Generator().manual_seed(draw.randrange(2**31)))
    shape = (inputs, *size)
    if math.prod(shape) > 300:
        return None
    try:
        fits = 0 < layer(torch.zeros(1, *shape)).numel() <= 600
    except RuntimeError:  # torch refuses this size
        with pytest.raises(BadInput):
            norm_bound(layer, shape)
        return None
    return (layer, shape) if fits else None


def random_cases(seed: int, count: int) -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
    draw = random.Random(seed)
    while count:
        case = random_case(draw)
        if case is not None:
            count -= 1
            yield case


def by_symbol(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """The bound that larger operators get."""
    convolution = bounds._read(layer)
    if not convolution.weight.any():
        return 0.0
    return convolution.unscaled(bounds._symbol_bound(convolution, convolution.sizes(shape)))


@pytest.mark.parametrize("seed", range(15))
def test_never_below_the_singular_values_of_random_layers(seed: int) -> None:
    for layer, shape in random_cases(seed, 100):
        matrix = dense(layer, shape)
        true, what = norm(matrix), f"{layer} at {shape}"
        assert true <= norm_bound(layer, shape) * SVD_SLACK, what
        assert true <= norm_bound(layer) * SVD_SLACK, what
        assert true <= by_symbol(layer, shape) * SVD_SLACK, what
        entries = dense(absolute(layer), shape)
        assert norm(entries) <= absolute_norm_bound(layer) * SVD_SLACK, what
        forward, adjoint = terms(layer)
        summands = (entries > 0).sum(1).max(), (entries > 0).sum(0).max()
        assert int(summands[0]) <= forward and int(summands[1]) <= adjoint, what


def test_never_below_when_all_tolerances_are_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no error hides behind the tolerance."""
    monkeypatch.setattr(bounds, "_TOLERANCE", 1e-7)
    monkeypatch.setattr(bounds, "_TOLERANCE_AT_SHAPE", 1e-7)
    for layer, shape in random_cases(100, 60):
        true = norm(dense(layer, shape))
        assert true <= min(by_symbol(layer, shape), norm_bound(layer)) * SVD_SLACK, f"{layer} at {shape}"


def test_compressions_are_never_below_and_tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it starts from: an estimate that is too small must show in the part that is kept, or fail."""
    monkeypatch.setattr(bounds, "_COMPRESSED_ORDER", 200)
    tried = 0
    for layer, shape in random_cases(300, 120):
        convolution = bounds._read(layer)
        sizes = convolution.sizes(shape)
        if not convolution.weight.any() or len(convolution.weight) > 1 or not bounds._fits(convolution, sizes):
            continue
        true = norm(dense(layer, shape)) / 2.0**convolution.exponent
        for share in (1.0, 0.97, 0.7) if true else ():
            bound = bounds._group_bound(convolution, sizes, share * true)
            assert true <= bound * SVD_SLACK, f"{layer} at {shape}, from {share} of the norm"
        tried += 1
    assert tried >= 8


def test_compression_is_within_a_thousandth_where_the_operator_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "_GRAM_FLOPS", 0.0)
    monkeypatch.setattr(bounds, "_COMPRESSED_ORDER", 1600)
    torch.manual_seed(0)
    layer, shape = nn.Conv2d(16, 16, 3, padding=1), (16, 10, 10)
    convolution = bounds._read(layer)
    true = bounds._lanczos(*convolution.normal(convolution.sizes(shape)), 150) * 2.0**convolution.exponent
    assert true <= norm_bound(layer, shape) * SVD_SLACK
    assert norm_bound(layer, shape) <= 1.001 * true < by_symbol(layer, shape) / 1.001


def test_slabs_prove_the_same_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "_SMALL", 4)
    monkeypatch.setattr(bounds, "_SLAB", 1)
    several = 0
    for layer, shape in random_cases(200, 150):
        convolution = bounds._read(layer)
        if not convolution.weight.any():
            continue
        sizes = convolution.sizes(shape)
        gram = bounds._Gram(convolution, sizes, bounds._absolute(convolution, sizes))
        true, bound = norm(dense(layer, shape)), convolution.unscaled(gram.bound())
        several += len(gram.slabs[0]) > 1
        assert true <= bound * SVD_SLACK, f"{layer} at {shape}"
        assert bound <= true * 1.0011 + 1e-5 * absolute_norm_bound(layer), f"{layer} at {shape}"
    assert several > 30


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    n=st.integers(1, 9),
    taps=st.integers(1, 12),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 4),
    padding=st.integers(0, 12),
    exponent=st.integers(-140, 120),
    mode=st.sampled_from(("zeros", "circular", "reflect", "replicate")),
)
def test_law_in_one_dimension(seed, n, taps, stride, dilation, padding, exponent, mode) -> None:
    layer = nn.Conv1d(
        2, 1, taps, stride, padding, dilation, padding_mode=mode, bias=False
    )  # a bias would drown tiny weights
    torch.manual_seed(seed)
    with torch.no_grad():
        layer.weight.normal_().mul_(2.0**exponent)
    try:
        layer(torch.zeros(1, 2, n))
    except RuntimeError:
        return
    true = norm(dense(layer, (2, n)))
    assert true <= min(norm_bound(layer, (2, n)), norm_bound(layer), by_symbol(layer, (2, n))) * SVD_SLACK


def finest(weight: Tensor, points: int) -> float:
    """sup σ₁(K̂) from below: the largest on a fine grid."""
    dims = tuple(range(2, weight.ndim))
    symbol = torch.fft.fftn(weight.double(), s=[points] * len(dims), dim=dims)
    return float(torch.linalg.svdvals(symbol.flatten(2).permute(2, 0, 1))[:, 0].max())


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("kind", ["normal", "positive", "delta", "rank one", "alternating", "ones"])
def test_any_size_is_within_half_a_percent_of_the_supremum(d: int, kind: str) -> None:
    for k in ((2, 3, 7, 31), (2, 3, 5), (2, 3))[d - 1]:
        for mode in ("zeros", "circular"):
            layer = CONVOLUTIONS[d - 1](3, 4, k, padding="same", padding_mode=mode)
            fill(layer.weight, kind, torch.Generator().manual_seed(k))
            supremum = finest(layer.weight.detach(), (1024, 128, 32)[d - 1])
            assert supremum <= norm_bound(layer) * SVD_SLACK
            slack = 1.005 if d < 3 else 1.005 / math.cos(3 * (k - 1) / 2 * math.pi / 32)  # of the coarse reference
            assert norm_bound(layer) <= slack * supremum


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize(
    ("k", "padding"), [(3, 1), (5, 2), (3, 0), (3, 2), (2, "same"), (4, 1), (7, 3), ((3, 5), (1, 2))]
)
def test_at_a_shape_within_a_thousandth(mode: str, k, padding) -> None:
    for channels, n in ((1, 8), (3, 8), (2, 12), (1, 20)):
        layer = nn.Conv2d(channels, channels, k, padding=padding, padding_mode=mode)
        true = norm(dense(layer, (channels, n, n + 1)))
        assert true <= norm_bound(layer, (channels, n, n + 1)) * SVD_SLACK
        assert norm_bound(layer, (channels, n, n + 1)) <= 1.001 * true


@pytest.mark.parametrize("share", [0.0, 1e-25, 1e-3])
def test_a_group_may_be_dead_or_far_smaller_than_another(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_GRAM_FLOPS_AT_ONCE", "_GRAM_FLOPS", "_GRAM_FLOPS_AT_MOST"):
        monkeypatch.setattr(bounds, name, 0)
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, padding=1, groups=2)
    with torch.no_grad():
        layer.weight[2:] *= share
    shape = (4, 6, 6)
    assert norm(dense(layer, shape)) <= norm_bound(layer, shape) * SVD_SLACK
    assert norm_bound(layer, shape) <= 1.01 * norm(dense(layer, shape))
    torch.set_default_dtype(torch.float64)
    try:
        assert norm(dense(layer, shape)) <= norm_bound(layer, shape) * SVD_SLACK
    finally:
        torch.set_default_dtype(torch.float32)


def test_padding_by_a_mode_is_what_torch_noted_when_the_layer_was_made() -> None:
    layer = nn.Conv1d(1, 1, 3, padding=1, padding_mode="replicate")
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[1.0, 0.0, 0.0]]]))
    layer.padding = (0,)  # which torch does not look at
    assert norm(dense(layer, (1, 6))) == pytest.approx(2**0.5)
    assert norm_bound(layer, (1, 6)) * SVD_SLACK >= 2**0.5


@pytest.mark.parametrize(("channels", "n"), [(16, 8), (1, 48), (4, 24)])
def test_at_a_shape_within_a_thousandth_of_larger_operators(channels: int, n: int) -> None:
    torch.manual_seed(n)
    layer = nn.Conv2d(channels, channels, 3, padding=1).double()
    estimate = norm_estimate(layer, (channels, n, n), iterations=400)
    assert estimate <= norm_bound(layer, (channels, n, n)) <= 1.001 * estimate


@pytest.mark.parametrize("allowed", [0, 1e12])
def test_the_operator_itself_is_factorised_where_nothing_else_is_tight(
    allowed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_GRAM_FLOPS_AT_ONCE", 0), ("_GRAM_FLOPS", 0), ("_MOST_KEPT", 1)):
        monkeypatch.setattr(bounds, name, value)
    monkeypatch.setattr(bounds, "_GRAM_FLOPS_AT_MOST", allowed)
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 12, 3, padding=1)
    true = norm(dense(layer, (12, 9, 9)))
    assert true <= norm_bound(layer, (12, 9, 9)) * SVD_SLACK
    assert (norm_bound(layer, (12, 9, 9)) <= 1.001 * true) == bool(allowed)


def test_a_circular_convolution_has_its_norm_on_its_own_grid() -> None:
    for n in (8, 9, 31):
        layer = nn.Conv2d(2, 3, 5, padding=2, padding_mode="circular").double()
        assert by_symbol(layer, (2, n, n)) == pytest.approx(finest(layer.weight.detach(), n), rel=1e-3)


def test_a_peak_between_grid_points_is_not_missed() -> None:
    """A cosine packet at frequency w: its own size as a grid misses the peak, the bound must not."""
    t = torch.arange(9, dtype=torch.float64)
    for w in np.linspace(0.05, 3.1, 25):
        layer = nn.Conv1d(1, 1, 9, padding=4).double()
        with torch.no_grad():
            layer.weight.copy_(torch.cos(w * (t - 4)))
        supremum = finest(layer.weight.detach(), 2**16)
        assert supremum <= norm_bound(layer) * SVD_SLACK and norm_bound(layer) <= 1.005 * supremum
        assert norm(dense(layer, (1, 40))) <= norm_bound(layer, (1, 40)) * SVD_SLACK


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-30, 1e30, 1e38])
def test_any_scale_of_the_weights(kind: str, scale: float) -> None:
    layer = nn.Conv2d(2, 2, 3, padding=1)
    fill(layer.weight, kind, torch.Generator().manual_seed(3))
    with torch.no_grad():
        layer.weight.clamp_(-3, 3).mul_(scale)
        true = norm(dense(layer, (2, 5, 5)) / scale) * scale
    assert true <= norm_bound(layer, (2, 5, 5)) * (SVD_SLACK + 1e-15)
    assert true <= norm_bound(layer) * (SVD_SLACK + 1e-15)


def test_scaling_by_powers_of_two_is_exact() -> None:
    layer = nn.Conv2d(3, 2, 3, stride=2, padding=1).double()
    before = norm_bound(layer, (3, 9, 9)), norm_bound(layer), absolute_norm_bound(layer)
    with torch.no_grad():
        layer.weight.mul_(2.0**-900)
    after = norm_bound(layer, (3, 9, 9)), norm_bound(layer), absolute_norm_bound(layer)
    assert after == pytest.approx([b * 2.0**-900 for b in before], rel=1e-14)


def test_zero_and_empty_kernels_have_norm_zero() -> None:
    layer = nn.Conv2d(2, 2, 3, padding=1)
    nn.init.zeros_(layer.weight)
    assert norm_bound(layer) == norm_bound(layer, (2, 4, 4)) == absolute_norm_bound(layer) == 0.0
    assert norm_estimate(layer, (2, 4, 4)) == 0.0


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 3), (40, 300), (300, 290)])
def test_linear(outputs: int, inputs: int) -> None:
    layer = nn.Linear(inputs, outputs)
    true = norm(layer.weight.detach().double())
    for bound in (norm_bound(layer), norm_bound(layer, (inputs,)), norm_bound(layer, (5, inputs))):
        assert true <= bound * SVD_SLACK and bound <= 1.0002 * true
    assert norm(layer.weight.detach().double().abs()) <= absolute_norm_bound(layer) * SVD_SLACK
    assert terms(layer) == (inputs, outputs)


def test_a_transposed_convolution_is_bounded_like_its_adjoint() -> None:
    layer = nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=2)
    back = nn.ConvTranspose2d(5, 3, 3, stride=2, padding=1, dilation=2, output_padding=1)
    back.weight = layer.weight
    assert norm_bound(layer) == norm_bound(back)
    assert terms(layer) == terms(back)[::-1]


def test_many_groups_cost_little_and_count_once() -> None:
    layer = nn.Conv2d(256, 256, 3, padding=1, groups=256)
    single = nn.Conv2d(1, 1, 3, padding=1)
    single.weight.data = layer.weight.data[[0]]
    layer.weight.data.copy_(single.weight.data.expand_as(layer.weight))
    assert norm_bound(layer) == pytest.approx(norm_bound(single), rel=1e-6)


def test_reflection_at_any_size_costs_a_root_of_two_per_axis() -> None:
    zeros, reflect = (nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode) for mode in ("zeros", "reflect"))
    reflect.weight = zeros.weight
    assert norm_bound(reflect) <= 2.001 * norm_bound(zeros)


def test_parametrized_layers() -> None:
    for layer, shape in (
        (parametrizations.weight_norm(nn.Conv2d(2, 3, 3, padding=1)), (2, 6, 6)),
        (parametrizations.orthogonal(nn.Linear(6, 4)), (6,)),
        (parametrizations.spectral_norm(nn.Linear(6, 4)).eval(), (6,)),
    ):
        layer = layer.double()  # else the reference would compute another weight
        assert norm(dense(layer, shape)) <= norm_bound(layer, shape) * SVD_SLACK


def test_float16_and_bfloat16_weights() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        layer = nn.Conv1d(2, 2, 3).to(dtype)
        assert norm(dense(layer, (2, 9))) <= norm_bound(layer, (2, 9)) * SVD_SLACK


def test_without_and_with_gradients_alike() -> None:
    layer, shape = nn.Conv2d(8, 8, 3, padding=1), (8, 10, 10)  # beyond what is read off eigenvalues
    with torch.inference_mode():
        inside = norm_bound(layer, shape)
        made_inside = nn.Conv2d(8, 8, 3, padding=1)
        assert norm_bound(made_inside, shape) > 0
    with torch.no_grad():
        assert norm_bound(layer, shape) == inside
    assert norm_bound(layer, shape) == inside and layer.weight.grad is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_weights_on_a_gpu() -> None:
    layer = nn.Conv2d(3, 3, 3, padding=1)
    assert norm_bound(layer) == norm_bound(copy.deepcopy(layer).cuda())


class Fourier(nn.Module):
    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def norm_bound(self, shape: tuple[int, ...] | None) -> float:
        return self.bound if shape is None else self.bound / 2


class OtherForward(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_module_of_ones_own() -> None:
    assert norm_bound(Fourier(3.0)) == 3.0 and norm_bound(Fourier(3.0), (4,)) == 1.5
    for method in (absolute_norm_bound, terms):
        with pytest.raises(Refused, match=method.__name__):
            method(Fourier(1.0))
    for bad in (math.nan, math.inf, -1.0):
        with pytest.raises(Refused, match="finite"):
            norm_bound(Fourier(bad))


def test_refusals() -> None:
    with pytest.raises(Refused, match="ReLU"):
        norm_bound(nn.ReLU())
    with pytest.raises(Refused, match="OtherForward"):
        norm_bound(OtherForward(1, 1, 3))
    overridden = OtherForward(1, 1, 3)
    parametrize.register_parametrization(overridden, "weight", Doubled())
    with pytest.raises(Refused, match="OtherForward"):
        norm_bound(overridden)
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(Refused, match="hook"):
        norm_bound(hooked)
    for value in (math.nan, math.inf):
        layer = nn.Conv1d(1, 1, 3)
        layer.weight.data[0, 0, 0] = value
        for bound in (norm_bound, absolute_norm_bound):
            with pytest.raises(Refused, match="finite"):
                bound(layer)
    with pytest.raises(Refused, match="real"):
        norm_bound(nn.Linear(2, 2, dtype=torch.complex64))
    huge = nn.Linear(2, 2).double()
    nn.init.constant_(huge.weight, 1.7e308)
    with pytest.raises(Refused, match="large"):
        norm_bound(huge)


@pytest.mark.parametrize("shape", [(3, 8), (2, 8, 8), (3, 8, 8, 8), (3, 0, 8), (3, 2, 8), ()])
def test_shapes_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput):
        norm_bound(nn.Conv2d(3, 3, 3), shape)


def test_gradient_ascent_finds_no_violation() -> None:
    """Weights chosen to raise ‖A‖ against the symbol's bound."""
    torch.manual_seed(0)
    for layer, shape in (
        (nn.Conv1d(1, 2, 4, padding=3), (1, 6)),
        (nn.Conv1d(2, 2, 3, stride=2, padding=2, dilation=3), (2, 9)),
        (nn.Conv2d(2, 2, (3, 2), stride=(2, 1), padding=(1, 1), groups=2, dilation=(1, 2)), (2, 5, 4)),
        (nn.ConvTranspose1d(2, 1, 3, stride=3, padding=1, dilation=2, output_padding=2), (2, 4)),
        (nn.Conv1d(1, 1, 3, padding=2, padding_mode="reflect"), (1, 4)),
        (nn.Conv1d(1, 1, 3, padding=2, padding_mode="replicate"), (1, 5)),
        (nn.Conv1d(1, 1, 5, stride=2, padding=3, padding_mode="circular"), (1, 5)),
    ):
        layer = layer.double()
        n = math.prod(shape)
        identity = torch.eye(n, dtype=torch.float64).view(n, *shape)
        optimizer = torch.optim.Adam([layer.weight], lr=0.05)
        for _ in range(10):
            bound = min(by_symbol(layer, shape), norm_bound(layer))
            matrix = (layer(identity) - layer(torch.zeros_like(identity[:1]))).flatten(1)
            true = torch.linalg.matrix_norm(matrix, 2)
            assert float(true.detach()) <= bound * SVD_SLACK
            # the bound's own gradient, nearly: the norm of the kernel as a whole, over all frequencies
            spectrum = torch.fft.fftn(
                layer.weight, s=[16] * (layer.weight.ndim - 2), dim=tuple(range(2, layer.weight.ndim))
            )
            energy = torch.linalg.matrix_norm(spectrum.flatten(2).permute(2, 0, 1), 2).max()
            optimizer.zero_grad()
            (-(true / energy)).backward()
            optimizer.step()


def test_the_estimate_is_below_and_near() -> None:
    for layer, shape in (
        (nn.Conv2d(3, 4, 3, padding=1), (3, 8, 8)),
        (nn.Linear(20, 30), (20,)),
        (nn.Conv1d(2, 2, 3), (2, 9)),
    ):
        true = norm(dense(layer, shape))
        assert 0.97 * true <= norm_estimate(layer, shape, iterations=200) <= true * (1 + 1e-5)
        assert norm_estimate(layer, shape, seed=1, iterations=3) == norm_estimate(layer, shape, seed=1, iterations=3)
