// A CUDA driver whose GPU is this program's memory and whose kernels the emulator runs: stands for cuda/driver.cpp.
#include "host_driver.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>

#include "cuda/emulated.h"
#include "cuda/images.h"
#include "cuda/kernel.h"
#include "host_table.h"

namespace fusedopt {

// Images of each rule that are nothing but its name, of a cubin behind a mark.
constexpr char kCubinMark = '!';
const unsigned char kSgd[] = "sgd", kAdam[] = "adam", kSgdCubin[] = "!sgd", kAdamCubin[] = "!adam";
extern const DeviceImage kDeviceImages[] = {{"sgd", 90, false, kSgdCubin, sizeof kSgdCubin},
                                            {"adam", 90, false, kAdamCubin, sizeof kAdamCubin},
                                            {"sgd", 80, true, kSgd, sizeof kSgd},
                                            {"adam", 80, true, kAdam, sizeof kAdam}};
extern const std::size_t kDeviceImageCount = 4;
extern const char kDeviceCompiler[] = "none: a test program";
extern const char kHostCompiler[] = "";
extern const char kBuildArchs[] = "90";

namespace driver {

// A kernel that was looked up; never freed.
struct FunctionTag {
  int rule, variant;
};

// What is queued on a stream: a copy, a kernel, a mark that an event waits for, or a wait for such a mark.
struct Work {
  enum Kind { kCopy, kKernel, kMark, kWait } kind;
  Pointer to = 0;
  const void* from = nullptr;
  std::size_t bytes = 0;
  FunctionTag* function = nullptr;
  KernelParams params{};
  EmulatedGrid grid{};
  Event event = nullptr;
  u64 mark = 0;
};

struct StreamTag {
  std::vector<Work> queued;
  bool is_capturing = false;
  bool is_lost = false;  // what it captures
  host::Graph graph;
};

struct EventTag {
  u64 recorded = 0, reached = 0;
};

namespace {

constexpr Result kRefused = 900;  // CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
constexpr int kCaptureGlobal = 0;

std::mt19937_64 chance(7);
std::set<Stream> streams;
std::map<void*, std::size_t> device_memory;
int capture_mode = kCaptureGlobal;
bool puts_off_everything = false;
u64 allocations_left = host::kPlenty;
bool refuses_cubins = false;

bool is_any_capturing() {
  for (Stream stream : streams)
    if (stream->is_capturing) return true;
  return false;
}

// What a thread may not do while anything is captured, unless it has said that it knows: the capture is lost by it.
bool is_forbidden() {
  if (capture_mode == kCaptureRelaxed || !is_any_capturing()) return false;
  for (Stream stream : streams) stream->is_lost = stream->is_capturing;
  return true;
}

void run(const Work& work) {
  if (work.kind == Work::kCopy) std::memcpy(reinterpret_cast<void*>(work.to), work.from, work.bytes);
  if (work.kind == Work::kMark) work.event->reached = work.mark;
  if (work.kind == Work::kKernel)
    run_emulated(emulated_kernel(work.function->rule, work.function->variant), work.params, work.grid);
}

// The next work of a stream; false where there is none, or where it has to wait.
bool advance(Stream stream) {
  if (stream->queued.empty()) return false;
  const Work work = stream->queued.front();
  if (work.kind == Work::kWait && work.event->reached < work.mark) return false;
  stream->queued.erase(stream->queued.begin());
  run(work);
  return true;
}

// A GPU gets on with its work whenever it likes.
void pass_time() {
  if (puts_off_everything) return;
  for (Stream stream : streams)
    while (chance() % 3 == 0 && advance(stream)) {
    }
}

Result queue(Stream stream, Work work) {
  if (stream->is_capturing && work.kind != Work::kKernel) return kRefused;
  if (stream->is_capturing)
    stream->graph.push_back(std::make_shared<Work>(work));
  else
    stream->queued.push_back(work);
  pass_time();
  return 0;
}

Result launch_kernel(Function function, unsigned blocks, unsigned threads, Stream stream, void** arguments,
                     bool is_cooperative) {
  Work work{Work::kKernel};
  work.function = function;
  work.params = *static_cast<const KernelParams*>(arguments[0]);
  work.grid = {u32(blocks), int(threads), chance(), is_cooperative};
  return queue(stream, work);
}

Api make_api() {
  Api made;
  made.init = [](unsigned) { return 0; };
  made.error_string = [](Result, const char** words) {
    *words = "refused by the driver of the tests";
    return 0;
  };
  made.version = [](int* version) { return *version = 13000, 0; };
  made.device_count = [](int* count) { return *count = 1, 0; };
  made.device_get = [](Device* device, int index) { return *device = index, 0; };
  made.device_attribute = [](int* value, int which, Device) {
    *value = which == kCapabilityMajor ? 9 : which == kCapabilityMinor ? 0 : 3;  // multiprocessors
    return 0;
  };
  made.primary_context = [](Context* context, Device) { return *context = nullptr, 0; };
  made.push_context = [](Context) { return 0; };
  made.pop_context = [](Context* context) { return *context = nullptr, 0; };
  made.load_module = [](Module* module, const void* data) {
    if (is_forbidden()) return kRefused;
    const char* const name = static_cast<const char*>(data);
    const bool is_cubin = *name == kCubinMark;
    if (is_cubin && refuses_cubins) return kNoBinary;
    *module = reinterpret_cast<Module>(const_cast<char*>(name + is_cubin));
    return 0;
  };
  made.get_function = [](Function* function, Module module, const char* name) {
    const std::string stem = reinterpret_cast<const char*>(module);
    for (std::size_t variant = 0; variant < variant_names().size(); ++variant)
      if (name == "fusedopt_" + stem + "_" + variant_names()[variant]) {
        *function = new FunctionTag{rule_index(stem), int(variant)};
        return 0;
      }
    return 500;  // CUDA_ERROR_NOT_FOUND
  };
  made.occupancy = [](int* blocks, Function, int, std::size_t) { return *blocks = 2, 0; };
  made.launch = [](Function function, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned,
                   unsigned, Stream stream, void** arguments,
                   void**) { return launch_kernel(function, blocks, threads, stream, arguments, false); };
  made.launch_cooperative = [](Function function, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned,
                               unsigned, unsigned, Stream stream, void** arguments) {
    return launch_kernel(function, blocks, threads, stream, arguments, true);
  };
  made.allocate = [](Pointer* pointer, std::size_t bytes) {
    if (is_forbidden()) return kRefused;
    if (allocations_left == 0) return kOutOfMemory;
    --allocations_left;
    void* const memory = std::malloc(bytes);
    std::memset(memory, 0xEE, bytes);
    device_memory[memory] = bytes;
    *pointer = reinterpret_cast<Pointer>(memory);
    return 0;
  };
  made.release = [](Pointer pointer) {
    if (is_forbidden()) return kRefused;
    host::synchronize();
    void* const memory = reinterpret_cast<void*>(pointer);
    device_memory.erase(memory);
    std::free(memory);
    return 0;
  };
  made.allocate_host = [](void** memory, std::size_t bytes, unsigned) {
    if (is_forbidden()) return kRefused;
    if (allocations_left == 0) return kOutOfMemory;
    --allocations_left;
    *memory = std::malloc(bytes);
    return 0;
  };
  made.release_host = [](void* memory) {
    if (is_forbidden()) return kRefused;
    host::synchronize();
    std::free(memory);
    return 0;
  };
  made.copy_to_device = [](Pointer to, const void* from, std::size_t bytes, Stream stream) {
    Work work{Work::kCopy};
    work.to = to;
    work.from = from;
    work.bytes = bytes;
    return queue(stream, work);
  };
  made.create_event = [](Event* event, unsigned) { return *event = new EventTag, 0; };
  made.destroy_event = [](Event event) {
    host::synchronize();
    delete event;
    return 0;
  };
  made.record_event = [](Event event, Stream stream) {
    Work work{Work::kMark};
    work.event = event;
    work.mark = ++event->recorded;
    return queue(stream, work);
  };
  made.wait_event = [](Event event) {
    if (is_forbidden()) return kRefused;
    while (event->reached < event->recorded)
      for (Stream stream : streams) advance(stream);
    return 0;
  };
  made.create_stream = [](Stream* stream, unsigned) {
    streams.insert(*stream = new StreamTag);
    return 0;
  };
  made.destroy_stream = [](Stream stream) {
    while (advance(stream)) {
    }
    streams.erase(stream);
    delete stream;
    return 0;
  };
  made.wait_stream = [](Stream stream) {
    if (is_forbidden()) return kRefused;
    while (!stream->queued.empty())
      for (Stream each : streams) advance(each);
    return 0;
  };
  made.stream_wait_event = [](Stream stream, Event event, unsigned) {
    Work work{Work::kWait};
    work.event = event;
    work.mark = event->recorded;
    return queue(stream, work);
  };
  made.is_capturing = [](Stream stream, int* status) { return *status = stream->is_capturing, 0; };
  made.exchange_capture_mode = [](int* mode) { return std::swap(*mode, capture_mode), 0; };
  return made;
}

}  // namespace

const Api& api() {
  static const Api made = make_api();
  return made;
}

std::string why_unavailable() { return ""; }

void check(Result result, const char* what) {
  const std::string text = std::string(what) + " failed: " + std::to_string(result);
  if (result == kOutOfMemory) throw OutOfMemory(text);
  if (result != 0) throw std::runtime_error(text);
}

}  // namespace driver

namespace host {

void put_off(bool everything) { driver::puts_off_everything = everything; }

void limit_memory(u64 allocations) { driver::allocations_left = allocations; }

void refuse_cubins(bool refused) { driver::refuses_cubins = refused; }

void synchronize() {
  for (bool has_more = true; has_more;) {
    has_more = false;
    for (driver::Stream stream : driver::streams) has_more = driver::advance(stream) || has_more;
  }
}

driver::Stream make_stream() {
  driver::Stream stream = nullptr;
  driver::api().create_stream(&stream, driver::kStreamNonBlocking);
  return stream;
}

void begin_capture(driver::Stream stream) {
  stream->is_capturing = true;
  stream->is_lost = false;
}

Graph end_capture(driver::Stream stream) {
  stream->is_capturing = false;
  if (stream->is_lost) throw std::runtime_error("something was called that a capture forbids");
  Graph graph;
  std::swap(graph, stream->graph);
  return graph;
}

void replay(const Graph& graph, driver::Stream stream) {
  for (const std::shared_ptr<driver::Work>& work : graph) driver::queue(stream, *work);
}

std::size_t blocks_of_memory() { return driver::device_memory.size(); }

}  // namespace host
}  // namespace fusedopt
