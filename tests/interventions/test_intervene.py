"""Signals of edges and interventions on them, against their definitions and full passes."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from full_pass import full_pass
from sparse_signals.core.model import BIAS_ROW, load_model, logits, qk_weights
from sparse_signals.core.rotary import rotate, rotation
from sparse_signals.core.run import run
from sparse_signals.heads.svd import head_svd
from sparse_signals.interventions.case import Case
from sparse_signals.interventions.changes import MID, PRE, K, Q, V, clean_run
from sparse_signals.interventions.edge_signals import (
    other_signals,
    random_signals,
    read_signals,
    solve,
)
from sparse_signals.interventions.intervene import intervene_on
from traced import ioi_case, random_case

KINDS = ("gpt2", "llama", "qwen2", "qwen3", "gpt_neox", "ioi")
TOLERANCE = 1e-9
SIGN = {"ablate": -1, "boost": 1}


@pytest.fixture(scope="module")
def cases(request, tokens, mask):
    tiny = {name: request.getfixturevalue(f"tiny_{name}") for name in KINDS[:-1]}
    return {name: random_case(model, tokens, mask) for name, model in tiny.items()} | {
        "ioi": ioi_case()
    }


@pytest.fixture(params=KINDS)
def case(request, cases):
    return cases[request.param]


def signals_of(case, edges=None):
    return read_signals(case.traced, edges)


def results(case, signals, rows=None, **options):
    return intervene_on(case.clean, signals, rows, **options)


def sample(case, n, seed=0):
    """Some edges, every kind of upstream component among them."""
    edges = case.traced.edges.sample(frac=1, random_state=seed)
    kinds = edges["kind"].mask(edges["kind"] == "head", edges["up_layer"].astype(str))
    first = edges.groupby([kinds, "side"]).head(1)
    return pd.concat([first, edges.drop(first.index)]).head(n)


# --- signals -------------------------------------------------------------------------------------


def image(case, edge, x):
    """The query or key part that the head of an edge reads from x (centred, through the gain)."""
    w = qk_weights(case.traced.model)
    x = x.double() - (x.double().mean() if w.centred else 0)
    W = (w.W_Q if edge.side == "dest" else w.W_K)[edge.layer, edge.head]
    y = (x * w.gain[edge.layer]) @ W
    if gains := case.traced.model.head_gains:
        name, scales = {"dest": ("q", case.clean.q_scale), "src": ("k", case.clean.k_scale)}[
            edge.side
        ]
        y = y * gains[name][edge.layer] / scales[edge.layer, edge.prompt, edge.head, edge.token]
    if case.traced.model.rotary:
        cos, sin = rotation(case.traced.model, torch.tensor([edge.token]))
        y = rotate(y[None], cos, sin)[0]
    return y


def test_signals_have_the_coordinates_of_the_support_alone(case):
    signals = signals_of(case, sample(case, 60))
    svd = head_svd(case.traced.model)
    maps = {"dest": svd.dest_map, "src": svd.src_map}
    for n, edge in enumerate(signals.edges.itertuples()):
        if edge.upstream == BIAS_ROW:
            continue
        basis = maps[edge.side][edge.layer, edge.head]
        found = image(case, edge, signals.delta[n]) @ basis
        wanted = image(case, edge, signals.written[n]) @ basis * signals.chosen[n]
        assert (found - wanted).abs().max() < 1e-8 * wanted.abs().max()


def test_signals_are_the_smallest_such_changes(case):
    """Adding what the head does not hear can only make them longer: they are orthogonal to it."""
    signals = signals_of(case, sample(case, 20))
    w = qk_weights(case.traced.model)
    for n, edge in enumerate(signals.edges.itertuples()):
        W = (w.W_Q if edge.side == "dest" else w.W_K)[edge.layer, edge.head]
        W = w.gain[edge.layer][:, None] * W
        W = W - W.mean(0) if w.centred else W
        inside = W @ torch.linalg.lstsq(W, signals.delta[n][:, None]).solution
        assert (inside[:, 0] - signals.delta[n]).norm() < 1e-8 * signals.delta[n].norm()


def test_without_biases_signals_are_projections(tiny_directories, tmp_path, tokens, mask):
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(tiny_directories["gpt2"])
    for block in model.transformer.h:
        block.attn.c_attn.bias.data[:64] = 0
        block.ln_1.bias.data[:] = 0
    model.save_pretrained(tmp_path)
    case = random_case(load_model(tmp_path, device="cpu", dtype=torch.float64), tokens, mask)
    signals = signals_of(case, case.traced.edges.head(60))
    svd = head_svd(case.traced.model)
    for n, edge in enumerate(signals.edges.itertuples()):
        basis = (svd.U if edge.side == "dest" else svd.V)[edge.layer, edge.head, :-1]
        P = basis[:, signals.chosen[n]]
        projected = P @ (P.T @ signals.written[n])
        assert (signals.delta[n] - projected).norm() < 1e-9 * projected.norm()


# --- interventions -------------------------------------------------------------------------------


def site_of(model, upstream):
    """Layer and site at which a component of the residual stream is changed."""
    row = model.components.set_index("component").loc[upstream]
    if row["kind"] in ("head", "bias"):
        return int(row["layer"]), MID
    return (int(row["layer"]) + 1 if row["kind"] == "MLP" else 0), PRE


def changes(case, signals, n, scope, sign, quirk=False):
    """The changes of an edge as a full pass takes them, from the model's own weights."""
    edge, delta = next(signals.edges.iloc[[n]].itertuples()), sign * signals.delta[n].double()
    if scope == "global":
        return [(*site_of(case.traced.model, edge.upstream), 0, edge.token, delta)]
    delta = delta / signals.scale[n]
    sites = {Q: replace_side(edge, "dest"), K: replace_side(edge, "src")}
    own = Q if edge.side == "dest" else K
    found = [
        (edge.layer, site, edge.head, edge.token, image(case, like, delta))
        for site, like in sites.items()
        if quirk or site == own
    ]
    if quirk:
        model, w = case.traced.model, qk_weights(case.traced.model)
        groups = model.n_heads // model.n_kv_heads
        W_V = model.bridge.blocks[edge.layer].attn.W_V[edge.head // groups]
        x = delta - (delta.mean() if w.centred else 0)
        vector = (x * w.gain[edge.layer]) @ W_V.double()
        found.append((edge.layer, V, edge.head, edge.token, vector))
    return found


def replace_side(edge, side):
    return edge._replace(side=side)


def expected(case, edge, changes):
    """Logit difference, score and attention of a full pass."""
    tokens = case.traced.batch.tokens[edge.prompt][case.traced.batch.mask[edge.prompt]]
    probe = edge.layer, edge.head, edge.dest, edge.src
    every, score, weight = full_pass(case.traced.model, tokens, changes, probe)
    io, s = case.traced.batch.io[edge.prompt], case.traced.batch.s[edge.prompt]
    return np.array([float(every[-1, io] - every[-1, s]), score, weight])


def gap(case, table, signals, quirk=False):
    """Largest difference of a table's results and changes from full passes."""
    worst, clean = 0.0, {}
    for row in table.itertuples():
        n = int(np.flatnonzero(signals.edges["edge"] == row.edge)[0])
        change = changes(case, signals, n, row.scope, SIGN[row.mode], quirk)
        if n not in clean:
            clean[n] = expected(case, row, [])
        after, before = expected(case, row, change), clean[n]
        found = np.array([row.F, row.score, row.attention])
        moved = np.array([row.F_change, row.score_change, row.attention_change])
        worst = max(worst, abs(found - after).max(), abs(moved - (after - before)).max())
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_full_passes(cases, kind):
    signals = signals_of(cases[kind], sample(cases[kind], 12))
    table = results(cases[kind], signals)
    assert set(table["scope"]) == {"global", "local"} and set(table["mode"]) == set(SIGN)
    assert gap(cases[kind], table, signals) < TOLERANCE


def test_equal_to_full_passes_in_float32(tokens, mask, tiny_directories):
    for kind in ("gpt2", "llama"):
        model = load_model(tiny_directories[kind], device="cpu")
        case = random_case(model, tokens, mask)
        signals = signals_of(case, sample(case, 8))
        assert gap(case, results(case, signals), signals) < 1e-5


def test_the_shipped_model_in_float32():
    exact = ioi_case()
    model = load_model("gpt2-ioi", device="cpu")
    traced = replace(exact.traced, model=model)
    case = Case(traced, clean_run(model, traced.batch))
    signals = signals_of(case, sample(case, 12))
    size = logits(model, case.traced.batch.tokens).abs().max()
    assert gap(case, results(case, signals), signals) < 1e-5 * size


@pytest.mark.parametrize("kind", KINDS)
def test_patching_all_inputs(cases, kind):
    signals = signals_of(cases[kind], sample(cases[kind], 8))
    table = results(cases[kind], signals, patch_qkv=True, scopes=["local"])
    assert gap(cases[kind], table, signals, quirk=True) < TOLERANCE


def test_local_ablation_takes_the_traced_weight_from_the_score(case):
    table = results(case, signals_of(case), scopes=["local"])
    assert BIAS_ROW in set(table["upstream"]) or case.traced.model.name != "tiny-qwen2"
    expected = table["weight"] * table["mode"].map(SIGN)
    assert (table["score_change"] - expected).abs().max() < 1e-9


def test_full_support_removes_the_component_from_query_or_key(case):
    edges = sample(case, 10)
    edges = edges[edges["upstream"] != BIAS_ROW]
    signals = signals_of(case, edges)
    everything = torch.ones_like(signals.chosen)
    whole = replace(signals, delta=solve(signals, everything))
    table = results(case, whole, scopes=["local"], modes=["ablate"])
    clean, divisor = case.clean, case.traced.model.divisor
    for n, row in enumerate(table.itertuples()):
        q = clean.q[row.layer, row.prompt, row.head, row.dest].double()
        k = clean.k[row.layer, row.prompt, row.head, row.src].double()
        removed = image(case, row, signals.written[n] / signals.scale[n])
        score = (q - removed) @ k if row.side == "dest" else q @ (k - removed)
        assert abs(row.score - score / divisor[row.layer]) < 1e-12


def test_ablating_and_boosting_are_opposite(case):
    signals = signals_of(case, sample(case, 60))
    table = results(case, signals).set_index(["scope", "edge", "mode"]).sort_index()
    ablated, boosted = (table.xs(mode, level="mode") for mode in ("ablate", "boost"))
    local = ablated.loc["local", "score_change"] + boosted.loc["local", "score_change"]
    assert local.abs().max() < 1e-9
    written = signals.written.double()
    if not case.traced.model.rms:
        written = written - written.mean(-1, keepdim=True)
    size = pd.Series(written.norm(dim=-1).numpy())[ablated.loc["global"].index]
    squares = ablated.loc["global", "norm_ratio"] ** 2 + boosted.loc["global", "norm_ratio"] ** 2
    parallelogram = 2 + 2 * (ablated.loc["global", "norm"] / size) ** 2
    assert (squares / parallelogram - 1).abs().max() < 1e-9


def test_cosine_and_ratio_of_a_component_that_is_all_signal(cases):
    """Half of what was written is taken: same direction, half the length."""
    case = cases["ioi"]
    edges = case.traced.edges[case.traced.edges["upstream"] == "embedding"].head(3)
    signals = signals_of(case, edges)
    centred = signals.written - signals.written.mean(-1, keepdim=True)
    table = results(case, replace(signals, delta=centred / 2), scopes=["global"], modes=["ablate"])
    assert np.allclose(table["cosine"], 1) and np.allclose(table["norm_ratio"], 0.5)


def test_the_bias_row_is_changed_locally_alone(cases):
    case = cases["qwen2"]
    edges = case.traced.edges
    signals = signals_of(case, edges[edges["upstream"] == BIAS_ROW].head(4))
    table = results(case, signals)
    assert set(table["scope"]) == {"local"} and len(table) == 8


# --- joint interventions -------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("kind", KINDS)
def test_joint_is_the_sum_of_the_changes(cases, kind, scope):
    case = cases[kind]
    edges = case.traced.edges[case.traced.edges["upstream"] != BIAS_ROW]
    edges = edges.sample(frac=1, random_state=2).groupby("prompt").head(4).sort_values("prompt")
    edges = edges[edges["prompt"] < 4]
    signals = signals_of(case, edges)
    rows = torch.tensor(signals.edges["prompt"].to_numpy())
    table = results(case, signals, rows, scopes=[scope], modes=["ablate"])
    assert table["row"].tolist() == rows.tolist()
    for row in table.itertuples():
        members = np.flatnonzero(table["row"] == row.row)
        change = [x for n in members for x in changes(case, signals, n, scope, -1)]
        found = np.array([row.F, row.score, row.attention])
        assert abs(found - expected(case, row, change)).max() < 2 * TOLERANCE


def test_joint_of_one_edge_is_single(cases):
    signals = signals_of(cases["ioi"], sample(cases["ioi"], 10))
    rows = torch.randperm(10, generator=torch.Generator().manual_seed(0)) + 5
    joint, single = results(cases["ioi"], signals, rows), results(cases["ioi"], signals)
    pd.testing.assert_frame_equal(joint.drop(columns="row"), single.drop(columns="row"), atol=1e-12)


def test_the_order_of_edges_does_not_matter(cases):
    edges = sample(cases["ioi"], 30)
    there = results(cases["ioi"], signals_of(cases["ioi"], edges))
    back = results(cases["ioi"], signals_of(cases["ioi"], edges.iloc[::-1]))
    order = ["scope", "mode", "firing", "side", "upstream"]
    there, back = (x.sort_values(order).drop(columns=["edge", "row"]) for x in (there, back))
    pd.testing.assert_frame_equal(
        there.reset_index(drop=True), back.reset_index(drop=True), atol=1e-10, rtol=1e-9
    )


def test_refusals(cases):
    case = cases["ioi"]
    signals = signals_of(case, case.traced.edges.groupby("prompt").head(1))
    with pytest.raises(ValueError, match="different prompts in one row"):
        results(case, signals, torch.zeros(len(signals), dtype=torch.long))
    late = replace(case.clean, first_prompt=3)
    with pytest.raises(ValueError, match="not in the clean run"):
        intervene_on(late, signals)


def test_no_edges_no_rows(cases):
    case = cases["ioi"]
    table = results(case, signals_of(case, case.traced.edges.head(0)))
    full = results(case, signals_of(case, case.traced.edges.head(1)))
    assert len(table) == 0 and list(table.columns) == list(full.columns)


# --- controls ------------------------------------------------------------------------------------


def test_random_controls(case):
    signals = signals_of(case)
    control = random_signals(signals, repeat=3, seed=5)
    edge = torch.tensor(control.edges["edge"].to_numpy())
    left = (~signals.chosen).sum(1)
    assert set(edge.tolist()) == set((left > 0).nonzero().flatten().tolist())
    size = signals.chosen.sum(1).minimum(left)[edge]
    assert (control.chosen.sum(1) == size).all()
    assert not (control.chosen & signals.chosen[edge]).any()
    norm = control.delta.norm(dim=-1) / signals.delta[edge].norm(dim=-1)
    assert (norm - 1).abs().max() < 1e-9
    assert set(control.edges["control"]) == {"random"} and set(control.edges["repeat"]) == {3}


def test_random_controls_depend_on_the_edge_alone(cases):
    signals = signals_of(cases["ioi"])
    few = torch.tensor([7, 3, 40])
    whole, part = (random_signals(x, 1, seed=2) for x in (signals, signals[few]))
    assert (whole.delta[few] - part.delta).abs().max() < 1e-12
    assert (random_signals(signals, 2, seed=2).chosen != whole.chosen).any()
    assert (random_signals(signals, 1, seed=3).chosen != whole.chosen).any()


def test_random_controls_are_uniform(cases):
    """Every vector outside the support is drawn equally often."""
    case = cases["ioi"]
    signals = signals_of(case)
    signals = signals[signals.chosen.sum(1).argsort(stable=True)[:1]]  # few of many vectors
    edges = signals.edges.iloc[[0] * 20].assign(prompt=range(20))  # each draws for itself
    copies = replace(signals[torch.zeros(20, dtype=torch.long)], edges=edges)
    draws = torch.cat([random_signals(copies, n).chosen for n in range(20)])
    left = ~signals.chosen[0]
    share = draws[:, left].double().mean(0)
    chance = float(signals.chosen.sum() / left.sum())
    assert (share - chance).abs().max() < 5 * (chance * (1 - chance) / 400) ** 0.5


def test_controls_from_other_prompts(cases):
    case = cases["ioi"]
    signals = signals_of(case)
    control = other_signals(signals, case.traced.batch, seed=1)
    assert 0 < len(control) < len(signals)
    norm = signals.delta[torch.tensor(control.edges["edge"].to_numpy())].norm(dim=-1)
    assert (control.delta.norm(dim=-1) / norm - 1).abs().max() < 1e-9
    unit = torch.nn.functional.normalize(signals.delta, dim=-1)
    for n, edge in enumerate(control.edges.itertuples()):
        same = unit @ torch.nn.functional.normalize(control.delta[n], dim=-1)
        donor = signals.edges.iloc[(same > 1 - 1e-9).nonzero().flatten().numpy()]
        donor = donor[donor["prompt"] != edge.prompt]
        key = ["upstream", "downstream", "side"]
        assert (donor[key] == [getattr(edge, name) for name in key]).all(axis=1).any()


def test_what_components_wrote(case):
    """As in the run that the trace is made from, where everything is computed at once."""
    signals = signals_of(case)
    whole = run(case.traced.model, case.traced.batch)
    stream = signals.edges["upstream"] != BIAS_ROW
    names = pd.Index(case.traced.model.components["component"])
    place = names.get_indexer(signals.edges.loc[stream, "upstream"])
    prompt, token = (signals.edges.loc[stream, x].to_numpy(copy=True) for x in ("prompt", "token"))
    gap = signals.written[np.flatnonzero(stream)] - whole.outputs[prompt, token, place]
    assert gap.abs().max() < 1e-12
    assert (read_signals(case.traced, run=whole).delta - signals.delta).abs().max() < 1e-12


def test_what_components_wrote_in_another_run(cases):
    """Prompts are those of the run: where MLPs wrote twice as much, so do the signals say."""
    case = cases["ioi"]
    whole = run(case.traced.model, case.traced.batch)
    edges = case.traced.edges
    edges = edges[edges["kind"].isin(["MLP", "head"])]
    other = replace(whole, mlp=2 * whole.mlp, scale=2 * whole.scale)
    before, after = (read_signals(case.traced, edges, run=x) for x in (whole, other))
    times = torch.tensor(np.where(edges["kind"] == "MLP", 2.0, 1.0))[:, None]
    assert (after.delta - times * before.delta).abs().max() < 1e-12
    assert torch.equal(after.scale, 2 * before.scale)


def test_read_signals_in_chunks(cases, monkeypatch):
    case = cases["ioi"]
    whole = signals_of(case)
    monkeypatch.setattr("sparse_signals.core.run.CHUNK_BYTES", 1)
    assert (signals_of(case).delta - whole.delta).abs().max() < 1e-12
