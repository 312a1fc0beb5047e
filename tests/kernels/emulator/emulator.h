// Runs CUDA kernels as host C++ and checks what a GPU does not tell: see README.md beside this file.
//
// A thread of a block is a fiber; blocks run one after another. Fibers switch only inside the functions declared here.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

constexpr int kLanes = 32;
constexpr size_t kMaxPayload = 64;

// Where in the kernel's source a call stands: default arguments are evaluated at the caller.
struct Site {
  const char* file;
  int line;
};
#define EMULATOR_SITE emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

void run_grid(dim3 grid, dim3 block, size_t dynamic_shared_bytes, void (*thread)(const void*), const void* context);

// Runs `thread` once for every thread of the grid. On a fault the launch ends, and so do all later ones: see
// error_message.
template <typename Thread>
void launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const Thread& thread) {
  run_grid(
      grid, block, dynamic_shared_bytes, [](const void* context) { (*static_cast<const Thread*>(context))(); },
      &thread);
}

// Memory that the next launch may use, besides shared memory.
void expose(const void* begin, size_t size);

// What went wrong since the last reset, or "".
const char* error_message();

// What the emulated driver says of itself, as CUDA's numbers have it (13000 is 13.0), and of any kernel (null: it runs).
extern int driver_version, toolkit_version;
extern const char* driver_error;

[[noreturn]] void fault(const char* what);
void block_barrier(Site site);
void warp_barrier(Site site);
int lane_id();

// Asynchronous copies: `from` null writes zeros.
void copy_async(void* shared, const void* from, size_t size);
void commit_copies();
void wait_copies(int newest_groups_left, Site site);

// All live lanes of the warp meet; `shown` receives the `size` bytes of each, lane by lane. Returns the live lanes.
unsigned exchange_bytes(unsigned mask, const void* data, size_t size, void* shown, Site site);

template <typename T>
struct Lanes {
  T value[kLanes];
  unsigned live;
  bool has(int lane) const { return lane >= 0 && lane < kLanes && (live >> lane & 1); }
};

template <typename T>
Lanes<T> exchange(unsigned mask, const T& value, Site site) {
  static_assert(sizeof(T) <= kMaxPayload);
  Lanes<T> lanes;
  lanes.live = exchange_bytes(mask, &value, sizeof(T), lanes.value, site);
  return lanes;
}

template <typename T>
T shuffle(unsigned mask, T value, int source, Site site) {
  const Lanes<T> lanes = exchange(mask, value, site);
  return lanes.has(source) ? lanes.value[source] : value;
}

template <typename T, typename Fold>
T reduce(unsigned mask, T value, Site site, Fold fold) {
  const Lanes<T> lanes = exchange(mask, value, site);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes.has(lane)) value = fold(value, lanes.value[lane]);
  }
  return value;
}

}  // namespace emulator
