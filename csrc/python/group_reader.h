// What the parameter groups say: hyperparameters, flags and modes, read again where they may have changed.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "host_table.h"
#include "python/dict_watch.h"
#include "python/objects.h"
#include "python/schema.h"

namespace fusedopt {

// Where a row's parameter stands: in the list of a group, at an index of it.
struct Place {
  u32 group = 0;
  Py_ssize_t index = 0;
  const PyObject* param = nullptr;  // borrowed from the row's watch
};

class GroupReader {
 public:
  // `sizes`: how many parameters each group has, over all devices.
  GroupReader(std::shared_ptr<const Schema> schema, dlpack::Device device, std::vector<Py_ssize_t> sizes)
      : schema_(std::move(schema)),
        device_(device),
        mode_watches_(sizes.size()),
        values_(sizes.size() * (schema_->hypers.size() + schema_->flags.size())),
        shapes_(sizes.size(), ~u64(0)),
        unseen_(sizes.size(), 0),
        sizes_(std::move(sizes)),
        params_(sizes_.size(), nullptr) {}

  u64 count() const { return sizes_.size(); }

  // Reads every group's hyperparameters into `host`. Returns the groups of which a flag, or whether a value is 0, has
  // changed since the last call: what a tensor needs for its step may have changed with it. −1 where parameters came,
  // went or were replaced by others, or where a mode changed.
  py::object read(const py::list& groups, const std::vector<Place>& places, HostTable& host) {
    py::list changed;
    if (groups.size() != sizes_.size()) return py::int_(-1);
    for (u32 g = 0; g < sizes_.size(); ++g) {
      const py::handle group = PyList_GET_ITEM(groups.ptr(), Py_ssize_t(g));
      if (!is_of_same_size(g, group)) return py::int_(-1);
      if (!modes_are_current(mode_watches_[g], py::reinterpret_borrow<py::dict>(group))) return py::int_(-1);
      read_values(g, group, host.group(g));
      read_flags(g, group, host.group(g).hypers.flags);
      const u64 shape = shape_of(host.group(g).hypers);
      if (shape != shapes_[g]) changed.append(g);
      shapes_[g] = shape;
    }
    for (const Place& place : places)
      if (PyList_GET_ITEM(params_[place.group], place.index) != place.param) return py::int_(-1);
    return changed.empty() ? py::object(py::none()) : py::object(changed);
  }

  // Whether tensors of a group have the state of a slot.
  bool needs(u32 group, size_t state, const GroupRow& row) const {
    return schema_->needs[state].is_asked_by(row.hypers, unseen_[group]);
  }

  // Whether the steps of a group's tensors are counted.
  bool counts(u32 group, const GroupRow& row) const {
    for (size_t s = 0; s < schema_->states.size(); ++s)
      if (needs(group, s, row)) return true;
    return schema_->keeps_step;
  }

  // For the garbage collector.
  int traverse(visitproc visit, void* arg) const {
    for (const py::object& value : values_) Py_VISIT(value.ptr());
    for (const DictWatch& watch : mode_watches_)
      if (const int stop = watch.traverse(visit, arg)) return stop;
    return 0;
  }

  // Lets go of every Python object. Nothing is read after that.
  void clear() {
    values_.clear();
    mode_watches_.clear();
  }

 private:
  bool is_of_same_size(u32 g, py::handle group) {
    static const py::str& kParams = lasting_name("params");
    params_[g] = lookup(group, kParams).ptr();
    return PyList_Check(params_[g]) && PyList_GET_SIZE(params_[g]) == sizes_[g];
  }

  bool modes_are_current(DictWatch& watch, const py::dict& group) const {
    if (watch.watches(group.ptr())) return watch.is_current();
    if (!watch.watches(nullptr)) return false;  // another dict than before
    std::vector<DictWatch::Entry> entries;
    entries.reserve(schema_->modes.size());
    for (const py::str& key : schema_->modes) {
      PyObject* const value = find(group, key);
      const bool is_asked = value != nullptr && value != Py_None;
      entries.emplace_back(key, is_asked ? py::reinterpret_borrow<py::object>(value) : py::object());
    }
    watch.watch(group, std::move(entries));
    return true;
  }

  void read_values(u32 g, py::handle group, GroupRow& row) {
    for (size_t h = 0; h < schema_->hypers.size(); ++h) {
      const HyperKey& hyper = schema_->hypers[h];
      py::object now = py::reinterpret_borrow<py::object>(lookup(group, hyper.key));
      if (hyper.item >= 0) {
        // Python names the group whose value has one too many: it is none of those that are read.
        if (Py_ssize_t(py::len(now)) != hyper.items) throw py::value_error("a value has another number of items");
        now = now[py::int_(hyper.item)];
      }
      py::object& before = value(g, h);
      const bool is_tensor = reader.is_tensor(now.ptr());
      const bool is_constant = PyFloat_CheckExact(now.ptr()) || PyLong_CheckExact(now.ptr());
      if (now.is(before) && is_constant) continue;
      before = now;
      unseen_[g] &= ~(1u << h);
      if (is_tensor)
        read_tensor_value(g, int(h), now, row);
      else
        set_value(row, int(h), number(now));
    }
  }

  // A tensor on the table's device is read by the launch itself, any other one here and now.
  void read_tensor_value(u32 g, int h, const py::object& tensor, GroupRow& row) {
    TensorFacts facts;
    std::vector<int64_t> extents;
    if (!reader.read(tensor.ptr(), facts, extents)) fail();
    i64 elements = 1;
    for (int32_t d = 0; d < facts.ndim; ++d) elements *= extents[size_t(d)];
    if (elements != 1) throw py::value_error("a tensor of 1 element is wanted, not one of " + std::to_string(elements));
    const int storage = storage_of(facts.dtype);
    const bool here = facts.device == device_ && storage >= 0;
    if (!here && facts.device.type != dlpack::kHost) unseen_[g] |= 1u << h;
    if (!here) return set_value(row, h, number(tensor.attr("item")()));
    // Only whether this is 0 matters before the launch; a GPU's value is not known by then.
    row.hypers.value[h] = device_.type == dlpack::kHost ? number(tensor.attr("item")()) : 1.0;
    row.tensor[h] = facts.address;
    row.storage[h] = u8(storage);
  }

  void read_flags(u32 g, py::handle group, u32& flags) {
    for (size_t f = 0; f < schema_->flags.size(); ++f) {
      const py::handle now = lookup(group, schema_->flags[f].key);
      py::object& before = value(g, schema_->hypers.size() + f);
      if (now.is(before) && PyBool_Check(now.ptr())) continue;
      before = py::reinterpret_borrow<py::object>(now);
      const int truth = PyObject_IsTrue(now.ptr());
      if (truth < 0) fail();
      flags = truth ? flags | schema_->flags[f].bit : flags & ~schema_->flags[f].bit;
    }
  }

  static py::handle lookup(py::handle group, const py::str& key) {
    PyObject* const found = find(group, key);
    if (found != nullptr) return found;
    PyErr_SetObject(PyExc_KeyError, key.ptr());
    fail();
  }

  py::object& value(u32 group, size_t item) {
    return values_[group * (schema_->hypers.size() + schema_->flags.size()) + item];
  }

  static void set_value(GroupRow& row, int h, double x) {
    row.hypers.value[h] = x;
    row.tensor[h] = 0;
  }

  static u64 shape_of(const Hypers& hypers) {
    u64 shape = hypers.flags;
    for (int h = 0; h < kHypers; ++h) shape |= u64(hypers.value[h] != 0.0) << (32 + h);
    return shape;
  }

  std::shared_ptr<const Schema> schema_;
  dlpack::Device device_;
  std::vector<DictWatch> mode_watches_;  // of each group
  std::vector<py::object> values_;       // of each group: hyperparameters and flags as last read
  std::vector<u64> shapes_;
  std::vector<u32> unseen_;  // of each group, the hyperparameters on a GPU that is not the table's device, as bits
  std::vector<Py_ssize_t> sizes_;
  std::vector<PyObject*> params_;  // each group's list, borrowed for as long as the groups are read
};

}  // namespace fusedopt
