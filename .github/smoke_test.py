"""Smoke test of an installed wheel: the compiled CPU kernels agree with plain PyTorch."""

import os

# isort: off
import deeplab_fast  # before torch, as a user may import it
import torch
# isort: on


def results(backend: str, logits: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
    """Labels, loss and gradient of the logits, computed by one backend."""
    logits = logits.clone().requires_grad_()
    with deeplab_fast.backend(backend):
        labels = deeplab_fast.upsample_argmax(logits.detach(), size=target.shape[1:])
        loss = deeplab_fast.upsample_cross_entropy(logits, target, reduction="sum")
        loss.backward()
    assert logits.grad is not None
    return [labels, loss.detach(), logits.grad]


print("deeplab_fast", deeplab_fast.__version__, deeplab_fast.available_backends())
torch.manual_seed(0)
logits, target = torch.randn(2, 21, 33, 33), torch.randint(21, (2, 129, 129))
expected = results("reference", logits, target)
threads = len(os.listdir("/proc/self/task"))
for actual, reference in zip(results("cpu", logits, target), expected):
    torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-4)

# A second OpenMP runtime would start threads of its own, which compete with those of torch.
assert len(os.listdir("/proc/self/task")) == threads, "the kernels do not share torch's threads"
