"""The residual stream is the sum of its components, and so are the logits."""

from dataclasses import replace

import pytest
import torch

from sparse_signals.core.model import activations, logits
from sparse_signals.core.prompts import PromptError
from sparse_signals.core.rotary import rotation, unrotate
from sparse_signals.core.run import KEPT, Outputs, run
from sparse_signals.tracing.roots import logit_attribution

KINDS = ["tiny_gpt2", "tiny_llama", "tiny_qwen2", "tiny_qwen3", "tiny_gpt_neox"]


@pytest.fixture(params=KINDS)
def model(request):
    return request.getfixturevalue(request.param)


def before(table, layer):
    """Which components of the residual stream a layer reads."""
    return torch.tensor(((table["layer"] < layer) & (table["kind"] != "bias row")).tolist())[:-1]


def test_components_sum_to_the_residual_stream_of_every_layer(model, batch):
    outputs = run(model, batch).outputs
    stream = activations(model, batch.tokens, ("resid_pre", "resid_post"))
    table = model.components
    for layer in range(model.n_layers):
        total = outputs[:, :, before(table, layer)].sum(2)
        torch.testing.assert_close(total, stream["resid_pre"][layer], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(outputs.sum(2), stream["resid_post"][-1], atol=1e-12, rtol=1e-12)


def test_components_name_what_the_outputs_hold(model, batch):
    table = model.components
    count = 2 + 3 * (4 + 2) + (0 if model.rotary else 1)
    assert len(table) == count == run(model, batch).outputs.shape[2] + 1
    assert table["component"].is_unique
    assert table["component"].iloc[-1] == "bias row"
    assert ("position" in set(table["component"])) is not model.rotary


def test_head_output_is_what_it_moved_without_the_value_bias(tiny_gpt2, batch):
    ran, out = run(tiny_gpt2, batch), tiny_gpt2.writers
    moved = ran.pattern[1, :, 2] @ ran.v[1, :, 2] @ out.W_O[1, 2]
    place = tiny_gpt2.components["component"].tolist().index("1.2")
    torch.testing.assert_close(ran.outputs[:, :, place], moved, atol=1e-12, rtol=1e-12)
    assert out.b_V.abs().max() > 0.1  # the biases of this model matter


def test_what_follows_from_the_weights_is_kept_with_the_model(tiny_gpt2, tiny_llama):
    assert tiny_gpt2.writers is tiny_gpt2.writers
    assert tiny_gpt2.components is tiny_gpt2.components
    assert tiny_gpt2.divisor is tiny_gpt2.divisor
    assert len({tiny_gpt2, tiny_gpt2, tiny_llama}) == 2 and tiny_gpt2 != tiny_llama
    heads = tiny_gpt2.components.loc[tiny_gpt2.is_head.tolist(), "component"]
    assert heads.tolist() == [f"{layer}.{head}" for layer in range(3) for head in range(4)]
    assert tiny_llama.rms and not tiny_gpt2.rms


def test_rows_of_a_run_are_the_run_of_some_prompts(model, batch):
    whole, some = run(model, batch), run(model, batch.rows(slice(2, 5)))
    rows = whole.rows(slice(2, 5))
    assert len(rows) == 3 and torch.equal(rows.mask, batch.mask[2:5])
    for name in (*KEPT, "outputs"):
        ours, expected = getattr(rows, name), getattr(some, name)
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
    assert torch.equal(rows.outputs, whole.outputs[2:5])


def test_chunks_of_a_run_share_memory_for_what_is_written(model, batch, monkeypatch):
    monkeypatch.setattr("sparse_signals.core.run.CHUNK_BYTES", 1)  # a prompt at a time
    whole, parts = run(model, batch), []
    for n, (rows, part) in enumerate(whole.chunks()):
        assert (rows.start, rows.stop) == (n, n + 1)
        torch.testing.assert_close(part.outputs, whole.outputs[rows], atol=1e-12, rtol=1e-12)
        parts.append(part)
    assert len(parts) == len(whole)
    assert len({part.outputs.data_ptr() for part in parts}) == 1


def test_unrotate_is_the_transpose_of_the_model_rotation(tiny_llama, tokens):
    kept = activations(tiny_llama, tokens, ("q", "q_raw"))
    raw, rotated = kept["q_raw"][1, :, 2].flatten(0, 1), kept["q"][1, :, 2].flatten(0, 1)
    position = torch.arange(tokens.shape[1]).repeat(len(tokens))
    y = torch.randn(raw.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    back = unrotate(y, *rotation(tiny_llama, position))
    torch.testing.assert_close((y * rotated).sum(-1), (back * raw).sum(-1), atol=1e-12, rtol=1e-12)
    assert not torch.allclose(back, y)


def test_logit_attribution_sums_to_the_logit_difference(model, batch):
    batch = replace(batch, io=torch.arange(1, 9), s=torch.arange(11, 19))
    shares, total = logit_attribution(run(model, batch))
    ours = logits(model, batch.tokens, batch.last)
    rows = torch.arange(8)
    torch.testing.assert_close(shares.sum(1), total)
    expected = ours[rows, batch.io] - ours[rows, batch.s]
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=1e-12)


def test_logit_attribution_needs_names(tiny_gpt2, batch):
    with pytest.raises(PromptError, match="two names"):
        logit_attribution(run(tiny_gpt2, batch))


def test_outputs_of_single_tokens_are_those_of_the_run(model, batch):
    """Asked from the top down each token is computed once; asked upwards, again."""
    ran, names = run(model, batch), model.components["layer"].to_numpy()
    prompt, pos = torch.tensor([[0, 3], [3, 0]]), torch.tensor([[2, 1], [4, 2]])
    found = Outputs(ran)
    for layer, used in ((2, 3), (1, 3), (0, 3), (3, 6)):
        written, slot = found.at(prompt, pos, layer)
        assert written.shape[1] == (names[:-1] < layer).sum() and found.used == used
        expected = ran.outputs[prompt, pos, : written.shape[1]]
        torch.testing.assert_close(written[slot], expected, atol=1e-12, rtol=1e-12)
