"""Modules: gradient flows, what goes between them, and the networks made of them."""

from nonexpansive.nn.control import (
    AdaptiveSteps,
    CappedStep,
    LipschitzStep,
    MaximalStep,
    NormControl,
    Rescale,
    Unconstrained,
)
from nonexpansive.nn.flow import Flows, GradientFlow, project
from nonexpansive.nn.implicit import Resolvent
from nonexpansive.nn.pooled import PooledRamps, SignedRamps, WeaklyConvexRamps
from nonexpansive.nn.resize import Lifted, Relaxed, Residual, Scale
from nonexpansive.nn.sort import GroupSort, MaxMin
from nonexpansive.nn.spline import ClippedRamps, LinearSpline

__all__ = [
    "AdaptiveSteps",
    "CappedStep",
    "ClippedRamps",
    "Flows",
    "GradientFlow",
    "GroupSort",
    "Lifted",
    "LinearSpline",
    "LipschitzStep",
    "MaxMin",
    "MaximalStep",
    "NormControl",
    "PooledRamps",
    "Relaxed",
    "Rescale",
    "Residual",
    "Resolvent",
    "Scale",
    "SignedRamps",
    "Unconstrained",
    "WeaklyConvexRamps",
    "project",
]
