// Launches on the CPU: picks the instruction set at run time and shares the chunks among the team.
#pragma once

#include <string>
#include <vector>

#include "table.h"

namespace fusedopt {

// Instruction sets that this build holds and this processor has, best first.
const std::vector<std::string>& cpu_instruction_sets();

// One launch: every chunk swept, then every step advanced. `isa` is one of cpu_instruction_sets(), or empty: the best
// for the variant on this processor. `fresh`: a bit for each of a row's states that nothing has written yet and that
// counts as 0; empty: there are none. Such a launch does nothing but the update, and skips nothing.
void launch_cpu(const LaunchParams& launch, int rule, int variant, int threads, const std::string& isa,
                const std::vector<u8>& fresh = {});

}  // namespace fusedopt
