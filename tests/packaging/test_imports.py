"""Import graph of the package: every arrow points down."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "deeplab_fast"

# The lowest room first. A room imports from itself and from rooms before it.
TOWER = (
    "_C",
    "_io",
    "_native",
    "backends",
    "ops",
    "nn",
    "models",
    "acceleration",
    "export",
    "training",
    "cli",
)
# The same within backends. Kernels of one backend do not use another's, except the reference's.
BACKENDS = (
    {"arguments", "dispatch_table"},
    {"race"},
    {"registry"},
    {"reference"},
    {"cpu", "cuda", "triton"},
    {"calls"},
    {"explanation", "tuning"},
)
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(name: str, path: Path) -> Iterator[str]:
    """Modules and names of the package that a file imports, also within functions."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (found for found in names if found.startswith("deeplab_fast."))


def rooms(name: str, path: Path) -> Iterator[tuple[str, str]]:
    """The imported names and their rooms; "" is the package itself, with the public names."""
    for found in imported(name, path):
        room = found.split(".")[1]
        yield found, room if room in TOWER else ""


@pytest.mark.parametrize("name", [name for name in MODULES if name.count(".") > 0])
def test_imports_point_down(name):
    room = name.split(".")[1]
    if room == "__main__":
        return
    below = TOWER[: TOWER.index(room) + 1]
    # The command line prints the version of the package that it is part of.
    allowed = (*below, "") if room == "cli" else below
    assert [found for found, other in rooms(name, MODULES[name]) if other not in allowed] == []


def level(name: str) -> int | None:
    """The index in BACKENDS of a module of deeplab_fast.backends."""
    part = name.removeprefix("deeplab_fast.backends.").split(".")[0]
    return next((i for i, names in enumerate(BACKENDS) if part in names), None)


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("deeplab_fast.backends.")])
def test_imports_within_backends_point_down(name):
    own = name.split(".")[2]
    for found in imported(name, MODULES[name]):
        if found.startswith("deeplab_fast.backends.") and found.split(".")[2] != own:
            assert level(found) < level(name), found


def test_only_native_imports_the_compiled_module():
    importers = {
        name for name, path in MODULES.items() if "deeplab_fast._C" in imported(name, path)
    }
    assert importers == {"deeplab_fast._native"}
