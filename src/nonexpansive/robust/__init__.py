"""Robust classification: certified radii, attacks, and the curves of accuracy over the size of a perturbation."""

from nonexpansive.robust.radius import CertifiedClassifier, certify_classifier, estimated_radii

__all__ = ["CertifiedClassifier", "certify_classifier", "estimated_radii"]
