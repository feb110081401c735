"""Restoration: splittings as certified modules, run to their fixed point; the forward models come from deepinv."""

from nonexpansive.restore.iterate import Report, fixed_point, prove
from nonexpansive.restore.likelihood import Gaussian, Likelihood, Poisson
from nonexpansive.restore.operators import Operator, forward_model
from nonexpansive.restore.physics import Blurring, blur, degrade, kernel
from nonexpansive.restore.restoration import Plan, measure, plan
from nonexpansive.restore.splitting import (
    AtLevel,
    Box,
    DataTerm,
    DouglasRachford,
    DualOfBox,
    DualOfData,
    ForwardBackward,
    GradientRED,
    GradientStep,
    HalfQuadratic,
    Halpern,
    KrasnoselskiiMann,
    PrimalDual,
    ProximalStep,
    Rescaled,
    prior,
    splitting,
)
from nonexpansive.restore.tiles import Tiled

__all__ = [
    "AtLevel",
    "Blurring",
    "Box",
    "DataTerm",
    "DouglasRachford",
    "DualOfBox",
    "DualOfData",
    "ForwardBackward",
    "Gaussian",
    "GradientRED",
    "GradientStep",
    "HalfQuadratic",
    "Halpern",
    "KrasnoselskiiMann",
    "Likelihood",
    "Operator",
    "Plan",
    "Poisson",
    "PrimalDual",
    "ProximalStep",
    "Report",
    "Rescaled",
    "Tiled",
    "blur",
    "degrade",
    "fixed_point",
    "forward_model",
    "kernel",
    "measure",
    "plan",
    "prior",
    "prove",
    "splitting",
]
