"""The shape of the house: who imports whom, and which file may hold which instructions."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import json
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pycompress import Int4, Int8, LowRank, Sparse, compress, ops
from pycompress.ops import cpu

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, CSRC = ROOT / "pycompress", ROOT / "csrc"

# What each room may import of the package; nothing points back up the chain
# cli -> (validation, storage) -> model -> passes -> plan -> nn -> methods -> weights -> ops -> _C.
LOWEST = {"ops", "weights", "profiles", "methods", "kinds"}  # what a layer is made of
HOUSE = LOWEST | {"nn", "calls", "references", "surgery"}
ALLOWED: dict[str, set[str]] = {
    "reference": set(),
    "measure": set(),
    "profiles": set(),
    "ops": {"_C", "reference"},
    "weights": {"ops"},
    "methods": {"profiles", "weights", "ops"},
    "kinds": {"methods", "weights", "ops"},
    "nn": LOWEST,
    "state": set(),
    "calls": {"state"},
    "references": {"state"},
    "surgery": {"nn", "references"},
    "records": {"calls", "kinds", "nn"},
    "replacing": set(),
    "toml": {"replacing"},
    "plan_file": {"methods", "profiles", "replacing", "toml"},
    "calibration": {"calls", "state", "kinds", "methods", "surgery", "replacing"},
    "plan": HOUSE | {"records", "measure"},
    "copying": {"references"},
    "passes": HOUSE | {"plan", "copying"},
    "progress": set(),
    "race": HOUSE | {"state", "plan", "passes", "measure", "progress"},
    "model": HOUSE | {"passes", "race", "copying", "progress", "plan", "records", "calibration"},
    "structure": HOUSE | {"passes", "copying", "records", "state", "calibration"},
    "storage": HOUSE | {"passes", "records", "references", "replacing"},
    "train": HOUSE | {"calibration", "copying", "model", "passes", "plan", "progress", "records"},
    "search": HOUSE
    | {
        "benchmark",
        "calibration",
        "copying",
        "measure",
        "model",
        "passes",
        "plan",
        "plan_file",
        "progress",
        "race",
        "records",
        "structure",
    }
    | {"integrations", "replacing", "state", "toml"},
    "integrations": {"train"},
    "flat_call": {"calls"},
    "onnx": HOUSE | {"flat_call", "passes", "replacing", "state", "storage"},
    "interchange": {"calibration", "calls", "model", "onnx", "plan", "records", "replacing"},
    "targets": HOUSE | {"copying", "flat_call", "interchange", "onnx", "passes", "replacing", "state"},
    "validation": HOUSE | {"onnx", "passes", "replacing", "storage"},
    "evaluation": HOUSE | {"benchmark", "measure", "passes", "state", "storage"},
    "report": HOUSE | {"benchmark", "calibration", "evaluation", "records", "replacing", "validation"},
    "benchmark": HOUSE | {"model", "measure", "onnx"},
    "demo": HOUSE | {"benchmark", "validation", "storage", "model", "calibration", "onnx"},
    "cli": HOUSE
    | {"search", "demo", "benchmark", "validation", "storage", "model", "onnx", "plan_file", "targets", "toml"},
    "__init__": HOUSE
    | {
        "evaluation",
        "interchange",
        "report",
        "search",
        "targets",
        "train",
        "validation",
        "storage",
        "model",
        "passes",
        "calibration",
        "structure",
    },
}
CHAIN = [
    "structure", "model", "race", "passes", "plan", "calibration", "records", "copying", "surgery", "references", "flat_call",
    "calls", "state", "nn", "kinds", "plan_file", "methods", "profiles", "weights", "ops", "reference", "measure", "progress",
    "toml", "replacing",
]  # fmt: skip
ABOVE = {
    "interchange", "onnx", "targets", "validation", "benchmark", "demo", "cli", "storage", "train", "integrations",
    "evaluation", "report", "search",
}  # fmt: skip
OUTSIDE = {
    "onnx", "onnx_ir", "onnxruntime", "onnxscript", "click", "rich", "yaml", "transformers", "jinja2", "matplotlib",
    "sentence_transformers", "coremltools", "openvino", "torchmetrics",
}  # fmt: skip


def room(path: Path) -> str:
    """The name that ALLOWED has for a file: the first part below the package."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py").removesuffix(".pyi")


def imported(path: Path) -> list[tuple[str, int, bool]]:
    """(dotted name, line, whether at the top of the module) of every import in a file, in functions too."""
    tree = ast.parse(path.read_text(), str(path))
    at_top = {id(node) for node in tree.body} | {
        id(inner) for node in tree.body if isinstance(node, ast.Try | ast.If) for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, id(node) in at_top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(("pycompress", *path.relative_to(PACKAGE).parts)[: -node.level]) if node.level else ""
            base = ".".join(filter(None, (package, node.module)))
            found += [(f"{base}.{alias.name}", node.lineno, id(node) in at_top) for alias in node.names]
    return found


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def own(path: Path) -> list[tuple[str, int]]:
    """(room, line) of what a file imports of the package itself."""
    found = []
    for name, line, _ in imported(path):
        parts = name.split(".")
        if parts[0] == "pycompress" and len(parts) > 1 and parts[1] != "__version__":
            found.append((parts[1], line))
    return found


def test_the_reader_of_imports() -> None:
    source = PACKAGE / "nn" / "layer.py"
    names = {name for name, _, _ in imported(source)}
    assert {"torch", "torch.Tensor", "pycompress.ops", "pycompress.methods.method.Method"} <= names
    assert {"ops", "methods"} <= {name for name, _ in own(source)}


def test_every_module_has_a_place() -> None:
    assert {room(path) for path in files()} <= set(ALLOWED), "a new module needs a line in ALLOWED"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_points_back(path: Path) -> None:
    here = room(path)
    for name, line in own(path):
        if name != here:
            assert name in ALLOWED[here], f"{path.relative_to(ROOT)}:{line}: {here} imports {name}"


def test_the_table_of_arrows_has_none_that_points_up_the_chain() -> None:
    for i, here in enumerate(CHAIN):
        assert not ALLOWED[here] & {*CHAIN[: i + 1], *ABOVE}, here
    assert set(CHAIN) | ABOVE | {"__init__"} == set(ALLOWED)


def test_the_chain_imports_nothing_that_stands_above_it() -> None:
    for path in files():
        if room(path) in CHAIN:
            above = {name for name, _ in own(path)} & ABOVE
            assert not above, f"{path.relative_to(ROOT)} imports {above}"


def test_the_package_has_no_cycle() -> None:
    arrows: dict[str, set[str]] = {}
    for path in files():
        arrows.setdefault(room(path), set()).update(name for name, _ in own(path))
    arrows = {here: {name for name in names if name in arrows and name != here} for here, names in arrows.items()}
    while arrows:
        free = {here for here, names in arrows.items() if not names & arrows.keys()}
        assert free, f"a cycle among {sorted(arrows)}"
        arrows = {here: names for here, names in arrows.items() if here not in free}


def rooms_on_the_way() -> list[str]:
    """The rooms of the package whose functions have called each other to come here, each change of room once."""
    files = [Path(frame.filename) for frame in reversed(inspect.stack())]
    return [name for name, _ in itertools.groupby(room(file) for file in files if file.is_relative_to(PACKAGE))]


@pytest.mark.parametrize(
    "method", [Int8(), Int4(), Sparse(0.3), LowRank(4, residual=Int8(), rank_guard=False)], ids=repr
)
def test_a_weight_and_an_activation_enter_no_room_twice(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the one chain: from compress to the packed weight, and from the module's call to the kernel's."""
    native, ways = cpu.native._C, dict[str, list[str]]()

    class Watched:
        def __getattr__(self, name: str) -> Any:
            found = getattr(native, name)

            def call(*operands: Any) -> Any:
                ways[name] = rooms_on_the_way()
                return found(*operands)

            return call if callable(found) else found

    monkeypatch.setattr(cpu.native, "_C", Watched())
    ops.OPS[method.name].linear.short.cache_clear()  # type: ignore[attr-defined]  # (it remembers native functions)
    layer = compress(torch.nn.Sequential(torch.nn.Linear(24, 16)), method)
    layer(torch.randn(3, 24))
    ops.OPS[method.name].linear.short.cache_clear()  # type: ignore[attr-defined]
    packing = [way for name, way in ways.items() if name.endswith("_pack")]
    calling = [way for name, way in ways.items() if "_linear" in name]
    assert packing and calling
    assert all(way == ["model", "nn", "ops"] for way in packing)
    assert all(way == ["nn", "ops"] for way in calling)


def test_one_door_to_the_native_module() -> None:
    doors = {path for path in files() if any(name.startswith("_C") for name, _ in own(path))}
    text = {
        path
        for path in files()
        if re.search(r"\bimport_module\(.*_C|__import__\(.*_C|from pycompress import _C", path.read_text())
    }
    assert doors | text == {PACKAGE / "ops" / "cpu" / "native.py"}
    assert {path for path in files() if '"pycompress._cuda"' in path.read_text()} == {
        PACKAGE / "ops" / "cuda" / "native.py"
    }


def test_the_twin_is_used_where_it_is_now() -> None:
    users = {room(path) for path in files() if any(name == "reference" for name, _ in own(path))}
    assert users <= {"reference", "ops", "nn", "methods"}


def test_extras_are_imported_late() -> None:
    """`import pycompress` needs torch, numpy, numba and safetensors only."""
    reachable, queue = set(), ["__init__"]
    while queue:
        here = queue.pop()
        if here in reachable:
            continue
        reachable.add(here)
        for path in files():
            if room(path) == here:
                top = [name.split(".") for name, _, at_top in imported(path) if at_top]
                queue += [parts[1] for parts in top if parts[0] == "pycompress" and len(parts) > 1]
                if here in {"__init__", *CHAIN, "evaluation", "report", "storage", "interchange"}:
                    extras = {parts[0] for parts in top} & OUTSIDE
                    assert not extras, f"{path.relative_to(ROOT)} imports {extras} at its top"
    assert {"model", "ops", "validation", "storage"} <= reachable
    assert not reachable & {"cli", "demo", "benchmark", "onnx"}


def test_no_rooms_without_a_name() -> None:
    banned = {"utils", "util", "helpers", "helper", "misc", "common_utils", "experimental", "legacy"}
    for base in (PACKAGE, CSRC):
        assert not [path for path in base.rglob("*") if path.stem.lower() in banned]


# --- C++ ----------------------------------------------------------------------------------------------------------------

INSTRUCTION_SETS = sorted([*CSRC.glob("*/avx*.cpp"), *CSRC.glob("*/amx.cpp")])


def includes(path: Path) -> list[str]:
    return re.findall(r"^\s*#\s*include\s*([<\"][^>\"]+[>\"])", path.read_text(), re.MULTILINE)


def sources() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in {".cpp", ".h", ".cu", ".cuh"})


def test_bindings_are_the_only_files_with_python_in_them() -> None:
    for path in sources():
        python = [name for name in includes(path) if re.search("pybind11|Python.h|torch|ATen|c10", name)]
        if path.parent.name == "bindings":
            assert not [name for name in python if "torch" in name or "ATen" in name], path
        else:
            assert not python, f"{path.relative_to(ROOT)} includes {python}"
    assert any("pybind11" in name for path in (CSRC / "bindings").iterdir() for name in includes(path))


# What the sources of a folder may include of others: those above it alone, so there is no cycle.
BUILDS_ON: dict[str, set[str]] = {
    "common": set(),
    "cuda": {"common"},
    "peak": {"common"},
    "dense": {"common"},
    "embed": {"common"},
    "pool": {"common"},
    "int8": {"common", "cuda"},
    "conv": {"common", "int8"},
    "recurrent": {"common", "int8"},
    "int4": {"common", "int8"},
    "sparse": {"common", "cuda", "int8"},
    "sparse/bitmap": {"common", "cuda"},
    "sparse/blocks": {"common", "cuda", "int8", "sparse"},
    "sparse/structured": {"common", "cuda", "int8", "sparse"},
    "weight_only": {"common", "cuda", "dense", "int4"},
    "low_rank": {"common", "cuda", "dense", "int4", "int8", "sparse"},
    "block": {"common", "dense", "int4", "int8", "low_rank", "sparse", "weight_only"},
}
BUILDS_ON["bindings"] = set(BUILDS_ON)
BUILDS_ON["onnxruntime"] = {"common", "int4", "int8", "low_rank", "sparse", "weight_only"}


def folders_included(path: Path) -> set[str]:
    """Of csrc, but its own; what tests/native/cuda puts in the place of CUDA's headers is none."""
    files = [path.parent / name.strip('"') for name in includes(path) if name.startswith('"')]
    folders = {file.resolve().parent for file in files if not file.name.startswith("emulate")}
    return {folder.relative_to(CSRC).as_posix() for folder in folders - {path.parent}}


def test_the_reader_of_includes() -> None:
    assert folders_included(CSRC / "sparse" / "blocks" / "gemm_sm80.cu") == {"common", "cuda", "sparse"}
    assert folders_included(CSRC / "cuda" / "launch.h") == set()


def test_folders_build_on_those_above_them() -> None:
    folders = list(BUILDS_ON)
    assert {path.parent.relative_to(CSRC).as_posix() for path in sources()} == set(folders)
    for i, below in enumerate(BUILDS_ON.values()):
        assert below <= set(folders[:i])


@pytest.mark.parametrize("folder", BUILDS_ON)
def test_sources_include_what_their_folder_builds_on(folder: str) -> None:
    for path in (path for path in sources() if path.parent == CSRC / folder):
        assert folders_included(path) <= BUILDS_ON[folder], path


@pytest.mark.parametrize("path", INSTRUCTION_SETS, ids=lambda path: str(path.relative_to(ROOT)))
def test_instruction_set_files_include_no_library(path: Path) -> None:
    """An inline function of the C++ library, compiled there for a new processor, could be the copy that the linker keeps."""
    seen, queue = set(), [path]
    while queue:
        here = queue.pop()
        if here in seen:
            continue
        seen.add(here)
        for name in includes(here):
            if name.startswith('"'):
                header = (here.parent / name.strip('"')).resolve()
                assert header.is_relative_to(CSRC), f"{here}: {name}"
                queue.append(header)
            elif here == path:
                assert name == "<immintrin.h>", f"{here.relative_to(ROOT)} includes {name}"
            else:  # types, memcpy and, in pack.h, a declaration: no code of their own
                allowed = {"<cstddef>", "<cstdint>", "<cstring>", "<vector>", "<immintrin.h>"}
                assert name in allowed, f"{here.relative_to(ROOT)} includes {name}"


def cmake() -> str:
    """CMakeLists.txt without its comments."""
    return re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())


def test_no_flags_that_change_the_numbers_or_the_processor() -> None:
    for flag in (
        "-march=native",
        "-mtune=native",
        "-ffast-math",
        "-Ofast",
        "-funsafe-math",
        "-flto",
        "INTERPROCEDURAL",
    ):
        assert flag not in cmake()
    assert "-ffp-contract=off" in cmake()
    assert "--fmad=false" in cmake()
    assert "-warn-spills,-warn-lmem-usage,-Werror" in cmake(), "by which `make test-all` finds kernels that spill"
    assert not re.search("use_fast_math|ftz=true|prec-(div|sqrt)=false", cmake())


def test_the_build_needs_no_torch() -> None:
    requires = re.search(r"requires = \[(.*?)\]", (ROOT / "pyproject.toml").read_text())
    assert requires is not None
    names = {re.match(r'\s*"([\w-]+)', part).group(1) for part in requires[1].split(",")}  # type: ignore[union-attr]
    assert names == {"scikit-build-core", "pybind11"}
    assert not re.search(r"find_package\((Torch|CUDAToolkit REQUIRED)", cmake())


# --- the instructions that came out -------------------------------------------------------------------------------------

x86 = pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="the processor is no x86-64")
tools = pytest.mark.skipif(
    not all(map(shutil.which, ("objcopy", "objdump", "nm"))), reason="needs objcopy, objdump and nm (binutils)"
)


class Unit(NamedTuple):
    """A source of the core as it was compiled."""

    target: Path
    command: list[str]


@pytest.fixture(scope="module")
def extension() -> Path:
    """The extension that is installed here."""
    native = pytest.importorskip("pycompress.ops.cpu.native")
    if native.extension_error() is not None:
        pytest.skip("no extension was built")
    return Path(native._C.__file__)


@pytest.fixture(scope="module")
def objects(extension: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Unit]:
    """Every translation unit but the bindings, from the folder in `build` that the extension was built in."""
    folder = tmp_path_factory.mktemp("code")

    def code(module: Path) -> bytes:
        out = folder / "text"
        subprocess.run(["objcopy", "-O", "binary", "--only-section=.text", str(module), str(out)], check=True)
        return out.read_bytes()

    installed = code(extension)
    built = next((path for path in ROOT.glob("build/*/_C.*.so") if code(path) == installed), None)
    if built is None:
        pytest.skip("the extension that is installed was not built in a folder of build/, as `make test` does")
    files = [path for path in sources() if path.suffix in {".cpp", ".h"} and "cuda" not in str(path.relative_to(CSRC))]
    if any(path.stat().st_mtime > built.stat().st_mtime for path in files):
        pytest.skip("the sources are newer than the extension that was built of them")
    units = {}
    for unit in json.loads((built.parent / "compile_commands.json").read_text()):
        command = unit["command"].split()
        target = Path(unit["directory"]) / command[command.index("-o") + 1]
        if "core.dir" in target.parts:
            units[str(Path(unit["file"]).relative_to(ROOT))] = Unit(target, command)
    assert set(units) == {
        str(path.relative_to(ROOT))
        for path in files
        if path.suffix == ".cpp" and path.parent.name not in ("bindings", "onnxruntime")
    }
    return units


@functools.cache
def disassembly(target: Path) -> str:
    return subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(target)], capture_output=True, text=True, check=True
    ).stdout


@x86
@tools
def test_flags(objects: dict[str, Unit]) -> None:
    """Those for a processor, for the files of its name alone; those for exact floats, for all."""
    machine = {name: [word for word in unit.command if word.startswith("-m")] for name, unit in objects.items()}
    assert {name for name, words in machine.items() if words} == {str(p.relative_to(ROOT)) for p in INSTRUCTION_SETS}
    assert machine["csrc/int8/avx2.cpp"] == ["-mavx2", "-mfma", "-mf16c", "-mpopcnt"]
    assert machine["csrc/int8/avx512vnni.cpp"][-1] == "-mavx512vnni"
    assert all({"-O3", "-ffp-contract=off"} <= set(unit.command) for unit in objects.values())


@x86
@tools
def test_vector_instructions_stay_in_their_files(objects: dict[str, Unit]) -> None:
    """A file that runs before the processor was asked must hold nothing that it could lack."""
    allowed = {  # by the first word of the file's name
        "avx2": {"vex", "ymm"},
        "avxvnni": {"vex", "ymm", "vpdpbusd"},
        "avx512": {"vex", "ymm", "zmm"},
        "avx512vnni": {"vex", "ymm", "zmm", "vpdpbusd"},
        "amx": {"vex", "ymm", "zmm", "tdpbusd"},
    }
    for name, unit in objects.items():
        text = disassembly(unit.target)
        found = {what for what in ("ymm", "zmm", "vpdpbusd", "tdpbusd") if what in text}
        if re.search(r"^\s+[0-9a-f]+:\s+v[a-z]", text, re.MULTILINE):  # any instruction in the VEX or EVEX encoding
            found.add("vex")
        assert found <= allowed.get(Path(name).stem.split("_")[0], set()), f"{name} holds {found}"
    ops = ("dense", "int4", "int8", "sparse", "weight_only")
    ordinary = {f"csrc/{op}/{name}.cpp" for op in ops for name in ("gemm", "pack", "scalar")}
    assert ordinary | {"csrc/common/isa.cpp", "csrc/peak/peak.cpp"} <= set(objects)
    assert all("ymm" in disassembly(objects[f"csrc/{op}/avx2.cpp"].target) for op in ops)
    assert "vpdpbusd" in disassembly(objects["csrc/int8/avxvnni.cpp"].target)
    assert "zmm" in disassembly(objects["csrc/int8/avx512vnni.cpp"].target)


@x86
@tools
def test_vnni_without_avx512_is_encoded_for_processors_without_avx512(objects: dict[str, Unit]) -> None:
    """In the AVX-VNNI file `vpdpbusd` has the {vex} prefix; the plain name would be the AVX-512 one."""
    lines = [line for line in disassembly(objects["csrc/int8/avxvnni.cpp"].target).splitlines() if "vpdpbusd" in line]
    assert lines
    assert all("{vex}" in line for line in lines)
    assert not any("%k" in line or "{1to" in line for line in lines)


@x86
@tools
def test_the_linker_has_no_choice(objects: dict[str, Unit]) -> None:
    """Of a weak symbol (an inline function or template) in two objects it keeps one: none of those may be in both an
    instruction-set file and a file that runs everywhere."""
    weak: dict[str, set[str]] = {}
    for name, unit in objects.items():
        lines = subprocess.run(["nm", "-C", str(unit.target)], capture_output=True, text=True, check=True).stdout
        weak[name] = {found[1] for found in re.finditer(r" [WVuv] (.*)", lines)}
    for path in INSTRUCTION_SETS:
        name = str(path.relative_to(ROOT))
        assert all(symbol.split("(")[0].count("pycompress::") for symbol in weak[name]), f"{name} holds library code"
        for other, symbols in weak.items():
            assert other == name or not symbols & weak[name], f"{name} and {other} share {symbols & weak[name]}"


@x86
@tools
def test_the_built_module_holds_what_the_files_hold(extension: Path, objects: dict[str, Unit]) -> None:
    """The extension that is installed here, disassembled: not one wide instruction more, so none in the bindings."""
    whole, parts = disassembly(extension), [disassembly(unit.target) for unit in objects.values()]
    for what in ("ymm", "zmm", "vpdpbusd", "tdpbusd"):
        expected = sum(what in line for part in parts for line in part.splitlines())
        assert sum(what in line for line in whole.splitlines()) == expected, what
