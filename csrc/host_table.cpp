// Building the table: columns, chunk plan, choice of variant.
#include "host_table.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "rules/all.h"

namespace fusedopt {
namespace {

struct VariantInfo {
  const char* name;
  bool (*covers)(int param_storage, int state_storage, u32 features);
};

const VariantInfo kVariants[] = {
#define FUSEDOPT_INFO(name, param, state, features) {#name, Variant<param, state, features>::covers},
    FUSEDOPT_VARIANTS(FUSEDOPT_INFO)
#undef FUSEDOPT_INFO
};
constexpr int kVariantCount = int(sizeof(kVariants) / sizeof(kVariants[0]));
static_assert(kVariantCount <= 16, "at most 16 variants a rule");

// The storage that all of some slots share: kAnyStorage where they differ; `none` while there is no slot yet.
constexpr int kNone = -2;
int merge(int common, int storage) { return common == kNone || common == storage ? storage : kAnyStorage; }

}  // namespace

void HostTable::resize(u64 rows) {
  rows_ = rows;
  address_.assign(size_t(kSlots) * rows, 0);
  numel_.assign(rows, 0);
  group_.assign(rows, 0);
  storage_.assign(rows, 0);
  layout_.assign(rows, kDenseLayout);
  row_layouts_.assign(rows, {});
  layouts_packed_ = false;
  planned_workers_ = 0;
  part_rows_ = {0};
  variant_ = -1;
  revise();
}

void HostTable::set_parts(std::vector<u64> first_rows) {
  part_rows_ = std::move(first_rows);
  revise();
}

void HostTable::set_row(u64 row, const RowSpec& spec) {
  if (row >= rows_) throw std::out_of_range("row " + std::to_string(row) + " of " + std::to_string(rows_));
  for (int s = 0; s < kSlots; ++s) address_[u64(s) * rows_ + row] = spec.address[s];
  u64 packed = 0;
  for (int s = 0; s < kElementSlots; ++s) packed |= u64(spec.storage[s]) << (kStorageBits * s);
  packed |= u64(spec.mode) << kModeShift;
  if (numel_[row] != spec.numel) planned_workers_ = 0;
  numel_[row] = spec.numel;
  group_[row] = spec.group;
  storage_[row] = packed;
  row_layouts_[row] = spec.layout;
  layouts_packed_ = false;
  variant_ = -1;
  revise();
}

void HostTable::revise() {
  static std::atomic<u64> revisions{0};
  first_leaf_.clear();
  revision_ = ++revisions;
}

void HostTable::set_phase(const Phase& phase) {
  if (phase.flags != phase_.flags) {
    variant_ = -1;
    revise();
  }
  phase_ = phase;
}

void HostTable::resize_groups(u64 groups) { groups_.resize(groups); }

bool HostTable::plan(i64 workers, i64 least, i64 most, i64 small) {
  if (planned_workers_ == workers && planned_least_ == least && planned_most_ == most && planned_small_ == small)
    return false;
  elements_ = 0;
  for (u64 t = 0; t < rows_; ++t) elements_ += numel_[t];
  const i64 share = elements_ / std::max<i64>(workers, 1);
  chunk_elements_ = std::clamp(share, least, most) / least * least;
  chunks_.clear();
  for (u64 t = 0; t < rows_; ++t)
    for (i64 c = 0; c * chunk_elements_ < numel_[t]; ++c) chunks_.push_back({u32(t), u32(c)});
  if (chunks_.size() > 0xFFFFFFFFull) throw std::length_error("more than 2^32 chunks");
  if (small >= 0) teams_ = plan_teams(chunks_, numel_, chunk_elements_, small);
  chunk_order_ = order_of(chunks_, rows_);
  planned_workers_ = workers;
  planned_least_ = least;
  planned_most_ = most;
  planned_small_ = small;
  revise();
  return true;
}

ChunkOrder order_of(const std::vector<Chunk>& chunks, u64 rows) {
  const auto all = [&](const auto& expected) {
    for (u32 c = 0; c < chunks.size(); ++c)
      if (chunks[c].tensor != expected(c).tensor || chunks[c].index != expected(c).index) return false;
    return true;
  };
  if (rows == 1 && all([](u32 c) { return Chunk{0, c}; })) return kOfOneTensor;
  return all([](u32 c) { return Chunk{c, 0}; }) ? kOneEach : kListed;
}

TeamPlan plan_teams(std::vector<Chunk>& chunks, const std::vector<i64>& numels, i64 chunk_elements, i64 small) {
  const auto is_large = [&](const Chunk& chunk) { return numels[chunk.tensor] > std::min(small, chunk_elements); };
  TeamPlan plan;
  plan.large_chunks = u32(std::stable_partition(chunks.begin(), chunks.end(), is_large) - chunks.begin());
  for (u64 t = 0; t < numels.size(); ++t)
    if (numels[t] == 0 || numels[t] > chunk_elements) plan.late_rows.push_back(u32(t));
  return plan;
}

int HostTable::variant() {
  if (variant_ >= 0) return variant_;
  int param_storage = kNone;
  int state_storage = kNone;
  u32 features = phase_.flags != 0 ? u32(kSideFeature) : 0u;
  if (phase_.has(kReports)) features |= kReportFeature;
  for (u64 t = 0; t < rows_; ++t) {
    if (slot(kParam, t) == 0) continue;  // never had a gradient
    if (layout_[t] != kDenseLayout || !row_layouts_[t].empty() || slot(kRun, t) != 0) features |= kStridedFeature;
    if (u32(storage_[t] >> kModeShift) & kRoundsAtRandom) {
      features |= kBlockFeature;
      param_storage = kAnyStorage;  // variants that fix it round to nearest
    }
    bool is_double = false;
    u32 modes = u32(storage_[t] >> kModeShift) & kRoundsAtRandom;
    for (int s = 0; s < kElementSlots; ++s) {
      if (slot(s, t) == 0 && s != kGrad) continue;
      int storage = int(storage_[t] >> (kStorageBits * s)) & kStorageMask;
      if (is_code(storage)) {
        features |= kBlockFeature;
        if (storage == (s == kState0 ? kSigned8 : kRoot8)) storage = kCodes8;
      }
      is_double = is_double || storage == kFloat64;
      if (storage == kFloat64) features |= kDoubleFeature;
      if (s == kMaster) features |= kMasterFeature;
      modes |= u32(s == kMaster || storage == kCodes8 || is_code(storage));
      if (s == kMaster || s == kCopy) continue;  // read at run time by every variant
      int& common = s < kState0 ? param_storage : state_storage;
      common = merge(common, storage);
    }
    if (is_double && modes != 0) throw std::invalid_argument("row " + std::to_string(t) + " has float64 and a mode");
  }
  if (param_storage == kNone) param_storage = kFloat32;
  if (state_storage == kNone) state_storage = param_storage;
  variant_ = 0;
  while (!kVariants[variant_].covers(param_storage, state_storage, features)) ++variant_;
  return variant_;  // the last one covers everything
}

u64 HostTable::leaves() { return first_leaf().back(); }

const std::vector<u64>& HostTable::first_leaf() {
  if (!first_leaf_.empty()) return first_leaf_;
  first_leaf_.push_back(0);
  for (i64 numel : numel_) first_leaf_.push_back(first_leaf_.back() + u64((numel + kLeaf - 1) / kLeaf));
  return first_leaf_;
}

const std::vector<u64>& HostTable::part_leaf() {
  part_leaf_.clear();
  for (u64 row : part_rows_) part_leaf_.push_back(row < rows_ ? first_leaf().at(row) : leaves());
  part_leaf_.push_back(leaves());
  return part_leaf_;
}

const std::vector<i64>& HostTable::layouts() {
  pack_layouts();
  return layouts_;
}

void HostTable::pack_layouts() {
  if (layouts_packed_) return;
  layouts_.clear();
  for (u64 t = 0; t < rows_; ++t) {
    layout_[t] = row_layouts_[t].empty() ? kDenseLayout : i32(layouts_.size());
    layouts_.insert(layouts_.end(), row_layouts_[t].begin(), row_layouts_[t].end());
  }
  layouts_packed_ = true;
}

LaunchParams HostTable::params(const float* grad_scale, const float* found_inf) {
  pack_layouts();
  LaunchParams launch{};
  launch.table = {rows_,           address_.data(),    numel_.data(),    group_.data(),
                  storage_.data(), layout_.data(),     layouts_.data(),  first_leaf().data(),
                  leaves(),        part_leaf().data(), part_rows_.size()};
  launch.grads = address_.data() + u64(kGrad) * rows_;
  launch.groups = groups_.data();
  launch.chunks = chunks_.data();
  launch.chunk_count = u32(chunks_.size());
  launch.chunk_order = chunk_order_;
  launch.chunk_elements = chunk_elements_;
  launch.grad_scale = grad_scale;
  launch.found_inf = found_inf;
  launch.arrivals = arrivals_;
  launch.phase = phase_;
  return launch;
}

const std::vector<std::string>& rule_names() {
#define FUSEDOPT_NAME(stem, Rule) #stem,
  static const std::vector<std::string> names = {FUSEDOPT_RULES(FUSEDOPT_NAME)};
#undef FUSEDOPT_NAME
  return names;
}

const std::vector<std::string>& variant_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const VariantInfo& variant : kVariants) all.push_back(variant.name);
    return all;
  }();
  return names;
}

int rule_index(const std::string& stem) {
  const std::vector<std::string>& names = rule_names();
  const auto at = std::find(names.begin(), names.end(), stem);
  if (at == names.end()) throw std::invalid_argument("no rule is called '" + stem + "'");
  return int(at - names.begin());
}

}  // namespace fusedopt
