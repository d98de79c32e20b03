"""The README and the documentation site: links, figures and the list of public names."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import deeplab_fast

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_of_the_repository(page):
    broken = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert broken == []


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
