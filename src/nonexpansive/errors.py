"""What can go wrong, by name. Each message says what is wrong and what to do about it."""

from __future__ import annotations


class NonexpansiveError(Exception):
    """Base of every error that this library raises on purpose."""


class Refused(NonexpansiveError, ValueError):
    """No certificate can be given (or a method is unusable): the message names the culprit and the remedy."""


class BadInput(NonexpansiveError, ValueError):
    """A file, image, kernel, setting or value that cannot be used: the message says what is expected."""


class BadCheckpoint(BadInput):
    """A checkpoint that is truncated, changed, of another architecture, or not one of ours."""


class Interrupted(NonexpansiveError):
    """The run was asked to stop (SIGTERM or SIGINT), saved a checkpoint and stopped."""


class Diverging(NonexpansiveError, RuntimeError):
    """A run contradicts what was proved about it (residual grew, solver missed its tolerance): a defect to report."""
