// Which parameters need no closer look before their first step: plain ones with a plain gradient and no state.
#pragma once

#include <tuple>
#include <utility>
#include <vector>

#include "python/schema.h"
#include "python/spans.h"
#include "python/watch.h"

namespace fusedopt {

// A row's group, its position in that group's list, and its parameter.
using NewPlace = std::tuple<u32, Py_ssize_t, py::object>;

// Finds the parameters of all groups, in order, and how many each group has; false where a group, as one that has any
// of the schema's modes, or a parameter needs a closer look.
inline bool find_places(const Schema& schema, const py::object& groups, std::vector<NewPlace>& places,
                        std::vector<Py_ssize_t>& sizes) {
  static const py::str& kParams = lasting_name("params");
  if (!PyList_CheckExact(groups.ptr())) return false;
  for (const py::handle group : py::reinterpret_borrow<py::list>(groups)) {
    if (!PyDict_CheckExact(group.ptr())) return false;
    for (const py::str& key : schema.modes)
      if (has_key(group, key)) return false;
    PyObject* const params = find(group, kParams);
    if (params == nullptr || !PyList_CheckExact(params)) return false;
    for (Py_ssize_t k = 0; k < PyList_GET_SIZE(params); ++k) {
      const auto param = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(params, k));
      if (!reader.is_plain(param.ptr())) return false;
      places.emplace_back(u32(sizes.size()), k, param);
    }
    sizes.push_back(PyList_GET_SIZE(params));
  }
  return true;
}

// Looks at rows on one device. `states`: the optimizer's. What a look finds is in the watch's facts, whose shapes and
// strides are in `extents`.
class PlainLook {
 public:
  PlainLook(dlpack::Device device, const py::object& states, std::vector<int64_t>& extents)
      : device_(device), states_(states), extents_(extents) {}

  // Whether a row's parameter has no state, and it and its gradient are on this device, of one shape and dtype, in
  // row-major order, whole and apart.
  bool sees_plain(Watch& watch) {
    const py::object& param = watch.param;
    if (!reader.is_plain(param.ptr()) || has_state(param)) return false;
    const py::object grad = grad_of(param.ptr());
    const void* const impl = impl_of(param);
    if (!reader.is_plain(grad.ptr()) || gradients.is_inference(impl)) return false;
    const size_t known = extents_.size();
    TensorFacts p, g;
    const bool is_known = can_read(param.ptr(), p, extents_) && can_read(grad.ptr(), g, extents_);
    if (is_known && p.dtype == g.dtype && has_same_shape(p, g)) {
      const u64 p_bytes = whole_bytes(impl, p), g_bytes = whole_bytes(impl_of(grad), g);
      const bool is_apart = p.address + p_bytes <= g.address || g.address + g_bytes <= p.address;
      if (p_bytes != 0 && g_bytes != 0 && is_apart) {
        watch.param_facts = p;
        watch.grad_facts = g;
        spans_.push_back(span_of(p, extents_));
        spans_.push_back(span_of(g, extents_));
        return true;
      }
    }
    extents_.resize(known);
    return false;
  }

  // Whether a row's parameter has neither gradient nor state, and is where it is known to be.
  bool sees_without_gradient(Watch& watch) {
    PyObject* const param = watch.param.ptr();
    if (has_state(watch.param) || !grad_of(param).is_none()) return false;
    if (!can_read(param, watch.param_facts, extents_)) return false;
    spans_.push_back(span_of(watch.param_facts, extents_));
    return watch.param_facts.device == device_ && watch.param_facts.address != 0;
  }

  // Whether no two tensors that were seen share memory. The end of this look.
  bool sees_all_apart() { return are_apart(std::move(spans_)); }

 private:
  bool has_state(const py::object& param) const {
    if (PyDict_GET_SIZE(states_.ptr()) == 0) return false;  // so at almost every first step, without a tensor's hash
    return has_key(states_, param);
  }

  bool has_same_shape(const TensorFacts& one, const TensorFacts& other) const {
    const auto shape = extents_.begin() + one.extents;
    return one.ndim == other.ndim && std::equal(shape, shape + one.ndim, extents_.begin() + other.extents);
  }

  // The bytes of a tensor that is what sees_plain() wants one to be; else 0.
  u64 whole_bytes(const void* impl, const TensorFacts& facts) const {
    const int storage = storage_of(facts.dtype);
    const i64 elements = row_major_elements(facts, extents_);
    if (storage < 0 || facts.address == 0 || !(facts.device == device_)) return 0;
    const int bytes_each = storage_bytes(storage);
    return gradients.is_whole(impl, elements, bytes_each) ? u64(elements * bytes_each) : 0;
  }

  dlpack::Device device_;
  const py::object& states_;
  std::vector<int64_t>& extents_;
  std::vector<Span> spans_;
};

}  // namespace fusedopt
