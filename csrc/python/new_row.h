// The first step of a parameter that needs no closer look: makes its states, and says what its row is.
#pragma once

#include <cstring>
#include <utility>
#include <vector>

#include "host_pages.h"
#include "host_table.h"
#include "python/group_reader.h"
#include "python/schema.h"
#include "python/spans.h"
#include "python/watch.h"

namespace fusedopt {

struct NewRow {
  RowSpec spec;
  py::dict state;
  std::vector<DictWatch::Entry> entries;  // that the state is watched for
  std::vector<u64> addresses;             // of the tensors among them
  std::vector<py::object> keep;           // what the row points into
  u8 fresh = 0;                           // a bit for each state that is yet to be cleared: FreshStates

  // A state's entry, in torch's order; null: the state has none.
  void put(const py::str& key, const py::object& tensor, u64 address) {
    entries.emplace_back(key, tensor);
    if (!tensor) return;
    state[key] = tensor;
    addresses.push_back(address);
  }
};

// Makes rows one after the other. `steps`: a count for each row whose steps are counted, in order; `steps_in_state`:
// views of them that the states are to have; `leaves_fresh`: whether large states on the host are left to others to
// clear.
class RowMaker {
 public:
  RowMaker(const Schema& schema, dlpack::Device device, const py::object& steps, const py::sequence& steps_in_state,
           u32 mode, const py::object& empty_like, bool leaves_fresh)
      : schema_(schema),
        is_on_host_(device.type == dlpack::kHost),
        steps_(steps),
        steps_in_state_(steps_in_state),
        mode_(mode),
        empty_like_(empty_like),
        leaves_fresh_(leaves_fresh) {
    if (PyByteArray_CheckExact(steps.ptr()))
      step_address_ = reinterpret_cast<u64>(PyByteArray_AS_STRING(steps.ptr()));
    else if (!reader.read_address(steps.ptr(), step_address_))
      fail();
  }

  // Of a parameter that has just been seen to need no closer look, with its gradient.
  NewRow make(const Watch& watch, u32 group, const GroupReader& groups, const GroupRow& group_row,
              const std::vector<int64_t>& extents) {
    NewRow row;
    row.spec.mode = mode_;
    row.spec.group = group;
    row.spec.numel = row_major_elements(watch.param_facts, extents);
    const u8 storage = u8(storage_of(watch.param_facts.dtype));
    const auto set_slot = [&](int slot, u64 address) {
      row.spec.address[slot] = address;
      row.spec.storage[slot] = storage;
    };
    set_slot(kParam, watch.param_facts.address);
    set_slot(kGrad, watch.grad_facts.address);
    row.entries.reserve(1 + schema_.states.size());
    row.addresses.reserve(1 + schema_.states.size());
    row.keep.reserve(1 + schema_.states.size());
    if (groups.counts(group, group_row)) add_step(row);
    for (size_t s = 0; s < schema_.states.size(); ++s) {
      if (groups.needs(group, s, group_row))
        set_slot(kState0 + int(s), add_state(row, watch.param, s, size_t(row.spec.numel * storage_bytes(storage))));
      else
        row.put(schema_.states[s], py::object(), 0);
    }
    return row;
  }

 private:
  void add_step(NewRow& row) {
    static const py::str& kStepKey = lasting_name("step");
    row.spec.address[kStep] = step_address_;
    row.keep.push_back(steps_);
    if (schema_.keeps_step) row.put(kStepKey, steps_in_state_[given_++], step_address_);
    step_address_ += sizeof(float);
  }

  u64 add_state(NewRow& row, const py::object& param, size_t slot, size_t bytes) {
    static PyObject* const kStorage = PyUnicode_InternFromString("untyped_storage");
    const auto tensor = py::reinterpret_steal<py::object>(PyObject_CallOneArg(empty_like_.ptr(), param.ptr()));
    u64 address = 0;
    if (!tensor || !reader.read_address(tensor.ptr(), address)) fail();
    if (address == 0 || !reader.is_plain(tensor.ptr())) throw py::type_error("a new state has no memory");
    if (leaves_fresh_ && is_on_host_ && bytes > kMostCleared)
      row.fresh |= u8(1u << slot);
    else
      clear(tensor, address, bytes);
    // Its storage: it goes on owning this memory where `tensor.data = ...` gives the tensor other memory.
    row.keep.push_back(call(tensor, kStorage));
    row.put(schema_.states[slot], tensor, address);
    return address;
  }

  // Fills a tensor with zeros to which nothing was written yet.
  void clear(const py::object& tensor, u64 address, size_t bytes) const {
    static PyObject* const kZero = PyUnicode_InternFromString("zero_");
    if (is_on_host_ && bytes <= kMostCleared) {
      std::memset(reinterpret_cast<void*>(address), 0, bytes);
      return;
    }
    if (is_on_host_) ask_for_huge_pages(address, bytes);
    call(tensor, kZero);
  }

  static constexpr size_t kMostCleared = 128 << 10;  // bytes that one thread clears as fast as several

  const Schema& schema_;
  bool is_on_host_;
  const py::object& steps_;
  const py::sequence& steps_in_state_;
  u32 mode_;
  const py::object& empty_like_;
  bool leaves_fresh_;
  u64 step_address_ = 0;  // of the next one
  size_t given_ = 0;
};

}  // namespace fusedopt
