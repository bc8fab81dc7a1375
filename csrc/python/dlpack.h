// The part of DLPack 1.x that reads tensors and owns them: layout of its structs and of the C exchange table.
//
// https://dmlc.github.io/dlpack/latest/c_api.html. torch ≥ 2.10 publishes the table as
// torch.Tensor.__dlpack_c_exchange_api__.
#pragma once

#include <cstdint>

namespace fusedopt {
namespace dlpack {

constexpr int32_t kHost = 1;  // a Device's type
constexpr int32_t kCuda = 2;
constexpr uint8_t kComplex = 5;  // a DataType's code

struct Device {
  int32_t type;  // 1 CPU, 2 CUDA, 3 CUDA host, 10 ROCm, ...
  int32_t index;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

struct DataType {
  uint8_t code;  // 0 int, 1 uint, 2 float, 4 bfloat, 5 complex
  uint8_t bits;
  uint16_t lanes;
  bool operator==(const DataType& other) const {
    return code == other.code && bits == other.bits && lanes == other.lanes;
  }
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

// Owns a reference to a tensor until its deleter is called.
struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;
};

struct ExchangeTable {
  ExchangeHeader header;
  void* managed_tensor_allocator;
  int (*managed_tensor_from_object)(void* object, ManagedTensor** out);  // −1 and an exception
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // fills `out`, which stays the object's; −1 and an exception
  void* current_work_stream;
};

}  // namespace dlpack
}  // namespace fusedopt
