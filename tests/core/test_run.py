"""The residual stream is the sum of its components, and so are the logits."""

import pandas as pd
import pytest
import torch

from sparse_signals.core.model import activations, logits
from sparse_signals.core.prompts import Batch, PromptError
from sparse_signals.core.rotary import rotation, unrotate
from sparse_signals.core.run import component_table, run_model, writers
from sparse_signals.tracing.roots import logit_attribution

KINDS = ["tiny_gpt2", "tiny_llama", "tiny_qwen2"]


@pytest.fixture(params=KINDS)
def model(request):
    return request.getfixturevalue(request.param)


def before(table, layer):
    """Which components of the residual stream a layer reads."""
    return torch.tensor(((table["layer"] < layer) & (table["kind"] != "bias row")).tolist())[:-1]


def test_components_sum_to_the_residual_stream_of_every_layer(model, tokens, mask):
    outputs = run_model(model, tokens, mask).outputs
    stream = activations(model, tokens, ("resid_pre", "resid_post"))
    table = component_table(model)
    for layer in range(model.n_layers):
        total = outputs[:, :, before(table, layer)].sum(2)
        torch.testing.assert_close(total, stream["resid_pre"][layer], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(outputs.sum(2), stream["resid_post"][-1], atol=1e-12, rtol=1e-12)


def test_component_table_names_what_the_outputs_hold(model, tokens, mask):
    table = component_table(model)
    count = 2 + 3 * (4 + 2) + (0 if model.rotary else 1)
    assert len(table) == count == run_model(model, tokens, mask).outputs.shape[2] + 1
    assert table["component"].is_unique
    assert table["component"].iloc[-1] == "bias row"
    assert ("position" in set(table["component"])) is not model.rotary


def test_head_output_is_what_it_moved_without_the_value_bias(tiny_gpt2, tokens, mask):
    run = run_model(tiny_gpt2, tokens, mask)
    table = component_table(tiny_gpt2).set_index("component")
    out = writers(tiny_gpt2)
    moved = run.attention.pattern[1, :, 2] @ run.v[1, :, 2] @ out.W_O[1, 2]
    place = list(table.index).index("1.2")
    torch.testing.assert_close(run.outputs[:, :, place], moved, atol=1e-12, rtol=1e-12)
    assert out.b_V.abs().max() > 0.1  # the biases of this model matter


def test_unrotate_is_the_transpose_of_the_model_rotation(tiny_llama, tokens):
    kept = activations(tiny_llama, tokens, ("q", "q_raw"))
    raw, rotated = kept["q_raw"][1, :, 2].flatten(0, 1), kept["q"][1, :, 2].flatten(0, 1)
    position = torch.arange(tokens.shape[1]).repeat(len(tokens))
    y = torch.randn(raw.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    back = unrotate(y, *rotation(tiny_llama, position))
    torch.testing.assert_close((y * rotated).sum(-1), (back * raw).sum(-1), atol=1e-12, rtol=1e-12)
    assert not torch.allclose(back, y)


def named(tokens, mask):
    io, s = torch.arange(1, 9), torch.arange(11, 19)
    return Batch(pd.DataFrame({"text": [""] * 8}), tokens, mask, [], {}, io, s)


def test_logit_attribution_sums_to_the_logit_difference(model, tokens, mask):
    batch = named(tokens, mask)
    shares, total = logit_attribution(model, run_model(model, tokens, mask), batch)
    ours = logits(model, tokens, mask.sum(1) - 1)
    rows = torch.arange(8)
    torch.testing.assert_close(shares.sum(1), total)
    expected = ours[rows, batch.io] - ours[rows, batch.s]
    # the final normalisation of rotary models is rounded to float32 by transformers
    torch.testing.assert_close(total, expected, atol=1e-6 if model.rotary else 1e-12, rtol=1e-6)


def test_logit_attribution_needs_names(tiny_gpt2, tokens, mask):
    batch = Batch(pd.DataFrame({"text": [""] * 8}), tokens, mask, [], {}, None, None)
    with pytest.raises(PromptError, match="two names"):
        logit_attribution(tiny_gpt2, run_model(tiny_gpt2, tokens, mask), batch)
