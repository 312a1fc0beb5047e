// Registers the grouped linear kernels with torch.
#include "grouped_linear.cuh"
#include "torch_ops.h"

namespace modmoe {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Layout parse_layout(const std::string& name) {
  if (name == "token") return Layout::kToken;
  if (name == "pair") return Layout::kPair;
  STD_TORCH_CHECK(name == "sorted", "a layout is 'token', 'pair' or 'sorted', got '", name, "'");
  return Layout::kSorted;
}

// Vector copies need widths, and beginnings of tensors, that are multiples of 16 bytes.
bool fits_vectors(std::initializer_list<const Tensor*> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor* x) {
    const int64_t row_bytes = x->size(x->dim() - 1) * static_cast<int64_t>(x->element_size());
    return row_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(x->const_data_ptr()) % 16 == 0;
  });
}

// One call of the op: what forward and backward have in common.
struct Call {
  const Tensor& weight;  // (E, out, in)
  const Tensor& order;
  const Tensor& offsets;
  const std::optional<Tensor>& gates;
  int64_t top_k;
  Stream stream;

  int64_t num_pairs() const { return order.size(0); }
  int64_t num_rows(Layout layout) const { return layout == Layout::kToken ? num_pairs() / top_k : num_pairs(); }
  Plan plan() const {
    return {data<int64_t>(order), data<int>(offsets), static_cast<int>(num_pairs()), static_cast<int>(offsets.size(0)),
            static_cast<int>(top_k)};
  }
};

void check_call(const Call& call, const Tensor& x) {
  check_tensor(call.weight, "weight", 3, x);
  check_tensor(call.order, "order", 1, call.weight);
  check_dtype(call.order, "order", ScalarType::Long);
  check_tensor(call.offsets, "offsets", 1, call.weight);
  check_dtype(call.offsets, "offsets", ScalarType::Int);
  check_size(call.offsets, "offsets", 0, call.weight.size(0));
  STD_TORCH_CHECK(call.top_k >= 1 && call.num_pairs() % call.top_k == 0, "top_k must divide the ", call.num_pairs(),
                  " pairs of the plan, got ", call.top_k);
  STD_TORCH_CHECK(call.num_pairs() <= kMaxRows, "there can be ", kMaxRows, " pairs, got ", call.num_pairs());
  for (int dim = 0; dim < 3; ++dim) {
    STD_TORCH_CHECK(call.weight.size(dim) <= 1 << 24, "weight must not exceed ", 1 << 24, " in dimension ", dim,
                    ", got ", call.weight.size(dim));
  }
  if (call.gates) {
    check_tensor(*call.gates, "gates", 2, call.weight);
    check_dtype(*call.gates, "gates", ScalarType::Float);
    check_size(*call.gates, "gates", 0, call.num_pairs() / call.top_k);
    check_size(*call.gates, "gates", 1, call.top_k);
  }
}

void check_rows(const Call& call, const Tensor& x, const char* name, Layout layout, int64_t width) {
  check_tensor(x, name, 2, call.weight);
  check_dtype(x, name, call.weight.scalar_type());
  check_size(x, name, 0, call.num_rows(layout));
  check_size(x, name, 1, width);
}

template <typename T, typename Shape, bool kDepthMajor>
void launch_rows(const RowsArguments<T>& args, Stream stream) {
  const int64_t row_tiles = max_row_tiles(args.plan.num_pairs, args.plan.num_experts, Shape::kRows);
  launch("grouped_linear", rows_kernel<T, Shape, kDepthMajor>, row_tiles * ceil_div(args.width, Shape::kColumns),
         Shape::kThreads, RowsKernel<T, Shape, kDepthMajor>::kSharedBytes, stream, args);
}

template <typename T, typename Shape>
void launch_rows(const RowsArguments<T>& args, bool depth_major, Stream stream) {
  depth_major ? launch_rows<T, Shape, true>(args, stream) : launch_rows<T, Shape, false>(args, stream);
}

struct Rows {
  Tensor out, dots;
};

// Rows of `in` times the matrix of their expert (its transpose for the gradient), brought to out_layout; and, where
// `other` is given, the ungated result's inner product with it, by pair.
Rows multiply_rows(const Call& call, const Tensor& in, Layout in_layout, Layout out_layout, bool transposed,
                   bool needs_out, const Tensor* other) {
  const int64_t pairs = call.num_pairs(), depth = in.size(1), width = call.weight.size(transposed ? 2 : 1);
  const ScalarType type = in.scalar_type();
  // Wide tiles where experts have a tile's worth of rows: known from the sizes alone.
  const bool wide = pairs >= 64 * call.offsets.size(0);
  const int64_t column_tiles = ceil_div(width, wide ? WideShape<float>::kColumns : NarrowShape<float>::kColumns);
  // The slots of a token end up in different tiles, and so are summed in a second step.
  const bool sums_slots = out_layout == Layout::kToken && call.top_k > 1;
  const Layout layout = out_layout == Layout::kToken ? Layout::kPair : out_layout;
  Tensor out = empty(in, {needs_out ? pairs : 0, width}, type);
  Tensor parts = empty(in, {other ? column_tiles : 0, pairs}, ScalarType::Float);
  Tensor dots = empty(in, {other ? pairs : 0}, ScalarType::Float);
  Tensor total = empty(in, {sums_slots && needs_out ? pairs / call.top_k : 0, width}, type);
  if (pairs == 0) return {sums_slots ? total : out, dots};
  const bool vectorized = fits_vectors({&in, &call.weight, &out}) && (!other || fits_vectors({other}));

  with_element_type(in, "x", [&](auto zero) {
    using T = decltype(zero);
    const RowsArguments<T> args{call.plan(),
                                data<T>(in),
                                data<T>(call.weight),
                                data<float>(call.gates),
                                needs_out ? mutable_data<T>(out) : nullptr,
                                other ? data<T>(*other) : nullptr,
                                other ? mutable_data<float>(parts) : nullptr,
                                in_layout,
                                layout,
                                out_layout,
                                static_cast<int>(depth),
                                static_cast<int>(width),
                                vectorized};
    wide ? launch_rows<T, WideShape<T>>(args, !transposed, call.stream)
         : launch_rows<T, NarrowShape<T>>(args, !transposed, call.stream);
    if (sums_slots && needs_out) {
      launch("sum_slots", sum_slots_kernel<T>, ceil_div(pairs / call.top_k * ceil_div(width, kStoreWidth), kSumThreads),
             kSumThreads, 0, call.stream, data<T>(out), mutable_data<T>(total), pairs / call.top_k,
             static_cast<int>(call.top_k), static_cast<int>(width), vectorized);
    }
    if (other) {
      launch("sum_parts", sum_parts_kernel, ceil_div(pairs, kSumThreads), kSumThreads, 0, call.stream,
             data<float>(parts), mutable_data<float>(dots), static_cast<int>(column_tiles), pairs);
    }
  });
  return {sums_slots ? total : out, dots};
}

Tensor weight_gradient(const Call& call, const Tensor& dy, Layout dy_layout, const Tensor& x, Layout x_layout) {
  Tensor out = empty(x, {call.weight.size(0), call.weight.size(1), call.weight.size(2)}, x.scalar_type());
  with_element_type(x, "x", [&](auto zero) {
    using T = decltype(zero);
    using Shape = WideShape<T>;
    const OuterArguments<T> args{call.plan(),
                                 data<T>(dy),
                                 data<T>(x),
                                 data<float>(call.gates),
                                 mutable_data<T>(out),
                                 dy_layout,
                                 x_layout,
                                 static_cast<int>(dy.size(1)),
                                 static_cast<int>(x.size(1)),
                                 fits_vectors({&dy, &x, &out})};
    const int64_t grid =
        call.weight.size(0) * ceil_div(dy.size(1), Shape::kRows) * ceil_div(x.size(1), Shape::kColumns);
    launch("grouped_linear_backward", call.gates ? outer_kernel<T, Shape, true> : outer_kernel<T, Shape, false>, grid,
           Shape::kThreads, OuterKernel<T, Shape>::kSharedBytes, call.stream, args);
  });
  return out;
}

// See modmoe.ops.grouped_linear; gates are float32, tensors contiguous.
Tensor grouped_linear(Tensor x, Tensor weight, Tensor order, Tensor offsets, std::optional<Tensor> gates, int64_t top_k,
                      std::string source, std::string target) {
  check_tensor(x, "x", 2, x);
  const DeviceGuard guard(x.get_device_index());
  const Call call{weight, order, offsets, gates, top_k, current_stream(x)};
  check_call(call, x);
  check_rows(call, x, "x", parse_layout(source), weight.size(2));
  return multiply_rows(call, x, parse_layout(source), parse_layout(target), false, true, nullptr).out;
}

// Gradients of x, weight and gates, the last in float32; an empty tensor where one is not needed.
std::tuple<Tensor, Tensor, Tensor> grouped_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor order,
                                                           Tensor offsets, std::optional<Tensor> gates, int64_t top_k,
                                                           std::string source, std::string target, bool needs_x,
                                                           bool needs_weight, bool needs_gates) {
  check_tensor(x, "x", 2, x);
  const DeviceGuard guard(x.get_device_index());
  const Call call{weight, order, offsets, gates, top_k, current_stream(x)};
  const Layout x_layout = parse_layout(source), dy_layout = parse_layout(target);
  check_call(call, x);
  check_rows(call, x, "x", x_layout, weight.size(2));
  check_rows(call, dy, "dy", dy_layout, weight.size(1));
  STD_TORCH_CHECK(!needs_gates || gates, "there are no gates to give a gradient for");
  Tensor dx = empty(x, {0}, x.scalar_type());
  Tensor dweight = empty(x, {0}, x.scalar_type());
  Tensor dgates = empty(x, {0}, ScalarType::Float);
  if (needs_x || needs_gates) {
    const Rows rows = multiply_rows(call, dy, dy_layout, x_layout, true, needs_x, needs_gates ? &x : nullptr);
    if (needs_x) dx = rows.out;
    if (needs_gates) dgates = torch::stable::view(rows.dots, {call.num_pairs() / top_k, top_k});
  }
  if (needs_weight) dweight = weight_gradient(call, dy, dy_layout, x, x_layout);
  return {dx, dweight, dgates};
}

}  // namespace
}  // namespace modmoe

STABLE_TORCH_LIBRARY_FRAGMENT(modmoe_cuda, m) {
  m.def(
      "grouped_linear(Tensor x, Tensor weight, Tensor order, Tensor offsets, Tensor? gates, int top_k, str source, "
      "str target) -> Tensor");
  m.def(
      "grouped_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor order, Tensor offsets, Tensor? gates, "
      "int top_k, str source, str target, bool needs_x, bool needs_weight, bool needs_gates) -> (Tensor, Tensor, "
      "Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(modmoe_cuda, CompositeExplicitAutograd, m) {
  m.impl("grouped_linear", TORCH_BOX(&modmoe::grouped_linear));
  m.impl("grouped_linear_backward", TORCH_BOX(&modmoe::grouped_linear_backward));
}
