// Work on ragged groups of rows, cut into units for threads.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace modmoe {

// A part of one expert's work: rows [begin, end), or columns of its gradient.
struct Unit {
  int64_t expert, begin, end, work;
};

// The offsets say where each expert's rows end.
inline void check_offsets(const int32_t* ends, int64_t experts, int64_t rows) {
  for (int64_t e = 0; e < experts; ++e)
    STD_TORCH_CHECK(ends[e] >= (e ? ends[e - 1] : 0) && ends[e] <= rows, "offsets must rise from 0 to at most ", rows,
                    " rows, got ", ends[e], " for expert ", e);
}

// run(next) on each thread; next() gives it a unit, and null when all are taken. Largest first, so that no thread is
// left with a large one at the end.
template <class Run>
void spread(std::vector<Unit> units, const Run& run) {
  std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.work > b.work; });
  std::atomic<size_t> taken{0};
  const auto next = [&]() -> const Unit* {
    const size_t i = taken++;
    return i < units.size() ? &units[i] : nullptr;
  };
  Parallel()(std::min<int64_t>(num_threads(), units.size()), [&](int64_t) { run(next); });
}

}  // namespace modmoe
