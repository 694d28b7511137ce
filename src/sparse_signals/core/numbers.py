"""Numbers for people: one rule of rounding, in text, tables and charts."""

from numbers import Integral, Real
from typing import Any

import numpy as np
import pandas as pd

TINY = 1e-12  # below this a float64 result is rounding noise, which differs between processors


def is_number(x: Any) -> bool:
    """Whether `x` is an integer or a float, of Python or of NumPy; True and False are not."""
    return isinstance(x, Real | np.number) and not isinstance(x, bool | np.bool_)


def fmt(x: Any, digits: int = 3) -> str:
    """A number for people: integers in full, floats at `digits` significant digits.

    Thousands are separated by commas; there is no −0, and |x| < 1e-12 is 0. Text stays as it is.
    """
    if not is_number(x):
        return str(x)
    if isinstance(x, Integral):
        return f"{int(x):,}"
    x = float(x)
    if not np.isfinite(x):
        return "–" if np.isnan(x) else ("∞" if x > 0 else "-∞")
    x = 0.0 if abs(x) < TINY else float(f"{x:.{digits}g}")
    if x != 0 and not 1e-4 <= abs(x) < 1e15:
        return f"{x:.{digits}g}"
    decimals = 0 if x == 0 else max(0, digits - 1 - int(np.floor(np.log10(abs(x)))))
    return f"{x:,.{decimals}f}"


def interval(value: float, low: float, high: float) -> str:
    """A number with its interval, for people: 3.14 [2.9, 3.4]."""
    return f"{fmt(value)} [{fmt(low)}, {fmt(high)}]"


def percent(share: float | np.floating) -> str:
    """A share as people say it: 0.914 is "91 %"; small ones keep a digit."""
    number = f"{100 * share:.0f}" if share >= 0.0095 else f"{100 * share:.1f}"
    return f"{number}\u00a0%"  # a line never breaks there


def count_of(n: int | np.integer, total: int, what: str) -> str:
    """How many of all, in words where that is none or all: "none of the 24 heads"."""
    words = {0: "none of the", total: "all"}
    return f"{words.get(int(n), f'{n} of')} {total:,} {what}"


def signed_percent(share: float | np.floating) -> str:
    """A share that may be negative, as people say it: −0.031 is "−3 %"."""
    return f"−{percent(-share)}" if share < 0 else percent(share)


def round_significant(value: Any, digits: int = 4) -> Any:
    """A float at `digits` significant digits, |x| < 1e-12 and −0 as 0.0; anything else as it is."""
    if not is_number(value) or isinstance(value, Integral) or not np.isfinite(value):
        return value
    return 0.0 if abs(value) < TINY else float(f"{value:.{digits}g}")


def rounded(table: pd.DataFrame, digits: int = 4) -> pd.DataFrame:
    """The table with every float at `digits` significant digits: what is published of it."""
    floats = table.select_dtypes(np.floating).columns
    return table.assign(**{name: table[name].map(lambda x: round_significant(x, digits))
                           for name in floats})  # fmt: skip


def rounded_everywhere(value: Any) -> Any:
    """A value from JSON with all floats in it rounded, however deep."""
    if isinstance(value, dict):
        return {key: rounded_everywhere(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded_everywhere(item) for item in value]
    return round_significant(value)
