// The Python module fusedopt._C: tables, the CPU engine, the CUDA launcher and its host emulation.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>

#include "cpu/dispatch.h"
#include "cuda/driver.h"
#include "cuda/emulated.h"
#include "cuda/images.h"
#include "cuda/launcher.h"
#include "host_table.h"
#include "python/spans.h"
#include "python/watched_table.h"

namespace fusedopt {
namespace {

// Null while its constructor has not returned.
Table* table_of(PyObject* self) {
  auto* const instance = reinterpret_cast<py::detail::instance*>(self);
  return instance->get_value_and_holder().holder_constructed() ? py::cast<Table*>(py::handle(self)) : nullptr;
}

// https://pybind11.readthedocs.io/en/stable/advanced/classes.html#custom-type-setup
void let_table_be_collected(PyHeapTypeObject* heap_type) {
  PyTypeObject* const type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const Table* const table = table_of(self);
    return table ? table->traverse(visit, arg) : 0;
  };
  type->tp_clear = [](PyObject* self) {
    if (Table* const table = table_of(self)) table->clear();
    return 0;
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of fusedopt: tables, the CPU engine, the CUDA launcher and its host emulation.";
  m.def("connect", [](const py::object& tensor_type, const py::object& param_type, const py::object& capsule,
                      const py::dict& dtypes) {
    reader.connect(tensor_type.ptr(), param_type.ptr(), capsule.ptr(), dtypes.ptr());
    gradients.connect();
  });
  m.def("uses_exchange", [] { return reader.uses_exchange(); });
  m.def("reads_gradients_directly", [] { return gradients.is_connected(); });
  m.def("addresses_apart", &addresses_apart, py::arg("tensors"));
  m.def("release_params", &Table::release_params);
  m.def("rules", &rule_names);
  m.def("variants", &variant_names);
  m.def("instruction_sets", &cpu_instruction_sets);
  m.def("emulates", [] { return emulated_kernel(0, 0) != nullptr; });
  m.def(
      "environment",
      [](const char* name) {
        const char* const value = std::getenv(name);
        return py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(value == nullptr ? "" : value));
      },
      py::arg("name"));
  m.def("launch_count", [] { return u64(launches); });
  m.def("build_info", [] {
    py::list images;
    for (size_t k = 0; k < kDeviceImageCount; ++k)
      images.append(
          py::make_tuple(kDeviceImages[k].rule, kDeviceImages[k].sm, kDeviceImages[k].ptx, kDeviceImages[k].size));
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

  py::class_<Schema, std::shared_ptr<Schema>>(m, "Schema")
      .def(py::init<const std::string&, const std::vector<std::pair<std::string, int>>&,
                    const std::vector<std::pair<std::string, u32>>&, const std::vector<std::string>&,
                    const std::vector<std::pair<std::string, std::string>>&, bool>(),
           py::arg("rule"), py::arg("hypers"), py::arg("flags"), py::arg("modes"), py::arg("states"),
           py::arg("keeps_step"));

  py::class_<Table>(m, "Table", py::custom_type_setup(let_table_be_collected))
      .def(py::init<std::shared_ptr<const Schema>, std::pair<int, int>, const std::vector<NewPlace>&,
                    std::vector<Py_ssize_t>, const py::dict&, std::vector<u64>>(),
           py::arg("schema"), py::arg("device"), py::arg("places"), py::arg("group_sizes"), py::arg("states"),
           py::arg("first_rows"))
      .def("set_row", &Table::set_row, py::arg("row"), py::arg("addresses"), py::arg("storages"), py::arg("mode"),
           py::arg("numel"), py::arg("group"), py::arg("layout"), py::arg("param"), py::arg("grad"), py::arg("unwrap"),
           py::arg("copy"), py::arg("keep"))
      .def_static("of_plain", &Table::of_plain, py::arg("schema"), py::arg("groups"), py::arg("states"))
      .def("described", &Table::described, py::arg("row"))
      .def("plain_rows", &Table::plain_rows, py::arg("rows"))
      .def("counted_rows", &Table::counted_rows, py::arg("rows"))
      .def("begin_rows", &Table::begin_rows, py::arg("rows"), py::arg("steps"), py::arg("steps_in_state"),
           py::arg("mode"), py::arg("empty_like"), py::arg("leaves_fresh") = false)
      .def("settle", &Table::settle)
      .def("set_phase", &Table::set_phase, py::arg("flags"), py::arg("stage"), py::arg("ema_decay"),
           py::arg("ema_decay_tensor"), py::arg("norms"), py::arg("max_norms"), py::arg("leaf_sums"), py::arg("joined"),
           py::arg("results"), py::arg("report"))
      .def_property_readonly("leaves", &Table::leaves)
      .def("watch_state", &Table::watch_state, py::arg("row"), py::arg("state"), py::arg("entries"))
      .def("hold_nothing", &Table::hold_nothing)
      .def("states_in_place", &Table::states_in_place)
      .def("state_in_place", &Table::state_in_place, py::arg("row"))
      .def("refresh", &Table::refresh)
      .def("gradients_moved", &Table::gradients_moved)
      .def("gradients_apart", &Table::gradients_apart)
      .def("read_groups", &Table::read_groups, py::arg("groups"))
      .def("params", &Table::params)
      .def("live_params", &Table::live_params)
      .def("bump_versions", &Table::bump_versions, py::arg("of_gradients"))
      .def("launch_cpu", &Table::launch_on_cpu, py::arg("threads"), py::arg("isa"), py::arg("grad_scale") = 0,
           py::arg("found_inf") = 0)
      .def("launch_emulated", &Table::launch_emulated, py::arg("blocks"), py::arg("threads"), py::arg("seed"),
           py::arg("inline_columns"), py::arg("grad_scale") = 0, py::arg("found_inf") = 0)
      .def("launch_cuda", &Table::launch_on_cuda, py::arg("launcher"), py::arg("stream"), py::arg("grad_scale") = 0,
           py::arg("found_inf") = 0)
      .def("moved_since_captures", &Table::moved_since_captures, py::arg("launcher"))
      .def("update_captures", &Table::update_captures, py::arg("launcher"), py::arg("stream"))
      .def("columns", &Table::columns, py::arg("workers"), py::arg("only_step"))
      .def_property_readonly("revision", &Table::revision)
      .def_property_readonly("rows", &Table::rows)
      .def_property_readonly("variant", &Table::variant)
      .def_property_readonly("chunk_count", &Table::chunk_count);

  py::register_exception<driver::OutOfMemory>(m, "OutOfMemory", PyExc_RuntimeError);
  py::class_<CudaLaunch>(m, "CudaLaunch")
      .def(py::init<int>(), py::arg("device"))
      .def_property_readonly("architecture", &CudaLaunch::architecture)
      .def_property_readonly("captures", &CudaLaunch::captures);
  m.def("cuda_unavailable", &cuda_unavailable, py::arg("device") = -1,
        "Why CUDA kernels can not be launched on this device, or on any (-1), of this machine; empty: they can.");
}

}  // namespace fusedopt
