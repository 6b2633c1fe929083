"""Checks of arguments: errors that name what was found and what was expected."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vptq_runtime.errors import OptionError


def check_int(option: str, found: object, least: int, most: int | None = None) -> None:
    """Raises OptionError unless `found` is a whole number in least ... most."""
    whole = isinstance(found, int) and not isinstance(found, bool)
    if not whole or found < least or (most is not None and found > most):  # type: ignore[operator]
        upper = "" if most is None else f" and at most {shown(most)}"
        raise OptionError(f"{option}: found {shown(found)}, expected a whole number, at least {least}{upper}")


def check_choice(option: str, found: object, known: Sequence[str]) -> None:
    """Raises OptionError, which lists the known values, unless `found` is one of them."""
    if not isinstance(found, str) or found not in known:
        raise OptionError(f"{option}: found {shown(found)}, expected one of {', '.join(known)}")


def check_number(option: str, found: object, least: float, most: float = sys.float_info.max) -> None:
    """Raises OptionError unless `found` is a finite number in least ... most."""
    number = isinstance(found, int | float) and not isinstance(found, bool)
    # NaN fails every comparison; infinity, and a whole number that no float can hold, the last one.
    if not number or not least <= found <= most:  # type: ignore[operator]
        upper = f" and at most {most}" if most < sys.float_info.max else ""
        raise OptionError(
            f"{option}: found {shown(found)}, expected a finite number, at least {least}{upper}"
        )


def shown(found: object) -> str:
    """A value as error messages quote it: one line, not too long."""
    if isinstance(found, int) and abs(found) >= 10**40:
        return "a number of more than 40 digits"  # Python refuses to print the longest ones
    try:
        return repr(found)[:80]
    except Exception:  # a list of such numbers, or nested without end, or what its class makes of it
        return f"a value of type {type(found).__name__}"
