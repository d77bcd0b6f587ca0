"""Examples in docstrings, in the README and in the guide run and print what they say; links, files
and commands that the documentation names exist."""

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import torch
import tyro

import noisyq_fast
from experiments import run, sweep

ROOT = Path(__file__).parents[1]
PAGES = [
    path
    for name in ("*.md", "docs/*.md", "*/README.md", "results/*/README.md")
    for path in ROOT.glob(name)
]
OPTIONAL = ("torchvision", "timm", "transformers")

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


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def examples(name, package=None):
    """The code of a page that needs that package, or none of the optional ones."""
    blocks = re.findall(r"```python\n(.*?)```", page(name), re.DOTALL)
    needed = [next((p for p in OPTIONAL if f"import {p}\n" in block), None) for block in blocks]
    return [block for block, need in zip(blocks, needed, strict=True) if need == package]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("README.md", 1),
        ("docs/guide.md", 8),
        ("docs/options.md", 2),
        ("docs/integer.md", 2),
        ("docs/deploy.md", 6),
    ],
)
def test_examples_of_pages(name, count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    blocks = examples(name)
    assert len(blocks) >= count
    values = {}
    exec("\n".join(blocks), values)
    if name == "docs/guide.md":
        assert min(values["float_accuracy"], values["quantized_accuracy"]) > 0.8


@pytest.mark.parametrize("package", OPTIONAL)
def test_examples_with_packages(package):
    pytest.importorskip(package, reason=f"{package} is not installed")
    blocks = examples("docs/guide.md", package)
    assert blocks
    for block in blocks:
        exec(block, {})


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text(encoding="utf-8")):
        target, _, heading = link.partition("#")
        linked = path.parent / target if target else path
        assert linked.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [h.lower().replace(" ", "-") for h in headings]


def test_files_that_are_named_exist():
    paths = re.findall(r"`([\w.-]+/[\w./-]*)`", page("CONTRIBUTING.md"))
    assert paths
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_commands_have_options_that_exist():
    text = page("README.md") + page("experiments/README.md")
    commands = re.findall(r"experiments/(run|sweep)\.py (.*)$", text, re.MULTILINE)
    commands = [c for c in commands if "`" not in c[1]]  # those in code blocks
    assert {script for script, _ in commands} == {"run", "sweep"}
    for script, options in commands:
        own, _, others = " ".join(shlex.split(options, comments=True)).partition(" -- ")
        if script == "sweep":
            tyro.cli(sweep.SweepConfig, args=own.split())
            own = others
        run.parse(own.split())
