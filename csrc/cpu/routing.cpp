// The dispatch plan on the CPU: pairs grouped by expert, by counting.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Ids (S) -> tokens per expert (E), their inclusive sum (E), order and inverse (S). Other ids than 0..E-1 are none.
template <typename Id>
void group(const Id* ids, int64_t pairs, int64_t experts, int32_t* count, int32_t* end, int64_t* order,
           int64_t* inverse) {
  const auto bin = [&](int64_t pair) { return ids[pair] >= 0 && ids[pair] < experts ? int64_t(ids[pair]) : experts; };
  std::vector<int64_t> next(experts + 2);  // next free row of each expert; first its count, one place further on
  for (int64_t pair = 0; pair < pairs; ++pair) ++next[bin(pair) + 1];
  for (int64_t e = 0; e < experts; ++e) {
    count[e] = int32_t(next[e + 1]);
    next[e + 1] += next[e];
    end[e] = int32_t(next[e + 1]);
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t row = next[bin(pair)]++;
    order[row] = pair;
    inverse[pair] = row;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dispatch_plan(Tensor top_k_index, int64_t experts) {
  const int64_t pairs = top_k_index.numel();
  STD_TORCH_CHECK(top_k_index.is_contiguous(), "top_k_index must be contiguous");
  STD_TORCH_CHECK(pairs <= INT32_MAX, "there may be at most ", INT32_MAX, " pairs, got ", pairs);
  const auto empty = [&](int64_t size, ScalarType dtype) {
    return torch::stable::new_empty(top_k_index, {size}, dtype);
  };
  Tensor count = empty(experts, ScalarType::Int), end = empty(experts, ScalarType::Int);
  Tensor order = empty(pairs, ScalarType::Long), inverse = empty(pairs, ScalarType::Long);
  const auto run = [&](auto zero) {
    group(static_cast<const decltype(zero)*>(top_k_index.data_ptr()), pairs, experts,
          static_cast<int32_t*>(count.data_ptr()), static_cast<int32_t*>(end.data_ptr()),
          static_cast<int64_t*>(order.data_ptr()), static_cast<int64_t*>(inverse.data_ptr()));
  };
  const ScalarType dtype = top_k_index.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Long || dtype == ScalarType::Int, "top_k_index must be int64 or int32");
  dtype == ScalarType::Long ? run(int64_t()) : run(int32_t());
  return {count, end, order, inverse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(modmoe_cpu, m) {
  m.def("dispatch_plan(Tensor top_k_index, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(modmoe_cpu, CPU, m) { m.impl("dispatch_plan", TORCH_BOX(&dispatch_plan)); }
