"""`stpp doctor`: checks of this machine's hardware and packages, one line each, with advice.

Heavy imports are deferred; failures are reported, not raised.
"""

import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from stpp import config
from stpp.versions import version_of

LEAST_DISK_GIB, LEAST_SHARED_GIB, LEAST_FILES = 10.0, 1.0, 4096
STALE_S = 60.0
"""Seconds by which sources may be newer than the built operators; installing writes both within seconds."""
TORCH = ((2, 11), (2, 14))
"""Supported PyTorch versions: from (inclusive), to (exclusive)."""
REBUILD = ("rebuild the operators: pip install --no-build-isolation --no-deps -e . "
           "(in a checkout: make clean setup)")


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check this machine's hardware and packages for training and labelling, and suggest fixes."""

    json: bool = False
    """Print the findings as JSON."""
    self_test: bool = True
    """Also try each part: decode an image, one training step, one engine; takes half a minute."""


@dataclass(frozen=True)
class Finding:
    """Result of checking one part."""

    part: str
    state: str
    """ "ok"; "warn": works, but slower or with limits; "fail": required and broken."""
    text: str
    advice: str = ""
    """Suggested fix; empty if none is needed."""

    def line(self) -> str:
        """The finding as a line of text."""
        return f"{self.state:<5} {self.part:<15} {self.text}" + (f" -> {self.advice}" if self.advice else "")


def doctor(args: Sequence[str]) -> None:
    """Runs `stpp doctor`.

    Raises:
        SystemExit: 1 if a required part fails.
    """
    options = config.parse(Doctor, args, prog="stpp doctor")
    found = []
    for finding in findings(self_test=options.self_test):
        found.append(finding)
        if not options.json:
            print(finding.line(), flush=True)
    failed = any(finding.state == "fail" for finding in found)
    if options.json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in found]}, indent=2))
    if failed:
        sys.exit(1)


def findings(*, self_test: bool) -> Iterator[Finding]:
    """Checks every part in turn."""
    yield machine()
    yield torch_package()
    if importlib.util.find_spec("torch") is None:
        return  # all other checks need torch
    for check in (processor, gpu, collectives, dali, tensorrt_package, torch_tensorrt, triton, apex,
                  operators, disk, open_files, shared_memory):
        yield _asked(check.__name__, check)
    if self_test:
        yield from _trials()


def machine() -> Finding:
    """System, Python, cores, memory."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 if hasattr(os, "sysconf") else 0
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return _ok("machine", f"{system}, {os.cpu_count()} cores, {pages:.0f} GiB")


def torch_package() -> Finding:
    """PyTorch version and build."""
    if importlib.util.find_spec("torch") is None:
        return Finding("torch", "fail", "not installed", "pip install torch, then stpp again")
    import torch

    text = f"{torch.__version__}, built for " + (f"CUDA {torch.version.cuda}" if torch.version.cuda
                                                 else "CPUs")
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if not TORCH[0] <= version < TORCH[1]:
        return Finding("torch", "warn", text, "stpp supports torch>=2.11,<2.14")
    return _ok("torch", text)


def processor() -> Finding:
    """CPU capabilities and the compute type chosen."""
    import torch

    from stpp.inference.record import Device
    from stpp.precision import autocast_dtype

    cpu = torch.device("cpu")
    units = {"bf16": torch.cpu._is_avx512_bf16_supported(), "AMX": torch.cpu._is_amx_tile_supported()}
    has = ", ".join(f"{name} {'yes' if supported else 'no'}" for name, supported in units.items())
    chosen = str(autocast_dtype("auto", cpu)).removeprefix("torch.")
    return _ok("processor",
               f"{Device.of(cpu).name}: {torch.backends.cpu.get_cpu_capability()}, {has}; computes in "
               f"{chosen}")


def gpu() -> Finding:
    """GPUs and their driver."""
    import torch

    driver = _first_line(Path("/proc/driver/nvidia/version"))
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return _ok("gpu", f"{len(names)} x {names[0]}, {memory:.0f} GiB; driver: {driver or 'unknown'}")
    if driver is None:
        return _ok("gpu", "none, and no driver; computes on the CPU")
    advice = (
        "install a CUDA build of PyTorch"
        if torch.version.cuda is None
        else "check `nvidia-smi`: the driver may be too old"
    )
    return Finding("gpu", "warn", f"driver found ({driver}), but PyTorch sees no GPU", advice)


def collectives() -> Finding:
    """Communication backend between ranks."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return Finding("collectives", "warn", "this PyTorch has none", "only one process can train")
    if dist.is_nccl_available() and torch.cuda.is_available():
        return _ok("collectives", "NCCL " + ".".join(map(str, torch.cuda.nccl.version())))
    if torch.cuda.is_available():
        return Finding("collectives", "warn", "no NCCL in this PyTorch", "several GPUs need it")
    return _ok("collectives", "gloo, for CPUs")


def dali() -> Finding:
    """DALI, the fast loader."""
    from stpp.images import batches

    names = [name for name in ("nvidia-dali-cuda120", "nvidia-dali-cuda130") if version_of(name)]
    if not batches.has_dali():
        return Finding("dali", "warn", "not installed; PIL reads the images, which is slower",
                       "pip install stpp[cuda12] or stpp[cuda13]; it needs no GPU")
    text = ", ".join(f"{name} {version_of(name)}" for name in names) or "of an unknown version"
    if len(names) > 1:
        return Finding("dali", "warn", text, f"two builds of one package: pip uninstall {names[0]}")
    import torch

    if torch.cuda.is_available() and names == ["nvidia-dali-cuda120"] and not version_of("nvidia-npp-cu12"):
        return Finding("dali", "warn", f"{text}, without NPP, which its GPU operators load",
                       "pip install nvidia-npp-cu12")
    return _ok("dali", text)


def tensorrt_package() -> Finding:
    """TensorRT, and which of its two variants."""
    import torch

    from stpp.inference import tensorrt

    package = tensorrt.installed()
    if package is None:
        advice = (
            "for faster teachers: pip install stpp[tensorrt] or stpp[tensorrt-rtx]"
            if torch.cuda.is_available()
            else ""
        )
        return Finding("tensorrt", "ok", "not installed", advice)
    name, module = package
    kind = "for GeForce and workstation GPUs" if name == "tensorrt-rtx" else "for all GPUs"
    missing = [other for other in ("onnx", "onnxscript") if importlib.util.find_spec(other) is None]
    if missing:
        return Finding("tensorrt", "warn", f"{name} {module.__version__}, without {' and '.join(missing)}",
                       f"pip install {' '.join(missing)}")
    return _ok("tensorrt", f"{name} {module.__version__}, {kind}")


def torch_tensorrt() -> Finding:
    """Torch-TensorRT; not imported, because importing fails with a CPU build of PyTorch."""
    import torch

    version = version_of("torch-tensorrt")
    if version and torch.version.cuda is None:
        return Finding("torch-tensorrt", "warn",
                       f"{version}, with a CPU build of PyTorch: it cannot be imported",
                       "install a CUDA build of PyTorch, or pip uninstall torch-tensorrt")
    return _ok("torch-tensorrt", version or "not installed")


def triton() -> Finding:
    """Triton, which compiles the CUDA operators."""
    import torch

    from stpp_kernels import dispatch

    version = version_of("triton")
    if torch.cuda.is_available() and not dispatch.triton_available():
        return Finding("triton", "warn",
                       f"{version or 'not installed'}, or no C compiler: operators run in plain PyTorch on "
                       "CUDA", "pip install triton, and install gcc")
    return _ok("triton", version or "not installed; needed on CUDA only")


def apex() -> Finding:
    """NVIDIA apex, or the unrelated package of that name, told apart by content; not imported, because
    importing runs its code."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return _ok("apex", "not installed; PyTorch's fused SGD is used")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    where = folders[0] if folders else spec.origin
    if any((folder / "optimizers" / "fused_sgd.py").is_file() for folder in folders):
        return _ok("apex", f"NVIDIA's, in {where}; --train.optimizer apex takes it")
    return Finding("apex", "warn",
                   f"an unrelated package of that name, version {version_of('apex')}, in {where}",
                   "pip uninstall apex; NVIDIA's is installed from its repository")


def operators() -> Finding:
    """The fused operators and their active implementations."""
    import stpp_kernels
    from stpp_kernels import dispatch

    folder = Path(stpp_kernels.__file__).parent
    serving = stpp_kernels.describe_implementations()
    if dispatch.reference_forced():
        return Finding("operators", "warn", "plain PyTorch, forced by STPP_KERNELS", "unset STPP_KERNELS")
    if stale := stale_build(folder):
        return Finding("operators", "warn", f"{stale}; {serving}", REBUILD)
    if not dispatch.load_extension():
        return Finding("operators", "warn", f"no C++ operators; {serving}", REBUILD)
    return _ok("operators", serving)


def stale_build(folder: Path) -> str | None:
    """Mismatch of the C++ operators in `folder` with their sources; None if current or not built."""
    from stpp_kernels import dispatch

    libraries, sources = dispatch.built_libraries(folder), sorted(folder.glob("csrc/*"))
    if not libraries or not sources:
        return None
    newest = max(sources, key=lambda path: path.stat().st_mtime)
    oldest = min(libraries, key=lambda path: path.stat().st_mtime)
    if newest.stat().st_mtime > oldest.stat().st_mtime + STALE_S:
        return f"{oldest.name} was built before {newest.name} was changed"
    return None


def disk() -> Finding:
    """Free disk space in the current folder."""
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    short = free < LEAST_DISK_GIB
    return Finding("disk", "warn" if short else "ok", f"{free:.1f} GiB free in {Path.cwd()}",
                   f"less than {LEAST_DISK_GIB:.0f} GiB: checkpoints and masks may not fit" if short else "")


def open_files() -> Finding:
    """Limit of open files per process."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    short = 0 <= soft < LEAST_FILES
    return Finding("open files", "warn" if short else "ok", f"{soft} at most" if soft >= 0 else "unlimited",
                   f"ulimit -n {LEAST_FILES} before a large run" if short else "")


def shared_memory() -> Finding:
    """Shared memory, through which local processes exchange data."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return _ok("shared memory", "no /dev/shm on this system")
    size = shutil.disk_usage(path).total / 2**30
    short = size < LEAST_SHARED_GIB
    return Finding("shared memory", "warn" if short else "ok", f"/dev/shm of {size:.1f} GiB",
                   "start the container with --shm-size 8g" if short else "")


def _trials() -> Iterator[Finding]:
    """Short trials of the installed parts; required parts must not fail."""
    import torch

    from stpp import log
    from stpp.commands import selftest
    from stpp.images import batches
    from stpp.inference import tensorrt

    log.set_speaker(False)  # suppresses the parts' own messages
    try:
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        package = tensorrt.installed()
        trials: list[tuple[str, bool, Callable[[], str], str]] = [
            ("PIL", True, lambda: selftest.decode(device, dali=False), "reinstall Pillow"),
            ("operators", True, lambda: selftest.operators(device),
             REBUILD + ", or set STPP_KERNELS=reference"),
            ("train step", True, lambda: selftest.train_step(device), "see the lines above"),
            ("engine", False, lambda: selftest.engine(device), "label with --backend eager"),
        ]
        if device.type == "cpu" and torch.get_num_threads() > 1:
            trials.append(("threads", False, lambda: selftest.threads(torch.get_num_threads()),
                           "stop the others, or compute with fewer threads: docs/performance.md"))
        if batches.has_dali():
            trials.append(("dali", False, lambda: selftest.decode(device, dali=True),
                           "use --loader reference"))
        if package and package[0] == "tensorrt-rtx" and device.type == "cpu":
            trials.append(("tensorrt", False, selftest.tensorrt_build, "reinstall tensorrt-rtx"))
        for part, needed, trial, advice in trials:
            yield _asked(f"try {part}", lambda part=part, trial=trial: _ok(f"try {part}", trial()),
                         state="fail" if needed else "warn", advice=advice)
    finally:
        log.set_speaker(True)


def _asked(part: str, check: Callable[[], Finding], *, state: str = "warn",
           advice: str = "see the message") -> Finding:
    """A finding, or a finding of the failure: no error of a checked part may stop the doctor."""
    try:
        return check()
    except Exception as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        return Finding(part, state, f"failed: {text}", advice)


def _ok(part: str, text: str) -> Finding:
    return Finding(part, "ok", text)


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").splitlines()[0].strip()
    except (OSError, IndexError):
        return None
