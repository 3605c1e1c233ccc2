// SPDX-License-Identifier: Apache-2.0
// A block, or a cluster of blocks, chooses the tokens of one row. Each block turns its slice of the candidates into
// pooled keys once and keeps them in shared memory (or, beyond that, in the workspace). Three histograms, 11 + 11 + 10
// bits, find the key T of the last token that stays; then each warp compacts a run of the slice in order: a key above T
// stays, a key equal to T stays while its place among the ties of the row is below what is still needed.
#include "kernels/select_tokens.h"

#include "kernels/runtime.h"
#include "kernels/select_tokens/steps.cuh"

namespace uncomp::kernels {
namespace {

using namespace select_steps;

constexpr int kOneLaunchRows = 256;  // up to here each block adds the lengths of all rows itself

__device__ SelectRow load_row(const SelectTokensParams& p, int32_t row) {
  return select_row(p.length[row], p.keep_len[row], p.columns, p.sink, p.window);
}

/// Where the entries of a row begin and end, and where those of the last row end; clamped to total_keep.
struct Span {
  int32_t start, end, all;
};

__device__ Span row_span(const SelectTokensParams& p, int32_t row, int32_t keep, bool one_launch) {
  if (!one_launch) return {p.row_start[row], p.row_start[row + 1], p.row_start[p.num_rows]};
  int64_t before = 0, all = 0;
#pragma unroll 4
  for (int32_t r = threadIdx.x % 32; r < p.num_rows; r += 32) {
    const int32_t other = load_row(p, r).keep;
    all += other;
    before += r < row ? other : 0;
  }
  before = warp_sum(before);
  all = warp_sum(all);
  const int64_t total = p.total_keep;
  return {static_cast<int32_t>(min_of(before, total)), static_cast<int32_t>(min_of(before + keep, total)),
          static_cast<int32_t>(min_of(all, total))};
}

template <bool kResident>
__global__ void __launch_bounds__(kSelectMaxThreads)
    select_tokens_kernel(const __grid_constant__ SelectTokensParams p, int32_t blocks, int32_t stage, bool one_launch,
                         uint32_t* workspace) {
  extern __shared__ __align__(16) unsigned char shared[];
  Scratch& scratch = *reinterpret_cast<Scratch*>(shared);
  float* buffer = reinterpret_cast<float*>(shared + 4 * (kSelectHistogramWords + kSelectScratchWords));
  const int32_t thread = threadIdx.x, threads = blockDim.x, warp = thread / 32, lane = thread % 32;
  const int32_t row = blockIdx.x / blocks;
  const Team team{static_cast<int32_t>(blockIdx.x % blocks), blocks};
  for (int32_t i = thread; i < kSelectHistogramWords; i += threads) scratch.histogram[i] = 0;

  const SelectRow s = load_row(p, row);

  // ---- this block's slice of the candidates as keys
  const int32_t limit = s.tokens - s.tail, candidates = limit - s.head, share = ceil_div(candidates, blocks);
  const int32_t skipped = static_cast<int32_t>(min_of<int64_t>(int64_t{team.rank} * share, candidates));
  const int32_t begin = s.head + skipped, count = min_of(share, candidates - skipped);
  uint32_t* keys =
      kResident ? reinterpret_cast<uint32_t*>(buffer) : workspace + static_cast<int64_t>(row) * p.columns + begin;
  if (s.need > 0) {
    load_keys<kResident>(p, p.scores + row * p.row_stride, begin, count, limit, stage, buffer, keys, scratch.histogram);
    team.arrive();
  }

  // ---- where the row's entries go; the tail that no row fills
  const Span span = row_span(p, row, s.keep, one_launch);
  if (one_launch && team.rank == 0 && thread == 0) {
    p.row_start[row] = span.start;
    if (row == p.num_rows - 1) p.row_start[p.num_rows] = span.all;
  }
  for (int64_t i = int64_t{span.all} + static_cast<int64_t>(blockIdx.x) * threads + thread; i < p.total_keep;
       i += static_cast<int64_t>(gridDim.x) * threads) {
    p.index[i] = -1;
  }
  int32_t* out = p.index + span.start;
  const int32_t room = span.end - span.start;
  const auto put = [&](int32_t place, int32_t column) {
    if (place < room) out[place] = column;
  };

  // ---- tokens that stay in any case
  for (int32_t i = team.rank * threads + thread; i < s.head + s.tail; i += blocks * threads) {
    const bool first = i < s.head;
    put(first ? i : s.keep - s.tail + (i - s.head), first ? i : s.tokens - s.tail + (i - s.head));
  }
  if (s.need == 0) return;  // the same for all blocks of the row
  team.wait();

  // ---- T, digit by digit; `need` becomes what is needed among the keys equal to T
  uint32_t need = static_cast<uint32_t>(s.need);
  uint32_t* histogram = scratch.histogram;
  Digit digit = find_digit(team, histogram, kSelectBins1, need, scratch);
  uint32_t threshold = digit.value;
  need -= digit.above;
  histogram += kSelectBins1;
  count_digit(keys, count, kSelectShift1, threshold, kSelectBits3, kSelectBins2, histogram);
  team.barrier();
  digit = find_digit(team, histogram, kSelectBins2, need, scratch);
  threshold = threshold << kSelectBits2 | digit.value;
  need -= digit.above;
  histogram += kSelectBins2;
  count_digit(keys, count, kSelectBits3, threshold, 0, kSelectBins3, histogram);
  team.barrier();
  digit = find_digit(team, histogram, kSelectBins3, need, scratch);
  threshold = threshold << kSelectBits3 | digit.value;
  need -= digit.above;

  // ---- keys above and equal to T before this warp's run of the slice
  const int32_t run = round_up(ceil_div(count, threads / 32), 32);
  const int32_t from = min_of(warp * run, count), to = min_of(from + run, count);
  uint32_t above = 0, equal = 0;
  for (int32_t i = from + lane; i < to; i += 32) {
    above += keys[i] > threshold;
    equal += keys[i] == threshold;
  }
  above = warp_sum(above);
  equal = warp_sum(equal);
  if (lane == 0) {
    scratch.above[warp] = above;
    scratch.equal[warp] = equal;
  }
  __syncthreads();
  above = lane < threads / 32 ? scratch.above[lane] : 0u;
  equal = lane < threads / 32 ? scratch.equal[lane] : 0u;
  if (blocks > 1) {
    const uint32_t all_above = warp_sum(above), all_equal = warp_sum(equal);
    if (thread == 0) {
      scratch.totals[0] = all_above;
      scratch.totals[1] = all_equal;
    }
    cluster_barrier();
  }
  above = lane < warp ? above : 0u;
  equal = lane < warp ? equal : 0u;
  if (blocks > 1) {
    if (lane < team.rank) {
      above += cluster_read(&scratch.totals[0], lane);
      equal += cluster_read(&scratch.totals[1], lane);
    }
    cluster_arrive();  // this block no longer reads the others
  }
  above = warp_sum(above);
  equal = warp_sum(equal);

  // ---- ordered compaction
  const uint32_t lower = (1u << lane) - 1;
  for (int32_t base = from; base < to; base += 32) {
    const int32_t i = base + lane;
    const uint32_t key = i < to ? keys[i] : 0u;
    const bool is_above = i < to && key > threshold, is_equal = i < to && key == threshold;
    const unsigned all_above = __ballot_sync(kFullWarp, is_above), all_equal = __ballot_sync(kFullWarp, is_equal);
    const uint32_t my_above = above + __popc(all_above & lower), my_equal = equal + __popc(all_equal & lower);
    if (is_above || (is_equal && my_equal < need)) {
      put(s.head + static_cast<int32_t>(my_above + min_of(my_equal, need)), begin + i);
    }
    above += __popc(all_above);
    equal += __popc(all_equal);
  }
  if (blocks > 1) cluster_wait();  // the others may still read this block
}

/// row_start alone: one block adds the lengths in order.
__global__ void __launch_bounds__(kSelectMaxThreads)
    select_row_start_kernel(const __grid_constant__ SelectTokensParams p) {
  __shared__ int64_t sum[32];
  const int64_t total = p.total_keep;
  int64_t done = 0;
  for (int64_t base = 0; base < p.num_rows; base += kSelectMaxThreads) {
    const int64_t row = base + threadIdx.x;
    const bool live = row < p.num_rows;
    int64_t all = 0;
    const int64_t before =
        done + block_exclusive_sum<int64_t>(live ? load_row(p, static_cast<int32_t>(row)).keep : 0, sum, &all);
    if (live) p.row_start[row] = static_cast<int32_t>(min_of(before, total));
    done += all;
  }
  if (threadIdx.x == 0) p.row_start[p.num_rows] = static_cast<int32_t>(min_of(done, total));
}

const void* kernel_of(const SelectPlan& plan) {
  return plan.resident ? reinterpret_cast<const void*>(&select_tokens_kernel<true>)
                       : reinterpret_cast<const void*>(&select_tokens_kernel<false>);
}

/// The plan that the current device can run: fewer blocks a row where it cannot hold a cluster of that size.
cudaError_t plan_for_device(const SelectTokensParams& p, SelectPlan* plan) {
  DeviceInfo info;
  if (const cudaError_t err = device_info(&info); err != cudaSuccess) return err;
  int32_t blocks = select_blocks(p.num_rows, p.columns, info.sm_count);
  for (;; blocks /= 2) {
    *plan = select_plan(p.num_rows, p.columns, p.pool, info.smem_per_block, blocks);
    if (const cudaError_t err = allow_shared_memory(kernel_of(*plan), static_cast<size_t>(plan->shared_bytes));
        err != cudaSuccess) {
      return err;
    }
    if (blocks == 1) return cudaSuccess;
    bool fits = false;
    if (const cudaError_t err =
            cluster_fits(kernel_of(*plan), blocks, plan->threads, static_cast<size_t>(plan->shared_bytes), &fits);
        err != cudaSuccess) {
      return err;
    }
    if (fits) return cudaSuccess;
  }
}

}  // namespace

cudaError_t select_tokens_workspace_bytes(const SelectTokensParams& params, int64_t* bytes) {
  SelectPlan plan{};
  const cudaError_t err = plan_for_device(params, &plan);
  *bytes = plan.workspace_bytes;
  return err;
}

cudaError_t select_tokens(const SelectTokensParams& params, void* workspace, cudaStream_t stream) {
  const bool one_launch = params.num_rows > 0 && params.num_rows <= kOneLaunchRows;
  if (!one_launch) {
    select_row_start_kernel<<<1, kSelectMaxThreads, 0, stream>>>(params);
    if (const cudaError_t err = cudaGetLastError(); err != cudaSuccess || params.num_rows == 0) return err;
  }
  SelectPlan plan{};
  if (const cudaError_t err = plan_for_device(params, &plan); err != cudaSuccess) return err;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(params.num_rows) * static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(plan.blocks), 1, 1};
  config.attrs = &cluster;
  config.numAttrs = plan.blocks > 1 ? 1 : 0;
  uint32_t* keys = static_cast<uint32_t*>(workspace);
  return plan.resident ? cudaLaunchKernelEx(&config, select_tokens_kernel<true>, params, plan.blocks, plan.stage,
                                            one_launch, keys)
                       : cudaLaunchKernelEx(&config, select_tokens_kernel<false>, params, plan.blocks, plan.stage,
                                            one_launch, keys);
}

}  // namespace uncomp::kernels
