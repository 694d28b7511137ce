"""Circuits made up for the tests of charts and pages: deterministic, shaped like real ones."""

import numpy as np
import pandas as pd

ROLES = ["other", "IO", "IO+1", "S1-1", "S1", "S1+1", "S2", "S2+1", "end"]
PROMPTS = 256
TOKENS = ["<|endoftext|>", " Mary", " and", " John", " went", " to", " the", " store", ",", " John",
          " gave", " a", " drink", " to"]  # fmt: skip


def components(layers: int, heads: int) -> pd.DataFrame:
    """Every component of a model, as in `Model.components`, by name: its kind and height."""
    rows = [(kind, kind, -1.0) for kind in ("embedding", "position", "bias row")]
    rows += [(f"{l}.{h}", "head", float(l)) for l in range(layers) for h in range(heads)]
    rows += [(f"bias {l}", "bias", l + 0.3) for l in range(layers)]
    rows += [(f"MLP {l}", "MLP", l + 0.5) for l in range(layers)]
    return pd.DataFrame(rows, columns=["component", "kind", "height"]).set_index("component")


def pooled_edges(n: int, layers: int = 4, heads: int = 6) -> pd.DataFrame:
    """`n` edges of a circuit pooled over prompts: few are in most prompts, many in a few."""
    rng, height = np.random.default_rng(0), components(layers, heads)["height"]
    rows = set()
    while len(rows) < n:
        down = f"{rng.integers(layers)}.{rng.integers(heads)}"
        writers = [name for name, at in height.items() if at < height[down]]
        src, dest = sorted(rng.integers(len(ROLES), size=2))
        rows.add((str(rng.choice(writers)), down, str(rng.choice(["dest", "src"])), dest, src))
    table = pd.DataFrame(sorted(rows), columns=["upstream", "downstream", "side", "dest", "src"])
    table["dest_role"], table["src_role"] = (
        table[side].map(lambda i: ROLES[i]) for side in ("dest", "src")
    )
    table["role"] = table["dest_role"].where(table["side"] == "dest", table["src_role"])
    weight = rng.gamma(2, 1, n)
    return table.drop(columns=["dest", "src"]).assign(
        up_layer=table["upstream"].map(height),
        down_layer=table["downstream"].map(height),
        prompts=np.maximum(1, (PROMPTS * rng.beta(0.5, 2, n)).astype(int)),
        of=PROMPTS,
        weight=weight,
        low=weight * 0.8,
        high=weight * 1.2,
        share=rng.beta(2, 5, n),
    )


def prompt_edges(n: int) -> pd.DataFrame:
    """`n` edges of the trace of one prompt, which is `TOKENS`."""
    rng, known = np.random.default_rng(1), components(4, 6)
    height, rows = known["height"], set()
    while len(rows) < n:
        down = f"{rng.integers(4)}.{rng.integers(6)}"
        writers = [name for name, at in height.items() if at < height[down]]
        src, dest = sorted(int(x) for x in rng.choice(range(1, len(TOKENS)), 2, replace=False))
        rows.add((str(rng.choice(writers)), down, str(rng.choice(["dest", "src"])), dest, src))
    table = pd.DataFrame(sorted(rows), columns=["upstream", "downstream", "side", "dest", "src"])
    return table.assign(
        kind=table["upstream"].map(known["kind"]),
        token=table["dest"].where(table["side"] == "dest", table["src"]),
        weight=rng.gamma(2, 1, n),
        share=rng.beta(1, 5, n),
        up_layer=table["upstream"].map(height),
        down_layer=table["downstream"].map(height),
    )


def answer_edges(n: int, layers: int = 4, heads: int = 6) -> pd.DataFrame:
    """`n` pooled edges of a trace from the answer: signed shares, the answer on top."""
    rng, height = np.random.default_rng(2), components(layers, heads)["height"]
    height = height[height.index.str.fullmatch(r"embedding|MLP \d+|\d+\.\d+")]
    rows = set()
    while len(rows) < n:
        down = "answer" if rng.random() < 0.2 else str(rng.choice(height.index[1:]))
        top = height.get(down, float(layers))
        up = str(rng.choice(height.index[height < top]))
        role, dest = sorted(rng.integers(len(ROLES), size=2))
        if down == "answer":
            rows.add((up, ROLES[-1], "direct", down, ROLES[-1]))
        elif down.startswith("MLP"):
            rows.add((up, ROLES[dest], "MLP", down, ROLES[dest]))
        else:
            channel = str(rng.choice(["query", "key", "value"]))
            rows.add((up, ROLES[dest if channel == "query" else role], channel, down, ROLES[dest]))
    names = ["upstream", "role", "channel", "downstream", "dest_role"]
    table = pd.DataFrame(sorted(rows), columns=names)
    share = rng.gamma(0.5, 0.1, n) * rng.choice([1, 1, -1], n)
    return table.assign(
        up_layer=table["upstream"].map(height),
        down_layer=table["downstream"].map(height).fillna(float(layers)),
        prompts=np.maximum(1, (PROMPTS * rng.beta(0.5, 2, n)).astype(int)),
        of=PROMPTS,
        value=10 * share,
        share=share,
        low=share - 0.01,
        high=share + 0.01,
    )
