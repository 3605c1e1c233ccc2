# SPDX-License-Identifier: Apache-2.0
# ccache when present, warnings as errors in our own code, and the search for nvcc.

# Ends the configuration with one unbroken line, which setup.py repeats last.
function(uncomp_stop text)
  message(NOTICE "uncomp: ${text}")
  message(FATAL_ERROR "stopped")
endfunction()

find_program(UNCOMP_CCACHE ccache)
if(UNCOMP_CCACHE)
  # Precompiled headers and __TIME__ in system headers would make ccache give up.
  set(launcher ${CMAKE_COMMAND} -E env CCACHE_SLOPPINESS=pch_defines,time_macros ${UNCOMP_CCACHE})
  set(CMAKE_CXX_COMPILER_LAUNCHER ${launcher})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${launcher})
endif()

set(UNCOMP_WARNINGS -Wall -Wextra -Werror)

function(uncomp_cxx_target target)
  target_compile_options(${target} PRIVATE ${UNCOMP_WARNINGS} $<$<BOOL:${UNCOMP_CCACHE}>:-fpch-preprocess>)
  target_compile_definitions(${target} PRIVATE UNCOMP_WITH_CUDA=$<BOOL:${UNCOMP_WITH_CUDA}>)
endfunction()

set(UNCOMP_NVCC_MINIMUM 12.8)
set(UNCOMP_WITH_CUDA OFF)
set(UNCOMP_NVCC_VERSION "")
set(UNCOMP_ARCHS_BUILT "")
string(TOLOWER "${UNCOMP_CUDA}" mode)
if(NOT mode MATCHES "^(auto|on|off)$")
  uncomp_stop("UNCOMP_CUDA must be auto, on or off; got ${UNCOMP_CUDA}")
endif()
if(mode STREQUAL "off")
  return()
endif()

find_program(UNCOMP_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
if(NOT UNCOMP_NVCC)
  if(mode STREQUAL "on")
    uncomp_stop("UNCOMP_CUDA=on but nvcc was not found: install CUDA Toolkit ${UNCOMP_NVCC_MINIMUM} or newer")
  endif()
  message(STATUS "uncomp: nvcc not found, building the CPU bodies only")
  return()
endif()

execute_process(COMMAND ${UNCOMP_NVCC} --version OUTPUT_VARIABLE nvcc_text)
string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" _ "${nvcc_text}")
set(UNCOMP_NVCC_VERSION ${CMAKE_MATCH_1})
if(NOT UNCOMP_NVCC_VERSION OR UNCOMP_NVCC_VERSION VERSION_LESS UNCOMP_NVCC_MINIMUM)
  uncomp_stop("${UNCOMP_NVCC} ${UNCOMP_NVCC_VERSION} is too old: install CUDA Toolkit ${UNCOMP_NVCC_MINIMUM} or newer, or set UNCOMP_CUDA=off")
endif()

# Architectures are named one by one below: CMake's own list would add a pass that rejects sm_90a instructions.
set(CMAKE_CUDA_COMPILER ${UNCOMP_NVCC})
set(CMAKE_CUDA_ARCHITECTURES OFF)
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know it for every nvcc
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
find_package(CUDAToolkit ${UNCOMP_NVCC_MINIMUM} REQUIRED)
set(UNCOMP_WITH_CUDA ON)

set(UNCOMP_GENCODE "")
set(newest_portable "")
foreach(arch IN LISTS UNCOMP_CUDA_ARCHS)
  if(NOT arch MATCHES "^[0-9]+[af]?$")
    uncomp_stop("UNCOMP_CUDA_ARCHS must be compute capabilities like 80;90a; got ${UNCOMP_CUDA_ARCHS}")
  endif()
  list(APPEND UNCOMP_GENCODE -gencode=arch=compute_${arch},code=sm_${arch})
  if(arch MATCHES "^[0-9]+$")
    set(newest_portable ${arch})
  endif()
endforeach()
if(newest_portable)
  # PTX for chips newer than this list.
  list(APPEND UNCOMP_GENCODE -gencode=arch=compute_${newest_portable},code=compute_${newest_portable})
endif()
list(JOIN UNCOMP_CUDA_ARCHS "," UNCOMP_ARCHS_BUILT)

add_library(uncomp_cudart INTERFACE)
target_include_directories(uncomp_cudart SYSTEM INTERFACE ${CUDAToolkit_INCLUDE_DIRS})
target_link_libraries(uncomp_cudart INTERFACE CUDA::cudart_static)

function(uncomp_cuda_target target)
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES OFF CUDA_STANDARD 20 CUDA_VISIBILITY_PRESET hidden)
  target_compile_options(${target} PRIVATE ${UNCOMP_GENCODE} -Werror=all-warnings --expt-relaxed-constexpr
                         -Xptxas=--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error
                         -Xcompiler=-Wall,-Wextra,-Werror)
endfunction()
