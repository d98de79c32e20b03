// Structs, dtypes and constants of api.h, for the launchers of `_C` and of the emulator's module.

#include <pybind11/stl.h>

#include <array>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "schedule/work_list.h"

namespace deeplab_fast::bindings {

void bind_structs(py::module_& m) {
  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("float16", DType::kFloat16)
      .value("bfloat16", DType::kBFloat16)
      .value("int64", DType::kInt64)
      .value("int32", DType::kInt32)
      .value("uint8", DType::kUInt8);
  py::class_<UpsampleShape>(m, "UpsampleShape")
      .def(py::init([](std::array<int64_t, 4> shape, std::array<int64_t, 4> strides,
                       std::array<int64_t, 2> size, std::array<float, 2> scales,
                       bool align_corners) {
             return UpsampleShape{shape[0],   shape[1],   shape[2],     shape[3], strides[0],
                                  strides[1], strides[2], strides[3],   size[0],  size[1],
                                  scales[0],  scales[1],  align_corners};
           }),
           "shape"_a, "strides"_a, "size"_a, "scales"_a, "align_corners"_a);
  py::class_<ConvWork>(m, "ConvWork")
      .def(py::init([](uintptr_t pixels, uintptr_t taps, uintptr_t tiles, uintptr_t items,
                       uintptr_t reductions, int32_t num_items, int32_t num_reductions,
                       uintptr_t first_items, int32_t num_ctas, uintptr_t listed_pixels,
                       uintptr_t tile_items) {
             return ConvWork{pointer<int32_t>(pixels),
                             pointer<Tap>(taps),
                             pointer<Tile>(tiles),
                             pointer<WorkItem>(items),
                             pointer<Reduction>(reductions),
                             num_items,
                             num_reductions,
                             pointer<int32_t>(first_items),
                             num_ctas,
                             pointer<ListedPixel>(listed_pixels),
                             pointer<TileItem>(tile_items)};
           }),
           "pixels"_a, "taps"_a, "tiles"_a, "items"_a, "reductions"_a, "num_items"_a,
           "num_reductions"_a, "first_items"_a, "num_ctas"_a, "listed_pixels"_a = 0,
           "tile_items"_a = 0);
  py::class_<ConvSource>(m, "ConvSource")
      .def(py::init([](int32_t first_channel, int32_t C, int32_t first_weight) {
             return ConvSource{first_channel, C, first_weight};
           }),
           "first_channel"_a, "C"_a, "first_weight"_a);
  py::class_<ConvOutput>(m, "ConvOutput")
      .def(py::init([](uintptr_t weight, uintptr_t bias, int32_t K, int32_t first_channel,
                       int64_t weight_stride) {
             return ConvOutput{pointer(weight), pointer(bias), nullptr, K,
                               first_channel,   weight_stride, nullptr};
           }),
           "weight"_a, "bias"_a, "K"_a, "first_channel"_a, "weight_stride"_a);
  py::class_<ConvShape>(m, "ConvShape")
      .def(py::init([](int32_t H, int32_t W, int32_t in_channels, int32_t out_channels) {
             return ConvShape{H, W, in_channels, out_channels};
           }),
           "H"_a, "W"_a, "in_channels"_a, "out_channels"_a);
  py::class_<ConvArguments>(m, "ConvArguments")
      .def(py::init([](std::vector<ConvOutput> outputs, std::vector<ConvSource> sources,
                       const ConvWork& work, std::array<float, 2> range, const ConvShape& shape,
                       DType dtype, int summing_branch) {
             return ConvArguments{std::move(outputs), std::move(sources), work, range, shape, dtype,
                                  summing_branch};
           }),
           "outputs"_a, "sources"_a, "work"_a, "range"_a, "shape"_a, "dtype"_a,
           "summing_branch"_a = -1, "range: of the activation.");
  py::class_<ConvWgradWork>(m, "ConvWgradWork")
      .def(py::init([](uintptr_t rectangles, uintptr_t items, uintptr_t reductions,
                       int32_t num_items, int32_t num_reductions, uintptr_t first_items,
                       int32_t num_ctas, std::array<int32_t, 3> box, uintptr_t box_items) {
             return ConvWgradWork{pointer<TapRectangle>(rectangles),
                                  pointer<WorkItem>(items),
                                  pointer<Reduction>(reductions),
                                  num_items,
                                  num_reductions,
                                  pointer<int32_t>(first_items),
                                  num_ctas,
                                  box[0],
                                  box[1],
                                  box[2],
                                  pointer<BoxItem>(box_items)};
           }),
           "rectangles"_a, "items"_a, "reductions"_a, "num_items"_a, "num_reductions"_a,
           "first_items"_a, "num_ctas"_a, "box"_a, "box_items"_a = 0, "box: (x, y, n).");
  py::class_<ConvWgradShape>(m, "ConvWgradShape")
      .def(py::init([](int32_t N, int32_t H, int32_t W, int32_t C, int32_t out_channels) {
             return ConvWgradShape{N, H, W, C, out_channels};
           }),
           "N"_a, "H"_a, "W"_a, "C"_a, "out_channels"_a);
  py::class_<PixelRuns>(m, "PixelRuns")
      .def(py::init([](int64_t N, int64_t num_pixels, int32_t C, int32_t run, int32_t parts) {
             return PixelRuns{N, num_pixels, C, run, parts};
           }),
           "N"_a, "num_pixels"_a, "C"_a, "run"_a, "parts"_a);
  py::class_<AsppShape>(m, "AsppShape")
      .def(py::init([](int64_t N, int32_t C, int32_t P, int32_t K, int64_t project_stride) {
             return AsppShape{N, C, P, K, project_stride};
           }),
           "N"_a, "C"_a, "P"_a, "K"_a, "project_stride"_a);
  py::class_<AsppWeights>(m, "AsppWeights")
      .def(py::init(
               [](uintptr_t pool, uintptr_t pool_bias, uintptr_t project, uintptr_t project_bias) {
                 return AsppWeights{pointer(pool), pointer(pool_bias), pointer(project),
                                    pointer(project_bias)};
               }),
           "pool"_a, "pool_bias"_a, "project"_a, "project_bias"_a);
  py::class_<DepthwiseShape>(m, "DepthwiseShape")
      .def(py::init([](std::array<int32_t, 4> size, std::array<int32_t, 2> kernel,
                       std::array<int32_t, 2> dilation, int32_t strip_rows, bool flipped) {
             return DepthwiseShape{size[0],   size[1],     size[2],     size[3],    kernel[0],
                                   kernel[1], dilation[0], dilation[1], strip_rows, flipped};
           }),
           "size"_a, "kernel"_a, "dilation"_a, "strip_rows"_a, "flipped"_a, "size: (N, H, W, C).");
  py::class_<CrossEntropyParams>(m, "CrossEntropyParams")
      .def(py::init([](uintptr_t weight, int64_t ignore_index, float label_smoothing) {
             return CrossEntropyParams{pointer<float>(weight), ignore_index, label_smoothing};
           }),
           "weight"_a, "ignore_index"_a, "label_smoothing"_a);
  m.attr("CONV_TILE") = kConvTile;
  m.attr("CONV_K_ITER_BYTES") = kConvKIterBytes;
  m.attr("CONV_TILE_SM90") = kConvTileSm90;
  m.attr("CONV_K_ITER_BYTES_SM90") = kConvKIterBytesSm90;
  m.attr("WGRAD_BOX_SM90") = kWgradBoxSm90;
  m.attr("MAX_CONV_BRANCHES") = kMaxConvBranches;
  m.attr("CONV_SUM_RUN") = kConvSumRun;
  m.attr("CONV_SUM_PARTS") = kConvSumParts;
  m.attr("MAX_DEPTHWISE_TAPS") = kMaxDepthwiseTaps;
}

}  // namespace deeplab_fast::bindings
