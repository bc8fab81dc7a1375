// The choice of instruction set, and the sharing of chunks: whoever is free takes the next few.
#include "cpu/dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "cpu/engine.h"
#include "cpu/processor.h"
#include "cpu/team.h"
#include "norm.h"
#include "variants.h"

namespace fusedopt {
namespace {

constexpr i64 kElementsPerWorker = 32768;  // below this a second thread costs more than it saves
constexpr u32 kTurnsPerWorker = 32;        // so that a thread which is held up leaves its share to the others

using Engine = SweepChunks (*)(int rule, int variant);
struct InstructionSet {
  const char* name;
  Engine engine;
  MeasureChunks (*measure)();
};

std::vector<InstructionSet> find_instruction_sets() {
  std::vector<InstructionSet> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back({"avx512", avx512::engine, avx512::measure_engine});
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"))
    found.push_back({"avx2", avx2::engine, avx2::measure_engine});
  found.push_back({"baseline", baseline::engine, baseline::measure_engine});
#elif defined(__aarch64__)
  found.push_back({"neon", neon::engine, neon::measure_engine});
#else
  found.push_back({"baseline", baseline::engine, baseline::measure_engine});
#endif
  return found;
}

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = find_instruction_sets();
  return sets;
}

// Whether a variant's loop waits for little but memory.
bool is_plain(int variant) {
#define FUSEDOPT_IS_PLAIN(name, param, state, features) param == kFloat32 && (features) == 0,
  static constexpr bool plain[] = {FUSEDOPT_VARIANTS(FUSEDOPT_IS_PLAIN)};
#undef FUSEDOPT_IS_PLAIN
  return plain[variant];
}

// The set of this name; empty: the best for a variant.
const InstructionSet& find_set(const std::string& isa, int variant) {
  const std::string name = isa.empty() && is_zen4() && is_plain(variant) ? "avx2" : isa;
  for (const InstructionSet& set : instruction_sets())
    if (name == set.name) return set;
  if (isa.empty()) return instruction_sets().front();
  throw std::invalid_argument("instruction set '" + isa + "' is not in this build or not in this processor");
}

int count_workers(const LaunchParams& launch, int threads) {
  const i64 most = i64(launch.chunk_count) * launch.chunk_elements / kElementsPerWorker;
  return int(std::clamp<i64>(std::min<i64>(most, launch.chunk_count), 1, std::max(threads, 1)));
}

// What some leaves join to: groups of 2,048 leaves, then the groups.
template <bool kLargest>
double join_leaves(const double* sums, u64 leaves) {
  double groups[kJoined] = {};
  for (u64 first = 0; first < leaves; first += kJoined) {
    double values[kJoined] = {};
    std::copy_n(sums + first, std::min<u64>(kJoined, leaves - first), values);
    join_halves<kLargest>(values, kJoined, 0, 1, [] {});
    groups[first / kJoined] = values[0];
  }
  join_halves<kLargest>(groups, kJoined, 0, 1, [] {});
  return groups[0];
}

void join_parts(const LaunchParams& launch) {
  const u64* const bounds = launch.table.part_leaf;
  for (u64 part = 0; part < launch.table.parts; ++part) {
    const double* const sums = launch.phase.leaf_sums + bounds[part];
    const u64 leaves = bounds[part + 1] - bounds[part];
    launch.phase.joined[part] =
        launch.phase.has(kLargestNorm) ? join_leaves<true>(sums, leaves) : join_leaves<false>(sums, leaves);
  }
}

// Writes the norms down. False: the launch is to change nothing.
bool admit_gradients(const Phase& phase) {
  bool refused = false;
  for (u64 n = 0; n < phase.norms; ++n) {
    const double norm = norm_of(phase, phase.joined[n]);
    phase.results[1 + n] = norm;
    refused = refused || is_refused(phase, norm);
  }
  if (refused) phase.results[0] += 1.0;
  return !refused;
}

// What a skipped step does: nothing, or it clears the gradients.
void skip(const LaunchParams& launch) {
  mark_report(launch, true);
  if (!launch.phase.has(kClearsGrads)) return;
  for (u32 c = 0; c < launch.chunk_count; ++c) {
    const Chunk chunk = launch.chunk(c);
    if (launch.grads[chunk.tensor] == 0) continue;
    const ChunkView view(launch, chunk, AnyVariant{});
    const u64 bytes = u64(storage_bytes(view.storage_of(kGrad)));
    if (view.layout == nullptr) {
      std::memset(reinterpret_cast<void*>(view.address[kGrad]), 0, u64(view.size) * bytes);
      continue;
    }
    for (i32 i = 0; i < view.size; ++i) {
      const i64 at = StridedIndex(view, i)(kGrad);
      std::memset(reinterpret_cast<void*>(view.address[kGrad] + u64(at) * bytes), 0, bytes);
    }
  }
}

// Sweeps chunks whose fresh states are to be cleared: a leaf at a time, which is then still in the first cache.
void sweep_fresh(const LaunchParams& launch, u32 first, u32 last, SweepChunks sweep, const u8* fresh) {
  constexpr u32 kAtOnce = 32;
  Chunk leaves[kAtOnce];
  LaunchParams fine = launch;
  fine.chunks = leaves;
  fine.chunk_count = 0;
  fine.chunk_order = kListed;
  fine.chunk_elements = kLeaf;  // of which a chunk has a whole number, wherever there are fresh states
  const u32 parts = u32(launch.chunk_elements / kLeaf);
  const auto sweep_all = [&] {
    sweep(fine, 0, fine.chunk_count, fresh);
    fine.chunk_count = 0;
  };
  for (u32 c = first; c < last; ++c) {
    const Chunk whole = launch.chunk(c);
    for (u32 leaf = whole.index * parts; leaf < (whole.index + 1) * parts; ++leaf) {
      if (leaf * kLeaf >= launch.table.numel[whole.tensor]) break;
      leaves[fine.chunk_count++] = {whole.tensor, leaf};
      if (fine.chunk_count == kAtOnce) sweep_all();
    }
  }
  sweep_all();
}

}  // namespace

const std::vector<std::string>& cpu_instruction_sets() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const InstructionSet& set : instruction_sets()) all.push_back(set.name);
    return all;
  }();
  return names;
}

void launch_cpu(const LaunchParams& launch, int rule, int variant, int threads, const std::string& isa,
                const std::vector<u8>& fresh) {
  if (is_skipped(launch)) return skip(launch);
  const InstructionSet& set = find_set(isa, variant);
  const SweepChunks sweep = set.engine(rule, variant);
  const int workers = count_workers(launch, threads);
  const u32 turn = std::max<u32>(1, launch.chunk_count / (u32(workers) * kTurnsPerWorker));
  const auto share = [&](const auto& work) {
    std::atomic<u64> next{0};
    run_team(workers, [&](int) {
      for (u64 first = next.fetch_add(turn); first < launch.chunk_count; first = next.fetch_add(turn))
        work(launch, u32(first), u32(std::min<u64>(first + turn, launch.chunk_count)));
    });
  };
  if (launch.phase.measures()) {
    share(set.measure());
    join_parts(launch);
    if (launch.phase.stage == kMeasures) return;
  }
  if (launch.phase.reads_twice() && !admit_gradients(launch.phase)) return skip(launch);
  if (fresh.empty())
    share([&](const LaunchParams& all, u32 first, u32 last) { sweep(all, first, last, nullptr); });
  else
    share([&](const LaunchParams& all, u32 first, u32 last) { sweep_fresh(all, first, last, sweep, fresh.data()); });
  mark_report(launch, false);
  for (u64 t = 0; t < launch.table.rows; ++t) advance_step(launch, t);
}

}  // namespace fusedopt
