"""Switches at edges: open ones change nothing, closed ones do what a hook on the model does."""

import numpy as np
import pytest
import torch

from gated import KINDS, LENGTH, TOLERANCE, batch_of, edge_table, every
from sparse_signals.core.forward import logit_difference
from sparse_signals.core.model import activations
from sparse_signals.core.prompts import Batch, PromptError, token_roles
from sparse_signals.core.run import run
from sparse_signals.interventions.faithfulness import gates
from sparse_signals.interventions.gated_model import ABLATIONS, run_switched, switchboard


@pytest.fixture(scope="module")
def batch():
    return batch_of(6)


@pytest.fixture(scope="module")
def reference():
    return batch_of(10, seed=1)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind, request):
    return request.getfixturevalue(kind)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_open_switches_are_the_model(kind, model, batch, reference, ablation):
    board = switchboard(model, batch, reference, ablation)
    outcome = run_switched(board, gates(board, every(board)))
    assert (outcome.difference - logit_difference(model, batch)).abs().max() < TOLERANCE
    pattern = activations(model, batch.tokens, ("pattern",))["pattern"]
    assert (outcome.pattern - pattern).abs().max() < TOLERANCE


def test_closed_switches_hide_the_words(model, reference):
    patterns = []
    for seed in (2, 3):
        board = switchboard(model, batch_of(6, seed), reference, "mean")
        patterns.append(run_switched(board, gates(board, every(board)[:0])).pattern)
        opened = run_switched(board, gates(board, every(board))).pattern
        assert (patterns[-1] - opened).abs().max() > 0.1
    assert (patterns[0] - patterns[1]).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("kind", "side"),  # with grouped keys, a hook on a key changes all heads that share it
    [("tiny_gpt2", "src"), *((kind, "dest") for kind in KINDS)],
    indirect=["kind"],
)
def test_a_closed_edge_is_a_hook_on_a_query_or_key(kind, model, batch, reference, side):
    board = switchboard(model, batch, reference, "mean")
    token = LENGTH - 1 if side == "dest" else 6
    table = edge_table(board, every(board))
    table = table[(table["side"] == side) & (table["role"] == token_roles(batch)[0][token])]
    picked = table.query("upstream == 'MLP 0' and downstream == '1.3'")
    edge = torch.tensor(picked["edge"].tolist())
    found = run_switched(board, gates(board, edge, others=True)).difference
    expected = hooked(model, batch, reference, side, "MLP 0", (1, 3), token)
    assert (found - logit_difference(model, batch)).abs().max() > 2 * TOLERANCE
    assert (found - expected).abs().max() < TOLERANCE


def hooked(model, batch, reference, side, upstream, head, token):
    """The model with one component averaged in the query or key of one head, through a hook."""
    table = model.components
    place = table["component"].tolist().index(upstream)
    before = torch.tensor((table["layer"][:-1] < head[0]).tolist())
    clean = run(model, batch).outputs[:, token]
    mean = run(model, reference).outputs[:, token, place].mean(0)
    x = clean[:, before].sum(1) - clean[:, place] + mean
    block = model.bridge.blocks[head[0]]
    name = "q" if side == "dest" else "k"
    W = block.attn.W_Q if side == "dest" else block.attn.W_K
    b = block.attn.b_Q if side == "dest" else block.attn.b_K
    row = block.ln1(x[:, None])[:, 0] @ W[head[1]] + (0 if b is None else b[head[1]])

    def replace(value, hook):
        value = value.clone()
        value[:, token, head[1]] = row
        return value

    return logit_difference(model, batch, [(f"blocks.{head[0]}.attn.hook_{name}", replace)])


def test_a_resampled_token_has_the_same_role(kind, model):
    """In one prompt whose tokens all have roles of their own, each is replaced by itself."""
    prompt = batch_of(1, length=8)
    assert len(set(token_roles(prompt)[0])) == 8
    board = switchboard(model, prompt, prompt, "resample")
    opened, closed = (run_switched(board, gates(board, every(board)[:n])) for n in (None, 0))
    assert (opened.difference - closed.difference).abs().max() < TOLERANCE


def test_resampling_draws_by_the_seed(tiny_gpt2, batch, reference):
    closed = [
        run_switched(board, gates(board, every(board)[:0])).difference
        for seed in (0, 0, 1)
        for board in [switchboard(tiny_gpt2, batch, reference, "resample", seed=seed)]
    ]
    assert torch.equal(closed[0], closed[1]) and not torch.allclose(closed[0], closed[2])


def test_edges_are_upstream_and_differ_between_prompts(model, batch, reference):
    board = switchboard(model, batch, reference)
    table = edge_table(board, every(board))
    of = model.components.set_index("component")
    assert not (of.loc[table["upstream"], "kind"] == "bias").any()
    assert "intact" not in set(table["role"])
    layers = (of.loc[table[end], "layer"].to_numpy() for end in ("upstream", "downstream"))
    assert np.less(*layers).all()
    first = 1 if model.rotary else 2
    inputs = sum(first + layer * (model.n_heads + 1) for layer in range(model.n_layers))
    assert len(table) == (len(board.roles) - 1) * 2 * model.n_heads * inputs


def test_roles_are_sets_and_a_third_name_stands_for_s2(batch):
    assert token_roles(batch)[0][:5] == ["intact", "IO-1", "IO", "IO+1, S1-1", "S1"]
    renamed = {("third" if role == "S2" else role): pos for role, pos in batch.roles.items()}
    third = Batch(**{**vars(batch), "roles": renamed})
    assert token_roles(third) == token_roles(batch)


def test_errors_say_what_is_wrong(tiny_gpt2, batch, reference):
    with pytest.raises(ValueError, match="ablation must be one of"):
        switchboard(tiny_gpt2, batch, reference, "zero")
    nameless = Batch(**{**vars(batch), "io": None, "s": None})
    with pytest.raises(PromptError, match="two names"):
        switchboard(tiny_gpt2, nameless, reference)
    lacking = Batch(**{**vars(batch), "roles": {"end": batch.roles["end"]}})
    with pytest.raises(PromptError, match="no token of the reference prompts has role"):
        switchboard(tiny_gpt2, batch, lacking)
