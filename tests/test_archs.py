"""FUSEDOPT_CUDA_ARCHS: which images are made for what was asked, by compilers old and new."""

from __future__ import annotations

from pathlib import Path

import pytest

from build_support import assembler, device, images
from build_support.settings import BuildError, Settings

NEW, OLD = (75, 80, 86, 89, 90, 100, 103, 120), (52, 75, 80, 86)
CHOICES = [
    ("", NEW, "75 80 90 100 120 75+ptx"),
    ("", OLD, "75 80 75+ptx"),
    ("few", NEW, "80 90 100 80+ptx"),
    ("few", OLD, "80 80+ptx"),
    ("80;90+ptx", NEW, "80 90 90+ptx"),
    ("9.0, sm_80", NEW, "80 90"),
    ("few 75", NEW, "75 80 90 100 80+ptx"),
]
REFUSED = [
    ("42", NEW, "does not know sm_42"),
    ("few", (52, 75), "knows none of"),
    ("many", NEW, "'many' is not an architecture; write for example .*'few' or 'native'"),
    ("few+ptx", NEW, "is not an architecture"),
]


def targets(asked: str, known: tuple[int, ...]) -> list[str]:
    compiler = device.DeviceCompiler("nvcc", "/opt/nvcc", "13.0.88", known)
    settings = Settings.from_environment({"FUSEDOPT_CUDA_ARCHS": asked})
    return [str(target) for target in device.choose_targets(settings, compiler)]


@pytest.mark.parametrize(("asked", "known", "made"), CHOICES)
def test_images_are_made_for_what_was_asked_and_is_known(asked: str, known: tuple[int, ...], made: str) -> None:
    assert targets(asked, known) == made.split()


@pytest.mark.parametrize(("asked", "known", "words"), REFUSED)
def test_what_is_no_architecture_or_not_known_is_refused(asked: str, known: tuple[int, ...], words: str) -> None:
    with pytest.raises(BuildError, match=words):
        targets(asked, known)


@pytest.mark.parametrize(
    ("asked", "assembles", "compiled"),
    [("", True, ["75+ptx"]), ("few", True, ["80+ptx"]), ("few", False, ["80", "90", "100", "80+ptx"]),
     ("80;90+ptx", True, ["80", "90", "90+ptx"]), ("90", True, ["90"])],
)  # fmt: skip
def test_a_kernel_is_compiled_once_where_its_cubins_can_be_assembled_of_its_oldest_ptx(
    asked: str, assembles: bool, compiled: list[str]
) -> None:
    compiler = device.DeviceCompiler("nvcc", "/opt/nvcc", "13.0.88", NEW)
    wanted = device.choose_targets(Settings.from_environment({"FUSEDOPT_CUDA_ARCHS": asked}), compiler)
    made = images.plan_images([Path("adam.cu")], wanted, Path("device"), assembles=assembles)
    assert [str(image.target) for image in made if image.ptx is None] == compiled
    paths = [image.path for image in made]
    assert len(set(paths)) == len(wanted)
    assert {image.ptx for image in made if image.ptx} <= set(paths)


def program(folder: Path, version: str) -> Path:
    """A ptxas that tells its version and does nothing else."""
    path = folder / "bin" / "ptxas"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {version[:4]}, V{version}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("version", "fits"), [("12.8.93", True), ("12.8.61", True), ("12.4.99", False), ("13.0.88", False)]
)
def test_only_an_assembler_of_the_version_of_nvrtc_takes_its_ptx(
    version: str, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = program(tmp_path, version)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(assembler, "package_folders", list)
    assert assembler.find_assembler("12.8.93") == str(path) * fits


def test_what_is_no_assembler_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = program(tmp_path, "12.8.93")
    path.write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(assembler, "package_folders", list)
    assert assembler.find_assembler("12.8.93") == ""


def test_nvrtc_compiles_once_where_it_has_an_assembler_which_may_not_contract_either() -> None:
    alone = device.DeviceCompiler("nvrtc", "/opt/libnvrtc.so.12", "12.8.93", NEW)
    helped = device.DeviceCompiler("nvrtc", "/opt/libnvrtc.so.12", "12.8.93", NEW, "/opt/ptxas")
    assert (alone.assembles, helped.assembles) == (False, True)
    command = helped.assembly_command(device.Target(90, False))
    assert f'"${assembler.PROGRAM_VARIABLE}" -arch=sm_90 --fmad false' in command
    assert "/opt/ptxas" not in command  # a path that changes from build to build would compile everything anew
