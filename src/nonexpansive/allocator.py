"""The C library's memory: kept for the next tensor, in place of being given back and zeroed anew."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of glibc's mallopt(3)."""


def keep_memory() -> bool:
    """Let this process keep what tensors on the CPU free, for those that follow. Returns whether it could be arranged (with glibc).

    glibc asks the system for each large block and returns it when it is freed. A network frees and asks for blocks of one size all the
    time, and the system fills each with zeros, page by page: a denoiser takes up to twice as long by that (``benchmarks/speed.py``).
    The price is that memory, once used, is not given back before the process ends. The command line and trainings call this; in a
    program of your own it is your choice, to be made before the large tensors.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1), mallopt(_TOP_PAD, 64 << 20)])


__all__ = ["keep_memory"]
