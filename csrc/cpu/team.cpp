// The worker threads: a mutex, two condition variables, a generation counter.
#include "cpu/team.h"

#include <pthread.h>

#include <condition_variable>
#include <mutex>
#include <thread>
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

class Team {
 public:
  void run(int workers, const std::function<void(int)>& work) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (int(threads_.size()) < workers - 1) start_thread();
      work_ = &work;
      wanted_ = workers - 1;
      ++generation_;
    }
    wake_.notify_all();
    work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    work_ = nullptr;  // who has not come by now is not waited for
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
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (worker > wanted_ || work_ == nullptr) continue;
      const std::function<void(int)>* work = work_;
      ++running_;
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
  unsigned long generation_ = 0;
  int wanted_ = 0;
  int running_ = 0;
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
