import mmap
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.training.allocator import keep_freed_memory, page_faults

ROOT = Path(__file__).resolve().parents[2]

STEPS = """
from experiments.training.allocator import keep_freed_memory, page_faults

def faults_of_a_step():
    before = page_faults()
    blocks = [bytearray(16 * 2**20) for _ in range(8)]
    del blocks
    return page_faults() - before

by_default = [faults_of_a_step() for _ in range(3)][-1]
keep_freed_memory()
kept = [faults_of_a_step() for _ in range(3)][-1]
print(by_default, kept)
"""

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")


@needs_glibc
def test_memory_that_is_kept_is_not_faulted_in_again():
    output = subprocess.check_output([sys.executable, "-c", STEPS], cwd=ROOT, text=True)
    by_default, kept = map(int, output.split())
    assert by_default > 10_000
    assert kept < by_default / 100


@needs_glibc
def test_tells_that_it_took_effect():
    assert keep_freed_memory() is True


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert keep_freed_memory() is False


def test_page_faults_are_counted():
    before = page_faults()
    # Not from the C library, which may have kept what another test freed.
    with mmap.mmap(-1, 2**20) as memory:
        memory.write(bytes(2**20))
    assert page_faults() > before
