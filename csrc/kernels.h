// The interface of the native library: plain pointers and sizes, without PyTorch.
#pragma once

#include <cstdint>

namespace noisyq {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// A dense tensor's memory as [outer, channels, inner]: element i belongs to channel
// (i / inner) % channels. Per-tensor quantization is one channel.
struct Layout {
  int64_t outer;
  int64_t channels;
  int64_t inner;
};

// The grids, with the names of noisyq_fast/grid.py; qmax = 2^(bits-1) - 1.
enum class GridKind : int { is_signed = 0, is_full = 1, is_unsigned = 2, is_affine = 3 };

struct Grid {
  GridKind kind;
  int qmax;
};

// A moving average of the absmax of each channel: running_absmax / observed, a weighted sum and its
// weight. If `observed` is null all weights are 1; if `running_absmax` is null there is no average.
// An affine grid has two averages: all low ends, then all high ends.
struct MovingAverage {
  float* running_absmax = nullptr;
  float* observed = nullptr;
  float constant = 0.0f;  // weight of a batch
};

// Elements without a gradient: none, those below 0, or those whose code was clamped (on an unsigned
// grid those below 0 too). `bits` receives one bit per element, in memory order.
enum class Masked : int { none = 0, negative = 1, clipped = 2 };

struct Mask {
  Masked masked = Masked::none;
  uint8_t* bits = nullptr;
};

// The rules of learned quantizers, in the order of NAMES in noisyq_fast/rules.py.
enum class RuleKind : int {
  lsq,
  pact,
  sat,
  aqd,
  aqd_odd,
  qil,
  qil_odd,
  dsq,
  dorefa_original,
  dorefa_modified,
  dorefa_centered,
};

namespace cpu {

// y = x fake-quantized with the range of each channel of x, with which `average` is updated. `y`
// may be `x`, unless there is a mask.
void fake_quantize(DType dtype, const void* x, void* y, Mask mask, Layout layout, Grid grid,
                   MovingAverage average, int threads);

// The same with a given range: the absmax of each channel, or the largest value; for an affine grid
// all low ends, then all high ends.
void fake_quantize_fixed_range(DType dtype, const void* x, const float* range, void* y, Mask mask,
                               Layout layout, Grid grid, int threads);

// out = grad, but 0 where the bit of the element is set.
void zero_clipped(DType dtype, const void* grad, void* out, const uint8_t* clipped,
                  int64_t elements, int threads);

// The codes, with one scale for each channel and, for an affine grid, one zero point. Codes are
// int8 on grids with negative codes, else uint8.
void quantize(DType dtype, const void* x, void* codes, Mask mask, float* scale, uint8_t* zero,
              Layout layout, Grid grid, MovingAverage average, int threads);
void quantize_fixed_range(DType dtype, const void* x, const float* range, void* codes, Mask mask,
                          float* scale, uint8_t* zero, Layout layout, Grid grid, int threads);

// y = (codes - zero) * scale. Without `zero`: codes * scale.
void dequantize(const void* codes, bool are_signed, const float* scale, const uint8_t* zero,
                float* y, Layout layout, int threads);

// A convolution of [images, height, width, channels] with [outputs, channels, kernel].
struct Convolution {
  int64_t images, height, width, channels, outputs;
  int64_t kernel[2], stride[2], padding[2], dilation[2];

  int64_t output_size(int axis, int64_t size) const {
    return (size + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis] + 1;
  }
  int64_t output_height() const { return output_size(0, height); }
  int64_t output_width() const { return output_size(1, width); }
};

// [outputs, channels, kernel], dense, with a stride of each axis.
template <class T>
struct Weight {
  const T* values;
  int64_t strides[4];

  // The first channel of an output at a tap.
  const T* at(int64_t output, int64_t row, int64_t column) const {
    return values + output * strides[0] + row * strides[2] + column * strides[3];
  }
};

// For each channel of exact sums v: the sum of v, the sum of v^2 as (upper, lower 32 bits), the
// smallest and the largest v.
struct Moments {
  int64_t* sum = nullptr;
  int64_t* squares = nullptr;
  float* low = nullptr;
  float* high = nullptr;
};

// Whether `convolve` runs on this machine.
bool has_dot_products();

// v = sum (code - zero) * weight, exact below 2^31, as floats or `narrow`, int16. With moments,
// which only narrow sums have, the number of sums per thread must stay below 2^23.
void convolve(const void* codes, bool are_signed, int zero, Weight<int8_t> weight,
              const Convolution& how, bool narrow, void* out, Moments moments, int threads);

// Exact sums of products of codes, [rows, channels]: int16, or float if that is too narrow.
struct Sums {
  const void* values;
  bool are_narrow;
};

// `bound` is an upper bound of |v|. `narrow`, if not null, receives v.
void moments_of_sums(const float* v, int16_t* narrow, int64_t rows, int64_t channels, int64_t bound,
                     Moments moments, int threads);

// Running statistics of a batch norm, and the number of batches. Null if there are none; `bias`, of
// the layer before, may be null.
struct RunningStatistics {
  float* mean = nullptr;
  float* variance = nullptr;
  int64_t* batches = nullptr;
  const float* bias = nullptr;
  double momentum = 0.0;
};

// Batch norm of v * scale, from its moments, as v * factor + term: see
// `noisyq_fast/integer/batch_norm.py`. `weight` and `bias` may be null.
void normalization(const int64_t* sum, const int64_t* squares, int64_t rows, int64_t channels,
                   const float* scale, const float* weight, const float* bias, double eps,
                   float* factor, float* term, float* mean, float* inverse, double* batch_mean,
                   double* batch_variance, RunningStatistics running);

// min(y, 0) and max(y, 0) of y = v * factor + term, or of its ReLU, from the smallest and the
// largest v of each channel. NaN if a y is NaN; max(y, 0) is NaN if min(y, 0) is not finite.
void ends_of_line(const float* least, const float* largest, const float* factor, const float* term,
                  int64_t channels, bool relu, float* ends);

// The range on a grid (one value, two for an affine grid) of a batch with these ends. Moves the
// average towards it.
void observe(const float* ends, GridKind kind, MovingAverage average, float* range);

// y = relu(v * factor + term + residual), without the ReLU or the residual if there is none.
// If not null, `zeros` receives one bit per y, set if it is not above 0, and `range` min(y, 0) and
// max(y, 0).
void map_sums(Sums v, int64_t rows, int64_t channels, const float* factor, const float* term,
              const float* residual, bool relu, float* y, uint8_t* zeros, float* range,
              int threads);

// The codes of relu(v * factor + term), or without the ReLU, for a given range (one value, two for
// an affine grid). One scale, NaN if a factor or a term is not finite, and, for an affine grid, one
// zero point.
void codes_of_sums(Sums v, int64_t rows, int64_t channels, const float* factor, const float* term,
                   bool relu, const float* range, Grid grid, uint8_t* codes, float* scale,
                   uint8_t* zero, int threads);

// The backward of y = relu(v * factor + term), where factor and term are a batch norm of v * scale.
// With g the gradient before the ReLU: for each channel the gradients of the norm's weight and
// bias, and the gradient of v as slope * g - shift - (v - mean) * tilt. With running statistics,
// shift and tilt are 0. The order of summation does not depend on the threads.
void grads_of_norm(DType dtype, const void* grad, Sums v, int64_t rows, int64_t channels,
                   const float* factor, const float* term, bool relu, const float* mean,
                   const float* inverse, const float* scale, const float* weight, bool uses_batch,
                   float* slope, float* shift, float* tilt, float* of_weight, float* of_bias,
                   int threads);
void grads_of_sums(DType dtype, const void* grad, Sums v, int64_t rows, int64_t channels,
                   const float* factor, const float* term, bool relu, const float* mean,
                   const float* slope, const float* shift, const float* tilt, void* out,
                   int threads);

// The gradient of v, given that of y, as in `grads_of_sums`; `grad` itself if `v` is null.
struct GradOfSums {
  const void* grad;
  Sums v;
  bool relu;
  const float *factor, *term, *mean, *slope, *shift, *tilt;
};

// The input of a convolution: (codes - zero) * scale.
struct ConvolvedCodes {
  const void* codes;
  bool are_signed;
  int zero;
  float scale;
};

// Whether `convolve_backward` multiplies values of a type on this machine.
bool has_products(DType dtype);

// The gradients of `convolve` for its input, in the layout of `grad`, and for its weight, [outputs,
// kernel, channels], each if not null. Channels and outputs are multiples of 16; the kernel has 1
// or 3 columns and no dilation. Products are in `dtype`, that of `grad`, sums in float.
void convolve_backward(DType dtype, const GradOfSums& of, ConvolvedCodes x, Weight<float> weight,
                       const Convolution& how, void* dx, float* dw, int threads);

// A convolution without groups and dilation.
struct AdderShape {
  int64_t images, rows, columns, inputs;  // of x
  int64_t outputs, kernel_rows, kernel_columns;
  int64_t row_stride, column_stride, row_padding, column_padding;
  int64_t out_rows, out_columns;
};

// Zeros around a gradient.
struct AdderBorder {
  int64_t top, bottom, left, right;
};

// y = -sum |w - x| of x [images, rows, columns, inputs], padded, and w [outputs / 16, kernel,
// inputs, 16], [images, out_rows, out_columns, outputs].
void adder_forward(const float* x, const float* w, float* y, AdderShape shape, int threads);

// dx = sum clip(w - x, -1, 1) g, like x: [inputs / 16, images, rows, columns, 16], not padded. w is
// [inputs / 16, kernel, outputs, 16], and g [images, out_rows, out_columns, outputs], padded.
void adder_input_gradient(const float* x, const float* w, const float* g, float* dx,
                          AdderShape shape, AdderBorder border, int threads);

// dw = sum (x - w) g, like w. Layouts as for the input's gradient, but x is padded and g is not.
void adder_weight_gradient(const float* x, const float* w, const float* g, float* dw,
                           AdderShape shape, int threads);

// Learned quantizers. Parameters: the first of all channels, then the second of all channels, ...
// `codes` are integers from `low` to `high`.
void fake_quantize_learned(DType dtype, const void* x, const float* parameters, void* y,
                           Layout layout, RuleKind kind, int low, int high, int threads);
void quantize_learned(DType dtype, const void* x, const float* parameters, int16_t* codes,
                      Layout layout, RuleKind kind, int low, int high, int threads);

// The gradient for x, and the gradients for each parameter, summed over the channel.
void fake_quantize_learned_backward(DType grad_dtype, const void* grad, DType dtype, const void* x,
                                    const float* parameters, void* dx, float* sums, Layout layout,
                                    RuleKind kind, int low, int high, int threads);

}  // namespace cpu

// On a device every function only launches; the caller has set the current device. A status other
// than 0 is the cudaError_t of a failed launch.
namespace cuda {

using Status = int;
using Stream = void*;  // a cudaStream_t

// A tensor with contiguous channels. `scale`, if not null, receives one scale per channel.
struct ChannelTensor {
  const void* x;
  void* y;
  float* scale;
  int64_t channels;
  int64_t inner;
  int qmax;
};

// All tensors in one launch (per 80 tensors), with one block per channel.
Status fake_quantize_channels(DType dtype, const ChannelTensor* tensors, int count, Stream stream);
Status quantize_channels(DType dtype, const ChannelTensor* tensors, int count, Stream stream);

// How many blocks share a channel.
struct Splits {
  int of_reduction;
  int of_map;
};

// A reduction and a map. `partial` is scratch for channels * of_reduction values.
Status fake_quantize_spread(DType dtype, const void* x, void* y, Layout layout, Splits splits,
                            uint32_t* partial, int qmax, MovingAverage average, Stream stream);
Status quantize_spread(DType dtype, const void* x, int8_t* codes, float* scale, Layout layout,
                       Splits splits, uint32_t* partial, int qmax, Stream stream);

// The same for channels that are interleaved in memory, which all blocks share. `progress` has
// channels + 1 values, 0 before and after.
Status fake_quantize_mixed(DType dtype, const void* x, void* y, Layout layout, Splits blocks,
                           int qmax, MovingAverage average, uint32_t* progress, Stream stream);

// A single channel that fits on chip, in one cooperative launch of `blocks`, at most one per
// multiprocessor. `partial` is scratch for one value per block.
Status fake_quantize_resident(DType dtype, const void* x, void* y, int64_t elements, int blocks,
                              uint32_t* partial, int qmax, MovingAverage average, Stream stream);

// How many bytes of a tensor a block of that launch can keep; 0 where it cannot be launched.
int64_t resident_bytes_per_block(int device);

// With a given absmax, for any layout. `clipped`, if not null, receives one bit per element, in
// memory order.
Status fake_quantize_fixed_range_clipped(DType dtype, const void* x, const float* absmax, void* y,
                                         uint8_t* clipped, Layout layout, int blocks, int qmax,
                                         Stream stream);

// out = grad, but 0 where the bit of the element is set.
Status zero_clipped(DType dtype, const void* grad, void* out, const uint8_t* clipped,
                    int64_t elements, int blocks, Stream stream);

// Any grid, with the dynamic range of each channel, in two launches. `range` is scratch for all
// ends and `progress` for 3 values per channel, 0 before and after. `splits.of_reduction` blocks
// reduce a channel; `splits.of_map` blocks map the whole tensor.
Status fake_quantize_on_grid(DType dtype, const void* x, void* y, Mask mask, Layout layout,
                             Splits splits, float* range, uint32_t* progress, Grid grid,
                             MovingAverage average, Stream stream);
Status quantize_on_grid(DType dtype, const void* x, void* codes, float* scale, uint8_t* zero,
                        Layout layout, Splits splits, float* range, uint32_t* progress, Grid grid,
                        Stream stream);

// The same for one tensor with contiguous channels, in one launch. With a mask, `inner` must be a
// multiple of 8.
Status fake_quantize_channels_on_grid(DType dtype, const void* x, void* y, Mask mask,
                                      int64_t channels, int64_t inner, Grid grid, Stream stream);
Status quantize_channels_on_grid(DType dtype, const void* x, void* codes, float* scale,
                                 uint8_t* zero, int64_t channels, int64_t inner, Grid grid,
                                 Stream stream);

// With a given range, as on the CPU.
Status fake_quantize_fixed_range_on_grid(DType dtype, const void* x, const float* range, void* y,
                                         Mask mask, Layout layout, int blocks, Grid grid,
                                         Stream stream);

// As on the CPU, with `splits` blocks for each channel.
Status fake_quantize_fixed_range(DType dtype, const void* x, const float* absmax, void* y,
                                 Layout layout, int splits, int qmax, Stream stream);
Status dequantize(const void* codes, bool are_signed, const float* scale, const uint8_t* zero,
                  float* y, Layout layout, int splits, Stream stream);

// Learned quantizers, as on the CPU. The backward takes contiguous, non-empty channels, and a
// gradient of the type of `x`. `partial` is scratch, for each channel and parameter, for the sums
// of all chunks (csrc/chunks.h), of the chunks of these sums, and so on down to one sum; a single
// chunk needs none.
Status fake_quantize_learned(DType dtype, const void* x, const float* parameters, void* y,
                             Layout layout, int splits, RuleKind kind, int low, int high,
                             Stream stream);
Status quantize_learned(DType dtype, const void* x, const float* parameters, int16_t* codes,
                        Layout layout, int splits, RuleKind kind, int low, int high, Stream stream);
Status fake_quantize_learned_backward(DType dtype, const void* grad, const void* x,
                                      const float* parameters, void* dx, float* sums,
                                      float* partial, int64_t channels, int64_t inner,
                                      RuleKind kind, int low, int high, float gradient_scale,
                                      Stream stream);

}  // namespace cuda
}  // namespace noisyq
