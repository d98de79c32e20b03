"""Basic blocks and paths of SASS, the machine code that cuobjdump prints."""

from __future__ import annotations

import re
from typing import NamedTuple


class Block(NamedTuple):
    """Instructions that run one after another, and the addresses of possible next blocks."""

    instructions: list[str]
    successors: list[int]

    def has(self, pattern: str) -> bool:
        return any(re.search(pattern, instruction) for instruction in self.instructions)


def basic_blocks(code: str) -> dict[int, Block]:
    """Basic blocks of a function, keyed by address in ascending order."""
    listed = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", code, re.M)
    instructions = [(int(address, 16), text) for address, text in listed]
    branch = re.compile(r"\bBRA(?:\.\S+)? (?:[^;]*?)0x([0-9a-f]+)")
    starts = {int(target, 16) for _, text in instructions for target in branch.findall(text)}
    for (_, text), (after, _) in zip(instructions, instructions[1:]):
        if branch.search(text) or "EXIT" in text:
            starts.add(after)
    blocks: dict[int, Block] = {}
    current = Block([], [])
    for i, (address, text) in enumerate(instructions):
        if i == 0 or address in starts:
            current = blocks[address] = Block([], [])
        current.instructions.append(text)
        target = branch.search(text)
        if target:
            current.successors.append(int(target[1], 16))
        after = instructions[i + 1][0] if i + 1 < len(instructions) else None
        is_end = after is None or after in starts
        goes_on = text.startswith("@") or not re.match(r"(BRA(?!\.)|EXIT)\b", text)
        if is_end and goes_on and after is not None:
            current.successors.append(after)
    return blocks


def longest_path(blocks: dict[int, Block], start: int, avoids: str) -> list[str]:
    """Instructions of the longest forward path from ``start``, up to an exit or a backward branch.

    The path contains no block that matches ``avoids``.
    """
    longest: dict[int, list[str]] = {}
    for address in reversed([a for a in blocks if a >= start]):
        block = blocks[address]
        ahead = [s for s in block.successors if s > address and s in blocks]
        ways = [longest[s] for s in ahead if s in longest]
        if not block.has(avoids) and (ways or not ahead):
            longest[address] = block.instructions + max(ways, key=len, default=[])
    return longest[start]
