"""Traces against a slow reference that follows one path at a time; what must not change them."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from shipped import CARRIERS, HEADS, MOVERS, root_of
from sparse_signals.core import run as core_run
from sparse_signals.core.model import load_model
from sparse_signals.core.prompts import Batch, PromptError, encode, ioi_prompts
from sparse_signals.core.resume import atomic, run_key
from sparse_signals.core.run import fitting_rows, run
from sparse_signals.signals.firings import find_firings
from sparse_signals.tracing import trace as tracing
from sparse_signals.tracing.contributions import (
    Contributions,
    Settings,
    contributions,
)
from sparse_signals.tracing.roots import (
    Root,
    TraceError,
    TraceWarning,
    logit_attribution,
    pairs_named,
    position_of,
    strongest_roots,
)
from sparse_signals.tracing.trace import kept_components, trace, trace_chunk, trace_prompts

KINDS = ["tiny_gpt2", "tiny_llama", "tiny_qwen2", "tiny_qwen3", "tiny_gpt_neox"]
PLACE = ["prompt", "upstream", "downstream", "side", "dest", "src"]
LEVEL = Settings(level=0.15)  # random models attend weakly
DEST = 4  # a position that all prompts have


@pytest.fixture(params=KINDS)
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def batch(tokens, mask):
    return Batch(pd.DataFrame({"text": [""] * 8}), tokens, mask, [], {}, None, None)


def roots_of(model, batch, n=3):
    """Heads of the last layer that fire from one position somewhere."""
    pairs = find_firings(run(model, batch), LEVEL.level)
    top = model.n_layers - 1
    firing = pairs[(pairs.dest == DEST) & (pairs.layer == top)]
    return [Root(top, head, DEST) for head in sorted(set(firing.head.tolist()))[:n]]


def cut(values, share):
    """The smallest prefix of the sorted values whose sum exceeds a share of the total."""
    order = sorted(range(len(values)), key=lambda c: -values[c])
    total, kept = 0.0, []
    for c in order:
        if values[c] <= 0:
            break
        kept.append(c)
        total += values[c]
        if total > share * sum(values):
            break
    return kept


def slow_trace(model, batch, roots, settings):
    """Depth first, one firing at a time, opened again whenever a path reaches it.

    Returns how often each edge is written, and the weight it is written with.
    """
    ran = run(model, batch)
    pairs = find_firings(ran, settings.level)
    values = contributions(ran, pairs, settings).values.tolist()
    firings = {}
    for n, row in enumerate(pairs.table().itertuples()):
        firings.setdefault((row.prompt, row.layer, row.head, row.dest), []).append((n, row))
    table, written = list(model.components.itertuples()), {}

    def follow(prompt, layer, head, dest):
        for n, row in firings.get((prompt, layer, head, dest), []):
            for side, name in enumerate(("dest", "src")):
                for c in cut(values[n][side], settings.share):
                    key = (prompt, table[c].component, row.name, name, row.dest, row.src)
                    times, _ = written.get(key, (0, 0.0))
                    written[key] = (times + 1, values[n][side][c])
                    if table[c].kind == "head":
                        follow(prompt, table[c].layer, table[c].head, (row.dest, row.src)[side])

    for root in roots:
        for prompt in range(len(batch.tokens)):
            follow(prompt, root.layer, root.head, root.dest)
    return written


@pytest.mark.parametrize(
    ("weighting", "fraction"),
    [("exact", None), ("exact", 1.0), ("attention", None), ("published", 1.0), ("norm", None)],
)
def test_trace_equals_the_slow_reference(model, batch, weighting, fraction):
    settings = replace(LEVEL, weighting=weighting, fraction=fraction)
    roots = roots_of(model, batch)
    expected = slow_trace(model, batch, roots, settings)
    edges = trace(run(model, batch), roots, settings).edges
    assert len(expected) > 10
    found = {
        tuple(row[:6]): (row.visits, row.weight)
        for row in edges[[*PLACE, "visits", "weight"]].itertuples(index=False)
    }
    assert found.keys() == expected.keys()
    for key, (times, weight) in expected.items():
        assert found[key][0] == times
        assert found[key][1] == pytest.approx(weight, abs=1e-9)


def test_an_edge_is_written_once_per_firing(model, batch):
    edges = trace(run(model, batch), roots_of(model, batch), LEVEL).edges
    assert not edges.duplicated(["firing", "side", "upstream"]).any()
    assert not edges.duplicated(PLACE).any()
    if model.rotary:  # several paths do reach some of them
        assert (edges["visits"] > 1).any()


def test_receiving_token_is_that_of_the_side(model, batch):
    edges = trace(run(model, batch), roots_of(model, batch), LEVEL).edges
    expected = edges["dest"].where(edges["side"] == "dest", edges["src"])
    assert edges["token"].equals(expected)


def test_shares_of_a_side_exceed_the_cut_and_the_last_one_was_needed(model, batch):
    edges = trace(run(model, batch), roots_of(model, batch), LEVEL).edges
    sides = edges.groupby(["firing", "side"], observed=True)["share"]
    assert (sides.sum() > LEVEL.share).all()
    assert (sides.sum() - sides.min() <= LEVEL.share + 1e-12).all()


def test_edges_do_not_depend_on_the_order_of_roots_or_prompts(model, batch):
    roots = roots_of(model, batch)
    assert len(roots) > 1
    one = trace(run(model, batch), roots, LEVEL).edges
    other = trace(run(model, batch), roots[::-1], LEVEL).edges
    pd.testing.assert_frame_equal(one, other)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    shuffled = replace(batch, tokens=batch.tokens[order], mask=batch.mask[order])
    mixed = trace(run(model, shuffled), roots, LEVEL).edges
    mixed["prompt"] = order.numpy()[mixed["prompt"]]
    keys = [table[PLACE].astype(str).sort_values(PLACE).to_numpy() for table in (one, mixed)]
    assert (keys[0] == keys[1]).all()


def test_chunks_give_what_one_run_gives(model, batch, monkeypatch):
    roots = roots_of(model, batch)
    whole = trace(run(model, batch), roots, LEVEL)
    monkeypatch.setattr(core_run, "CHUNK_BYTES", 1)  # a prompt at a time
    parts = trace(run(model, batch), roots, LEVEL)
    assert len(fitting_rows(model, batch)) == 8
    ours, theirs = (t.edges.sort_values(PLACE)[[*PLACE, "visits"]] for t in (whole, parts))
    assert (ours.astype(str).to_numpy() == theirs.astype(str).to_numpy()).all()
    linked = parts.edges.merge(parts.firings, on="firing", suffixes=("", "_firing"))
    assert len(linked) == len(parts.edges)
    assert (linked["prompt"] == linked["prompt_firing"]).all()
    assert (linked["downstream"] == linked["name"]).all()


def test_a_run_that_was_cut_off_goes_on(tiny_gpt2, batch, monkeypatch, tmp_path):
    roots = roots_of(tiny_gpt2, batch)
    monkeypatch.setattr(core_run, "CHUNK_BYTES", 1)
    whole, calls, real = trace(run(tiny_gpt2, batch), roots, LEVEL), [], trace_chunk

    def failing(*arguments):
        calls.append(arguments[-1])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(tracing, "trace_chunk", failing)
    with pytest.raises(KeyboardInterrupt):
        trace_prompts(tiny_gpt2, batch, roots, LEVEL, folder=tmp_path)
    resumed = trace_prompts(tiny_gpt2, batch, roots, LEVEL, folder=tmp_path)
    assert calls == [0, 1, 2, 3, 3, 4, 5, 6, 7]
    pd.testing.assert_frame_equal(resumed.edges, whole.edges)
    assert resumed.firings["vectors"].map(list).equals(whole.firings["vectors"].map(list))
    again = trace_prompts(tiny_gpt2, batch, roots, replace(LEVEL, share=0.5), folder=tmp_path)
    assert len(again.edges) < len(whole.edges)  # other settings, another run
    assert calls[9:] == list(range(8))


def test_support_lists_are_those_of_the_contributions(tiny_gpt2, batch):
    traced = trace(run(tiny_gpt2, batch), roots_of(tiny_gpt2, batch), LEVEL)
    ran = run(tiny_gpt2, batch)
    pairs = find_firings(ran, LEVEL.level)
    support = contributions(ran, pairs, LEVEL).support
    where = (
        pairs.table()
        .reset_index()
        .merge(traced.firings, on=["prompt", "layer", "head", "dest", "src"], suffixes=("", "_t"))
    )
    assert len(where) == len(traced.firings)
    for row in where.itertuples():
        assert list(row.vectors) == support[row.index].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("roots", "message"),
    [
        ([], "at least one root"),
        ([Root(3, 0)], "3.0:end is no head of tiny-gpt2, which has 3 layers of 4 heads"),
        ([Root(2, 1, 0)], r"never fires on these prompts \(.* at least 0.15\): 2.1:0"),
    ],
)
def test_roots_that_cannot_be_traced_say_why(tiny_gpt2, batch, roots, message):
    with pytest.raises(TraceError, match=message):
        trace(run(tiny_gpt2, batch), roots, LEVEL)


def test_each_root_must_fire_not_its_head_alone(tiny_gpt2, batch):
    root = roots_of(tiny_gpt2, batch)[0]
    silent = replace(root, dest=0)  # the first token sees no other
    ran = run(tiny_gpt2, batch)
    with pytest.warns(TraceWarning, match=rf"never fires .*: {silent}; choose"):
        both = trace(ran, [root, silent], LEVEL)
    alone = trace(ran, [root], LEVEL)
    pd.testing.assert_frame_equal(both.edges, alone.edges)
    fired = set(alone.firings.loc[alone.firings["root"], "prompt"])
    assert both.silent() == [(root, sorted(set(range(8)) - fired)), (silent, list(range(8)))]


def test_unknown_role_says_which_there_are(tiny_gpt2, batch):
    with pytest.raises(PromptError, match="no role 'IO' in these prompts: they have end alone"):
        trace(run(tiny_gpt2, batch), [Root(2, 0, src="IO")], LEVEL)


@pytest.fixture(scope="module")
def ioi():
    model = load_model("gpt2-ioi", device="cpu", dtype=torch.float64)
    table = ioi_prompts(24, seed=4, tokenizer=model.tokenizer)
    batch = encode(model, table)
    return model, batch


def test_roots_by_attribution_are_the_heads_that_write_the_answer(ioi):
    model, batch = ioi
    roots = strongest_roots(model, batch, 3)
    written = HEADS.sort_values("direct attribution", ascending=False)["head"]
    assert {root.name for root in roots} <= set(written[:6])
    assert len(roots) == 3


def test_roots_of_each_prompt_are_the_heads_that_write_most_there(ioi):
    model, batch = ioi
    ran = run(model, batch)
    shares = logit_attribution(ran)[0][:, model.is_head]
    pairs = find_firings(ran)
    expected = set()
    for prompt in range(24):
        fires = {
            (row.layer, row.head)
            for row in pairs.table().itertuples()
            if row.prompt == prompt and row.dest == batch.last[prompt]
        }
        own = {(x, y): shares[prompt, x * model.n_heads + y].item() for x, y in fires}
        best = sorted(own, key=lambda head: -own[head])[:2]
        expected |= {(*head, prompt) for head in best if own[head] > 0}
    roots = strongest_roots(model, batch, 2, each=True)
    assert {(root.layer, root.head, n) for root in roots for n in root.prompts} == expected
    sizes = [len(root.prompts) for root in roots]
    assert sizes == sorted(sizes, reverse=True) and len(roots) > 2
    assert str(roots[0]) == f"{roots[0].name}:end on {sizes[0]} prompts"


def test_a_root_of_some_prompts_starts_there_alone_whatever_the_chunks(ioi, monkeypatch):
    model, batch = ioi
    roots = strongest_roots(model, batch, 1, each=True)
    whole = trace(run(model, batch), roots)
    first = whole.firings[whole.firings["root"]]
    found = {(row.layer, row.head, row.prompt) for row in first.itertuples()}
    assert found == {(root.layer, root.head, n) for root in roots for n in root.prompts}
    assert whole.untraced() == [] and all(not missing for _, missing in whole.silent())
    monkeypatch.setattr(core_run, "CHUNK_PROMPTS", 5)
    parts = trace_prompts(model, batch, roots)
    ours, theirs = (t.edges[PLACE].astype(str).sort_values(PLACE) for t in (whole, parts))
    assert (ours.to_numpy() == theirs.to_numpy()).all()
    assert whole.first(3).roots[0].prompts == tuple(n for n in roots[0].prompts if n < 3)


def test_prompts_without_a_root_are_named(tiny_gpt2, batch):
    root = roots_of(tiny_gpt2, batch, 1)[0]
    traced = trace(run(tiny_gpt2, batch), [root], LEVEL)
    seen = set(traced.firings.loc[traced.firings["root"], "prompt"])
    assert 0 < len(seen) < 8
    assert traced.untraced() == sorted(set(range(8)) - seen) == traced.silent()[0][1]


@pytest.mark.parametrize("fraction", [1.0, None])
def test_only_firings_that_are_reached_are_opened(model, batch, monkeypatch, fraction):
    settings, opened, real = replace(LEVEL, fraction=fraction), [], contributions

    def counting(run, pairs, *rest):
        opened.append(len(pairs))
        return real(run, pairs, *rest)

    monkeypatch.setattr(tracing, "contributions", counting)
    firings = trace(run(model, batch), roots_of(model, batch), settings).firings
    assert sum(opened) == len(firings) < len(find_firings(run(model, batch), LEVEL.level))


def test_a_role_restricts_the_firings_of_a_root(ioi):
    model, batch = ioi
    traced = trace(run(model, batch), [root_of(MOVERS[0], "end", "IO")])
    first = traced.firings[traced.firings["root"]]
    assert len(first) > 5 and (first["name"] == MOVERS[0]).all()
    assert (first["src"].to_numpy() == batch.roles["IO"].numpy()[first["prompt"]]).all()
    assert traced.firings["error"].max() < 1e-9


def test_a_contrast_opens_the_roots_by_a_difference_and_nothing_else(ioi):
    model, batch = ioi
    plain = trace(run(model, batch), [root_of(MOVERS[0], "end", "IO")])
    sharp = trace(run(model, batch), [root_of(MOVERS[0], "end", "IO", "S1")])
    assert sharp.firings["error"].max() < 1e-9
    ours, theirs = (t.firings[t.firings["root"]] for t in (plain, sharp))
    assert (ours[["prompt", "src"]].to_numpy() == theirs[["prompt", "src"]].to_numpy()).all()
    top = sharp.edges[(sharp.edges["downstream"] == MOVERS[0]) & (sharp.edges["side"] == "dest")]
    # on the model card, ablating the carriers makes the movers blind to the difference
    assert set(top["upstream"].value_counts().index[:2]) <= set(CARRIERS)
    below = [
        t.edges[t.edges["layer"] == 0].groupby(PLACE)["weight"].first() for t in (plain, sharp)
    ]
    common = below[0].index.intersection(below[1].index)
    assert len(common) > 10
    assert np.allclose(below[0][common], below[1][common], rtol=1e-12, atol=0)


def test_a_contrast_follows_one_side_and_only_where_it_is_positive(ioi):
    model, batch = ioi
    settings = Settings(level=0.1)
    traced = trace(run(model, batch), [root_of(MOVERS[0], "end", "IO", "S1")], settings)
    edges, firings = traced.edges, traced.firings
    first = firings[firings["root"]]
    into = edges[edges["firing"].isin(first["firing"])]
    assert set(into["side"]) == {"dest"} and (into["share"] > 0).all()
    plain = trace(run(model, batch), [root_of(MOVERS[0], "end", "IO")], settings).firings
    assert 0 < len(first) < plain["root"].sum()  # in some prompts it prefers the subject


@pytest.mark.parametrize(
    ("root", "settings", "message"),
    [
        (
            root_of(MOVERS[0], "end", "IO", "S1"),
            Settings(weighting="published"),
            "only the exact weighting",
        ),
        (root_of(MOVERS[0], "end", "IO", "IO"), Settings(), "compares a source with itself"),
    ],
)
def test_contrasts_that_make_no_sense_are_refused(ioi, root, settings, message):
    model, batch = ioi
    with pytest.raises(TraceError, match=message):
        trace(run(model, batch), [root], settings)


def test_places_are_roles_their_neighbours_and_positions(ioi):
    _, batch = ioi
    assert torch.equal(position_of(batch, "S2-1"), batch.roles["S2"] - 1)
    assert torch.equal(position_of(batch, "S1+1"), batch.roles["S1+1"])
    assert (position_of(batch, 3) == 3).all()
    with pytest.raises(PromptError, match="no position 99: the longest prompt has"):
        position_of(batch, 99)
    with pytest.raises(PromptError, match="no role 'IX-1'"):
        position_of(batch, "IX-1")


def test_another_basis_is_another_run(tiny_gpt2, batch, tmp_path):
    roots = roots_of(tiny_gpt2, batch)
    one = trace_prompts(tiny_gpt2, batch, roots, LEVEL, folder=tmp_path).edges
    turned = replace(LEVEL, fraction=1.0, turn=0)
    other = trace_prompts(tiny_gpt2, batch, roots, turned, folder=tmp_path).edges
    assert len(list(tmp_path.iterdir())) == 2 and not one["weight"].equals(other["weight"])


def test_roots_are_written_as_the_command_line_takes_them():
    assert str(Root(9, 6)) == "9.6:end" and str(Root(9, 6, "end", "IO", "S1")) == "9.6:end:IO:S1"


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "table.txt"
    path.write_text("old")

    def fail():
        with atomic(path) as aside:
            aside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic(path) as aside:
        aside.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_runs_are_named_by_their_content(tiny_gpt2, tiny_llama, batch):
    one = run_key(tiny_gpt2, batch, "a")
    other = replace(batch, tokens=batch.tokens + 1)
    keys = [run_key(tiny_gpt2, batch, "b"), run_key(tiny_llama, batch, "a"),
            run_key(tiny_gpt2, other, "a")]  # fmt: skip
    assert one == run_key(tiny_gpt2, batch, "a") and one not in keys


@pytest.mark.parametrize(
    ("share", "kept"),
    [(0.5, [1, 0, 0, 0]), (0.6, [1, 0, 1, 0]), (0.9, [1, 0, 1, 0]), (0.95, [1, 1, 1, 0])],
)
def test_a_side_keeps_the_fewest_that_exceed_the_share(share, kept):
    """Of 0.6, 0.15, 0.35 and −0.1, which sum to 1: reaching a share is not exceeding it."""
    values = torch.tensor([0.6, 0.15, 0.35, -0.1], dtype=torch.float64).expand(1, 2, 4)
    every = torch.ones(1, 2, dtype=torch.bool)
    parts = Contributions(values, values.sum(-1)[:, 0], every, every)
    found = kept_components(parts, Settings(share=share))
    assert found[0].int().tolist() == [kept, kept]


def test_neighbours_of_a_role_stay_inside(batch):
    end, last = batch.mask.sum(1) - 1, batch.tokens.shape[1] - 1
    assert position_of(batch, "end-1").tolist() == (end - 1).tolist()
    assert position_of(batch, "end+2").tolist() == (end + 2).clamp(max=last).tolist()
    assert position_of(batch, "end-99").tolist() == [0] * len(end)


def test_a_pair_is_named_by_a_root_with_a_source(model, batch):
    with pytest.raises(ValueError, match=r"root 2\.1:4 names no source: give its src"):
        pairs_named(run(model, batch), Root(2, 1, DEST))
