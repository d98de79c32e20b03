"""The checkout, and the compilers that tests of its sources call."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CXX = os.environ.get("CXX", "c++")
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
