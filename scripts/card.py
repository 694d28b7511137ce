"""The model card of gpt2-ioi: `model_card.md` beside this script, with tables put in."""

import re
from pathlib import Path
from typing import Any

import pandas as pd

from evidence import LOGIT, STAGES, TOP, Evidence

Table = pd.DataFrame


def publish(found: dict[int, Evidence], recipe: dict[str, Any], out: Path) -> None:
    """Write the card of the chosen seed, and its tables as CSV, to `out`."""
    chosen = found[recipe["seed"]]
    tables = {
        "heads": chosen.heads, "stages": chosen.stages, "steps": chosen.steps,
        "layers": chosen.layers, "accuracy": chosen.accuracy, "kinds": chosen.kinds,
        "gates": chosen.gates, "roles": roles(chosen), "seeds": seed_table(found),
    }  # fmt: skip
    for name, table in tables.items():
        table.round(4).to_csv(out / f"{name}.csv", index=False, lineterminator="\n")
    (out / "README.md").write_text(card(chosen, recipe, tables), encoding="utf-8")


def card(chosen: Evidence, recipe: dict[str, Any], tables: dict[str, Table]) -> str:
    """The card as Markdown."""
    recipe = recipe | {"lessons": lessons(recipe["lessons"])}
    shown = tables | {
        "recipe": pd.DataFrame(recipe.items(), columns=["setting", "value"]),
        "gates": chosen.gates.replace({"passed": {True: "yes", False: "**no**"}}),
        "direct": chosen.direct, "pairs": redundant_pairs(chosen),
    }  # fmt: skip
    parts = {name: markdown(table) for name, table in shown.items()}
    missed = chosen.missed
    parts["missed"] = f"It misses: {'; '.join(missed)}." if missed else "It passes every gate."
    parts |= {"seed": str(recipe["seed"]), "hinted": hinted(chosen, recipe["hinted"])}
    parts["why"] = without_movers(chosen)
    ratios = chosen.pairs[chosen.pairs["measure"] == LOGIT]["ratio"]
    parts["largest"] = f"{ratios.max():.2f}"
    text = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], text)


def hinted(chosen: Evidence, number: int) -> str:
    """Which heads of each stage began with a hint, and which without."""
    told, heads = [], chosen.heads
    first = heads["head"].str.split(".").str[1].astype(int) < number
    for stage in STAGES:
        of = heads["stage"] == stage
        groups = [", ".join(heads["head"][of & x]) or "none" for x in (first, ~first)]
        told.append(f"Of the {stage}, {groups[0]} had one and {groups[1]} had not.")
    return " ".join(told)


def without_movers(chosen: Evidence) -> str:
    """What is left of the answer where all movers are ablated, and what carriers write into it."""
    left = chosen.stages[chosen.stages["ablated"] == "movers"].set_index("measure")["value"]
    whole, heads = clean_difference(chosen), chosen.heads
    written = heads["direct attribution"][heads["stage"] == "carriers"].sum()
    return (
        f"Without its movers the model still answers {100 * left[TOP]:.0f} of 100 prompts, with "
        f"{100 * left[LOGIT] / whole:.0f} % of the logit difference; the carriers write "
        f"{100 * written / whole:.0f} % of it into the logits themselves."
    )


def lessons(values: tuple[dict[str, Any], ...]) -> str:
    """What is asked for, layers, steps."""
    each = [
        f"{x['name']} ({x['layers']} layer{'s' * (x['layers'] > 1)}, {x['steps']} steps)"
        for x in values
    ]
    return ", ".join(each)


def markdown(table: Table) -> str:
    """A table in Markdown, numbers to three decimals."""
    rows = [table.columns, ["---"] * table.shape[1], *table.itertuples(index=False)]
    cells = [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def seed_table(found: dict[int, Evidence]) -> Table:
    """One column a seed: what the gates measured; a star where it does not pass."""
    columns = {}
    for seed, evidence in found.items():
        gates = evidence.gates
        star = gates["passed"].map({True: "", False: " *"})
        columns[f"seed {seed}"] = gates["measured"].map("{:.3f}".format) + star
    first = next(iter(found.values())).gates
    table = pd.DataFrame({"gate": first["gate"], "wanted": first["wanted"]} | columns)
    more = {
        "worst top-1": lambda x: f"{x.worst:.3f}",
        "gates missed": lambda x: len(x.missed),
        "participation of σ": lambda x: f"{x.heads['participation of σ'].mean():.1f}",
    }
    rows = [[name, "", *map(of, found.values())] for name, of in more.items()]
    return pd.concat([table, pd.DataFrame(rows, columns=table.columns)], ignore_index=True)


def redundant_pairs(chosen: Evidence, n: int = 3) -> Table:
    """The most redundant pairs by each measure."""
    pairs = chosen.pairs.dropna(subset="ratio").sort_values("ratio", ascending=False)
    return pairs.groupby("measure").head(n)


def clean_difference(chosen: Evidence) -> float:
    """The mean logit difference with nothing ablated."""
    rows = chosen.stages[chosen.stages["ablated"] == "nothing"]
    return float(rows.set_index("measure")["value"]["logit difference"])


def roles(chosen: Evidence) -> Table:
    """The roles of Wang et al. 2022 and the heads of this model that have them, by stated rules."""
    heads, whole = chosen.heads, clean_difference(chosen)
    written, at = heads["direct attribution"], heads.set_index("head")
    gathers = (heads["END→IO"] > 0.2) & (heads["END→IO"] > 2 * heads["END→S1"])
    pairs = chosen.pairs[(chosen.pairs["ratio"] > 2) & (chosen.pairs["measure"] == LOGIT)]
    backups = sorted({*pairs["a"], *pairs["b"]} & set(at.index[(gathers & (written > 0)).tolist()]))
    rules = [
        ("duplicate token", "S2→S1 above 0.3, below 0.1 where S1 is replaced",
         (heads["S2→S1"] > 0.3) & (heads["S2→S1 replaced"] < 0.1)),
        ("induction", "S2→S1+1 above 0.3, below 0.1 where S1 is replaced",
         (heads["S2→S1+1"] > 0.3) & (heads["S2→S1+1 replaced"] < 0.1)),
        ("previous token", "S1+1→S1 above 0.5", heads["S1+1→S1"] > 0.5),
        ("S-inhibition", "END→S2 above 0.3, below 0.1 to another who is named last",
         (heads["END→S2"] > 0.3) & (heads["END→last named"] < 0.1)),
        ("name mover", "END→IO above 0.2 and twice END→S1, writes in favour of IO",
         gathers & (written > 0)),
        ("negative name mover",
         "END→IO above 0.1, writes 2 % of the logit difference or more against IO",
         (heads["END→IO"] > 0.1) & (written < -0.02 * whole)),
    ]  # fmt: skip
    rows = [
        (role, rule, ", ".join(heads["head"][which]) or "absent") for role, rule, which in rules
    ]
    rule = "name mover; with another, loses twice the sum of the logit difference"
    rows.append(("backup name mover", rule, ", ".join(backups) or "absent"))
    return pd.DataFrame(rows, columns=["role in GPT-2 small", "rule here", "heads"])
