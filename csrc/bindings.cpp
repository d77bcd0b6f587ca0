// Python sees integers: addresses, sizes, enumerators. Every check has been made by then, in
// noisyq_fast/ops.py.
#include "bindings.h"

namespace py = pybind11;
namespace cpu = noisyq::cpu;
using noisyq::DType;
using noisyq::GridKind;
using noisyq::Masked;
using noisyq::moving_average;
using noisyq::pointer;
using noisyq::RuleKind;

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

  m.def(
      "fake_quantize_learned",
      [](int dtype, uintptr_t x, uintptr_t parameters, uintptr_t y, int64_t outer,
         int64_t channels, int64_t inner, int kind, int low, int high, int threads) {
        cpu::fake_quantize_learned(DType{dtype}, pointer<const void>(x),
                                   pointer<const float>(parameters), pointer<void>(y),
                                   {outer, channels, inner}, RuleKind{kind}, low, high, threads);
      },
      release);

  m.def(
      "quantize_learned",
      [](int dtype, uintptr_t x, uintptr_t parameters, uintptr_t codes, int64_t outer,
         int64_t channels, int64_t inner, int kind, int low, int high, int threads) {
        cpu::quantize_learned(DType{dtype}, pointer<const void>(x),
                              pointer<const float>(parameters), pointer<int16_t>(codes),
                              {outer, channels, inner}, RuleKind{kind}, low, high, threads);
      },
      release);

  m.def(
      "fake_quantize_learned_backward",
      [](int grad_dtype, uintptr_t grad, int dtype, uintptr_t x, uintptr_t parameters,
         uintptr_t dx, uintptr_t sums, int64_t outer, int64_t channels, int64_t inner, int kind,
         int low, int high, int threads) {
        cpu::fake_quantize_learned_backward(
            DType{grad_dtype}, pointer<const void>(grad), DType{dtype}, pointer<const void>(x),
            pointer<const float>(parameters), pointer<void>(dx), pointer<float>(sums),
            {outer, channels, inner}, RuleKind{kind}, low, high, threads);
      },
      release);

#ifdef NOISYQ_WITH_CUDA
  noisyq::bind_cuda(m);
#endif
}
