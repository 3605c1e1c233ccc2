// SPDX-License-Identifier: Apache-2.0
// Entry of every Catch2 executable. Where the tests need a GPU and there is none, exits with 77, which ctest shows as
// "Skipped"; UNCOMP_REQUIRE_GPU=1 turns that into a failure.
#if __has_include(<catch2/catch_session.hpp>)
#include <catch2/catch_session.hpp>
#else
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#endif

#include <cstdio>
#include <cstdlib>

#if UNCOMP_TEST_NEEDS_GPU
#include <cuda_runtime_api.h>
#endif

int main(int argc, char** argv) {
#if UNCOMP_TEST_NEEDS_GPU
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    if (std::getenv("UNCOMP_REQUIRE_GPU") != nullptr) {
      std::puts("no CUDA device, but UNCOMP_REQUIRE_GPU is set");
      return 1;
    }
    std::puts("skipped: no CUDA device on this machine");
    return 77;
  }
#endif
  return Catch::Session().run(argc, argv);
}
