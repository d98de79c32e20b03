"""Faults: Registration, dispatch, models and the callers of the kernels."""

from __future__ import annotations

from .guards import (
    BACKWARD,
    CALLS,
    CHOICE,
    CUDA_GRAPHS,
    NON_FINITE,
    PLANS,
    SM90,
    TRANSFORMS,
    TRITON_CALLS,
    Fault,
    Guard,
)

FAULTS: dict[str, list[Fault]] = {
    "csrc/bindings/call_signature.cpp": [
        Fault("shapes left out", "    write(owned(PyObject_GetAttr(tensor, shape)).ptr());\n", ""),
        Fault(
            "strides left out",
            "    write(owned(PyObject_CallMethodNoArgs(tensor, stride)).ptr());\n",
            "",
        ),
        Fault(
            "dtypes of tensors left out",
            "    write_bytes(owned(PyObject_GetAttr(tensor, dtype)).ptr());\n",
            "",
        ),
        Fault("devices left out", "if (!equal) {", "if (false) {"),
        Fault("numbers left out", "    write_bytes(number);\n", ""),
        Fault("lengths of lists left out", "      write_bytes(size);\n", ""),
        Fault(
            "lengths of strings left out",
            "    write_bytes(size);\n    signature_.append",
            "    signature_.append",
        ),
        Fault("True is False", "value == Py_True ? 'T' : 'F'", "'T'"),
        Fault(
            "numbers cut to 64 bits",
            "if (number == -1 && PyErr_Occurred()) throw",
            "PyErr_Clear(); if (false) throw",
        ),
    ],
    "deeplab_fast/_native/device_cache.py": [
        Fault(
            "keyword arguments left out of the key",
            "key = (*args, *kwargs.items())",
            "key = (*args,)",
        ),
        Fault(
            "names of keyword arguments left out of the key",
            "key = (*args, *kwargs.items())",
            "key = (*args, *kwargs.values())",
        ),
        Fault(
            "first argument left out of the key",
            "key = (*args, *kwargs.items())",
            "key = (*args[1:], *kwargs.items())",
        ),
        Fault(
            "last argument left out of the key",
            "key = (*args, *kwargs.items())",
            "key = (*args[:-1], *kwargs.items())",
        ),
        Fault(
            "the key is how many arguments there are",
            "key = (*args, *kwargs.items())",
            "key = (len(args), *kwargs.items())",
        ),
        Fault(
            "one more entry than is kept",
            "len(self._recent) >= MAX_ENTRIES",
            "len(self._recent) > MAX_ENTRIES",
        ),
        Fault(
            "dropped before the device has read it",
            "            self._wait()\n            self._recent, self._older = {}, self._recent\n",
            "            self._recent, self._older = {}, self._recent\n",
        ),
        Fault(
            "only one generation",
            "self._recent, self._older = {}, self._recent\n",
            "self._recent, self._older = {}, {}\n",
        ),
        Fault(
            "older entries are not found",
            "for generation in (self._recent, self._older, self._captured):",
            "for generation in (self._recent, self._captured):",
        ),
        Fault(
            "captured entries are not found",
            "for generation in (self._recent, self._older, self._captured):",
            "for generation in (self._recent, self._older):",
        ),
        Fault(
            "the owner does not get the entries that a capture looks up",
            "            _owner.entries.append(value)\n",
            "            pass\n",
            CUDA_GRAPHS,
        ),
        Fault(
            "entries with an owner are never dropped",
            'if capturing and hasattr(_owner, "entries"):',
            "if False:",
            CUDA_GRAPHS,
        ),
        Fault(
            "captured entries are dropped",
            "            self._captured[key] = value\n",
            "            pass\n",
        ),
        Fault(
            "a first call is captured",
            "        if is_capturing():\n            raise RuntimeError",
            "        if False:\n            raise RuntimeError",
        ),
        Fault(
            "captured only when new",
            "        if not capturing:\n            recent",
            "        if True:\n            recent",
        ),
        Fault(
            "made in the caller's thread",
            "found = thread.submit(make, *args, **kwargs).result()",
            "found = make(*args, **kwargs)",
        ),
        Fault(
            "made by several threads at once",
            "        with lock:  #",
            "        with threading.Lock():  #",
        ),
        Fault(
            "found in an older generation and not kept",
            "        self._recent[key] = value\n",
            "        if key not in self._older:\n            self._recent[key] = value\n",
        ),
        Fault(
            "GPUs given by name are not waited for",
            "(d for d in (*args, *kwargs.values()) if",
            "(d for d in args if",
        ),
    ],
    "deeplab_fast/backends/registry.py": [
        Fault(
            "an op itself is autocast",
            "and torch.is_autocast_enabled(device.type):\n        with torch.autocast",
            "and False:\n        with torch.autocast",
        ),
        Fault(
            "forced for ever after an exception",
            "_forced = self._outer.pop()",
            "self._outer.pop()",
        ),
        Fault(
            "an inner backend ends the outer",
            "_forced = self._outer.pop()",
            '_forced = ""',
        ),
        Fault(
            "the reference before the kernels of the CPU",
            '"cpu": ("cpu", "reference")',
            '"cpu": ("reference", "cpu")',
        ),
        Fault(
            "the trace has the forced backend",
            "_trace.append((op, plan.backend))",
            "_trace.append((op, backend))",
        ),
        Fault("a trace ends the outer one", "        _trace = outer", "        _trace = None"),
        Fault(
            "every reason is a warning",
            "isinstance(reason, FixableReason)",
            "reason",
        ),
        Fault(
            "cuDNN before what beat it",
            '(*buckets[bucket], "reference")',
            '("reference", *buckets[bucket])',
        ),
        Fault(
            "cuDNN before the winner of a race",
            '(*faster, "reference")',
            '("reference", *faster)',
            guard=CHOICE,
        ),
        Fault("losers of a race", 'ranking[: ranking.index("reference")]', "ranking", guard=CHOICE),
        Fault(
            "deterministic mode rests on times",
            "    if torch.are_deterministic_algorithms_enabled():\n        # Our",
            "    if False:\n        # Our",
            guard=CHOICE,
        ),
        Fault(
            "races without cudnn.benchmark",
            "if not torch.backends.cudnn.benchmark:",
            "if False:",
            guard=CHOICE,
        ),
        Fault(
            "races while a graph is captured",
            "return not (is_capturing() or torch.compiler.is_compiling())",
            "return not torch.compiler.is_compiling()",
            guard=CHOICE,
        ),
        Fault(
            "Triton always races",
            'if len(names) > 1 and "triton" in names:',
            "if False:",
            guard=CHOICE,
        ),
        Fault(
            "plans outlive what they are based on",
            "dispatch_table.changed.append(forget_plans)",
            "",
            guard=CHOICE,
        ),
        Fault(
            "measurements decide on the CPU too",
            'device_type == "cuda" and op in shape_buckets',
            "op in shape_buckets",
        ),
        Fault(
            "plans of another backend",
            "key = (op, backend, device,",
            "key = (op, device,",
            PLANS,
        ),
        Fault(
            "plans of other global settings",
            "device, *_modes(arguments[0]), _C",
            "device, _C",
            PLANS,
        ),
        Fault(
            "plans made during a capture are kept",
            "return not (is_capturing() or torch.compiler.is_compiling())",
            "return not torch.compiler.is_compiling()",
            PLANS,
        ),
        Fault(
            "no plan is kept",
            "            _plans.add(key, plan, device)\n",
            "            pass\n",
            PLANS,
        ),
        Fault("plans are never forgotten", "    _plans.clear()\n", "    pass\n", PLANS),
        Fault(
            "shapes are not checked",
            "    if check := _checks.get(op):\n",
            "    if check := None:\n",
            PLANS,
        ),
        Fault(
            "launched while another GPU is current",
            "    with guard:\n        return call(target.stream(), arguments)",
            "    return call(target.stream(), arguments)",
            PLANS,
        ),
    ],
    "deeplab_fast/backends/cpu.py": [
        Fault(
            "a branch's ReLU drops NaN",
            "torch.clamp(output, min=0, out=slice)",
            "torch.fmax(output, output.new_zeros(()), out=slice)",
        ),
        Fault(
            "ReLU of the pooled branch drops NaN",
            "F.linear(x.mean((2, 3)), pool_weight.flatten(1), pool_bias).relu_()",
            "F.linear(x.mean((2, 3)), pool_weight.flatten(1), pool_bias).nan_to_num_().relu_()",
        ),
        Fault(
            "the pooled branch behind the ReLU",
            "F.conv2d(branches, branch_weight).add_(image_bias[:, :, None, None]).relu_()",
            "F.conv2d(branches, branch_weight).relu_().add_(image_bias[:, :, None, None])",
        ),
        Fault(
            "ReLU6 as ReLU",
            'return tensor.relu_() if activation == "relu" else F.relu6(tensor, inplace=True)',
            "return tensor.relu_()",
        ),
        Fault(
            "sums of blocks lose NaN",
            "total += convolve(input, weight, None)",
            "total += convolve(input, weight, None).nan_to_num(0.0)",
        ),
    ],
    "deeplab_fast/backends/cuda/aspp.py": [
        Fault(
            "means of too many channels",
            "max(input.size(1), pool_weight.size(0)) > _MAX_POOL_CHANNELS",
            "pool_weight.size(0) > _MAX_POOL_CHANNELS",
        ),
        Fault(
            "too many pooled channels",
            "max(input.size(1), pool_weight.size(0)) > _MAX_POOL_CHANNELS",
            "input.size(1) > _MAX_POOL_CHANNELS",
        ),
        Fault("one channel fewer than fit", "> _MAX_POOL_CHANNELS:", ">= _MAX_POOL_CHANNELS:"),
        Fault(
            "rows of the projection next to each other",
            "project_weight.stride(0)\n",
            "P\n",
        ),
        Fault(
            "strided biases",
            "        pool_bias.contiguous(),\n",
            "        pool_bias,\n",
        ),
        Fault(
            "strided pooled weight",
            "        aligned_nhwc(pool_weight),\n",
            "        pool_weight,\n",
        ),
        Fault(
            "channels of the first branch",
            "sum(weight.size(0) for weight in weights)\n    if",
            "weights[0].size(0)\n    if",
        ),
        Fault(
            "projection without activation",
            '[project], [(1, 1)], "relu")',
            "[project], [(1, 1)])",
        ),
        Fault("branches without activation", 'pairs, "relu")', 'pairs, "none")'),
        Fault(
            "means where the sums are",
            "sums + means_at, sums + pooled_at",
            "sums, sums + pooled_at",
        ),
        Fault(
            "columns of the branches for the pooled channels",
            "project + pooled_columns_at",
            "project",
        ),
    ],
    "deeplab_fast/_native/memory_format.py": [
        Fault(
            "no pixels have no stride",
            "strides[-1] * max(size, 1)",
            "strides[-1] * size",
        ),
        Fault(
            "strides of the wrong side",
            "1, width * channels, channels",
            "1, height * channels, 1",
        ),
        Fault(
            "any strides are those promised",
            "if result.stride() == _strides(result.shape, _format(input)):",
            "if True:",
        ),
        Fault(
            "one channel is channels_last",
            "tensor.stride(1) == 1 and tensor.size(1) > 1",
            "tensor.stride(1) == 1",
        ),
        Fault(
            "rows of any length",
            "        and distance * weight.element_size() % 16 == 0\n",
            "",
            CALLS,
        ),
        Fault(
            "rows at any address",
            "if weight.data_ptr() % 16 == 0:",
            "if True:",
            CALLS,
        ),
        Fault(
            "rows of any kernel",
            "weight.shape[2:] == (1, 1)\n        and weight.stride(1) == 1",
            "weight.stride(1) == 1",
            CALLS,
        ),
        Fault(
            "rows of any 1x1 weight",
            "        and weight.stride(1) == 1\n",
            "",
            CALLS,
        ),
        Fault(
            "unaligned rows at another distance",
            "return torch.empty_strided(\n        weight.shape, weight.stride(), ",
            "return torch.empty(\n        weight.shape, ",
            PLANS,
        ),
        Fault(
            "rows that overlap",
            "        and distance >= weight.size(1)\n",
            "",
            PLANS,
        ),
        Fault(
            "aligned to 8 bytes",
            "tensor.data_ptr() % 16 == 0 else",
            "tensor.data_ptr() % 2 == 0 else",
            CALLS,
        ),
    ],
    "deeplab_fast/_native/common.py": [
        Fault("relu6 without its bound", '"relu6": (0.0, 6.0)', '"relu6": (0.0, math.inf)'),
        Fault(
            "relu of negatives", '"relu": (0.0, math.inf)', '"relu": (-1.0, math.inf)', NON_FINITE
        ),
        Fault(
            "finite bounds without an activation",
            '"none": (-math.inf, math.inf)',
            '"none": (-3.4e38, 3.4e38)',
            NON_FINITE,
        ),
        Fault("ReLU bounded above", '"relu": (0.0, math.inf)', '"relu": (0.0, 3.4e38)', NON_FINITE),
    ],
    "deeplab_fast/backends/cuda/depthwise_conv2d.py": [
        Fault("a dilation of zero", "if min(dilation) < 1:", "if min(dilation) < 0:", PLANS),
        Fault(
            "dilations limited by the other side",
            "min(dilation[0], H), min(dilation[1], W)",
            "min(dilation[0], W), min(dilation[1], H)",
        ),
        Fault(
            "dilations swapped",
            "min(dilation[0], H), min(dilation[1], W)",
            "min(dilation[1], H), min(dilation[0], W)",
        ),
        Fault(
            "taps not flipped for the gradient",
            "weight_rows, dilation, flipped=True)",
            "weight_rows, dilation)",
        ),
        Fault(
            "taps flipped for the output",
            "_strip_rows(context, input, weight), flipped)",
            "_strip_rows(context, input, weight), True)",
        ),
        Fault(
            "strips of a gradient by the device",
            "_shape(input, weight, dilation, _fixed_strip_rows(input)),",
            "_shape(input, weight, dilation, _strip_rows(context, input, weight)),",
        ),
        Fault(
            "strips whose last round is not counted",
            "return -(-ctas // resident_ctas) * (rows",
            "return max(ctas // resident_ctas, 1) * (rows",
        ),
        Fault(
            "strips as if every thread had 16 bytes",
            "        vector = 4\n",
            "        vector = 8\n",
        ),
        Fault(
            "one pixel too many",
            "input.numel() // input.size(1) >= _MAX_PIXELS",
            "input.numel() // input.size(1) > _MAX_PIXELS",
        ),
        Fault(
            "one tap too many",
            "weight.size(2) * weight.size(3) > _C.MAX_DEPTHWISE_TAPS",
            "weight.size(2) * weight.size(3) > _C.MAX_DEPTHWISE_TAPS + 2",
        ),
        Fault("strided bias", "None if bias is None else bias.contiguous()", "bias"),
        Fault(
            "strided weight",
            "        weight=aligned(arguments.weight, torch.contiguous_format),\n",
            "        weight=arguments.weight,\n",
        ),
        Fault(
            "scratch memory without the bias",
            "num_parts * (taps + 1) * channels",
            "num_parts * taps * channels",
        ),
        Fault(
            "one part only", "        num_parts = max(num_parts, 1)\n", "        num_parts = 1\n"
        ),
        Fault(
            "parts without a limit",
            "min(input.numel() // _ELEMENTS_PER_PART, -(-_MAX_PARTIAL_SUMS // channels))",
            "input.numel() // _ELEMENTS_PER_PART",
        ),
        Fault(
            "several outputs of a channel",
            "if weight.size(0) != input.size(1):",
            "if weight.size(0) % input.size(1):",
        ),
    ],
    "deeplab_fast/backends/cuda/dilated_conv2d.py": [
        Fault(
            "first channels of branches",
            "accumulate(channels, initial=0)",
            "accumulate((0, *channels), initial=0)",
        ),
        Fault(
            "strided biases",
            "        biases=[bias.contiguous() for bias in arguments.biases],\n",
            "        biases=arguments.biases,\n",
        ),
        Fault(
            "one pixel too many for the work list",
            "// input.size(1) >= 2**31",
            "// input.size(1) > 2**31",
        ),
        Fault(
            "pixels of one branch only",
            "len(weights) * input.numel() // input",
            "input.numel() // input",
        ),
        Fault(
            "one branch too many",
            "len(weights) > _C.MAX_CONV_BRANCHES",
            "len(weights) > _C.MAX_CONV_BRANCHES + 1",
        ),
        Fault("channels of any number", "    if channels % multiple:\n", "    if False:\n"),
        Fault(
            "taps of one row",
            "weight.size(2) * weight.size(3) > MAX_TAPS",
            "weight.size(2) > MAX_TAPS",
        ),
        Fault(
            "half the partial sums",
            "work_list.num_slots * kernel.tile**2",
            "work_list.num_slots * kernel.tile**2 // 2",
        ),
        Fault(
            "sums of pixels from any branch",
            "if kernel is CONV_SM90 else None,",
            "if True else None,",
        ),
        Fault(
            "sums of pixels of a larger kernel",
            "if weight.shape[2:] == (1, 1))",
            "if weight.size(2) == 1)",
            SM90,
        ),
        Fault(
            "k-iterations of another kernel",
            "k_iters_per_tap(C, dtype, kernel)",
            "k_iters_per_tap(C, dtype)",
            SM90,
        ),
        Fault(
            "unaligned input",
            "        x, w = input.data_ptr(), weight.data_ptr()\n        if is_unaligned(x, w):",
            "        x, w = input.data_ptr(), weight.data_ptr()\n        if is_unaligned(w):",
            Guard("test_dilated_conv2d.py unaligned"),
        ),
        Fault(
            "addresses of the first call's weights",
            "if last != (weights, biases):",
            "if last is None:",
            PLANS,
        ),
        Fault(
            "addresses of the first call's biases",
            "if last != (weights, biases):",
            "if last is None or last[0] != weights:",
            PLANS,
        ),
        Fault(
            "a weight that is not aligned",
            "        if is_unaligned(x, w):\n            return convolve(stream, aligned(arguments",
            "        if is_unaligned(x):\n            return convolve(stream, aligned(arguments",
            PLANS,
        ),
    ],
    "deeplab_fast/backends/cuda/dilated_conv2d_and_mean.py": [
        Fault(
            "rows of the sums of one image",
            "(-(-N * H * W // run) + N - 1) * parts",
            "-(-N * H * W // run) * parts",
        ),
        Fault(
            "rows of one part",
            "(-(-N * H * W // run) + N - 1) * parts",
            "-(-N * H * W // run) + N - 1",
        ),
        Fault(
            "pixels of all images",
            "_C.PixelRuns(N, H * W, C, run, parts)",
            "_C.PixelRuns(1, N * H * W, C, run, parts)",
        ),
        Fault(
            "runs of another length",
            "run, parts = _C.CONV_SUM_RUN, _C.CONV_SUM_PARTS",
            "run, parts = 2 * _C.CONV_SUM_RUN, _C.CONV_SUM_PARTS",
        ),
        Fault(
            "summed once more",
            "        if self._branches.summing_branch is None:\n            self._sum_pixels",
            "        if True:\n            self._sum_pixels",
        ),
    ],
    "deeplab_fast/backends/cuda/dilated_conv2d_backward.py": [
        Fault(
            "taps of the largest branch",
            "sum(weight.size(2) * weight.size(3) for weight in weights)",
            "max(weight.size(2) * weight.size(3) for weight in weights)",
        ),
        Fault("weights not transposed", "weight.permute(1, 2, 3, 0)", "weight.permute(1, 3, 2, 0)"),
        Fault(
            "k-iterations of the first branch's channels",
            "k_iters_per_tap(max(channels), input.dtype, kernel)",
            "k_iters_per_tap(channels[0], input.dtype, kernel)",
            BACKWARD,
        ),
        Fault(
            "first channels off by a branch",
            "zip(accumulate(channels, initial=0), channels,",
            "zip(accumulate(channels), channels,",
        ),
        Fault(
            "mean's share left out",
            "image_bias=0 if image_bias is None else image_bias.data_ptr()",
            "image_bias=0",
            Guard("test_dilated_conv2d_and_mean.py outputs_and_gradients and emulated"),
        ),
        Fault("gradients share memory", "[part.clone() for part in", "[part for part in"),
        Fault("too few pixels a part", "num_pixels // _PIXELS_PER_PART", "num_pixels"),
        Fault(
            "more parts than CTAs",
            "max(1, min(context.num_ctas, num_pixels // _PIXELS_PER_PART))",
            "max(1, num_pixels // _PIXELS_PER_PART)",
        ),
        Fault(
            "half the partial sums",
            "work_list.num_slots * kernel.tile**2",
            "work_list.num_slots * kernel.tile**2 // 2",
            BACKWARD,
        ),
        Fault(
            "half the sums of parts",
            "new_empty(num_parts * K, dtype=torch.float32)",
            "new_empty(num_parts * K // 2, dtype=torch.float32)",
        ),
        Fault(
            "gradients of padded channels",
            "[in_format_of(grad[: w.size(0)], w)",
            "[in_format_of(grad, w)",
            BACKWARD,
        ),
        Fault("strided gradient", "    grad_output = aligned_nhwc(grad_output)\n", "    pass\n"),
    ],
    "deeplab_fast/backends/cuda/fused_conv2d.py": [
        Fault(
            "a bias of another length",
            "or bias.shape != weight.shape[:1]:",
            ":",
        ),
        Fault(
            "a bias of another dtype",
            "if bias.dtype != input.dtype or bias.device != input.device:",
            "if bias.device != input.device:",
        ),
        Fault(
            "a residual of another shape",
            "if residual.shape != (input.size(0), weight.size(0), *input.shape[2:]):",
            "if residual.dim() != 4:",
        ),
        Fault(
            "a copy of the residual is not brought back",
            "        if residual is not arguments.residual:\n",
            "        if False:\n",
        ),
        Fault(
            "an input that is overwritten while it is read",
            "        elif x < output + output_bytes and output < x + input_bytes:",
            "        elif False:",
        ),
        Fault(
            "a depthwise convolution in place ignores the residual",
            "(bias.data_ptr(),), output)",
            "(bias.data_ptr(),), 0)",
        ),
    ],
    "deeplab_fast/backends/cuda/upsample_cross_entropy.py": [
        Fault(
            "strided log-sum-exp as if contiguous",
            "target.contiguous(), log_sum_exp.contiguous()",
            "target.contiguous(), log_sum_exp",
        ),
        Fault(
            "mean without its total weight",
            'total_weight.data_ptr() if reduction == "mean" else 0',
            "0",
        ),
    ],
    "deeplab_fast/_native/work_lists.py": [
        Fault(
            "work items not sorted by CTA",
            "if kernel.is_persistent:\n        work_items =",
            "if False:\n        work_items =",
        ),
        Fault(
            "as many CTAs as of the smaller kernel",
            "        max(1, num_ctas // kernel.sm80_ctas),\n"
            "        kernel.item_k_iters,\n"
            "    )\n"
            "    work_items, first_items = items_by_cta(schedule, kernel)\n"
            "    lists = [pixels,",
            "        max(1, num_ctas),\n"
            "        kernel.item_k_iters,\n"
            "    )\n"
            "    work_items, first_items = items_by_cta(schedule, kernel)\n"
            "    lists = [pixels,",
        ),
        Fault(
            "weight gradient: as many CTAs as of the smaller kernel",
            "        max(1, num_ctas // kernel.sm80_ctas),\n"
            "        kernel.item_k_iters,\n"
            "    )\n"
            "    work_items, first_items = items_by_cta(schedule, kernel)\n"
            "    lists = [rectangles,",
            "        max(1, num_ctas),\n"
            "        kernel.item_k_iters,\n"
            "    )\n"
            "    work_items, first_items = items_by_cta(schedule, kernel)\n"
            "    lists = [rectangles,",
        ),
        Fault(
            "a block of channels too many",
            "-(-out_channels[output] // tile_channels)",
            "out_channels[output] // tile_channels + 1",
        ),
        Fault(
            "blocks of the first output's channels",
            "-(-out_channels[output] // tile_channels)",
            "-(-out_channels[0] // tile_channels)",
        ),
        Fault(
            "a k-iteration too many",
            "return -(-channels * dtype.itemsize // kernel.k_iter_bytes)",
            "return channels * dtype.itemsize // kernel.k_iter_bytes + 1",
        ),
        Fault(
            "a k-iteration too few",
            "return -(-channels * dtype.itemsize // kernel.k_iter_bytes)",
            "return max(1, channels * dtype.itemsize // kernel.k_iter_bytes)",
        ),
        Fault(
            "k-iterations of 16-bit elements",
            "return -(-channels * dtype.itemsize // kernel.k_iter_bytes)",
            "return -(-channels * 2 // kernel.k_iter_bytes)",
        ),
        Fault(
            "dilations limited by the other side",
            "min(vertical, H), min(horizontal, W))",
            "min(vertical, W), min(horizontal, H))",
        ),
        Fault(
            "dilations swapped",
            "min(vertical, H), min(horizontal, W))",
            "min(horizontal, H), min(vertical, W))",
        ),
        Fault(
            "weight gradient: blocks of one operand",
            "-(-k // kernel.tile) * -(-channels // kernel.tile)",
            "-(-k // kernel.tile)",
        ),
        Fault(
            "weight gradient: a k-iteration too few",
            "-(-num_boxes(box, N, h, w) * kernel.box_pixels // pixels_per_k_iter)",
            "num_boxes(box, N, h, w) * kernel.box_pixels // pixels_per_k_iter",
        ),
        Fault(
            "weight gradient: k-iterations of 16-bit elements",
            "pixels_per_k_iter = kernel.k_iter_bytes // dtype.itemsize",
            "pixels_per_k_iter = kernel.k_iter_bytes // 2",
        ),
        Fault(
            "boxes of a single image",
            "-(-w // x) * -(-h // y) * -(-N // n)",
            "-(-w // x) * -(-h // y)",
        ),
        Fault("the worst box", "return min(boxes,", "return max(boxes,"),
        Fault(
            "a CTA without work items",
            "ctas.bincount().cumsum(0)",
            "ctas.bincount(minlength=6).cumsum(0)",
        ),
        Fault(
            "tf32 on the kernel that truncates fp32",
            "if context.is_sm90 and dtype != torch.float32 and is_small:",
            "if context.is_sm90 and is_small:",
        ),
        Fault(
            "coordinates of 16 bits with a sign",
            "is_small = max(size) < 2**15",
            "is_small = max(size) < 2**16",
        ),
        Fault(
            "coordinates of large maps",
            "is_small = max(size) < 2**15",
            "is_small = True",
        ),
        Fault("rows counted over all images", "pixels // W % H << 16", "pixels // W << 16"),
        Fault(
            "channels and taps of a work item exchanged",
            "first_k_iter % num_taps, first_k_iter // num_taps * channels,",
            "first_k_iter // num_taps, first_k_iter % num_taps * channels,",
        ),
        Fault(
            "the first box of an item in another row",
            "first_box // columns % rows, first_box % columns,",
            "first_box // rows % columns, first_box % columns,",
        ),
        Fault(
            "the first box of an item one image on",
            "first_box // columns // rows * box_n,",
            "first_box // columns // rows,",
        ),
        Fault(
            "blocks of input channels of other output channels",
            "block // blocks_c * tile, block % blocks_c * tile,",
            "block % blocks_c * tile, block // blocks_c * tile,",
        ),
        Fault(
            "no workspace slots for partial sums",
            "return ConvWorkList(kernel, work, tensors, schedule.num_slots)",
            "return ConvWorkList(kernel, work, tensors, 0)",
        ),
    ],
    "deeplab_fast/backends/dispatch_table.py": [
        Fault(
            "the last row of a bucket decides",
            "for row in sorted(rows, key=lambda row: row.ratio)}",
            "for row in rows}",
        ),
        Fault(
            "the best row of a bucket decides",
            "for row in sorted(rows, key=lambda row: row.ratio)}",
            "for row in sorted(rows, key=lambda row: -row.ratio)}",
        ),
        Fault("a tie with cuDNN wins", "if row.ratio < 1", "if row.ratio <= 1"),
        Fault("absolute times", "self.median_ms / self.cudnn_ms", "self.median_ms"),
        Fault("rows of other devices", "if row.device == here:", "if row.device:"),
        Fault(
            "the slowest kernel first",
            "sorted(worst.values(), key=lambda row: row.ratio)",
            "sorted(worst.values(), key=lambda row: -row.ratio)",
        ),
        Fault("shipped rows before the user's", "(*read(PATH), *valid)", "(*valid, *read(PATH))"),
        Fault("rows that are out of date", "if row.versions == versions()]", "]"),
        Fault(
            "the shape is no part of a measurement",
            "self.op, self.shape_bucket, self.shape, self.kernel",
            "self.op, self.shape_bucket, self.kernel",
        ),
        Fault(
            "processes do not wait for each other",
            "        fcntl.flock(file, fcntl.LOCK_EX)\n",
            "",
        ),
        Fault(
            "a damaged table is an error",
            "except (OSError, ValueError) as error:\n        _re",
            "except OSError as error:\n        _re",
        ),
        Fault("binary files are an error", "(csv.Error, UnicodeDecodeError)", "UnicodeDecodeError"),
        Fault(
            "a warning at every look-up",
            "@functools.cache\ndef _report_once",
            "@functools.lru_cache(maxsize=0)\ndef _report_once",
        ),
        Fault("invalid rows are added", '_row(list(row), f"row {number}")', "row"),
        Fault("rows take effect in the next process", "    fastest_kernels.cache_clear()\n", ""),
        Fault("plans are kept", "    for forget in changed:\n        forget()\n", ""),
    ],
    "deeplab_fast/backends/race.py": [
        Fault(
            "the first call is timed",
            "            call()\n    start = clock()",
            "            samples[name].append(_sample(call, device, clock))\n    start = clock()",
        ),
        Fault("one sample is enough", "MIN_SAMPLES = 2", "MIN_SAMPLES = 1"),
        Fault("no budget", " or 1e3 * (clock() - start) < budget_ms", ""),
        Fault("slow calls get as many samples", "if times[0] <= limit]", "]"),
        Fault(
            "an exception ends the race",
            "except Exception as error:",
            "except ZeroDivisionError as error:",
        ),
        Fault(
            "interrupts are ignored", "except Exception as error:", "except BaseException as error:"
        ),
        Fault("the in-place op is not undone", "arguments[0].clone()}", "arguments[0]}"),
        Fault(
            "no memory is an error",
            "except torch.OutOfMemoryError as error:",
            "except ZeroDivisionError as error:",
        ),
        Fault("a race at every call", "        _remembered[key] = times\n", ""),
        Fault(
            "each thread races", "        if key in _remembered:  # an", "        if False:  # an"
        ),
        Fault("threads race at once", "    with _lock:\n", "    if True:\n"),
        Fault("tf32 is fp32", "return op, tf32_is_allowed(), ", "return op, "),
        Fault("samples overlap", "        end.synchronize()\n", ""),
        Fault("every race is kept", "if len(_remembered) >= MAX_REMEMBERED:", "if False:"),
    ],
    "deeplab_fast/backends/explanation.py": [
        Fault("a table that is gone", "        if not rows:\n", "        if False:\n"),
        Fault("the model stays in evaluation mode", "module.training = training", "pass"),
        Fault("a method as a model", "if not isinstance(model, nn.Module):", "if False:"),
        Fault("inf as a time", 'time = "failed" if row.failed else', "time ="),
        Fault("dropout is active", "    model.eval()\n", ""),
        Fault("kernels run as usual", 'kwargs | {"backend": "reference"}', "kwargs"),
        Fault(
            "the best time of a bucket",
            "worst_rows(rows), backend)",
            "worst_rows(rows[:1]), backend)",
        ),
        Fault(
            "compiled models have layers of another name",
            'getattr(model, "_orig_mod", model)',
            "model",
        ),
    ],
    "deeplab_fast/backends/tuning.py": [
        Fault("a wrong kernel is timed", "if not error <= tolerance:", "if False:"),
        Fault(
            "a wrong kernel is chosen for similar shapes",
            " | dict.fromkeys(failures, math.inf)",
            "",
        ),
        Fault("NaN is not wrong", "if not error <= tolerance:", "if error > tolerance:"),
        Fault(
            "the memory of a correct output is reused",
            "            outputs.append(",
            "            outputs.clear()\n            outputs.append(",
        ),
        Fault(
            "an error relative to the smallest output",
            "scale = right.double().abs().max()",
            "scale = right.double().abs().min()",
        ),
        Fault(
            "the slower of cuDNN's times",
            "cudnn = min((times[name] for name",
            "cudnn = max((times[name] for name",
        ),
        Fault("cuDNN's trial of all algorithms left out", "benchmark=True)", "benchmark=False)"),
        Fault(
            "the flag of cuDNN stays on",
            "        torch.backends.cudnn.benchmark = before\n",
            "        pass\n",
        ),
        Fault(
            "captured in the caller's thread",
            "return thread.submit(capture).result()",
            "return capture()",
        ),
        Fault(
            "rows saved at the end only", "if measured[key]:", "if len(measured) == len(distinct):"
        ),
        Fault("measured calls are measured again", "if key not in measured:", "if True:"),
        Fault(
            "rows of other versions count",
            "if (row.device, row.versions) == here:",
            "if row.device == here[0]:",
        ),
        Fault(
            "rows of other GPUs count",
            "if (row.device, row.versions) == here:",
            "if row.versions == here[1]:",
        ),
        Fault(
            "calls of one op are alike",
            "key = call.op, call.shape_bucket, call.shape\n",
            'key = call.op, call.shape_bucket, ""\n',
        ),
        Fault(
            "the choice is the fastest kernel of the call alone",
            "return next(faster, CUDNN)",
            "return min(rows, key=lambda row: row.ratio).kernel if rows else CUDNN",
        ),
        Fault(
            "tuning with deterministic algorithms",
            "if torch.are_deterministic",
            "if False and torch.are_deterministic",
        ),
        Fault("a result instead of a function", "if not callable(run):", "if False:"),
        Fault("an unusable GPU is used on", "if is_unusable(arguments[0].device):", "if False:"),
    ],
    "deeplab_fast/backends/calls.py": [
        Fault(
            "all strides are contiguous",
            'torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")',
            'torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")',
        ),
        Fault(
            "the dtype is forgotten",
            'dtype=tensor.dtype, device="meta"',
            'dtype=torch.float32, device="meta"',
        ),
        Fault("calls on empty tensors are recorded", "if args[0].numel():", "if True:"),
        Fault(
            "a recorded call starts the automatic choice",
            'kwargs = kwargs | {"backend": "reference"}',
            "pass",
        ),
        Fault("hooks stay behind", "            hook.remove()", "            pass"),
        Fault("a failed module keeps running", ", always_call=True", ""),
        Fault(
            "the random state of the user",
            "generator=generator)",
            "generator=None)",
        ),
        Fault(
            "memory for the first row only",
            "1 + sum((size - 1) * stride for size, stride in strides)",
            "1 + max((size - 1) * stride for size, stride in strides)",
        ),
        Fault(
            "an op in place writes to its argument",
            "output = arguments[0].clone()",
            "output = arguments[0]",
        ),
    ],
    "deeplab_fast/cli/tune.py": [
        Fault("a wrong kernel is a success", "return 1 if failures else 0", "return 0"),
        Fault(
            "only the first batch size",
            "for batch in arguments.batch:",
            "for batch in arguments.batch[:1]:",
        ),
        Fault("the dtype is ignored", "getattr(torch, arguments.dtype)", "torch.float32"),
        Fault(
            "an unwritable table is a traceback",
            "except (OSError, tuning.UnusableGPU) as error:",
            "except tuning.UnusableGPU as error:",
        ),
    ],
    "deeplab_fast/models/segmentation.py": [
        Fault(
            "tuning in training mode",
            'raise RuntimeError("tune: expected',
            'RuntimeError("tune: expected',
        ),
        Fault(
            "layers without names",
            "tuning.tune(lambda: self.predict(images), images.device, self)",
            "tuning.tune(lambda: self.predict(images), images.device)",
        ),
    ],
    "deeplab_fast/models/cuda_graphs.py": [
        Fault("captured one call late", "if calls < CAPTURED_CALL:", "if calls <= CAPTURED_CALL:"),
        Fault(
            "results are the memory of the graph",
            "return _clone(captured.output)",
            "return captured.output",
        ),
        Fault("old images are replayed", "            captured.images.copy_(images)\n", ""),
        Fault("the graph reads the caller's images", "torch.empty_like(images)", "images"),
        Fault(
            "the most recently used graph is dropped",
            "self._graphs.popitem(last=False)",
            "self._graphs.popitem()",
        ),
        Fault("a replay is not a use", "        self._graphs.move_to_end(key)\n", ""),
        Fault(
            "calls of any number of shapes are counted",
            "if len(self._calls) > MAX_GRAPHS:",
            "if len(self._calls) > 10 * MAX_GRAPHS:",
        ),
        Fault(
            "dropped while it is replayed",
            "            self._gpu.wait()\n            self._graphs.popitem",
            "            self._graphs.popitem",
        ),
        Fault(
            "cleared while it is replayed",
            "        self._gpu.wait()\n        self._gpu = self._make_gpu()\n",
            "        self._gpu = self._make_gpu()\n",
        ),
        Fault("hooks are skipped", "            any(self._hooks)\n", "            False\n"),
        Fault(
            "replaced memory of a weight is not detected",
            "            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses\n",
            "",
        ),
        Fault(
            "replaced weights are not detected",
            "            and list(map(id, self._current_members())) == self._ids\n",
            "",
        ),
        Fault("added weights are not detected", "            and not any(self._empty)\n", ""),
        Fault(
            "graphs of one module replayed for another",
            "module._modules is self._full[0]",
            "True",
        ),
        Fault(
            "captured with weights that were replaced during the call",
            "if weights is self._weights and key not in self._graphs:",
            "if key not in self._graphs:",
        ),
        Fault("a failed capture is tried again", "            self._calls[key] = -math.inf\n", ""),
        Fault("a capture inside a capture", "            and not self._gpu.is_capturing()\n", ""),
        Fault("trace sees no ops", "            and not registry.is_tracing()\n", ""),
        Fault(
            "strides left out of the key",
            "images.shape, images.stride(), images.dtype",
            "images.shape, images.dtype",
        ),
        Fault(
            "convention of the upsampling left out of the key",
            "            module.align_corners,\n",
            "",
        ),
        Fault("forced backend left out of the key", "        registry.current(),\n", ""),
        Fault("old choice of kernels is replayed", "        registry.plans_version(),\n", ""),
        Fault(
            "threads use the graph at the same time",
            "                return self._replay(key, images)\n        result",
            "                pass\n"
            "        if is_captured and not needs_eager_call:\n"
            "            return self._replay(key, images)\n"
            "        result",
        ),
        Fault(
            "streams use the graph at the same time", "        stream.wait_event(replayed)\n", ""
        ),
        Fault(
            "the next stream does not wait for a call that failed",
            "        try:\n            yield\n        finally:\n"
            "            replayed.record(stream)",
            "        yield\n        replayed.record(stream)",
        ),
        Fault(
            "the stream of a failed capture stays current",
            "                    torch.cuda.stream(stream),\n",
            "",
        ),
        Fault(
            "each graph has its own memory",
            "sharing.pool() if sharing else torch.cuda.graph_pool_handle()",
            "torch.cuda.graph_pool_handle()",
        ),
        Fault(
            "memory of graphs is kept when it is short",
            "            self.clear()\n            self._enabled = False\n",
            "            self._enabled = False\n",
        ),
    ],
    "deeplab_fast/models/inference.py": [
        Fault(
            "loaded weights are as finite as the weights before",
            "        self.finite_weights = _are_finite(self)\n",
            "",
        ),
        Fault(
            "images on another device",
            "if images.device != weight.device:",
            "if False:",
            Guard("test_models.py", "predict_rejects or prepare_rejects"),
        ),
        Fault(
            "a dtype by its name",
            "if dtype is not None and not (",
            "if False and not (",
            Guard("test_models.py", "predict_rejects or prepare_rejects"),
        ),
        Fault(
            "graphs although declined",
            "CudaGraphs() if cuda_graphs else None",
            "CudaGraphs()",
            CUDA_GRAPHS,
        ),
        Fault(
            "graphs stay when the model moves",
            "_apply(self, *args: Any, **kwargs: Any) -> InferenceModel:\n"
            "        self._drop_cuda_graphs()\n",
            "_apply(self, *args: Any, **kwargs: Any) -> InferenceModel:\n",
            CUDA_GRAPHS,
        ),
        Fault(
            "graphs stay when weights are loaded",
            "load_state_dict(self, *args: Any, **kwargs: Any) -> Any:\n"
            "        self._drop_cuda_graphs()\n",
            "load_state_dict(self, *args: Any, **kwargs: Any) -> Any:\n",
            CUDA_GRAPHS,
        ),
        Fault(
            "a broken image looks healthy",
            "return with_nan_of(logits, [images], self.finite_weights)",
            "return logits",
        ),
        Fault("a broken last layer breaks all classes", "*earlier, _ = filter", "earlier = filter"),
    ],
    "deeplab_fast/ops/upsample.py": [
        Fault("opaque in eager mode", "torch.compiler.is_dynamo_compiling()", "True"),
        Fault("opaque on every device", 'input.device.type == "cpu"', "True"),
        Fault("opaque to gradients", "torch.is_grad_enabled() and input.requires_grad", "False"),
        Fault("no gradient, no call", "torch.is_grad_enabled() and ", ""),
        Fault("opaque to tangents", "        and not _transforms.active()\n", ""),
        Fault("never opaque", "return _opaque(", "return _interpolate("),
        Fault("opaque in exported programs", "        and not is_exporting()\n", ""),
        Fault(
            "another size in compiled graphs",
            "_opaque(input, *size, align_corners)",
            "_opaque(input, *size[::-1], align_corners)",
        ),
        Fault(
            "align_corners ignored",
            'mode="bilinear", align_corners=align_corners',
            'mode="bilinear", align_corners=False',
        ),
    ],
    "deeplab_fast/ops/_arguments.py": [
        Fault("False of NumPy is True", "return bool(value)", "return True"),
        Fault(
            "a list is no pair",
            "isinstance(value, (tuple, Sequence)) and",
            "isinstance(value, tuple) and",
        ),
        Fault(
            "a string is a pair",
            "is_sequence = isinstance(value, (tuple, Sequence)) and not isinstance(value, str)",
            "is_sequence = isinstance(value, (tuple, Sequence))",
        ),
        Fault("any number of values is a pair", "len(values) != 2 or not", "not"),
        Fault("numbers past 64 bits", "not 0 < values[1] < INT64_END", "not 0 < values[1]"),
        Fault(
            "a tensor is a list of tensors",
            "isinstance(values, (Tensor, str))",
            "isinstance(values, str)",
        ),
    ],
    "deeplab_fast/ops/shape_bucket.py": [
        Fault(
            "memory format left out of the bucket",
            '        in_format,\n        f"{C}->',
            '        f"{C}->',
        ),
        Fault(
            "dilations swapped",
            "_taps_inside(H, R, vertical) * _taps_inside(W, S, horizontal)",
            "_taps_inside(H, R, horizontal) * _taps_inside(W, S, vertical)",
        ),
        Fault(
            "sizes swapped",
            "_taps_inside(H, R, vertical) * _taps_inside(W, S, horizontal)",
            "_taps_inside(W, R, vertical) * _taps_inside(H, S, horizontal)",
        ),
        Fault(
            "images left out of the pixels",
            "max(1, N * H * W).bit_length()",
            "max(1, H * W).bit_length()",
        ),
        Fault(
            "outputs of the first branch only", "sum(K for K, _, _, _ in kernels)", "kernels[0][0]"
        ),
        Fault(
            "share inside rounded down",
            "-(-8 * inside // max(1, dense))",
            "8 * inside // max(1, dense)",
        ),
        Fault(
            "groups left out of the bucket", '*([f"groups {groups}"] if groups > 1 else []),', ""
        ),
        Fault(
            "all gradients in every bucket",
            "zip(_GRADIENTS, output_mask) if needed",
            "zip(_GRADIENTS, output_mask)",
        ),
        Fault(
            "tf32 counts as fp32", 'return "tf32" if tf32_is_allowed() else "fp32"', 'return "fp32"'
        ),
        Fault(
            "precision left out of the bucket",
            'return f"{_precision(input.dtype)} {shapes}"',
            'return f"bf16 {shapes}"',
        ),
    ],
    "deeplab_fast/backends/cuda/device.py": [
        Fault(
            "the sm_80 kernels are Hopper's",
            "sm90 and _runs_sm90(properties))",
            "_runs_sm90(properties))",
        ),
        Fault(
            "the properties of one GPU for all",
            "device_properties(device)",
            "device_properties(torch.device('cuda', 0))",
        ),
    ],
    "deeplab_fast/ops/_register.py": [
        Fault("compiled inputs in any layout", ", tags=_STRIDES)", ")"),
        Fault(
            "autocast halves float64",
            "(torch.float32, torch.float16, torch.bfloat16)",
            "(torch.float64, torch.float32, torch.float16, torch.bfloat16)",
        ),
        Fault(
            "autocast leaves fp16",
            "(torch.float32, torch.float16, torch.bfloat16)",
            "(torch.float32, torch.bfloat16)",
        ),
        Fault("autocast is bfloat16", "torch.get_autocast_dtype(device_type)", "torch.bfloat16"),
        Fault("autocast of the meta device", 'device_type == "meta" or not', "not"),
        Fault(
            "backward on the automatic choice",
            'ctx.backend = keyword_only_inputs["backend"]',
            'ctx.backend = ""',
        ),
        Fault(
            "transforms on the automatic choice",
            "_transforms.call(op, _rules[name], values, backend)",
            '_transforms.call(op, _rules[name], values, "")',
            TRANSFORMS,
        ),
        Fault(
            "gradients are lost",
            "or torch.is_grad_enabled() or torch.compiler",
            "or torch.compiler",
            Guard("test_dilated_conv2d.py gradcheck"),
        ),
    ],
    "deeplab_fast/ops/_transforms.py": [
        Fault("forward mode not seen", " or forward_ad._current_level >= 0", ""),
        Fault(
            "transforms not seen",
            "torch._C._are_functorch_transforms_active() or forward_ad",
            "forward_ad",
        ),
        Fault(
            "all gradients are needed",
            "call.arguments(needed[1:])",
            "call.arguments([True] * len(needed))",
        ),
        Fault("backward elsewhere", "= call, call.backend", '= call, ""'),
        Fault("tangents elsewhere", "output, call.backend)", 'output, "")'),
        Fault("the first of all weights", "set(mapped) <= set(images)", "True"),
        Fault("images one by one", "set(mapped) <= set(images)", "False"),
        Fault(
            "dimensions exchanged",
            "tensor = tensor.movedim(dim, 0)",
            "tensor = tensor.transpose(dim, 0)",
        ),
        Fault("samples along another dimension", "t.select(d, i)", "t.select(0, i)"),
        Fault("no words about no samples", "if batch_size == 0:", "if False:"),
        Fault(
            "functionalize is for an autograd.Function",
            "    if _is_functionalized_only():\n        return op(*arguments, backend=backend)\n",
            "",
        ),
        Fault(
            "functionalize hides forward mode", "forward_ad._current_level < 0\n        and ", ""
        ),
    ],
    "deeplab_fast/ops/aspp.py": [
        Fault(
            "no tangent from biases of branches",
            "(t_input, t_weights, t_biases, None)",
            "(t_input, t_weights, [None] * len(biases), None)",
            TRANSFORMS,
        ),
        Fault(
            "tangents pass a ReLU", "return t_output * (output > 0)", "return t_output", TRANSFORMS
        ),
        Fault(
            "dtypes differ",
            "    check_dtypes(input, *tensors)\n",
            "    pass\n",
        ),
        Fault(
            "pooling of more pixels",
            "tuple(weight.shape[1:]) != (channels, 1, 1)",
            "weight.size(1) != channels",
        ),
        Fault(
            "no gradient where the output is NaN",
            "grad_output * ~(output <= 0)",
            "grad_output * (output > 0)",
            Guard("test_non_finite.py aspp and reference"),
        ),
        Fault(
            "no gradient where a branch is NaN",
            "grad_joined * ~(joined <= 0)",
            "grad_joined * (joined > 0)",
            Guard("test_non_finite.py aspp and reference"),
        ),
    ],
    "deeplab_fast/ops/dilated_conv2d.py": [
        Fault(
            "gradients of input and bias exchanged",
            "mask = list(ctx.needs_input_grad[:3])",
            "mask = list(ctx.needs_input_grad[2::-1])",
        ),
        Fault("every gradient", "mask = list(ctx.needs_input_grad[:3])", "mask = [True] * 3"),
        Fault(
            "gradients of all weights or none",
            "mask = [needs_input, any(needs_weights), any(needs_biases)]",
            "mask = [needs_input, all(needs_weights), any(needs_biases)]",
        ),
        Fault(
            "gradients of biases with those of weights",
            "mask = [needs_input, any(needs_weights), any(needs_biases)]",
            "mask = [needs_input, any(needs_weights), any(needs_weights)]",
        ),
        Fault(
            "fake weights like the input",
            "empty_like_format(weight, tuple(weight.shape)) if mask[1]",
            "empty_like_format(input, tuple(weight.shape)) if mask[1]",
        ),
        Fault(
            "fake bias whether needed or not",
            "weight.size(0) if mask[2] else 0",
            "weight.size(0)",
        ),
        Fault("groups that do not divide", "or shape[0] % groups or", "or"),
        Fault("even kernels across", " or shape[3] % 2 == 0", ""),
        Fault("bias not autocast", "input, weight, bias = autocast", "input, weight, _ = autocast"),
        Fault(
            "vmap sums over samples",
            "return () if any(mask[1:]) else (0, 1)  #",
            "return (0, 1)  #",
            TRANSFORMS,
        ),
        Fault(
            "tangent of biases alone",
            "for t in (*t_weights, *t_biases)):",
            "for t in t_weights):",
            TRANSFORMS,
        ),
        Fault(
            "gradients of any shape",
            "    if grad_output.shape != expected:",
            "    if False:",
            PLANS,
        ),
        Fault(
            "means of any shape",
            "if grad_mean is not None and grad_mean.shape != input.shape[:2]:",
            "if False:",
            PLANS,
        ),
    ],
    "deeplab_fast/ops/dilated_conv2d_and_mean.py": [
        Fault(
            "the mean's gradient lost",
            "mask, grad_mean, backend",
            "mask, None, backend",
            Guard("test_dilated_conv2d_and_mean.py outputs_and_gradients and cpu"),
        ),
        Fault("the mean in autocast's dtype", "mean.to(input.dtype)", "mean.to(converted.dtype)"),
        Fault(
            "zeros convolved",
            "    ctx.set_materialize_grads(False)",
            "    ctx.set_materialize_grads(True)",
            Guard("test_dilated_conv2d_and_mean.py one_of_the_outputs and cpu"),
        ),
        Fault(
            "fake mean of float64",
            "dtype = torch.promote_types(input.dtype, torch.float32)",
            "dtype = torch.float32",
        ),
        Fault("tangent of the mean", "torch.zeros_like(mean)", "torch.ones_like(mean)", TRANSFORMS),
    ],
    "deeplab_fast/_native/limits.py": [
        Fault(
            "the newest of several GPUs decides",
            "oldest = min(",
            "oldest = max(",
            TRITON_CALLS,
        ),
        Fault(
            "even kernels",
            "size % 2 == 0 or 2 * p",
            "2 * p",
        ),
        Fault(
            "stride across",
            "if tuple(stride) != (1, 1):",
            "if stride[0] != 1:",
        ),
    ],
    "deeplab_fast/ops/fused_conv2d.py": [
        Fault("padding of the other side", "2 * padding[i]", "2 * padding[0]"),
        Fault(
            "in place within transforms",
            "    if _transforms.active() or is_exporting():",
            "    if False:",
            TRANSFORMS,
        ),
    ],
    "deeplab_fast/ops/upsample_argmax.py": [
        Fault(
            "fake labels transposed",
            "(logits.size(0), *arguments.size)",
            "(logits.size(0), *arguments.size[::-1])",
        ),
        Fault("257 classes in a byte", "torch.uint8: 256", "torch.uint8: 257"),
        Fault(
            "size and scale_factor",
            "(size is None) == (scale_factor is None)",
            "size is None and scale_factor is None",
        ),
    ],
    "deeplab_fast/ops/upsample_cross_entropy.py": [
        Fault(
            "what is kept has a gradient",
            "ctx.mark_non_differentiable(log_sum_exp, total_weight)",
            "pass",
        ),
        Fault(
            "loss of the fake",
            'if arguments.reduction == "none" else ()',
            'if arguments.reduction != "sum" else ()',
        ),
        Fault("no smoothing past 0", "0.0 <= label_smoothing <= 1.0", "label_smoothing <= 1.0"),
        Fault(
            "twice the tangent", "torch.ones_like(loss)", "2 * torch.ones_like(loss)", TRANSFORMS
        ),
        Fault("weights with a tangent", "if t_weight is not None:", "if False:", TRANSFORMS),
    ],
}
