"""Writes a file beside its place and moves it there when it is complete."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where nobody can remove a file that is open
    fcntl = None  # type: ignore[assignment]

_KINDS = {
    stat.S_IFIFO: 'a fifo',
    stat.S_IFCHR: 'a device',
    stat.S_IFBLK: 'a device',
    stat.S_IFSOCK: 'a socket',
}


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a file for writing that takes the place of another when it is complete.

    The content goes into a temporary file in the same folder, which is flushed to disk
    and then renamed. After an error the temporary file is gone, and the file at the
    path is as before. What a killed process left there goes away when the same path is
    written again.

    A file that was there keeps its mode; the mode of a new file follows the umask.
    Where the path is a symbolic link, the file that it points to is replaced.

    Args:
        path (path-like): Where the file is wanted.

    Returns:
        A context manager. Its value is a binary file to write to, not to be closed.

    Raises:
        OSError: The file cannot be written, or the path is a folder, a fifo, a device
            or a socket. It names the path, not the temporary file.

    """
    path = os.fsdecode(path)
    part, file = '', None
    try:
        mode = _mode(path)
        folder, name = os.path.split(os.path.realpath(path))
        start = f'.{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}.'
        _remove_leftovers(folder, start)
        while file is None:
            part = os.path.join(folder, f'{start}{secrets.token_hex(8)}.part')
            file = _create(part, 0o666 if mode is None else 0o600)
        yield file
        file.flush()
        if mode is not None and hasattr(os, 'fchmod'):
            os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
        if fcntl is None:
            file.close()  # Windows renames no file that is open
        os.replace(part, os.path.join(folder, name))
    except BaseException as e:
        if file is not None:
            with contextlib.suppress(OSError):  # that of a full disk, again
                file.close()
        if part:
            with contextlib.suppress(OSError):
                os.unlink(part)
        if isinstance(e, OSError) and e.errno and e.filename in (None, part):
            raise OSError(e.errno, e.strerror, path) from None
        raise
    file.close()  # and with it the lock, which the file had up to here
    _flush_folder(folder)


def _mode(path: str) -> int | None:
    """The mode of the file that is there; None if there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if not os.path.basename(path):  # 'folder/', or nothing at all
            raise
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, 'there is a folder', path)
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), 'something else')
        raise OSError(errno.EINVAL, f'there is {kind}, not a regular file', path)
    return stat.S_IMODE(status.st_mode)


def _create(part: str, mode: int) -> BinaryIO | None:
    """Makes a file and locks it; None if another process has just removed it.

    The lock says that the writer is alive. Between the two steps another process may
    take the file for a leftover.
    """
    file = open(  # noqa: SIM115 (the caller closes it)
        part, 'xb', opener=lambda name, flags: os.open(name, flags, mode)
    )
    if fcntl is None:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        return file  # a file system without locks; nobody removes leftovers there
    if os.fstat(file.fileno()).st_nlink:
        return file
    file.close()
    return None


def _remove_leftovers(folder: str, start: str) -> None:
    """Removes the temporary files of writers that are gone."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if (
                entry.name.startswith(start)
                and entry.name.endswith('.part')
                and entry.is_file(follow_symlinks=False)
            ):
                with contextlib.suppress(OSError):
                    _remove_leftover(entry.path)


def _remove_leftover(part: str) -> None:
    """Removes a temporary file; OSError if its writer has it open."""
    if fcntl is None:
        os.unlink(part)
        return
    descriptor = os.open(part, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(part)
    finally:
        os.close(descriptor)


def _flush_folder(folder: str) -> None:
    """Has the new name written to disk, where the system can do that."""
    if not hasattr(os, 'O_DIRECTORY'):
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
