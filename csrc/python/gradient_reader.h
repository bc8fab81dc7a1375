// Reads a parameter's gradient without a Python object for it.
//
// `param.grad` makes a Python object of every new gradient: after `zero_grad()` and a backward pass that is most of
// what a step over many small tensors costs. torch's own libraries export what is needed to do without: the getter of
// c10::TensorImpl, and the C functions that compiled models (AOTInductor) read tensors with, whose ABI is stable. They
// are looked up in the process; where one is missing, or says anything else than DLPack does, gradients go on being
// asked of Python.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <type_traits>

#include "types.h"

namespace fusedopt {

// at::Tensor, known by its address alone: a pointer to a c10::TensorImpl lies there.
struct TorchTensor;

// https://github.com/pytorch/pytorch/blob/main/torch/csrc/inductor/aoti_torch/c/shim.h: 0 is success.
// name in the library, member, arguments
#define FUSEDOPT_TORCH(X)                                                              \
  X(aoti_torch_is_defined, is_defined, (const TorchTensor*, bool*))                    \
  X(aoti_torch_get_layout, get_layout, (const TorchTensor*, int32_t*))                 \
  X(aoti_torch_get_dtype, get_dtype, (const TorchTensor*, int32_t*))                   \
  X(aoti_torch_get_device_type, get_device_type, (const TorchTensor*, int32_t*))       \
  X(aoti_torch_get_device_index, get_device_index, (const TorchTensor*, int32_t*))     \
  X(aoti_torch_get_dim, get_dim, (const TorchTensor*, int64_t*))                       \
  X(aoti_torch_get_sizes, get_sizes, (const TorchTensor*, int64_t**))                  \
  X(aoti_torch_get_strides, get_strides, (const TorchTensor*, int64_t**))              \
  X(aoti_torch_get_data_ptr, get_data_ptr, (const TorchTensor*, void**))               \
  X(aoti_torch_get_storage_offset, get_storage_offset, (const TorchTensor*, int64_t*)) \
  X(aoti_torch_get_storage_size, get_storage_size, (const TorchTensor*, int64_t*))

// C++ functions of torch that take a tensor and say yes or no: mangled name, member.
#define FUSEDOPT_TORCH_PREDICATES(X)              \
  X(_ZN2at6native6is_negERKNS_6TensorE, is_neg)   \
  X(_ZN2at6native7is_conjERKNS_6TensorE, is_conj) \
  X(_ZN2at6native12is_inferenceERKNS_6TensorE, is_inference)

class GradientReader {
 public:
  // A strided gradient as torch describes it; shape and strides are its own.
  struct View {
    void* data = nullptr;
    int32_t dtype = -1;  // torch's numbers, of which only equality is of interest
    int32_t device[2] = {};
    int64_t ndim = 0;
    const int64_t* shape = nullptr;
    const int64_t* strides = nullptr;

    u64 address() const { return u64(reinterpret_cast<std::uintptr_t>(data)); }
    bool is_like(const View& other) const {
      return dtype == other.dtype && device[0] == other.device[0] && device[1] == other.device[1];
    }
    bool has_extents(int32_t count, const int64_t* extents) const {
      return ndim == count && std::equal(shape, shape + count, extents) &&
             std::equal(strides, strides + count, extents + count);
    }
  };
  enum Found { kNone, kStrided, kUnreadable };

  // Looks the functions up.
  void connect();
  bool is_connected() const { return grad_ != nullptr; }

  // The gradient, perhaps undefined, of the parameter whose c10::TensorImpl is at `impl`. It is soon to be read.
  const TorchTensor* find(const void* impl) const {
    const TorchTensor* const grad = grad_(impl);
    prefetch(grad);
    return grad;
  }
  static void prefetch(const TorchTensor* tensor) {
    const char* const impl = *reinterpret_cast<const char* const*>(tensor);
    for (int line = 0; line < 3; ++line) __builtin_prefetch(impl + 64 * line);
  }

  // Whether a tensor's memory holds the negative or the conjugate of its values.
  bool is_lazy(const TorchTensor* tensor) const { return is_neg_(tensor) || is_conj_(tensor); }
  bool is_lazy(const void* impl) const { return is_lazy(reinterpret_cast<const TorchTensor*>(&impl)); }

  // Where a tensor's Python object, of `size` bytes, refers to its c10::TensorImpl: the handle that C functions take,
  // good as long as the object. Null where no such place is found, or what is read there is not where its memory is.
  const TorchTensor* within(const void* object, size_t size, const void* impl, u64 address) const {
    const auto* const words = static_cast<const void* const*>(object);
    for (size_t k = 2; k < size / sizeof(void*); ++k) {  // behind the count of references and the type
      if (words[k] != impl) continue;
      const auto* const tensor = reinterpret_cast<const TorchTensor*>(words + k);
      return lies_at(tensor, address) ? tensor : nullptr;
    }
    return nullptr;
  }
  bool lies_at(const TorchTensor* tensor, u64 address) const {
    void* data = nullptr;
    return get_data_ptr_(tensor, &data) == 0 && u64(reinterpret_cast<std::uintptr_t>(data)) == address;
  }

  // Whether the tensor whose c10::TensorImpl is at `impl` was made in inference mode.
  bool is_inference(const void* impl) const { return is_inference_(reinterpret_cast<const TorchTensor*>(&impl)); }

  // Tells autograd that a tensor is written. False: ask Python, which knows what to say of one made in inference mode.
  bool bump_version(const TorchTensor* tensor) const {
    if (bump_version_ == nullptr || is_inference_(tensor)) return false;
    bump_version_(tensor);
    return true;
  }
  bool bump_version(const void* impl) const { return bump_version(reinterpret_cast<const TorchTensor*>(&impl)); }

  // Whether autograd knows how a gradient came about, or might not: this torch does not say.
  bool has_history(const TorchTensor* grad) const {
    return requires_grad_ == nullptr || requires_grad_(*reinterpret_cast<const void* const*>(grad));
  }

  // Whether the memory of the tensor whose c10::TensorImpl is at `impl` holds its values: so many, of so many bytes.
  bool is_whole(const void* impl, i64 elements, i64 bytes_each) const {
    const auto* const tensor = reinterpret_cast<const TorchTensor*>(&impl);
    int64_t offset = 0, bytes = 0;
    const bool is_read = get_storage_offset_(tensor, &offset) == 0 && get_storage_size_(tensor, &bytes) == 0;
    return is_read && (offset + elements) * bytes_each <= bytes && !is_lazy(tensor);
  }

  // What it is like. kUnreadable: ask Python.
  Found read(const TorchTensor* grad, View& view) const {
    bool is_defined = false;
    int32_t layout = -1;
    if (is_defined_(grad, &is_defined) != 0) return kUnreadable;
    if (!is_defined) return kNone;
    if (get_layout_(grad, &layout) != 0 || layout != 0 || is_lazy(grad)) return kUnreadable;
    const bool is_read = get_dtype_(grad, &view.dtype) == 0 && get_device_type_(grad, &view.device[0]) == 0 &&
                         get_device_index_(grad, &view.device[1]) == 0 && get_dim_(grad, &view.ndim) == 0 &&
                         get_sizes_(grad, const_cast<int64_t**>(&view.shape)) == 0 &&
                         get_strides_(grad, const_cast<int64_t**>(&view.strides)) == 0 &&
                         get_data_ptr_(grad, &view.data) == 0;
    return is_read ? kStrided : kUnreadable;
  }

 private:
  // const at::Tensor& c10::TensorImpl::grad() const
  const TorchTensor* (*grad_)(const void* impl) = nullptr;
  // void torch::autograd::impl::bump_version(const at::Tensor&): nothing else depends on it
  void (*bump_version_)(const TorchTensor*) = nullptr;
  // bool c10::TensorImpl::requires_grad() const: likewise
  bool (*requires_grad_)(const void* impl) = nullptr;
#define FUSEDOPT_MEMBER(name, member, arguments) int32_t(*member##_) arguments = nullptr;
  FUSEDOPT_TORCH(FUSEDOPT_MEMBER)
#undef FUSEDOPT_MEMBER
#define FUSEDOPT_MEMBER(name, member) bool (*member##_)(const TorchTensor*) = nullptr;
  FUSEDOPT_TORCH_PREDICATES(FUSEDOPT_MEMBER)
#undef FUSEDOPT_MEMBER
};

inline void GradientReader::connect() {
  grad_ = nullptr;
  void* const c10 = dlopen("libc10.so", RTLD_LAZY | RTLD_NOLOAD);  // only what torch itself has loaded
  void* const cpu = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (c10 == nullptr || cpu == nullptr) return;
  bool all = true;
  const auto find = [&](void* library, const char* name, auto& function) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    all = all && function != nullptr;
  };
#define FUSEDOPT_FIND(name, member, ...) find(cpu, #name, member##_);
  FUSEDOPT_TORCH(FUSEDOPT_FIND)
  FUSEDOPT_TORCH_PREDICATES(FUSEDOPT_FIND)
#undef FUSEDOPT_FIND
  find(c10, "_ZNK3c1010TensorImpl4gradEv", grad_);
  if (!all) grad_ = nullptr;
  find(cpu, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", bump_version_);
  find(c10, "_ZNK3c1010TensorImpl13requires_gradEv", requires_grad_);
}

}  // namespace fusedopt
