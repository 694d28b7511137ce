"""Circuit graphs: every node has a place and a name, edges are pruned, titles follow the data."""

import json
import re
from itertools import pairwise

import pandas as pd
import pytest
import vl_convert

import example_circuits as made_up
from sparse_signals.charts import graph
from sparse_signals.charts import graph as layout
from sparse_signals.charts import style as base
from sparse_signals.charts import tracing as circuits

NODE = re.compile(r'aria-label="([^"]*)" role="graphics-symbol" aria-roledescription="rect mark"')


def text(chart) -> str:
    return " ".join(chart.to_dict()["title"]["text"]).replace("\u00a0", " ")


def drawn(chart, version="6.4", **params) -> str:
    """The chart as SVG, with other values of its parameters."""
    spec = base.canonical(chart.to_dict())
    for param in spec["params"]:
        param["value"] = params.get(param["name"], param.get("value"))
    return vl_convert.vegalite_to_svg(spec, vl_version=version)


def marks(svg: str, group: str) -> str:
    """What a named group of marks holds."""
    return re.search(rf'<g class="mark-\w+ role-mark {group}_marks"[^>]*>(.*?)</g>', svg)[1]


def node_names(edges: pd.DataFrame) -> set[str]:
    up = edges["upstream"] + " at " + edges["role"]
    return set(up) | set(edges["downstream"] + " at " + edges["dest_role"])


def places(table: pd.DataFrame, columns: list[str]) -> layout.Layout:
    return layout.place(graph._nodes(table), columns)


@pytest.mark.parametrize("version", ["5.8", "6.4"])
@pytest.mark.parametrize("n", [40, 600])
def test_every_node_is_drawn_and_labelled(n, version):
    edges = made_up.pooled_edges(n)
    svg = drawn(circuits.circuit_graph(edges), version, prune=0)
    names = node_names(edges)
    assert sorted(NODE.findall(svg)) == sorted(names)
    labels = re.findall(r"<text[^>]*>([^<]+)</text>", marks(svg, "labels"))
    assert len(labels) == len(names)
    assert len(re.findall(r'class="mark-line role-mark layer_0_marks"', svg)) == n


@pytest.mark.parametrize("size", [(40, 4, 6), (600, 4, 6), (600, 12, 12)])
def test_no_two_nodes_overlap_and_all_are_inside(size):
    table = circuits.drawn_edges(made_up.pooled_edges(*size))
    placed = places(table, made_up.ROLES)
    nodes = placed.nodes
    assert nodes["left"].min() >= 0 and nodes["right"].max() <= placed.width <= layout.PLOT
    assert nodes["y"].between(graph.HALF, placed.height - graph.HALF).all()
    for _, row in nodes.groupby("y"):
        row = row.sort_values("left")
        assert (row["left"].to_numpy()[1:] > row["right"].to_numpy()[:-1]).all()
    rows = sorted(nodes["y"].unique())
    assert min(b - a for a, b in pairwise(rows)) > 2 * graph.HALF


def test_a_higher_layer_is_drawn_higher_and_a_column_keeps_its_nodes():
    table = circuits.drawn_edges(made_up.pooled_edges(200))
    nodes = places(table, made_up.ROLES).nodes
    tops = nodes.groupby("layer")["y"].agg(["min", "max"])
    assert (tops["min"].to_numpy()[1:] > tops["max"].to_numpy()[:-1]).all()
    ends = nodes.groupby("column").agg(left=("left", "min"), right=("right", "max"))
    ends = ends.loc[made_up.ROLES]
    assert (ends["left"].to_numpy()[1:] > ends["right"].to_numpy()[:-1]).all()


def test_labels_are_words_where_they_fit():
    few = circuits.drawn_edges(made_up.pooled_edges(40))
    few = few[few["at"].isin(["S1", "end"]) & few["dest"].eq("end")]
    wide = places(few, ["S1", "end"])
    assert not wide.brief and {"pos", "MLP 0"} <= set(wide.nodes["label"])
    narrow = places(circuits.drawn_edges(made_up.pooled_edges(600)), made_up.ROLES)
    assert narrow.brief and {"E", "P", "B", "M0", "B0", "0.0"} <= set(narrow.nodes["label"])


def test_slider_opens_at_about_forty_edges():
    edges = made_up.pooled_edges(600)
    prune = graph.default_prune(100 * edges["prompts"] / edges["of"])
    svg = drawn(circuits.circuit_graph(edges))
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
    assert graph.default_prune(pd.Series(percents)) == least


def test_title_names_the_most_frequent_edge_and_the_description_says_all():
    edges = made_up.pooled_edges(60).assign(prompts=10)
    edges.loc[7, "prompts"] = 192
    chart = circuits.circuit_graph(edges)
    edge = edges.loc[7]
    names = [
        f"{edge['upstream']} at {edge['role']}",
        f"{edge['downstream']} at {edge['dest_role']}",
    ]
    assert f"most often, {' → '.join(names)} (75 %)" in text(chart)
    assert "Of 60 edges traced in 256 prompts, 1 is in at least half" in text(chart)
    assert "60 edges" in chart.to_dict()["description"]


def test_edges_between_the_same_nodes_are_drawn_apart():
    edges = made_up.pooled_edges(40).iloc[[0] * 3].assign(src_role=["IO", "S1", "end"], side="dest")
    edges = edges.assign(role=edges["dest_role"])
    paths = re.findall(r'<path aria-label[^>]*? d="([^"]+)"|<path [^>]*?d="(M[^"]+C[^"]+)"',
                       drawn(circuits.circuit_graph(edges), prune=0))  # fmt: skip
    curves = {b for _, b in paths if "C" in b and b.count("C") >= 3 and "Z" not in b}
    assert len(curves) == 3


@pytest.mark.parametrize("active", [{"chosen": "MLP 0 at end"}, {"pinned": "MLP 0 at end"}])
def test_an_active_node_lights_its_edges_and_neighbours(active):
    edges = made_up.pooled_edges(300)
    ((name, node),) = active.items()
    value = [{"node": node}] if name == "pinned" else node
    svg = drawn(circuits.circuit_graph(edges), prune=0, **{name: value})
    table = circuits.drawn_edges(edges)
    lit = table[(table["writer"] == node) | (table["reader"] == node)]
    assert len(lit) > 1
    assert svg.count(f'fill="{base.HIGHLIGHT}"') == 1
    boxes, labels = marks(svg, "nodes"), marks(svg, "labels")
    assert labels.count('fill="white"') == len(set(lit["writer"]) | set(lit["reader"]))
    assert boxes.count('fill-opacity="1"') == labels.count('fill="white"')


def test_spec_is_small_canonical_and_takes_categories():
    edges = made_up.pooled_edges(600)
    spec = base.canonical(circuits.circuit_graph(edges).to_dict())
    assert len(json.dumps(spec)) < 400_000
    names = ["upstream", "downstream", "side"]
    other = edges.astype(dict.fromkeys(names, "category"))
    assert base.canonical(circuits.circuit_graph(other).to_dict()) == spec


def test_graphs_can_be_used_by_keyboard():
    params = {
        p["name"]: p for p in circuits.circuit_graph(made_up.pooled_edges(60)).to_dict()["params"]
    }
    assert params["prune"]["bind"]["input"] == "range"
    assert params["chosen"]["bind"]["options"][0] is None
    assert set(params["chosen"]["bind"]["options"][1:]) == node_names(made_up.pooled_edges(60))


def test_columns_follow_the_order_and_unknown_roles_come_first():
    edges = made_up.pooled_edges(200)
    edges = edges.replace({"role": {"IO": "giver"}, "dest_role": {"IO": "giver"}})
    spec = circuits.circuit_graph(edges).to_dict()
    names = spec["layer"][0]["encoding"]["x"]["axis"]["labelExpr"]
    order = json.loads(names[1 : names.index(")[")]).values()
    assert set(list(order)[:2]) == {"giver", "other"}
    assert list(order)[2:] == ["IO+1", "S1-1", "S1", "S1+1", "S2", "S2+1", "end"]


@pytest.mark.parametrize("version", ["5.8", "6.4"])
def test_prompt_graph_has_a_column_for_every_token(version):
    edges = made_up.prompt_edges(60)
    svg = drawn(circuits.prompt_graph(edges, made_up.TOKENS), version, prune=0)
    assert "0 &lt;|endoftext|&gt;" in svg and "13 to" in svg
    label = {pos: f"{pos} {token.strip()}" for pos, token in enumerate(made_up.TOKENS)}
    nodes = set(edges["upstream"] + " at " + edges["token"].map(label))
    nodes |= set(edges["downstream"] + " at " + edges["dest"].map(label))
    assert set(NODE.findall(svg)) == nodes


def test_prompt_graph_names_the_largest_share():
    edges = made_up.prompt_edges(60).assign(share=0.1)
    edges.loc[3, "share"] = 0.9
    row, chart = edges.loc[3], circuits.prompt_graph(edges, made_up.TOKENS)
    assert f"{row['upstream']} at {row['token']} " in text(chart) and "(90 %)" in text(chart)
    assert chart.to_dict()["description"]


@pytest.mark.parametrize("edges", [made_up.pooled_edges(1), made_up.prompt_edges(1)])
def test_no_edges_is_an_error_that_says_so(edges):
    draw = circuits.circuit_graph if "of" in edges else lambda e: circuits.prompt_graph(e, ["a"])
    with pytest.raises(ValueError, match="no edges"):
        draw(edges.iloc[:0])
