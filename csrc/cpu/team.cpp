// The worker threads: a mutex, two condition variables, a generation counter.
//
// A thread that sleeps is woken late: tens of microseconds, on a virtual machine more than a step over a million
// elements takes. So whoever waits looks for a moment whether there is something to do before it goes to sleep.
#include "cpu/team.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#elif defined(__aarch64__)
#include <cstdint>
#endif

namespace fusedopt {
namespace {

// The default floating-point mode for a scope: torch.set_flush_denormal and others change it per thread.
class DefaultFloatMode {
 public:
#if defined(__SSE2__)
  DefaultFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }  // all exceptions masked, nearest, no FTZ, no DAZ
  ~DefaultFloatMode() { _mm_setcsr((saved_ & ~0x3Fu) | (_mm_getcsr() & 0x3Fu)); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultFloatMode() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(std::uint64_t(0)));
  }
  ~DefaultFloatMode() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  std::uint64_t saved_;
#endif
};

constexpr std::chrono::microseconds kAwake{50};  // longer than what lies between two steps, or their last chunks

void pause() {
#if defined(__SSE2__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Condition>
void look_for(const Condition& condition) {
  constexpr int kLooks = 64;  // between two looks at the clock
  const auto end = std::chrono::steady_clock::now() + kAwake;
  while (std::chrono::steady_clock::now() < end)
    for (int k = 0; k < kLooks; ++k) {
      if (condition()) return;
      pause();
    }
}

// The processor that this thread is on; -1: nobody says.
int processor() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Linux may wake a thread on the processor of the one that wakes it, where it then waits its turn, milliseconds, while
// others are idle. It leaves for one of those, and may go anywhere after.
void leave_processor(int busy) {
#if defined(__linux__)
  cpu_set_t all, others;
  if (pthread_getaffinity_np(pthread_self(), sizeof all, &all) != 0) return;
  others = all;
  CPU_CLR(busy, &others);
  if (CPU_COUNT(&others) == 0) return;
  pthread_setaffinity_np(pthread_self(), sizeof others, &others);
  pthread_setaffinity_np(pthread_self(), sizeof all, &all);
#else
  (void)busy;
#endif
}

class Team {
 public:
  void run(int workers, const std::function<void(int)>& work) {
    bool nobody_came = false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (int(threads_.size()) < workers - 1) start_thread();
      work_ = &work;
      wanted_ = workers - 1;
      callers_processor_ = processor();
      ++generation_;
      nobody_came = !std::exchange(somebody_comes_, false);
    }
    wake_.notify_all();
    if (nobody_came) std::this_thread::yield();  // it may wait for this very processor
    work(0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = nullptr;  // who has not come by now is not waited for
    }
    look_for([this] { return running_ == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

  std::mutex& in_use() { return in_use_; }

 private:
  void start_thread() {
    const int worker = int(threads_.size()) + 1;
    const unsigned long seen = generation_;
    threads_.emplace_back([this, worker, seen] { serve(worker, seen); });
    threads_.back().detach();
  }

  void serve(int worker, unsigned long seen) {
    const DefaultFloatMode mode;
    for (;;) {
      look_for([&] { return generation_ != seen; });
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_ != seen; });
      if (callers_processor_ >= 0 && processor() == callers_processor_) {
        const int busy = callers_processor_;
        lock.unlock();
        leave_processor(busy);
        lock.lock();
      }
      seen = generation_;
      if (worker > wanted_ || work_ == nullptr) continue;
      const std::function<void(int)>* work = work_;
      ++running_;
      somebody_comes_ = true;
      lock.unlock();
      (*work)(worker);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex in_use_;  // held by the thread that the team works for
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* work_ = nullptr;  // null: no more hands are needed
  std::atomic<unsigned long> generation_{0};
  int wanted_ = 0;
  int callers_processor_ = -1;
  bool somebody_comes_ = true;
  std::atomic<int> running_{0};
};

// Never destroyed: its threads outlive main. A forked child has none of them and starts a team of its own.
Team* team = nullptr;
pthread_once_t team_once = PTHREAD_ONCE_INIT;

void start_team() {
  team = new Team;
  pthread_atfork(nullptr, nullptr, [] { team = new Team; });
}

}  // namespace

void run_team(int workers, const std::function<void(int)>& work) {
  const DefaultFloatMode mode;
  if (workers <= 1) return work(0);
  pthread_once(&team_once, start_team);
  std::unique_lock<std::mutex> mine(team->in_use(), std::try_to_lock);
  if (mine.owns_lock()) return team->run(workers, work);
  work(0);
}

}  // namespace fusedopt
