// New states that nothing has written yet: a launch on the CPU clears each chunk right before it is swept.
#pragma once

#include <cstring>
#include <utility>
#include <vector>

#include "host_pages.h"
#include "host_table.h"

namespace fusedopt {

class FreshStates {
 public:
  explicit FreshStates(const HostTable& host) : host_(host) {}

  // `states`: a bit for each of the row's states that is left to a launch, or to settle(), to clear.
  void keep(u64 row, u8 states) {
    if (states == 0) return;
    fresh_.resize(host_.rows());
    fresh_[row] = states;
    each(row, states, ask_for_huge_pages);
  }
  void forget(u64 row) {
    if (row < fresh_.size()) fresh_[row] = 0;
  }
  void forget_all() { fresh_.clear(); }

  // What a launch is to clear: see launch_cpu(). During that launch there are none, so that another thread that settles
  // leaves what is being stepped; a launch that failed gives them back.
  std::vector<u8> take() { return std::exchange(fresh_, {}); }
  void give_back(std::vector<u8> fresh) { fresh_ = std::move(fresh); }

  // Clears them now.
  void settle() {
    for (u64 row = 0; row < fresh_.size(); ++row)
      each(row, fresh_[row], [](u64 address, u64 bytes) { std::memset(reinterpret_cast<void*>(address), 0, bytes); });
    fresh_.clear();
  }

 private:
  // Calls visit(address, bytes) for those of a row's states that have a bit.
  template <class Visit>
  void each(u64 row, u8 states, const Visit& visit) const {
    for (int s = 0; s < kStates; ++s)
      if (states >> s & 1) visit(host_.slot(kState0 + s, row), u64(host_.bytes(kState0 + s, row)));
  }

  const HostTable& host_;
  std::vector<u8> fresh_;  // of each row; empty: there are none
};

}  // namespace fusedopt
