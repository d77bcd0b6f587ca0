# Enables CUDA as the environment variable NOISYQ_CUDA says: AUTO (the default) where nvcc works, ON
# or the build fails, OFF. NOISYQ_CUDA_STATUS says what came of it: noisyq_fast.info() shows it,
# because pip hides the messages of a build that succeeds.

set(NOISYQ_CUDA AUTO)
if(DEFINED ENV{NOISYQ_CUDA})
  set(NOISYQ_CUDA "$ENV{NOISYQ_CUDA}")
endif()
if(NOT NOISYQ_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "NOISYQ_CUDA: got ${NOISYQ_CUDA}, takes AUTO, ON or OFF")
endif()

set(NOISYQ_CUDA_STATUS "switched off by NOISYQ_CUDA=OFF when it was compiled")
if(NOISYQ_CUDA STREQUAL "OFF")
  return()
endif()

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

# Machine code for what this nvcc knows of these, or for those that the environment variable
# NOISYQ_CUDA_ARCHITECTURES names ("90", "80 90"), and PTX of the newest for devices still to come.
execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE known)
string(REGEX MATCHALL "[0-9]+[a-z]*" known "${known}")
if(DEFINED ENV{NOISYQ_CUDA_ARCHITECTURES})
  string(REGEX REPLACE "[ ,]+" ";" wanted "$ENV{NOISYQ_CUDA_ARCHITECTURES}")
  foreach(architecture ${wanted})
    if(NOT architecture IN_LIST known)
      string(REPLACE ";" " " known "${known}")
      message(FATAL_ERROR "NOISYQ_CUDA_ARCHITECTURES: got ${architecture}, takes some of ${known} "
                          "(what nvcc ${CMAKE_CUDA_COMPILER_VERSION} compiles for)")
    endif()
  endforeach()
  if(NOT wanted)
    message(FATAL_ERROR "NOISYQ_CUDA_ARCHITECTURES: got nothing, takes architectures such as 90")
  endif()
else()
  set(wanted 75 80 86 89 90 100 120)
endif()
list(SORT wanted COMPARE NATURAL)
foreach(architecture ${wanted})
  if(architecture IN_LIST known)
    list(APPEND NOISYQ_CUDA_ARCHITECTURES ${architecture}-real)
    set(newest ${architecture})
  endif()
endforeach()
list(APPEND NOISYQ_CUDA_ARCHITECTURES ${newest}-virtual)
message(STATUS "CUDA kernels are compiled for ${NOISYQ_CUDA_ARCHITECTURES}")
