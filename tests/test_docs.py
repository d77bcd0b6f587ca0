"""Examples in docstrings and in the README run and print what they say."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import noisyq_fast

MODULES = [
    module.name
    for module in pkgutil.walk_packages(noisyq_fast.__path__, "noisyq_fast.")
    if not module.name.endswith(("__main__", "_core"))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    torch.set_printoptions(profile="default")
    results = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert results.failed == 0


@pytest.mark.parametrize("name", [n for n in noisyq_fast.__all__ if n[0].islower()])
def test_public_functions_have_examples(name):
    assert ">>>" in getattr(noisyq_fast, name).__doc__


def test_readme_examples():
    readme = Path(__file__).parents[1] / "README.md"
    examples = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert len(examples) >= 2
    exec("\n".join(examples), {})
