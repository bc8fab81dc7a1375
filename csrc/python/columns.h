// The columns of a table as bytes, for a backend that keeps its own copies.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "host_table.h"

namespace fusedopt {

namespace py = pybind11;

template <class T>
py::bytes bytes_of(const std::vector<T>& column) {
  return py::bytes(reinterpret_cast<const char*>(column.data()), column.size() * sizeof(T));
}

inline void add_group_columns(const HostTable& host, py::dict& all) {
  std::vector<double> values, max_norms;
  std::vector<u32> flags, storages;
  std::vector<u64> tensors;
  for (const GroupRow& group : host.group_rows()) {
    values.insert(values.end(), group.hypers.value, group.hypers.value + kHypers);
    flags.push_back(group.hypers.flags);
    max_norms.push_back(group.max_norm);
    tensors.insert(tensors.end(), group.tensor, group.tensor + kHypers);
    storages.insert(storages.end(), group.storage, group.storage + kHypers);
  }
  all["group_values"] = bytes_of(values);
  all["group_flags"] = bytes_of(flags);
  all["group_max_norms"] = bytes_of(max_norms);
  all["group_tensors"] = bytes_of(tensors);
  all["group_storages"] = bytes_of(storages);
}

// Of a table whose chunks are planned. `only_step` leaves out what rarely changes.
inline py::dict columns_of(HostTable& host, bool only_step) {
  py::dict all;
  const std::vector<u64>& address = host.addresses();
  const auto grads = address.begin() + i64(u64(kGrad) * host.rows());
  all["grads"] = bytes_of(std::vector<u64>(grads, grads + i64(host.rows())));
  add_group_columns(host, all);
  if (only_step) return all;
  all["address"] = bytes_of(address);
  all["numel"] = bytes_of(host.numels());
  all["group"] = bytes_of(host.group_of());
  all["storage"] = bytes_of(host.storages());
  all["first_leaf"] = bytes_of(host.first_leaf());
  all["part_leaf"] = bytes_of(host.part_leaf());
  all["layouts"] = bytes_of(host.layouts());
  all["layout"] = bytes_of(host.layout_of());
  all["chunks"] = bytes_of(host.chunks());
  all["chunk_elements"] = host.chunk_elements();
  return all;
}

}  // namespace fusedopt
