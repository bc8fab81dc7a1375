// The chunk loop of one CPU thread, compiled once per instruction set and rule, which FUSEDOPT_ISA and FUSEDOPT_RULE
// name; the rule's header is included by the command (build_support/units.py).
#include "cpu/engine.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#include "cpu/access.h"
#include "norm.h"

namespace fusedopt {
namespace {

struct Isa {};  // internal linkage: see HostAccess
using Access = HostAccess<Isa>;

// Where a better instruction set is compiled beside this one, this one is for rare old processors: one variant that
// covers all, and one for blocks, give the same bits and a third of the build time.
#ifdef FUSEDOPT_ONE_VARIANT
template <class V>
using Compiled = Variant<kAnyStorage, kAnyStorage, kEveryFeature & ~(V::kBlocks ? 0u : u32(kBlockFeature))>;
#else
template <class V>
using Compiled = V;
#endif

// The programs of tests/native/ have tables without any mode: its loops would take them minutes to compile.
#ifdef FUSEDOPT_NO_MODES
constexpr bool kHasModes = false;
#else
constexpr bool kHasModes = true;
#endif

// A rule built for (group, step); consecutive tensors mostly share both.
template <template <class> class Rule>
class RuleCache {
 public:
  void prepare(const LaunchParams& launch, u32 group, u64 step, bool use_double) {
    if (group == group_ && step == step_ && (have_double_ || !use_double)) return;
    if (group != group_) {
      hypers_ = read_hypers(launch.groups[group]);
      coefficient_ = coefficient_of(launch, group);
    }
    group_ = group;
    step_ = step;
    have_double_ = use_double;
    in_float = Rule<float>(hypers_, step);
    if (use_double) in_double = Rule<double>(hypers_, step);
  }
  u32 flags() const { return hypers_.flags; }
  double coefficient() const { return coefficient_; }
  Rule<float> in_float{Hypers{}, 1};
  Rule<double> in_double{Hypers{}, 1};

 private:
  Hypers hypers_{};
  double coefficient_ = 1.0;
  u32 group_ = ~0u;
  u64 step_ = 0;
  bool have_double_ = false;
};

// The rule with branches that the compiler knows: a loop without tests, its values in registers from load to store.
// False where these are not the rule's branches.
template <class V, u32 kBranches, class Rule, class S>
FUSEDOPT_FN bool sweep_as(const ChunkView& view, const Rule& rule, const Gradient<float>& gradient, const S& side,
                          u64 step) {
  if (rule.branches != kBranches || !gradient.is_plain()) return false;
  Rule usual = rule;
  usual.branches = kBranches;
  Gradient<float> plain;
  if (V::kSide) {
    plain.clips = gradient.clips;
    plain.coefficient = gradient.coefficient;
  }
  sweep_chunk<Access, V>(view, usual, plain, side, step, 0, 1);
  return true;
}

template <class V, class Rule, class S, std::size_t... kCases>
FUSEDOPT_FN bool sweep_usual(const ChunkView& view, const Rule& rule, const Gradient<float>& gradient, const S& side,
                             u64 step, std::index_sequence<kCases...>) {
  return (sweep_as<V, Rule::kUsual[kCases]>(view, rule, gradient, side, step) || ...);
}

// How many of a rule's usual branches have such a loop: none where float8 is converted, which takes so long that the
// tests do not show; the two most frequent where a loop is large.
template <class V, class Rule>
constexpr std::size_t usual_cases() {
  constexpr std::size_t all = std::size(Rule::kUsual);
  if (!V::kFixed || V::kStateStorage == kFloatCodes8) return 0;
  return V::kBlocks || V::kReports ? std::min<std::size_t>(all, 2) : all;
}

template <class V, class Rule, class S>
FUSEDOPT_FN void sweep_float(const ChunkView& view, const Rule& rule, const Gradient<float>& gradient, const S& side,
                             u64 step) {
  if (sweep_usual<V>(view, rule, gradient, side, step, std::make_index_sequence<usual_cases<V, Rule>()>{})) return;
  sweep_chunk<Access, V>(view, rule, gradient, side, step, 0, 1);
}

// Small tensors lie scattered over memory: the first line of each slot is asked for while earlier chunks are swept.
constexpr u32 kChunksAhead = 4;

FUSEDOPT_FN void prefetch(const LaunchParams& launch, const Chunk& chunk) {
  if (chunk.index != 0) return;
  __builtin_prefetch(reinterpret_cast<const void*>(launch.grads[chunk.tensor]));
  for (int s = 0; s < kPlace; ++s)
    if (s != kGrad) __builtin_prefetch(reinterpret_cast<const void*>(launch.table.slot(s, chunk.tensor)), 1);
}

// Clears states of a chunk. Not inlined, so that its view is none of the sweep's.
__attribute__((noinline)) void clear_states(const LaunchParams& launch, const Chunk& chunk, u8 states) {
  const ChunkView view(launch, chunk, AnyVariant{});
  for (int s = kState0; s < kState0 + kStates; ++s)
    if (states >> state_of(s) & 1)
      std::memset(reinterpret_cast<void*>(view.address[s]), 0, u64(view.size) * u64(storage_bytes(view.storage_of(s))));
}

template <template <class> class Rule, class V>
void sweep_run(const LaunchParams& launch, u32 first, u32 last, const u8* fresh) {
  RuleCache<Rule> rule;
  Access::Tally tally;
  for (u32 c = first; c < last; ++c) {
    const Chunk chunk = chunk_at<V>(launch, c, 0, launch.chunk_count);
    if (c + kChunksAhead < last) prefetch(launch, chunk_at<V>(launch, c + kChunksAhead, 0, launch.chunk_count));
    if (launch.grads[chunk.tensor] == 0) continue;
    if (fresh) clear_states(launch, chunk, fresh[chunk.tensor]);
    ChunkView view(launch, chunk, V{});
    const bool use_double = V::kDouble && view.computes_in_double();
    const u64 step = next_step(view);
    rule.prepare(launch, launch.table.group[chunk.tensor], step, use_double);
    if constexpr (V::kDouble)
      if (use_double) {
        sweep_chunk<Access, V>(view, rule.in_double, gradient_of<V, double>(launch, rule.flags(), rule.coefficient()),
                               side_of<V, double>(launch, chunk.tensor, step, &tally), step, 0, 1);
        continue;
      }
    sweep_float<V>(view, rule.in_float, gradient_of<V, float>(launch, rule.flags(), rule.coefficient()),
                   side_of<V, float>(launch, chunk.tensor, step, &tally), step);
  }
}

// What a loop fixes at compile time that a chunk's tensor has: see Variant.
struct Kind {
  int param, state, master;
  u32 features;
  bool operator==(const Kind& other) const {
    return param == other.param && state == other.state && master == other.master && features == other.features;
  }
};

// The kind of a tensor; of storage kAnyStorage where they differ.
Kind kind_of(const TensorTable& table, u32 t) {
  const u64 packed = table.storage[t];
  const auto of = [&](int slot) { return int(packed >> (kStorageBits * slot)) & kStorageMask; };
  const auto has = [&](int slot) { return table.slot(slot, t) != 0; };
  Kind kind{of(kParam), of(kParam), kAnyStorage, 0};
  if (of(kGrad) != of(kParam)) kind.param = kAnyStorage;
  for (int s = kState0; s < kState0 + kStates; ++s) {
    if (!has(s)) continue;
    int storage = of(s);
    if (storage == (s == kState0 ? kSigned8 : kRoot8)) storage = kCodes8;
    if (storage == (s == kState0 ? kFloat8 : kFloat8Square)) storage = kFloatCodes8;
    if (is_code(of(s))) kind.features |= kBlockFeature;
    kind.state = s == kState0 || kind.state == storage ? storage : kAnyStorage;
  }
  if (has(kEma) && of(kEma) != kind.state) kind.state = kAnyStorage;  // see Variant::storage
  if (has(kMaster)) {
    kind.master = of(kMaster);
    kind.features |= kMasterFeature;
  }
  if (u32(packed >> kModeShift) & kRoundsAtRandom) kind.features |= kBlockFeature | kRoundFeature;
  return kind;
}

// The loop for a chunk whose storages have a variant of their own, which fixes them at compile time; null: it has none,
// or is too short to gain by it. Some of these variants are here only, where they cost no GPU image.
template <template <class> class Rule, u32 kBeside>
SweepChunks usual_sweep(const TensorTable& table, const Chunk& chunk) {
  const u32 t = chunk.tensor;
  if (table.numel[t] < kLeaf || table.layout[t] != kDenseLayout || table.slot(kRun, t) != 0) return nullptr;
  const Kind kind = kind_of(table, t);
  SweepChunks found = nullptr;
  const auto look = [&](auto variant) {
    using V = Compiled<decltype(variant)>;
    const Kind fixed{V::kParamStorage, V::kStateStorage, V::kMasterStorage, V::kFeatures & ~kBeside};
    if (V::kFixed && kind == fixed) found = sweep_run<Rule, V>;
  };
  look(Variant<kFloat32, kFloat32, kBeside>{});
  look(Variant<kBFloat16, kBFloat16, kBeside>{});
  look(Variant<kBFloat16, kFloat32, kBeside>{});
  if constexpr (kBeside == 0) {
    look(Variant<kFloat16, kFloat16, 0>{});
    look(Variant<kFloat16, kFloat32, 0>{});
  }
  if constexpr (kBeside == 0 && kHasModes) {
    constexpr u32 kRounds = kBlockFeature | kRoundFeature;
    look(Variant<kBFloat16, kFloat32, kMasterFeature, kLowBits>{});
    look(Variant<kBFloat16, kFloat32, kMasterFeature, kFloat32>{});
    look(Variant<kBFloat16, kFloat32, kMasterFeature, kBFloat16>{});
    look(Variant<kBFloat16, kFloat32, kRounds>{});
    look(Variant<kBFloat16, kBFloat16, kRounds>{});
    look(Variant<kFloat32, kCodes8, kBlockFeature>{});
    look(Variant<kBFloat16, kCodes8, kBlockFeature>{});
    look(Variant<kBFloat16, kCodes8, kRounds>{});
    look(Variant<kBFloat16, kCodes8, kBlockFeature | kMasterFeature, kLowBits>{});
    look(Variant<kFloat32, kFloatCodes8, kBlockFeature>{});
    look(Variant<kBFloat16, kFloatCodes8, kBlockFeature>{});
    look(Variant<kBFloat16, kFloatCodes8, kRounds>{});
    look(Variant<kBFloat16, kFloatCodes8, kBlockFeature | kMasterFeature, kLowBits>{});
  }
  return found;
}

// Chunks of one kind after the other, each by the loop for its kind.
template <template <class> class Rule, class V>
void sweep_mixed(const LaunchParams& launch, u32 first, u32 last, const u8* fresh) {
  constexpr u32 kBeside = V::kFeatures & (kSideFeature | kReportFeature);
  const auto kind = [&](u32 c) {
    return usual_sweep<Rule, kBeside>(launch.table, chunk_at<V>(launch, c, 0, launch.chunk_count));
  };
  for (u32 begin = first, end = first; begin < last; begin = end) {
    const SweepChunks sweep = kind(begin);
    for (end = begin + 1; end < last && kind(end) == sweep;) ++end;
    (sweep ? sweep : sweep_run<Rule, V>)(launch, begin, end, fresh);
  }
}

template <template <class> class Rule, class V>
void sweep_chunks(const LaunchParams& launch, u32 first, u32 last, const u8* fresh) {
  if constexpr (V::kFixed && !V::kMastered)
    sweep_run<Rule, V>(launch, first, last, fresh);
  else
    sweep_mixed<Rule, V>(launch, first, last, fresh);
}

}  // namespace

namespace FUSEDOPT_ISA {
SweepChunks FUSEDOPT_RULE(int variant) {
#define FUSEDOPT_POINTER(name, param, state, features) \
  sweep_chunks<class_of::FUSEDOPT_RULE, Compiled<Variant<param, state, features>>>,
  static const SweepChunks table[] = {FUSEDOPT_VARIANTS(FUSEDOPT_POINTER)};
#undef FUSEDOPT_POINTER
  return table[variant];
}
}  // namespace FUSEDOPT_ISA

}  // namespace fusedopt
