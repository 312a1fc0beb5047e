// What csrc/cuda/launch.h has for CUDA devices, for the emulator: tensors are on the CPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace modmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxInt = 2147483647;
constexpr int64_t kMaxRows = kMaxInt - 128;

struct Stream {};
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

inline bool is_on_device(const Tensor& x) { return x.is_cpu(); }
inline Stream current_stream(const Tensor&) { return {}; }

// The next launch may use this tensor.
template <typename T>
T* mutable_data(const Tensor& x) {
  emulator::expose(x.data_ptr(), x.numel() * x.element_size());
  return static_cast<T*>(x.data_ptr());
}
template <typename T>
const T* data(const Tensor& x) {
  return mutable_data<T>(x);
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t grid, int threads, int shared_bytes, Stream,
            Arguments... arguments) {
  emulator::launch(static_cast<unsigned>(grid), threads, shared_bytes, [&] { kernel(arguments...); });
  STD_TORCH_CHECK(*emulator::error_message() == 0, name, ": ", emulator::error_message());
}

}  // namespace modmoe
