"""Include graph of csrc: every arrow points down."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"

# The rooms that the files of each room may include, besides the room itself. api.h, which declares
# the launchers, is a room of its own.
ROOMS = {
    "common": set(),
    "schedule": {"common"},
    "api.h": set(),
    "cpu": {"api.h", "common", "schedule"},
    "cuda/common": {"api.h", "common", "schedule"},
    "cuda/conv": {"api.h", "common", "schedule", "cuda/common"},
    "cuda/depthwise": {"api.h", "common", "schedule", "cuda/common"},
    "cuda/aspp": {"api.h", "common", "schedule", "cuda/common"},
    "cuda/upsample": {"api.h", "common", "schedule", "cuda/common"},
    "bindings": {"api.h", "schedule"},
    "emulator": {"api.h", "common", "bindings"},
}
# One function per instruction: the emulator's meaning of it takes the place of inline PTX.
EMULATED = {
    "cuda/common/ptx.cuh": ["emulator/ptx.h"],
    "cuda/common/ptx_sm90.cuh": ["emulator/ptx_sm90.h"],
}
FILES = {
    path.relative_to(CSRC).as_posix(): path.read_text()
    for path in CSRC.rglob("*")
    if path.suffix in (".h", ".cuh", ".cpp", ".cu")
}


def room(file: str) -> str:
    (name,) = (name for name in ROOMS if file == name or file.startswith(f"{name}/"))
    return name


def includes(file: str) -> list[str]:
    """Files of csrc that ``file`` includes with quotes, found as the compiler finds them."""
    found = []
    for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', FILES[file], re.M):
        beside = (CSRC / file).parent / name
        path = beside.relative_to(CSRC).as_posix() if beside.exists() else name
        assert path in FILES, f"{file} includes {name}, which is not in csrc"
        found.append(path)
    return found


@pytest.mark.parametrize("file", FILES)
def test_includes_point_down(file):
    allowed = ROOMS[room(file)] | {room(file)}
    others = [name for name in includes(file) if room(name) not in allowed]
    assert others == EMULATED.get(file, [])


def test_headers_have_an_include_guard():
    headers = {name: text for name, text in FILES.items() if name.endswith(("h", "cuh"))}
    assert [name for name, text in headers.items() if text.count("#pragma once") != 1] == []


def test_every_header_is_included():
    """CUDA's headers, which the emulator stands in for, are included with angle brackets."""
    included = {name for file in FILES for name in includes(file)}
    included |= {
        f"emulator/{name}"
        for text in FILES.values()
        for name in re.findall(r"#include <(.+)>", text)
    }
    assert {name for name in FILES if name.endswith(("h", "cuh"))} - included == set()
