"""Fields of configs: defaults, and checks that say what is legal.

A check takes a value and gives None if it is legal, else the legal values in words ("one of 'a', 'b'"), to stand behind
"must be".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "DEFAULT_WHITE_LIST", "Check", "Field", "a_bool", "a_choice", "a_dict", "a_list", "a_number", "a_string", "an_int",
    "anything", "either", "normal", "options_of", "unboxed", "unshared",
]  # fmt: skip

DEFAULT_WHITE_LIST = "*"
"""White list of a config that is for every operator."""

Check = Callable[[Any], "str | None"]


@dataclass(frozen=True)
class Field:
    """One field of a config.

    Attributes:
        default: Its value if nothing is said. Mutable defaults are copied.
        check: What is legal.
        doc: What it means, for the reference.
        tunable: A list of legal values stands for candidates, that `expand` and `autotune` try one after the other.
        stored: Whether `to_dict` and files carry it. One that is not stored cannot be said in JSON.
        ours: A field that neural_compressor does not have: `to_dict` gives it only where it differs from its default.
        convert: What is done to a legal value before it is kept; None: `normal`, so that files give back what is kept.
    """

    default: Any
    check: Check = lambda value: None
    doc: str = ""
    tunable: bool = True
    stored: bool = True
    ours: bool = False
    convert: Callable[[Any], Any] | None = None

    def kept(self, value: Any) -> Any:
        """A legal value as a config holds it: its own, and as it comes back from a file."""
        if not self.stored:
            return value
        return normal(value, self.default) if self.convert is None else self.convert(value)

    @property
    def choices(self) -> tuple[Any, ...]:
        """The legal values, where there are only a few; else the default alone."""
        return getattr(self.check, "choices", (self.default,))

    def candidates(self, value: Any) -> bool:
        """Whether the value is a list of legal values, not a legal value itself."""
        if not self.tunable or not isinstance(value, list) or not value or self.check(value) is None:
            return False
        return all(self.check(v) is None for v in value)


def unboxed(value: Any) -> Any:
    """Numbers and lists in the place of NumPy's and torch's, also in a list or tuple."""
    if type(value).__module__.partition(".")[0] in ("numpy", "torch") and hasattr(value, "tolist"):
        return value.tolist()
    return type(value)(map(unboxed, value)) if type(value) in (list, tuple) else value


def normal(value: Any, like: Any = None) -> Any:
    """A copy as JSON gives it back: text as keys, and a list for a tuple unless `like`, the default, has a tuple."""
    if isinstance(value, Mapping):
        inner = like if isinstance(like, dict) else {}
        return {str(key): normal(v, inner.get(key)) for key, v in value.items()}
    if isinstance(value, list | tuple):
        found = map(normal, value)
        return tuple(found) if isinstance(like, tuple) else list(found)
    return value


def unshared(value: Any) -> Any:
    """A copy of nested lists, tuples and dictionaries; everything else in them is the same object."""
    if type(value) is dict:
        return {key: unshared(v) for key, v in value.items()}
    return type(value)(map(unshared, value)) if type(value) in (list, tuple) else value


def anything(value: Any) -> str | None:
    """Every value is legal."""
    return None


def a_choice(*values: Any) -> Check:
    """One of the values, by type too: 1 is not True."""

    def check(value: Any) -> str | None:
        good = any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)
        return None if good else f"one of {', '.join(map(repr, values))}"

    check.choices = values  # type: ignore[attr-defined]
    return check


def a_bool(value: Any) -> str | None:
    """True or False."""
    return None if isinstance(value, bool) else "True or False"


a_bool.choices = (False, True)  # type: ignore[attr-defined]


def an_int(low: int | None = None, high: int | None = None, also: tuple[Any, ...] = ()) -> Check:
    """A whole number from `low` to `high`, or one of `also`."""

    def check(value: Any) -> str | None:
        if any(value is v or (value == v and type(value) is type(v)) for v in also):
            return None
        if isinstance(value, int) and not isinstance(value, bool):
            if (low is None or value >= low) and (high is None or value <= high):
                return None
        return " or ".join([f"a whole number{_range(low, high)}", *map(repr, also)])

    if low is not None and high is not None and high - low < 10:
        check.choices = tuple(range(low, high + 1))  # type: ignore[attr-defined]
    return check


def a_number(low: float | None = None, high: float | None = None, also: tuple[Any, ...] = ()) -> Check:
    """A finite number from `low` to `high`, or one of `also`."""

    def check(value: Any) -> str | None:
        if any(value is v or (value == v and type(value) is type(v)) for v in also):
            return None
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf"):
            if (low is None or value >= low) and (high is None or value <= high):
                return None
        return " or ".join([f"a number{_range(low, high)}", *map(repr, also)])

    return check


def _range(low: Any, high: Any) -> str:
    if low is not None and high is not None:
        return f" from {low} to {high}"
    return f" of at least {low}" if low is not None else f" of at most {high}" if high is not None else ""


def a_string(value: Any) -> str | None:
    """Any text."""
    return None if isinstance(value, str) else "a string"


def a_list(of: Check = anything, words: str = "values") -> Check:
    """A list or tuple of which every entry passes `of`."""

    def check(value: Any) -> str | None:
        good = isinstance(value, list | tuple) and all(of(v) is None for v in value)
        return None if good else f"a list of {words}"

    return check


def a_dict(*keys: str) -> Check:
    """A dictionary with string keys; if `keys` are given, with no others."""

    def check(value: Any) -> str | None:
        good = isinstance(value, dict) and all(isinstance(k, str) for k in value)
        if good and (not keys or set(value) <= set(keys)):
            return None
        return "a dictionary" + (f" with the keys {', '.join(map(repr, keys))}" if keys else " with names as keys")

    return check


def options_of(fields: Mapping[str, Field]) -> Check:
    """A dictionary of some of the fields, each with a legal value or a list of candidates for it."""
    names = a_dict(*fields)

    def check(value: Any) -> str | None:
        if (wrong := names(value)) is not None:
            return wrong
        for key, v in value.items():
            if (expected := fields[key].check(v)) is not None and not fields[key].candidates(v):
                return f"a dictionary whose {key!r} is {expected}"
        return None

    return check


def either(*checks: Check) -> Check:
    """Legal if one of the checks says so."""

    def check(value: Any) -> str | None:
        said = [c(value) for c in checks]
        return None if None in said else " or ".join(filter(None, said))

    choices = [getattr(c, "choices", None) for c in checks]
    if all(c is not None for c in choices):
        check.choices = tuple(v for c in choices for v in c or ())  # type: ignore[attr-defined]
    return check
