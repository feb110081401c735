"""Depth: what the product of bounds costs an ordinary residual network, and what it does not cost a chain of gradient flows.

Networks ``dense_classifier`` of rising depth are trained alike, every weight at spectral norm 1. Of their features, a map ℝⁿ → ℝⁿ of
``depth`` residual blocks, two numbers are taken: the Lipschitz constant that is certified, from above, and the largest ratio that
gradient ascent finds, from below. An ordinary block x + Bσ(Ax + b) has the bound 2, which :func:`worst_case` attains at any depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nonexpansive import checkpoint
from nonexpansive.experiments import shipped
from nonexpansive.experiments.training import train
from nonexpansive.math.bounds import norm_bound
from nonexpansive.math.certificate import certify
from nonexpansive.nn.classifier import Classifier
from nonexpansive.nn.resize import Residual
from nonexpansive.train import Run, load_images

DEPTHS = (1, 2, 4, 8, 16, 32, 64)
SIZES = (1e-1, 3e1)
"""The distances of the pairs from which the ascent begins lie between these, evenly in their logarithms."""

HALVINGS = 8
"""How often they are halved on the way."""


@dataclass(frozen=True)
class Trained:
    """One network: ``right`` of ``tested`` images, ``measured`` ≤ the Lipschitz constant of its features ≤ ``certified``.

    ``norm`` bounds the spectral norm of each of its weights.
    """

    depth: int
    ordinary: bool
    right: int
    tested: int
    measured: float
    certified: float
    norm: float


def experiment(
    data: Path | str, out: Path, depths: Iterable[int] = DEPTHS, overrides: Iterable[str] = (), **options: Any
) -> Iterator[Trained]:
    """Both kinds of network at each depth, trained in folders of ``out`` (or taken from there), with the data set of "dense.toml".

    ``overrides`` change the training, as ``train.steps=100``; ``options`` as for :func:`~nonexpansive.train.fit`.
    """
    for depth in depths:
        for ordinary in (True, False):
            own = [f"model.depth={depth}", f"model.ordinary={str(ordinary).lower()}"]
            run = Run.from_toml(shipped("dense"), [*overrides, *own])
            best = train(run, data, out / f"{'ordinary' if ordinary else 'flows'}-{depth}", **options)
            model = checkpoint.load(best)
            assert isinstance(model, Classifier)
            test = load_images(run.data.source, "test", data)
            x = test.images.double() / 255
            certified = certify(model.features, model.shape).lipschitz
            norm = max(norm_bound(m) for m in model.features.modules() if isinstance(m, nn.Linear))
            model.double().requires_grad_(False)
            right = int((model(x).argmax(1) == test.labels).sum())
            yield Trained(depth, ordinary, right, len(x), steepest(model.features, x[:64]), certified, norm)


def steepest(f: Callable[[Tensor], Tensor], x: Tensor, steps: int = 200, seed: int = 0) -> float:
    """The largest ‖f(x+δ) - f(x)‖/‖δ‖ seen on the way of gradient ascent from pairs x, x + δ: a Lipschitz constant from below.

    x (N, *shape), as many starts, float64; f treats them apart. With x held, the steps in δ (to the normalised gradient of
    ‖f(x+δ) - f(x)‖) are, wherever f is linear between the two, those of a power iteration on its Jacobian. Now and then x moves
    uphill, and, :data:`HALVINGS` times, the pair becomes the steeper half of the segment between them, which is at least as steep.
    """

    def ratio(x: Tensor, delta: Tensor) -> Tensor:
        return (f(x + delta) - f(x)).flatten(1).norm(dim=1) / delta.flatten(1).norm(dim=1)

    random = torch.Generator().manual_seed(seed)
    low, high = (torch.tensor(size, dtype=x.dtype).log() for size in SIZES)
    size = _like((low + (high - low) * torch.rand(len(x), generator=random, dtype=x.dtype)).exp(), x)
    delta = size * _unit(torch.randn(x.shape, generator=random, dtype=x.dtype))
    best = 0.0
    for step in range(steps):
        x, delta = x.detach().requires_grad_(), delta.detach().requires_grad_()
        with torch.enable_grad():
            ratios = ratio(x, delta)
            along, towards = torch.autograd.grad(ratios.clamp_min(1e-300).log().sum(), (x, delta))
        best = max(best, float(ratios.detach().nan_to_num(0.0).max()))
        with torch.no_grad():
            if step % (steps // HALVINGS) == steps // HALVINGS - 1:
                delta, size = delta / 2, size / 2
                x = torch.where(_like(ratio(x + delta, delta) > ratio(x, delta), x), x + delta, x)
                continue
            # the gradient of log ‖f(x+δ) - f(x)‖ alone: that of -log ‖δ‖ taken off again
            delta = size * _unit(towards + delta / _like(delta.flatten(1).norm(dim=1).square(), x))
            if step % 4 == 3:
                x = x + size * (1 - step / steps) * _unit(along)
    return best


def worst_case(size: int, depth: int) -> nn.Sequential:
    """An ordinary residual network of weights I, norm 1, with σ the ReLU: f(x) = 2^depth·x for x ≥ 0, the bound attained."""

    def identity() -> nn.Linear:
        linear = nn.Linear(size, size, bias=False)
        nn.init.eye_(linear.weight)
        return linear

    return nn.Sequential(*(Residual(nn.Sequential(identity(), nn.ReLU(), identity())) for _ in range(depth)))


def _unit(x: Tensor) -> Tensor:
    norm = x.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    return x / _like(norm, x)


def _like(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 1))
