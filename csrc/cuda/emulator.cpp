// Runs kernels on the host: the fibers, the order of blocks and threads, barriers and shuffles.
#include "cuda/emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kernel.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace fusedopt {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned char kPoison = 0xA5;  // what shared memory holds before a block writes it
constexpr size_t kWarp = device::kWarpThreads;

enum class State { kReady, kAtBarrier, kAtGridBarrier, kAtShuffle, kFinished };

// A thread of a block, and what it waits for.
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::kReady;
  u64 value = 0;  // that it gives to a shuffle, then that it takes from it
  int lane_mask = 0;
  u32* counter = nullptr;  // of the grid barrier
};

// A block that runs: the same memory serves one block after another.
struct Block {
  explicit Block(int threads) : fibers(size_t(threads)) {}
  u32 index = 0;
  bool live = false;
  std::vector<Fiber> fibers;
  std::map<const void*, std::unique_ptr<unsigned char[]>> shared;  // by what it is for

  size_t count(State state) const {
    return size_t(std::count_if(fibers.begin(), fibers.end(), [&](const Fiber& f) { return f.state == state; }));
  }
  bool all(State state) const { return count(state) == fibers.size(); }
};

// Tells AddressSanitizer, where it is on, that the stack is about to change and that it has.
struct StackSwitch {
  void* saved = nullptr;
  void leave(const void* bottom, size_t size, bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &saved, bottom, size);
#else
    (void)bottom, (void)size, (void)for_good;
#endif
  }
  void arrive(const void** bottom = nullptr, size_t* size = nullptr) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(saved, bottom, size);
#else
    (void)bottom, (void)size;
#endif
  }
};

class Emulator {
 public:
  Emulator(EmulatedKernel kernel, const KernelParams& params, const EmulatedGrid& grid)
      : kernel_(kernel), params_(params), grid_(grid), random_(grid.seed) {}

  void run() {
    std::vector<u32> waiting(grid_.blocks);
    std::iota(waiting.begin(), waiting.end(), 0);
    std::shuffle(waiting.begin(), waiting.end(), random_);
    const u32 resident = grid_.cooperative ? grid_.blocks : u32(random_() % grid_.blocks) + 1;
    for (u32 k = 0; k < resident; ++k) blocks_.push_back(std::make_unique<Block>(grid_.threads));
    for (;;) {
      for (auto& block : blocks_)
        if (!block->live && !waiting.empty()) {
          start(*block, waiting.back());
          waiting.pop_back();
        }
      Block* const next = any_ready();
      if (next != nullptr)
        run_until_all_wait(*next);
      else if (!release_grid())
        return;
    }
  }

  const EmulatedGrid& grid() const { return grid_; }
  int thread() const { return thread_; }
  u32 block() const { return block_->index; }

  void* shared_bytes(const void* what, u64 size) {
    std::unique_ptr<unsigned char[]>& bytes = block_->shared[what];
    if (!bytes) {
      bytes.reset(new unsigned char[size]);
      std::fill_n(bytes.get(), size, kPoison);
    }
    return bytes.get();
  }

  EmulatedTraffic traffic;

  // Gives others their turn until all who must have come.
  void wait() { suspend(State::kAtBarrier); }

  void wait_for_grid(u32* counter) {
    if (!grid_.cooperative) throw std::runtime_error("a grid barrier needs a cooperative launch");
    self().counter = counter;
    suspend(State::kAtGridBarrier);
  }

  u64 shuffle(u64 value, int lane_mask) {
    self().value = value;
    self().lane_mask = lane_mask;
    suspend(State::kAtShuffle);
    return self().value;
  }

 private:
  Fiber& self() { return block_->fibers[size_t(thread_)]; }

  void start(Block& block, u32 index) {
    block.index = index;
    block.live = true;
    block.shared.clear();
    for (Fiber& fiber : block.fibers) {
      fiber.state = State::kReady;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Emulator::enter, 0);
    }
  }

  // A random one of the blocks that do not wait for the grid; null: there is none.
  Block* any_ready() {
    std::vector<Block*> ready;
    for (auto& block : blocks_)
      if (block->live && !block->all(State::kAtGridBarrier)) ready.push_back(block.get());
    return ready.empty() ? nullptr : ready[size_t(random_() % ready.size())];
  }

  // One turn for every thread that can run, in random order, and what follows from where they stopped.
  void run_until_all_wait(Block& block) {
    block_ = &block;
    std::vector<int> order(block.fibers.size());
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_);
    for (int t : order)
      if (block.fibers[size_t(t)].state == State::kReady) resume(t);
    if (block.count(State::kAtShuffle) != 0) return release_warps(block);
    if (block.all(State::kFinished)) {
      block.live = false;
    } else if (block.all(State::kAtBarrier)) {
      for (Fiber& fiber : block.fibers) fiber.state = State::kReady;
    } else if (!block.all(State::kAtGridBarrier)) {
      const bool grid = block.count(State::kAtGridBarrier) != 0;
      const size_t there = block.count(grid ? State::kAtGridBarrier : State::kAtBarrier);
      throw std::runtime_error(std::string(grid ? "grid barrier" : "barrier") + " in block " +
                               std::to_string(block.index) + " was not reached by " +
                               std::to_string(block.fibers.size() - there) + " of " +
                               std::to_string(block.fibers.size()) + " threads");
    }
  }

  // Lanes exchange their values once all of their warp that have not finished are at the shuffle.
  void release_warps(Block& block) {
    for (size_t first = 0; first < block.fibers.size(); first += kWarp) {
      const size_t lanes = std::min(kWarp, block.fibers.size() - first);
      Fiber* const warp = &block.fibers[first];
      const auto is_there = [](const Fiber& fiber) { return fiber.state == State::kAtShuffle; };
      const size_t there = size_t(std::count_if(warp, warp + lanes, is_there));
      if (there == 0) continue;
      std::vector<u64> values(lanes);
      for (size_t k = 0; k < lanes; ++k) values[k] = warp[k].value;
      for (size_t k = 0; k < lanes; ++k) {
        const size_t from = k ^ size_t(warp[k].lane_mask);
        if (there != lanes || from >= lanes || warp[k].lane_mask != warp[0].lane_mask)
          throw std::runtime_error("shuffle in block " + std::to_string(block.index) + ", warp " +
                                   std::to_string(first / kWarp) + ": not by every one of 32 lanes, " +
                                   std::to_string(there) + " are there");
        warp[k].value = values[from];
      }
      for (size_t k = 0; k < lanes; ++k) warp[k].state = State::kReady;
    }
  }

  // Once every block of the grid is at the grid barrier, all go on. False: all have finished.
  bool release_grid() {
    size_t there = 0;
    u32* counter = nullptr;
    for (auto& block : blocks_) {
      if (!block->live) continue;
      ++there;
      if (counter == nullptr) counter = block->fibers[0].counter;
      for (Fiber& fiber : block->fibers)
        if (fiber.counter != counter) throw std::runtime_error("a grid barrier with more than one counter");
    }
    if (there == 0) return false;
    if (there != blocks_.size())
      throw std::runtime_error("grid barrier was not reached by " + std::to_string(blocks_.size() - there) + " of " +
                               std::to_string(blocks_.size()) + " blocks");
    if ((*counter & ~device::kGridBarrierFlag) != 0)
      throw std::runtime_error("the counter of a grid barrier was " + std::to_string(*counter) + " when it began");
    *counter ^= device::kGridBarrierFlag;
    for (auto& block : blocks_)
      for (Fiber& fiber : block->fibers) fiber.state = State::kReady;
    return true;
  }

  static void enter();

  void resume(int t) {
    thread_ = t;
    scheduler_switch_.leave(self().stack.get(), kStackBytes);
    swapcontext(&scheduler_, &self().context);
    scheduler_switch_.arrive();
    if (error_) std::rethrow_exception(error_);
  }

  void suspend(State state) {
    StackSwitch stack;
    self().state = state;
    stack.leave(scheduler_bottom_, scheduler_size_, state == State::kFinished);
    swapcontext(&self().context, &scheduler_);
    stack.arrive(&scheduler_bottom_, &scheduler_size_);
  }

  void run_thread() {
    StackSwitch().arrive(&scheduler_bottom_, &scheduler_size_);
    try {
      kernel_(params_);
    } catch (...) {
      error_ = std::current_exception();
    }
    suspend(State::kFinished);
  }

  EmulatedKernel kernel_;
  const KernelParams& params_;
  EmulatedGrid grid_;
  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Block>> blocks_;
  ucontext_t scheduler_;
  StackSwitch scheduler_switch_;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_size_ = 0;
  std::exception_ptr error_;
  Block* block_ = nullptr;  // that runs now
  int thread_ = 0;          // of it
};

thread_local Emulator* running = nullptr;

void Emulator::enter() { running->run_thread(); }

}  // namespace

namespace device {

int thread_index() { return running->thread(); }
int block_threads() { return running->grid().threads; }
u32 block_index() { return running->block(); }
u32 block_count() { return running->grid().blocks; }
void barrier() { running->wait(); }
void grid_barrier(u32* counter) { running->wait_for_grid(counter); }
u64 shuffle_bits(u64 bits, int lane_mask) { return running->shuffle(bits, lane_mask); }
void* shared_bytes(const void* what, u64 size) { return running->shared_bytes(what, size); }

void check_access(u64 address, u64 width) {
  ++running->traffic.accesses;
  running->traffic.bytes += width;
  if (address % width != 0)
    throw std::runtime_error("a " + std::to_string(width) + "-byte access at address " + std::to_string(address) +
                             " is misaligned by " + std::to_string(address % width));
}

}  // namespace device

EmulatedTraffic run_emulated(EmulatedKernel kernel, const KernelParams& params, const EmulatedGrid& grid) {
  if (grid.blocks < 1 || grid.threads < 1) throw std::invalid_argument("a grid has at least 1 block and 1 thread");
  Emulator emulator(kernel, params, grid);
  Emulator* const outer = running;
  running = &emulator;
  try {
    emulator.run();
  } catch (...) {
    running = outer;
    throw;
  }
  running = outer;
  if (*params.launch.arrivals != 0) throw std::runtime_error("the last block did not reset the arrival counter");
  return emulator.traffic;
}

}  // namespace fusedopt
