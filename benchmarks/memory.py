"""What a training step keeps in memory: bytes that are saved for the backward, and the peak."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from training_step import ACTION_UNITS, CLASSIFICATION, FORMS, Work, in_format, step_of

from experiments.training.allocator import keep_freed_memory

HERE = Path(__file__).parent
WORKS = [CLASSIFICATION, ACTION_UNITS]
STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def saved_for_backward(work: Work, form: str) -> int:
    """Bytes of what autograd saves in a forward, each storage once, without parameters."""
    model = FORMS[form](work.network().to(memory_format=torch.channels_last), work.example())
    images, *targets = work.batch(work.size)
    storages = {}  # holds them, so that no address is used twice

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = work.loss(model.train()(in_format(images)), *targets)
    del loss
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in storages.values())


def peak_of(work: Work, form: str) -> int:
    """Bytes that training steps need at most beyond model, optimizer and inputs; in a process of
    its own, which runs this file."""
    command = [sys.executable, __file__, work.title, form]
    paths = os.pathsep.join([*map(str, (HERE.parent, HERE)), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    return int(result.stdout.split()[-1])


def measured_peak(work: Work, form: str) -> int:
    model = FORMS[form](work.network(), work.example())
    step_of(replace(work, size=2), model)()  # loads libraries, compiles kernels
    step = step_of(work, model)
    RESET.write_text("5")  # the peak so far
    before = kibibytes("VmRSS")
    for _ in range(3):
        step()
    return 1024 * (kibibytes("VmHWM") - before)


def kibibytes(name: str) -> int:
    return int(re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)[1])


def main() -> None:
    title, form = sys.argv[1:]
    keep_freed_memory()
    torch.manual_seed(0)
    print(measured_peak(next(work for work in WORKS if work.title == title), form))


if __name__ == "__main__":
    main()
