"""Objectives: one number of the logits, as PyTorch gives it."""

import pytest
import torch

from sparse_signals.core.objective import Objective
from sparse_signals.core.prompts import PromptError

LOGITS = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).double()


def test_a_difference_is_of_means():
    asked = Objective.difference([[1, 2], [3]], [[4], [5, 6, 7]])
    expected = [LOGITS[0, 1:3].mean() - LOGITS[0, 4], LOGITS[1, 3] - LOGITS[1, 5:8].mean()]
    assert torch.allclose(asked.value(LOGITS), torch.stack(expected))
    assert asked.what == "logit difference"


def test_a_log_probability_is_of_any_of_the_answers():
    asked = Objective.log_probability([[1, 2, 2], [3]])
    p = LOGITS.softmax(-1)
    assert torch.allclose(asked.value(LOGITS).exp(), torch.stack([p[0, 1:3].sum(), p[1, 3]]))
    assert asked.what == "ln P(answer)"


def test_rows_are_some_of_the_prompts():
    asked = Objective.difference([[1, 2], [3]], [[4], [5]])
    assert torch.equal(asked.rows(slice(1, 2)).value(LOGITS[1:]), asked.value(LOGITS)[1:])


def test_what_is_missing_or_both_is_said():
    with pytest.raises(PromptError, match="prompt 1 has no wrong answer"):
        Objective.difference([[1], [2]], [[3], []])
    with pytest.raises(PromptError, match="prompt 0 has no answer"):
        Objective.log_probability([[], [2]])
    with pytest.raises(PromptError, match="token 2 is both"):
        Objective.difference([[1, 2]], [[2]])


def test_right_tokens_are_those_of_positive_weight():
    asked = Objective.difference([[1, 1, 2], [0]], [[4], [5, 6, 7]])
    p = LOGITS.softmax(-1)
    assert torch.allclose(asked.probability(LOGITS), torch.stack([p[0, 1:3].sum(), p[1, 0]]))
    best = torch.zeros(2, 9).index_fill(1, torch.tensor([0]), 1.0)
    assert asked.comes_first(best).tolist() == [False, True]
    assert asked.comes_first(best.roll(2, 1)).tolist() == [True, False]
