// The host's model of a GPU itself: barriers of block and grid, shuffles, shared memory; and that a kernel which breaks
// their rules is told so. Usage: check_grid <seed> <rounds>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <numeric>
#include <string>
#include <vector>

#include "cuda/emulator.h"
#include "cuda/kernel.h"

using namespace fusedopt;

namespace {

constexpr int kWarp = 32;

// What the kernels below work on. They are tests' own and take nothing from KernelParams.
struct Job {
  std::vector<u32> input;
  std::vector<u32> partial;  // one sum for each block
  std::vector<u32> output;   // the sum of all input, written by every thread
  u32 barrier = 0;
  u32 other_barrier = 0;
};
Job job;

struct Sums {
  u32 of_warp[1024 / kWarp];
};

u32 sum_of_warp(u32 x) {
  for (int mask = 1; mask < kWarp; mask *= 2) x += device::shuffle_xor(x, mask);
  return x;
}

void write_partial_sum() {
  const int lane = device::thread_index(), lanes = device::block_threads();
  u32 sum = 0;
  for (size_t i = device::block_index() * u32(lanes) + u32(lane); i < job.input.size();
       i += device::block_count() * u32(lanes))
    sum += job.input[i];
  sum = sum_of_warp(sum);
  Sums& sums = device::shared<Sums>();
  if (lane % kWarp == 0) sums.of_warp[lane / kWarp] = sum;
  device::barrier();
  if (lane == 0) job.partial[device::block_index()] = std::accumulate(sums.of_warp, sums.of_warp + lanes / kWarp, 0u);
}

void write_total() {
  const u32 thread = device::block_index() * u32(device::block_threads()) + u32(device::thread_index());
  job.output[thread] = std::accumulate(job.partial.begin(), job.partial.end(), 0u);
}

void sum_all(const KernelParams&) {
  write_partial_sum();
  device::grid_barrier(&job.barrier);
  write_total();
  device::grid_barrier(&job.barrier);  // a second one on the same counter
}

void sum_all_without_barrier(const KernelParams&) {
  write_partial_sum();
  device::barrier();
  write_total();
}

bool is_first() { return device::block_index() == 0 && device::thread_index() == 0; }

void skip_in_one_block(const KernelParams&) {
  if (device::block_index() != 0) device::grid_barrier(&job.barrier);
}
void skip_in_one_thread(const KernelParams&) {
  if (!is_first()) device::grid_barrier(&job.barrier);
}
void two_counters(const KernelParams&) {
  device::grid_barrier(device::block_index() == 0 ? &job.barrier : &job.other_barrier);
}
void block_barrier_in_one_thread(const KernelParams&) {
  if (is_first())
    device::barrier();
  else
    device::grid_barrier(&job.barrier);
}
void shuffle_without_one_lane(const KernelParams&) {
  if (!is_first()) sum_of_warp(1);
}
void shuffle_beside_a_barrier(const KernelParams&) {
  if (device::thread_index() < kWarp / 2)
    sum_of_warp(1);
  else
    device::barrier();
}
void shuffle_with_two_masks(const KernelParams&) { device::shuffle_xor(1u, is_first() ? 1 : 2); }
void barrier_without_one_thread(const KernelParams&) {
  if (!is_first()) device::barrier();
}

void run(EmulatedKernel kernel, const EmulatedGrid& grid) {
  u32 arrivals = 0;
  KernelParams params{};
  params.launch.arrivals = &arrivals;
  run_emulated(kernel, params, grid);
}

[[noreturn]] void fail(const std::string& words) {
  std::fprintf(stderr, "FAILED: %s\n", words.c_str());
  std::exit(1);
}

void must_fail(const char* name, EmulatedKernel kernel, const EmulatedGrid& grid, const std::string& words) {
  job.barrier = job.other_barrier = 0;
  try {
    run(kernel, grid);
  } catch (const std::exception& error) {
    if (std::string(error.what()).find(words) != std::string::npos) return;
    fail(std::string(name) + ": it was said that \"" + error.what() + "\", not that \"" + words + "\"");
  }
  fail(std::string(name) + " was let through");
}

// Whether every thread saw the whole sum.
bool sums_right(EmulatedKernel kernel, const EmulatedGrid& grid) {
  job.input.resize(10'007);
  std::iota(job.input.begin(), job.input.end(), u32(grid.seed));
  job.partial.assign(grid.blocks, 0);
  job.output.assign(size_t(grid.blocks) * size_t(grid.threads), 0);
  run(kernel, grid);
  const u32 total = std::accumulate(job.input.begin(), job.input.end(), 0u);
  return std::all_of(job.output.begin(), job.output.end(), [&](u32 sum) { return sum == total; });
}

}  // namespace

int main(int argc, char** argv) {
  const u64 seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  const u64 rounds = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 10;
  u64 unnoticed = 0;  // times that the order of blocks happened to hide a missing barrier
  for (u64 k = seed; k < seed + rounds; ++k) {
    const EmulatedGrid grid{u32(k % 7) + 2, kWarp * int(k % 8 + 1), k, true};
    if (!sums_right(sum_all, grid)) fail("a thread passed the grid barrier too early, seed " + std::to_string(k));
    unnoticed += sums_right(sum_all_without_barrier, grid) ? 1 : 0;
    must_fail("one block skips the grid barrier", skip_in_one_block, grid, "was not reached by 1 of");
    must_fail("one thread skips the grid barrier", skip_in_one_thread, grid, "was not reached by 1 of");
    must_fail("two counters", two_counters, grid, "more than one counter");
    must_fail("one thread at the wrong barrier", block_barrier_in_one_thread, grid, "was not reached by 1 of");
    must_fail("one lane skips a shuffle", shuffle_without_one_lane, grid, "shuffle in block 0");
    must_fail("half a warp at a shuffle", shuffle_beside_a_barrier, grid, "not by every one of 32 lanes");
    must_fail("lanes with different masks", shuffle_with_two_masks, grid, "shuffle in block 0");
    must_fail("half a warp in the grid", shuffle_without_one_lane, {1, kWarp / 2, k}, "shuffle in block 0");
    must_fail("one thread skips the barrier", barrier_without_one_thread, grid, "was not reached by 1 of");
    must_fail("no cooperative launch", sum_all, {grid.blocks, grid.threads, k}, "needs a cooperative launch");
    job.barrier = 5;
    try {
      run(sum_all, grid);
      fail("a counter that was not 0 was let through");
    } catch (const std::exception& error) {
      job.barrier = 0;
      if (std::string(error.what()).find("was 5") == std::string::npos) fail(error.what());
    }
  }
  if (2 * unnoticed > rounds) fail("most orders of blocks hide a missing grid barrier");
  std::printf("%llu rounds: the grid holds together\n", rounds);
  return 0;
}
