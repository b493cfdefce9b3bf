"""What the attacks of attacks.py are let loose on, and what is looked at after each: a scene.

`layers` says what stands between a program and the system:

all         the tool as it is
boundary    the operating system's boundary; every name of Python's, and no audit hook
seccomp     of the boundary the filter only: root stays root, and there is no Landlock
none        nothing but limits of time and memory: for attacks that harm only what is put there for them
"""

import contextlib
import ctypes
import importlib
import mmap
import os
import secrets
import selectors
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import psutil
from reliability.attacks import MODULES, Attack

from entropy_polarity.tasks import sandbox
from entropy_polarity.tasks.boundary import Boundary
from entropy_polarity.tasks.workers import Outcome, Workers

Layers = Literal["all", "boundary", "seccomp", "none"]
CANARY = "PAPO_CANARY"
NOBODY = 65534
_PAGE: Any = None


def answer(code: str, seconds: float, layers: Layers) -> list[Any]:
    """In a worker: its process, and what the sandbox says of the code behind these layers."""
    if layers != "all":
        _open_all_names()
    if layers == "seccomp":
        Boundary.withdraw = lambda self: []
    return [os.getpid(), sandbox.run(code, seconds, layers == "none") if code else ""]


def _open_all_names() -> None:
    """Let code run as Python's own, with nothing of ours in its way, modules to use, and a page for machine code."""
    global _PAGE
    if _PAGE is not None:
        return
    _PAGE = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    names = {"__name__": "__main__", "EXECUTABLE": ctypes.addressof(ctypes.c_char.from_buffer(_PAGE))}
    for name in (*MODULES, "sympy", "pyseccomp"):
        importlib.import_module(name)
    sandbox._modules = lambda: {}  # pyright: ignore[reportAttributeAccessIssue]
    sandbox._execute = lambda code, modules: exec(compile(code, sandbox._CODE, "exec"), names)
    sandbox._refuse_events = lambda: None


class Scene:
    """A folder, a secret in a file, in memory and in the environment, listeners, a process to kill, and a worker."""

    def __init__(self, folder: Path, layers: Layers, seconds: float = 2.0) -> None:
        self.folder, self.layers, self.seconds = folder, layers, seconds
        self.secret = f"secret-{secrets.token_hex(8)}"
        self.memory = ctypes.create_string_buffer(self.secret.encode(), 64)
        os.environ[CANARY] = self.secret
        # The limit is on the command line: by it, whatever the worker starts is known.
        self.limit = 60 + secrets.randbelow(10**9) / 1e9
        self.workers = Workers(f"{__name__}:answer", seconds=self.limit, memory_bytes=1 << 30, count=1, isolated=True)
        self.decoy: subprocess.Popen[bytes] | None = None
        self.listeners: list[socket.socket] = []

    def __enter__(self) -> "Scene":
        os.chmod(self.folder, 0o777)
        self.set_up()
        return self

    def __exit__(self, *_: Any) -> None:
        self.workers.close()
        self.end_strays()
        self._close()
        os.environ.pop(CANARY, None)

    def set_up(self) -> None:
        """Everything as it is to be found again."""
        self._close()
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (self.folder / "kept").write_text(self.secret, encoding="utf-8")
        os.chmod(self.folder / "kept", 0o666)
        (self.folder / "empty").mkdir()
        os.chmod(self.folder / "empty", 0o777)
        tcp, udp, unix = socket.socket(), socket.socket(type=socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX)
        tcp.bind(("127.0.0.1", 0))
        udp.bind(tcp.getsockname())
        unix.bind(str(self.folder / "socket"))
        os.chmod(self.folder / "socket", 0o666)
        for listening in (tcp, unix):
            listening.listen()
        self.listeners = [tcp, udp, unix]
        user = NOBODY if os.geteuid() == 0 else None  # of the user that attacks: it is not this that may protect it
        self.decoy = subprocess.Popen(["sleep", "600"], user=user)
        self.memory.value = self.secret.encode()
        self.worker = self._worker() or self._worker()  # one that was killed is replaced at the second call
        self.before = self.state()

    def _close(self) -> None:
        for listening in self.listeners:
            listening.close()
        if self.decoy:
            self.decoy.kill()
            self.decoy.wait()

    def state(self) -> dict[str, Any]:
        """What no attack may change."""
        assert self.decoy
        with selectors.DefaultSelector() as selector:
            for listening in self.listeners:
                selector.register(listening, selectors.EVENT_READ)
            heard = len(selector.select(0))
        decoy = psutil.Process(self.decoy.pid)
        ours = psutil.Process()
        return {
            "files": {str(path): _of_file(path) for path in sorted([self.folder, *self.folder.rglob("*")])},
            "heard": heard,
            "decoy": decoy.status() in (psutil.STATUS_RUNNING, psutil.STATUS_SLEEPING),
            "memory": self.memory.raw,
            "trainer": (ours.nice(), os.sched_getaffinity(0), os.getcwd()),
            "host": os.uname().nodename,
            "shared": [
                Path(f"/proc/sysvipc/{kind}").read_text(encoding="utf-8").count("\n") for kind in ("shm", "sem", "msg")
            ],
            "memory files": sorted(path.name for path in Path("/dev/shm").glob("*") if path.name in ("made", "broken")),
        }

    def attempt(self, attack: Attack, count_processes: bool = True) -> tuple[list[str], str]:
        """Every effect that the program had, by name, and what it said. All is set up again where it had one."""
        outcome = self._ask(attack.code)
        said = outcome.value[1] if outcome.value else f"worker: {outcome.failure}"
        found = [] if self._worker() == self.worker else ["worker"]
        found += ["processes"] * (count_processes and any(self.strays()))
        found += ["said"] * ("BROKEN" in said) + ["secret"] * (self.secret in said)
        after = self.state()
        found += [name for name, value in self.before.items() if after[name] != value]
        if found:
            self.end_strays()
            self.set_up()
        return found, said

    def _ask(self, code: str) -> Outcome:
        assert self.decoy
        for name, value in {
            "FOLDER": self.folder,
            "WORKER": getattr(self, "worker", 0),
            "TRAINER": os.getpid(),
            "DECOY": self.decoy.pid,
            "PORT": self.listeners[0].getsockname()[1],
            "ADDRESS": ctypes.addressof(self.memory),
        }.items():
            code = code.replace(f"@{name}@", str(value))
        return self.workers.map([(code, self.seconds, self.layers)])[0]

    def _worker(self) -> int:
        value = self._ask("").value
        return value[0] if value else 0

    def strays(self) -> Iterator[psutil.Process]:
        """Processes that the worker started, directly or not, and that are still there."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = str(self.limit) in " ".join(process.cmdline())
                below = process.ppid() == self.worker or os.getsid(process.pid) == self.worker
                if process.pid != self.worker and (ours or below):
                    yield process

    def end_strays(self) -> None:
        for process in self.strays():
            with contextlib.suppress(psutil.Error):
                process.kill()


def _of_file(path: Path) -> tuple[Any, ...]:
    status = path.lstat()
    content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    return status.st_mode, status.st_uid, status.st_nlink, status.st_mtime_ns, content
