"""Charts of the appendix: they draw from small frames, and their titles follow the data."""

from copy import deepcopy
from functools import cache

import pandas as pd
import pytest
import vl_convert

from drawing import drawn, spec, title
from sparse_signals.attribution.tables import CHANNELS
from sparse_signals.charts import planted as charts
from sparse_signals.planted.answers import PLANTED_ANSWERS, planted_answer
from sparse_signals.planted.circuits import planted
from sparse_signals.planted.scoring import (
    FATES,
    drawn_attention,
    drawn_decoys,
    drawn_edges,
    drawn_links,
    run_case,
)

METHODS = ("exact", "whole score", "loudest")


def with_value(chart, name, value):
    """The chart as it is after a menu was used."""
    changed = deepcopy(spec(chart))
    next(p for p in changed["params"] if p["name"] == name)["value"] = value
    return vl_convert.vegalite_to_svg(changed, vl_version="6.4")


@cache
def case(name):
    return run_case(planted(name, prompts=2))


@pytest.fixture(scope="module")
def circuits():
    cases = [case(name) for name in ("inhibition", "redundant", "decoys")]
    edges = pd.concat(drawn_edges(one.planted) for one in cases)
    return edges, pd.concat(drawn_decoys(one) for one in cases)


def test_picture_counts_edges_and_draws_one_circuit_at_a_time(circuits):
    chart = charts.planted_circuits(*circuits)
    assert "6 edges (inhibition), 12 edges (redundant)" in title(chart)
    assert ">3.0<" not in drawn(chart) and ">3.0<" in with_value(chart, "circuit", "redundant")


def test_decoys_are_boxes_without_lines(circuits):
    edges, decoys = circuits
    assert set(decoys["reader"]) == {"0.1", "0.2", "1.1", "1.2"}
    mine = edges[edges["circuit"] == "decoys"]
    assert not set(decoys["reader"]) & (set(mine["upstream"]) | set(mine["reader"]))
    svg = with_value(charts.planted_circuits(*circuits), "circuit", "decoys")
    assert ">1.2<" in svg and ">0.2<" in svg


def test_no_two_boxes_of_a_circuit_overlap(circuits):
    names = circuits[0]["circuit"].unique()
    columns = {(name, role): n for name in names for n, role in enumerate(charts.PLANTED_ROLES)}
    nodes = charts._planted_nodes(*circuits, columns)
    for _, row in nodes.groupby(["circuit", "y"]):
        assert (row["x"].sort_values().diff().dropna() > 2 * charts.HALF_X).all()


@pytest.fixture(scope="module")
def answers():
    cases = [planted_answer(name, prompts=2) for name in PLANTED_ANSWERS]
    links = pd.concat(drawn_links(one, one.truth.assign(share=0.5)) for one in cases)
    rows = [(one.name, *decoy) for one in cases for decoy in one.decoys.items()]
    return links, pd.DataFrame(rows, columns=["circuit", "reader", "at"])


def test_title_counts_what_a_score_trace_misses(answers):
    chart = charts.answer_circuits(*answers)
    assert "Of 26 planted edges a score trace finds 12" in title(chart)
    assert "10 into values, 3 into MLPs, 1 into the answer" in title(chart)


def test_answers_stand_above_all_and_one_circuit_is_drawn_at_a_time(answers):
    chart = charts.answer_circuits(*answers)
    svg = drawn(chart)
    assert ">answer<" in svg and ">stop<" in svg and ">MLP 0<" not in svg
    svg = with_value(chart, "circuit", "sum")
    assert ">MLP 0<" in svg and ">MLP 1<" in svg and ">left<" in svg and ">stop<" not in svg
    assert "share: 50" in drawn(chart)


def test_roles_of_planted_answers_are_all_in_the_picture(answers):
    roles = set(answers[0]["role"]) | set(answers[0]["dest_role"]) | set(answers[1]["at"])
    assert roles == set(charts.ANSWER_ROLES)
    assert list(charts.CHANNELS_READ) == list(CHANNELS)


def test_attention_title_never_promises_more_than_there_is():
    looks = drawn_attention(case("inhibition"))
    assert looks.groupby("head")["planted"].sum().eq(1).all()
    chart = charts.attention_squares(looks)
    assert "at least 99.9" in title(chart) and "0 &lt;start&gt;" in drawn(chart)
    looks.loc[looks["planted"], "attention"] = 0.5129
    assert "at least 51.2" in title(charts.attention_squares(looks))


def scores(exact=1.0, **columns):
    rows = [
        (method, kind, circuit, exact if method == "exact" else 0.5)
        for method in METHODS
        for kind in ("head edges", "all edges")
        for circuit in ("all four", "induction")
        if (method, kind) != ("loudest", "all edges")
    ]
    table = pd.DataFrame(rows, columns=["method", "edges", "circuit", "precision"])
    for name in ("recall", "precision_low", "precision_high", "recall_low", "recall_high"):
        table[name] = table["precision"]
    return table.assign(**columns)


@pytest.mark.parametrize(("exact", "found"), [(1.0, "exact"), (0.9, "none")])
def test_scoreboard_names_who_is_perfect(exact, found):
    chart = charts.scoreboard(scores(exact))
    assert title(chart).endswith(f"(head edges): {found}")
    assert f">{exact:.2f}<" in drawn(chart)


def fates(share):
    shares = dict(zip(FATES, (share, 0.0, 0.0, 1 - share), strict=True))
    rows = [
        (circuit, noise, fate, 1.0 * (fate == "found") if noise == 0 else value, 1 - 10 * noise)
        for circuit in ("all four", "induction")
        for noise in (0.0, 0.05)
        for fate, value in shares.items()
    ]
    return pd.DataFrame(rows, columns=["circuit", "noise", "fate", "share", "accuracy"])


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_noise_title_speaks_of_the_noise_that_loses_half(share):
    table = pd.concat([scores(noise=0.0), scores(0.8, noise=0.05)])
    chart = charts.noise_curves(table, fates(share))
    assert "at noise 0.05 the model answers 50" in title(chart) and "80" in title(chart)
    assert spec(chart)["params"]
    assert "reader silent" in drawn(chart)


def test_fates_have_the_names_of_the_module():
    assert tuple(charts.FATE_COLOURS) == FATES


def test_noise_methods_can_be_chosen_without_a_mouse():
    chart = charts.noise_curves(pd.concat([scores(noise=0.0), scores(noise=0.05)]), fates(0.2))
    menus = [p["bind"] for p in spec(chart)["params"] if "bind" in p]
    assert [None, *METHODS] in [m.get("method", {}).get("options") for m in menus]


def test_cut_title_quotes_both_ends_and_the_usual_cut():
    rows = [
        ("all four", method, share, 1 - share / 2, share)
        for method in ("exact", "whole score")
        for share in (0.5, 0.7, 0.99)
    ]
    table = pd.DataFrame(rows, columns=["circuit", "method", "share", "precision", "recall"])
    chart = charts.cut_curves(table, noise=0.03)
    assert "at noise 0.03" in title(chart) and "0.65 and 0.70 at 0.7" in title(chart)
    assert drawn(chart).count("method: whole score; ") == 3 + 1  # points and a line
