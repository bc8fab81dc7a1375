// Several threads step tables of their own at once, with teams of changing size: for ThreadSanitizer.
// Usage: check_team <seed> <rounds>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>

#include "random_table.h"

using namespace fusedopt;
using namespace fusedopt::test;

namespace {

void step_often(u64 seed, int rounds, std::atomic<u64>& launches) {
  Random random(seed);
  // Enough elements for four workers (cpu/dispatch.cpp: kElementsPerWorker).
  RandomTable table(random, random.pick(rule_names()), {60'000, 70'001, 5, 3 * kLeaf, 33'000});
  const Contents before = table.contents();
  Contents expected;
  for (int round = 0; round < rounds; ++round, ++launches) {
    table.restore(before);
    const RandomPlan plan(random, table);
    LaunchParams launch = table.launch();
    plan.apply(launch);
    const int threads = round == 0 ? 1 : int(random.below(5)) + 1;
    launch_cpu(launch, table.host.rule(), table.host.variant(), threads, random.pick(cpu_instruction_sets()));
    if (round == 0) expected = table.contents();
    const std::string difference = table.difference(expected);
    if (!difference.empty())
      fail("seed " + std::to_string(seed) + ", round " + std::to_string(round) + ": " + difference);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const u64 seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 10;
  std::atomic<u64> launches{0};
  step_often(seed, rounds, launches);  // alone: the whole team is free
  std::vector<std::thread> steppers;
  for (u64 k = 1; k <= 3; ++k) steppers.emplace_back([&, k] { step_often(seed + k, rounds, launches); });
  for (std::thread& stepper : steppers) stepper.join();
  std::printf("%llu launches: same bits\n", u64(launches));
  return 0;
}
