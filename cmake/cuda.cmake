# Enables CUDA where NOISYQ_CUDA asks for it and nvcc works. NOISYQ_CUDA_STATUS says what came of
# it: noisyq_fast.info() shows it, because pip hides the messages of a build that succeeds.

set(NOISYQ_CUDA_STATUS "switched off by NOISYQ_CUDA=OFF when it was compiled")
if(NOISYQ_CUDA STREQUAL "OFF")
  return()
endif()

include(CheckLanguage)
check_language(CUDA) # compiles a small program; a broken nvcc counts as none
if(NOT CMAKE_CUDA_COMPILER)
  set(NOISYQ_CUDA_STATUS "no working nvcc was found when it was compiled")
  if(NOISYQ_CUDA STREQUAL "ON")
    message(FATAL_ERROR "NOISYQ_CUDA=ON, but ${NOISYQ_CUDA_STATUS}")
  endif()
  message(STATUS "CUDA kernels are left out: ${NOISYQ_CUDA_STATUS}")
  return()
endif()

set(CMAKE_CUDA_ARCHITECTURES OFF) # set for the target below
enable_language(CUDA)
set(NOISYQ_CUDA_STATUS "nvcc ${CMAKE_CUDA_COMPILER_VERSION}")

# Machine code for what this nvcc knows of these, and PTX of the newest for devices still to come.
execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE known)
foreach(architecture 75 80 86 89 90 100 120)
  if(known MATCHES "compute_${architecture}\n")
    list(APPEND NOISYQ_CUDA_ARCHITECTURES ${architecture}-real)
    set(newest ${architecture})
  endif()
endforeach()
list(APPEND NOISYQ_CUDA_ARCHITECTURES ${newest}-virtual)
