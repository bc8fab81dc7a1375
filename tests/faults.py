"""Small faults, as data, that `make mutate` plants in a copy of the tree: every one must be caught by some test.

A fault replaces a text that stands exactly once in its file. What can not be seen without a GPU is not here: a fence
that is missing, and an alignment that Triton's compiler is told and its interpreter ignores.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LEAST_TESTS = "not slow and not gpu"


@dataclass(frozen=True)
class Suite:
    """Tests that look for a fault: one run of pytest, the narrowest that should do.

    Attributes:
        name: how the suite is called.
        arguments: of pytest.
        environment: variables that are set for it.
        cuda: whether it looks at CUDA images, which the build then makes.
    """

    name: str
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict, hash=False)
    cuda: bool = False


INTERPRETER = {"TRITON_INTERPRET": "1", "FUSEDOPT_TEST_BACKENDS": "triton"}
# What `make test` runs of the longest modules under Triton's interpreter; all of them are among the long tests.
INTERPRETED_PARTS = {
    "blocks": "torch.float32 or finite_inverse or 256 or columns",
    "precision": "bit_for_bit or SGD or kahan",
    "phase": "not all_side_outputs or AdamW-bf16 or SGD-f64",
    "norm": "not bits_of_the_reference or Adam-all",
    "report": "f32-dense or split or fp32 or counted or several_leaves",
}


def interpreted_part(module: str) -> Suite:
    """The part of a module's tests that `make test` runs under Triton's interpreter."""
    return Suite(f"interpreted {module}", (f"tests/test_{module}.py", "-k", INTERPRETED_PARTS[module]), INTERPRETER)


BITS = Suite("bits", ("tests/test_bits.py", "-k", "not unscaled and not chunks and (emulated-3x64 or cpu-baseline-2)"))
USUAL = Suite("usual branches", ("tests/test_bits.py", "-k", "not unscaled and not chunks and (cpu-Adam or cpu-SGD)"))
UNSCALED = Suite("unscaled", ("tests/test_bits.py", "-k", "unscaled and (emulated or cpu)"))
CHUNKS = Suite("chunks", ("tests/test_bits.py", "-k", "chunks and (emulated or cpu)"))
CODECS = Suite("codecs", ("tests/test_codecs.py", "-k", "cpu or emulated"))
SIZES = Suite("sizes", ("tests/test_sizes.py", "-k", "cpu or emulated"))
LAYOUTS = Suite("layouts", ("tests/test_layouts.py", "-k", "cpu or emulated"))
STEP = Suite("step", ("tests/test_step.py", "-k", "cpu or emulated or threads or forked or mode or checkpoint"))
OVERRUNS = Suite("overruns", ("tests/test_sanitizers.py", "-k", "random_tables_plans"))
COLLECTED = Suite("collected", ("tests/contract/test_behaviours.py", "-k", "garbage"))
INFINITE = Suite("infinite parameters", ("tests/contract/test_behaviours.py", "-k", "parameters-of-+Inf"))
MOVED = Suite("moved states", ("tests/test_step.py", "-k", "other_memory"))
READ = Suite("gradients read", ("tests/test_exchange.py", "-k", "gradient"))
VERSIONS = Suite("versions", ("tests/test_step.py", "-k", "version and cpu"))
FREED = Suite("freed memory", ("tests/contract/test_bad_input.py", "-k", "freed or shrunk or memory"))
FIRST = Suite("first step", ("tests/test_first_step.py",))
COMPILED_STEP = Suite("compiled step", ("tests/contract/test_compile.py",))
CAPTURE = Suite("capture", ("tests/test_capture.py",))
LAUNCHER_RUN = Suite("launcher", ("tests/test_sanitizers.py", "-k", "launcher"))
AMP = Suite("amp", ("tests/test_amp.py", "-k", "cpu or emulated"))
FAKE_DRIVER = Suite("driver", ("tests/test_fake_driver.py",), cuda=True)
LASTING = Suite("lasting memory", ("tests/test_norm.py", "-k", "memory_that"))
TERMS = Suite("terms of a report", ("tests/test_triton_launch.py", "-k", "terms"))
THREADS = Suite("threads", ("tests/test_sanitizers.py", "-k", "share_the_team"))
BLOCKS = Suite("blocks", ("tests/test_blocks.py", "-k", "cpu or emulated"))
RANDOM = Suite("random words", ("tests/test_random.py",))
PRECISION = Suite("precision", ("tests/test_precision.py", "-k", "cpu or emulated"))
PHASE = Suite("phase", ("tests/test_phase.py", "-k", "cpu or emulated"))
PHASE_ONCE = Suite("phase, on one backend", ("tests/test_phase.py", "-k", "two_updates or torch_has_cast"))
NORM = Suite("norm", ("tests/test_norm.py", "-k", "cpu or emulated"))
REPORT = Suite("report", ("tests/test_report.py", "-k", "cpu or emulated"))
REFERENCE = Suite("reference", ("tests/test_accuracy.py", "tests/test_bits.py", "-k", "reference or cpu-baseline-2"))
INTERPRETED = Suite("interpreted", ("tests/test_bits.py", "-k", "f32 and not unscaled"), INTERPRETER)
INTERPRETED_UNSCALED = Suite("interpreted, unscaled", ("tests/test_bits.py", "-k", "unscaled and f32"), INTERPRETER)
INTERPRETED_SIZES = Suite("interpreted sizes", ("tests/test_sizes.py", "-k", "f32 or programs"), INTERPRETER)
INTERPRETED_LAYOUTS = Suite("interpreted layouts", ("tests/test_layouts.py",), INTERPRETER)
INTERPRETED_STEP = Suite("interpreted step", ("tests/test_step.py", "-k", "found_inf or without_gradient"), INTERPRETER)
INTERPRETED_RANDOM = Suite("interpreted random words", ("tests/test_random.py",), INTERPRETER)
INTERPRETED_BLOCKS = interpreted_part("blocks")
INTERPRETED_PRECISION = interpreted_part("precision")
INTERPRETED_PHASE = interpreted_part("phase")
INTERPRETED_NORM = interpreted_part("norm")
INTERPRETED_REPORT = interpreted_part("report")
TRITON_CODE = Suite("Triton's code", ("tests/test_triton_aot.py", "-k", "sm_90 and f32 and adam"))
CUDA_CODE = Suite("CUDA's code", ("tests/test_cubins.py", "-k", "90 or contracted"), cuda=True)


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: in words, unique.
        path: the file, from the root of the repository.
        old: text that stands once in the file.
        new: what takes its place.
        suites: where to look for it, the likeliest first.
    """

    name: str
    path: str
    old: str
    new: str
    suites: tuple[Suite, ...]


ADAM = "csrc/rules/adam.h"
SGD = "csrc/rules/sgd.h"
RULE = "csrc/rules/rule.h"
CODEC = "csrc/storage/codec.h"
BLOCK = "csrc/storage/block.h"
RANDOM_BITS = "csrc/storage/random.h"
MASTER = "csrc/storage/master.h"
PHASE_OF = "csrc/phase.h"
NORM_OF = "csrc/norm.h"
REDUCE = "csrc/rules/reduce.h"
SWEEP = "csrc/sweep.h"
KERNEL = "csrc/cuda/kernel.h"
ACCESS = "csrc/cuda/access.h"
ENGINE = "csrc/cpu/engine.cpp"
HOST_ACCESS = "csrc/cpu/access.h"
VECTOR = "csrc/cpu/vector.h"
WATCHED = "csrc/python/watched_table.h"
PLACED = "csrc/python/placed_states.h"
PLAIN = "csrc/python/plain_look.h"
NEW_ROW = "csrc/python/new_row.h"
SCHEMA = "csrc/python/schema.h"
GROUPS = "csrc/python/group_reader.h"
FRESH = "csrc/python/fresh_states.h"
GRADIENTS = "csrc/python/gradient_reader.h"
LAUNCHER = "csrc/cuda/launcher.cpp"
TRITON_RULES = "triton_kernels/rules.py"
TRITON_STORAGE = "triton_kernels/storage.py"
TRITON_SWEEP = "triton_kernels/sweep.py"
TRITON_TABLE = "triton_kernels/table.py"
TRITON_BLOCKS = "triton_kernels/blocks.py"
TRITON_MASTER = "triton_kernels/master.py"
TRITON_PHASE = "triton_kernels/phase.py"
TRITON_REDUCE = "triton_kernels/reduce.py"
TRITON_REPORT = "triton_kernels/report.py"
PYTHON = "fusedopt/reference.py"

FAULTS: tuple[Fault, ...] = (
    # the rules
    Fault("adamw: decay dropped", ADAM, "adaptive + bounded<C>(decay * p)", "adaptive", (BITS,)),
    Fault("adamw: an infinite parameter becomes NaN", ADAM, "bounded<C>(decay * p)", "decay * p", (INFINITE,)),
    Fault("adam: l2 dropped", ADAM, "g = has(kL2) ? g + l2 * p : g;", "", (BITS,)),
    Fault("adam: betas swapped", ADAM, "g, one_minus_beta1, beta1, has", "g, one_minus_beta2, beta2, has", (BITS,)),
    Fault(
        "adam: bias correction a step late", ADAM, "power(h.value[kBeta2], t)", "power(h.value[kBeta2], t + 1)", (BITS,)
    ),
    Fault("adam: eps not corrected", ADAM, "C(h.value[kEps] * bias_correction2_sqrt)", "C(h.value[kEps])", (BITS,)),
    Fault(
        "amsgrad: the last, not the largest",
        ADAM,
        "has(kMaximum) ? maximum(max_exp_avg_sq, exp_avg_sq) : exp_avg_sq",
        "exp_avg_sq",
        (BITS,),
    ),
    Fault(
        "adam: products rounded in another order",
        ADAM,
        "one_minus_beta2 * g * g;",
        "one_minus_beta2 * (g * g);",
        (BITS,),
    ),
    Fault("lerp from the wrong end", RULE, "return nearer_to_end ?", "return !nearer_to_end ?", (BITS,)),
    Fault("adam: the nearer end is always the first", ADAM, "!(one_minus_beta1 < C(0.5))", "false", (BITS,)),
    Fault("maximum loses NaN", RULE, "(a > b) | (a != a)", "(a > b)", (BITS,)),
    Fault("sgd: nesterov dropped", SGD, "has(kLooksAhead) ? g + momentum * velocity : has", "has", (BITS,)),
    Fault("sgd: first velocity dampened", SGD, "has(kFirst) ? g :", "has(kFirst) ? one_minus_dampening * g :", (BITS,)),
    Fault("sgd: dampening dropped", SGD, "+ one_minus_dampening * g;", "+ g;", (BITS,)),
    Fault("sgd: decay dropped", SGD, "has(kL2) ? g + weight_decay * p : g", "g", (BITS,)),
    # the codecs
    Fault("bf16: truncated", CODEC, "bits + 0x7FFFu + ((bits >> 16) & 1u)", "bits", (CODECS,)),
    Fault("bf16: ties away from zero", CODEC, "0x7FFFu + ((bits >> 16) & 1u)", "0x8000u", (CODECS,)),
    Fault("bf16: NaN becomes infinite", CODEC, "x != x ? nan : rounded", "rounded", (CODECS,)),
    Fault("f16: denormals read as zero", CODEC, "exponent == 0u ? denormal :", "exponent == 0u ? U{} :", (CODECS,)),
    Fault("f16: overflow a value early", CODEC, "magnitude >= (143u << 23)", "magnitude >= (142u << 23)", (CODECS,)),
    # what happens to a chunk
    Fault("gradient not unscaled", SWEEP, "    if (unscale) {\n", "    if (false) {\n", (UNSCALED,)),
    Fault("unscaled by the reciprocal", SWEEP, "g[k] = g[k] / scale;", "g[k] = g[k] * (C(1) / scale);", (UNSCALED,)),
    Fault("maximize dropped", SWEEP, "negate((flags & kMaximize) != 0)", "negate((flags & 0u) != 0)", (BITS,)),
    Fault(
        "found_inf ignored",
        SWEEP,
        "return launch.found_inf && *launch.found_inf != 0.0f;",
        "return false && launch.found_inf;",
        (STEP,),
    ),
    Fault("step advanced twice", SWEEP, "*step += 1.0f;", "*step += 2.0f;", (BITS,)),
    Fault("step advanced without a gradient", SWEEP, "if (step && launch.grads[tensor] != 0)", "if (step)", (STEP,)),
    Fault(
        "last tensor's step not advanced",
        "csrc/cpu/dispatch.cpp",
        "t < launch.table.rows; ++t) advance_step",
        "t + 1 < launch.table.rows; ++t) advance_step",
        (BITS,),
    ),
    Fault(
        "a tensor of one chunk does not advance",
        KERNEL,
        "  if (view.step && view.size == numel) *view.step = float(step);\n",
        "",
        (BITS, STEP),
    ),
    Fault(
        "every chunk advances its tensor",
        KERNEL,
        "if (view.step && view.size == numel) *view",
        "if (view.step) *view",
        (SIZES, CHUNKS),
    ),
    Fault(
        "tensors of no elements do not advance",
        "csrc/host_table.cpp",
        "numels[t] == 0 || numels[t] > chunk_elements",
        "numels[t] > chunk_elements",
        (STEP, BITS, CHUNKS),
    ),
    Fault(
        "small chunks are left out",
        KERNEL,
        "is_small < 2; ++is_small",
        "is_small < 1; ++is_small",
        (BITS,),
    ),
    Fault(
        "every warp of a block takes the same small chunks",
        KERNEL,
        "u32(in_block()) * device::block_count() + device",
        "device",
        (BITS, CHUNKS),
    ),
    Fault("strides of the parameter for every slot", SWEEP, "strides[s * ndim + d]", "strides[d]", (LAYOUTS,)),
    Fault(
        "strided chunks begin at 0",
        SWEEP,
        "i64 rest = chunk.begin + i;",
        "i64 rest = i;",
        (LAYOUTS, CHUNKS),
    ),
    Fault(
        "chunk index off",
        SWEEP,
        "begin = i64(chunk.index) * launch.chunk_elements;",
        "begin = i64(chunk.index) * kLeaf;",
        (SIZES,),
    ),
    Fault(
        "last element of a tensor left out",
        SWEEP,
        "rest < launch.chunk_elements ? rest :",
        "rest < launch.chunk_elements ? rest - 1 :",
        (SIZES,),
    ),
    # states in 8 bits, random words, what is kept beside 16-bit parameters
    Fault("blocks: a mean's code read without its sign", BLOCK, "(code ^ 0x80u) | kOnes", "code | kOnes", (BLOCKS,)),
    Fault(
        "blocks: roots rounded to nearest",
        BLOCK,
        "(random & 0x7FFFu)) >> 15",
        "0x4000u) >> 15",
        (BLOCKS,),
    ),
    Fault("blocks: a root becomes 0", BLOCK, "least = bits < smallest ? bits : smallest", "least = none", (BLOCKS,)),
    Fault("blocks: the largest code overflows", BLOCK, "255.0f - 0x1p-14f", "255.0f + 0x1p-14f", (BLOCKS,)),
    Fault("blocks: no code where there is no inverse", HOST_ACCESS, "if (inverse == 0.0f)", "if (false)", (BLOCKS,)),
    Fault(
        "blocks: coded without their scales",
        HOST_ACCESS,
        "last = part;",
        "last = part, last.inverse += 1.0f;",
        (BLOCKS,),
    ),
    Fault("cpu: the loop of another kind", ENGINE, "kind == fixed)", "kind.param == fixed.param)", (BLOCKS,)),
    Fault("blocks: infinity keeps its scale", BLOCK, "largest < 0x7F800000u", "largest <= 0x7F800000u", (BLOCKS,)),
    Fault("blocks: scales whose inverse overflows", BLOCK, "reach >= 1.17549435e-38f", "reach > 0.0f", (BLOCKS,)),
    Fault("blocks: negative numbers are the largest", BLOCK, "(x) & 0x7FFFFFFFu", "(x)", (BLOCKS,)),
    Fault("blocks: every chunk has the scales of the first", SWEEP, "(u64(begin) >> block_bits)", "u64(0)", (BLOCKS,)),
    Fault(
        "blocks: parts of a chunk have its first scales",
        SWEEP,
        "found.scales[s] += (u64(at) >> block_bits) * sizeof(float);",
        "found.scales[s] += 0;",
        (REPORT,),
    ),
    Fault("places: runs follow each other", SWEEP, "element / run * pitch + element % run", "element", (BLOCKS,)),
    Fault("places: runs begin where they end", SWEEP, "at + u64(count) <= run", "at < run", (BLOCKS,)),
    Fault("places: 32 bits only", SWEEP, "first >> 32 == (first + u64(count) - 1) >> 32", "true", (BLOCKS,)),
    Fault("cpu: places: runs not looked at", ENGINE, " || table.slot(kRun, t) != 0", "", (BLOCKS,)),
    Fault("blocks: neighbours share a scale", SWEEP, "i >> chunk.block_bits", "i >> (chunk.block_bits + 1)", (BLOCKS,)),
    Fault(
        "blocks: one stream for all parameters", SWEEP, "rounding(chunk.mode() >> kKeyShift", "rounding(0", (BLOCKS,)
    ),
    Fault(
        "blocks: threads of a block do not share the largest",
        ACCESS,
        "largest = other > largest ? other : largest;",
        "(void)other;",
        (BLOCKS,),
    ),
    Fault(
        "blocks: nothing beside the update",
        SWEEP,
        "(chunk, side, at, i, n, part, seen)",
        "(chunk, NoSide{}, at, i, n, part, seen)",
        (BLOCKS,),
    ),
    Fault(
        "rounding: a float16 of no sign",
        CODEC,
        "bit_cast<X>(sign | bit_cast<U>(rounded))",
        "bit_cast<X>(bit_cast<U>(rounded))",
        (BLOCKS,),
    ),
    Fault(
        "rounding: a subnormal float16 as any other",
        CODEC,
        "? shifted - least_normal : normal;",
        "? normal : normal;",
        (BLOCKS,),
    ),
    Fault("random words: the same at every step", RANDOM_BITS, "32), step);", "32), 0u);", (RANDOM, BLOCKS)),
    Fault("random words: another mixing step", RANDOM_BITS, "x ^ (x >> 15)", "x ^ (x >> 16)", (RANDOM, BLOCKS)),
    Fault("random words: repeat after 2^32 elements", RANDOM_BITS, "key ^ u32(place >> 32)", "key", (RANDOM,)),
    Fault(
        "bf16 at random: infinity rounded", CODEC, "return x - x == X{} ? rounded : x;", "return rounded;", (BLOCKS,)
    ),
    Fault(
        "master: a changed parameter not seen",
        MASTER,
        "kept) == p ? kept : p",
        "kept) == p ? kept : kept",
        (PRECISION,),
    ),
    Fault("low bits: to nearest even", MASTER, "bits + 0x8000u", "bits + 0x7FFFu + ((bits >> 16) & 1u)", (PRECISION,)),
    Fault("low bits: not those of this parameter", MASTER, "joined != joined ? p : joined", "joined", (PRECISION,)),
    Fault("low bits: of a NaN", MASTER, "exact != exact ? nothing : bit", "false ? nothing : bit", (BLOCKS,)),
    Fault("compensation not given back", MASTER, "return p + kept;", "return p;", (PRECISION,)),
    Fault("compensation of infinity", MASTER, "lost - lost == nothing ? lost : nothing", "lost", (PRECISION,)),
    # what a launch does beside the update
    Fault("average: the first is not the parameter", PHASE_OF, "first(t <= 1)", "first(false)", (PHASE,)),
    Fault("average: no warm-up", PHASE_OF, "phase.has(kWarmsUp) && most < d", "false", (PHASE,)),
    Fault("average: its nearer end is the first", PHASE_OF, "!(one_minus_decay < C(0.5))", "false", (PHASE,)),
    Fault(
        "average: of the parameter before it is rounded",
        SWEEP,
        "if (side.averages || side.copies || side.report.is_wanted())",
        "if (false)",
        (PHASE,),
    ),
    Fault("gradient not cleared", SWEEP, "  if (side.clears) {", "  if (false) {", (PHASE,)),
    Fault("gradient not cleared in a skipped step", KERNEL, "if (V::kSide) skip_block(launch);", "", (PHASE, NORM)),
    Fault(
        "cpu: gradient not cleared in a skipped step",
        "csrc/cpu/dispatch.cpp",
        "if (is_skipped(launch)) return skip(launch);",
        "if (is_skipped(launch)) return;",
        (PHASE, NORM),
    ),
    Fault("norm: gradients not clipped", SWEEP, "launch.phase.has(kClips);", "false;", (NORM,)),
    Fault("norm: gradients made larger", REDUCE, "coefficient >= 1.0 ? 1.0 : coefficient", "coefficient", (NORM,)),
    Fault("norm: nothing added to what divides", REDUCE, "(norm + 1e-6)", "norm", (NORM,)),
    Fault("norm: root of the largest", NORM_OF, "phase.has(kLargestNorm) ? joined : square", "square", (NORM,)),
    Fault("norm: infinity let pass", NORM_OF, "phase.has(kSkipsNonfinite) && !is_finite(norm)", "false", (NORM,)),
    Fault(
        "norm: one sum for the leaves of a chunk", NORM_OF, "visit(first + u64(at / kLeaf),", "visit(first,", (NORM,)
    ),
    Fault("norm: float16 read as bfloat16", KERNEL, "join_dense_leaf<kFloat16>", "join_dense_leaf<kBFloat16>", (NORM,)),
    Fault("norm: strides not followed", KERNEL, "V::kStrided && leaf.layout != nullptr", "false", (NORM,)),
    Fault("norm: magnitudes with their signs", REDUCE, "x <= X{} ? X{} - x : x", "x", (NORM,)),
    Fault("norm: skipped steps not counted", KERNEL, "phase.results[0] += 1.0;", ";", (NORM,)),
    Fault("norm: no barrier in the tree", REDUCE, "    barrier();\n", "", (NORM,)),
    Fault(
        "norm: no barrier of the grid",
        KERNEL,
        "measure_leaves<V>(launch);\n  device::grid_barrier(launch.arrivals + 1);",
        "measure_leaves<V>(launch);",
        (NORM,),
    ),
    Fault(
        "norm: the last group of leaves for all",
        KERNEL,
        "groups.joined[turn] = joined;",
        "groups.joined[0] = joined;",
        (NORM,),
    ),
    Fault(
        "cpu: norm: only the first leaves of a group of them",
        "csrc/cpu/dispatch.cpp",
        "groups[first / kJoined] = values[0];",
        "groups[0] = values[0];",
        (NORM,),
    ),
    Fault(
        "report: a short leaf has the elements of another",
        REDUCE,
        "return whole < size ? whole : size;",
        "return whole;",
        (REPORT,),
    ),
    Fault("report: chains of another quarter", REDUCE, "c / kRow * kQuarter + c % kRow", "c * kRow", (REPORT,)),
    Fault(
        "report: no barrier before a leaf takes the place of another",
        ACCESS,
        "      if (wanted) barrier();  // the last piece is joined\n",
        "",
        (REPORT,),
    ),
    Fault(
        "report: chains joined before their elements are there",
        ACCESS,
        "->events[lane] = events;\n      barrier();\n",
        "->events[lane] = events;\n",
        (REPORT,),
    ),
    Fault("report: events of the last leaf too", ACCESS, "      events = 0;\n", "", (REPORT,)),
    Fault(
        "report: the second half of a leaf in float64 is another's",
        ACCESS,
        "s < kReportSquares && c >= chains",
        "s < 0",
        (REPORT,),
    ),
    Fault("report: every update of 0 is lost", SWEEP, "& (seen.update[k] != zero)", "", (REPORT,)),
    Fault(
        "cpu: report: the second half of a leaf is not joined",
        HOST_ACCESS,
        "q < half; ++q) join(quarters[q], quarters[q + half]);",
        "q < half / 2; ++q) join(quarters[q], quarters[q + half]);",
        (REPORT,),
    ),
    Fault("report: lost updates counted as infinite", ACCESS, "events % kLostEvent, ", "events, ", (REPORT,)),
    Fault(
        "cpu: the last vector begun is not finished",
        HOST_ACCESS,
        "    finish(width, i - N, N, last);\n    return i;",
        "    return i;",
        (BITS, SIZES, REPORT),
    ),
    Fault(
        "cpu: a vector is finished where the next one is",
        HOST_ACCESS,
        "      finish(width, i - N, N, last);\n      last = next;",
        "      finish(width, i, N, last);\n      last = next;",
        (BITS, SIZES, REPORT),
    ),
    Fault("report: squares that float loses", REDUCE, "7.888609052210118e-31", "0.0", (REPORT,)),
    Fault("report: squares that float has no room for", REDUCE, "sum <= X{} + kMostHeld<C>", "sum == sum", (REPORT,)),
    Fault(
        "report: all chains added in double",
        REDUCE,
        "holds<C>(sum) ? double(sum) :",
        "false ? double(sum) :",
        (REPORT,),
    ),
    Fault(
        "cpu: report: all chains of a quarter added in double",
        HOST_ACCESS,
        "holds<C>(lanes[k]) ?",
        "false ?",
        (REPORT,),
    ),
    Fault(
        "cpu: report: no chain added in double",
        HOST_ACCESS,
        "if (are_all(held)) return;",
        "return;",
        (REPORT,),
    ),
    Fault(
        "cpu: report: elements of an earlier quarter",
        HOST_ACCESS,
        "[k % kRow] = C(0);",
        "[k % kRow] += C(0);",
        (REPORT,),
    ),
    # the kernel and its access to memory
    Fault(
        "no barrier before the rule is replaced",
        KERNEL,
        "  team.barrier();\n  if (team.lane() == 0) {\n    state.is_live",
        "  if (team.lane() == 0) {\n    state.is_live",
        (BITS, SIZES, CHUNKS),
    ),
    Fault(
        "no barrier after the rule is built",
        KERNEL,
        "block.arrived = arrived;\n    }\n  }\n  team.barrier();",
        "block.arrived = arrived;\n    }\n  }",
        (BITS,),
    ),
    Fault(
        "no barrier before is_last is read",
        KERNEL,
        "  device::barrier();\n  if (!block.is_last)",
        "  if (!block.is_last)",
        (BITS,),
    ),
    Fault(
        "arrivals not reset",
        KERNEL,
        "count_released(launch.arrivals, device::block_count() - 1)",
        "count_released(launch.arrivals, device::block_count())",
        (BITS, CHUNKS),
    ),
    Fault(
        "the first block advances the steps",
        KERNEL,
        "arrive(launch)) == device::block_count() - 1;",
        "arrive(launch)) == 0;",
        (BITS, CHUNKS, STEP),
    ),
    Fault(
        "a block arrives before its last chunk and after it",
        KERNEL,
        "arrives && is_last, state)",
        "arrives, state)",
        (BITS, CHUNKS),
    ),
    Fault(
        "a rule outlives its step count",
        KERNEL,
        "group != built.group || step != built.step ||",
        "group != built.group ||",
        (BITS,),
    ),
    Fault(
        "a rule outlives its group",
        KERNEL,
        "group != built.group || step != built.step ||",
        "step != built.step ||",
        (BITS,),
    ),
    Fault("misaligned tensors taken for aligned", ACCESS, "if (!chunk.has(s) ||", "if (true ||", (SIZES, BITS)),
    Fault(
        "head of a misaligned tensor left out",
        ACCESS,
        "k < head ? k : last + k - head",
        "last + k",
        (SIZES,),
    ),
    Fault(
        "last vector beyond the tensor",
        ACCESS,
        "(chunk.size - head) / N * N",
        "(chunk.size - head + N - 1) / N * N",
        (SIZES,),
    ),
    # the CPU engine
    Fault(
        "cpu: a rule outlives its step count",
        ENGINE,
        "group == group_ && step == step_ &&",
        "group == group_ &&",
        (BITS,),
    ),
    Fault(
        "cpu: a tail is written to its full width",
        HOST_ACCESS,
        "buffer, u64(count) * sizeof(T));",
        "buffer, sizeof(buffer));",
        (SIZES,),
    ),
    Fault("cpu: a tail is an element short", HOST_ACCESS, "i, end - i);", "i, end - i - 1);", (SIZES,)),
    Fault(
        "cpu: a whole vector where an element is missing",
        HOST_ACCESS,
        "i + N <= end; i += N) visit",
        "i + N - 1 <= end; i += N) visit",
        (SIZES,),
    ),
    Fault(
        "cpu: a tail is read to its full width",
        HOST_ACCESS,
        "(W::kPartial) {\n      __b",
        "(false) {\n      __b",
        (OVERRUNS,),
    ),
    Fault(
        "cpu: usual branches taken for the rule's own",
        ENGINE,
        "rule.branches != kBranches ||",
        "(rule.branches & kBranches) != kBranches ||",
        (USUAL,),
    ),
    Fault("cpu: the plain loop for gradients with a scale", ENGINE, " || !gradient.is_plain()", "", (UNSCALED, BITS)),
    Fault(
        "cpu: avx2 narrows the lower half twice",
        VECTOR,
        "extracti128_si256(all, 1)",
        "extracti128_si256(all, 0)",
        (CODECS,),
    ),
    Fault("cpu: avx512 loses the last lane", VECTOR, "kAll = 0xFFFF;", "kAll = 0x7FFF;", (CODECS,)),
    Fault("cpu: avx512 saturates what it narrows", VECTOR, "maskz_cvtepi32_epi16", "maskz_cvtsepi32_epi16", (CODECS,)),
    Fault(
        "cpu: references to parameters not given back",
        WATCHED,
        "if (watch.hold) released.push_back(std::move(watch.hold));",
        "{}",
        (COLLECTED,),
    ),
    Fault(
        "cpu: states given other memory not seen",
        PLACED,
        "return watch.state_addresses == watch.addresses();",
        "return watch.state_addresses.size() < 99;",
        (MOVED,),
    ),
    Fault(
        "plain: shared memory not seen",
        WATCHED,
        "!rows.empty() && look.sees_all_apart();",
        "!rows.empty();",
        (FIRST,),
    ),
    Fault("plain: modes of a group not seen", PLAIN, "if (has_key(group, key)) return false;", "(void)key;", (FIRST,)),
    Fault(
        "plain: states that are there not seen",
        PLAIN,
        "(param.ptr()) || has_state(param)",
        "(param.ptr())",
        (FIRST,),
    ),
    Fault("plain: refused groups not seen", WATCHED, "kRefused = 1u << 31;", "kRefused = 0;", (FIRST,)),
    Fault("plain: interrupts lost", WATCHED, "if (!error.matches(PyExc_Exception)) throw;", "", (FIRST,)),
    Fault("plain: memory of states not kept", NEW_ROW, "row.keep.push_back(call(tensor, kStorage));", "", (FIRST,)),
    Fault(
        "plain: leaves of another step",
        "fusedopt/table.py",
        "-(-numel // LEAF)",
        "-(-row.param.numel() // LEAF)",
        (FIRST,),
    ),
    Fault(
        "plain: states that no hyperparameter asks for",
        SCHEMA,
        "return hypers.value[hyper] != 0.0 || (unseen >> hyper & 1) != 0;",
        "return hypers.value[hyper] == hypers.value[hyper] || unseen != 0;",
        (STEP,),
    ),
    Fault(
        "plain: states that no flag asks for",
        SCHEMA,
        "return flag == 0 || (hypers.flags & flag) != 0;",
        "return true;",
        (STEP,),
    ),
    Fault(
        "plain: steps of rows without states counted",
        GROUPS,
        "return schema_->keeps_step;",
        "return schema_ != nullptr;",
        (FIRST,),
    ),
    # the CUDA launcher, over a driver that works late
    Fault(
        "launcher: kernels loaded within a capture",
        LAUNCHER,
        "if (capturing) state.refuse_unknown(host);",
        "",
        (LAUNCHER_RUN,),
    ),
    Fault(
        "clearing: gradients that moved not looked at",
        "fusedopt/table.py",
        "if self.phase.zero_grads and self.core.gradients_moved():",
        "if self.core is None:",
        (PHASE,),
    ),
    Fault(
        "clearing: gradients of tied parameters not looked at",
        "fusedopt/table.py",
        "(row.name, row.param.grad) for row in self._beside if",
        "(row.name, row.param.grad) for row in self.rows if",
        (PHASE_ONCE,),
    ),
    Fault(
        "clearing: not seen by a compiled graph",
        "fusedopt/base.py",
        " or self._phase.writes_tensors_of_others or",
        " or",
        (COMPILED_STEP,),
    ),
    Fault(
        "compile: a step in a full graph that has touched its groups",
        "fusedopt/traced.py",
        "return must_be_one and not any(_is_touched(tracer.output, optimizer) for optimizer in known)",
        "return must_be_one",
        (COMPILED_STEP,),
    ),
    Fault(
        "compile: a step in every graph",
        "fusedopt/traced.py",
        "return must_be_one and not any(_is_touched(tracer.output, optimizer) for optimizer in known)",
        "return True",
        (COMPILED_STEP,),
    ),
    Fault(
        "clearing: a gradient keeps its history",
        GRADIENTS,
        "return requires_grad_ == nullptr || requires_grad_(",
        "return requires_grad_ != nullptr && !requires_grad_(",
        (PHASE,),
    ),
    Fault(
        "report: parameters of a skipped step beside the numbers of another",
        "fusedopt/table.py",
        "        partials.fill_(UNWRITTEN)\n",
        "",
        (REPORT,),
    ),
    Fault(
        "report: reading changes it", "fusedopt/table.py", 'columns.to("cpu", copy=True)', "columns.cpu()", (REPORT,)
    ),
    Fault(
        "report: an earlier launch is at fault",
        "fusedopt/base.py",
        "phase.reads_twice and found is None",
        "phase.reads_twice",
        (REPORT,),
    ),
    Fault(
        "average: torch's dtype stays",
        "fusedopt/states.py",
        "torch.promote_types(usable.dtype, average_dtype(row.param))",
        "usable.dtype",
        (PHASE_ONCE,),
    ),
    Fault(
        "launcher: a capture lost for want of memory",
        LAUNCHER,
        "    const RelaxedCapture relaxed;  // without memory",
        "    // without memory",
        (LAUNCHER_RUN,),
    ),
    Fault(
        "capture: states that the graph alone would clear",
        "fusedopt/lasting.py",
        "    if is_capturing(device):\n        raise",
        "    if device is None:\n        raise",
        (CAPTURE,),
    ),
    Fault(
        "capture: compiled steps recorded",
        "fusedopt/traced.py",
        '{"tags": (torch.Tag.cudagraph_unsafe,)}',
        '{"tags": ()}',
        (CAPTURE,),
    ),
    Fault(
        "scalars of a GPU read before they came",
        "fusedopt/base.py",
        'non_blocking=device.type != "cpu"',
        "non_blocking=True",
        (AMP,),
    ),
    Fault(
        "launcher: tables that graphs read given up",
        LAUNCHER,
        "captured_tables.push_back(std::move(table));",
        "",
        (LAUNCHER_RUN,),
    ),
    Fault(
        "launcher: a launch overtakes the one before on another stream",
        LAUNCHER,
        "if (stream != last_stream && !capturing)",
        "if (stream == nullptr && !capturing)",
        (LAUNCHER_RUN,),
    ),
    Fault(
        "launcher: host memory rewritten while it is copied",
        LAUNCHER,
        'check(api().wait_event(staging.read), "cuEventSynchronize");\n    std::memcpy',
        "std::memcpy",
        (LAUNCHER_RUN,),
    ),
    Fault(
        "launcher: changed hyperparameters not sent",
        LAUNCHER,
        "if (!same) groups.send(",
        "if (now.empty()) groups.send(",
        (LAUNCHER_RUN,),
    ),
    Fault(
        "launcher: gradients that moved not sent",
        LAUNCHER,
        "if (!same) grads.send(",
        "if (host.rows() == 0) grads.send(",
        (LAUNCHER_RUN,),
    ),
    Fault(
        "launcher: a graph keeps the hyperparameters of its capture",
        LAUNCHER,
        "    params.inline_groups = 0;\n    params.launch.groups",
        "    params.launch.groups",
        (LAUNCHER_RUN,),
    ),
    Fault(
        "launcher: room counted that there was no memory for",
        LAUNCHER,
        "    bytes_ = 0;  // where there is no memory, the next step tries again\n",
        "    bytes_ = room;\n",
        (LAUNCHER_RUN,),
    ),
    Fault(
        "launcher: pinned room counted that there was no memory for",
        LAUNCHER,
        "    staging.bytes = 0;\n",
        "    staging.bytes = bytes;\n",
        (LAUNCHER_RUN,),
    ),
    Fault(
        "launcher: a table known that could not be sent",
        LAUNCHER,
        "      revision = 0;\n",
        "",
        (LAUNCHER_RUN,),
    ),
    Fault(
        "launcher: gradients known that could not be sent",
        LAUNCHER,
        "      sent_grads.clear();\n",
        "",
        (LAUNCHER_RUN,),
    ),
    Fault(
        "launcher: every table kept once there is a graph",
        LAUNCHER,
        "      table_is_captured = false;\n",
        "",
        (LAUNCHER_RUN,),
    ),
    Fault(
        "launcher: PTX not tried where a cubin is not for the GPU",
        LAUNCHER,
        "if (result == driver::kNoBinary &&",
        "if (result == driver::kOutOfMemory &&",
        (LAUNCHER_RUN,),
    ),
    Fault(
        "launcher: cubins of a newer CUDA than the driver's taken for usable",
        LAUNCHER,
        "if (is_too_new(*image)) return too_new_image();",
        "",
        (FAKE_DRIVER,),
    ),
    # states that a first launch clears
    Fault(
        "fresh: states not cleared before they are swept",
        ENGINE,
        "if (states >> state_of(s) & 1)",
        "if (states >> state_of(s) & 2)",
        (FIRST,),
    ),
    Fault(
        "fresh: the last leaves of a chunk not swept",
        "csrc/cpu/dispatch.cpp",
        "leaf < (whole.index + 1) * parts;",
        "leaf + 1 < (whole.index + 1) * parts;",
        (FIRST,),
    ),
    Fault(
        "fresh: cleared at every launch",
        FRESH,
        "return std::exchange(fresh_, {});",
        "return fresh_;",
        (FIRST,),
    ),
    Fault(
        "fresh: a copy of the state between states and launch",
        "fusedopt/base.py",
        "        self._settle()\n        held =",
        "        held =",
        (FIRST,),
    ),
    Fault(
        "hidden steps: what has begun piles up",
        "fusedopt/hidden_steps.py",
        "        if self._begun:\n            self._known = self.known\n",
        "",
        (FIRST,),
    ),
    Fault(
        "fresh: not cleared where the launch failed",
        "fusedopt/base.py",
        "        except BaseException:\n            self._settle()\n            raise\n\n    _launch_untraced",
        "        except BaseException:\n            raise\n\n    _launch_untraced",
        (FIRST,),
    ),
    Fault(
        "fresh: not cleared where not all could be made",
        "fusedopt/base.py",
        "        else:\n            self._settle()\n",
        "",
        (FIRST,),
    ),
    Fault(
        "fresh: left to backends that read states",
        "fusedopt/base.py",
        "leaves_fresh=updates_all and backend is cpu",
        "leaves_fresh=updates_all",
        (FIRST,),
    ),
    Fault(
        "fresh: left where no launch follows",
        "fusedopt/base.py",
        "updates_all = launches and not",
        "updates_all = not",
        (FIRST,),
    ),
    # chunks that are not listed
    Fault(
        "chunks: those of the only tensor taken for those of each",
        "csrc/table.h",
        "return chunk_order == kOfOneTensor ? Chunk{0, c} : Chunk{c, 0};",
        "return Chunk{c, 0};",
        (OVERRUNS,),
    ),
    Fault(
        "chunks: a tensor beside empty ones taken for the only one",
        "csrc/host_table.cpp",
        "if (rows == 1 && all(",
        "if (all(",
        (LAUNCHER_RUN,),
    ),
    Fault(
        "chunks: smaller than a leaf where leaves are joined",
        LAUNCHER,
        "return table.phase().flags != 0 ? kLeaf : least[table.variant()];",
        "return least[table.variant()];",
        (NORM,),
    ),
    Fault(
        "chunks: the plan for the update kept where leaves are joined",
        "csrc/host_table.cpp",
        "planned_workers_ == workers && planned_least_ == least &&",
        "planned_workers_ == workers &&",
        (AMP,),
    ),
    # memory that outlives a table
    Fault(
        "lasting: another stream not told to the allocator",
        "fusedopt/lasting.py",
        "if stream == self._last or",
        "if self._last is not None or",
        (LASTING,),
    ),
    Fault(
        "lasting: memory that graphs use given up",
        "fusedopt/lasting.py",
        "if tensor is not None and self.has_captures:",
        "if tensor is None:",
        (LASTING,),
    ),
    Fault(
        "lasting: terms that graphs use given up",
        "fusedopt/triton_launch.py",
        "            table.lasting.keep(self._terms)\n",
        "",
        (TERMS,),
    ),
    Fault("read directly: lazy gradients not seen", GRADIENTS, " || is_lazy(grad)", "", (READ,)),
    Fault(
        "read directly: strides not looked at",
        GRADIENTS,
        "&&\n             std::equal(strides, strides + count, extents + count);",
        ";",
        (READ,),
    ),
    Fault("read directly: versions stay", GRADIENTS, "    bump_version_(tensor);\n", "", (VERSIONS,)),
    Fault("read directly: dtypes not looked at", GRADIENTS, "dtype == other.dtype && device", "device", (READ,)),
    Fault(
        "read directly: a parameter that changed places not seen",
        WATCHED,
        "now.hint == watch.param_facts.hint && ",
        "",
        (READ,),
    ),
    Fault(
        "read directly: states that lie elsewhere not seen",
        PLACED,
        "if (!gradients.lies_at(placed_[k].tensor, placed_[k].address)) return false;",
        "gradients.lies_at(placed_[k].tensor, placed_[k].address);",
        (MOVED,),
    ),
    Fault(
        "read directly: storages that were freed not seen",
        GRADIENTS,
        "(offset + elements) * bytes_each <= bytes && ",
        "offset + elements + bytes_each + bytes > 0 && ",
        (FREED,),
    ),
    Fault(
        "cpu: first chunk left out",
        "csrc/cpu/dispatch.cpp",
        "std::atomic<u64> next{0};",
        "std::atomic<u64> next{1};",
        (SIZES,),
    ),
    Fault(
        "cpu: workers not waited for",
        "csrc/cpu/team.cpp",
        "done_.wait(lock, [this] { return running_ == 0; });",
        "",
        (THREADS,),
    ),
    Fault(
        "cpu: workers share a chunk",
        "csrc/cpu/dispatch.cpp",
        "chunk_count; first = next.fetch_add(turn))",
        "chunk_count; first += turn)",
        (SIZES, CHUNKS),
    ),
    # the Triton twin
    Fault(
        "triton: betas swapped",
        TRITON_RULES,
        "g, s.one_minus_beta1, s.beta1)",
        "g, s.one_minus_beta2, s.beta2)",
        (INTERPRETED,),
    ),
    Fault(
        "triton: nesterov dropped",
        TRITON_RULES,
        "tl.where(s.nesterov, g + s.momentum * velocity, velocity)",
        "velocity",
        (INTERPRETED,),
    ),
    Fault(
        "triton: bias correction a step late", TRITON_RULES, "power(beta1, t)", "power(beta1, t + 1)", (INTERPRETED,)
    ),
    Fault(
        "triton: bf16 truncated",
        TRITON_STORAGE,
        "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16",
        "bits >> 16",
        (INTERPRETED,),
    ),
    Fault("triton: negation loses the sign of zero", TRITON_SWEEP, "g * -1.0", "0.0 - g", (INTERPRETED,)),
    Fault("triton: gradient not unscaled", TRITON_SWEEP, "if unscale:", "if unscale & False:", (INTERPRETED_UNSCALED,)),
    Fault(
        "triton: an element behind the tail",
        TRITON_SWEEP,
        "mask = i < last - start",
        "mask = i <= last - start",
        (INTERPRETED_SIZES,),
    ),
    Fault("triton: arrivals not reset", TRITON_SWEEP, "            tl.store(arrivals, 0)\n", "", (INTERPRETED,)),
    Fault(
        "triton: found_inf ignored",
        TRITON_SWEEP,
        "mask=found_inf != 0, other=0.0) == 0.0",
        "mask=found_inf != 0, other=0.0) >= 0.0",
        (INTERPRETED_STEP,),
    ),
    Fault(
        "triton: step advanced without a gradient",
        TRITON_TABLE,
        "(address != 0) & (gradient != 0)",
        "address != 0",
        (INTERPRETED_STEP,),
    ),
    Fault(
        "triton: strides of the parameter for the gradient",
        TRITON_TABLE,
        "tl.load(stride + GRAD * ndim)",
        "tl.load(stride + PARAM * ndim)",
        (INTERPRETED_LAYOUTS,),
    ),
    Fault("triton: approximate division", TRITON_RULES, "tl.div_rn(a, b)", "a / b", (TRITON_CODE,)),
    Fault(
        "triton: blocks: a mean's code without its sign",
        TRITON_BLOCKS,
        "(codes ^ 0x80)",
        "codes",
        (INTERPRETED_BLOCKS,),
    ),
    Fault(
        "triton: blocks: roots rounded to nearest",
        TRITON_BLOCKS,
        "(random & 0x7FFF)) >> 15",
        "0x4000) >> 15",
        (INTERPRETED_BLOCKS,),
    ),
    Fault(
        "triton: blocks: a root becomes 0",
        TRITON_BLOCKS,
        "tl.where(x > 0.0, 0x8701, 0)",
        "tl.where(x > 0.0, 0, 0)",
        (INTERPRETED_BLOCKS,),
    ),
    Fault(
        "triton: blocks: scales whose inverse overflows",
        TRITON_BLOCKS,
        "reach >= 1.1754943508222875e-38",
        "reach > 0.0",
        (INTERPRETED_BLOCKS,),
    ),
    Fault(
        "triton: blocks: of 256 have two scales",
        TRITON_BLOCKS,
        "tl.where(bits >= 8, join(largest, LENGTH, MOST_BLOCK), largest)",
        "largest",
        (INTERPRETED_BLOCKS,),
    ),
    Fault(
        "triton: random words: repeat after 2^32 elements",
        TRITON_BLOCKS,
        " ^ (place >> 32).to(tl.uint32)",
        "",
        (INTERPRETED_RANDOM,),
    ),
    Fault(
        "triton: master: a changed parameter not seen",
        TRITON_MASTER,
        "tl.where(rounded_to_16(single, param_storage) == p, single, p)",
        "single",
        (INTERPRETED_PRECISION,),
    ),
    Fault(
        "triton: low bits: without their sign",
        TRITON_MASTER,
        "(half.to(tl.uint32) ^ 0x8000) - 0x8000",
        "half.to(tl.uint32)",
        (INTERPRETED_PRECISION,),
    ),
    Fault(
        "triton: compensation of infinity",
        TRITON_MASTER,
        "tl.where(lost - lost == 0.0, lost, 0.0)",
        "lost",
        (INTERPRETED_PRECISION,),
    ),
    Fault(
        "triton: average: no warm-up",
        TRITON_PHASE,
        "tl.where(((flags & WARMS_UP) != 0) &",
        "tl.where((t < 0) &",
        (INTERPRETED_PHASE,),
    ),
    Fault(
        "triton: gradient not cleared",
        TRITON_PHASE,
        "only_if(clears, mask)",
        "only_if(clears & first, mask)",
        (INTERPRETED_PHASE,),
    ),
    Fault(
        "triton: norm: gradients made larger",
        TRITON_REDUCE,
        "(max_norm < 0.0) | (coefficient >= 1.0)",
        "max_norm < 0.0",
        (INTERPRETED_NORM,),
    ),
    Fault("triton: norm: magnitudes with their signs", TRITON_REDUCE, "tl.abs(g)", "g", (INTERPRETED_NORM,)),
    Fault(
        "triton: norm: the last group of leaves for all",
        TRITON_REDUCE,
        "k == first // JOINED",
        "k == 0",
        (INTERPRETED_NORM,),
    ),
    Fault(
        "triton: norm: infinity let pass",
        TRITON_SWEEP,
        "| (norm - norm == 0.0)",
        "| (norm == norm)",
        (INTERPRETED_NORM,),
    ),
    Fault(
        "triton: chains joined from the end",
        TRITON_REDUCE,
        """join_rows(joined, low, largest, COUNT // 2)
        return join_rows(joined, high,""",
        """join_rows(joined, high, largest, COUNT // 2)
        return join_rows(joined, low,""",
        (INTERPRETED_REPORT,),
    ),
    Fault(
        "triton: report: the rest of a short leaf is another's",
        TRITON_REPORT,
        "mask=k < size,",
        "mask=k < JOINED,",
        (INTERPRETED_REPORT,),
    ),
    Fault(
        "triton: places: runs follow each other",
        TRITON_TABLE,
        "element // whole * pitch + element % whole",
        "element",
        (INTERPRETED_BLOCKS,),
    ),
    Fault(
        "triton: report: parts of a chunk have its first scales",
        TRITON_TABLE,
        "scales = (scale0 + skipped, scale1 + skipped, scale2 + skipped)",
        "scales = (scale0, scale1, scale2)",
        (INTERPRETED_REPORT,),
    ),
    Fault(
        "triton: report: squares that float has no room for",
        TRITON_REDUCE,
        "(sums <= MOST_HELD)",
        "(sums == sums)",
        (INTERPRETED_REPORT,),
    ),
    Fault("triton: report: squares that float loses", TRITON_REDUCE, "2.0**-100", "0.0", (INTERPRETED_REPORT,)),
    Fault("triton: report: every update of 0 is lost", TRITON_REPORT, " & (update != 0.0)", "", (INTERPRETED_REPORT,)),
    # the compilers
    Fault("cuda: products contracted into fma", "build_support/device.py", "--fmad=false", "--fmad=true", (CUDA_CODE,)),
    Fault(
        "cuda: vectors loaded word by word",
        ACCESS,
        "device::load128(words + b / 4, address + u64(b));",
        "for (int w = b; w < b + 16; w += 4) words[w / 4] = device::load32(address + u64(w));",
        (CUDA_CODE,),
    ),
    # what the host does
    Fault(
        "reference: betas swapped",
        PYTHON,
        "lerp(exp_avg, g, 1.0 - beta1, beta1)",
        "lerp(exp_avg, g, 1.0 - beta2, beta2)",
        (REFERENCE,),
    ),
    Fault("reference: dampening dropped", PYTHON, "_scalar(1.0 - dampening, param) * g", "g", (REFERENCE,)),
)
