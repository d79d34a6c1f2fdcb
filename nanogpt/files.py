"""Files: atomic writes, reads of regular files only, and locks against other processes.

The callers know what the files hold. All errors are OSErrors.
"""

import errno
import json
import os
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TextIO


def open_regular(path: Path | str) -> int:
    """A descriptor to read the regular file at `path`. OSError for anything else: a pipe or device could block forever."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    return _only_regular(handle, path)


def _only_regular(handle: int, path: Path | str) -> int:
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return handle
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def identity(path: Path | str | int) -> tuple[int, int] | None:
    """(device, inode) of a file or folder, given its path or descriptor; None if it is gone."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def read(path: Path | str) -> bytes:
    """The bytes of the regular file at `path`."""
    with open(open_regular(path), "rb") as f:
        return f.read()


def append_to(path: Path | str) -> TextIO:
    """The regular file at `path`, or a new one, opened to append lines of text; a symbolic link is not followed."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = _only_regular(os.open(path, flags, 0o666), path)
    return open(path, "a", buffering=1, encoding="utf-8", opener=lambda *_: handle)  # so its name is the path


def create(path: Path | str, mode: str = "xb", buffering: int = -1) -> Any:
    """A new file at `path`, open for writing. An existing one is removed first, so a symbolic link is not followed."""
    Path(path).unlink(missing_ok=True)
    return open(path, mode, buffering)


def temporary(path: Path) -> Path:
    """The name beside `path` under which this process writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sync(file: IO) -> None:
    """Force what was written to an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def write(path: Path | str, data: bytes) -> None:
    """Atomic, durable write: at every moment, `path` has its previous contents or all of `data`."""
    new = temporary(Path(path))
    try:
        with create(new) as f:
            f.write(data)
            sync(f)
        os.replace(new, path)
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """`write` of a value as JSON."""
    write(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def flush(path: Path | str) -> None:
    """Force a file, or the names in a folder, to disk. Does nothing for folders on systems that cannot."""
    if not hasattr(os, "O_DIRECTORY") and os.path.isdir(path):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)  # macOS: its fsync leaves the drive's own cache alone
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """The name under which to make a file or a folder of files: it becomes `path` at the end, once it is on the disk.

    If the block raises, or the process is killed, there is nothing at `path`. What a killed process left is removed first.
    """
    new = path.with_name(f".{path.name}.tmp")
    discard(new)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield new
        for part in [*(new.iterdir() if new.is_dir() else ()), new]:
            flush(part)
        os.rename(new, path)
    except BaseException:
        discard(new)
        raise
    flush(path.parent)


def discard(path: Path) -> None:
    """Remove a file or a folder, as far as that is possible; a symbolic link is not followed."""
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


REMOVED = "it was removed or replaced during the run"


class Lock:
    """A lock file, held by one process at a time. The lock ends with its process, however that ends.

    If the system or the file system has no locks, every process gets it. A context manager releases it at its end.
    """

    def __init__(self, path: Path | str) -> None:
        self.path, self.signed = Path(path), False
        self.handle: int | None = None  # the open file, while the lock is held

    def take(self, create: bool = True) -> None:
        """Lock it, or raise BlockingIOError, which names the holder. Without `create`, a missing file is not locked."""
        if self.handle is not None:
            return
        flags = os.O_RDWR | (os.O_CREAT if create else 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            handle = _only_regular(os.open(self.path, flags, 0o666), self.path)
        except FileNotFoundError:
            if create:
                raise
            return
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # not on Windows
        except BlockingIOError as e:
            holder = os.read(handle, 1000).decode(errors="replace").strip()
            os.close(handle)
            raise BlockingIOError(e.errno, holder or "an unnamed process") from None
        except OSError:
            pass  # some network file systems
        self.handle = handle

    def sign(self) -> None:
        """Write this process's id and host into it."""
        assert self.handle is not None, "the lock is not held"
        self.signed = True
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: Any) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock."""
        if self.handle is not None:
            with suppress(OSError):
                if self.signed:
                    os.ftruncate(self.handle, 0)
            os.close(self.handle)
            self.handle = None
