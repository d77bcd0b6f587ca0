// The CUDA kernels for Python. A launch that fails raises an error that says why.
#include <cuda_runtime_api.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace noisyq {
namespace {

void check(cuda::Status status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call that looks for an error would find this one
  throw std::runtime_error(cudaGetErrorString(static_cast<cudaError_t>(status)));
}

// Blocks of a reduction and of a map.
using Pair = std::pair<int, int>;

// (x, y, scale, channels, inner, qmax)
using Row = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int>;

template <class Kernel>
void over_channels(Kernel kernel, int dtype, const std::vector<Row>& rows, uintptr_t stream) {
  std::vector<cuda::ChannelTensor> tensors;
  for (const auto& [x, y, scale, channels, inner, qmax] : rows) {
    tensors.push_back(
        {pointer<const void>(x), pointer<void>(y), pointer<float>(scale), channels, inner, qmax});
  }
  check(kernel(DType{dtype}, tensors.data(), static_cast<int>(tensors.size()),
               pointer<void>(stream)));
}

}  // namespace

void bind_cuda(py::module_& core) {
  py::module_ m = core.def_submodule("cuda", "Kernels for CUDA devices.");

  m.def("device_count", [] {
    int count = 0;
    check(cudaGetDeviceCount(&count));
    return count;
  });

  m.def(
      "fake_quantize_channels",
      [](int dtype, const std::vector<Row>& rows, uintptr_t stream) {
        over_channels(cuda::fake_quantize_channels, dtype, rows, stream);
      },
      "dtype"_a, "rows"_a, "stream"_a);

  m.def(
      "quantize_channels",
      [](int dtype, const std::vector<Row>& rows, uintptr_t stream) {
        over_channels(cuda::quantize_channels, dtype, rows, stream);
      },
      "dtype"_a, "rows"_a, "stream"_a);

  m.def(
      "fake_quantize_spread",
      [](int dtype, uintptr_t x, uintptr_t y, int64_t outer, int64_t channels, int64_t inner,
         Pair splits, uintptr_t partial, int qmax, uintptr_t running_absmax, uintptr_t observed,
         float averaging_constant, uintptr_t stream) {
        const Layout layout{outer, channels, inner};
        check(cuda::fake_quantize_spread(
            DType{dtype}, pointer<const void>(x), pointer<void>(y), layout,
            {splits.first, splits.second}, pointer<uint32_t>(partial), qmax,
            moving_average(running_absmax, observed, averaging_constant), pointer<void>(stream)));
      },
      "dtype"_a, "x"_a, "y"_a, "outer"_a, "channels"_a, "inner"_a, "splits"_a, "partial"_a,
      "qmax"_a, "running_absmax"_a, "observed"_a, "averaging_constant"_a, "stream"_a);

  m.def(
      "quantize_spread",
      [](int dtype, uintptr_t x, uintptr_t codes, uintptr_t scale, int64_t outer, int64_t channels,
         int64_t inner, Pair splits, uintptr_t partial, int qmax, uintptr_t stream) {
        const Layout layout{outer, channels, inner};
        check(cuda::quantize_spread(DType{dtype}, pointer<const void>(x), pointer<int8_t>(codes),
                                    pointer<float>(scale), layout, {splits.first, splits.second},
                                    pointer<uint32_t>(partial), qmax, pointer<void>(stream)));
      },
      "dtype"_a, "x"_a, "codes"_a, "scale"_a, "outer"_a, "channels"_a, "inner"_a, "splits"_a,
      "partial"_a, "qmax"_a, "stream"_a);

  m.def(
      "fake_quantize_mixed",
      [](int dtype, uintptr_t x, uintptr_t y, int64_t outer, int64_t channels, int64_t inner,
         Pair blocks, uintptr_t progress, int qmax, uintptr_t running_absmax, uintptr_t observed,
         float averaging_constant, uintptr_t stream) {
        const Layout layout{outer, channels, inner};
        check(
            cuda::fake_quantize_mixed(DType{dtype}, pointer<const void>(x), pointer<void>(y),
                                      layout, {blocks.first, blocks.second}, qmax,
                                      moving_average(running_absmax, observed, averaging_constant),
                                      pointer<uint32_t>(progress), pointer<void>(stream)));
      },
      "dtype"_a, "x"_a, "y"_a, "outer"_a, "channels"_a, "inner"_a, "blocks"_a, "progress"_a,
      "qmax"_a, "running_absmax"_a, "observed"_a, "averaging_constant"_a, "stream"_a);

  m.def("resident_bytes_per_block", cuda::resident_bytes_per_block, "device"_a);

  m.def(
      "fake_quantize_resident",
      [](int dtype, uintptr_t x, uintptr_t y, int64_t elements, int blocks, uintptr_t partial,
         int qmax, uintptr_t running_absmax, uintptr_t observed, float averaging_constant,
         uintptr_t stream) {
        check(cuda::fake_quantize_resident(
            DType{dtype}, pointer<const void>(x), pointer<void>(y), elements, blocks,
            pointer<uint32_t>(partial), qmax,
            moving_average(running_absmax, observed, averaging_constant), pointer<void>(stream)));
      },
      "dtype"_a, "x"_a, "y"_a, "elements"_a, "blocks"_a, "partial"_a, "qmax"_a, "running_absmax"_a,
      "observed"_a, "averaging_constant"_a, "stream"_a);

  m.def(
      "fake_quantize_fixed_range_clipped",
      [](int dtype, uintptr_t x, uintptr_t absmax, uintptr_t y, uintptr_t clipped, int64_t outer,
         int64_t channels, int64_t inner, int blocks, int qmax, uintptr_t stream) {
        const Layout layout{outer, channels, inner};
        check(cuda::fake_quantize_fixed_range_clipped(
            DType{dtype}, pointer<const void>(x), pointer<const float>(absmax), pointer<void>(y),
            pointer<uint8_t>(clipped), layout, blocks, qmax, pointer<void>(stream)));
      },
      "dtype"_a, "x"_a, "absmax"_a, "y"_a, "clipped"_a, "outer"_a, "channels"_a, "inner"_a,
      "blocks"_a, "qmax"_a, "stream"_a);

  m.def(
      "zero_clipped",
      [](int dtype, uintptr_t grad, uintptr_t out, uintptr_t clipped, int64_t elements, int blocks,
         uintptr_t stream) {
        check(cuda::zero_clipped(DType{dtype}, pointer<const void>(grad), pointer<void>(out),
                                 pointer<const uint8_t>(clipped), elements, blocks,
                                 pointer<void>(stream)));
      },
      "dtype"_a, "grad"_a, "out"_a, "clipped"_a, "elements"_a, "blocks"_a, "stream"_a);

  m.def(
      "fake_quantize_fixed_range",
      [](int dtype, uintptr_t x, uintptr_t absmax, uintptr_t y, int64_t outer, int64_t channels,
         int64_t inner, int splits, int qmax, uintptr_t stream) {
        const Layout layout{outer, channels, inner};
        check(cuda::fake_quantize_fixed_range(DType{dtype}, pointer<const void>(x),
                                              pointer<const float>(absmax), pointer<void>(y),
                                              layout, splits, qmax, pointer<void>(stream)));
      },
      "dtype"_a, "x"_a, "absmax"_a, "y"_a, "outer"_a, "channels"_a, "inner"_a, "splits"_a, "qmax"_a,
      "stream"_a);

  m.def(
      "dequantize",
      [](uintptr_t codes, bool are_signed, uintptr_t scale, uintptr_t zero_point, uintptr_t y,
         int64_t outer, int64_t channels, int64_t inner, int splits, uintptr_t stream) {
        const Layout layout{outer, channels, inner};
        check(cuda::dequantize(pointer<const void>(codes), are_signed, pointer<const float>(scale),
                               pointer<const uint8_t>(zero_point), pointer<float>(y), layout,
                               splits, pointer<void>(stream)));
      },
      "codes"_a, "are_signed"_a, "scale"_a, "zero_point"_a, "y"_a, "outer"_a, "channels"_a,
      "inner"_a, "splits"_a, "stream"_a);

  m.def(
      "fake_quantize_on_grid",
      [](int dtype, uintptr_t x, uintptr_t y, int masked, uintptr_t mask, int64_t outer,
         int64_t channels, int64_t inner, Pair splits, uintptr_t range, uintptr_t progress,
         int kind, int qmax, uintptr_t running, uintptr_t observed, float averaging_constant,
         uintptr_t stream) {
        const Layout layout{outer, channels, inner};
        check(cuda::fake_quantize_on_grid(
            DType{dtype}, pointer<const void>(x), pointer<void>(y),
            {Masked{masked}, pointer<uint8_t>(mask)}, layout, {splits.first, splits.second},
            pointer<float>(range), pointer<uint32_t>(progress), {GridKind{kind}, qmax},
            moving_average(running, observed, averaging_constant), pointer<void>(stream)));
      },
      "dtype"_a, "x"_a, "y"_a, "masked"_a, "mask"_a, "outer"_a, "channels"_a, "inner"_a, "splits"_a,
      "range"_a, "progress"_a, "kind"_a, "qmax"_a, "running"_a, "observed"_a,
      "averaging_constant"_a, "stream"_a);

  m.def(
      "quantize_on_grid",
      [](int dtype, uintptr_t x, uintptr_t codes, uintptr_t scale, uintptr_t zero_point,
         int64_t outer, int64_t channels, int64_t inner, Pair splits, uintptr_t range,
         uintptr_t progress, int kind, int qmax, uintptr_t stream) {
        const Layout layout{outer, channels, inner};
        check(cuda::quantize_on_grid(DType{dtype}, pointer<const void>(x), pointer<void>(codes),
                                     pointer<float>(scale), pointer<uint8_t>(zero_point), layout,
                                     {splits.first, splits.second}, pointer<float>(range),
                                     pointer<uint32_t>(progress), {GridKind{kind}, qmax},
                                     pointer<void>(stream)));
      },
      "dtype"_a, "x"_a, "codes"_a, "scale"_a, "zero_point"_a, "outer"_a, "channels"_a, "inner"_a,
      "splits"_a, "range"_a, "progress"_a, "kind"_a, "qmax"_a, "stream"_a);

  m.def(
      "fake_quantize_channels_on_grid",
      [](int dtype, uintptr_t x, uintptr_t y, int masked, uintptr_t mask, int64_t channels,
         int64_t inner, int kind, int qmax, uintptr_t stream) {
        check(cuda::fake_quantize_channels_on_grid(
            DType{dtype}, pointer<const void>(x), pointer<void>(y),
            {Masked{masked}, pointer<uint8_t>(mask)}, channels, inner, {GridKind{kind}, qmax},
            pointer<void>(stream)));
      },
      "dtype"_a, "x"_a, "y"_a, "masked"_a, "mask"_a, "channels"_a, "inner"_a, "kind"_a, "qmax"_a,
      "stream"_a);

  m.def(
      "quantize_channels_on_grid",
      [](int dtype, uintptr_t x, uintptr_t codes, uintptr_t scale, uintptr_t zero_point,
         int64_t channels, int64_t inner, int kind, int qmax, uintptr_t stream) {
        check(cuda::quantize_channels_on_grid(DType{dtype}, pointer<const void>(x),
                                              pointer<void>(codes), pointer<float>(scale),
                                              pointer<uint8_t>(zero_point), channels, inner,
                                              {GridKind{kind}, qmax}, pointer<void>(stream)));
      },
      "dtype"_a, "x"_a, "codes"_a, "scale"_a, "zero_point"_a, "channels"_a, "inner"_a, "kind"_a,
      "qmax"_a, "stream"_a);

  m.def(
      "fake_quantize_fixed_range_on_grid",
      [](int dtype, uintptr_t x, uintptr_t range, uintptr_t y, int masked, uintptr_t mask,
         int64_t outer, int64_t channels, int64_t inner, int blocks, int kind, int qmax,
         uintptr_t stream) {
        const Layout layout{outer, channels, inner};
        check(cuda::fake_quantize_fixed_range_on_grid(
            DType{dtype}, pointer<const void>(x), pointer<const float>(range), pointer<void>(y),
            {Masked{masked}, pointer<uint8_t>(mask)}, layout, blocks, {GridKind{kind}, qmax},
            pointer<void>(stream)));
      },
      "dtype"_a, "x"_a, "range"_a, "y"_a, "masked"_a, "mask"_a, "outer"_a, "channels"_a, "inner"_a,
      "blocks"_a, "kind"_a, "qmax"_a, "stream"_a);

  m.def(
      "fake_quantize_learned",
      [](int dtype, uintptr_t x, uintptr_t parameters, uintptr_t y, int64_t outer, int64_t channels,
         int64_t inner, int splits, int kind, int low, int high, uintptr_t stream) {
        check(cuda::fake_quantize_learned(DType{dtype}, pointer<const void>(x),
                                          pointer<const float>(parameters), pointer<void>(y),
                                          {outer, channels, inner}, splits, RuleKind{kind}, low,
                                          high, pointer<void>(stream)));
      },
      "dtype"_a, "x"_a, "parameters"_a, "y"_a, "outer"_a, "channels"_a, "inner"_a, "splits"_a,
      "kind"_a, "low"_a, "high"_a, "stream"_a);

  m.def(
      "quantize_learned",
      [](int dtype, uintptr_t x, uintptr_t parameters, uintptr_t codes, int64_t outer,
         int64_t channels, int64_t inner, int splits, int kind, int low, int high,
         uintptr_t stream) {
        check(cuda::quantize_learned(DType{dtype}, pointer<const void>(x),
                                     pointer<const float>(parameters), pointer<int16_t>(codes),
                                     {outer, channels, inner}, splits, RuleKind{kind}, low, high,
                                     pointer<void>(stream)));
      },
      "dtype"_a, "x"_a, "parameters"_a, "codes"_a, "outer"_a, "channels"_a, "inner"_a, "splits"_a,
      "kind"_a, "low"_a, "high"_a, "stream"_a);

  m.def(
      "fake_quantize_learned_backward",
      [](int dtype, uintptr_t grad, uintptr_t x, uintptr_t parameters, uintptr_t dx, uintptr_t sums,
         uintptr_t partial, int64_t channels, int64_t inner, int kind, int low, int high,
         float gradient_scale, uintptr_t stream) {
        check(cuda::fake_quantize_learned_backward(
            DType{dtype}, pointer<const void>(grad), pointer<const void>(x),
            pointer<const float>(parameters), pointer<void>(dx), pointer<float>(sums),
            pointer<float>(partial), channels, inner, RuleKind{kind}, low, high, gradient_scale,
            pointer<void>(stream)));
      },
      "dtype"_a, "grad"_a, "x"_a, "parameters"_a, "dx"_a, "sums"_a, "partial"_a, "channels"_a,
      "inner"_a, "kind"_a, "low"_a, "high"_a, "gradient_scale"_a, "stream"_a);
}

}  // namespace noisyq
