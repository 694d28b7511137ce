"""What is asked of prompts: tokens of answers, counterfactuals beside them, and roles."""

import pandas as pd
import pytest
import torch

from encoding import byte_tokenizer, model_with, sentencepiece_tokenizer, word_tokenizer
from sparse_signals.core.model import load_model, logits
from sparse_signals.core.prompts import PromptError, encode, ioi_prompts, roles_of
from sparse_signals.core.questions import answer_words, next_tokens, questions
from sparse_signals.core.reading import read_texts

TEXT = "The capital of Sweden is"


@pytest.fixture(scope="module")
def model():
    """Words with a space before them are tokens, and so are numbers of two digits."""
    words = [" capital", " of", " Sweden", " Norway", " is", " Stock", " Oslo", " Paris", " Rome"]
    years = [" 17", *(f"{n:02}" for n in range(100))]
    return model_with(byte_tokenizer([*words, *years, "Oslo"]), n_ctx=60)


def row(**columns):
    return pd.DataFrame([{"text": TEXT, "answer": "Oslo"} | columns])


def reads(model, rows):
    return [[model.tokenizer.decode([token]) for token in row] for row in rows]


@pytest.mark.parametrize(
    ("text", "item", "expected"),
    [
        ("So it is", "Oslo", [" Oslo"]),
        ("So it is ", "Oslo", ["Oslo"]),
        ("So it is (", "Oslo", ["Oslo"]),
        ("So it is", " Oslo", [" Oslo"]),
        ("So it is", ".", ["."]),
        ("from 17", "32", ["32"]),
        ("from the", "17", [" 17"]),
        ("So it is", "Stockholm", [" Stock", "h", "o", "l", "m"]),
    ],
)
def test_an_item_is_what_the_text_goes_on_with(model, text, item, expected):
    found = next_tokens(item, text, model.tokenizer)
    assert [model.tokenizer.decode([token]) for token in found] == expected
    whole = text + (" " if expected[0][0] == " " and item[0] != " " else "") + item
    ids = model.tokenizer(whole)["input_ids"]
    assert ids[-len(found) :] == found or text.endswith(" ")


@pytest.mark.parametrize("legacy", [True, False])
def test_items_where_a_space_is_put_before_every_text(legacy):
    tokenizer = sentencepiece_tokenizer(["to", "Oslo", "17", "32"], legacy)
    pieces = tokenizer.convert_ids_to_tokens
    assert pieces(next_tokens("Oslo", "go to", tokenizer)) == ["▁Oslo"]
    assert pieces(next_tokens("1", "to 17", tokenizer)) == ["1"]


def test_alternatives_and_numbers_of_tokens(model):
    oslo, rome = (next_tokens(x, "a", model.tokenizer)[0] for x in ("Oslo", "Rome"))
    asked = questions(model, row(answer=f"Oslo|#{rome}|Oslo", wrong=" Paris "))
    assert asked.right == [[oslo, rome]]
    assert reads(model, asked.wrong) == [[" Paris"]]
    assert asked.objective.weights.tolist() == [[0.5, 0.5, -1.0]]
    assert asked.objective.tokens.tolist() == [[oslo, rome, *asked.wrong[0]]]
    assert asked.counterfactual is None and asked.notes == ()


def test_of_several_tokens_the_first_is_asked_and_it_is_said(model):
    with pytest.warns(UserWarning, match="' Stockholm' is 5 tokens: its first, ' Stock', is the"):
        asked = questions(model, row(answer="Stockholm", wrong="Oslo"))
    assert reads(model, asked.right) == [[" Stock"]]
    with (
        pytest.warns(UserWarning, match=r"and so for 1 more"),
        pytest.raises(PromptError, match="wrong answer are the same token, ' Stock': 'The capital"),
    ):
        questions(model, row(answer="Stockholm", wrong="Stocks"))


def test_without_a_wrong_answer_it_is_a_log_probability(model):
    asked = questions(model, row(wrong=None))
    assert asked.objective.logarithm and asked.wrong == [[]]


def test_names_are_the_answer_where_none_is_given():
    table = ioi_prompts(6)
    model = model_with(word_tokenizer(table["text"]))
    asked = questions(model, table)
    assert asked.right == asked.batch.io[:, None].tolist()
    assert asked.wrong == asked.batch.s[:, None].tolist()
    assert set(asked.batch.roles) == {"IO", "S1", "S2", "S1+1", "end"}
    third = questions(model, table.assign(answer=table["s"], wrong=table["io"]))
    assert third.right == asked.wrong
    numbers = table["template"].tolist()
    same = asked.template[:, None] == asked.template
    assert same.tolist() == [[a == b for b in numbers] for a in numbers]


def test_without_any_answer_it_is_what_the_model_finds_likeliest():
    model = load_model("gpt2-ioi", device="cpu")
    texts = ["On Sunday Mary saw Paul", "Every Friday"]
    asked = questions(model, texts)
    for n, text in enumerate(texts):
        alone = encode(model, [text])
        assert asked.right[n] == [int(logits(model, alone.tokens)[0].argmax())]
    assert "likeliest" in asked.notes[0] and asked.objective.logarithm
    assert asked.template.tolist() == [0, 1]


def test_rows_are_some_of_the_prompts(model):
    texts = [TEXT, f"{TEXT} of"]
    table = pd.DataFrame({"text": texts, "answer": ["Oslo", "Rome"], "wrong": ["Rome", "Paris"]})
    table["counterfactual"] = [text.replace("Sweden", "Norway") for text in texts]
    whole = questions(model, table)
    part, alone = whole.rows(slice(1, 2)), questions(model, table[1:])
    assert (len(whole), len(part), part.right) == (2, 1, alone.right)
    assert torch.equal(part.objective.tokens, alone.objective.tokens)
    assert torch.equal(part.counterfactual.tokens[part.counterfactual.mask], alone_tokens(alone))
    assert torch.equal(whole.counterfactual.mask, whole.batch.mask)


def alone_tokens(asked):
    return asked.counterfactual.tokens[asked.counterfactual.mask]


def test_a_counterfactual_lies_beside_its_prompt_token_by_token(model):
    other = TEXT.replace("Sweden", "Norway")
    asked = questions(model, row(counterfactual=other))
    differ = asked.batch.tokens != asked.counterfactual.tokens
    assert [x for x, y in zip(asked.counterfactual.labels[0], differ[0], strict=True) if y] == [
        " Norway"
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"counterfactual": "The capital of Rome of is"}, r"has 8 tokens and the prompt 7, they"),
        ({"counterfactual": f"{TEXT} of"}, r"8 tokens .*: ' of' against ''"),
        ({"counterfactual": "The capital is"}, r": ' is' against ' of\| Sweden\| is'"),
        ({"answer": "#9999"}, "there is no token #9999: the model has"),
        ({"answer": "Oslo|Rome", "wrong": "Rome"}, "same token, ' Rome'"),
    ],
)
def test_what_does_not_fit_is_refused(model, columns, message):
    with pytest.raises(PromptError, match=message):
        questions(model, row(**columns))


@pytest.mark.parametrize("column", ["answer", "wrong", "counterfactual"])
@pytest.mark.parametrize("nothing", [None, float("nan"), "", " | "])
def test_a_column_is_filled_in_all_rows_or_in_none(model, column, nothing):
    full = row(wrong="Rome", counterfactual=TEXT)
    table = pd.concat([full, full], ignore_index=True).astype(object)
    table.loc[1, column] = nothing
    with pytest.raises(PromptError, match=f"prompt 1: nothing in column {column}, which other"):
        questions(model, table)


def test_a_word_that_is_not_known_is_named_and_so_is_its_prompt():
    model = model_with(word_tokenizer([TEXT, " Oslo"]))
    with pytest.raises(PromptError, match="prompt 1: not in the vocabulary: Rome"):
        questions(model, pd.DataFrame({"text": [TEXT] * 2, "answer": ["is", "Rome"]}))
    with pytest.raises(PromptError, match="counterfactuals: not in the vocabulary: Oslos"):
        questions(model, row(answer="is", counterfactual="The capital of Oslos is"))


def test_a_file_may_have_answers_counterfactuals_and_roles(tmp_path, model):
    path = tmp_path / "a.csv"
    other = TEXT.replace("Sweden", "Norway")
    header = "text,answer,wrong,counterfactual,at country"
    path.write_text(f"{header}\n{TEXT},Oslo|Rome,Paris,{other},{TEXT.index('Sweden')}\n")
    asked = questions(model, read_texts(path))
    assert reads(model, asked.right + asked.wrong) == [[" Oslo", " Rome"], [" Paris"]]
    place = int(asked.batch.roles["country"][0])
    assert asked.batch.labels[0][place] == " Sweden"
    assert asked.counterfactual.labels[0][place] == " Norway"


# --- roles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
def test_roles_are_at_characters(model, bos):
    texts = [TEXT, f"Oslo: {TEXT}"]
    table = pd.DataFrame({"text": texts, "at land": [x.index("Sweden") + 3 for x in texts]})
    batch = encode(model, table, bos=bos)
    found = [batch.labels[n][int(place)] for n, place in enumerate(batch.roles["land"])]
    assert found == [" Sweden"] * 2
    assert torch.equal(batch.roles["end"], batch.last)
    named = roles_of(batch).query("role != 'other'")
    assert sorted(named["role"]) == ["end", "end", "land", "land"]


def test_a_role_is_not_called_as_tokens_without_one(model):
    with pytest.raises(PromptError, match="'at other' is no role"):
        encode(model, pd.DataFrame({"text": [TEXT], "at other": [4]}))


@pytest.mark.parametrize("place", [99, -1, "here", None])
def test_a_role_outside_of_the_text_is_refused(model, place):
    with pytest.raises(PromptError, match="prompt 1: at land: no token at"):
        encode(model, pd.DataFrame({"text": [TEXT] * 2, "at land": [4, place]}))


def test_answers_in_words_are_cut_short(model):
    ids = questions(
        model, pd.DataFrame({"text": [TEXT], "answer": "Oslo|Paris|Rome|Norway"})
    ).right[0]
    words = [model.tokenizer.decode([token]).strip() for token in ids]
    assert answer_words(ids[:2], model.tokenizer) == " | ".join(words[:2])
    assert answer_words(ids, model.tokenizer) == " | ".join([*words[:3], "…"])
