// The tensor table, the chunk plan and the parameters of one launch, as the kernels see them: plain arrays.
#pragma once

#include "phase.h"
#include "rules/rule.h"
#include "storage/storage.h"

namespace fusedopt {

// A slot is a column of the table: one address per tensor, 0 where the tensor lacks it.
enum Slot : int {
  kParam,
  kGrad,  // 0 in a launch: no gradient, the tensor is skipped and its step does not advance
  kState0,
  kState1,
  kState2,
  kMaster,  // what the parameter lacks to be exact: a copy in float32, its low bits, or a compensation
  kEma,     // average of the parameter over the steps
  kCopy,    // of the parameter, rounded to another dtype
  kStep,    // one float32: how many steps the tensor has taken
  kScale0,  // of the states that are codes: one float32 for each block
  kScale1,
  kScale2,
  // No addresses: where a tensor that lies over devices has its elements in the whole, in row-major order, for its
  // random bits.
  kPlace,  // of element 0
  kRun,    // how many elements follow each other there; 0: all
  kPitch,  // how far the first ones of two such runs are apart
  kSlots
};

constexpr int kElementSlots = kStep;  // the slots before kStep hold one value per element

constexpr i64 kLeaf = 2048;      // elements; the unit of reduction, counted from a tensor's start
constexpr int kStorageBits = 4;  // bits per slot in TensorTable::storage
constexpr int kStorageMask = (1 << kStorageBits) - 1;

// Behind the slots, TensorTable::storage has the mode of a tensor, 32 bits: the elements of a block as a power of two
// in the low 4, whether the parameter is rounded at random, and from bit 8 on the key of its random bits.
constexpr int kModeShift = 32;
constexpr u32 kBlockBits = 15;
constexpr u32 kRoundsAtRandom = 1u << 4;
constexpr int kKeyShift = 8;
constexpr int kMostBlock = 256;    // elements: what a warp takes at a time
constexpr i32 kDenseLayout = -1;   // every slot dense and in the same order: element i is at address + i·size
constexpr u64 kEmptyGradient = 1;  // stands for the address of a gradient of 0 elements, which has none

// One group's hyperparameters. tensor[h] != 0: read value h from there at run time, in storage[h].
struct GroupRow {
  Hypers hypers;
  u64 tensor[kHypers];
  u8 storage[kHypers];
  double max_norm = -1.0;  // of its gradients; below 0: any
};

// Part of one tensor: what one block or thread takes at a time. A whole number of leaves, where anything is joined.
struct Chunk {
  u32 tensor;
  u32 index;  // the chunk starts at element index · chunk_elements
};

// Which chunks a launch has: those that are listed; or, where the list need not be read, as a small step does not wait
// for it then, those of the only tensor in order, or each tensor's only one in order.
enum ChunkOrder : u32 { kListed, kOfOneTensor, kOneEach };

struct TensorTable {
  u64 rows;
  const u64* address;  // kSlots columns of `rows`
  const i64* numel;
  const u32* group;
  const u64* storage;     // kStorageBits per slot, then the tensor's mode
  const i32* layout;      // kDenseLayout, or where the tensor's strided layout starts in `layouts`
  const i64* layouts;     // ndim, then sizes[ndim], then strides[ndim] of each element slot, in elements
  const u64* first_leaf;  // how many leaves the rows before this one have
  u64 leaves;
  const u64* part_leaf;  // the first leaf of each part, and behind them `leaves`: rows whose leaves are joined together
  u64 parts;
  FUSEDOPT_FN u64 slot(int s, u64 row) const { return address[u64(s) * rows + row]; }
};

struct LaunchParams {
  TensorTable table;
  const u64* grads;  // the kGrad column of this step, wherever it travels
  const GroupRow* groups;
  const Chunk* chunks;
  u32 chunk_count;
  ChunkOrder chunk_order;
  i64 chunk_elements;
  const float* grad_scale;  // null, or gradients are divided by it
  const float* found_inf;   // null, or nothing at all changes where it is not 0
  u32* arrivals;  // blocks of a GPU that have read the step counts they need: 0 again with the last one, which advances
                  // those that are left; behind it the grid barrier's
  Phase phase;    // what else happens in the pass; read by variants with kSideFeature only

  FUSEDOPT_FN Chunk chunk(u32 c) const {
    if (chunk_order == kListed) return chunks[c];
    return chunk_order == kOfOneTensor ? Chunk{0, c} : Chunk{c, 0};
  }
};

}  // namespace fusedopt
