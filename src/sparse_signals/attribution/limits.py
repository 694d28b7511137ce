"""What shares do not say: that other exact ones exist, and what one number of a node hides."""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch

from sparse_signals.attribution.aligned import AlignedRuns, Counterfactual
from sparse_signals.attribution.graph import carried, find_edges
from sparse_signals.attribution.tables import CHANNELS
from sparse_signals.core.model import Model, head_name
from sparse_signals.core.objective import Objective
from sparse_signals.core.prompts import Batch
from sparse_signals.core.stats import participation_ratio

RULES = ("the mean of both", "attention first", "value first")


@torch.no_grad()
def carried_by(
    model: Model,
    batch: Batch,
    counterfactual: Counterfactual,
    channels: Mapping[str, Sequence[str]],
    *,
    objective: Objective | None = None,
    least: float = 0.0,
) -> pd.DataFrame:
    """How much of ΔF comes along ways that use some channels alone ("query", "value", …).

    `channels` names sets of them. Without "query" and "key" that is attention frozen: where heads
    look is left as it was, in the mean of both runs. One row a prompt and set: prompt, what,
    difference (ΔF), carried. Edges below `least` of |ΔF| are left out of all.
    """
    pieces = []
    for rows, runs in AlignedRuns.of(model, batch, counterfactual, objective).chunks():
        found = next(runs.readers())
        edges = find_edges(runs, found, least)
        for what, names in channels.items():
            kinds = torch.tensor([CHANNELS.index(name) for name in names])
            value = carried(runs, found, edges[torch.isin(edges.kind.cpu(), kinds)])
            prompts = range(rows.start, rows.start + len(value))
            table = pd.DataFrame({"prompt": prompts, "difference": runs.difference.cpu().numpy()})
            pieces.append(table.assign(what=what, carried=value.cpu().numpy()))
    return pd.concat(pieces, ignore_index=True)


@torch.no_grad()
def exact_splits(
    model: Model,
    batch: Batch,
    counterfactual: Counterfactual,
    *,
    objective: Objective | None = None,
) -> pd.DataFrame:
    """What every head has of ΔF, split into what it moved and where it looked, by three rules.

    Δ(Av) = Ā Δv + ΔA v̄ is the mean of A Δv + ΔA v′ (attention first: values change at the new
    attention) and A′ Δv + ΔA v (value first). All three are exact, and linear; they differ by
    ΔA Δv. One row a prompt, head (at all destinations) and rule: prompt, name, rule, moved, looked.
    """
    pieces, groups = [], model.n_heads // model.n_kv_heads
    for rows, runs in AlignedRuns.of(model, batch, counterfactual, objective).chunks():
        found = next(runs.readers())
        for layer, readers in enumerate(found.layers):
            a, b = (end.layers[layer] for end in runs.ends)
            A, A2 = (x.log_weights.exp() for x in (a, b))
            v, v2 = (x.v.repeat_interleave(groups, dim=1) for x in (a, b))
            both = torch.einsum("phir,phij,phjr->ph", readers.z, A - A2, v - v2)
            looked = torch.einsum("phir,phij,phjr->ph", readers.z, A - A2, (v + v2) / 2)
            moved = torch.einsum("phir,phij,phjr->ph", readers.z, (A + A2) / 2, v - v2)
            for rule, part in zip(RULES, (0.0, 0.5, -0.5), strict=True):
                values = (moved + part * both, looked - part * both)
                heads = torch.arange(model.n_heads).repeat(len(both))
                prompts = torch.arange(len(both)).repeat_interleave(model.n_heads) + rows.start
                table = pd.DataFrame(
                    {"prompt": prompts.numpy(), "layer": layer, "head": heads.numpy()}
                )
                table["name"] = head_name(table["layer"], table["head"])
                for name, value in zip(("moved", "looked"), values, strict=True):
                    table[name] = value.flatten().cpu().numpy()
                pieces.append(table.assign(rule=rule))
    columns = ["prompt", "name", "rule", "moved", "looked"]
    return pd.concat(pieces, ignore_index=True)[columns]


@torch.no_grad()
def neuron_shares(
    model: Model,
    batch: Batch,
    counterfactual: Counterfactual,
    *,
    objective: Objective | None = None,
) -> pd.DataFrame:
    """What the one share of an MLP is made of: those of its neurons, which sum to it exactly.

    One row a prompt and MLP, at the token where it matters most: prompt, layer, pos, share (value
    in units of F), size (the sum of sizes), participation (how many neurons share it), ninety (how
    many hold 90 % of the size), neurons.
    """
    pieces = []
    for rows, runs in AlignedRuns.of(model, batch, counterfactual, objective).chunks():
        found = next(runs.readers())
        for layer, readers in enumerate(found.layers):
            a, b = (end.layers[layer] for end in runs.ends)
            post, post2 = (x.post if x.up is None else x.post * x.up for x in (a, b))
            values = (readers.written @ model.bridge.blocks[layer].mlp.W_out.T) * (post - post2)
            best = values.sum(-1).abs().argmax(1)
            number = torch.arange(len(best), device=best.device)
            each = values[number, best]
            place = best if values.shape[1] > 1 else runs.last
            ordered = each.abs().sort(dim=-1, descending=True).values
            size = ordered.sum(-1)
            held = ordered.cumsum(-1) < 0.9 * size[:, None]
            columns = {
                "prompt": number + rows.start, "pos": place + runs.start, "share": each.sum(-1),
                "size": size, "participation": participation_ratio(each),
                "ninety": held.sum(-1) + 1,
            }  # fmt: skip
            table = pd.DataFrame({name: x.cpu().numpy() for name, x in columns.items()})
            pieces.append(table.assign(layer=layer, neurons=values.shape[-1]))
    return pd.concat(pieces, ignore_index=True)
