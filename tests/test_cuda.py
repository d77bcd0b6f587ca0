"""The CUDA kernels as far as a machine without a GPU can tell: they compile for every architecture
that is named, without spills and without fused multiply-adds, and their grids have sizes that fit.

Where there is a GPU, the tests of the operators run on it (the `backend` fixture)."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from noisyq_fast.backends.cuda import resident_blocks, splits_per_channel

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
KERNELS = sorted(path.name for path in SOURCES.glob("*.cu"))
OPTIONS = ["-std=c++17", "-O3", "-fmad=false"]
ARCHITECTURES = (80, 90, 100)

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def nvcc(*arguments):
    result = subprocess.run(["nvcc", *OPTIONS, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


@needs_nvcc
@pytest.mark.parametrize("source", KERNELS)
def test_machine_code_has_no_spills_and_few_registers(source, tmp_path):
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    report = nvcc("-Xptxas", "-v", "-c", *targets, SOURCES / source, "-o", tmp_path / "out.o")
    for architecture in ARCHITECTURES:
        assert f"for 'sm_{architecture}'" in report
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    assert spills
    assert set(spills) == {"0"}
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    # 65,536 registers a multiprocessor hold 4 blocks of 256 threads even at 64 a thread.
    assert max(registers) <= 64


@needs_nvcc
@pytest.mark.parametrize("source", KERNELS)
def test_arithmetic_is_ieee_and_accesses_are_wide(source, tmp_path):
    nvcc("-ptx", "-arch=compute_80", SOURCES / source, "-o", tmp_path / "out.ptx")
    ptx = (tmp_path / "out.ptx").read_text()
    assert "fma.rn.f32" not in ptx
    assert "div.rn.f32" in ptx
    assert "div.approx" not in ptx
    assert ".ftz" not in ptx
    assert "cvt.rni.f32.f32" in ptx
    assert re.search(r"ld\.global\.v4\.[buf]32", ptx)
    assert re.search(r"st\.global\.v4\.[buf]32", ptx)


@pytest.mark.parametrize("multiprocessors", [1, 108, 132])
@pytest.mark.parametrize("channels", [1, 2, 3, 64, 100_000])
@pytest.mark.parametrize("channel_bytes", [2, 16_383, 16_384, 16_385, 8 << 20, 1 << 40])
def test_blocks_fill_the_device_and_have_work(channel_bytes, channels, multiprocessors):
    splits = splits_per_channel(channel_bytes, channels, multiprocessors)
    assert 1 <= splits <= max(1, -(-channel_bytes // 16_384))
    assert channels * splits < 2**31
    # One fewer would leave room on the device, or is as many as have work.
    full = channels * splits >= 8 * multiprocessors
    assert full or splits == -(-channel_bytes // 16_384)


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("tensor_bytes", [1, 16_384, 16_385, 20 << 20])
def test_resident_blocks_all_run_at_once(tensor_bytes, multiprocessors):
    blocks = resident_blocks(tensor_bytes, multiprocessors)
    # A cooperative launch needs every block on the device; one that is alone has no work to share.
    assert 1 <= blocks <= multiprocessors
    assert blocks == multiprocessors or blocks == -(-tensor_bytes // 16_384)
