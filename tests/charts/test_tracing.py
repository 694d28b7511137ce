"""Charts of chapter 4 say what their data say, and can be drawn; every node has its place."""

import json
import re
from copy import deepcopy
from functools import cache
from itertools import pairwise

import pandas as pd
import pytest
import vl_convert

import example_circuits as made_up
from drawing import drawn, spec, title
from sparse_signals.charts import graph
from sparse_signals.charts import tracing as charts
from sparse_signals.charts.style import HIGHLIGHT

NODE = re.compile(r'aria-label="([^"]*)" role="graphics-symbol" aria-roledescription="rect mark"')


@pytest.fixture
def opened():
    rows = [
        ("0.1", side, slices, weight, component_kept)
        for side, component_kept in (("dest", True), ("src", False))
        for slices, weight in (("the support", 2.0), ("all slices", 4.0))
    ]
    rows += [
        ("MLP 0", "dest", "the support", -1.0, False),
        ("MLP 0", "dest", "all slices", 1.0, False),
    ]
    return pd.DataFrame(rows, columns=["component", "side", "slices", "weight", "kept"])


def test_opened_firing_counts_what_is_kept(opened):
    chart = charts.firing_opened(opened, "Head 1.0")
    assert title(chart).startswith("Head 1.0: the trace keeps 1 component of the destination side")
    assert "sum to 44\xa0% less over the support" in title(chart)
    assert "0.1" in drawn(chart)


def test_kinds_state_the_share_of_heads_above_the_first_layer():
    rows = [(layer, side, kind, share, share - 0.1, share + 0.1)
            for layer, heads in ((0, 0.0), (1, 0.25), (2, 0.75))
            for side in ("dest", "src")
            for kind, share in (("head", heads), ("MLP", 1 - heads))]  # fmt: skip
    table = pd.DataFrame(rows, columns=["layer", "side", "kind", "share", "low", "high"])
    chart = charts.kinds_of_components(table)
    assert "heads carry 50\xa0% of the destination side and 50\xa0%" in title(chart)
    assert drawn(chart)


def test_sensitivity_names_the_setting_that_matters_most():
    rows = [(setting, x, value, value, value, 10.0, weighting)
            for setting, lowest in (("level", 0.9), ("share", 0.3), ("fraction", 0.6))
            for x, value in ((0.5, lowest), (0.7, 1.0))
            for weighting in ("exact", "published")]  # fmt: skip
    columns = ["setting", "x", "value", "low", "high", "edges", "weighting"]
    chart = charts.sensitivity_curves(pd.DataFrame(rows, columns=columns))
    assert "most on the share of a side that is kept (overlap down to 0.30)" in title(chart)
    assert "least on the attention" in title(chart)
    assert drawn(chart)


def test_reasons_say_who_is_first_and_draw_the_largest_alone():
    rows = [(component, question, slices, share, share, share)
            for slices in ("all slices", "the support")
            for question, shares in (("why look at IO", {"0.2": 0.8, "0.0": 0.1}),
                                     ("why IO rather than S1", {"0.2": -0.1, "0.0": 0.5, "no": 0}))
            for component, share in shares.items()]  # fmt: skip
    columns = ["component", "question", "slices", "value", "low", "high"]
    first = ["0.2 contributes most", "it is 0.0"]
    chart = charts.reasons(pd.DataFrame(rows, columns=columns), "1.4", first, most=2)
    assert title(chart).startswith("Head 1.4, destination side, all slices. Why look at IO: 0.2")
    assert "; why IO rather than S1: it is 0.0" in title(chart)
    assert "0.2" in drawn(chart) and ">no<" not in drawn(chart)


@pytest.mark.parametrize(("clear", "words"), [(True, "all 2"), (False, "none of the 2")])
def test_heads_compared_say_how_many_traces_beat_chance(clear, words):
    rows = [(f"1.{n}", trace, n / 4, n - 1.0, n - 1.5, n - 0.5, 0.1, 0.0, 0.6, clear)
            for trace in ("by score", "by contrast") for n in range(4)]  # fmt: skip
    columns = ["name", "trace", "share", "F", "F_low", "F_high", "P", "top1", "rho", "clear"]
    chart = charts.heads_compared(pd.DataFrame(rows, columns=columns))
    assert title(chart).startswith(f"In {words} kinds of trace")
    assert "by score ρ = 0.60" in title(chart)
    assert "1.3" in drawn(chart)


def test_the_strongest_paths_lead_down_from_the_top_and_join_few_nodes():
    rows = [("2.0", "3.0", 3.0, 90), ("1.0", "2.0", 2.0, 50), ("1.1", "3.0", 3.0, 40),
            ("0.0", "1.1", 1.0, 100), ("0.1", "1.0", 1.0, 100)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["writer", "reader", "down_layer", "percent"])
    kept = graph.strongest_paths(table, 5)  # 0.9, 0.45, then 0.1 at 0.45 before 1.1 at 0.4
    assert kept["writer"].tolist() == ["2.0", "1.0", "1.1", "0.1"]
    assert len(graph.strongest_paths(table, 4)) == 3
    pd.testing.assert_frame_equal(graph.strongest_paths(table, 60), table)


def test_large_graphs_say_of_how_many_edges_they_show_the_strongest():
    edges = made_up.pooled_edges(600)
    chart = charts.circuit_graph(edges, nodes=30)
    assert title(chart).startswith("Of the ") and " strongest of 600 edges" in title(chart)
    shown = set(NODE.findall(with_values(chart, prune=0)))
    assert 20 < len(shown) <= 30 and shown < node_names(edges)


def test_dots_have_a_row_each():
    table = pd.DataFrame({"n": ["five", "ten"], "value": [1, 2], "low": [0, 1], "high": [2, 3]})
    picture = drawn(charts.dots(table, "n", "words", "Title", "axis"))
    assert "five" in picture and "ten" in picture


def with_values(chart, version="6.4", **params) -> str:
    """The chart as SVG, with other values of its parameters."""
    changed = deepcopy(spec(chart))
    for param in changed["params"]:
        param["value"] = params.get(param["name"], param.get("value"))
    return vl_convert.vegalite_to_svg(changed, vl_version=version)


def marks(svg: str, group: str) -> str:
    """What a named group of marks holds."""
    return re.search(rf'<g class="mark-\w+ role-mark {group}_marks"[^>]*>(.*?)</g>', svg)[1]


@cache
def circuit(n: int):
    """`n` edges, and their graph."""
    edges = made_up.pooled_edges(n)
    return edges, charts.circuit_graph(edges)


@cache
def of_a_prompt():
    edges = made_up.prompt_edges(60)
    return edges, charts.prompt_graph(edges, made_up.TOKENS)


def node_names(edges: pd.DataFrame) -> set[str]:
    up = edges["upstream"] + " at " + edges["role"]
    return set(up) | set(edges["downstream"] + " at " + edges["dest_role"])


def places(table: pd.DataFrame, columns: list[str]) -> graph.Layout:
    return graph.lay_out(graph._nodes(table), columns)


@pytest.mark.parametrize("version", ["5.8", "6.4"])
@pytest.mark.parametrize("n", [40, 600])
def test_every_node_is_drawn_and_labelled(n, version):
    edges, chart = circuit(n)
    svg = with_values(chart, version, prune=0)
    names = node_names(edges)
    assert sorted(NODE.findall(svg)) == sorted(names)
    labels = re.findall(r"<text[^>]*>([^<]+)</text>", marks(svg, "labels"))
    assert len(labels) == len(names)
    assert len(re.findall(r'class="mark-line role-mark layer_0_marks"', svg)) == n


@pytest.mark.parametrize("size", [(40, 4, 6), (600, 4, 6), (600, 12, 12)])
def test_no_two_nodes_overlap_and_all_are_inside(size):
    table = charts.named_edges(made_up.pooled_edges(*size))
    placed = places(table, made_up.ROLES)
    nodes = placed.nodes
    assert nodes["left"].min() >= 0 and nodes["right"].max() <= placed.width <= graph.PLOT
    assert nodes["y"].between(graph.HALF, placed.height - graph.HALF).all()
    for _, row in nodes.groupby("y"):
        row = row.sort_values("left")
        assert (row["left"].to_numpy()[1:] > row["right"].to_numpy()[:-1]).all()
    rows = sorted(nodes["y"].unique())
    assert min(b - a for a, b in pairwise(rows)) > 2 * graph.HALF


def test_a_higher_layer_is_drawn_higher_and_a_column_keeps_its_nodes():
    table = charts.named_edges(made_up.pooled_edges(200))
    nodes = places(table, made_up.ROLES).nodes
    tops = nodes.groupby("layer")["y"].agg(["min", "max"])
    assert (tops["min"].to_numpy()[1:] > tops["max"].to_numpy()[:-1]).all()
    ends = nodes.groupby("column").agg(left=("left", "min"), right=("right", "max"))
    ends = ends.loc[made_up.ROLES]
    assert (ends["left"].to_numpy()[1:] > ends["right"].to_numpy()[:-1]).all()


def test_labels_are_words_where_they_fit():
    few = charts.named_edges(made_up.pooled_edges(40))
    few = few[few["at"].isin(["S1", "end"]) & few["dest"].eq("end")]
    wide = places(few, ["S1", "end"])
    assert not wide.brief and {"pos", "MLP 0"} <= set(wide.nodes["label"])
    narrow = places(charts.named_edges(made_up.pooled_edges(600)), made_up.ROLES)
    assert narrow.brief and {"E", "P", "B", "M0", "B0", "0.0"} <= set(narrow.nodes["label"])


def test_slider_opens_at_about_forty_edges():
    edges, chart = circuit(600)
    prune = graph.default_prune(100 * edges["prompts"] / edges["of"], graph.Slider("%"))
    svg = with_values(chart)
    kept = edges[100 * edges["prompts"] / edges["of"] >= prune]
    assert 30 <= len(kept) <= 50
    assert svg.count("mark-line role-mark layer_0_marks") == len(kept)
    assert set(NODE.findall(svg)) == node_names(kept)


@pytest.mark.parametrize(("percents", "least"), [
    ([5.4] * 40, 5),
    ([80.0] * 41 + [10.0] * 400, 11),
    ([100.0] * 500, 0),
])  # fmt: skip
def test_default_prune_leaves_about_forty(percents, least):
    assert graph.default_prune(pd.Series(percents), graph.Slider("%")) == least


def test_title_names_the_most_frequent_edge_and_the_description_says_all():
    edges = made_up.pooled_edges(60).assign(prompts=10)
    edges.loc[7, "prompts"] = 192
    chart = charts.circuit_graph(edges)
    edge = edges.loc[7]
    names = [
        f"{edge['upstream']} at {edge['role']}",
        f"{edge['downstream']} at {edge['dest_role']}",
    ]
    assert f"most often, {' → '.join(names)} (75\xa0%)" in title(chart)
    assert "Of 60 edges traced in 256 prompts, 1 is in at least half" in title(chart)
    assert "60 edges" in chart.to_dict()["description"]


def test_edges_between_the_same_nodes_are_drawn_apart():
    edges = made_up.pooled_edges(40).iloc[[0] * 3].assign(src_role=["IO", "S1", "end"], side="dest")
    edges = edges.assign(role=edges["dest_role"])
    paths = re.findall(r'<path aria-label[^>]*? d="([^"]+)"|<path [^>]*?d="(M[^"]+C[^"]+)"',
                       with_values(charts.circuit_graph(edges), prune=0))  # fmt: skip
    curves = {b for _, b in paths if "C" in b and b.count("C") >= 3 and "Z" not in b}
    assert len(curves) == 3


@pytest.mark.parametrize("active", [{"chosen": "MLP 0 at end"}, {"pinned": "MLP 0 at end"}])
def test_an_active_node_lights_its_edges_and_neighbours(active):
    edges, chart = circuit(300)
    ((name, node),) = active.items()
    value = [{"node": node}] if name == "pinned" else node
    svg = with_values(chart, prune=0, **{name: value})
    table = charts.named_edges(edges)
    lit = table[(table["writer"] == node) | (table["reader"] == node)]
    assert len(lit) > 1
    assert svg.count(f'fill="{HIGHLIGHT}"') == 1
    boxes, labels = marks(svg, "nodes"), marks(svg, "labels")
    assert labels.count('fill="white"') == len(set(lit["writer"]) | set(lit["reader"]))
    assert boxes.count('fill-opacity="1"') == labels.count('fill="white"')


def test_spec_is_small_canonical_and_takes_categories():
    edges, chart = circuit(600)
    small = spec(chart)
    assert len(json.dumps(small)) < 400_000
    names = ["upstream", "downstream", "side"]
    other = edges.astype(dict.fromkeys(names, "category"))
    assert spec(charts.circuit_graph(other)) == small


def test_graphs_can_be_used_by_keyboard():
    edges, chart = circuit(40)
    params = {param["name"]: param for param in spec(chart)["params"]}
    most = (100 * edges["prompts"] / edges["of"]).max()
    assert params["prune"]["bind"]["input"] == "range"
    assert most - 1 < params["prune"]["bind"]["max"] <= most  # its end leaves the largest edge
    assert params["chosen"]["bind"]["options"][0] is None
    assert set(params["chosen"]["bind"]["options"][1:]) == node_names(edges)


def test_columns_follow_the_order_and_unknown_roles_come_first():
    edges = made_up.pooled_edges(200)
    edges = edges.replace({"role": {"IO": "giver"}, "dest_role": {"IO": "giver"}})
    names = spec(charts.circuit_graph(edges))["layer"][0]["encoding"]["x"]["axis"]["labelExpr"]
    order = json.loads(names[1 : names.index(")[")]).values()
    assert set(list(order)[:2]) == {"giver", "other"}
    assert list(order)[2:] == ["IO+1", "S1-1", "S1", "S1+1", "S2", "S2+1", "end"]


@pytest.mark.parametrize("version", ["5.8", "6.4"])
def test_prompt_graph_has_a_column_for_every_token(version):
    edges, chart = of_a_prompt()
    svg = with_values(chart, version, prune=0)
    assert "0 &lt;|endoftext|&gt;" in svg and "13 to" in svg
    label = {pos: f"{pos} {token.strip()}" for pos, token in enumerate(made_up.TOKENS)}
    nodes = set(edges["upstream"] + " at " + edges["token"].map(label))
    nodes |= set(edges["downstream"] + " at " + edges["dest"].map(label))
    assert set(NODE.findall(svg)) == nodes


def test_prompt_graph_names_the_largest_share():
    edges = made_up.prompt_edges(60).assign(share=0.1)
    edges.loc[3, "share"] = 0.9
    row, chart = edges.loc[3], charts.prompt_graph(edges, made_up.TOKENS)
    assert f"{row['upstream']} at {row['token']} " in title(chart) and "(90\xa0%)" in title(chart)
    assert chart.to_dict()["description"]


@pytest.mark.parametrize("edges", [made_up.pooled_edges(1), made_up.prompt_edges(1)])
def test_no_edges_is_an_error_that_says_so(edges):
    draw = charts.circuit_graph if "of" in edges else lambda e: charts.prompt_graph(e, ["a"])
    with pytest.raises(ValueError, match="no edges"):
        draw(edges.iloc[:0])
