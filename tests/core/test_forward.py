"""The book's forward pass does what the bridge does with TransformerLens' own hooks."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from full_pass import norms_in_heads
from hooked import hooked, ungrouped
from random_models import NEOX, save_random_model
from sparse_signals.core.forward import Gates, forward, last_logits, logit_difference
from sparse_signals.core.model import load_model, logits, wrap_model
from sparse_signals.core.prompts import Batch, PromptError
from sparse_signals.core.run import KEPT, run

KINDS = ("gpt2", "llama", "qwen2", "qwen3", "gpt_neox")
TOLERANCE = 1e-10
INPUTS = ("q", "k", "v", "mlp", "out")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind, request):
    return request.getfixturevalue(f"tiny_{kind}")


@pytest.fixture(scope="module")
def batch(tokens, mask):
    """Random tokens as prompts of several lengths; IO and S are any two tokens."""
    numbers = torch.arange(len(tokens))
    table = pd.DataFrame({"text": [""] * len(tokens)})
    labels = [["?"] * int(n) for n in mask.sum(1)]
    return Batch(table, tokens, mask, labels, {}, 3 + numbers, 20 + numbers)


@pytest.fixture(scope="module")
def ungrouped_models(tiny_directories):
    """Every kind with keys and values of its own for each query head, and hooks at all inputs."""
    return {kind: wrap_model(ungrouped(tiny_directories[kind]), kind) for kind in KINDS}


def random_gates(model, batch, names, rows=3, seed=0):
    """Gates of some inputs, between −0.5 and 1.5, in rows that tokens use at random."""
    generator = torch.Generator().manual_seed(seed)
    row, place = (
        torch.randint(n, batch.tokens.shape, generator=generator) for n in (rows, len(batch.tokens))
    )
    size = len(model.components) - 1
    reference = run(model, replace(batch, tokens=batch.tokens.flip(0))).outputs[:, 2]
    shapes = dict.fromkeys("qkv", (rows, model.n_layers, model.n_heads, size))
    shapes |= {"mlp": (rows, model.n_layers, size), "out": (rows, size)}
    values = {
        name: 2 * torch.rand(shapes[name], dtype=torch.float64, generator=generator) - 0.5
        for name in names
    }
    return Gates(row, reference, place, **values)


def gap(a, b):
    return float((a - b).abs().max())


def test_without_changes_it_is_the_model(kind, model, batch):
    with torch.no_grad():
        found = forward(model, batch)
    expected = run(model, batch)
    for name in (*KEPT, "outputs"):
        assert gap(getattr(found.run, name), getattr(expected, name)) < TOLERANCE, name
    assert gap(found.difference, logit_difference(model, batch)) < TOLERANCE
    every = logits(model, batch.tokens, batch.last)
    assert gap(found.logits, every) < TOLERANCE


def test_blocks_of_neox_may_be_sequential(tmp_path, batch):
    """Then an MLP reads what the heads of its layer write."""
    path = save_random_model(tmp_path / "in-turn", "gpt_neox", **NEOX, use_parallel_residual=False)
    model = load_model(path, "cpu", torch.float64)
    with torch.no_grad():
        found = forward(model, batch)
    assert gap(found.logits, logits(model, batch.tokens, batch.last)) < 1e-6
    assert not model.parallel


@pytest.mark.parametrize("names", [*((name,) for name in INPUTS), INPUTS], ids="-".join)
def test_gates_are_hooks_at_the_inputs(kind, model, ungrouped_models, batch, names):
    """Three rows of gates: tokens of a row have theirs, for all of its prompts."""
    gates = random_gates(model, batch, names)
    with torch.no_grad():
        found, clean = forward(model, batch, gates=gates), forward(model, batch)
    assert gap(found.difference, hooked(ungrouped_models[kind], batch, gates)) < TOLERANCE
    assert gap(found.difference, clean.difference) > 1e-4


def test_every_token_can_have_gates_of_its_own(kind, model, ungrouped_models, batch):
    gates = random_gates(model, batch, INPUTS, rows=batch.tokens.numel())
    gates = replace(gates, row=torch.arange(batch.tokens.numel()).view(batch.tokens.shape))
    with torch.no_grad():
        found = forward(model, batch, gates=gates).difference
    assert gap(found, hooked(ungrouped_models[kind], batch, gates)) < TOLERANCE


def test_one_row_gates_pairs_of_components(tiny_gpt2, batch):
    one = random_gates(tiny_gpt2, batch, INPUTS, rows=1)
    rows = {name: getattr(one, name).expand(2, *getattr(one, name).shape[1:]) for name in INPUTS}
    two = replace(random_gates(tiny_gpt2, batch, (), rows=2), place=one.place, **rows)
    with torch.no_grad():
        found = [forward(tiny_gpt2, batch, gates=gates).difference for gates in (one, two)]
    assert gap(*found) < 1e-12


def test_open_gates_are_the_model(kind, model, batch):
    gates = random_gates(model, batch, INPUTS)
    opened = {name: torch.ones_like(getattr(gates, name)) for name in INPUTS}
    with torch.no_grad():
        found = forward(model, batch, gates=replace(gates, **opened))
    assert gap(found.difference, logit_difference(model, batch)) < TOLERANCE
    assert gap(found.run.outputs, run(model, batch).outputs) < TOLERANCE


def test_closed_gates_read_the_reference_alone(model, batch):
    """Whatever the prompt: the last token of all prompts answers alike, for the same names."""
    gates = random_gates(model, batch, INPUTS)
    closed = {name: torch.zeros_like(getattr(gates, name)) for name in INPUTS}
    gates = replace(gates, place=torch.zeros_like(gates.place), **closed)
    alike = replace(batch, io=batch.io[:1].expand(8), s=batch.s[:1].expand(8))
    with torch.no_grad():
        found = forward(model, alike, gates=gates).difference
    assert gap(found, found[0]) < 1e-12


@pytest.mark.parametrize("name", INPUTS)
def test_gradients_of_gates_are_finite_differences(kind, model, batch, name):
    gates = random_gates(model, batch, INPUTS, rows=2)
    value = getattr(gates, name).clone().requires_grad_()
    total = forward(model, batch, gates=replace(gates, **{name: value})).difference.sum()
    gradient = torch.autograd.grad(total, value)[0]
    step, found = 1e-5, []
    for sign in (1, -1):
        moved = value.detach() + sign * step * gradient / gradient.norm()
        with torch.no_grad():
            found.append(forward(model, batch, gates=replace(gates, **{name: moved})).difference)
    slope = float((found[0] - found[1]).sum()) / (2 * step)
    assert float(gradient.norm()) == pytest.approx(slope, rel=1e-6)


def test_gates_of_what_comes_later_do_nothing(tiny_gpt2, batch):
    gates = random_gates(tiny_gpt2, batch, INPUTS[:4])
    table, other = tiny_gpt2.components[:-1], {}
    for name in INPUTS[:4]:
        other[name] = getattr(gates, name).clone()
        for layer in range(tiny_gpt2.n_layers):
            later = table["layer"] > layer if name == "mlp" else table["layer"] >= layer
            later |= table["component"] == f"MLP {layer}"
            other[name][:, layer, ..., torch.tensor(later.tolist())] = 7
    with torch.no_grad():
        found = [forward(tiny_gpt2, batch, gates=x) for x in (gates, replace(gates, **other))]
    assert gap(found[0].difference, found[1].difference) == 0


def removed_from(model, batch, component):
    """Something random, taken from what a component writes at every token."""
    generator = torch.Generator().manual_seed(3)
    shape = (*batch.tokens.shape, len(model.components) - 1, model.d_model)
    taken = 0.1 * torch.randn(*batch.tokens.shape, model.d_model, generator=generator).double()
    place = model.components["component"].tolist().index(component)
    removed = torch.zeros(shape, dtype=torch.float64)
    removed[:, :, place] = taken
    return removed, taken


@pytest.mark.parametrize("freeze", [False, True], ids=["recomputed", "frozen"])
@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("embedding", "hook_embed"),
        ("0.2", "blocks.0.hook_attn_out"),
        ("bias 1", "blocks.1.hook_attn_out"),
        ("MLP 1", "blocks.1.hook_mlp_out"),
    ],
)
@pytest.mark.filterwarnings("ignore:A forward hook edited")
def test_what_is_removed_is_a_hook_on_the_output(kind, model, batch, component, name, freeze):
    removed, taken = removed_from(model, batch, component)
    with torch.no_grad():
        like = forward(model, batch).scales
        found = forward(model, batch, removed=removed, like=like if freeze else None)
    hooks = [(name, lambda value, hook: value - taken)]
    if freeze:
        hooks += frozen(model, batch)
    assert gap(found.difference, logit_difference(model, batch, hooks)) < TOLERANCE
    assert gap(found.difference, logit_difference(model, batch)) > 1e-3
    stream = stream_of(model, batch, hooks)
    assert gap(found.run.outputs.sum(2), stream) < TOLERANCE * stream.abs().max()


def frozen(model, batch):
    """Hooks that divide by what normalisations divide by without changes."""
    norms = [f"blocks.{layer}.{name}" for layer in range(model.n_layers) for name in ("ln1", "ln2")]
    names = [f"{name}.hook_scale" for name in [*norms, *norms_in_heads(model), "ln_final"]]
    with torch.no_grad():
        kept = model.bridge.run_with_cache(batch.tokens, names_filter=lambda x: x in names)[1]
    return [(name, lambda x, hook, scale=kept[name]: scale) for name in names]


def stream_of(model, batch, hooks):
    """The residual stream after the last layer."""
    kept = {}
    keep = (f"blocks.{model.n_layers - 1}.hook_resid_post", lambda x, hook: kept.update(last=x))
    logit_difference(model, batch, [*hooks, keep])
    return kept["last"]


def test_frozen_scales_make_gated_inputs_linear(tiny_gpt2, batch):
    """Closing two switches of one query moves its scores by the sum of both, if scales are kept."""
    gates = random_gates(tiny_gpt2, batch, ("q",))
    with torch.no_grad():
        like = forward(tiny_gpt2, batch).scales
    found = {}
    for frozen_scales in (False, True):
        queries = []
        for closed in ([], [0], [3], [0, 3]):
            q = torch.ones_like(gates.q)
            q[:, 2, 1, closed] = 0
            with torch.no_grad():
                now = forward(
                    tiny_gpt2,
                    batch,
                    gates=replace(gates, q=q),
                    like=like if frozen_scales else None,
                )
            queries.append(now.run.q[2, :, 1])
        clean, one, other, both = queries
        found[frozen_scales] = gap(both - clean, one - clean + other - clean)
    assert found[True] < 1e-12 < 1e-3 < found[False]


def test_what_is_written_can_be_gated_for_all_readers(model, batch):
    """As if every input had the same gates."""
    gates = random_gates(model, batch, ("out",))
    layers = gates.out[:, None].expand(-1, model.n_layers, -1)
    every = dict.fromkeys("qkv", layers[:, :, None]) | {"mlp": layers}
    with torch.no_grad():
        one = forward(model, batch, gates=replace(gates, written=gates.out, out=None))
        many = forward(model, batch, gates=replace(gates, **every))
    assert gap(one.logits, many.logits) < 1e-9 < 1e-4 < gap(one.logits, logits(model, batch.tokens))


def test_a_group_or_a_layer_can_share_inputs(model, batch):
    """As if each of its heads had the same gates."""
    gates, groups = random_gates(model, batch, INPUTS), model.n_heads // model.n_kv_heads
    fewer = {"q": gates.q[:, :, :1], "k": gates.k[:, :, ::groups], "v": gates.v[:, :, :1]}
    same = {name: fewer[name].expand_as(gates.q) for name in "qv"}
    same["k"] = fewer["k"].repeat_interleave(groups, dim=2)
    with torch.no_grad():
        found = [forward(model, batch, gates=replace(gates, **some)) for some in (fewer, same)]
    assert gap(found[0].difference, found[1].difference) < 1e-12


def test_a_pass_goes_on_after_the_tokens_in_front(model, batch):
    whole = forward(model, batch)
    front = forward(model, batch.positions(0, 4)).run
    found = forward(model, batch.positions(4, 12), front=front)
    for name in ("q", "k", "v", "z", "pattern"):
        assert gap(getattr(found.run, name), getattr(whole.run, name)[:, :, :, 4:]) < 1e-12, name
    assert gap(found.run.outputs, whole.run.outputs[:, 4:]) < 1e-12
    assert gap(found.run.rows(slice(2, 5)).outputs, whole.run.outputs[2:5, 4:]) < 1e-12
    assert gap(found.logits, whole.logits) < 1e-12


def test_the_logits_of_a_run_are_those_of_the_model(kind, model, batch):
    own = logits(model, batch.tokens, batch.last)
    torch.testing.assert_close(last_logits(run(model, batch)), own, atol=TOLERANCE, rtol=0)


def test_only_the_difference_needs_names(tiny_gpt2, batch):
    nameless = forward(tiny_gpt2, replace(batch, io=None))
    assert gap(nameless.logits, forward(tiny_gpt2, batch).logits) == 0
    with pytest.raises(PromptError, match="two names"):
        _ = nameless.difference
