"""Sweeps over all edges, their controls, what survives an interruption, and what is pooled."""

import numpy as np
import pandas as pd
import pytest
import torch

from sparse_signals.core.model import BIAS_ROW
from sparse_signals.core.prompts import roles_of
from sparse_signals.interventions import intervene as module
from sparse_signals.interventions.changes import clean_run
from sparse_signals.interventions.edge_signals import read_signals
from sparse_signals.interventions.intervene import Plan, intervene, intervene_on, summary
from sparse_signals.tracing.circuit import KEY
from traced import ioi_case, random_batch

PLAN = Plan(randoms=2, others=True, seed=3)


@pytest.fixture(scope="module")
def case():
    return ioi_case()


@pytest.fixture(scope="module")
def table(case):
    return run(case)


def some_edges(case, n=8):
    return case.traced.edges.groupby("prompt").head(n)


def run(case, edges=None, plan=PLAN, **options):
    edges = some_edges(case) if edges is None else edges
    return intervene(case.traced, edges, plan, **options)


def test_every_edge_scope_mode_and_control(case, table):
    edges = some_edges(case)
    counts = table.groupby(["control", "repeat", "scope", "mode"]).size().unstack(level=[2, 3])
    assert (counts.loc[("signal", 0), "local"] == len(edges)).all()
    assert (counts.loc[("signal", 0), "global"] == (edges["upstream"] != BIAS_ROW).sum()).all()
    assert {("random", 0), ("random", 1), ("other prompt", 0)} < set(counts.index)
    assert (counts.loc["random", "local"] > 0.9 * len(edges)).all(axis=None)


def test_signals_have_the_effects_of_intervene_on(case, table):
    alone = intervene_on(case.clean, read_signals(case.traced, some_edges(case)))
    ours = table[table["control"] == "signal"].reset_index(drop=True)
    order = ["scope", "mode", "edge"]
    ours, alone = (x.sort_values(order).reset_index(drop=True) for x in (ours, alone))
    pd.testing.assert_frame_equal(ours.drop(columns="row"), alone.drop(columns="row"), atol=1e-9)


def test_chunks_do_not_matter(case, table, monkeypatch):
    monkeypatch.setattr("sparse_signals.core.run.CHUNK_BYTES", 2**22)  # of three prompts each
    order = ["control", "repeat", "scope", "mode", "edge"]
    chunked = run(case).sort_values(order).reset_index(drop=True)
    whole = table.sort_values(order).reset_index(drop=True)
    columns = [name for name in whole if name != "row"]
    pd.testing.assert_frame_equal(chunked[columns], whole[columns], atol=1e-8)


def test_an_interrupted_sweep_goes_on(case, monkeypatch, tmp_path):
    monkeypatch.setattr("sparse_signals.core.run.CHUNK_BYTES", 2**21)
    edges, done, real = some_edges(case, 2), [], clean_run

    def stop_after_two(model, batch, rows):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(rows)
        return real(model, batch, rows)

    monkeypatch.setattr(module, "clean_run", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run(case, edges, Plan(), folder=tmp_path)
    again = []
    monkeypatch.setattr(module, "clean_run", lambda *args: again.append(args[2]) or real(*args))
    resumed = run(case, edges, Plan(), folder=tmp_path)
    assert len(done) == 2 and again and not set(map(str, done)) & set(map(str, again))
    monkeypatch.setattr(module, "clean_run", None)
    pd.testing.assert_frame_equal(run(case, edges, Plan(), folder=tmp_path), resumed)
    with pytest.raises(TypeError):  # other edges are another sweep
        run(case, case.traced.edges.head(5), Plan(), folder=tmp_path)


def test_chunks_of_another_size_are_another_sweep(case, monkeypatch, tmp_path):
    edges = some_edges(case, 2)
    monkeypatch.setattr("sparse_signals.core.run.CHUNK_BYTES", 2**21)
    small = run(case, edges, Plan(), folder=tmp_path)
    monkeypatch.setattr("sparse_signals.core.run.CHUNK_BYTES", 2**22)
    assert len(run(case, edges, Plan(), folder=tmp_path)) == len(small)


def test_no_edges_give_an_empty_table(case, table):
    nothing = run(case, case.traced.edges.head(0))
    assert len(nothing) == 0 and list(nothing.columns) == list(table.columns)
    assert len(summary(nothing, case.traced.batch)) == 0


# --- pooled --------------------------------------------------------------------------------------


def test_summary_is_a_mean_over_prompts(case, table):
    pooled = summary(table, case.traced.batch)
    row = pooled[(pooled["control"] == "random") & (pooled["prompts"] > 2)].iloc[0]
    mine = table[table["control"] == "random"]
    for name in ("scope", "mode", "upstream", "downstream", "side"):
        mine = mine[mine[name] == row[name]]
    roles = roles_of(case.traced.batch)
    for end in ("dest", "src"):
        wanted = roles[roles["role"] == row[f"{end}_role"]]
        places = pd.MultiIndex.from_frame(wanted[["prompt", "pos"]])
        mine = mine[pd.MultiIndex.from_frame(mine[["prompt", end]]).isin(places)]
    each = mine.groupby("prompt")["F_change"].mean()
    assert row["measure"] == "F_change" and row["prompts"] == len(each)
    assert row["value"] == pytest.approx(each.mean())
    assert row["low"] <= row["value"] <= row["high"]


def test_summary_names_edges(case, table):
    named = summary(table, case.traced.batch).drop_duplicates([*KEY, "edge"])
    assert len(named) == len(named[KEY].drop_duplicates()) == named["edge"].nunique()
    row = named[named["side"] == "src"].iloc[0]
    words = f"{row['upstream']} → {row['downstream']} k ({row['dest_role']}→{row['src_role']})"
    assert row["edge"] == words


def test_summary_has_paired_differences(case, table):
    pooled = summary(table, case.traced.batch)
    pooled = pooled.set_index([*KEY, "scope", "mode", "measure", "control"])
    kinds = pooled["value"].unstack("control")
    prompts = pooled["prompts"].unstack("control")
    paired = prompts["signal − random"] == prompts["signal"]
    gap = kinds["signal"] - kinds["random"] - kinds["signal − random"]
    assert paired.sum() > 10 and gap[paired].abs().max() < 1e-9
    assert (prompts["signal − other prompt"].dropna() <= prompts["other prompt"].dropna()).all()


def test_intervals_of_a_known_spread(case):
    """Of n prompts with values 0 and 1, half each: mean 0.5, standard error 0.5 / √n."""
    of = 400
    prompts = np.arange(of)
    table = pd.DataFrame({"prompt": prompts, "F_change": prompts % 2 - 0.0})
    table = table.assign(upstream="0.0", downstream="1.0", side="dest", dest=1, src=0)
    table = table.assign(scope="local", mode="ablate", control="signal")
    tokens = torch.zeros(of, 2, dtype=torch.long)
    batch = random_batch(tokens, torch.ones_like(tokens, dtype=torch.bool))
    row = summary(table, batch, ["F_change"]).iloc[0]
    assert row["value"] == 0.5
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * 0.5 / of**0.5, rel=0.15)
