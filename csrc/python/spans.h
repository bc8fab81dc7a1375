// The bytes that tensors lie in, and whether they lie apart.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "python/objects.h"

namespace fusedopt {

// From a tensor's first byte to behind its last; none where it is empty.
using Span = std::pair<u64, u64>;

inline Span span_of(const TensorFacts& facts, const std::vector<int64_t>& extents) {
  const int64_t* const shape = extents.data() + facts.extents;
  i64 last = 0;
  for (int32_t d = 0; d < facts.ndim; ++d) {
    if (shape[d] == 0) return {0, 0};
    last += (shape[d] - 1) * shape[facts.ndim + d];
  }
  return {facts.address, facts.address + u64(last + 1) * ((facts.dtype.bits + 7) / 8)};
}

inline bool are_apart(std::vector<Span> spans) {
  std::sort(spans.begin(), spans.end());
  for (size_t k = 1; k < spans.size(); ++k)
    if (spans[k].first < spans[k - 1].second) return false;
  return true;
}

// The elements of a tensor that is in row-major order; else 0.
inline i64 row_major_elements(const TensorFacts& facts, const std::vector<int64_t>& extents) {
  const int64_t* const shape = extents.data() + facts.extents;
  const int64_t* const strides = shape + facts.ndim;
  i64 elements = 1;
  for (int32_t d = facts.ndim - 1; d >= 0; --d) {
    if (shape[d] != 1 && strides[d] != elements) return 0;
    elements *= shape[d];
  }
  return elements;
}

// Where tensors lie that are known to share no memory, as all are plain ones on one device that can be read; else None.
inline py::object addresses_apart(const py::list& tensors) {
  std::vector<Span> spans;
  std::vector<int64_t> extents;
  py::list addresses;
  dlpack::Device device{};
  for (const py::handle tensor : tensors) {
    TensorFacts facts;
    extents.clear();
    if (!reader.is_plain(tensor.ptr()) || !can_read(tensor.ptr(), facts, extents)) return py::none();
    if (addresses.empty()) device = facts.device;
    const Span span = span_of(facts, extents);
    if (!(facts.device == device) || (span.second != 0 && span.first == 0)) return py::none();
    if (span.second != 0) spans.push_back(span);
    addresses.append(facts.address);
  }
  return are_apart(std::move(spans)) ? py::object(addresses) : py::none();
}

}  // namespace fusedopt
