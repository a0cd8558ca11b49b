"""The shape of the house: who imports whom, and which file may hold which instructions."""

from __future__ import annotations

import ast
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, CSRC = ROOT / "pycompress", ROOT / "csrc"

# What each module may import of the package; nothing points back up the chain cli -> model -> nn -> methods -> ops -> _C.
ALLOWED: dict[str, set[str]] = {
    "reference": set(),
    "measure": set(),
    "fusion": set(),
    "ops": {"_C", "reference"},
    "methods": {"ops", "reference", "measure"},
    "nn": {"methods", "ops", "reference"},
    "records": {"nn"},
    "calibration": {"nn", "methods"},
    "plan": {"records", "nn", "methods", "ops", "fusion"},
    "model": {"plan", "records", "calibration", "nn", "methods", "ops", "fusion", "measure"},
    "storage": {"model", "records", "nn", "methods", "ops", "fusion"},
    "onnx": {"nn", "methods", "ops"},
    "validation": {"onnx", "model", "nn", "methods", "ops"},
    "benchmark": {"model", "nn", "methods", "ops", "measure", "onnx"},
    "demo": {"benchmark", "validation", "storage", "model", "calibration", "nn", "methods", "ops", "onnx"},
    "cli": {"demo", "benchmark", "validation", "storage", "model", "nn", "methods", "ops", "onnx"},
    "__init__": {"validation", "storage", "model", "calibration", "nn", "methods", "ops"},
}
CHAIN = ["model", "plan", "calibration", "records", "nn", "methods", "ops", "reference", "fusion", "measure"]
ABOVE = {"onnx", "validation", "benchmark", "demo", "cli", "storage"}
OUTSIDE = {"onnx", "onnxruntime", "click", "rich", "transformers", "matplotlib", "sentence_transformers"}


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
    source = PACKAGE / "nn" / "int8.py"
    names = {name for name, _, _ in imported(source)}
    assert {"torch", "torch.Tensor", "pycompress.ops", "pycompress.methods.int8.Int8"} <= names
    assert {("ops"), ("methods")} <= {name for name, _ in own(source)}


def test_every_module_has_a_place() -> None:
    assert {room(path) for path in files()} <= set(ALLOWED), "a new module needs a line in ALLOWED"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_points_back(path: Path) -> None:
    here = room(path)
    for name, line in own(path):
        if name != here:
            assert name in ALLOWED[here], f"{path.relative_to(ROOT)}:{line}: {here} imports {name}"


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


def test_one_door_to_the_native_module() -> None:
    doors = {path for path in files() if any(name.startswith("_C") for name, _ in own(path))}
    text = {
        path
        for path in files()
        if re.search(r"\bimport_module\(.*_C|__import__\(.*_C|from pycompress import _C", path.read_text())
    }
    assert doors | text == {PACKAGE / "ops" / "native.py"}
    assert {path for path in files() if '"pycompress._cuda"' in path.read_text()} == {PACKAGE / "ops" / "cuda.py"}


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
                if here in {"__init__", *CHAIN, "storage"}:
                    extras = {parts[0] for parts in top} & OUTSIDE
                    assert not extras, f"{path.relative_to(ROOT)} imports {extras} at its top"
    assert {"model", "ops", "validation", "storage"} <= reachable
    assert not reachable & {"cli", "demo", "benchmark", "onnx"}


def test_no_rooms_without_a_name() -> None:
    banned = {"utils", "util", "helpers", "helper", "misc", "common_utils", "experimental", "legacy"}
    for base in (PACKAGE, CSRC):
        assert not [path for path in base.rglob("*") if path.stem.lower() in banned]


# --- C++ ----------------------------------------------------------------------------------------------------------------

INSTRUCTION_SETS = sorted(CSRC.glob("*/avx*.cpp"))


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


# What the sources of an op may include of other ops; all may use csrc/common and csrc/cuda.
BUILDS_ON: dict[str, set[str]] = {
    "int8": set(),
    "sparse": {"int8"},
    "int4": {"int8"},
    "low_rank": {"int8", "int4", "sparse"},
    "weight_only": {"int8", "int4", "low_rank"},
}


def test_every_folder_of_sources_has_a_place() -> None:
    assert {path.name for path in CSRC.iterdir()} == {*BUILDS_ON, "bindings", "common", "cuda", "peak"}


def test_common_knows_no_op() -> None:
    for path in (CSRC / "common").iterdir():
        assert not [name for name in includes(path) if re.search("|".join([*BUILDS_ON, "peak", "bindings"]), name)], (
            path
        )


@pytest.mark.parametrize("op", BUILDS_ON)
def test_an_op_knows_only_those_that_it_builds_on(op: str) -> None:
    others = {*BUILDS_ON, "peak", "bindings"} - {op} - BUILDS_ON[op]
    for path in (CSRC / op).iterdir():
        found = {name for name in others if any(f"/{name}/" in file for file in includes(path))}
        assert not found, f"{path.relative_to(ROOT)} includes files of {found}"


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
    not all(map(shutil.which, ("objdump", "nm", "g++"))), reason="needs objdump, nm and g++ (binutils, gcc)"
)


def flags() -> tuple[list[str], dict[str, list[str]]]:
    """The flags of every file and those of single files, read from CMakeLists.txt."""
    text = cmake()
    variables = {name: value.split() for name, value in re.findall(r"set\((\w+) ((?:-m\S+|\S+\.cpp)[^)]*)\)", text)}
    general = re.search(r"target_compile_options\(core PRIVATE ([^)]*)\)", text)
    assert general is not None
    special: dict[str, list[str]] = {}
    for names, options in re.findall(
        r"set_source_files_properties\(\s*((?:\S+\.cpp\s+|\$\{\w+\}\s+)+)PROPERTIES COMPILE_OPTIONS \"([^\"]*)\"", text
    ):
        own_flags: list[str] = []
        for option in options.split(";"):
            own_flags += variables[option[2:-1]] if option.startswith("${") else [option]
        for name in names.split():
            for file in variables[name[2:-1]] if name.startswith("${") else [name]:
                special[file] = own_flags
    return general[1].split(), special


def test_the_reader_of_flags() -> None:
    general, special = flags()
    assert "-O3" in general
    assert special["csrc/int8/avx2.cpp"] == ["-mavx2", "-mfma", "-mf16c", "-mpopcnt"]
    assert special["csrc/int8/avx512vnni.cpp"][-1] == "-mavx512vnni"
    assert set(special) == {str(path.relative_to(ROOT)) for path in INSTRUCTION_SETS}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every translation unit but the bindings (pybind11 takes long), compiled with the flags of CMakeLists.txt."""
    general, special = flags()
    folder = tmp_path_factory.mktemp("objects")
    base = ["g++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DPYCOMPRESS_X86", "-fopenmp", *general, "-w", "-c"]

    def compile_one(path: Path) -> tuple[str, Path]:
        name = str(path.relative_to(ROOT))
        target = folder / (name.replace("/", "_") + ".o")
        subprocess.run([*base, *special.get(name, []), str(path), "-o", str(target)], check=True)
        return name, target

    units = [path for path in sources() if path.suffix == ".cpp" and path.parent.name != "bindings"]
    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(compile_one, units))


def disassembly(target: Path) -> str:
    return subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(target)], capture_output=True, text=True, check=True
    ).stdout


@x86
@tools
def test_vector_instructions_stay_in_their_files(objects: dict[str, Path]) -> None:
    """A file that runs before the processor was asked must hold nothing that it could lack."""
    allowed = {  # by the first word of the file's name
        "avx2": {"vex", "ymm"},
        "avxvnni": {"vex", "ymm", "vpdpbusd"},
        "avx512vnni": {"vex", "ymm", "zmm", "vpdpbusd"},
    }
    for name, target in objects.items():
        text = disassembly(target)
        found = {what for what in ("ymm", "zmm", "vpdpbusd") if what in text}
        if re.search(r"^\s+[0-9a-f]+:\s+v[a-z]", text, re.MULTILINE):  # any instruction in the VEX or EVEX encoding
            found.add("vex")
        assert found <= allowed.get(Path(name).stem.split("_")[0], set()), f"{name} holds {found}"
    ordinary = {f"csrc/{op}/{name}.cpp" for op in BUILDS_ON for name in ("gemm", "pack", "scalar")}
    assert ordinary | {"csrc/common/isa.cpp", "csrc/peak/peak.cpp"} <= set(objects)
    assert all("ymm" in disassembly(objects[f"csrc/{op}/avx2.cpp"]) for op in BUILDS_ON)
    assert "vpdpbusd" in disassembly(objects["csrc/int8/avxvnni.cpp"])
    assert "zmm" in disassembly(objects["csrc/int8/avx512vnni.cpp"])


@x86
@tools
def test_vnni_without_avx512_is_encoded_for_processors_without_avx512(objects: dict[str, Path]) -> None:
    """In the AVX-VNNI file `vpdpbusd` has the {vex} prefix; the plain name would be the AVX-512 one."""
    lines = [line for line in disassembly(objects["csrc/int8/avxvnni.cpp"]).splitlines() if "vpdpbusd" in line]
    assert lines
    assert all("{vex}" in line for line in lines)
    assert not any("%k" in line or "{1to" in line for line in lines)


@x86
@tools
def test_the_linker_has_no_choice(objects: dict[str, Path]) -> None:
    """Of a weak symbol (an inline function or template) in two objects it keeps one: none of those may be in both an
    instruction-set file and a file that runs everywhere."""
    weak: dict[str, set[str]] = {}
    for name, target in objects.items():
        lines = subprocess.run(["nm", "-C", str(target)], capture_output=True, text=True, check=True).stdout
        weak[name] = {found[1] for found in re.finditer(r" [WVuv] (.*)", lines)}
    for path in INSTRUCTION_SETS:
        name = str(path.relative_to(ROOT))
        assert all(symbol.split("(")[0].count("pycompress::") for symbol in weak[name]), f"{name} holds library code"
        for other, symbols in weak.items():
            assert other == name or not symbols & weak[name], f"{name} and {other} share {symbols & weak[name]}"


@x86
@tools
def test_the_built_module_holds_what_the_files_hold(objects: dict[str, Path]) -> None:
    """The extension that is installed here, disassembled: not one wide instruction more, so none in the bindings."""
    native = pytest.importorskip("pycompress.ops.native")
    if native.extension_error() is not None:
        pytest.skip("no extension was built")
    built = Path(native._C.__file__)
    if any(path.stat().st_mtime > built.stat().st_mtime for path in [*sources(), ROOT / "CMakeLists.txt"]):
        pytest.skip("the sources are newer than the extension that was built of them")
    whole, parts = disassembly(built), [disassembly(target) for target in objects.values()]
    for what in ("ymm", "zmm", "vpdpbusd"):
        expected = sum(what in line for part in parts for line in part.splitlines())
        assert sum(what in line for line in whole.splitlines()) == expected, what
