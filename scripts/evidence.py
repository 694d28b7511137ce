"""What gpt2-ioi does and how: its accuracy, the part of every head, the stages of its circuit.

Ablated means: what a component writes is replaced, wherever it is read, by its mean over
counterfactual prompts (the same sentences, in which nobody is named twice) at the same token.
Stages are named on prompts of the training kind; heads, stages and ablations are measured on
others: names that never met and sentences that never occurred in training.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_signals.core.forward import Gates, forward
from sparse_signals.core.model import Model, load_model, logits
from sparse_signals.core.prompts import Batch, encode, fill, ioi_prompts
from sparse_signals.core.run import Run, run
from sparse_signals.core.sentences import NAMES, TEMPLATES
from sparse_signals.core.stats import bootstrap
from sparse_signals.heads.svd import head_svd, head_table
from sparse_signals.tracing.roots import logit_attribution
from stories import KINDS, Story, composed, either, from_template, held_out_pair, story

SEEN = tuple(t for t in TEMPLATES if not t.held_out)
UNSEEN = tuple(t for t in TEMPLATES if t.held_out)
SPLITS = {  # templates, and whether the two names never met in training
    "seen": (SEEN, False),
    "unseen pairs": (SEEN, True),
    "unseen templates": (UNSEEN, False),
    "unseen both": (UNSEEN, True),
}
CHOSEN_BY = ("unseen pairs", "unseen templates")  # what the choice of a seed looks at
STAGES = ("detectors", "carriers", "movers")
EDGES = {  # destination role, source role
    "END→IO": ("end", "IO"), "END→S1": ("end", "S1"), "END→S2": ("end", "S2"),
    "S2→S1": ("S2", "S1"), "S2→S1+1": ("S2", "S1+1"), "S1+1→S1": ("S1+1", "S1"),
}  # fmt: skip
ROWS = 40  # prompts a pass, when hooks replace what heads move
LITTLE, FLOOR = 0.1, 0.01  # redundant: each costs less, both more; a smaller sum counts as this
LOGIT, TOP = "logit difference", "top-1"


# --- prompts -------------------------------------------------------------------------------------


def prompts_of(split: str, loaded: Model, n: int, giver: str = "repeated") -> Batch:
    """The first `n` drawn prompts of a split, ABBA and BABA in equal numbers."""
    templates, held_out = SPLITS[split]
    table = ioi_prompts(30 * n, seed=2024, templates=templates, giver=giver)
    pairs = [held_out_pair(*names) for names in zip(table["io"], table["s"], strict=True)]
    table = table[[pair == held_out for pair in pairs]]
    table = table.groupby("order").head(n // 2)
    return encode(loaded, table, bos=True)


def counterfactual(batch: Batch, loaded: Model, templates: tuple) -> Batch:
    """The same prompts with another person in place of the first mention: nobody comes twice."""
    rng, rows = random.Random(1), batch.table.to_dict("records")
    for row in rows:
        other = rng.choice([name for name in NAMES if name not in (row["io"], row["s"])])
        a, b = (row["io"], other) if row["order"] == "ABBA" else (other, row["io"])
        slots = {"A": a, "B": b, "S": row["s"], "PLACE": row["place"], "OBJECT": row["object"]}
        row |= {"text": fill(templates[row["template"]].text, slots)}
        row |= {"third": row["s"], "s": other}
    return encode(loaded, pd.DataFrame(rows), bos=True)


def stories_of(kind, held_out: bool, n: int) -> list[Story]:
    """Stories of one kind, none of which need have been trained on."""
    rng = random.Random(f"{kind.__name__}/{held_out}")
    return [story(rng, held_out, kind) for _ in range(n)]


# --- accuracy ------------------------------------------------------------------------------------


def end_logits(model: Model, batch: Batch) -> Float[Tensor, "prompt vocab"]:
    """Logits after the last token of each prompt."""
    return logits(model, batch.tokens, batch.last)


def accuracy_table(model: Model, n: int = 1000) -> pd.DataFrame:
    """Standard prompts, `n` a split: one row per split and order, with means over prompts."""
    found = {}
    for split in SPLITS:
        for giver in ("repeated", "third"):
            batch = prompts_of(split, model, n, giver)
            answer = end_logits(model, batch)
            io, s = answer.gather(1, batch.answers("accuracy")).T
            columns = {"top1": answer.argmax(-1) == batch.io, "prefers IO": io > s}
            columns |= {
                "logit difference": io - s,
                "P(answer)": answer.softmax(-1).gather(1, batch.io[:, None])[:, 0],
            }
            rows = pd.DataFrame({name: x.double().numpy() for name, x in columns.items()})
            found[split, giver] = rows.groupby(batch.table["order"].to_numpy()).mean()
    return pd.concat(found, names=["split", "giver", "order"]).reset_index()


def kinds_table(model: Model, n: int = 500) -> pd.DataFrame:
    """Every other kind of story: how often one named once comes first, seen pairs and unseen."""
    rows = []
    for kind in KINDS:
        if kind in (from_template, composed):
            continue
        for held_out in (False, True):
            told = stories_of(kind, held_out, n)
            batch = encode(model, [x.text for x in told], bos=True)
            best = end_logits(model, batch).argmax(-1).tolist()
            right = [
                model.tokenizer.decode([token]).strip() in x.answers
                for token, x in zip(best, told, strict=True)
            ]
            table = pd.DataFrame({"kind": [x.kind for x in told], "right": right})
            for name, value in table.groupby("kind")["right"].mean().items():
                rows.append((name, "unseen pairs" if held_out else "seen pairs", value))
    return pd.DataFrame(rows, columns=["kind", "names", "right"])


# --- what is ablated -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Per prompt logit(IO) − logit(S) and whether IO comes first, and the run, if it was kept."""

    difference: Float[Tensor, "prompt"]
    top1: Float[Tensor, "prompt"]
    run: Run | None = None


@dataclass(frozen=True)
class Bench:
    """Prompts of a split, and what every component writes on their counterfactuals."""

    model: Model
    split: str
    n: int = 200

    @cached_property
    def batch(self) -> Batch:
        """The prompts."""
        return prompts_of(self.split, self.model, self.n)

    @cached_property
    def replaced(self) -> Run:
        """The run on the counterfactual prompts."""
        templates, _ = SPLITS[self.split]
        return run(self.model, counterfactual(self.batch, self.model, templates))

    @cached_property
    def clean(self) -> Outcome:
        """Nothing ablated."""
        return self.ablated(())

    @cached_property
    def place(self) -> Int[Tensor, "prompt pos"]:
        """The place of every token: its position in its sentence, a template in an order."""
        sentence = self.batch.table["template"].astype(str) + self.batch.table["order"]
        number = torch.from_numpy(sentence.astype("category").cat.codes.to_numpy("int64"))
        length = self.batch.tokens.shape[1]
        return number[:, None] * length + torch.arange(length)

    @cached_property
    def reference(self) -> Float[Tensor, "place component d"]:
        """The mean of what components write at a place, over counterfactual prompts."""
        return self.mean_at(self.replaced.outputs.flatten(0, 1))

    @cached_property
    def mean_z(self) -> Float[Tensor, "place layer head r"]:
        """The mean of what heads move at a place, over counterfactual prompts."""
        return self.mean_at(self.replaced.z.permute(1, 3, 0, 2, 4).flatten(0, 1))

    def mean_at(self, values: Float[Tensor, "token ..."]) -> Float[Tensor, "place ..."]:
        """The mean over the tokens of every place."""
        place = self.place.flatten()
        sums = values.new_zeros(int(place.max()) + 1, *values.shape[1:]).index_add(0, place, values)
        count = place.bincount(minlength=len(sums)).clamp(min=1)
        return sums / count.view(-1, *[1] * (values.ndim - 1))

    def at(self, *roles: str) -> Bool[Tensor, "prompt pos"]:
        """The tokens of some roles; all tokens without any."""
        here = torch.full_like(self.batch.mask, not roles)
        for role in roles:
            here[torch.arange(len(here)), self.batch.roles[role]] = True
        return here

    def ablated(
        self, senders: Iterable[str], *roles: str, inputs: str = "", receivers: Iterable[str] = ()
    ) -> Outcome:
        """Ablate components at the tokens of some roles (none: at all), for all that read them.

        Or only in the `inputs` ("q", "k", "v") of the heads `receivers`.
        """
        model, here = self.model, self.at(*roles)
        names = model.components["component"][:-1]
        gate = torch.ones(2, len(names), dtype=model.dtype)
        gate[1, torch.tensor(names.isin(list(senders)).tolist())] = 0.0
        given = {"written": gate}
        if inputs:
            each = gate[:, None, None].repeat(1, model.n_layers, model.n_heads, 1)
            to = names[model.is_head[:-1].tolist()].isin(list(receivers)).tolist()
            each[1].flatten(0, 1)[~torch.tensor(to)] = 1.0
            given = dict.fromkeys(inputs, each)
        passed = forward(
            model, self.batch, gates=Gates(here.long(), self.reference, self.place, **given)
        )
        best = passed.logits.argmax(-1)
        return Outcome(passed.difference, (best == self.batch.io).double(), passed.run)

    def without(self, heads: Iterable[str], *roles: str) -> Outcome:
        """The same for heads and all readers, by hooks: many times faster, and without a run."""
        pieces = torch.arange(len(self.place)).split(ROWS)
        found = torch.cat([self._logits_without(heads, self.at(*roles), rows) for rows in pieces])
        io, s = found.gather(1, self.batch.answers("ablation")).T
        return Outcome(io - s, (found.argmax(-1) == self.batch.io).double())

    def _logits_without(
        self, heads: Iterable[str], here: Bool[Tensor, "prompt pos"], rows: Int[Tensor, "row"]
    ) -> Float[Tensor, "row vocab"]:
        model, hooks = self.model, []
        mean = self.mean_z[self.place[rows]] + model.writers.b_V
        for layer in range(model.n_layers):
            chosen = torch.tensor([name in heads for name in heads_of(model, layer)])
            at = (here[rows, :, None] & chosen)[..., None]

            def replace(z: Tensor, hook: object, at: Tensor = at, layer: int = layer) -> Tensor:
                return torch.where(at, mean[:, :, layer], z)

            hooks += [(f"blocks.{layer}.attn.hook_z", replace)] * bool(chosen.any())
        return logits(model, self.batch.tokens[rows], self.batch.last[rows], hooks)

    def attention(self, run: Run, edge: str) -> Float[Tensor, "head prompt"]:
        """What every head attends to along an edge of `EDGES`, in a run of these places."""
        rows, (i, j) = torch.arange(len(self.place)), (self.batch.roles[x] for x in EDGES[edge])
        return run.pattern[:, rows, :, i, j].flatten(1).T


def last_named(model: Model, n: int = 200) -> Float[Tensor, "head"]:
    """Mean attention from the end to a new person, named after the one who is named twice."""
    told = [x for x in stories_of(either, False, 3 * n) if x.kind == "a new person after"][:n]
    batch = encode(model, [x.text for x in told], bos=True)
    names = [f"Ġ{max(x.answers, key=x.text.rfind)}" for x in told]
    ids = torch.tensor(model.tokenizer.convert_tokens_to_ids(names))
    place = (batch.tokens == ids[:, None]).int().argmax(1)
    pattern = run(model, batch).pattern
    return pattern[:, torch.arange(len(ids)), :, batch.last, place].mean(0).flatten()


# --- heads and stages ----------------------------------------------------------------------------


def heads_of(model: Model, layer: int | None = None) -> list[str]:
    """The names of all heads, or of those of a layer."""
    table = model.components
    wanted = (table["kind"] == "head") & (table["layer"].eq(layer) if layer is not None else True)
    return table["component"][wanted].tolist()


def head_evidence(bench: Bench) -> pd.DataFrame:
    """One row a head: attention by role, direct attribution, effects of ablation, spectrum."""
    model, clean, names = bench.model, bench.clean, heads_of(bench.model)
    table = pd.DataFrame({"head": names})
    for edge in EDGES:
        table[edge] = bench.attention(clean.run, edge).mean(1)
    table["S2→S1 replaced"] = bench.attention(bench.replaced, "S2→S1").mean(1)
    table["S2→S1+1 replaced"] = bench.attention(bench.replaced, "S2→S1+1").mean(1)
    table["END→last named"] = last_named(model)
    for roles, where in (((), "everywhere"), (("end",), "at the end")):
        found = [bench.without([name], *roles) for name in names]
        table[f"Δ top-1, {where}"] = [float((x.top1 - clean.top1).mean()) for x in found]
        gaps = [float((x.difference - clean.difference).mean()) for x in found]
        table[f"Δ logit difference, {where}"] = gaps
    written = logit_attribution(clean.run)[0].mean(0)
    table["direct attribution"] = written[model.is_head]
    table["participation of σ"] = head_table(head_svd(model))["participation"]
    return table


def name_stages(heads: pd.DataFrame) -> dict[str, list[str]]:
    """The heads of each stage, by what they attend to alone."""
    finds = heads[["S2→S1", "S2→S1+1"]].max(axis=1) > 0.3
    unmoved = heads[["S2→S1 replaced", "S2→S1+1 replaced"]].max(axis=1) < 0.1
    rules = {
        "detectors": finds & unmoved,
        "carriers": (heads["END→S2"] > 0.3) & (heads["END→last named"] < 0.1),
        "movers": (heads["END→IO"] > 0.2) & (heads["END→IO"] > 2 * heads["END→S1"]),
    }
    return {stage: heads["head"][rule].tolist() for stage, rule in rules.items()}


ABLATED_AT = {"detectors": ("S2",), "carriers": ("end",), "movers": ("end",)}


def stage_evidence(bench: Bench, stages: dict[str, list[str]]) -> pd.DataFrame:
    """What ablating each stage does to the answer and to the stages after it; means, intervals.

    "carriers" is the mean attention of the carriers END→S2, "movers" that of the movers END→IO
    less END→S1.
    """
    names, found = pd.Index(heads_of(bench.model)), []
    carriers, movers = (names.get_indexer(stages[x]) for x in ("carriers", "movers"))
    for stage in ("nothing", *STAGES):
        members = stages.get(stage, [])
        out = bench.ablated(members, *ABLATED_AT.get(stage, ()))
        looks = {edge: bench.attention(out.run, edge) for edge in EDGES}
        columns = {
            "top-1": out.top1,
            "logit difference": out.difference,
            "carriers' attention": looks["END→S2"][carriers].mean(0),
            "movers' attention": (looks["END→IO"] - looks["END→S1"])[movers].mean(0),
        }
        rows = pd.DataFrame({name: x.numpy() for name, x in columns.items()})
        intervals = bootstrap(rows, bench.batch.table["template"])
        found.append(intervals.assign(ablated=stage, heads=", ".join(members)))
    return pd.concat(found)[["ablated", "heads", "measure", "value", "low", "high"]]


def step_evidence(bench: Bench, stages: dict[str, list[str]]) -> pd.DataFrame:
    """Through what each stage tells the next: change of the logit difference, path by path."""
    words = ["embedding", *heads_of(bench.model, 0)]
    paths = [
        ("detectors", stages["detectors"], "carriers", "S2"),
        ("carriers", stages["carriers"], "movers", "end"),
        ("embedding and layer 0", words, "carriers", "S2"),
        ("embedding and layer 0", words, "movers", "IO"),
    ]
    rows = []
    for sender, senders, receiver, role in paths:
        for entry in "qkv":
            out = bench.ablated(senders, role, inputs=entry, receivers=stages[receiver])
            change = out.difference - bench.clean.difference
            rows.append((sender, receiver, role, entry, float(change.mean())))
    columns = ["sender", "receiver", "at", "through", "Δ logit difference"]
    return pd.DataFrame(rows, columns=columns)


def layer_evidence(bench: Bench) -> pd.DataFrame:
    """Heads of a layer, or of two, ablated at the end or everywhere."""
    model, rows = bench.model, []
    layers = range(model.n_layers)
    for chosen in [(x,) for x in layers] + list(combinations(layers, 2)):
        members = [name for layer in chosen for name in heads_of(model, layer)]
        for roles, where in ((("end",), "at the end"), ((), "everywhere")):
            out = bench.without(members, *roles)
            change = (out.difference - bench.clean.difference).mean()
            top1 = (out.top1 - bench.clean.top1).mean()
            rows.append((", ".join(map(str, chosen)), where, float(change), float(top1)))
    return pd.DataFrame(rows, columns=["layers", "where", "Δ logit difference", "Δ top-1"])


def pair_evidence(bench: Bench, heads: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """Pairs of heads of the last two layers, and of layers: losses alone and together, at the end.

    One row per pair and measure; a loss of the logit difference is a part of its mean.
    """
    whole = float(bench.clean.difference.mean())
    rows, names = [], [name for layer in range(2, 4) for name in heads_of(bench.model, layer)]
    alone = heads.set_index("head")
    for a, b in combinations(names, 2):
        both = bench.without([a, b], "end")
        gaps = alone.loc[[a, b], "Δ logit difference, at the end"].tolist()
        rows.append((a, b, LOGIT, *gaps, float((both.difference - bench.clean.difference).mean())))
        tops = alone.loc[[a, b], "Δ top-1, at the end"].tolist()
        rows.append((a, b, TOP, *tops, float((both.top1 - bench.clean.top1).mean())))
    at_end = layers[layers["where"] == "at the end"].set_index("layers")
    for pair in at_end.index[at_end.index.str.contains(",")]:
        a, b = pair.split(", ")
        for measure, column in ((LOGIT, "Δ logit difference"), (TOP, "Δ top-1")):
            rows.append((f"layer {a}", f"layer {b}", measure, *at_end.loc[[a, b, pair], column]))
    table = pd.DataFrame(rows, columns=["a", "b", "measure", "a alone", "b alone", "both"])
    lost = ["a alone", "b alone", "both"]
    scale = table["measure"].map({LOGIT: -1 / whole, TOP: -1.0})
    table[lost] = table[lost].mul(scale, axis=0)
    return table.assign(ratio=redundancy(table))


def redundancy(losses: pd.DataFrame) -> pd.Series:
    """Joint over summed loss where each costs little and both more; elsewhere NaN."""
    alone = losses[["a alone", "b alone"]]
    little = (alone.abs() < LITTLE).all(axis=1) & (losses["both"] > LITTLE)
    return (losses["both"] / alone.sum(axis=1).clip(lower=FLOOR)).where(little)


# --- gates ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """What was measured on a model: tables for the card, and the gates."""

    accuracy: pd.DataFrame
    kinds: pd.DataFrame
    heads: pd.DataFrame
    stages: pd.DataFrame
    steps: pd.DataFrame
    layers: pd.DataFrame
    pairs: pd.DataFrame
    direct: pd.DataFrame
    gates: pd.DataFrame

    @property
    def missed(self) -> list[str]:
        """The gates that are not passed."""
        return self.gates["gate"][~self.gates["passed"]].tolist()

    @property
    def worst(self) -> float:
        """The lowest top-1 accuracy over what the choice of a seed looks at."""
        return worst_top1(self.accuracy)


def worst_top1(accuracy: pd.DataFrame, splits: Iterable[str] = CHOSEN_BY) -> float:
    """The lowest top-1 accuracy over some splits, ABBA and BABA."""
    kept = accuracy["split"].isin(list(splits)) & accuracy["giver"].eq("repeated")
    return float(accuracy["top1"][kept].min())


def measure(folder: Path, n: int = 1000) -> Evidence:
    """Everything that the gates, the choice of a seed and the model card need, on the CPU."""
    model = load_model(folder, device="cpu", dtype=torch.float64)
    stages = name_stages(head_evidence(Bench(model, "seen")))
    bench = Bench(model, "unseen both")
    accuracy, kinds = accuracy_table(model, n), kinds_table(model, n // 2)
    heads = head_evidence(bench)
    heads.insert(
        1, "stage", [next((x for x in stages if h in stages[x]), "") for h in heads["head"]]
    )
    tables = stage_evidence(bench, stages), step_evidence(bench, stages), layer_evidence(bench)
    pairs, direct = pair_evidence(bench, heads, tables[2]), direct_evidence(bench)
    gates = gate_table(accuracy, kinds, heads, *tables, pairs, direct, first_mover(bench, stages))
    return Evidence(accuracy, kinds, heads, *tables, pairs, direct, gates)


def direct_evidence(bench: Bench) -> pd.DataFrame:
    """What each kind of component writes into the logit difference itself, and its share."""
    parts, whole = logit_attribution(bench.clean.run)
    kind = bench.model.components["kind"].replace("bias row", "bias of the read-out")
    table = pd.Series(parts.mean(0)).groupby(kind.to_numpy(), sort=False).sum()
    whole = float(whole.mean())
    return pd.DataFrame(
        {"kind": table.index, "written": table.values, "share": table.values / whole}
    )


def first_mover(bench: Bench, stages: dict[str, list[str]]) -> pd.DataFrame:
    """By how much the mover that looks most at IO leads the next, on average: with interval."""
    names = heads_of(bench.model)
    looks = bench.attention(bench.clean.run, "END→IO")[[names.index(x) for x in stages["movers"]]]
    order = looks.mean(1).argsort(descending=True)
    lead = looks[order[0]] - (looks[order[1]] if len(order) > 1 else 0.0)
    return bootstrap(pd.DataFrame({"lead": lead.numpy()}), bench.batch.table["template"])


def gate_table(
    accuracy: pd.DataFrame,
    kinds: pd.DataFrame,
    heads: pd.DataFrame,
    stages: pd.DataFrame,
    steps: pd.DataFrame,
    layers: pd.DataFrame,
    pairs: pd.DataFrame,
    direct: pd.DataFrame,
    lead: pd.DataFrame,
) -> pd.DataFrame:
    """The gates, fixed before training: gate, wanted, measured, passed."""
    means = stages.pivot(index="ablated", columns="measure", values="value")
    clean, whole = means.loc["nothing"], means.loc["nothing", "logit difference"]
    after = {stage: means.loc[stage] for stage in STAGES}
    best = {
        stage: heads[heads["stage"] == stage].sort_values(edge).iloc[-1]
        for stage, edge in zip(STAGES, ("S2→S1", "END→S2", "END→IO"), strict=True)
    }
    finds = "S2→S1" if best["detectors"]["S2→S1"] > best["detectors"]["S2→S1+1"] else "S2→S1+1"
    third = accuracy["prefers IO"][accuracy["giver"] == "third"]
    lost = -steps.groupby("through")["Δ logit difference"].min() / whole
    through = [(f"lost along one path through a {name}", ">", 0.1, lost[name[0]])
               for name in ("query", "key", "value")]  # fmt: skip
    without = after["movers"]["logit difference"]
    redundant = pairs.groupby("measure")["ratio"].max().fillna(0.0)
    rows = [
        ("top-1, unseen pairs of names", ">", 0.97, worst_top1(accuracy, ["unseen pairs"])),
        ("top-1, unseen templates", ">", 0.93, worst_top1(accuracy, ["unseen templates"])),
        ("right, every other kind", ">", 0.95, kinds["right"].min()),
        ("prefers one of two alike, at most", "<", 0.1, (third - 0.5).abs().max()),
        (f"a detector's {finds}", ">", 0.5, best["detectors"][finds]),
        ("the same where S1 is replaced", "<", 0.05, best["detectors"][f"{finds} replaced"]),
        ("carriers' attention left without detectors", "<", 0.5,
         after["detectors"]["carriers' attention"] / clean["carriers' attention"]),
        ("top-1 without detectors", "<", 0.5, after["detectors"]["top-1"]),
        ("a carrier's END→S2", ">", 0.8, best["carriers"]["END→S2"]),
        ("the same to another, named last", "<", 0.05, best["carriers"]["END→last named"]),
        ("movers' preference left without carriers", "<", 0.2,
         after["carriers"]["movers' attention"] / clean["movers' attention"]),
        ("the first mover's END→IO", ">", 0.6, best["movers"]["END→IO"]),
        ("the same head's END→S1", "<", 0.2, best["movers"]["END→S1"]),
        ("logit difference lost without movers", ">", 0.25, 1 - without / whole),
        ("top-1 lost without movers", ">", 0.1, clean["top-1"] - after["movers"]["top-1"]),
        *through,
        ("changed by the layer that works least", ">", 0.1, working(layers, whole).min()),
        ("written by MLPs directly", "<", 1 / 3, direct.set_index("kind")["share"]["MLP"]),
        ("joint over summed loss, some pair", ">", 2.0, redundant.max()),
        ("lead of the first mover in END→IO, low end", ">", 0.0, lead["low"].item()),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["gate", "wanted", "bound", "measured"])
    above = table["measured"] > table["bound"]
    passed = above.where(table["wanted"] == ">", table["measured"] < table["bound"])
    wanted = table["wanted"] + " " + table.pop("bound").map("{:.3g}".format)
    return table.assign(wanted=wanted, passed=passed)


def working(layers: pd.DataFrame, whole: float) -> pd.Series:
    """What each layer changes of the logit difference: alone, or with one that backs it up.

    Two back each other up that together lose a tenth more of it than in sum.
    """
    change = (
        layers.groupby("layers")["Δ logit difference"].agg(lambda x: x[x.abs().idxmax()]) / whole
    )
    found = {}
    for layer in [x for x in change.index if "," not in x]:
        pairs = [x.split(", ") for x in change.index if "," in x and layer in x.split(", ")]
        backed = [
            -change[", ".join(pair)]
            for pair in pairs
            if change[", ".join(pair)] < sum(change[x] for x in pair) - LITTLE
        ]
        found[layer] = max(abs(change[layer]), *backed, 0)
    return pd.Series(found)
