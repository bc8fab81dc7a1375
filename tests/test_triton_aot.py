"""The Triton kernels, compiled ahead of time for GPUs that are not here: what is in the code is looked at.

Looked for: 16-byte accesses to every slot, no spills, registers within the variant's bound, no contraction
into fma, no denormals flushed, no float64 in the element loop. NVIDIA's division and square root are single
PTX instructions, whose expansion in SASS holds FFMA of its own; AMD's are expanded in the assembly, where every
fma must come from a source line that divides, takes a root or makes a 64-bit integer of a float.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fusedopt.triton_kernels import rules  # noqa: E402
from fusedopt.triton_kernels.launch import (  # noqa: E402
    INTERPRETED,
    REGISTERS,
    THREADS,
    VARIANTS,
    compile_time_arguments,
    compiler_options,
    measure,
)
from fusedopt.triton_kernels.sweep import sweep  # noqa: E402

from . import sass  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 is set: kernels are not compiled")

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA = [name for name, target in TARGETS.items() if target.backend == "cuda"]

SIGNATURE = {
    "address": "*i64",
    "grads": "*i64",
    "numel": "*i64",
    "group": "*i32",
    "storage": "*i64",
    "layout": "*i32",
    "layouts": "*i64",
    "rows": "i64",
    "chunks": "*i32",
    "chunk_count": "i64",
    "chunk_elements": "i64",
    "group_values": "*fp64",
    "group_flags": "*i32",
    "group_tensors": "*i64",
    "group_storages": "*i32",
    "grad_scale": "i64",
    "found_inf": "i64",
    "arrivals": "*i32",
    "phase_flags": "i32",
    "ema_decay": "i64",
    "ema_decay_storage": "i32",
    "joined": "*fp64",
    "norms": "i64",
    "group_max_norms": "*fp64",
    "leaves": "i64",
    "results": "*fp64",
    "first_leaf": "*i64",
    "report": "i64",
    "report_terms": "i64",
}


JOINED_TYPES = {"leaf_sums": "*fp64", "part_leaf": "*i64", "parts": "i64"}  # what `measure` takes that `sweep` does not
MEASURE_SIGNATURE = {name: kind for name, kind in {**SIGNATURE, **JOINED_TYPES}.items() if name in measure.arg_names}


class Kernel(NamedTuple):
    """A compiled kernel and what it was compiled from."""

    rule: str
    variant: str
    target: str
    asm: dict[str, Any]

    @property
    def loads(self) -> int:
        """Slots that an element is loaded from: parameter, gradient and states."""
        return 2 + rules.RULES[self.rule].states

    @property
    def stores(self) -> int:
        """Slots that an element is stored to: the same without the gradient."""
        return self.loads - 1


@pytest.fixture(scope="module")
def compiled() -> Callable[[str, str, str], Kernel]:
    """Compiles a kernel once for all tests."""
    kernels: dict[tuple[str, str, str], Kernel] = {}

    def get(rule: str, variant: str, target: str) -> Kernel:
        key = (rule, variant, target)
        if key not in kernels:
            constants = compile_time_arguments(rule, variant)
            source = ASTSource(sweep, SIGNATURE | dict.fromkeys(constants, "constexpr"), constants)
            to = TARGETS[target]
            options = compiler_options(variant, to.backend, to.warp_size)
            kernels[key] = Kernel(*key, triton.compile(source, target=to, options=options).asm)
        return kernels[key]

    return get


def run_tool(name: str, flag: str, cubin: bytes, folder: Path) -> str:
    """The output of one of NVIDIA's binary tools, which come with Triton."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    done = subprocess.run([TOOLS / name, flag, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def element_loop(ptx: str) -> str:
    """The PTX between the first vector load and the last vector store: the loop over whole vectors."""
    first = ptx.index("ld.global.v4")
    return ptx[first : ptx.rindex("st.global.v4")]


each_rule = pytest.mark.parametrize("rule", list(rules.RULES))
# On every GPU the two variants that most launches take, on one of them all.
COMMON = ("f32", "bf16")
each_nvidia = pytest.mark.parametrize(
    ("variant", "target"),
    [(variant, target) for target in NVIDIA for variant in COMMON]
    + [pytest.param(v, "sm_90", marks=pytest.mark.slow) for v in VARIANTS if v not in COMMON],
)


@each_rule
@each_nvidia
def test_nvidia_code(rule: str, variant: str, target: str, compiled: Any, tmp_path: Path, record_property: Any) -> None:
    kernel = compiled(rule, variant, target)
    usage = run_tool("cuobjdump", "-res-usage", kernel.asm["cubin"], tmp_path)
    registers, stack, local = map(int, re.findall(r"\b(?:REG|STACK|LOCAL):(\d+)", usage))
    sass = run_tool("cuobjdump", "-sass", kernel.asm["cubin"], tmp_path)
    accesses = Counter(re.findall(r"\b(?:LD|ST)[GL](?:\.\w+)*", sass))
    record_property("figure", f"triton {rule} {variant} {target}: {registers} registers")

    assert registers <= compiler_options(variant, "cuda", 32)["maxnreg"]
    if VARIANTS[variant].side or variant == "blocks":
        return  # to join 2,048 numbers, or to keep the states of a whole block, a program of 128 threads spills
    assert stack == local == 0, usage
    assert not [access for access in accesses if access.startswith(("LDL", "STL"))], accesses
    # 8 bytes of each bfloat16 slot beside 16 of each float32 slot
    narrow_params = VARIANTS[variant].width == 4 and variant.startswith("bf16")
    assert accesses["LDG.E.128"] >= kernel.loads - 2 * narrow_params, accesses
    assert accesses["STG.E.128"] >= kernel.stores - narrow_params, accesses


# Bytes of parameter and gradient, and of states, in the variants that fix them.
FIXED = {"f32": (4, 4), "bf16": (2, 2), "bf16_f32": (2, 4)}
ACCESS_BYTES = {"LDG.E.128": 16, "LDG.E.64": 8, "STG.E.128": 16, "STG.E.64": 8}


@each_rule
@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("variant", FIXED)
def test_nvidia_vector_loop_moves_each_slot_once(
    rule: str, variant: str, target: str, compiled: Any, tmp_path: Path
) -> None:
    """Bytes an element: those of the loop's accesses over the elements that a thread takes in an iteration."""
    kernel = compiled(rule, variant, target)
    file = tmp_path / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    (found,) = sass.read_kernels(file, str(TOOLS / "cuobjdump")).values()
    (loop,) = [loop for loop in found.innermost_loops if loop.count(r"LDG\.E\.128")]
    accesses = Counter(opcode for opcode in loop.opcodes if re.match(r"(LD|ST)[GL]?\.", opcode))
    near, far = FIXED[variant]
    states = rules.RULES[rule].states
    elements = compile_time_arguments(rule, variant)["BLOCK"] // THREADS

    assert set(accesses) <= set(ACCESS_BYTES), accesses
    moved = sum(ACCESS_BYTES[opcode] * count for opcode, count in accesses.items())
    assert moved == elements * (2 * near + states * far + near + states * far)
    assert sum(accesses.values()) == kernel.loads + kernel.stores, "one access for each slot"
    programs = REGISTERS // (-(-found.registers // 8) * 8 * THREADS)  # registers are given out by eights
    assert programs >= VARIANTS[variant].programs


@each_rule
@each_nvidia
def test_nvidia_arithmetic(rule: str, variant: str, target: str, compiled: Any) -> None:
    ptx = compiled(rule, variant, target).asm["ptx"]
    assert not re.findall(r"\bfma\.\S+|\bmad\.\S*f(?:32|64)", ptx), "contracted"
    assert not re.findall(r"\S*\.ftz\S*|\S*\.approx\S*|div\.full\S*", ptx), "flushed or approximate"
    if not VARIANTS[variant].double and not VARIANTS[variant].report:  # whose squares are
        assert ".f64" not in element_loop(ptx), "float64 in the element loop"


@each_rule
@each_nvidia
def test_nothing_is_shuffled_between_threads(rule: str, variant: str, target: str, compiled: Any) -> None:
    """All slots of a block are laid out alike: no element goes through shared memory to another thread."""
    if VARIANTS[variant].blocks or VARIANTS[variant].report:
        return  # what a block, or a leaf, joins to is found by all of its threads
    assert "convert_layout" not in compiled(rule, variant, target).asm["ttgir"]


@pytest.mark.parametrize("target", NVIDIA)
def test_nvidia_code_of_the_norm(target: str, tmp_path: Path, record_property: Any) -> None:
    to = TARGETS[target]
    options = compiler_options(None, to.backend, to.warp_size)
    asm = triton.compile(ASTSource(measure, MEASURE_SIGNATURE, {}), target=to, options=options).asm
    usage = run_tool("cuobjdump", "-res-usage", asm["cubin"], tmp_path)
    registers, stack, local = map(int, re.findall(r"\b(?:REG|STACK|LOCAL):(\d+)", usage))
    record_property("figure", f"triton measure {target}: {registers} registers")
    assert stack == local == 0, usage
    assert not re.findall(r"\bfma\.\S+|\bmad\.\S*f(?:32|64)", asm["ptx"]), "contracted"
    assert not re.findall(r"\S*\.ftz\S*|\S*\.approx\S*|div\.full\S*", asm["ptx"]), "flushed or approximate"


@each_rule
@pytest.mark.parametrize("variant", COMMON)
def test_amd_code(rule: str, variant: str, compiled: Any, record_property: Any) -> None:
    kernel = compiled(rule, variant, "gfx942")
    code = kernel.asm["amdgcn"]
    (registers,) = map(int, re.findall(r"\.vgpr_count:\s+(\d+)", code))
    record_property("figure", f"triton {rule} {variant} gfx942: {registers} vector registers")

    # Stricter than needed: a program is 2 waves of 64, and each of a unit's 4 vector processors has 512 a lane.
    assert registers <= 512 // VARIANTS[variant].programs
    assert re.search(r"\.vgpr_spill_count:\s+0\b", code)
    assert "scratch_" not in code
    assert len(re.findall(r"\b(?:global|buffer)_load_dwordx4", code)) >= kernel.loads
    assert len(re.findall(r"\b(?:global|buffer)_store_dwordx4", code)) >= kernel.stores


@each_rule
@pytest.mark.parametrize("variant", COMMON)
def test_amd_arithmetic(rule: str, variant: str, compiled: Any) -> None:
    code = compiled(rule, variant, "gfx942").asm["amdgcn"]
    assert re.search(r"\.amdhsa_float_denorm_mode_32 3\b", code), "denormals are flushed"
    expanded = re.compile(r" / |div_rn|sqrt|\.to\(tl\.int64\)")
    strays = [line for line in fma_sources(code) if not expanded.search(line)]
    assert not strays, "contracted"


def fma_sources(code: str) -> set[str]:
    """The source lines that AMD's fused multiply-adds come from, by the line markers of the assembly."""
    package = Path(rules.__file__).parent
    found = set()
    line = ""
    for text in code.splitlines():
        marker = re.search(r"\.loc\s.*;\s*(?:\S*/)?(\w+\.py):(\d+)", text)
        if marker:
            file, number = marker.groups()
            line = (package / file).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        elif re.search(r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)_(?:f32|f64)", text):
            found.add(line.strip())
    return found
