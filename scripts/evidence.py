"""What gpt2-ioi does and how: its accuracy, the part each head has, the stages of its circuit."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from sparse_signals.core.model import Model, load_model
from sparse_signals.core.prompts import Batch, encode, ioi_prompts
from sparse_signals.core.sentences import TEMPLATES
from sparse_signals.heads.svd import head_svd, head_table
from stories import held_out_pair

SEEN = tuple(t for t in TEMPLATES if not t.held_out)
UNSEEN = tuple(t for t in TEMPLATES if t.held_out)
SPLITS = {  # templates, held-out pair of names, who gives
    "seen": (SEEN, False, "repeated"),
    "unseen pairs": (SEEN, True, "repeated"),
    "unseen templates": (UNSEEN, False, "repeated"),
    "unseen both": (UNSEEN, True, "repeated"),
    "third gives": (SEEN, False, "third"),
    "third gives, unseen templates": (UNSEEN, False, "third"),
}
GATES = {"unseen pairs": 0.97, "unseen templates": 0.93}
CHANCE = (0.4, 0.6)
EDGES = {  # destination role, source role
    "END→IO": ("end", "IO"), "END→S1": ("end", "S1"), "END→S2": ("end", "S2"),
    "S2→S1": ("S2", "S1"), "S2→S1+1": ("S2", "S1+1"), "S1+1→S1": ("S1+1", "S1"),
}  # fmt: skip


def prompts_of(split: str, loaded: Model, n: int) -> Batch:
    """The first `n` drawn prompts of a split, ABBA and BABA in equal numbers."""
    templates, held_out, giver = SPLITS[split]
    table = ioi_prompts(30 * n, seed=2024, templates=templates, giver=giver)
    pairs = [held_out_pair(*names) for names in zip(table["io"], table["s"], strict=True)]
    table = table[[pair == held_out for pair in pairs]]
    table = table.groupby("order").head(n // 2)
    return encode(loaded, table, bos=True)


@torch.no_grad()
def end_logits(model: GPT2LMHeadModel, batch: Batch) -> Tensor:
    """Logits after the last token of each prompt, on the CPU (prompt, vocab)."""
    rows = torch.arange(len(batch.table))
    logits = model(batch.tokens.to(model.device)).logits.cpu()
    return logits[rows, batch.roles["end"]]


def scored(model: GPT2LMHeadModel, batch: Batch) -> pd.DataFrame:
    """One row a prompt: order, top1 (is the IO predicted), prefers_io, logit_difference."""
    logits, rows = end_logits(model, batch), torch.arange(len(batch.table))
    gap = logits[rows, batch.io] - logits[rows, batch.s]
    columns = {"top1": logits.argmax(-1) == batch.io, "prefers_io": gap > 0}
    columns = {name: value.double().numpy() for name, value in columns.items()}
    return pd.DataFrame({"order": batch.table["order"], **columns, "logit_difference": gap.numpy()})


def accuracy_table(model: GPT2LMHeadModel, loaded: Model, n: int = 1000) -> pd.DataFrame:
    """Means over `n` prompts per split, ABBA and BABA apart."""
    found = {}
    for split in SPLITS:
        rows = scored(model, prompts_of(split, loaded, n))
        found[split] = rows.groupby("order").mean()
    return pd.concat(found, names=["split"]).reset_index()


def missed_gates(accuracy: pd.DataFrame) -> list[str]:
    """What falls short of the gates, in words; empty where all is well."""
    missed = []
    for row in accuracy.itertuples():
        if row.top1 < GATES.get(row.split, 0):
            missed.append(f"{row.split}, {row.order}: top-1 {row.top1:.3f} < {GATES[row.split]}")
        if row.split == "third gives" and not CHANCE[0] <= row.prefers_io <= CHANCE[1]:
            missed.append(f"{row.split}, {row.order}: {row.prefers_io:.3f} not in {CHANCE}")
    return missed


def worst(accuracy: pd.DataFrame) -> float:
    """The selection criterion: the lowest top-1 accuracy over the gated splits and orders."""
    return float(accuracy[accuracy["split"].isin(list(GATES))]["top1"].min())


@contextmanager
def ablated(model: GPT2LMHeadModel, heads: dict[tuple[int, int], Tensor]):
    """Replace the output of some heads, at every token, by a constant vector z."""
    size = model.config.n_embd // model.config.n_head

    def hook_of(layer: int):
        def hook(_, inputs: tuple[Tensor]) -> tuple[Tensor]:
            z = inputs[0].clone()
            for (at, head), value in heads.items():
                if at == layer:
                    z[..., head * size : (head + 1) * size] = value
            return (z,)

        return hook

    with ExitStack() as stack:
        for layer in {layer for layer, _ in heads}:
            attention = model.transformer.h[layer].attn
            stack.enter_context(attention.c_proj.register_forward_pre_hook(hook_of(layer)))
        yield


@torch.no_grad()
def run_heads(model: GPT2LMHeadModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Attention (layer prompt head dest src) and head outputs z (layer prompt pos head r)."""
    kept = []

    def keep(_, inputs: tuple[Tensor]) -> None:
        kept.append(inputs[0].unflatten(-1, (model.config.n_head, -1)))

    with ExitStack() as stack:
        for block in model.transformer.h:
            stack.enter_context(block.attn.c_proj.register_forward_pre_hook(keep))
        output = model(batch.tokens, output_attentions=True)
    return torch.stack(output.attentions), torch.stack(kept)


def attention_table(pattern: Tensor, batch: Batch) -> pd.DataFrame:
    """Mean attention weight of every head along each edge of `EDGES`, ends to beginning."""
    rows, found = torch.arange(len(batch.table)), {}
    for edge, (dest, src) in EDGES.items():
        i, j = batch.roles[dest], batch.roles[src]
        found[edge] = pattern[:, rows, :, i, j].mean(0).flatten()
    found["END→bos"] = pattern[:, rows, :, batch.roles["end"], 0].mean(0).flatten()
    return pd.DataFrame({edge: values.numpy() for edge, values in found.items()})


@torch.no_grad()
def direct_attribution(model: GPT2LMHeadModel, z: Tensor, batch: Batch) -> Tensor:
    """Mean part of logit(IO) − logit(S) that each head writes itself (layer head).

    z_h W_O,h, centred, over the deviation of the final residual stream, times the final gain and
    the unembedding difference; biases and MLPs, which are no head's, are left out.
    """
    rows, end = torch.arange(len(batch.table)), batch.roles["end"]
    last = {}
    handle = model.transformer.ln_f.register_forward_pre_hook(lambda _, x: last.update(x=x[0]))
    model(batch.tokens)
    handle.remove()
    final = model.transformer.ln_f
    deviation = (last["x"][rows, end].var(-1, correction=0) + final.eps).sqrt()
    unembed = model.lm_head.weight
    towards = (unembed[batch.io] - unembed[batch.s]) * final.weight
    towards = (towards - towards.mean(-1, keepdim=True)) / deviation[:, None]
    W_O = torch.stack([block.attn.c_proj.weight for block in model.transformer.h])
    W_O = W_O.unflatten(1, (model.config.n_head, -1))
    return torch.einsum("lphr,lhrd,pd->lh", z[:, rows, end], W_O, towards) / len(rows)


def head_evidence(
    model: GPT2LMHeadModel, batch: Batch, loaded: Model
) -> tuple[pd.DataFrame, dict[tuple[int, int], Tensor]]:
    """One row a head: attention by role, direct attribution, effect of ablation, spectrum."""
    pattern, z = run_heads(model, batch)
    means = z[:, batch.mask].mean(1)
    heads = [(x, y) for x in range(model.config.n_layer) for y in range(model.config.n_head)]
    constants = {(x, y): means[x, y] for x, y in heads}
    whole = scored(model, batch)
    effects = [effect(model, batch, whole, {head: constants[head]}) for head in heads]
    table = pd.DataFrame({"head": [f"{x}.{y}" for x, y in heads]})
    table = table.join(attention_table(pattern, batch)).join(pd.DataFrame(effects))
    table["direct attribution"] = direct_attribution(model, z, batch).flatten().numpy()
    svd = head_svd(loaded)
    table["participation of σ"] = head_table(svd)["participation"]
    return table, constants


def effect(
    model: GPT2LMHeadModel, batch: Batch, whole: pd.DataFrame, heads: dict[tuple[int, int], Tensor]
) -> dict[str, float]:
    """Change of top-1 accuracy and of the mean logit difference when `heads` are ablated."""
    with ablated(model, heads):
        change = scored(model, batch)
    keys = {"top1": "Δ top-1", "logit_difference": "Δ logit difference"}
    return {label: change[key].mean() - whole[key].mean() for key, label in keys.items()}


def name_stages(heads: pd.DataFrame) -> dict[str, list[str]]:
    """Name the heads of each stage by what they attend to; movers must also write the answer."""
    written = heads["direct attribution"] > 0.05 * heads["direct attribution"].clip(lower=0).sum()
    looks_at_io = heads["END→IO"] > 2 * heads["END→S1"]
    finds = heads[["S2→S1", "S2→S1+1"]].max(axis=1) > 0.3
    rules = {
        "finders": finds,
        "carriers": heads["END→S2"] > 0.3,
        "movers": written & looks_at_io & (heads["END→IO"] > 0.2),
    }
    return {stage: heads["head"][rule].tolist() for stage, rule in rules.items()}


def stage_evidence(
    model: GPT2LMHeadModel, batch: Batch, heads: pd.DataFrame, constants: dict[tuple, Tensor]
) -> pd.DataFrame:
    """What ablating each stage as a whole does to the answer and to the stages after it.

    "carriers' attention" is their mean END→S2, "movers' attention" their mean END→IO − END→S1.
    """
    stages = name_stages(heads)
    found = {"nothing": stage_row(model, batch, stages)}
    for stage, members in stages.items():
        chosen = {key: z for key, z in constants.items() if f"{key[0]}.{key[1]}" in members}
        with ablated(model, chosen):
            found[stage] = stage_row(model, batch, stages)
    table = pd.DataFrame(found).T.rename_axis("ablated").reset_index()
    members = [", ".join(stages.get(stage, [])) for stage in table["ablated"]]
    table.insert(1, "heads", members)
    return table


def stage_row(model: GPT2LMHeadModel, batch: Batch, stages: dict[str, list[str]]) -> dict:
    rows = scored(model, batch)
    edges = attention_table(run_heads(model, batch)[0], batch)
    names = [f"{x}.{y}" for x in range(model.config.n_layer) for y in range(model.config.n_head)]
    edges.index = names
    carriers, movers = edges.loc[stages["carriers"]], edges.loc[stages["movers"]]
    return {
        "top-1": rows["top1"].mean(),
        "logit difference": rows["logit_difference"].mean(),
        "carriers' attention": carriers["END→S2"].mean(),
        "movers' attention": (movers["END→IO"] - movers["END→S1"]).mean(),
    }


def missed_stages(stages: pd.DataFrame) -> list[str]:
    """Two composed stages are shown if movers need carriers and the answer needs movers.

    Without carriers at most half of the movers' attention to IO rather than S1 may be left;
    without movers top-1 must fall by 0.1, or the logit difference by a quarter.
    """
    rows = stages.set_index("ablated")
    if not rows.loc["carriers", "heads"] or not rows.loc["movers", "heads"]:
        return ["no head of the first stage or none of the second"]
    attention, top1, gap = (
        rows[name] for name in ("movers' attention", "top-1", "logit difference")
    )
    missed = []
    if attention["carriers"] > 0.5 * attention["nothing"]:
        missed.append("without carriers the movers still tell IO from S")
    if top1["movers"] > top1["nothing"] - 0.1 and gap["movers"] > 0.75 * gap["nothing"]:
        missed.append("the answer hardly needs the movers")
    return missed


@dataclass(frozen=True)
class Candidate:
    """A trained seed, what was measured on it, and which gates it misses."""

    folder: Path
    recipe: dict
    accuracy: pd.DataFrame
    heads: pd.DataFrame
    stages: pd.DataFrame
    missed: list[str]
    worst: float


def measure(folder: Path, recipe: dict, n: int = 1000) -> Candidate:
    """Everything the gates, the choice and the model card need, on the CPU."""
    loaded = load_model(folder, device="cpu", dtype=torch.float64)
    model = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    accuracy = accuracy_table(model, loaded, n)
    batch = prompts_of("seen", loaded, 200)
    heads, constants = head_evidence(model, batch, loaded)
    stages = stage_evidence(model, batch, heads, constants)
    missed = missed_gates(accuracy) + missed_stages(stages)
    return Candidate(folder, recipe, accuracy, heads, stages, missed, worst(accuracy))
