"""The head that the chapters follow: the one that looks most from the last token to the answer."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sparse_signals.core.model import head_name
from sparse_signals.core.numbers import interval
from sparse_signals.core.prompts import Batch, PromptError
from sparse_signals.core.run import Run
from sparse_signals.core.stats import DRAWS, bounds, resample


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
    prompt, end, io = np.arange(len(run)), run.batch.roles["end"], run.batch.roles["IO"]
    looks = run.pattern[:, prompt, :, end, io].double().cpu().numpy()  # prompt, layer, head
    means = _means(looks.reshape(len(run), -1), template_of(run.batch), draws, seed)
    second, best = means[0].argsort(kind="stable")[-2:]
    others = np.delete(means, best, axis=1).max(axis=1)
    leads = means[:, best] - others
    low, high = bounds(leads[1:])
    heads = run.model.n_heads
    runner_up = head_name(*divmod(int(second), heads))
    place = divmod(int(best), heads)
    return Protagonist(
        *place, float(means[0, best]), runner_up, float(leads[0]), float(low), float(high)
    )


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
