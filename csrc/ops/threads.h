// SPDX-License-Identifier: Apache-2.0
// Work shared among torch's own threads.
#pragma once

#include <c10/util/FunctionRef.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace uncomp {

/// Calls work(task, thread) for the tasks 0 .. tasks - 1, which threads take in this order, each the next free one.
/// thread counts from 0 to shared_by(tasks, most_threads) - 1; with one thread all runs on the caller. An exception of
/// one task is raised here once all threads are done.
void share(int64_t tasks, int64_t most_threads, c10::function_ref<void(int64_t task, int64_t thread)> work);

/// Threads that `share` would use: torch's number, one inside a parallel region of torch.
int64_t shared_by(int64_t tasks, int64_t most_threads);

/// Threads that are worth starting for a loop that reads `elements`.
constexpr int64_t threads_for(int64_t elements) { return 1 + elements / (1 << 15); }

/// Neighbours of one row that make one task.
struct RowPart {
  int32_t row, first, count;
};

/// Rows of count(row) items each, cut into parts of at most `most` items; a row of none has no part.
template <class Count>
std::vector<RowPart> row_parts(int32_t rows, int32_t most, const Count& count) {
  std::vector<RowPart> parts;
  for (int32_t r = 0; r < rows; ++r) {
    const int32_t items = count(r);
    for (int32_t i = 0; i < items; i += most) parts.push_back({r, i, std::min(most, items - i)});
  }
  return parts;
}

}  // namespace uncomp
