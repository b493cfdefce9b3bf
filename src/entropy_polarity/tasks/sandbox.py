"""The sandbox of the tool `python`: code that a policy wrote, run where it can reach nothing.

The layers, from the outside in:

1. a worker (tasks/workers.py): an isolated interpreter without this process's environment, killed when it hangs;
2. a child of it for every call, so that no call sees what another left. It has no descriptor but its output, limits of
   time and memory, and an empty directory that is removed;
3. the operating system's boundary (tasks/boundary.py): the child can compute and write its output; the kernel refuses
   it everything else, whatever code it comes to run;
4. an audit hook that refuses every event of the interpreter but those of computing: no file, import, process, socket;
5. names: modules of a list, without what they imported themselves; builtins of a list; and no code with an identifier
   that starts with an underscore or leads to a frame is run at all.

The third is what holds against an enemy, and does not trust the last two: those have been got around before, and give a
policy its errors in words. Without the third nothing runs unless the caller takes that on itself.
"""

import ast
import builtins
import functools
import importlib
import importlib.util
import io
import os
import pkgutil
import random
import resource
import select
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from time import monotonic
from types import ModuleType, SimpleNamespace
from typing import Any

from entropy_polarity.tasks.boundary import Boundary

MAX_OUTPUT_BYTES = 4000
OUTPUT = 1  # the child's only descriptor
MODULES = (
    *("bisect", "cmath", "collections", "collections.abc", "datetime", "decimal", "fractions", "functools", "heapq"),
    *("itertools", "math", "random", "re", "statistics", "string", "sympy", "sympy.abc"),
)
# Roads from a text to an attribute or to code.
_HIDDEN = {
    "functools": {"singledispatch", "singledispatchmethod", "update_wrapper", "wraps"},
    "string": {"Formatter"},
    # The first two make code of texts; the last ones write into the names of whoever calls them, and so does `var`,
    # which has a stand-in.
    "sympy": {"lambdify", "nsolve", "preview", "source", "vfield", "vring", "vfree_group", "var"},
}
_BUILTINS = (
    *("__build_class__", "NotImplemented", "abs", "all", "any", "ascii", "bin", "bool", "bytearray", "bytes"),
    *("callable", "chr", "classmethod", "complex", "dict", "divmod", "enumerate", "filter", "float", "format"),
    *("frozenset", "hasattr", "hash", "hex", "id", "int", "isinstance", "issubclass", "iter", "len", "list", "map"),
    *("max", "min", "next", "object", "oct", "ord", "pow", "print", "property", "range", "repr", "reversed"),
    *("round", "set", "slice", "sorted", "staticmethod", "str", "sum", "super", "tuple", "zip"),
)
_BEHIND = ("_strptime",)  # imported by the library at a call, by a name that no code may write
# Methods that code may define or call, and a name that it may ask for.
_SPECIAL = {"_", "__", "__name__", "__init__", "__iter__", "__next__", "__call__", "__enter__", "__exit__"} | {
    *("__repr__", "__str__", "__format__", "__hash__", "__bool__", "__int__", "__float__", "__len__"),
    *("__contains__", "__getitem__", "__setitem__", "__delitem__", "__abs__", "__neg__", "__pos__"),
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__add__", "__sub__", "__mul__", "__matmul__"),
    *("__truediv__", "__floordiv__", "__mod__", "__pow__", "__divmod__", "__radd__", "__rsub__", "__rmul__"),
    *("__rtruediv__", "__rfloordiv__", "__rmod__", "__rpow__", "__iadd__", "__isub__", "__imul__", "__itruediv__"),
}
_FRAMES = ("gi_", "cr_", "ag_", "tb_", "co_", "f_back", "f_builtins", "f_code", "f_globals", "f_locals", "f_trace")
# Of sympy, what is not for mathematics, what is deprecated, and what is large: the rest must be there before a call.
_NOT_LOADED = {
    *("benchmarks", "codegen", "compatibility", "external", "interactive", "parsing", "physics", "plotting"),
    *("printing", "pytest", "randtest", "resolvent_lookup", "runtests", "testing", "tests", "this", "tmpfiles"),
    *("trace", "utilities", "conftest", "stats", "categories", "crypto", "diffgeom", "unify", "strategies"),
}
_CODE = "<code>"


def run(code: str, seconds: float, without_boundary: bool = False) -> str:
    """What `code` printed within `seconds`, the value of a last line that is an expression, and what went wrong.

    For a worker: it forks. The output is cut at MAX_OUTPUT_BYTES, where the code ends too. Raises BoundaryError where
    there is no boundary, unless it is to run without one.
    """
    _modules()
    boundary = None if without_boundary else _boundary()
    late = f"error: timed out after {seconds:g} seconds"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _be_child(code, seconds, writer, boundary)
    try:
        os.close(writer)
        output, note = _read(reader, seconds, late)
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    # Killed by us after its output was closed is a normal end.
    if not note and os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        died_of = os.WTERMSIG(status)
        note = late if died_of == signal.SIGXCPU else f"error: the interpreter died of signal {died_of}"
    text = output.decode(errors="replace").rstrip("\n")
    return "\n".join(part for part in (text, note) if part) or "(nothing was printed)"


@functools.cache
def _boundary() -> Boundary:
    return Boundary([OUTPUT])


def _read(descriptor: int, seconds: float, late: str) -> tuple[bytes, str]:
    """The output up to its end, or to a limit: then with a note of which, `late` where it is that of time."""
    deadline, output = monotonic() + seconds, b""
    while len(output) <= MAX_OUTPUT_BYTES:
        readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - monotonic()))
        if not readable:
            return output, late
        chunk = os.read(descriptor, MAX_OUTPUT_BYTES + 1)
        if not chunk:
            return output, ""
        output += chunk
    return output[:MAX_OUTPUT_BYTES], f"error: more than {MAX_OUTPUT_BYTES} bytes of output: the code was ended there"


# What follows runs in the child, which never returns.


def _be_child(code: str, seconds: float, writer: int, boundary: Boundary | None) -> None:
    try:
        os.dup2(writer, OUTPUT)
        os.close(0)
        os.closerange(2, 1024)  # among them the worker's answers: nobody is to forge one
        sys.stdout = io.TextIOWrapper(
            io.FileIO(OUTPUT, "w", closefd=False), encoding="utf-8", errors="replace", write_through=True
        )
        sys.stderr = sys.stdout
        random.seed(0)  # the same code has the same output, on a resumed run too
        os.environ.clear()
        with tempfile.TemporaryDirectory() as folder:  # nowhere in the file system, when that is gone
            os.chdir(folder)
        modules = _modules()
        if boundary:
            boundary.withdraw()
        _limit(seconds)
        if boundary:
            boundary.seal()
        _refuse_events()
        _execute(code, modules)
    except BaseException as error:
        print(_described(error))
    finally:
        os._exit(0)


def _limit(seconds: float) -> None:
    """Limits that the system holds whatever the interpreter does. That of memory is the worker's."""
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
        resource.setrlimit(kind, (0, 0))
    cpu = int(seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))


def _refuse_events() -> None:
    """From here on. What the hook reads are constants of its own code: there is no name, and no set, to change."""

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "import":
            raise ImportError(f"{arguments[0]} is not available here")  # libraries do without what is optional
        # Computing alone; namedtuple and sympy look at the frame of their caller.
        if event not in {
            "builtins.id",
            "compile",
            "exec",
            "object.__getattr__",
            "object.__setattr__",
            "sys._getframe",
            "sys._getframemodulename",
        }:
            raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(refuse)


def _execute(code: str, modules: dict[str, SimpleNamespace]) -> None:
    """Run the code; of a last line that is an expression, print the value."""
    tree = ast.parse(code, _CODE)
    check(tree)
    names = {"__builtins__": _builtins(modules), "__name__": "__main__"}
    if "sympy" in modules:
        modules["sympy"].var = functools.partial(_var, names)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, _CODE, "exec"), names)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), _CODE, "eval"), names)
        if value is not None:
            print(value)


def _var(names: dict[str, Any], /, *text: Any, **settings: Any) -> Any:
    """What sympy's `var` is to a program: symbols, and its names for them. The original writes into any caller's."""
    made = sys.modules["sympy"].symbols(*text, **settings)

    def keep(found: Any) -> None:
        if isinstance(found, list | tuple | set):
            for one in found:
                keep(one)
        elif str(found).isidentifier() and not str(found).startswith("_"):
            names[str(found)] = found

    keep(made)
    return made


def check(tree: ast.AST) -> None:
    """Raise PermissionError where code names what could lead out of its surroundings.

    Every identifier of the tree is looked at, whatever kind of node holds it: attributes, names, patterns, keywords.
    """
    for node in ast.walk(tree):
        for name in _identifiers(node):
            hidden = name.startswith("_") and name not in _SPECIAL
            if hidden or (name.startswith(_FRAMES) and isinstance(node, ast.Attribute | ast.MatchClass)):
                raise PermissionError(f"the name {name} is not allowed here (line {getattr(node, 'lineno', '?')})")


def _identifiers(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant):
        return
    for _, value in ast.iter_fields(node):
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                yield from text.split(".")  # a module's name has several


def _builtins(modules: dict[str, SimpleNamespace]) -> dict[str, Any]:
    def importing(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if name in _BEHIND:
            return sys.modules[name]
        if level or name not in modules:
            raise ImportError(f"{name} is not available; there are {', '.join(modules)}")
        return modules[name if fromlist else name.partition(".")[0]]

    kinds = {name: thing for name, thing in vars(builtins).items() if isinstance(thing, type)}
    errors = {name: kind for name, kind in kinds.items() if issubclass(kind, BaseException)}
    # Of three arguments, `type` would make classes from texts.
    own = {"__import__": importing, "type": lambda thing: type(thing)}
    return {name: getattr(builtins, name) for name in _BUILTINS} | errors | own


def _described(error: BaseException) -> str:
    """One line: what was raised, and where in the code."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _CODE:
            line = trace.tb_lineno
        trace = trace.tb_next
    words = error.msg if isinstance(error, SyntaxError) else str(error)
    where = f" (line {line})" if line is not None else ""
    return f"error: {type(error).__name__}{': ' * bool(words)}{words}{where}"


@functools.cache
def _modules() -> dict[str, SimpleNamespace]:
    """What an import of each module gives: its public contents. Made once, in the worker, with all they may load."""
    for name in (*_BEHIND, "unicodedata"):
        importlib.import_module(name)
    known = [name for name in MODULES if importlib.util.find_spec(name.partition(".")[0])]
    if "sympy" in known:
        _load_sympy()
    shown = {name: SimpleNamespace(**_public(importlib.import_module(name))) for name in known}
    for name in known:
        package, _, member = name.rpartition(".")
        if package:
            setattr(shown[package], member, shown[name])
    return shown


def _public(module: ModuleType) -> dict[str, Any]:
    """The contents of a module without other modules: `statistics.sys` would be a way out."""
    names = set(getattr(module, "__all__", dir(module))) - _HIDDEN.get(module.__name__, set())
    contents = {name: getattr(module, name) for name in sorted(names) if not name.startswith("_")}
    return {name: thing for name, thing in contents.items() if not isinstance(thing, ModuleType)}


def _load_sympy() -> None:
    """Import what sympy imports on demand, which a child cannot, and take Python's `eval` from it."""
    import sympy

    from entropy_polarity.tasks.safe_evaluation import shield

    def load(package: ModuleType) -> None:
        for part in pkgutil.iter_modules(package.__path__):
            if part.name not in _NOT_LOADED:
                with suppress(ImportError):  # some only say that they have moved
                    module = importlib.import_module(f"{package.__name__}.{part.name}")
                    if part.ispkg:
                        load(module)

    warnings.simplefilter("ignore")
    load(sympy)
    importlib.import_module("sympy.physics.units")  # its sets of functions ask for it
    shield("sympy")
