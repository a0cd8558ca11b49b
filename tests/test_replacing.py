"""A file takes the place of another whole or not at all; mode, owner and links are kept. `stress_save.py` kills it at random."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import pycompress as pc
from pycompress.replacing import replacing
from pycompress.storage import saving

OTHER = 1234  # a user and a group that are not ours
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs the rights of root")


def model(numbers: int = 1000) -> nn.Module:
    made = pc.compress(nn.Sequential(nn.Linear(16, 16)), pc.Int8())
    made.register_buffer("table", torch.arange(numbers))
    return made


def write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        Path(temporary).write_text(text)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


# --- mode, owner, links -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o000, 0o077, 0o777])
def test_a_new_file_has_the_mode_that_umask_says(mask: int, path: Path, umask: Callable[[int], int]) -> None:
    umask(mask)
    pc.save(model(), path)
    assert mode(path) == 0o666 & ~mask
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("old", [0o644, 0o600, 0o666, 0o640, 0o755])
def test_a_replaced_file_keeps_its_mode(old: int, path: Path) -> None:
    path.touch()
    path.chmod(old)
    pc.save(model(), path)
    pc.load(model(), path)
    assert mode(path) == old


@root
def test_a_replaced_file_keeps_its_owner(path: Path) -> None:
    path.touch()
    os.chown(path, OTHER, OTHER)
    path.chmod(0o4755)  # which a change of owner would take away
    pc.save(model(), path)
    assert (path.stat().st_uid, path.stat().st_gid, mode(path)) == (OTHER, OTHER, 0o4755)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_link_stays_and_what_it_points_to_is_replaced(absolute: bool, path: Path) -> None:
    real, link, chain = path.parent / "deep" / "real", path.parent / "link", path.parent / "chain"
    real.parent.mkdir()
    link.symlink_to(real if absolute else "deep/real")
    chain.symlink_to("link")
    for there in (False, True):  # also one that points nowhere yet
        assert real.exists() is there
        pc.save(model(), chain)
        pc.load(model(), chain)
        assert chain.is_symlink() and link.is_symlink() and not real.is_symlink()
        assert {*path.parent.iterdir()} == {link, chain, real.parent} and [*real.parent.iterdir()] == [real]


def test_links_in_a_circle(path: Path) -> None:
    path.symlink_to("other")
    (path.parent / "other").symlink_to(path.name)
    with pytest.raises(OSError, match="save: "):
        pc.save(model(), path)
    assert path.is_symlink()


# --- paths --------------------------------------------------------------------------------------------------------------


def test_kinds_of_paths(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Like:
        def __fspath__(self) -> str:
            return str(path)

    monkeypatch.chdir(path.parent)
    for given in (str(path), Like(), path.name, f"./{path.name}", f"../{path.parent.name}/{path.name}"):
        pc.save(model(), given)
        assert [*path.parent.iterdir()] == [path]
        pc.load(model(), given)
        path.unlink()


@pytest.mark.parametrize("name", ["with space", "ünï", "line\nbreak", "x" * 255, "a'\"\\"])
def test_odd_names(name: str, tmp_path: Path) -> None:
    pc.save(model(), tmp_path / name)
    pc.load(model(), tmp_path / name)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_paths_that_are_none(tmp_path: Path) -> None:
    for bad, error, words in (
        (tmp_path, IsADirectoryError, "save: Is a directory"),
        ("", IsADirectoryError, "save: "),
        (tmp_path / "no" / "folder", FileNotFoundError, "save: No such file or directory"),
        (tmp_path / ("x" * 300), OSError, "save: File name too long"),
        (os.devnull, OSError, "save: no regular file"),
        (3, TypeError, "int"),
        (None, TypeError, "NoneType"),
    ):
        with pytest.raises(error, match=words):
            pc.save(model(), bad)
    assert not [*tmp_path.iterdir()]
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


# --- what can go wrong --------------------------------------------------------------------------------------------------


def interrupted(what: BaseException) -> Callable[..., None]:
    def half(tensors: Any, filename: str, metadata: Any) -> None:
        Path(filename).write_bytes(b"half")
        raise what

    return half


@pytest.mark.parametrize(
    ("what", "error"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt), (MemoryError(), MemoryError), (OSError(errno.EIO, "broken"), OSError),
        (safetensors.SafetensorError("full"), OSError),
    ],
    ids=repr,
)  # fmt: skip
def test_an_old_file_stays_when_writing_fails(
    what: BaseException, error: type[BaseException], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "save_file", interrupted(what))
    for before in (None, b"old"):
        if before is not None:
            path.write_bytes(before)
        with pytest.raises(error):
            pc.save(model(), path)
        assert (path.read_bytes() if path.exists() else None) == before
        assert [*path.parent.iterdir()] == [path] * (before is not None)


def fail_beside(temporary: Path) -> None:
    temporary.with_name(".tmp123").touch()
    Path("nowhere", "at all").touch()


def test_whatever_lies_beside_the_temporary_file_goes_with_it(path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(path) as temporary:
        fail_beside(Path(temporary))
    assert not [*path.parent.iterdir()]


def test_a_full_disk(path: Path) -> None:
    folder = path.parent / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        small = folder / "model.safetensors"
        pc.save(model(), small)
        before = small.read_bytes()
        with pytest.raises(OSError, match=r"save: .*(No space left|StorageFull)"):
            pc.save(model(1_000_000), small)
        assert small.read_bytes() == before and [*folder.iterdir()] == [small]
        small.unlink()
        with pytest.raises(OSError, match="save: "):
            pc.save(model(1_000_000), small)
        assert not [*folder.iterdir()]
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_limit_of_the_size_of_files(path: Path, forked: Callable[..., Any]) -> None:
    pc.save(model(), path)
    before, large = path.read_bytes(), model(1_000_000)

    def save() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            pc.save(large, path)
        except OSError as error:
            return str(error)
        return "saved"

    assert "save: " in forked(save)
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


@root
@pytest.mark.parametrize("protected", ["the folder", "the file"])
def test_what_may_not_be_written(protected: str, forked: Callable[..., Any]) -> None:
    made = model()
    with TemporaryDirectory() as folder:  # which another user may enter, as pytest's are not
        path = Path(folder) / "model.safetensors"
        path.write_bytes(b"old")
        path.chmod(0o444 if protected == "the file" else 0o666)
        path.parent.chmod(0o555 if protected == "the folder" else 0o777)

        def save() -> str:
            os.setuid(OTHER)
            try:
                pc.save(made, path)
            except PermissionError as error:
                return str(error)
            return "saved"

        assert "save: Permission denied" in forked(save)
        assert path.read_bytes() == b"old" and [*path.parent.iterdir()] == [path]


def test_a_write_protected_file_is_not_replaced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="save: Permission denied"):
        pc.save(model(), path)
    assert path.read_bytes() == b"old"


def test_two_at_once(path: Path) -> None:
    with replacing(path) as first, replacing(path) as second:
        Path(first).write_text("first")
        Path(second).write_text("second")
    assert path.read_text() == "first", "which ended last"
    assert [*path.parent.iterdir()] == [path]


def test_nothing_is_there_before_the_end(path: Path) -> None:
    write(path, "old")
    with replacing(path) as temporary:
        Path(temporary).write_text("new")
        assert path.read_text() == "old"
        assert mode(Path(temporary)) == 0o600, "nobody else reads a half"
    assert path.read_text() == "new"


@pytest.mark.slow
def test_killed_at_random() -> None:
    script = Path(__file__).parent / "stress_save.py"
    result = subprocess.run([sys.executable, script, "15"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "15 kills, all files whole" in result.stdout
