"""The Triton kernels of products of codes and of what follows, compiled.

Products of matrices are those of the tensor cores, on signed bytes, which come 16 at a time where
sizes allow; and no product is added without having been rounded.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_triton_compile import KERNELS, LEARNED

from noisyq_fast.backends import on_triton

ARCHITECTURES = (80, 90, 100)
TENSOR_CORES = r"mma\.(sync|mma_async)\S*\.s32\.s8\.s8|tcgen05\.mma\S*kind::i8"
PRODUCTS = {"multiply", "multiply_few"}
PASSES = {
    "moments_partially",
    "moments",
    "moments_of_products",
    "normalization",
    "ends_of_line",
    "observe",
    "map_sums",
    "ends_of_map",
    "codes_of_sums",
    "grads_of_norm_partially",
    "grads_of_norm",
    "grads_of_sums",
}


def test_every_kernel_that_is_launched_is_compiled():
    """Here or in `test_triton_compile`."""
    sources = Path(on_triton.__file__).parent.glob("*.py")
    launched = {
        name for source in sources for name in re.findall(r"kernels\(\)\.(\w+)", source.read_text())
    }
    assert launched == KERNELS | LEARNED | PRODUCTS | PASSES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code(architecture, tmp_path):
    pytest.importorskip("triton")
    child = subprocess.run(
        [sys.executable, __file__, str(architecture), tmp_path],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    kernels = [json.loads(line) for line in child.stdout.splitlines()]
    assert {kernel["name"] for kernel in kernels} == PRODUCTS | PASSES
    assert ("wgmma" in kernels[0]["ptx"]) == (architecture == 90)
    for kernel in kernels:
        variant, ptx = kernel["variant"], kernel["ptx"]
        assert (kernel["stack"], kernel["local"]) == (0, 0), variant  # No spills.
        assert "fma.rn" not in ptx, variant
        assert ".ftz" not in ptx, variant
        assert not re.search(r"(div|sqrt|rcp)\.(full|approx)", ptx), variant
        multiplies = kernel["name"] == "multiply"
        assert bool(re.search(TENSOR_CORES, ptx)) == multiplies, variant
        if multiplies and kernel["wide"]:
            assert re.search(r"cp\.async\.\S+ \[[^]]*], \[[^]]*], 0x10", ptx), variant
            assert ptx.count("ld.global.b8") <= 1, variant  # The zero point.
        if kernel["name"] == "normalization":
            assert "sqrt.rn.f64" in ptx, variant


def compile_for(architecture, folder):
    """Prints what every operator launches as lines of JSON."""
    import torch
    from triton_compiler import compile_instead

    from noisyq_fast import Grid
    from noisyq_fast.backends.on_triton import backend
    from noisyq_fast.backends.reference.sums import Running

    def describe(name, named):
        of_pixel = named["terms"][1] if name in PRODUCTS else 0
        values = [
            (key, value)
            for key, value in named.items()
            if isinstance(value, (int, str, tuple)) or key in ("codes", "sums", "out", "kept")
        ]
        return {"variant": f"{name}: {values}, sm_{architecture}", "wide": of_pixel % 16 == 0}

    compile_instead(architecture, folder, describe)

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def convolve(batch, channels, outputs, size, groups=1, dtype=torch.int8, width=3):
        x = empty(batch, channels, size, size, dtype=dtype)
        w = empty(outputs, channels // groups, width, width, dtype=dtype)
        z, wz = empty(dtype=dtype), empty(outputs, dtype=dtype)
        if dtype == torch.int8:
            z = wz = None
        of_x, of_weight = (x, empty(), z, None), (w, empty(outputs), wz, None)
        how = [1, 1], [width // 2] * 2, [1, 1], False, [0, 0], groups
        values = x.to(torch.float32 if dtype == torch.int8 else torch.bfloat16)
        function = backend.functions["integer_convolution"]
        function(values, w, empty(outputs), *of_x, *of_weight, *how)

    convolve(128, 64, 64, 32)
    convolve(16, 64, 64, 56, dtype=torch.uint8)
    convolve(16, 64, 64, 56, groups=64)
    x, w = empty(128, 64, 32, 32, dtype=torch.int8), empty(64, 64, 3, 3, dtype=torch.int8)
    x = x.to(memory_format=torch.channels_last)
    how = [1, 1], [1, 1], [1, 1], 1, 2**15 - 1, True
    backend.functions["convolve_sums"](x, None, w, None, *how)
    if architecture == 90:
        convolve(128, 3, 16, 32)
        convolve(128, 128, 128, 32, width=1)
        convolve(16, 64, 64, 56, groups=2)
        x, w = empty(64, 128, 768, dtype=torch.int8), empty(10, 768, dtype=torch.int8)
        of_x, of_weight = (x, empty(64), None, None), (w, empty(10), None, None)
        backend.functions["integer_linear"](x.half(), w, None, *of_x, *of_weight)

    functions = backend.functions
    sums = empty(128, 64, 32, 32).to(torch.int16, memory_format=torch.channels_last)
    of_channel = [empty(64) for _ in range(4)]
    _, total, squares, *ends = functions["moments"](sums.float(), 2**15 - 1)
    functions["moments"](sums.float(), 2**24)
    count = 128 * 32 * 32
    running = Running(*of_channel[:2], empty(dtype=torch.int64), of_channel[2], 0.1)
    for given in (running, running._replace(bias=None), None):
        functions["normalization"](total, squares, count, *of_channel[:3], 1e-5, given)
    functions["ends_of_line"](*ends, *of_channel[:2], True)
    functions["observe"](empty(2), empty(2), empty(), 0.01, Grid(4, "affine"))
    functions["map_sums"](sums, *of_channel[:2], sums.float(), True, True, True)
    functions["codes_of_sums"](sums, *of_channel[:2], True, empty(2), Grid(4, "affine"))
    grad = sums.bfloat16()
    functions["grads_of_norm"](grad, sums, *of_channel[:2], True, *of_channel, True)
    functions["grads_of_sums"](grad, sums, *of_channel[:2], True, *of_channel)


if __name__ == "__main__":
    compile_for(int(sys.argv[1]), Path(sys.argv[2]))
