"""Names of modules."""

import sys
from pathlib import Path

import experiments
import noisyq_fast

PACKAGES = {"matplotlib", "numpy", "polars", "ray", "scipy", "sklearn", "tensorboard", "torch"}
PACKAGES |= {"torchmetrics", "torchvision", "tqdm", "triton", "tyro"}
OF_TORCH = {"distributed", "optim"}  # as in `from torch import distributed`


def test_no_module_is_named_like_one_that_people_import():
    taken = PACKAGES | OF_TORCH | sys.stdlib_module_names
    for package in (experiments, noisyq_fast):
        folder = Path(package.__file__).parent
        names = {path: path.stem for path in folder.rglob("*.py") if path.stem[:2] != "__"}
        names |= {path.parent: path.parent.name for path in folder.rglob("*/__init__.py")}
        assert not [str(path) for path, name in names.items() if name in taken]
