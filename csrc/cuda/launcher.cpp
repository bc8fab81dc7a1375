// Device memory for the table, the modules with the kernels, and the launch.
#include "cuda/launcher.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda/driver.h"
#include "cuda/images.h"

namespace fusedopt {
namespace {

using driver::api;
using driver::check;

constexpr size_t kAlignment = 64;  // of each column in its block
constexpr int kStagingBuffers = 3;

int attribute(driver::Device device, int which) {
  int value = 0;
  check(api().device_attribute(&value, which, device), "cuDeviceGetAttribute");
  return value;
}

// Compute capability, 90 for 9.0.
int architecture_of(driver::Device device) {
  return 10 * attribute(device, driver::kCapabilityMajor) + attribute(device, driver::kCapabilityMinor);
}

// A cubin runs on its own major version from its minor version up; PTX on anything newer.
const DeviceImage* best_image(const std::string& stem, int architecture, bool cubins = true) {
  const DeviceImage* best = nullptr;
  for (size_t k = 0; k < kDeviceImageCount; ++k) {
    const DeviceImage& image = kDeviceImages[k];
    if (stem != image.rule || image.sm > architecture) continue;
    if (!image.ptx && (!cubins || image.sm / 10 != architecture / 10)) continue;
    if (best == nullptr || (best->ptx && !image.ptx) || (best->ptx == image.ptx && image.sm > best->sm)) best = &image;
  }
  return best;
}

std::string no_image(int architecture) {
  const std::string number = std::to_string(architecture);
  return "this build has no kernels for compute capability " + number + " (it has: " + kBuildArchs +
         "); rebuild with FUSEDOPT_CUDA_ARCHS=" + number;
}

// Versions of CUDA as the driver gives its own: 12080 for 12.8.
int toolkit_version() {
  int major = 0, minor = 0;
  return std::sscanf(kDeviceCompiler, "%*s %d.%d", &major, &minor) == 2 ? 1000 * major + 10 * minor : 0;
}

int driver_version() {
  int version = 0;
  check(api().version(&version), "cuDriverGetVersion");
  return version;
}

// A driver loads the cubins of every toolkit of its own major version or an older one, and PTX of no newer one.
bool is_too_new(const DeviceImage& image) {
  const int toolkit = toolkit_version();
  return driver_version() < (image.ptx ? toolkit : toolkit / 1000 * 1000);
}

std::string too_new_image() {
  const int version = driver_version();
  return "this build's kernels are those of " + std::string(kDeviceCompiler) + ", and the driver knows CUDA " +
         std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10) +
         "; update the driver, or rebuild with an older CUDA toolkit (CUDA_HOME); without any nvcc the build takes "
         "NVRTC 12.8";
}

// One GPU: its context, and the modules loaded into it.
class Gpu {
 public:
  static Gpu& get(int index) {
    static std::mutex mutex;
    static auto& all = *new std::map<int, Gpu*>;  // never freed: contexts live as long as the process
    const std::lock_guard<std::mutex> lock(mutex);
    Gpu*& gpu = all[index];
    if (gpu == nullptr) gpu = new Gpu(index);
    return *gpu;
  }

  driver::Context context() const { return context_; }
  int architecture() const { return architecture_; }

  struct Kernel {
    driver::Function function = nullptr;
    int blocks = 0;  // that run at once on the whole GPU
  };

  const Kernel& kernel(int rule, int variant) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = kernels_.find({rule, variant});
    if (known != kernels_.end()) return known->second;
    Kernel kernel;
    const std::string& stem = rule_names()[size_t(rule)];
    const std::string name = "fusedopt_" + stem + "_" + variant_names()[size_t(variant)];
    check(api().get_function(&kernel.function, module(stem), name.c_str()), ("cuModuleGetFunction " + name).c_str());
    int per_multiprocessor = 0;
    check(api().occupancy(&per_multiprocessor, kernel.function, kBlockThreads, 0), "cuOccupancyMaxActiveBlocks");
    kernel.blocks = std::max(per_multiprocessor, 1) * multiprocessors_;
    return kernels_[{rule, variant}] = kernel;
  }

 private:
  explicit Gpu(int index) {
    check(api().device_get(&device_, index), "cuDeviceGet");
    check(api().primary_context(&context_, device_), "cuDevicePrimaryCtxRetain");
    architecture_ = architecture_of(device_);
    multiprocessors_ = attribute(device_, driver::kMultiprocessors);
  }

  driver::Module module(const std::string& stem) {
    const auto known = modules_.find(stem);
    if (known != modules_.end()) return known->second;
    const DeviceImage* const image = best_image(stem, architecture_);
    if (image == nullptr) throw std::runtime_error(no_image(architecture_));
    driver::Module module = nullptr;
    driver::Result result = api().load_module(&module, image->data);
    const DeviceImage* const ptx = best_image(stem, architecture_, false);
    if (result == driver::kNoBinary && ptx != nullptr) {  // a Jetson takes no cubin but of its very architecture
      if (is_too_new(*ptx)) throw std::runtime_error(too_new_image());
      result = api().load_module(&module, ptx->data);
    }
    check(result, ("cuModuleLoadData " + stem).c_str());
    return modules_[stem] = module;
  }

  driver::Device device_ = 0;
  driver::Context context_ = nullptr;
  int architecture_ = 0;
  int multiprocessors_ = 0;
  std::mutex mutex_;
  std::map<std::string, driver::Module> modules_;
  std::map<std::pair<int, int>, Kernel> kernels_;
};

// Allocation is forbidden to a thread that captures in the default mode; it is harmless to the capture.
class RelaxedCapture {
 public:
  RelaxedCapture() { api().exchange_capture_mode(&mode_); }
  ~RelaxedCapture() { api().exchange_capture_mode(&mode_); }

 private:
  int mode_ = driver::kCaptureRelaxed;
};

// Pinned host memory, and the event after which the GPU no longer reads it.
struct Staging {
  void* host = nullptr;
  size_t bytes = 0;
  driver::Event read = nullptr;
};

bool is_capturing(driver::Stream stream) {
  int status = 0;
  check(api().is_capturing(stream, &status), "cuStreamIsCapturing");
  return status != 0;
}

// A stream of our own: what it carries is done at once even while another stream is being captured.
class SideStream {
 public:
  SideStream() { check(api().create_stream(&stream_, driver::kStreamNonBlocking), "cuStreamCreate"); }
  ~SideStream() { api().destroy_stream(stream_); }
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;
  operator driver::Stream() const { return stream_; }

 private:
  driver::Stream stream_ = nullptr;
};

// A block of device memory, and the pinned memory through which it is filled.
class Upload {
 public:
  Upload() = default;
  Upload(const Upload&) = delete;
  Upload& operator=(const Upload&) = delete;
  ~Upload() {
    for (Staging& staging : ring_) discard(staging);
    if (device_ != 0) api().release(device_);
  }

  driver::Pointer device() const { return device_; }

  // In the order of the stream, which is not being captured.
  void send(const void* data, size_t bytes, driver::Stream stream) {
    if (bytes == 0) return;
    reserve(bytes);
    Staging& staging = ring_[next_++ % kStagingBuffers];
    grow(staging, bytes);
    check(api().wait_event(staging.read), "cuEventSynchronize");
    std::memcpy(staging.host, data, bytes);
    check(api().copy_to_device(device_, staging.host, bytes, stream), "cuMemcpyHtoDAsync");
    check(api().record_event(staging.read, stream), "cuEventRecord");
  }

  // At once, even during a capture.
  void fill(const void* data, size_t bytes) {
    const RelaxedCapture relaxed;
    const SideStream side;
    send(data, bytes, side);
    check(api().wait_stream(side), "cuStreamSynchronize");
  }

 private:
  void reserve(size_t bytes) {
    if (bytes <= bytes_) return;
    const size_t room = std::max(bytes, 2 * bytes_);
    bytes_ = 0;  // where there is no memory, the next step tries again
    if (device_ != 0) check(api().release(std::exchange(device_, 0)), "cuMemFree");  // waits until nothing uses it
    check(api().allocate(&device_, room), "cuMemAlloc");
    bytes_ = room;
  }

  static void grow(Staging& staging, size_t bytes) {
    if (staging.read == nullptr) check(api().create_event(&staging.read, driver::kEventDisableTiming), "cuEventCreate");
    if (bytes <= staging.bytes) return;
    staging.bytes = 0;
    if (staging.host != nullptr) {
      check(api().wait_event(staging.read), "cuEventSynchronize");
      check(api().release_host(std::exchange(staging.host, nullptr)), "cuMemFreeHost");
    }
    check(api().allocate_host(&staging.host, bytes, 0), "cuMemHostAlloc");
    staging.bytes = bytes;
  }

  static void discard(Staging& staging) {
    if (staging.read != nullptr) {
      api().wait_event(staging.read);
      api().destroy_event(staging.read);
    }
    if (staging.host != nullptr) api().release_host(staging.host);
  }

  driver::Pointer device_ = 0;
  size_t bytes_ = 0;
  Staging ring_[kStagingBuffers];
  size_t next_ = 0;
};

// Columns packed one behind the other, each aligned.
class Packer {
 public:
  template <class T>
  size_t add(const std::vector<T>& column) {
    const size_t at = (bytes_.size() + kAlignment - 1) / kAlignment * kAlignment;
    bytes_.resize(at + column.size() * sizeof(T));
    if (!column.empty()) std::memcpy(bytes_.data() + at, column.data(), column.size() * sizeof(T));
    return at;
  }
  const std::vector<unsigned char>& bytes() const { return bytes_; }

 private:
  std::vector<unsigned char> bytes_;
};

template <class T>
const T* device_pointer(driver::Pointer base, size_t offset) {
  return reinterpret_cast<const T*>(base + offset);
}

}  // namespace

// How large a chunk may be, in elements. With fewer, what all blocks work on lies closer together, which memory is
// faster at; with more, less of the time goes into preparing chunks, of which 16-bit vectors leave less
// (docs/performance.md).
static i64 most_elements(int variant) {
#define FUSEDOPT_MOST(name, param, state, features) Variant<param, state, features>::kWidth == 4 ? 8192 : 32768,
  static constexpr i64 most[] = {FUSEDOPT_VARIANTS(FUSEDOPT_MOST)};
#undef FUSEDOPT_MOST
  return most[variant];
}

// Nothing is joined where there is only the update: then a thread of every block may have one vector of 4.
i64 least_elements(HostTable& table) {
#define FUSEDOPT_LEAST(name, param, state, features) \
  std::min<i64>(kLeaf, Variant<param, state, features>::kWidth * kBlockThreads),
  static constexpr i64 least[] = {FUSEDOPT_VARIANTS(FUSEDOPT_LEAST)};
#undef FUSEDOPT_LEAST
  return table.phase().flags != 0 ? kLeaf : least[table.variant()];
}

void fill_teams(const HostTable& table, KernelParams& params) {
  params.large_chunks = table.phase().has(kReports) ? u32(table.chunks().size()) : table.teams().large_chunks;
  params.late_count = u32(table.teams().late_rows.size());
  params.late_rows = table.teams().late_rows.data();
}

void fill_inline_columns(const HostTable& table, KernelParams& params) {
  if (table.groups() <= u64(kInlineGroups)) {
    params.inline_groups = u32(table.groups());
    std::copy(table.group_rows().begin(), table.group_rows().end(), params.groups);
  }
  if (table.rows() <= u64(kInlineGrads)) {
    params.inline_grads = u32(table.rows());
    for (u64 row = 0; row < table.rows(); ++row) params.grads[row] = table.slot(kGrad, row);
  }
}

std::string cuda_unavailable(int device) {
  if (kDeviceImageCount == 0) return std::string("this build has no device code (") + kDeviceCompiler + ")";
  const std::string why = driver::why_unavailable();
  if (!why.empty() || device < 0) return why;
  driver::Device handle = 0;
  check(api().device_get(&handle, device), "cuDeviceGet");
  const int architecture = architecture_of(handle);
  for (const std::string& stem : rule_names()) {
    const DeviceImage* const image = best_image(stem, architecture);
    if (image == nullptr) return no_image(architecture);
    if (is_too_new(*image)) return too_new_image();
  }
  return "";
}

// What a captured launch reads from device memory beside the table. A graph is replayed after the host has moved on, so
// all of it stays as it was until update_captures().
struct Capture {
  Upload groups;
  Upload grads;
  size_t group_count = 0;
  std::vector<u64> addresses;  // of all slots, when it was captured
};

struct CudaLaunch::State {
  explicit State(int device) : gpu(Gpu::get(device)) {}

  Gpu& gpu;
  std::unique_ptr<Upload> table = std::make_unique<Upload>();
  Upload grads, groups, arrivals;
  std::vector<std::unique_ptr<Capture>> captures;
  std::vector<std::unique_ptr<Upload>> captured_tables;  // those that have been replaced since
  bool table_is_captured = false;
  KernelParams params{};
  u64 revision = 0;
  std::vector<u64> sent_grads;
  std::vector<GroupRow> sent_groups;
  bool has_arrivals = false;
  driver::Event finished = nullptr;  // the last launch
  driver::Stream last_stream = nullptr;

  // Before anything that a capture forbids, as to load the kernels is. In the words of fusedopt/lasting.py.
  void refuse_unknown(const HostTable& host) const {
    if (revision != host.revision())
      throw std::runtime_error(
          "the optimizer's tensors, or what a step does with them, changed since its last step: run one step like it "
          "before the capture");
  }

  void send_table(HostTable& host, driver::Stream stream) {
    if (revision == host.revision()) return;
    if (table_is_captured) {
      captured_tables.push_back(std::move(table));
      table = std::make_unique<Upload>();
      table_is_captured = false;
    }
    Packer packer;
    const LaunchParams here = host.params(nullptr, nullptr);  // packs the layouts
    const size_t address = packer.add(host.addresses());
    const size_t numel = packer.add(host.numels());
    const size_t group = packer.add(host.group_of());
    const size_t storage = packer.add(host.storages());
    const size_t layout = packer.add(host.layout_of());
    const size_t layouts = packer.add(host.layouts());
    const size_t chunks = packer.add(host.chunks());
    const size_t first_leaf = packer.add(host.first_leaf());
    const size_t part_leaf = packer.add(host.part_leaf());
    const size_t late_rows = packer.add(host.teams().late_rows);
    table->send(packer.bytes().data(), packer.bytes().size(), stream);
    const driver::Pointer base = table->device();
    params.launch = here;
    params.launch.table = {host.rows(),
                           device_pointer<u64>(base, address),
                           device_pointer<i64>(base, numel),
                           device_pointer<u32>(base, group),
                           device_pointer<u64>(base, storage),
                           device_pointer<i32>(base, layout),
                           device_pointer<i64>(base, layouts),
                           device_pointer<u64>(base, first_leaf),
                           host.leaves(),
                           device_pointer<u64>(base, part_leaf),
                           here.table.parts};
    params.launch.chunks = device_pointer<Chunk>(base, chunks);
    fill_teams(host, params);
    params.late_rows = device_pointer<u32>(base, late_rows);
    revision = host.revision();
  }

  // What changes from step to step rides in the launch where it fits.
  void send_step(const HostTable& host, driver::Stream stream) {
    params.inline_groups = params.inline_grads = 0;
    fill_inline_columns(host, params);
    if (params.inline_groups == 0) send_groups(host, stream);
    if (params.inline_grads == 0) send_grads(host, stream);
  }

  // A graph must be able to see later values of the groups, so they lie in device memory even where they would fit.
  void capture_step(const HostTable& host) {
    const RelaxedCapture relaxed;  // without memory for all of it the rest is freed, which is forbidden too
    auto capture = std::make_unique<Capture>();
    const std::vector<GroupRow>& now = host.group_rows();
    capture->groups.fill(now.data(), now.size() * sizeof(GroupRow));
    capture->group_count = now.size();
    capture->addresses = host.addresses();
    params.inline_groups = params.inline_grads = 0;
    fill_inline_columns(host, params);
    params.inline_groups = 0;
    params.launch.groups = device_pointer<GroupRow>(capture->groups.device(), 0);
    if (params.inline_grads == 0) {
      capture->grads.fill(grads_of(host), host.rows() * sizeof(u64));
      params.launch.grads = device_pointer<u64>(capture->grads.device(), 0);
    }
    captures.push_back(std::move(capture));
    table_is_captured = true;
  }

  static const u64* grads_of(const HostTable& host) { return host.addresses().data() + u64(kGrad) * host.rows(); }

  void send_groups(const HostTable& host, driver::Stream stream) {
    const std::vector<GroupRow>& now = host.group_rows();
    const bool same = now.size() == sent_groups.size() &&
                      std::memcmp(now.data(), sent_groups.data(), now.size() * sizeof(GroupRow)) == 0;
    if (!same) groups.send(now.data(), now.size() * sizeof(GroupRow), stream);
    sent_groups = now;
    params.launch.groups = device_pointer<GroupRow>(groups.device(), 0);
  }

  void send_grads(const HostTable& host, driver::Stream stream) {
    const u64* const now = grads_of(host);
    const bool same = sent_grads.size() == host.rows() && std::equal(sent_grads.begin(), sent_grads.end(), now);
    if (!same) grads.send(now, host.rows() * sizeof(u64), stream);
    sent_grads.assign(now, now + host.rows());
    params.launch.grads = device_pointer<u64>(grads.device(), 0);
  }

  void send_arrivals(driver::Stream stream) {
    if (has_arrivals) return;
    const u32 zero[2] = {};  // and the grid barrier's counter
    arrivals.send(zero, sizeof(zero), stream);
    has_arrivals = true;
  }

  // All that a launch reads. Where some of it fails, no table, groups or gradients are there.
  void send(HostTable& host, driver::Stream stream) {
    try {
      send_table(host, stream);
      send_step(host, stream);
      send_arrivals(stream);
    } catch (...) {
      revision = 0;
      sent_groups.clear();
      sent_grads.clear();
      mark_last(stream);
      throw;
    }
  }

  // What is queued up to here comes before the next launch on another stream.
  driver::Result mark_last(driver::Stream stream) {
    last_stream = stream;
    return api().record_event(finished, stream);
  }

  // Another stream must not overtake the last launch, which reads the table that this one may rewrite.
  void order_after_last_launch(driver::Stream stream, bool capturing) {
    if (finished == nullptr) {
      check(api().create_event(&finished, driver::kEventDisableTiming), "cuEventCreate");
      return;
    }
    if (stream != last_stream && !capturing) check(api().stream_wait_event(stream, finished, 0), "cuStreamWaitEvent");
  }
};

CudaLaunch::CudaLaunch(int device) : state_(new State(device)) {}

CudaLaunch::~CudaLaunch() {
  const driver::Context context = state_->gpu.context();
  driver::Context popped;
  if (api().push_context(context) != 0) return;  // the process is ending
  const RelaxedCapture relaxed;                  // the collector may come to it while a graph captures
  if (state_->finished != nullptr) {
    api().wait_event(state_->finished);
    api().destroy_event(state_->finished);
  }
  state_.reset();
  api().pop_context(&popped);
}

int CudaLaunch::architecture() const { return state_->gpu.architecture(); }

void CudaLaunch::launch(HostTable& host, u64 stream_handle, u64 grad_scale, u64 found_inf) {
  State& state = *state_;
  const driver::CurrentContext current(state.gpu.context());
  const RelaxedCapture relaxed;  // another thread may capture in the default mode: no thread must make memory then
  const driver::Stream stream = reinterpret_cast<driver::Stream>(stream_handle);
  const bool capturing = is_capturing(stream);
  if (capturing) state.refuse_unknown(host);
  const Gpu::Kernel& kernel = state.gpu.kernel(host.rule(), host.variant());
  host.plan(kernel.blocks, least_elements(host), most_elements(host.variant()), kSmallTensor);
  if (host.chunks().empty() && host.rows() == 0) return;
  state.order_after_last_launch(stream, capturing);
  if (capturing) {
    state.refuse_unknown(host);
    state.capture_step(host);
  } else {
    state.send(host, stream);
  }
  state.params.launch.chunk_count = u32(host.chunks().size());
  state.params.launch.chunk_elements = host.chunk_elements();
  state.params.launch.grad_scale = reinterpret_cast<const float*>(grad_scale);
  state.params.launch.found_inf = reinterpret_cast<const float*>(found_inf);
  state.params.launch.phase = host.phase();
  state.params.launch.arrivals = reinterpret_cast<u32*>(state.arrivals.device());
  const i64 small_chunks = i64(host.chunks().size()) - state.params.large_chunks;
  constexpr i64 kTeams = kBlockThreads / device::kWarpThreads;
  const i64 wanted = state.params.large_chunks + (small_chunks + kTeams - 1) / kTeams;
  const unsigned blocks = unsigned(std::clamp<i64>(wanted, 1, kernel.blocks));
  void* arguments[] = {&state.params};
  driver::Result launched = 0;
  if (host.phase().measures())  // a barrier of the whole grid, which the occupancy query has bounded
    launched = api().launch_cooperative(kernel.function, blocks, 1, 1, kBlockThreads, 1, 1, 0, stream, arguments);
  else
    launched = api().launch(kernel.function, blocks, 1, 1, kBlockThreads, 1, 1, 0, stream, arguments, nullptr);
  const driver::Result marked = capturing ? 0 : state.mark_last(stream);
  check(launched, host.phase().measures() ? "cuLaunchCooperativeKernel" : "cuLaunchKernel");
  check(marked, "cuEventRecord");
}

size_t CudaLaunch::captures() const { return state_->captures.size(); }

void CudaLaunch::update_captures(const HostTable& host, u64 stream_handle) {
  const driver::CurrentContext current(state_->gpu.context());
  const RelaxedCapture relaxed;
  const driver::Stream stream = reinterpret_cast<driver::Stream>(stream_handle);
  if (is_capturing(stream)) throw std::runtime_error("hyperparameters can not be given to a graph during a capture");
  const std::vector<GroupRow>& now = host.group_rows();
  for (const std::unique_ptr<Capture>& capture : state_->captures)
    if (capture->group_count != now.size())
      throw std::runtime_error("the optimizer had " + std::to_string(capture->group_count) +
                               " parameter groups at the capture and has " + std::to_string(now.size()) +
                               " now: capture again");
  for (const std::unique_ptr<Capture>& capture : state_->captures)
    capture->groups.send(now.data(), now.size() * sizeof(GroupRow), stream);
}

std::vector<u64> CudaLaunch::moved_since_captures(const HostTable& host) const {
  const std::vector<u64>& now = host.addresses();
  std::vector<u64> moved;
  for (u64 row = 0; row < host.rows(); ++row) {
    const auto knows = [&](const std::unique_ptr<Capture>& capture) {
      if (capture->addresses.size() != now.size()) return false;
      for (u64 s = 0; s < u64(kSlots); ++s)
        if (capture->addresses[s * host.rows() + row] != now[s * host.rows() + row]) return false;
      return true;
    };
    if (std::none_of(state_->captures.begin(), state_->captures.end(), knows)) moved.push_back(row);
  }
  return moved;
}

}  // namespace fusedopt
