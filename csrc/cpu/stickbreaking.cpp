// Registers stick-breaking attention on the CPU with torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "parallel.h"
#include "stickbreaking.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
modmoe::Heads<const T> heads(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && (x.size(3) < 2 || x.stride(3) == 1), "the last of 4 dimensions must be contiguous");
  return {static_cast<const T*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename T>
modmoe::Heads<T> new_heads(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& x) {
  return x ? static_cast<const T*>(x->data_ptr()) : nullptr;
}

template <typename T, typename Stored = T>
modmoe::Attention<T, Stored> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const std::optional<Tensor>& key_mask,
                                       const std::optional<Tensor>& document_start,
                                       const std::optional<Tensor>& lengths, double scale, bool attend_current,
                                       double stop_below) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.size(1) > 0 && q.size(1) % k.size(1) == 0, "heads do not fit");
  STD_TORCH_CHECK(k.size(2) >= q.size(2) && k.size(3) == q.size(3) && k.size(0) == q.size(0), "shapes do not fit");
  STD_TORCH_CHECK(k.size(2) <= INT32_MAX, "there may be at most ", INT32_MAX, " keys, got ", k.size(2));
  return {q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3),
          heads<T>(q), heads<Stored>(k), heads<Stored>(v),
          data_or_null<bool>(key_mask), data_or_null<int64_t>(document_start), data_or_null<int64_t>(lengths),
          T(scale), attend_current, T(stop_below)};
}

// run(zero of q's type, zero of that of keys and values).
template <class Run>
void with_dtypes(const Tensor& q, const Tensor& k, const Tensor& v, Run run) {
  const ScalarType dtype = q.scalar_type(), stored = k.scalar_type();
  STD_TORCH_CHECK(stored == v.scalar_type(), "dtypes of k and v differ");
  if (dtype == ScalarType::Double && stored == dtype) return run(double(), double());
  if (dtype == ScalarType::Float && stored == dtype) return run(float(), float());
  STD_TORCH_CHECK(dtype == ScalarType::Float && stored == ScalarType::BFloat16,
                  "dtypes must be float32 or float64; keys and values may be bfloat16 beside float32");
  run(float(), modmoe::BFloat16());
}

std::tuple<Tensor, Tensor> stickbreaking_forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> key_mask,
                                                 std::optional<Tensor> document_start, std::optional<Tensor> lengths,
                                                 double scale, bool attend_current, double stop_below) {
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  Tensor remainder = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  if (remainder.numel() == 0) return {out, remainder};
  with_dtypes(q, k, v, [&](auto zero, auto stored) {
    using T = decltype(zero);
    modmoe::forward(attention<T, decltype(stored)>(q, k, v, key_mask, document_start, lengths, scale, attend_current,
                                                   stop_below),
                    new_heads<T>(out), static_cast<T*>(remainder.data_ptr()), modmoe::num_threads(),
                    modmoe::Parallel());
  });
  return {out, remainder};
}

std::tuple<Tensor, Tensor, Tensor> stickbreaking_backward(Tensor dout, Tensor drem, Tensor q, Tensor k, Tensor v,
                                                          std::optional<Tensor> key_mask,
                                                          std::optional<Tensor> document_start, double scale,
                                                          bool attend_current, double stop_below) {
  Tensor dq = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  Tensor dk = torch::stable::new_zeros(k, {k.size(0), k.size(1), k.size(2), k.size(3)});
  Tensor dv = torch::stable::new_zeros(k, {k.size(0), k.size(1), k.size(2), k.size(3)});
  if (drem.numel() == 0) return {dq, dk, dv};
  STD_TORCH_CHECK(drem.is_contiguous(), "the gradient of the remainder must be contiguous");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type(), "dtypes differ");
  with_dtypes(q, k, v, [&](auto zero, auto) {
    using T = decltype(zero);
    modmoe::backward(attention<T>(q, k, v, key_mask, document_start, {}, scale, attend_current, stop_below),
                     modmoe::Gradients<T>{heads<T>(dout), static_cast<const T*>(drem.data_ptr()), new_heads<T>(dq),
                                          static_cast<T*>(dk.data_ptr()), static_cast<T*>(dv.data_ptr())},
                     modmoe::num_threads(), modmoe::Parallel());
  });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(modmoe_cpu, m) {
  m.def(
      "stickbreaking_forward(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? document_start, Tensor? lengths, "
      "float scale, bool attend_current, float stop_below) -> (Tensor, Tensor)");
  m.def(
      "stickbreaking_backward(Tensor dout, Tensor drem, Tensor q, Tensor k, Tensor v, Tensor? key_mask, "
      "Tensor? document_start, float scale, bool attend_current, float stop_below) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(modmoe_cpu, CPU, m) {
  m.impl("stickbreaking_forward", TORCH_BOX(&stickbreaking_forward));
  m.impl("stickbreaking_backward", TORCH_BOX(&stickbreaking_backward));
}
