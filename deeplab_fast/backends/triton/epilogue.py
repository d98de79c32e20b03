"""output = activation(sum + bias + residual), the end of every convolution kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_output(
    b_sum, p_output, p_bias, p_residual, o_pixel, m_pixel, o_channel, m_channel, out_channels,
    pixels_per_image, stride_bias, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Add bias and residual to the fp32 sums of a block, activate and store them."""
    m_output = m_pixel[:, None] & m_channel[None, :]
    o_output = o_pixel.to(tl.int64)[:, None] * out_channels + o_channel[None, :]
    if HAS_BIAS:
        o_image = (o_pixel // pixels_per_image).to(tl.int64)
        o_bias = (o_image * stride_bias)[:, None] + o_channel[None, :]
        b_sum += tl.load(p_bias + o_bias, mask=m_output, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b_sum += tl.load(p_residual + o_output, mask=m_output, other=0.0).to(tl.float32)
    if ACTIVATION != "none":
        b_sum = tl.where(b_sum < 0, 0.0, b_sum)  # NaN stays NaN
    if ACTIVATION == "relu6":
        b_sum = tl.where(b_sum > 6, 6.0, b_sum)
    tl.store(p_output + o_output, b_sum.to(p_output.dtype.element_ty), mask=m_output)
