"""Faults in the training form of accelerate()."""

from __future__ import annotations

from .guards import Fault

FAULTS: dict[str, list[Fault]] = {
    "deeplab_fast/nn/pyramid.py": [
        Fault("memory formats inside vmap", "if active():", "if False:"),
        Fault("pooled branch always first", "start = sum(x.size(1) for x in before)", "start = 0"),
        Fault("bias of the projection dropped", "pool_weight, conv.bias)\n", "pool_weight)\n"),
        Fault("3x3 projection as in the middle", "min(H, 3), min(W, 3)", "1, 1"),
        Fault(
            "shared norms counted once",
            "    is_shared = any(norm is other for norm, other in combinations(norms, 2))\n",
            "    is_shared = False\n",
        ),
        Fault("branches that are not counted", "norm.num_batches_tracked.add_(1)", "pass"),
        Fault(
            "branches with bias",
            "(conv.bias, conv.groups, conv.dilation) == (None, 1,",
            "(None, conv.groups, conv.dilation) == (None, 1,",
        ),
    ],
    "deeplab_fast/acceleration/matching.py": [
        Fault(
            "a pooled branch of several pixels",
            "module.output_size in (1, (1, 1))",
            "module.output_size is not None",
        ),
        Fault(
            "changes of the input overlooked",
            "if any(map(self.works_in_place, users)) else",
            "if False else",
        ),
        Fault(
            "sizes of branches overlooked", "if any(not _readers", "if False and any(not _readers"
        ),
        Fault("branches used twice", "or len({*values}) < len(values)", ""),
        Fault("ReLU forgotten", "norms, branches[0].relu", "norms, False"),
        Fault(
            "two branches that are not atrous",
            "return longest if is_atrous else []",
            "return longest",
        ),
    ],
    "deeplab_fast/acceleration/rewritten.py": [
        Fault("hooks overlooked", "is_hooked(module) for module", "False for module"),
        Fault("settings overlooked", "_is_same(getattr(module, name, None), value)", "True"),
        Fault("replaced modules overlooked", "original_class(module) is self.kind", "True"),
        Fault("added modules overlooked", "list(module._modules) == self.children", "True"),
        Fault("replaced convolutions", "original_class(module) is", "type(module) is"),
        Fault("one graph for both modes", "self._runs[root.training]", "self._runs[True]"),
        Fault("modes of submodules overlooked", "if self.depends_on_mode and", "if False and"),
    ],
    "deeplab_fast/acceleration/module.py": [
        Fault("attributes left behind", "vars(module).pop(name, None)", "pass"),
    ],
    "deeplab_fast/acceleration/training.py": [
        Fault("branches replaced one by one, too", " and module not in joint]", "]"),
        Fault("not restored first", "    restore_parts(model)\n    names", "    names"),
    ],
    "deeplab_fast/acceleration/convolutions.py": [
        Fault(
            "subclasses of nn.Conv2d",
            "type(conv) is not nn.Conv2d",
            "not isinstance(conv, nn.Conv2d)",
        ),
    ],
}
