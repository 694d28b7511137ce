"""Chapter 4: what a trace must be compared with: other settings, other prompts, and ablation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparse_signals.core.forward import forward
from sparse_signals.core.model import Model
from sparse_signals.core.numbers import interval
from sparse_signals.core.objective import Objective
from sparse_signals.core.prompts import Batch, roles_of
from sparse_signals.core.run import CHUNK_BYTES, Run, fitting_rows
from sparse_signals.core.stats import (
    DRAWS,
    bootstrap,
    bounds,
    false_discovery,
    resample,
    sign_flip,
)
from sparse_signals.heads.protagonist import template_of
from sparse_signals.signals.firings import Pairs
from sparse_signals.tracing.circuit import KEY, Quirks, labelled, pool
from sparse_signals.tracing.contributions import SIDES, Contributions, Settings, contributions
from sparse_signals.tracing.roots import Root
from sparse_signals.tracing.trace import Trace, kept_components, trace_chunk

PLACE = ["upstream", "downstream", "side", "dest", "src"]
VARIED = {
    "level": (0.3, 0.5, 0.7, 0.9),
    "share": (0.3, 0.5, 0.7, 0.8, 0.9),
    "fraction": (0.4, 0.7, 1.0),
}
ALIKE = 0.05  # overlaps that differ by less than this count as alike
ALPHA = 0.05  # the false-discovery rate at which an effect counts
ABLATED = ("F", "P", "top1")


def kind_shares(run: Run, pairs: Pairs, parts: Contributions) -> pd.DataFrame:
    """How much of a score each kind of component carries: mean share of a side, by layer.

    One row per layer, side and kind: firings, share and its 95 % interval over templates. The
    shares of a side sum to 1; some are negative.
    """
    kinds, templates = run.model.components["kind"], template_of(run.batch)
    shares = (parts.values / parts.total[:, None, None]).cpu().numpy()
    layer, prompt = pairs.layer.cpu().numpy(), pairs.prompt.cpu().numpy()
    rows = []
    for number in np.unique(layer):
        for side, name in enumerate(SIDES):
            here = shares[layer == number, side]
            table = pd.DataFrame({k: here[:, kinds == k].sum(1) for k in kinds.unique()})
            found = bootstrap(table, templates[prompt[layer == number]])
            found = found.rename(columns={"measure": "kind"})
            rows.append(found.assign(layer=number, side=name, firings=len(here)))
    return pd.concat(rows, ignore_index=True).rename(columns={"value": "share"})


@dataclass(frozen=True)
class Lead:
    """The component with the largest mean, and how far it is ahead of the best of all others.

    `low` and `high` bound the lead, 95 %, templates resampled.
    """

    component: str
    value: float
    runner_up: str
    lead: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether it leads in 97.5 % of the draws, so that there is no tie."""
        return self.low > 0

    @property
    def verdict(self) -> str:
        """The component and its lead in words, to be the subject of a sentence and its verb."""
        lead = interval(self.lead, self.low, self.high)
        if self.is_clear:
            return f"{self.component} contributes most, {lead} more than {self.runner_up}"
        ahead = f"{self.component} is ahead of {self.runner_up} by {lead}"
        return f"no component is clearly first: {ahead}"


def component_means(
    run: Run, pairs: Pairs, parts: Contributions, side: str = "dest"
) -> tuple[pd.DataFrame, Lead]:
    """What every component contributes to one side of some pairs on average, and who is ahead.

    One row per component: component, value (softmax units), low, high (95 % over templates). In
    every sample of templates the lead of the first is over the best of all others.
    """
    clusters = template_of(run.batch)[pairs.prompt.cpu().numpy()]
    values = parts.values[:, SIDES.index(side)].cpu().numpy()
    table = pd.DataFrame(values, columns=run.model.components["component"])
    found = bootstrap(table, clusters).rename(columns={"measure": "component"})
    names, cluster = np.unique(clusters, return_inverse=True)
    sums = pd.DataFrame(values).groupby(cluster).sum().to_numpy()
    times = resample(len(names))
    means = (times @ sums) / (times @ np.bincount(cluster))[:, None]
    second, first = means[0].argsort(kind="stable")[-2:]
    leads = means[:, first] - np.delete(means, first, axis=1).max(1)
    low, high = (float(x) for x in bounds(leads[1:]))
    labels = found["component"]
    return found, Lead(
        labels[first], float(means[0, first]), labels[second], float(leads[0]), low, high
    )


def opened_firing(run: Run, pair: Pairs, settings: Settings = Settings()) -> pd.DataFrame:
    """One firing opened: what every component contributes, over the support and over all slices.

    One row per component, side and slices: weight, and whether the trace keeps the component.
    """
    tables = []
    kept = kept_components(contributions(run, pair, settings), settings)[0].cpu().numpy()
    for slices, fraction in (("the support", settings.fraction or 1.0), ("all slices", None)):
        found = contributions(run, pair, replace(settings, fraction=fraction))
        for number, side in enumerate(SIDES):
            table = run.model.components[["component"]].assign(side=side, slices=slices)
            table["weight"] = found.values[0, number].cpu().numpy()
            tables.append(table.assign(kept=kept[number])[table["weight"] != 0])
    return pd.concat(tables, ignore_index=True)


# --- other settings ------------------------------------------------------------------------------


def overlap(ours: pd.DataFrame, theirs: pd.DataFrame, prompts: int) -> Float[np.ndarray, "prompt"]:
    """|A ∩ B| / |A ∪ B| of the edges of two traces, prompt by prompt (NaN where both are empty)."""
    keys = ["prompt", *PLACE]
    both = ours[keys].merge(theirs[keys], on=keys, how="outer", indicator=True)
    shared = np.bincount(both.loc[both["_merge"] == "both", "prompt"], minlength=prompts)
    either = np.bincount(both["prompt"], minlength=prompts)
    return np.divide(shared, either, out=np.full(prompts, np.nan), where=either > 0)


def sensitivity(run: Run, roots: Sequence[Root], base: Settings = Settings()) -> pd.DataFrame:
    """How the edges of a trace change with each setting, the others as in `base`.

    One row per setting and value: overlap with the trace of `base` (mean over prompts; low, high:
    95 % over templates) and the number of edges a prompt.
    """
    prompts = len(run)
    varied = [(name, x, replace(base, **{name: x})) for name, xs in VARIED.items() for x in xs]
    settings = [base, *(variant for _, _, variant in varied)]
    default, *others = _traced_edges(run, roots, settings)
    rows = []
    for (name, value, _), edges in zip(varied, others, strict=True):
        same = pd.DataFrame({"overlap": overlap(default, edges, prompts)})
        found = bootstrap(same, template_of(run.batch))
        each = len(edges) / prompts
        rows.append(found.assign(setting=name, x=value, edges=each, weighting=base.weighting))
    return pd.concat(rows, ignore_index=True).drop(columns="measure")


def nearer(gap: Float[np.ndarray, "prompt"], batch: Batch) -> tuple[str, str]:
    """Whether one overlap is larger than another, in a word, and their difference for people.

    gap: the difference in every prompt. Its 95 % interval resamples templates. What lies within
    `ALIKE` of 0 is called as near, whichever its sign.
    """
    row = bootstrap(pd.DataFrame({"gap": gap}), template_of(batch)).iloc[0]
    low, high = row["low"], row["high"]
    if low > -ALIKE and high < ALIKE:
        word = "as near"
    elif low > 0:
        word = "nearer"
    else:
        word = "further" if high < 0 else "neither clearly nearer nor clearly further"
    return word, interval(row["value"], low, high)


def variants(run: Run, ways: dict[str, tuple[Sequence[Root], Settings]]) -> pd.DataFrame:
    """The same prompts traced in several ways; the first is what others are compared with.

    One row per way: way, traced (prompts on which a root fires), edges (per prompt), overlap (with
    the edges of the first way, mean over prompts, and its 95 % interval over templates, in words)
    and against (the share of edges whose weight is negative).
    """
    rows, first = [], None
    for way, (roots, settings) in ways.items():
        edges = _traced_edges(run, roots, [settings])[0]
        first = edges if first is None else first
        same = pd.DataFrame({"overlap": overlap(first, edges, len(run))})
        found = bootstrap(same, template_of(run.batch)).iloc[0]
        alike = interval(found["value"], found["low"], found["high"])
        against = float((edges["weight"] < 0).mean())
        rows.append((way, edges["prompt"].nunique(), len(edges) / len(run), alike, against))
    return pd.DataFrame(rows, columns=["way", "traced", "edges", "overlap", "against"])


def _traced_edges(
    run: Run, roots: Sequence[Root], settings: Sequence[Settings]
) -> list[pd.DataFrame]:
    """The edges of the trace with each of the settings, with one run of the model for all."""
    edges: list[list[pd.DataFrame]] = [[] for _ in settings]
    for rows, part in run.chunks():
        for one, found in zip(settings, edges, strict=True):
            found.append(trace_chunk(part, roots, one, rows.start)[1])
    return [pd.concat(tables, ignore_index=True) for tables in edges]


def quirk_table(run: Run, roots: Sequence[Root]) -> pd.DataFrame:
    """The published way of tracing and pooling, and what each quirk of the released code changes.

    One row per quirk: edges of the pooled graph, overlap with the graph without quirks (edges with
    the same ends, side and roles), how many edges count more than all prompts, the largest count,
    and the mean weight.
    """
    plain = Settings.published()
    with_bias = replace(plain, bias_per_head=True)
    batch = run.batch
    clean, biased = _traced_edges(run, roots, [plain, with_bias])
    pooled = {"none": pool(clean, batch), "bias once per head": pool(biased, batch)}
    for name, quirk in {
        "a count per path": Quirks(double_count=True),
        "first writer names the edge": Quirks(first_writer=True),
        "one role a token": Quirks(last_role=True),
    }.items():
        pooled[name] = pool(clean, batch, quirk)
    every = Quirks(double_count=True, first_writer=True, last_role=True)
    pooled["all of them"] = pool(biased, batch, every)
    ours = _edge_keys(pooled["none"])
    rows = [
        (name, len(edges), len(ours & _edge_keys(edges)) / len(ours | _edge_keys(edges)),
         int((edges["prompts"] > edges["of"]).sum()), int(edges["prompts"].max()),
         float(edges["weight"].mean()))
        for name, edges in pooled.items()
    ]  # fmt: skip
    columns = ["quirk", "edges", "overlap", "above all prompts", "largest count", "mean weight"]
    return pd.DataFrame(rows, columns=columns)


def _edge_keys(edges: pd.DataFrame) -> set[tuple[str, ...]]:
    return set(edges[KEY].itertuples(index=False, name=None))


# --- other prompts -------------------------------------------------------------------------------


def incidence(edges: pd.DataFrame, batch: Batch) -> Bool[np.ndarray, "prompt edge"]:
    """Which prompts have which edge, edges told apart by their ends, side and roles."""
    table = labelled(edges, roles_of(batch))
    number = table.groupby(KEY).ngroup()
    found = np.zeros((len(batch.tokens), number.max() + 1), dtype=bool)
    found[table["prompt"], number] = True
    return found


def likeness(found: Bool[np.ndarray, "prompt edge"]) -> Float[np.ndarray, "prompt prompt"]:
    """Overlap |A ∩ B| / |A ∪ B| of the edges of every two prompts."""
    shared = found.astype(float) @ found.T.astype(float)
    size = found.sum(1)
    either = size[:, None] + size[None] - shared
    return np.divide(shared, either, out=np.zeros_like(shared), where=either > 0)


def prompt_likeness(edges: pd.DataFrame, batch: Batch) -> pd.DataFrame:
    """How alike the traces of two prompts are, by what the prompts have in common.

    One row per relation (order of names × template): mean overlap of the edges of two prompts,
    with a 95 % interval that resamples templates, and the number of pairs of prompts; and a last
    row, "gap", for the first relation less "other template, same order", where both are there.
    """
    alike, table, size = likeness(incidence(edges, batch)), batch.table, len(batch.tokens)
    names, cluster = np.unique(template_of(batch), return_inverse=True)
    member = np.eye(len(names))[cluster]
    times, order = resample(len(names)), table["order"].to_numpy()
    same_order, rows, samples = order[:, None] == order, [], {}
    for with_order in (True, False):
        pairs = (same_order == with_order) & ~np.eye(size, dtype=bool)
        sums = [member.T @ (pairs * x) @ member for x in (np.ones_like(alike), alike)]
        for with_template in (True, False):
            own = [x.diagonal() for x in sums]
            count, total = (
                times @ x if with_template else ((times @ (y - np.diag(x))) * times).sum(1)
                for x, y in zip(own, sums, strict=True)
            )
            words = ["same" if x else "other" for x in (with_template, with_order)]
            name = f"{words[0]} template, {words[1]} order"
            if not count[0]:
                continue
            ratio = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
            samples[name] = ratio
            rows.append((name, ratio[0], *bounds(ratio[1:]), int(count[0]) // 2))
    ends = [f"{word} template, same order" for word in ("same", "other")]
    if set(ends) <= set(samples):
        gap = samples[ends[0]] - samples[ends[1]]
        rows.append(("gap", gap[0], *bounds(gap[1:]), 0))
    return pd.DataFrame(rows, columns=["prompts", "overlap", "low", "high", "pairs"])


def top_edges_kept(
    edges: pd.DataFrame, batch: Batch, counts: Sequence[int], repeats: int = DRAWS
) -> pd.DataFrame:
    """Of the n commonest edges, the share that is among the n commonest of other templates.

    Each repeat splits the templates at random in two halves. One row per n: kept, low, high.
    """
    found, rng, rows = incidence(edges, batch), np.random.default_rng(0), []
    names, cluster = np.unique(template_of(batch), return_inverse=True)
    each = np.eye(len(names))[cluster].T @ found
    order = [rng.permutation(len(names)) for _ in range(repeats)]
    halves = [(each[o[: len(o) // 2]].sum(0), each[o[len(o) // 2 :]].sum(0)) for o in order]
    # ties are broken at random, in each half anew
    ranked = [tuple(np.lexsort((rng.random(len(half)), -half)) for half in pair) for pair in halves]
    for n in counts:
        kept = [len(np.intersect1d(a[:n], b[:n])) / n for a, b in ranked]
        rows.append((n, np.mean(kept), *np.quantile(kept, [0.025, 0.975])))
    return pd.DataFrame(rows, columns=["n", "kept", "low", "high"])


# --- ablation ------------------------------------------------------------------------------------


def ablation_effects(
    model: Model, batch: Batch, counterfactuals: Sequence[Batch], heads: Sequence[str]
) -> pd.DataFrame:
    """What the answer loses when a head writes what it writes elsewhere, one head at a time.

    At every token the head writes its mean over the counterfactuals of that prompt, which are
    aligned with it token by token. Effects are on F = logit(IO) − logit(S), on P(IO) and on
    whether IO comes first (top-1). One row per head: name; F, P, top1 (mean change), with _low and
    _high (95 % over templates); F_p (of the mean over templates, by flips of sign) and F_q (the
    false-discovery rate over these heads). Source: mean ablation over ABC prompts as in Wang et al.
    2023, section 2.1, of single heads and per prompt.
    """
    asked, pieces = Objective.of_names(batch), []
    for rows in fitting_rows(model, batch, CHUNK_BYTES // 2):
        others = [other.rows(rows) for other in counterfactuals]
        pieces.append(_ablated(model, batch.rows(rows), others, asked.rows(rows), heads))
    changes = torch.cat(pieces, dim=-1).cpu().numpy()
    table, clusters = pd.DataFrame({"name": list(heads)}), template_of(batch)
    for measure, values in zip(ABLATED, changes, strict=True):
        found = bootstrap(pd.DataFrame(values.T), clusters)
        for column, end in (("value", ""), ("low", "_low"), ("high", "_high")):
            table[measure + end] = found[column].to_numpy()
    means = pd.DataFrame(changes[0].T).groupby(clusters).mean().to_numpy().T
    table["F_p"] = sign_flip(means)
    return table.assign(F_q=false_discovery(table["F_p"].to_numpy()))


@torch.no_grad()
def _ablated(
    model: Model, batch: Batch, others: Sequence[Batch], asked: Objective, heads: Sequence[str]
) -> Float[Tensor, "measure head prompt"]:
    """Changes of F, P(IO) and top-1 without each head."""
    clean = forward(model, batch)
    gap = clean.run.z - sum(forward(model, other).run.z for other in others) / len(others)
    removed, before, changes = torch.zeros_like(clean.run.outputs), _told(clean.logits, asked), []
    components = model.components.set_index("component")[["layer", "head"]]
    for layer, head in components.loc[list(heads)].to_numpy().tolist():
        place = model.components_below(layer) + head
        removed[:, :, place] = gap[layer, :, head] @ model.writers.W_O[layer, head]
        found = forward(model, batch, removed=removed, known=(clean, layer))
        removed[:, :, place] = 0
        changes.append(_told(found.logits, asked) - before)
    return torch.stack(changes, dim=1)


def _told(logits: Float[Tensor, "prompt vocab"], asked: Objective) -> Float[Tensor, "3 prompt"]:
    first = asked.comes_first(logits).to(logits)
    return torch.stack([asked.value(logits), asked.probability(logits), first])


def effect_words(effect: pd.Series) -> str:
    """The three effects of an ablation, of a row of their table, each with its interval."""
    said = {"F": "logit difference", "P": "P(IO)", "top1": "top-1"}
    return ", ".join(
        f"{word} {interval(*effect[[name, f'{name}_low', f'{name}_high']])}"
        for name, word in said.items()
    )


def prominence(traced: Trace) -> pd.DataFrame:
    """In which share of the prompts each head is part of the trace. One row per head: name, share.

    A head is part of it as a firing that was reached, or as a component that was kept.
    """
    ends = [traced.firings[["prompt", "name"]],
            traced.edges[["prompt", "upstream"]].set_axis(["prompt", "name"], axis=1)]  # fmt: skip
    seen = pd.concat(ends).drop_duplicates()["name"].value_counts()
    components = traced.model.components
    names = components.loc[components["kind"] == "head", "component"].to_numpy()
    share = seen.reindex(names, fill_value=0).to_numpy() / len(traced.batch.tokens)
    return pd.DataFrame({"name": names, "share": share})
