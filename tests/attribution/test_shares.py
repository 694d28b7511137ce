"""Shares of edges: exact, as found by two other ways, and refused where they cannot be right."""

from dataclasses import replace

import pytest
import torch

from aligned import aligned
from slow_shares import slow_shares
from sparse_signals.attribution import aligned as runs_module
from sparse_signals.attribution import shares as module
from sparse_signals.attribution.aligned import ShareError
from sparse_signals.attribution.rules import SECANT, gradients, integrated
from sparse_signals.attribution.shares import (
    edge_shares,
    largest_shares,
    node_shares,
)
from sparse_signals.core.forward import Gates, forward, logit_difference
from sparse_signals.core.model import load_model, logits
from sparse_signals.core.objective import Objective
from sparse_signals.core.prompts import PromptError, encode, ioi_prompts
from sparse_signals.core.run import run

KINDS = ("gpt2", "llama", "qwen2", "qwen3", "gpt_neox")
TOLERANCE = 1e-9
INPUTS = ("q", "k", "v", "mlp", "out")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind, request):
    return request.getfixturevalue(f"tiny_{kind}")


@pytest.fixture(scope="module")
def pair(tokens, mask):
    return aligned(tokens, mask)


def each_token(batch):
    return torch.arange(batch.tokens.numel()).view(batch.tokens.shape)


def gap(a, b):
    return float((a - b).abs().max())


# --- they are exact -------------------------------------------------------------------------------


def test_they_add_up_everywhere(model, pair):
    found = edge_shares(model, *pair)
    assert found.gaps.worst < 1e-13
    assert gap(found.out.sum(1), found.difference) < 1e-13
    heads = model.is_head[:-1].cpu()
    table = model.components[:-1]
    into = sum(getattr(found, name).sum(-1) for name in "qkv").flatten(1)
    assert gap(into, found.nodes[:, heads]) < 1e-13
    mlps = torch.tensor((table["kind"] == "MLP").tolist())
    assert gap(found.mlp.sum(-1), found.nodes[:, mlps]) < 1e-13
    assert gap(found.nodes[:, 0], found.difference) < 1e-13
    assert float(found.difference.abs().min()) > 1e-4


def test_the_difference_is_that_of_the_model(kind, model, pair):
    found = edge_shares(model, *pair).difference
    expected = logit_difference(model, pair[0])
    other = logit_difference(model, replace(pair[1], io=pair[0].io, s=pair[0].s))
    assert gap(found, expected - other) < TOLERANCE


def test_what_does_not_change_has_no_share(model, pair):
    found = edge_shares(model, *pair, row=each_token(pair[0]))
    still = torch.tensor(model.components[:-1]["kind"].isin(["bias", "position"]).tolist())
    for name in INPUTS:
        assert float(getattr(found, name)[..., still].abs().max()) == 0
    same = torch.arange(12)[None, :].expand(8, 12) < 2  # nothing differs before the third token
    later = pair[0].last[:, None] < torch.arange(12)
    for place in (same, later):
        rows = place.flatten()
        assert (
            max(float(getattr(found, name)[rows].abs().max()) for name in (*INPUTS, "nodes")) == 0
        )


def test_later_components_have_no_share(tiny_gpt2, pair):
    found = edge_shares(tiny_gpt2, *pair)
    layer = torch.tensor(tiny_gpt2.components[:-1]["layer"].tolist())
    mlp = torch.tensor((tiny_gpt2.components[:-1]["kind"] == "MLP").tolist())
    for l in range(3):
        for name in "qkv":
            assert float(getattr(found, name)[:, l, :, layer >= l].abs().max()) == 0
        assert float(found.mlp[:, l, (layer > l) | (mlp & (layer == l))].abs().max()) == 0


# --- they are what other ways find ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "places"), [(0, (2, 3)), (7, (2, 3, 7)), (7, (0,)), (7, (9,)), (7, (11,))], ids=str
)
def test_they_are_derivatives_of_gates_on_differences(model, tokens, mask, prompt, places):
    """Edge by edge, with secants found by quadrature: of a padded prompt, and of whole ones.

    Tokens differ from the first, the last, or one in the middle.
    """
    everywhere = mask if max(places) < 8 else torch.ones_like(mask)
    batch, other = aligned(tokens, everywhere, places)
    ids = batch.answers("a test")
    direction = torch.zeros(8, 50).double().scatter(1, ids, torch.tensor([[1.0, -1]] * 8).double())
    found = edge_shares(model, batch, other, row=each_token(batch))
    length = int(batch.mask[prompt].sum())
    expected = slow_shares(
        model, batch.tokens[prompt, :length], other.tokens[prompt, :length], direction[prompt]
    )
    assert gap(expected["change"], found.difference[prompt]) < 1e-12
    rows = slice(12 * prompt, 12 * prompt + length)
    for name in ("q", "k", "v", "mlp"):
        assert gap(getattr(found, name)[rows], expected[name]) < 1e-12, name
        assert float(expected[name].abs().max()) > 1e-6
    assert gap(found.out[12 * prompt + length - 1], expected["out"]) < 1e-12


def gate_gradients(model, batch, other, point):
    """Δx_c · ∂F/∂(input) by autograd through the book's pass, at a point between x′ and x."""
    prompts, length = batch.tokens.shape
    size = len(model.components) - 1
    shapes = dict.fromkeys("qkv", (prompts, model.n_layers, model.n_heads, size))
    shapes |= {"mlp": (prompts, model.n_layers, size), "out": (prompts, size)}
    first = torch.tensor(model.components[:-1]["layer"].tolist()) < 0
    values = {name: torch.ones(shape).double() for name, shape in shapes.items()}
    for value in values.values():
        value[..., first] = point
    x, y = (
        forward(model, each).run.outputs for each in (batch, replace(other, io=batch.io, s=batch.s))
    )
    row = torch.arange(prompts)[:, None].expand(prompts, length)
    place = each_token(batch)
    here = forward(model, batch, gates=Gates(row, y.flatten(0, 1), place, **values)).run.outputs
    # an edge that is open reads the same, whatever the reference: so it may differ by Δ
    reference = torch.where(first[:, None], y, here - (x - y)).flatten(0, 1)
    values = {name: value.requires_grad_() for name, value in values.items()}
    with torch.enable_grad():
        found = forward(model, batch, gates=Gates(row, reference, place, **values))
        gradients = torch.autograd.grad(found.difference.sum(), list(values.values()))
    return dict(zip(values, gradients, strict=True))


@pytest.mark.parametrize(
    "points", [(1.0,), (0.0,), (0.25,), (0.0, 1.0), integrated(3).points], ids=str
)
def test_gradients_are_those_of_autograd(kind, model, pair, points):
    found = edge_shares(model, *pair, rule=gradients(*points))
    with torch.no_grad():
        each = [gate_gradients(model, *pair, point) for point in points]
    for name in INPUTS:
        expected = sum(x[name] for x in each) / len(points)
        size = float(expected.abs().max())
        assert gap(getattr(found, name), expected) < 10 * TOLERANCE * size, name
        assert size > 1e-4


@pytest.mark.slow
def test_many_steps_add_up_at_the_embeddings(model, pair):
    gaps = [edge_shares(model, *pair, rule=integrated(n)).gaps.embeddings for n in (2, 8, 32)]
    assert gaps[2] < gaps[1] / 8 < gaps[0] / 16 and gaps[2] < 1e-3


def test_of_nearly_equal_runs_they_are_gradients(tiny_llama, pair):
    """Two tokens that are almost the same one: a secant is hardly longer than a point."""
    batch = pair[0].rows(slice(7, 8))
    near = replace(batch, tokens=batch.tokens.clone())
    near.tokens[0, 3] = next(n for n in range(50) if n not in batch.tokens)
    weights = tiny_llama.bridge.embed.W_E
    kept = weights.clone()
    noise = torch.randn(32, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        weights[near.tokens[0, 3]] = weights[batch.tokens[0, 3]] + 1e-6 * noise
    exact, slope = (edge_shares(tiny_llama, batch, near, rule=x) for x in (SECANT, gradients(1.0)))
    with torch.no_grad():
        weights.copy_(kept)
    for name in INPUTS:
        size = float(getattr(slope, name).abs().max())
        assert 0 < gap(getattr(exact, name), getattr(slope, name)) < 1e-3 * size


# --- answers, rows, chunks ------------------------------------------------------------------------


def test_any_weights_of_logits_can_be_asked(model, pair):
    ids = pair[0].answers("a test")
    one, half = (Objective(ids, torch.tensor([[x, -x]] * 8)) for x in (1.0, 0.5))
    whole, expected = edge_shares(model, *pair, objective=one), edge_shares(model, *pair)
    part = edge_shares(model, *pair, objective=half)
    for name in INPUTS:
        assert gap(getattr(whole, name), getattr(expected, name)) < 1e-14
        assert gap(2 * getattr(part, name), getattr(expected, name)) < 1e-14
    several = Objective.difference([[3, 4, 5]] * 8, [[6]] * 8)
    found, each = edge_shares(model, *pair, objective=several), [
        edge_shares(model, *pair, objective=Objective.difference([[x]] * 8, [[6]] * 8)).q
        for x in (3, 4, 5)
    ]  # fmt: skip
    assert gap(3 * found.q, sum(each)) < 1e-13


@pytest.mark.parametrize("others", [0, 1, 2])
def test_a_log_probability_is_split_too(kind, model, pair, others):
    batch, other = pair
    right = [[token, *range(48, 48 + others)] for token in batch.io.tolist()]
    asked = Objective.log_probability(right)
    found = edge_shares(model, batch, other, objective=asked)
    every = [logits(model, x.tokens, x.last).softmax(-1) for x in pair]
    sums = [torch.stack([p[row].sum() for p, row in zip(x, right, strict=True)]) for x in every]
    expected = sums[0].log() - sums[1].log()
    assert gap(found.difference, expected) < TOLERANCE
    assert found.gaps.worst < 1e-12
    slope = edge_shares(model, batch, other, objective=asked, rule=integrated(32))
    assert gap(slope.nodes[:, 0], expected) < 2e-3


def test_rows_say_over_which_tokens_shares_are_summed(model, pair):
    batch = pair[0]
    alone = edge_shares(model, *pair, row=each_token(batch))
    generator = torch.Generator().manual_seed(1)
    row = torch.randint(5, batch.tokens.shape, generator=generator)
    pooled, whole = edge_shares(model, *pair, row=row), edge_shares(model, *pair)
    for name in (*INPUTS, "nodes"):
        values = getattr(alone, name)
        expected = values.new_zeros(5, *values.shape[1:]).index_add(0, row.flatten(), values)
        assert gap(getattr(pooled, name), expected) < 1e-13
        assert gap(getattr(whole, name), values.unflatten(0, (8, 12)).sum(1)) < 1e-13


def test_nodes_alone_are_the_same(model, pair, monkeypatch):
    expected = edge_shares(model, *pair, row=each_token(pair[0])).nodes.unflatten(0, (8, 12))
    assert gap(node_shares(model, *pair), expected) < 1e-15
    assert float(expected.abs().max()) > 1e-3
    monkeypatch.setitem(module.COMPLETE, torch.float64, 1e-20)
    with pytest.raises(ShareError, match="miss what they add up to"):
        node_shares(model, *pair)


def test_the_largest_shares_have_names(model, pair):
    found = edge_shares(model, *pair)
    every = torch.cat([getattr(found, name).flatten() for name in INPUTS])
    table = largest_shares(model, found, len(every))
    assert len(table) == len(every)
    assert torch.equal(torch.tensor(table["share"].abs().to_numpy()), every.abs().sort()[0].flip(0))
    names = model.components["component"].tolist()
    for _, edge in table.groupby("input").head(20).iterrows():
        place = (edge["row"], edge["layer"], edge["head"])
        place = place[: {"mlp": 2, "out": 1}.get(edge["input"], 3)]
        values = getattr(found, edge["input"])[place]
        assert float(values[names.index(edge["upstream"])]) == edge["share"]
    first = table[table["input"] == "q"].iloc[0]
    assert first["downstream"] == f"{first['layer']}.{first['head']}"
    assert set(table[table["input"] == "mlp"]["downstream"]) == {"MLP 0", "MLP 1", "MLP 2"}


def test_chunks_change_nothing(model, pair, monkeypatch):
    expected = edge_shares(model, *pair)
    monkeypatch.setattr(runs_module, "RUNS_BYTES", 1)
    found = edge_shares(model, *pair)
    for name in (*INPUTS, "nodes", "difference"):
        assert gap(getattr(found, name), getattr(expected, name)) < 1e-13


def test_one_token_and_one_layer(tiny_directories, tmp_path, tokens):
    from random_models import SIZES, save_random_model

    path = save_random_model(tmp_path / "one", "gpt2", **SIZES | {"num_hidden_layers": 1})
    model = load_model(path, device="cpu", dtype=torch.float64)
    for length in (1, 4):
        everywhere = torch.ones(8, length, dtype=torch.bool)
        pair = aligned(tokens[:, :length], everywhere, places=(0,))
        found = edge_shares(model, *pair)
        assert found.gaps.worst < 1e-13 and float(found.difference.abs().max()) > 1e-3


def test_a_run_against_itself_has_no_shares(tiny_gpt2, pair):
    found = edge_shares(tiny_gpt2, pair[0], pair[0])
    assert found.gaps.worst == 0 and float(found.q.abs().max()) == 0


# --- real prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_shipped_model_on_its_task(dtype):
    model = load_model("gpt2-ioi", device="cpu", dtype=dtype)
    table = ioi_prompts(16, seed=1, tokenizer=model.tokenizer)
    other = table.assign(io=table["s"], s=table["io"])
    swapped = table.copy()
    for n, row in table.iterrows():
        swapped.loc[n, "text"] = (
            row["text"].replace(row["io"], "@").replace(row["s"], row["io"]).replace("@", row["s"])
        )
    swapped = swapped.assign(io=other["io"], s=other["s"])
    batch, counterfactual = encode(model, table), encode(model, swapped)
    found = edge_shares(model, batch, counterfactual)
    assert found.gaps.worst < (1e-5 if dtype == torch.float32 else 1e-13)
    assert float(found.difference.min()) > 1


def test_few_edges_carry_the_answer():
    """S2 becomes IO: with one edge in ten open, most of the difference comes through."""
    model = load_model("gpt2-ioi", device="cpu")
    batch = encode(model, ioi_prompts(16, seed=3, tokenizer=model.tokenizer))
    other = replace(batch, tokens=batch.tokens.clone())
    other.tokens[torch.arange(16), batch.roles["S2"]] = batch.io
    pooled = torch.zeros_like(batch.tokens)
    found = edge_shares(model, batch, other, row=pooled)
    sizes = [getattr(found, name).abs() for name in INPUTS]
    every = torch.cat([size.flatten() for size in sizes])
    edges = int((every > 0).sum())
    reference = run(model, other).outputs.flatten(0, 1)
    answers = {}
    for name, order in (
        ("none", every.argsort()[:0]),
        ("strong", every.argsort(descending=True)[: edges // 10]),
        ("weak", every.argsort(descending=True)[edges // 10 :]),
    ):
        opened = torch.zeros_like(every).index_fill(0, order, 1.0)
        parts = opened.split([size.numel() for size in sizes])
        gates = {n: x.view(y.shape) for n, x, y in zip(INPUTS, parts, sizes, strict=True)}
        with torch.no_grad():
            gated = forward(
                model, batch, gates=Gates(pooled, reference, each_token(batch), **gates)
            )
        answers[name] = float(gated.difference.mean())
    whole = float(logit_difference(model, batch).mean()) - answers["none"]
    assert (answers["strong"] - answers["none"]) / whole > 0.8
    assert (answers["weak"] - answers["none"]) / whole < 0.5


# --- refusals -------------------------------------------------------------------------------------


def test_batches_must_be_aligned(tiny_gpt2, pair):
    batch, other = pair
    mask = other.mask.clone()
    mask[3, 7] = False
    with pytest.raises(PromptError, match="prompt 3 has 8 tokens and its counterfactual 7"):
        edge_shares(tiny_gpt2, batch, replace(other, mask=mask))
    with pytest.raises(PromptError, match="both must be alike"):
        edge_shares(tiny_gpt2, batch, other.rows(slice(4)))


def test_an_answer_is_needed(tiny_gpt2, pair):
    with pytest.raises(PromptError, match="two names"):
        edge_shares(tiny_gpt2, replace(pair[0], io=None), pair[1])


def test_the_objective_is_of_these_prompts(tiny_gpt2, pair):
    with pytest.raises(PromptError, match="of 7 prompts"):
        edge_shares(tiny_gpt2, *pair, objective=Objective.log_probability([[1]] * 7))


def test_rows_cover_all_tokens(tiny_gpt2, pair):
    with pytest.raises(ShareError, match="belongs to a row"):
        edge_shares(tiny_gpt2, *pair, row=each_token(pair[0]) - 1)


def test_prompts_fit_into_the_window(tiny_gpt2):
    long = aligned(torch.ones(2, 40, dtype=torch.long), torch.ones(2, 40, dtype=torch.bool))
    with pytest.raises(PromptError, match="prompts have 40 tokens; tiny-gpt2 takes 32"):
        edge_shares(tiny_gpt2, *long)


def test_shares_that_do_not_add_up_are_refused(tiny_gpt2, pair, monkeypatch):
    monkeypatch.setitem(module.COMPLETE, torch.float64, 1e-20)
    with pytest.raises(ShareError, match="miss what they add up to"):
        edge_shares(tiny_gpt2, *pair)
    edge_shares(tiny_gpt2, *pair, rule=gradients(1.0))


def test_rounding_of_a_small_difference_is_no_fault():
    """Logits of 10 are known to 1e-5 in float32, so is a difference that is 0.02 in all."""
    model = load_model("gpt2-ioi", device="cpu")
    tokens = torch.randint(
        1, len(model.tokenizer), (256, 16), generator=torch.Generator().manual_seed(0)
    )
    batch, other = aligned(tokens, torch.ones_like(tokens, dtype=torch.bool), places=(2, 4, 9))
    values = node_shares(model, batch, other)[:, :, 0]
    found = edge_shares(model, batch, other)
    gap = (values.sum(1) - found.difference).abs()
    assert (gap / values.abs().sum(1)).max() > 2e-5 and gap.max() < 5e-5
    assert found.gaps.worst < 1e-4


@pytest.mark.parametrize("name", ["Softmax", "Mixing", "Score", "Norm", "Pointwise"])
def test_a_wrong_secant_is_noticed(tiny_gpt2, pair, monkeypatch, name):
    """Any operation at one run instead of between both."""
    from sparse_signals.attribution import readers

    real = getattr(readers, name).between

    def at_one_run(*values, **more):
        values = list(values)
        pairs = {"Softmax": [(0, 1)], "Norm": [(0, 1), (2, 3)], "Pointwise": [(1, 2), (3, 4)]}
        for one, two in pairs.get(name, [(0, 1), (2, 3)]):
            values[two] = values[one]
        return real(*values, **more)

    monkeypatch.setattr(getattr(readers, name), "between", at_one_run)
    with pytest.raises(ShareError, match="miss what they add up to"):
        edge_shares(tiny_gpt2, *pair)
