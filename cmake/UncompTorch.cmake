# SPDX-License-Identifier: Apache-2.0
# torch as its Python package describes itself. find_package(Torch) is not used: with a CUDA torch it demands a whole
# CUDA toolkit, and we build without one too.

execute_process(
  COMMAND ${UNCOMP_PYTHON} ${CMAKE_CURRENT_SOURCE_DIR}/cmake/describe_torch.py
  OUTPUT_VARIABLE torch_text ERROR_VARIABLE torch_error RESULT_VARIABLE torch_result OUTPUT_STRIP_TRAILING_WHITESPACE
  ERROR_STRIP_TRAILING_WHITESPACE)
if(NOT torch_result EQUAL 0)
  string(REGEX REPLACE "^uncomp: " "" torch_error "${torch_error}")
  uncomp_stop("${torch_error}")
endif()
# One "KEY=value" a line.
string(REPLACE "\n" ";" torch_lines "${torch_text}")
foreach(line IN LISTS torch_lines)
  string(REGEX MATCH "^([A-Z0-9_]+)=(.*)$" _ "${line}")
  set(UNCOMP_${CMAKE_MATCH_1} "${CMAKE_MATCH_2}")
endforeach()
string(REPLACE "|" ";" UNCOMP_TORCH_INCLUDES "${UNCOMP_TORCH_INCLUDES}")
message(STATUS "uncomp: torch ${UNCOMP_TORCH_VERSION} of ${UNCOMP_PYTHON}")

add_library(uncomp_torch INTERFACE)
target_include_directories(uncomp_torch SYSTEM INTERFACE ${UNCOMP_TORCH_INCLUDES})
# torch's own CUDA libraries may be absent where we only build.
target_link_options(uncomp_torch INTERFACE LINKER:--allow-shlib-undefined)
target_link_libraries(uncomp_torch INTERFACE ${UNCOMP_TORCH_LIB}/libtorch_cpu.so ${UNCOMP_TORCH_LIB}/libc10.so)

add_library(uncomp_torch_python INTERFACE)
target_include_directories(uncomp_torch_python SYSTEM INTERFACE ${UNCOMP_PYTHON_INCLUDE} ${UNCOMP_PYBIND11_INCLUDE})
target_compile_definitions(uncomp_torch_python INTERFACE TORCH_EXTENSION_NAME=_C)
target_link_libraries(uncomp_torch_python INTERFACE uncomp_torch ${UNCOMP_TORCH_LIB}/libtorch_python.so)
