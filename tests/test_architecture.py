"""Import rules, checked in the sources; and what an import loads, checked in a separate process."""

import ast
import importlib.util
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"stpp": ROOT / "engine", "stpp_kernels": ROOT / "kernels"}

LOOSE = {"by_class", "clock", "checkpoint", "config", "device", "distributed", "errors", "files", "log",
         "metrics", "outputs", "parquet", "precision", "processes", "settings", "signals", "versions"}
# Layers from the lowest: a package imports only itself and the layers below it. A new package needs a
# place here.
FLOORS = (
    {"stpp_kernels"},
    LOOSE,
    {"images"},
    {"loading", "models", "annotations"},
    {"training", "inference", "dataset"},
    {"methods", "label"},
    {"report"},
    {"run"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
# The package itself offers `stpp.load`, lazily; any module may ask it for its version.
PACKAGE = "stpp"
# Heavy packages, and the modules that wrap them. True: the wrapper itself is imported lazily.
WRAPPERS = {
    "nvidia": {"stpp.loading.dali": True, "stpp.loading.dali_graph": True, "stpp.images.decode_dali": True},
    "pyarrow": {"stpp.parquet": False},
    "tensorrt": {"stpp.inference.tensorrt": False},
    "tensorrt_rtx": {"stpp.inference.tensorrt": False},
    "torch_tensorrt": {"stpp.inference.torch_tensorrt": False},
    "apex": {"stpp.training.optimizer": False},
    "fsspec": {"stpp.images.storage": False},
    "pycocotools": {"stpp.annotations.regions": False},
    "scipy": {"stpp.annotations.labelled": False},
}
LIGHT = ("stpp", "stpp.by_class", "stpp.config", "stpp.cli", "stpp.errors", "stpp.files", "stpp.settings",
         "stpp.signals")


@dataclass(frozen=True)
class Import:
    module: str
    """Importing module."""
    target: str
    """Imported name, as far as it can be a module: `from a.b import c` gives "a.b.c"."""
    eager: bool
    """True if the import runs when the module is imported."""
    line: int

    def __str__(self):
        return f"{self.module}:{self.line} imports {self.target}"


def module_name(path, source):
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(text, module, is_package=False):
    """Finds all imports of a source: plain, from, relative, and `import_module("...")`."""
    found = []

    def visit(node, eager):
        if isinstance(node, ast.Import):
            found.extend(Import(module, alias.name, eager, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                kept = len(parents) - node.level + is_package
                base = ".".join(parents[:kept] + ([base] if base else []))
            found.extend(Import(module, f"{base}.{alias.name}", eager, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append(Import(module, node.args[0].value, eager, node.lineno))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, False)
            for child in node.orelse:
                visit(child, eager)
            return
        inside = eager and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(text), True)
    return found


def all_imports(package):
    source = SOURCES[package]
    files = sorted((source / package).rglob("*.py"))
    assert files, f"no sources of {package} under {source}"
    found = []
    for path in files:
        found += imports_of(path.read_text(encoding="utf-8"), module_name(path, source),
                            path.stem == "__init__")
    return found


def room(name):
    """Returns the package or top-level module of `stpp` of a dotted name: "loading" for "stpp.loading.dali",
    "stpp" for itself."""
    first = name.split(".")[1] if "." in name else ""
    folder = SOURCES["stpp"] / "stpp"
    there = bool(first) and ((folder / first).is_dir() or (folder / f"{first}.py").is_file())
    return first if there else PACKAGE


def package(name):
    return name.split(".")[0]


def test_import_reader_finds_every_kind():
    text = (
        "import a.b, c\nfrom d import e\nfrom . import f\nfrom ..g import h\n"
        "def late():\n    import i\n    import_module('j')\n"
        "if TYPE_CHECKING:\n    import k\nelse:\n    import l\ntry:\n    import m\n"
        "except ImportError:\n    pass\n"
        "importlib.import_module('n.o')\nclass C:\n    import p\n"
    )
    found = {(one.target, one.eager) for one in imports_of(text, "x.y.z")}
    assert found == {
        ("a.b", True), ("c", True), ("d.e", True), ("x.y.f", True), ("x.g.h", True), ("i", False),
        ("j", False), ("k", False), ("l", True), ("m", True), ("n.o", True), ("p", True),
    }  # fmt: skip
    found = imports_of("from . import f\nfrom .g import h", "x.y", is_package=True)
    assert [one.target for one in found] == ["x.y.f", "x.y.g.h"]


def test_every_module_has_a_layer():
    folder = SOURCES["stpp"] / "stpp"
    names = {path.stem for path in folder.glob("*.py")} | {path.parent.name
                                                           for path in folder.glob("*/__init__.py")}
    unplaced = names - {"__init__"} - FLOOR.keys()
    assert unplaced == set(), f"say in FLOORS where {unplaced} belongs"


def test_imports_only_from_layers_below():
    wrong = []
    for found in all_imports("stpp"):
        if package(found.target) not in SOURCES:
            continue
        source = room(found.module)
        target = room(found.target) if package(found.target) == "stpp" else "stpp_kernels"
        if PACKAGE in (source, target) or target == source:
            continue
        # Top-level modules import one another; packages of one layer do not.
        if FLOOR[target] > FLOOR[source] or (FLOOR[target] == FLOOR[source] and source not in LOOSE):
            wrong.append(str(found))
    assert wrong == []


@pytest.mark.parametrize("name", list(SOURCES))
def test_no_import_cycles(name):
    source = SOURCES[name]
    modules = {module_name(path, source) for path in (source / name).rglob("*.py")}
    needs = {module: set() for module in modules}
    for found in all_imports(name):
        # `from a.b import c` is the module a.b.c, or a name in a.b.
        target = found.target if found.target in modules else found.target.rpartition(".")[0]
        if target in modules and target not in (found.module, PACKAGE):
            needs[found.module].add(target)
    circles, done = [], set()

    def visit(module, path):
        if module in path:
            circles.append(" -> ".join([*path[path.index(module):], module]))
        elif module not in done:
            for target in sorted(needs[module]):
                visit(target, [*path, module])
            done.add(module)

    for module in sorted(modules):
        visit(module, [])
    assert circles == []


def test_class_names_are_unique():
    places = defaultdict(list)
    for path in sorted((SOURCES["stpp"] / "stpp").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module_name(path, SOURCES["stpp"]))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_operators_import_only_torch():
    wrong = []
    for found in all_imports("stpp_kernels"):
        name = package(found.target)
        allowed = name in {"torch", "stpp_kernels"} or name in sys.stdlib_module_names
        if name == "triton":
            allowed = found.module.startswith("stpp_kernels.triton.")
        if not allowed:
            wrong.append(str(found))
    assert wrong == []


def test_triton_kernels_are_imported_lazily():
    folder = "stpp_kernels.triton"
    outside = [found for found in all_imports("stpp_kernels") if not found.module.startswith(folder)]
    assert [str(found) for found in outside if found.eager and found.target.startswith(folder + ".")] == []


@pytest.mark.parametrize("heavy", list(WRAPPERS))
def test_heavy_packages_are_imported_lazily_by_their_wrappers(heavy):
    wrappers = WRAPPERS[heavy]
    lazy_wrappers = {name for name, lazy in wrappers.items() if lazy}
    wrong = []
    for found in all_imports("stpp"):
        if package(found.target) == heavy:
            if found.module not in wrappers or (found.eager and found.module not in lazy_wrappers):
                wrong.append(str(found))
        wraps = any(f"{found.target}.".startswith(f"{name}.") for name in lazy_wrappers)
        if wraps and found.eager and found.module not in lazy_wrappers:
            wrong.append(f"{found}, which loads {heavy}")
    assert wrong == []


def loaded_after(code):
    """Returns names in sys.modules, and "CUDA context" if there is one, after `code` in a new process."""
    show = "import sys\nprint(*sys.modules)\ntorch = sys.modules.get('torch')\n"
    show += "print('CUDA-context' if torch and torch.cuda.is_initialized() else '')"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_neither_torch_nor_numpy(module):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} does not exist")
    assert loaded_after(f"import {module}") & {"torch", "numpy", "stpp_kernels", "PIL", *WRAPPERS} == set()


def test_importing_all_modules_loads_no_heavy_package_or_cuda_context():
    lazy = {name for wrappers in WRAPPERS.values() for name, is_lazy in wrappers.items() if is_lazy}
    modules = []
    for name, source in SOURCES.items():
        for path in sorted((source / name).rglob("*.py")):
            module = module_name(path, source)
            if (
                module not in lazy
                and not module.startswith("stpp_kernels.triton.")
                and path.stem != "__main__"
            ):
                modules.append(module)
    loaded = loaded_after("\n".join(f"import {module}" for module in modules))
    assert {"stpp.models.build", "stpp_kernels"} <= loaded
    # The namespace `nvidia` alone proves nothing: torch's CUDA libraries use it too.
    assert loaded & ((WRAPPERS.keys() - {"nvidia"}) | {"nvidia.dali", "CUDA-context"}) == set()


def test_command_line_names_match_registries():
    from stpp.config import BackendName, MethodName
    from stpp.inference.build import BACKENDS
    from stpp.inference.choose import COSTS
    from stpp.methods import METHODS

    assert set(get_args(MethodName)) == set(METHODS)
    assert set(get_args(BackendName)) == {"auto", "eager", *BACKENDS}
    assert {backend for costs in COSTS.values() for backend, _ in costs} == set(BACKENDS)
    for module in BACKENDS.values():
        assert all(hasattr(module, name) for name in ("SHAPES", "unavailable", "versions", "build", "load"))
