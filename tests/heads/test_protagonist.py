from dataclasses import replace

import pandas as pd
import pytest
import torch

import sparse_signals as ss
from sparse_signals.core.prompts import PromptError
from sparse_signals.heads.protagonist import find_protagonist, protagonist, template_of


def looking(model, batch, shares, templates):
    """A run in which head (layer, head) gives IO shares[(layer, head)][prompt] of its attention."""
    batch = replace(batch, table=pd.DataFrame({"text": "", "template": templates}))
    batch.roles.update(end=batch.last, IO=torch.zeros(len(batch.tokens), dtype=torch.long))
    ran = ss.run(model, batch)
    ran.pattern[:] = 0
    for (layer, head), values in shares.items():
        row = torch.arange(len(values))
        ran.pattern[layer, row, head, batch.last, 0] = torch.tensor(values, dtype=torch.float64)
    return ran


@pytest.fixture
def own(batch):
    return replace(batch, roles={})


def test_the_protagonist_has_the_largest_mean_and_leads_the_runner_up(tiny_gpt2, own):
    shares = {(1, 2): [0.9] * 8, (0, 3): [0.2, 0.4] * 4, (2, 1): [0.6, 0.4] * 4}
    found = protagonist(looking(tiny_gpt2, own, shares, [0, 0, 1, 1, 2, 2, 3, 3]))
    assert (found.name, found.runner_up) == ("1.2", "2.1")
    assert found.attention == pytest.approx(0.9)
    assert found.lead == found.low == found.high == pytest.approx(0.4)  # the same in all templates
    assert found.is_clear
    assert found.verdict.startswith("leads the runner-up, head 2.1, by 0.400 [0.400, 0.400]")


def test_a_lead_that_one_template_makes_is_a_tie(tiny_gpt2, own):
    """The mean leads by 0.1, and in half of the samples without the last template it does not."""
    shares = {(1, 2): [0.5] * 6 + [0.9] * 2, (2, 1): [0.5] * 8}
    by_template = protagonist(looking(tiny_gpt2, own, shares, [0, 0, 1, 1, 2, 2, 3, 3]))
    assert by_template.lead == pytest.approx(0.1)
    assert by_template.low == pytest.approx(0)
    assert not by_template.is_clear
    assert "is tied with the runner-up, head 2.1" in by_template.verdict


def test_the_lead_is_over_the_best_of_all_other_heads_in_each_sample(tiny_gpt2, own):
    """Each rival wins one template, so that in every sample with one template only, one of them."""
    shares = {(1, 2): [0.6] * 8, (2, 1): [1.0] * 4 + [0.0] * 4, (0, 0): [0.0] * 4 + [1.0] * 4}
    found = protagonist(looking(tiny_gpt2, own, shares, [0] * 4 + [1] * 4))
    assert found.lead == pytest.approx(0.1)
    assert (found.low, found.high) == pytest.approx((-0.4, 0.1))


def test_prompts_without_templates_are_their_own_units(own):
    assert template_of(own).tolist() == list(range(8))


def test_prompts_without_names_are_refused(tiny_gpt2, own):
    with pytest.raises(PromptError, match="two names"):
        protagonist(ss.run(tiny_gpt2, own))


def test_the_protagonist_of_a_model_is_the_same_each_time_and_has_a_name():
    model = ss.load_model("gpt2-ioi", device="cpu")
    found = find_protagonist(model)
    assert found == find_protagonist(model)
    assert found.attention > 0.8 and found.lead >= 0
