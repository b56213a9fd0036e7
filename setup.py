"""Installs the engine and the fused operators from their two source roots, and builds the C++ operators.

Metadata is in pyproject.toml. A failed C++ build is a warning: the operators then run in plain PyTorch.
"""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOTS = {"stpp": "engine", "stpp_kernels": "kernels"}
CSRC = Path("kernels/stpp_kernels/csrc")


def cpp_operators() -> dict:
    """Returns setup arguments that build `stpp_kernels._C`; none if torch is not installed yet."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("stpp: torch is missing, so the C++ operators are not built; install torch, then this package "
              "with --no-build-isolation", file=sys.stderr)
        return {}

    class OptionalBuild(BuildExtension):
        def run(self):
            try:
                super().run()
            # a compiler fails in many ways; each leaves the plain operators in use
            except Exception as error:
                print(f"stpp: C++ operators not built ({error}); the plain PyTorch forms will be "
                      "used", file=sys.stderr)

    sources = sorted(str(path) for path in CSRC.glob("*.cpp"))
    # STPP_MARCH names an older processor where one build serves several machines, for example x86-64-v3.
    flags = ["-O3", "-fopenmp",
             f"-march={os.environ.get('STPP_MARCH', 'native')}", "-ffp-contract=fast", "-fno-math-errno"]
    extension = CppExtension("stpp_kernels._C", sources, extra_compile_args=flags,
                             extra_link_args=["-fopenmp"])
    return {"ext_modules": [extension] if sources else [], "cmdclass": {"build_ext": OptionalBuild}}


packages = [name for root in ROOTS.values() for name in find_packages(root)]
setup(
    packages=packages,
    package_dir={name: f"{ROOTS[name.split('.')[0]]}/{name.replace('.', '/')}" for name in packages},
    package_data={"stpp_kernels": ["csrc/*"], "stpp": ["report/*"]},
    **cpp_operators(),
)
