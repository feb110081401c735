"""Memory that is freed stays with the process once that was asked for, and only then."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch
from nonexpansive.allocator import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory()
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
before = resident()
x = torch.ones(200_000_000, dtype=torch.uint8)
used = resident() - before
del x
left = resident() - before
y = torch.ones(199_000_000, dtype=torch.uint8)
print(used, left, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc is what can be told")
@pytest.mark.parametrize("way", ["keep", "leave"])
def test_what_is_freed_stays(way: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, way], capture_output=True, text=True, check=True)
    used, left, again = map(int, done.stdout.split())
    assert used > 190e6
    assert left > 190e6 if way == "keep" else left < 20e6
    assert again < used + 20e6  # and it is used again
