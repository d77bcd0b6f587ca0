"""Compiles the kernels that operators would launch, for a GPU that need not be there.

For a process of its own, without the interpreter: it changes Triton for good.
"""

import json
import re
import subprocess


class Driver:
    """What Triton asks about a GPU before it compiles for it."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_instead(architecture, folder, describe):
    """From now on a launch compiles and prints a line of JSON: the kernel's name, its PTX, the
    resources it uses, and what ``describe`` tells of its arguments by name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from noisyq_fast.backends.on_triton import launch
    from noisyq_fast.backends.on_triton.tiling import TileLimits

    run = JITFunction.run

    def compile_only(kernel, *arguments, grid, warmup, **options):
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
        named = dict(zip(kernel.arg_names, arguments, strict=True))
        record = {
            "name": kernel.__name__,
            "ptx": compiled.asm["ptx"],
            **usage(compiled.asm["cubin"]),
            **describe(kernel.__name__, named),
        }
        print(json.dumps(record))

    def usage(cubin):
        path = folder / "kernel.cubin"
        path.write_bytes(cubin)
        told = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", path],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return {
            name: int(re.search(rf"{resource}:(\d+)", told)[1])
            for name, resource in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))
        }

    triton.runtime.driver.set_active(Driver(GPUTarget("cuda", architecture, 32)))
    JITFunction.run = compile_only
    launch.limits = lambda device: TileLimits(processors=132)
