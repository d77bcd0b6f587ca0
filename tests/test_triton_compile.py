"""The Triton kernels as far as a machine without a GPU can tell: every variant compiles for every
architecture that is named, without spills, with IEEE arithmetic, and with 16 bytes for each access
where sizes allow.

The operators are called as ever, on tensors without memory, and what they would launch is compiled
instead. That takes a process of its own: this one may have the interpreter on.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ARCHITECTURES = (80, 90, 100)
KERNELS = {
    "quantize_channels",
    "quantize_tensor",
    "reduce_partially",
    "quantize_reduced",
    "quantize_fixed_range",
    "dequantize",
    "quantize_masked",
    "zero_clipped",
}
LEARNED = {"quantize_learned", "learned_backward", "sum_chunks"}
WITHOUT_DIVISION = {"reduce_partially", "dequantize", "zero_clipped", "sum_chunks"}


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
    assert {kernel["name"] for kernel in kernels} == KERNELS | LEARNED
    for kernel in kernels:
        variant, ptx = kernel["variant"], kernel["ptx"]
        assert (kernel["stack"], kernel["local"]) == (0, 0), variant  # No spills.
        assert "fma.rn.f32" not in ptx, variant
        assert ".ftz" not in ptx, variant
        assert not re.search(r"div\.(full|approx)", ptx), variant
        # The gradient of pact is a matter of comparisons.
        divides = kernel["name"] not in WITHOUT_DIVISION and "learned_backward: pact" not in variant
        assert ("div.rn.f32" in ptx) == divides, variant
        if kernel["wide"]:
            # The 65,536 registers of a multiprocessor hold 24 warps at least; 12 of rules with exp.
            assert kernel["registers"] <= (168 if kernel["name"] in LEARNED else 80), variant
            if kernel["maps"] or kernel["name"] != "quantize_reduced":  # that reads partial results
                assert ptx.count("ld.global.v4.b32") >= kernel["tensors"], variant
            assert ("st.global.v4.b32" in ptx) == kernel["maps"], variant
            assert not re.search(r"(ld|st)\.global\.b16", ptx), variant


def compile_for(architecture, folder):
    """Prints what every operator launches, in every variant, as lines of JSON."""
    import torch
    from every_operator import RULES
    from strategies import DTYPES
    from triton_compiler import compile_instead

    from noisyq_fast import Grid
    from noisyq_fast.backends import on_triton as backend
    from noisyq_fast.backends.reference.masks import CLIPPED, NEGATIVE, NOTHING
    from noisyq_fast.grid import AFFINE, FULL, UNSIGNED
    from noisyq_fast.rules import NAMES, PARAMETERS, Rule

    def describe(name, named):
        if name in ("learned_backward", "sum_chunks"):
            told = f"{named.get('RULE')}, inner {named.get('inner')}"
            return {"variant": f"{name}: {told}, sm_{architecture}", "wide": False}
        sizes, tile = named["sizes"], named["TILE"]
        inputs = next(iter(named.values()))
        if not isinstance(inputs, tuple):
            inputs, sizes = [inputs], [sizes]
        dtypes = [x.dtype for x in inputs]
        return {
            "variant": f"{name}: {named.get('RULE') or named.get('KIND')}, {named.get('MASKED')}, "
            f"{dtypes}, {sizes}, tile {tile}, sm_{architecture}",
            "wide": all(n == 1 or n % 16 == 0 for *layout, _ in sizes for n in layout),
            "tensors": len(inputs),
            "maps": any(named.get(output) is not None for output in ("y", "out")),
        }

    compile_instead(architecture, folder, describe)

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def on_grid(grid, dtype, n):
        ends = [2] if grid.is_affine else []
        weight = empty(8 * n, 250 * n, dtype=dtype)
        activation = empty(n, n, n, (n + 1) // 2, dtype=dtype)
        average = empty(*ends), empty()
        masked = NEGATIVE if grid.kind == UNSIGNED else CLIPPED
        codes, scale, zero_point = backend.quantize_on_grid(weight, grid, 0)
        if grid.is_affine:
            backend.dequantize_on_grid(codes, scale, zero_point, 0)
        backend.fake_quantize_on_grid(weight, grid, 0, masked)
        backend.fake_quantize_on_grid(activation, grid, 1, NOTHING)
        backend.fake_quantize_ema_on_grid(activation, *average, grid, None, 0.01, masked)
        backend.fake_quantize_fixed_range_on_grid(activation, empty(*ends), grid, None, CLIPPED)
        backend.fake_quantize_fixed_range_on_grid(activation, empty(*ends, n), grid, 1, NOTHING)
        backend.fake_quantize_fixed_range_on_grid(activation, empty(*ends, n), grid, 1, CLIPPED)

    def learned(x, axis, name):
        _, low, high = RULES[name]
        channels = [] if axis is None else [x.shape[axis]]
        arguments = empty(len(PARAMETERS[name]), *channels), Rule(name, low, high), axis
        compute = backend.backend.functions
        compute["fake_quantize_learned"](x, *arguments)
        compute["quantize_learned"](x, *arguments)
        compute["fake_quantize_learned_backward"](x, x, *arguments, 1.0)

    # Sizes that 16 divides, and odd ones, for which one architecture tells enough.
    for n in (64, 65) if architecture == 90 else (64,):
        for dtype in DTYPES:
            weight = empty(8 * n, 250 * n, dtype=dtype)
            activation = empty(n, n, n, (n + 1) // 2, dtype=dtype)
            range_ = empty()
            backend.fake_quantize(weight, 7, 0)
            backend.quantize(weight, 7, 0)
            backend.fake_quantize(empty(9 * n, 1000 * n, dtype=dtype), 7, 0)
            backend.fake_quantize_ema(activation, range_, None, 7, None, 0.01)
            backend.fake_quantize_ema(activation, range_, empty(), 7, None, 0.01)
            backend.fake_quantize_ema(weight, empty(8 * n), empty(8 * n), 7, 0, 0.01)
            backend.quantize(activation, 7, None)
            backend.fake_quantize(activation, 7, 1)
            backend.fake_quantize(activation.to(memory_format=torch.channels_last), 7, 1)
            backend.fake_quantize_fixed_range(activation, range_, 7, None)
            backend.fake_quantize_fixed_range_clipped(weight, empty(8 * n), 7, 0)
            _, bits = backend.fake_quantize_fixed_range_clipped(activation, range_, 7, None)
            backend.zero_clipped(activation, bits)
            for laid_out in (activation, activation.to(memory_format=torch.channels_last)):
                backend.fake_quantize_fixed_range_clipped(laid_out, empty(n), 7, 1)
        backend.dequantize(empty(8 * n, 250 * n, dtype=torch.int8), empty(8 * n), 0)
        steps = empty(8 * n, 250 * n, dtype=torch.uint8), empty(dtype=torch.uint8)
        backend.backend.functions["float_steps"](*steps, torch.bfloat16)
        for i, (kind, dtype) in enumerate(zip((AFFINE, UNSIGNED, FULL), DTYPES, strict=True)):
            on_grid(Grid(4, kind), dtype, n)
            learned(empty(n, n, n, (n + 1) // 2, dtype=dtype), 1, NAMES[i])
        weights = [empty(8 * n, 250 * n, dtype=dtype) for dtype in DTYPES]
        weights.append(empty(9 * n, 1000 * n))
        backend.fake_quantize_many(weights, [127, 7, 7, 127], [0] * 4)
    for i, name in enumerate(NAMES):
        learned(empty(512, 16000, dtype=DTYPES[i % 3]), 0, name)
    # A size of more than 32 bits.
    backend.fake_quantize_ema(empty(2**31 + 1), range_, None, 7, None, 0.01)


if __name__ == "__main__":
    compile_for(int(sys.argv[1]), Path(sys.argv[2]))
