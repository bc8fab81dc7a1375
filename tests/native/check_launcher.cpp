// The CUDA launcher over a driver that works late and runs kernels on the emulator (host_driver.h): whatever changes
// between launches, on whatever stream they are, captured or not, the bits are those of the CPU engine. What the
// launcher frees or reuses too early is seen by the sanitizers or by the bits. Usage: check_launcher <seed> <tables>
#include <exception>
#include <functional>

#include "cuda/launcher.h"
#include "host_driver.h"
#include "random_table.h"

using namespace fusedopt;
using namespace fusedopt::test;

namespace {

// What happens to an optimizer, and to the table that is kept of it.
struct Event {
  enum Kind { kStep, kOtherRate, kGradient, kOtherRow, kCapture, kSync, kReplay } kind;
  u64 index = 0;  // of a group, of a row or of a stream
  double rate = 0.0;
};

// The part of a table that changes from step to step.
struct Moment {
  std::vector<GroupRow> groups;
  std::vector<u64> grads;

  explicit Moment(const HostTable& host) : groups(host.group_rows()) {
    for (u64 row = 0; row < host.rows(); ++row) grads.push_back(host.slot(kGrad, row));
  }
  void apply(HostTable& host) const {
    for (u64 g = 0; g < groups.size(); ++g) host.group(g) = groups[g];
    for (u64 row = 0; row < grads.size(); ++row) host.set_grad(row, grads[row]);
  }
};

std::vector<Event> random_events(Random& random, const RandomTable& table) {
  std::vector<Event> events = {{Event::kStep}};
  bool is_captured = false;
  for (int k = 0; k < 14; ++k) {
    const Event::Kind kind = Event::Kind(random.below(Event::kReplay + 1));
    if ((kind == Event::kSync || kind == Event::kReplay) && !is_captured) continue;
    const u64 most = kind == Event::kOtherRate ? table.host.groups() : kind == Event::kStep ? 2 : table.host.rows();
    const Event event{kind, u64(random.below(i64(most))), random.uniform(0, 0.25)};
    // A capture, and a graph that is given other numbers, want a table that has been sent.
    if (kind == Event::kCapture || kind == Event::kSync) events.push_back({Event::kStep});
    events.push_back(event);
    is_captured = is_captured || kind == Event::kCapture;
  }
  return events;
}

u64 number_of(const void* pointer) { return u64(reinterpret_cast<std::uintptr_t>(pointer)); }

// What both ways of taking steps do alike. `grads`: where every row's gradient lies when it has one.
void change(RandomTable& table, const Event& event, const std::vector<u64>& grads) {
  HostTable& host = table.host;
  if (event.kind == Event::kOtherRate) host.group(event.index).hypers.value[0] = event.rate;
  if (event.kind == Event::kGradient)
    host.set_grad(event.index, host.slot(kGrad, event.index) ? 0 : grads[event.index]);
  if (event.kind == Event::kOtherRow) host.set_parts({0});  // a table that has to be sent anew
}

// By the CPU engine: a graph is the moment of its capture, with the rates that it was given since.
void take_plainly(RandomTable& table, const std::vector<Event>& events) {
  const std::vector<u64> grads = Moment(table.host).grads;
  std::vector<Moment> graphs;
  for (const Event& event : events) {
    change(table, event, grads);
    if (event.kind == Event::kStep) run_plainly(table);
    if (event.kind == Event::kCapture) graphs.emplace_back(table.host);
    if (event.kind == Event::kSync)
      for (Moment& graph : graphs) graph.groups = table.host.group_rows();
    if (event.kind != Event::kReplay) continue;
    const Moment now(table.host);
    for (const Moment& graph : graphs) {
      graph.apply(table.host);
      run_plainly(table);
    }
    now.apply(table.host);
  }
}

void take_by_launches(RandomTable& table, const std::vector<Event>& events, const driver::Stream (&streams)[2]) {
  const std::vector<u64> grads = Moment(table.host).grads;
  std::vector<host::Graph> graphs;
  CudaLaunch cuda(0);
  const auto launch = [&](driver::Stream stream) {
    cuda.launch(table.host, number_of(stream), number_of(table.grad_scale.get()), number_of(table.found_inf.get()));
  };
  for (const Event& event : events) {
    change(table, event, grads);
    if (event.kind == Event::kStep) launch(streams[event.index]);
    if (event.kind == Event::kSync) cuda.update_captures(table.host, number_of(streams[0]));
    if (event.kind == Event::kCapture) {
      host::begin_capture(streams[0]);
      launch(streams[0]);
      graphs.push_back(host::end_capture(streams[0]));
    }
    if (event.kind != Event::kReplay) continue;
    host::synchronize();  // the order of replays and steps is the caller's affair
    for (const host::Graph& graph : graphs) host::replay(graph, streams[0]);
    host::synchronize();
  }
  host::synchronize();
  if (cuda.captures() != graphs.size()) fail("not every capture was counted");
}

void expect_refusal(const std::string& words, const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception& error) {
    if (std::string(error.what()).find(words) != std::string::npos) return;
    fail("refused in other words: " + std::string(error.what()));
  }
  fail("not refused: " + words);
}

void check_refusals(driver::Stream stream) {
  Random random(1);
  RandomTable table(random, "adam", {5});
  const u64 number = number_of(stream);
  CudaLaunch cuda(0);
  host::begin_capture(stream);
  expect_refusal("run one step like it before the capture", [&] { cuda.launch(table.host, number, 0, 0); });
  expect_refusal("during a capture", [&] { cuda.update_captures(table.host, number); });
  host::end_capture(stream);
  cuda.launch(table.host, number, 0, 0);
  host::begin_capture(stream);
  cuda.launch(table.host, number, 0, 0);
  host::end_capture(stream);
  if (!cuda.moved_since_captures(table.host).empty()) fail("a row moved though none did");
  table.host.set_grad(0, table.host.slot(kGrad, 0) ? 0 : 64);
  if (cuda.moved_since_captures(table.host) != std::vector<u64>{0}) fail("a row's gradient moved unnoticed");
  table.host.resize_groups(table.host.groups() + 1);
  expect_refusal("capture again", [&] { cuda.update_captures(table.host, number); });
  host::begin_capture(stream);
  {
    CudaLaunch collected(0);
  }  // by the garbage collector, say
  host::end_capture(stream);
}

// Takes the events both ways.
void compare(RandomTable& table, const std::vector<Event>& events, const driver::Stream (&streams)[2], u64 seed) {
  const Contents before = table.contents();
  const Moment start(table.host);
  take_plainly(table, events);
  const Contents expected = table.contents();
  table.restore(before);
  start.apply(table.host);
  try {
    take_by_launches(table, events, streams);
  } catch (const std::exception& error) {
    fail("seed " + std::to_string(seed) + ": " + error.what());
  }
  const std::string difference = table.difference(expected);
  if (!difference.empty()) fail("seed " + std::to_string(seed) + ": " + difference);
  if (host::blocks_of_memory() != 0) fail("device memory was not freed");
}

// One step on a device, and what it leaves.
void expect_step(CudaLaunch& cuda, RandomTable& table, driver::Stream stream, const char* when) {
  const Contents before = table.contents();
  run_plainly(table);
  const Contents expected = table.contents();
  table.restore(before);
  cuda.launch(table.host, number_of(stream), number_of(table.grad_scale.get()), number_of(table.found_inf.get()));
  host::synchronize();
  const std::string difference = table.difference(expected);
  if (!difference.empty()) fail(std::string(when) + ": " + difference);
}

// A launch for some part of which there was no memory has changed nothing, and the next one, over tensors that fit or
// over these, is whole.
void check_want_of_memory(driver::Stream stream) {
  Random random(3);
  RandomTable small(random, "adam", std::vector<i64>(size_t(kInlineGrads) + 1, 1));
  RandomTable large(random, "adam", std::vector<i64>(3 * size_t(kInlineGrads), 1));
  for (u64 k = 0, left = 0; left == 0; ++k) {
    CudaLaunch cuda(0);
    expect_step(cuda, small, stream, "with memory");
    const Contents before = large.contents();
    const auto launch = [&] { cuda.launch(large.host, number_of(stream), 0, 0); };
    host::limit_memory(k);
    for (int again = 0; again < 2 && left == 0; ++again) {
      try {
        launch();
        left = 1;
      } catch (const driver::OutOfMemory&) {
        if (!large.difference(before).empty()) fail("a step for which there was no memory has changed something");
      }
    }
    host::limit_memory(host::kPlenty);
    host::synchronize();
    large.restore(before);
    expect_step(cuda, small, stream, "after a table that there was no room for");
    expect_step(cuda, large, stream, "with room for it");
  }
}

// Nor is a capture lost by a step for which there was no memory.
void check_want_of_memory_in_captures(driver::Stream stream) {
  Random random(8);
  RandomTable table(random, "adam", std::vector<i64>(size_t(kInlineGrads) + 1, 1));
  u64 refused = 0;
  for (u64 k = 0; refused == k; ++k) {
    CudaLaunch cuda(0);
    expect_step(cuda, table, stream, "with memory");
    host::begin_capture(stream);
    host::limit_memory(k);
    try {
      cuda.launch(table.host, number_of(stream), 0, 0);
    } catch (const driver::OutOfMemory&) {
      ++refused;
    }
    host::limit_memory(host::kPlenty);
    host::end_capture(stream);
    if (cuda.captures() != (refused == k ? 1 : 0)) fail("a step that was not captured counts as one");
  }
  if (refused != 4) fail("the groups and the gradients of a capture have memory of two kinds each");
  if (host::blocks_of_memory() != 0) fail("what a capture without memory had of it was not freed");
}

// Chunks are listed where they can not be worked out: a tensor among empty ones, whose steps count too.
void check_empty_tensors(driver::Stream stream) {
  const std::vector<std::vector<i64>> tables = {{9000}, {9000, 0, 0}, {0, 9000}, {5, 0, 3000}, {5, 3000}, {0}};
  for (const std::vector<i64>& numels : tables) {
    Random random(6);
    RandomTable table(random, "adam", numels);
    CudaLaunch cuda(0);
    for (int k = 0; k < 2; ++k) expect_step(cuda, table, stream, "among empty tensors");
  }
}

// Of the tables that follow a captured one, each takes the place of the one before.
void check_replaced_tables(driver::Stream stream) {
  Random random(4);
  RandomTable table(random, "sgd", {5, 3000});
  CudaLaunch cuda(0);
  std::vector<std::size_t> blocks;
  expect_step(cuda, table, stream, "before the capture");
  host::begin_capture(stream);
  cuda.launch(table.host, number_of(stream), 0, 0);
  host::end_capture(stream);
  for (int k = 0; k < 3; ++k) {
    table.host.set_parts({0});  // to be sent anew
    expect_step(cuda, table, stream, "after the capture");
    blocks.push_back(host::blocks_of_memory());
  }
  if (blocks.front() != blocks.back()) fail("tables that no graph reads are kept");
}

// A GPU that takes no cubin takes PTX. Its modules are loaded once in a process: it is one that nothing else uses.
void check_without_cubins(driver::Stream stream) {
  Random random(5);
  RandomTable table(random, "adam", {5});
  host::refuse_cubins(true);
  CudaLaunch cuda(1);
  expect_step(cuda, table, stream, "by PTX");
  host::refuse_cubins(false);
}

// More copies in a row than there is pinned memory for, before the first of them is made.
void check_late_copies(const driver::Stream (&streams)[2]) {
  Random random(2);
  RandomTable table(random, "adam", std::vector<i64>(size_t(kInlineGrads) + 1, 1));
  std::vector<Event> events = {{Event::kStep}};
  for (u64 row = 0; row < 8; ++row) {
    events.push_back({Event::kGradient, row});
    events.push_back({Event::kStep});
  }
  host::put_off(true);
  compare(table, events, streams, 2);
  host::put_off(false);
}

}  // namespace

int main(int argc, char** argv) {
  const u64 seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  const int tables = argc > 2 ? std::atoi(argv[2]) : 100;
  const driver::Stream streams[2] = {host::make_stream(), host::make_stream()};
  check_refusals(streams[0]);
  check_late_copies(streams);
  check_want_of_memory(streams[0]);
  check_want_of_memory_in_captures(streams[0]);
  check_empty_tensors(streams[0]);
  check_replaced_tables(streams[0]);
  check_without_cubins(streams[0]);
  u64 events_taken = 0;
  for (int k = 0; k < tables; ++k) {
    Random random(seed + u64(k));
    // Few tensors around every edge, or more than ride in a launch.
    std::vector<i64> numels(size_t(random.chance(20) ? kInlineGrads + random.below(3) : random.below(12) + 1));
    for (i64& numel : numels) numel = numels.size() > 12 ? random.below(4) : random.below(2 * kLeaf);
    RandomTable table(random, random.pick(rule_names()), numels);
    const std::vector<Event> events = random_events(random, table);
    events_taken += events.size();
    compare(table, events, streams, seed + u64(k));
  }
  for (driver::Stream stream : streams) driver::api().destroy_stream(stream);
  std::printf("%d tables, %llu events: the launcher gives the bits of the CPU engine\n", tables, events_taken);
  return 0;
}
