"""What shares do not say: other exact splits, frozen attention, neurons; how sparse Δa is."""

import pytest

from aligned import aligned
from sparse_signals.attribution.limits import RULES, carried_by, exact_splits, neuron_shares
from sparse_signals.attribution.shares import node_shares
from sparse_signals.attribution.signals import BLOCKS, difference_sparsity
from sparse_signals.attribution.tables import CHANNELS


@pytest.fixture(params=("gpt2", "llama"))
def prompts(request, tokens, mask):
    model = request.getfixturevalue(f"tiny_{request.param}")
    return model, *aligned(tokens[4:], mask[4:], places=(3, 5))


def test_all_channels_carry_everything_and_some_do_not(prompts):
    sets = {"all": CHANNELS, "frozen": CHANNELS[2:], "looking": ("query", "key", "direct")}
    found = carried_by(*prompts, sets)
    wide = found.pivot(index="prompt", columns="what", values="carried")
    whole = found[found["what"] == "all"].set_index("prompt")["difference"]
    assert (wide["all"] - whole).abs().max() < 1e-11 * whole.abs().max()
    assert ((wide["frozen"] - whole).abs() > 1e-3 * whole.abs()).any()
    assert found["prompt"].nunique() == 4


def test_three_splits_have_one_sum(prompts):
    model, batch, _ = prompts
    found = exact_splits(*prompts)
    found["sum"] = found["moved"] + found["looked"]
    wide = found.pivot(index=["prompt", "name"], columns="rule", values=["moved", "sum"])
    names = list(RULES)
    assert (wide["sum"].max(axis=1) - wide["sum"].min(axis=1)).max() < 1e-12
    assert (wide["moved"][names[1]] - wide["moved"][names[2]]).abs().max() > 1e-4
    shares = node_shares(*prompts).sum(1)
    place = {name: n for n, name in enumerate(model.components["component"])}
    for (prompt, name), value in wide["sum"][names[0]].items():
        assert value == pytest.approx(float(shares[prompt, place[name]]), abs=1e-12)
    assert len(batch.tokens) == found["prompt"].nunique()


def test_neurons_sum_to_the_share_of_their_mlp(prompts):
    model, _, _ = prompts
    found, shares = neuron_shares(*prompts), node_shares(*prompts)
    place = {name: n for n, name in enumerate(model.components["component"])}
    for row in found.itertuples():
        expected = shares[row.prompt, row.pos, place[f"MLP {row.layer}"]]
        assert row.share == pytest.approx(float(expected), abs=1e-12)
        assert row.size >= abs(row.share)
        assert 1 <= row.participation <= row.neurons
    assert len(found) == 4 * model.n_layers


def test_rotations_of_random_weights_change_no_sparsity(prompts):
    """Of random heads no direction means anything: blocks of neighbours are as sparse."""
    found = difference_sparsity(*prompts, least=0.0, repeats=3)
    assert set(found["null"]) == set(BLOCKS)
    ratio = found.groupby(["of", "null"])[["participation", "rotated"]].mean()
    blocks = ratio.loc[("Δa", "blocks of 4")]
    assert blocks["participation"] == pytest.approx(blocks["rotated"], rel=0.2)
    rank = prompts[0].d_head
    assert found["participation"].between(1, rank).all()
    assert found["rotated"].between(1, rank).all()
