"""F: one number that the logits at the last token of a prompt have, and what is asked of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_signals.core.model import Model
from sparse_signals.core.prompts import Batch, PromptError

Tokens = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Objective:
    """What is asked of the logits at the last token of every prompt, as one number F.

    F = Σ_k weight_k · logit(token_k), or with `logarithm` F = ln Σ_k P(token_k) over the tokens
    whose weight is not 0. Tokens of weight 0 fill the rows up.

    >>> asked = Objective.difference([[3, 4]], [[5]])
    >>> asked.weights.tolist(), asked.value(torch.eye(6)[3:4]).item()
    ([[0.5, 0.5, -1.0]], 0.5)
    """

    tokens: Int[Tensor, "prompt k"]
    weights: Float[Tensor, "prompt k"]
    logarithm: bool = False

    @classmethod
    def difference(cls, right: Tokens, wrong: Tokens) -> "Objective":
        """The mean logit of some tokens less that of others, for every prompt.

        Raises PromptError where a prompt has no right or no wrong token, or one that is both.
        """
        rows = list(zip(right, wrong, strict=True))
        for n, (ours, theirs) in enumerate(rows):
            if not ours or not theirs:
                raise PromptError(f"prompt {n} has no {'wrong ' if ours else ''}answer")
            if both := sorted({*ours} & {*theirs}):
                raise PromptError(f"prompt {n}: token {both[0]} is both right and wrong")
        parts = [[1 / len(a)] * len(a) + [-1 / len(b)] * len(b) for a, b in rows]
        return cls(_filled([[*a, *b] for a, b in rows], 0), _filled(parts, 0.0))

    @classmethod
    def of_names(cls, batch: Batch) -> "Objective":
        """logit(IO) − logit(S). Raises PromptError where the prompts have no names."""
        io, wrong = batch.answers("the answer that is asked for")[:, :, None].unbind(1)
        return cls.difference(io.tolist(), wrong.tolist())

    @classmethod
    def log_probability(cls, right: Tokens) -> "Objective":
        """ln P of the next token being one of some, for every prompt; PromptError if there is none.

        The same token twice counts once.
        """
        rows = [list(dict.fromkeys(row)) for row in right]
        if not all(rows):
            raise PromptError(f"prompt {rows.index([])} has no answer")
        return cls(_filled(rows, 0), _filled([[1.0] * len(row) for row in rows], 0.0), True)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def what(self) -> str:
        """In words, with the sign of every part."""
        if self.logarithm:
            return "ln P(answer)"
        return "logit difference" if bool((self.weights < 0).any()) else "logit"

    def rows(self, rows: slice) -> "Objective":
        """The same of some of the prompts."""
        return Objective(self.tokens[rows], self.weights[rows], self.logarithm)

    def to(self, like: Tensor) -> "Objective":
        """The same where another tensor is, with weights of its kind."""
        return Objective(self.tokens.to(like.device), self.weights.to(like), self.logarithm)

    def value(self, logits: Float[Tensor, "prompt vocab"]) -> Float[Tensor, "prompt"]:
        """F of every prompt; can be differentiated."""
        asked = self.to(logits)
        found = logits.gather(1, asked.tokens)
        if not self.logarithm:
            return torch.linalg.vecdot(found, asked.weights)
        chosen = found.masked_fill(asked.weights == 0, -torch.inf)
        return chosen.logsumexp(1) - logits.logsumexp(1)

    def right(self, logits: Float[Tensor, "prompt vocab"]) -> Bool[Tensor, "prompt vocab"]:
        """Which tokens are right: those of positive weight."""
        asked = self.to(logits)
        wanted = (asked.weights > 0).to(logits)
        return torch.zeros_like(logits).scatter_add(1, asked.tokens, wanted) > 0

    def probability(self, logits: Float[Tensor, "prompt vocab"]) -> Float[Tensor, "prompt"]:
        """P(answer): that the next token is right."""
        return (logits.softmax(-1) * self.right(logits)).sum(1)

    def comes_first(self, logits: Float[Tensor, "prompt vocab"]) -> Bool[Tensor, "prompt"]:
        """Whether the token of the largest logit is right."""
        return self.right(logits).gather(1, logits.argmax(1, keepdim=True))[:, 0]


def aligned_objective(
    model: Model, batch: Batch, counterfactual: Batch, objective: Objective | None = None
) -> Objective:
    """The objective of prompts that are aligned with their counterfactuals, token by token.

    None: logit(IO) − logit(S). Raises PromptError where prompts and counterfactuals differ in
    number or length or are too long for the model, and for the objective of other prompts.
    """
    ours, theirs = batch.mask, counterfactual.mask
    if ours.shape != theirs.shape:
        raise PromptError(
            f"the counterfactuals are {theirs.shape[0]} prompts of up to {theirs.shape[1]} tokens, "
            f"the prompts {ours.shape[0]} of up to {ours.shape[1]}: both must be alike"
        )
    if uneven := (ours != theirs).any(1).nonzero().flatten().tolist():
        n = uneven[0]
        raise PromptError(
            f"prompt {n} has {int(ours[n].sum())} tokens and its counterfactual "
            f"{int(theirs[n].sum())}: they must have the same number"
        )
    if ours.shape[1] > model.n_ctx:
        raise PromptError(f"prompts have {ours.shape[1]} tokens; {model.name} takes {model.n_ctx}")
    objective = Objective.of_names(batch) if objective is None else objective
    if len(objective) != len(ours):
        raise PromptError(f"the objective is of {len(objective)} prompts, not of these {len(ours)}")
    return objective


def first_change(batch: Batch, counterfactual: Batch) -> int:
    """The first position at which any of the prompts differs from its counterfactual.

    At most that of a last token: where nothing differs, the answer is still to be computed.
    """
    differ = (batch.tokens != counterfactual.tokens) & batch.mask
    first = differ.any(0).nonzero().flatten().tolist()
    return min([*first[:1], int(batch.last.min())])


def _filled(rows: Sequence[Sequence[int | float]], filler: int | float) -> Tensor:
    """Rows of different lengths as one tensor."""
    length = max(map(len, rows), default=0)
    kind = torch.float64 if isinstance(filler, float) else torch.int64
    return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows], dtype=kind)
