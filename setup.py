"""Installs the engine and the fused operators from their two source roots, and builds the C++ operators.

Metadata is in pyproject.toml. If the C++ build fails, setup warns, and the operators run in plain PyTorch.
"""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOTS = {"stpp": "engine", "stpp_kernels": "kernels"}
CSRC = Path("kernels/stpp_kernels/csrc")


def cpp_operators() -> dict:
    """Setup arguments that build `stpp_kernels._C`; empty if torch is not installed."""
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
            # a compiler can fail in many ways; the plain operators remain
            except Exception as error:
                print(f"stpp: C++ operators not built ({error}); falling back to the plain PyTorch "
                      "forms", file=sys.stderr)

    sources = sorted(str(path) for path in CSRC.glob("*.cpp"))
    # STPP_MARCH selects an older processor for a build shared by several machines, for example x86-64-v3.
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
