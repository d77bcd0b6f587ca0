// What the bindings share.
#pragma once

#include <pybind11/pybind11.h>

#include "kernels.h"

namespace noisyq {

// Addresses cross from Python as integers.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Adds the submodule `cuda`.
void bind_cuda(pybind11::module_& core);

}  // namespace noisyq
