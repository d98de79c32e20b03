"""MkDocs hooks that publish a few files from outside docs/, at their path in the repository.

A page links to them as on GitHub, relative to its own file: ``../benchmarks/README.md``. On the
site docs/ is the root, so such a link loses one ``../``, and a link from the outside into ``docs/``
loses that folder.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PUBLISHED = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/NOTES.md",
    "benchmarks/README.md",
    "benchmarks/results/README.md",
    "benchmarks/results/*/*.csv",
    "benchmarks/results/*/*/*.csv",
    "benchmarks/results/*/*/*.png",
)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in PUBLISHED:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            if "/local/" not in uri:
                files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = Path(page.file.abs_src_path).relative_to(ROOT).parent.as_posix()
    here = posixpath.dirname(page.file.src_uri)

    def on_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(source, link[1])).removeprefix("docs/")
        return posixpath.relpath(target, here or ".")

    return LINK.sub(on_site, markdown)
