"""Write docs/supported.md, the table of models, backbones and checkpoints that tests compare.

    python docs/supported.py            writes the page
    python docs/supported.py --check    fails if the page is not up to date

A row comes from the tests that are marked ``parity``, which are collected and not run:

* ``model``, ``backbone`` and ``weights`` are parameters of the test. One that is the same in all
  cases may be a keyword of the marker instead: ``@pytest.mark.parity(model="DeepLabV3")``.
  ``weights`` is the name of the project that the weights and the expected results are of.
* What is compared are the marker's arguments, as in ``@pytest.mark.parity("labels")``. Without
  arguments it is "one training step" if the name of the test has the word training or gradients,
  else "outputs".
* Tests that are marked ``skip`` or ``xfail`` prove nothing and are left out. ``skipif`` and a skip
  inside a test or fixture count, because they depend on the machine.

The page does not depend on what is installed, so other packages must not be needed to collect these
tests: call ``pytest.importorskip`` in a test or a fixture, not at the top of the file.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).with_suffix(".md")
HEAD = """\
# Supported models and checkpoints

<!-- made by docs/supported.py -->
For each row, a test loads the same weights into the other project's model and into ours, and
checks that both give the same results for the same images, up to rounding. A model with random
weights is compared with the same network in plain PyTorch. Other combinations of a model and a
backbone can be built and trained too, but no test compares them with another project.
[Limits](limits.md) lists what is not supported.

"""
COLUMNS = ("model", "weights", "backbones", "compared")
# Order in the column "compared". Other entries follow.
ORDER = ("outputs", "one training step")


class Collector:
    """Plugin of pytest that keeps the parity tests and what could not be collected."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []
        self.problems: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
            self.problems.append(f"{report.nodeid}: not collected: {reason}")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = list(session.items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it would")
    check = parser.parse_args().check
    text = page(rows(collect(ROOT / "tests")))
    if not check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        sys.exit("docs/supported.md is not up to date: run python docs/supported.py")


def collect(folder: Path) -> list[pytest.Item]:
    """The tests in a folder that are marked ``parity``, of any speed."""
    files = [path for path in sorted(folder.rglob("test_*.py")) if ".parity" in path.read_text()]
    collector = Collector()
    arguments = ["--collect-only", "-m", "parity", "-n", "0", "-p", "no:cacheprovider", "-qq"]
    arguments += ["--disable-warnings", "--rootdir", str(folder.parent)]
    arguments += ["--config-file", str(ROOT / "pyproject.toml")]
    status = pytest.main([*arguments, *map(str, files)], [collector])
    if collector.problems or status != pytest.ExitCode.OK:
        sys.exit("\n".join(collector.problems) or f"pytest: {status!r}")
    return collector.items


def rows(items: list[pytest.Item]) -> dict[tuple[str, str, str], set[str]]:
    """The compared results of each (model, weights, backbone)."""
    table: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for item in items:
        if any(item.iter_markers("skip")) or any(item.iter_markers("xfail")):
            continue
        marker = item.get_closest_marker("parity")
        values = marker.kwargs | (item.callspec.params if hasattr(item, "callspec") else {})
        missing = {"model", "weights", "backbone"} - values.keys()
        if missing:
            sys.exit(f"{item.nodeid}: expected the parameters {', '.join(sorted(missing))}")
        table[values["model"], values["weights"], values["backbone"]].update(compared(item, marker))
    return table


def compared(item: pytest.Item, marker: pytest.Mark) -> tuple[str, ...]:
    if marker.args:
        return marker.args
    name = item.originalname
    return ("one training step",) if "training" in name or "gradients" in name else ("outputs",)


def page(table: dict[tuple[str, str, str], set[str]]) -> str:
    """The page. Backbones of a model and project with which the same is compared share a row."""
    groups = defaultdict(list)
    for (model, weights, backbone), what in table.items():
        key = [*(name for name in ORDER if name in what), *sorted(what.difference(ORDER))]
        groups[model, weights, ", ".join(key)].append(backbone)
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for (model, weights, what), backbones in sorted(groups.items(), key=order):
        names = ", ".join(f"`{name}`" for name in sorted(backbones, key=natural))
        lines.append(f"| `{model}` | {weights} | {names} | {what} |")
    return HEAD + "\n".join(lines) + "\n"


def order(group: tuple[tuple[str, str, str], list[str]]) -> tuple:
    """Models in order, projects by name with random weights last, the most compared first."""
    (model, weights, what), _ = group
    return model, weights == "random", weights.lower(), -len(what), what


def natural(name: str) -> list:
    """A key that sorts resnet50 before resnet101, and our own backbones before timm's."""
    words = name.replace("/", " / ")
    digits = "".join(c if c.isdigit() else " " for c in words).split()
    letters = "".join(" " if c.isdigit() else c for c in words).split()
    return ["/" in name, letters, [int(number) for number in digits]]


if __name__ == "__main__":
    main()
