"""What chapter 4 compares a trace with: known answers on small tables, identities on models."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from shipped import MOVERS, root_of
from sparse_signals.core.model import activations, load_model, logits
from sparse_signals.core.objective import Objective
from sparse_signals.core.prompts import encode, ioi_prompts
from sparse_signals.core.run import run
from sparse_signals.core.stats import rank_correlation
from sparse_signals.core.tasks import ioi_counterfactuals
from sparse_signals.planted.circuits import planted
from sparse_signals.signals.firings import find_firings
from sparse_signals.tracing import comparisons
from sparse_signals.tracing.comparisons import (
    ablation_effects,
    component_means,
    effect_words,
    kind_shares,
    likeness,
    nearer,
    opened_firing,
    overlap,
    prominence,
    prompt_likeness,
    quirk_table,
    sensitivity,
    top_edges_kept,
    variants,
)
from sparse_signals.tracing.contributions import Settings, contributions
from sparse_signals.tracing.roots import Root
from sparse_signals.tracing.trace import kept_components, trace

PLACE = ["prompt", *comparisons.PLACE]
SUPPORT = Settings(fraction=1.0)


@pytest.fixture(scope="module")
def ioi():
    model = load_model("gpt2-ioi", device="cpu", dtype=torch.float64)
    table = ioi_prompts(12, seed=4, tokenizer=model.tokenizer)
    return run(model, encode(model, table))


@pytest.fixture(scope="module")
def opened(ioi):
    pairs = find_firings(ioi)
    return pairs, contributions(ioi, pairs, SUPPORT)


ROOTS = [root_of(head, "end", "IO") for head in MOVERS]


def rows(*edges):
    return pd.DataFrame(edges, columns=PLACE)


def test_overlap_is_shared_over_all_edges_prompt_by_prompt():
    one = rows((0, "0.1", "1.0", "dest", 4, 1), (0, "0.2", "1.0", "dest", 4, 1),
               (1, "0.1", "1.0", "dest", 4, 1))  # fmt: skip
    other = rows((0, "0.1", "1.0", "dest", 4, 1), (1, "0.1", "1.0", "src", 4, 1))
    found = overlap(one, other, 3)
    assert found[:2].tolist() == [0.5, 0.0] and np.isnan(found[2])


def test_shares_of_the_kinds_sum_to_one(ioi, opened):
    pairs, parts = opened
    table = kind_shares(ioi, pairs, parts)
    sums = table.groupby(["layer", "side"])["share"].sum()
    assert np.allclose(sums, 1) and len(sums) == 8
    first = table[table["layer"] == 0].set_index(["side", "kind"])["share"]
    assert (first.xs("head", level="kind") == 0).all()  # nothing is upstream of layer 0 but …
    assert first["dest", "embedding"] > 0.5
    assert ((table["low"] <= table["share"]) & (table["share"] <= table["high"])).all()


def test_component_means_sum_to_the_mean_total_and_the_first_leads(ioi, opened):
    pairs, parts = opened
    table, lead = component_means(ioi, pairs, parts, "src")
    value = table.set_index("component")["value"]
    place = list(ioi.model.components["component"]).index("0.1")
    assert value["0.1"] == pytest.approx(float(parts.values[:, 1, place].mean()))
    assert value.sum() == pytest.approx(float(parts.total.mean()))
    first, second = value.nlargest(2).items()
    assert (lead.component, lead.runner_up) == (first[0], second[0])
    assert lead.lead == pytest.approx(first[1] - second[1]) and lead.low <= lead.lead <= lead.high


def test_a_component_leads_only_where_the_templates_agree(ioi, opened):
    pairs, parts = opened
    own = pairs[:1], parts[torch.tensor([0])]
    clear = component_means(ioi, *own)[1]  # one template: no draw differs
    assert clear.is_clear and clear.verdict.startswith(f"{clear.component} contributes most")
    values = torch.zeros_like(parts.values)
    values[:, 0, 0] = 1.0
    turns = ioi.batch.table["template"].to_numpy()[pairs.prompt.numpy()]
    one = torch.tensor(turns == turns[0]).double()
    values[:, 0, 1] = 0.9 * one / one.mean()  # nearly as much, on one template alone
    tie = component_means(ioi, pairs, replace(parts, values=values))[1]
    assert not tie.is_clear and tie.verdict.startswith("no component is clearly first")


def test_a_firing_opened_adds_up_over_support_and_over_all_slices(ioi, opened):
    pairs, parts = opened
    n = int((pairs.layer == 2).nonzero()[0])
    table = opened_firing(ioi, pairs[n : n + 1], SUPPORT)
    sums = table.groupby(["slices", "side"])["weight"].sum()
    assert np.allclose(sums["the support"], float(parts.total[n]))
    assert np.allclose(sums["all slices"], float(pairs.score[n]))
    kept = kept_components(parts, SUPPORT)[n].sum()
    assert table[table["slices"] == "the support"]["kept"].sum() == int(kept)


def test_sensitivity_is_one_at_the_default_and_below_elsewhere(ioi, monkeypatch):
    monkeypatch.setattr(comparisons, "VARIED", {"share": (0.5, 0.7, 0.9), "level": (0.5, 0.9)})
    table = sensitivity(ioi, ROOTS)
    table = table.set_index(["setting", "x"])
    assert table.loc[("share", 0.7), "value"] == table.loc[("level", 0.5), "value"] == 1
    assert table.loc[("share", 0.5), "value"] < 1 and table.loc[("level", 0.9), "value"] < 1
    edges = table.loc["share", "edges"]
    assert edges[0.5] < edges[0.7] < edges[0.9]


@pytest.mark.parametrize(("gap", "word"), [
    (0.01, "as near"), (0.2, "nearer"), (-0.2, "further"),
])  # fmt: skip
def test_overlaps_within_the_margin_are_alike(ioi, gap, word):
    assert nearer(np.full(12, gap), ioi.batch)[0] == word
    one = np.where(ioi.batch.table["template"] == ioi.batch.table["template"][0], 3.0, -0.3)
    assert nearer(one, ioi.batch)[0] == "neither clearly nearer nor clearly further"


def test_variants_are_compared_with_the_first_and_the_answer_hears_some_edges_as_negative(ioi):
    whole, heard = Settings(), Settings(weighting="answer")
    table = variants(ioi, {"all": (ROOTS, whole), "heard": (ROOTS, heard), "cut": (ROOTS, SUPPORT)})
    table = table.set_index("way")
    assert table.loc["heard", "overlap"] == table.loc["all", "overlap"] == "1.00 [1.00, 1.00]"
    assert not table.loc["cut", "overlap"].startswith("1.00")
    assert table.loc["all", "against"] == 0 < table.loc["heard", "against"] < 1
    edges = trace(ioi, ROOTS).edges
    assert table.loc["all", "edges"] == pytest.approx(len(edges) / 12)


def test_quirks_overcount_where_paths_are_redundant():
    two = planted("redundant")
    roots = [Root(2, 0, "end", "IO"), Root(3, 0, "end", "IO")]
    table = quirk_table(run(two.model, two.batch), roots)
    table = table.set_index("quirk")
    prompts_ = len(two.batch.tokens)
    assert table.loc["none", "largest count"] == prompts_
    assert table.loc["none", "above all prompts"] == 0
    # two movers hear each of the two inhibition heads: two paths, but for the first prompt
    assert table.loc["a count per path", "largest count"] == 1 + 2 * (prompts_ - 1)
    assert table.loc["none", "overlap"] == 1


def test_likeness_of_known_prompts():
    found = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 0]], dtype=bool)
    alike = likeness(found)
    assert alike[0, 2] == alike[1, 1] == 1 and alike[0, 1] == pytest.approx(1 / 3)


def test_prompts_alike_in_template_have_likelier_traces(ioi):
    batch = ioi.batch
    # edges that depend on the template alone
    table = pd.DataFrame({"prompt": range(12), "firing": range(12), "downstream": "1.0",
                          "side": "dest", "dest": batch.roles["end"], "src": batch.roles["IO"],
                          "upstream": "MLP " + batch.table["template"].astype(str)})  # fmt: skip
    found = prompt_likeness(table, batch).set_index("prompts")
    assert found.loc["other template, same order", "overlap"] == 0
    if "gap" in found.index:
        assert found.loc["gap", "overlap"] == 1
    same = found.loc[[name for name in found.index if name.startswith("same template")]]
    assert (same.loc[same["pairs"] > 0, "overlap"] == 1).all() and same["pairs"].sum() > 0


def test_commonest_edges_are_found_again_when_all_prompts_agree(ioi):
    batch, edges = ioi.batch, trace(ioi, ROOTS).edges
    kept = top_edges_kept(edges, batch, [3, 8], repeats=20)
    assert ((kept["low"] <= kept["kept"]) & (kept["kept"] <= kept["high"])).all()
    single = edges[edges["prompt"] == edges["prompt"].mode()[0]]
    single = single.drop_duplicates(["upstream", "downstream", "side"]).head(3)
    agreed = pd.concat([single.assign(prompt=n, dest=0, src=0) for n in range(12)])
    assert (top_edges_kept(agreed, batch, [3], repeats=5)["kept"] == 1).all()


def test_ablation_equals_a_head_overwritten_by_hand(ioi):
    model, batch = ioi.model, ioi.batch
    names = sorted({*batch.table["io"], *batch.table["s"]})
    texts = [ioi_counterfactuals(batch.table, "abc", seed, names=names) for seed in range(2)]
    others = [encode(model, text) for text in texts]
    heads = ["0.0", "1.3", "3.5"]
    table = ablation_effects(model, batch, others, heads).set_index("name")
    mean = sum(activations(model, x.tokens, ("z",))["z"][1, :, 3] for x in others) / 2

    def by_hand(value, hook):
        value[:, :, 3] = mean
        return value

    told = []
    asked = Objective.of_names(batch)
    for hooks in ((), [("blocks.1.attn.hook_z", by_hand)]):
        out = logits(model, batch.tokens, batch.last, hooks)
        first = asked.comes_first(out).double()
        told.append([x.mean().item() for x in (asked.value(out), asked.probability(out), first)])
    change = np.subtract(told[1], told[0])
    assert table.loc["1.3", ["F", "P", "top1"]].tolist() == pytest.approx(change.tolist())
    assert table.index.tolist() == heads and abs(change[0]) > 0.1
    for name in ("F", "P", "top1"):
        assert (table[f"{name}_low"] <= table[name]).all()
        assert (table[name] <= table[f"{name}_high"]).all()
    assert (table["F_q"] >= table["F_p"]).all() and table["F_p"].min() < 0.05
    said = effect_words(table.loc["1.3"])
    assert [part.split(" ")[0] for part in said.split("], ")] == ["logit", "P(IO)", "top-1"]


def test_prominence_counts_prompts_with_the_head_at_either_end(ioi):
    traced = trace(ioi, ROOTS)
    table = prominence(traced).set_index("name")["share"]
    edges = traced.edges
    as_end = set(edges.loc[edges["upstream"] == "0.2", "prompt"])
    as_end |= set(traced.firings.loc[traced.firings["name"] == "0.2", "prompt"])
    assert table["0.2"] == len(as_end) / 12 > 0
    idle = set(table.index) - {*edges["upstream"], *traced.firings["name"]}
    assert idle and (table[list(idle)] == 0).all() and len(table) == 24


def test_rank_correlation_of_known_orders():
    x, one = np.arange(12.0), np.zeros(12)
    found = rank_correlation(x, x**3, one)
    assert found["rho"] == pytest.approx(1) and abs(found["chance"]) < 0.05 and found["p"] < 0.01
    assert rank_correlation(x, -x, one)["rho"] == pytest.approx(-1)
    shuffled = np.random.default_rng(0).permutation(x)
    assert rank_correlation(x, shuffled, one)["p"] > 0.05


def test_rank_correlation_of_groups_alone_is_chance():
    layer = np.repeat([0, 1], 6)
    x = np.r_[0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15.0]
    y = np.r_[3, 0, 4, 1, 5, 2, 12, 15, 10, 13, 11, 14.0]  # only the layers agree
    found = rank_correlation(x, y, layer)
    assert found["rho"] > 0.7 and found["chance"] > 0.7 and found["p"] > 0.2
    assert rank_correlation(x, y, np.zeros(12))["p"] < 0.01


def test_all_slices_are_kept_without_a_filter(ioi, opened):
    pairs, _ = opened
    whole = contributions(ioi, pairs, replace(Settings(), fraction=None))
    torch.testing.assert_close(whole.total, pairs.score)
    torch.testing.assert_close(whole.values.sum(-1)[:, 0], pairs.score)
