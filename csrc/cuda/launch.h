// Memory of tensors, and kernels launched on it. The tests' emulator supplies its own version for the host.
#pragma once

#ifndef __CUDACC__
#include <emulated_launch.h>
#else

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

// Weak, so that the library also loads into a torch without CUDA, which does not have it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace modmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using Stream = cudaStream_t;

constexpr int64_t kMaxInt = 2147483647;
constexpr int64_t kMaxRows = kMaxInt - 128;  // a tile that begins before the last row ends within int

inline bool is_on_device(const Tensor& x) { return x.is_cuda(); }

inline Stream current_stream(const Tensor& x) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch is built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}

// What a kernel is given of a tensor, anew for each launch.
template <typename T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) cudaGetLastError();  // which the next launch would otherwise take for its own
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// Launches `kernel` on `stream` of the current device, and reports what the launch itself finds wrong.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t grid, int threads, int shared_bytes, Stream stream,
            Arguments... arguments) {
  STD_TORCH_CHECK(grid <= kMaxInt, name, ": needs ", grid, " blocks, more than CUDA has (", kMaxInt, ")");
  if (grid == 0) return;
  if (shared_bytes > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
  }
  kernel<<<static_cast<unsigned>(grid), threads, shared_bytes, stream>>>(arguments...);
  check_cuda(cudaGetLastError(), name);
}

}  // namespace modmoe

#endif
