// The Python module fusedopt._C: a table that watches its tensors, and the launches over it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <unordered_set>
#include <utility>

#include "cpu/dispatch.h"
#include "cuda/driver.h"
#include "cuda/emulated.h"
#include "cuda/images.h"
#include "cuda/kernel.h"
#include "cuda/launcher.h"
#include "dict_watch.h"
#include "gradient_reader.h"
#include "host_pages.h"
#include "host_table.h"
#include "tensor_reader.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

TensorReader reader;
GradientReader gradients;
std::atomic<u64> launches{0};

// Where a hyperparameter stands in a group: group[key], or group[key][item].
struct HyperKey {
  py::str key;
  int item;          // −1: the value itself
  Py_ssize_t items;  // that the value has, where it is not meant itself
};

struct FlagKey {
  py::str key;
  u32 bit;
};

// What asks for a state of a group's tensors: a hyperparameter that is not 0, a flag that is set, or their being there.
// As fusedopt/rules.py has it: `unseen` are the hyperparameters, as bits, that would have to be fetched from a GPU.
struct Need {
  int hyper = -1;
  u32 flag = 0;

  bool is_asked_by(const Hypers& hypers, u32 unseen) const {
    if (hyper >= 0) return hypers.value[hyper] != 0.0 || (unseen >> hyper & 1) != 0;
    return flag == 0 || (hypers.flags & flag) != 0;
  }
};

// What every table of a rule knows of it: fusedopt/rules.py.
struct Schema {
  // `state_keys`: of each state its name, and the key that asks for it or "".
  Schema(const std::string& stem, const std::vector<std::pair<std::string, int>>& hyper_keys,
         const std::vector<std::pair<std::string, u32>>& flag_keys, const std::vector<std::string>& mode_keys,
         const std::vector<std::pair<std::string, std::string>>& state_keys, bool counts_always)
      : rule(rule_index(stem)), keeps_step(counts_always) {
    if (hyper_keys.size() > size_t(kHypers)) throw std::invalid_argument("a rule names at most 8 hyperparameters");
    for (const auto& [key, item] : hyper_keys) {
      Py_ssize_t items = 0;
      for (const auto& [other, last] : hyper_keys)
        if (other == key) items = std::max<Py_ssize_t>(items, last + 1);
      hypers.push_back({py::str(key), item, items});
    }
    for (const auto& [key, bit] : flag_keys) flags.push_back({py::str(key), bit});
    for (const std::string& key : mode_keys) modes.push_back(py::str(key));
    for (const auto& [name, asked_by] : state_keys) {
      states.push_back(py::str(name));
      needs.push_back(need_of(asked_by, hyper_keys, flag_keys));
    }
  }

  int rule;
  std::vector<HyperKey> hypers;
  std::vector<FlagKey> flags;
  std::vector<py::str> modes;   // keys that ask for a mode, or for what no group may ask
  std::vector<py::str> states;  // names, by slot
  std::vector<Need> needs;      // by slot
  bool keeps_step;

 private:
  static Need need_of(const std::string& key, const std::vector<std::pair<std::string, int>>& hyper_keys,
                      const std::vector<std::pair<std::string, u32>>& flag_keys) {
    if (key.empty()) return {};
    for (size_t h = 0; h < hyper_keys.size(); ++h)
      if (hyper_keys[h].first == key && hyper_keys[h].second < 0) return {int(h), 0};
    for (const auto& [name, bit] : flag_keys)
      if (name == key) return {-1, bit};
    throw std::invalid_argument("'" + key + "', which asks for a state, is neither one hyperparameter nor a flag");
  }
};

// One parameter as the table last saw it. What every step looks at comes first, in as few cache lines as it takes.
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
};

// A tensor that must stay where it is, and can be asked without Python.
struct Placed {
  const TorchTensor* tensor;
  u64 address;
};

// Where a row's parameter stands: in the list of a group, at an index of it.
struct Place {
  u32 group = 0;
  Py_ssize_t index = 0;
  const PyObject* param = nullptr;  // borrowed from the row's watch
};

[[noreturn]] void fail() { throw py::error_already_set(); }

// param.grad: through the getter that this type's attribute is, looked up once a type.
py::object grad_of(PyObject* param) {
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
const void* impl_of(const py::object& tensor) {
  static PyObject* const kName = PyUnicode_InternFromString("_cdata");
  const auto number = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), kName));
  const void* const impl = number ? PyLong_AsVoidPtr(number.ptr()) : nullptr;
  if (impl == nullptr && PyErr_Occurred()) fail();
  return impl;
}

// Reads a tensor's facts; false, and no exception, where only Python can say what it is.
bool can_read(PyObject* tensor, TensorFacts& facts, std::vector<int64_t>& extents) {
  if (reader.read(tensor, facts, extents)) return true;
  PyErr_Clear();
  return false;
}

// The bytes that a tensor lies in, from its first to behind its last; none where it is empty.
using Span = std::pair<u64, u64>;

Span span_of(const TensorFacts& facts, const std::vector<int64_t>& extents) {
  const int64_t* const shape = extents.data() + facts.extents;
  i64 last = 0;
  for (int32_t d = 0; d < facts.ndim; ++d) {
    if (shape[d] == 0) return {0, 0};
    last += (shape[d] - 1) * shape[facts.ndim + d];
  }
  return {facts.address, facts.address + u64(last + 1) * ((facts.dtype.bits + 7) / 8)};
}

bool are_apart(std::vector<Span> spans) {
  std::sort(spans.begin(), spans.end());
  for (size_t k = 1; k < spans.size(); ++k)
    if (spans[k].first < spans[k - 1].second) return false;
  return true;
}

// Where tensors lie that are known to share no memory, as all are plain ones on one device that can be read; else None.
py::object addresses_apart(const py::list& tensors) {
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

// A name that is never given back: at the end of the process there is no interpreter left to give it to.
const py::str& lasting_name(const char* name) { return *new py::str(name); }

// tensor.method()
py::object call(const py::object& tensor, PyObject* method) {
  py::object result = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), method));
  if (!result) fail();
  return result;
}
bool says(const py::object& tensor, PyObject* question) { return call(tensor, question).ptr() == Py_True; }

py::object local_tensor(const py::object& tensor, bool unwrap) {
  return unwrap ? py::object(tensor.attr("_local_tensor")) : tensor;
}

const float* float_pointer(u64 address) { return reinterpret_cast<const float*>(address); }
double* double_pointer(u64 address) { return reinterpret_cast<double*>(address); }

class Table {
 public:
  // `places`: every row's group, its position in that group's list, and its parameter. A row is blank until set_row()
  // describes it: the launch passes it over, whatever its parameter is, wherever it lies. `sizes`: how many parameters
  // each group has, over all devices. `states`: the optimizer's state; refresh() reports the rows to which it gives
  // another dict. `first_rows`: of each part of the table whose leaves are joined to one number.
  Table(std::shared_ptr<const Schema> schema, std::pair<int, int> device,
        const std::vector<std::tuple<u32, Py_ssize_t, py::object>>& places, std::vector<Py_ssize_t> sizes,
        const py::dict& states, std::vector<u64> first_rows)
      : schema_(std::move(schema)),
        host_(schema_->rule),
        device_{device.first, device.second},
        mode_watches_(sizes.size()),
        watches_(places.size()),
        places_(places.size()),
        live_(places.size(), false),
        values_(sizes.size() * (schema_->hypers.size() + schema_->flags.size())),
        shapes_(sizes.size(), ~u64(0)),
        unseen_(sizes.size(), 0),
        sizes_(std::move(sizes)),
        params_(sizes_.size(), nullptr),
        states_(states) {
    host_.resize(places.size());
    host_.resize_groups(sizes_.size());
    host_.set_parts(std::move(first_rows));
    states_watch_.watch(states, {});
    for (u64 row = 0; row < places.size(); ++row) {
      const auto& [group, index, param] = places[row];
      places_[row] = {group, index, param.ptr()};
      watches_[row].param = param;
      watches_[row].param_facts.ndim = watches_[row].grad_facts.ndim = TensorFacts::kUnknown;
    }
    living().insert(this);
  }
  ~Table() { living().erase(this); }
  Table(const Table&) = delete;
  Table& operator=(const Table&) = delete;

  // From now on refresh() reports the row when `state` no longer holds these very objects.
  void watch_state(u64 row, const py::dict& state, const py::dict& entries) {
    std::vector<DictWatch::Entry> all;
    for (const auto& [key, value] : entries)
      all.emplace_back(py::reinterpret_borrow<py::str>(key),
                       value.is_none() ? py::object() : py::reinterpret_borrow<py::object>(value));
    placed_is_known_ = false;
    watches_.at(row).state.watch(state, std::move(all));
    watches_[row].state_addresses = addresses_of(watches_[row]);
  }

  // From now on refresh() does not have torch's C++ side count a reference to every parameter.
  void hold_nothing() { wants_holds_ = false; }

  // Has all tables give theirs back until the next refresh().
  static void release_params() {
    std::vector<Hold> released;  // destroyed at the end: the last reference to a parameter may end a table
    for (Table* const table : living()) {
      for (Watch& watch : table->watches_)
        if (watch.hold) released.push_back(std::move(watch.hold));
      table->holding_ = false;
    }
  }

  // Whether the watched states and copies are where they were: `tensor.data = ...` leaves no other trace, and after
  // `tensor.share_memory_()` their old memory is gone. Of those that only Python can be asked of, some at a time.
  bool states_in_place() {
    if (!placed_is_known_) find_placed();
    for (size_t k = 0; k < placed_.size(); ++k) {
      if (k + 2 * kPlacedAhead < placed_.size()) {
        __builtin_prefetch(placed_[k + 2 * kPlacedAhead].tensor);
        gradients.prefetch(placed_[k + kPlacedAhead].tensor);
      }
      if (!gradients.lies_at(placed_[k].tensor, placed_[k].address)) return false;
    }
    const size_t count = std::min(asked_.size(), std::max(kAskedAtOnce, asked_.size() / kAskedAtOnce));
    for (size_t k = 0; k < count; ++k)
      if (!state_in_place(asked_[next_asked_++ % asked_.size()])) return false;
    return true;
  }
  bool state_in_place(u64 row) const { return watches_.at(row).state_addresses == addresses_of(watches_.at(row)); }

  void set_row(u64 row, const std::array<u64, kSlots>& addresses, const std::array<int, kElementSlots>& storages,
               u32 mode, i64 numel, u32 group, std::vector<i64> layout, py::object param, const py::object& grad,
               bool unwrap, const py::object& copy, std::vector<py::object> keep) {
    RowSpec spec;
    for (int s = 0; s < kSlots; ++s) spec.address[s] = addresses[size_t(s)];
    for (int s = 0; s < kElementSlots; ++s) spec.storage[s] = u8(storages[size_t(s)]);
    spec.mode = mode;
    spec.numel = numel;
    spec.group = group;
    spec.layout = std::move(layout);
    host_.set_row(row, spec);
    if (row < fresh_.size()) fresh_[row] = 0;
    watch_tensors(row, std::move(param), grad, unwrap, std::move(keep));
    Watch& watch = watches_[row];
    watch.copy = copy.is_none() ? py::object() : copy;
    watch.state_addresses = addresses_of(watch);
  }

  // A table of all parameters of these groups, and its rows that have a gradient, which begin_rows() can describe: see
  // plain_rows(). None where a tensor or a group needs a closer look, as one that has any of the schema's modes does.
  static py::object of_plain(const std::shared_ptr<const Schema>& schema, const py::object& groups,
                             const py::object& states) {
    std::vector<std::tuple<u32, Py_ssize_t, py::object>> places;
    std::vector<Py_ssize_t> sizes;
    TensorFacts first;
    std::vector<int64_t> extents;
    if (!gradients.is_connected() || !PyDict_Check(states.ptr())) return py::none();
    if (!find_places(*schema, groups, places, sizes) || places.empty()) return py::none();
    if (!can_read(std::get<2>(places[0]).ptr(), first, extents)) return py::none();
    if (first.device.type != dlpack::kHost && first.device.type != dlpack::kCuda) return py::none();
    const std::pair<int, int> device{first.device.type, first.device.index};
    auto table = std::make_unique<Table>(schema, device, places, std::move(sizes),
                                         py::reinterpret_borrow<py::dict>(states), std::vector<u64>{0});
    std::vector<u64> rows;
    if (!table->begin_groups(groups) || !table->see_all_plain(rows)) return py::none();
    return py::make_tuple(std::move(table), std::move(rows));
  }

  // Of these rows those that begin_rows() can describe: the parameter has no state, and needs no closer look. It and
  // its gradient are on this device, of one shape and dtype, in row-major order, whole and apart. Also says whether all
  // of these parameters and gradients are.
  std::pair<std::vector<u64>, bool> plain_rows(const std::vector<u64>& rows) {
    std::vector<u64> plain;
    std::vector<Span> spans;
    for (const u64 row : rows) {
      Watch& watch = watches_.at(row);
      if (!gradients.is_connected() || !see_plain(watch)) continue;
      plain.push_back(row);
      spans.push_back(span_of(watch.param_facts, extents_));
      spans.push_back(span_of(watch.grad_facts, extents_));
    }
    return {std::move(plain), are_apart(std::move(spans))};
  }

  // Of these rows those whose steps are counted: that have states, or all where the rule always counts.
  std::vector<u64> counted_rows(const std::vector<u64>& rows) const {
    std::vector<u64> counted;
    counted.reserve(rows.size());
    for (const u64 row : rows)
      if (is_counted(places_.at(row).group)) counted.push_back(row);
    return counted;
  }

  // Makes the states of rows that plain_rows() has just passed, and describes the rows. `steps`: a count for each of
  // counted_rows(), in order; `steps_in_state`: views of them that the state is to have; `leaves_fresh`: whether large
  // states on the host are left to the launch on the CPU that follows, or to settle(), to clear.
  void begin_rows(const std::vector<u64>& rows, const py::object& steps, const py::sequence& steps_in_state, u32 mode,
                  const py::object& empty_like, bool leaves_fresh) {
    NewSteps left{steps, 0, steps_in_state};
    if (PyByteArray_CheckExact(steps.ptr()))
      left.address = reinterpret_cast<u64>(PyByteArray_AS_STRING(steps.ptr()));
    else if (!reader.read_address(steps.ptr(), left.address))
      fail();
    for (const u64 row : rows) begin_row(row, left, mode, empty_like, leaves_fresh);
  }

  // Clears the states that begin_rows() has left to a launch. During that launch there are none.
  void settle() {
    for (u64 row = 0; row < fresh_.size(); ++row)
      each_state(row, fresh_[row],
                 [](u64 address, u64 bytes) { std::memset(reinterpret_cast<void*>(address), 0, bytes); });
    fresh_.clear();
  }

  // A row's group, its place in that, its parameter, where that lay when the row was described, how many elements it
  // had, and what its state is watched to hold.
  py::tuple described(u64 row) const {
    const Watch& watch = watches_.at(row);
    py::dict entries;
    for (const auto& [key, value] : watch.state.entries())
      if (value) entries[key] = value;
    const Place& place = places_[row];
    return py::make_tuple(place.group, place.index, watch.param, watch.param_facts.address, host_.numel(row), entries);
  }

  // Reads every parameter's gradient again. Returns the rows that are not what the table says, or None.
  py::object refresh() {
    py::list changed;
    if (wants_holds_ && !holding_) hold_live_params();
    if (extents_.size() > kMostExtents) forget_facts();
    const bool states_changed = !states_watch_.is_unchanged();
    // Block by block, so that what the next look needs is on its way from memory for all of them at once.
    for (u64 first = 0; first < watches_.size(); first += kBlockRows) {
      const u64 count = std::min(kBlockRows, watches_.size() - first);
      const TorchTensor* grads[kBlockRows];
      bool is_seen[kBlockRows];
      for (u64 k = 0; k < count; ++k) {
        prefetch(first + kBlockRows + k);
        grads[k] = grad_without_python(watches_[first + k]);
      }
      for (u64 k = 0; k < count; ++k) is_seen[k] = is_current_without_python(first + k, watches_[first + k], grads[k]);
      for (u64 k = 0; k < count; ++k) {
        Watch& watch = watches_[first + k];
        if ((!is_seen[k] && !row_is_current(first + k, watch)) || (states_changed && !state_is_current(watch)))
          changed.append(first + k);
      }
    }
    return changed.empty() ? py::object(py::none()) : py::object(changed);
  }

  // Reads every group's hyperparameters. Returns the groups of which a flag, or whether a value is 0, has changed since
  // the last call: what a tensor needs for its step may have changed with it. −1 where parameters came, went or were
  // replaced by others, or where a mode changed.
  py::object read_groups(const py::list& groups) {
    py::list changed;
    static const py::str& kParams = lasting_name("params");
    if (groups.size() != host_.groups()) return py::int_(-1);
    for (u64 g = 0; g < host_.groups(); ++g) {
      const py::handle group = PyList_GET_ITEM(groups.ptr(), Py_ssize_t(g));
      params_[g] = lookup(group, kParams).ptr();
      if (!PyList_Check(params_[g]) || PyList_GET_SIZE(params_[g]) != sizes_[g]) return py::int_(-1);
      if (!modes_are_current(mode_watches_[g], py::reinterpret_borrow<py::dict>(group))) return py::int_(-1);
      read_values(g, group);
      read_flags(g, group);
      const u64 shape = shape_of(host_.group(g).hypers);
      if (shape != shapes_[g]) changed.append(g);
      shapes_[g] = shape;
    }
    for (const Place& place : places_)
      if (PyList_GET_ITEM(params_[place.group], place.index) != place.param) return py::int_(-1);
    return changed.empty() ? py::object(py::none()) : py::object(changed);
  }

  // The parameters of all rows: the same list at every call.
  py::object params() {
    if (params_of_rows_.is_none()) {
      py::list params(watches_.size());
      for (u64 row = 0; row < watches_.size(); ++row) params[row] = watches_[row].param;
      params_of_rows_ = params;
    }
    return params_of_rows_;
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

  // Tells autograd that the live parameters, or else their gradients, are written. Returns the parameters of which only
  // Python can say so.
  py::list bump_versions(bool of_gradients) const {
    py::list left;
    for (u64 row = 0; row < watches_.size(); ++row) {
      const Watch& watch = watches_[row];
      if (!live_[row]) continue;
      const bool is_done = watch.impl != nullptr && (of_gradients ? gradients.bump_version(gradients.find(watch.impl))
                                                                  : gradients.bump_version(watch.impl));
      if (!is_done) left.append(watch.param);
    }
    return left;
  }

  // What else a launch does: the options of fusedopt/phase.py.
  void set_phase(u32 flags, u32 stage, double ema_decay, u64 ema_decay_tensor, u64 norms,
                 const std::vector<double>& max_norms, u64 leaf_sums, u64 joined, u64 results, u64 report) {
    for (u64 g = 0; g < host_.groups(); ++g) host_.group(g).max_norm = max_norms.at(g);
    host_.set_phase({flags, stage, ema_decay, float_pointer(ema_decay_tensor), norms, double_pointer(leaf_sums),
                     double_pointer(joined), double_pointer(results), double_pointer(report)});
  }

  void launch_on_cpu(int threads, const std::string& isa, u64 grad_scale, u64 found_inf) {
    if (found_inf != 0 || host_.phase().flags != 0) settle();
    host_.plan(threads, kLeaf, kCpuChunk);
    const LaunchParams launch = host_.params(float_pointer(grad_scale), float_pointer(found_inf));
    const int rule = host_.rule();
    const int variant = host_.variant();
    std::vector<u8> fresh = std::exchange(fresh_, {});  // another thread that settles leaves what is being stepped
    ++launches;
    try {
      const py::gil_scoped_release release;
      launch_cpu(launch, rule, variant, threads, isa, fresh);
    } catch (...) {
      fresh_ = std::move(fresh);
      throw;
    }
  }

  void launch_emulated(u32 blocks, int threads, u64 seed, bool inline_columns, u64 grad_scale, u64 found_inf) {
    settle();
    host_.plan(i64(blocks) * threads, least_elements(host_), kCpuChunk,
               threads % device::kWarpThreads == 0 ? kSmallTensor : 0);
    KernelParams params{};
    params.launch = host_.params(float_pointer(grad_scale), float_pointer(found_inf));
    fill_teams(host_, params);
    if (inline_columns) fill_inline_columns(host_, params);
    ++launches;
    run_emulated(emulated_kernel(host_.rule(), host_.variant()), params,
                 {blocks, threads, seed, host_.phase().measures()});
  }

  void launch_on_cuda(CudaLaunch& cuda, u64 stream, u64 grad_scale, u64 found_inf) {
    const py::gil_scoped_release release;
    cuda.launch(host_, stream, grad_scale, found_inf);
    ++launches;  // one that finds no memory is made again
  }

  std::vector<u64> moved_since_captures(const CudaLaunch& cuda) const { return cuda.moved_since_captures(host_); }
  void update_captures(CudaLaunch& cuda, u64 stream) const { cuda.update_captures(host_, stream); }

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
    all["first_leaf"] = bytes_of(host_.first_leaf());
    all["part_leaf"] = bytes_of(host_.part_leaf());
    all["layouts"] = bytes_of(host_.layouts());
    all["layout"] = bytes_of(host_.layout_of());
    all["chunks"] = bytes_of(host_.chunks());
    all["chunk_elements"] = host_.chunk_elements();
    return all;
  }

  // What the garbage collector must know: a hook on a parameter may hold the optimizer, and that this table.
  int traverse(visitproc visit, void* arg) const {
    Py_VISIT(states_.ptr());
    Py_VISIT(live_params_.ptr());
    Py_VISIT(params_of_rows_.ptr());
    for (const py::object& value : values_) Py_VISIT(value.ptr());
    for (const DictWatch& watch : mode_watches_)
      if (const int stop = watch.traverse(visit, arg)) return stop;
    for (const Watch& watch : watches_) {
      Py_VISIT(watch.param.ptr());
      Py_VISIT(watch.copy.ptr());
      for (const py::object& kept : watch.keep) Py_VISIT(kept.ptr());
      Py_VISIT(watch.grad_spec.ptr());
      if (const int stop = watch.state.traverse(visit, arg)) return stop;
    }
    return states_watch_.traverse(visit, arg);
  }

  // Lets go of every Python object.
  void clear() {
    watches_.clear();
    fresh_.clear();
    places_.clear();
    values_.clear();
    mode_watches_.clear();
    states_watch_ = {};
    states_ = py::object();
    live_params_ = params_of_rows_ = py::none();
    placed_.clear();
    asked_.clear();
    placed_is_known_ = false;
  }

  u64 leaves() { return host_.leaves(); }
  u64 revision() const { return host_.revision(); }
  u64 rows() const { return host_.rows(); }
  std::string variant() { return variant_names()[size_t(host_.variant())]; }
  u64 chunk_count() const { return host_.chunks().size(); }

 private:
  static std::unordered_set<Table*>& living() {
    static auto& tables = *new std::unordered_set<Table*>;  // outlives every table
    return tables;
  }

  // Finds the parameters of all groups, in order; false where a group or a parameter needs a closer look.
  static bool find_places(const Schema& schema, const py::object& groups,
                          std::vector<std::tuple<u32, Py_ssize_t, py::object>>& places,
                          std::vector<Py_ssize_t>& sizes) {
    static const py::str& kParams = lasting_name("params");
    if (!PyList_CheckExact(groups.ptr())) return false;
    for (const py::handle group : py::reinterpret_borrow<py::list>(groups)) {
      if (!PyDict_CheckExact(group.ptr())) return false;
      for (const py::str& key : schema.modes)
        if (has_key(group, key)) return false;
      PyObject* const params = PyDict_GetItemWithError(group.ptr(), kParams.ptr());  // borrowed
      if (params == nullptr && PyErr_Occurred()) fail();
      if (params == nullptr || !PyList_CheckExact(params)) return false;
      for (Py_ssize_t k = 0; k < PyList_GET_SIZE(params); ++k) {
        const auto param = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(params, k));
        if (!reader.is_plain(param.ptr())) return false;
        places.emplace_back(u32(sizes.size()), k, param);
      }
      sizes.push_back(PyList_GET_SIZE(params));
    }
    return true;
  }

  // Reads the groups of a new table; false where Python has to say what is wrong with one of them.
  bool begin_groups(const py::object& groups) {
    try {
      read_groups(py::reinterpret_borrow<py::list>(groups));
    } catch (const py::error_already_set& error) {
      if (!error.matches(PyExc_Exception)) throw;  // an interrupt is not the group's fault
      return false;
    } catch (const std::exception&) {
      return false;
    }
    const auto is_refused = [](const GroupRow& group) { return (group.hypers.flags & kRefused) != 0; };
    return std::none_of(host_.group_rows().begin(), host_.group_rows().end(), is_refused);
  }

  // Whether all rows that have a gradient, which are listed, need no closer look, and no two tensors share memory.
  bool see_all_plain(std::vector<u64>& rows) {
    std::vector<Span> spans;
    for (u64 row = 0; row < watches_.size(); ++row) {
      Watch& watch = watches_[row];
      if (see_plain(watch)) {
        rows.push_back(row);
        spans.push_back(span_of(watch.grad_facts, extents_));
      } else if (!see_without_gradient(watch)) {
        return false;
      }
      spans.push_back(span_of(watch.param_facts, extents_));
    }
    return !rows.empty() && are_apart(std::move(spans));
  }

  // Whether a row's parameter has neither gradient nor state, and is where it is known to be.
  bool see_without_gradient(Watch& watch) {
    PyObject* const param = watch.param.ptr();
    if (has_state(watch.param) || !grad_of(param).is_none()) return false;
    return can_read(param, watch.param_facts, extents_) && watch.param_facts.device == device_ &&
           watch.param_facts.address != 0;
  }

  // Whether a row needs no closer look: see plain_rows(). What it is then is in its facts.
  bool see_plain(Watch& watch) {
    const py::object& param = watch.param;
    if (!reader.is_plain(param.ptr()) || has_state(param)) return false;
    const py::object grad = grad_of(param.ptr());
    const void* const impl = impl_of(param);
    if (!reader.is_plain(grad.ptr()) || gradients.is_inference(impl)) return false;
    const size_t known = extents_.size();
    TensorFacts p, g;
    const bool is_known = can_read(param.ptr(), p, extents_) && can_read(grad.ptr(), g, extents_);
    if (is_known && p.dtype == g.dtype && has_same_shape(p, g)) {
      const u64 p_bytes = whole_bytes(impl, p), g_bytes = whole_bytes(impl_of(grad), g);
      const bool is_apart = p.address + p_bytes <= g.address || g.address + g_bytes <= p.address;
      if (p_bytes != 0 && g_bytes != 0 && is_apart) {
        watch.param_facts = p;
        watch.grad_facts = g;
        return true;
      }
    }
    extents_.resize(known);
    return false;
  }

  bool has_state(const py::object& param) const {
    if (PyDict_GET_SIZE(states_.ptr()) == 0) return false;  // so at almost every first step, without a tensor's hash
    return has_key(states_, param);
  }

  static bool has_key(py::handle dict, py::handle key) {
    const int found = PyDict_Contains(dict.ptr(), key.ptr());
    if (found < 0) fail();
    return found == 1;
  }

  bool has_same_shape(const TensorFacts& one, const TensorFacts& other) const {
    const auto shape = extents_.begin() + one.extents;
    return one.ndim == other.ndim && std::equal(shape, shape + one.ndim, extents_.begin() + other.extents);
  }

  // Counts of steps that rows are given one after the other.
  struct NewSteps {
    const py::object& all;
    u64 address;  // of the next one
    const py::sequence& in_state;
    size_t given = 0;
  };

  bool needs(u32 group, size_t state) const {
    return schema_->needs[state].is_asked_by(host_.group_rows()[group].hypers, unseen_[group]);
  }

  bool is_counted(u32 group) const {
    for (size_t s = 0; s < schema_->states.size(); ++s)
      if (needs(group, s)) return true;
    return schema_->keeps_step;
  }

  void begin_row(u64 row, NewSteps& steps, u32 mode, const py::object& empty_like, bool leaves_fresh) {
    static PyObject* const kStorage = PyUnicode_InternFromString("untyped_storage");
    static const py::str& kStepKey = lasting_name("step");
    Watch& watch = watches_[row];
    RowSpec spec;
    spec.mode = mode;
    spec.group = places_[row].group;
    spec.numel = row_major_elements(watch.param_facts);
    const u8 storage = u8(storage_of(watch.param_facts.dtype));
    const auto set_slot = [&](int slot, u64 address) {
      spec.address[slot] = address;
      spec.storage[slot] = storage;
    };
    set_slot(kParam, watch.param_facts.address);
    set_slot(kGrad, watch.grad_facts.address);
    // Storages: they go on owning this memory where `tensor.data = ...` gives a tensor other memory.
    std::vector<py::object> keep;
    keep.reserve(1 + schema_->states.size());
    py::dict state;
    std::vector<DictWatch::Entry> entries;
    std::vector<u64> addresses;
    u8 fresh = 0;
    entries.reserve(1 + schema_->states.size());
    addresses.reserve(1 + schema_->states.size());
    const auto put = [&](const py::str& key, const py::object& tensor, u64 address) {  // in torch's order
      entries.emplace_back(key, tensor);
      if (!tensor) return;
      state[key] = tensor;
      addresses.push_back(address);
    };
    if (is_counted(spec.group)) {
      spec.address[kStep] = steps.address;
      keep.push_back(steps.all);
      if (schema_->keeps_step) put(kStepKey, steps.in_state[steps.given++], steps.address);
      steps.address += sizeof(float);
    }
    for (size_t s = 0; s < schema_->states.size(); ++s) {
      const py::str& name = schema_->states[s];
      if (!needs(spec.group, s)) {
        put(name, py::object(), 0);
        continue;
      }
      const auto tensor = py::reinterpret_steal<py::object>(PyObject_CallOneArg(empty_like.ptr(), watch.param.ptr()));
      u64 address = 0;
      if (!tensor || !reader.read_address(tensor.ptr(), address)) fail();
      if (address == 0 || !reader.is_plain(tensor.ptr())) throw py::type_error("a new state has no memory");
      const size_t bytes = size_t(spec.numel * storage_bytes(storage));
      if (leaves_fresh && device_.type == dlpack::kHost && bytes > kMostCleared)
        fresh |= u8(1u << s);
      else
        clear(tensor, address, bytes);
      set_slot(kState0 + int(s), address);
      keep.push_back(call(tensor, kStorage));
      put(name, tensor, address);
    }
    host_.set_row(row, spec);
    if (fresh != 0) keep_fresh(row, fresh);
    watch.state = DictWatch();
    if (!state.empty()) {
      if (PyDict_SetItem(states_.ptr(), watch.param.ptr(), state.ptr()) < 0) fail();
      watch.state.watch(state, std::move(entries));
    }
    watch.state_addresses = std::move(addresses);
    begin_watch(watch, std::move(keep), false);
    find_impl(watch);
    set_live(row, true);
  }

  void keep_fresh(u64 row, u8 states) {
    fresh_.resize(watches_.size());
    fresh_[row] = states;
    each_state(row, states, ask_for_huge_pages);
  }

  // Calls visit(address, bytes) for those of a row's states that have a bit, which are of the parameter's dtype.
  template <class Visit>
  void each_state(u64 row, u8 states, const Visit& visit) const {
    const u64 bytes = u64(host_.numel(row) * storage_bytes(storage_of(watches_[row].param_facts.dtype)));
    for (int s = 0; s < kStates; ++s)
      if (states >> s & 1) visit(host_.slot(kState0 + s, row), bytes);
  }

  // The bytes of a tensor that is what see_plain() wants one to be; else 0.
  u64 whole_bytes(const void* impl, const TensorFacts& facts) const {
    const int storage = storage_of(facts.dtype);
    const i64 elements = row_major_elements(facts);
    if (storage < 0 || facts.address == 0 || !(facts.device == device_)) return 0;
    const int bytes_each = storage_bytes(storage);
    return gradients.is_whole(impl, elements, bytes_each) ? u64(elements * bytes_each) : 0;
  }

  // The elements of a tensor that is in row-major order; else 0.
  i64 row_major_elements(const TensorFacts& facts) const {
    const int64_t* const shape = extents_.data() + facts.extents;
    const int64_t* const strides = shape + facts.ndim;
    i64 elements = 1;
    for (int32_t d = facts.ndim - 1; d >= 0; --d) {
      if (shape[d] != 1 && strides[d] != elements) return 0;
      elements *= shape[d];
    }
    return elements;
  }

  // Fills a tensor with zeros to which nothing was written yet.
  void clear(const py::object& tensor, u64 address, size_t bytes) const {
    static PyObject* const kZero = PyUnicode_InternFromString("zero_");
    if (device_.type == dlpack::kHost && bytes <= kMostCleared) {
      std::memset(reinterpret_cast<void*>(address), 0, bytes);
      return;
    }
    if (device_.type == dlpack::kHost) ask_for_huge_pages(address, bytes);
    call(tensor, kZero);
  }

  void watch_tensors(u64 row, py::object param, const py::object& grad, bool unwrap, std::vector<py::object> keep) {
    Watch& watch = watches_[row];
    watch.param = std::move(param);
    places_[row].param = watch.param.ptr();
    begin_watch(watch, std::move(keep), unwrap);
    watch.param_facts.ndim = watch.grad_facts.ndim = TensorFacts::kUnknown;
    watch.grad_spec = unwrap && !grad.is_none() ? py::object(grad.attr("_spec")) : py::object();
    if (!grad.is_none()) {
      if (!reader.read(local_tensor(watch.param, unwrap).ptr(), watch.param_facts, extents_)) fail();
      if (!reader.read(local_tensor(grad, unwrap).ptr(), watch.grad_facts, extents_)) fail();
      watch.stand_in = !grad_of(watch.param.ptr()).is(grad);
      find_impl(watch);
    }
    set_live(row, !grad.is_none());
  }

  // What a row's watch begins with, before its facts and its gradient are known to be what it reads.
  void begin_watch(Watch& watch, std::vector<py::object> keep, bool unwrap) {
    watch.hold = Hold();
    holding_ = false;
    placed_is_known_ = false;
    watch.copy = py::object();
    watch.keep = std::move(keep);
    watch.unwrap = unwrap;
    watch.stand_in = false;
    watch.impl = nullptr;
    watch.grad_spec = py::object();
  }

  static constexpr u32 kRefused = 1u << 31;  // the flag of groups that no step takes: fusedopt/rules.py
  static constexpr i64 kCpuChunk = 32768;
  static constexpr size_t kMostCleared = 128 << 10;  // bytes that one thread clears as fast as several
  static constexpr u64 kBlockRows = 8;
  static constexpr size_t kPlacedAhead = 8;
  static constexpr size_t kAskedAtOnce = 64;  // or as small a share of all
  static constexpr size_t kMostExtents = size_t(1) << 24;

  // Tensors lie scattered over the heap: the next ones are asked for while this one is looked at.
  void prefetch(u64 row) const {
    if (row >= watches_.size()) return;
    const Watch& watch = watches_[row];
    __builtin_prefetch(watch.param.ptr());
    __builtin_prefetch(watch.state.hint());
    __builtin_prefetch(watch.param_facts.hint);
    __builtin_prefetch(watch.impl != nullptr ? watch.grad : watch.grad_facts.hint);
  }

  void hold_live_params() {
    for (u64 row = 0; row < watches_.size(); ++row)
      if (live_[row] && !watches_[row].unwrap && !watches_[row].hold)
        watches_[row].hold = reader.hold(watches_[row].param.ptr());
    holding_ = true;
  }

  // Calls visit(tensor) for what a row's launches write beside its parameter.
  template <class Visit>
  static void each_placed(const Watch& watch, const Visit& visit) {
    const auto look = [&](const py::object& found) {
      if (!found || !reader.is_tensor(found.ptr())) return;  // such as a key of random bits
      visit(local_tensor(found, watch.unwrap && py::hasattr(found, "_local_tensor")));
    };
    for (const DictWatch::Entry& entry : watch.state.entries()) look(entry.second);
    look(watch.copy);
  }

  static std::vector<u64> addresses_of(const Watch& watch) {
    std::vector<u64> addresses;
    each_placed(watch, [&](const py::object& tensor) {
      if (!reader.read_address(tensor.ptr(), addresses.emplace_back())) fail();
    });
    return addresses;
  }

  void find_placed() {
    placed_.clear();
    asked_.clear();
    for (u64 row = 0; row < watches_.size(); ++row) {
      const Watch& watch = watches_[row];
      bool is_asked = false;
      size_t k = 0;
      each_placed(watch, [&](const py::object& tensor) {
        const u64 address = watch.state_addresses.at(k++);
        const TorchTensor* const found = watch.unwrap ? nullptr : find_handle(tensor, address);
        if (found != nullptr) placed_.push_back({found, address});
        is_asked = is_asked || found == nullptr;
      });
      if (is_asked) asked_.push_back(row);
    }
    placed_is_known_ = true;
  }

  static const TorchTensor* find_handle(const py::object& tensor, u64 address) {
    if (!gradients.is_connected() || !reader.is_plain(tensor.ptr())) return nullptr;
    return gradients.within(tensor.ptr(), size_t(Py_TYPE(tensor.ptr())->tp_basicsize), impl_of(tensor), address);
  }

  // From now on this parameter's gradient is read without Python, if what is read so is what Python reads.
  void find_impl(Watch& watch) {
    if (!gradients.is_connected() || watch.unwrap || watch.stand_in || !reader.is_plain(watch.param.ptr())) return;
    const void* const impl = impl_of(watch.param);
    if (!owns(impl, watch.param_facts)) return;
    if (gradients.read(gradients.find(impl), watch.grad_view) != GradientReader::kStrided) return;
    const bool is_alike = is_as_known(watch.grad_view, watch) && watch.grad_view.address() == watch.grad_facts.address;
    watch.impl = is_alike ? impl : nullptr;
  }

  // Whether a tensor's shape is kept within its c10::TensorImpl, as that of up to five dimensions is: where a
  // parameter's is, is then which c10::TensorImpl it has.
  static bool owns(const void* impl, const TensorFacts& facts) {
    constexpr std::uintptr_t kMostBytes = 512;
    return reinterpret_cast<std::uintptr_t>(facts.hint) - reinterpret_cast<std::uintptr_t>(impl) < kMostBytes;
  }

  bool is_as_known(const GradientReader::View& view, const Watch& watch) const {
    const TensorFacts& known = watch.grad_facts;
    return view.is_like(watch.grad_view) && view.has_extents(known.ndim, extents_.data() + known.extents);
  }

  // Where torch has the gradient of a parameter that is what it was; null where only Python may be asked for it.
  const TorchTensor* grad_without_python(Watch& watch) {
    if (watch.impl == nullptr || !param_is_current(watch)) return nullptr;
    return watch.grad = gradients.find(watch.impl);
  }

  // As row_is_current(), but false also says that Python has to be asked.
  bool is_current_without_python(u64 row, Watch& watch, const TorchTensor* grad) {
    if (grad == nullptr) return false;
    GradientReader::View view;
    const GradientReader::Found found = gradients.read(grad, view);
    if (found == GradientReader::kNone) return pass_over(row);
    const bool is_same = found == GradientReader::kStrided && is_as_known(view, watch) && watch.state.is_current();
    return is_same && take_gradient(row, view.address());
  }

  // A row without gradient is passed over by the launch: what else it says is looked at when a gradient comes.
  bool row_is_current(u64 row, Watch& watch) {
    const py::object grad = grad_of(watch.param.ptr());
    if (grad.is_none()) return pass_over(row);
    if (watch.stand_in || !watch.state.is_current() || !param_is_current(watch)) return false;
    TensorFacts now;
    if (!matches(grad.ptr(), watch, watch.grad_facts, now) || is_lazy(grad, watch.grad_facts)) return false;
    if (watch.unwrap && !lies_as_before(grad, watch.grad_spec)) return false;
    return take_gradient(row, now.address);
  }

  bool pass_over(u64 row) {
    host_.set_grad(row, 0);
    set_live(row, false);
    return true;
  }

  // False where the gradient keeps its values elsewhere, as a collective's pending result does.
  bool take_gradient(u64 row, u64 address) {
    const bool is_empty = host_.numel(row) == 0;
    if (address == 0 && !is_empty) return false;
    host_.set_grad(row, is_empty ? kEmptyGradient : address);
    set_live(row, true);
    return true;
  }

  // Whether a parameter is what and where it was, and the very tensor of torch's C++ side.
  bool param_is_current(const Watch& watch) {
    TensorFacts now;
    if (!matches(watch.param.ptr(), watch, watch.param_facts, now) || now.address != watch.param_facts.address)
      return false;
    if (watch.impl == nullptr) return !is_lazy(watch.param, watch.param_facts);
    return now.hint == watch.param_facts.hint && !gradients.is_lazy(watch.impl);
  }

  // After a change of the optimizer's state: does it still give every parameter the dict that its row watches?
  bool state_is_current(const Watch& watch) const {
    PyObject* const found = PyDict_GetItemWithError(states_.ptr(), watch.param.ptr());  // borrowed
    if (found == nullptr && PyErr_Occurred()) fail();
    return watch.state.watches(found);
  }

  bool matches(PyObject* tensor, const Watch& watch, const TensorFacts& facts, TensorFacts& now) {
    if (facts.ndim == TensorFacts::kUnknown) return false;
    static PyObject* const kLocalTensor = PyUnicode_InternFromString("_local_tensor");
    const reading::Owned shard(watch.unwrap ? PyObject_GetAttr(tensor, kLocalTensor) : nullptr);
    const bool is_readable = shard || !watch.unwrap;
    const int same = is_readable ? reader.matches(shard ? shard.get() : tensor, facts, extents_, now) : -1;
    if (same < 0) PyErr_Clear();  // it can not be read, such as a sparse one: Python will say what is wrong
    return same == 1;
  }

  // Whether a DTensor gradient is laid out over the devices as the one before. Mostly that is the same object; a
  // partial sum has the shape of the whole, so that the shape alone would not tell.
  static bool lies_as_before(const py::object& grad, py::object& before) {
    static PyObject* const kSpec = PyUnicode_InternFromString("_spec");
    py::object now = py::reinterpret_steal<py::object>(PyObject_GetAttr(grad.ptr(), kSpec));
    if (!now) fail();
    if (now.is(before)) return true;
    if (!now.equal(before)) return false;
    before = std::move(now);
    return true;
  }

  // Whether a tensor's memory holds the conjugate or the negative of its values, as that of z.conj().imag does.
  static bool is_lazy(const py::object& tensor, const TensorFacts& facts) {
    static PyObject* const kIsNeg = PyUnicode_InternFromString("is_neg");
    static PyObject* const kIsConj = PyUnicode_InternFromString("is_conj");
    return says(tensor, kIsNeg) || (facts.dtype.code == dlpack::kComplex && says(tensor, kIsConj));
  }

  // Rows that changed often have left their old extents behind: every row describes itself anew.
  void forget_facts() {
    extents_.clear();
    for (Watch& watch : watches_) watch.param_facts.ndim = watch.grad_facts.ndim = TensorFacts::kUnknown;
  }

  void set_live(u64 row, bool live) {
    if (live_[row] == live) return;
    live_[row] = live;
    live_params_ = py::none();
  }

  py::object& value(u64 group, size_t item) {
    return values_[group * (schema_->hypers.size() + schema_->flags.size()) + item];
  }

  static py::handle lookup(py::handle group, const py::str& key) {
    PyObject* const found = PyDict_GetItemWithError(group.ptr(), key.ptr());  // borrowed
    if (found == nullptr) {
      if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key.ptr());
      fail();
    }
    return found;
  }

  bool modes_are_current(DictWatch& watch, const py::dict& group) const {
    if (watch.watches(group.ptr())) return watch.is_current();
    if (!watch.watches(nullptr)) return false;  // another dict than before
    std::vector<DictWatch::Entry> entries;
    entries.reserve(schema_->modes.size());
    for (const py::str& key : schema_->modes) {
      PyObject* const value = PyDict_GetItemWithError(group.ptr(), key.ptr());  // borrowed
      if (value == nullptr && PyErr_Occurred()) fail();
      const bool is_asked = value != nullptr && value != Py_None;
      entries.emplace_back(key, is_asked ? py::reinterpret_borrow<py::object>(value) : py::object());
    }
    watch.watch(group, std::move(entries));
    return true;
  }

  void read_values(u64 g, py::handle group) {
    for (size_t h = 0; h < schema_->hypers.size(); ++h) {
      const HyperKey& hyper = schema_->hypers[h];
      py::object now = py::reinterpret_borrow<py::object>(lookup(group, hyper.key));
      if (hyper.item >= 0) {
        // Python names the group whose value has one too many: it is none of those that are read.
        if (Py_ssize_t(py::len(now)) != hyper.items) throw py::value_error("a value has another number of items");
        now = now[py::int_(hyper.item)];
      }
      py::object& before = value(g, h);
      const bool is_tensor = reader.is_tensor(now.ptr());
      const bool is_constant = PyFloat_CheckExact(now.ptr()) || PyLong_CheckExact(now.ptr());
      if (now.is(before) && is_constant) continue;
      before = now;
      unseen_[g] &= ~(1u << h);
      if (is_tensor)
        read_tensor_value(g, int(h), now);
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
  void read_tensor_value(u64 g, int h, const py::object& tensor) {
    GroupRow& group = host_.group(g);
    TensorFacts facts;
    std::vector<int64_t> extents;
    if (!reader.read(tensor.ptr(), facts, extents)) fail();
    i64 elements = 1;
    for (int32_t d = 0; d < facts.ndim; ++d) elements *= extents[size_t(d)];
    if (elements != 1) throw py::value_error("a tensor of 1 element is wanted, not one of " + std::to_string(elements));
    const int storage = storage_of(facts.dtype);
    const bool here = facts.device.type == device_.type && facts.device.index == device_.index && storage >= 0;
    if (!here && facts.device.type != dlpack::kHost) unseen_[g] |= 1u << h;
    if (!here) return set_value(group, h, number(tensor.attr("item")()));
    // Only whether this is 0 matters before the launch; a GPU's value is not known by then.
    group.hypers.value[h] = device_.type == dlpack::kHost ? number(tensor.attr("item")()) : 1.0;
    group.tensor[h] = facts.address;
    group.storage[h] = u8(storage);
  }

  void read_flags(u64 g, py::handle group) {
    u32& flags = host_.group(g).hypers.flags;
    for (size_t f = 0; f < schema_->flags.size(); ++f) {
      const py::handle now = lookup(group, schema_->flags[f].key);
      py::object& before = value(g, schema_->hypers.size() + f);
      if (now.is(before) && PyBool_Check(now.ptr())) continue;
      before = py::reinterpret_borrow<py::object>(now);
      const int truth = PyObject_IsTrue(now.ptr());
      if (truth < 0) fail();
      flags = truth ? flags | schema_->flags[f].bit : flags & ~schema_->flags[f].bit;
    }
  }

  static u64 shape_of(const Hypers& hypers) {
    u64 shape = hypers.flags;
    for (int h = 0; h < kHypers; ++h) shape |= u64(hypers.value[h] != 0.0) << (32 + h);
    return shape;
  }

  void add_group_columns(py::dict& all) const {
    std::vector<double> values, max_norms;
    std::vector<u32> flags, storages;
    std::vector<u64> tensors;
    for (const GroupRow& group : host_.group_rows()) {
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

  template <class T>
  static py::bytes bytes_of(const std::vector<T>& column) {
    return py::bytes(reinterpret_cast<const char*>(column.data()), column.size() * sizeof(T));
  }

  std::shared_ptr<const Schema> schema_;
  HostTable host_;
  dlpack::Device device_;
  std::vector<DictWatch> mode_watches_;  // of each group
  std::vector<Watch> watches_;
  std::vector<Place> places_;
  std::vector<int64_t> extents_;  // shapes and strides that the facts point into
  std::vector<bool> live_;
  bool wants_holds_ = true;
  bool holding_ = false;  // every live parameter that can be held
  bool placed_is_known_ = false;
  std::vector<Placed> placed_;  // of all rows
  std::vector<u64> asked_;      // rows of which Python has to be asked instead
  size_t next_asked_ = 0;
  std::vector<py::object> values_;  // per group: hyperparameters and flags as last read
  std::vector<u64> shapes_;
  std::vector<u32> unseen_;  // of each group, the hyperparameters on a GPU that is not the table's device, as bits
  std::vector<Py_ssize_t> sizes_;
  std::vector<PyObject*> params_;  // each group's list, borrowed for as long as the groups are read
  std::vector<u8> fresh_;          // a bit for each of a row's states that has yet to be cleared; empty: there are none
  py::object live_params_ = py::none();
  py::object params_of_rows_ = py::none();
  py::object states_;  // the optimizer's: parameter to dict
  DictWatch states_watch_;
};

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
      .def(py::init<std::shared_ptr<const Schema>, std::pair<int, int>,
                    const std::vector<std::tuple<u32, Py_ssize_t, py::object>>&, std::vector<Py_ssize_t>,
                    const py::dict&, std::vector<u64>>(),
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
