"""Tasks: prompts, aligned counterfactuals and answers, for tokenizers of several kinds."""

import re
import warnings

import pandas as pd
import pytest
import torch

from encoding import byte_tokenizer, model_with, word_tokenizer
from shipped import needs_smollm2
from sparse_signals.core.model import load_model, logits
from sparse_signals.core.prompts import PromptError, ioi_prompts
from sparse_signals.core.questions import questions
from sparse_signals.core.sentences import NAMES
from sparse_signals.core.task_sentences import MEN, NOUNS, WOMEN
from sparse_signals.core.tasks import TASKS, ioi_counterfactuals, task_prompts

KINDS = [(name, kind) for name, task in TASKS.items() for kind in task.tables]
TWO_DIGITS = [*(f" {century}" for century in range(15, 19)), *(f"{n:02}" for n in range(100))]


def tokenizer_of(digits: int):
    """Every word of the tasks is a token with the space before it; years are tokens of `digits`."""
    tables = [task_prompts(name, 2000) for name in TASKS]
    texts = " ".join(pd.concat(tables)[["text", "counterfactual"]].stack())
    words = sorted({*re.findall(r"[^\W\d]+", texts), "she", "he", "is", "are"})
    return byte_tokenizer([*(f" {word}" for word in words), *(TWO_DIGITS if digits == 2 else [])])


@pytest.fixture(scope="module", params=[1, 2])
def model(request):
    return model_with(tokenizer_of(request.param), n_ctx=200)


def reads(model, tokens):
    return [model.tokenizer.decode([token]) for token in tokens]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_every_task_is_asked_of_aligned_prompts(model, name, kind):
    table = task_prompts(name, 60, seed=1, tokenizer=model.tokenizer, counterfactual=kind)
    with warnings.catch_warnings(action="error"):  # every answer is a token
        asked = questions(model, table)
    again = task_prompts(name, 60, seed=1, tokenizer=model.tokenizer, counterfactual=kind)
    pd.testing.assert_frame_equal(table, again)
    assert not table.equals(task_prompts(name, 60, tokenizer=model.tokenizer, counterfactual=kind))
    assert asked.objective.what == "logit difference"
    assert torch.equal(asked.batch.mask, asked.counterfactual.mask)
    differ = (asked.batch.tokens != asked.counterfactual.tokens) & asked.batch.mask
    assert differ.any(1).all()
    assert not differ.gather(1, asked.batch.last[:, None]).any()
    assert {"end"} < set(asked.batch.roles)


@pytest.mark.parametrize("name", TASKS)
def test_templates_are_held_out(name):
    task = TASKS[name]
    held = [template.held_out for template in task.templates]
    assert held.count(False) >= 6 and held.count(True) >= 4
    assert len({template.text for template in task.templates}) == len(held)
    for wanted in (True, False):
        table = task_prompts(name, 200, held_out=wanted)
        assert set(table["held_out"]) == {wanted}
        assert set(table["template"]) == {i for i, x in enumerate(held) if x == wanted}
    everything = task_prompts(name, 400)
    assert everything["held_out"].tolist() == [held[i] for i in everything["template"]]
    assert set(everything["held_out"]) == {True, False}


def test_flipping_swaps_the_answers_of_pronouns_and_agreement(model):
    """The counterfactual, read as a prompt of its own, has the answers the other way round."""
    table = task_prompts("pronouns", 40, tokenizer=model.tokenizer)
    for row in table.itertuples():
        (other,) = set(row.counterfactual.split()) & {
            f"{x}{end}" for x in NAMES for end in ("", ",")
        }
        assert (row.name in WOMEN, other.strip(",") in MEN) == ((row.answer == "she"),) * 2
    table = task_prompts("agreement", 40, tokenizer=model.tokenizer)
    for row in table.itertuples():
        assert row.answer == ("is" if row.noun in NOUNS else "are")
        several = NOUNS.get(row.noun) or next(x for x in NOUNS if NOUNS[x] == row.noun)
        assert row.text.replace(f" {row.noun} ", f" {several} ", 1) == row.counterfactual
    assert set(table["attractor"]) & set(NOUNS) and set(table["attractor"]) - set(NOUNS)
    assert (WOMEN[0], len(set(WOMEN) | set(MEN))) == ("Mary", len(NAMES)) and set(WOMEN) < set(
        NAMES
    )


def test_later_years_are_right(model):
    table = task_prompts("greater-than", 80, tokenizer=model.tokenizer)
    asked = questions(model, table)
    digits = len(table["answer"][0].split("|")[0])
    for n, row in enumerate(table.itertuples()):
        start = row.year[:digits]
        right, wrong = reads(model, asked.right[n]), reads(model, asked.wrong[n])
        assert right == row.answer.split("|") and wrong == row.wrong.split("|")
        assert min(right) > start and max(wrong) <= start and right and wrong
        equal = [] if digits == 2 else [start]  # the decade of the year itself is neither
        assert len({*right, *wrong, *equal}) == 10**digits
        place = row.text.index(row.year, row.text.index(row.text[-2:]) + 2)
        assert row.counterfactual == f"{row.text[:place]}01{row.text[place + 2 :]}"
        assert asked.batch.labels[n][int(asked.batch.roles["year"][n])] == start
        assert row.text.count(row.text[-2:]) >= 2


def test_induction_repeats_a_block_and_the_counterfactual_nothing(model):
    table = task_prompts("induction", 60, tokenizer=model.tokenizer)
    asked = questions(model, table)
    rows, roles, end = torch.arange(60), asked.batch.roles, asked.batch.last
    tokens, other = asked.batch.tokens, asked.counterfactual.tokens
    assert torch.equal(tokens[rows, roles["seen"]], tokens[rows, end])
    assert torch.equal(roles["seen"] + 1, roles["next"])
    assert tokens[rows, roles["next"]][:, None].tolist() == asked.right
    assert other[rows, roles["next"]][:, None].tolist() == asked.wrong
    for n in range(60):
        first, last = int(roles["next"][n]), int(end[n])
        assert int(other[n, last]) not in other[n, :last].tolist()
        assert asked.right[n][0] not in other[n, : last + 1].tolist()
        assert int(tokens[n, last - 1]) == int(tokens[n, first - 2])  # two words or more come again


# --- IOI -----------------------------------------------------------------------------------------


def test_the_prompts_of_ioi_are_those_that_they_were():
    table = task_prompts("ioi", 50, seed=3)
    columns = ["text", "io", "s", "order", "template", "place", "object"]
    pd.testing.assert_frame_equal(table[columns], ioi_prompts(50, seed=3)[columns])
    assert table["answer"].equals(table["io"]) and table["wrong"].equals(table["s"])


def test_counterfactuals_of_ioi():
    table = ioi_prompts(40, seed=2)
    named = re.compile(rf"\b({'|'.join(NAMES)})\b")
    for kind in ("flip", "abc"):
        for row, other in zip(table.itertuples(), ioi_counterfactuals(table, kind), strict=True):
            ours, theirs = named.findall(row.text), named.findall(other)
            assert named.sub("X", row.text) == named.sub("X", other)
            if kind == "flip":
                assert theirs == [*ours[:2], row.io] and ours[2] == row.s
            else:
                assert len({*ours, *theirs}) == 5 and len(set(theirs)) == 3
    assert ioi_counterfactuals(table, "abc", 1) != ioi_counterfactuals(table, "abc", 2)


def test_any_names_can_be_flipped():
    table = pd.DataFrame({"text": ["So Jo and Joan met. Jo told"], "io": ["Joan"], "s": ["Jo"]})
    assert ioi_counterfactuals(table) == ["So Jo and Joan met. Joan told"]
    with pytest.raises(PromptError, match="needs s twice and io once"):
        ioi_counterfactuals(table.assign(s="Joan", io="Jo"))
    with pytest.raises(PromptError, match="three other names are needed, 1 left"):
        ioi_counterfactuals(table, "abc", names=["Jo", "Kate"])
    with pytest.raises(PromptError, match="'flip' or 'abc', not 'xyz'"):
        ioi_counterfactuals(table, "xyz")


# --- what is refused or left out -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"name": "chess"}, "no task 'chess': choose among ioi, greater-than"),
        ({"counterfactual": "abc"}, "the counterfactual of pronouns is 'flip', not 'abc'"),
        ({"n": 0}, "at least one prompt"),
    ],
)
def test_bad_choices(choice, message):
    with pytest.raises(PromptError, match=message):
        task_prompts(**({"name": "pronouns", "n": 3} | choice))


def test_words_that_are_no_tokens_are_left_out_and_named():
    texts = [*task_prompts("pronouns", 2000)["text"], " she he"]
    tokenizer = word_tokenizer(texts, without=["Mary", "Emma"])
    with pytest.warns(UserWarning, match="pronouns: 2 of 54 names of women are .*: Mary, Emma$"):
        table = task_prompts("pronouns", 300, tokenizer=tokenizer)
    assert not table["text"].str.contains("Mary|Emma").any()
    with pytest.warns(UserWarning, match="ioi: 2 of 108 names are .*: Mary, Emma$"):
        table = task_prompts("ioi", 300, tokenizer=tokenizer, counterfactual="abc")
    assert not (table["text"] + table["counterfactual"]).str.contains("Mary|Emma").any()
    few = word_tokenizer(texts, without=WOMEN[2:])
    with pytest.raises(PromptError, match=r"needs 10 names of women as tokens, this .* has 2 of"):
        task_prompts("pronouns", 3, tokenizer=few)


def test_years_that_are_whole_tokens_cannot_be_asked_about():
    whole = word_tokenizer(task_prompts("greater-than", 3000)["text"])
    with pytest.raises(
        PromptError, match=r"greater-than needs 10 years as tokens, .* has 0 of 400"
    ):
        task_prompts("greater-than", 3, tokenizer=whole)


def test_what_the_shipped_model_can_be_asked():
    model = load_model("gpt2-ioi", device="cpu")
    asked = questions(model, task_prompts("ioi", 40, tokenizer=model.tokenizer))
    value = asked.objective.value(logits(model, asked.batch.tokens, asked.batch.last))
    other, last = asked.counterfactual.tokens, asked.counterfactual.last
    assert (value > 0).all() and (asked.objective.value(logits(model, other, last)) < 0).all()
    assert len(questions(model, task_prompts("induction", 9, tokenizer=model.tokenizer))) == 9
    for name in ("greater-than", "pronouns", "agreement"):
        with pytest.raises(PromptError, match=f"sentences of {name} have words .* vocabulary: "):
            task_prompts(name, 3, tokenizer=model.tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_smollm2_does_the_tasks(smollm, name):
    """As measured on 64 prompts: 98 % or more have F > 0, and the mean is 3.5 or more."""
    table = task_prompts(name, 64, seed=1, tokenizer=smollm.tokenizer)
    asked = questions(smollm, table)
    found = [
        asked.objective.value(logits(smollm, x.tokens, x.last))
        for x in (asked.batch, asked.counterfactual)
    ]
    assert (found[0] > 0).double().mean() > 0.95
    assert found[0].mean() > 3
    assert found[1].mean() < -1


@pytest.fixture(scope="module")
def smollm():
    needs_smollm2()
    return load_model("smollm2-135m", device="cpu")
