"""Equality of two expressions, to the last digit: close is not equal.

math-verify rounds decimals to six places and drops from a difference what is smaller than 10^-15, whatever the size of
the numbers. `equal` stands in the place of its comparisons (tasks/grading.py). Numbers are compared as fractions where
they are fractions, else in digits that count from the first one; powers that would fill the memory, by their residues.
"""

import hashlib
import math
from typing import Any

import sympy
from sympy import Add, Expr, Float, Integer, Mul, Pow, Rational, Symbol, UnevaluatedExpr, factorial

DIGITS = 60  # in which two numbers that are no fractions must agree
ROUNDED_DIGITS = 6  # that a decimal must have to stand for a number that no decimal is
MAX_BITS = 100_000  # of a number that is written out
SYMBOL_BITS = 40  # of what stands for a variable
# Larger ones are known by residues modulo the primes of Curve25519 and secp256k1: in neither has 2 a small order.
PRIMES = (2**255 - 19, 2**256 - 2**32 - 977)
# Where expressions are compared; one of them is small, so that high powers do not hide the rest.
POINTS = tuple(Float(point, DIGITS + 30) for point in ("3.3345551482839053", "-1.9782662999200599", "0.0517170383548"))
PERCENT = UnevaluatedExpr(Rational(1, 100))


class UndecidedError(ValueError):
    """A value that is not worked out here."""


def equal(a: Any, b: Any, *_: Any) -> bool:
    """Whether two expressions or matrices have the same value; the arguments after them are math-verify's tolerances.

    Numbers are compared exactly. A decimal of at least six digits also stands for a number that no decimal is, where it
    is that number rounded: 0.333333 is 1/3, and 0.4999999 is not 1/2. Of a percentage the sign may be left out.
    Expressions with variables are equal where they agree at three points.

    >>> one = sympy.Rational(1, 3)
    >>> equal(one, sympy.Float("0.333333")), equal(one, sympy.Float("0.3333")), equal(sympy.pi, sympy.Rational(22, 7))
    (True, False, False)
    """
    if isinstance(a, sympy.MatrixBase | sympy.MatrixExpr) or isinstance(b, sympy.MatrixBase | sympy.MatrixExpr):
        return _equal_matrices(a, b)
    if a in (sympy.nan, sympy.zoo) or b in (sympy.nan, sympy.zoo):
        return False
    if a == b or not (isinstance(a, Expr) and isinstance(b, Expr)):
        return bool(a == b)
    return _without_sign(a, b) or _without_sign(b, a) or _is_rounded(a, b) or _is_rounded(b, a) or _equal(a, b)


def _equal_matrices(a: Any, b: Any) -> bool:
    a, b = a.doit(), b.doit()
    if not (isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase) and a.shape == b.shape):
        return False
    return all(equal(x, y) for x, y in zip(a.flat(), b.flat(), strict=True))


def _equal(a: Any, b: Any) -> bool:
    if max(bits(a), bits(b)) > MAX_BITS:
        try:
            return all(residue(a, prime) == residue(b, prime) for prime in PRIMES)
        except UndecidedError:
            return False
    a, b = exact(a), exact(b)
    if not (a.free_symbols or b.free_symbols):
        return _equal_numbers(a, b)
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    try:
        return all(_equal_numbers(*(_at(point, symbols, e) for e in (a, b))) for point in POINTS)
    except UndecidedError:
        return sympy.simplify(a - b).is_zero is True


def _at(point: Any, symbols: list[Any], expression: Any) -> Any:
    """The expression's value where the variables are different multiples of `point`."""
    value = expression.xreplace({symbol: point * (5 + 2 * n) / 7 for n, symbol in enumerate(symbols)}).doit()
    if not value.is_number or value.has(sympy.nan, sympy.zoo, sympy.oo):
        raise UndecidedError
    return value


def is_no_equation_for_value(gold: Any, found: Any) -> bool:
    """False where an equation like x + 2 y = 0 is given and a value is asked for; of x = 0 the value is 0."""
    equation = isinstance(found, sympy.Eq) and found.lhs.is_Add and found.rhs.is_zero is True
    return not (isinstance(gold, Expr) and equation)


def is_no_pair_for_list(gold: Any, found: Any) -> bool:
    """False where the interval or the point (1, 2) is given and the two numbers 1 and 2 are asked for."""
    pair = isinstance(found, sympy.Interval) or (isinstance(found, sympy.Tuple) and len(found) == 2)
    return not (isinstance(gold, sympy.FiniteSet) and pair)


def may_be_solved(gold: Any, found: Any) -> bool:
    """Whether equations of the same variables have solutions: two that have none are not equal for that."""
    return gold.free_symbols == found.free_symbols and bool(sympy.solve(gold, gold.free_symbols))


def exact(expression: Any) -> Any:
    """The expression with its decimals as fractions, worked out as far as sympy does."""
    fractions = {number: Rational(str(number)) for number in expression.atoms(Float)}
    return expression.xreplace(fractions).doit()


def _equal_numbers(a: Any, b: Any) -> bool:
    if (a.is_Rational and b.is_Rational) or a.is_infinite or b.is_infinite:
        return a == b
    x, y = sympy.N(a, DIGITS), sympy.N(b, DIGITS)
    sizes = abs(x), abs(y)
    if a.has(Float) or b.has(Float):  # at a point: what is nothing else than rounding is 0
        return bool(abs(x - y) <= Float(10) ** (5 - DIGITS) * max(sizes) or max(sizes) < Float(10) ** -DIGITS)
    # What is no number yet, or may be 0, of which no digit is the first.
    if not all(size.is_Float for size in sizes) or min(sizes) < Float(10) ** -DIGITS * max(1, *sizes):
        return sympy.simplify(a - b).is_zero is True
    return bool(abs(x - y) <= Float(10) ** (5 - DIGITS) * max(sizes))


def _without_sign(percentage: Any, number: Any) -> bool:
    """Whether `percentage` is n % and the other n, from 1 on: what is smaller is a share."""
    said = _of_percentage(percentage)
    if said is None or _of_percentage(number) is not None:
        return False
    return bool(said.is_number and abs(said) >= 1) and equal(said, number)


def _of_percentage(expression: Any) -> Any:
    """The n of n %; None of what is no percentage."""
    percentage = isinstance(expression, Mul) and PERCENT in expression.args
    return Mul(*(part for part in expression.args if part != PERCENT)) if percentage else None


def _is_rounded(decimal: Any, number: Any) -> bool:
    """Whether a decimal of enough digits is the rounded value of a number whose decimals do not end."""
    if (said := _of_percentage(decimal)) is not None:
        decimal, number = said, 100 * number
    if not isinstance(decimal, Float) or number.free_symbols or number.has(Float) or bits(number) > MAX_BITS:
        return False
    mantissa, _, exponent = str(decimal).partition("e")
    digits = mantissa.lstrip("-").replace(".", "").strip("0")
    number = exact(number)
    if len(digits) < ROUNDED_DIGITS or not number.is_real or (number.is_Rational and _ends(int(number.q))):
        return False
    places = len(mantissa.rstrip("0").partition(".")[2]) - int(exponent or 0)
    return bool(abs(sympy.N(number - Rational(str(decimal)), DIGITS)) <= Rational(1, 2) * Rational(10) ** -places)


def _ends(denominator: int) -> bool:
    """Whether the decimals of a reduced fraction with that denominator end."""
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def bits(expression: Any) -> float:
    """About how many bits it takes to write out the numbers in an expression; infinite where that is not known."""
    if isinstance(expression, Rational):
        return int(expression.p).bit_length() + int(expression.q).bit_length()
    if isinstance(expression, Pow | factorial):
        growth = expression.args[-1]
        size = bits(growth)
        if size > 1000:
            return math.inf
        count = abs(_number(growth)) if growth.is_number else size
        base = bits(expression.args[0])
        return base + base * count
    if not expression.args:
        return SYMBOL_BITS
    return sum(bits(part) for part in expression.args)


def _number(expression: Any) -> float:
    try:
        return float(abs(sympy.N(exact(expression), 15)))
    except (TypeError, OverflowError):
        return math.inf


def residue(expression: Any, prime: int) -> int:
    """The value modulo a prime of an expression of +, * and whole powers, without the value itself.

    A variable stands for a number made of its name. Raises UndecidedError for other expressions.
    """

    def of(part: Any) -> int:
        return residue(part, prime)

    if isinstance(expression, Float):
        expression = Rational(str(expression))
    if isinstance(expression, Rational):
        return _power(int(expression.q), -1, prime) * int(expression.p) % prime
    if isinstance(expression, Symbol):
        return int(hashlib.sha256(expression.name.encode()).hexdigest(), 16) % prime
    if isinstance(expression, UnevaluatedExpr):
        return of(expression.args[0])
    if isinstance(expression, Add):
        return sum(map(of, expression.args)) % prime
    if isinstance(expression, Mul):
        return math.prod(map(of, expression.args)) % prime
    if isinstance(expression, Pow) and not expression.exp.free_symbols and bits(expression.exp) <= 1000:
        exponent = exact(expression.exp)
        if isinstance(exponent, Integer):
            return _power(of(expression.base), int(exponent), prime)
    raise UndecidedError


def _power(base: int, exponent: int, prime: int) -> int:
    try:
        return pow(base, exponent, prime)
    except ValueError:  # it has no inverse
        raise UndecidedError from None
