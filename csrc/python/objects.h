// Tensors, dicts and names as Python objects, and the two readers of tensors that all tables share.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "python/gradient_reader.h"
#include "python/tensor_reader.h"

namespace fusedopt {

namespace py = pybind11;

inline TensorReader reader;
inline GradientReader gradients;

[[noreturn]] inline void fail() { throw py::error_already_set(); }

// A name that is never given back: at the end of the process there is no interpreter left to give it to.
inline const py::str& lasting_name(const char* name) { return *new py::str(name); }

// tensor.method()
inline py::object call(const py::object& tensor, PyObject* method) {
  py::object result = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), method));
  if (!result) fail();
  return result;
}
inline bool says(const py::object& tensor, PyObject* question) { return call(tensor, question).ptr() == Py_True; }

inline py::object local_tensor(const py::object& tensor, bool unwrap) {
  return unwrap ? py::object(tensor.attr("_local_tensor")) : tensor;
}

// param.grad: through the getter that this type's attribute is, looked up once a type.
inline py::object grad_of(PyObject* param) {
  static PyObject* const kName = PyUnicode_InternFromString("grad");
  static PyTypeObject* known_type = nullptr;
  static PyGetSetDef* known_getter = nullptr;
  if (Py_TYPE(param) != known_type) {
    const auto attribute = py::reinterpret_steal<py::object>(PyObject_GetAttr((PyObject*)Py_TYPE(param), kName));
    if (!attribute) fail();
    const bool is_getter = Py_TYPE(attribute.ptr()) == &PyGetSetDescr_Type;
    known_getter = is_getter ? reinterpret_cast<PyGetSetDescrObject*>(attribute.ptr())->d_getset : nullptr;
    known_type = Py_TYPE(param);
  }
  PyObject* const grad =
      known_getter ? known_getter->get(param, known_getter->closure) : PyObject_GetAttr(param, kName);
  if (grad == nullptr) fail();
  return py::reinterpret_steal<py::object>(grad);
}

// torch's c10::TensorImpl of a tensor.
inline const void* impl_of(const py::object& tensor) {
  static PyObject* const kName = PyUnicode_InternFromString("_cdata");
  const auto number = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), kName));
  const void* const impl = number ? PyLong_AsVoidPtr(number.ptr()) : nullptr;
  if (impl == nullptr && PyErr_Occurred()) fail();
  return impl;
}

// Whether a tensor's memory holds the conjugate or the negative of its values, as that of z.conj().imag does.
inline bool is_lazy(const py::object& tensor, const TensorFacts& facts) {
  static PyObject* const kIsNeg = PyUnicode_InternFromString("is_neg");
  static PyObject* const kIsConj = PyUnicode_InternFromString("is_conj");
  return says(tensor, kIsNeg) || (facts.dtype.code == dlpack::kComplex && says(tensor, kIsConj));
}

// Reads a tensor's facts; false, and no exception, where only Python can say what it is.
inline bool can_read(PyObject* tensor, TensorFacts& facts, std::vector<int64_t>& extents) {
  if (reader.read(tensor, facts, extents)) return true;
  PyErr_Clear();
  return false;
}

// dict[key], borrowed; null where it is not there.
inline PyObject* find(py::handle dict, py::handle key) {
  PyObject* const found = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (found == nullptr && PyErr_Occurred()) fail();
  return found;
}

inline bool has_key(py::handle dict, py::handle key) {
  const int found = PyDict_Contains(dict.ptr(), key.ptr());
  if (found < 0) fail();
  return found == 1;
}

inline double number(const py::object& object) {
  const double x = PyFloat_AsDouble(object.ptr());
  if (x == -1.0 && PyErr_Occurred()) fail();
  return x;
}

}  // namespace fusedopt
