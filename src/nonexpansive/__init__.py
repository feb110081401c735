"""Neural networks that are provably stable: non-expansive and averaged by construction, with certificates that are sound.

``certify(module, shape)`` proves a Lipschitz bound, and averagedness where there is one; ``norm_bound(layer)`` bounds a layer's
norm from above; :class:`GradientFlow` is the block; ``load(name)`` gives a trained model, ``models()`` lists the shipped ones.
"""

from nonexpansive import errors
from nonexpansive.allocator import keep_memory
from nonexpansive.checkpoint import load, models, save
from nonexpansive.math.bounds import norm_bound, norm_estimate
from nonexpansive.math.certificate import Certificate, certify, fold, rule
from nonexpansive.math.tableau import ButcherTableau, tableau
from nonexpansive.nn import GradientFlow

__all__ = [
    "ButcherTableau",
    "Certificate",
    "GradientFlow",
    "certify",
    "errors",
    "fold",
    "keep_memory",
    "load",
    "models",
    "norm_bound",
    "norm_estimate",
    "rule",
    "save",
    "tableau",
]
__version__ = "0.1.0"
