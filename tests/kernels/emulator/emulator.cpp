// The emulator's runtime. Compiled without instrumentation; the kernels are compiled with -fsanitize=thread and call
// the __tsan_* functions below instead of that sanitizer's own.
#include "emulator.h"

#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace modmoe {
// The definition of what kernels declare as `extern __shared__`.
thread_local unsigned char shared_memory[160 << 10] __attribute__((aligned(128)));
}  // namespace modmoe

namespace emulator {

int driver_version = 13000, toolkit_version = 13000;
const char* driver_error = nullptr;

namespace {

enum class Access { kRead, kWrite, kAtomic };

struct Range {
  const unsigned char* begin = nullptr;
  const unsigned char* end = nullptr;
  bool has(const unsigned char* p) const { return p >= begin && p < end; }
};

// -------------------------------------------------------------------------------------------------------------- state

constexpr size_t kStackBytes = 64 << 10;

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  size_t size;
  int group;
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  bool entered = false;
  int id = 0;
  std::vector<Copy> copies;  // asynchronous, under way
  int group = 0;             // of the next asynchronous copy
  bool owns(const unsigned char* p) const { return p >= stack.get() && p < stack.get() + kStackBytes; }
};

struct Meeting {  // threads that wait for each other
  std::vector<int> waiting;
  Site site{};
};

struct Warp {
  Meeting meeting;
  unsigned live = 0;   // mask of the lanes that have not returned
  unsigned epoch = 0;  // warp barriers passed
  unsigned char incoming[kLanes * kMaxPayload];
  unsigned char shown[kLanes * kMaxPayload];
  unsigned shown_by = 0;
  int num_live() const { return __builtin_popcount(live); }
};

struct Barrier {
  Site site;
  std::string name;
  bool deleted;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<int> ready;
Meeting block_meeting;
int live_threads;
Fiber* current;
void (*thread_body)(const void*);
const void* thread_context;
jmp_buf scheduler;
unsigned schedule;  // 0: the lowest thread first, 1: the highest first, else: any, drawn from this seed
std::mt19937 random_engine;

std::string error;
std::vector<Barrier> barriers;
std::string deleted_barrier;

enum Signal { kSwitch = 1, kFault = 2 };

std::string name(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

[[noreturn]] void fault(const std::string& what) {
  error = what + ", block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x);
  _longjmp(scheduler, kFault);  // abandons all fibers: kernels own nothing that would need a destructor
}

// --------------------------------------------------------------------------------------------------------- scheduling

void leave() {
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, kSwitch);
}

void check_return(const Meeting& meeting, int live) {
  if (live > 0 && static_cast<int>(meeting.waiting.size()) == live) {
    fault("some threads returned while others wait at " + name(meeting.site));
  }
}

void fiber_main() {
  for (;;) {
    thread_body(thread_context);
    Warp& warp = warps[current->id / kLanes];
    warp.live &= ~(1u << current->id % kLanes);
    --live_threads;
    check_return(block_meeting, live_threads);
    check_return(warp.meeting, warp.num_live());
    leave();
  }
}

// Waits until `expected` threads are here; the last one runs `release` and wakes the others.
template <typename Release>
void meet(Meeting& meeting, int expected, Site site, Release release) {
  if (meeting.waiting.empty()) meeting.site = site;
  if (meeting.site.line != site.line || std::strcmp(meeting.site.file, site.file) != 0) {
    fault("divergence: some threads wait at " + name(meeting.site) + ", others at " + name(site));
  }
  if (static_cast<int>(meeting.waiting.size()) + 1 < expected) {
    meeting.waiting.push_back(current->id);
    leave();
    return;
  }
  release();
  ready.insert(ready.end(), meeting.waiting.begin(), meeting.waiting.end());
  meeting.waiting.clear();
}

int take_ready() {
  auto next = ready.begin();
  if (schedule == 0) {
    next = std::min_element(ready.begin(), ready.end());
  } else if (schedule == 1) {
    next = std::max_element(ready.begin(), ready.end());
  } else {
    next += random_engine() % ready.size();
  }
  const int id = *next;
  *next = ready.back();
  ready.pop_back();
  return id;
}

void enter(Fiber& fiber) {
  current = &fiber;
  threadIdx = {fiber.id % blockDim.x, fiber.id / blockDim.x % blockDim.y, fiber.id / (blockDim.x * blockDim.y)};
  if (fiber.entered) _longjmp(fiber.resume, 1);
  fiber.entered = true;
  setcontext(&fiber.start);
}

void report_deadlock() {
  error = "deadlock in block " + std::to_string(blockIdx.x);
  if (!block_meeting.waiting.empty()) error += ", threads wait at " + name(block_meeting.site);
  for (const Warp& warp : warps) {
    if (!warp.meeting.waiting.empty()) error += ", lanes wait at " + name(warp.meeting.site);
  }
}

void make_fibers(int count) {
  while (static_cast<int>(fibers.size()) < count) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->id = static_cast<int>(fibers.size()) - 1;
  }
  for (auto& fiber : fibers) {
    fiber->entered = false;
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = fiber->stack.get();
    fiber->start.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber->start, fiber_main, 0);
  }
}

void start_block(int threads) {
  block_meeting = {};
  warps.assign((threads + kLanes - 1) / kLanes, Warp());
  live_threads = threads;
  ready.clear();
  for (int id = 0; id < threads; ++id) {
    fibers[id]->copies.clear();
    fibers[id]->group = 0;
    warps[id / kLanes].live |= 1u << id % kLanes;
    ready.push_back(id);
  }
}

void run_block() {
  // A fiber that stops or fails comes back here.
  if (_setjmp(scheduler) == kFault) return;
  if (!ready.empty()) enter(*fibers[take_ready()]);
  if (live_threads > 0) report_deadlock();
}

// True if the caller shall act as if the barrier were not there.
bool is_deleted(Site site) {
  for (const Barrier& barrier : barriers) {
    if (barrier.site.line == site.line && barrier.site.file == site.file) return barrier.deleted;
  }
  barriers.push_back({site, name(site), name(site) == deleted_barrier});
  return barriers.back().deleted;
}

// ------------------------------------------------------------------------------------------------------- memory checks
//
// Every two bytes (the smallest thing kernels write) of shared memory and of registered buffers remember their last
// write and reads. Two accesses by different threads, one of them a write, race unless a barrier stands between them.

constexpr size_t kGranule = 2;

struct Event {
  unsigned block = 0;  // blocks are numbered over all launches, from 1
  unsigned epoch = 0;  // block barriers passed
  unsigned warp_epoch = 0;
  int thread = 0;
  Access access = Access::kRead;
};

enum class By { kThread, kWarp, kBlock, kGrid };  // whose reads an event stands for

struct Granule {
  Event write, read;  // the last ones
  By readers = By::kThread;
  bool in_flight = false;  // target of an asynchronous copy that its thread has not waited for
};

struct Region : Range {
  std::vector<Granule> granules;
  Region(const unsigned char* begin, const unsigned char* end)
      : Range{begin, end}, granules((end - begin) / kGranule + 1) {}
  Granule& at(const unsigned char* p) { return granules[(p - begin) / kGranule]; }
};

std::unique_ptr<Region> shared_region;
std::vector<Region> buffers;
Range library_image, launcher_stack;
size_t dynamic_shared_size;
bool races_allowed;
unsigned block_serial, first_block_of_launch, block_epoch;

bool is_before(const Event& past, By by, const Event& now) {
  if (past.block < first_block_of_launch) return true;
  if (by == By::kGrid || past.block != now.block) return false;  // blocks of one launch are not ordered
  if (past.epoch < now.epoch) return true;
  if (by == By::kBlock || past.thread / kLanes != now.thread / kLanes) return false;
  return past.warp_epoch < now.warp_epoch || (by == By::kThread && past.thread == now.thread);
}

void report_race(const char* what, const Event& past) {
  if (races_allowed) return;
  fault(std::string("race: ") + what + " by block " + std::to_string(past.block - first_block_of_launch) +
        " of the launch, thread " + std::to_string(past.thread) + ", and no barrier between");
}

void check_read(Granule& granule, const Event& now, bool shared) {
  if (shared && granule.write.block != now.block) fault("shared memory is read before it is written");
  if (!is_before(granule.write, By::kThread, now)) report_race("read after a write", granule.write);
  By by = By::kThread;
  if (!is_before(granule.read, granule.readers, now)) {
    by = granule.read.block != now.block                       ? By::kGrid
         : granule.read.thread / kLanes != now.thread / kLanes ? By::kBlock
                                                               : By::kWarp;
    by = std::max(by, granule.readers);
  }
  granule.readers = by;
  granule.read = now;
}

void check_write(Granule& granule, const Event& now) {
  const bool atomic = granule.write.access == Access::kAtomic && now.access == Access::kAtomic;
  if (!atomic && !is_before(granule.write, By::kThread, now)) report_race("write after a write", granule.write);
  if (!is_before(granule.read, granule.readers, now)) report_race("write after a read", granule.read);
  granule.write = now;
}

bool is_readable_elsewhere(const unsigned char* p) {  // kernel parameters; constants
  return launcher_stack.has(p) || library_image.has(p);
}

Region* find_buffer(const unsigned char* p) {
  const auto found = std::find_if(buffers.begin(), buffers.end(), [&](const Region& r) { return r.has(p); });
  return found == buffers.end() ? nullptr : &*found;
}

void record(const volatile void* address, size_t size, Access access) {
  if (current == nullptr) return;
  const auto* p = const_cast<const unsigned char*>(static_cast<const volatile unsigned char*>(address));
  if (current->owns(p)) return;
  const bool shared = shared_region->has(p);
  Region* region = shared ? shared_region.get() : find_buffer(p);
  if (region == nullptr) {
    if (access == Access::kRead && is_readable_elsewhere(p)) return;
    fault(access == Access::kRead ? "read out of bounds" : "write out of bounds");
  }
  const bool dynamic = p >= modmoe::shared_memory && p < modmoe::shared_memory + sizeof(modmoe::shared_memory);
  const unsigned char* end = shared && dynamic ? modmoe::shared_memory + dynamic_shared_size : region->end;
  if (p + size > end) fault("access past the end of a buffer");
  const Event now{block_serial, block_epoch, warps[current->id / kLanes].epoch, current->id, access};
  const size_t last = (p + size - 1 - region->begin) / kGranule;
  for (size_t i = (p - region->begin) / kGranule; i <= last; ++i) {
    Granule& granule = region->granules[i];
    if (shared && std::max(granule.write.block, granule.read.block) < block_serial) granule = {};  // a new block's
    if (granule.in_flight) fault("access to memory that an asynchronous copy may still be writing");
    if (access == Access::kRead) {
      check_read(granule, now, shared);
    } else {
      check_write(granule, now);
    }
  }
}

void set_in_flight(const Copy& copy, bool in_flight) {
  for (size_t i = 0; i < copy.size; i += kGranule) shared_region->at(copy.to + i).in_flight = in_flight;
}

// Finds the addresses of this library, and of its thread-local storage, which holds nothing but shared memory.
int find_library(dl_phdr_info* info, size_t, void* thread_local_range) {
  Range image, storage;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const auto* begin = reinterpret_cast<const unsigned char*>(info->dlpi_addr + header.p_vaddr);
    if (header.p_type == PT_LOAD) {
      image.begin = image.begin == nullptr ? begin : std::min(image.begin, begin);
      image.end = std::max(image.end, begin + header.p_memsz);
    } else if (header.p_type == PT_TLS) {
      storage.begin = static_cast<const unsigned char*>(info->dlpi_tls_data);
      storage.end = storage.begin + header.p_memsz;
    }
  }
  if (!image.has(reinterpret_cast<const unsigned char*>(&error))) return 0;
  library_image = image;
  *static_cast<Range*>(thread_local_range) = storage;
  return 1;
}

// Each thread of the host has its own.
void find_shared_memory() {
  modmoe::shared_memory[0] = 0;  // thread-local storage exists from its first use on
  Range storage;
  dl_iterate_phdr(find_library, &storage);
  if (shared_region && shared_region->begin == storage.begin) return;
  shared_region = std::make_unique<Region>(storage.begin, storage.end);
}

}  // namespace

// ---------------------------------------------------------------------------------------------- what kernels are given

void expose(const void* begin, size_t size) {
  const auto* p = static_cast<const unsigned char*>(begin);
  if (find_buffer(p) == nullptr) buffers.emplace_back(p, p + size);
}

const char* error_message() { return error.c_str(); }

void fault(const char* what) { fault(std::string(what)); }

void run_grid(dim3 grid, dim3 block, size_t dynamic_shared_bytes, void (*thread)(const void*), const void* context) {
  if (!error.empty()) return;
  find_shared_memory();
  const auto* here = static_cast<const unsigned char*>(__builtin_frame_address(0));
  launcher_stack = {here - 4096, here + (64 << 10)};
  dynamic_shared_size = dynamic_shared_bytes;
  thread_body = thread;
  thread_context = context;
  gridDim = grid;
  blockDim = block;
  random_engine.seed(schedule);
  first_block_of_launch = block_serial + 1;
  const int threads = static_cast<int>(block.x * block.y * block.z);
  make_fibers(threads);
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (unsigned i = 0; i < blocks && error.empty(); ++i) {
    const unsigned index = schedule == 1 ? blocks - 1 - i : i;
    blockIdx = {index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y)};
    ++block_serial;
    block_epoch = 0;
    start_block(threads);
    run_block();
  }
  current = nullptr;
  buffers.clear();
}

void block_barrier(Site site) {
  if (is_deleted(site)) return;
  meet(block_meeting, live_threads, site, [] { ++block_epoch; });
}

void warp_barrier(Site site) {
  if (is_deleted(site)) return;
  Warp& warp = warps[current->id / kLanes];
  meet(warp.meeting, warp.num_live(), site, [&] { ++warp.epoch; });
}

int lane_id() { return current->id % kLanes; }

// Orders no memory accesses: of the warp functions, only __syncwarp does.
unsigned exchange_bytes(unsigned mask, const void* data, size_t size, void* shown, Site site) {
  Warp& warp = warps[current->id / kLanes];
  if ((mask & warp.live) != warp.live) fault("warp function without all live lanes at " + name(site));
  std::memcpy(warp.incoming + lane_id() * size, data, size);
  // Nobody can overwrite `shown` before all lanes have read it: that takes all of them at the next meeting.
  meet(warp.meeting, warp.num_live(), site, [&] {
    std::memcpy(warp.shown, warp.incoming, sizeof(warp.shown));
    warp.shown_by = warp.live;
  });
  std::memcpy(shown, warp.shown, kLanes * size);
  return warp.shown_by;
}

void copy_async(void* shared, const void* from, size_t size) {
  const Copy copy{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(from), size, current->group};
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(from)) % size != 0) {
    fault("asynchronous copy between addresses that are not multiples of its size");
  }
  if (from != nullptr) record(from, size, Access::kRead);
  record(shared, size, Access::kWrite);
  set_in_flight(copy, true);
  current->copies.push_back(copy);
}

void commit_copies() { ++current->group; }

// Copies happen as late as they may: when their thread waits for them.
void wait_copies(int newest_groups_left, Site site) {
  if (is_deleted(site)) return;
  std::vector<Copy> left;
  for (const Copy& copy : current->copies) {
    if (copy.group >= current->group - newest_groups_left) {
      left.push_back(copy);
      continue;
    }
    set_in_flight(copy, false);
    record(copy.to, copy.size, Access::kWrite);
    if (copy.from == nullptr) {
      std::memset(copy.to, 0, copy.size);
    } else {
      std::memcpy(copy.to, copy.from, copy.size);
    }
  }
  current->copies = left;
}

}  // namespace emulator

// ---------------------------------------------------------------------------------------------------- what Python
// calls

using emulator::Access;

extern "C" {

// Forgets barriers and the last error. From now on threads run in this order, and the barrier at "file:line"
// counts as deleted.
void emulator_reset(unsigned schedule, const char* deleted_barrier, bool races_allowed) {
  emulator::races_allowed = races_allowed;
  emulator::error.clear();
  emulator::barriers.clear();
  emulator::schedule = schedule;
  emulator::deleted_barrier = deleted_barrier;
  emulator::buffers.clear();
}

// `error` stays the caller's.
void emulator_driver(int driver, int toolkit, const char* error) {
  emulator::driver_version = driver;
  emulator::toolkit_version = toolkit;
  emulator::driver_error = error;
}

const char* emulator_error() { return emulator::error_message(); }

// The barriers met since the last reset, one "file:line" per line.
const char* emulator_barriers() {
  static std::string text;
  text.clear();
  for (const auto& barrier : emulator::barriers) text += barrier.name + "\n";
  return text.c_str();
}

#define INSTRUMENTED(size)                                                                \
  void __tsan_read##size(void* p) { emulator::record(p, size, Access::kRead); }           \
  void __tsan_write##size(void* p) { emulator::record(p, size, Access::kWrite); }         \
  void __tsan_unaligned_read##size(void* p) { emulator::record(p, size, Access::kRead); } \
  void __tsan_unaligned_write##size(void* p) { emulator::record(p, size, Access::kWrite); }
INSTRUMENTED(1)
INSTRUMENTED(2)
INSTRUMENTED(4)
INSTRUMENTED(8)
INSTRUMENTED(16)
void __tsan_read_range(void* p, size_t size) { emulator::record(p, size, Access::kRead); }
void __tsan_write_range(void* p, size_t size) { emulator::record(p, size, Access::kWrite); }
int __tsan_atomic32_fetch_add(volatile int* p, int value, int) {
  emulator::record(p, sizeof(int), Access::kAtomic);
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
