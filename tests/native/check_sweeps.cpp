// Random tables, plans and grids: the CPU engine and the emulated kernels must give the same bits, and no sanitizer may
// have anything to say. Usage: check_sweeps <seed> <tables>
#include <algorithm>
#include <cmath>
#include <exception>
#include <set>

#include "cuda/emulated.h"
#include "cuda/kernel.h"
#include "cuda/launcher.h"
#include "random_table.h"

using namespace fusedopt;
using namespace fusedopt::test;

namespace {

// Around every vector, block, leaf and chunk.
i64 random_numel(Random& random) {
  const i64 edge = random.pick<i64>({0, 1, 4, 8, 16, 64, 128, kLeaf, 2 * kLeaf});
  return random.chance(70) ? std::max<i64>(edge + random.below(5) - 2, 0) : random.below(3 * kLeaf);
}

std::string describe_cpu(Random& random, RandomTable& table) {
  const RandomPlan plan(random, table);
  LaunchParams launch = table.launch();
  plan.apply(launch);
  const std::string isa = random.pick(cpu_instruction_sets());
  const int threads = int(random.below(4)) + 1;
  const int variant = any_variant(random, table.host);
  launch_cpu(launch, table.host.rule(), variant, threads, isa);
  return "cpu " + isa + ", " + std::to_string(threads) + " threads, variant " + variant_names()[size_t(variant)];
}

std::string describe_emulated(Random& random, RandomTable& table) {
  RandomPlan plan(random, table);
  const EmulatedGrid grid{u32(random.below(6)) + 1, random.pick<int>({16, 33, 64, 256}), random.bits()};
  KernelParams params{};
  params.launch = table.launch();
  const bool has_warps = grid.threads % device::kWarpThreads == 0;
  const TeamPlan teams = plan_teams(plan.chunks, table.host.numels(), plan.chunk_elements,
                                    has_warps ? random.pick<i64>({0, 5, kSmallTensor, kLeaf}) : 0);
  params.large_chunks = teams.large_chunks;
  params.late_count = u32(teams.late_rows.size());
  params.late_rows = teams.late_rows.data();
  plan.apply(params.launch);
  const bool inline_columns = random.chance(50);
  if (inline_columns) fill_inline_columns(table.host, params);
  const int variant = any_variant(random, table.host);
  run_emulated(emulated_kernel(table.host.rule(), variant), params, grid);
  return "emulated " + std::to_string(grid.blocks) + " x " + std::to_string(grid.threads) + ", variant " +
         variant_names()[size_t(variant)] + (inline_columns ? ", inline" : "");
}

}  // namespace

int main(int argc, char** argv) {
  const u64 seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  const int tables = argc > 2 ? std::atoi(argv[2]) : 100;
  u64 launches = 0;
  std::vector<u64> variants(variant_names().size());
  for (int k = 0; k < tables; ++k) {
    Random random(seed + u64(k));
    std::vector<i64> numels(size_t(random.below(12)) + 1);
    for (i64& numel : numels) numel = random_numel(random);
    RandomTable table(random, random.pick(rule_names()), numels);
    ++variants[size_t(table.host.variant())];
    const Contents before = table.contents();
    run_plainly(table);
    const Contents expected = table.contents();
    for (int run = 0; run < 6; ++run, ++launches) {
      table.restore(before);
      std::string what;
      try {
        what = run % 2 ? describe_cpu(random, table) : describe_emulated(random, table);
      } catch (const std::exception& error) {
        fail("seed " + std::to_string(seed + u64(k)) + ": " + error.what());
      }
      const std::string difference = table.difference(expected);
      if (!difference.empty()) fail("seed " + std::to_string(seed + u64(k)) + ", " + what + ": " + difference);
    }
  }
  // Random tables have no outputs beside the update, no master, no codes and no report: tests/test_phase.py,
  // test_precision.py, test_blocks.py and test_report.py have.
  const std::set<std::string> drawn = {"f32", "bf16", "bf16_f32", "any", "strided", "full"};
  const auto is_drawn = [&](const std::string& name) { return drawn.count(name) != 0; };
  for (size_t v = 0; v < variants.size(); ++v)
    if (variants[v] == 0 && tables >= 100 && is_drawn(variant_names()[v]))
      fail("no table needed variant " + variant_names()[v]);
  std::printf("%d tables, %llu launches: same bits\n", tables, launches);
  return 0;
}
