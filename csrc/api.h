// What the bindings see of the kernels: dtypes, shapes, status, launcher prototypes.
// Launchers take outputs, inputs, shape, dtype, then stream (CUDA) or num_threads (CPU).
// Strides are in elements. No framework header may be included anywhere under csrc/.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace deeplab_fast {

enum class DType : int { kFloat32, kFloat16, kBFloat16, kInt64, kInt32, kUInt8 };

// Bilinear upsampling of [N, C, H, W] logits (any strides) to [N, out_H, out_W] pixels.
// scale_*: source pixels per output pixel, as PyTorch computes them (see bilinear.h).
struct UpsampleShape {
  int64_t N, C, H, W;
  int64_t stride_N, stride_C, stride_H, stride_W;
  int64_t out_H, out_W;
  float scale_H, scale_W;
  bool align_corners;
};

// Rows of the work lists of a dilated convolution: common/zones.h.
struct Tap;
struct TapRectangle;
struct Tile;
struct WorkItem;
struct ListedPixel;
struct TileItem;
struct BoxItem;
struct Reduction;

// What the work list of the CUDA kernel is made for: tiles of kConvTile pixels, in jobs of
// num_taps * ceil(C / step) steps and one block per kConvTile output channels. A step is
// kConvStepBytes of one tap's input channels, the most that any source of the tile has.
constexpr int kConvTile = 128, kConvStepBytes = 64, kMaxConvBranches = 8;

// The same for the kernel of compute capability 9.0; its items are those of one worker, a cluster
// of thread blocks, after those of another.
constexpr int kConvTileSm90 = 256, kConvStepBytesSm90 = 128;

// Sums of the pixels of [N, num_pixels, C], on their way to means: [rows, C]. Pixels are taken in
// runs, over all images, and a run adds `parts` rows for each image that it has pixels of: from
// row (i + n) * parts on for run i and image n, which no other run and image has.
struct PixelRuns {
  int64_t N, num_pixels;
  int32_t C, run, parts;  // run: pixels
};

// PixelRuns::run and parts of ConvOutput::pixel_sums.
constexpr int kConvSumRun = kConvTileSm90 / 2, kConvSumParts = 4;

// On the GPU; partial sums take kConvTile * kConvTile floats per slot of the schedule.
struct ConvWork {
  const int32_t* pixels;
  const Tap* taps;
  const Tile* tiles;
  const WorkItem* items;
  const Reduction* reductions;
  int32_t num_items, num_reductions;
  const int32_t* first_items;  // [num_workers + 1]: where a worker's items begin
  int32_t num_workers;
  // The kernel for compute capability 9.0 reads these in the place of pixels, tiles and items; its
  // reduction reads pixels and tiles. No worker is idle.
  const ListedPixel* listed_pixels;
  const TileItem* tile_items;
};

// What the taps of one branch (Tap::branch) multiply: C channels of the input from first_channel
// on, and from first_weight on [num_taps, C] of a weight's row. A forward convolution reads the
// same channels in all branches; the gradient of its input reads those of one output each.
struct ConvSource {
  int32_t first_channel, C, first_weight;
};

// K channels of the output from first_channel on (Tile::output).
struct ConvOutput {
  const void* weight;       // [K, weight_stride], [C] of every tap in a row
  const void* bias;         // [K], or nullptr for zeros
  const float* image_bias;  // [N, K], or nullptr for zeros
  int32_t K, first_channel;
  int64_t weight_stride;
  float* pixel_sums;  // of the input, by a kernel that can and a 1x1 convolution; or nullptr
};

// Of an input [N, H, W, in_channels] and an output [N, H, W, out_channels].
struct ConvShape {
  int32_t H, W, in_channels, out_channels;
};

// What the sums become: clamp(sum + biases + residual, low, high), NaN staying NaN.
struct ConvEpilogue {
  const void* residual;  // in the layout of the output, which it may be; nullptr for zeros
  float low, high;
};

// Of the weight gradient: one job per rectangle, of ceil(N * h * w / step) steps of
// kConvStepBytes / sizeof(dtype) pixels, and ceil(K / kConvTile) * ceil(C / kConvTile) blocks,
// those of the same output channels next to each other. On the GPU; partial sums as for ConvWork.
// For compute capability 9.0: with its tile and step, items by workers as in ConvWork, and the
// pixels of whole boxes that cover the rectangle from its first on, x fastest, then y, then images.
struct ConvWgradWork {
  const TapRectangle* rectangles;
  const WorkItem* items;
  const Reduction* reductions;
  int32_t num_items, num_reductions;
  const int32_t* first_items;
  int32_t num_workers;
  int32_t box_x, box_y, box_n;  // kWgradBoxSm90 pixels; one for the other kernel
  const BoxItem* box_items;     // for compute capability 9.0 only, in the place of items
};

constexpr int kWgradBoxSm90 = 32;

struct ConvWgradBranch {
  void* grad_weight;  // [K, R, S, C]
  int32_t K, num_taps, first_channel;
};

// Of an input [N, H, W, C] and the gradient [N, H, W, out_channels] of the output.
struct ConvWgradShape {
  int32_t N, H, W, C, out_channels;
};

// The image-pooling branch of an ASPP over N images of C channels: P pooled, K projected.
struct AsppShape {
  int64_t N;
  int32_t C, P, K;
  int64_t project_stride;
};

struct AsppWeights {
  const void *pool, *pool_bias;        // [P, C] and [P]
  const void *project, *project_bias;  // [K, P], project_stride from row to row, and [K]
};

// Depthwise: input and output [N, H, W, C], weight [C, R, S]. Rates are at most H and W.
struct DepthwiseShape {
  int32_t N, H, W, C, R, S, rate_H, rate_W;
  int32_t strip_rows;  // that one thread computes
  bool mirrored;       // taps, as in the gradient of the input
};

// N * H * W is below 2^28. R * S times the channels of 128 bytes fit shared memory as floats:
// at most kMaxDepthwiseTaps.
constexpr int kMaxDepthwiseTaps = 361;

struct CrossEntropyTerms {
  const float* weight;  // [C], or nullptr for ones
  int64_t ignore_index;
  float label_smoothing;
};

// Over all pixels that are not ignored.
struct CrossEntropySums {
  double loss, weight;
  int64_t bad_pixel;  // the first whose target is no class, or -1
};

// kernel: the name of the kernel or step that failed; nullptr on success.
struct Status {
  const char* kernel = nullptr;
  const char* message = nullptr;
  bool ok() const { return kernel == nullptr; }
};

namespace cpu {

// labels [N, out_H, out_W] contiguous, kInt64 | kInt32 | kUInt8.
Status upsample_argmax_fwd(void* labels, const void* logits, const UpsampleShape& shape,
                           DType label_dtype, DType logit_dtype, int num_threads);

// loss [N, out_H, out_W] or nullptr; log_sum_exp, target the same shape; all contiguous.
// log_sum_exp is that of the upsampled centred logits: the source logits less their maximum over
// classes at each source pixel.
Status upsample_cross_entropy_fwd(float* loss, float* log_sum_exp, CrossEntropySums* sums,
                                  const float* logits, const int64_t* target,
                                  const UpsampleShape& shape, const CrossEntropyTerms& terms,
                                  int num_threads);

// grad_logits [N, C, H, W] contiguous; grad_loss [N, out_H, out_W] in the strides given.
Status upsample_cross_entropy_bwd(float* grad_logits, const float* grad_loss,
                                  const std::array<int64_t, 3>& grad_loss_strides,
                                  const float* log_sum_exp, const float* logits,
                                  const int64_t* target, const UpsampleShape& shape,
                                  const CrossEntropyTerms& terms, int num_threads);

}  // namespace cpu

#ifdef DEEPLAB_FAST_WITH_CUDA
namespace cuda {

// Versions as CUDA writes them (13.0 is 13000), 0 where there is no driver.
struct DeviceInfo {
  struct Device {
    std::string name;
    int major, minor;  // compute capability
  };
  int driver_version = 0, runtime_version = 0;
  std::vector<Device> devices;
};

DeviceInfo device_info();

// stream: a cudaStream_t of the current device.
Status upsample_argmax_fwd(void* labels, const void* logits, const UpsampleShape& shape,
                           DType label_dtype, DType logit_dtype, void* stream);

// Bytes of the workspace of upsample_cross_entropy_fwd or _bwd, aligned to 16.
int64_t upsample_cross_entropy_workspace(const UpsampleShape& shape, bool backward);

// loss, one number, or nullptr; pixel_losses [N, out_H, out_W] or nullptr; log_sum_exp and target
// as on the CPU. A target that is no class makes its loss NaN.
Status upsample_cross_entropy_fwd(float* loss, float* pixel_losses, float* log_sum_exp,
                                  float* total_weight, void* workspace, const void* logits,
                                  const int64_t* target, bool mean, const UpsampleShape& shape,
                                  const CrossEntropyTerms& terms, DType dtype, void* stream);

// grad_logits [N, C, H, W] in the logits' dtype, contiguous or channels_last. grad_loss as on the
// CPU, to be divided by total_weight unless that is nullptr.
Status upsample_cross_entropy_bwd(void* grad_logits, void* workspace, const float* grad_loss,
                                  const std::array<int64_t, 3>& grad_loss_strides,
                                  const float* total_weight, const float* log_sum_exp,
                                  const void* logits, const int64_t* target, bool channels_last,
                                  const UpsampleShape& shape, const CrossEntropyTerms& terms,
                                  DType dtype, void* stream);

// All outputs in one launch, none with pixel_sums. kFloat16 | kBFloat16 | kFloat32, multiplied as
// tf32, of input, output, residual, weights and biases. in_channels, all of a ConvSource, and
// weight_stride if there is more than one row, are multiples of 16 bytes; the tensors and the work
// list are aligned to 16 bytes, the biases need not be.
Status dilated_conv2d_fwd(void* output, float* partial_sums, const void* input,
                          const std::vector<ConvOutput>& outputs,
                          const std::vector<ConvSource>& sources, const ConvWork& work,
                          const ConvEpilogue& epilogue, const ConvShape& shape, DType dtype,
                          void* stream);

// The same for compute capability 9.0, in kFloat16 | kBFloat16, with pixel_sums. A source is that
// of the output of the same number, or of the only one.
Status dilated_conv2d_fwd_sm90(void* output, float* partial_sums, const void* input,
                               const std::vector<ConvOutput>& outputs,
                               const std::vector<ConvSource>& sources, const ConvWork& work,
                               const ConvEpilogue& epilogue, const ConvShape& shape, DType dtype,
                               void* stream);

// Which of two forms of dilated_conv2d_fwd_sm90 is launched from now on: whether the copies of
// pixels tell the consumers that they have arrived, or the threads that issued them. Until a GPU
// has shown which is faster. Returns what was set before.
bool set_copies_arrive(bool value);

// The gradients of all branches' weights, kFloat16 | kBFloat16 | kFloat32 (tf32 products) as input
// and grad_output, which are aligned to 16 bytes, as are C, K, first_channel and out_channels.
Status dilated_conv2d_wgrad(float* partial_sums, const void* grad_output, const void* input,
                            const std::vector<ConvWgradBranch>& branches, const ConvWgradWork& work,
                            const ConvWgradShape& shape, DType dtype, void* stream);

// The same for compute capability 9.0, in kFloat16 | kBFloat16. Pixels next to the rectangle of a
// tap are multiplied by zero: their Inf and NaN spread.
Status dilated_conv2d_wgrad_sm90(float* partial_sums, const void* grad_output, const void* input,
                                 const std::vector<ConvWgradBranch>& branches,
                                 const ConvWgradWork& work, const ConvWgradShape& shape,
                                 DType dtype, void* stream);

// grad_bias [K]: sums of grad_output [num_pixels, K], both aligned to 16 bytes.
// partial_sums [num_parts, K]: the pixels are summed in so many parts.
Status dilated_conv2d_bias_grad(void* grad_bias, float* partial_sums, const void* grad_output,
                                int64_t num_pixels, int32_t K, int32_t num_parts, DType dtype,
                                void* stream);

// The rows of runs of one part each. dtypes as above; C is a multiple of 16 bytes, to which input
// is aligned.
Status pixel_sums_fwd(float* sums, const void* input, const PixelRuns& runs, DType dtype,
                      void* stream);

// means [N, C] of the pixels whose sums these are. overlaps: the kernel may start while the one
// before it in the stream runs; compute capability 9.0.
Status pixel_means_fwd(float* means, const float* sums, const PixelRuns& runs, bool overlaps,
                       void* stream);

// What the pooled channels add to the projection: image_bias [N, K], from means [N, C] by way of
// pooled [N, P]. dtypes, of the weights, as above; C, P and project_stride are multiples of 16
// bytes, to which weights are aligned.
Status aspp_image_bias_fwd(float* image_bias, float* pooled, const float* means,
                           const AsppWeights& weights, const AsppShape& shape, DType dtype,
                           bool overlaps, void* stream);

// kFloat32 | kFloat16 | kBFloat16, summed in float32. bias [C] or nullptr. All but bias are aligned
// to 16 bytes.
Status depthwise_conv2d_fwd(void* output, const void* input, const void* weight, const void* bias,
                            const ConvEpilogue& epilogue, const DepthwiseShape& shape, DType dtype,
                            void* stream);

// grad_weight [C, R, S] and grad_bias [C], each or nullptr, of the same dtypes and alignment.
// partial_sums [num_parts, R * S + 1, C]: the pixels are summed in so many parts.
Status depthwise_conv2d_wgrad(void* grad_weight, void* grad_bias, float* partial_sums,
                              const void* grad_output, const void* input,
                              const DepthwiseShape& shape, int num_parts, DType dtype,
                              void* stream);

}  // namespace cuda
#endif

}  // namespace deeplab_fast
