"""Programs that try to get out of the tool `python`, or to harm what is around it, grouped by the road they take.

In each, @FOLDER@ is a folder that anybody may write to, with the file `kept`, whose text is a secret, and the empty
folder `empty`; @WORKER@, @TRAINER@ and @DECOY@ are processes; @PORT@ is listened at by TCP and UDP, and @FOLDER@/socket
too; @ADDRESS@ is where the trainer has a secret in its memory. A program that gets what it wanted without
leaving a trace says BROKEN. Those marked `!` leave one that is seen where there is no boundary, and harm nothing but
what was put there for them: with them the test is tested. Numbers of calls and machine code are those of x86-64, and
are left out elsewhere.
"""

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Attack(NamedTuple):
    """A program, where it belongs, and whether it must succeed where there is no boundary."""

    group: str
    title: str
    code: str
    must_succeed: bool


# What the programs import: where names are free, it is there before a process is closed in.
_IMPORTED = """
    _thread asyncio asyncio.unix_events codecs collections concurrent.futures concurrent.futures.thread ctypes
    encodings.idna fcntl gc http.client importlib io logging mmap multiprocessing multiprocessing.popen_fork os pathlib
    pty resource runpy select shutil signal socket sqlite3 subprocess sys tempfile threading time urllib.request zipfile
"""
MODULES = _IMPORTED.split()

_C = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
_C_CALL = _C + "found = {}\nprint('BROKEN' if found != -1 else os.strerror(ctypes.get_errno()))\n"


def _got(expression: str) -> str:
    """An expression whose value, any, is a success."""
    module = max((name for name in MODULES if expression.startswith(f"{name}.")), key=len)
    return f"import {module}\n{expression}\nprint('BROKEN')\n"


_MACHINE_CODE = """
import ctypes
code = ctypes.CFUNCTYPE(ctypes.c_long)(EXECUTABLE)
ctypes.memmove(EXECUTABLE, bytes.fromhex("{code}"), {length})
print("BROKEN" if code() >= 0 else "refused")
"""


def _machine(code: str) -> str:
    """x86-64 code, in a page that the worker had made executable before."""
    return _MACHINE_CODE.format(code=code, length=len(code) // 2)


# Calls by other interfaces than the one that the filter is for, and by no library at all.
_MACHINE = {
    "getuid by i386's interface": _machine("b8c7000000cd80c3"),
    "fork by i386's interface": _machine("b802000000cd80c3"),
    "getuid by x32's interface": _machine("b866000040" + "0f05c3"),
    "fork in machine code": _machine("b839000000" + "0f05c3"),
    "socket in machine code": _machine("b829000000bf02000000be01000000ba000000000f05c3"),
}

_ESCAPE = """
import collections
import sympy

class Text(str):
    def isidentifier(self): return True

class Map(sympy.Basic):
    name = "map"
    def __iter__(self): return iter(())
    def __call__(self, function, names): return [name if isinstance(name, Text) else str(name) for name in names]

class Type(Map):
    name = "type"
    def __call__(self, thing): return str

class Names:
    __contains__ = staticmethod(sympy.var)

for fake in (Map(), Type()):
    fake in collections.ChainMap(Names())
system = "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == '_wrap_close'][0].__init__.__globals__"
box = "s['sys'].modules['entropy_polarity.tasks.sandbox'].__dict__"  # an earlier hook read its events from a set
hook = f"{box}.get('_COMPUTING', {{0}}).update(['os.truncate', 'os.kill', 'os.fork'])"
collections.namedtuple("P", [Text(f"x=[s := {system}, {hook}, ACTION]: 0 #")])
"""

_FORK = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try: time.sleep(1)
            except OSError: pass
    os._exit(0)
"""

_READ = """
import ctypes
libc, found = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(64)
here, there = (ctypes.c_uint64 * 2)(ctypes.addressof(found), 64), (ctypes.c_uint64 * 2)(@ADDRESS@, 64)
libc.process_vm_readv(@TRAINER@, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
print(found.value)
"""

# Whole programs. `!` as above.
_PROGRAMS = {
    "escapes": {
        "! the names of collections, then a file": _ESCAPE.replace("ACTION", "s['truncate']('@FOLDER@/kept', 0)"),
        "! the names of collections, then a signal": _ESCAPE.replace("ACTION", "s['kill'](@DECOY@, 9)"),
        "! the names of collections, then a process": _ESCAPE.replace(
            "ACTION", "s['fork']() or s['sys'].modules['time'].sleep(20)"
        ),
        "! the functions of the sandbox": (
            "import os, sys\nbox = sys.modules['entropy_polarity.tasks.sandbox']\n"
            "box._refuse_events = box._limit = print\nos.unlink('@FOLDER@/kept')\n"
        ),
        "a call inside a call": (
            "import sys\nfound = sys.modules['entropy_polarity.tasks.sandbox'].run('6 * 7', 1.0, True)\n"
            "print('BROKEN' if '42' in found else found)\n"
        ),
        "the filter once more, with everything allowed": (
            "import pyseccomp, os\npyseccomp.SyscallFilter(pyseccomp.ALLOW).load()\nprint('BROKEN')\n"
        ),
        "the filter without no_new_privs": (
            "import pyseccomp\nrules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)\n"
            "rules.set_attr(pyseccomp.Attr.CTL_NNP, 0)\nrules.load()\nprint('BROKEN')\n"
        ),
        "every function that the collector knows": (
            "import gc, os\n"
            "for thing in gc.get_objects():\n"
            "    if getattr(thing, '__name__', '') in ('refuse', '_refuse'):\n"
            "        thing.__code__ = (lambda event, arguments: None).__code__\n"
            "os.rename('@FOLDER@/kept', '@FOLDER@/taken')\n"
        ),
    },
    "processes": {
        "a shell": "import os\nprint(os.system('mkdir @FOLDER@/made'))\n",
        "! a process that outlives the call": _FORK,
        "forks without end": "import os\nwhile True:\n    os.fork()\n    print('BROKEN')\n",
        "forks without end, whatever they raise": (
            "import os\nfor _ in range(1000):\n    try: os.fork(); print('BROKEN')\n    except OSError: pass\n"
        ),
        "threads of C": _C + "name = ctypes.c_ulong()\n"
        "found = libc.pthread_create(ctypes.byref(name), None, libc.getpid, None)\n"
        "print('BROKEN' if found == 0 else found)\n",
    },
    "environment": {
        "os.environ": "import os\nprint(dict(os.environ), os.getenv('PAPO_CANARY'))\n",
        "getenv of C": _C + "libc.getenv.restype = ctypes.c_char_p\nprint(libc.getenv(b'PAPO_CANARY'))\n",
        "what the process was started with, in its memory": (
            f"{_C}print(ctypes.string_at(ctypes.c_void_p.in_dll(libc, 'environ'), 1000))\n"
        ),
    },
    "tracing": {
        "! the memory of the trainer": _READ,
        "! the memory of the trainer, written": _READ.replace("readv", "writev"),
        "the memory of the worker": _READ.replace("@TRAINER@", "@WORKER@").replace(
            "print(found.value)", "print('BROKEN' if ctypes.get_errno() in (0, 14) else ctypes.get_errno())"
        ),
    },
    "descriptors": {
        "every number": (
            "import os\n"
            "for number in [0, *range(2, 4096)]:\n"
            '    try: os.write(number, b\'{"value": "forged", "failure": ""}\\n\'); print(\'BROKEN\', number)\n'
            "    except OSError: pass\n"
        ),
        "every number, read": (
            "import os\n"
            "for number in range(4096):\n"
            "    try: os.read(number, 1); print('BROKEN', number)\n"
            "    except OSError: pass\n"
        ),
        "a forged answer on the only descriptor": (
            'import os\nos.write(1, b\'{"value": "forged", "failure": ""}\\n\')\n'
        ),
    },
    "ends": {
        "exit": "import os\nos._exit(3)\n",
        "abort": "import os\nos.abort()\n",
        "a wild pointer": "import ctypes\nctypes.string_at(8)\n",
        "a wild jump": "import ctypes\nctypes.CFUNCTYPE(None)(8)()\n",
        "the stack": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()\n",
        "the interpreter's own state": "import ctypes\nctypes.memset(id(int), 0, 4096)\n",
        "the memory": "x = [1]\nwhile True: x += x\n",
        "the output": "import os\nwhile True: os.write(1, b'x' * 60000)\n",
        "the clock": "while True: pass\n",
        "the clock, in C": "import ctypes\nctypes.CDLL(None).pause()\nwhile True: pass\n",
        "a lock": "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()\n",
        "whatever is raised": "while True:\n    try:\n        while True: pass\n    except BaseException: pass\n",
    },
    "machine code": _MACHINE,
}


def _marked(text: str) -> tuple[bool, str]:
    return text.startswith("! "), text.removeprefix("! ")


def _lines() -> Iterator[tuple[str, str, str]]:
    """Kind, group and text of every program of one line."""
    kind = group = ""
    for line in (Path(__file__).parent / "attacks.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            kind, group = line.strip("[]").split()
        elif line and not line.startswith("#"):
            yield kind, group, line


def _attacks() -> list[Attack]:
    found = []
    for kind, group, line in _lines():
        must, title = _marked(line)
        found.append(Attack(group, title, _C_CALL.format(title) if kind == "c" else _got(title), must))
    for group, programs in _PROGRAMS.items():
        for name, code in programs.items():
            must, title = _marked(name)
            found.append(Attack(group, title, code, must))
    if platform.machine() != "x86_64":
        found = [a for a in found if "libc.syscall(" not in a.code and a.group != "machine code"]
    return found


ATTACKS = _attacks()
