"""The README and the documentation site: links, code, figures and the list of public names."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

import deeplab_fast

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
GUIDES = sorted(path.stem for path in ROOT.glob("docs/guides/*.md"))
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
BLOCK = re.compile(r"^```(?:py|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{index}")
    for page in PAGES
    for index, block in enumerate(BLOCK.findall(page.read_text()))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_of_the_repository(page):
    broken = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert broken == []


@pytest.mark.parametrize("block", BLOCKS)
def test_code_uses_names_that_exist(block):
    modules = set()
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("deeplab_fast."):
            module = importlib.import_module(node.module)
            assert [item.name for item in node.names if not hasattr(module, item.name)] == []
        elif isinstance(node, ast.Import):
            modules |= {item.name for item in node.names if item.name.startswith("deeplab_fast")}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
            assert hasattr(importlib.import_module(ast.unparse(node.value)), node.attr)


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if "import segmentation_models_pytorch" in block.values[0]]
)
@pytest.mark.usefixtures("one_thread")
def test_code_with_models_of_another_project_runs(block):
    pytest.importorskip("segmentation_models_pytorch", reason="the code uses it")
    exec(compile(block, "block", "exec"), {})


def test_guides_are_listed():
    """The README, the table of contents and .ci/run name every guide."""
    (executed,) = re.findall(r"docs/guides/{([\w,-]+)}\.md", (ROOT / ".ci/run").read_text())
    assert sorted(executed.split(",")) == GUIDES
    for page, folder in (("README.md", "docs/guides"), ("mkdocs.yml", "guides")):
        text = (ROOT / page).read_text()
        assert [name for name in GUIDES if f"{folder}/{name}.md" not in text] == []


def test_reference_lists_every_public_name():
    pages = "".join(path.read_text() for path in ROOT.glob("docs/reference/*.md"))
    entries = set(
        re.findall(r"[\w]+", "\n".join(re.findall(r"members:.*?(?=\n\n|\Z)", pages, re.S)))
    )
    assert set(deeplab_fast.__all__) <= entries


def test_figure_of_tiles_shows_the_tiles_of_the_kernels():
    spec = importlib.util.spec_from_file_location("tiles", ROOT / "docs/figures/tiles.py")
    tiles = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiles)
    assert tiles.FIGURE.read_text() == tiles.draw()
