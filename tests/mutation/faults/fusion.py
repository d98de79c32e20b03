"""Faults: fusion of convolutions with what follows them."""

from __future__ import annotations

from .guards import COMPILED, Fault, Guard

NETWORKS = Guard("test_fusion.py transformers or timm")

FAULTS: dict[str, list[Fault]] = {
    "deeplab_fast/models/fusion/calls.py": [
        Fault(
            "results with two readers are fused", "if len(node.users) != 1:", "if not node.users:"
        ),
    ],
    "deeplab_fast/models/fusion/layers.py": [
        Fault("residual copied", "if not overwrite:", "if True:", COMPILED),
        Fault(
            "fused layers ignore autocast",
            "input, weight, bias = autocast(input, weight, bias)",
            "pass",
        ),
        Fault(
            "sums do not broadcast", "if not self._is_output_like(residual, input):", "if False:"
        ),
        Fault(
            "statistics are rounded before",
            "(norm.running_var.double() + norm.eps).sqrt()",
            "(norm.running_var + norm.eps).sqrt()",
        ),
        Fault("padding is ignored", 'if conv.padding_mode != "zeros" or ', "if "),
    ],
    "deeplab_fast/models/fusion/rewriting.py": [
        Fault(
            "uneven padding becomes even",
            "if (left, top) == (right, bottom):",
            "if True:",
        ),
        Fault(
            "padding of a changed tensor is moved",
            "is_view(other) for other in between(pad, node)",
            "True for other in between(pad, node)",
        ),
        Fault("all outputs are main", 'if not self.drop_outputs(("out",)):', "if True:"),
        Fault(
            "a residual that is read later is overwritten",
            "(user in earlier and self.is_pure(user))",
            "self.is_pure(user)",
        ),
        Fault(
            "a residual that has a view is overwritten",
            "(user in earlier and self.is_pure(user))",
            "user in earlier",
        ),
        Fault(
            "an input or a view is overwritten",
            "return self.is_pure(value) and all(",
            "return all(",
        ),
        Fault(
            "the input of the convolution is overwritten",
            "if input is not residual and self.is_free(",
            "if self.is_free(",
        ),
        Fault(
            "a change between convolution and sum is not seen",
            "is_view(other) for other in between(conv, node)",
            "True for other in between(conv, node)",
        ),
        Fault(
            "a sum in place changes no other value",
            "not (changes_residual and not self.is_free(residual, node))",
            "True",
        ),
        Fault(
            "calls without a result are dropped",
            "if not node.users and (self.is_pure(node) or is_view(node)):",
            'if not node.users and node.op not in ("placeholder", "output"):',
        ),
        Fault("weights that are read are folded", " and str(node.target) not in self.read", ""),
        Fault("unused outputs are computed", "if outputs is not None:", "if False:"),
        Fault(
            "parts of a concatenation in another order",
            "start = sum(sizes[:i])",
            "start = sum(sizes[i + 1 :])",
        ),
    ],
    "deeplab_fast/models/fusion/module.py": [
        Fault(
            "names are identifiers", "{_module(owner)}, {name!r})", "{_module(owner)}, '{name}_')"
        ),
        Fault(
            "a module with quotes in its name",
            "._modules[{name!r}]",
            "._modules['{name}']",
        ),
        Fault("an argument hides slice", 'f"{text(slice)}(', 'f"slice('),
        Fault(
            "a fused module runs the train of the original",
            "        return self\n\n    def extra_repr",
            "        return super().train(mode)\n\n    def extra_repr",
        ),
    ],
    "deeplab_fast/models/fusion/tracing.py": [
        Fault("autocast is lost", "if _autocast() != self.autocast:", "if False:"),
        Fault("x += y is x + y", 'for _name in ("iadd", ', "for _name in ("),
        Fault(
            "values are no tensors",
            'raise TraceError("the code depends on the type of a value")',
            "return type(value)",
        ),
        Fault(
            "tensors that are no buffers are lost",
            "if isinstance(value, Tensor) and not any(",
            "if False and not any(",
        ),
        Fault(
            "what hooks do is lost",
            "if any(map(is_hooked, module.modules())) or any(",
            "if any(",
        ),
        Fault("stored values are lost", "if _restore(states):", "if _restore(states) and False:"),
        Fault(
            "changes of lists and buffers are lost",
            "return [(container, copy.copy(container)) for container in changeable]",
            "return [(container, copy.copy(container)) for container in attributes]",
        ),
        Fault(
            "changes of nested lists are lost",
            "                collect(item)",
            "                pass",
        ),
        Fault(
            "type() of a value is not seen",
            'raise TraceError("the code depends on type()")',
            "pass",
        ),
        Fault(
            "even kernels are padded as odd ones",
            "if stride == (1, 1) and all(k % 2 for k in kernel):",
            "if all(k % 2 for k in kernel):",
            NETWORKS,
        ),
        Fault("changed lists stay", "container.extend(before)", "pass"),
        Fault("values have any attribute", "if not hasattr(Tensor, name):", "if False:"),
    ],
}
