// Kernels of routing: softmax gating, and the stable counting sort that groups (token, slot) pairs by expert.
//
// No torch header here, so that the tests can also compile these kernels for the host.
// Letters: N tokens, E experts, K experts per token, S = N * K pairs. Expert id E stands for "no expert".
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>

#include "numeric.cuh"

namespace modmoe {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kMaxExperts = 1024;

// ---------------------------------------------------------------------------------------------------------------
// Gating: one warp per token, its E logits in registers.

constexpr int kGatingThreads = 128;

__device__ inline float warp_max(float x) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

__device__ inline float warp_sum(float x) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

// Maps floats to integers that compare alike; NaN is largest, as in torch.topk, and no float maps to 0.
__device__ inline unsigned sort_key(float x) {
  if (x != x) return 0xffffffffu;
  const unsigned bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Gates and ids of the top_k experts by softmax(logits) + bias, best first, the lower id first among equals.
//
// logits (N, E); token_mask (N,) or null: masked tokens get gate 0 and id E; bias (E,) or null: for the choice only;
// gates (N, top_k); ids (N, top_k). E <= 32 * kPerLane.
template <typename T, int kPerLane>
__global__ void __launch_bounds__(kGatingThreads)
    gating_kernel(const T* __restrict__ logits, const bool* __restrict__ token_mask, const float* __restrict__ bias,
                  float* __restrict__ gates, int64_t* __restrict__ ids, int64_t num_tokens, int num_experts, int top_k,
                  bool renormalize) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kGatingThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (token >= num_tokens) return;
  gates += token * top_k;
  ids += token * top_k;
  if (token_mask != nullptr && !token_mask[token]) {
    for (int slot = lane; slot < top_k; slot += kWarpSize) {
      gates[slot] = 0.0f;
      ids[slot] = num_experts;
    }
    return;
  }

  // Lane l holds experts l, l + 32, ...
  float probs[kPerLane];
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = lane + i * kWarpSize;
    probs[i] = expert < num_experts ? to_float(logits[token * num_experts + expert]) : -INFINITY;
    largest = fmaxf(largest, probs[i]);
  }
  largest = warp_max(largest);
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const bool exists = lane + i * kWarpSize < num_experts;
    probs[i] = exists ? expf(probs[i] - largest) : 0.0f;
    total += probs[i];
  }
  total = warp_sum(total);

  unsigned keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = lane + i * kWarpSize;
    probs[i] /= total;
    keys[i] = expert < num_experts ? sort_key(bias == nullptr ? probs[i] : probs[i] + bias[expert]) : 0;
  }

  float chosen_sum = 0.0f;
  for (int slot = 0; slot < top_k; ++slot) {
    unsigned best = 0;
    unsigned best_expert = kMaxExperts;
    float best_prob = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (keys[i] > best) {
        best = keys[i];
        best_expert = lane + i * kWarpSize;
        best_prob = probs[i];
      }
    }
    const bool leads = best == __reduce_max_sync(kFullWarp, best);
    const int expert = static_cast<int>(__reduce_min_sync(kFullWarp, leads ? best_expert : kMaxExperts));
    const float prob = __shfl_sync(kFullWarp, best_prob, expert % kWarpSize);
    chosen_sum += prob;
    if (lane == slot % kWarpSize) {
      gates[slot] = prob;
      ids[slot] = expert;
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (expert == lane + i * kWarpSize) keys[i] = 0;
    }
  }
  if (renormalize) {
    // A bias can choose experts whose probabilities underflow. Each lane reads back what it wrote itself.
    const float divisor = fmaxf(chosen_sum, FLT_MIN);
    for (int slot = lane; slot < top_k; slot += kWarpSize) gates[slot] /= divisor;
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Dispatch order: a stable counting sort of the S expert ids, in three launches.
//
// Pairs are cut into chunks, one block each, and a chunk into consecutive slices, one warp each. The row of a pair is
//   (pairs of smaller experts) + (of its expert in earlier chunks) + (in earlier slices) + (before it in its slice),
// sums that do not depend on the order in which threads run. Ids outside 0..E count as E.

constexpr int kSortWarps = 8;
constexpr int kSortThreads = kSortWarps * kWarpSize;
constexpr int kSliceSteps = 4;
constexpr int kSlice = kSliceSteps * kWarpSize;
constexpr int kChunk = kSortWarps * kSlice;

inline int num_sort_chunks(int64_t num_pairs) {
  return static_cast<int>(num_pairs == 0 ? 1 : (num_pairs + kChunk - 1) / kChunk);  // offsets are written even then
}

inline size_t place_shared_bytes(int num_experts) { return sizeof(int) * (num_experts + 1) * (1 + kSortWarps); }

// Inclusive prefix sum over the lanes of a warp.
__device__ inline int warp_prefix_sum(int x) {
  const int lane = threadIdx.x % kWarpSize;
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int below = __shfl_up_sync(kFullWarp, x, offset);
    if (lane >= offset) x += below;
  }
  return x;
}

template <typename Id>
__device__ inline int checked_id(Id id, int num_experts) {
  return id >= 0 && id < num_experts ? static_cast<int>(id) : num_experts;
}

// First launch, grid num_chunks: counts[e * num_chunks + chunk] = pairs of expert e in the chunk, e = 0..E.
template <typename Id>
__global__ void __launch_bounds__(kSortThreads)
    count_kernel(const Id* __restrict__ ids, int* __restrict__ counts, int num_pairs, int num_experts) {
  __shared__ int histogram[kMaxExperts + 1];
  for (int e = threadIdx.x; e <= num_experts; e += kSortThreads) histogram[e] = 0;
  __syncthreads();
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kChunk;
  for (int i = threadIdx.x; i < kChunk && start + i < num_pairs; i += kSortThreads) {
    atomicAdd(&histogram[checked_id(ids[start + i], num_experts)], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e <= num_experts; e += kSortThreads) {
    counts[static_cast<int64_t>(e) * gridDim.x + blockIdx.x] = histogram[e];
  }
}

// Second launch, grid E + 1, one warp each: counts become exclusive prefix sums over chunks; totals[e] their total.
__global__ void __launch_bounds__(kWarpSize)
    scan_kernel(int* __restrict__ counts, int* __restrict__ totals, int num_chunks) {
  const int lane = threadIdx.x;
  counts += static_cast<int64_t>(blockIdx.x) * num_chunks;
  int before = 0;
  for (int base = 0; base < num_chunks; base += kWarpSize) {
    const int chunk = base + lane;
    const int count = chunk < num_chunks ? counts[chunk] : 0;
    const int prefix = warp_prefix_sum(count);
    if (chunk < num_chunks) counts[chunk] = before + prefix - count;
    before += __shfl_sync(kFullWarp, prefix, kWarpSize - 1);
  }
  if (lane == 0) totals[blockIdx.x] = before;
}

// Exclusive prefix sum of totals[0..num_experts] into sums, by the first warp of the block.
__device__ inline void prefix_experts(const int* __restrict__ totals, int* sums, int num_experts) {
  if (threadIdx.x >= kWarpSize) return;
  int before = 0;
  for (int base = 0; base <= num_experts; base += kWarpSize) {
    const int e = base + static_cast<int>(threadIdx.x);
    const int total = e <= num_experts ? totals[e] : 0;
    const int prefix = warp_prefix_sum(total);
    if (e <= num_experts) sums[e] = before + prefix - total;
    before += __shfl_sync(kFullWarp, prefix, kWarpSize - 1);
  }
}

// Third launch, grid num_chunks: where every pair goes. counts and totals as the second launch left them;
// tokens_per_expert, offsets (E,); order, inverse (S,).
//
// Shared memory: rows[(E + 1) * (1 + kSortWarps)], first the row at which each expert starts, then, for each slice, its
// count per expert, which turns into the row of its next pair.
template <typename Id>
__global__ void __launch_bounds__(kSortThreads)
    place_kernel(const Id* __restrict__ ids, const int* __restrict__ counts, const int* __restrict__ totals,
                 int* __restrict__ tokens_per_expert, int* __restrict__ offsets, int64_t* __restrict__ order,
                 int64_t* __restrict__ inverse, int num_pairs, int num_experts) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const int num_ids = num_experts + 1;
  int* expert_start = reinterpret_cast<int*>(shared_memory);
  int* slice_rows = expert_start + num_ids;
  const int lane = threadIdx.x % kWarpSize;
  int* my_rows = slice_rows + threadIdx.x / kWarpSize * num_ids;

  prefix_experts(totals, expert_start, num_experts);
  for (int e = lane; e < num_ids; e += kWarpSize) my_rows[e] = 0;
  __syncwarp();

  int id[kSliceSteps];
  const int64_t slice_start = static_cast<int64_t>(blockIdx.x) * kChunk + threadIdx.x / kWarpSize * kSlice;
#pragma unroll
  for (int step = 0; step < kSliceSteps; ++step) {
    const int64_t pair = slice_start + step * kWarpSize + lane;
    id[step] = pair < num_pairs ? checked_id(ids[pair], num_experts) : -1;
    const unsigned same = __match_any_sync(kFullWarp, id[step]);
    const bool first = lane == __ffs(same) - 1;
    if (id[step] >= 0 && first) my_rows[id[step]] += __popc(same);
    __syncwarp();
  }
  __syncthreads();

  for (int e = threadIdx.x; e < num_ids; e += kSortThreads) {
    int row = expert_start[e] + counts[static_cast<int64_t>(e) * gridDim.x + blockIdx.x];
    for (int slice = 0; slice < kSortWarps; ++slice) {
      const int count = slice_rows[slice * num_ids + e];
      slice_rows[slice * num_ids + e] = row;
      row += count;
    }
    if (blockIdx.x == 0 && e < num_experts) {
      tokens_per_expert[e] = totals[e];
      offsets[e] = expert_start[e] + totals[e];
    }
  }
  __syncthreads();

#pragma unroll
  for (int step = 0; step < kSliceSteps; ++step) {
    const unsigned same = __match_any_sync(kFullWarp, id[step]);
    const int rank = __popc(same & ((1u << lane) - 1));
    const int row = id[step] >= 0 ? my_rows[id[step]] + rank : 0;
    __syncwarp();
    if (id[step] >= 0) {
      const int64_t pair = slice_start + step * kWarpSize + lane;
      order[row] = pair;
      inverse[pair] = row;
      if (rank == 0) my_rows[id[step]] = row + __popc(same);
    }
    __syncwarp();
  }
}

}  // namespace modmoe
