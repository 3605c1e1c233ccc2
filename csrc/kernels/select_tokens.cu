// SPDX-License-Identifier: Apache-2.0
// A block, or a cluster of blocks, chooses the tokens of one row. Each block turns its slice of the candidates into
// pooled keys once and keeps them in shared memory (or, beyond that, in the workspace). Three histograms, 11 + 11 + 10
// bits, find the key T of the last token that stays; then each warp compacts a run of the slice in order: a key above T
// stays, a key equal to T stays while its place among the ties of the row is below what is still needed.
#include "kernels/select_tokens.h"

#include "core/select_keys.h"
#include "core/select_plan.h"
#include "kernels/common/cluster.cuh"
#include "kernels/common/reduce.cuh"
#include "kernels/runtime.h"

namespace uncomp::kernels {
namespace {

constexpr int kBatch = 4;            // columns that a thread has in flight
constexpr int kOneLaunchRows = 256;  // up to here each block adds the lengths of all rows itself

constexpr int kSelectShift1 = kSelectBits2 + kSelectBits3;

/// Shared memory before the keys.
struct Scratch {
  uint32_t histogram[kSelectHistogramWords];
  uint32_t sum[32], above[32], equal[32];  // per warp
  uint32_t found[2];                       // digit, keys above it
  uint32_t totals[2];                      // of this block: keys above T, keys equal to T
};
static_assert(sizeof(Scratch) <= 4 * (kSelectHistogramWords + kSelectScratchWords));

__device__ SelectRow load_row(const SelectTokensParams& p, int32_t row) {
  return select_row(p.length[row], p.keep_len[row], p.columns, p.sink, p.window);
}

/// Blocks of the row this block works on.
struct Team {
  int32_t rank, blocks;

  /// A barrier over the row's blocks in two halves.
  __device__ void arrive() const {
    if (blocks > 1) cluster_arrive();
  }
  __device__ void wait() const {
    if (blocks > 1) {
      cluster_wait();
    } else {
      __syncthreads();
    }
  }
  __device__ void barrier() const {
    arrive();
    wait();
  }
  /// Sum of a word of shared memory over the blocks. All reads are in flight together; `blocks` is a power of two.
  __device__ uint32_t sum(const uint32_t* p) const {
    if (blocks == 1) return *p;
    uint32_t part[kSelectMaxBlocks], total = 0;
#pragma unroll
    for (int32_t r = 0; r < kSelectMaxBlocks; ++r) part[r] = cluster_read(p, r & (blocks - 1));
#pragma unroll
    for (int32_t r = 0; r < kSelectMaxBlocks; ++r) total += r < blocks ? part[r] : 0u;
    return total;
  }
};

struct Digit {
  uint32_t value, above;  // the digit of T, and the keys whose digit is larger
};

/// The digit in which the `need`-th largest key lies. Every thread owns a run of bins, highest first.
__device__ Digit find_digit(const Team& team, const uint32_t* histogram, int32_t bins, uint32_t need,
                            Scratch& scratch) {
  const int32_t run = bins / static_cast<int32_t>(blockDim.x);
  const uint32_t* bin = histogram + bins - 1 - static_cast<int32_t>(threadIdx.x) * run;
  uint32_t held = 0, total = 0;
#pragma unroll 2
  for (int32_t i = 0; i < run; ++i) held += team.sum(bin - i);
  uint32_t above = block_exclusive_sum(held, scratch.sum, &total);
  if (above < need && need <= above + held) {
    uint32_t here = team.sum(bin);
    while (above + here < need) {
      above += here;
      here = team.sum(--bin);
    }
    scratch.found[0] = static_cast<uint32_t>(bin - histogram);
    scratch.found[1] = above;
  }
  __syncthreads();
  return {scratch.found[0], scratch.found[1]};
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

/// Joins `p.pool` scores upwards from each of a thread's columns.
template <bool kMax>
__device__ void pool_columns(const float* buffer, const int32_t (&column)[kBatch], int32_t width,
                             float (&pool)[kBatch]) {
  for (int32_t d = 0; d < width; ++d) {
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const float x = buffer[column[k] + d];
      pool[k] = kMax ? larger_number(pool[k], x) : add_rounded(pool[k], x);
    }
  }
}

/// Turns columns [begin, begin + count) of a row into pooled keys and counts their highest digits. Pooling sees columns
/// [0, limit). `buffer` holds the scores of a stage from half a pool before it to half a pool behind it, so the pool of
/// the stage's column i starts at buffer[i]. No later column reads that place, and resident keys are put there.
template <bool kResident>
__device__ void load_keys(const SelectTokensParams& p, const float* scores, int32_t begin, int32_t count, int32_t limit,
                          int32_t stage, float* buffer, uint32_t* keys, uint32_t* histogram) {
  const int32_t thread = threadIdx.x, threads = blockDim.x, half = p.pool / 2;
  const float nothing = pool_nothing(p.pool_mode);
  for (int32_t at = 0; at < count; at += stage) {
    const int32_t held = min_of(stage, count - at), origin = begin + at - half;
    for (int32_t i = thread; i < held + 2 * half; i += threads) {
      const int32_t c = origin + i;
      if (c >= 0 && c < limit) {
        cp_async4(buffer + i, scores + c);
      } else {
        buffer[i] = nothing;
      }
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();  // the scores are here, the histograms zero
    for (int32_t tile = 0; tile < held; tile += kBatch * threads) {
      int32_t column[kBatch];
      float pool[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        column[k] = min_of(tile + k * threads + thread, held - 1);
        pool[k] = nothing;
      }
      if (p.pool_mode == Pool::max) {
        pool_columns<true>(buffer, column, p.pool, pool);
      } else {
        pool_columns<false>(buffer, column, p.pool, pool);
      }
      if (kResident) __syncthreads();  // all scores of the tile are read
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int32_t i = tile + k * threads + thread;
        if (i >= held) continue;
        const uint32_t key = pool_key(pool[k], p.pool, p.pool_mode);
        keys[at + i] = key;
        atomicAdd(&histogram[key >> kSelectShift1], 1u);
      }
    }
    if (!kResident) __syncthreads();  // before the next stage overwrites the scores
  }
}

/// Counts the digit `key >> shift` of the keys whose upper bits, `key >> prefix_shift`, are `prefix`.
__device__ void count_digit(const uint32_t* keys, int32_t count, int prefix_shift, uint32_t prefix, int shift,
                            uint32_t bins, uint32_t* histogram) {
  const int32_t thread = threadIdx.x, threads = blockDim.x;
  for (int32_t tile = 0; tile < count; tile += kBatch * threads) {
    uint32_t key[kBatch];
    bool live[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int32_t i = tile + k * threads + thread;
      live[k] = i < count;
      key[k] = live[k] ? keys[i] : 0u;
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (live[k] && key[k] >> prefix_shift == prefix) atomicAdd(&histogram[key[k] >> shift & (bins - 1)], 1u);
    }
  }
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
