// Python sees integers: addresses, sizes, enumerators. Every check has been made by then, in
// noisyq_fast/ops.py.
#include "bindings.h"

namespace py = pybind11;
namespace cpu = noisyq::cpu;
using noisyq::DType;
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
      [](int dtype, uintptr_t x, uintptr_t y, int64_t outer, int64_t channels, int64_t inner,
         int qmax, uintptr_t running_absmax, uintptr_t observed, float averaging_constant,
         int threads) {
        cpu::fake_quantize(DType{dtype}, pointer<const void>(x), pointer<void>(y),
                           {outer, channels, inner}, qmax,
                           moving_average(running_absmax, observed, averaging_constant), threads);
      },
      release);

  m.def(
      "fake_quantize_fixed_range",
      [](int dtype, uintptr_t x, uintptr_t absmax, uintptr_t y, uintptr_t clipped, int64_t outer,
         int64_t channels, int64_t inner, int qmax, int threads) {
        cpu::fake_quantize_fixed_range(DType{dtype}, pointer<const void>(x),
                                       pointer<const float>(absmax), pointer<void>(y),
                                       pointer<uint8_t>(clipped), {outer, channels, inner}, qmax,
                                       threads);
      },
      release);

  m.def(
      "quantize",
      [](int dtype, uintptr_t x, uintptr_t codes, uintptr_t scale, int64_t outer, int64_t channels,
         int64_t inner, int qmax, int threads) {
        cpu::quantize(DType{dtype}, pointer<const void>(x), pointer<int8_t>(codes),
                      pointer<float>(scale), {outer, channels, inner}, qmax, threads);
      },
      release);

  m.def(
      "dequantize",
      [](uintptr_t codes, uintptr_t scale, uintptr_t y, int64_t outer, int64_t channels,
         int64_t inner, int threads) {
        cpu::dequantize(pointer<const int8_t>(codes), pointer<const float>(scale),
                        pointer<float>(y), {outer, channels, inner}, threads);
      },
      release);

#ifdef NOISYQ_WITH_CUDA
  noisyq::bind_cuda(m);
#endif
}
