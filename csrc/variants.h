// Every variant of the sweep: what it is compiled for. A launch takes the first that covers its tensors.
#pragma once

#include "table.h"

namespace fusedopt {

enum Feature : u32 {
  kStridedFeature = 1u << 0,  // slots that differ in layout, or are not dense
  kDoubleFeature = 1u << 1,   // tensors with a float64 slot, computed in float64
  kSideFeature = 1u << 2,     // outputs beside the update: phase.h
  kMasterFeature = 1u << 3,   // 16-bit parameters that keep what rounding takes
  kBlockFeature = 1u << 4,    // states in 8 bits, parameters rounded at random; never of a tensor in float64
  kReportFeature = 1u << 5,   // numbers about every leaf: report.h; always with kSideFeature
  kRoundFeature = 1u << 6,    // all parameters rounded at random, where the storages are fixed; else the table says it
  kEveryFeature = kStridedFeature | kDoubleFeature | kSideFeature | kMasterFeature | kBlockFeature | kReportFeature,
};

// kParamStorage holds for parameter and gradient, kStateStorage for the states, kMasterStorage for what is kept of the
// parameter, if all tensors keep it; kAnyStorage is decided at run time.
template <int kParamStorage_, int kStateStorage_, u32 kFeatures_, int kMasterStorage_ = kAnyStorage>
struct Variant {
  static constexpr int kParamStorage = kParamStorage_;
  static constexpr int kStateStorage = kStateStorage_;
  static constexpr int kMasterStorage = kMasterStorage_;
  static constexpr u32 kFeatures = kFeatures_;
  static constexpr bool kFixed = kParamStorage != kAnyStorage;
  static constexpr bool kStrided = (kFeatures & kStridedFeature) != 0;
  static constexpr bool kSide = (kFeatures & kSideFeature) != 0;
  static constexpr bool kReports = (kFeatures & kReportFeature) != 0;
  static constexpr bool kDouble = (kFeatures & kDoubleFeature) != 0;
  static constexpr bool kMastered = (kFeatures & kMasterFeature) != 0;
  static constexpr bool kBlocks = (kFeatures & kBlockFeature) != 0;
  static constexpr bool kRounds = (kFeatures & kRoundFeature) != 0;
  // Elements a GPU thread takes at a time: 16 bytes of the narrowest slot, 4 where that is float32.
  static constexpr int kWidth = kParamStorage == kFloat32 ? 4 : 8;
  // Blocks of 256 threads that should fit on a multiprocessor at once: it bounds the registers (64, 80, 128, 255).
  // Two are enough to keep 16 KB of loads in flight where a thread loads 8 elements of four slots; a leaf that is
  // reported keeps more values than 128 registers hold.
  static constexpr int kMinBlocks = kReports ? 1 : !kFixed || kMastered || kSide ? 2 : kWidth == 4 ? 4 : 3;

  // The storage of a slot: a constant in a fixed variant, else what the table says.
  FUSEDOPT_FN static int storage(int slot, u64 packed) {
    if (slot == kMaster && kMasterStorage != kAnyStorage) return kMasterStorage;
    if (kFixed && slot != kCopy && slot != kMaster) {
      if (slot < kState0) return kParamStorage;
      if (kStateStorage == kCodes8) return slot == kState0 ? kSigned8 : kRoot8;
      if (kStateStorage == kFloatCodes8) return slot == kState0 ? kFloat8 : kFloat8Square;
      return kStateStorage;
    }
    return int(packed >> (kStorageBits * slot)) & kStorageMask;
  }
  // Whether a slot holds codes.
  FUSEDOPT_FN static bool codes(int slot, u64 packed) {
    return kBlocks && slot >= kState0 && is_code(storage(slot, packed));
  }
  // Whether a tensor can have a slot: one that it cannot have is not read.
  FUSEDOPT_FN static constexpr bool may_have(int slot) {
    return slot == kMaster ? kMastered : slot == kEma || slot == kCopy ? kSide : slot > kStep ? kBlocks : true;
  }
  // Whether a tensor keeps something of its parameter, which has the slot for it or not.
  FUSEDOPT_FN static bool keeps(bool has_master) { return kMastered && (kMasterStorage != kAnyStorage || has_master); }
  static bool covers(int param_storage, int state_storage, u32 features) {
    return (features & ~kFeatures) == 0 &&
           (!kFixed || (param_storage == kParamStorage && state_storage == kStateStorage));
  }
};

// Serves all tensors.
using AnyVariant = Variant<kAnyStorage, kAnyStorage, kEveryFeature>;

// name, storage of parameter and gradient, storage of states, features; smallest first.
#define FUSEDOPT_VARIANTS(X)                                                                                        \
  X(f32, fusedopt::kFloat32, fusedopt::kFloat32, 0)                                                                 \
  X(bf16, fusedopt::kBFloat16, fusedopt::kBFloat16, 0)                                                              \
  X(bf16_f32, fusedopt::kBFloat16, fusedopt::kFloat32, 0)                                                           \
  X(any, fusedopt::kAnyStorage, fusedopt::kAnyStorage, 0)                                                           \
  X(strided, fusedopt::kAnyStorage, fusedopt::kAnyStorage, fusedopt::kStridedFeature)                               \
  X(full, fusedopt::kAnyStorage, fusedopt::kAnyStorage, fusedopt::kStridedFeature | fusedopt::kDoubleFeature)       \
  X(bf16_f32_master, fusedopt::kBFloat16, fusedopt::kFloat32, fusedopt::kMasterFeature)                             \
  X(master, fusedopt::kAnyStorage, fusedopt::kAnyStorage, fusedopt::kStridedFeature | fusedopt::kMasterFeature)     \
  X(bf16_8, fusedopt::kBFloat16, fusedopt::kCodes8, fusedopt::kMasterFeature | fusedopt::kBlockFeature)             \
  X(blocks, fusedopt::kAnyStorage, fusedopt::kAnyStorage,                                                           \
    fusedopt::kStridedFeature | fusedopt::kMasterFeature | fusedopt::kBlockFeature)                                 \
  X(f32_side, fusedopt::kFloat32, fusedopt::kFloat32, fusedopt::kSideFeature)                                       \
  X(strided_side, fusedopt::kAnyStorage, fusedopt::kAnyStorage, fusedopt::kStridedFeature | fusedopt::kSideFeature) \
  X(blocks_side, fusedopt::kAnyStorage, fusedopt::kAnyStorage,                                                      \
    fusedopt::kStridedFeature | fusedopt::kMasterFeature | fusedopt::kBlockFeature | fusedopt::kSideFeature)        \
  X(f32_report, fusedopt::kFloat32, fusedopt::kFloat32, fusedopt::kSideFeature | fusedopt::kReportFeature)          \
  X(master_report, fusedopt::kAnyStorage, fusedopt::kAnyStorage,                                                    \
    fusedopt::kStridedFeature | fusedopt::kMasterFeature | fusedopt::kSideFeature | fusedopt::kReportFeature)       \
  X(everything, fusedopt::kAnyStorage, fusedopt::kAnyStorage, fusedopt::kEveryFeature)

}  // namespace fusedopt
