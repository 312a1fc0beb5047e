// What the registration files share: tensors of the stable ABI and checks of them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "launch.h"
#include "numeric.cuh"

namespace modmoe {

inline const char* dtype_name(ScalarType type) { return torch::headeronly::toString(type); }

inline void check_tensor(const Tensor& x, const char* name, int64_t dim, const Tensor& beside) {
  STD_TORCH_CHECK(is_on_device(x), name, " must be on a CUDA device");
  STD_TORCH_CHECK(x.get_device_index() == beside.get_device_index(), name, " is on CUDA device ", x.get_device_index(),
                  ", other tensors on ", beside.get_device_index());
  STD_TORCH_CHECK(x.dim() == dim, name, " must have ", dim, " dimensions, got ", x.dim());
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
}

inline void check_dtype(const Tensor& x, const char* name, ScalarType type) {
  STD_TORCH_CHECK(x.scalar_type() == type, name, " must be ", dtype_name(type), ", got ", dtype_name(x.scalar_type()));
}

inline void check_size(const Tensor& x, const char* name, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(x.size(dim) == size, name, " must have size ", size, " in dimension ", dim, ", got ", x.size(dim));
}

template <typename T>
const T* data(const std::optional<Tensor>& x) {
  return x ? data<T>(*x) : nullptr;
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

// Calls run with a zero of the element type.
template <typename Run>
auto with_element_type(const Tensor& x, const char* name, Run run) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Half:
      return run(__half{});
    case ScalarType::BFloat16:
      return run(__nv_bfloat16{});
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16, got ", dtype_name(x.scalar_type()));
  }
  return run(float{});  // not reached
}

}  // namespace modmoe
