# Compiled kernels (csrc/bindings). Addresses of tensors, streams and structs are int; csrc/api.h
# documents the arguments. The submodules are written as classes of static methods, because a stub
# file cannot contain modules.

from collections.abc import Sequence
from typing import ClassVar, TypedDict

class _BuildInfo(TypedDict):
    version: str
    compiler: str
    cuda: str | None
    architectures: list[str]

class _Device(TypedDict):
    name: str
    major: int
    minor: int

class _DeviceInfo(TypedDict):
    driver_version: int
    runtime_version: int
    devices: list[_Device]

class _WorkList(TypedDict):
    work_items: bytearray
    ctas: bytearray
    reductions: bytearray
    num_slots: int

def build_info() -> _BuildInfo: ...
def call_signature(arguments: tuple[object, ...], device: object) -> bytes: ...

CONV_TILE: int
CONV_K_ITER_BYTES: int
CONV_TILE_SM90: int
CONV_K_ITER_BYTES_SM90: int
WGRAD_BOX_SM90: int
MAX_CONV_BRANCHES: int
CONV_SUM_RUN: int
CONV_SUM_PARTS: int
MAX_DEPTHWISE_TAPS: int

class DType:
    float32: ClassVar[DType]
    float16: ClassVar[DType]
    bfloat16: ClassVar[DType]
    int64: ClassVar[DType]
    int32: ClassVar[DType]
    uint8: ClassVar[DType]
    __members__: ClassVar[dict[str, DType]]
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class UpsampleShape:
    def __init__(
        self,
        shape: Sequence[int],
        strides: Sequence[int],
        size: Sequence[int],
        scales: Sequence[float],
        align_corners: bool,
    ) -> None: ...

class ConvWork:
    def __init__(
        self,
        pixels: int,
        taps: int,
        tiles: int,
        items: int,
        reductions: int,
        num_items: int,
        num_reductions: int,
        first_items: int,
        num_ctas: int,
        listed_pixels: int = 0,
        tile_items: int = 0,
    ) -> None: ...

class ConvSource:
    def __init__(self, first_channel: int, C: int, first_weight: int) -> None: ...

class ConvOutput:
    def __init__(
        self,
        weight: int,
        bias: int,
        K: int,
        first_channel: int,
        weight_stride: int,
    ) -> None: ...

class ConvShape:
    def __init__(self, H: int, W: int, in_channels: int, out_channels: int) -> None: ...

class ConvArguments:
    def __init__(
        self,
        outputs: Sequence[ConvOutput],
        sources: Sequence[ConvSource],
        work: ConvWork,
        range: Sequence[float],
        shape: ConvShape,
        dtype: DType,
        summing_branch: int = -1,
    ) -> None: ...

class ConvWgradWork:
    def __init__(
        self,
        rectangles: int,
        items: int,
        reductions: int,
        num_items: int,
        num_reductions: int,
        first_items: int,
        num_ctas: int,
        box: Sequence[int],
        box_items: int = 0,
    ) -> None: ...

class ConvWgradShape:
    def __init__(self, N: int, H: int, W: int, C: int, out_channels: int) -> None: ...

class PixelRuns:
    def __init__(self, N: int, num_pixels: int, C: int, run: int, parts: int) -> None: ...

class AsppShape:
    def __init__(self, N: int, C: int, P: int, K: int, project_stride: int) -> None: ...

class AsppWeights:
    def __init__(self, pool: int, pool_bias: int, project: int, project_bias: int) -> None: ...

class DepthwiseShape:
    def __init__(
        self,
        size: Sequence[int],
        kernel: Sequence[int],
        dilation: Sequence[int],
        strip_rows: int,
        flipped: bool,
    ) -> None: ...

class CrossEntropyParams:
    def __init__(self, weight: int, ignore_index: int, label_smoothing: float) -> None: ...

class cpu:
    @staticmethod
    def upsample_argmax_fwd(
        labels: int,
        logits: int,
        shape: UpsampleShape,
        label_dtype: DType,
        logit_dtype: DType,
        num_threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def upsample_cross_entropy_fwd(
        loss: int,
        log_sum_exp: int,
        logits: int,
        target: int,
        shape: UpsampleShape,
        params: CrossEntropyParams,
        num_threads: int,
        /,
    ) -> tuple[float, float, int]: ...
    @staticmethod
    def upsample_cross_entropy_bwd(
        grad_logits: int,
        grad_loss: int,
        grad_loss_strides: Sequence[int],
        log_sum_exp: int,
        logits: int,
        target: int,
        shape: UpsampleShape,
        params: CrossEntropyParams,
        num_threads: int,
        /,
    ) -> None: ...

class schedule:
    @staticmethod
    def forward_tiles(
        plane: Sequence[int], branches: Sequence[Sequence[int]], block_m: int = 128
    ) -> tuple[bytearray, bytearray, bytearray]: ...
    @staticmethod
    def input_grad_tiles(
        plane: Sequence[int], branches: Sequence[Sequence[int]], block_m: int = 128
    ) -> tuple[bytearray, bytearray, bytearray]: ...
    @staticmethod
    def tap_rectangles(size: Sequence[int], branches: Sequence[Sequence[int]]) -> bytearray: ...
    @staticmethod
    def split_k(
        tiles: Sequence[Sequence[int]], num_ctas: int, split_cost: int, item_cost: int = 0
    ) -> _WorkList: ...

class cuda:  # only in a build with CUDA
    @staticmethod
    def device_info() -> _DeviceInfo: ...
    @staticmethod
    def upsample_argmax_fwd(
        labels: int,
        logits: int,
        shape: UpsampleShape,
        label_dtype: DType,
        logit_dtype: DType,
        stream: int,
        /,
    ) -> None: ...
    @staticmethod
    def upsample_cross_entropy_workspace(shape: UpsampleShape, backward: bool, /) -> int: ...
    @staticmethod
    def upsample_cross_entropy_fwd(
        loss: int,
        pixel_losses: int,
        log_sum_exp: int,
        total_weight: int,
        workspace: int,
        logits: int,
        target: int,
        mean: bool,
        shape: UpsampleShape,
        params: CrossEntropyParams,
        dtype: DType,
        stream: int,
        /,
    ) -> None: ...
    @staticmethod
    def upsample_cross_entropy_bwd(
        grad_logits: int,
        workspace: int,
        grad_loss: int,
        grad_loss_strides: Sequence[int],
        total_weight: int,
        log_sum_exp: int,
        logits: int,
        target: int,
        channels_last: bool,
        shape: UpsampleShape,
        params: CrossEntropyParams,
        dtype: DType,
        stream: int,
        /,
    ) -> None: ...
    @staticmethod
    def dilated_conv2d_fwd(
        output: int,
        partial_sums: int,
        input: int,
        residual: int,
        image_bias: int,
        pixel_sums: int,
        arguments: ConvArguments,
        stream: int,
        /,
    ) -> None: ...
    @staticmethod
    def dilated_conv2d_fwd_sm90(
        output: int,
        partial_sums: int,
        input: int,
        residual: int,
        image_bias: int,
        pixel_sums: int,
        arguments: ConvArguments,
        stream: int,
        /,
    ) -> None: ...
    @staticmethod
    def set_copies_arrive(value: bool, /) -> bool: ...
    @staticmethod
    def dilated_conv2d_wgrad(
        partial_sums: int,
        grad_output: int,
        input: int,
        branches: Sequence[tuple[int, int, int]],
        work: ConvWgradWork,
        shape: ConvWgradShape,
        dtype: DType,
        stream: int,
        /,
    ) -> None: ...
    @staticmethod
    def dilated_conv2d_wgrad_sm90(
        partial_sums: int,
        grad_output: int,
        input: int,
        branches: Sequence[tuple[int, int, int]],
        work: ConvWgradWork,
        shape: ConvWgradShape,
        dtype: DType,
        stream: int,
        /,
    ) -> None: ...
    @staticmethod
    def dilated_conv2d_bias_grad(
        grad_bias: int,
        partial_sums: int,
        grad_output: int,
        num_pixels: int,
        K: int,
        num_parts: int,
        dtype: DType,
        stream: int,
        /,
    ) -> None: ...
    @staticmethod
    def pixel_sums_fwd(
        sums: int, input: int, runs: PixelRuns, dtype: DType, stream: int, /
    ) -> None: ...
    @staticmethod
    def pixel_means_fwd(
        means: int, sums: int, runs: PixelRuns, overlaps: bool, stream: int, /
    ) -> None: ...
    @staticmethod
    def aspp_image_bias_fwd(
        image_bias: int,
        pooled: int,
        means: int,
        weights: AsppWeights,
        shape: AsppShape,
        dtype: DType,
        overlaps: bool,
        stream: int,
        /,
    ) -> None: ...
    @staticmethod
    def depthwise_conv2d_fwd(
        output: int,
        input: int,
        weight: int,
        bias: int,
        residual: int,
        range: Sequence[float],
        shape: DepthwiseShape,
        dtype: DType,
        stream: int,
        /,
    ) -> None: ...
    @staticmethod
    def depthwise_conv2d_wgrad(
        grad_weight: int,
        grad_bias: int,
        partial_sums: int,
        grad_output: int,
        input: int,
        shape: DepthwiseShape,
        num_parts: int,
        dtype: DType,
        stream: int,
        /,
    ) -> None: ...

class dry_run(cuda): ...  # the same launchers, which do nothing
