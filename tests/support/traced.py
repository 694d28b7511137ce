"""Small traces of every kind of model, to intervene on."""

from functools import cache

import pandas as pd
import torch

from sparse_signals.core.model import Model, load_model
from sparse_signals.core.prompts import Batch, encode, ioi_prompts
from sparse_signals.core.run import run
from sparse_signals.interventions.case import Case, prepare
from sparse_signals.interventions.changes import clean_run
from sparse_signals.signals.firings import find_firings
from sparse_signals.tracing.contributions import Settings
from sparse_signals.tracing.roots import Root, strongest_roots
from sparse_signals.tracing.trace import trace

SETTINGS = Settings(level=1.0, context=True, fraction=1.0)


def random_batch(tokens: torch.Tensor, mask: torch.Tensor) -> Batch:
    """Random tokens as prompts; IO and S are any two tokens."""
    table = pd.DataFrame({"text": [""] * len(tokens)})
    labels = [["?"] * int(n) for n in mask.sum(1)]
    numbers = torch.arange(len(tokens))
    return Batch(table, tokens, mask, labels, {}, 3 + numbers, 20 + numbers)


def random_case(model: Model, tokens: torch.Tensor, mask: torch.Tensor) -> Case:
    """From all heads that fire from the last token."""
    whole = run(model, random_batch(tokens, mask))
    pairs = find_firings(whole, SETTINGS.level, SETTINGS.context)
    at_end = pairs[pairs.dest == whole.batch.last[pairs.prompt]].table()
    heads = at_end[["layer", "head"]].drop_duplicates().sort_values(["layer", "head"])
    roots = [Root(int(layer), int(head)) for layer, head in heads.to_numpy()]
    return Case(trace(whole, roots, SETTINGS), clean_run(model, whole.batch))


@cache
def ioi_case(n: int = 6) -> Case:
    """The shipped model on its own task, in float64."""
    model = load_model("gpt2-ioi", device="cpu", dtype=torch.float64)
    batch = encode(model, ioi_prompts(n, seed=1, tokenizer=model.tokenizer))
    return prepare(run(model, batch), strongest_roots(model, batch), Settings(fraction=1.0))
