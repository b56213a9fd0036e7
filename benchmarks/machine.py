"""Facts of a machine: device, driver, versions, libraries for DALI and TensorRT, and the operators' forms.

    python benchmarks/machine.py
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys

import torch

from stpp_kernels import implementations

PACKAGES = ("torch", "triton", "torchvision", "numpy", "pillow", "pyarrow", "tyro", "hypothesis", "pytest",
            "pytest-xdist", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "tensorrt", "torch-tensorrt",
            "apex")
TOOLS = ("nvcc", "ncu", "compute-sanitizer", "gcc", "g++", "ninja", "make", "git")
LIBRARIES = ("libnpp*.so*", "libnvjpeg.so*", "libnvinfer.so*", "libcuda.so*")
FIND_S = 10


def version(package: str) -> str:
    """Returns the installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def output(command: list[str]) -> str:
    """Returns a command's output, or the reason why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FIND_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    return done.stdout.strip()


def main() -> None:
    print(platform.platform(), "python", platform.python_version(), "cores", os.cpu_count())
    print(output(["nvidia-smi",
                  "--query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total", "--format=csv"]))
    print("CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version(), "devices",
          torch.cuda.device_count())
    print(*(f"{package} {version(package)}" for package in PACKAGES), sep=", ")
    print(*(f"{tool} {shutil.which(tool) or '-'}" for tool in TOOLS), sep=", ")
    print("operators:", implementations())
    places = filter(os.path.isdir, dict.fromkeys(("/usr", "/opt", sys.prefix)))
    wanted = [word for name in LIBRARIES for word in ("-o", "-name", name)][1:]
    print(output(["find", *places, *wanted]) or "no libraries found")


if __name__ == "__main__":
    main()
