"""FUSEDOPT_QUICK: what is compiled after an edit, by which flags, and that an older compiler does without."""

from __future__ import annotations

from pathlib import Path

from build_support import device, extension, host, units
from build_support.settings import QUICK_NOTE, ROOT, Settings

TARGET = device.Target(90, False)
WELL, SOON = (Settings.from_environment({"FUSEDOPT_QUICK": choice}) for choice in ("0", "1"))


def device_compiler(kind: str, version: str) -> device.DeviceCompiler:
    return device.DeviceCompiler(kind, "/opt/compiler", version, (90,))


def test_the_default_is_to_compile_well() -> None:
    assert not Settings.from_environment({}).quick


def test_quick_objects_stay_apart_from_the_others() -> None:
    assert extension.build_folder(SOON) != extension.build_folder(WELL)


def test_flags_of_rounding_are_the_same_and_only_optimizations_fewer() -> None:
    assert host.compile_flags(SOON) == [*host.compile_flags(WELL), "-O0"]
    assert not host.cold_flags(SOON)
    for kind in ("nvcc", "nvrtc"):
        compiler = device_compiler(kind, "13.0.88")
        command = compiler.made_quick().command(TARGET, "depfile", 1)
        assert command.replace(f" {device.QUICK_FLAG}", "").replace(QUICK_NOTE, "") == compiler.command(
            TARGET, "depfile", 1
        )


def test_a_device_compiler_without_the_flag_compiles_as_ever_and_does_not_call_it_quick() -> None:
    for kind in ("nvcc", "nvrtc"):
        older = device_compiler(kind, "12.8.93")
        assert older.made_quick() == older


def test_the_best_instruction_set_has_all_variants_and_those_below_it_one() -> None:
    for machine, isas in host.ENGINE_ISAS.items():
        compiler = host.HostCompiler(("g++",), "g++ 12", machine)
        quick = compiler.made_quick()
        assert quick.description.endswith(QUICK_NOTE)
        assert list(quick.isas) == list(isas) == list(compiler.isas)
        *lower, best = isas
        assert quick.isas[best] == isas[best]
        assert all(host.ONE_VARIANT in quick.isas[isa] for isa in lower)


def test_only_what_no_speed_depends_on_has_fewer_optimizations() -> None:
    assert not any(unit.is_hot for unit in units.emulated_units(ROOT))
    for isas in host.ENGINE_ISAS.values():
        assert all(unit.is_hot for unit in units.engine_units(ROOT, isas))


def test_what_is_installed_does_not_take_the_emulated_kernels_of_a_checkout() -> None:
    here, installed = (units.emulated_units(ROOT, emulates=emulates) for emulates in (True, False))
    assert not {unit.tag for unit in here} & {unit.tag for unit in installed}
    assert all("-DFUSEDOPT_NO_EMULATION" in unit.flags for unit in installed)


def test_each_rule_has_units_of_its_own_and_no_other_file_reaches_its_header() -> None:
    isas = {"baseline": ["-DFUSEDOPT_ONE_VARIANT"], "avx2": ["-mavx2"]}
    stems = units.rule_stems(ROOT)
    assert {f"{stem}.cu" for stem in stems} == {path.name for path in (ROOT / "csrc/cuda/kernels").glob("*.cu")}
    made = [*units.emulated_units(ROOT), *units.engine_units(ROOT, isas)]
    for stem in stems:
        mine = [unit for unit in made if f"rules/{stem}.h" in unit.flags]
        assert [unit.tag for unit in mine] == [stem, f"baseline.{stem}", f"avx2.{stem}"]
        assert len({(unit.source, unit.tag) for unit in made}) == len(made)
        assert not including(f"rules/{stem}.h")


def including(header: str) -> list[Path]:
    """The files of csrc/ that include a header, apart from the kernels of one rule."""
    files = [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cpp")]
    return [path for path in files if f'#include "{header}"' in path.read_text()]


def test_every_source_is_compiled() -> None:
    compiled = [*units.plain_units(ROOT), *units.emulated_units(ROOT), *units.engine_units(ROOT, {"neon": []})]
    assert {unit.source for unit in compiled} == set((ROOT / "csrc").rglob("*.cpp"))
