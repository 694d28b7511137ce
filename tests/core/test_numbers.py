"""Numbers for people: how they are rounded and written."""

import numpy as np
import pandas as pd
import pytest

from sparse_signals.core.numbers import count_of, fmt, percent, rounded, signed_percent


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12345678, "12,345,678"),
        (np.int64(4), "4"),
        (0.0, "0"),
        (-0.0, "0"),
        (-3e-17, "0"),
        (0.12345, "0.123"),
        (-0.04999, "-0.0500"),
        (0.9999, "1.00"),
        (np.float64(99.96), "100"),
        (1234.5, "1,230"),
        (1234567.8, "1,230,000"),
        (0.00012345, "0.000123"),
        (1.2345e-6, "1.23e-06"),
        (float("nan"), "–"),
        (float("-inf"), "-∞"),
        (True, "True"),
        ("9.9", "9.9"),
    ],
)
def test_fmt_gives_three_digits_and_no_negative_zero(value, text):
    assert fmt(value) == text


def test_fmt_takes_other_numbers_of_digits():
    assert fmt(3.14159, 5) == "3.1416"


def test_rounded_touches_floats_only():
    table = pd.DataFrame({"a": [1.23456, -1e-15], "b": [123456, 2], "c": ["x", "y"]})
    out = rounded(table)
    assert out["a"].tolist() == [1.235, 0.0] and str(out["a"][1]) == "0.0"
    assert out["b"].tolist() == [123456, 2] and out["c"].tolist() == ["x", "y"]


@pytest.mark.parametrize(("share", "words"), [(0.914, "91 %"), (0.0042, "0.4 %"), (1.0, "100 %")])
def test_percent_reads_like_a_sentence(share, words):
    assert percent(share).replace("\u00a0", " ") == words


def test_a_negative_share_has_a_minus():
    assert [signed_percent(x) for x in (-0.314, 0.314, -0.001)] == [
        "−31\u00a0%",
        "31\u00a0%",
        "−0.1\u00a0%",
    ]


@pytest.mark.parametrize(("n", "words"), [
    (0, "none of the 24 heads"), (1, "1 of 24 heads"), (24, "all 24 heads"),
])  # fmt: skip
def test_counts_of_none_and_of_all_are_words(n, words):
    assert count_of(n, 24, "heads") == words
