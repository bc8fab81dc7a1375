// Runs kernels on the host: the fibers, the order of blocks and threads, the barrier.
#include "cuda/emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kernel.h"
#include "rules/all.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace fusedopt {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned char kPoison = 0xA5;  // what shared memory holds before a block writes it

// A thread of the running block.
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool finished = false;
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
      : kernel_(kernel), params_(params), grid_(grid), random_(grid.seed), fibers_(size_t(grid.threads)) {}

  void run() {
    std::vector<u32> order(grid_.blocks);
    for (u32 b = 0; b < grid_.blocks; ++b) order[b] = b;
    std::shuffle(order.begin(), order.end(), random_);
    for (u32 block : order) run_block(block);
  }

  int thread() const { return thread_; }
  u32 block() const { return block_; }
  const EmulatedGrid& grid() const { return grid_; }

  void* shared_bytes(u64 size) {
    if (shared_.size() < size) shared_.resize(size, kPoison);
    return shared_.data();
  }

  // Gives the other threads their turn until all of them have come to the barrier.
  void wait() { suspend(false); }

 private:
  void run_block(u32 block) {
    block_ = block;
    std::fill(shared_.begin(), shared_.end(), kPoison);
    for (Fiber& fiber : fibers_) start(fiber);
    std::vector<int> order(fibers_.size());
    for (size_t t = 0; t < order.size(); ++t) order[t] = int(t);
    bool running = true;
    while (running) {
      std::shuffle(order.begin(), order.end(), random_);
      for (int t : order) resume(t);
      size_t finished = 0;
      for (const Fiber& fiber : fibers_) finished += fiber.finished ? 1 : 0;
      if (finished != 0 && finished != fibers_.size())
        throw std::runtime_error("barrier in block " + std::to_string(block) + " was not reached by " +
                                 std::to_string(finished) + " of " + std::to_string(fibers_.size()) + " threads");
      running = finished == 0;
    }
  }

  void start(Fiber& fiber) {
    fiber.finished = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Emulator::enter, 0);
  }

  static void enter();

  void resume(int t) {
    thread_ = t;
    scheduler_switch_.leave(fibers_[size_t(t)].stack.get(), kStackBytes);
    swapcontext(&scheduler_, &fibers_[size_t(t)].context);
    scheduler_switch_.arrive();
    if (error_) std::rethrow_exception(error_);
  }

  void suspend(bool for_good) {
    const int t = thread_;
    StackSwitch stack;
    stack.leave(scheduler_bottom_, scheduler_size_, for_good);
    swapcontext(&fibers_[size_t(t)].context, &scheduler_);
    stack.arrive(&scheduler_bottom_, &scheduler_size_);
    thread_ = t;
  }

  void run_thread() {
    StackSwitch().arrive(&scheduler_bottom_, &scheduler_size_);
    Fiber& fiber = fibers_[size_t(thread_)];
    try {
      kernel_(params_);
    } catch (...) {
      error_ = std::current_exception();
    }
    fiber.finished = true;
    suspend(true);
  }

  EmulatedKernel kernel_;
  const KernelParams& params_;
  EmulatedGrid grid_;
  std::mt19937_64 random_;
  std::vector<Fiber> fibers_;
  std::vector<unsigned char> shared_;
  ucontext_t scheduler_;
  StackSwitch scheduler_switch_;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_size_ = 0;
  std::exception_ptr error_;
  u32 block_ = 0;
  int thread_ = 0;
};

thread_local Emulator* running = nullptr;

void Emulator::enter() { running->run_thread(); }

template <template <class> class Rule>
EmulatedKernel variant_kernel(int variant) {
#define FUSEDOPT_POINTER(name, param, state, features) sweep_kernel<Rule, Variant<param, state, features>>,
  static const EmulatedKernel table[] = {FUSEDOPT_VARIANTS(FUSEDOPT_POINTER)};
#undef FUSEDOPT_POINTER
  return table[variant];
}

}  // namespace

namespace device {

int thread_index() { return running->thread(); }
int block_threads() { return running->grid().threads; }
u32 block_index() { return running->block(); }
u32 block_count() { return running->grid().blocks; }
void barrier() { running->wait(); }
void* shared_bytes(u64 size) { return running->shared_bytes(size); }

void check_alignment(u64 address, u64 width) {
  if (address % width != 0)
    throw std::runtime_error("a " + std::to_string(width) + "-byte access at address " + std::to_string(address) +
                             " is misaligned by " + std::to_string(address % width));
}

}  // namespace device

EmulatedKernel emulated_kernel(int rule, int variant) {
  using Select = EmulatedKernel (*)(int);
#define FUSEDOPT_SELECT(stem, Rule) variant_kernel<Rule>,
  static const Select rules[] = {FUSEDOPT_RULES(FUSEDOPT_SELECT)};
#undef FUSEDOPT_SELECT
  return rules[rule](variant);
}

void run_emulated(EmulatedKernel kernel, const KernelParams& params, const EmulatedGrid& grid) {
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
}

}  // namespace fusedopt
