"""Robust classification: certified radii, attacks, and the curves of accuracy over the size of a perturbation."""

from nonexpansive.robust.attacks import ATTACKS, Found, nearest, search
from nonexpansive.robust.curves import EPSILONS, STANDARD, Curve
from nonexpansive.robust.evaluate import Evaluation, evaluate, pixels, require_sound
from nonexpansive.robust.radius import CertifiedClassifier, Radii, certify_classifier, estimated_radii

__all__ = [
    "ATTACKS",
    "EPSILONS",
    "STANDARD",
    "CertifiedClassifier",
    "Curve",
    "Evaluation",
    "Found",
    "Radii",
    "certify_classifier",
    "estimated_radii",
    "evaluate",
    "nearest",
    "pixels",
    "require_sound",
    "search",
]
