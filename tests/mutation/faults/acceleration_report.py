"""Faults in the report on accelerated models."""

from __future__ import annotations

from .guards import Fault

FAULTS: dict[str, list[Fault]] = {
    "deeplab_fast/acceleration/accelerating.py": [
        Fault(
            "the accelerated model is counted with global hooks",
            ", before.shape[0], by_layer=False)",
            ", before.shape[0])",
        ),
        Fault(
            "the channels of the images are always those of the first convolution",
            "channels = channels or channels_of_images(model)",
            "channels = channels_of_images(model)",
        ),
    ],
    "deeplab_fast/acceleration/counting.py": [
        Fault(
            "the hooks of the model run",
            "        module._forward_pre_hooks.clear()\n",
            "",
        ),
        Fault(
            "the model is counted in training mode",
            "copy.deepcopy(model, memo).eval()",
            "copy.deepcopy(model.eval(), memo)",
        ),
        Fault(
            "products with padding of dense convolutions are reported",
            "        if max(self.dilation) == 1:\n            return 0\n",
            "",
        ),
        Fault(
            "the padding of the library's convolutions is skipped",
            "                if on_padding := convolution.flops_on_padding():\n"
            "                    self.cost.padding[layer] += on_padding\n"
            "        if op",
            "                if on_padding := convolution.flops_on_padding():\n"
            "                    self.cost.padding[layer] += on_padding\n"
            "                    self.cost.skipped[layer] += on_padding\n"
            "        if op",
        ),
        Fault(
            "the pooled branch is projected at each pixel",
            "yield _same_convolution(pixel, call.project_weight[:, -pooled:], (1, 1))",
            "yield _same_convolution(call.input, call.project_weight[:, -pooled:], (1, 1))",
        ),
        Fault(
            "deterministic algorithms stay off",
            "torch.use_deterministic_algorithms(is_enabled, warn_only=warn_only)",
            "pass",
        ),
        Fault(
            "interpolation is counted as the operations of a GPU",
            "    torch.use_deterministic_algorithms(False)\n",
            "",
        ),
        Fault(
            "reads are not counted",
            "tree_leaves((args, kwargs, output))",
            "tree_leaves(output)",
        ),
    ],
    "deeplab_fast/acceleration/flops.py": [
        Fault(
            "the last outputs of a convolution are forgotten",
            "last = size + 2 * padding - (kernel - 1) * dilation",
            "last = size",
        ),
    ],
    "deeplab_fast/acceleration/report.py": [
        Fault(
            "a layer belongs to parts whose name begins like its own",
            'not module or f"{layer}.".startswith(f"{module}.")',
            "not module or layer.startswith(module)",
        ),
        Fault(
            "a layer counts for the outermost part",
            "sums[max(owners,",
            "sums[min(owners,",
        ),
        Fault(
            "the final resize contains all layers",
            'if self.kind == "final resize":',
            "if False:",
        ),
    ],
    "deeplab_fast/cli/accelerate_report.py": [
        Fault(
            "an import within the module is taken for the module",
            ' and f"{name}.".startswith(f"{missing.name}.")',
            "",
        ),
        Fault(
            "a module that exits ends the command",
            "except (Exception, SystemExit) as error:",
            "except Exception as error:",
        ),
        Fault(
            "the folder of a file is not on the path",
            "    sys.path.insert(1, str(path.resolve().parent))\n",
            "",
        ),
        Fault("the path stays changed", "        sys.path[:] = before\n", "        pass\n"),
    ],
}
