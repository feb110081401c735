"""Depth: what the product of bounds costs an ordinary residual network, and what it does not cost a chain of gradient flows.

Networks ``dense_classifier`` of rising depth are trained alike, every weight at spectral norm 1. Of their features, a map ℝⁿ → ℝⁿ of
``depth`` residual blocks, two numbers are taken: the Lipschitz constant that is certified, from above, and the largest ratio that
gradient ascent finds, from below. An ordinary block x + Bσ(Ax + b) has the bound 2, which :func:`worst_case` attains at any depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nonexpansive import checkpoint
from nonexpansive.experiments import shipped
from nonexpansive.experiments.stability import steepest
from nonexpansive.experiments.training import train
from nonexpansive.math.bounds import norm_bound
from nonexpansive.math.certificate import certify
from nonexpansive.nn.classifier import Classifier
from nonexpansive.nn.resize import Residual
from nonexpansive.train import Run, load_images

DEPTHS = (1, 2, 4, 8, 16, 32, 64)


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


def worst_case(size: int, depth: int) -> nn.Sequential:
    """An ordinary residual network of weights I, norm 1, with σ the ReLU: f(x) = 2^depth·x for x ≥ 0, the bound attained."""

    def identity() -> nn.Linear:
        linear = nn.Linear(size, size, bias=False)
        nn.init.eye_(linear.weight)
        return linear

    return nn.Sequential(*(Residual(nn.Sequential(identity(), nn.ReLU(), identity())) for _ in range(depth)))
