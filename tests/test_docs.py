"""README and docs: their code runs, their links lead somewhere, the commands that they name exist."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pycompress import ops

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
README_BYTES = 8000
# Whole models, validated or measured; a compiler that starts. The others take seconds together.
SLOW = {"README.md", "docs/guide/search.md", "docs/guide/torch.md"}
# Registers weights, kinds and layers, which the other tests should not find in the tables: runs in an interpreter of its own.
APART = "docs/guide/extend.md"

# What the title of a block may say that it needs: a block that needs what is not here is compiled and not run.
NEEDS: dict[str, Callable[[], bool]] = {"a CUDA device": lambda: ops.cuda_error() is None}

FENCE = re.compile(
    r'^```(?P<language>\w*)(?: title="needs (?P<needs>[^"]+)")?\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"\]\((?P<path>[^)#\s]*)(?:#[^)\s]*)?\)")
INLINE = re.compile(r"`([^`\n]+)`")
OPTION = re.compile(r"--[a-z][a-z-]*")


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line``: of its first line of code in the page, from 1."""

    language: str
    needs: str | None
    code: str
    line: int


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["language"], m["needs"], m["code"], text.count("\n", 0, m.start("code")) + 1)
        for m in FENCE.finditer(text)
    ]


def compiled(page: Path) -> Iterator[tuple[Block, Any]]:
    """The page's Python blocks as code, whose tracebacks name the lines of the page."""
    for block in blocks(page):
        if block.language == "python":
            yield block, compile("\n" * (block.line - 1) + block.code, str(page), "exec", dont_inherit=True)


WITH_CODE = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_the_code_compiles(page: Path) -> None:
    for block, _ in compiled(page):
        assert block.needs is None or block.needs in NEEDS, f"{name(page)}:{block.line}: needs {block.needs!r}?"


def run(page: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block, code in compiled(page):
        if block.needs is None or NEEDS[block.needs]():
            exec(code, namespace)


@pytest.mark.parametrize("page", [page for page in WITH_CODE if name(page) not in {*SLOW, APART}], ids=name)
def test_the_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(page)


def test_the_code_that_registers_runs(tmp_path: Path, python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = "import os, pathlib, sys, test_docs; os.chdir(sys.argv[2]); test_docs.run(pathlib.Path(sys.argv[1]))"
    done = python(code, ROOT / APART, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in WITH_CODE if name(page) in SLOW], ids=name)
def test_the_slow_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_fences_and_links(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(blocks(page)), (
        "a fence is open, or its title is none"
    )
    for link in LINK.finditer(FENCE.sub("", text)):
        path = link["path"]
        if path and not re.match(r"[a-z]+:", path):
            assert (page.parent / path).exists(), f"{name(page)} links to {path}, which is not there"


def test_the_readme_fits_its_size() -> None:
    assert README.stat().st_size <= README_BYTES
    assert sum(block.code.count("\n") for block in blocks(README) if block.language == "python") <= 14


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[str]:
    """The lines of shell blocks, and what the text has in backticks."""
    for block in blocks(page):
        if block.language == "sh":
            yield from (line.split("#")[0].strip() for line in block.code.splitlines())
    yield from INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8")))


ALL = sorted({(name(page), command) for page in TEXTS for command in commands(page)})


def of(pattern: str) -> list[tuple[str, str]]:
    return [(page, command) for page, command in ALL if re.match(pattern, command)]


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = of(r"make [a-z]")
    assert named
    for page, command in named:
        for target in command.split()[1:]:
            assert target in targets, f"{page} names `{command}`, the Makefile has {', '.join(targets)}"


def test_scripts_exist_and_have_their_options() -> None:
    named = of(r"python (?:benchmarks|tests)/")
    assert named
    for page, command in named:
        script = ROOT / command.split()[1]
        assert script.exists(), f"{page} names `{command}`"
        known = set(OPTION.findall(script.read_text(encoding="utf-8"))) | all_options()
        assert set(OPTION.findall(command)) <= known, f"{page} names `{command}`, the options are {sorted(known)}"


def test_subcommands_exist_and_have_their_options() -> None:
    named = of(r"pycompress [a-z]")
    assert named
    for page, command in named:
        found: Any = group()
        for word in command.split()[1:]:
            if word.startswith("-") or not hasattr(found, "commands"):  # options, arguments
                break
            for part in word.split("|"):  # `int8|int4`
                assert part in found.commands, f"{page} names `{command}`, there are {', '.join(found.commands)}"
            found = found.commands[word.split("|")[0]]
        known = {option for parameter in found.params for option in parameter.opts}
        assert set(OPTION.findall(command)) <= known, f"{page} names `{command}`, the options are {sorted(known)}"


def group() -> Any:
    from pycompress import cli

    return cli.pycompress


def all_options(command: Any = None) -> set[str]:
    """Of every command below this one: the scripts in benchmarks/ take those of `pycompress bench`."""
    command = command or group()
    own = {option for parameter in command.params for option in parameter.opts}
    return own.union(*(all_options(child) for child in getattr(command, "commands", {}).values()))
