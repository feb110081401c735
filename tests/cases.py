"""The registry over which the laws are run: modules with the shape of one sample, and the attacks that try to break a bound."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from nonexpansive.math.bounds import norm_bound
from nonexpansive.nn import (
    AdaptiveSteps,
    CappedStep,
    ClippedRamps,
    GradientFlow,
    GroupSort,
    Lifted,
    LinearSpline,
    MaximalStep,
    MaxMin,
    NormControl,
    Relaxed,
    Rescale,
    Residual,
    Resolvent,
    Scale,
    WeaklyConvexRamps,
)
from nonexpansive.nn.classifier import (
    Centre,
    Channels,
    Symmetrised,
    dense_classifier,
    flow_classifier,
    paper_classifier,
)
from nonexpansive.nn.models import Denoiser, ProximalDenoiser
from nonexpansive.restore.likelihood import Poisson
from nonexpansive.restore.primal_dual import DualOfData, PrimalDual
from nonexpansive.restore.schemes import Halpern, KrasnoselskiiMann
from nonexpansive.restore.splitting import DouglasRachford, ForwardBackward, GradientRED, HalfQuadratic
from nonexpansive.restore.steps import AtLevel, Box, GradientStep, ProximalStep, Rescaled
from nonexpansive.restore.tiles import Tiled, bytes_per_pixel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A module by name. ``rounds``: whether its float32 program can be certified; ``affine``: whether it is T(x) = Jx + c."""

    name: str
    make: Callable[[], nn.Module]
    shape: Shape
    rounds: bool = True
    affine: bool = False

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The module, in evaluation mode, the same at every call: made in float32 with weights that are not at their start."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        module = self.make()
        with torch.no_grad():
            for name, p in module.named_parameters():
                if name.endswith("bias"):
                    p.add_(0.5 * torch.randn_like(p))
        return module.eval().to(dtype)

    def __str__(self) -> str:
        return self.name


# ---------------------------------------------------------------------------------------------------------------- torch's own


def _bn(kind: type[nn.Module], *arguments: object, **options: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        norm = kind(*arguments, **options)
        norm.running_mean.normal_()  # type: ignore[union-attr, operator]
        norm.running_var.uniform_(0.3, 2.0)  # type: ignore[union-attr, operator]
        if norm.weight is not None:
            norm.weight.data.normal_()
        return norm

    return make


_AFFINE: list[tuple[Callable[[], nn.Module], Shape]] = [
    (lambda: nn.Linear(5, 3), (5,)),
    (lambda: nn.Linear(3, 6, bias=False), (2, 3)),
    (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 7)),
    (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="reflect"), (2, 5, 6)),
    (lambda: nn.Conv2d(4, 4, 2, groups=2, dilation=2, padding=1, padding_mode="replicate"), (4, 5, 4)),
    (lambda: nn.Conv2d(2, 2, 4, padding="same", padding_mode="circular"), (2, 5, 5)),
    (lambda: nn.Conv3d(1, 2, 2, padding=1), (1, 3, 3, 4)),
    (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), (2, 4)),
    (lambda: nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1, output_padding=1), (2, 3, 4)),
    (lambda: nn.ConvTranspose3d(2, 1, 2), (2, 2, 3, 3)),
    (lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 3, padding=1)), (2, 5, 5)),
    (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), (4,)),
    (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), (4,)),
    (_bn(nn.BatchNorm1d, 3), (3,)),
    (_bn(nn.BatchNorm1d, 3), (3, 4)),
    (_bn(nn.BatchNorm2d, 2, affine=False), (2, 3, 4)),
    (_bn(nn.BatchNorm3d, 2), (2, 2, 2, 3)),
    (lambda: nn.AvgPool1d(3, 2, 1), (2, 7)),
    (lambda: nn.AvgPool1d(3, 1), (1, 6)),
    (lambda: nn.AvgPool2d(2), (2, 6, 5)),
    (lambda: nn.AvgPool2d((3, 2), 2, (1, 0), ceil_mode=True, count_include_pad=False), (1, 6, 5)),
    (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True), (1, 6, 6)),
    (lambda: nn.AvgPool2d(2, divisor_override=3), (1, 4, 4)),
    (lambda: nn.AvgPool3d(2, 1), (1, 3, 4, 3)),
    (lambda: nn.AdaptiveAvgPool1d(3), (2, 7)),
    (lambda: nn.AdaptiveAvgPool2d(1), (3, 4, 4)),
    (lambda: nn.AdaptiveAvgPool2d((None, 2)), (1, 3, 5)),
    (lambda: nn.AdaptiveAvgPool3d((1, 2, 2)), (1, 2, 3, 4)),
    (lambda: nn.ReflectionPad1d(2), (2, 5)),
    (lambda: nn.ReflectionPad2d((1, 2, 3, 0)), (1, 5, 4)),
    (lambda: nn.ReflectionPad3d(1), (1, 2, 3, 2)),
    (lambda: nn.ReplicationPad1d((3, 0)), (2, 4)),
    (lambda: nn.ReplicationPad2d(2), (1, 3, 3)),
    (lambda: nn.ReplicationPad3d((0, 1, 0, 2, 1, 1)), (1, 2, 2, 2)),
    (lambda: nn.CircularPad1d(3), (1, 4)),
    (lambda: nn.CircularPad2d(1), (2, 2, 3)),
    (lambda: nn.CircularPad3d(1), (1, 2, 2, 2)),
    (lambda: nn.ZeroPad1d(2), (2, 3)),
    (lambda: nn.ZeroPad2d((1, 0, -1, 2)), (1, 3, 3)),
    (lambda: nn.ZeroPad3d(1), (1, 2, 2, 2)),
    (lambda: nn.ConstantPad1d(1, 0.3), (2, 3)),
    (lambda: nn.ConstantPad2d(2, -1.7), (1, 2, 3)),
    (lambda: nn.ConstantPad3d(1, 0.1), (1, 2, 2, 2)),
    (lambda: nn.Upsample(scale_factor=2), (2, 3, 3)),
    (lambda: nn.Upsample(scale_factor=1.7), (1, 7)),
    (lambda: nn.Upsample(size=(5, 2, 7), mode="nearest-exact"), (1, 3, 3, 3)),
    (lambda: nn.UpsamplingNearest2d(scale_factor=3), (1, 2, 3)),
    (lambda: nn.Identity(), (3,)),
    (lambda: nn.Dropout(0.3), (3, 2)),
    (lambda: nn.Dropout1d(0.3), (3, 2)),
    (lambda: nn.Dropout2d(0.3), (3, 2, 2)),
    (lambda: nn.Dropout3d(0.3), (3, 2, 2, 2)),
    (lambda: nn.AlphaDropout(0.3), (3,)),
    (lambda: nn.FeatureAlphaDropout(0.3), (3, 2, 2)),
    (lambda: nn.Flatten(), (2, 3, 2)),
    (lambda: nn.Flatten(2), (2, 3, 2)),
    (lambda: nn.Unflatten(1, (2, 3)), (6, 2)),
    (lambda: nn.PixelShuffle(2), (8, 2, 3)),
    (lambda: nn.PixelUnshuffle(2), (1, 4, 6)),
    (lambda: nn.ChannelShuffle(2), (4, 2, 2)),
    (lambda: Scale(0.3), (4,)),
    (lambda: Scale(-1.7), (2, 3)),
    (lambda: Scale(1.0), (3,)),
]
_NONLINEAR: list[tuple[Callable[[], nn.Module], Shape]] = [
    (lambda: nn.MaxPool1d(3, 1, 1), (2, 6)),
    (lambda: nn.MaxPool1d(2, 3), (1, 7)),
    (lambda: nn.MaxPool2d(2), (2, 5, 4)),
    (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), (1, 6, 5)),
    (lambda: nn.MaxPool2d(2, 1, dilation=2), (1, 5, 5)),
    (lambda: nn.MaxPool3d(2, 1), (1, 3, 3, 3)),
    (lambda: nn.AdaptiveMaxPool1d(3), (2, 7)),
    (lambda: nn.AdaptiveMaxPool2d((None, 2)), (1, 3, 5)),
    (lambda: nn.AdaptiveMaxPool3d(2), (1, 3, 2, 3)),
]
_ACTIVATIONS: list[Callable[[], nn.Module]] = [
    lambda: nn.Identity(), lambda: nn.ReLU(), lambda: nn.ReLU6(), lambda: nn.LeakyReLU(), lambda: nn.LeakyReLU(0.5),
    lambda: nn.PReLU(2), lambda: nn.ELU(), lambda: nn.ELU(0.4), lambda: nn.CELU(0.7), lambda: nn.SELU(), lambda: nn.Tanh(),
    lambda: nn.Sigmoid(), lambda: nn.LogSigmoid(), lambda: nn.Softplus(), lambda: nn.Softplus(3.0), lambda: nn.Softsign(),
    lambda: nn.Softshrink(0.2), lambda: nn.Tanhshrink(), lambda: nn.Hardtanh(-0.3, 1.2), lambda: nn.Hardsigmoid(),
    lambda: nn.Threshold(0.2, 0.2), lambda: ClippedRamps(2), lambda: LinearSpline(2),
]  # fmt: skip
_DECREASING: list[Callable[[], nn.Module]] = [
    lambda: nn.GELU(), lambda: nn.GELU("tanh"), lambda: nn.SiLU(), lambda: nn.Mish(), lambda: nn.Hardswish(),
    lambda: nn.LeakyReLU(-0.3),
]  # fmt: skip


def _named(prefix: str, makers: list[tuple[Callable[[], nn.Module], Shape]], affine: bool) -> list[Case]:
    return [
        Case(f"{prefix} {i}: {make()!r} on {shape}", make, shape, affine=affine)
        for i, (make, shape) in enumerate(makers)
    ]


AFFINE = _named("affine", _AFFINE, True)
LAYERS = [
    *AFFINE,
    *_named("layer", _NONLINEAR, False),
    *_named("activation", [(make, (2, 5)) for make in (*_ACTIVATIONS[1:], *_DECREASING)], False),
]

# ---------------------------------------------------------------------------------------------------------------- flows

METHODS = [
    "euler", "heun", "ssp33", "rk4", "ssp(2,2)", "ssp(3,2)", "ssp(7,2)", "ssp43", "ssp104", "kutta3", "rk38", "ralston2",
    "ralston3",
]  # fmt: skip
CONTROLS: list[Callable[[], NormControl]] = [
    MaximalStep,
    AdaptiveSteps,
    lambda: Rescale(span=3.0),
    lambda: MaximalStep(0.5),
    lambda: AdaptiveSteps(0.6, span=2.0),
    lambda: Rescale(0.3),
    lambda: CappedStep(0.8),
]
CONVOLUTIONS: list[tuple[type[nn.Module], Shape]] = [
    (nn.Conv1d, (4, 6)), (nn.Conv2d, (4, 4, 5)), (nn.Conv3d, (4, 3, 3, 2))
]  # fmt: skip
GEOMETRIES: list[dict[str, object]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 2, "padding": 1, "dilation": 2, "groups": 2},
    {"kernel_size": 3, "padding": "same", "groups": 4},
]


class Difference(nn.Module):
    """x ↦ x[1:] - x[:-1] + c, a linear module of the user's: ‖A‖ ≤ 2. It returns a view of nothing and has no weight."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return x[..., 1:] - x[..., :-1] + self.offset

    def norm_bound(self, shape: Shape | None) -> float:
        return 2.0

    def absolute_norm_bound(self) -> float:
        return 2.0

    def terms(self) -> tuple[int, int]:
        return 3, 2


def flow_linears() -> Iterator[tuple[str, Callable[[], nn.Module], Shape]]:
    """Every linear layer that a flow may have."""
    yield "linear", lambda: nn.Linear(4, 6), (4,)
    yield "linear without bias on a matrix", lambda: nn.Linear(4, 3, bias=False), (3, 4)
    yield "user's own", lambda: Difference(0.3), (2, 5)
    yield "weight norm", lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 3, padding=1)), (2, 4, 5)
    yield "spectral norm", lambda: parametrizations.spectral_norm(nn.Conv1d(2, 3, 3, padding=1)), (2, 6)
    for (kind, shape), geometry in itertools.product(CONVOLUTIONS, GEOMETRIES):
        for mode in ("zeros", "circular", "reflect", "replicate"):
            if geometry["padding"] == "same" and mode == "reflect":
                continue

            def make(
                kind: type[nn.Module] = kind, geometry: dict[str, object] = geometry, mode: str = mode
            ) -> nn.Module:
                return kind(4, 4, padding_mode=mode, **geometry)

            yield f"{kind.__name__} {mode} {geometry}", make, shape


def _flows() -> list[Case]:
    monotone = ["relu", "tanh", "leaky_relu", "softplus", "sigmoid", "elu", "identity", "softshrink", "hardtanh"]
    cases = []

    def add(name: str, linear: Callable[[], nn.Module], shape: Shape, sigma: object, method: str, control: int) -> None:
        def make() -> nn.Module:
            activation = sigma() if callable(sigma) else sigma
            layer, given = linear(), CONTROLS[control]()
            if not isinstance(dict(layer.named_parameters()).get("weight"), nn.Parameter):
                given = MaximalStep(0.7)  # some controls scale a plain weight, which this layer has not
            return GradientFlow(layer, activation, method=method, control=given, shape=shape)  # type: ignore[arg-type]

        cases.append(Case(f"flow {len(cases)}: {name}, {method}, control {control}", make, shape))

    for i, (name, linear, shape) in enumerate(flow_linears()):
        add(f"{name}, {monotone[i % 9]}", linear, shape, monotone[i % 9], METHODS[i % 13], i % 7)
    for i, sigma in enumerate(_ACTIVATIONS):
        add(f"{sigma()!r}", lambda: nn.Conv1d(2, 2, 3, padding=1), (2, 5), sigma, METHODS[(3 * i) % 13], (i + 1) % 7)
    for i, (method, control) in enumerate(itertools.product(METHODS, range(7))):
        add("", lambda: nn.Linear(3, 4), (3,), monotone[i % 9], method, control)
    return cases


FLOWS = _flows()

# -------------------------------------------------------------------------------------------------------------- compositions


class Dense:
    """A data term with a dense A, all of it in float64: for the laws of the splittings."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        n = int(torch.Size(shape).numel())
        generator = torch.Generator().manual_seed(seed)
        self.matrix = torch.randn(n - 1, n, generator=generator, dtype=torch.float64) / n**0.5
        self.image_shape, self.data_shape = shape, (n - 1,)
        linear = nn.Linear(n, n - 1, bias=False, dtype=torch.float64)
        linear.weight.data = self.matrix
        self.norm = norm_bound(linear)
        self.lipschitz = self.norm**2 * (1 + 1e-12)
        self.y = torch.randn(1, n - 1, generator=generator, dtype=torch.float64)

    def A(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.T.to(x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.matrix.to(y)).unflatten(1, self.image_shape)

    def prox(self, z: Tensor, y: Tensor, tau: float) -> Tensor:
        matrix = self.matrix.to(z)
        normal = torch.eye(matrix.shape[1]).to(z) + tau * matrix.T @ matrix
        right = z.flatten(1) + tau * (y @ matrix)
        return torch.linalg.solve(normal, right.T).T.unflatten(1, self.image_shape)

    def start(self, y: Tensor) -> Tensor:
        return self.A_adjoint(y)


def denoiser(channels: int = 1, **config: object) -> Denoiser:
    """A small one, with activations that are not at their start."""
    model = Denoiser(channels, **({"features": 4 * channels, "blocks": 2} | config))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "activation" in name:
                p.add_(0.3 * torch.randn_like(p))
    return model


def _tiled() -> nn.Module:
    model = denoiser(blocks=1, factor=1, features=2)
    side = 3 * (model.reach + 1)
    return AtLevel(Tiled(model, bytes_per_pixel(model) * side**2), 0.1)


def _step(shape: Shape, of: type, tau: float) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        data = Dense(shape)
        return of(data, data.y, tau / data.lipschitz if of is GradientStep else tau)

    return make


_IMAGE = (1, 4, 3)


def _photons() -> nn.Module:
    data, noise = Dense(_IMAGE), Poisson(0.1, 0.4)
    return GradientStep(data, data.y.abs(), 1.9 / (data.lipschitz * noise.smoothness(data.y.abs())), noise)


def _primal_dual() -> nn.Module:
    data = Dense(_IMAGE)
    return PrimalDual(AtLevel(denoiser(alpha=0.5), 0.1), DualOfData(data, data.y), _IMAGE, 0.7)


_COMPOSED: list[tuple[str, Callable[[], nn.Module], Shape, bool]] = [
    ("MaxMin", MaxMin, (4, 3), True),
    ("GroupSort", lambda: GroupSort(3), (6,), True),
    ("Lifted", lambda: Lifted(GradientFlow(nn.Conv2d(8, 8, 3, padding=1), alpha=0.5), 8, 2), (2, 3, 5), True),
    ("Lifted without unshuffling", lambda: Lifted(GradientFlow(nn.Conv2d(4, 3, 1)), 4), (3, 2, 2), True),
    ("GradientFlow, summed in chunks", lambda: GradientFlow(nn.Linear(1030, 3)), (1030,), True),
    ("Relaxed below 1", lambda: Relaxed(GradientFlow(nn.Linear(3, 3), alpha=0.8), 0.3), (3,), True),
    ("Relaxed above 1", lambda: Relaxed(GradientFlow(nn.Linear(3, 3), alpha=0.4), 2.0), (3,), True),
    ("Relaxed by nearly 1", lambda: Relaxed(Scale(1e-3), 1 - 1e-9), (3,), True),
    ("Relaxed, merely non-expansive", lambda: Relaxed(MaxMin(), 0.4), (4,), True),
    ("Relaxed too far", lambda: Relaxed(GradientFlow(nn.Linear(3, 3)), 1.5), (3,), True),
    ("Relaxed by 0", lambda: Relaxed(nn.ReLU(), 0.0), (3,), True),
    ("Residual", lambda: Residual(nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv1d(3, 2, 1))), (2, 5), True),
    ("Resolvent", lambda: Resolvent(nn.Linear(3, 4), "tanh", 2.0, 1e-4), (3,), True),
    ("Resolvent of a convolution", lambda: Resolvent(nn.Conv2d(2, 2, 3, padding=1), "relu", 0.7, 1e-5), (2, 3, 3), True),
    ("Resolvent, weakly convex", lambda: Resolvent(nn.Linear(3, 4), WeaklyConvexRamps(4, 2), 1.0, 1e-4, True), (3,), True),
    ("Resolvent, relative step", lambda: Resolvent(nn.Conv1d(2, 3, 3, padding=1), "tanh", 3.0, 1e-4, True), (2, 5), True),
    ("proximal denoiser", lambda: AtLevel(ProximalDenoiser(1, 2, 1, tolerance=1e-4), 0.1), (1, 5, 3), True),
    ("proximal denoiser, rescaled", lambda: Rescaled(AtLevel(ProximalDenoiser(3, 1, 3, modulus=0.5), 0.2), 0.5), (3, 4, 3), True),
    ("denoiser", lambda: AtLevel(denoiser(), 0.1), (1, 5, 3), True),
    ("denoiser, nearly no noise", lambda: AtLevel(denoiser(), 1e-5), (1, 4, 4), True),
    ("denoiser, colour", lambda: AtLevel(denoiser(3), 0.05), (3, 3, 4), True),
    ("denoiser, splines", lambda: AtLevel(denoiser(activation="linear_spline", alpha=0.5), 0.3), (1, 4, 5), True),
    (
        "denoiser, pooled, two scales",
        lambda: AtLevel(denoiser(activation="pooled_ramps", hidden="frame", scales=[1, 2], kernel=1), 0.2),
        (1, 4, 5),
        True,
    ),
    (
        "denoiser, signed and unconstrained",
        lambda: AtLevel(denoiser(activation="signed_ramps", control="unconstrained"), 0.2),
        (1, 4, 5),
        True,
    ),
    (
        "denoiser, up to a Lipschitz constant",
        lambda: AtLevel(denoiser(activation="weakly_convex_ramps", lipschitz=3.0), 0.2),
        (1, 4, 5),
        True,
    ),
    ("denoiser, unlevelled", lambda: AtLevel(denoiser(activation="relu", alpha=0.6, factor=1), 0.2), (1, 4, 4), True),
    ("denoiser, adaptive", lambda: AtLevel(denoiser(activation="tanh", control="adaptive", method="rk4"), 0.9), (1, 3, 3), True),
    ("Tiled", _tiled, (1, 19, 17), True),
    ("Centre", lambda: Centre([0.4, -2.0]), (2, 3, 1), True),
    ("Channels appended", lambda: Channels(5), (2, 3), True),
    ("Channels dropped", lambda: Channels(2), (4, 2, 2), True),
    ("Symmetrised", lambda: Symmetrised(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), MaxMin(), nn.Flatten()), [1, 2]), (2, 4, 3), True),
    ("classifier", lambda: paper_classifier((3, 8, 8), 3, blocks=1), (3, 8, 8), True),
    ("classifier, ordinary", lambda: paper_classifier((1, 8, 8), 3, blocks=1, ordinary=True), (1, 8, 8), True),
    ("classifier, rescaled", lambda: paper_classifier((1, 8, 8), 3, blocks=1, rescaled=True), (1, 8, 8), True),
    ("classifier, dense", lambda: dense_classifier((1, 3, 3), 3, depth=2), (1, 3, 3), True),
    ("classifier, dense, ordinary", lambda: dense_classifier((1, 3, 3), 3, depth=2, ordinary=True), (1, 3, 3), True),
    ("classifier of flows", lambda: flow_classifier(
        (1, 4, 6), 3, [{"unshuffle": 2, "channels": 8, "kernels": [3]}, {"channels": 6, "neurons": 3, "kernels": [1]}]), (1, 4, 6), True),
    ("classifier of flows, dense ones last", lambda: flow_classifier(
        (1, 4, 4), 3, [{"unshuffle": 2, "channels": 6, "kernels": [3]}], dense=[5, 2]), (1, 4, 4), True),
    ("classifier, symmetrised", lambda: flow_classifier(
        (1, 4, 4), 3, [{"channels": 4, "kernels": [3, 3]}], symmetrised=True, shifts=[1]), (1, 4, 4), True),
    ("Sequential, empty", nn.Sequential, (3,), True),
    ("Sequential, twice the same", lambda: nn.Sequential(*[nn.Linear(3, 3)] * 3), (3,), True),
    (
        "Sequential, nested",
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.Sequential(nn.ReLU(), nn.Sequential(MaxMin(), nn.AvgPool2d(2), Scale(2.0))),
            nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), GradientFlow(nn.Linear(5, 7), "relu"),
        ),
        (1, 4, 4), True,
    ),
    ("Sequential, pooled to norm 1", lambda: nn.Sequential(nn.AvgPool2d(2), Scale(2.0)), (1, 4, 4), True),
    ("Box", Box, (3, 2), True),
    ("Box with other bounds", lambda: Box(0.1, 3), (3, 2), True),
    ("Rescaled", lambda: Rescaled(AtLevel(denoiser(), 0.1), 0.7), (1, 5, 3), True),
    ("GradientStep, Poisson", _photons, _IMAGE, False),
    ("RED gradient", lambda: GradientRED(
        _step(_IMAGE, GradientStep, 0.9)(), AtLevel(denoiser(), 0.1), 0.2), _IMAGE, False),  # type: ignore[arg-type]
    ("Krasnosel'skii-Mann", lambda: KrasnoselskiiMann(GradientFlow(nn.Linear(3, 3), alpha=0.5), 1.9), (3,), True),
    ("Halpern", lambda: Halpern(GradientFlow(nn.Linear(3, 3))), (3,), True),
    ("primal-dual", _primal_dual, (12 + 11,), False),
    ("GradientStep", _step(_IMAGE, GradientStep, 1.7), _IMAGE, False),
    ("ProximalStep", _step(_IMAGE, ProximalStep, 2.0), _IMAGE, False),
    ("forward-backward", lambda: ForwardBackward(
        _step(_IMAGE, GradientStep, 1.2)(), AtLevel(denoiser(), 0.1), Box()), _IMAGE, False),
    ("half-quadratic", lambda: HalfQuadratic(AtLevel(denoiser(), 0.1), _step(_IMAGE, ProximalStep, 3.0)()), _IMAGE, False),
    ("half-quadratic, proximal", lambda: HalfQuadratic(
        _step(_IMAGE, ProximalStep, 3.0)(), AtLevel(ProximalDenoiser(1, 2, 1), 0.1)), _IMAGE, False),
    ("Douglas-Rachford", lambda: DouglasRachford(
        AtLevel(denoiser(alpha=0.5), 0.1), _step(_IMAGE, ProximalStep, 3.0)()), _IMAGE, False),  # type: ignore[arg-type]
    ("Douglas-Rachford with a box", lambda: DouglasRachford(
        Resolvent(nn.Conv2d(1, 2, 3, padding=1)), Box()), _IMAGE, True),  # type: ignore[arg-type]
]  # fmt: skip
COMPOSED = [Case(name, make, shape, rounds) for name, make, shape, rounds in _COMPOSED]
CASES = [*LAYERS, *FLOWS, *COMPOSED]

# ------------------------------------------------------------------------------------------------------------------ attacks


def norms(x: Tensor) -> Tensor:
    """The Euclidean norm of each sample."""
    return x.flatten(1).norm(dim=1)


def pairs(shape: Shape, count: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x and d = y - x in float64: of sizes from 0.01 to 100 for x and 1e-4 to 10 for d, some d along one entry alone."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> Tensor:
        z = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
        exponent = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
        return z * (10**exponent / norms(z)).reshape(-1, *(1 for _ in shape))

    x, d = draw(-2, 2), draw(-4, 1)
    single = torch.zeros_like(d[::4]).flatten(1)
    index = torch.randint(single.shape[1], (len(single), 1), generator=generator)
    single.scatter_(1, index, norms(d[::4])[:, None])
    return x, torch.cat([d[1::4], d[2::4], d[3::4], single.reshape(d[::4].shape)])


def stretch(module: Callable[[Tensor], Tensor], x: Tensor, d: Tensor, shift: float = 0.0) -> Tensor:
    """‖T(x+d) - T(x) - shift·d‖/‖d‖ for each sample. For an α-averaged T it is at most α at shift = 1 - α: then it is
    α times the stretch of the non-expansive R in T = (1-α)I + αR."""
    both = module(torch.cat([x + d, x]))
    moved = both[: len(x)] - both[len(x) :]
    return norms(moved - shift * d if shift else moved) / norms(d)


def attack(module: Callable[[Tensor], Tensor], x: Tensor, d: Tensor, shift: float = 0.0, steps: int = 8) -> Tensor:
    """The largest stretch found from (x, d): d by a power method on the differentiated map, x by gradient ascent."""
    best = stretch(module, x, d, shift).detach()
    reach, size = norms(d), norms(x)
    column = (-1, *(1 for _ in x.shape[1:]))
    for _ in range(steps):
        x, d = x.detach().requires_grad_(), d.detach().requires_grad_()
        both = module(torch.cat([x + d, x]))
        moved = both[: len(x)] - both[len(x) :]
        if shift:
            moved = moved - shift * d
        squared = moved.flatten(1).square().sum(1)
        best = torch.maximum(best, (squared.detach().sqrt() / norms(d.detach())))
        if not squared.requires_grad:
            break
        towards_x, towards_d = torch.autograd.grad(squared.sum(), (x, d), allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            scale = norms(towards_d)
            d = torch.where(
                (scale > 0).reshape(column), towards_d * (reach / scale.clamp_min(1e-300)).reshape(column), d
            )
            x = x + towards_x * (0.1 * size / norms(towards_x).clamp_min(1e-300)).reshape(column)
    return torch.maximum(best, stretch(module, x.detach(), d.detach(), shift).detach())


def violation(module: Callable[[Tensor], Tensor], x: Tensor, d: Tensor, alpha: float) -> Tensor:
    """(‖Tx-Ty‖² + ((1-α)/α)‖(I-T)x-(I-T)y‖²)/‖x-y‖² - 1 for each sample: above 0, T is not α-averaged."""
    with torch.no_grad():
        both = module(torch.cat([x + d, x]))
    moved = both[: len(x)] - both[len(x) :]
    rest = norms(d - moved) ** 2
    return (norms(moved) ** 2 + (1 - alpha) / alpha * rest) / norms(d) ** 2 - 1
