// The Python module fusedopt._C: a table that watches its tensors, and the launches over it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <utility>

#include "cpu/dispatch.h"
#include "cuda/images.h"
#include "cuda/kernel.h"
#include "cuda/launcher.h"
#include "host_table.h"
#include "tensor_reader.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

TensorReader reader;
std::atomic<u64> launches{0};

// Where a hyperparameter stands in a group: group[key], or group[key][item].
struct HyperKey {
  py::str key;
  int item;  // −1: the value itself
};

struct FlagKey {
  py::str key;
  u32 bit;
};

// One parameter as the table last saw it.
struct Watch {
  py::object param;  // owned, as the table points into it
  py::list keep{};   // what else the row points into
  TensorFacts param_facts;
  TensorFacts grad_facts;
  bool unwrap = false;  // DTensor: its _local_tensor is what the row holds
};

[[noreturn]] void fail() { throw py::error_already_set(); }

py::object local_tensor(const py::object& tensor, bool unwrap) {
  return unwrap ? py::object(tensor.attr("_local_tensor")) : tensor;
}

const float* float_pointer(u64 address) { return reinterpret_cast<const float*>(address); }

class Table {
 public:
  Table(const std::string& rule, const std::vector<std::pair<std::string, int>>& hypers,
        const std::vector<std::pair<std::string, u32>>& flags, std::pair<int, int> device)
      : host_(rule_index(rule)), device_{device.first, device.second} {
    if (hypers.size() > size_t(kHypers)) throw std::invalid_argument("a rule names at most 8 hyperparameters");
    for (const auto& [key, item] : hypers) hypers_.push_back({py::str(key), item});
    for (const auto& [key, bit] : flags) flags_.push_back({py::str(key), bit});
  }

  // `sizes`: how many parameters each group has, over all devices.
  void resize(u64 rows, std::vector<Py_ssize_t> sizes) {
    const u64 groups = sizes.size();
    sizes_ = std::move(sizes);
    host_.resize(rows);
    host_.resize_groups(groups);
    watches_.clear();
    watches_.resize(rows);
    live_.assign(rows, false);
    values_.assign(groups * (hypers_.size() + flags_.size()), py::object());
    shapes_.assign(groups, ~u64(0));
    live_params_ = py::none();
  }

  void set_row(u64 row, const std::array<u64, kSlots>& addresses, const std::array<int, kElementSlots>& storages,
               i64 numel, u32 group, std::vector<i64> layout, py::object param, const py::object& grad, bool unwrap,
               py::list keep) {
    RowSpec spec;
    for (int s = 0; s < kSlots; ++s) spec.address[s] = addresses[size_t(s)];
    for (int s = 0; s < kElementSlots; ++s) spec.storage[s] = u8(storages[size_t(s)]);
    spec.numel = numel;
    spec.group = group;
    spec.layout = std::move(layout);
    host_.set_row(row, spec);
    Watch& watch = watches_[row];
    watch.param = std::move(param);
    watch.keep = std::move(keep);
    watch.unwrap = unwrap;
    if (!reader.read(local_tensor(watch.param, unwrap).ptr(), watch.param_facts)) fail();
    watch.grad_facts.known = false;
    if (!grad.is_none() && !reader.read(local_tensor(grad, unwrap).ptr(), watch.grad_facts)) fail();
    set_live(row, !grad.is_none());
  }

  // Reads every parameter's gradient again. Returns the rows that are not what the table says, or None.
  py::object refresh() {
    py::list changed;
    static PyObject* const kGradName = PyUnicode_InternFromString("grad");
    for (u64 row = 0; row < watches_.size(); ++row) {
      const Watch& watch = watches_[row];
      const py::object grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(watch.param.ptr(), kGradName));
      if (!grad) fail();
      if (!row_is_current(row, watch, grad)) changed.append(row);
    }
    return changed.empty() ? py::object(py::none()) : py::object(changed);
  }

  // Reads every group's hyperparameters. Returns the groups of which a flag, or whether a value is 0, has changed since
  // the last call: what a tensor needs for its step may have changed with it. −1 where parameters came or went.
  py::object read_groups(const py::list& groups) {
    py::list changed;
    static const py::str kParams("params");
    if (groups.size() != host_.groups()) return py::int_(-1);
    for (u64 g = 0; g < host_.groups(); ++g) {
      const py::handle group = PyList_GET_ITEM(groups.ptr(), Py_ssize_t(g));
      const Py_ssize_t size = PyObject_Length(lookup(group, kParams).ptr());
      if (size < 0) fail();
      if (size != sizes_[g]) return py::int_(-1);
      read_values(g, group);
      read_flags(g, group);
      const u64 shape = shape_of(host_.group(g).hypers);
      if (shape != shapes_[g]) changed.append(g);
      shapes_[g] = shape;
    }
    return changed.empty() ? py::object(py::none()) : py::object(changed);
  }

  // The parameters that have a gradient, as of the last refresh.
  py::object live_params() {
    if (live_params_.is_none()) {
      py::list params;
      for (u64 row = 0; row < watches_.size(); ++row)
        if (live_[row]) params.append(watches_[row].param);
      live_params_ = params;
    }
    return live_params_;
  }

  void launch_on_cpu(int threads, const std::string& isa, u64 grad_scale, u64 found_inf) {
    host_.plan(threads, kLeaf, kCpuChunk);
    const LaunchParams launch = host_.params(float_pointer(grad_scale), float_pointer(found_inf));
    const int rule = host_.rule();
    const int variant = host_.variant();
    ++launches;
    const py::gil_scoped_release release;
    launch_cpu(launch, rule, variant, threads, isa);
  }

  void launch_emulated(u32 blocks, int threads, u64 seed, bool inline_columns, u64 grad_scale, u64 found_inf) {
    host_.plan(i64(blocks) * threads, kLeaf, kCpuChunk);
    KernelParams params{};
    params.launch = host_.params(float_pointer(grad_scale), float_pointer(found_inf));
    if (inline_columns) fill_inline_columns(host_, params);
    ++launches;
    run_emulated(emulated_kernel(host_.rule(), host_.variant()), params, {blocks, threads, seed});
  }

  void launch_on_cuda(CudaLaunch& cuda, u64 stream, u64 grad_scale, u64 found_inf) {
    ++launches;
    const py::gil_scoped_release release;
    cuda.launch(host_, stream, grad_scale, found_inf);
  }

  // The columns as bytes, for a backend that keeps its own copies; `only_step` leaves out what rarely changes.
  py::dict columns(i64 workers, bool only_step) {
    host_.plan(workers, kLeaf, kCpuChunk);
    py::dict all;
    const std::vector<u64>& address = host_.addresses();
    const auto grads = address.begin() + i64(u64(kGrad) * host_.rows());
    all["grads"] = bytes_of(std::vector<u64>(grads, grads + i64(host_.rows())));
    add_group_columns(all);
    if (only_step) return all;
    all["address"] = bytes_of(address);
    all["numel"] = bytes_of(host_.numels());
    all["group"] = bytes_of(host_.group_of());
    all["storage"] = bytes_of(host_.storages());
    all["layouts"] = bytes_of(host_.layouts());
    all["layout"] = bytes_of(host_.layout_of());
    all["chunks"] = bytes_of(host_.chunks());
    all["chunk_elements"] = host_.chunk_elements();
    return all;
  }

  u64 revision() const { return host_.revision(); }
  u64 rows() const { return host_.rows(); }
  std::string variant() { return variant_names()[size_t(host_.variant())]; }
  u64 chunk_count() const { return host_.chunks().size(); }

 private:
  static constexpr i64 kCpuChunk = 32768;

  bool row_is_current(u64 row, const Watch& watch, const py::object& grad) {
    u64 address = 0;
    const py::object param = local_tensor(watch.param, watch.unwrap);
    int same = reader.matches(param.ptr(), watch.param_facts, address);
    if (same < 0) fail();
    if (!same || address != watch.param_facts.address) return false;
    if (grad.is_none()) {
      host_.set_grad(row, 0);
      set_live(row, false);
      return true;
    }
    same = reader.matches(local_tensor(grad, watch.unwrap).ptr(), watch.grad_facts, address);
    if (same < 0) fail();
    if (!same) return false;
    host_.set_grad(row, host_.numel(row) == 0 ? kEmptyGradient : address);
    set_live(row, true);
    return true;
  }

  void set_live(u64 row, bool live) {
    if (live_[row] == live) return;
    live_[row] = live;
    live_params_ = py::none();
  }

  py::object& value(u64 group, size_t item) { return values_[group * (hypers_.size() + flags_.size()) + item]; }

  static py::handle lookup(py::handle group, const py::str& key) {
    PyObject* const found = PyDict_GetItemWithError(group.ptr(), key.ptr());  // borrowed
    if (found == nullptr) {
      if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key.ptr());
      fail();
    }
    return found;
  }

  void read_values(u64 g, py::handle group) {
    for (size_t h = 0; h < hypers_.size(); ++h) {
      py::object now = py::reinterpret_borrow<py::object>(lookup(group, hypers_[h].key));
      if (hypers_[h].item >= 0) now = now[py::int_(hypers_[h].item)];
      py::object& before = value(g, h);
      const bool is_tensor = reader.is_tensor(now.ptr());
      if (now.is(before) && !is_tensor) continue;
      before = now;
      if (is_tensor)
        read_tensor_value(host_.group(g), int(h), now);
      else
        set_value(host_.group(g), int(h), number(now));
    }
  }

  static double number(const py::object& object) {
    const double x = PyFloat_AsDouble(object.ptr());
    if (x == -1.0 && PyErr_Occurred()) fail();
    return x;
  }

  static void set_value(GroupRow& group, int h, double x) {
    group.hypers.value[h] = x;
    group.tensor[h] = 0;
  }

  // A tensor on the table's device is read by the launch itself, any other one here and now.
  void read_tensor_value(GroupRow& group, int h, const py::object& tensor) {
    TensorFacts facts;
    if (!reader.read(tensor.ptr(), facts)) fail();
    const int storage = storage_of(facts.dtype);
    const bool here = facts.device.type == device_.type && facts.device.index == device_.index && storage >= 0;
    if (!here) return set_value(group, h, number(tensor.attr("item")()));
    group.hypers.value[h] = 1.0;  // not 0: unknown until the launch
    group.tensor[h] = facts.address;
    group.storage[h] = u8(storage);
  }

  void read_flags(u64 g, py::handle group) {
    u32& flags = host_.group(g).hypers.flags;
    for (size_t f = 0; f < flags_.size(); ++f) {
      const py::handle now = lookup(group, flags_[f].key);
      py::object& before = value(g, hypers_.size() + f);
      if (now.is(before)) continue;
      before = py::reinterpret_borrow<py::object>(now);
      const int truth = PyObject_IsTrue(now.ptr());
      if (truth < 0) fail();
      flags = truth ? flags | flags_[f].bit : flags & ~flags_[f].bit;
    }
  }

  static u64 shape_of(const Hypers& hypers) {
    u64 shape = hypers.flags;
    for (int h = 0; h < kHypers; ++h) shape |= u64(hypers.value[h] != 0.0) << (32 + h);
    return shape;
  }

  void add_group_columns(py::dict& all) const {
    std::vector<double> values;
    std::vector<u32> flags, storages;
    std::vector<u64> tensors;
    for (const GroupRow& group : host_.group_rows()) {
      values.insert(values.end(), group.hypers.value, group.hypers.value + kHypers);
      flags.push_back(group.hypers.flags);
      tensors.insert(tensors.end(), group.tensor, group.tensor + kHypers);
      storages.insert(storages.end(), group.storage, group.storage + kHypers);
    }
    all["group_values"] = bytes_of(values);
    all["group_flags"] = bytes_of(flags);
    all["group_tensors"] = bytes_of(tensors);
    all["group_storages"] = bytes_of(storages);
  }

  template <class T>
  static py::bytes bytes_of(const std::vector<T>& column) {
    return py::bytes(reinterpret_cast<const char*>(column.data()), column.size() * sizeof(T));
  }

  HostTable host_;
  dlpack::Device device_;
  std::vector<HyperKey> hypers_;
  std::vector<FlagKey> flags_;
  std::vector<Watch> watches_;
  std::vector<bool> live_;
  std::vector<py::object> values_;  // per group: hyperparameters and flags as last read
  std::vector<u64> shapes_;
  std::vector<Py_ssize_t> sizes_;
  py::object live_params_ = py::none();
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of fusedopt: tables, the CPU engine, the CUDA launcher and its host emulation.";
  m.def("connect", [](const py::object& tensor_type, const py::object& capsule, const py::dict& dtypes) {
    reader.connect(tensor_type.ptr(), capsule.ptr(), dtypes.ptr());
  });
  m.def("uses_exchange", [] { return reader.uses_exchange(); });
  m.def("rules", &rule_names);
  m.def("variants", &variant_names);
  m.def("instruction_sets", &cpu_instruction_sets);
  m.def("launch_count", [] { return u64(launches); });
  m.def("build_info", [] {
    py::list images;
    for (size_t k = 0; k < kDeviceImageCount; ++k)
      images.append(py::make_tuple(kDeviceImages[k].rule, kDeviceImages[k].sm, kDeviceImages[k].ptx, kDeviceImages[k].size));
    py::dict info;
    info["host_compiler"] = std::string(kHostCompiler);
    info["device_compiler"] = std::string(kDeviceCompiler);
    info["archs"] = std::string(kBuildArchs);
    info["images"] = images;
    return info;
  });
  m.attr("FLOAT32") = int(kFloat32);
  m.attr("BFLOAT16") = int(kBFloat16);
  m.attr("FLOAT16") = int(kFloat16);
  m.attr("FLOAT64") = int(kFloat64);
  m.attr("EMPTY_GRADIENT") = kEmptyGradient;

  py::class_<Table>(m, "Table")
      .def(py::init<const std::string&, const std::vector<std::pair<std::string, int>>&,
                    const std::vector<std::pair<std::string, u32>>&, std::pair<int, int>>(),
           py::arg("rule"), py::arg("hypers"), py::arg("flags"), py::arg("device"))
      .def("resize", &Table::resize, py::arg("rows"), py::arg("group_sizes"))
      .def("set_row", &Table::set_row, py::arg("row"), py::arg("addresses"), py::arg("storages"), py::arg("numel"),
           py::arg("group"), py::arg("layout"), py::arg("param"), py::arg("grad"), py::arg("unwrap"), py::arg("keep"))
      .def("refresh", &Table::refresh)
      .def("read_groups", &Table::read_groups, py::arg("groups"))
      .def("live_params", &Table::live_params)
      .def("launch_cpu", &Table::launch_on_cpu, py::arg("threads"), py::arg("isa"), py::arg("grad_scale") = 0,
           py::arg("found_inf") = 0)
      .def("launch_emulated", &Table::launch_emulated, py::arg("blocks"), py::arg("threads"), py::arg("seed"),
           py::arg("inline_columns"), py::arg("grad_scale") = 0, py::arg("found_inf") = 0)
      .def("launch_cuda", &Table::launch_on_cuda, py::arg("launcher"), py::arg("stream"), py::arg("grad_scale") = 0,
           py::arg("found_inf") = 0)
      .def("columns", &Table::columns, py::arg("workers"), py::arg("only_step"))
      .def_property_readonly("revision", &Table::revision)
      .def_property_readonly("rows", &Table::rows)
      .def_property_readonly("variant", &Table::variant)
      .def_property_readonly("chunk_count", &Table::chunk_count);

  py::class_<CudaLaunch>(m, "CudaLaunch")
      .def(py::init<int>(), py::arg("device"))
      .def_property_readonly("architecture", &CudaLaunch::architecture);
  m.def("cuda_unavailable", &cuda_unavailable, "Why CUDA kernels can not be launched on this machine; empty: they can.");
}

}  // namespace fusedopt
