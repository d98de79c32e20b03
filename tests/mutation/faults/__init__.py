"""Faults to put into the code, for mutate.py. The tests must detect every one."""

from __future__ import annotations

from pathlib import Path

from . import (
    acceleration_bench,
    acceleration_infer,
    acceleration_loss,
    acceleration_report,
    acceleration_train,
    backbones,
    checkpoints,
    convolutions,
    decoder,
    deploy_check,
    deploy_data,
    deploy_export,
    deploy_quant,
    deploy_segment,
    deploy_trace,
    deploy_video,
    fusion,
    hub,
    package,
    training,
    triton,
    upsampling,
)
from .guards import GUARDS, Fault, Guard

__all__ = ["FAULTS", "GUARDS", "Fault", "Guard", "check_texts"]

ROOT = Path(__file__).resolve().parents[3]

FAULTS: dict[str, list[Fault]] = {}
for area in (
    acceleration_loss,
    acceleration_infer,
    acceleration_train,
    upsampling,
    convolutions,
    decoder,
    deploy_segment,
    deploy_trace,
    deploy_data,
    deploy_check,
    deploy_quant,
    deploy_export,
    deploy_video,
    triton,
    package,
    fusion,
    backbones,
    checkpoints,
    hub,
    training,
    acceleration_bench,
    acceleration_report,
):
    for path, faults in area.FAULTS.items():
        FAULTS[path] = FAULTS.get(path, []) + faults


def check_texts() -> None:
    """Raises AssertionError unless every fault can be put into its file in one way."""
    for path, faults in FAULTS.items():
        text = (ROOT / path).read_text()
        for fault in faults:
            count = text.count(fault.sound)
            assert count == 1, f"{fault.name}: {fault.sound!r} is {count} times in {path}, not once"
            assert fault.sound != fault.faulty, fault.name
