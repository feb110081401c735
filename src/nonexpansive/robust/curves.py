"""Accuracy over the size of the perturbation, with what a finite number of images leaves open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nonexpansive.errors import BadInput

STANDARD = (36 / 255, 72 / 255, 108 / 255)
"""The ε at which the field reports certified accuracy."""

EPSILONS = tuple(sorted({*(k / 39 for k in range(40)), *STANDARD}))
"""40 points of [0, 1] and the standard ones."""


@dataclass(frozen=True)
class Curve:
    """Of ``total`` images, ``counts[k]`` are right, and stay so under every perturbation considered of a norm up to ``epsilons[k]``."""

    name: str
    epsilons: tuple[float, ...]
    counts: tuple[int, ...]
    total: int

    @staticmethod
    def of(name: str, threshold: Tensor, epsilons: Sequence[float] = EPSILONS) -> Curve:
        """The curve of images that hold at ε < ``threshold`` (N,): a certified radius, or the distance of an adversary, 0 where
        the answer is wrong. It falls with ε whatever the thresholds are. Raises BadInput for ε below 0 or NaN, or no images."""
        if not epsilons or not all(0 <= e < float("inf") for e in epsilons):
            raise BadInput(f"every ε must be a finite number from 0, and there must be one; got {list(epsilons)}")
        if len(threshold) == 0:
            raise BadInput("an accuracy needs at least one image")
        steps = tuple(sorted(set(map(float, epsilons))))
        return Curve(name, steps, tuple(int((threshold.double() > e).sum()) for e in steps), len(threshold))

    @property
    def accuracy(self) -> tuple[float, ...]:
        return tuple(count / self.total for count in self.counts)

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """95 % confidence intervals of Clopper & Pearson for each accuracy, were the images drawn independently."""
        from scipy.stats import binomtest

        intervals = (binomtest(count, self.total).proportion_ci(0.95, "exact") for count in self.counts)
        return [(float(interval.low), float(interval.high)) for interval in intervals]

    @property
    def area(self) -> float:
        """The area under the curve by the trapezoidal rule, divided by the length of its range: a mean accuracy over ε."""
        length = self.epsilons[-1] - self.epsilons[0]
        if length == 0:
            return self.accuracy[0]
        y, x = torch.tensor(self.accuracy, dtype=torch.float64), torch.tensor(self.epsilons, dtype=torch.float64)
        return float(torch.trapezoid(y, x)) / length

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return {
            "name": self.name,
            "images": self.total,
            "epsilons": list(self.epsilons),
            "accuracy": list(self.accuracy),
            "interval_95": [list(interval) for interval in self.intervals],
            "area": self.area,
        }
