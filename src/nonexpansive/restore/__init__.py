"""Restoration: splittings as certified modules, run to their fixed point; the forward models come from deepinv."""

from nonexpansive.restore.deblurring import Plan, plan
from nonexpansive.restore.iterate import Report, fixed_point, prove
from nonexpansive.restore.physics import Blurring, blur, degrade, kernel
from nonexpansive.restore.splitting import (
    AtLevel,
    Box,
    DouglasRachford,
    ForwardBackward,
    GradientStep,
    HalfQuadratic,
    ProximalStep,
    splitting,
)
from nonexpansive.restore.tiles import Tiled

__all__ = [
    "AtLevel",
    "Blurring",
    "Box",
    "DouglasRachford",
    "ForwardBackward",
    "GradientStep",
    "HalfQuadratic",
    "Plan",
    "ProximalStep",
    "Report",
    "Tiled",
    "blur",
    "degrade",
    "fixed_point",
    "kernel",
    "plan",
    "prove",
    "splitting",
]
