// A table that watches its tensors, and the launches over it: fusedopt._C.Table.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <tuple>
#include <unordered_set>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "cuda/emulated.h"
#include "cuda/kernel.h"
#include "cuda/launcher.h"
#include "host_table.h"
#include "python/columns.h"
#include "python/fresh_states.h"
#include "python/group_reader.h"
#include "python/new_row.h"
#include "python/placed_states.h"
#include "python/plain_look.h"
#include "python/schema.h"
#include "python/spans.h"
#include "python/watch.h"

namespace fusedopt {

inline std::atomic<u64> launches{0};  // of this process, over all tables

inline const float* float_pointer(u64 address) { return reinterpret_cast<const float*>(address); }
inline double* double_pointer(u64 address) { return reinterpret_cast<double*>(address); }

class Table {
 public:
  // `places`: of every row. A row is blank until set_row() describes it: the launch passes it over, whatever its
  // parameter is, wherever it lies. `sizes`: how many parameters each group has, over all devices. `states`: the
  // optimizer's state; refresh() reports the rows to which it gives another dict. `first_rows`: of each part of the
  // table whose leaves are joined to one number.
  Table(std::shared_ptr<const Schema> schema, std::pair<int, int> device, const std::vector<NewPlace>& places,
        std::vector<Py_ssize_t> sizes, const py::dict& states, std::vector<u64> first_rows)
      : schema_(std::move(schema)),
        host_(schema_->rule),
        device_{device.first, device.second},
        groups_(schema_, device_, std::move(sizes)),
        watches_(places.size()),
        places_(places.size()),
        live_(places.size(), false),
        states_(states) {
    host_.resize(places.size());
    host_.resize_groups(groups_.count());
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
    placed_.forget();
    watches_.at(row).state.watch(state, std::move(all));
    watches_[row].state_addresses = watches_[row].addresses();
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

  // Whether the watched states and copies are where they were.
  bool states_in_place() { return placed_.are_in_place(watches_); }
  bool state_in_place(u64 row) const { return PlacedStates::is_in_place(watches_.at(row)); }

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
    fresh_.forget(row);
    watch_tensors(row, std::move(param), grad, unwrap, std::move(keep));
    Watch& watch = watches_[row];
    watch.copy = copy.is_none() ? py::object() : copy;
    watch.state_addresses = watch.addresses();
  }

  // A table of all parameters of these groups, and its rows that have a gradient, which begin_rows() can describe: see
  // plain_rows(). None where a tensor or a group needs a closer look, as one that has any of the schema's modes does.
  static py::object of_plain(const std::shared_ptr<const Schema>& schema, const py::object& groups,
                             const py::object& states) {
    std::vector<NewPlace> places;
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

  // Of these rows those that begin_rows() can describe: PlainLook. Also says whether all of their parameters and
  // gradients are apart.
  std::pair<std::vector<u64>, bool> plain_rows(const std::vector<u64>& rows) {
    std::vector<u64> plain;
    PlainLook look(device_, states_, extents_);
    for (const u64 row : rows)
      if (gradients.is_connected() && look.sees_plain(watches_.at(row))) plain.push_back(row);
    return {std::move(plain), look.sees_all_apart()};
  }

  // Of these rows those whose steps are counted: that have states, or all where the rule always counts.
  std::vector<u64> counted_rows(const std::vector<u64>& rows) {
    std::vector<u64> counted;
    counted.reserve(rows.size());
    for (const u64 row : rows) {
      const u32 group = places_.at(row).group;
      if (groups_.counts(group, host_.group(group))) counted.push_back(row);
    }
    return counted;
  }

  // Makes the states of rows that plain_rows() has just passed, and describes the rows. `steps`: a count for each of
  // counted_rows(), in order; `steps_in_state`: views of them that the state is to have; `leaves_fresh`: whether large
  // states on the host are left to the launch on the CPU that follows, or to settle(), to clear.
  void begin_rows(const std::vector<u64>& rows, const py::object& steps, const py::sequence& steps_in_state, u32 mode,
                  const py::object& empty_like, bool leaves_fresh) {
    RowMaker maker(*schema_, device_, steps, steps_in_state, mode, empty_like, leaves_fresh);
    for (const u64 row : rows) {
      const u32 group = places_[row].group;
      begin_row(row, maker.make(watches_[row], group, groups_, host_.group(group), extents_));
    }
  }

  // Clears the states that begin_rows() has left to a launch. During that launch there are none.
  void settle() { fresh_.settle(); }

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

  // Whether a gradient has come to lie elsewhere since the last call.
  bool gradients_moved() { return std::exchange(gradients_moved_, false); }

  // Whether the gradients, as of the last refresh, are known to share no memory.
  bool gradients_apart() const {
    std::vector<Span> spans;
    for (u64 row = 0; row < watches_.size(); ++row) {
      if (!live_[row] || host_.numel(row) == 0) continue;
      TensorFacts facts = watches_[row].grad_facts;
      facts.address = host_.slot(kGrad, row);
      spans.push_back(span_of(facts, extents_));
    }
    return are_apart(std::move(spans));
  }

  // See GroupReader::read.
  py::object read_groups(const py::list& groups) { return groups_.read(groups, places_, host_); }

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
  // Python can say so, as of gradients that autograd knows more of.
  py::list bump_versions(bool of_gradients) const {
    py::list left;
    for (u64 row = 0; row < watches_.size(); ++row) {
      const Watch& watch = watches_[row];
      if (!live_[row]) continue;
      if (!(of_gradients ? bump_gradient(watch) : watch.impl != nullptr && gradients.bump_version(watch.impl)))
        left.append(watch.param);
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
    std::vector<u8> fresh = fresh_.take();
    ++launches;
    try {
      const py::gil_scoped_release release;
      launch_cpu(launch, rule, variant, threads, isa, fresh);
    } catch (...) {
      fresh_.give_back(std::move(fresh));
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
    return columns_of(host_, only_step);
  }

  // What the garbage collector must know: a hook on a parameter may hold the optimizer, and that this table.
  int traverse(visitproc visit, void* arg) const {
    Py_VISIT(states_.ptr());
    Py_VISIT(live_params_.ptr());
    Py_VISIT(params_of_rows_.ptr());
    if (const int stop = groups_.traverse(visit, arg)) return stop;
    for (const Watch& watch : watches_)
      if (const int stop = watch.traverse(visit, arg)) return stop;
    return states_watch_.traverse(visit, arg);
  }

  // Lets go of every Python object.
  void clear() {
    watches_.clear();
    fresh_.forget_all();
    places_.clear();
    groups_.clear();
    states_watch_ = {};
    states_ = py::object();
    live_params_ = params_of_rows_ = py::none();
    placed_.clear();
  }

  u64 leaves() { return host_.leaves(); }
  u64 revision() const { return host_.revision(); }
  u64 rows() const { return host_.rows(); }
  std::string variant() { return variant_names()[size_t(host_.variant())]; }
  u64 chunk_count() const { return host_.chunks().size(); }

 private:
  static bool bump_gradient(const Watch& watch) {
    if (watch.impl == nullptr) return false;
    const TorchTensor* const grad = gradients.find(watch.impl);
    return !gradients.has_history(grad) && gradients.bump_version(grad);
  }

  static std::unordered_set<Table*>& living() {
    static auto& tables = *new std::unordered_set<Table*>;  // outlives every table
    return tables;
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
    PlainLook look(device_, states_, extents_);
    for (u64 row = 0; row < watches_.size(); ++row) {
      if (look.sees_plain(watches_[row]))
        rows.push_back(row);
      else if (!look.sees_without_gradient(watches_[row]))
        return false;
    }
    return !rows.empty() && look.sees_all_apart();
  }

  void begin_row(u64 row, NewRow made) {
    Watch& watch = watches_[row];
    host_.set_row(row, made.spec);
    fresh_.keep(row, made.fresh);
    watch.state = DictWatch();
    if (!made.state.empty()) {
      if (PyDict_SetItem(states_.ptr(), watch.param.ptr(), made.state.ptr()) < 0) fail();
      watch.state.watch(made.state, std::move(made.entries));
    }
    watch.state_addresses = std::move(made.addresses);
    begin_watch(watch, std::move(made.keep), false);
    find_impl(watch);
    set_live(row, true);
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
    placed_.forget();
    watch.copy = py::object();
    watch.keep = std::move(keep);
    watch.unwrap = unwrap;
    watch.stand_in = false;
    watch.impl = nullptr;
    watch.grad_spec = py::object();
  }

  static constexpr u32 kRefused = 1u << 31;  // the flag of groups that no step takes: fusedopt/rules.py
  static constexpr i64 kCpuChunk = 32768;
  static constexpr u64 kBlockRows = 8;
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
    const u64 place = is_empty ? kEmptyGradient : address;
    gradients_moved_ = gradients_moved_ || host_.slot(kGrad, row) != place;
    host_.set_grad(row, place);
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
  bool state_is_current(const Watch& watch) const { return watch.state.watches(find(states_, watch.param)); }

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

  std::shared_ptr<const Schema> schema_;
  HostTable host_;
  dlpack::Device device_;
  GroupReader groups_;
  std::vector<Watch> watches_;
  std::vector<Place> places_;
  std::vector<int64_t> extents_;  // shapes and strides that the facts point into
  std::vector<bool> live_;
  bool wants_holds_ = true;
  bool holding_ = false;  // every live parameter that can be held
  bool gradients_moved_ = false;
  PlacedStates placed_;
  FreshStates fresh_{host_};
  py::object live_params_ = py::none();
  py::object params_of_rows_ = py::none();
  py::object states_;  // the optimizer's: parameter to dict
  DictWatch states_watch_;
};

}  // namespace fusedopt
