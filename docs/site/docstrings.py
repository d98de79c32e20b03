"""A griffe extension: this project's names and docstrings as mkdocstrings expects them."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|attr|data|mod):`~?([\w.]+)`")
EXAMPLE = re.compile(r"^(>>> .*)\Z", re.MULTILINE | re.DOTALL)


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.is_module:
            obj.docstring = None  # the pages have their own introductions
        elif obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, obj)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Point ``deeplab_fast.aspp`` at the function, not at the module ``ops.aspp``."""
        for name in map(str, pkg.exports or ()):
            if pkg[name].is_module:
                pkg.set_member(name, griffe.Alias(name, pkg[name][name], parent=pkg))


def as_markdown(docstring: str, owner: griffe.Object) -> str:
    """Roles as links, if the name has an entry, and final ``>>>`` lines as section "Examples"."""
    scope = owner if owner.is_class else owner.parent

    def link(role: re.Match[str]) -> str:
        name = role[1]
        path = name if scope is None or name.startswith("deeplab_fast.") else f"{scope.path}.{name}"
        title = name.removeprefix("deeplab_fast.")
        return f'<autoref optional identifier="{path}"><code>{title}</code></autoref>'

    def section(example: re.Match[str]) -> str:
        return "Examples:\n    " + example[1].replace("\n", "\n    ")

    return EXAMPLE.sub(section, ROLE.sub(link, docstring))
