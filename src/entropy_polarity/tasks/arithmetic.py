"""Arithmetic in untrusted text, for the tool `calculator`: exact where it is rational, and bounded in every way.

Nothing is evaluated: the syntax tree is walked. Before a number is computed that could be far too large it is refused,
so that no expression takes longer than some milliseconds.
"""

import ast
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from entropy_polarity.tasks.safe_evaluation import BINARY

MAX_CHARACTERS = 1000
MAX_DEPTH = 200
MAX_BITS = 10_000  # of a numerator or denominator: 3000 digits
Number = int | float | Fraction


def value_of(expression: str) -> Number:
    """The value of an expression: numbers, + - * / // % ** (or ^), brackets, constants and functions of a list.

    >>> value_of("2 * (1/3 + 0.5) ^ 2")
    Fraction(25, 18)

    Raises ValueError, ArithmeticError or TypeError with the reason, SyntaxError for what is no expression.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"the expression has {len(expression)} characters; at most {MAX_CHARACTERS} are read")
    tree = ast.parse(expression.strip().translate(_SIGNS).replace("^", "**"), mode="eval")
    return _value(tree.body, MAX_DEPTH)


_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "π": "pi"})  # as a policy may write them


def _value(node: ast.AST, depth: int) -> Number:
    """The value of a whitelisted expression: exact where it is rational."""
    if depth == 0:
        raise ValueError(f"the expression is nested more than {MAX_DEPTH} deep")
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            _bounded(value)
            return _bounded(Fraction(str(value)))  # of 0.1 the decimal fraction, not the nearest binary one
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, depth - 1)
        case ast.UnaryOp(op=ast.UAdd()):
            return _value(node.operand, depth - 1)
        case ast.BinOp() if type(node.op) in _OPERATORS:
            left, right = _value(node.left, depth - 1), _value(node.right, depth - 1)
            return _bounded(_OPERATORS[type(node.op)](left, right))
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS:
            return _bounded(_FUNCTIONS[name](*(_value(argument, depth - 1) for argument in node.args)))
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)):
            raise ValueError(f"{name} is not known here; use {', '.join([*_CONSTANTS, *_FUNCTIONS])}")
    raise ValueError(f"{type(node).__name__} is not arithmetic")


def _bounded(value: Number) -> Number:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("the value is infinite or undefined")
        return value
    if isinstance(value, complex):
        raise ValueError("the value is not a real number")
    exact = Fraction(value)
    if max(exact.numerator.bit_length(), exact.denominator.bit_length()) > MAX_BITS:
        raise ValueError(f"the value is too large: more than {MAX_BITS} bits")
    return exact


def shown(value: Number) -> str:
    """A value as text; of a fraction, its decimals too.

    >>> shown(Fraction(4)), shown(Fraction(1, 3)), shown(0.5)
    ('4', '1/3 = 0.3333333333333333', '0.5')
    """
    if isinstance(value, float) or value.denominator == 1:
        return str(value)
    return f"{value} = {float(value)}"


def _power(base: Number, exponent: Number) -> Number:
    whole = isinstance(exponent, Fraction) and exponent.denominator == 1
    if isinstance(base, Fraction) and whole:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        _expect_bits(abs(exponent) * (bits - 1))
        return base ** int(exponent)
    return float(base) ** float(exponent)


def _expect_bits(bits: Number, most: int = MAX_BITS) -> None:
    """Raise before a number is computed that would be far too large."""
    if bits > most:
        raise ValueError(f"the value is too large: more than {MAX_BITS} bits")


def _whole(value: Number) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1:
        raise ValueError(f"{float(value):g} is no whole number")
    return int(value)


def _factorial(n: Number) -> int:
    _expect_bits(_whole(n) * _whole(n).bit_length(), 2 * MAX_BITS)
    return math.factorial(_whole(n))


def _comb(n: Number, k: Number) -> int:
    n, k = _whole(n), _whole(k)
    _expect_bits(min(k, n - k) * n.bit_length(), 2 * MAX_BITS)
    return math.comb(n, k)


def _perm(n: Number, k: Number) -> int:
    n, k = _whole(n), _whole(k)
    _expect_bits(k * n.bit_length(), 2 * MAX_BITS)
    return math.perm(n, k)


def _sqrt(value: Number) -> Number:
    """Exact of squares."""
    if isinstance(value, Fraction) and value >= 0:
        root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
        if root * root == value:
            return root
    return math.sqrt(value)


def _round(value: Number, digits: Number = Fraction(0)) -> Number:
    if abs(_whole(digits)) > 1000:
        raise ValueError("round takes at most 1000 digits")
    return round(value, _whole(digits))


_CONSTANTS = {"pi": math.pi, "e": math.e}
_OPERATORS: dict[type, Callable[[Any, Any], Number]] = {
    **{kind: BINARY[kind] for kind in (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)},
    ast.Pow: _power,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "round": _round,
    "floor": math.floor,
    "ceil": math.ceil,
    "sqrt": _sqrt,
    **{name: getattr(math, name) for name in ("exp", "log", "log2", "log10", "sin", "cos", "tan", "asin", "acos")},
    "atan": math.atan,
    "factorial": _factorial,
    "comb": _comb,
    "perm": _perm,
    "gcd": lambda *numbers: math.gcd(*map(_whole, numbers)),
    "lcm": lambda *numbers: math.lcm(*map(_whole, numbers)),
    "min": lambda *numbers: min(numbers),
    "max": lambda *numbers: max(numbers),
}
