"""Access to the compiled module ``_C``: only this package imports it and prepares calls into it."""

from pathlib import Path

# torch is imported before _C, which then uses torch's OpenMP runtime. The threads of two runtimes
# would compete for the cores.
import torch  # noqa: F401

try:
    from .. import _C
except ImportError as error:
    raise ImportError(
        f"{Path(__file__).parents[1]} has no compiled kernels for this Python ({error}). If it is "
        "a checkout, start Python in another folder to get the installed package, or install the "
        "checkout itself: pip install --editable ."
    ) from error

__all__ = ["_C"]
