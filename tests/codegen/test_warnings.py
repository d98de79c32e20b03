"""Warnings of the CUDA compiler about the kernels for compute capability 9.0."""

from __future__ import annotations

import subprocess

import pytest

from ..support.toolchain import NVCC, ROOT


@pytest.mark.slow
@pytest.mark.skipif(not NVCC, reason="needs nvcc")
@pytest.mark.parametrize("kernel", ["dilated_conv2d_sm90", "dilated_conv2d_wgrad_sm90"])
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_compiles_without_warnings(tmp_path, architecture, kernel):
    """ptxas could warn that setmaxnreg is ignored (C7508) or wgmma serialised (C7510)."""
    source = ROOT / "csrc" / "cuda" / "conv" / f"{kernel}.cu"
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    options = ["-std=c++17", "-cubin", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra"]
    options += ["--fmad=false", f"-I{ROOT}/csrc"]
    command = [NVCC, *options, target, source, "-o", tmp_path / "cubin"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout + done.stderr == "", done.stderr
