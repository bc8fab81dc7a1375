// Notices that a Python dict holds other objects than it did, for one comparison per dict and step.
//
// Before Python 3.12 every change of a dict gives it a new version tag (PEP 509). Since then a watcher is called at
// every change of a watched dict (PyDict_Watch); the one here counts the changes of all of them. Both only say that
// something changed: the entries themselves are then compared. Every function wants the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "types.h"

namespace fusedopt {

class DictWatch {
 public:
  // A key, and what the dict holds under it: null for nothing or None. Both are owned.
  using Entry = std::pair<pybind11::str, pybind11::object>;

  void watch(const pybind11::dict& dict, std::vector<Entry> entries) {
    dict_ = dict;
    entries_ = std::move(entries);
    start(dict.ptr());
    seen_ = version(dict.ptr());
  }

  const std::vector<Entry>& entries() const { return entries_; }

  // Where the dict is, to prefetch and never to read.
  const void* hint() const { return dict_.ptr(); }

  // For the garbage collector.
  int traverse(visitproc visit, void* arg) const {
    Py_VISIT(dict_.ptr());
    for (const Entry& entry : entries_) Py_VISIT(entry.second.ptr());
    return 0;
  }

  // Whether this is the dict that is watched; null: whether none is.
  bool watches(const PyObject* dict) const { return dict_.ptr() == dict; }

  // False once after a change, of whatever kind.
  bool is_unchanged() {
    if (!dict_) return true;
    const u64 now = version(dict_.ptr());
    return now == std::exchange(seen_, now);
  }

  // Whether it still holds the same entries.
  bool is_current() {
    if (!dict_) return true;
    const u64 now = version(dict_.ptr());
    if (now == seen_) return true;
    for (const Entry& entry : entries_) {
      PyObject* found = PyDict_GetItemWithError(dict_.ptr(), entry.first.ptr());  // borrowed
      if (found == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();
      if (found == Py_None) found = nullptr;
      if (found != entry.second.ptr()) return false;
    }
    seen_ = now;
    return true;
  }

 private:
#if PY_VERSION_HEX >= 0x030C0000
  static u64& changes() {
    static u64 count = 0;
    return count;
  }
  static int on_change(PyDict_WatchEvent, PyObject*, PyObject*, PyObject*) {
    ++changes();
    return 0;
  }
  static void start(PyObject* dict) {
    static const int watcher = PyDict_AddWatcher(on_change);
    if (watcher < 0 || PyDict_Watch(watcher, dict) < 0) throw pybind11::error_already_set();
  }
  static u64 version(PyObject*) { return changes(); }
#else
  static void start(PyObject*) {}
  static u64 version(PyObject* dict) { return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag; }
#endif

  pybind11::object dict_;
  u64 seen_ = 0;
  std::vector<Entry> entries_;
};

}  // namespace fusedopt
