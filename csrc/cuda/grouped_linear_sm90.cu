// Grouped matrix products on Hopper's own instructions (wgmma, TMA), by CUTLASS; registers them with torch.
//
// TMA reads boxes of memory, not rows by index: rows must already be sorted. Built for sm_90a alone, and only where the
// CUTLASS headers are (the wheel nvidia-cutlass brings them).
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "torch_ops.h"

namespace modmoe {
namespace {

using cute::_1;
using cute::_128;
using cute::_64;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;
using ProblemShape = cute::Shape<int, int, int>;  // rows, columns, depth of one expert's product

constexpr int kAlignment = 8;  // elements of 16 bits: TMA's 16 bytes

template <typename Element, typename LayoutA, typename LayoutB>
struct GroupedGemm {
  using TileShape = cute::Shape<_128, _128, _64>;
  using ClusterShape = cute::Shape<_1, _1, _1>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor*, kAlignment, Element, RowMajor*,
      kAlignment, cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong,
      cutlass::epilogue::fusion::LinearCombination<Element, float, void>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA*, kAlignment, Element, LayoutB*, kAlignment,
      float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<ProblemShape>, Mainloop, Epilogue>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using StrideA = typename Kernel::InternalStrideA;
  using StrideB = typename Kernel::InternalStrideB;
  using StrideD = typename Kernel::InternalStrideD;
};

// One product as CUTLASS wants it, in arrays over experts on the device.
template <typename Element, typename Gemm>
struct Problems {
  ProblemShape* shape;
  const Element** a;
  const Element** b;
  Element** d;
  typename Gemm::StrideA* stride_a;
  typename Gemm::StrideB* stride_b;
  typename Gemm::StrideD* stride_d;

  // Lays the arrays out in `memory`, or just counts the bytes if that is null.
  size_t place(char* memory, int64_t num_experts) {
    size_t used = 0;
    const auto take = [&](auto*& array) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(memory + used);
      used += (sizeof(*array) * num_experts + 127) / 128 * 128;
    };
    take(shape), take(a), take(b), take(d), take(stride_a), take(stride_b), take(stride_d);
    return used;
  }
};

// A stride is (rows, columns, batch); the one that is not a constant is the distance of rows in memory.
template <typename Stride>
__device__ void set_row_distance(Stride& stride, int64_t distance) {
  if constexpr (std::is_same_v<cute::remove_cvref_t<decltype(cute::get<0>(stride))>, int64_t>) {
    cute::get<0>(stride) = distance;
  } else {
    cute::get<1>(stride) = distance;
  }
}

struct Operands {
  const void* a;
  const void* b;
  void* d;
  int64_t distance_a, distance_b, distance_d;  // of rows, in elements
  int rows, columns, depth;                    // -1 for the one that is the number of an expert's rows
};

template <typename Element, typename Gemm>
__global__ void fill_problems(Problems<Element, Gemm> problems, Operands operands, const int* offsets, int num_experts,
                              int num_rows) {
  const int e = blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= num_experts) return;
  const int64_t begin = e == 0 ? 0 : min(max(offsets[e - 1], 0), num_rows);
  const int size = min(max(offsets[e], static_cast<int>(begin)), num_rows) - static_cast<int>(begin);
  const auto* a = static_cast<const Element*>(operands.a) + begin * operands.distance_a;
  const auto* b = static_cast<const Element*>(operands.b);
  auto* d = static_cast<Element*>(operands.d);
  if (operands.rows < 0) {  // rows times the expert's matrix
    problems.shape[e] = cute::make_shape(size, operands.columns, operands.depth);
    b += static_cast<int64_t>(e) * operands.columns * operands.depth;
    d += begin * operands.distance_d;
  } else {  // rows times rows; an expert without any has no tiles: a depth of 0 is more than TMA can describe
    problems.shape[e] = cute::make_shape(size > 0 ? operands.rows : 0, operands.columns, size > 0 ? size : 1);
    b += begin * operands.distance_b;
    d += static_cast<int64_t>(e) * operands.rows * operands.columns;
  }
  problems.a[e] = a;
  problems.b[e] = b;
  problems.d[e] = d;
  problems.stride_a[e] = {};
  problems.stride_b[e] = {};
  problems.stride_d[e] = {};
  set_row_distance(problems.stride_a[e], operands.distance_a);
  set_row_distance(problems.stride_b[e], operands.distance_b);
  set_row_distance(problems.stride_d[e], operands.distance_d);
}

Tensor bytes(const Tensor& like, size_t size) {
  return empty(like, {static_cast<int64_t>(size) + 1}, ScalarType::Byte);
}

template <typename Element, typename LayoutA, typename LayoutB>
void run(const Operands& operands, const Tensor& offsets, int64_t num_rows) {
  using Gemm = GroupedGemm<Element, LayoutA, LayoutB>;
  const Stream stream = current_stream(offsets);
  const int num_experts = static_cast<int>(offsets.size(0));
  Problems<Element, Gemm> problems;
  Tensor arrays = bytes(offsets, problems.place(nullptr, num_experts));
  problems.place(static_cast<char*>(arrays.mutable_data_ptr()), num_experts);
  launch("grouped_linear_sm90", fill_problems<Element, Gemm>, (num_experts + 255) / 256, 256, 0, stream, problems,
         operands, data<int>(offsets), num_experts, static_cast<int>(num_rows));

  cutlass::KernelHardwareInfo hardware;
  hardware.device_id = offsets.get_device_index();
  hardware.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(hardware.device_id);
  typename Gemm::Device::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGrouped,
                                             {num_experts, problems.shape, nullptr},
                                             {problems.a, problems.stride_a, problems.b, problems.stride_b},
                                             {{}, nullptr, nullptr, problems.d, problems.stride_d},
                                             hardware};
  arguments.epilogue.thread.alpha = 1.0f;
  arguments.epilogue.thread.beta = 0.0f;
  typename Gemm::Device device;
  const auto check = [](cutlass::Status status, const char* what) {
    STD_TORCH_CHECK(status == cutlass::Status::kSuccess, "CUTLASS: ", what, ": ", cutlassGetStatusString(status));
  };
  check(device.can_implement(arguments), "the shapes do not fit");
  Tensor workspace = bytes(offsets, Gemm::Device::get_workspace_size(arguments));
  check(device.initialize(arguments, workspace.mutable_data_ptr(), stream), "initialising failed");
  check(device.run(stream), "launching failed");
}

template <typename Run>
void with_low_precision(const Tensor& x, Run run) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16, "the sm_90a products are for float16 and ",
                  "bfloat16, got ", dtype_name(type));
  type == ScalarType::Half ? run(cutlass::half_t{}) : run(cutlass::bfloat16_t{});
}

void check_operand(const Tensor& x, const char* name, int64_t dim, const Tensor& beside) {
  check_tensor(x, name, dim, beside);
  check_dtype(x, name, beside.scalar_type());
  STD_TORCH_CHECK(x.size(dim - 1) % kAlignment == 0, "the width of ", name, " must be a multiple of ", kAlignment,
                  " for TMA, got ", x.size(dim - 1));
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, name,
                  " must begin at a multiple of 16 bytes");
  for (int i = 0; i < dim; ++i) {
    STD_TORCH_CHECK(x.size(i) <= kMaxRows, name, " must not exceed ", kMaxRows, " in dimension ", i, ", got ", x.size(i));
  }
}

void check_offsets(const Tensor& offsets, const Tensor& rows) {
  check_tensor(offsets, "offsets", 1, rows);
  check_dtype(offsets, "offsets", ScalarType::Int);
}

// Sorted rows (S, depth) times weight[e].T of weight (E, width, depth); if `transposed`, rows (S, width) times
// weight[e]. Rows past the last offset are not written.
Tensor multiply_sm90(Tensor rows, Tensor weight, Tensor offsets, bool transposed) {
  check_operand(rows, "rows", 2, rows);
  check_operand(weight, "weight", 3, rows);
  check_offsets(offsets, rows);
  check_size(offsets, "offsets", 0, weight.size(0));
  check_size(weight, "weight", transposed ? 1 : 2, rows.size(1));
  const DeviceGuard guard(rows.get_device_index());
  const int64_t depth = rows.size(1), width = weight.size(transposed ? 2 : 1);
  STD_TORCH_CHECK(width % kAlignment == 0, "widths must be multiples of ", kAlignment, " for TMA, got ", width);
  Tensor out = empty(rows, {rows.size(0), width}, rows.scalar_type());
  if (rows.size(0) == 0) return out;
  const Operands operands{
      rows.const_data_ptr(),   weight.const_data_ptr(), out.mutable_data_ptr(), depth, weight.size(2), width, -1,
      static_cast<int>(width), static_cast<int>(depth)};
  with_low_precision(rows, [&](auto zero) {
    using Element = decltype(zero);
    transposed ? run<Element, RowMajor, RowMajor>(operands, offsets, rows.size(0))
               : run<Element, RowMajor, ColumnMajor>(operands, offsets, rows.size(0));
  });
  return out;
}

// left (S, width) and right (S, depth) sorted rows -> (E, width, depth). Experts without rows are not written.
Tensor outer_sm90(Tensor left, Tensor right, Tensor offsets) {
  check_operand(left, "left", 2, left);
  check_operand(right, "right", 2, left);
  check_offsets(offsets, left);
  check_size(right, "right", 0, left.size(0));
  const DeviceGuard guard(left.get_device_index());
  const int64_t width = left.size(1), depth = right.size(1);
  Tensor out = empty(left, {offsets.size(0), width, depth}, left.scalar_type());
  if (left.size(0) == 0) return out;
  const Operands operands{left.const_data_ptr(),
                          right.const_data_ptr(),
                          out.mutable_data_ptr(),
                          width,
                          depth,
                          depth,
                          static_cast<int>(width),
                          static_cast<int>(depth),
                          -1};
  with_low_precision(left,
                     [&](auto zero) { run<decltype(zero), ColumnMajor, RowMajor>(operands, offsets, left.size(0)); });
  return out;
}

}  // namespace
}  // namespace modmoe

STABLE_TORCH_LIBRARY_FRAGMENT(modmoe_cuda, m) {
  m.def("multiply_sm90(Tensor rows, Tensor weight, Tensor offsets, bool transposed) -> Tensor");
  m.def("outer_sm90(Tensor left, Tensor right, Tensor offsets) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(modmoe_cuda, CompositeExplicitAutograd, m) {
  m.impl("multiply_sm90", TORCH_BOX(&modmoe::multiply_sm90));
  m.impl("outer_sm90", TORCH_BOX(&modmoe::outer_sm90));
}
