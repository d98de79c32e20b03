"""Definition of a fault, and the tests that must detect it."""

from __future__ import annotations

from typing import NamedTuple


class Guard(NamedTuple):
    """The tests that must detect the faults of a source file."""

    tests: str  # files, and what -k selects in them
    module: str = "_emulated"  # the one to compile, for csrc; the work lists are made by _C


class Fault(NamedTuple):
    name: str
    sound: str  # occurs once in the file
    faulty: str
    guard: Guard | None = None  # where it is not that of the file


ALLOCATOR = Guard("test_allocator.py")
ACCELERATE_REPORT = Guard("test_report.py test_accelerate_report.py")
CHECKS = Guard("test_checks.py")
ACCELERATED = Guard("test_inference_form.py not projects")
ACCELERATION_TRAIN = Guard("test_training_form.py not compiles_to_one_graph")
ARGMAX = Guard("test_upsample_argmax_rules.py test_upsample_argmax.py emulated")
ARGMAX_CPU = Guard(
    "test_upsample_argmax_rules.py test_upsample_argmax.py "
    "(cpu or outputs or streamed or half_precision or several_threads) and not emulated",
    "_C",
)
ARGMAX_TRITON = Guard(
    "test_upsample_argmax_rules.py test_upsample_argmax.py "
    "(triton or interpreter or interpreted) and not (compile or export or opcheck or real_logits)"
)
ASPP = Guard("test_aspp.py test_prepared_kernels.py prepared_kernels or emulated")
BACKBONES = Guard("test_backbones.py")
BACKWARD = Guard(
    "test_dilated_conv2d_backward.py test_dilated_conv2d.py seeds or backward and emulated"
)
BESIDE = Guard("test_dilated_conv2d_sm90.py beside")
CALLS = Guard(
    "test_kernel_calls.py test_workspaces.py test_tile_edges.py "
    "kernel_calls or workspaces or branches or along"
)
CHECKPOINTS = Guard("test_torch_file.py test_checkpoints.py torch_file or VainF and mobilenet")
COMPILED = Guard("test_compile.py copies")
CUDA_GRAPHS = Guard("test_cuda_graphs.py not compiles")
CONV = Guard("test_convolution_kernel.py test_dilated_conv2d.py convolution_kernel or emulated_")
EXPORT_ONNX = Guard("test_onnx.py")
EXPORT_TORCH = Guard("test_torch_export.py not aotinductor")
DEPTHWISE = Guard("test_dilated_conv2d.py test_fused_conv2d.py emulated and depthwise")
ENTROPY = Guard(
    "test_upsample_cross_entropy_limits.py test_upsample_cross_entropy.py "
    "emulated and not (compile or export or opcheck)"
)
ENTROPY_CPU = Guard("test_upsample_cross_entropy_limits.py cpu or threads_share", "_C")
ENTROPY_TRITON = Guard("test_upsample_cross_entropy_limits.py triton")
EXIF = Guard("test_exif.py")
EVALUATION = Guard("test_evaluation.py not command and not wrong_arguments")
FAR = "test_large_offsets.py"
FAR_CONV = Guard(f"{FAR} test_convolution or weight_gradient or bias_gradient or on_the_way")
FAR_CPU = Guard(f"{FAR} cpu", "_C")
FAR_DEPTHWISE = Guard(f"{FAR} depthwise")
FAR_MEANS = Guard(f"{FAR} means or pooled")
FAR_UPSAMPLING = Guard(f"{FAR} argmax or far_labels or cross_entropy")
FUSION = Guard("test_fusion.py not networks")
HUB = Guard("test_hub.py not imports_huggingface_hub")
MEAN = Guard("test_dilated_conv2d_and_mean.py emulated")
CHOICE = Guard("test_dispatch_table.py test_race.py")
NON_FINITE = Guard("test_non_finite.py sm_80 or sm_90")
NON_FINITE_CPU = Guard("test_non_finite.py cpu or prepared_model")
NON_FINITE_TRITON = Guard("test_non_finite.py triton")
OPENVINO = Guard("test_openvino.py")
PLANS = Guard("test_plans.py")
PLUS = Guard("test_deeplabv3plus.py test_conv.py not compile and not export")
RECIPE = Guard("test_recipe.py")
REGISTRATION = Guard("test_backends.py test_arguments.py not (side_effects or symbolic)")
SM90 = Guard("test_dilated_conv2d_sm90.py means or k_iteration_is")
SINGLE_ROW = Guard("test_dilated_conv2d_sm90.py any_stride")
SM90_FORMS = Guard("test_dilated_conv2d_sm90.py seeds_agree or pipeline or means")
COCO = Guard("test_coco.py")
LABEL_FORMATS = Guard("test_label_formats.py test_exif.py")
LAYOUTS = Guard(
    "test_layouts.py test_label_formats.py test_training_data.py not workers and not worker"
)
TRAINING_DATA = Guard("test_training_data.py")
TRANSFORMS = Guard("test_transforms.py not (compiled or model_and)")
TRITON_CALLS = Guard(
    "test_triton.py versions or distributions or unavailable_reason or widened or unsupported "
    "or together or needed or have_the_dtype or in_place"
)
TRITON_ASPP = Guard("test_triton.py different_images or image_bias")
TRITON_DENSE = Guard("test_triton_blocks.py not depthwise and not interpolation")
TRITON_DEPTHWISE = Guard("test_triton_blocks.py depthwise or dilation or strides")
TRITON_FAR = Guard("test_triton_blocks.py far")
TUNING = Guard("test_tuning.py test_tune.py")
VIDEO = Guard("test_video.py")
WGRAD = Guard("test_races.py test_dilated_conv2d_backward.py tiles or sums or emulated")
WGRAD_SM90 = Guard("test_dilated_conv2d_wgrad_sm90.py")

OVERLAY = Guard("test_overlay.py")
SEGMENT = Guard("test_segment_options.py not evaluation and not labelled_images")
SEGMENT_METHOD = Guard("test_segment.py command or views or dtype or int32 or wrong_arguments")

# Each file's guard; a fault can have its own instead.
LOSSES = Guard("test_losses.py not compiles and not dice_op and not training_step")

GUARDS = {
    "deeplab_fast/export/openvino.py": OPENVINO,
    "deeplab_fast/export/optional.py": OPENVINO,
    "deeplab_fast/export/quantization.py": OPENVINO,
    "deeplab_fast/acceleration/inference.py": ACCELERATED,
    "deeplab_fast/acceleration/labels.py": ACCELERATED,
    "deeplab_fast/acceleration/trial.py": ACCELERATED,
    "csrc/common/bilinear.h": ARGMAX,
    "csrc/common/half.h": ARGMAX_CPU,
    "csrc/bindings/call_signature.cpp": Guard("test_plans.py signature or another_call", "_C"),
    "csrc/schedule/split_k.cpp": Guard("test_split_k.py", "_C"),
    "csrc/schedule/tap_tiles.cpp": Guard("test_tap_tiles.py", "_C"),
    "csrc/schedule/work_list.h": CONV,
    "csrc/cpu/exp2_log2.h": ENTROPY_CPU,
    "csrc/cpu/stream.h": ARGMAX_CPU,
    "csrc/cpu/upsample_argmax.cpp": ARGMAX_CPU,
    "csrc/cpu/upsample_cross_entropy.cpp": ENTROPY_CPU,
    "csrc/cuda/aspp/aspp.cu": ASPP,
    "csrc/cuda/upsample/cells.cuh": ARGMAX,
    "csrc/cuda/conv/conv_epilogue.cuh": CONV,
    "csrc/cuda/depthwise/depthwise.cuh": DEPTHWISE,
    "csrc/cuda/depthwise/depthwise_conv2d.cu": DEPTHWISE,
    "csrc/cuda/depthwise/depthwise_conv2d_wgrad.cu": DEPTHWISE,
    "csrc/cuda/conv/dilated_conv2d.cu": CONV,
    "csrc/cuda/conv/dilated_conv2d_sm90.cu": Guard(
        "test_races.py test_dilated_conv2d_sm90.py "
        "sm_90 or seeds_agree or pipeline or epilogue or means or between_vectors"
    ),
    "csrc/cuda/conv/dilated_conv2d_wgrad.cu": WGRAD,
    "csrc/cuda/conv/dilated_conv2d_wgrad_sm90.cu": WGRAD_SM90,
    "csrc/cuda/common/elements.cuh": NON_FINITE,
    "csrc/cuda/conv/implicit_gemm.cuh": CONV,
    "csrc/cuda/common/pairs.cuh": NON_FINITE,
    "csrc/cuda/common/pipeline.cuh": SM90_FORMS,
    "csrc/cuda/aspp/pixel_means.cu": ASPP,
    "csrc/cuda/common/tensor_map.cuh": Guard(
        "test_dilated_conv2d_sm90.py test_cache_keys.py "
        "same_address or memory_of_others or more_weights"
    ),
    "csrc/cuda/upsample/upsample_argmax.cu": ARGMAX,
    "csrc/cuda/upsample/upsample_cross_entropy.cu": ENTROPY,
    "csrc/cuda/upsample/upsample_cross_entropy.cuh": ENTROPY,
    "csrc/cuda/upsample/upsample_cross_entropy_bwd.cu": ENTROPY,
    "csrc/cuda/upsample/upsample_cross_entropy_prepare.cu": ENTROPY,
    "csrc/cuda/conv/warp_mma.cuh": CONV,
    "csrc/cuda/conv/warp_rows.cuh": Guard(
        "test_races.py test_dilated_conv2d_sm90.py sm_90 or seeds_agree or epilogue"
    ),
    "csrc/cuda/conv/rectangle_walk.cuh": Guard("test_dilated_conv2d_backward.py rectangle"),
    "csrc/cuda/conv/wgrad_reduce.cuh": WGRAD_SM90,
    "deeplab_fast/_native/device_cache.py": Guard("test_device_cache.py test_cache_keys.py"),
    "deeplab_fast/backends/registry.py": REGISTRATION,
    "deeplab_fast/_io/images.py": SEGMENT,
    "deeplab_fast/_io/legend.py": OVERLAY,
    "deeplab_fast/_io/overlay.py": OVERLAY,
    "deeplab_fast/_io/palette_file.py": OVERLAY,
    "deeplab_fast/_io/video.py": VIDEO,
    "deeplab_fast/cli/__init__.py": ALLOCATOR,
    "deeplab_fast/cli/allocator.py": ALLOCATOR,
    "deeplab_fast/backends/cpu.py": NON_FINITE_CPU,
    "deeplab_fast/backends/cuda/device.py": Guard("test_cache_keys.py gpu"),
    "deeplab_fast/backends/cuda/aspp.py": Guard(
        "test_kernel_calls.py test_aspp.py pooled or aspp and (limits or emulated)"
    ),
    "deeplab_fast/_native/common.py": CALLS,
    "deeplab_fast/_native/limits.py": REGISTRATION,
    "deeplab_fast/_native/memory_format.py": REGISTRATION,
    "deeplab_fast/backends/cuda/depthwise_conv2d.py": Guard(
        "test_kernel_calls.py test_workspaces.py test_dilated_conv2d.py depthwise or rates_between"
    ),
    "deeplab_fast/backends/cuda/dilated_conv2d.py": CALLS,
    "deeplab_fast/backends/cuda/dilated_conv2d_and_mean.py": Guard(
        "test_workspaces.py test_tile_edges.py test_dilated_conv2d_sm90.py means"
    ),
    "deeplab_fast/backends/cuda/dilated_conv2d_backward.py": CALLS,
    "deeplab_fast/backends/cuda/fused_conv2d.py": Guard("test_fused_conv2d.py emulated"),
    "deeplab_fast/backends/cuda/upsample_cross_entropy.py": ENTROPY,
    "deeplab_fast/_native/work_lists.py": Guard(
        "test_kernel_calls.py test_cache_keys.py test_dilated_conv2d_sm90.py "
        "test_dilated_conv2d_wgrad_sm90.py "
        "kernel_calls or convolutions or boxes or box_items or fp32 or tile_items or beyond_16_bits"
    ),
    "deeplab_fast/backends/dispatch_table.py": CHOICE,
    "deeplab_fast/backends/race.py": CHOICE,
    "deeplab_fast/backends/explanation.py": Guard("test_explanation.py"),
    "deeplab_fast/backends/tuning.py": TUNING,
    "deeplab_fast/backends/calls.py": TUNING,
    "deeplab_fast/acceleration/accelerating.py": ACCELERATE_REPORT,
    "deeplab_fast/acceleration/counting.py": ACCELERATE_REPORT,
    "deeplab_fast/acceleration/flops.py": ACCELERATE_REPORT,
    "deeplab_fast/acceleration/report.py": ACCELERATE_REPORT,
    "deeplab_fast/cli/accelerate_report.py": ACCELERATE_REPORT,
    "deeplab_fast/cli/images.py": SEGMENT,
    "deeplab_fast/cli/results.py": SEGMENT,
    "deeplab_fast/cli/segment.py": SEGMENT,
    "deeplab_fast/cli/train.py": Guard(
        "test_training.py deeplabv3plus or another_network or contradict or wrong_atrous or default"
    ),
    "deeplab_fast/cli/tune.py": TUNING,
    "deeplab_fast/cli/video.py": VIDEO,
    "deeplab_fast/models/backbones/imagenet.py": BACKBONES,
    "deeplab_fast/models/backbones/mobilenet_v2.py": BACKBONES,
    "deeplab_fast/models/backbones/mobilenet_v3.py": BACKBONES,
    "deeplab_fast/models/backbones/resnet.py": BACKBONES,
    "deeplab_fast/models/backbones/timm_features.py": BACKBONES,
    "deeplab_fast/models/segmentation.py": TUNING,
    "deeplab_fast/models/checkpoints/torch_file.py": CHECKPOINTS,
    "deeplab_fast/models/checkpoints/state_dict.py": CHECKPOINTS,
    "deeplab_fast/models/checkpoints/safetensors_file.py": Guard(
        "test_weights.py files_of_version"
    ),
    "deeplab_fast/models/checkpoints/huggingface.py": Guard("test_weights.py transformers_network"),
    "deeplab_fast/models/checkpoints/checkpoint.py": CHECKPOINTS,
    "deeplab_fast/models/checkpoints/resnets.py": Guard("test_checkpoints.py relatives"),
    "deeplab_fast/models/checkpoints/segmentation_models_pytorch.py": Guard(
        "test_checkpoints.py segmentation_models_pytorch and not resnet50"
    ),
    "deeplab_fast/models/checkpoints/vainf.py": Guard("test_checkpoints.py VainF and mobilenet"),
    "deeplab_fast/models/checkpoints/jfzhang95.py": Guard(
        "test_checkpoints.py jfzhang95 and mobilenet"
    ),
    "deeplab_fast/models/checkpoints/mmsegmentation.py": Guard(
        "test_checkpoints.py mmsegmentation"
    ),
    "deeplab_fast/models/checkpoints/backbone_weights.py": Guard("test_backbone_weights.py"),
    "deeplab_fast/models/checkpoints/torchvision.py": Guard("test_convert.py"),
    "deeplab_fast/cli/convert.py": Guard("test_convert.py"),
    "deeplab_fast/models/checkpoints/folder.py": HUB,
    "deeplab_fast/models/cuda_graphs.py": CUDA_GRAPHS,
    "deeplab_fast/models/hub.py": HUB,
    "deeplab_fast/models/inference.py": NON_FINITE_CPU,
    "deeplab_fast/models/deeplab.py": PLUS,
    "deeplab_fast/models/deeplabv3plus.py": PLUS,
    "deeplab_fast/acceleration/convolutions.py": ACCELERATION_TRAIN,
    "deeplab_fast/acceleration/matching.py": ACCELERATION_TRAIN,
    "deeplab_fast/acceleration/module.py": ACCELERATION_TRAIN,
    "deeplab_fast/acceleration/rewritten.py": ACCELERATION_TRAIN,
    "deeplab_fast/acceleration/training.py": ACCELERATION_TRAIN,
    "deeplab_fast/nn/aspp.py": PLUS,
    "deeplab_fast/nn/pyramid.py": Guard("test_nn.py test_training_form.py not compiles"),
    "deeplab_fast/nn/conv.py": PLUS,
    "deeplab_fast/models/fusion/calls.py": FUSION,
    "deeplab_fast/models/fusion/layers.py": FUSION,
    "deeplab_fast/models/fusion/module.py": FUSION,
    "deeplab_fast/models/fusion/rewriting.py": FUSION,
    "deeplab_fast/models/fusion/tracing.py": FUSION,
    "deeplab_fast/nn/deferred.py": Guard("test_deferred.py not compile"),
    "deeplab_fast/nn/dice.py": LOSSES,
    "deeplab_fast/nn/loss.py": Guard("test_loss.py not compiles"),
    "deeplab_fast/nn/mmsegmentation.py": LOSSES,
    "deeplab_fast/ops/_arguments.py": REGISTRATION,
    "deeplab_fast/ops/shape_bucket.py": Guard(
        "test_dispatch_table.py test_cache_keys.py bucket or share"
    ),
    "deeplab_fast/ops/_register.py": REGISTRATION,
    "deeplab_fast/ops/_decomposition.py": Guard("test_decomposition.py"),
    "deeplab_fast/ops/_transforms.py": TRANSFORMS,
    "deeplab_fast/ops/aspp.py": REGISTRATION,
    "deeplab_fast/ops/dilated_conv2d.py": REGISTRATION,
    "deeplab_fast/ops/dilated_conv2d_and_mean.py": REGISTRATION,
    "deeplab_fast/ops/fused_conv2d.py": REGISTRATION,
    "deeplab_fast/ops/upsample.py": Guard("test_upsample.py"),
    "deeplab_fast/ops/nan_of_images.py": NON_FINITE_CPU,
    "deeplab_fast/_io/files.py": EXPORT_ONNX,
    "deeplab_fast/cli/export.py": Guard("test_export.py"),
    "deeplab_fast/export/check.py": Guard("test_check.py"),
    "deeplab_fast/export/metadata.py": EXPORT_ONNX,
    "deeplab_fast/export/onnx.py": EXPORT_ONNX,
    "deeplab_fast/export/program.py": EXPORT_ONNX,
    "deeplab_fast/export/torch_export.py": EXPORT_TORCH,
    "deeplab_fast/ops/upsample_argmax.py": REGISTRATION,
    "deeplab_fast/ops/upsample_class_sums.py": LOSSES,
    "deeplab_fast/ops/upsample_cross_entropy.py": REGISTRATION,
    "deeplab_fast/training/checkpoint.py": RECIPE,
    "deeplab_fast/training/checks.py": CHECKS,
    "deeplab_fast/training/label_counts.py": CHECKS,
    "deeplab_fast/_io/folders.py": LAYOUTS,
    "deeplab_fast/training/coco.py": COCO,
    "deeplab_fast/training/coco_labels.py": COCO,
    "deeplab_fast/training/coco_stuff.py": LAYOUTS,
    "deeplab_fast/training/colors.py": LABEL_FORMATS,
    "deeplab_fast/training/data.py": LABEL_FORMATS,
    "deeplab_fast/training/label_files.py": LABEL_FORMATS,
    "deeplab_fast/training/label_ids.py": LABEL_FORMATS,
    "deeplab_fast/training/patterns.py": LAYOUTS,
    "deeplab_fast/training/text_files.py": LAYOUTS,
    "deeplab_fast/training/distributed.py": RECIPE,
    "deeplab_fast/training/evaluation.py": EVALUATION,
    "deeplab_fast/models/preprocessing.py": EVALUATION,
    "deeplab_fast/models/sliding_window.py": EVALUATION,
    "deeplab_fast/training/layouts.py": LAYOUTS,
    "deeplab_fast/training/loader.py": TRAINING_DATA,
    "deeplab_fast/training/log.py": RECIPE,
    "deeplab_fast/training/loop.py": RECIPE,
    "deeplab_fast/training/metrics.py": EVALUATION,
    "deeplab_fast/training/objective.py": RECIPE,
    "deeplab_fast/training/recipe.py": RECIPE,
    "deeplab_fast/training/report.py": RECIPE,
    "deeplab_fast/training/run_folder.py": RECIPE,
    "deeplab_fast/training/schedule.py": RECIPE,
    "deeplab_fast/training/signals.py": RECIPE,
    "deeplab_fast/training/state.py": RECIPE,
    "deeplab_fast/training/step.py": RECIPE,
    "deeplab_fast/training/transforms.py": TRAINING_DATA,
    "deeplab_fast/backends/triton/device.py": TRITON_CALLS,
    "deeplab_fast/backends/triton/epilogue.py": NON_FINITE_TRITON,
    "deeplab_fast/backends/triton/dilated_conv2d_backward.py": NON_FINITE_TRITON,
    "deeplab_fast/backends/triton/fused_conv2d.py": TRITON_CALLS,
    "deeplab_fast/backends/triton/aspp.py": NON_FINITE_TRITON,
    "deeplab_fast/backends/triton/bilinear.py": Guard(
        "test_triton_blocks.py test_triton.py with_the_fma or fma_rounds_once"
    ),
    "deeplab_fast/backends/triton/depthwise_conv2d.py": NON_FINITE_TRITON,
    "deeplab_fast/backends/triton/block_sizes.py": TRITON_DENSE,
    "deeplab_fast/backends/triton/dilated_conv2d.py": NON_FINITE_TRITON,
    "deeplab_fast/backends/triton/tf32.py": NON_FINITE_TRITON,
    "deeplab_fast/backends/triton/work_lists.py": TRITON_DENSE,
    "deeplab_fast/backends/triton/upsample_argmax.py": ARGMAX_TRITON,
    "deeplab_fast/backends/triton/upsample_cross_entropy.py": ENTROPY_TRITON,
}
