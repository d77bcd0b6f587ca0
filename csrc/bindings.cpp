// Python sees integers: addresses, sizes, enumerators. Every check has been made by then, in
// noisyq_fast/ops.py.
#include "bindings.h"

#include <pybind11/stl.h>

#include "dtypes.h"

namespace py = pybind11;
namespace cpu = noisyq::cpu;
using noisyq::DType;
using noisyq::GridKind;
using noisyq::Masked;
using noisyq::moving_average;
using noisyq::pointer;

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
      release);

  m.def(
      "fake_quantize_fixed_range",
      [](int dtype, uintptr_t x, uintptr_t range, uintptr_t y, int masked, uintptr_t mask,
         int64_t outer, int64_t channels, int64_t inner, int kind, int qmax, int threads) {
        cpu::fake_quantize_fixed_range(DType{dtype}, pointer<const void>(x),
                                       pointer<const float>(range), pointer<void>(y),
                                       {Masked{masked}, pointer<uint8_t>(mask)},
                                       {outer, channels, inner}, {GridKind{kind}, qmax}, threads);
      },
      release);

  m.def(
      "zero_clipped",
      [](int dtype, uintptr_t grad, uintptr_t out, uintptr_t clipped, int64_t elements,
         int threads) {
        cpu::zero_clipped(DType{dtype}, pointer<const void>(grad), pointer<void>(out),
                          pointer<const uint8_t>(clipped), elements, threads);
      },
      release);

  m.def(
      "quantize",
      [](int dtype, uintptr_t x, uintptr_t codes, uintptr_t scale, uintptr_t zero, int64_t outer,
         int64_t channels, int64_t inner, int kind, int qmax, int threads) {
        cpu::quantize(DType{dtype}, pointer<const void>(x), pointer<void>(codes),
                      pointer<float>(scale), pointer<uint8_t>(zero), {outer, channels, inner},
                      {GridKind{kind}, qmax}, threads);
      },
      release);

  m.def(
      "dequantize",
      [](uintptr_t codes, bool are_signed, uintptr_t scale, uintptr_t zero, uintptr_t y,
         int64_t outer, int64_t channels, int64_t inner, int threads) {
        cpu::dequantize(pointer<const void>(codes), are_signed, pointer<const float>(scale),
                        pointer<const uint8_t>(zero), pointer<float>(y), {outer, channels, inner},
                        threads);
      },
      release);

  // The 13 numbers of a shape, and the 4 of a border, in their order.
  using Shape = std::array<int64_t, 13>;
  using Border = std::array<int64_t, 4>;

  m.def(
      "adder_forward",
      [](uintptr_t x, uintptr_t w, uintptr_t y, const Shape& shape, int threads) {
        cpu::adder_forward(pointer<const float>(x), pointer<const float>(w), pointer<float>(y),
                           noisyq::bit_cast<cpu::AdderShape>(shape), threads);
      },
      release);

  m.def(
      "adder_input_gradient",
      [](uintptr_t x, uintptr_t w, uintptr_t g, uintptr_t dx, const Shape& shape,
         const Border& border, int threads) {
        cpu::adder_input_gradient(pointer<const float>(x), pointer<const float>(w),
                                  pointer<const float>(g), pointer<float>(dx),
                                  noisyq::bit_cast<cpu::AdderShape>(shape),
                                  noisyq::bit_cast<cpu::AdderBorder>(border), threads);
      },
      release);

  m.def(
      "adder_weight_gradient",
      [](uintptr_t x, uintptr_t w, uintptr_t g, uintptr_t dw, const Shape& shape, int threads) {
        cpu::adder_weight_gradient(pointer<const float>(x), pointer<const float>(w),
                                   pointer<const float>(g), pointer<float>(dw),
                                   noisyq::bit_cast<cpu::AdderShape>(shape), threads);
      },
      release);

#ifdef NOISYQ_WITH_CUDA
  noisyq::bind_cuda(m);
#endif
}
