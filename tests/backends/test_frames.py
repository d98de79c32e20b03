"""Distance from a public function to the launch of its kernel."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import deeplab_fast
from deeplab_fast._native.common import LaunchContext
from deeplab_fast.backends import registry

PACKAGE = str(Path(deeplab_fast.__file__).parent)
CPP_FRAMES = 2  # the binding, and the launcher that it calls


@pytest.fixture
def launches(monkeypatch) -> list[list[str]]:
    """The package's frames on the stack at each launch, where nothing is computed."""
    stacks: list[list[str]] = []

    def launch(*arguments: object) -> None:
        frame, names = sys._getframe(1), []
        while frame:
            if frame.f_code.co_filename.startswith(PACKAGE):
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        stacks.append(names[::-1])

    launchers = "dilated_conv2d_fwd", "depthwise_conv2d_fwd", "upsample_argmax_fwd"
    module = SimpleNamespace(**dict.fromkeys(launchers, launch))
    target = registry.Target(LaunchContext(module, 0, 8), lambda: 0, lambda: None)
    backend = registry.Backend(lambda device_type: None, lambda device: target, load=None)
    monkeypatch.setitem(registry._backends, "cuda", backend)
    return stacks


def test_at_most_seven_frames_to_the_launch_of_a_convolution(launches):
    nhwc = {"memory_format": torch.channels_last}  # other formats are converted in one more frame
    x, dense = torch.ones(1, 8, 3, 3).to(**nhwc), torch.ones(8, 8, 3, 3).to(**nhwc)
    depthwise = torch.ones(8, 1, 3, 3)
    with deeplab_fast.backend("cuda"):
        deeplab_fast.dilated_conv2d(x.bfloat16(), dense.bfloat16())
        deeplab_fast.dilated_conv2d(x, depthwise, groups=8)
    for stack in launches:
        assert stack[0] == "dilated_conv2d"
        assert len(stack) + CPP_FRAMES <= 7, stack
    assert len(launches) == 2


def test_at_most_six_frames_to_the_launch_of_argmax(launches):
    with deeplab_fast.backend("cuda"):
        deeplab_fast.upsample_argmax(torch.ones(1, 2, 3, 3), (5, 5))
    (stack,) = launches
    assert len(stack) + CPP_FRAMES <= 6, stack
