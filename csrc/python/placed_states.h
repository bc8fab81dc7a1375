// Whether states and copies are where they were: `tensor.data = ...` leaves no other trace, and after
// `tensor.share_memory_()` their old memory is gone.
#pragma once

#include <algorithm>
#include <vector>

#include "python/watch.h"

namespace fusedopt {

class PlacedStates {
 public:
  // After a change of any row's watch.
  void forget() { is_known_ = false; }

  // Lets go of all; not while it is looked at, when Python may come to forget().
  void clear() {
    forget();
    placed_.clear();
    asked_.clear();
  }

  // Of those that only Python can be asked of, some at a time.
  bool are_in_place(const std::vector<Watch>& watches) {
    if (!is_known_) find_all(watches);
    for (size_t k = 0; k < placed_.size(); ++k) {
      if (k + 2 * kAhead < placed_.size()) {
        __builtin_prefetch(placed_[k + 2 * kAhead].tensor);
        gradients.prefetch(placed_[k + kAhead].tensor);
      }
      if (!gradients.lies_at(placed_[k].tensor, placed_[k].address)) return false;
    }
    const size_t count = std::min(asked_.size(), std::max(kAskedAtOnce, asked_.size() / kAskedAtOnce));
    for (size_t k = 0; k < count; ++k)
      if (!is_in_place(watches[asked_[next_asked_++ % asked_.size()]])) return false;
    return true;
  }
  static bool is_in_place(const Watch& watch) { return watch.state_addresses == watch.addresses(); }

 private:
  // A tensor that must stay where it is, and can be asked without Python.
  struct Placed {
    const TorchTensor* tensor;
    u64 address;
  };

  void find_all(const std::vector<Watch>& watches) {
    clear();
    for (u64 row = 0; row < watches.size(); ++row) {
      const Watch& watch = watches[row];
      bool is_asked = false;
      size_t k = 0;
      watch.each_placed([&](const py::object& tensor) {
        const u64 address = watch.state_addresses.at(k++);
        const TorchTensor* const found = watch.unwrap ? nullptr : find_handle(tensor, address);
        if (found != nullptr) placed_.push_back({found, address});
        is_asked = is_asked || found == nullptr;
      });
      if (is_asked) asked_.push_back(row);
    }
    is_known_ = true;
  }

  static const TorchTensor* find_handle(const py::object& tensor, u64 address) {
    if (!gradients.is_connected() || !reader.is_plain(tensor.ptr())) return nullptr;
    return gradients.within(tensor.ptr(), size_t(Py_TYPE(tensor.ptr())->tp_basicsize), impl_of(tensor), address);
  }

  static constexpr size_t kAhead = 8;
  static constexpr size_t kAskedAtOnce = 64;  // or as small a share of all

  bool is_known_ = false;
  std::vector<Placed> placed_;  // of all rows
  std::vector<u64> asked_;      // rows of which Python has to be asked instead
  size_t next_asked_ = 0;
};

}  // namespace fusedopt
