// SPDX-License-Identifier: Apache-2.0
// matrix_spectrum over and over: back to back, on two streams, in a graph whose lengths change.
#include "support/catch.hpp"
#include "support/spectrum_problem.hpp"

using namespace uncomp;
using namespace uncomp::test;
using namespace uncomp::test::spectrum;

TEST_CASE("launches that follow each other at once repeat the first one's bits",
          "[matrix_spectrum_repeat][matrix_spectrum][large]") {
  for (const bool half : {false, true}) {
    Problem p = make_problem(3, 8, 1500, 128, 128, half);
    Call call(p, 32, true);
    call.poison(nullptr);
    call(nullptr);
    const std::vector<float> want = call.spectrum.host();
    for (int round = 0; round < 100; ++round) {
      call.poison(nullptr);
      for (int i = 0; i < 10; ++i) call(nullptr);
      REQUIRE(same_bits(call.spectrum.host(), want));
    }
  }
}

TEST_CASE("spectra of two streams at once do not meet", "[matrix_spectrum_repeat][matrix_spectrum][large]") {
  Problem long_heads = make_problem(1, 4, 5000, 128, 128, true), many_heads = make_problem(2, 40, 700, 64, 64, true);
  Call a(long_heads, 32, true), b(many_heads, 16, true);
  a(nullptr);
  b(nullptr);
  const std::vector<float> want_a = a.spectrum.host(), want_b = b.spectrum.host();
  cudaStream_t streams[2];
  for (cudaStream_t& s : streams) cuda_ok(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
  for (int round = 0; round < 50; ++round) {
    a.poison(streams[0]);
    b.poison(streams[1]);
    for (int i = 0; i < 5; ++i) {
      a(streams[0]);
      b(streams[1]);
    }
    REQUIRE(same_bits(a.spectrum.host(), want_a));
    REQUIRE(same_bits(b.spectrum.host(), want_b));
  }
  for (cudaStream_t s : streams) cuda_ok(cudaStreamDestroy(s));
}

TEST_CASE("a captured graph follows the lengths on the device", "[matrix_spectrum_repeat][matrix_spectrum][large]") {
  Problem p = make_problem(2, 6, 3000, 128, 128, true);
  p.first = {0, 0};
  Call call(p, 32, true);
  cudaStream_t stream;
  cuda_ok(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  call(stream);
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  cuda_ok(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  call(stream);
  cuda_ok(cudaStreamEndCapture(stream, &graph));
  cuda_ok(cudaGraphInstantiate(&replay, graph, 0));
  for (const std::vector<int32_t>& length :
       {std::vector<int32_t>{3000, 1}, {0, 2999}, {1024, 1025}, {31, -5}, {9999, 2}}) {
    cuda_ok(cudaMemcpy(call.length.data(), length.data(), 2 * sizeof(int32_t), cudaMemcpyHostToDevice));
    call.poison(stream);
    call(stream);
    cuda_ok(cudaStreamSynchronize(stream));
    const std::vector<float> want = call.spectrum.host();
    call.poison(stream);
    cuda_ok(cudaGraphLaunch(replay, stream));
    cuda_ok(cudaStreamSynchronize(stream));
    REQUIRE(same_bits(call.spectrum.host(), want));
  }
  cuda_ok(cudaGraphExecDestroy(replay));
  cuda_ok(cudaGraphDestroy(graph));
  cuda_ok(cudaStreamDestroy(stream));
}
