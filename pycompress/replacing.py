"""A file takes the place of another whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from tempfile import TemporaryDirectory

FilePath = str | PathLike[str]


@contextmanager
def replacing(path: FilePath) -> Iterator[str]:
    """Gives a path to write a file to; when the block has ended, that file takes the place of ``path`` in one step.

    Where the block raises, nothing has happened; where the process is killed in it, a folder ``.pycompress-*`` is left beside the
    file, which is the old one still. Needs room for both. A symbolic link stays, what it points to is replaced. A new file has the
    mode that any new file gets there, a replaced one that of the old, and its owner where this process may give it away.

    Raises:
        OSError: the folder cannot be written, the old file is protected or is none (a folder, a device).
    """
    target = os.path.realpath(path)
    old = _old(target)
    with TemporaryDirectory(prefix=".pycompress-", dir=os.path.dirname(target), ignore_cleanup_errors=True) as folder:
        # In a folder of its own, so that whatever the writer puts beside its file goes with it.
        temporary = os.path.join(folder, "new")
        with open(temporary, "xb"):
            mode = os.stat(temporary).st_mode if old is None else old.st_mode
        os.chmod(temporary, stat.S_IRUSR | stat.S_IWUSR)
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        if old is not None:
            for owner in ((-1, old.st_gid), (old.st_uid, -1)):
                with suppress(OSError, AttributeError):  # (Windows has no owners)
                    os.chown(temporary, *owner)
        os.chmod(temporary, stat.S_IMODE(mode))
        os.replace(temporary, target)


def _old(target: str) -> os.stat_result | None:
    """What is known of the file that will be replaced; None where there is none."""
    try:
        old = os.stat(target)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(old.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), target)
    if not stat.S_ISREG(old.st_mode):
        raise OSError(errno.EINVAL, "no regular file", target)
    if not os.access(target, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), target)
    return old
