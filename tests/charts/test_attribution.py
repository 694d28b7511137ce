"""Charts of traces from the answer say what their data say; signs can be seen."""

import re

import pandas as pd
import pytest
import vl_convert

import example_circuits as made_up
from drawing import drawn, spec, title
from sparse_signals.charts import attribution as charts
from sparse_signals.charts import graph
from sparse_signals.core.numbers import signed_percent

BADGE = re.compile(r'class="mark-symbol role-mark layer_1_marks"[^>]*>(.*?)</g>')


@pytest.fixture
def pooled():
    return made_up.answer_edges(60)


def of_prompt(edges):
    at = dict(zip(made_up.ROLES, range(len(made_up.ROLES)), strict=True))
    edges = edges.assign(token=edges["role"].map(at), dest=edges["dest_role"].map(at), of_node=0.5)
    return edges.drop(columns=["role", "dest_role"])


def test_title_names_the_largest_edge_and_who_writes_the_answer(pooled):
    pooled = pooled.assign(share=0.01)
    pooled.loc[5, "share"] = -0.5
    row = pooled.loc[5]
    chart = charts.answer_graph(pooled)
    name = f"{row['upstream']} at {row['role']} → {row['downstream']} at {row['dest_role']}"
    assert f"largest edge pooled over 256 prompts is {name} (50\xa0%), against" in title(chart)
    into = pooled[pooled["downstream"] == "answer"].groupby("upstream")["share"].sum()
    first = into.abs().idxmax()
    assert f"write above all {first} ({signed_percent(into[first])})" in title(chart)
    assert "query, key or value" in spec(chart)["description"]


def test_every_negative_edge_has_a_sign_and_no_other(pooled):
    shown = {"prune": 0.0}
    chart = charts.answer_graph(pooled)
    for param in (parts := spec(chart))["params"]:
        param["value"] = shown.get(param["name"], param.get("value"))
    for version in ("5.8", "6.4"):
        svg = vl_convert.vegalite_to_svg(parts, vl_version=version)
        assert BADGE.search(svg)[1].count("<path") == (pooled["share"] < 0).sum() > 5
    only = charts.answer_graph(pooled.assign(share=pooled["share"].abs()))
    assert not BADGE.search(drawn(only)) and "⊖" not in str(spec(only))
    assert "⊖" in str(spec(chart)["title"])


def test_channels_have_colour_and_dash_of_their_own(pooled):
    encoding = spec(charts.answer_graph(pooled))["layer"][0]["encoding"]
    channels = ["query", "key", "value", "MLP", "direct"]
    for name in ("color", "strokeDash"):
        scale = encoding[name]["scale"]
        assert scale["domain"] == channels
        assert len({str(x) for x in scale["range"]}) == len(channels)


def test_slider_has_about_a_hundred_steps_and_reaches_the_largest(pooled):
    for largest in (0.0037, 0.31, 1.4):
        scaled = pooled.assign(share=pooled["share"] * largest / pooled["share"].abs().max())
        params = {x["name"]: x for x in spec(charts.answer_graph(scaled))["params"]}
        bind = params["prune"]["bind"]
        assert bind["max"] >= 100 * largest and 40 <= bind["max"] / bind["step"] <= 101
        percents = 100 * scaled["share"].abs()
        assert 25 <= (percents >= params["prune"]["value"]).sum() <= 55


@pytest.mark.parametrize("largest", [0.3742, 0.0123, 0.9951, 0.5])
def test_the_slider_leaves_the_largest_edge(pooled, largest):
    table = pooled.assign(share=pooled["share"] / pooled["share"].abs().max() * largest)
    slider = next(p for p in spec(charts.answer_graph(table))["params"] if p["name"] == "prune")
    assert largest * 50 < slider["bind"]["max"] <= largest * 100 + 1e-9


def test_the_answer_is_a_row_of_its_own_and_columns_follow_the_order(pooled):
    chart = charts.answer_graph(pooled, made_up.ROLES)
    axis = spec(chart)["layer"][0]["encoding"]["y"]["axis"]["labelExpr"]
    assert '"answer"' in axis
    order = re.findall(
        r': "([^"]+)"', spec(chart)["layer"][0]["encoding"]["x"]["axis"]["labelExpr"]
    )
    assert order == [role for role in made_up.ROLES if role in order]


def test_a_prompt_has_a_column_for_every_token(pooled):
    edges = of_prompt(pooled)
    svg = drawn(charts.answer_prompt_graph(edges, made_up.TOKENS))
    assert "13 to" in svg and "answer" in svg
    assert "largest edge of this prompt" in title(charts.answer_prompt_graph(edges, made_up.TOKENS))


def test_no_edges_are_an_error(pooled):
    with pytest.raises(ValueError, match="no edges"):
        charts.answer_graph(pooled.iloc[:0])


def test_a_name_that_closes_a_script_is_data(pooled):
    hostile = "</script>'\""
    chart = charts.answer_graph(pooled.assign(role=hostile))
    assert hostile in str(spec(chart)["datasets"]) or "script" in str(spec(chart))
    assert drawn(chart)


def test_default_prune_keeps_the_steps_of_the_slider():
    percents = pd.Series([0.34] * 10)
    assert graph.default_prune(percents, graph.Slider("%", 0.1, 1.0)) == pytest.approx(0.3)


def test_first_edges_touch_so_many_nodes_and_no_more(pooled):
    for edges, ends in ((pooled, ("role", "dest_role")), (of_prompt(pooled), ("token", "dest"))):
        kept = charts.first_edges(edges, 12)
        pd.testing.assert_frame_equal(kept, edges.head(len(kept)))
        ways = zip(("upstream", "downstream"), ends, strict=True)

        def touched(table, ways=tuple(ways)):
            return {node for names in ways for node in zip(*(table[x] for x in names), strict=True)}

        assert len(touched(kept)) <= 12 < len(touched(edges.head(len(kept) + 1)))
