// A random table over buffers of exactly the bytes that its elements reach, and the launches that must agree on it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "host_table.h"
#include "rules/adam.h"
#include "rules/sgd.h"

namespace fusedopt {
namespace test {

class Random {
 public:
  explicit Random(u64 seed) : engine_(seed) {}
  u64 bits() { return engine_(); }
  i64 below(i64 n) { return i64(engine_() % u64(n)); }
  bool chance(int percent) { return below(100) < percent; }
  double uniform(double low, double high) { return low + (high - low) * double(engine_() >> 11) * 0x1p-53; }
  template <class T>
  T pick(const std::vector<T>& from) {
    return from[size_t(below(i64(from.size())))];
  }
  std::mt19937_64& engine() { return engine_; }

 private:
  std::mt19937_64 engine_;
};

// The bits of one element, of every kind of number that its storage has.
inline u64 random_element(Random& random, int storage, bool positive) {
  const int width = 8 * storage_bytes(storage);
  const u64 sign = u64(1) << (width - 1);
  const int mantissa = storage == kFloat64 ? 52 : storage == kFloat32 ? 23 : storage == kFloat16 ? 10 : 7;
  const u64 infinity = (sign - 1) >> mantissa << mantissa;
  u64 bits = 0;
  const i64 kind = random.below(20);
  if (kind < 12) {
    const double x = random.uniform(-1, 1) * std::pow(2.0, double(random.below(12) - 6));
    bits = storage == kFloat64   ? bit_cast<u64>(x)
           : storage == kFloat32 ? bit_cast<u32>(float(x))
                                 : encode16(storage, float(x));
  } else if (kind < 15) {
    bits = random.bits() & (2 * sign - 1);
  } else if (kind < 18) {
    bits = random.bits() & ((u64(1) << mantissa) - 1);  // denormal
  } else if (kind < 19) {
    bits = random.chance(50) ? sign : 0;
  } else {
    bits = infinity | u64(random.below(2));  // infinity or NaN
  }
  return positive ? bits & ~sign : bits;
}

inline bool is_nan(int storage, u64 bits) {
  if (storage == kFloat64) return std::isnan(bit_cast<double>(bits));
  if (storage == kFloat32) return std::isnan(bit_cast<float>(u32(bits)));
  return std::isnan(decode16<float>(storage, u16(bits)));
}

// One slot of one tensor: `extent` elements and not a byte more behind them, `offset` bytes before.
struct Slab {
  std::unique_ptr<unsigned char, decltype(&std::free)> memory{nullptr, std::free};
  size_t offset = 0;
  i64 extent = 0;
  int storage = kFloat32;

  size_t bytes() const { return size_t(extent) * size_t(storage_bytes(storage)); }
  unsigned char* data() const { return memory.get() + offset; }
  u64 address() const { return extent == 0 ? kEmptyGradient : u64(reinterpret_cast<std::uintptr_t>(data())); }
  u64 element(i64 i) const {
    u64 bits = 0;
    std::memcpy(&bits, data() + size_t(i) * size_t(storage_bytes(storage)), size_t(storage_bytes(storage)));
    return bits;
  }
};

inline Slab make_slab(Random& random, int storage, i64 extent, bool positive) {
  Slab slab;
  slab.storage = storage;
  slab.extent = extent;
  const size_t size = size_t(storage_bytes(storage));
  slab.offset = random.chance(30) ? size * size_t(random.below(16 / i64(size)) + 1) : 0;
  slab.memory.reset(static_cast<unsigned char*>(std::malloc(slab.offset + slab.bytes())));
  for (i64 i = 0; i < extent; ++i) {
    const u64 bits = random_element(random, storage, positive);
    std::memcpy(slab.data() + size_t(i) * size, &bits, size);
  }
  return slab;
}

// Everything that a launch may change.
using Contents = std::vector<std::vector<unsigned char>>;

struct RandomTable {
  // Storages that a launch mixes, in the order of the variants that they lead to.
  enum Family { kAllFloat32, kAllBFloat16, kBFloat16Float32, kNoDouble, kAll, kFamilies };

  HostTable host;
  Random& random;
  std::vector<std::vector<Slab>> slabs;  // of each tensor, by slot; an absent slot has no memory
  std::vector<std::unique_ptr<float>> steps;
  std::unique_ptr<float> grad_scale, found_inf;

  RandomTable(Random& source, const std::string& rule, const std::vector<i64>& numels)
      : host(rule_index(rule)), random(source) {
    const int groups = int(random.below(5)) + 1;
    host.resize(numels.size());
    host.resize_groups(u64(groups));
    for (int g = 0; g < groups; ++g) fill_group(host.group(u64(g)), rule);
    const int family = int(random.below(kFamilies));
    const bool strided = random.chance(40);
    for (size_t t = 0; t < numels.size(); ++t) add(u64(t), numels[t], u32(random.below(groups)), family, strided);
    if (random.chance(30)) grad_scale = std::make_unique<float>(float(random.uniform(0.5, 300)));
    if (random.chance(30)) found_inf = std::make_unique<float>(random.chance(30) ? 1.0f : 0.0f);
  }

  Contents contents() const {
    Contents all;
    for (const std::vector<Slab>& tensor : slabs)
      for (const Slab& slab : tensor) all.emplace_back(slab.data(), slab.data() + slab.bytes());
    for (const std::unique_ptr<float>& step : steps) {
      const unsigned char* const bytes = reinterpret_cast<const unsigned char*>(step.get());
      all.emplace_back(bytes, bytes + (step ? sizeof(float) : 0));
    }
    return all;
  }

  void restore(const Contents& all) {
    size_t next = 0;
    for (std::vector<Slab>& tensor : slabs)
      for (Slab& slab : tensor) copy(all[next++], slab.data());
    for (std::unique_ptr<float>& step : steps) copy(all[next++], reinterpret_cast<unsigned char*>(step.get()));
  }

  // Where this differs from what it should be, in words; empty: nowhere. NaN is NaN.
  std::string difference(const Contents& expected) const {
    size_t next = 0;
    for (size_t t = 0; t < slabs.size(); ++t)
      for (size_t s = 0; s < slabs[t].size(); ++s) {
        const std::vector<unsigned char>& wanted = expected[next++];
        const Slab& slab = slabs[t][s];
        const size_t size = size_t(storage_bytes(slab.storage));
        for (i64 i = 0; i < slab.extent; ++i) {
          u64 bits = 0;
          std::memcpy(&bits, wanted.data() + size_t(i) * size, size);
          if (bits == slab.element(i) || (is_nan(slab.storage, bits) && is_nan(slab.storage, slab.element(i))))
            continue;
          char words[160];
          std::snprintf(words, sizeof words,
                        "tensor %zu of %lld, slot %zu of storage %d: element %lld is %llx, not %llx", t, host.numel(t),
                        s, slab.storage, i, slab.element(i), bits);
          return words;
        }
      }
    for (size_t t = 0; t < steps.size(); ++t)
      if (steps[t] && std::memcmp(expected[next + t].data(), steps[t].get(), sizeof(float)) != 0)
        return "step of tensor " + std::to_string(t) + " differs";
    return "";
  }

  LaunchParams launch() { return host.params(grad_scale.get(), found_inf.get()); }

 private:
  static void copy(const std::vector<unsigned char>& from, unsigned char* to) {
    if (!from.empty()) std::memcpy(to, from.data(), from.size());
  }

  void fill_group(GroupRow& group, const std::string& rule) {
    group = {};
    double* const h = group.hypers.value;
    group.hypers.flags = u32(random.below(8));
    if (rule == "adam") {
      h[Adam<float>::kLr] = random.uniform(0, 0.1);
      h[Adam<float>::kBeta1] = random.pick<double>({0.9, 0.3, 0.0});
      h[Adam<float>::kBeta2] = random.pick<double>({0.999, 0.5});
      h[Adam<float>::kEps] = 1e-8;
      h[Adam<float>::kWeightDecay] = random.pick<double>({0.0, 0.1});
    } else {
      h[SGD<float>::kLr] = random.uniform(0, 0.5);
      h[SGD<float>::kMomentum] = random.pick<double>({0.0, 0.9});
      h[SGD<float>::kDampening] = random.pick<double>({0.0, 0.5});
      h[SGD<float>::kWeightDecay] = random.pick<double>({0.0, 0.1});
    }
  }

  bool has_state(int state, u32 group) const {
    const Hypers& hypers = const_cast<HostTable&>(host).group(group).hypers;
    if (rule_names()[size_t(host.rule())] == "sgd") return state == 0 && hypers.value[SGD<float>::kMomentum] != 0.0;
    return state < 2 || hypers.has(Adam<float>::kAmsgrad);
  }

  int storage_of(int slot, int family) {
    switch (family) {
      case kAllFloat32:
        return kFloat32;
      case kAllBFloat16:
        return kBFloat16;
      case kBFloat16Float32:
        return slot >= kState0 ? kFloat32 : kBFloat16;
      case kNoDouble:
        return int(random.below(kFloat64));
      default:
        return int(random.below(kFloat64 + 1));
    }
  }

  void add(u64 row, i64 numel, u32 group, int family, bool strided) {
    RowSpec spec;
    spec.numel = numel;
    spec.group = group;
    std::vector<i64> extents(size_t(kElementSlots), numel);
    if (strided && numel > 0 && random.chance(60)) spec.layout = random_layout(numel, extents);
    std::vector<Slab> tensor;
    for (int s = 0; s < kElementSlots; ++s) {
      spec.storage[s] = u8(storage_of(s, family));
      if (s > kState2 || (s >= kState0 && !has_state(s - kState0, group))) continue;
      if (s == kGrad && random.chance(20)) continue;
      tensor.push_back(make_slab(random, spec.storage[s], extents[size_t(s)], s > kState0));
      spec.address[s] = tensor.back().address();
    }
    const bool keeps_step = rule_names()[size_t(host.rule())] == "adam" || has_state(0, group);
    steps.push_back(keeps_step ? std::make_unique<float>(float(random.pick<int>({0, 1, 9, 1000}))) : nullptr);
    spec.address[kStep] = u64(reinterpret_cast<std::uintptr_t>(steps.back().get()));
    slabs.push_back(std::move(tensor));
    host.set_row(row, spec);
  }

  // Up to three dimensions; each slot in an order of its own, with gaps, the gradient perhaps expanded.
  std::vector<i64> random_layout(i64 numel, std::vector<i64>& extents) {
    std::vector<i64> sizes;
    for (i64 rest = numel; sizes.size() < 2;) {
      std::vector<i64> factors;
      for (i64 f = 1; f <= std::min<i64>(rest, 64); ++f)
        if (rest % f == 0) factors.push_back(f);
      sizes.push_back(random.pick(factors));
      rest /= sizes.back();
      if (sizes.size() == 2) sizes.push_back(rest);
    }
    std::vector<i64> layout = {3, sizes[0], sizes[1], sizes[2]};
    for (int s = 0; s < kElementSlots; ++s) {
      std::vector<int> order = {0, 1, 2};
      std::shuffle(order.begin(), order.end(), random.engine());
      std::vector<i64> strides(3);
      i64 reach = 1;
      for (int d : order) {
        strides[size_t(d)] = reach * (random.chance(20) ? 2 : 1);
        reach = strides[size_t(d)] * sizes[size_t(d)];
      }
      if (s == kGrad && random.chance(20)) strides[size_t(random.below(3))] = 0;
      extents[size_t(s)] = 1;
      for (size_t d = 0; d < 3; ++d) extents[size_t(s)] += (sizes[d] - 1) * strides[d];
      layout.insert(layout.end(), strides.begin(), strides.end());
    }
    return layout;
  }
};

// Any division of the tensors into whole leaves, or smaller chunks where nothing is joined, mostly in any order.
struct RandomPlan {
  std::vector<Chunk> chunks;
  i64 chunk_elements;

  RandomPlan(Random& random, const RandomTable& table)
      : chunk_elements((table.host.phase().flags != 0 || random.chance(60) ? kLeaf : kLeaf / 2) *
                       (random.below(9) + 1)) {
    for (u64 t = 0; t < table.host.rows(); ++t)
      for (i64 c = 0; c * chunk_elements < table.host.numel(t); ++c) chunks.push_back({u32(t), u32(c)});
    if (random.chance(70)) std::shuffle(chunks.begin(), chunks.end(), random.engine());
  }
  void apply(LaunchParams& launch) const {
    launch.chunks = chunks.data();
    launch.chunk_count = u32(chunks.size());
    launch.chunk_order = order_of(chunks, launch.table.rows);
    launch.chunk_elements = chunk_elements;
  }
};

// The variant that covers every tensor and has no output beside the update.
inline int full_variant() {
  const std::vector<std::string>& names = variant_names();
  return int(std::find(names.begin(), names.end(), "full") - names.begin());
}

// The variant that a launch would take, or the one that covers everything.
inline int any_variant(Random& random, HostTable& host) { return random.chance(70) ? host.variant() : full_variant(); }

// One thread, plain code, one chunk per tensor: nothing to go wrong between elements.
inline void run_plainly(RandomTable& table) {
  std::vector<Chunk> chunks;
  i64 largest = 1;
  for (u64 t = 0; t < table.host.rows(); ++t) {
    if (table.host.numel(t) > 0) chunks.push_back({u32(t), 0});
    largest = std::max(largest, table.host.numel(t));
  }
  LaunchParams launch = table.launch();
  launch.chunks = chunks.data();
  launch.chunk_count = u32(chunks.size());
  launch.chunk_order = kListed;
  launch.chunk_elements = (largest + kLeaf - 1) / kLeaf * kLeaf;
  const int full = full_variant();
  launch_cpu(launch, table.host.rule(), full, 1, cpu_instruction_sets().back());
}

[[noreturn]] inline void fail(const std::string& words) {
  std::fprintf(stderr, "FAILED: %s\n", words.c_str());
  std::exit(1);
}

}  // namespace test
}  // namespace fusedopt
