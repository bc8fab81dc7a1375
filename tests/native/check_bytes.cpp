// The bytes that an element costs, counted while the kernels run on the host: each slot that a tensor has is loaded
// once and, but for the gradient, stored once, 16 bytes at a time. What the machine code adds to that is seen by
// tests/test_cubins.py: nothing. Usage: check_bytes
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/emulated.h"
#include "cuda/kernel.h"
#include "host_table.h"
#include "rules/adam.h"

using namespace fusedopt;

namespace {

constexpr i64 kElements = 3 * kLeaf + 1024;  // whole vectors of every width, and no whole number of chunks

struct Case {
  const char* name;
  const char* rule;
  int states;
  double momentum;  // of SGD
  u32 flags;
  int param_storage, state_storage;
  u64 floor;  // bytes an element
};

const Case kCases[] = {
    {"adam f32", "adam", 2, 0, 0, kFloat32, kFloat32, 28},
    {"amsgrad f32", "adam", 3, 0, Adam<float>::kAmsgrad, kFloat32, kFloat32, 36},
    {"adam bf16", "adam", 2, 0, 0, kBFloat16, kBFloat16, 14},
    {"adam bf16, states f32", "adam", 2, 0, 0, kBFloat16, kFloat32, 22},
    {"adam f16, states f32", "adam", 2, 0, 0, kFloat16, kFloat32, 22},
    {"adam f64", "adam", 2, 0, 0, kFloat64, kFloat64, 56},
    {"sgd f32", "sgd", 0, 0.0, 0, kFloat32, kFloat32, 12},
    {"momentum f32", "sgd", 1, 0.9, 0, kFloat32, kFloat32, 20},
    {"momentum bf16", "sgd", 1, 0.9, 0, kBFloat16, kBFloat16, 10},
};

// Memory for elements, aligned as allocators of tensors align it.
struct Elements {
  explicit Elements(int storage) : data(std::aligned_alloc(64, size_t(kElements * storage_bytes(storage)))) {
    __builtin_memset(data, 0, size_t(kElements * storage_bytes(storage)));
  }
  ~Elements() { std::free(data); }
  Elements(const Elements&) = delete;
  u64 address() const { return reinterpret_cast<u64>(data); }
  void* data;
};

EmulatedTraffic run(const Case& it, int variant) {
  HostTable host(rule_index(it.rule));
  host.resize(1);
  host.resize_groups(1);
  host.group(0).hypers.value[1] = it.momentum;
  host.group(0).hypers.flags = it.flags;
  const Elements param(it.param_storage), grad(it.param_storage);
  const Elements states[] = {Elements(it.state_storage), Elements(it.state_storage), Elements(it.state_storage)};
  float step = 0;
  RowSpec row;
  row.numel = kElements;
  row.address[kParam] = param.address();
  row.address[kGrad] = grad.address();
  row.address[kStep] = reinterpret_cast<u64>(&step);
  for (int s = 0; s < kElementSlots; ++s) row.storage[s] = u8(s < kState0 ? it.param_storage : it.state_storage);
  for (int k = 0; k < it.states; ++k) row.address[kState0 + k] = states[k].address();
  host.set_row(0, row);
  host.plan(2, kLeaf, kLeaf);
  KernelParams params{};
  params.launch = host.params(nullptr, nullptr);
  return run_emulated(emulated_kernel(host.rule(), variant < 0 ? host.variant() : variant), params, {2, 64, 1});
}

void check(const Case& it, int variant) {
  const EmulatedTraffic traffic = run(it, variant);
  if (traffic.bytes == it.floor * kElements && traffic.accesses * 16 == traffic.bytes) return;
  std::fprintf(stderr, "FAILED: %s: %.2f bytes an element in accesses of %.2f bytes, not %llu in accesses of 16\n",
               it.name, double(traffic.bytes) / double(kElements), double(traffic.bytes) / double(traffic.accesses),
               it.floor);
  std::exit(1);
}

}  // namespace

int main() {
  std::string words;
  for (const Case& it : kCases) {
    check(it, -1);
    // The variant that covers all computes float64 two elements at a time, so that narrower slots take less than 16
    // bytes there; every other tensor costs the same in it.
    if (it.param_storage != kFloat64) check(it, int(variant_names().size()) - 1);
    words += (words.empty() ? "" : ", ") + std::string(it.name) + " " + std::to_string(it.floor);
  }
  std::printf("%s\n", words.c_str());
  return 0;
}
