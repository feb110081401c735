"""Restoration: splittings as certified modules, run to their fixed point; the forward models come from deepinv."""

from nonexpansive.restore.iterate import Descent, Report, fixed_point, prove
from nonexpansive.restore.likelihood import Gaussian, Likelihood, Poisson
from nonexpansive.restore.methods import splitting
from nonexpansive.restore.operators import Operator, forward_model
from nonexpansive.restore.physics import Blurring, blur, degrade, kernel
from nonexpansive.restore.primal_dual import DualOfBox, DualOfData, PrimalDual
from nonexpansive.restore.restoration import Plan, plan
from nonexpansive.restore.schemes import Halpern, KrasnoselskiiMann
from nonexpansive.restore.splitting import DouglasRachford, ForwardBackward, GradientRED, HalfQuadratic
from nonexpansive.restore.steps import AtLevel, Box, DataTerm, GradientStep, ProximalStep, Rescaled, prior
from nonexpansive.restore.tiles import Tiled

__all__ = [
    "AtLevel",
    "Blurring",
    "Box",
    "DataTerm",
    "Descent",
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
    "plan",
    "prior",
    "prove",
    "splitting",
]
