"""Installation of the engine and the fused operators, and the build of the C++ operators.

Metadata is in pyproject.toml. If the C++ build fails, setup warns, and the operators run in plain PyTorch.
"""

import os
import re
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
            # a compiler can fail in many ways; the plain operators remain
            except Exception as error:
                print(f"stpp: C++ operators not built ({error}); falling back to the plain PyTorch "
                      "forms", file=sys.stderr)

    sources = sorted(str(path) for path in CSRC.glob("*.cpp"))
    # One library for each processor in STPP_MARCH (`make wheel`); a checkout is built for its own machine.
    # stpp_kernels/dispatch.py loads the best one that the processor can run.
    marches = os.environ.get("STPP_MARCH", "native").split()
    modules = [CppExtension("stpp_kernels._C" + ("" if march == "native" else f"_{march.replace('-', '_')}"),
                            sources, extra_link_args=["-fopenmp"],
                            extra_compile_args=["-O3", "-g0", "-fopenmp", f"-march={march}",
                                                "-ffp-contract=fast", "-fno-math-errno"])
               for march in marches]
    return {"ext_modules": modules if sources else [], "cmdclass": {"build_ext": OptionalBuild}}


packages = [name for root in ROOTS.values() for name in find_packages(root)]
folders = {name: f"{ROOTS[name.split('.')[0]]}/{name.replace('.', '/')}" for name in packages}
folders["stpp.recipes"] = "launch/recipes"
code = Path("engine/stpp/__init__.py").read_text(encoding="utf-8")
setup(
    version=re.search(r'__version__ = "(.+)"', code).group(1),
    packages=list(folders),
    package_dir=folders,
    package_data={"stpp_kernels": ["csrc/*"], "stpp": ["report/*"], "stpp.recipes": ["*.toml"]},
    **cpp_operators(),
)
