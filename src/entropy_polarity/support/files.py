"""Files that neither a kill nor a stranger's folder can spoil: written in one move, and never through a link.

A file is written under a random name beside its place, which nobody else can have taken (O_EXCL), put on the disk, and
moved there: a reader sees the old file or the new one, also after a loss of power.
"""

import errno
import os
import re
import secrets
import shutil
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = "lock"
# What a kill can leave of a write: it stands under the name of the file and sixteen random digits.
DRAFT = re.compile(r"(?P<name>.+)\.[0-9a-f]{16}\.part")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
_LOOK = 0.1  # seconds between two looks at a lock


def draft_of(path: Path) -> Path:
    """A place beside `path` for what is not there yet, or not any more."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file to write into; it takes the place of `path` when the block ends, and is gone when that raises."""
    draft = draft_of(path)
    try:
        with open(draft, "xb", opener=_without_links) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace the file in one move, in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def append_text(path: Path, text: str) -> None:
    """Add to the end of the file, in UTF-8. Raises OSError where it is a link."""
    with open(path, "ab", opener=_without_links) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it gets the name `path`, where nothing may be, when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(path)
    draft.mkdir()
    try:
        yield draft
        for file in draft.rglob("*"):
            sync_file(file) if file.is_file() else sync_folder(file)
        sync_folder(draft)
        os.rename(draft, path)
    except BaseException:
        shutil.rmtree(draft)
        raise
    sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder in one move: what a kill leaves of it has the name of a draft."""
    draft = draft_of(path)
    os.rename(path, draft)
    shutil.rmtree(draft)


def sync_file(path: Path) -> None:
    """Return when the file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Return when the names in a folder are on the disk, where the system can promise that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def refuse_links(folder: Path) -> None:
    """Raise OSError if `folder` holds, at any depth, a link that leads out of it, or a pipe or a device: we could write
    into, or delete, what is not its own. The folder itself may be a link: the user named that one."""
    root = os.path.realpath(folder)
    for parent, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            if not os.path.lexists(path):  # a draft of another process, moved meanwhile
                continue
            if os.path.islink(path) and os.path.commonpath([root, os.path.realpath(path)]) != root:
                raise OSError(f"{path} is a link that leads out of {folder}: put the file or folder itself there")
            mode = os.lstat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
                raise OSError(f"{path} is neither a file nor a folder: remove it")


@contextmanager
def locked(folder: Path, what: str = "process", patience: float = 0.0) -> Iterator[int]:
    """Make `folder` and hold the operating system's lock on a file in it; it ends with the process, whatever ends that.

    Yields the handle: a process that inherits it holds the lock too. Raises BlockingIOError where another process has
    it for longer than `patience` seconds; `what` is what that is called. A file system without locks gives a warning.
    """
    made = not folder.exists()
    handle = _handle_of_lock(folder, what, time.monotonic() + patience)
    try:
        yield handle
    except BaseException:
        if made and [path.name for path in folder.iterdir()] == [LOCK]:  # nothing was made: the place is free
            (folder / LOCK).unlink()
            with suppress(OSError):  # another process puts its lock there
                folder.rmdir()
        raise
    finally:
        os.close(handle)


def _handle_of_lock(folder: Path, what: str, until: float) -> int:
    """The handle of the lock file in `folder`, held. Before the time `until` it is waited for."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = _without_links(str(folder / LOCK), os.O_WRONLY | os.O_CREAT)
        except FileNotFoundError:  # the folder went with a process that made nothing
            continue
        if not _taken(handle, folder):
            os.close(handle)
            if time.monotonic() >= until:
                raise BlockingIOError(f"another {what} is at work in {folder}: wait for it, or give another --output")
            time.sleep(_LOOK)
        elif _is_at(handle, folder / LOCK):
            return handle
        else:  # its holder has deleted it, and a third process may hold the one that is there now
            os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _taken(handle: int, folder: Path) -> bool:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no fcntl")
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{folder}: no locks here; nothing keeps a second process out", stacklevel=2)
    return True


def _without_links(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(f"{path} is a link, and nothing is written through one: put the file itself there") from None
        raise
