"""Chapter 5: intervene on the signals of traced edges, one at a time or many at once.

`global` adds to, or takes from, what the upstream component wrote, and everything downstream is
recomputed; `local` changes only the query or key of the downstream head. Ablating subtracts the
signal, boosting adds it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain, product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_signals.core.model import BIAS_ROW, Model, once_per_model, qk_weights
from sparse_signals.core.prompts import Batch, roles_of
from sparse_signals.core.resume import chunked, run_key
from sparse_signals.core.rotary import rotate, rotation
from sparse_signals.core.run import fitting_rows
from sparse_signals.core.stats import (
    DRAWS,
    false_discovery,
    group_bootstrap,
    resample,
    sign_flip,
)
from sparse_signals.interventions.case import templates_of
from sparse_signals.interventions.changes import (
    MID,
    PRE,
    Changes,
    Clean,
    K,
    Probes,
    Q,
    V,
    clean_run,
)
from sparse_signals.interventions.edge_signals import (
    Signals,
    by_reader,
    column,
    other_signals,
    random_signals,
    read_signals,
)
from sparse_signals.interventions.recompute import Outcome, recompute
from sparse_signals.tracing.circuit import KEY, labelled
from sparse_signals.tracing.trace import Trace

SCOPES = ("global", "local")
MODES = ("ablate", "boost")
SIGN = {"ablate": -1.0, "boost": 1.0}
OF_EDGE = ["edge", "firing", "prompt", "upstream", "downstream", "side", "layer", "head", "dest",
           "src", "token", "weight", "control", "repeat"]  # fmt: skip
EFFECTS = ("F_change", "F_size", "score_change", "attention_change")


@dataclass(frozen=True)
class Plan:
    """What is done to every edge.

    randoms: how many random supports stand beside each signal; others: whether the signal of the
    same pooled edge in another prompt does. patch_qkv: a local intervention changes query, key and
    value of the head, not one of them, as in the released code of Franco and Crovella 2024.
    """

    scopes: Sequence[str] = SCOPES
    modes: Sequence[str] = MODES
    randoms: int = 0
    others: bool = False
    seed: int = 0
    patch_qkv: bool = False


def intervene(
    traced: Trace,
    edges: pd.DataFrame | None = None,
    plan: Plan = Plan(),
    *,
    folder: Path | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Intervene on every edge of a trace (or on some of them) alone. The table of `intervene_on`.

    With a folder, finished chunks of prompts are kept there, and a run that was cut off goes on
    after them. Raises PromptError where the prompts have no names.

    >>> effects = intervene(traced.first(2), plan=Plan(scopes=["global"], modes=["ablate"]))
    >>> bool((effects["F_change"].abs() > 0).any()), effects["mode"].unique().tolist()
    (True, ['ablate'])
    """
    model, batch = traced.model, traced.batch
    signals = read_signals(traced, edges)
    others = other_signals(signals, batch, plan.seed) if plan.others else None
    chunks = fitting_rows(model, batch)

    def work(rows: slice) -> dict[str, pd.DataFrame]:
        clean, here = clean_run(model, batch, rows), _in_rows(signals, rows)
        randoms = (random_signals(here, n, plan.seed) for n in range(plan.randoms))
        elsewhere = [_in_rows(others, rows)] if others else []
        how = {"scopes": plan.scopes, "modes": plan.modes, "patch_qkv": plan.patch_qkv}
        tables = [intervene_on(clean, x, **how) for x in chain([here], randoms, elsewhere)]
        return {"effects": pd.concat(tables, ignore_index=True)}

    if folder:
        columns = ["prompt", "upstream", "side", "layer", "head", "dest", "src"]
        content = pd.util.hash_pandas_object(signals.edges[columns]).to_numpy().tobytes()
        digest = sha256(content + signals.chosen.cpu().numpy().tobytes()).hexdigest()
        folder = folder / run_key(model, batch, (plan, chunks, digest))
    pieces = chunked(chunks, work, folder=folder, progress=progress)
    return pd.concat([piece["effects"] for piece in pieces], ignore_index=True)


def _in_rows(signals: Signals, rows: slice) -> Signals:
    prompt = column(signals.edges, "prompt", signals.reader.device)
    return signals[(prompt >= rows.start) & (prompt < rows.stop)]


# --- on signals at hand --------------------------------------------------------------------------


def intervene_on(
    clean: Clean,
    signals: Signals,
    rows: Int[Tensor, "edge"] | None = None,
    *,
    scopes: Sequence[str] = SCOPES,
    modes: Sequence[str] = MODES,
    patch_qkv: bool = False,
    freeze_norms: bool = False,
) -> pd.DataFrame:
    """What every intervention does: one row of the table per edge, scope and mode.

    Edges with the same number in `rows` (all of one prompt) are changed together, by the sum of
    their signals; without `rows` each is changed alone. The bias row is nothing that can be changed
    globally, and left out there. Columns: row, scope, mode, those of the edge, norm (of δ), F
    (logit(IO) − logit(S), of the row) and F_change, score and attention of the edge's firing and
    their changes, cosine and norm_ratio of what the edge alone changes, after against before (the
    output of upstream, or the query or key). `patch_qkv` as in `Plan`; with `freeze_norms` every
    normalisation divides by what it divided by in the clean run.
    Raises ValueError for edges of prompts that `clean` lacks, or of two prompts in one row.
    """
    device = clean.end.device
    rows = torch.arange(len(signals)) if rows is None else rows
    numbers, row = rows.to(device).unique(return_inverse=True)
    prompt = _prompts(clean, signals, row)
    variants, of = list(product(scopes, modes)), len(numbers)
    inputs = _input_changes(clean, signals, row, prompt, patch_qkv)
    changes = (
        _in_variants(_stream(clean.model, signals, row), "global", variants, of),
        _in_variants(inputs, "local", variants, of),
    )
    # the rows of each variant, then every prompt without changes
    of_row = prompt.new_zeros(of).index_copy(0, row, prompt).repeat(len(variants))
    every = torch.cat([of_row, torch.arange(len(clean.end), device=device)])
    starts = torch.arange(len(variants), device=device)[:, None] * of
    places = (column(signals.edges, x, device) for x in ("layer", "head", "dest", "src"))
    probes = Probes(
        torch.cat([(row + starts).flatten(), len(of_row) + prompt]),
        *(place.repeat(len(variants) + 1) for place in places),
    )
    outcome = recompute(clean, every, *changes, probes, freeze_norms=freeze_norms)
    table = _results(outcome, signals, row, prompt, variants, of)
    same = _cosines(clean, signals, inputs, prompt, variants)
    table = table.assign(row=np.tile(numbers[row].cpu(), len(variants)), **same)
    columns = ["row", "scope", "mode", *OF_EDGE, "norm", "F", "F_change", "score", "score_change",
               "attention", "attention_change", "cosine", "norm_ratio"]  # fmt: skip
    meant = (table["scope"] == "local") | (table["upstream"] != BIAS_ROW)
    return table.loc[meant, columns].reset_index(drop=True)


def _prompts(clean: Clean, signals: Signals, row: Int[Tensor, "edge"]) -> Int[Tensor, "edge"]:
    """The prompt of every edge, counted from the first one of the clean run."""
    prompt = column(signals.edges, "prompt", row.device) - clean.first_prompt
    if len(prompt) and not 0 <= int(prompt.min()) <= int(prompt.max()) < len(clean.end):
        raise ValueError("edges of prompts that are not in the clean run: choose among its prompts")
    if len(torch.stack([row, prompt]).unique(dim=1).T) > len(row.unique()):
        raise ValueError("edges of different prompts in one row: an intervention is on one prompt")
    return prompt


def _in_variants(changes: Changes, scope: str, variants: list[tuple], rows: int) -> Changes:
    """The changes of one scope in each of its variants, which follow each other by `rows` rows."""
    signs = [(n * rows, SIGN[mode]) for n, (name, mode) in enumerate(variants) if name == scope]
    every = torch.arange(len(changes.row), device=changes.row.device)
    repeated = changes[every.repeat(len(signs))]
    shift, sign = (
        x.to(changes.values) for x in torch.tensor(signs or [(0, 0.0)][:0]).view(-1, 2).T
    )
    return replace(
        repeated,
        row=repeated.row + shift.long().repeat_interleave(len(every)),
        factor=repeated.factor * sign.repeat_interleave(len(every)),
    )


def _stream(model: Model, signals: Signals, row: Int[Tensor, "edge"]) -> Changes:
    """δ where upstream writes: heads and biases after attention, MLPs before the next layer."""
    table = model.components.set_index("component").loc[signals.edges["upstream"]]
    kind = table["kind"].to_numpy()
    site = np.where(np.isin(kind, ["head", "bias"]), MID, PRE)
    layer = np.maximum(table["layer"].to_numpy(), 0) + (kind == "MLP")
    keep = torch.from_numpy((kind != BIAS_ROW).nonzero()[0]).to(row.device)
    layer, site = (torch.from_numpy(x).to(row.device) for x in (layer, site))
    token, none = column(signals.edges, "token", row.device), torch.zeros_like(row)
    factor = torch.ones_like(signals.scale)
    which = torch.arange(len(row), device=row.device)
    return Changes(row, layer, site, none, token, factor, which, signals.delta)[keep]


def _input_changes(
    clean: Clean,
    signals: Signals,
    row: Int[Tensor, "edge"],
    prompt: Int[Tensor, "edge"],
    patch_qkv: bool,
) -> Changes:
    """δ as it enters the query or key of the downstream head, δ·A / s_t or δ·B / s_t, turned.

    Where heads normalise queries and keys, divided by what they divide these by, too.
    """
    model = clean.model
    layer, head, token = (column(signals.edges, x, row.device) for x in ("layer", "head", "token"))
    delta = signals.delta.double() / signals.scale[:, None]
    own = torch.where(signals.reader < model.n_heads, Q, K)
    scales = torch.cat([clean.q_scale, clean.k_scale], dim=2).double()

    def turned(reader: Int[Tensor, "edge"]) -> Float[Tensor, "edge r"]:
        image = by_reader(delta, signals.readers.raw[:, :, :-1], layer, reader)
        image = image / scales[layer, prompt, reader, token, None]
        return rotate(image, *rotation(model, token)) if model.rotary else image

    vectors = [turned(signals.reader)]
    sites = [own]
    if patch_qkv:
        other = (signals.reader + model.n_heads) % (2 * model.n_heads)
        vectors.append(turned(other))
        vectors.append(by_reader(delta, _value_maps(model), layer, head))
        sites += [Q + K - own, torch.full_like(own, V)]
    which = torch.arange(len(sites) * len(row), device=row.device)
    row, layer, head, token, factor = (
        x.repeat(len(sites)) for x in (row, layer, head, token, torch.ones_like(signals.scale))
    )
    return Changes(row, layer, torch.cat(sites), head, token, factor, which, torch.cat(vectors))


@once_per_model
def _value_maps(model: Model) -> Float[Tensor, "layer head d r"]:
    """W_V of every query head with the gain and centring of the normalisation folded in."""
    w = qk_weights(model)
    W_V = torch.stack([block.attn.W_V for block in model.bridge.blocks]).double()
    W_V = w.gain[:, None, :, None] * W_V
    if w.centred:
        W_V = W_V - W_V.mean(-2, keepdim=True)
    return W_V.repeat_interleave(model.n_heads // model.n_kv_heads, dim=1)


# --- the table -----------------------------------------------------------------------------------


def _results(
    outcome: Outcome,
    signals: Signals,
    row: Int[Tensor, "edge"],
    prompt: Int[Tensor, "edge"],
    variants: list[tuple],
    rows: int,
) -> pd.DataFrame:
    """What comes of every edge and variant, beside the clean run."""
    starts = torch.arange(len(variants), device=row.device)[:, None] * rows
    mine, clean = (row + starts), len(variants) * rows + prompt
    F = outcome.logits[:, 0] - outcome.logits[:, 1]
    values = {"F": F[mine], "F_change": F[mine] - F[clean]}
    for name in ("score", "attention"):
        found = getattr(outcome, name).view(len(variants) + 1, len(row))
        values[name], values[f"{name}_change"] = found[:-1], found[:-1] - found[-1]
    values["norm"] = signals.delta.double().norm(dim=-1).expand(len(variants), -1)
    edges = pd.concat([signals.edges[OF_EDGE]] * len(variants), ignore_index=True)
    names = pd.DataFrame(variants, columns=["scope", "mode"], dtype="str")
    names = names.loc[names.index.repeat(len(row))].reset_index(drop=True)
    return edges.assign(
        scope=names["scope"],
        mode=names["mode"],
        **{name: value.flatten().cpu().numpy() for name, value in values.items()},
    )


def _cosines(
    clean: Clean,
    signals: Signals,
    inputs: Changes,
    prompt: Int[Tensor, "edge"],
    variants: list[tuple],
) -> dict[str, np.ndarray]:
    """Cosine of what is changed with what it was, and the ratio of their norms."""
    written, n = signals.written.double(), len(prompt)
    if not clean.model.rms:
        written = written - written.mean(-1, keepdim=True)
    own = inputs.layer[:n], prompt, inputs.head[:n], inputs.token[:n]
    read = torch.where((inputs.site[:n] == Q)[:, None], clean.q[own], clean.k[own]).double()
    before = {"global": (written, signals.delta.double()), "local": (read, inputs.values[:n])}
    cosine, ratio = [], []
    for scope, mode in variants:
        x, change = before[scope]
        after = x + SIGN[mode] * change
        cosine.append(torch.nn.functional.cosine_similarity(x, after, dim=-1))
        ratio.append(after.norm(dim=-1) / x.norm(dim=-1))
    names = ("cosine", "norm_ratio")
    return {n: torch.cat(v).cpu().numpy() for n, v in zip(names, (cosine, ratio), strict=True)}


# --- pooled --------------------------------------------------------------------------------------


def summary(
    table: pd.DataFrame,
    batch: Batch,
    measures: Sequence[str] = EFFECTS,
    keys: pd.DataFrame | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> pd.DataFrame:
    """What interventions do on average, edge by pooled edge, with 95 % intervals over templates.

    One row per pooled edge (of all, or of those in `keys`), scope, mode, control and measure: edge
    (upstream → reader, q or k, and the roles), prompts, value, low, high, p (`sign_flip` of the
    means of templates) and q (the false-discovery rate over edges). A prompt counts once: edges
    with the same key in it and repeats of a control are averaged first. F_size is |F_change|. Rows
    with control "signal − X" are the paired difference to control X.
    """
    table = labelled(table.assign(F_size=table["F_change"].abs()), roles_of(batch))
    table = table if keys is None else table.merge(keys[KEY].drop_duplicates(), on=KEY)
    by = [*KEY, "scope", "mode", "control"]
    each = table.groupby([*by, "prompt"], sort=False)[list(measures)].mean().reset_index()
    each = pd.concat([each, *_differences(each, by, measures)], ignore_index=True)
    groups = each.groupby(by, sort=False)
    number, size = groups.ngroup().to_numpy(), groups.ngroups
    pooled = groups.agg(prompts=("prompt", "size")).reset_index()
    side = pooled["side"].map({"dest": " q (", "src": " k ("})
    ends = pooled["upstream"] + " → " + pooled["downstream"]
    pooled["edge"] = ends + side + pooled["dest_role"] + "→" + pooled["src_role"] + ")"
    names, template = np.unique(templates_of(batch), return_inverse=True)
    template, times = template[each["prompt"]], resample(len(names), draws, seed)
    parts = []
    for measure in measures:
        known, values = each[measure].notna().to_numpy(float), each[measure].fillna(0).to_numpy()
        value, low, high = group_bootstrap(values, number, template, times, size, known)
        found = pooled.assign(measure=measure, value=value, low=low, high=high)
        means = each[measure].groupby([number, template]).mean().unstack()
        parts.append(found.assign(p=sign_flip(means.to_numpy(float))))
    found, family = pd.concat(parts, ignore_index=True), ["scope", "mode", "control", "measure"]
    q = found.groupby(family)["p"].transform(lambda p: false_discovery(p.to_numpy()))
    return found.assign(q=q)


def _differences(
    each: pd.DataFrame, by: Sequence[str], measures: Sequence[str]
) -> Iterator[pd.DataFrame]:
    """Signal minus each control, where a prompt has both."""
    index = [*(name for name in by if name != "control"), "prompt"]
    kinds = {name: rows.set_index(index) for name, rows in each.groupby("control", sort=False)}
    signal = kinds.pop("signal", None)
    for name, control in kinds.items():
        if signal is not None:
            gap = signal[list(measures)] - control[list(measures)]
            yield gap.dropna().reset_index().assign(control=f"signal − {name}")
