"""Planted circuits: their heads, their task, and their edges, by a slow and obvious tracer."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

from sparse_signals.core.model import logits
from sparse_signals.core.run import run
from sparse_signals.planted.answers import PLANTED_ANSWERS, planted_answer
from sparse_signals.planted.circuits import (
    EDGE,
    LOUD,
    LOUDNESS,
    MUTE,
    PLANTED,
    planted,
    recovery,
    same_value,
)
from sparse_signals.planted.weights import ANSWER_LOGIT, D_MODEL, MESSAGE, Head, handwritten_model
from sparse_signals.signals.firings import find_firings

FIRING = ["prompt", "layer", "head", "dest", "src"]
EPS = 1e-5


@cache
def circuit(name, noise=0.0, seed=0):
    return planted(name, noise, seed)


# --- a second opinion: the model and the tracer, in numpy, one prompt and one firing at a time ----


@cache
def arrays(model):
    """Weights by name; those of blocks are lists over layers."""
    bridge = model.bridge
    found = {"W_E": bridge.embed.W_E, "W_pos": bridge.pos_embed.W_pos, "W_U": bridge.unembed.W_U}
    found = {name: value.detach().numpy() for name, value in found.items()}
    for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q"):
        found[name] = [getattr(block.attn, name).detach().numpy() for block in bridge.blocks]
    for name, part in (("W_in", "in"), ("W_out", "out")):
        found[name] = [getattr(block.mlp, part).weight.detach().numpy() for block in bridge.blocks]
    return found


def centred(x):
    return x - x.mean(-1, keepdims=True)


def normalised(x):
    scale = np.sqrt((centred(x) ** 2).mean(-1, keepdims=True) + EPS)
    return centred(x) / scale, scale


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def forward(model, tokens, without=()):
    """What every component wrote, what each layer's heads did, and the logits at the last token."""
    w = arrays(model)
    written = {"embedding": w["W_E"][tokens], "position": w["W_pos"][: len(tokens)]}
    layers = []
    for layer in range(model.n_layers):
        upstream = dict(written)
        x, scale = normalised(sum(written.values()))
        states = []
        for head in range(model.n_heads):
            q = x @ w["W_Q"][layer][head] + w["b_Q"][layer][head]
            score = q @ (x @ w["W_K"][layer][head]).T / np.sqrt(model.d_head)
            weight = np.exp(np.where(np.tri(len(tokens)) > 0, score, -np.inf))
            weight /= weight.sum(-1, keepdims=True)
            out = weight @ (x @ w["W_V"][layer][head]) @ w["W_O"][layer][head]
            written[f"{layer}.{head}"] = out * (f"{layer}.{head}" not in without)
            states.append((score, weight))
        layers.append({"upstream": upstream, "x": x, "scale": scale, "heads": states})
        hidden = gelu(normalised(sum(written.values()))[0] @ w["W_in"][layer])
        written[f"MLP {layer}"] = hidden @ w["W_out"][layer]
    return written, layers, normalised(sum(written.values()))[0][-1] @ w["W_U"]


def smallest_prefix(values, fraction):
    """Keys of the largest values, until their sum exceeds a fraction of the whole sum."""
    chosen, total, whole = [], 0.0, sum(values.values())
    for key in sorted(values, key=values.get, reverse=True):
        if total > fraction * whole * (1 + 1e-12) or values[key] <= 0:
            break
        chosen.append(key)
        total += values[key]
    return chosen


@cache
def dense_svd(model, layer, head):
    w = arrays(model)
    A = np.vstack([centred(w["W_Q"][layer][head].T).T, w["b_Q"][layer][head]])
    B = np.vstack([centred(w["W_K"][layer][head].T).T, np.zeros(model.d_head)])
    U, S, Vt = np.linalg.svd(A @ B.T)
    return U, S / np.sqrt(model.d_head), Vt.T


def side_contributions(model, layers, layer, head, dest, src):
    """{side: {component: its share of the slices in the support}} of one firing."""
    U, S, V = dense_svd(model, layer, head)
    state = layers[layer]
    xi, xj = (np.append(state["x"][t], 1) for t in (dest, src))
    support = smallest_prefix(dict(enumerate(S * (xi @ U) * (xj @ V))), 1.0)
    to_dest = U[:, support] @ (S[support] * (xj @ V[:, support]))
    to_src = V[:, support] @ (S[support] * (xi @ U[:, support]))
    shares = {}
    for side, reader, t in (("dest", to_dest, dest), ("src", to_src, src)):
        wrote = {c: centred(out[t]) / state["scale"][t] for c, out in state["upstream"].items()}
        shares[side] = {c: out @ reader[:-1] for c, out in wrote.items()} | {"bias row": reader[-1]}
    return shares


def trace_one(model, layers, prompt, firing, edges):
    """Add the edges of a firing (layer, head, dest, src), and of all that it leads to."""
    layer, head, *places = firing
    for side, values in side_contributions(model, layers, *firing).items():
        for upstream in smallest_prefix(values, 0.7):
            edges.add((upstream, layer, head, side, prompt, *places))
            if upstream[0].isdigit():
                up_layer, up_head = map(int, upstream.split("."))
                token = places[side == "src"]
                score, weight = layers[up_layer]["heads"][up_head]
                for j in range(1, token + 1):
                    if weight[token, j] >= 0.5 and score[token, j] >= 0:
                        trace_one(model, layers, prompt, (up_layer, up_head, token, j), edges)


def real_tokens(case):
    for tokens, mask in zip(case.batch.tokens, case.batch.mask, strict=True):
        yield tokens[mask].numpy()


def traced(case):
    edges = set()
    for prompt, tokens in enumerate(real_tokens(case)):
        layers = forward(case.model, tokens)[1]
        for root in case.roots[case.roots["prompt"] == prompt].itertuples():
            firing = (root.layer, root.head, root.dest, root.src)
            trace_one(case.model, layers, prompt, firing, edges)
    return pd.DataFrame(sorted(edges), columns=EDGE)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("name", PLANTED)
def test_the_second_opinion_is_the_same_model(name, noise):
    case = circuit(name, noise)
    expected = np.stack([forward(case.model, tokens)[2] for tokens in real_tokens(case)])
    assert np.abs(expected - end_logits(case).numpy()).max() < 1e-9


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("name", PLANTED_ANSWERS)
def test_the_second_opinion_agrees_on_models_with_mlps(name, noise):
    case = planted_answer(name, noise)
    expected = np.stack([forward(case.model, tokens)[2] for tokens in real_tokens(case)])
    assert np.abs(expected - end_logits(case).numpy()).max() < 1e-9


# --- the circuits --------------------------------------------------------------------------------


def end_logits(case):
    return logits(case.model, case.batch.tokens, case.batch.last)


def firings(case):
    return find_firings(run(case.model, case.batch)).table()


@pytest.mark.parametrize("name", PLANTED)
def test_the_truth_is_what_a_tracer_finds(name):
    case = circuit(name)
    result = recovery(traced(case), case.truth)
    assert (result["precision"], result["recall"]) == (1, 1)
    assert len(case.truth) == result["correct"] > 20
    by_name = case.truth["upstream"].where(~case.truth["upstream"].str.match(r"\d"), "head")
    assert case.truth["kind"].equals(by_name.rename("kind"))


@pytest.mark.parametrize("name", PLANTED)
def test_sides_are_carried_by_the_planted_components_alone(name):
    case = circuit(name)
    runs = [forward(case.model, tokens)[1] for tokens in real_tokens(case)]
    for (prompt, *firing), edges in case.truth.groupby(FIRING):
        for side, values in side_contributions(case.model, runs[prompt], *firing).items():
            planned = set(edges["upstream"][edges["side"] == side])
            total = sum(values.values())
            assert total > 20
            for component, value in values.items():
                share = 1 / len(planned) if component in planned else 0
                assert value / total == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("name", PLANTED)
def test_heads_of_the_circuit_fire_where_intended_and_nowhere_else(name):
    case = circuit(name)
    found, expected = firings(case), case.truth[FIRING].drop_duplicates()
    if name == "induction":  # the previous-token head fires everywhere, on the token before
        previous = found[found["name"] == "0.0"]
        assert (previous["dest"] - previous["src"] == 1).all()
        assert len(previous) == int((case.batch.mask.sum(1) - 2).sum())
        found = found[found["name"] != "0.0"]
        expected = expected[expected["layer"] > 0]
    assert found["attention"].min() > 0.999
    if name == "decoys":
        found = found[~found["name"].isin(MUTE + LOUD)]
    order = found[FIRING].sort_values(FIRING).to_numpy().tolist()
    assert order == expected.sort_values(FIRING).to_numpy().tolist()


@pytest.mark.parametrize("name", PLANTED)
def test_the_model_answers(name):
    case = circuit(name)
    found = end_logits(case)
    every = torch.arange(len(found))
    assert (found.argmax(-1) == case.batch.io).all()
    assert (found[every, case.batch.io] - found[every, case.batch.s]).min() > 8
    others = found.scatter(1, case.batch.io[:, None], 0.0)
    assert others.abs().max() < 0.01


def test_prompts_and_roles():
    batch = circuit("inhibition").batch
    assert set(batch.table["order"]) == {"ABBA", "BABA"}
    assert len(set(batch.mask.sum(1).tolist())) == 2
    for n, (labels, row) in enumerate(zip(batch.labels, batch.table.itertuples(), strict=True)):
        places = {role: int(position[n]) for role, position in batch.roles.items()}
        assert labels[places["IO"]] == row.io and labels.count(row.io) == 1
        assert [labels[places[role]] for role in ("S1", "S2")] == [row.s, row.s]
        assert places["S1"] < places["S2"] < places["end"] == len(labels) - 1
        assert places["S1+1"] == places["S1"] + 1
        assert (places["IO"] < places["S1"]) == (row.order == "ABBA")
        assert row.text == " ".join(labels[1:])


def test_decoys_fire_on_the_path_and_are_no_part_of_it():
    case = circuit("decoys")
    found = firings(case)
    for decoys in (MUTE, LOUD):
        for decoy, true_head in zip(decoys, ("0.0", "1.0"), strict=True):
            places = [
                found[found["name"] == name][["prompt", "dest", "src"]]
                for name in (decoy, true_head)
            ]
            assert places[0].to_numpy().tolist() == places[1].to_numpy().tolist()
            assert len(places[0]) == len(case.batch.tokens)
    assert not case.truth["upstream"].isin(MUTE + LOUD).any()


def test_loud_decoys_outdo_all_messages_and_mute_ones_send_nothing():
    case = circuit("decoys")
    tokens = next(real_tokens(case))
    written = forward(case.model, tokens)[0]
    S2, end = (int(case.batch.roles[role][0]) for role in ("S2", "end"))
    for layer, token in enumerate((S2, end)):
        norms = {head: np.linalg.norm(out[token]) for head, out in written.items()}
        loud, message = norms.pop(LOUD[layer]), norms[f"{layer}.0"]
        assert norms[MUTE[layer]] == 0
        assert loud > 3 * max(norms[head] for head in norms if head[0].isdigit())
        assert loud == pytest.approx(message * LOUDNESS / MESSAGE)


# --- redundancy ----------------------------------------------------------------------------------


@cache
def gap(*without):
    """Mean logit(IO) − logit(S) of the redundant circuit without some heads."""
    case = circuit("redundant")
    found = []
    for tokens, io, s in zip(real_tokens(case), case.batch.io, case.batch.s, strict=True):
        values = forward(case.model, tokens, without)[2]
        found.append(values[io] - values[s])
    return np.mean(found)


def test_the_logit_has_a_closed_form():
    source = 2 + MESSAGE**2 * 2 / 2  # squared norm at S2: token, position, message
    informed = (2 * MESSAGE) ** 2 * 2 / source
    mover = MESSAGE  # a name at its first place holds a token and a position
    squared = 2 + informed + (2 * mover) ** 2
    expected = 2 * ANSWER_LOGIT * np.sqrt(2 / (squared + D_MODEL * EPS))
    assert gap() == pytest.approx(expected, rel=1e-3)


def test_movers_add_up():
    singles = [gap() - gap(mover) for mover in ("2.0", "3.0")]
    assert gap("2.0", "3.0") == 0
    assert gap() / sum(singles) == pytest.approx(1.04, abs=0.02)


def test_informants_back_each_other_up():
    for informant in ("1.0", "1.1"):
        assert gap() < gap(informant) < 1.06 * gap()
    assert gap("1.0", "1.1") < 1e-3 * gap()


# --- noise, and the rest of the interface ---------------------------------------------------------


def test_noise_is_reproducible_and_leaves_prompts_alone():
    first, again = planted("inhibition", 0.05, seed=3), planted("inhibition", 0.05, seed=3)
    other, clean = circuit("inhibition", 0.05), planted("inhibition", seed=3)
    assert torch.equal(end_logits(first), end_logits(again))
    assert not torch.equal(arrays_of(first, "W_Q"), arrays_of(other, "W_Q"))
    assert torch.equal(first.batch.tokens, clean.batch.tokens)
    assert not torch.equal(first.batch.tokens, other.batch.tokens)


def arrays_of(case, name):
    return torch.tensor(np.stack(arrays(case.model)[name]))


def rms(values):
    return values[values != 0].square().mean().sqrt().item()


@pytest.mark.parametrize("name", ["W_E", "W_pos", "W_U", "W_Q", "W_K", "W_V", "W_O"])
def test_noise_has_the_level_it_says(name):
    clean, noisy = (arrays_of(circuit("inhibition", noise), name) for noise in (0.0, 0.05))
    if clean.ndim == 2:
        clean, noisy = clean[None, None], noisy[None, None]
    for layer, head in np.ndindex(clean.shape[:2]):
        own = clean[layer, head]
        unit = rms(own if own.any() else clean)
        assert (noisy - clean)[layer, head].std().item() == pytest.approx(0.05 * unit, rel=0.1)


def test_mlps_get_noise_as_values_and_outputs_do():
    clean, noisy = circuit("inhibition"), circuit("inhibition", 0.05)
    for mlp, like in (("W_in", "W_V"), ("W_out", "W_O")):
        unit = rms(arrays_of(clean, like))
        assert not arrays_of(clean, mlp).any()
        assert arrays_of(noisy, mlp).std().item() == pytest.approx(0.05 * unit, rel=0.1)


def test_a_little_noise_changes_no_edge():
    for name in PLANTED:
        case = circuit(name, 0.01)
        assert recovery(traced(case), case.truth)[["precision", "recall"]].tolist() == [1, 1]


def test_recovery_counts_edges_once():
    truth = circuit("induction").truth
    found = pd.concat([truth.iloc[:4], truth.iloc[:4], truth.iloc[:1].assign(layer=9)])
    result = recovery(found.assign(weight=1.0), truth)
    assert result["precision"] == 0.8 and result["recall"] == 4 / len(truth)
    assert (result["correct"], result["spurious"]) == (4, 1)
    assert result["missing"] == len(truth) - 4
    assert np.isnan(recovery(truth.iloc[:0], truth)["precision"])


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="no planted circuit called 'x': choose among induction"):
        planted("x")
    with pytest.raises(ValueError, match="noise must be at least 0"):
        planted("induction", noise=-1.0)
    with pytest.raises(ValueError, match=r"not there: \['side'\]"):
        recovery(circuit("induction").truth.drop(columns="side"), circuit("induction").truth)
    with pytest.raises(ValueError, match="features, but there is room for 64"):
        handwritten_model([Head(0, 0, ())], [str(n) for n in range(60)])
    too_many = Head(0, 0, same_value("token", "token", ["a"] * 32))
    with pytest.raises(ValueError, match=r"head 0.0: at most 31 matches"):
        handwritten_model([too_many], ["a"])
