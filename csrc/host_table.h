// The tensor table as the host keeps it: columns that grow, the chunk plan, and the parameters of a launch over them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "table.h"
#include "variants.h"

namespace fusedopt {

// One tensor as the table builder describes it.
struct RowSpec {
  u64 address[kSlots] = {};
  u8 storage[kElementSlots] = {};
  u32 mode = 8;  // table.h
  i64 numel = 0;
  u32 group = 0;
  std::vector<i64> layout;  // empty: dense; else as TensorTable::layouts
};

// The chunks of a launch whose teams are blocks and warps: KernelParams.
struct TeamPlan {
  u32 large_chunks = 0;
  std::vector<u32> late_rows;
};

// Whether these chunks, of a table of so many rows, need no list.
ChunkOrder order_of(const std::vector<Chunk>& chunks, u64 rows);

// Puts the chunks of tensors of up to `small` elements, which have one each, behind the others.
TeamPlan plan_teams(std::vector<Chunk>& chunks, const std::vector<i64>& numels, i64 chunk_elements, i64 small);

class HostTable {
 public:
  explicit HostTable(int rule) : rule_(rule) {}

  void resize(u64 rows);
  u64 rows() const { return rows_; }
  void set_row(u64 row, const RowSpec& spec);
  void set_grad(u64 row, u64 address) { address_[u64(kGrad) * rows_ + row] = address; }
  u64 slot(int s, u64 row) const { return address_[u64(s) * rows_ + row]; }
  i64 numel(u64 row) const { return numel_[row]; }
  i64 bytes(int s, u64 row) const {
    return numel_[row] * storage_bytes(int(storage_[row] >> (kStorageBits * s)) & kStorageMask);
  }

  // The first row of each part of the table, in order: rows whose leaves are joined to one number.
  void set_parts(std::vector<u64> first_rows);

  // What else a launch does: phase.h.
  void set_phase(const Phase& phase);

  void resize_groups(u64 groups);
  GroupRow& group(u64 index) { return groups_[index]; }
  u64 groups() const { return groups_.size(); }

  // Chunks for `workers` blocks or threads, of a multiple of `least` elements; false where the plan at hand already is
  // that. `small`: up to how many elements a tensor is for a warp; below 0, workers are no teams.
  bool plan(i64 workers, i64 least, i64 most, i64 small = -1);

  int rule() const { return rule_; }
  int variant();  // the smallest that covers all rows
  u64 revision() const {
    return revision_;
  }  // new with every change but of gradients and groups; unique in the process
  u64 leaves();  // of all rows
  const std::vector<u64>& first_leaf();
  const std::vector<u64>& part_leaf();
  i64 elements() const { return elements_; }
  i64 chunk_elements() const { return chunk_elements_; }

  const std::vector<u64>& addresses() const { return address_; }
  const std::vector<i64>& numels() const { return numel_; }
  const std::vector<u32>& group_of() const { return group_; }
  const std::vector<u64>& storages() const { return storage_; }
  const std::vector<i32>& layout_of() const { return layout_; }
  const std::vector<i64>& layouts();
  const std::vector<GroupRow>& group_rows() const { return groups_; }
  const std::vector<Chunk>& chunks() const { return chunks_; }
  const TeamPlan& teams() const { return teams_; }

  const Phase& phase() const { return phase_; }

  // Parameters that point into this table. Valid until it changes.
  LaunchParams params(const float* grad_scale, const float* found_inf);

 private:
  void pack_layouts();
  void revise();

  int rule_;
  u64 rows_ = 0;
  std::vector<u64> address_;
  std::vector<i64> numel_;
  std::vector<u32> group_;
  std::vector<u64> storage_;
  std::vector<i32> layout_;
  std::vector<std::vector<i64>> row_layouts_;
  std::vector<i64> layouts_;
  std::vector<GroupRow> groups_;
  std::vector<Chunk> chunks_;
  ChunkOrder chunk_order_ = kListed;
  TeamPlan teams_;
  i64 chunk_elements_ = 0;
  i64 elements_ = 0;
  i64 planned_workers_ = 0;  // the arguments of the plan at hand
  i64 planned_least_ = 0;
  i64 planned_most_ = 0;
  i64 planned_small_ = -1;
  int variant_ = -1;
  bool layouts_packed_ = true;
  u64 revision_ = 0;
  u32 arrivals_[2] = {};
  std::vector<u64> first_leaf_;  // and behind the last row's, how many there are; empty: to be counted
  std::vector<u64> part_rows_{0};
  std::vector<u64> part_leaf_;
  Phase phase_{};
};

// Names, in the order of the lists in rules/all.h and variants.h.
const std::vector<std::string>& rule_names();
const std::vector<std::string>& variant_names();
int rule_index(const std::string& stem);  // throws std::invalid_argument

}  // namespace fusedopt
