"""Expressions in untrusted text, interpreted instead of evaluated.

Symbolic libraries turn text into expressions with Python's own `eval`: `__import__("os").system(...)` in an answer
would run. `shield` gives their modules an `eval` and a `compile` that walk the syntax tree and know arithmetic,
containers and calls of mathematical classes, nothing else: no attribute, no subscript, no comprehension, no other name.
"""

import ast
import operator
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.MatMult: operator.matmul,
}
_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
    ast.Not: operator.not_,
}
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_CONTAINERS: dict[type, Callable[..., Any]] = {ast.List: list, ast.Tuple: tuple, ast.Set: set}
_BUILTIN = {"abs": abs, "max": max, "min": min, "round": round, "int": int, "float": float, "complex": complex}
# Functions of sympy that are no classes, and only compute.
_SYMPY_FUNCTIONS = frozenset({"sqrt", "cbrt", "root", "real_root", "gcd", "lcm"})


def safe_compile(source: Any, *_: Any, **__: Any) -> ast.AST:
    """What stands for the code of `source`, a text or a syntax tree, for `safe_eval`."""
    return source if isinstance(source, ast.AST) else ast.parse(source.strip(), mode="eval")


def safe_eval(source: Any, names: Mapping[str, Any] | None = None, local_names: Mapping[str, Any] | None = None) -> Any:
    """The value of the expression `source`: a text, or what `safe_compile` gave. Nothing of it is executed.

    Raises ValueError for whatever is neither arithmetic nor a container nor a call of a mathematical class of `names`,
    SyntaxError for what is no expression.

    >>> safe_eval("[1, 2 * 3]")
    [1, 6]
    >>> safe_eval("().__class__")
    Traceback (most recent call last):
    ...
    ValueError: Attribute is not allowed in an answer
    """
    return _value(safe_compile(source), [names or {}, local_names or {}])


def _value(node: ast.AST, scopes: list[Mapping[str, Any]]) -> Any:
    def of(child: ast.AST) -> Any:
        return _value(child, scopes)

    match node:
        case ast.Expression():
            return of(node.body)
        case ast.Constant():
            return node.value
        case ast.Name():
            return _named(node.id, scopes)
        case ast.BinOp() if type(node.op) in BINARY:
            return BINARY[type(node.op)](of(node.left), of(node.right))
        case ast.UnaryOp():
            return _UNARY[type(node.op)](of(node.operand))
        case ast.Compare() if len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
            return _COMPARE[type(node.ops[0])](of(node.left), of(node.comparators[0]))
        case ast.List() | ast.Tuple() | ast.Set():
            return _CONTAINERS[type(node)](of(item) for item in node.elts)
        case ast.Dict() if None not in node.keys:
            return {of(key): of(value) for key, value in zip(node.keys, node.values, strict=True) if key is not None}
        case ast.Call():
            keywords = {keyword.arg: of(keyword.value) for keyword in node.keywords if keyword.arg is not None}
            if len(keywords) < len(node.keywords):
                raise ValueError("** is not allowed in an answer")
            return of(node.func)(*(of(argument) for argument in node.args), **keywords)
    raise ValueError(f"{type(node).__name__} is not allowed in an answer")


def _named(name: str, scopes: list[Mapping[str, Any]]) -> Any:
    for scope in reversed(scopes):
        if name in scope and _is_mathematical(scope[name]):
            return scope[name]
    if name in _BUILTIN:
        return _BUILTIN[name]
    raise ValueError(f"{name!r} is not allowed in an answer")


def _is_mathematical(thing: Any) -> bool:
    """Whether it is a class, an instance or a harmless function of sympy."""
    sympy = sys.modules.get("sympy")
    if sympy is None:
        return False
    kinds = (sympy.Basic, sympy.MatrixBase)
    if isinstance(thing, type):
        return issubclass(thing, kinds)
    name = getattr(thing, "__name__", "")
    function = name in _SYMPY_FUNCTIONS and getattr(thing, "__module__", "").startswith("sympy.")
    return function or isinstance(thing, kinds)


def shield(package: str) -> None:
    """Give every loaded module of `package` `safe_eval` and `safe_compile` in place of Python's; its own stay."""
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and (name == package or name.startswith(f"{package}.")):
            module.__dict__.setdefault("eval", safe_eval)
            module.__dict__.setdefault("compile", safe_compile)
