// The chunk loop of one CPU thread, compiled once per instruction set (FUSEDOPT_ISA names it).
#include "cpu/engine.h"

#include <iterator>
#include <utility>

#include "cpu/access.h"
#include "rules/all.h"

namespace fusedopt {
namespace {

struct Isa {};  // internal linkage: see HostAccess
using Access = HostAccess<Isa>;

// Where a better instruction set is compiled beside this one, this one is for rare old processors: one variant that
// covers all gives the same bits and a third of the build time.
#ifdef FUSEDOPT_ONE_VARIANT
template <class V>
using Compiled = Variant<kAnyStorage, kAnyStorage, kStridedFeature | kDoubleFeature | kMasterFeature>;
#else
template <class V>
using Compiled = V;
#endif

// A rule built for (group, step); consecutive tensors mostly share both.
template <template <class> class Rule>
class RuleCache {
 public:
  void prepare(const LaunchParams& launch, u32 group, u64 step, bool use_double) {
    if (group == group_ && step == step_ && (have_double_ || !use_double)) return;
    if (group != group_) hypers_ = read_hypers(launch.groups[group]);
    group_ = group;
    step_ = step;
    have_double_ = use_double;
    in_float = Rule<float>(hypers_, step);
    if (use_double) in_double = Rule<double>(hypers_, step);
  }
  u32 flags() const { return hypers_.flags; }
  Rule<float> in_float{Hypers{}, 1};
  Rule<double> in_double{Hypers{}, 1};

 private:
  Hypers hypers_{};
  u32 group_ = ~0u;
  u64 step_ = 0;
  bool have_double_ = false;
};

// The rule with branches that the compiler knows: a loop without tests, its values in registers from load to store.
// False where these are not the rule's branches.
template <class V, u32 kBranches, class Rule>
FUSEDOPT_FN bool sweep_as(const ChunkView& view, const Rule& rule, const Gradient<float>& gradient) {
  if (rule.branches != kBranches || !gradient.is_plain()) return false;
  Rule usual = rule;
  usual.branches = kBranches;
  sweep_chunk<Access, V>(view, usual, Gradient<float>(), 0, 1);
  return true;
}

template <class V, class Rule, std::size_t... kCases>
FUSEDOPT_FN bool sweep_usual(const ChunkView& view, const Rule& rule, const Gradient<float>& gradient,
                             std::index_sequence<kCases...>) {
  return (sweep_as<V, Rule::kUsual[kCases]>(view, rule, gradient) || ...);
}

template <class V, class Rule>
FUSEDOPT_FN void sweep_float(const ChunkView& view, const Rule& rule, const Gradient<float>& gradient) {
  using Cases = std::make_index_sequence<std::size(Rule::kUsual)>;
  if (V::kFixed && sweep_usual<V>(view, rule, gradient, Cases{})) return;
  sweep_chunk<Access, V>(view, rule, gradient, 0, 1);
}

// Small tensors lie scattered over memory: the first line of each slot is asked for while earlier chunks are swept.
constexpr u32 kChunksAhead = 4;

FUSEDOPT_FN void prefetch(const LaunchParams& launch, const Chunk& chunk) {
  if (chunk.index != 0) return;
  __builtin_prefetch(reinterpret_cast<const void*>(launch.grads[chunk.tensor]));
  for (int s = 0; s < kSlots; ++s)
    if (s != kGrad) __builtin_prefetch(reinterpret_cast<const void*>(launch.table.slot(s, chunk.tensor)), 1);
}

template <template <class> class Rule, class V>
void sweep_chunks(const LaunchParams& launch, u32 first, u32 last) {
  RuleCache<Rule> rule;
  for (u32 c = first; c < last; ++c) {
    const Chunk chunk = launch.chunks[c];
    if (c + kChunksAhead < last) prefetch(launch, launch.chunks[c + kChunksAhead]);
    if (launch.grads[chunk.tensor] == 0) continue;
    ChunkView view(launch, chunk);
    const bool use_double = V::kDouble && view.computes_in_double();
    rule.prepare(launch, launch.table.group[chunk.tensor], next_step(launch, chunk.tensor), use_double);
    if (use_double)
      sweep_chunk<Access, V>(view, rule.in_double, Gradient<double>(launch, rule.flags()), 0, 1);
    else
      sweep_float<V>(view, rule.in_float, Gradient<float>(launch, rule.flags()));
  }
}

template <template <class> class Rule>
SweepChunks variant_engine(int variant) {
#define FUSEDOPT_POINTER(name, param, state, features) sweep_chunks<Rule, Compiled<Variant<param, state, features>>>,
  static const SweepChunks table[] = {FUSEDOPT_VARIANTS(FUSEDOPT_POINTER)};
#undef FUSEDOPT_POINTER
  return table[variant];
}

}  // namespace

namespace FUSEDOPT_ISA {
SweepChunks engine(int rule, int variant) {
  using Select = SweepChunks (*)(int);
#define FUSEDOPT_SELECT(stem, Rule) variant_engine<Rule>,
  static const Select rules[] = {FUSEDOPT_RULES(FUSEDOPT_SELECT)};
#undef FUSEDOPT_SELECT
  return rules[rule](variant);
}
}  // namespace FUSEDOPT_ISA

}  // namespace fusedopt
