// Products of ragged groups of rows with the matrices of their experts, one expert to a thread.
//
// torch's own matrix product does the arithmetic. It comes near the peak of one core on the few hundred rows that an
// expert gets, but loses half of two cores to waiting when it splits so small a product among them; here each thread
// has products of its own. The products bypass the dispatcher: its state (autograd, inference mode, autocast) belongs
// to the calling thread and would be missing on the others.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "units.h"

namespace {

using modmoe::Unit;
using torch::stable::Tensor;

// oneDNN compiles a kernel for each new shape in 16 bits; multiples of this many rows make shapes come back.
constexpr int64_t kGranule = 32;

struct Matrix {
  char* data;
  int64_t rows, columns, row_stride, column_stride;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  Matrix slice_rows(int64_t begin, int64_t end, int64_t element_size) const {
    return {data + begin * row_stride * element_size, end - begin, columns, row_stride, column_stride};
  }
};

// Rows [begin, end) of a 2-D tensor, or matrix `index` of a 3-D one.
Matrix rows_of(const Tensor& x, int64_t begin, int64_t end) {
  char* data = static_cast<char*>(x.data_ptr()) + begin * x.stride(0) * int64_t(x.element_size());
  return {data, end - begin, x.size(1), x.stride(0), x.stride(1)};
}

Matrix matrix_of(const Tensor& x, int64_t index) {
  char* data = static_cast<char*>(x.data_ptr()) + index * x.stride(0) * int64_t(x.element_size());
  return {data, x.size(1), x.size(2), x.stride(1), x.stride(2)};
}

Tensor tensor_of(const Matrix& m, const Tensor& like) {
  return torch::stable::from_blob(m.data, {m.rows, m.columns}, {m.row_stride, m.column_stride}, like.device(),
                                  like.scalar_type());
}

void multiply(const Matrix& out, const Matrix& a, const Matrix& b, const Tensor& like) {
  const Tensor result = tensor_of(out, like), left = tensor_of(a, like), right = tensor_of(b, like);
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(result.get(), left.get(), right.get()));
}

void fill_zero(const Matrix& contiguous, const Tensor& like) {
  std::fill_n(contiguous.data, contiguous.rows * contiguous.columns * int64_t(like.element_size()), char(0));
}

// Experts with more than their share of the rows are cut, so that no thread is left with most of the work.
int64_t parts(int64_t rows, int64_t total) {
  return std::clamp<int64_t>((2 * rows * modmoe::num_threads() + total - 1) / std::max<int64_t>(total, 1), 1,
                             modmoe::num_threads());
}

const int32_t* checked(const Tensor& offsets, int64_t num_experts, int64_t num_rows) {
  STD_TORCH_CHECK(offsets.numel() == num_experts && offsets.is_contiguous(), "there must be an offset for each expert");
  const int32_t* ends = static_cast<const int32_t*>(offsets.data_ptr());
  modmoe::check_offsets(ends, num_experts, num_rows);
  return ends;
}

// (S, in) rows times (E, in, out) weight of their expert -> (S, out); rows past the last offset are zero.
Tensor grouped_multiply(Tensor rows, Tensor weight, Tensor offsets) {
  STD_TORCH_CHECK(rows.dim() == 2 && weight.dim() == 3 && rows.size(1) == weight.size(1), "shapes do not fit");
  STD_TORCH_CHECK(rows.scalar_type() == weight.scalar_type(), "dtypes differ");
  const int64_t num_experts = weight.size(0), total = rows.size(0);
  const int32_t* ends = checked(offsets, num_experts, total);
  Tensor out = torch::stable::new_empty(rows, {total, weight.size(2)});
  std::vector<Unit> units;
  int64_t begin = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t end = ends[e], share = (end - begin) / parts(end - begin, total);
    const int64_t step = std::max(kGranule, (share + kGranule - 1) / kGranule * kGranule);
    while (end - begin >= kGranule) {
      const int64_t cut = begin + std::min(step, (end - begin) / kGranule * kGranule);
      units.push_back({e, begin, cut, cut - begin});
      begin = cut;
    }
    if (begin < end) units.push_back({e, begin, end, end - begin});
    begin = end;
  }
  modmoe::spread(units, [&](const auto& next) {
    while (const Unit* u = next())
      multiply(rows_of(out, u->begin, u->end), rows_of(rows, u->begin, u->end), matrix_of(weight, u->expert), rows);
  });
  fill_zero(rows_of(out, begin, total), rows);
  return out;
}

// (S, out) and (S, in) rows -> (E, out, in), the sum over each expert's rows of left x right.
Tensor grouped_outer(Tensor left, Tensor right, Tensor offsets) {
  STD_TORCH_CHECK(left.dim() == 2 && right.dim() == 2 && left.size(0) == right.size(0), "shapes do not fit");
  STD_TORCH_CHECK(left.scalar_type() == right.scalar_type(), "dtypes differ");
  const int64_t num_experts = offsets.numel(), total = left.size(0), width = left.size(1);
  const int32_t* ends = checked(offsets, num_experts, total);
  Tensor out = torch::stable::new_empty(left, {num_experts, width, right.size(1)});
  std::vector<Unit> units;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t rows = ends[e] - (e ? ends[e - 1] : 0), step = std::max<int64_t>(1, width / parts(rows, total));
    for (int64_t column = 0; column < width; column += step)
      units.push_back({e, column, std::min(width, column + step), rows * step});
  }
  modmoe::spread(units, [&](const auto& next) {
    while (const Unit* u = next()) {
      const int64_t from = u->expert ? ends[u->expert - 1] : 0, to = ends[u->expert];
      const Matrix gradient = matrix_of(out, u->expert).slice_rows(u->begin, u->end, out.element_size());
      const Matrix columns = rows_of(left, from, to).transposed().slice_rows(u->begin, u->end, left.element_size());
      if (from == to)
        fill_zero(gradient, out);
      else
        multiply(gradient, columns, rows_of(right, from, to), left);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(modmoe_cpu, m) {
  m.def("grouped_multiply(Tensor rows, Tensor weight, Tensor offsets) -> Tensor");
  m.def("grouped_outer(Tensor left, Tensor right, Tensor offsets) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(modmoe_cpu, CPU, m) {
  m.impl("grouped_multiply", TORCH_BOX(&grouped_multiply));
  m.impl("grouped_outer", TORCH_BOX(&grouped_outer));
}
