"""Traces from the answer: which components, at which tokens, made F(x) differ from F(x′), and how.

Where a trace of chapter 4 follows where heads look, this follows what is moved as well: queries,
keys, values, MLPs and direct writing, each edge with its exact share of the difference.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_signals.attribution.aligned import AlignedRuns, Counterfactual, ShareError
from sparse_signals.attribution.tables import AnswerSettings, Asked, role_names, tables_of
from sparse_signals.core.model import Model
from sparse_signals.core.objective import Objective
from sparse_signals.core.prompts import Batch
from sparse_signals.core.resume import Tables, chunked
from sparse_signals.core.stats import DRAWS, ENTRIES, bounds, resample

EDGE_KEY = ["upstream", "role", "channel", "downstream", "dest_role"]
SHARES = ("value", "share", "low", "high")


@dataclass(frozen=True)
class AnswerTrace:
    """What made F(x) differ from F(x′), prompt by prompt. Values are in units of F, shares of ΔF.

    prompts: prompt, f, counterfactual_f, difference, flat (whether F hardly differs: then nothing
    is traced), edges (of its graph), explained (the part of ΔF that these alone carry).
    edges: prompt, upstream, token (where it writes), channel ("query", "key", "value", "MLP",
    "direct"), downstream, dest (where that writes), value, share, of_node (value over the sum of
    sizes of all edges into the same node), strength, graph (whether it is in the graph; the others
    have at least `AnswerSettings.least`), up_layer and down_layer (heights in a chart).
    tokens: prompt, pos, token, value, share: what the embedding of a token has.
    paths: prompt, pos (of its token), path (number), value, share, steps, text, and roles, the text
    with roles in the place of tokens: the largest, from token to answer.
    comparisons: what heads in the graph compare, see `signals.compare_heads`, with share.
    """

    model: Model
    batch: Batch
    settings: AnswerSettings
    facts: dict[str, str]
    prompts: pd.DataFrame
    edges: pd.DataFrame
    tokens: pd.DataFrame
    paths: pd.DataFrame
    comparisons: pd.DataFrame

    @property
    def used(self) -> pd.DataFrame:
        """The prompts that are not flat."""
        return self.prompts[~self.prompts["flat"]]

    @property
    def explained(self) -> float:
        """The part of the differences that the graphs alone carry, over all prompts."""
        used = self.used
        return float((used["explained"] * used["difference"]).sum() / used["difference"].sum())

    def nodes(self) -> pd.DataFrame:
        """Nodes of the graphs: prompt, component, pos, into and out (sums of values of edges)."""
        edges = self.edges[self.edges["graph"]]
        out = edges.groupby(["prompt", "upstream", "token"])["value"].sum()
        into = edges.groupby(["prompt", "downstream", "dest"])["value"].sum()
        names = ["prompt", "component", "pos"]
        table = pd.DataFrame({"into": into.rename_axis(names), "out": out.rename_axis(names)})
        return table.fillna(0.0).reset_index()

    def pool(
        self, clusters: Iterable[int] | None = None, draws: int = DRAWS, seed: int = 0
    ) -> pd.DataFrame:
        """Edges by the roles of their tokens, pooled over prompts, the largest |share| first.

        upstream, role, channel, downstream, dest_role, up_layer, down_layer, prompts (with the edge
        in their graph), of, value (mean), share (Σ value / ΣΔF) with a 95 % interval, low to high:
        bootstrap over `clusters`, the independent unit of every prompt (None: the prompt). Roles of
        a token count together ("IO+1, S1-1"), so that shares add up. Edges below
        `AnswerSettings.least` in a prompt count as 0 there.
        """
        roles = role_names(self.batch)
        edges = self.edges.assign(
            role=roles[self.edges["prompt"], self.edges["token"]],
            dest_role=roles[self.edges["prompt"], self.edges["dest"]],
        )
        groups = edges.groupby(EDGE_KEY, sort=False)
        table = groups.agg(up_layer=("up_layer", "first"), down_layer=("down_layer", "first"))
        here = edges[edges["graph"]].groupby(EDGE_KEY, sort=False)["prompt"].nunique()
        table["prompts"] = here.reindex(table.index).fillna(0).astype(int)
        table["of"] = len(self.prompts)
        number = groups.ngroup().to_numpy()
        table["value"], table["share"], table["low"], table["high"] = self._shares(
            edges, number, len(table), clusters, draws, seed
        )
        table = table.reset_index()
        order = table["share"].abs().sort_values(ascending=False, kind="stable").index
        return table.loc[order].reset_index(drop=True)

    def _shares(
        self,
        rows: pd.DataFrame,
        group: Int[np.ndarray, "row"],
        groups: int,
        clusters: Iterable[int] | None,
        draws: int,
        seed: int,
    ) -> tuple[np.ndarray, ...]:
        """Σ value / ΣΔF of every group of rows: mean value, share, low, high.

        Over the prompts that are not flat, which are not drawn either.
        """
        used = ~self.prompts["flat"].to_numpy()
        given = self.prompts["prompt"] if clusters is None else pd.Series(list(clusters))
        cluster = given.where(used).factorize()[0]  # −1 for a flat one
        size, mine = int(cluster.max()) + 1, used[rows["prompt"]]
        place = (cluster[rows["prompt"]] * groups + group)[mine]
        values = np.bincount(place, rows["value"][mine], size * groups).reshape(size, groups)
        whole = np.bincount(cluster[used], self.prompts["difference"][used], size)
        times = resample(size, draws, seed)
        whole, found = (times @ whole)[:, None], np.empty((3, groups))
        step = max(1, ENTRIES // len(times))
        for some in (slice(start, start + step) for start in range(0, groups, step)):
            samples = times @ values[:, some] / whole
            found[:, some] = samples[0], *bounds(samples[1:])
        return values.sum(0) / used.sum(), *found

    def pooled_tokens(
        self, clusters: Iterable[int] | None = None, draws: int = DRAWS, seed: int = 0
    ) -> pd.DataFrame:
        """Which tokens ΔF comes from, by role, over prompts: role, value, share, low, high."""
        roles = role_names(self.batch)
        role = pd.Series(roles[self.tokens["prompt"], self.tokens["pos"]])
        number, names = role.factorize()
        found = self._shares(self.tokens, number, len(names), clusters, draws, seed)
        columns = dict(zip(SHARES, found, strict=True))
        table = pd.DataFrame({"role": names} | columns)
        table = table[table["value"] != 0]
        return table.sort_values("share", key=abs, ascending=False, ignore_index=True)

    def pooled_paths(
        self, clusters: Iterable[int] | None = None, draws: int = DRAWS, seed: int = 0
    ) -> pd.DataFrame:
        """Paths by the roles of their tokens, over prompts: text, prompts, value, share, low, high.

        A path counts as 0 in a prompt where it is not among the largest, `AnswerSettings.paths`.
        """
        groups = self.paths.groupby("roles", sort=False)
        number, table = groups.ngroup().to_numpy(), groups.agg(prompts=("prompt", "nunique"))
        found = self._shares(self.paths, number, len(table), clusters, draws, seed)
        columns = dict(zip(SHARES, found, strict=True))
        table = table.assign(**columns).rename_axis("text").reset_index()
        return table.sort_values("share", key=abs, ascending=False, ignore_index=True)

    def pooled_comparisons(self) -> pd.DataFrame:
        """What heads compare, by the roles of both tokens, over prompts.

        name, dest_role, src_role, prompts, attention and other (means over these prompts, in x and
        x′), share (Σ value / ΣΔF), size (median number of slices that carry the change).
        """
        roles, table = role_names(self.batch), self.comparisons
        ends = {f"{end}_role": roles[table["prompt"], table[end]] for end in ("dest", "src")}
        groups = table.assign(**ends).groupby(["name", *ends], sort=False)
        found = groups.agg(
            prompts=("prompt", "nunique"), attention=("attention", "mean"),
            other=("other", "mean"), share=("value", "sum"), size=("size", "median"),
        ).reset_index()  # fmt: skip
        found = found.assign(share=found["share"] / self.used["difference"].sum())
        return found.sort_values("share", key=abs, ascending=False, ignore_index=True)


@torch.no_grad()
def trace_answer(
    model: Model,
    batch: Batch,
    counterfactual: Counterfactual,
    *,
    objective: Objective | None = None,
    asked: Asked | None = None,
    settings: AnswerSettings = AnswerSettings(),
    folder: Path | None = None,
    progress: bool = False,
    **facts: str,
) -> AnswerTrace:
    """Trace F(x) − F(x′) back from the read-out, or from another node, through both runs.

    `objective`: F, None: logit(IO) − logit(S). `asked`: F is what this node writes, instead.
    `counterfactual`: prompts x′, aligned with x token by token, or vectors in the place of their
    embeddings (`reference_mean`). `folder`: where finished chunks are kept, as `chunked` does.
    `facts` go into the trace.
    Raises ShareError where F differs in no prompt, or shares do not add up, and as `edge_shares`.

    >>> from dataclasses import replace
    >>> io_twice = batch.tokens.scatter(1, batch.roles["S2"][:, None], batch.io[:, None])
    >>> traced = trace_answer(model, batch, replace(batch, tokens=io_twice))
    >>> bool((traced.prompts["explained"] - 1).abs().max() <= 0.2)
    True
    >>> set(traced.edges["channel"]) == {"query", "key", "value", "MLP", "direct"}
    True
    """
    whole = AlignedRuns.of(model, batch, counterfactual, objective)

    def work(rows: slice) -> Tables:
        tables = tables_of(whole.rows(rows), asked, settings)
        for table in tables.values():
            table.insert(0, "prompt", table.pop("prompt") + rows.start)
        return tables

    parts = list(chunked(whole.fitting(), work, folder=folder, progress=progress))
    joined = {name: pd.concat([x[name] for x in parts], ignore_index=True) for name in parts[0]}
    if joined["prompts"]["flat"].all():
        what = "the answer" if asked is None else str(asked)
        raise ShareError(
            f"{what} hardly differs between prompts and counterfactuals, or no edge has "
            f"{settings.least:.1%} of the difference: choose another counterfactual, or a smaller "
            "least"
        )
    said = {
        "model": model.name,
        "prompts": str(len(batch.tokens)),
        "asked": whole.objective.what if asked is None else str(asked),
        "settings": ", ".join(f"{name} {value:g}" for name, value in vars(settings).items()),
    }
    return AnswerTrace(model, batch, settings, said | facts, **joined)


def reference_mean(
    model: Model, batch: Batch, same: Int[Tensor, "prompt"] | None = None
) -> Float[Tensor, "prompt pos d"]:
    """Vectors to compare prompts with where no counterfactual is known: means of embeddings.

    At every place the mean over the prompts of the batch that are of the same form: as long, and
    with the same number in `same`, if given. What these prompts have in common does not differ.
    Raises ShareError where a prompt is the only one of its form.
    """
    form = torch.stack([batch.last, batch.last * 0 if same is None else same], dim=1)
    _, number, count = form.unique(dim=0, return_inverse=True, return_counts=True)
    if alone := (count[number] == 1).nonzero().flatten().tolist():
        raise ShareError(
            f"prompt {alone[0]} is the only one of its form: give its counterfactual, or more "
            "prompts of the same number of tokens"
        )
    number = number.to(model.device)
    embedding = model.bridge.embed.W_E[batch.tokens.to(model.device)]
    total = embedding.new_zeros(len(count), *embedding.shape[1:]).index_add(0, number, embedding)
    return (total / count.to(total)[:, None, None])[number]


def vocabulary_mean(model: Model, batch: Batch) -> Float[Tensor, "prompt pos d"]:
    """Vectors to compare a prompt with of which nothing is known, not even others of its form.

    At every place but the first the mean embedding of all words: what a prompt says, against
    nothing in particular. The first token stays, since much attention rests on it in any prompt.
    """
    words = model.bridge.embed.W_E
    vectors = words.mean(0).expand(*batch.tokens.shape, -1).clone()
    vectors[:, 0] = words[batch.tokens[:, 0].to(model.device)]
    return vectors
