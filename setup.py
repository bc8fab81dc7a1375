"""Packages and the extension; the rest stands in pyproject.toml, and the compiling in build_support/."""

import sys
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_support.commands import Build, BuildExtension  # noqa: E402

if int(setuptools.__version__.split(".")[0]) < 77:  # the first that reads today's license field
    sys.exit(f"error: setuptools >= 77 is needed, this is {setuptools.__version__}: pip install -U setuptools")

# The Triton kernels stand beside csrc/ in the repository and inside the package once installed: the bare name
# triton_kernels belongs to Triton's own package. In-place builds make a link, which find_packages finds too.
triton_name = "fusedopt.triton_kernels"
inside = find_packages(str(ROOT / "triton_kernels"))
packages = [name for name in find_packages(include=["fusedopt", "fusedopt.*"]) if not name.startswith(triton_name)]

setup(
    packages=[*packages, triton_name, *(f"{triton_name}.{name}" for name in inside)],
    package_dir={triton_name: "triton_kernels"},
    package_data={"fusedopt": ["py.typed", "*.pyi"]},
    include_package_data=False,
    ext_modules=[Extension("fusedopt._C", sources=["csrc/bindings.cpp"])],
    cmdclass={"build": Build, "build_ext": BuildExtension},
    zip_safe=False,
)
