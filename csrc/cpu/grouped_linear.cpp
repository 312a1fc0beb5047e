// The grouped linear map, with the gather before it and the gates, sums over slots and the gates' gradient after it.
//
// Letters: N tokens, E experts, K experts per token, S = N K pairs. A sorted row belongs to the expert whose offsets it
// lies between. float32, float64 and, where numbers.h takes it, bf16; widths that are multiples of a vector.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "expert_gemm.h"
#include "units.h"

namespace {

using modmoe::ExpertGemm;
template <typename T>
using Sum = typename modmoe::Numbers<T>::Sum;
using modmoe::Unit;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// The plan: which pair is in a sorted row, and where the rows of an expert end.
struct Plan {
  const int64_t* order;
  const int32_t* ends;
  int64_t pairs, experts, top_k;

  Plan(const Tensor& order_, const Tensor& offsets, int64_t experts_, int64_t top_k_)
      : order(data<int64_t>(order_)), ends(data<int32_t>(offsets)), pairs(order_.numel()), experts(experts_),
        top_k(top_k_) {
    STD_TORCH_CHECK(order_.is_contiguous() && order_.scalar_type() == ScalarType::Long, "order must be int64");
    STD_TORCH_CHECK(offsets.is_contiguous() && offsets.scalar_type() == ScalarType::Int && offsets.numel() == experts,
                    "there must be an int32 offset for each expert");
    STD_TORCH_CHECK(top_k > 0 && pairs % top_k == 0, "top_k must divide the ", pairs, " pairs, got ", top_k);
    modmoe::check_offsets(ends, experts, pairs);
    std::vector<char> seen(pairs);
    for (int64_t s = 0; s < pairs; ++s) {
      STD_TORCH_CHECK(order[s] >= 0 && order[s] < pairs && !seen[order[s]], "order must hold each of ", pairs,
                      " pairs once, got ", order[s], " in row ", s);
      seen[order[s]] = 1;
    }
  }

  int64_t begin(int64_t e) const { return e ? ends[e - 1] : 0; }
  int64_t end(int64_t e) const { return ends[e]; }
  int64_t rows() const { return experts ? ends[experts - 1] : 0; }
};

enum class Layout { token, pair, sorted };

Layout layout_of(const std::string& name) {
  STD_TORCH_CHECK(name == "token" || name == "pair" || name == "sorted", "there is no layout ", name);
  return name == "token" ? Layout::token : name == "pair" ? Layout::pair : Layout::sorted;
}

// A matrix whose rows are in some layout.
template <typename T>
struct Rows {
  T* data;
  int64_t width;
  Layout layout;

  T* at(const Plan& plan, int64_t sorted) const {
    const int64_t row = layout == Layout::sorted ? sorted
                        : layout == Layout::pair ? plan.order[sorted]
                                                 : plan.order[sorted] / plan.top_k;
    return data + row * width;
  }

  std::vector<T*> range(const Plan& plan, int64_t begin, int64_t end) const {
    std::vector<T*> rows(end - begin);
    for (int64_t s = begin; s < end; ++s) rows[s - begin] = at(plan, s);
    return rows;
  }
};

template <typename T>
Rows<const T> rows_of(const Tensor& x, const Plan& plan, const std::string& name, int64_t width) {
  const Layout layout = layout_of(name);
  const int64_t count = layout == Layout::token ? plan.pairs / plan.top_k : plan.pairs;
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == count && x.size(1) == width && x.is_contiguous(), "there must be ",
                  count, " contiguous rows of ", width);
  return {data<const T>(x), width, layout};
}

// Gates of the rows from sorted row `begin` on; ones where there are none.
template <typename T>
std::vector<T> scales(const T* gates, const Plan& plan, int64_t begin, int64_t end) {
  std::vector<T> scale(end - begin, T(1));
  if (gates)
    for (int64_t s = begin; s < end; ++s) scale[s - begin] = gates[plan.order[s]];
  return scale;
}

template <typename T>
const Sum<T>* gates_of(const std::optional<Tensor>& gates, const Plan& plan) {
  if (!gates) return nullptr;
  STD_TORCH_CHECK(gates->is_contiguous() && gates->numel() == plan.pairs, "there must be a gate for each pair");
  return data<const Sum<T>>(*gates);
}

// Rows to be written, with their gates. Tokens are sums over slots: their pairs are written first, and then added.
template <typename T>
class Result {
 public:
  Result(const Tensor& like, const Plan& plan, const std::string& layout, int64_t width, const Sum<T>* gates)
      : plan_(plan), sums_(layout_of(layout) == Layout::token), gates_(gates),
        written_(torch::stable::new_empty(like, {plan.pairs, width})),
        rows_{data<T>(written_), width, sums_ ? Layout::pair : layout_of(layout)} {
    for (int64_t s = plan.rows(); s < plan.pairs; ++s) std::fill_n(rows_.at(plan, s), width, T{});
  }

  const Rows<T>& rows() const { return rows_; }
  std::vector<Sum<T>> row_scales(int64_t begin, int64_t end) const {
    return scales(sums_ ? nullptr : gates_, plan_, begin, end);
  }

  Tensor finish() const {
    if (!sums_) return written_;
    const int64_t width = rows_.width, slots = plan_.top_k;
    Tensor out = torch::stable::new_empty(written_, {plan_.pairs / slots, width});
    T* const to = data<T>(out);
    modmoe::Parallel()(plan_.pairs / slots, [&](int64_t token) {
      modmoe::weighted_sum(rows_.data + token * slots * width, gates_ ? gates_ + token * slots : nullptr, slots, width,
                           to + token * width);
    });
    return out;
  }

 private:
  const Plan& plan_;
  bool sums_;
  const Sum<T>* gates_;
  Tensor written_;
  Rows<T> rows_;
};

// The rows of all experts, in units that keep the threads equally busy.
template <typename T>
std::vector<Unit> units_of_rows(const Plan& plan) {
  using Gemm = ExpertGemm<T>;
  const int64_t share = plan.rows() / (4 * modmoe::num_threads());
  const int64_t step = std::clamp(share / Gemm::kColumns * Gemm::kColumns, Gemm::kColumns, Gemm::kMaxRows);
  std::vector<Unit> units;
  for (int64_t e = 0; e < plan.experts; ++e)
    for (int64_t begin = plan.begin(e); begin < plan.end(e); begin += step) {
      const int64_t end = std::min(begin + step, plan.end(e));
      units.push_back({e, begin, end, end - begin});
    }
  return units;
}

// The columns of all gradients, in such units. An expert without rows has a gradient too, of zeros.
std::vector<Unit> units_of_columns(const Plan& plan, int64_t width) {
  const int64_t share = std::max<int64_t>(plan.rows() * width / (4 * modmoe::num_threads()), 1);
  std::vector<Unit> units;
  for (int64_t e = 0; e < plan.experts; ++e) {
    const int64_t rows = plan.end(e) - plan.begin(e), parts = 1 + rows * width / share;
    const int64_t step = (width + parts - 1) / parts;
    for (int64_t begin = 0; begin < width; begin += step)
      units.push_back({e, begin, std::min(begin + step, width), std::max<int64_t>(rows, 1) * step});
  }
  return units;
}

// The matrices of all experts, one after the other.
template <typename T>
struct Matrices {
  T* data;
  int64_t stride;

  explicit Matrices(const Tensor& weight) : data(::data<T>(weight)), stride(weight.stride(0)) {}
  T* at(int64_t expert) const { return data + expert * stride; }
};

bool is_taken(ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return MODMOE_TAKES_BF16;
  return dtype == ScalarType::Float || dtype == ScalarType::Double;
}

bool takes_bf16() { return is_taken(ScalarType::BFloat16); }

// Of sums, and of gates.
ScalarType sum_dtype(ScalarType dtype) { return dtype == ScalarType::BFloat16 ? ScalarType::Float : dtype; }

// What the products rely on; they read and write whole vectors.
void check_operands(const Tensor& weight, const std::optional<Tensor>& gates,
                    std::initializer_list<const Tensor*> rows) {
  const ScalarType dtype = weight.scalar_type();
  STD_TORCH_CHECK(is_taken(dtype), "dtype must be float32, float64 or, on some processors, bfloat16");
  for (const Tensor* x : rows) STD_TORCH_CHECK(x->scalar_type() == dtype, "dtypes differ");
  STD_TORCH_CHECK(!gates || gates->scalar_type() == sum_dtype(dtype), "gates must have the dtype of sums");
  STD_TORCH_CHECK(weight.dim() == 3 && weight.stride(2) == 1 && weight.stride(1) == weight.size(2),
                  "the matrix of each expert must be contiguous");
  for (int64_t width : {weight.size(1), weight.size(2)})
    STD_TORCH_CHECK(width > 0 && width * int64_t(weight.element_size()) % modmoe::kVectorBytes == 0,
                    "widths must fill vectors of ", modmoe::kVectorBytes, " bytes, got ", width);
}

template <class Run>
auto with_dtype(ScalarType dtype, const Run& run) {
#if MODMOE_TAKES_BF16
  if (dtype == ScalarType::BFloat16) return run(modmoe::BFloat16());
#endif
  return dtype == ScalarType::Double ? run(double()) : run(float());
}

template <typename T>
Tensor forward(const Tensor& x, const Tensor& weight, const Plan& plan, const std::optional<Tensor>& gates,
               const std::string& source, const std::string& target) {
  const int64_t out = weight.size(1), in = weight.size(2);
  const Rows<const T> from = rows_of<T>(x, plan, source, in);
  const Result<T> result(x, plan, target, out, gates_of<T>(gates, plan));
  const Matrices<const T> matrices(weight);
  modmoe::spread(units_of_rows<T>(plan), [&](const auto& next) {
    ExpertGemm<T> gemm;
    while (const Unit* u = next()) {
      const auto x_rows = from.range(plan, u->begin, u->end);
      const auto y_rows = result.rows().range(plan, u->begin, u->end);
      const auto scale = result.row_scales(u->begin, u->end);
      gemm.multiply_transposed(x_rows.data(), y_rows.data(), scale.data(), u->end - u->begin,
                               matrices.at(u->expert), in, out);
    }
  });
  return result.finish();
}

// Gradients of x and of the gates: with u = w^T dy of a row, <u, x> is its gate's and gate * u is the row's.
template <typename T>
void input_gradients(const Rows<const T>& dy, const Rows<const T>& x, const Tensor& weight, const Plan& plan,
                     const Result<T>* dx, Sum<T>* dgates) {
  const Matrices<const T> matrices(weight);
  modmoe::spread(units_of_rows<T>(plan), [&](const auto& next) {
    ExpertGemm<T> gemm;
    std::vector<Sum<T>> dots(ExpertGemm<T>::kMaxRows);
    while (const Unit* u = next()) {
      const auto dy_rows = dy.range(plan, u->begin, u->end), x_rows = x.range(plan, u->begin, u->end);
      std::vector<T*> dx_rows;
      std::vector<Sum<T>> scale;
      if (dx) dx_rows = dx->rows().range(plan, u->begin, u->end), scale = dx->row_scales(u->begin, u->end);
      gemm.multiply(dy_rows.data(), u->end - u->begin, matrices.at(u->expert), x.width, dy.width,
                    x_rows.data(), dgates ? dots.data() : nullptr, dx ? dx_rows.data() : nullptr, scale.data());
      if (dgates)
        for (int64_t s = u->begin; s < u->end; ++s) dgates[plan.order[s]] = dots[s - u->begin];
    }
  });
}

template <typename T>
void weight_gradient(const Rows<const T>& dy, const Rows<const T>& x, const Plan& plan, const Sum<T>* gates,
                     const Tensor& dweight) {
  const Matrices<T> gradients(dweight);
  modmoe::spread(units_of_columns(plan, dy.width), [&](const auto& next) {
    ExpertGemm<T> gemm;
    while (const Unit* u = next()) {
      const int64_t begin = plan.begin(u->expert), end = plan.end(u->expert);
      T* gradient = gradients.at(u->expert);
      if (begin == end) {
        std::fill_n(gradient + u->begin * x.width, (u->end - u->begin) * x.width, T{});
        continue;
      }
      const auto dy_rows = dy.range(plan, begin, end), x_rows = x.range(plan, begin, end);
      const auto scale = scales(gates, plan, begin, end);
      gemm.outer(dy_rows.data(), x_rows.data(), scale.data(), end - begin, gradient, x.width, u->begin, u->end);
    }
  });
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Plan& plan,
                                            const std::optional<Tensor>& gates, const std::string& source,
                                            const std::string& target, bool needs_x, bool needs_weight,
                                            bool needs_gates) {
  const int64_t out = weight.size(1), in = weight.size(2);
  const Rows<const T> dy_rows = rows_of<T>(dy, plan, target, out), x_rows = rows_of<T>(x, plan, source, in);
  const Sum<T>* const gate = gates_of<T>(gates, plan);
  Tensor dx = torch::stable::new_empty(x, {0});
  Tensor dgates = torch::stable::new_empty(x, {0});
  Tensor dweight =
      needs_weight ? torch::stable::new_empty(weight, {plan.experts, out, in}) : torch::stable::new_empty(weight, {0});
  std::optional<Result<T>> dx_rows;
  if (needs_x) dx_rows.emplace(x, plan, source, in, gate);
  if (needs_gates) dgates = torch::stable::new_zeros(x, {plan.pairs}, sum_dtype(x.scalar_type()));
  if (needs_x || needs_gates)
    input_gradients<T>(dy_rows, x_rows, weight, plan, needs_x ? &*dx_rows : nullptr,
                       needs_gates ? data<Sum<T>>(dgates) : nullptr);
  if (needs_x) dx = dx_rows->finish();
  if (needs_weight) weight_gradient<T>(dy_rows, x_rows, plan, gate, dweight);
  return {dx, dweight, dgates};
}

Tensor grouped_linear(Tensor x, Tensor weight, Tensor order, Tensor offsets, std::optional<Tensor> gates,
                      int64_t top_k, std::string source, std::string target) {
  check_operands(weight, gates, {&x});
  const Plan plan(order, offsets, weight.size(0), top_k);
  return with_dtype(x.scalar_type(), [&](auto zero) {
    return forward<decltype(zero)>(x, weight, plan, gates, source, target);
  });
}

std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor order,
                                                           Tensor offsets, std::optional<Tensor> gates, int64_t top_k,
                                                           std::string source, std::string target, bool needs_x,
                                                           bool needs_weight, bool needs_gates) {
  check_operands(weight, gates, {&dy, &x});
  const Plan plan(order, offsets, weight.size(0), top_k);
  return with_dtype(x.scalar_type(), [&](auto zero) {
    return backward<decltype(zero)>(dy, x, weight, plan, gates, source, target, needs_x, needs_weight, needs_gates);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(modmoe_cpu, m) {
  m.def(
      "grouped_linear(Tensor x, Tensor weight, Tensor order, Tensor offsets, Tensor? gates, int top_k, str source, "
      "str target) -> Tensor");
  m.def(
      "grouped_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor order, Tensor offsets, Tensor? gates, "
      "int top_k, str source, str target, bool needs_x, bool needs_weight, bool needs_gates) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("takes_bf16() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(modmoe_cpu, CPU, m) {
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear));
  m.impl("grouped_linear_backward", TORCH_BOX(&grouped_linear_backward));
}

STABLE_TORCH_LIBRARY_IMPL(modmoe_cpu, CompositeExplicitAutograd, m) { m.impl("takes_bf16", TORCH_BOX(&takes_bf16)); }
