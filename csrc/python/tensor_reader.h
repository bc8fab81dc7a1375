// Reads tensors from Python without torch's headers: pointer, dtype, device, shape and strides.
//
// Through DLPack's C exchange table where torch has it (≥ 2.10), else through the tensor's Python attributes. Knows the
// Python C API, not pybind11. Every function wants the GIL; −1 or false means that a Python exception is set.
#pragma once

#include <Python.h>

#include <utility>
#include <vector>

#include "python/dlpack.h"
#include "table.h"

namespace fusedopt {

// What a tensor was when its row of the table was made; cheap to compare with what it is now.
struct TensorFacts {
  static constexpr int32_t kUnknown = -1;
  u64 address = 0;
  dlpack::DataType dtype{};
  dlpack::Device device{};
  int32_t ndim = kUnknown;
  uint32_t extents = 0;        // where shape and strides start in the table's list of extents
  const void* hint = nullptr;  // somewhere in the tensor's own memory, to prefetch and never to read
};

// A reference to a tensor that torch's C++ side counts. While there is one beside the Python object's, torch needs not
// touch that object whenever it borrows the tensor: reading it and bumping its version take a third of the time.
class Hold {
 public:
  Hold() = default;
  explicit Hold(dlpack::ManagedTensor* held) : held_(held) {}
  Hold(Hold&& other) noexcept : held_(std::exchange(other.held_, nullptr)) {}
  Hold& operator=(Hold&& other) noexcept {
    std::swap(held_, other.held_);
    return *this;
  }
  ~Hold() {
    if (held_ != nullptr && held_->deleter != nullptr) held_->deleter(held_);
  }

  explicit operator bool() const { return held_ != nullptr; }

 private:
  dlpack::ManagedTensor* held_ = nullptr;
};

class TensorReader {
 public:
  // `tensor_type` is torch.Tensor, `param_type` torch.nn.Parameter, `capsule` torch's exchange table or None, `dtypes`
  // maps torch dtypes to (code, bits).
  void connect(PyObject* tensor_type, PyObject* param_type, PyObject* capsule, PyObject* dtypes);

  bool is_tensor(PyObject* object) const;
  bool is_plain(PyObject* object) const {  // of no subclass, which might have a getter of its own
    auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type == tensor_type_ || type == param_type_;
  }
  bool uses_exchange() const { return exchange_ != nullptr; }

  // Nothing is held where torch has no exchange table, or where it will not give this tensor out.
  Hold hold(PyObject* tensor) const {
    dlpack::ManagedTensor* held = nullptr;
    if (hold_ != nullptr && hold_(tensor, &held) != 0) PyErr_Clear();
    return Hold(held);
  }

  // Where the tensor's first element is; false with an exception.
  bool read_address(PyObject* tensor, u64& address) {
    dlpack::Tensor view;
    if (!describe(tensor, view)) return false;
    address = address_of(view);
    return true;
  }

  // The facts of `tensor`, stored in `facts` and at the end of `extents`.
  bool read(PyObject* tensor, TensorFacts& facts, std::vector<int64_t>& extents);

  // Sets address and hint of `now` and returns 1 where all other facts are as known, 0 where not, −1 with an exception.
  int matches(PyObject* tensor, const TensorFacts& known, const std::vector<int64_t>& extents, TensorFacts& now) {
    dlpack::Tensor view;
    if (!describe(tensor, view)) return -1;
    now.address = address_of(view);
    now.hint = view.shape;
    if (!(view.dtype == known.dtype) || view.ndim != known.ndim || !(view.device == known.device)) return 0;
    const int64_t* const shape = extents.data() + known.extents;
    const int64_t* const strides = shape + view.ndim;
    for (int32_t d = 0; d < view.ndim; ++d)
      if (view.shape[d] != shape[d] || view.strides[d] != strides[d]) return 0;
    return 1;
  }

 private:
  static u64 address_of(const dlpack::Tensor& tensor) {
    return u64(reinterpret_cast<std::uintptr_t>(tensor.data)) + tensor.byte_offset;
  }
  bool describe(PyObject* tensor, dlpack::Tensor& out) {
    return exchange_ != nullptr ? exchange_(tensor, &out) == 0 : describe_by_attributes(tensor, out);
  }
  bool describe_by_attributes(PyObject* tensor, dlpack::Tensor& out);

  PyObject* tensor_type_ = nullptr;
  PyObject* param_type_ = nullptr;
  PyObject* dtypes_ = nullptr;
  int (*exchange_)(void*, dlpack::Tensor*) = nullptr;
  int (*hold_)(void*, dlpack::ManagedTensor**) = nullptr;
  std::vector<int64_t> scratch_;
};

namespace reading {

// An owned reference for a scope.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {}
  ~Owned() { Py_XDECREF(object_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  PyObject* get() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

inline bool append_integers(PyObject* sequence, std::vector<int64_t>& to) {
  const reading::Owned fast(PySequence_Fast(sequence, "a shape is a sequence"));
  if (!fast) return false;
  for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(fast.get()); ++k) {
    const long long value = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(fast.get(), k));
    if (value == -1 && PyErr_Occurred()) return false;
    to.push_back(value);
  }
  return true;
}

}  // namespace reading

inline void TensorReader::connect(PyObject* tensor_type, PyObject* param_type, PyObject* capsule, PyObject* dtypes) {
  Py_XINCREF(tensor_type);
  Py_XINCREF(param_type);
  Py_XINCREF(dtypes);
  tensor_type_ = tensor_type;
  param_type_ = param_type;
  dtypes_ = dtypes;
  exchange_ = nullptr;
  hold_ = nullptr;
  if (!PyCapsule_CheckExact(capsule)) return;
  auto* header = static_cast<dlpack::ExchangeHeader*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  while (header != nullptr && header->version.major != 1) header = header->previous;
  if (header == nullptr) {
    PyErr_Clear();
    return;
  }
  auto* const table = reinterpret_cast<dlpack::ExchangeTable*>(header);
  exchange_ = table->tensor_from_object;
  hold_ = table->managed_tensor_from_object;
}

inline bool TensorReader::is_tensor(PyObject* object) const {
  return tensor_type_ != nullptr && PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(tensor_type_));
}

inline bool TensorReader::describe_by_attributes(PyObject* tensor, dlpack::Tensor& out) {
  const reading::Owned pointer(PyObject_CallMethod(tensor, "data_ptr", nullptr));
  const reading::Owned shape(PyObject_GetAttrString(tensor, "shape"));
  const reading::Owned strides(PyObject_CallMethod(tensor, "stride", nullptr));
  const reading::Owned dtype(PyObject_GetAttrString(tensor, "dtype"));
  const reading::Owned device(PyObject_GetAttrString(tensor, "device"));
  if (!pointer || !shape || !strides || !dtype || !device) return false;
  PyObject* const code = PyDict_GetItemWithError(dtypes_, dtype.get());  // borrowed
  if (code == nullptr) {
    if (!PyErr_Occurred()) PyErr_Format(PyExc_TypeError, "dtype %R is not one that the table knows", dtype.get());
    return false;
  }
  int kind = 0, bits = 0;
  if (!PyArg_ParseTuple(code, "ii", &kind, &bits)) return false;
  const reading::Owned type(PyObject_GetAttrString(device.get(), "type"));
  const reading::Owned index(PyObject_GetAttrString(device.get(), "index"));
  if (!type || !index) return false;
  scratch_.clear();
  if (!reading::append_integers(shape.get(), scratch_)) return false;
  out.ndim = int32_t(scratch_.size());
  if (!reading::append_integers(strides.get(), scratch_)) return false;
  out.data = PyLong_AsVoidPtr(pointer.get());
  out.dtype = {uint8_t(kind), uint8_t(bits), 1};
  out.device.type = PyUnicode_CompareWithASCIIString(type.get(), "cpu") == 0 ? 1 : 2;
  out.device.index = index.get() == Py_None ? 0 : int32_t(PyLong_AsLong(index.get()));
  out.shape = scratch_.data();
  out.strides = scratch_.data() + out.ndim;
  out.byte_offset = 0;
  return !PyErr_Occurred();
}

inline bool TensorReader::read(PyObject* tensor, TensorFacts& facts, std::vector<int64_t>& extents) {
  dlpack::Tensor view;
  if (!describe(tensor, view)) return false;
  facts.address = address_of(view);
  facts.dtype = view.dtype;
  facts.device = view.device;
  facts.ndim = view.ndim;
  facts.hint = view.shape;
  facts.extents = uint32_t(extents.size());
  extents.insert(extents.end(), view.shape, view.shape + view.ndim);
  extents.insert(extents.end(), view.strides, view.strides + view.ndim);
  return true;
}

// Storage code of a dtype, or −1.
inline int storage_of(const dlpack::DataType& dtype) {
  if (dtype.lanes != 1) return -1;
  if (dtype.code == 2 && dtype.bits == 32) return kFloat32;
  if (dtype.code == 2 && dtype.bits == 64) return kFloat64;
  if (dtype.code == 2 && dtype.bits == 16) return kFloat16;
  if (dtype.code == 4 && dtype.bits == 16) return kBFloat16;
  return -1;
}

}  // namespace fusedopt
