"""Faults of the Triton kernels."""

from __future__ import annotations

from .guards import (
    ARGMAX_TRITON,
    TRITON_ASPP,
    TRITON_CALLS,
    TRITON_DENSE,
    TRITON_DEPTHWISE,
    TRITON_FAR,
    Fault,
)

FAULTS: dict[str, list[Fault]] = {
    "deeplab_fast/backends/triton/device.py": [
        Fault(
            "the last block runs over int32",
            "MAX_INDEX = 2**31 - 4096",
            "MAX_INDEX = 2**31 - 1",
        ),
        Fault(
            "bf16 is widened on a GPU",
            "if not _INTERPRETED:\n        return args",
            "if False:\n        return args",
        ),
        Fault(
            "no kernels for AMD",
            "    if torch.version.hip:\n        return None\n",
            "",
        ),
        Fault(
            "versions compared as text",
            'tuple(map(int, found.split(".")[:2])) < than',
            'found < "{}.{}".format(*than)',
        ),
    ],
    "deeplab_fast/backends/triton/fused_conv2d.py": [
        Fault(
            "no activation after a residual",
            "arguments.convolution(arguments.activation)",
            "arguments.convolution()",
        ),
        Fault(
            "a residual elsewhere is not written",
            "    if output is not residual:\n        residual.copy_(output)",
            "    pass",
        ),
        Fault(
            "only a residual that is the input is read first",
            "if input.untyped_storage().data_ptr() == sums.untyped_storage().data_ptr():",
            "if input is residual:",
        ),
        Fault(
            "a residual of another batch is supported",
            "if residual.shape != (input.size(0), weight.size(0), *input.shape[2:]):",
            "if residual.shape[1:] != (weight.size(0), *input.shape[2:]):",
        ),
    ],
    "deeplab_fast/backends/triton/dilated_conv2d_backward.py": [
        Fault(
            "gradient rows past the last",
            "m_m, m_n = o_m < K, o_n < C",
            "m_m, m_n = o_m >= 0, o_n < C",
            TRITON_DENSE,
        ),
        Fault(
            "gradients of a column too many",
            "tl.cdiv(C, BLOCK_N)\n    o_m = i_block // num_column_blocks * BLOCK_M + tl",
            "C // BLOCK_N + 1\n    o_m = i_block // num_column_blocks * BLOCK_M + tl",
            TRITON_DENSE,
        ),
        Fault(
            "split gradients lose rows",
            "wgrad_reduce_kernel[(len(work.reductions) * (blocks.m // rows),)](",
            "wgrad_reduce_kernel[(len(work.reductions),)](",
            TRITON_DENSE,
        ),
        Fault(
            "a gradient's NaN is 0",
            "        b_sum = tl.dot(b_grad, b_input, b_sum, input_precision=PRECISION)",
            "        b_grad = tl.where(b_grad == b_grad, b_grad, 0.0)\n"
            "        b_sum = tl.dot(b_grad, b_input, b_sum, input_precision=PRECISION)",
        ),
        Fault(
            "the mask of another gradient",
            "        if output_mask[1]:\n            grad_weight = depthwise",
            "        if output_mask[0]:\n            grad_weight = depthwise",
            TRITON_CALLS,
        ),
    ],
    "deeplab_fast/backends/triton/aspp.py": [
        Fault(
            "ASPP's projection may be empty",
            "[*arguments.weights, arguments.pool_weight, arguments.project_weight]",
            "[*arguments.weights, arguments.pool_weight]",
            TRITON_CALLS,
        ),
        Fault(
            "ReLU of the pooled branch drops NaN",
            "pool_bias.float()).relu_()",
            "pool_bias.float()).nan_to_num_(0.0).relu_()",
        ),
        Fault(
            "infinite means cut off",
            "mean = input.mean((2, 3), dtype=torch.float32)",
            "mean = input.mean((2, 3), dtype=torch.float32).clamp(-65504, 65504)",
        ),
        Fault("no activation of the pooled branch", ".relu_()", "", TRITON_ASPP),
        Fault(
            "one mean of all images",
            "input.mean((2, 3), dtype=torch.float32)",
            "input.mean((0, 2, 3), dtype=torch.float32)[None].expand(input.size(0), -1)",
            TRITON_ASPP,
        ),
        Fault(
            "the bias of images is rounded",
            "project_bias.float())",
            "project_bias.float()).to(input.dtype)",
            TRITON_ASPP,
        ),
    ],
    "deeplab_fast/backends/triton/bilinear.py": [
        Fault(
            "pixels past the image",
            "return i_n, tl.where(m_p, o_p, 0), m_p",
            "return i_n, o_p, o_p <= num_pixels",
            ARGMAX_TRITON,
        ),
        Fault(
            "int32 offsets of images",
            "i_n = (tl.program_id(0) // num_blocks).to(tl.int64)",
            "i_n = tl.program_id(0) // num_blocks",
            ARGMAX_TRITON,
        ),
        Fault(
            "the second product is not rounded",
            "return tl.fma(b_a, b_w0, b_b * b_w1)",
            "return tl.fma(b_b, b_w1, b_a * b_w0)",
        ),
        Fault(
            "source index not clamped at the end",
            "tl.minimum(o_lo + 1, size - 1), 1.0",
            "o_lo + 1, 1.0",
            ARGMAX_TRITON,
        ),
        Fault("an emulated fma that rounds twice", "tl.where(inexact, odd, total)", "total"),
        Fault(
            "source index not clamped at 0",
            "tl.where(b_src < 0, 0.0, b_src)",
            "b_src",
            ARGMAX_TRITON,
        ),
        Fault(
            "source index not clamped at the end",
            "tl.minimum(b_src.to(tl.int32), size - 1)",
            "b_src.to(tl.int32)",
            ARGMAX_TRITON,
        ),
        Fault(
            "past the last source pixel",
            "tl.minimum(o_lo + 1, size - 1)",
            "o_lo + 1",
            ARGMAX_TRITON,
        ),
        Fault(
            "weights swapped",
            "size - 1), 1.0 - b_w1, b_w1",
            "size - 1), b_w1, 1.0 - b_w1",
            ARGMAX_TRITON,
        ),
        Fault(
            "the other product rounded",
            "return _emulated_fma(b_a, b_w0, b_b * b_w1)",
            "return _emulated_fma(b_b, b_w1, b_a * b_w0)",
            ARGMAX_TRITON,
        ),
        Fault(
            "both products rounded",
            "return _emulated_fma(b_a, b_w0, b_b * b_w1)",
            "return b_a * b_w0 + b_b * b_w1",
            ARGMAX_TRITON,
        ),
        Fault(
            "rounded to nearest first",
            "return tl.where(inexact, odd, total)",
            "return total",
            ARGMAX_TRITON,
        ),
        Fault(
            "index rounded twice",
            "b_src = _emulated_fma(b_scale, b_dst + b_half, -b_half)",
            "b_src = b_scale * (b_dst + b_half) - b_half",
            ARGMAX_TRITON,
        ),
    ],
    "deeplab_fast/backends/triton/depthwise_conv2d.py": [
        Fault(
            "NaN of the input is 0",
            "            b_sum += b_input.to(tl.float32) * b_weight.to(tl.float32)[None, :]",
            "            b_input = tl.where(b_input == b_input, b_input, 0.0)\n"
            "            b_sum += b_input.to(tl.float32) * b_weight.to(tl.float32)[None, :]",
        ),
        Fault(
            "zeros not multiplied",
            "            b_sum += b_input.to(tl.float32) * b_weight.to(tl.float32)[None, :]",
            "            b_product = b_input.to(tl.float32) * b_weight.to(tl.float32)[None, :]\n"
            "            b_sum += tl.where(b_input == 0, 0.0, b_product)",
        ),
        Fault(
            "a gradient's NaN is 0",
            "        b_sum += b_grad * b_input.to(tl.float32)",
            "        b_sum += tl.where(b_grad == b_grad, b_grad, 0.0) * b_input.to(tl.float32)",
        ),
        Fault(
            "channels past the last",
            "o_pixel < num_pixels, o_c < out_channels",
            "o_pixel < num_pixels, o_c <= out_channels",
            TRITON_DEPTHWISE,
        ),
        Fault(
            "one output of each channel",
            "for i in tl.static_range(MULTIPLIER if FLIPPED else 1):",
            "for i in tl.static_range(1):",
            TRITON_DEPTHWISE,
        ),
        Fault(
            "weights past the last",
            "mask=m_c, other=0.0)",
            "mask=m_c | True, other=0.0)",
            TRITON_DEPTHWISE,
        ),
        Fault(
            "products in half precision",
            "b_sum += b_input.to(tl.float32) * b_weight.to(tl.float32)[None, :]",
            "b_sum += (b_input * b_weight[None, :]).to(tl.float32)",
            TRITON_DEPTHWISE,
        ),
        Fault(
            "offsets of the input in int32",
            "o_input = (o_pixel + i_dy * W + i_dx).to(tl.int64)[:, None] * in_channels",
            "o_input = (o_pixel + i_dy * W + i_dx)[:, None] * in_channels",
            TRITON_DEPTHWISE,
        ),
        Fault(
            "offsets of partial sums in int32",
            "tl.program_id(0).to(tl.int64) * K",
            "tl.program_id(0) * K",
            TRITON_DEPTHWISE,
        ),
        Fault(
            "only the first block of a run is summed",
            "range(0, RUN, BLOCK_P)",
            "range(0, BLOCK_P, BLOCK_P)",
            TRITON_DEPTHWISE,
        ),
        Fault("runs that overlap", "_RUN = 2048", "_RUN = 2000", TRITON_DEPTHWISE),
        Fault("only the first run counts", "partial.sum(0)", "partial[0]", TRITON_DEPTHWISE),
        Fault(
            "partial sums in half precision",
            "new_empty((runs, R, S, K), dtype=torch.float32)",
            "new_empty((runs, R, S, K))",
            TRITON_DEPTHWISE,
        ),
        Fault(
            "dilations clamped to the other side",
            "min(dilation[0], input.size(2)), min(dilation[1], input.size(3))",
            "min(dilation[0], input.size(3)), min(dilation[1], input.size(2))",
            TRITON_DEPTHWISE,
        ),
        Fault("a weight with gaps", "weight.contiguous(),", "weight,", TRITON_DEPTHWISE),
    ],
    "deeplab_fast/backends/triton/epilogue.py": [
        Fault(
            "offsets of a bias in int32",
            "o_image = (o_pixel // pixels_per_image).to(tl.int64)",
            "o_image = o_pixel // pixels_per_image",
            TRITON_FAR,
        ),
        Fault(
            "offsets of the output in int32",
            "o_output = o_pixel.to(tl.int64)[:, None]",
            "o_output = o_pixel[:, None]",
            TRITON_FAR,
        ),
        Fault(
            "the residual behind the activation",
            "    if HAS_RESIDUAL:\n"
            "        b_sum += tl.load(p_residual + o_output, mask=m_output, "
            "other=0.0).to(tl.float32)\n"
            '    if ACTIVATION != "none":\n'
            "        b_sum = tl.where(b_sum < 0, 0.0, b_sum)  # NaN stays NaN\n"
            '    if ACTIVATION == "relu6":\n'
            "        b_sum = tl.where(b_sum > 6, 6.0, b_sum)\n",
            '    if ACTIVATION != "none":\n'
            "        b_sum = tl.where(b_sum < 0, 0.0, b_sum)\n"
            '    if ACTIVATION == "relu6":\n'
            "        b_sum = tl.where(b_sum > 6, 6.0, b_sum)\n"
            "    if HAS_RESIDUAL:\n"
            "        b_sum += tl.load(p_residual + o_output, mask=m_output, "
            "other=0.0).to(tl.float32)\n",
        ),
        Fault(
            "an infinite bias is not added",
            "b_sum += tl.load(p_bias + o_bias, mask=m_output, other=0.0).to(tl.float32)",
            "b_bias = tl.load(p_bias + o_bias, mask=m_output, other=0.0).to(tl.float32)\n"
            '        b_sum += tl.where(tl.abs(b_bias) < float("inf"), b_bias, 0.0)',
        ),
        Fault(
            "ReLU6 drops NaN",
            "b_sum = tl.where(b_sum > 6, 6.0, b_sum)",
            "b_sum = tl.where(b_sum < 6, b_sum, 6.0)",
        ),
        Fault(
            "ReLU drops NaN",
            "b_sum = tl.where(b_sum < 0, 0.0, b_sum)  # NaN stays NaN",
            "b_sum = tl.where(b_sum > 0, b_sum, 0.0)",
        ),
    ],
    "deeplab_fast/backends/triton/block_sizes.py": [
        Fault(
            "blocks smaller than tensor cores multiply",
            "_SMALLEST = 16",
            "_SMALLEST = 8",
        ),
        Fault(
            "columns fit the depth",
            "n=fitting(columns, largest.n), k=fitting(depth, largest.k)",
            "n=fitting(depth, largest.n), k=fitting(columns, largest.k)",
        ),
        Fault(
            "more shared memory than AMD has",
            "if torch.version.hip:\n        largest",
            "if False:\n        largest",
        ),
    ],
    "deeplab_fast/backends/triton/tf32.py": [
        Fault(
            "tf32 makes 0 of NaN",
            '    b_rounded = tl.where(tl.abs(b_exact) < float("inf"), b_rounded, '
            "b_exact)  # NaN stays NaN\n",
            "",
        ),
        Fault(
            "offsets of tf32 in int32",
            "o = tl.program_id(0).to(tl.int64) * BLOCK",
            "o = tl.program_id(0) * BLOCK",
            TRITON_FAR,
        ),
        Fault(
            "tf32 past the last",
            "mask=o < num_elements, other=0.0)",
            "mask=o >= 0, other=0.0)",
            TRITON_DENSE,
        ),
        Fault("tf32 on AMD", "and not torch.version.hip", "", TRITON_DENSE),
    ],
    "deeplab_fast/backends/triton/work_lists.py": [
        Fault(
            "k-iterations of the first branch",
            "depth = max(out_channels) if flipped",
            "depth = out_channels[0] if flipped",
        ),
        Fault(
            "the first branch is aligned",
            "math.gcd(16, *channels)",
            "math.gcd(16, channels[0])",
        ),
        Fault("no sum is split", "multi_processor_count", "multi_processor_count // 200"),
    ],
    "deeplab_fast/backends/triton/dilated_conv2d.py": [
        Fault(
            "pixels of one branch count",
            "len(weights) * input.numel() // input.size(1)",
            "input.numel() // input.size(1)",
            TRITON_CALLS,
        ),
        Fault(
            "workspace slots that are NaN left out",
            "        b_sum += tl.load(p_partial + o_row[:, None] + o_n[None, :])",
            "        b_slot = tl.load(p_partial + o_row[:, None] + o_n[None, :])\n"
            "        b_sum += tl.where(b_slot == b_slot, b_slot, 0.0)",
        ),
        Fault(
            "split sums lose rows",
            "dilated_conv2d_reduce_kernel[(len(work.reductions) * (blocks.m // rows),)](",
            "dilated_conv2d_reduce_kernel[(len(work.reductions),)](",
            TRITON_DENSE,
        ),
        Fault(
            "slots of the rows above",
            "((i_first_slot + i).to(tl.int64) * BLOCK_M + o_m) * BLOCK_N",
            "((i_first_slot + i).to(tl.int64) * BLOCK_M + o_m % 16) * BLOCK_N",
            TRITON_DENSE,
        ),
        Fault(
            "one slot not added",
            "for i in range(num_slots):",
            "for i in range(num_slots - 1):",
            TRITON_DENSE,
        ),
        Fault(
            "channels past a branch",
            "m_n = o_n < (C if FLIPPED else num_channels)",
            "m_n = o_n < C",
            TRITON_DENSE,
        ),
        Fault(
            "weights past the last",
            "mask=m_k[:, None] & m_n[None, :], other=0.0)\n        i_dy",
            "mask=(m_k[:, None] | True) & m_n[None, :], other=0.0)\n        i_dy",
            TRITON_DENSE,
        ),
        Fault(
            "input past the last",
            "mask=(m_inside & m_pixel)[:, None] & m_k[None, :],",
            "mask=(m_inside & m_pixel)[:, None] & (m_k[None, :] | True),",
            TRITON_DENSE,
        ),
        Fault(
            "bias of the first image",
            "        out_channels, H * W, stride_bias, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,\n    )",
            "        out_channels, H * W, 0, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,\n    )",
            TRITON_DENSE,
        ),
        Fault(
            "workspace in half precision",
            "work.num_slots * blocks.m * blocks.n, dtype=torch.float32)\n    epilogue",
            "work.num_slots * blocks.m * blocks.n)\n    epilogue",
            TRITON_DENSE,
        ),
        Fault(
            "offsets of the weight in int32",
            "o_weight = (o_n.to(tl.int64) * num_taps + i_tap)[None, :]",
            "o_weight = (o_n * num_taps + i_tap)[None, :]",
            TRITON_FAR,
        ),
        Fault(
            "offsets of the flipped weight in int32",
            "o_weight = (o_c.to(tl.int64) * num_taps + i_tap)[:, None]",
            "o_weight = (o_c * num_taps + i_tap)[:, None]",
            TRITON_FAR,
        ),
        Fault(
            "offsets of workspace slots in int32",
            "((i_first_slot + i).to(tl.int64) * BLOCK_M + o_m)",
            "((i_first_slot + i) * BLOCK_M + o_m)",
            TRITON_FAR,
        ),
        Fault(
            "a bias with gaps",
            "bias = given[0].contiguous() if",
            "bias = given[0] if",
            TRITON_DENSE,
        ),
    ],
    "deeplab_fast/backends/triton/upsample_argmax.py": [
        Fault("-0 loses to +0", "tl.where(b_value == 0, 0.0, b_value).to(", "b_value.to("),
        Fault(
            "NaN by its bits",
            "b_ordered = tl.where(b_value != b_value, _NAN_KEY, b_ordered)\n",
            "b_ordered = b_ordered\n",
        ),
        Fault(
            "NaN is least",
            "_NAN_KEY = tl.constexpr(0x7FFFFFFF)",
            "_NAN_KEY = tl.constexpr(-0x7FFFFFFF)",
        ),
        Fault(
            "negative values in reverse",
            "b_ordered = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)",
            "b_ordered = b_bits",
        ),
        Fault(
            "ties by a byte of the class",
            "| (0x7FFFFFFF - o_class).to(tl.int64)",
            "| (0x7FFFFFFF - o_class % 256).to(tl.int64)",
        ),
        Fault(
            "no key below any other",
            "_NO_KEY = tl.constexpr(-(2**63))",
            "_NO_KEY = tl.constexpr(-(2**62))",
        ),
        Fault(
            "a corner less to win at",
            "    b_can_win |= b_d > _losing_bound(p_d + o_winner, m_cell)[None, :]\n",
            "",
        ),
        Fault("no margin", "b_logit - (tl.abs(b_logit) * 2.0**-18 + 2.0**-118)", "b_logit"),
        Fault(
            "no margin for denormals",
            "b_logit - (tl.abs(b_logit) * 2.0**-18 + 2.0**-118)",
            "b_logit - tl.abs(b_logit) * 2.0**-18",
        ),
        Fault("margin of the sign", "tl.abs(b_logit) * 2.0**-18", "b_logit * 2.0**-18"),
        Fault("anything is finite", "(tl.abs(b_logit) < 2.0**126)", "(b_logit == b_logit)"),
        Fault(
            "NaN is finite",
            "(tl.abs(b_logit) < 2.0**126)",
            "((tl.abs(b_logit) < 2.0**126) | (b_logit != b_logit))",
        ),
        Fault(
            "only the last block of classes is finite",
            "b_finite &= _is_finite(b_a)",
            "b_finite = _is_finite(b_a)",
        ),
        Fault(
            "a corner's infinity missed", "& _is_finite(b_c) & _is_finite(b_d)", "& _is_finite(b_c)"
        ),
        Fault(
            "classes past the last read",
            "o_c = tl.minimum(i_c + tl.arange(0, BLOCK_C), C - 1)[:, None]",
            "o_c = (i_c + tl.arange(0, BLOCK_C))[:, None]",
        ),
        Fault(
            "classes past the last listed",
            "m_class = (o_c < C) & m_cell[None, :]",
            "m_class = (o_c <= C) & m_cell[None, :]",
        ),
        Fault(
            "the last class never listed",
            "m_class = (o_c < C) & m_cell[None, :]",
            "m_class = (o_c < C - 1) & m_cell[None, :]",
        ),
        Fault("next row past the last", "(tl.minimum(o_lo_y + 1, H - 1) - o_lo_y)", "1"),
        Fault(
            "next column past the last",
            "o_hi_x = tl.minimum(o_lo_x + 1, W - 1)",
            "o_hi_x = o_lo_x + 1",
        ),
        Fault(
            "cells of the first image", "(o_cell // W // H) * stride_n", "(o_cell // W // H) * 0"
        ),
        Fault(
            "cells past the last counted",
            "tl.store(p_counts + o_cell, b_count, mask=m_cell)",
            "tl.store(p_counts + o_cell, b_count)",
        ),
        Fault(
            "a candidate more than fits",
            "mask=m_win & (o_slot < _MAX_CANDIDATES)",
            "mask=m_win & (o_slot <= _MAX_CANDIDATES)",
        ),
        Fault(
            "candidates of a block over those of the one before",
            "o_slot = b_count[None, :] + tl.cumsum",
            "o_slot = tl.cumsum",
        ),
        Fault(
            "a cell that is not finite listed",
            "tl.where(b_finite != 0, b_count, _MAX_CANDIDATES + 1)",
            "b_count",
        ),
        Fault(
            "a cell of too many listed",
            "m_listed = b_count <= _MAX_CANDIDATES",
            "m_listed = b_count <= _MAX_CANDIDATES + 1",
        ),
        Fault("two candidates are one", "m_open = b_count > 1", "m_open = b_count > 2"),
        Fault(
            "a candidate too few",
            "m_c = (o_c < b_num[None, :]) & m_open",
            "m_c = (o_c < b_num[None, :] - 1) & m_open",
        ),
        Fault(
            "candidates of another image",
            "o_cell = (i_n * H + o_y_lo) * W + o_x_lo",
            "o_cell = o_y_lo * W + o_x_lo",
        ),
        Fault(
            "the last class left out",
            "            m_c = o_c < C\n",
            "            m_c = o_c < C - 1\n",
        ),
        Fault(
            "classes past the last win",
            "b_key = tl.where(m_c, _key(b_value, o_c), _NO_KEY)",
            "b_key = _key(b_value, o_c)",
        ),
        Fault(
            "rows exchanged",
            "b_value = interpolate(b_top, b_bottom, b_h0",
            "b_value = interpolate(b_bottom, b_top, b_h0",
        ),
        Fault(
            "images over one another",
            "p_label = p_labels + i_n * num_pixels + o_p",
            "p_label = p_labels + o_p",
        ),
        Fault(
            "int32 offsets of rows",
            "p_hi_row = p_image + o_y_hi.to(tl.int64) * stride_h",
            "p_hi_row = p_image + o_y_hi * stride_h",
        ),
        Fault(
            "int32 offsets of columns",
            "p_hi_row + o_x_hi.to(tl.int64) * stride_w",
            "p_hi_row + o_x_hi * stride_w",
        ),
        Fault(
            "int32 offsets of winners",
            "o_winner_d = _class_of(b_key_d).to(tl.int64) * stride_c",
            "o_winner_d = _class_of(b_key_d) * stride_c",
        ),
        Fault(
            "as many blocks as pixels fill",
            "(N * triton.cdiv(out_H * out_W, block_p),)",
            "(max(1, N * (out_H * out_W // block_p)),)",
        ),
        Fault(
            "scales exchanged",
            "        scale_h,\n        scale_w,\n        PRUNED",
            "        scale_w,\n        scale_h,\n        PRUNED",
        ),
    ],
    "deeplab_fast/backends/triton/upsample_cross_entropy.py": [
        Fault("triton: last cell not written", "mask=o_cell <= size)", "mask=o_cell < size)"),
        Fault(
            "triton: a halving too few", "out_size.bit_length(),", "(out_size - 1).bit_length(),"
        ),
        Fault(
            "triton: no block for the last cell's begin",
            "[(triton.cdiv(size + 1, block),)]",
            "[(triton.cdiv(size, block),)]",
        ),
        Fault(
            "triton: last classes forgotten",
            "triton.cdiv(num_cells, block_s), triton.cdiv(C, block_c)",
            "triton.cdiv(num_cells, block_s), max(C // block_c, 1)",
        ),
        Fault(
            "triton: last cells forgotten",
            "triton.cdiv(num_cells, block_s), triton.cdiv(C, block_c)",
            "max(num_cells // block_s, 1), triton.cdiv(C, block_c)",
        ),
        Fault(
            "triton: last elements forgotten",
            "(triton.cdiv(logits.numel(), block),)",
            "(max(logits.numel() // block, 1),)",
        ),
        Fault(
            "triton: last pixels forgotten",
            "num_blocks = N * triton.cdiv(out_H * out_W, block_p)",
            "num_blocks = N * max(out_H * out_W // block_p, 1)",
        ),
        Fault("triton: an element past the last", "m = o < num_logits", "m = o <= num_logits"),
        Fault(
            "triton: pixels past the last written",
            "tl.store(p_log_sum_exp + o_pixel, b_log_sum_exp, mask=m_p)",
            "tl.store(\n"
            "        p_log_sum_exp + i_n * num_pixels + tl.program_id(0) % num_blocks * BLOCK_P\n"
            "        + tl.arange(0, BLOCK_P),\n"
            "        b_log_sum_exp,\n"
            "    )",
        ),
        Fault(
            "triton: one block of a cell's columns",
            "range(0, tl.max(b_width, axis=0), BLOCK_X)",
            "range(0, 1, BLOCK_X)",
        ),
        Fault(
            "triton: no NaN for a bad target",
            'tl.where(m_counted & (m_known == 0), float("nan"), b_grad)',
            "b_grad",
        ),
        Fault(
            "triton: unused infinite weight",
            'MEAN=reduction == "mean",\n        SMOOTH=label_smoothing > 0,',
            'MEAN=reduction == "mean",\n        SMOOTH=True,',
        ),
        Fault(
            "triton: ignored pixels' NaN forgotten",
            "tl.where(m_pixel[None, :], b_grad_logit, 0.0)",
            "tl.where(m_counted[None, :], b_grad_logit, 0.0)",
        ),
        Fault(
            "triton: weights of ignored pixels count",
            "tl.where(m_counted, b_weight, 0.0)",
            "tl.where(m_p, b_weight, 0.0)",
        ),
        Fault(
            "triton: strided log-sum-exp as if contiguous",
            "log_sum_exp.contiguous(),",
            "log_sum_exp,",
        ),
    ],
}
