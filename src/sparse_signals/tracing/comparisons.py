"""Chapter 4: what a trace must be compared with: other settings, other prompts, and ablation."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from sparse_signals.core.forward import logit_difference
from sparse_signals.core.model import Model, activations, head_name
from sparse_signals.core.prompts import Batch, roles_of
from sparse_signals.core.run import Run
from sparse_signals.core.stats import DRAWS, bootstrap, bounds, resample
from sparse_signals.signals.firings import Pairs
from sparse_signals.tracing.circuit import KEY, Quirks, labelled, pool
from sparse_signals.tracing.contributions import SIDES, Contributions, Settings, contributions
from sparse_signals.tracing.roots import Root
from sparse_signals.tracing.trace import Trace, kept_components, trace_chunk

PLACE = ["upstream", "downstream", "side", "dest", "src"]
VARIED = {
    "level": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "share": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "fraction": (0.4, 0.55, 0.7, 0.85, 1.0),
}


def kind_shares(model: Model, pairs: Pairs, parts: Contributions) -> pd.DataFrame:
    """How much of a score each kind of component carries: mean share of a side, by layer.

    One row per layer, side and kind: firings, share and its 95 % interval over prompts. The
    shares of a side sum to 1; some are negative.
    """
    kinds = model.components["kind"]
    shares = (parts.values / parts.total[:, None, None]).cpu().numpy()
    layer, prompt = pairs.layer.cpu().numpy(), pairs.prompt.cpu().numpy()
    rows = []
    for number in np.unique(layer):
        for side, name in enumerate(SIDES):
            here = shares[layer == number, side]
            table = pd.DataFrame({k: here[:, kinds == k].sum(1) for k in kinds.unique()})
            found = bootstrap(table, prompt[layer == number]).rename(columns={"measure": "kind"})
            rows.append(found.assign(layer=number, side=name, firings=len(here)))
    return pd.concat(rows, ignore_index=True).rename(columns={"value": "share"})


def component_shares(
    model: Model, pairs: Pairs, parts: Contributions, side: str = "dest"
) -> pd.DataFrame:
    """Mean share of every component in one side of some firings, with its interval over prompts.

    One row per component: share = mean contribution / mean total, low, high.
    """
    values = parts.values[:, SIDES.index(side)] / parts.total.mean()
    table = pd.DataFrame(values.cpu().numpy(), columns=model.components["component"])
    found = bootstrap(table, pairs.prompt.cpu().numpy())
    return found.rename(columns={"measure": "component", "value": "share"})


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

    One row per setting and value: overlap with the trace of `base` (mean over prompts, low, high)
    and the number of edges a prompt.
    """
    prompts = len(run)
    varied = [(name, x, replace(base, **{name: x})) for name, xs in VARIED.items() for x in xs]
    settings = [base, *(variant for _, _, variant in varied)]
    default, *others = _traced_edges(run, roots, settings)
    rows = []
    for (name, value, _), edges in zip(varied, others, strict=True):
        same = pd.DataFrame({"overlap": overlap(default, edges, prompts)})
        found = bootstrap(same, np.arange(prompts))
        each = len(edges) / prompts
        rows.append(found.assign(setting=name, x=value, edges=each, weighting=base.weighting))
    return pd.concat(rows, ignore_index=True).drop(columns="measure")


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


def prompt_likeness(edges: pd.DataFrame, batch: Batch, draws: int = DRAWS) -> pd.DataFrame:
    """How alike the traces of two prompts are, by what the prompts have in common.

    One row per relation (order of names × template): mean overlap of the edges of two prompts,
    with a 95 % interval that resamples prompts, and the number of pairs of prompts.
    """
    alike, table, size = likeness(incidence(edges, batch)), batch.table, len(batch.tokens)
    order, template = (table[c].to_numpy() for c in ("order", "template"))
    same = {"order": order[:, None] == order, "template": template[:, None] == template}
    drawn = resample(size, draws)
    rows = []
    for with_order in (True, False):
        for with_template in (True, False):
            pairs = (same["order"] == with_order) & (same["template"] == with_template)
            pairs &= ~np.eye(size, dtype=bool)
            times, total = ((drawn @ x * drawn).sum(1) for x in (pairs, pairs * alike))
            if not pairs.any():
                continue
            ratio = np.divide(total, times, out=np.full(len(drawn), np.nan), where=times > 0)
            low, high = bounds(ratio[1:])
            words = ["same" if x else "other" for x in (with_template, with_order)]
            name = f"{words[0]} template, {words[1]} order"
            rows.append((name, ratio[0], low, high, int(pairs.sum()) // 2))
    return pd.DataFrame(rows, columns=["prompts", "overlap", "low", "high", "pairs"])


def top_edges_kept(
    edges: pd.DataFrame, batch: Batch, counts: Sequence[int], repeats: int = 200
) -> pd.DataFrame:
    """Of the n commonest edges, the share that is among the n commonest of other prompts.

    Each repeat splits the prompts at random in two halves. One row per n: kept, low, high.
    """
    found = incidence(edges, batch)
    rng, rows = np.random.default_rng(0), []
    order = [rng.permutation(len(found)) for _ in range(repeats)]
    halves = [(found[o[: len(o) // 2]].mean(0), found[o[len(o) // 2 :]].mean(0)) for o in order]
    # ties are broken at random, in each half anew
    ranked = [tuple(np.lexsort((rng.random(len(half)), -half)) for half in pair) for pair in halves]
    for n in counts:
        kept = [len(np.intersect1d(a[:n], b[:n])) / n for a, b in ranked]
        rows.append((n, np.mean(kept), *np.quantile(kept, [0.025, 0.975])))
    return pd.DataFrame(rows, columns=["n", "kept", "low", "high"])


# --- ablation ------------------------------------------------------------------------------------


def ablation_effects(model: Model, batch: Batch) -> pd.DataFrame:
    """Change of logit(IO) − logit(S) when a head writes its mean instead, one head at a time.

    The mean is over prompts and real tokens. One row per head: name, effect (mean change), low,
    high (95 % over prompts). Source: Wang et al. 2023 for the roles it finds.
    """
    z = activations(model, batch.tokens, ("z",))["z"]
    mean = z.transpose(1, 2)[:, :, batch.mask.to(z.device)].mean(2)
    before = logit_difference(model, batch)
    changes = {}
    for layer in range(model.n_layers):
        for head in range(model.n_heads):

            def write_mean(value: Tensor, hook: object, at=(layer, head)) -> Tensor:
                value[:, :, at[1]] = mean[at]
                return value

            hooks = [(f"blocks.{layer}.attn.hook_z", write_mean)]
            changes[head_name(layer, head)] = logit_difference(model, batch, hooks) - before
    table = pd.DataFrame({name: change.cpu().numpy() for name, change in changes.items()})
    found = bootstrap(table, np.arange(len(table)))
    return found.rename(columns={"measure": "name", "value": "effect"})


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
