"""Small traces of every kind of model, to intervene on."""

from functools import cache

import pandas as pd
import torch

from sparse_signals.core.model import Model, load_model
from sparse_signals.core.prompts import Batch, encode, ioi_prompts
from sparse_signals.core.run import read_attention
from sparse_signals.interventions.changes import clean_run, read_layers
from sparse_signals.signals.firings import find_firings
from sparse_signals.tracing.contributions import Settings, read_weights
from sparse_signals.tracing.roots import Root, strongest_roots
from sparse_signals.tracing.trace import trace

SETTINGS = Settings(level=1.0, context=True)


def random_batch(tokens: torch.Tensor, mask: torch.Tensor) -> Batch:
    """Random tokens as prompts; IO and S are any two tokens."""
    table = pd.DataFrame({"text": [""] * len(tokens)})
    labels = [["?"] * int(n) for n in mask.sum(1)]
    numbers = torch.arange(len(tokens))
    return Batch(table, tokens, mask, labels, {}, 3 + numbers, 20 + numbers)


class Case:
    """A model, a batch, its trace, and what interventions on all of its prompts need."""

    def __init__(self, model: Model, batch: Batch, roots, settings=SETTINGS, traced=None):
        self.model, self.batch = model, batch
        self.weights = read_weights(model)
        self.trace = traced or trace(model, batch, roots, settings, weights=self.weights)
        self.layers, self.clean = read_layers(model), clean_run(model, batch)


def random_case(model: Model, tokens: torch.Tensor, mask: torch.Tensor) -> Case:
    """From all heads that fire from the last token."""
    attention = read_attention(model, tokens, mask)
    pairs = find_firings(attention, SETTINGS.level, SETTINGS.context)
    at_end = pairs[pairs.dest == (mask.sum(1) - 1)[pairs.prompt]].table()
    heads = at_end[["layer", "head"]].drop_duplicates().sort_values(["layer", "head"])
    roots = [Root(int(layer), int(head)) for layer, head in heads.to_numpy()]
    return Case(model, random_batch(tokens, mask), roots, SETTINGS)


@cache
def ioi_case(n: int = 6) -> Case:
    """The shipped model on its own task, in float64."""
    model = load_model("gpt2-ioi", device="cpu", dtype=torch.float64)
    table = ioi_prompts(n, seed=1, tokenizer=model.tokenizer)
    batch = encode(table, model.tokenizer, bos=model.bos, max_length=model.n_ctx)
    return Case(model, batch, strongest_roots(model, batch), Settings())
