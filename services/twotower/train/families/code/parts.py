"""The parts that functions are composed of: the iterable, the filter, the map and the reduction.

Each part has its code and several wordings for the docstring. `x` is the loop's variable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["int", "char", "word"]
"""The kinds of elements of an iterable."""

Result = Literal["int", "str"]
"""The kinds of results of a map."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Selects elements. `{k}` stands for a number, `{c}` for a letter, drawn for each function."""

    name: str
    code: str
    adjective: tuple[str, ...]
    """Wordings before the noun."""
    clause: tuple[str, ...]
    """Wordings after the noun, an alternative to the adjectives."""
    low: int = 0
    high: int = 0
    """The upper end of the range of `{k}`."""


@dataclass(frozen=True, slots=True)
class Map:
    """Transforms an element. `{e}` is the noun with its filter."""

    name: str
    code: str
    words: tuple[str, ...]
    result: Result
    low: int = 0
    high: int = 0


NUMBER_FILTERS = (
    Filter("even", "x % 2 == 0", ("even",), ("that are even",)),
    Filter("odd", "x % 2 == 1", ("odd",), ("that are odd",)),
    Filter("positive", "x > 0", ("positive",), ("that are positive", "above zero")),
    Filter("negative", "x < 0", ("negative",), ("that are negative", "below zero")),
    Filter("nonzero", "x != 0", ("nonzero",), ("that are not zero",)),
    Filter("greater", "x > {k}", (), ("greater than {k}", "above {k}", "that are greater than {k}", "larger than {k}"), 1, 20),
    Filter("less", "x < {k}", (), ("less than {k}", "below {k}", "that are less than {k}", "smaller than {k}"), 1, 20),
    Filter("at_least", "x >= {k}", (), ("of at least {k}", "that are at least {k}"), 1, 20),
    Filter("at_most", "x <= {k}", (), ("of at most {k}", "that are at most {k}"), 1, 20),
    Filter(
        "divisible", "x % {k} == 0", (), ("divisible by {k}", "that are divisible by {k}", "that are multiples of {k}"), 3, 9
    ),
    Filter("not_divisible", "x % {k} != 0", (), ("not divisible by {k}", "that are not divisible by {k}"), 3, 9),
    Filter("other", "x != {k}", (), ("other than {k}", "that are not {k}"), 1, 20),
)
NUMBER_MAPS = (
    Map("double", "x * 2", ("the doubles of {e}", "twice {e}", "{e}, each doubled"), "int"),
    Map("square", "x * x", ("the squares of {e}", "{e}, each squared"), "int"),
    Map("cube", "x * x * x", ("the cubes of {e}", "{e}, each cubed"), "int"),
    Map("negate", "-x", ("the negatives of {e}", "{e}, each negated"), "int"),
    Map("add", "x + {k}", ("{e}, each increased by {k}", "{e}, each plus {k}"), "int", 1, 20),
    Map("subtract", "x - {k}", ("{e}, each decreased by {k}", "{e}, each minus {k}"), "int", 1, 20),
    Map("multiply", "x * {k}", ("{e}, each multiplied by {k}", "{e}, each times {k}"), "int", 3, 12),
    Map("half", "x // 2", ("the halves of {e}, rounded down", "{e}, each halved and rounded down"), "int"),
    Map("absolute", "abs(x)", ("the absolute values of {e}",), "int"),
    Map("remainder", "x % {k}", ("the remainders of {e} after division by {k}", "{e}, each modulo {k}"), "int", 3, 12),
)

CHAR_FILTERS = (
    Filter("vowel", 'x in "aeiou"', (), ("that are vowels", "that are lowercase vowels")),
    Filter("no_vowel", 'x not in "aeiou"', (), ("that are not vowels", "other than vowels")),
    Filter("digit", "x.isdigit()", (), ("that are digits",)),
    Filter("no_digit", "not x.isdigit()", (), ("that are not digits", "other than digits")),
    Filter("letter", "x.isalpha()", (), ("that are letters",)),
    Filter("upper", "x.isupper()", ("uppercase",), ("that are uppercase", "in upper case")),
    Filter("lower", "x.islower()", ("lowercase",), ("that are lowercase", "in lower case")),
    Filter("no_space", 'x != " "', (), ("that are not spaces", "other than spaces")),
    Filter("equal", "x == '{c}'", (), ("equal to '{c}'", "that are '{c}'")),
    Filter("not_equal", "x != '{c}'", (), ("not equal to '{c}'", "that are not '{c}'", "other than '{c}'")),
    Filter("before", "x < '{c}'", (), ("before '{c}'", "that come before '{c}'")),
    Filter("after", "x > '{c}'", (), ("after '{c}'", "that come after '{c}'")),
)
CHAR_MAPS = (
    Map("upper", "x.upper()", ("{e} in upper case", "{e}, each in upper case", "{e}, each made uppercase"), "str"),
    Map("lower", "x.lower()", ("{e} in lower case", "{e}, each in lower case", "{e}, each made lowercase"), "str"),
    Map("twice", "x * 2", ("{e}, each written twice", "{e}, each doubled"), "str"),
    Map("repeat", "x * {k}", ("{e}, each repeated {k} times",), "str", 3, 5),
    Map("mark", "x + '{c}'", ("{e}, each followed by '{c}'",), "str"),
)

WORD_FILTERS = (
    Filter("longer", "len(x) > {k}", (), ("longer than {k} letters", "with more than {k} letters"), 1, 7),
    Filter("shorter", "len(x) < {k}", (), ("shorter than {k} letters", "with fewer than {k} letters"), 2, 8),
    Filter("length", "len(x) == {k}", (), ("of length {k}", "with exactly {k} letters"), 1, 7),
    Filter("starts", "x.startswith('{c}')", (), ("that start with '{c}'", "starting with '{c}'", "that begin with '{c}'")),
    Filter("ends", "x.endswith('{c}')", (), ("that end with '{c}'", "ending with '{c}'", "that end in '{c}'")),
    Filter("contains", "'{c}' in x", (), ("that contain '{c}'", "containing '{c}'", "with the letter '{c}'")),
    Filter("without", "'{c}' not in x", (), ("that do not contain '{c}'", "without the letter '{c}'", "without '{c}'")),
    Filter("upper", "x.isupper()", ("uppercase",), ("that are uppercase", "in upper case")),
    Filter("lower", "x.islower()", ("lowercase",), ("that are lowercase", "in lower case")),
    Filter("palindrome", "x == x[::-1]", (), ("that are palindromes", "that read the same backwards")),
    Filter("other", "x != '{c}'", (), ("other than '{c}'", "that are not '{c}'")),
)
WORD_MAPS = (
    Map("upper", "x.upper()", ("{e} in upper case", "{e}, each in upper case", "{e}, each made uppercase"), "str"),
    Map("lower", "x.lower()", ("{e} in lower case", "{e}, each in lower case", "{e}, each made lowercase"), "str"),
    Map("length", "len(x)", ("the lengths of {e}",), "int"),
    Map("reverse", "x[::-1]", ("{e}, each reversed", "{e}, each written backwards"), "str"),
    Map("first", "x[:1]", ("the first letters of {e}",), "str"),
    Map("last", "x[-1:]", ("the last letters of {e}",), "str"),
    Map("capital", "x.capitalize()", ("{e}, each capitalized",), "str"),
    Map("twice", "x * 2", ("{e}, each written twice",), "str"),
    Map("mark", "x + '{c}'", ("{e}, each followed by '{c}'",), "str"),
    Map("cut", "x[:{k}]", ("the first {k} letters of {e}",), "str", 2, 5),
    Map("count", "x.count('{c}')", ("how often '{c}' occurs in {e}",), "int"),
)

FILTERS: dict[Kind, tuple[Filter, ...]] = {"int": NUMBER_FILTERS, "char": CHAR_FILTERS, "word": WORD_FILTERS}
MAPS: dict[Kind, tuple[Map, ...]] = {"int": NUMBER_MAPS, "char": CHAR_MAPS, "word": WORD_MAPS}
NOUNS: dict[Kind, tuple[str, ...]] = {"int": ("numbers",), "char": ("characters",), "word": ("words",)}


@dataclass(frozen=True, slots=True)
class Reduce:
    """Makes the returned value. `{e}` are the elements, `{x}` one of them as code."""

    name: str
    words: tuple[str, ...]
    kinds: tuple[Result, ...]
    """The kinds of elements it applies to."""
    start: str
    """The line before the loop, or an empty string."""
    body: tuple[str, ...]
    """The lines in the loop."""
    end: str
    """The line after the loop."""
    mapped: bool = True
    """Whether a map before it makes sense."""


BOTH: tuple[Result, ...] = ("int", "str")
REDUCES = (
    Reduce("sum", ("the sum of {e}", "the total of {e}"), ("int",), "total = 0", ("total += {x}",), "return total"),
    Reduce("product", ("the product of {e}",), ("int",), "total = 1", ("total *= {x}",), "return total"),
    Reduce(
        "count",
        ("the number of {e}", "how many {e} there are"),
        BOTH,
        "total = 0",
        ("total += 1",),
        "return total",
        mapped=False,
    ),
    Reduce("list", ("a list of {e}", "{e} as a list"), BOTH, "result = []", ("result.append({x})",), "return result"),
    Reduce(
        "backwards",
        ("a list of {e} in reverse order", "{e} as a list in reverse order"),
        BOTH,
        "result = []",
        ("result.insert(0, {x})",),
        "return result",
    ),
    Reduce(
        "sorted",
        ("a sorted list of {e}", "{e} in sorted order"),
        BOTH,
        "result = []",
        ("result.append({x})",),
        "return sorted(result)",
    ),
    Reduce(
        "unique",
        ("a list of {e} without duplicates",),
        BOTH,
        "result = []",
        ("if {x} not in result:", "    result.append({x})"),
        "return result",
    ),
    Reduce(
        "largest",
        ("the largest of {e}, or None if there are none", "the maximum of {e}, or None if there are none"),
        ("int",),
        "best = None",
        ("if best is None or {x} > best:", "    best = {x}"),
        "return best",
    ),
    Reduce(
        "smallest",
        ("the smallest of {e}, or None if there are none", "the minimum of {e}, or None if there are none"),
        ("int",),
        "best = None",
        ("if best is None or {x} < best:", "    best = {x}"),
        "return best",
    ),
    Reduce(
        "longest",
        ("the longest of {e}, or None if there are none",),
        ("str",),
        "best = None",
        ("if best is None or len({x}) > len(best):", "    best = {x}"),
        "return best",
        mapped=False,
    ),
    Reduce(
        "shortest",
        ("the shortest of {e}, or None if there are none",),
        ("str",),
        "best = None",
        ("if best is None or len({x}) < len(best):", "    best = {x}"),
        "return best",
        mapped=False,
    ),
    Reduce("first", ("the first of {e}, or None if there are none",), BOTH, "", ("return {x}",), "return None"),
    Reduce("last", ("the last of {e}, or None if there are none",), BOTH, "last = None", ("last = {x}",), "return last"),
    Reduce(
        "any",
        ("True if there are any {e}, otherwise False", "whether there are any {e}"),
        BOTH,
        "",
        ("return True",),
        "return False",
        mapped=False,
    ),
    Reduce(
        "none",
        ("True if there are no {e}, otherwise False", "whether there are no {e}"),
        BOTH,
        "",
        ("return False",),
        "return True",
        mapped=False,
    ),
    Reduce(
        "join",
        ("{e} as one string", "a string of {e}", "{e} joined into one string"),
        ("str",),
        'result = ""',
        ("result += {x}",),
        "return result",
    ),
    Reduce(
        "comma",
        ("{e} joined with commas", "a string of {e}, joined with commas"),
        ("str",),
        "result = []",
        ("result.append({x})",),
        'return ",".join(result)',
    ),
    Reduce(
        "dashes",
        ("{e} joined with dashes", "a string of {e}, joined with dashes"),
        ("str",),
        "result = []",
        ("result.append({x})",),
        'return "-".join(result)',
    ),
    Reduce(
        "reverse", ("{e} as one string in reverse order",), ("str",), 'result = ""', ("result = {x} + result",), "return result"
    ),
)


@dataclass(frozen=True, slots=True)
class Iterable:
    """What the loop iterates over. `{p}` is the parameter."""

    name: str
    kind: Kind
    loop: str
    where: tuple[str, ...]
    """Wordings after the noun that name the parameter."""
    parameters: tuple[str, ...]
    argument: Literal["ints", "text", "words", "n"]
    """The kind of the parameter's argument."""


ITERABLES = (
    Iterable(
        "numbers",
        "int",
        "for x in {p}:",
        ("in {p}", "in the list {p}", "of {p}", "in the list"),
        ("numbers", "values", "nums", "items", "data", "xs", "scores", "ints", "list1", "arr"),
        "ints",
    ),
    Iterable(
        "range",
        "int",
        "for x in range(1, {p} + 1):",
        ("from 1 to {p}", "from 1 up to and including {p}", "between 1 and {p}"),
        ("n", "m", "limit", "top", "end", "k", "count"),
        "n",
    ),
    Iterable(
        "below",
        "int",
        "for x in range({p}):",
        ("from 0 up to but not including {p}", "from 0 to {p} - 1"),
        ("n", "m", "limit", "top", "end", "k", "count"),
        "n",
    ),
    Iterable(
        "characters",
        "char",
        "for x in {p}:",
        ("in {p}", "of the string {p}", "in the string {p}", "of {p}", "in the text"),
        ("text", "s", "string", "line", "phrase", "name", "message", "word"),
        "text",
    ),
    Iterable(
        "words",
        "word",
        "for x in {p}:",
        ("in {p}", "in the list {p}", "of {p}", "in the list"),
        ("words", "names", "strings", "items", "texts", "tokens", "terms", "lines"),
        "words",
    ),
    Iterable(
        "split",
        "word",
        "for x in {p}.split():",
        ("of the sentence {p}", "in the text {p}", "in the sentence"),
        ("text", "sentence", "line", "phrase", "s", "message"),
        "text",
    ),
)
