"""The machine code of the CUDA kernels is looked at: widths, bytes, registers, occupancy, no spills, no contraction.

Images are those of the last build where they are newer than the sources, else made here, by the build's own command.
Division and root are IEEE's: in SASS they expand to FFMA and to calls of subroutines, so fma is looked for in the PTX.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from build_support import device, extension, images, nvrtc
from build_support.settings import ROOT, Settings, Unavailable

from . import sass

SMS = (80, 90, 100)
RULES = {"sgd": 1, "adam": 3}  # states: csrc/rules
# Bytes of parameter and gradient, and of states; elements that a thread takes at a time; blocks of 256 threads that
# should fit on a multiprocessor: csrc/variants.h.
FIXED = {"f32": (4, 4, 4, 4), "bf16": (2, 2, 8, 3), "bf16_f32": (2, 4, 8, 3)}
CHOSEN = ("any", "strided", "full")
KEPT = ("bf16_f32_master", "master", "bf16_8", "blocks")  # the storage of the master slot is chosen at run time
SIDES = ("f32_side", "strided_side", "blocks_side")  # outputs beside the update
REPORTS = ("f32_report", "master_report", "everything")  # numbers about every leaf
LEAST_BLOCKS = {
    **{name: row[3] for name, row in FIXED.items()},
    **dict.fromkeys((*CHOSEN, *KEPT, *SIDES), 2),
    **dict.fromkeys(REPORTS, 1),
}

REGISTERS = 65536  # of a multiprocessor, on all of SMS
THREADS = 2048
BLOCK = 256
GRANULARITY = 8  # registers of a thread are given out by the warp, in units of 256

NARROW = r"(?:LD|ST)G?\.E(?:\.(?:U8|U16|S16|64))*"  # an access of less than 16 bytes; LD and ST: any kind of memory
FLOAT64 = r"D(?:ADD|MUL|FMA|SETP|MNMX).*|F2F\.(?:F64|F32\.F64).*|I2F\.F64.*|MUFU\.\w*64H"
LOCAL = r"(?:LD|ST)L.*"
EXACT_SQUARE = r"fma\.rn\.f64\s+%\w+, (%\w+), \1, %\w+;"  # asked for: join_term in csrc/rules/reduce.h


@cache
def compiler() -> device.DeviceCompiler:
    try:
        return device.find_device_compiler()
    except Unavailable as problem:
        pytest.skip(str(problem))


@cache
def image(rule: str, target: device.Target) -> Path:
    """One image: that of the last build, or made now."""
    if target.sm not in compiler().archs:
        pytest.skip(f"{compiler()} does not know sm_{target.sm}")
    source = ROOT / f"csrc/cuda/kernels/{rule}.cu"
    written = max(path.stat().st_mtime for folder in ("csrc", "build_support") for path in (ROOT / folder).rglob("*.*"))
    for folder in (extension.build_folder(Settings.from_environment()) / "device", ROOT / "build/cubins"):
        (plan,) = images.plan_images([source], [target], folder.relative_to(ROOT), assembles=False)
        path = ROOT / plan.path
        if path.exists() and path.stat().st_mtime > written:
            return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists() or path.stat().st_mtime < written:
            command = compiler().command(target, f"{path}.d", 1).replace("$in", str(source)).replace("$out", str(path))
            command = command.replace(f"${nvrtc.PYTHON_VARIABLE}", sys.executable)
            environment = {**os.environ, nvrtc.LIBRARY_VARIABLE: compiler().path}
            result = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, result.stdout + result.stderr
    return path


@cache
def kernels(rule: str, sm: int) -> dict[str, sass.Kernel]:
    tool = sass.find_cuobjdump()
    if tool is None:
        pytest.skip("there is no cuobjdump: neither Triton nor a CUDA toolkit is installed")
    return sass.read_kernels(image(rule, device.Target(sm, False)), tool)


def kernel(rule: str, variant: str, sm: int) -> sass.Kernel:
    return kernels(rule, sm)[f"fusedopt_{rule}_{variant}"]


def vector_loops(found: sass.Kernel) -> list[sass.Loop]:
    """The loops over whole vectors of tensors whose every slot is aligned: no element is reached by itself."""
    wide = [loop for loop in found.innermost_loops if loop.count(r"LDG\.E\.128")]
    return [loop for loop in wide if not loop.count(r"(?:LD|ST)G?\.E(?:\.(?:U8|U16|S16))?")]


each_rule = pytest.mark.parametrize("rule", RULES)
each_sm = pytest.mark.parametrize("sm", SMS)


@each_rule
@each_sm
def test_every_kernel_fits_as_many_blocks_as_it_should_and_spills_nothing(
    rule: str, sm: int, record_property: Any
) -> None:
    assert {name.removeprefix(f"fusedopt_{rule}_") for name in kernels(rule, sm)} == {*LEAST_BLOCKS}
    for variant, blocks in LEAST_BLOCKS.items():
        found = kernel(rule, variant, sm)
        assert found.stack == found.local == 0, found.name
        assert not [i for i in found.instructions if re.fullmatch(LOCAL, i.opcode)], found.name
        given = -(-found.registers // GRANULARITY) * GRANULARITY
        fitting = min(REGISTERS // (given * BLOCK), THREADS // BLOCK)
        record_property("figure", f"cuda {rule} {variant} sm_{sm}: {found.registers} registers, {fitting} blocks")
        assert fitting >= blocks, f"{found.name}: {found.registers} registers"


@each_rule
@each_sm
def test_no_clamped_minimum_decides_a_branch(rule: str, sm: int) -> None:
    """Where ptxas 13.0 makes one instruction of ``max(0, min(left, 8)) == 8``, it compares the wrong way round.

    Lanes with fewer than 8 then go where whole vectors are. Seen on an H100: 8-bit states were read and written behind
    the ends of tensors. No other minimum or maximum has been seen to write or read a predicate: each that does is to be
    looked at.
    """
    for found in kernels(rule, sm).values():
        for i in found.instructions:
            assert not (re.match("V?IMNMX", i.opcode) and re.search(r"\bP[0-6]\b", i.operands)), f"{found.name}: {i}"


@each_rule
@each_sm
@pytest.mark.parametrize("variant", FIXED)
def test_the_vector_loop_moves_each_slot_once_in_16_byte_accesses(rule: str, variant: str, sm: int) -> None:
    """Bytes an element, from the loop's accesses alone.

    An iteration takes N elements of each slot, N being the variant's width, which makes 16 bytes of the narrowest slot.
    So a slot of b bytes an element needs b·N/16 accesses of 16 bytes for a load and as many for a store. The loop has
    exactly those, and no other access to global memory: then an element costs b for each load and store of a slot,
    which is the floor. A state that a tensor lacks is branched around; tests/native/check_bytes.cpp counts that.
    """
    near, far, width, _ = FIXED[variant]
    states = RULES[rule]
    (loop,) = vector_loops(kernel(rule, variant, sm))
    loads, stores = loop.count(r"LDG\.E\.128"), loop.count(r"STG\.E\.128")
    assert 16 * loads == width * (2 * near + states * far)
    assert 16 * stores == width * (near + states * far)
    assert loop.count(NARROW) == 0, sorted(set(loop.opcodes))
    floor = {("sgd", "f32"): 20, ("adam", "f32"): 28 + 8}.get((rule, variant))  # Adam with AMSGrad's third state
    assert floor in (None, 16 * (loads + stores) // width)


@each_rule
@each_sm
@pytest.mark.parametrize("variant", CHOSEN)
def test_kernels_that_choose_storages_at_run_time_have_a_loop_of_wide_accesses(
    rule: str, variant: str, sm: int
) -> None:
    """Only "any" has a loop for aligned chunks alone; the others choose the width of each slot's access within it."""
    slots = 2 + RULES[rule]
    found = kernel(rule, variant, sm)
    loops = vector_loops(found) if variant == "any" else found.innermost_loops
    # A slot of 4 bytes takes two accesses for 8 elements, one of 2 bytes takes one.
    assert any(loop.count(r"LDG\.E\.128") >= 2 * slots for loop in loops), [loop.opcodes for loop in loops]


@each_rule
@each_sm
@pytest.mark.parametrize("variant", FIXED)
def test_no_float64_and_no_local_memory_in_the_element_loops(rule: str, variant: str, sm: int) -> None:
    found = kernel(rule, variant, sm)
    loops = [loop for loop in found.innermost_loops if loop.count(r"LDG\.E\.128")]
    assert len(loops) == 2, "one loop where all slots are aligned, one where some are"
    for loop in loops:
        for opcode in [*loop.opcodes, *loop.opcodes_called]:
            assert not re.fullmatch(f"{FLOAT64}|{LOCAL}", opcode), f"{found.name}: {opcode} in an element loop"


def test_the_search_for_float64_finds_it_where_it_is() -> None:
    opcodes = {i.opcode for i in kernel("adam", "f32", 90).instructions}
    assert any(re.fullmatch(FLOAT64, opcode) for opcode in opcodes), "bias corrections are made in float64"


@each_rule
def test_nothing_is_contracted_flushed_or_approximate(rule: str) -> None:
    ptx = image(rule, device.Target(SMS[0], True)).read_text()
    fused = re.findall(r"\b(?:fma|mad)\.\S*f(?:32|64)\s.*", ptx)
    assert not [line for line in fused if not re.fullmatch(EXACT_SQUARE, line)], "contracted"
    assert not re.findall(r"\S*\.ftz\S*|\S*\.approx\S*|div\.full\S*", ptx), "flushed or approximate"
    assert "div.rn.f32" in ptx
    assert rule != "adam" or "sqrt.rn.f32" in ptx
