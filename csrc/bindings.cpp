// Python passes integers: addresses, sizes, enumerators. All arguments have been checked, in
// noisyq_fast/operators/checks.py.
#include "bindings.h"

#include <pybind11/stl.h>

#include "dtypes.h"

namespace py = pybind11;
using namespace pybind11::literals;
namespace cpu = noisyq::cpu;
using noisyq::DType;
using noisyq::GridKind;
using noisyq::Masked;
using noisyq::moving_average;
using noisyq::pointer;
using noisyq::RuleKind;

namespace {

using Strides = std::array<int64_t, 4>;

template <class T>
noisyq::cpu::Weight<T> weight_at(uintptr_t address, const Strides& strides) {
  return {pointer<const T>(address), {strides[0], strides[1], strides[2], strides[3]}};
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native kernels of noisyq_fast.";
  m.attr("compiler") = NOISYQ_COMPILER;
  m.attr("cuda_compiler") = NOISYQ_CUDA;
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif

  const auto release = py::call_guard<py::gil_scoped_release>();

  m.def(
      "fake_quantize",
      [](int dtype, uintptr_t x, uintptr_t y, int masked, uintptr_t mask, int64_t outer,
         int64_t channels, int64_t inner, int kind, int qmax, uintptr_t running, uintptr_t observed,
         float averaging_constant, int threads) {
        cpu::fake_quantize(DType{dtype}, pointer<const void>(x), pointer<void>(y),
                           {Masked{masked}, pointer<uint8_t>(mask)}, {outer, channels, inner},
                           {GridKind{kind}, qmax},
                           moving_average(running, observed, averaging_constant), threads);
      },
      "dtype"_a, "x"_a, "y"_a, "masked"_a, "mask"_a, "outer"_a, "channels"_a, "inner"_a, "kind"_a,
      "qmax"_a, "running"_a, "observed"_a, "averaging_constant"_a, "threads"_a, release);

  m.def(
      "fake_quantize_fixed_range",
      [](int dtype, uintptr_t x, uintptr_t range, uintptr_t y, int masked, uintptr_t mask,
         int64_t outer, int64_t channels, int64_t inner, int kind, int qmax, int threads) {
        cpu::fake_quantize_fixed_range(DType{dtype}, pointer<const void>(x),
                                       pointer<const float>(range), pointer<void>(y),
                                       {Masked{masked}, pointer<uint8_t>(mask)},
                                       {outer, channels, inner}, {GridKind{kind}, qmax}, threads);
      },
      "dtype"_a, "x"_a, "range"_a, "y"_a, "masked"_a, "mask"_a, "outer"_a, "channels"_a, "inner"_a,
      "kind"_a, "qmax"_a, "threads"_a, release);

  m.def(
      "zero_clipped",
      [](int dtype, uintptr_t grad, uintptr_t out, uintptr_t clipped, int64_t elements,
         int threads) {
        cpu::zero_clipped(DType{dtype}, pointer<const void>(grad), pointer<void>(out),
                          pointer<const uint8_t>(clipped), elements, threads);
      },
      "dtype"_a, "grad"_a, "out"_a, "clipped"_a, "elements"_a, "threads"_a, release);

  m.def(
      "quantize",
      [](int dtype, uintptr_t x, uintptr_t codes, int masked, uintptr_t mask, uintptr_t scale,
         uintptr_t zero_point, int64_t outer, int64_t channels, int64_t inner, int kind, int qmax,
         uintptr_t running, uintptr_t observed, float averaging_constant, int threads) {
        cpu::quantize(DType{dtype}, pointer<const void>(x), pointer<void>(codes),
                      {Masked{masked}, pointer<uint8_t>(mask)}, pointer<float>(scale),
                      pointer<uint8_t>(zero_point), {outer, channels, inner},
                      {GridKind{kind}, qmax}, moving_average(running, observed, averaging_constant),
                      threads);
      },
      "dtype"_a, "x"_a, "codes"_a, "masked"_a, "mask"_a, "scale"_a, "zero_point"_a, "outer"_a,
      "channels"_a, "inner"_a, "kind"_a, "qmax"_a, "running"_a, "observed"_a,
      "averaging_constant"_a, "threads"_a, release);

  m.def(
      "quantize_fixed_range",
      [](int dtype, uintptr_t x, uintptr_t range, uintptr_t codes, int masked, uintptr_t mask,
         uintptr_t scale, uintptr_t zero_point, int64_t outer, int64_t channels, int64_t inner,
         int kind, int qmax, int threads) {
        cpu::quantize_fixed_range(DType{dtype}, pointer<const void>(x), pointer<const float>(range),
                                  pointer<void>(codes), {Masked{masked}, pointer<uint8_t>(mask)},
                                  pointer<float>(scale), pointer<uint8_t>(zero_point),
                                  {outer, channels, inner}, {GridKind{kind}, qmax}, threads);
      },
      "dtype"_a, "x"_a, "range"_a, "codes"_a, "masked"_a, "mask"_a, "scale"_a, "zero_point"_a,
      "outer"_a, "channels"_a, "inner"_a, "kind"_a, "qmax"_a, "threads"_a, release);

  m.def(
      "dequantize",
      [](uintptr_t codes, bool are_signed, uintptr_t scale, uintptr_t zero_point, uintptr_t y,
         int64_t outer, int64_t channels, int64_t inner, int threads) {
        cpu::dequantize(pointer<const void>(codes), are_signed, pointer<const float>(scale),
                        pointer<const uint8_t>(zero_point), pointer<float>(y),
                        {outer, channels, inner}, threads);
      },
      "codes"_a, "are_signed"_a, "scale"_a, "zero_point"_a, "y"_a, "outer"_a, "channels"_a,
      "inner"_a, "threads"_a, release);

  m.def("has_dot_products", &cpu::has_dot_products);

  m.def(
      "convolve",
      [](uintptr_t codes, bool are_signed, int zero_point, uintptr_t weight, const Strides& strides,
         int64_t images, int64_t height, int64_t width, int64_t channels, int64_t outputs,
         std::array<int64_t, 2> kernel, std::array<int64_t, 2> stride,
         std::array<int64_t, 2> padding, std::array<int64_t, 2> dilation, bool narrow,
         uintptr_t out, uintptr_t sum, uintptr_t squares, uintptr_t low, uintptr_t high,
         int threads) {
        cpu::convolve(pointer<const void>(codes), are_signed, zero_point,
                      weight_at<int8_t>(weight, strides),
                      {images,
                       height,
                       width,
                       channels,
                       outputs,
                       {kernel[0], kernel[1]},
                       {stride[0], stride[1]},
                       {padding[0], padding[1]},
                       {dilation[0], dilation[1]}},
                      narrow, pointer<void>(out),
                      {pointer<int64_t>(sum), pointer<int64_t>(squares), pointer<float>(low),
                       pointer<float>(high)},
                      threads);
      },
      "codes"_a, "are_signed"_a, "zero_point"_a, "weight"_a, "strides"_a, "images"_a, "height"_a,
      "width"_a, "channels"_a, "outputs"_a, "kernel"_a, "stride"_a, "padding"_a, "dilation"_a,
      "narrow"_a, "out"_a, "sum"_a, "squares"_a, "low"_a, "high"_a, "threads"_a, release);

  m.def("has_products", [](int dtype) { return cpu::has_products(DType{dtype}); }, "dtype"_a);

  // For the gradient of sums: v, factor, term, mean, slope, shift, tilt.
  using OfSums = std::array<uintptr_t, 7>;
  // For a convolution: images, height, width, channels, outputs, and two of kernel, stride,
  // padding.
  using Sizes = std::array<int64_t, 11>;

  m.def(
      "convolve_backward",
      [](int dtype, uintptr_t grad, const OfSums& of_sums, bool narrow, bool relu, uintptr_t codes,
         bool are_signed, int zero_point, uintptr_t scale, uintptr_t weight, const Strides& strides,
         const Sizes& sizes, uintptr_t dx, uintptr_t dw, int threads) {
        const auto at = [&](int i) { return pointer<const float>(of_sums[i]); };
        const auto& s = sizes;
        cpu::convolve_backward(
            DType{dtype},
            {pointer<const void>(grad),
             {pointer<const void>(of_sums[0]), narrow},
             relu,
             at(1),
             at(2),
             at(3),
             at(4),
             at(5),
             at(6)},
            {pointer<const void>(codes), are_signed, zero_point, *pointer<const float>(scale)},
            weight_at<float>(weight, strides),
            {s[0], s[1], s[2], s[3], s[4], {s[5], s[6]}, {s[7], s[8]}, {s[9], s[10]}, {1, 1}},
            pointer<void>(dx), pointer<float>(dw), threads);
      },
      "dtype"_a, "grad"_a, "of_sums"_a, "narrow"_a, "relu"_a, "codes"_a, "are_signed"_a,
      "zero_point"_a, "scale"_a, "weight"_a, "strides"_a, "sizes"_a, "dx"_a, "dw"_a, "threads"_a,
      release);

  m.def(
      "moments",
      [](uintptr_t sums, uintptr_t kept, int64_t rows, int64_t channels, int64_t bound,
         uintptr_t sum, uintptr_t squares, uintptr_t low, uintptr_t high, int threads) {
        cpu::moments_of_sums(pointer<const float>(sums), pointer<int16_t>(kept), rows, channels,
                             bound,
                             {pointer<int64_t>(sum), pointer<int64_t>(squares), pointer<float>(low),
                              pointer<float>(high)},
                             threads);
      },
      "sums"_a, "kept"_a, "rows"_a, "channels"_a, "bound"_a, "sum"_a, "squares"_a, "low"_a,
      "high"_a, "threads"_a, release);

  m.def(
      "normalization",
      [](uintptr_t sum, uintptr_t squares, int64_t count, int64_t channels, uintptr_t scale,
         uintptr_t weight, uintptr_t bias, double eps, uintptr_t factor, uintptr_t term,
         uintptr_t mean, uintptr_t inverse, uintptr_t batch_mean, uintptr_t batch_variance,
         uintptr_t running_mean, uintptr_t running_variance, uintptr_t batches,
         uintptr_t layer_bias, double momentum) {
        cpu::normalization(pointer<const int64_t>(sum), pointer<const int64_t>(squares), count,
                           channels, pointer<const float>(scale), pointer<const float>(weight),
                           pointer<const float>(bias), eps, pointer<float>(factor),
                           pointer<float>(term), pointer<float>(mean), pointer<float>(inverse),
                           pointer<double>(batch_mean), pointer<double>(batch_variance),
                           {pointer<float>(running_mean), pointer<float>(running_variance),
                            pointer<int64_t>(batches), pointer<const float>(layer_bias), momentum});
      },
      "sum"_a, "squares"_a, "count"_a, "channels"_a, "scale"_a, "weight"_a, "bias"_a, "eps"_a,
      "factor"_a, "term"_a, "mean"_a, "inverse"_a, "batch_mean"_a, "batch_variance"_a,
      "running_mean"_a, "running_variance"_a, "batches"_a, "layer_bias"_a, "momentum"_a, release);

  m.def(
      "ends_of_line",
      [](uintptr_t low, uintptr_t high, uintptr_t factor, uintptr_t term, int64_t channels,
         bool relu, uintptr_t ends) {
        cpu::ends_of_line(pointer<const float>(low), pointer<const float>(high),
                          pointer<const float>(factor), pointer<const float>(term), channels, relu,
                          pointer<float>(ends));
      },
      "low"_a, "high"_a, "factor"_a, "term"_a, "channels"_a, "relu"_a, "ends"_a, release);

  m.def(
      "observe",
      [](uintptr_t ends, int kind, uintptr_t running, uintptr_t observed, float averaging_constant,
         uintptr_t range) {
        cpu::observe(pointer<const float>(ends), static_cast<GridKind>(kind),
                     {pointer<float>(running), pointer<float>(observed), averaging_constant},
                     pointer<float>(range));
      },
      "ends"_a, "kind"_a, "running"_a, "observed"_a, "averaging_constant"_a, "range"_a, release);

  m.def(
      "map_sums",
      [](uintptr_t sums, bool narrow, int64_t rows, int64_t channels, uintptr_t factor,
         uintptr_t term, uintptr_t residual, bool relu, uintptr_t y, uintptr_t zeros,
         uintptr_t range, int threads) {
        cpu::map_sums({pointer<const void>(sums), narrow}, rows, channels,
                      pointer<const float>(factor), pointer<const float>(term),
                      pointer<const float>(residual), relu, pointer<float>(y),
                      pointer<uint8_t>(zeros), pointer<float>(range), threads);
      },
      "sums"_a, "narrow"_a, "rows"_a, "channels"_a, "factor"_a, "term"_a, "residual"_a, "relu"_a,
      "y"_a, "zeros"_a, "range"_a, "threads"_a, release);

  m.def(
      "codes_of_sums",
      [](uintptr_t sums, bool narrow, int64_t rows, int64_t channels, uintptr_t factor,
         uintptr_t term, bool relu, uintptr_t range, int kind, int qmax, uintptr_t codes,
         uintptr_t scale, uintptr_t zero_point, int threads) {
        cpu::codes_of_sums(
            {pointer<const void>(sums), narrow}, rows, channels, pointer<const float>(factor),
            pointer<const float>(term), relu, pointer<const float>(range), {GridKind{kind}, qmax},
            pointer<uint8_t>(codes), pointer<float>(scale), pointer<uint8_t>(zero_point), threads);
      },
      "sums"_a, "narrow"_a, "rows"_a, "channels"_a, "factor"_a, "term"_a, "relu"_a, "range"_a,
      "kind"_a, "qmax"_a, "codes"_a, "scale"_a, "zero_point"_a, "threads"_a, release);

  m.def(
      "grads_of_norm",
      [](int dtype, uintptr_t grad, uintptr_t sums, bool narrow, int64_t rows, int64_t channels,
         uintptr_t factor, uintptr_t term, bool relu, uintptr_t mean, uintptr_t inverse,
         uintptr_t scale, uintptr_t weight, bool uses_batch, uintptr_t slope, uintptr_t shift,
         uintptr_t tilt, uintptr_t of_weight, uintptr_t of_bias, int threads) {
        cpu::grads_of_norm(
            DType{dtype}, pointer<const void>(grad), {pointer<const void>(sums), narrow}, rows,
            channels, pointer<const float>(factor), pointer<const float>(term), relu,
            pointer<const float>(mean), pointer<const float>(inverse), pointer<const float>(scale),
            pointer<const float>(weight), uses_batch, pointer<float>(slope), pointer<float>(shift),
            pointer<float>(tilt), pointer<float>(of_weight), pointer<float>(of_bias), threads);
      },
      "dtype"_a, "grad"_a, "sums"_a, "narrow"_a, "rows"_a, "channels"_a, "factor"_a, "term"_a,
      "relu"_a, "mean"_a, "inverse"_a, "scale"_a, "weight"_a, "uses_batch"_a, "slope"_a, "shift"_a,
      "tilt"_a, "of_weight"_a, "of_bias"_a, "threads"_a, release);

  m.def(
      "grads_of_sums",
      [](int dtype, uintptr_t grad, uintptr_t sums, bool narrow, int64_t rows, int64_t channels,
         uintptr_t factor, uintptr_t term, bool relu, uintptr_t mean, uintptr_t slope,
         uintptr_t shift, uintptr_t tilt, uintptr_t out, int threads) {
        cpu::grads_of_sums(
            DType{dtype}, pointer<const void>(grad), {pointer<const void>(sums), narrow}, rows,
            channels, pointer<const float>(factor), pointer<const float>(term), relu,
            pointer<const float>(mean), pointer<const float>(slope), pointer<const float>(shift),
            pointer<const float>(tilt), pointer<void>(out), threads);
      },
      "dtype"_a, "grad"_a, "sums"_a, "narrow"_a, "rows"_a, "channels"_a, "factor"_a, "term"_a,
      "relu"_a, "mean"_a, "slope"_a, "shift"_a, "tilt"_a, "out"_a, "threads"_a, release);

  // The 13 numbers of a shape, and the 4 of a border, in their order.
  using Shape = std::array<int64_t, 13>;
  using Border = std::array<int64_t, 4>;

  m.def(
      "adder_forward",
      [](uintptr_t x, uintptr_t weight, uintptr_t y, const Shape& shape, int threads) {
        cpu::adder_forward(pointer<const float>(x), pointer<const float>(weight), pointer<float>(y),
                           noisyq::bit_cast<cpu::AdderShape>(shape), threads);
      },
      "x"_a, "weight"_a, "y"_a, "shape"_a, "threads"_a, release);

  m.def(
      "adder_input_gradient",
      [](uintptr_t x, uintptr_t weight, uintptr_t grad, uintptr_t dx, const Shape& shape,
         const Border& border, int threads) {
        cpu::adder_input_gradient(pointer<const float>(x), pointer<const float>(weight),
                                  pointer<const float>(grad), pointer<float>(dx),
                                  noisyq::bit_cast<cpu::AdderShape>(shape),
                                  noisyq::bit_cast<cpu::AdderBorder>(border), threads);
      },
      "x"_a, "weight"_a, "grad"_a, "dx"_a, "shape"_a, "border"_a, "threads"_a, release);

  m.def(
      "adder_weight_gradient",
      [](uintptr_t x, uintptr_t weight, uintptr_t grad, uintptr_t dw, const Shape& shape,
         int threads) {
        cpu::adder_weight_gradient(pointer<const float>(x), pointer<const float>(weight),
                                   pointer<const float>(grad), pointer<float>(dw),
                                   noisyq::bit_cast<cpu::AdderShape>(shape), threads);
      },
      "x"_a, "weight"_a, "grad"_a, "dw"_a, "shape"_a, "threads"_a, release);

  m.def(
      "fake_quantize_learned",
      [](int dtype, uintptr_t x, uintptr_t parameters, uintptr_t y, int64_t outer, int64_t channels,
         int64_t inner, int kind, int low, int high, int threads) {
        cpu::fake_quantize_learned(DType{dtype}, pointer<const void>(x),
                                   pointer<const float>(parameters), pointer<void>(y),
                                   {outer, channels, inner}, RuleKind{kind}, low, high, threads);
      },
      "dtype"_a, "x"_a, "parameters"_a, "y"_a, "outer"_a, "channels"_a, "inner"_a, "kind"_a,
      "low"_a, "high"_a, "threads"_a, release);

  m.def(
      "quantize_learned",
      [](int dtype, uintptr_t x, uintptr_t parameters, uintptr_t codes, int64_t outer,
         int64_t channels, int64_t inner, int kind, int low, int high, int threads) {
        cpu::quantize_learned(DType{dtype}, pointer<const void>(x),
                              pointer<const float>(parameters), pointer<int16_t>(codes),
                              {outer, channels, inner}, RuleKind{kind}, low, high, threads);
      },
      "dtype"_a, "x"_a, "parameters"_a, "codes"_a, "outer"_a, "channels"_a, "inner"_a, "kind"_a,
      "low"_a, "high"_a, "threads"_a, release);

  m.def(
      "fake_quantize_learned_backward",
      [](int grad_dtype, uintptr_t grad, int dtype, uintptr_t x, uintptr_t parameters, uintptr_t dx,
         uintptr_t sums, int64_t outer, int64_t channels, int64_t inner, int kind, int low,
         int high, int threads) {
        cpu::fake_quantize_learned_backward(
            DType{grad_dtype}, pointer<const void>(grad), DType{dtype}, pointer<const void>(x),
            pointer<const float>(parameters), pointer<void>(dx), pointer<float>(sums),
            {outer, channels, inner}, RuleKind{kind}, low, high, threads);
      },
      "grad_dtype"_a, "grad"_a, "dtype"_a, "x"_a, "parameters"_a, "dx"_a, "sums"_a, "outer"_a,
      "channels"_a, "inner"_a, "kind"_a, "low"_a, "high"_a, "threads"_a, release);

#ifdef NOISYQ_WITH_CUDA
  noisyq::bind_cuda(m);
#endif
}
