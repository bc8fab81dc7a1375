// One parameter as a table last saw it, and what its launches write beside it.
#pragma once

#include <vector>

#include "python/dict_watch.h"
#include "python/objects.h"

namespace fusedopt {

// What every step looks at comes first, in as few cache lines as it takes.
struct Watch {
  py::object param;  // owned, as the table points into it
  DictWatch state{};
  TensorFacts param_facts;
  TensorFacts grad_facts;
  const void* impl = nullptr;         // torch's c10::TensorImpl, of which `gradients` may be asked; null: it may not
  const TorchTensor* grad = nullptr;  // where `gradients` last found it, to prefetch and never to read
  GradientReader::View grad_view;     // what it was
  bool unwrap = false;                // DTensor: its _local_tensor is what the row holds
  bool stand_in = false;   // the row's gradient was made from the parameter's, and has to be made again each step
  py::object grad_spec{};  // of a DTensor's gradient: how it lies over the devices
  Hold hold;
  std::vector<u64> state_addresses;  // of the entries that the state's watch has, and of the copy
  py::object copy{};                 // what a launch copies the parameter to, if it does
  std::vector<py::object> keep{};    // what else the row points into

  // Calls visit(tensor) for what the row's launches write beside the parameter.
  template <class Visit>
  void each_placed(const Visit& visit) const {
    const auto look = [&](const py::object& found) {
      if (!found || !reader.is_tensor(found.ptr())) return;  // such as a key of random bits
      visit(local_tensor(found, unwrap && py::hasattr(found, "_local_tensor")));
    };
    for (const DictWatch::Entry& entry : state.entries()) look(entry.second);
    look(copy);
  }

  // Where that lies now.
  std::vector<u64> addresses() const {
    std::vector<u64> found;
    each_placed([&](const py::object& tensor) {
      if (!reader.read_address(tensor.ptr(), found.emplace_back())) fail();
    });
    return found;
  }

  // For the garbage collector.
  int traverse(visitproc visit, void* arg) const {
    Py_VISIT(param.ptr());
    Py_VISIT(copy.ptr());
    for (const py::object& kept : keep) Py_VISIT(kept.ptr());
    Py_VISIT(grad_spec.ptr());
    return state.traverse(visit, arg);
  }
};

}  // namespace fusedopt
