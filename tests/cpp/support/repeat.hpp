// SPDX-License-Identifier: Apache-2.0
// What every launch must stand: many in a row, others beside it, a graph whose inputs change. A call on the device has
// launch(stream); poison(), which spoils all that a launch writes, its workspace too; results(), the bytes it left.
#pragma once

#include <array>
#include <vector>

#include "support/catch.hpp"
#include "support/device.hpp"

namespace uncomp::test {

using Bytes = std::vector<unsigned char>;

/// What lies in the arrays, one behind the other.
template <class... T>
Bytes contents(const DeviceArray<T>&... arrays) {
  Bytes all;
  const auto add = [&](const auto& host) {
    const auto* begin = reinterpret_cast<const unsigned char*>(host.data());
    all.insert(all.end(), begin, begin + host.size() * sizeof(host[0]));
  };
  (add(arrays.host()), ...);
  return all;
}

/// A stream that waits for no other.
class Stream {
 public:
  Stream() { cuda_ok(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(stream_); }
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

/// What `record` puts into `stream`, to be launched there over and over.
class Graph {
 public:
  template <class Record>
  Graph(const Stream& stream, Record&& record) : stream_(stream) {
    cuda_ok(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    record();
    cuda_ok(cudaStreamEndCapture(stream_, &graph_));
    cuda_ok(cudaGraphInstantiate(&program_, graph_, 0));
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    cudaGraphExecDestroy(program_);
    cudaGraphDestroy(graph_);
  }
  void launch() const { cuda_ok(cudaGraphLaunch(program_, stream_)); }

 private:
  cudaStream_t stream_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t program_ = nullptr;
};

/// `launches` in a row leave what a single one leaves, and so does each of `runs` over poison.
template <class Call>
void require_repeats(Call& call, int launches, int runs) {
  call.launch(nullptr);
  const Bytes first = call.results();
  call.poison();
  for (int i = 0; i < launches; ++i) call.launch(nullptr);
  REQUIRE((call.results() == first));
  for (int run = 0; run < runs; ++run) {
    call.poison();
    call.launch(nullptr);
    REQUIRE((call.results() == first));
  }
}

/// Calls side by side, each on a stream of its own and `launches` in a row, leave what each leaves alone.
template <class... Calls>
void require_apart(int rounds, int launches, Calls&... calls) {
  const std::array<Stream, sizeof...(Calls)> streams;
  std::array<Bytes, sizeof...(Calls)> alone;
  const auto each = [&](const auto& f) {
    size_t i = 0;
    (f(calls, i++), ...);
  };
  each([&](auto& call, size_t i) {
    call.launch(nullptr);
    alone[i] = call.results();
  });
  for (int round = 0; round < rounds; ++round) {
    (calls.poison(), ...);
    cuda_ok(cudaDeviceSynchronize());
    for (int launch = 0; launch < launches; ++launch) {
      each([&](auto& call, size_t i) { call.launch(streams[i]); });
    }
    each([&](auto& call, size_t i) { REQUIRE((call.results() == alone[i])); });
  }
}

struct NoLook {
  void operator()(int) const {}
};

/// One graph of two launches, recorded once, leaves what a plain launch leaves after each `change(step)`; then
/// `look(step)` may judge it.
template <class Call, class Change, class Look = NoLook>
void require_graph_follows(Call& call, int steps, Change&& change, Look&& look = {}) {
  call.launch(nullptr);  // permissions, outside of the capture
  cuda_ok(cudaDeviceSynchronize());
  const Stream stream;
  const Graph graph(stream, [&] {
    call.launch(stream);
    call.launch(stream);
  });
  for (int step = 0; step < steps; ++step) {
    CAPTURE(step);
    change(step);
    call.poison();
    call.launch(nullptr);
    const Bytes want = call.results();
    call.poison();
    cuda_ok(cudaDeviceSynchronize());
    graph.launch();
    REQUIRE((call.results() == want));
    look(step);
  }
}

}  // namespace uncomp::test
