// Interface between bindings and kernels: dtypes, shapes, status, launcher prototypes.
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

// Rows of the work lists of a dilated convolution: schedule/work_list.h.
struct Tap;
struct TapRectangle;
struct Tile;
struct WorkItem;
struct ListedPixel;
struct TileItem;
struct BoxItem;
struct Reduction;

// Sizes of the CUDA kernels, on which work lists depend. An output tile is kConvTile pixels x
// kConvTile output channels. A k-iteration is kConvKIterBytes of one tap's input channels. A tile
// has num_taps * ceil(C / channels of a k-iteration) k-iterations, where C is the largest number of
// channels of its sources.
constexpr int kConvTile = 128, kConvKIterBytes = 64, kMaxConvBranches = 8;

// The same for the kernels of compute capability 9.0. There a cluster of two CTAs computes a work
// item, and stands in the work list in place of a CTA.
constexpr int kConvTileSm90 = 256, kConvKIterBytesSm90 = 128;

// Partial sums [rows, C] over the pixels of [N, num_pixels, C], from which the means are computed.
// Pixels are summed in runs of `run` pixels, counted over all images. A run writes `parts` rows for
// each image that it has pixels of: those of run i and image n are the rows from (i + n) * parts
// on.
struct PixelRuns {
  int64_t N, num_pixels;
  int32_t C, run, parts;
};

// PixelRuns::run and PixelRuns::parts of the rows that ConvOutput::pixel_sums points to.
constexpr int kConvSumRun = kConvTileSm90 / 2, kConvSumParts = 4;

// Work list of a convolution, in device memory. A workspace slot is kConvTile * kConvTile floats.
struct ConvWork {
  const int32_t* pixels;
  const Tap* taps;
  const Tile* tiles;
  const WorkItem* items;
  const Reduction* reductions;
  int32_t num_items, num_reductions;
  const int32_t* first_items;  // [num_ctas + 1]: index of the first item of each CTA
  int32_t num_ctas;            // CTAs that have at least one item
  // The main kernel for compute capability 9.0 reads the next two instead of pixels, tiles and
  // items; its reduction kernel reads pixels and tiles.
  const ListedPixel* listed_pixels;
  const TileItem* tile_items;
};

// Operands of the taps of one branch (Tap::branch): C input channels from first_channel on, and
// [num_taps, C] weights from element first_weight of each row on. All branches of a forward
// convolution read the same channels. For the input gradient each branch reads the channels of its
// own output.
struct ConvSource {
  int32_t first_channel, C, first_weight;
};

// One output (Tile::output): K channels of the output tensor from first_channel on.
struct ConvOutput {
  const void* weight;       // [K, weight_stride]; a row holds the C weights of every tap
  const void* bias;         // [K], or nullptr for zeros
  const float* image_bias;  // [N, K], or nullptr for zeros
  int32_t K, first_channel;
  int64_t weight_stride;
  float* pixel_sums;  // PixelRuns rows: sums of the input of a 1x1 convolution; or nullptr
};

// Input [N, H, W, in_channels], output [N, H, W, out_channels].
struct ConvShape {
  int32_t H, W, in_channels, out_channels;
};

// Epilogue: clamp(sum + biases + residual, low, high); NaN stays NaN.
struct ConvEpilogue {
  const void* residual;  // has the layout of the output and may alias it; nullptr for zeros
  float low, high;
};

// Work list of a weight gradient, in device memory. Workspace slots are as in ConvWork. The
// rectangle of a tap takes the place of a pixel tile. It has ceil(N * h * w / pixels of a
// k-iteration) k-iterations of kConvKIterBytes / sizeof(dtype) pixels, and ceil(K / kConvTile) *
// ceil(C / kConvTile) blocks; blocks of the same output channels are neighbours. For compute
// capability 9.0 a k-iteration consists of whole boxes of pixels. The boxes cover the rectangle
// from its first pixel on: x changes fastest, then y, then the image.
struct ConvWgradWork {
  const TapRectangle* rectangles;
  const WorkItem* items;
  const Reduction* reductions;
  int32_t num_items, num_reductions;
  const int32_t* first_items;  // [num_ctas + 1], as in ConvWork
  int32_t num_ctas;
  int32_t box_x, box_y, box_n;  // kWgradBoxSm90 pixels in total; 1 x 1 x 1 for the sm_80 kernel
  const BoxItem* box_items;     // for compute capability 9.0, instead of items
};

constexpr int kWgradBoxSm90 = 32;

struct ConvWgradBranch {
  void* grad_weight;  // [K, R, S, C]
  int32_t K, num_taps, first_channel;
};

// Input [N, H, W, C], gradient of the output [N, H, W, out_channels].
struct ConvWgradShape {
  int32_t N, H, W, C, out_channels;
};

// Image-pooling branch of an ASPP: N images with C channels, P pooled and K projected channels.
struct AsppShape {
  int64_t N;
  int32_t C, P, K;
  int64_t project_stride;
};

struct AsppWeights {
  const void *pool, *pool_bias;        // [P, C] and [P]
  const void *project, *project_bias;  // [K, P], rows project_stride apart, and [K]
};

// Depthwise convolution: input and output [N, H, W, C], weight [C, R, S]. The dilation is at most
// H and W, N * H * W is below 2^28, and R * S is at most kMaxDepthwiseTaps.
struct DepthwiseShape {
  int32_t N, H, W, C, R, S, dilation_H, dilation_W;
  int32_t strip_rows;  // rows that one thread computes
  bool flipped;        // flips the taps, for the input gradient
};

// With this number of taps the fp32 weights for the channels in 128 bytes fit into the shared
// memory of a block.
constexpr int kMaxDepthwiseTaps = 361;

struct CrossEntropyParams {
  const float* weight;  // [C], or nullptr for ones
  int64_t ignore_index;
  float label_smoothing;
};

// Sums over all pixels that are not ignored.
struct CrossEntropySums {
  double loss, weight;
  int64_t bad_pixel;  // the first pixel whose target is not a class, or -1
};

// Result of a launcher: success, or an error message and where it came from.
struct Status {
  const char* kernel = nullptr;  // name of the kernel or API call that failed
  const char* message = nullptr;
  bool ok() const { return kernel == nullptr; }
};

namespace cpu {

// labels [N, out_H, out_W] contiguous, kInt64 | kInt32 | kUInt8.
Status upsample_argmax_fwd(void* labels, const void* logits, const UpsampleShape& shape,
                           DType label_dtype, DType logit_dtype, int num_threads);

// loss [N, out_H, out_W] or nullptr; log_sum_exp and target have the same shape; all are
// contiguous. log_sum_exp belongs to the upsampled centred logits: the source logits minus their
// maximum over classes at each source pixel.
Status upsample_cross_entropy_fwd(float* loss, float* log_sum_exp, CrossEntropySums* sums,
                                  const float* logits, const int64_t* target,
                                  const UpsampleShape& shape, const CrossEntropyParams& params,
                                  int num_threads);

// grad_logits [N, C, H, W] contiguous; grad_loss [N, out_H, out_W] with the strides given.
Status upsample_cross_entropy_bwd(float* grad_logits, const float* grad_loss,
                                  const std::array<int64_t, 3>& grad_loss_strides,
                                  const float* log_sum_exp, const float* logits,
                                  const int64_t* target, const UpsampleShape& shape,
                                  const CrossEntropyParams& params, int num_threads);

}  // namespace cpu

namespace cuda {

// Versions are numbers as in the CUDA API: 13.0 is 13000. They are 0 if there is no driver.
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

// Bytes of workspace that upsample_cross_entropy_fwd or _bwd needs, aligned to 16 bytes.
int64_t upsample_cross_entropy_workspace(const UpsampleShape& shape, bool backward);

// loss: one number, or nullptr; pixel_losses [N, out_H, out_W] or nullptr; log_sum_exp and target
// as on the CPU. A target that is not a class makes the loss NaN.
Status upsample_cross_entropy_fwd(float* loss, float* pixel_losses, float* log_sum_exp,
                                  float* total_weight, void* workspace, const void* logits,
                                  const int64_t* target, bool mean, const UpsampleShape& shape,
                                  const CrossEntropyParams& params, DType dtype, void* stream);

// grad_logits [N, C, H, W] in the logits' dtype, contiguous or channels_last. grad_loss as on the
// CPU; it is divided by total_weight unless that is nullptr.
Status upsample_cross_entropy_bwd(void* grad_logits, void* workspace, const float* grad_loss,
                                  const std::array<int64_t, 3>& grad_loss_strides,
                                  const float* total_weight, const float* log_sum_exp,
                                  const void* logits, const int64_t* target, bool channels_last,
                                  const UpsampleShape& shape, const CrossEntropyParams& params,
                                  DType dtype, void* stream);

// Computes all outputs in one launch; none may have pixel_sums. Input, output, residual, weights
// and biases are kFloat16 | kBFloat16 | kFloat32 (multiplied as TF32). in_channels, the fields of a
// ConvSource and, if there is more than one row, weight_stride are multiples of 16 bytes. Tensors
// and work list are aligned to 16 bytes, except biases.
Status dilated_conv2d_fwd(void* output, float* partial_sums, const void* input,
                          const std::vector<ConvOutput>& outputs,
                          const std::vector<ConvSource>& sources, const ConvWork& work,
                          const ConvEpilogue& epilogue, const ConvShape& shape, DType dtype,
                          void* stream);

// The same for compute capability 9.0, in kFloat16 | kBFloat16; outputs may have pixel_sums. Either
// source i belongs to output i, or all sources belong to the only output.
Status dilated_conv2d_fwd_sm90(void* output, float* partial_sums, const void* input,
                               const std::vector<ConvOutput>& outputs,
                               const std::vector<ConvSource>& sources, const ConvWork& work,
                               const ConvEpilogue& epilogue, const ConvShape& shape, DType dtype,
                               void* stream);

// Chooses between two versions of dilated_conv2d_fwd_sm90, until a GPU has shown which is faster.
// true: the pixel copies themselves signal their arrival to the consumers. false: the threads that
// issued the copies do. Returns the previous value.
bool set_copies_arrive(bool value);

// Gradients of all branches' weights. The gradients, input and grad_output are kFloat16 | kBFloat16
// | kFloat32 (multiplied as TF32). input and grad_output are aligned to 16 bytes; C, K,
// first_channel and out_channels are multiples of 16 bytes.
Status dilated_conv2d_wgrad(float* partial_sums, const void* grad_output, const void* input,
                            const std::vector<ConvWgradBranch>& branches, const ConvWgradWork& work,
                            const ConvWgradShape& shape, DType dtype, void* stream);

// The same for compute capability 9.0, in kFloat16 | kBFloat16. It multiplies pixels next to a
// tap's rectangle by zero, so Inf and NaN in them reach the gradient.
Status dilated_conv2d_wgrad_sm90(float* partial_sums, const void* grad_output, const void* input,
                                 const std::vector<ConvWgradBranch>& branches,
                                 const ConvWgradWork& work, const ConvWgradShape& shape,
                                 DType dtype, void* stream);

// grad_bias [K]: sums over the pixels of grad_output [num_pixels, K], both aligned to 16 bytes.
// partial_sums [num_parts, K]: workspace; the pixels are summed in num_parts parts.
Status dilated_conv2d_bias_grad(void* grad_bias, float* partial_sums, const void* grad_output,
                                int64_t num_pixels, int32_t K, int32_t num_parts, DType dtype,
                                void* stream);

// Writes the rows of `runs`, which has one part per run. dtypes as above; C is a multiple of 16
// bytes, and input is aligned to 16 bytes.
Status pixel_sums_fwd(float* sums, const void* input, const PixelRuns& runs, DType dtype,
                      void* stream);

// means [N, C] over the pixels of each image, from the rows of `runs`. If `overlaps` is true, the
// kernel may start while the previous one in the stream is running; this needs compute capability
// 9.0.
Status pixel_means_fwd(float* means, const float* sums, const PixelRuns& runs, bool overlaps,
                       void* stream);

// image_bias [N, K]: the contribution of the pooled channels to the projection. It is computed from
// means [N, C]; pooled [N, P] is the intermediate result. Weights have the dtypes above and are
// aligned to 16 bytes; C, P and project_stride are multiples of 16 bytes.
Status aspp_image_bias_fwd(float* image_bias, float* pooled, const float* means,
                           const AsppWeights& weights, const AsppShape& shape, DType dtype,
                           bool overlaps, void* stream);

// kFloat32 | kFloat16 | kBFloat16, summed in fp32. bias [C] or nullptr. All tensors but bias are
// aligned to 16 bytes.
Status depthwise_conv2d_fwd(void* output, const void* input, const void* weight, const void* bias,
                            const ConvEpilogue& epilogue, const DepthwiseShape& shape, DType dtype,
                            void* stream);

// grad_weight [C, R, S] and grad_bias [C]; either may be nullptr. dtypes and alignment as above.
// partial_sums [num_parts, R * S + 1, C]: workspace; the pixels are summed in num_parts parts.
Status depthwise_conv2d_wgrad(void* grad_weight, void* grad_bias, float* partial_sums,
                              const void* grad_output, const void* input,
                              const DepthwiseShape& shape, int num_parts, DType dtype,
                              void* stream);

}  // namespace cuda

}  // namespace deeplab_fast
