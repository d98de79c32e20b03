"""Whether torch.export traces the code that is running."""

from __future__ import annotations

import torch


def _is_exporting_before_2_7() -> bool:
    # Only a trace of torch.export that is not strict is recognised: TorchDynamo traces strict ones
    # and torch.compile alike.
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


is_exporting = getattr(torch.compiler, "is_exporting", _is_exporting_before_2_7)
