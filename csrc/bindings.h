// Common code of the bindings.
#pragma once

#include <pybind11/pybind11.h>

#include "kernels.h"

namespace noisyq {

// Python passes addresses as integers.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline MovingAverage moving_average(uintptr_t running_absmax, uintptr_t observed, float constant) {
  return {pointer<float>(running_absmax), pointer<float>(observed), constant};
}

// Adds the submodule `cuda`.
void bind_cuda(pybind11::module_& core);

}  // namespace noisyq
