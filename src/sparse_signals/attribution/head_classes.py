"""Which heads do what the classes of Wang et al. do, by rules on edges and on where heads look.

A rule asks three things of a head: at which token it writes, what its largest edge leads into, and
which token it looks at from there. It patches nothing, so it can not find backups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from sparse_signals.attribution.tables import ANSWER
from sparse_signals.core.model import Model, head_name
from sparse_signals.core.prompts import Batch
from sparse_signals.core.run import runs
from sparse_signals.core.stats import tidy
from sparse_signals.tracing.roots import position_of

LEAST_LOOK = 0.1  # mean attention of a head at its source
LEAST_SHARE = 0.01  # of ΔF: an edge of a class has as much, and an interval on one side of 0
OUTCOMES = ("present", "not found", "not testable here")


@dataclass(frozen=True)
class HeadClass:
    """A class of heads of the IOI circuit, as a rule on edges.

    The head writes at `role`; its edge arrives through one of `channels` in `into`: the answer, any
    head that writes to the answer ("writers"), or the heads found for another class. Its share has
    the `sign`. From `role`, the head looks at `source`, and at none of the `rivals` more.
    """

    name: str
    role: str
    channels: tuple[str, ...]
    into: str
    source: str
    rivals: tuple[str, ...]
    sign: int = 1

    @property
    def rule(self) -> str:
        """The rule in words."""
        into = "" if self.into == ANSWER else f"the {' or '.join(self.channels)} of "
        named = {ANSWER: "the answer", "writers": "a head that writes to the answer"}
        against = ", against it" if self.sign < 0 else ""
        return (
            f"from {self.role} into {into}{named.get(self.into, f'a found {self.into} head')}"
            f"{against}; looks at {self.source}"
        )


FROM_END, FROM_S2 = ("IO", "S1", "S2"), ("IO", "S1", "S1+1")
CLASSES = (
    HeadClass("name mover", "end", ("direct",), ANSWER, "IO", FROM_END),
    HeadClass("negative name mover", "end", ("direct",), ANSWER, "IO", FROM_END, sign=-1),
    HeadClass("S-inhibition", "end", ("query",), "writers", "S2", FROM_END),
    HeadClass("duplicate token", "S2", ("key", "value"), "S-inhibition", "S1", FROM_S2),
    HeadClass("induction", "S2", ("key", "value"), "S-inhibition", "S1+1", FROM_S2),
    HeadClass("previous token", "S1+1", ("key", "value"), "induction", "S1", ("S1", "S1+1", "IO")),
)
PAIRS = tuple(dict.fromkeys((x.role, source) for x in CLASSES for source in x.rivals))


@torch.no_grad()
def mean_attention(
    model: Model, batch: Batch, pairs: Sequence[tuple[str, str]] = PAIRS
) -> pd.DataFrame:
    """A_ij of every head, from one role to another, mean over the prompts that have j ≤ i.

    One row a head, one column a pair: name, then "end→IO" and so on. A weight is between 0 and 1.
    Raises PromptError for a role that the prompts do not have.
    """
    total = torch.zeros(len(pairs), model.n_layers, model.n_heads, dtype=torch.float64)
    count = torch.zeros(len(pairs), 1, 1, dtype=torch.float64)
    for rows, run in runs(model, batch):
        prompt = torch.arange(rows.stop - rows.start)
        for n, pair in enumerate(pairs):
            dest, src = (position_of(batch, role)[rows] for role in pair)
            seen = (src <= dest).double()
            weights = run.pattern[:, prompt, :, dest, src].cpu().double()  # prompt comes first
            total[n] += torch.einsum("p,plh->lh", seen, weights)
            count[n] += seen.sum()
    table = tidy((total / count).movedim(0, -1), ("layer", "head", "pair"), "weight")
    table["name"] = head_name(table["layer"], table["head"])
    names = {n: "→".join(pair) for n, pair in enumerate(pairs)}
    wide = table.pivot(index=["layer", "head", "name"], columns="pair", values="weight")
    return wide.rename(columns=names).reset_index().drop(columns=["layer", "head"])


def classes_found(pooled: pd.DataFrame, looks: pd.DataFrame) -> pd.DataFrame:
    """What there is of every class of `CLASSES`, of edges of `AnswerTrace.pool` and `looks`.

    One row a class: class, rule, outcome ("present", "not found"; "not testable here" where nothing
    at its token differs between prompts and counterfactuals), heads (the largest first, all of
    them), share of the first one with low and high (NaN without one). Of a head its largest edge
    counts. Source of the classes: Wang et al. 2023.
    """
    edges = pooled[pooled["upstream"].str.contains(".", regex=False)]
    direct = edges[edges["channel"] == "direct"]
    heads = {ANSWER: [ANSWER], "writers": _clear(direct, 1)["upstream"].tolist()}
    looks, rows = looks.set_index("name"), []
    for each in CLASSES:
        at = edges[[each.role in role.split(", ") for role in edges["role"]]]
        into = at["channel"].isin(each.channels) & at["downstream"].isin(heads[each.into])
        found = _clear(at[into], each.sign).drop_duplicates("upstream")
        seen = looks[[f"{each.role}→{source}" for source in each.rivals]]
        seen = seen.reindex(found["upstream"])
        most = seen.idxmax(axis=1) == f"{each.role}→{each.source}"
        found = found[(most & (seen.max(axis=1) >= LEAST_LOOK)).to_numpy()]
        heads[each.name] = found["upstream"].tolist()
        outcome = OUTCOMES[0 if len(found) else 1 if len(at) else 2]
        first = dict.fromkeys(("share", "low", "high"), float("nan"))
        if len(found):
            first = found.iloc[0][["share", "low", "high"]].to_dict()
        row = {"class": each.name, "rule": each.rule, "outcome": outcome}
        rows.append(row | {"heads": heads[each.name]} | first)
    return pd.DataFrame(rows)


def _clear(edges: pd.DataFrame, sign: int) -> pd.DataFrame:
    """Edges of at least the least share whose interval is on one side of 0, the largest first."""
    low = edges[["low", "high"]].mul(sign).min(axis=1)
    return edges[(sign * edges["share"] >= LEAST_SHARE) & (low > 0)]
