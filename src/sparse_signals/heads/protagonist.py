"""The head that the chapters follow: the one that looks most from the last token to the answer."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from sparse_signals.core.model import Model, activations, head_name
from sparse_signals.core.numbers import interval
from sparse_signals.core.prompts import Batch, PromptError, encode, exchanged, ioi_prompts
from sparse_signals.core.run import Run
from sparse_signals.core.sentences import TEMPLATES
from sparse_signals.core.stats import DRAWS, bounds, resample

EFFORT = 20_000  # prompts times heads
SENTENCES = tuple(template for template in TEMPLATES if not template.held_out)
"""What the choice is made on; the others are left for tests."""


@dataclass(frozen=True)
class Protagonist:
    """A head, its mean attention from `end` to IO, and its lead over the runner-up.

    `low` and `high` bound the lead over the best of all other heads, 95 %, templates resampled.
    """

    layer: int
    head: int
    attention: float
    runner_up: str
    lead: float
    low: float
    high: float

    @property
    def name(self) -> str:
        """The head as layer.head."""
        return head_name(self.layer, self.head)

    @property
    def is_clear(self) -> bool:
        """Whether it leads in 97.5 % of the draws, so that there is no tie."""
        return self.low > 0

    @property
    def verdict(self) -> str:
        """The lead in words, with its interval, to follow the head's name in a sentence."""
        lead = interval(self.lead, self.low, self.high)
        if self.is_clear:
            return f"leads the runner-up, head {self.runner_up}, by {lead} of attention"
        return f"is tied with the runner-up, head {self.runner_up}: its lead of {lead} is not clear"


def find_protagonist(model: Model) -> Protagonist:
    """The protagonist of a model: the same one in every chapter.

    Asks `protagonist` on prompts of `SENTENCES` and their `exchanged` twins, the same ones each
    time: as many as `EFFORT` allows for a model with so many heads.
    """
    n = max(4, EFFORT // (2 * model.n_layers * model.n_heads))
    prompts = ioi_prompts(n, tokenizer=model.tokenizer, templates=SENTENCES)
    batch = encode(model, pd.concat([prompts, exchanged(prompts)], ignore_index=True))
    pattern = activations(model, batch.tokens, ["pattern"])["pattern"]
    return _leader(_looks(pattern, batch), template_of(batch))


def protagonist(run: Run, draws: int = DRAWS, seed: int = 0) -> Protagonist:
    """The head with the largest mean attention A_ij from `end` to IO, over the prompts of a run.

    In each of `draws` bootstrap samples of the templates (of the prompts, where the table names no
    template) its lead is its mean minus the largest mean of another head. Raises PromptError where
    the prompts have no names.

    >>> chosen = protagonist(run)
    >>> chosen.lead >= 0, chosen.low <= chosen.lead <= chosen.high
    (True, True)
    """
    if not {"end", "IO"} <= set(run.batch.roles):
        raise PromptError("which head looks at the IO needs prompts with two names, IO and S")
    return _leader(_looks(run.pattern, run.batch), template_of(run.batch), draws, seed)


def _looks(
    pattern: Float[Tensor, "layer prompt head dest src"], batch: Batch
) -> Float[np.ndarray, "prompt layer head"]:
    prompt, end, io = np.arange(len(batch.tokens)), batch.roles["end"], batch.roles["IO"]
    return pattern[:, prompt, :, end, io].double().cpu().numpy()


def _leader(
    looks: Float[np.ndarray, "prompt layer head"],
    clusters: np.ndarray,
    draws: int = DRAWS,
    seed: int = 0,
) -> Protagonist:
    means = _means(looks.reshape(len(looks), -1), clusters, draws, seed)
    second, best = means[0].argsort(kind="stable")[-2:]
    leads = means[:, best] - np.delete(means, best, axis=1).max(axis=1)
    low, high = bounds(leads[1:])
    at, runner_up = (divmod(int(head), looks.shape[2]) for head in (best, second))
    attention, lead = float(means[0, best]), float(leads[0])
    return Protagonist(*at, attention, head_name(*runner_up), lead, float(low), float(high))


def template_of(batch: Batch) -> np.ndarray:
    """The independent unit of every prompt: its template; itself, where no template is named."""
    if "template" in batch.table:
        return batch.table["template"].to_numpy()
    return np.arange(len(batch.tokens))


def _means(
    values: Float[np.ndarray, "prompt head"], clusters: np.ndarray, draws: int, seed: int
) -> Float[np.ndarray, "sample head"]:
    """Means over prompts, of the data itself (row 0) and of samples of whole clusters."""
    names, cluster = np.unique(clusters, return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, cluster, values)
    times = resample(len(names), draws, seed)
    return (times @ sums) / (times @ np.bincount(cluster))[:, None]
