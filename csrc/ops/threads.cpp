// SPDX-License-Identifier: Apache-2.0
// Work shared among torch's own threads. at::parallel_for is a template: compiled here it would call whatever OpenMP
// this compiler brings, or none. TensorIterator's loop is the same call compiled inside torch.
#include "ops/threads.h"

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>

namespace uncomp {

int64_t shared_by(int64_t tasks, int64_t most_threads) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  return std::max<int64_t>(std::min({tasks, most_threads, threads}), 1);
}

void share(int64_t tasks, int64_t most_threads, c10::function_ref<void(int64_t task, int64_t thread)> work) {
  const int64_t threads = shared_by(tasks, most_threads);
  if (threads == 1) {
    for (int64_t task = 0; task < tasks; ++task) work(task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  // One byte a thread; the place of a byte is the number of its thread.
  at::Tensor bytes = at::empty({threads}, at::kByte);
  const char* first = static_cast<const char*>(bytes.const_data_ptr());
  at::TensorIterator::nullary_op(bytes).for_each(
      [&](char** data, const int64_t* strides, int64_t count, int64_t) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t thread = data[0] + i * strides[0] - first;
          for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(task, thread);
        }
      },
      /*grain_size=*/1);
}

}  // namespace uncomp
