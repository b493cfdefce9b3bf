"""The operating system's boundary around a process that runs or reads what a stranger wrote. Linux only.

A process inside it computes, writes to the descriptors that it was given, and ends. Whatever else it asks of the kernel
fails with EPERM, in whatever way it came to ask: by a name, through memory that it overwrote, in machine code of its
own. Nothing inside can take the boundary away again. Its parts:

seccomp           a list of the calls to the kernel that may be made, some only with certain arguments. No file,
                  process, thread, signal, socket, further descriptor or executable memory is among them
no_new_privs      comes with it: a program that were started all the same would have no more rights
Landlock          where the kernel has it: no file, no TCP, no signal to a process outside
another user      where this one is root: nobody, without capabilities
end with parent   the process is killed when its parent dies

The filter is required, and is enough by itself; the others are taken where they exist, should it ever have a hole.
Nothing here holds against faults of the kernel in the calls that are left, against side channels, or against computing
itself, whose time and memory have other limits.

libseccomp, of which pyseccomp is the binding, compiles the filter; Landlock's binding is landlockpy.
"""

import ctypes
import functools
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from errno import EPERM
from typing import Any, Literal, NamedTuple

INSTALL = "pip install 'entropy-polarity[tools]' on Linux, with the system's libseccomp2"
EXAMINATION_SECONDS = 60.0
Purpose = Literal["computing", "reading"]

_NOBODY = 65534
_CAP_KILL = 5
_PR_SET_PDEATHSIG = 1
_PROT_EXEC, _MAP_ANONYMOUS = 0x4, 0x20
_WRITING = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
_FUTEX = (0, 1, 9, 10)  # WAIT, WAKE, WAIT_BITSET, WAKE_BITSET
_WHOLE = (1 << 64) - 1  # all bits of an argument

# Memory, the clock, random numbers, and to end.
_COMPUTING = (
    *("brk", "munmap", "mremap", "clock_gettime", "clock_getres", "gettimeofday", "time", "getrandom"),
    *("getpid", "gettid", "sched_yield", "rt_sigreturn", "restart_syscall", "exit", "exit_group"),
)
# What libraries need that import at a call, and the limits and the alarm of a call (tasks/workers.py).
_READING = (
    *("read", "pread64", "lseek", "close", "fstat", "stat", "lstat", "newfstatat", "statx", "getdents64", "readlink"),
    *("readlinkat", "access", "faccessat", "faccessat2", "getcwd", "uname", "sysinfo", "sched_getaffinity", "mmap"),
    *("mprotect", "madvise", "getuid", "geteuid", "getgid", "getegid", "getrusage", "setitimer", "getitimer"),
    *("rt_sigaction", "rt_sigprocmask"),
)


class BoundaryError(OSError):
    """There is no boundary here; the message says what is lacking."""


class Boundary:
    """What the process that made it, or a child, is to be closed in by: first `withdraw`, then, for good, `seal`.

    `writing` are the descriptors that it may write to then. "computing" leaves it nothing else. "reading" leaves it
    its user, its descriptors and read access to files: for libraries that import at a call, and work on text of which
    nothing is executed. Raises BoundaryError where something that is needed is not installed.
    """

    def __init__(self, writing: Iterable[int], purpose: Purpose = "computing") -> None:
        self._purpose: Purpose = purpose
        self._landlock = _landlock_version()  # imports what nobody may not be able to read
        self._filter = _filter([*writing], purpose)
        self._system = ctypes.CDLL(None)

    def withdraw(self) -> list[str]:
        """Everything before the filter, and its names; needs a free descriptor where the kernel has Landlock."""
        done = []
        if self._purpose == "computing":
            done += ["another user"] if _become_nobody() else []
            # After the change of user, which would clear it. One that reads may be the child of a thread that ends.
            self._system.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            done.append("end with parent")
        if self._landlock:
            _withdraw_from_files(self._purpose)
            done.append(f"Landlock {self._landlock}")
        return done

    def seal(self) -> None:
        """From here on no call to the kernel but those of the list. Raises OSError where the kernel refuses."""
        self._filter.load()


def _filter(writing: list[int], purpose: Purpose) -> Any:
    seccomp = _seccomp()
    rules = seccomp.SyscallFilter(seccomp.ERRNO(EPERM))

    def allow(call: str, *bits: tuple[int, int, int]) -> None:
        """`bits` are the number of an argument, its bits that are looked at, and what they have to be."""
        wanted = [seccomp.Arg(argument, seccomp.MASKED_EQ, mask, value) for argument, mask, value in bits]
        rules.add_rule(seccomp.ALLOW, call, *wanted)

    for call in _COMPUTING + (_READING if purpose == "reading" else ()):
        allow(call)
    for operation in _FUTEX:
        allow("futex", (1, 0x7F, operation))
    for descriptor in writing:
        allow("write", (0, _WHOLE, descriptor))
    if purpose == "computing":
        allow("mmap", (2, _PROT_EXEC, 0), (3, _MAP_ANONYMOUS, _MAP_ANONYMOUS))
    else:
        allow("open", (1, _WRITING, os.O_RDONLY))
        allow("openat", (2, _WRITING, os.O_RDONLY))
        allow("prlimit64", (0, _WHOLE, 0))  # its own
    return rules


def _seccomp() -> Any:
    if sys.platform != "linux":
        raise BoundaryError(f"there is no seccomp on {sys.platform}")
    try:
        import pyseccomp
    except ImportError:
        raise BoundaryError("pyseccomp is not installed") from None
    except RuntimeError:  # its own for a library that is not there
        raise BoundaryError("libseccomp was not found") from None
    return pyseccomp


def _landlock_version() -> int:
    """Of the kernel's interface; 0 where it has none, or landlockpy is not installed."""
    if sys.platform != "linux" or importlib.util.find_spec("landlockpy") is None:
        return 0
    import landlockpy

    try:
        return landlockpy.abi_version()
    except landlockpy.LandlockError:  # the filter of a container may refuse the question
        return 0


def _withdraw_from_files(purpose: Purpose) -> None:
    from landlockpy import AccessFS, Ruleset, Scope

    with Ruleset(scoped=Scope.SIGNAL | Scope.ABSTRACT_UNIX_SOCKET) as rules:
        if purpose == "reading":
            rules.allow_path("/", AccessFS.READ_FILE | AccessFS.READ_DIR)
        rules.restrict()


def _become_nobody() -> bool:
    """Whether root could be given up. A root that may not end nobody's process keeps it, to be able to end this one."""
    if os.geteuid() != 0:
        return False
    with open("/proc/self/status", encoding="utf-8") as file:
        capabilities = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff"))
    if not capabilities >> _CAP_KILL & 1:
        return False
    try:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    except OSError:  # a container may have no such user, or its root no such right
        return False
    return True


class Examination(NamedTuple):
    """The parts of a boundary here, or in words why there is none: one of the two is empty."""

    parts: tuple[str, ...]
    lacking: str


@functools.cache
def examine() -> Examination:
    """Enter the boundary in a process of its own, and try there what must not be possible. Once a process."""
    command = [sys.executable, "-P", "-m", __name__]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    try:
        found = subprocess.run(
            command, capture_output=True, env=os.environ | {"PYTHONPATH": path}, timeout=EXAMINATION_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Examination((), f"entering it took more than {EXAMINATION_SECONDS:g} seconds")
    try:
        parts, lacking = json.loads(found.stdout)
    except ValueError:
        return Examination((), f"the process that entered it ended with status {found.returncode}")
    return Examination(tuple(parts), lacking)


def _examined() -> Examination:
    parent = os.getppid()
    try:
        boundary = Boundary([1])
        parts = boundary.withdraw()
        boundary.seal()
    except BoundaryError as error:
        return Examination((), str(error))
    except OSError as error:
        return Examination((), f"the kernel refuses it: {error}")
    trials: dict[str, Callable[[], Any]] = {
        "open a file": lambda: os.open("/", os.O_RDONLY),
        "start a process": os.fork,
        "send a signal": lambda: os.kill(parent, 0),
        "open a socket": socket.socket,
    }
    for what, attempt in trials.items():
        try:
            attempt()
        except PermissionError:
            continue
        return Examination((), f"a process inside it could {what}")
    return Examination(("seccomp", "no_new_privs", *parts), "")


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_examined()))
    sys.stdout.flush()
