"""Tools: values by hand, hostile input ends as text within its limits, and nothing is left behind."""

import json
import subprocess
import sys
import time

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropy_polarity.tasks import tools
from entropy_polarity.tasks.arithmetic import MAX_CHARACTERS
from entropy_polarity.tasks.tools import MAX_CODE_CHARACTERS, calculator, python

pytestmark = pytest.mark.usefixtures("python_runs")


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left():
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    yield
    tools._interpreters().close()
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    assert [p for p in left if "sandbox" in " ".join(p.cmdline()) or p.status() == psutil.STATUS_ZOMBIE] == []


# ---- the calculator ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 * (3 + 4) ^ 2", "98"),
        ("2*3^2", "18"),
        ("-7 // 2", "-4"),
        ("7 % 4", "3"),
        ("1/3", "1/3 = 0.3333333333333333"),
        ("0.1 + 0.2", "3/10 = 0.3"),
        ("1/3 + 2/3", "1"),
        ("2 ** -3", "1/8 = 0.125"),
        ("2 ^ 0.5", "1.4142135623730951"),
        ("sqrt(16/9)", "4/3 = 1.3333333333333333"),
        ("comb(10, 3) / 2^10", "15/128 = 0.1171875"),
        ("factorial(20)", "2432902008176640000"),
        ("perm(5, 2) + gcd(12, 18) + lcm(4, 6)", "38"),
        ("round(2.567, 2)", "257/100 = 2.57"),
        ("max(1, 2.5, 2) - floor(pi) - abs(-1)", "-3/2 = -1.5"),
        ("log(8, 2) + log10(100)", "5.0"),
        ("3 × 4 − 2", "10"),
        ("10 ** 400 / 10 ** 399", "10"),
    ],
)
def test_the_calculator_by_hand(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("1/0", "division by zero"),
        ("0 ^ -1", "division by zero"),
        ("9**9**9**9", "too large"),
        ("(10^1000)^1000", "too large"),
        ("10^3000 * 10^3000", "too large"),
        ("factorial(10^9)", "too large"),
        ("comb(10^9, 5*10^8)", "too large"),
        ("perm(10^9, 10^9)", "too large"),
        ("1e400", "infinite"),
        ("exp(10000)", "math range error"),
        ("sqrt(-1)", "math domain error"),
        ("(-8)^(1/3)", "not a real number"),
        ("factorial(2.5)", "2.5 is no whole number"),
        ("-" * 900 + "1", "nested more than 200 deep"),
        ("(" * 400, "no arithmetic expression"),
        ("1" * (MAX_CHARACTERS + 1), "at most 1000 are read"),
        ("x + 1", "x is not known here; use pi, e, abs"),
        ("().__class__", "Attribute is not arithmetic"),
        ("__import__('os')", "__import__ is not known"),
        ("[1][0]", "Subscript is not arithmetic"),
        ("'a' * 10**9", "Constant is not arithmetic"),
        ("max(1, key=2)", "max is not known"),
        ("1,000", "Tuple is not arithmetic"),
        ("答え", "答え is not known here"),
        ("７ + ", "no arithmetic expression"),
        ("\x00", "no arithmetic expression"),
        ("", "no arithmetic expression"),
        (12, "the expression is int; expected text"),
    ],
)
def test_the_calculator_says_what_is_wrong(expression, error):
    began = time.monotonic()
    answer = calculator(expression)
    assert answer.startswith("error: ")
    assert error in answer
    assert time.monotonic() - began < 1


PIECES = ["9", "0", "1e99", ".5", "(", ")", "**", "^", "/", "*", "-", ",", " ", "factorial(", "comb(", "round(", "exp(",
          "lcm(", "min(", "pi", "_", "[", "'", "é"]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text(max_size=60))
def test_the_calculator_answers_anything(expression):
    began = time.monotonic()
    assert isinstance(calculator(expression), str)
    assert time.monotonic() - began < 1


# ---- Python -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("print(1)\n2 + 2", "1\n4"),
        ("co_prime = 3", "(nothing was printed)"),
        ("import math\nfrom fractions import Fraction as F\nmath.comb(5, 2) * F(1, 3)", "10/3"),
        ("from collections import *\nCounter('abca')['a'], namedtuple('P', 'x')(1)", "(2, P(x=1))"),
        ("import collections.abc\nisinstance([], collections.abc.Sequence)", "True"),
        ("import datetime\ndatetime.datetime.strptime('2020-02-29', '%Y-%m-%d').year", "2020"),
        ("from functools import cache\n@cache\ndef f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\nf(50)",
         "12586269025"),
        ("class A:\n    def __init__(self, x): self.x = x\n    def __repr__(self): return f'A{self.x}'\n"
         "class B(A):\n    def __init__(self): super().__init__(3)\nB()", "A3"),
        ("if __name__ == '__main__':\n    for _ in range(2): print('é日本')", "é日本\né日本"),
        ("print('\\ud800')", "?"),
        ("print(1)\ndef f():\n    return 1 / 0\nf()", "1\nerror: ZeroDivisionError: division by zero (line 3)"),
        ("if", "error: SyntaxError: invalid syntax (line 1)"),
        ("raise SystemExit", "error: SystemExit (line 1)"),
    ],
)  # fmt: skip
def test_python_by_hand(code, output):
    assert python(code) == output


def test_python_knows_sympy():
    pytest.importorskip("sympy")
    code = """
import sympy as sp
from sympy.abc import x
print(sp.solve(x**2 - 2), sp.integrate(sp.exp(-x**2), (x, -sp.oo, sp.oo)), sp.limit(sp.sin(x) / x, x, 0))
print(sp.factorint(360), sp.dsolve(sp.Function('f')(x).diff(x)), sp.N(sp.pi, 20), sp.simplify('x*x'))
print(sp.minimum(x**2, x), sp.satisfiable(sp.Symbol('p')), sp.latex(sp.Rational(1, 2)))
from sympy import *
print(var('a b:2'), var('f', cls=Function), f(a) + b1, var('__builtins__'), __name__)
"""
    assert python(code) == (
        "[-sqrt(2), sqrt(2)] sqrt(pi) 1\n{2: 3, 3: 2, 5: 1} Eq(f(x), C1) 3.1415926535897932385 x**2\n"
        "0 {p: True} \\frac{1}{2}\n(a, b0, b1) f b1 + f(a) __builtins__ __main__"
    )


def test_no_call_sees_what_another_left():
    assert python("import math\nmath.pi = 3\nkept = 1\nmath.pi") == "3"
    assert python("import math\nprint(math.pi)\nkept").startswith("3.14159")
    drawn = python("import random\nrandom.random()")
    assert drawn == python("import random\nrandom.random()"), "a resumed run must see the same"
    tools._interpreters().close()
    assert drawn == python("import random\nrandom.random()")


REFUSED = {
    "import os": "os is not available; there are bisect, cmath",
    "from os import system": "os is not available",
    "import os.path as p": "os.path is not available",
    "__import__('os')": "the name __import__ is not allowed",
    "import _strptime": "not allowed",
    "().__class__.__base__.__subclasses__()": "not allowed",
    "x.__cl\uff41ss__": "the name __class__ is not allowed",
    "x = (i for i in [1])\nx.gi_frame": "the name gi_frame is not allowed",
    "try:\n    1 / 0\nexcept Exception as e:\n    e.__traceback__.tb_frame": "not allowed",
    "match 1:\n    case int(__class__=c): c": "the name __class__ is not allowed",
    "class A:\n    __match_args__ = ('__globals__',)": "the name __match_args__ is not allowed",
    "global __builtins__": "the name __builtins__ is not allowed",
    "from __future__ import annotations": "not allowed",
    "import statistics\nstatistics.sys.modules": "no attribute 'sys'",
    "from random import _os": "not allowed",
    "import string\nstring.Formatter().get_field('0.__class__', (1,), {})": "no attribute 'Formatter'",
    "import functools\nfunctools.update_wrapper": "no attribute 'update_wrapper'",
    "import collections\ncollections.abc.sys": "no attribute 'sys'",
    "getattr(1, '__class__')": "name 'getattr' is not defined",
    "type('A', (), {})": "TypeError",
    "eval('1')": "name 'eval' is not defined",
    "exec('import os')": "name 'exec' is not defined",
    "compile('1', '', 'eval')": "name 'compile' is not defined",
    "globals()": "name 'globals' is not defined",
    "open('/etc/passwd')": "name 'open' is not defined",
    "input()": "name 'input' is not defined",
    "'a' * 10**11": "MemoryError",
    "def f(): f()\nf()": "RecursionError",
    "(" * 5000: "too many nested parentheses",
    "-" * 9000 + "1": "error: ",
    "1+" * 4000 + "1": "RecursionError",
    "\x00": "null bytes",
    "int('9' * 5000)": "Exceeds the limit",
    "1" * (MAX_CODE_CHARACTERS + 1): "at most 10000 are run",
    "raise BaseException('x')": "BaseException: x",
}
SYMPY_REFUSED = {
    "import sympy\nsympy.sympify('__import__(\"os\").getcwd()')": "not allowed",
    "import sympy\nsympy.S('().__class__')": "not allowed",
    "import sympy\nsympy.lambdify": "no attribute",
    "from sympy import utilities": "cannot import name",
    "import sympy.utilities": "not available",
    "import sympy\nsympy.plot(1)": "not available here",
}


@pytest.mark.parametrize("code", REFUSED)
def test_python_refuses(code):
    began = time.monotonic()
    assert REFUSED[code] in python(code)
    assert "error: " in python(code)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("code", SYMPY_REFUSED)
def test_python_refuses_the_roads_through_sympy(code):
    pytest.importorskip("sympy")
    assert SYMPY_REFUSED[code] in python(code)


def test_a_format_shows_a_text_and_no_object():
    assert python("'{0.__class__}'.format(1)") == "<class 'int'>"


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "x = 9 ** 9 ** 9",
        "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    ],
)
def test_python_ends_in_time_and_keeps_what_was_said(code, monkeypatch):
    monkeypatch.setattr(tools, "SECONDS", 0.5)
    began = time.monotonic()
    assert python("print('first')\n" + code) == "first\nerror: timed out after 0.5 seconds"
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("code", ["print('x' * 10**8)", "while True: print('é' * 100)"])
def test_output_is_cut(code):
    answer = python(code)
    assert len(answer) < 4100
    assert answer.endswith("error: more than 4000 bytes of output: the code was ended there")


@pytest.mark.parametrize(
    "code", ["x = [1]\nwhile True: x += x", "x = []\nwhile True: x.append('a' * 10**6 + str(len(x)))"]
)
def test_memory_is_bounded(code, monkeypatch):
    monkeypatch.setattr(tools, "SECONDS", 60.0)  # a busy machine takes its time to give a gigabyte
    assert "MemoryError" in python(code)


# What code could try that has a way around the names: the audit hook, and the limits, must hold without them, and
# without the boundary, which has tests of its own (test_boundary.py).
OPENING = [
    "open({marker!r}, 'w')",
    "open('/etc/hostname').read()",
    "import os; os.open({marker!r}, os.O_CREAT)",
    "import pathlib; pathlib.Path({marker!r}).touch()",
    "import socket; socket.socket()",
]
ESCAPED = [
    *OPENING,
    "import os; os.mkdir({marker!r})",
    "import os; os.symlink('a', {marker!r})",
    "import os; os.system('touch ' + {marker!r})",
    "import os; os.execv('/bin/touch', ['touch', {marker!r}])",
    "import os\nwhile True: os.fork()",
    "import os; os.kill(os.getppid(), 9)",
    "import os; os.listdir('/')",
    "import subprocess; subprocess.run(['touch', {marker!r}])",
    "import socket; socket.getaddrinfo(b'localhost', 80)",
    "import ctypes; ctypes.CDLL(None).system(b'touch {marker}')",
    "import os; os.posix_spawn('/bin/touch', ['touch', {marker!r}], {})",
    "import threading, shutil; shutil.rmtree({marker!r})",
    # The hook has nothing that could be changed: neither a set, nor a name that it looks up.
    "import os, sys\nbox = sys.modules['entropy_polarity.tasks.sandbox']\n"
    "for thing in vars(box).values(): thing.update(['os.mkdir']) if isinstance(thing, set) else None\n"
    "box._refuse_events = box._refuse = print\nos.mkdir({marker!r})",
]
WITHOUT_NAMES = """
import builtins, json, sys
import ctypes, pathlib, shutil, socket, subprocess
from entropy_polarity.tasks import sandbox
sandbox.check = lambda tree: None
sandbox._builtins = lambda modules: vars(builtins)
sandbox._load_sympy = lambda: None
if sys.argv[1] == "no hook":
    sandbox._refuse_events = lambda: None
print(json.dumps([sandbox.run(code, 3.0, True) for code in json.loads(sys.argv[2])]))
"""


def without_names(codes, marker, hook="hook"):
    texts = json.dumps([code.replace("{marker!r}", repr(marker)).replace("{marker}", marker) for code in codes])
    command = [sys.executable, "-c", WITHOUT_NAMES, hook, texts]
    found = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, timeout=120)
    return json.loads(found.stdout)


def test_code_that_reaches_everything_still_writes_nothing_and_starts_nothing(tmp_path):
    for code, answer in zip(ESCAPED, without_names(ESCAPED, str(tmp_path / "pwned")), strict=True):
        assert "PermissionError" in answer, (code, answer)
        assert "is not allowed here" in answer, (code, answer)
    assert list(tmp_path.iterdir()) == []


def test_the_system_alone_keeps_files_and_sockets_shut(tmp_path):
    for code, answer in zip(OPENING, without_names(OPENING, str(tmp_path / "pwned"), "no hook"), strict=True):
        assert "OSError: [Errno 24]" in answer, (code, answer)  # no descriptor to be had
    answers = without_names(["import os; print(os.environ)", "import os; os.getcwd()"], "", "no hook")
    assert answers[0] == "environ({})"
    assert "FileNotFoundError" in answers[1]
    assert list(tmp_path.iterdir()) == []
