// The fibers of emulate.h, what they wait for, and their copies.
#include "emulate.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <random>
#include <sstream>

#include "emulate_block.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulate {

Cluster cluster;

namespace {

constexpr size_t kStackBytes = 64 * 1024;  // AddressSanitizer clears its record of all of it at each switch
constexpr int kWatched = 0xa5;

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

// Memory of `bytes` bytes between unmapped pages.
class Mapping {
 public:
  explicit Mapping(size_t bytes) {
    const size_t page = page_bytes();
    body_ = (bytes + page - 1) / page * page;
    map_ = static_cast<uint8_t*>(mmap(nullptr, body_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map_ == MAP_FAILED || (body_ > 0 && mprotect(map_ + page, body_, PROT_READ | PROT_WRITE) != 0))
      throw std::bad_alloc();
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { munmap(map_, body_ + 2 * page_bytes()); }
  uint8_t* data() const { return map_ + page_bytes(); }
  size_t size() const { return body_; }

 private:
  uint8_t* map_;
  size_t body_;
};

}  // namespace

// A thread. Contexts are switched by _setjmp and _longjmp, which spare the system calls of swapcontext; by swapcontext
// under AddressSanitizer, which must be told of every stack.
struct Fiber {
  Fiber(const std::function<void()>& thread_body, Mapping& mapping) : body(&thread_body), stack(mapping) {}

  const std::function<void()>* body;
  Mapping& stack;
  Thread state;
  ucontext_t context{};
  jmp_buf jump{};
  void* fake_stack = nullptr;  // AddressSanitizer's
  bool started = false, finished = false;
  bool (*ready)(void*) = nullptr;  // null: it can run
  void* ready_context = nullptr;
  const char* waits_for = "";
};

namespace {

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;            // of the cluster's blocks, one after the other
  std::vector<std::unique_ptr<Mapping>> stacks, shared;  // the stacks stay from launch to launch
  Fiber* running = nullptr;
  ucontext_t main{};
  jmp_buf main_jump{};
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0, shared_bytes = 0;
  std::string error;
};
Machine machine;

std::string name_of(const Block& block) {
  std::ostringstream out;
  out << "block " << block.index.x << "," << block.index.y << "," << block.index.z;
  return out.str();
}
std::string name_of(const Thread& one) { return name_of(*one.block) + " thread " + std::to_string(one.index); }

void to_main(bool finished) {
  Fiber& fiber = *machine.running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(finished ? nullptr : &fiber.fake_stack, machine.main_stack, machine.main_stack_bytes);
  swapcontext(&fiber.context, &machine.main);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#else
  if (finished) _longjmp(machine.main_jump, 1);
  if (_setjmp(fiber.jump) == 0) _longjmp(machine.main_jump, 1);
#endif
}

void fiber_main() {
  Fiber& fiber = *machine.running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.main_stack, &machine.main_stack_bytes);
#endif
  try {
    (*fiber.body)();
  } catch (const std::exception& error) {
    machine.error = name_of(fiber.state) + ": " + error.what();
  }
  fiber.finished = true;
  ++fiber.state.block->returned;
  to_main(true);
}

void start(Fiber& fiber) {
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

// Until it waits, finishes or fails.
void resume(Fiber& fiber) {
  machine.running = &fiber;
  const auto i = static_cast<unsigned>(fiber.state.index);
  threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  blockIdx = fiber.state.block->index;
  fiber.ready = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  if (!fiber.started) start(fiber);
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.data(), fiber.stack.size());
  swapcontext(&machine.main, &fiber.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  if (_setjmp(machine.main_jump) == 0) {
    if (fiber.started) _longjmp(fiber.jump, 1);
    start(fiber);
    setcontext(&fiber.context);
  }
#endif
  machine.running = nullptr;
}

// What each thread waits for, runs of threads that wait for the same put together.
std::string deadlock() {
  std::ostringstream out;
  out << "deadlock:";
  for (size_t begin = 0, end = 0; begin < machine.fibers.size(); begin = end) {
    const Fiber& first = *machine.fibers[begin];
    const auto alike = [&](const Fiber& fiber) {
      return fiber.state.block == first.state.block && fiber.finished == first.finished &&
             std::strcmp(fiber.waits_for, first.waits_for) == 0;
    };
    while (end < machine.fibers.size() && alike(*machine.fibers[end])) ++end;
    out << " " << name_of(first.state) << "-" << machine.fibers[end - 1]->state.index
        << (first.finished ? " have returned" : " wait for ") << (first.finished ? "" : first.waits_for) << ";";
  }
  return out.str();
}

// The threads of each warp, in the order in which they take their turns, anew each round.
std::vector<std::vector<size_t>> turns(std::mt19937& random) {
  std::vector<std::vector<size_t>> warps;
  for (size_t i = 0; i < machine.fibers.size(); ++i) {
    if (machine.fibers[i]->state.index % 32 == 0) warps.emplace_back();
    warps.back().push_back(i);
  }
  for (auto& warp : warps) {
    if (options.threads == Order::descending) std::reverse(warp.begin(), warp.end());
    if (options.threads == Order::random) std::shuffle(warp.begin(), warp.end(), random);
  }
  if (options.threads == Order::descending) std::reverse(warps.begin(), warps.end());
  if (options.threads == Order::random) std::shuffle(warps.begin(), warps.end(), random);
  return warps;
}

std::string check_end() {
  for (const auto& fiber : machine.fibers)
    for (const auto& group : fiber->state.copies)
      if (!group.empty()) return name_of(fiber->state) + " returned before its copies had landed";
  for (const auto& block : cluster.blocks) {
    const size_t watched = machine.shared[block->rank]->size() - machine.shared_bytes;
    if (std::any_of(block->shared + machine.shared_bytes, block->shared + machine.shared_bytes + watched,
                    [](int byte) { return byte != kWatched; }))
      return name_of(*block) + " wrote behind its shared memory";
  }
  return check_cluster();
}

// A turn of each thread of a warp that can run; whether there was one.
bool run_warp(const std::vector<size_t>& warp, size_t& left, std::mt19937& random) {
  bool progress = false;
  for (const size_t i : warp) {
    Fiber& fiber = *machine.fibers[i];
    if (fiber.finished || (fiber.ready != nullptr && !fiber.ready(fiber.ready_context))) continue;
    resume(fiber);
    if (!machine.error.empty()) return false;
    progress = true;
    if (fiber.finished) --left;
    while (options.tiles == Landing::early && land_one()) {
    }
    if (options.tiles == Landing::random && random() % 8 == 0) land_one();
  }
  return progress;
}

// Ascending: all warps go along with each other. Descending: each as far as it gets before the next one has its turn,
// so that what no barrier keeps apart is far apart. Random: some so, some so.
void run_cluster(std::mt19937& random) {
  auto warps = turns(random);
  size_t left = machine.fibers.size();
  while (left > 0) {
    bool progress = false;
    for (const auto& warp : warps) {
      const bool ahead =
          options.threads == Order::descending || (options.threads == Order::random && random() % 2 == 0);
      bool more = run_warp(warp, left, random);
      progress |= more;
      while (ahead && more) more = run_warp(warp, left, random);
      if (!machine.error.empty()) return;
    }
    if (!progress && !land_one() && machine.error.empty()) machine.error = deadlock();
    if (!machine.error.empty()) return;
    if (options.threads == Order::random) warps = turns(random);
  }
  machine.error = check_end();
}

// Blocks [first, first + blocks of the cluster), their memory poisoned, their threads at the beginning.
void set_up(unsigned first, size_t threads) {
  cluster.copies.clear();
  cluster.barrier = {};
  for (unsigned rank = 0; rank < cluster.blocks.size(); ++rank) {
    const unsigned i = first + rank;
    auto& block = *(cluster.blocks[rank] = std::make_unique<Block>());
    block.rank = rank;
    block.index = {i % gridDim.x, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y};
    block.threads = static_cast<int>(threads);
    block.shared = machine.shared[rank]->data();
    std::memset(block.shared, kPoison, machine.shared_bytes);
    std::memset(block.shared + machine.shared_bytes, kWatched, machine.shared[rank]->size() - machine.shared_bytes);
    for (size_t t = 0; t < threads; ++t) {
      Fiber& fiber = *machine.fibers[rank * threads + t];
      fiber.state = Thread{};
      fiber.state.index = static_cast<int>(t);
      fiber.state.block = &block;
      fiber.started = fiber.finished = false;
      fiber.ready = nullptr;
    }
  }
}

}  // namespace

Thread& this_thread() { return machine.running->state; }

size_t shared_bytes() { return machine.shared_bytes; }

void fail(const std::string& what) { throw std::runtime_error(what); }

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body, unsigned blocks_a_cluster) {
  const size_t threads = size_t{block.x} * block.y * block.z, blocks = size_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || blocks > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("no grid of blocks that a device would take");
  if (blocks_a_cluster == 0 || grid.x % blocks_a_cluster != 0) throw std::runtime_error("no grid of whole clusters");
  if (shared_bytes > 227 * 1024) throw std::runtime_error("more shared memory than a block can have");
  std::mt19937 random(options.seed);
  machine.shared_bytes = shared_bytes;
  machine.error.clear();
  blockDim = {block.x, block.y, block.z};
  gridDim = {grid.x, grid.y, grid.z};
  machine.fibers.clear();
  machine.shared.clear();
  cluster.blocks.clear();
  cluster.blocks.resize(blocks_a_cluster);
  for (unsigned i = 0; i < blocks_a_cluster; ++i) machine.shared.push_back(std::make_unique<Mapping>(shared_bytes + 1));
  for (size_t i = 0; i < threads * blocks_a_cluster; ++i) {
    if (machine.stacks.size() == i) machine.stacks.push_back(std::make_unique<Mapping>(kStackBytes));
    machine.fibers.push_back(std::make_unique<Fiber>(body, *machine.stacks[i]));
  }
  for (size_t n = 0; n < blocks && machine.error.empty(); n += blocks_a_cluster) {
    set_up(static_cast<unsigned>(options.reversed_blocks ? blocks - blocks_a_cluster - n : n), threads);
    run_cluster(random);
  }
  if (machine.error.empty()) return;
#if defined(__SANITIZE_ADDRESS__)
  for (const auto& stack : machine.stacks) ASAN_UNPOISON_MEMORY_REGION(stack->data(), stack->size());  // threads died
#endif
  throw std::runtime_error(machine.error);
}

int thread() { return this_thread().index; }
int block_threads() { return this_thread().block->threads; }

void wait(bool (*ready)(void*), void* context, const char* what) {
  if (ready(context)) return;
  Fiber& fiber = *machine.running;
  fiber.ready = ready;
  fiber.ready_context = context;
  fiber.waits_for = what;
  to_main(false);
}

void meet(uint32_t mask, const char* instruction, void* argument, void (*execute)(Lanes& lanes)) {
  const int warp = thread() / 32, there = std::min(32, block_threads() - warp * 32);
  if (there < 32) mask &= (1u << there) - 1;
  if ((mask >> lane() & 1) == 0) fail(std::string(instruction) + ": the lane is not in its mask");
  Meeting& meeting = this_thread().block->meetings[{warp, mask}];
  if (meeting.arrived == 0) meeting.instruction = instruction;
  if (std::strcmp(meeting.instruction, instruction) != 0)
    fail(std::string("executes ") + instruction + " while its warp executes " + meeting.instruction);
  meeting.arrived |= 1u << lane();
  meeting.lanes[lane()] = argument;
  if (meeting.arrived == mask) {
    execute(meeting.lanes);
    meeting.arrived = 0;
    std::fill(std::begin(meeting.lanes), std::end(meeting.lanes), nullptr);
    ++meeting.round;
    return;
  }
  wait_until([&meeting, round = meeting.round] { return meeting.round != round; }, instruction);
}

int barrier(int id, int threads, int value, const char* instruction) {
  require(id >= 0 && id < 16, "there are 16 named barriers");
  require(threads > 0 && (threads % 32 == 0 || threads == block_threads()), "a barrier counts whole warps");
  Barrier& here = this_thread().block->barriers[id];
  if (here.arrived == 0) here.threads = threads;
  if (here.threads != threads) fail(std::string(instruction) + ": the barrier is in use by another number of threads");
  here.sum += value;
  if (++here.arrived == threads) {
    here.result = here.sum;
    here.arrived = here.sum = 0;
    ++here.round;
    return here.result;
  }
  wait_until([&here, round = here.round] { return here.round != round; }, instruction);
  return here.result;
}

uint8_t* shared_memory() { return this_thread().block->shared; }

// A __shared__ variable is static: its address is only its distance to the dynamic shared memory.
uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - shared_memory()) + kSharedBase;
}

uint8_t* shared_at(uint32_t address, size_t bytes) {
  if (address < kSharedBase || address - kSharedBase + bytes > machine.shared_bytes)
    fail("an access of " + std::to_string(bytes) + " bytes at offset " +
         std::to_string(static_cast<int64_t>(address) - kSharedBase) + " of " + std::to_string(machine.shared_bytes) +
         " bytes of shared memory");
  return shared_memory() + (address - kSharedBase);
}

bool in_shared(const void* pointer, size_t bytes) {
  const auto* p = static_cast<const uint8_t*>(pointer);
  return p >= shared_memory() && p + bytes <= shared_memory() + machine.shared_bytes;
}

uint32_t ballot(uint32_t mask, bool value, const char* instruction) {
  struct Argument {
    bool value;
    uint32_t result;
  } argument{value, 0};
  meet(mask, instruction, argument, [](Argument*(&lanes)[32]) {
    uint32_t all = 0;
    for (int i = 0; i < 32; ++i)
      if (lanes[i] != nullptr && lanes[i]->value) all |= 1u << i;
    for (Argument* one : lanes)
      if (one != nullptr) one->result = all;
  });
  return argument.result;
}

// --- asynchronous copies (9.7.9.25.3) -------------------------------------------------------------------------------

void copy_async(void* shared, const void* global, int bytes, int valid) {
  require(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  require(valid >= 0 && valid <= bytes, "cp.async reads none to all of its bytes");
  const auto size = static_cast<uintptr_t>(bytes);
  require(reinterpret_cast<uintptr_t>(shared) % size == 0, "cp.async: the target is not aligned to its size");
  require(reinterpret_cast<uintptr_t>(global) % size == 0, "cp.async: the source is not aligned to its size");
  require(in_shared(shared, size), "cp.async: the target is not in the dynamic shared memory");
  std::memset(shared, kPoison, size);
  this_thread().copies.back().push_back({shared, global, bytes, valid});
}

void commit_copies() { this_thread().copies.emplace_back(); }

// The last entry of `copies` is the group that has not been committed yet.
void wait_copies(int pending) {
  std::deque<std::vector<Copy>>& groups = this_thread().copies;
  while (groups.size() > static_cast<size_t>(pending) + 1) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.shared, 0, static_cast<size_t>(copy.bytes));
      std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.valid));
    }
    groups.pop_front();
  }
}

}  // namespace emulate
