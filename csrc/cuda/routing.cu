// Registers the routing kernels with torch.
#include "routing.cuh"
#include "torch_ops.h"

namespace modmoe {
namespace {

void check_experts(int64_t num_experts) {
  STD_TORCH_CHECK(num_experts >= 1 && num_experts <= kMaxExperts, "the number of experts must be between 1 and ",
                  kMaxExperts, ", got ", num_experts);
}

// Gates (N, top_k) in float32 and expert ids (N, top_k) in int64; see gating_kernel.
std::tuple<Tensor, Tensor> gating(Tensor logits, int64_t top_k, std::optional<Tensor> token_mask,
                                  std::optional<Tensor> selection_bias, bool renormalize) {
  check_tensor(logits, "logits", 2, logits);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  check_experts(num_experts);
  STD_TORCH_CHECK(top_k >= 1 && top_k <= num_experts, "top_k must be between 1 and the number of experts (",
                  num_experts, "), got ", top_k);
  if (token_mask) {
    check_tensor(*token_mask, "token_mask", 1, logits);
    check_dtype(*token_mask, "token_mask", ScalarType::Bool);
    check_size(*token_mask, "token_mask", 0, num_tokens);
  }
  if (selection_bias) {
    check_tensor(*selection_bias, "selection_bias", 1, logits);
    check_dtype(*selection_bias, "selection_bias", ScalarType::Float);
    check_size(*selection_bias, "selection_bias", 0, num_experts);
  }
  const DeviceGuard guard(logits.get_device_index());
  Tensor gates = empty(logits, {num_tokens, top_k}, ScalarType::Float);
  Tensor ids = empty(logits, {num_tokens, top_k}, ScalarType::Long);
  with_element_type(logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&](auto per_lane) {
      const int64_t tokens_per_block = kGatingThreads / kWarpSize;
      launch("gating", gating_kernel<T, decltype(per_lane)::value>,
             (num_tokens + tokens_per_block - 1) / tokens_per_block, kGatingThreads, 0, current_stream(logits),
             data<T>(logits), data<bool>(token_mask), data<float>(selection_bias), mutable_data<float>(gates),
             mutable_data<int64_t>(ids), num_tokens, static_cast<int>(num_experts), static_cast<int>(top_k),
             renormalize);
    };
    if (num_experts <= 32) return run(std::integral_constant<int, 1>{});
    if (num_experts <= 64) return run(std::integral_constant<int, 2>{});
    if (num_experts <= 128) return run(std::integral_constant<int, 4>{});
    if (num_experts <= 256) return run(std::integral_constant<int, 8>{});
    return run(std::integral_constant<int, kMaxExperts / kWarpSize>{});
  });
  return {gates, ids};
}

// tokens_per_expert (E,), offsets (E,), order (S,), inverse (S,); see place_kernel.
std::tuple<Tensor, Tensor, Tensor, Tensor> dispatch_plan(Tensor top_k_index, int64_t num_experts) {
  check_tensor(top_k_index, "top_k_index", 2, top_k_index);
  check_experts(num_experts);
  const ScalarType type = top_k_index.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Long || type == ScalarType::Int, "top_k_index must be int64 or int32, got ",
                  dtype_name(type));
  const int64_t num_pairs = top_k_index.numel();
  STD_TORCH_CHECK(num_pairs <= kMaxInt, "there can be ", kMaxInt, " (token, slot) pairs, got ", num_pairs);
  const DeviceGuard guard(top_k_index.get_device_index());
  const Stream stream = current_stream(top_k_index);
  const int chunks = num_sort_chunks(num_pairs), experts = static_cast<int>(num_experts),
            pairs = static_cast<int>(num_pairs);
  Tensor counts = empty(top_k_index, {num_experts + 1, chunks}, ScalarType::Int);
  Tensor totals = empty(top_k_index, {num_experts + 1}, ScalarType::Int);
  Tensor tokens_per_expert = empty(top_k_index, {num_experts}, ScalarType::Int);
  Tensor offsets = empty(top_k_index, {num_experts}, ScalarType::Int);
  Tensor order = empty(top_k_index, {num_pairs}, ScalarType::Long);
  Tensor inverse = empty(top_k_index, {num_pairs}, ScalarType::Long);
  const auto run = [&](auto zero) {
    using Id = decltype(zero);
    launch("count", count_kernel<Id>, chunks, kSortThreads, 0, stream, data<Id>(top_k_index), mutable_data<int>(counts),
           pairs, experts);
    launch("scan", scan_kernel, num_experts + 1, kWarpSize, 0, stream, mutable_data<int>(counts),
           mutable_data<int>(totals), chunks);
    launch("place", place_kernel<Id>, chunks, kSortThreads, static_cast<int>(place_shared_bytes(experts)), stream,
           data<Id>(top_k_index), data<int>(counts), data<int>(totals), mutable_data<int>(tokens_per_expert),
           mutable_data<int>(offsets), mutable_data<int64_t>(order), mutable_data<int64_t>(inverse), pairs, experts);
  };
  type == ScalarType::Long ? run(int64_t{}) : run(int{});
  return {tokens_per_expert, offsets, order, inverse};
}

}  // namespace
}  // namespace modmoe

STABLE_TORCH_LIBRARY_FRAGMENT(modmoe_cuda, m) {
  m.def(
      "gating(Tensor logits, int top_k, Tensor? token_mask, Tensor? selection_bias, bool renormalize) -> (Tensor, "
      "Tensor)");
  m.def("dispatch_plan(Tensor top_k_index, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(modmoe_cuda, CompositeExplicitAutograd, m) {
  m.impl("gating", TORCH_BOX(&modmoe::gating));
  m.impl("dispatch_plan", TORCH_BOX(&modmoe::dispatch_plan));
}
