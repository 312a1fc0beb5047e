// Loops on torch's own threads: a second pool beside them would halve the speed of both.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace modmoe {

inline int num_threads() { return int(torch::stable::get_num_threads()); }

// f(0) ... f(n - 1), spread over the threads in runs of neighbours.
struct Parallel {
  template <class F>
  void operator()(int64_t n, const F& f) const {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  }
};

}  // namespace modmoe
