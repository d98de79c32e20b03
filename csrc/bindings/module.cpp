// pybind11 module `_C`. Tensors arrive as raw addresses; deeplab_fast/cpu.py and cuda.py validate
// them before. A failed Status becomes a RuntimeError that names the kernel.
// Compiled a second time as `_emulated`: the CUDA kernels on the CPU, for `_C`'s dtypes and shapes.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "api.h"
#include "schedule/zones.h"
#ifdef DEEPLAB_FAST_EMULATED
#include "emulator/simt.h"
#endif

namespace py = pybind11;
using namespace py::literals;
using namespace deeplab_fast;

namespace {

void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(std::string(status.kernel) + ": " + status.message);
}

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

#ifdef DEEPLAB_FAST_WITH_CUDA
void bind_cuda(py::module_ m) {
  m.def(
      "device_info",
      [] {
        const cuda::DeviceInfo info = cuda::device_info();
        py::list devices;
        for (const auto& device : info.devices) {
          devices.append(
              py::dict("name"_a = device.name, "major"_a = device.major, "minor"_a = device.minor));
        }
        return py::dict("driver_version"_a = info.driver_version,
                        "runtime_version"_a = info.runtime_version, "devices"_a = devices);
      },
      "Driver and runtime version (13.0 is 13000, no driver 0) and the devices they see.");
  m.def("upsample_argmax_fwd", [](uintptr_t labels, uintptr_t logits, const UpsampleShape& shape,
                                  DType label_dtype, DType logit_dtype, uintptr_t stream) {
    check(cuda::upsample_argmax_fwd(pointer(labels), pointer(logits), shape, label_dtype,
                                    logit_dtype, pointer(stream)));
  });
  m.def("upsample_cross_entropy_workspace", &cuda::upsample_cross_entropy_workspace);
  m.def("upsample_cross_entropy_fwd",
        [](uintptr_t loss, uintptr_t pixel_losses, uintptr_t log_sum_exp, uintptr_t total_weight,
           uintptr_t workspace, uintptr_t logits, uintptr_t target, bool mean,
           const UpsampleShape& shape, const CrossEntropyTerms& terms, DType dtype,
           uintptr_t stream) {
          check(cuda::upsample_cross_entropy_fwd(
              static_cast<float*>(pointer(loss)), static_cast<float*>(pointer(pixel_losses)),
              static_cast<float*>(pointer(log_sum_exp)), static_cast<float*>(pointer(total_weight)),
              pointer(workspace), pointer(logits), static_cast<const int64_t*>(pointer(target)),
              mean, shape, terms, dtype, pointer(stream)));
        });
  m.def(
      "upsample_cross_entropy_bwd",
      [](uintptr_t grad_logits, uintptr_t workspace, uintptr_t grad_loss,
         std::array<int64_t, 3> grad_loss_strides, uintptr_t total_weight, uintptr_t log_sum_exp,
         uintptr_t logits, uintptr_t target, bool channels_last, const UpsampleShape& shape,
         const CrossEntropyTerms& terms, DType dtype, uintptr_t stream) {
        check(cuda::upsample_cross_entropy_bwd(
            pointer(grad_logits), pointer(workspace), static_cast<const float*>(pointer(grad_loss)),
            grad_loss_strides, static_cast<const float*>(pointer(total_weight)),
            static_cast<const float*>(pointer(log_sum_exp)), pointer(logits),
            static_cast<const int64_t*>(pointer(target)), channels_last, shape, terms, dtype,
            pointer(stream)));
      });
  const auto def_convolution = [&](const char* name, auto launcher) {
    m.def(name, [launcher](uintptr_t output, uintptr_t partial_sums, uintptr_t input,
                           const std::vector<ConvOutput>& outputs,
                           const std::vector<ConvSource>& sources, const ConvWork& work,
                           const ConvEpilogue& epilogue, const ConvShape& shape, DType dtype,
                           uintptr_t stream) {
      check(launcher(pointer(output), static_cast<float*>(pointer(partial_sums)), pointer(input),
                     outputs, sources, work, epilogue, shape, dtype, pointer(stream)));
    });
  };
  def_convolution("dilated_conv2d_fwd", cuda::dilated_conv2d_fwd);
  def_convolution("dilated_conv2d_fwd_sm90", cuda::dilated_conv2d_fwd_sm90);
  m.def("set_copies_arrive", cuda::set_copies_arrive);
  const auto def_wgrad = [&](const char* name, auto launcher) {
    m.def(
        name,
        [launcher](uintptr_t partial_sums, uintptr_t grad_output, uintptr_t input,
                   const std::vector<std::tuple<uintptr_t, int32_t, int32_t>>& rows,
                   const ConvWgradWork& work, const ConvWgradShape& shape, DType dtype,
                   uintptr_t stream) {
          std::vector<ConvWgradBranch> branches;
          int32_t first_channel = 0;
          for (const auto& [grad_weight, K, num_taps] : rows) {
            branches.push_back({pointer(grad_weight), K, num_taps, first_channel});
            first_channel += K;
          }
          check(launcher(static_cast<float*>(pointer(partial_sums)), pointer(grad_output),
                         pointer(input), branches, work, shape, dtype, pointer(stream)));
        },
        "Branches are (gradient of the weight, K, number of taps).");
  };
  def_wgrad("dilated_conv2d_wgrad", cuda::dilated_conv2d_wgrad);
  def_wgrad("dilated_conv2d_wgrad_sm90", cuda::dilated_conv2d_wgrad_sm90);
  m.def("dilated_conv2d_bias_grad",
        [](uintptr_t grad_bias, uintptr_t partial_sums, uintptr_t grad_output, int64_t num_pixels,
           int32_t K, int32_t num_parts, DType dtype, uintptr_t stream) {
          check(cuda::dilated_conv2d_bias_grad(
              pointer(grad_bias), static_cast<float*>(pointer(partial_sums)), pointer(grad_output),
              num_pixels, K, num_parts, dtype, pointer(stream)));
        });
  m.def("pixel_sums_fwd",
        [](uintptr_t sums, uintptr_t input, const PixelRuns& runs, DType dtype, uintptr_t stream) {
          check(cuda::pixel_sums_fwd(static_cast<float*>(pointer(sums)), pointer(input), runs,
                                     dtype, pointer(stream)));
        });
  m.def("pixel_means_fwd", [](uintptr_t means, uintptr_t sums, const PixelRuns& runs, bool overlaps,
                              uintptr_t stream) {
    check(cuda::pixel_means_fwd(static_cast<float*>(pointer(means)),
                                static_cast<const float*>(pointer(sums)), runs, overlaps,
                                pointer(stream)));
  });
  m.def("aspp_image_bias_fwd",
        [](uintptr_t image_bias, uintptr_t pooled, uintptr_t means, const AsppWeights& weights,
           const AsppShape& shape, DType dtype, bool overlaps, uintptr_t stream) {
          check(cuda::aspp_image_bias_fwd(static_cast<float*>(pointer(image_bias)),
                                          static_cast<float*>(pointer(pooled)),
                                          static_cast<const float*>(pointer(means)), weights, shape,
                                          dtype, overlaps, pointer(stream)));
        });
  m.def("depthwise_conv2d_fwd",
        [](uintptr_t output, uintptr_t input, uintptr_t weight, uintptr_t bias, uintptr_t residual,
           std::array<float, 2> range, const DepthwiseShape& shape, DType dtype, uintptr_t stream) {
          const ConvEpilogue epilogue{pointer(residual), range[0], range[1]};
          check(cuda::depthwise_conv2d_fwd(pointer(output), pointer(input), pointer(weight),
                                           pointer(bias), epilogue, shape, dtype, pointer(stream)));
        });
  m.def("depthwise_conv2d_wgrad",
        [](uintptr_t grad_weight, uintptr_t grad_bias, uintptr_t partial_sums,
           uintptr_t grad_output, uintptr_t input, const DepthwiseShape& shape, int num_parts,
           DType dtype, uintptr_t stream) {
          check(cuda::depthwise_conv2d_wgrad(
              pointer(grad_weight), pointer(grad_bias), static_cast<float*>(pointer(partial_sums)),
              pointer(grad_output), pointer(input), shape, num_parts, dtype, pointer(stream)));
        });
}
#endif

#ifdef DEEPLAB_FAST_EMULATED

void bind_emulator(py::module_& m) {
  m.def(
      "set_seed", [](uint64_t seed) { return std::exchange(emulator::options.seed, seed); },
      "Orders threads and asynchronous copies from now on; returns the seed until now.");
  m.def(
      "set_shared_memory_limit",
      [](size_t bytes) { return std::exchange(emulator::options.shared_memory_limit, bytes); },
      "Bytes that a block can have from now on; returns the limit until now.");
  m.def(
      "set_clusters",
      [](std::map<std::string, std::pair<int64_t, int64_t>> clusters) {
        return std::exchange(emulator::options.clusters, std::move(clusters));
      },
      "Runs only the clusters (begin, end) of the kernels named from now on; returns the ranges "
      "until now. A negative begin counts from the end.");
  m.def("launch_counts", &emulator::launch_counts, "How often each kernel was launched.");
}

}  // namespace

PYBIND11_MODULE(_emulated, m) {
  m.doc() = "The CUDA kernels of deeplab_fast in submodule cuda, compiled for the CPU.";
  py::module_::import("deeplab_fast._C");  // has the types that the launchers take
  bind_cuda(m.def_submodule("cuda"));
  bind_emulator(m);
}

#else

void bind_shapes(py::module_& m) {
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
           py::arg("shape"), py::arg("strides"), py::arg("size"), py::arg("scales"),
           py::arg("align_corners"));
  py::class_<ConvWork>(m, "ConvWork")
      .def(py::init([](uintptr_t pixels, uintptr_t taps, uintptr_t tiles, uintptr_t items,
                       uintptr_t reductions, int32_t num_items, int32_t num_reductions,
                       uintptr_t first_items, int32_t num_workers, uintptr_t listed_pixels,
                       uintptr_t tile_items) {
             return ConvWork{static_cast<const int32_t*>(pointer(pixels)),
                             static_cast<const Tap*>(pointer(taps)),
                             static_cast<const Tile*>(pointer(tiles)),
                             static_cast<const WorkItem*>(pointer(items)),
                             static_cast<const Reduction*>(pointer(reductions)),
                             num_items,
                             num_reductions,
                             static_cast<const int32_t*>(pointer(first_items)),
                             num_workers,
                             static_cast<const ListedPixel*>(pointer(listed_pixels)),
                             static_cast<const TileItem*>(pointer(tile_items))};
           }),
           py::arg("pixels"), py::arg("taps"), py::arg("tiles"), py::arg("items"),
           py::arg("reductions"), py::arg("num_items"), py::arg("num_reductions"),
           py::arg("first_items"), py::arg("num_workers"), py::arg("listed_pixels") = 0,
           py::arg("tile_items") = 0);
  py::class_<ConvSource>(m, "ConvSource")
      .def(py::init([](int32_t first_channel, int32_t C, int32_t first_weight) {
             return ConvSource{first_channel, C, first_weight};
           }),
           py::arg("first_channel"), py::arg("C"), py::arg("first_weight"));
  py::class_<ConvOutput>(m, "ConvOutput")
      .def(py::init([](uintptr_t weight, uintptr_t bias, uintptr_t image_bias, int32_t K,
                       int32_t first_channel, int64_t weight_stride, uintptr_t pixel_sums) {
             return ConvOutput{
                 pointer(weight), pointer(bias), static_cast<const float*>(pointer(image_bias)), K,
                 first_channel,   weight_stride, static_cast<float*>(pointer(pixel_sums))};
           }),
           py::arg("weight"), py::arg("bias"), py::arg("image_bias"), py::arg("K"),
           py::arg("first_channel"), py::arg("weight_stride"), py::arg("pixel_sums") = 0);
  py::class_<ConvShape>(m, "ConvShape")
      .def(py::init([](int32_t H, int32_t W, int32_t in_channels, int32_t out_channels) {
             return ConvShape{H, W, in_channels, out_channels};
           }),
           py::arg("H"), py::arg("W"), py::arg("in_channels"), py::arg("out_channels"));
  py::class_<ConvEpilogue>(m, "ConvEpilogue")
      .def(py::init([](uintptr_t residual, float low, float high) {
             return ConvEpilogue{pointer(residual), low, high};
           }),
           py::arg("residual"), py::arg("low"), py::arg("high"));
  py::class_<ConvWgradWork>(m, "ConvWgradWork")
      .def(py::init([](uintptr_t rectangles, uintptr_t items, uintptr_t reductions,
                       int32_t num_items, int32_t num_reductions, uintptr_t first_items,
                       int32_t num_workers, std::array<int32_t, 3> box, uintptr_t box_items) {
             return ConvWgradWork{static_cast<const TapRectangle*>(pointer(rectangles)),
                                  static_cast<const WorkItem*>(pointer(items)),
                                  static_cast<const Reduction*>(pointer(reductions)),
                                  num_items,
                                  num_reductions,
                                  static_cast<const int32_t*>(pointer(first_items)),
                                  num_workers,
                                  box[0],
                                  box[1],
                                  box[2],
                                  static_cast<const BoxItem*>(pointer(box_items))};
           }),
           py::arg("rectangles"), py::arg("items"), py::arg("reductions"), py::arg("num_items"),
           py::arg("num_reductions"), py::arg("first_items"), py::arg("num_workers"),
           py::arg("box"), py::arg("box_items") = 0, "box: (x, y, n).");
  py::class_<ConvWgradShape>(m, "ConvWgradShape")
      .def(py::init([](int32_t N, int32_t H, int32_t W, int32_t C, int32_t out_channels) {
             return ConvWgradShape{N, H, W, C, out_channels};
           }),
           py::arg("N"), py::arg("H"), py::arg("W"), py::arg("C"), py::arg("out_channels"));
  m.attr("CONV_TILE") = kConvTile;
  m.attr("CONV_STEP_BYTES") = kConvStepBytes;
  m.attr("CONV_TILE_SM90") = kConvTileSm90;
  m.attr("CONV_STEP_BYTES_SM90") = kConvStepBytesSm90;
  m.attr("WGRAD_BOX_SM90") = kWgradBoxSm90;
  m.attr("MAX_CONV_BRANCHES") = kMaxConvBranches;
  m.attr("CONV_SUM_RUN") = kConvSumRun;
  m.attr("CONV_SUM_PARTS") = kConvSumParts;
  py::class_<PixelRuns>(m, "PixelRuns")
      .def(py::init([](int64_t N, int64_t num_pixels, int32_t C, int32_t run, int32_t parts) {
             return PixelRuns{N, num_pixels, C, run, parts};
           }),
           py::arg("N"), py::arg("num_pixels"), py::arg("C"), py::arg("run"), py::arg("parts"));
  py::class_<AsppShape>(m, "AsppShape")
      .def(py::init([](int64_t N, int32_t C, int32_t P, int32_t K, int64_t project_stride) {
             return AsppShape{N, C, P, K, project_stride};
           }),
           py::arg("N"), py::arg("C"), py::arg("P"), py::arg("K"), py::arg("project_stride"));
  py::class_<AsppWeights>(m, "AsppWeights")
      .def(py::init(
               [](uintptr_t pool, uintptr_t pool_bias, uintptr_t project, uintptr_t project_bias) {
                 return AsppWeights{pointer(pool), pointer(pool_bias), pointer(project),
                                    pointer(project_bias)};
               }),
           py::arg("pool"), py::arg("pool_bias"), py::arg("project"), py::arg("project_bias"));
  py::class_<DepthwiseShape>(m, "DepthwiseShape")
      .def(py::init([](std::array<int32_t, 4> size, std::array<int32_t, 2> kernel,
                       std::array<int32_t, 2> rates, int32_t strip_rows, bool mirrored) {
             return DepthwiseShape{size[0],   size[1],  size[2],  size[3],    kernel[0],
                                   kernel[1], rates[0], rates[1], strip_rows, mirrored};
           }),
           py::arg("size"), py::arg("kernel"), py::arg("rates"), py::arg("strip_rows"),
           py::arg("mirrored"), "size: (N, H, W, C).");
  m.attr("MAX_DEPTHWISE_TAPS") = kMaxDepthwiseTaps;
  py::class_<CrossEntropyTerms>(m, "CrossEntropyTerms")
      .def(py::init([](uintptr_t weight, int64_t ignore_index, float label_smoothing) {
             return CrossEntropyTerms{static_cast<const float*>(pointer(weight)), ignore_index,
                                      label_smoothing};
           }),
           py::arg("weight"), py::arg("ignore_index"), py::arg("label_smoothing"));
}

void bind_cpu(py::module_ m) {
  m.def("upsample_argmax_fwd", [](uintptr_t labels, uintptr_t logits, const UpsampleShape& shape,
                                  DType label_dtype, DType logit_dtype, int num_threads) {
    py::gil_scoped_release release;
    check(cpu::upsample_argmax_fwd(pointer(labels), pointer(logits), shape, label_dtype,
                                   logit_dtype, num_threads));
  });
  m.def(
      "upsample_cross_entropy_fwd",
      [](uintptr_t loss, uintptr_t log_sum_exp, uintptr_t logits, uintptr_t target,
         const UpsampleShape& shape, const CrossEntropyTerms& terms, int num_threads) {
        CrossEntropySums sums;
        {
          py::gil_scoped_release release;
          check(cpu::upsample_cross_entropy_fwd(
              static_cast<float*>(pointer(loss)), static_cast<float*>(pointer(log_sum_exp)), &sums,
              static_cast<const float*>(pointer(logits)),
              static_cast<const int64_t*>(pointer(target)), shape, terms, num_threads));
        }
        return py::make_tuple(sums.loss, sums.weight, sums.bad_pixel);
      },
      "Returns the sums of losses and weights, and the first pixel whose target is no class or "
      "-1.");
  m.def("upsample_cross_entropy_bwd",
        [](uintptr_t grad_logits, uintptr_t grad_loss, std::array<int64_t, 3> grad_loss_strides,
           uintptr_t log_sum_exp, uintptr_t logits, uintptr_t target, const UpsampleShape& shape,
           const CrossEntropyTerms& terms, int num_threads) {
          py::gil_scoped_release release;
          check(cpu::upsample_cross_entropy_bwd(
              static_cast<float*>(pointer(grad_logits)),
              static_cast<const float*>(pointer(grad_loss)), grad_loss_strides,
              static_cast<const float*>(pointer(log_sum_exp)),
              static_cast<const float*>(pointer(logits)),
              static_cast<const int64_t*>(pointer(target)), shape, terms, num_threads));
        });
}

// Structs of int32 as a buffer of [rows, fields].
template <typename Row>
py::bytearray int32_rows(const std::vector<Row>& rows) {
  static_assert(std::is_trivially_copyable_v<Row> && sizeof(Row) % sizeof(int32_t) == 0);
  return py::bytearray(reinterpret_cast<const char*>(rows.data()), rows.size() * sizeof(Row));
}

// (kernel_H, kernel_W, dilation_H, dilation_W) each.
std::vector<Branch> to_branches(const std::vector<std::array<int32_t, 4>>& rows) {
  std::vector<Branch> branches;
  for (const auto& row : rows) branches.push_back({row[0], row[1], row[2], row[3]});
  return branches;
}

void bind_zones(py::module_ m) {
  m.doc() = "Work lists of dilated convolution (common/zones.h), each a bytearray of int32 rows.";
  const auto def_tiles = [&](const char* name, auto list_tiles, const char* doc) {
    m.def(
        name,
        [list_tiles](std::array<int32_t, 3> plane, const std::vector<std::array<int32_t, 4>>& rows,
                     int32_t block_m) {
          const std::vector<Branch> branches = to_branches(rows);
          TileList list;
          {
            py::gil_scoped_release release;
            list = list_tiles(Plane{plane[0], plane[1], plane[2]}, branches, block_m);
          }
          return py::make_tuple(int32_rows(list.pixels), int32_rows(list.taps),
                                int32_rows(list.tiles));
        },
        "plane"_a, "branches"_a, "block_m"_a = 128, doc);
  };
  def_tiles("forward_tiles", list_forward_tiles,
            "(N, H, W), [(kernel_H, kernel_W, dilation_H, dilation_W)] -> pixels, taps, tiles.");
  def_tiles("input_grad_tiles", list_input_grad_tiles,
            "(N, H, W), [(kernel_H, kernel_W, dilation_H, dilation_W)] -> pixels, taps, tiles.");
  m.def(
      "tap_rectangles",
      [](std::array<int32_t, 2> size, const std::vector<std::array<int32_t, 4>>& rows) {
        return int32_rows(list_tap_rectangles(to_branches(rows), size[0], size[1]));
      },
      "size"_a, "branches"_a, "(H, W), branches -> tap rectangles of the weight gradient.");
  m.def(
      "rectangle_walk",
      [](std::array<int32_t, 2> size, std::array<int32_t, 4> rectangle, int32_t first, int32_t step,
         int32_t num_steps) {
        const auto [H, W] = size;
        const auto [y, x, h, w] = rectangle;
        const TapRectangle of = {{}, y, x, h, w};
        RectanglePixel pixel = rectangle_pixel(of, H, W, first);
        std::vector<int32_t> pixels;
        for (int32_t i = 0; i < num_steps; ++i) {
          pixels.push_back(pixel.index);
          advance(pixel, rectangle_step(of, H, W, step));
        }
        return int32_rows(pixels);
      },
      "size"_a, "rectangle"_a, "first"_a, "step"_a, "num_steps"_a,
      "(H, W), (y, x, h, w) -> the pixels first, first + step, ... of the rectangle in all "
      "images.");
  m.def(
      "schedule",
      [](const std::vector<std::array<int32_t, 2>>& rows, int32_t num_workers,
         int32_t split_overhead, int32_t item_overhead) {
        std::vector<Job> jobs;
        for (const auto& row : rows) jobs.push_back({row[0], row[1]});
        const Schedule schedule = make_schedule(jobs, num_workers, split_overhead, item_overhead);
        return py::dict("items"_a = int32_rows(schedule.items),
                        "workers"_a = int32_rows(schedule.workers),
                        "reductions"_a = int32_rows(schedule.reductions),
                        "num_slots"_a = schedule.num_slots, "makespan"_a = schedule.makespan);
      },
      "jobs"_a, "num_workers"_a, "split_overhead"_a, "item_overhead"_a = 0,
      "[(steps, blocks)] -> items longest first and their workers, reductions, number of slots and "
      "makespan.");
}

py::dict build_info() {
#ifdef DEEPLAB_FAST_WITH_CUDA
  const py::object cuda = py::str(DEEPLAB_FAST_CUDA_VERSION);
  const py::object architectures = py::str(DEEPLAB_FAST_CUDA_ARCHITECTURES).attr("split")();
#else
  const py::object cuda = py::none();
  const py::object architectures = py::list();
#endif
  return py::dict("version"_a = DEEPLAB_FAST_VERSION, "compiler"_a = DEEPLAB_FAST_CXX_COMPILER,
                  "cuda"_a = cuda, "architectures"_a = architectures);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of deeplab_fast: submodules cpu, zones, and cuda where built.";
  m.def("build_info", &build_info, "Package version, C++ compiler, CUDA version or None.");
  bind_shapes(m);
  bind_cpu(m.def_submodule("cpu"));
  bind_zones(m.def_submodule("zones"));
#ifdef DEEPLAB_FAST_WITH_CUDA
  bind_cuda(m.def_submodule("cuda"));
#endif
}

#endif
