"""Chapter 1: whether the repetition of a name decides where a head looks, by exchanging the giver.

Two prompts differ in one word: which of the two names is there once more. The names, their places
and all else stay, so that what moves with the giver is due to the repetition.
"""

import numpy as np
import pandas as pd
from jaxtyping import Float

from sparse_signals.core.model import head_name
from sparse_signals.core.run import Run
from sparse_signals.core.stats import bootstrap, false_discovery, sign_flip
from sparse_signals.heads.protagonist import template_of

MOVERS = ["repetition", "place"]


def exchange_effects(run: Run) -> pd.DataFrame:
    """What follows the repetition and what the place, in every head and pair of prompts.

    run: of prompts and then, in the same order, of `exchanged` prompts. With A the attention from
    `end`, both prompts of a pair taken together: repetition is the mean of A(IO) − A(S1), and
    place the mean of A(first name) − A(second name), both in shares of attention. follows: whether
    A(IO) > A(S1) in both prompts, so that the name looked at more changes with the giver.
    Columns: pair, template, layer, head, name, repetition, place, follows.
    """
    looks = _from_end(run, "IO") - _from_end(run, "S1")  # prompt, layer, head
    first, second = looks[: len(looks) // 2], looks[len(looks) // 2 :]
    io_first = run.batch.table["order"].to_numpy()[: len(first), None, None] == "ABBA"
    values = {
        "repetition": (first + second) / 2,
        "place": np.where(io_first, 1, -1) * (first - second) / 2,
        "follows": (first > 0) & (second > 0),
    }
    ranges = [range(size) for size in first.shape]
    index = pd.MultiIndex.from_product(ranges, names=["pair", "layer", "head"])
    table = pd.DataFrame({k: v.ravel() for k, v in values.items()}, index=index).reset_index()
    name = head_name(table["layer"], table["head"])
    return table.assign(name=name, template=template_of(run.batch)[table["pair"]])


def _from_end(run: Run, role: str) -> Float[np.ndarray, "prompt layer head"]:
    prompt, roles = np.arange(len(run)), run.batch.roles
    return run.pattern[:, prompt, :, roles["end"], roles[role]].cpu().numpy()


def head_effects(effects: pd.DataFrame, rate: float = 0.05) -> pd.DataFrame:
    """The two effects of every head, tested over templates, all heads together.

    One row per head: layer, head, name, repetition, place (means over pairs), and moves: what of
    the two is not zero at a false-discovery rate of `rate` over all heads and both effects,
    "repetition", "place", "both" or "neither" (signs of template means flipped).
    """
    keys = ["layer", "head", "name"]
    by_template = effects.groupby([*keys, "template"])[MOVERS].mean()
    heads = effects.groupby(keys)[MOVERS].mean().reset_index()
    stacked = [by_template[effect].unstack("template").to_numpy() for effect in MOVERS]
    p = np.stack([sign_flip(values) for values in stacked])
    found = false_discovery(p.ravel()).reshape(p.shape) <= rate
    moves = np.select([found.all(0), found[0], found[1]], ["both", *MOVERS], "neither")
    return heads.assign(moves=moves)


def share_that_follow(effects: pd.DataFrame) -> pd.DataFrame:
    """Of one head, the mean of follows, repetition and place with 95 % intervals over templates."""
    table = effects[["follows", *MOVERS]].astype(float)
    return bootstrap(table, effects["template"]).set_index("measure")


def repetition_verdict(found: pd.DataFrame) -> str:
    """Whether repetition decides where a head looks, as the interval of follows lies about 1/2.

    found: of `share_that_follow`. "decides", "does not decide", or "may or may not decide".
    """
    low, high = (found[end]["follows"] for end in ("low", "high"))
    if low > 0.5:
        return "decides"
    return "does not decide" if high < 0.5 else "may or may not decide"
