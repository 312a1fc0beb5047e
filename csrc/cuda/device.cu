// Registers the question whether the kernels can run on a device.
#include <string>

#include "torch_ops.h"

namespace modmoe {

__global__ void probe_kernel() {}

namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Why the kernels cannot run on a device, or nothing: a driver that is too old, or a card they hold no code for.
std::string device_problem(int64_t device) {
  int driver = 0, toolkit = 0;
  cudaRuntimeGetVersion(&toolkit);
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no CUDA driver";
  const DeviceGuard guard(static_cast<int32_t>(device));
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  cudaGetLastError();  // forget it: nothing was launched
  if (error == cudaSuccess) return "";
  std::string problem = cudaGetErrorString(error);
  if (driver < toolkit) {
    problem += ": the driver is for CUDA " + version_text(driver) + ", the kernels were built with " +
               version_text(toolkit) + "; update the driver, or set CUDA_HOME to an older toolkit";
  }
  return problem;
}

}  // namespace
}  // namespace modmoe

STABLE_TORCH_LIBRARY_FRAGMENT(modmoe_cuda, m) { m.def("device_problem(int device) -> str"); }

STABLE_TORCH_LIBRARY_IMPL(modmoe_cuda, CompositeExplicitAutograd, m) {
  m.impl("device_problem", TORCH_BOX(&modmoe::device_problem));
}
