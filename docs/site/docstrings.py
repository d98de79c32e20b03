"""A griffe extension: this project's docstrings as the Markdown that mkdocstrings expects.

``:func:`name` `` becomes a link to the entry of ``name``, if it has one, and the lines with ``>>>``
at the end of a docstring become its section "Examples".
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|attr|data|mod):`~?([\w.]+)`")
EXAMPLE = re.compile(r"^(>>> .*)\Z", re.MULTILINE | re.DOTALL)


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        text = ROLE.sub(lambda role: link(obj, role[1]), obj.docstring.value)
        obj.docstring.value = EXAMPLE.sub(
            lambda example: "Examples:\n    " + example[1].replace("\n", "\n    "), text
        )


def link(obj: griffe.Object, name: str) -> str:
    owner = obj if obj.is_class else obj.parent
    path = name if name.startswith("deeplab_fast.") or owner is None else f"{owner.path}.{name}"
    title = name.removeprefix("deeplab_fast.")
    return f'<autoref optional identifier="{path}"><code>{title}</code></autoref>'
