"""Charts of chapter 2: they build, say what they show, and their title follows the data."""

from functools import cache

import numpy as np
import pandas as pd
import pytest

from drawing import title
from sparse_signals.charts import heads as charts

NAMES = [("0.0", 0, 0), ("0.1", 0, 1), ("1.0", 1, 0)]


def rng(seed):
    return np.random.default_rng(seed)


def outer_products(seed):
    rows = [(p, i, j) for p in ("Ω", "pair 0", "pair 1") for i in range(3) for j in range(3)]
    table = pd.DataFrame(rows, columns=["part", "row", "column"])
    return charts.outer_products(table.assign(value=rng(seed).standard_normal(len(table))))


def head_spectra(seed):
    heads = pd.DataFrame(NAMES, columns=["name", "layer", "head"])
    heads = heads.assign(ours=rng(seed).uniform(2, 4, 3), random=3.0, low=2.5, high=3.5)
    outside = np.where(heads["ours"] > 3.5, "flatter", "steeper")
    inside = heads["ours"].between(2.5, 3.5)
    heads["verdict"] = np.where(inside, "as random", outside)
    flat = pd.concat([heads.assign(null=null) for null in ("shape", "factors")])
    spectra = heads[["name"]].merge(pd.DataFrame({"k": range(4)}), how="cross").assign(sigma=1.0)
    band = pd.DataFrame({"k": range(4), "low": 0.9, "high": 1.1})
    return charts.head_spectra(flat, spectra, band)


def published_flatness(seed):
    points = pd.DataFrame({"row": ["ours", "ours", "published"], "name": ["0.0", "0.1", "9.9"]})
    points["share"] = rng(seed).uniform(0.2, 0.9, 3)
    random = pd.DataFrame({"row": ["ours"], "measure": ["σ"], "low": [0.8], "high": [0.9]})
    return charts.published_flatness(points, random)


def partial_sums(seed):
    rows = [(i, j, k) for i in range(4) for j in range(i + 1) for k in (1, 2, 3)]
    table = pd.DataFrame(rows, columns=["dest", "src", "K"])
    table["score"] = rng(seed).standard_normal(len(table))
    return charts.partial_sums(table, ["<|start|>", " Mary", " and", " John"], "0.1")


def choices(seed):
    bases = ("singular vectors", "random directions")
    rows = [(n, b, k, k / 4) for n in ("all heads", "0.0") for b in bases for k in (1, 2, 4)]
    shares = pd.DataFrame(rows, columns=["name", "basis", "K", "value"])
    shares = shares.assign(low=shares["value"] - 0.1, high=shares["value"])
    needed = pd.DataFrame({"basis": bases, "value": [2 + seed, 4], "low": 2.0, "high": 4.0})
    return charts.choices(shares, needed, of=4)


def stability(seed):
    noise = rng(seed).uniform(1e-4, 1e-1, (3, 60))
    columns = {"gap": noise[0], "vector": noise[1], "plane": noise[2], "k": 0, "name": "0.0"}
    table = pd.DataFrame(columns)
    return charts.stability(pd.concat([table.assign(size=size) for size in (1e-6, 1e-4, 1e-2)]))


def listeners(seed):
    rows = [(s, k, f"word {n}") for s in "uv" for k in (0, 1) for n in range(20)]
    table = pd.DataFrame(rows, columns=["side", "k", "label"])
    table["value"] = rng(seed).standard_normal(len(table))
    return charts.listeners(table.assign(count=3), "0.1", 1)


@cache
def chart_of(make, seed=0):
    return make(seed)


@cache
def spec_of(make):
    return chart_of(make).to_dict()


CHARTS = [outer_products, head_spectra, published_flatness, partial_sums, choices, stability,
          listeners]  # fmt: skip


@pytest.mark.parametrize("make", CHARTS)
def test_chart_has_a_title_and_a_description(make):
    assert len(title(chart_of(make))) > 30
    assert title(chart_of(make)) in spec_of(make)["description"]


@pytest.mark.parametrize("make", CHARTS)
def test_title_follows_the_data(make):
    assert len({title(chart_of(make, seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("make", CHARTS)
def test_specs_stay_small(make):
    assert len(str(spec_of(make))) < 60_000


def test_grid_can_be_clicked_or_chosen_from_lists():
    params = {p["name"]: p for p in spec_of(head_spectra)["params"]}
    assert params["chosen_name"]["bind"]["name"]["options"] == ["0.0", "0.1", "1.0"]
    assert params["chosen_name"]["select"]["on"] == "click"
    assert params["against"]["bind"]["options"] == ["shape", "factors"]


def test_title_of_spectra_counts_heads_for_each_null():
    words = title(chart_of(head_spectra, 0))
    assert words.count("random matrices of the same") == 2
    verdicts = ["steeper", "steeper", "as random"]
    assert charts._counts(pd.Series(verdicts)) == (
        "2 of the 3 heads are clearly steeper and none of the 3 heads clearly flatter than"
    )


def test_a_count_that_no_draw_changes_needs_no_interval():
    assert charts.span(pd.Series({"value": 28, "low": 28.0, "high": 28.0})) == "28"
    assert charts.span(pd.Series({"value": 28, "low": 24.0, "high": 28.0})) == "28 (24–28)"


def test_slider_opens_where_the_scores_are_nearly_right():
    assert spec_of(partial_sums)["params"][0]["value"] == 3
    assert "first 3 of 3" in title(chart_of(partial_sums))


def test_listeners_show_both_ends_of_every_pair():
    tables = spec_of(listeners)["datasets"].values()
    assert [len(rows) for rows in tables] == [2 * 2 * charts.LISTED] * 2


def test_scores_are_centred_at_zero():
    low, high = spec_of(partial_sums)["vconcat"][0]["encoding"]["color"]["scale"]["domain"]
    assert low == -high < 0


def test_packed_numbers_come_back():
    table = pd.DataFrame({"name": ["a", "a", "b"], "x": [1.23456, -1e-17, 2.0]})
    packed = charts.packed(table, ["name"], ["x"])
    assert packed["x"].tolist() == ["1.23 0", "2"]
    assert charts.unpacked(packed, ["x"]).mark_bar().to_dict()["transform"][1] == {"flatten": ["x"]}
