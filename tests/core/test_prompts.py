"""Prompts, their tokens and their roles; bad input is refused with the reason."""

import re
import warnings
from dataclasses import replace

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from encoding import byte_tokenizer, model_with, sentencepiece_tokenizer, word_tokenizer
from sparse_signals.core.prompts import (
    PromptError,
    encode,
    exchanged,
    ioi_prompts,
    role_table,
)
from sparse_signals.core.reading import read_texts, with_names
from sparse_signals.core.sentences import NAMES, OBJECTS, PLACES, TEMPLATES

NAMED = "Then, Tom and Kate left the park and Tom gave a ring to"


@pytest.fixture(scope="module")
def model():
    return model_with(word_tokenizer([*ioi_prompts(2000, seed=1).text, NAMED]))


def test_material_is_large_enough_and_clean():
    assert len(NAMES) == len(set(NAMES)) >= 100
    assert len({template.text for template in TEMPLATES}) >= 15
    assert any(t.held_out for t in TEMPLATES) and not all(t.held_out for t in TEMPLATES)
    for template in TEMPLATES:
        assert all(template.text.count(f" [{slot}]") == 1 for slot in "ABS")
        assert template.text.endswith(" to")
    assert not set(PLACES) & set(OBJECTS)


def test_exchanged_prompts_differ_in_the_giver_alone():
    prompts = ioi_prompts(6, seed=1)
    other = exchanged(prompts)
    for one, two in zip(prompts.itertuples(), other.itertuples(), strict=True):
        words = list(zip(one.text.split(), two.text.split(), strict=True))
        different = [(a.strip(",."), b.strip(",.")) for a, b in words if a != b]
        assert different == [(one.s, one.io)]
        assert (two.io, two.s, two.text.count(two.s)) == (one.s, one.io, 2)
        assert {one.order, two.order} == {"ABBA", "BABA"}
    pd.testing.assert_frame_equal(exchanged(other), prompts)


def test_prompts_are_reproducible_and_balanced():
    table = ioi_prompts(40, seed=3)
    pd.testing.assert_frame_equal(table, ioi_prompts(40, seed=3))
    assert not table.equals(ioi_prompts(40, seed=4))
    assert (table["order"] == "ABBA").sum() == 20
    for row in table.itertuples():
        first = min((row.io, row.s), key=row.text.index)
        assert (first == row.io) == (row.order == "ABBA")


def test_third_giver_repeats_nobody(model):
    table = ioi_prompts(50, giver="third", order="ABBA")
    assert set(table["order"]) == {"ABBA"}
    assert all(len({row.io, row.s, row.third}) == 3 for row in table.itertuples())
    batch = encode(model, table, bos=True)
    assert "S2" not in batch.roles and "third" in batch.roles


def test_roles_point_at_their_tokens(model):
    batch = encode(model, ioi_prompts(60), bos=True)
    rows = torch.arange(60)
    for role, ids in {"IO": batch.io, "S1": batch.s, "S2": batch.s}.items():
        assert torch.equal(batch.tokens[rows, batch.roles[role]], ids)
    assert (batch.roles["S1"] < batch.roles["S2"]).all()
    assert torch.equal(batch.roles["S1+1"], batch.roles["S1"] + 1)
    ends = [batch.labels[i][pos] for i, pos in enumerate(batch.roles["end"].tolist())]
    assert set(ends) == {" to"}


def test_padding_is_on_the_right_and_bos_is_explicit(model):
    with_bos = encode(model, ioi_prompts(30), bos=True)
    without = encode(model, ioi_prompts(30), bos=False)
    assert (with_bos.tokens[:, 0] == model.tokenizer.bos_token_id).all()
    assert torch.equal(with_bos.mask.sum(1), without.mask.sum(1) + 1)
    assert torch.equal(with_bos.roles["S2"], without.roles["S2"] + 1)
    assert (with_bos.mask.int().diff(dim=1) <= 0).all()
    assert [len(x) for x in with_bos.labels] == with_bos.mask.sum(1).tolist()
    text = ["".join(labels) for labels in without.labels]
    assert text == list(without.table["text"])


def test_role_table_holds_sets(model):
    text = ["The bus was late, and Mary waited with John by the park. Then John gave a ring to"]
    table = pd.DataFrame({"text": text, "io": ["Mary"], "s": ["John"]})
    roles = role_table(encode(model_with(word_tokenizer(text)), table, bos=True))
    of = roles.groupby("pos")["role"].agg(set)
    john = roles[roles["token"] == " John"]["pos"].unique()
    assert of[john[0]] == {"S1"} and of[john[1]] == {"S2"}
    assert of[john[0] + 1] == {"S1+1"} and of[john[0] - 1] == {"S1-1"}
    assert of[0] == {""} and of[of.index[-1]] == {"end"}


def test_plain_texts_have_no_roles(model):
    batch = encode(model, ["The bus was late"], bos=False)
    assert batch.roles == {} and batch.io is None and batch.s is None
    assert set(role_table(batch)["role"]) == {""}


def test_single_token_names_only():
    small = word_tokenizer(ioi_prompts(500).text, without=["Mary", "Paul"])
    table = ioi_prompts(300, tokenizer=small)
    assert not set(table["io"]) & {"Mary", "Paul"}
    with pytest.raises(PromptError, match=r"single token.*: Mary"):
        ioi_prompts(3, tokenizer=small, names=["Mary", "John", "Alice"])
    named = pd.DataFrame({"text": ["The bus was late"], "io": ["Mary"], "s": ["John"]})
    with pytest.raises(PromptError, match=r"single token.*: Mary"):
        encode(model_with(small), named)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "at least one"),
        ({"order": "AB"}, "order must be"),
        ({"giver": "nobody"}, "giver must be"),
        ({"names": ["Mary", "Mary"]}, "2 different"),
        ({"templates": []}, "no templates"),
    ],
)
def test_bad_choices(change, message):
    with pytest.raises(PromptError, match=message):
        ioi_prompts(**({"n": 2} | change))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no prompts"),
        (["  "], "empty"),
        (["The zebra was late"], "not in the vocabulary: zebra"),
        (["The bus was late, and Mary waited with John"], "11 tokens, the limit is 8"),
    ],
)
def test_bad_texts(texts, message, model):
    with pytest.raises(PromptError, match=message):
        encode(replace(model, n_ctx=8), texts, bos=True)


def test_a_name_that_is_missing_is_refused(model):
    table = ioi_prompts(2).assign(io="Matthew")
    with pytest.raises(PromptError, match="prompt 0: io is 'Matthew', which is there 0 times"):
        encode(model, table, bos=True)


def test_prompts_from_files(tmp_path, model):
    table = ioi_prompts(6)
    lines, sheet = tmp_path / "a.txt", tmp_path / "a.csv"
    lines.write_text("\n\n".join(table["text"]) + "\n", encoding="utf-8")
    table[["text", "io", "s"]].to_csv(sheet, index=False)
    columns = ["text", "io", "s", "order"]
    named = with_names(read_texts(lines))
    assert named.index.tolist() == [1, 3, 5, 7, 9, 11] and named.index.name == "line"
    pd.testing.assert_frame_equal(named[columns].reset_index(drop=True), table[columns])
    named = with_names(read_texts(sheet))
    assert named.index.tolist() == [2, 3, 4, 5, 6, 7]
    pd.testing.assert_frame_equal(named.reset_index(drop=True), table[columns[:3]])
    batch = encode(model, named, bos=True)
    assert batch.roles.keys() >= {"S2"} and batch.table.index.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "content",
    [
        f' text, io ,\tS \n"{NAMED}", Kate ,Tom\n'.encode(),
        f'\ufefftext,io,s\r\n"{NAMED} ", "Kate", Tom \r\n,,\r\n'.encode(),
        f'"text","io","s"\n\n"{NAMED}"\n'.encode("utf-8-sig"),
    ],
)
def test_spaces_and_marks_in_a_file_of_values_change_nothing(tmp_path, content):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    row = with_names(read_texts(path)).iloc[0]
    assert (row["text"], row["io"], row["s"]) == (NAMED, "Kate", "Tom")


def test_a_mark_before_lines_of_text_is_dropped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(f"  {NAMED} \n".encode("utf-8-sig"))
    assert read_texts(path)["text"].tolist() == [NAMED]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{}", "a .txt or .csv"),
        ("a.txt", "\n", "holds no prompts"),
        ("a.csv", "text,io\n,\n", "holds no prompts"),
        ("a.csv", "prompt\nhello\n", "needs a column 'text'; its first line is 'prompt'"),
        ("a.csv", "", "needs a column 'text'"),
        ("a.csv", "text,io, IO\nThen,Tom,Kate\n", "several columns called io: keep one"),
        ("a.csv", "text,io\nThen\nSo, Tom, Kate\n", "line 3: a text with commas needs quotes"),
        ("a.csv", 'text,io\n"So, Tom" ,Tom\n', "line 2: ',' expected after"),
        ("a.csv", 'text,io\n"Then, Tom\nSo\n', "line 3: unexpected end of data"),
        ("a.txt", "\nMary and John came. Paul spoke to\n", "line 2: needs one name twice"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(PromptError, match=message):
        with_names(read_texts(path))
    with pytest.raises(PromptError, match="no such file"):
        read_texts(tmp_path / "missing.txt")


def test_a_row_without_text_is_not_left_out(tmp_path, model):
    path = tmp_path / "a.csv"
    path.write_text(f'text,io,s\n"{NAMED}",Kate,Tom\n,Kate,Tom\n')
    with pytest.raises(PromptError, match="line 3: an empty prompt"):
        encode(model, read_texts(path))


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"io": "Kate"}, {"s": "Tom"}, {"io": "Kate", "s": ""}])
def test_the_names_that_are_missing_are_inferred(given):
    row = with_names(pd.DataFrame([{"text": NAMED, **given}])).iloc[0]
    assert (row["io"], row["s"], row["order"]) == ("Kate", "Tom", "BABA")


def test_a_name_that_is_given_need_not_be_in_the_list():
    table = pd.DataFrame({"text": [NAMED.replace("Kate", "Zebulon")], "io": ["Zebulon"]})
    assert with_names(table)["s"].tolist() == ["Tom"]
    with pytest.raises(PromptError, match=r"it has Tom 2× of .* columns io and s of a .csv"):
        with_names(table[["text"]])


@pytest.mark.parametrize(
    ("text", "given", "reason"),
    [
        (NAMED, {"io": "Tom"}, "io is 'Tom', there 2×"),
        (NAMED, {"s": "Kate"}, "s is 'Kate', there 1×"),
        (NAMED, {"io": "Alice"}, "io is 'Alice', there 0×"),
        (f"{NAMED} Tom", {}, "it has Tom 3×, Kate 1× of [0-9]+ known names"),
        ("Then, the bus left", {}, "it has none of "),
        (NAMED.replace("Kate", "kate"), {}, "a name has a capital letter, but kate has none"),
    ],
)
def test_names_that_contradict_the_sentence_are_refused(text, given, reason):
    table = pd.DataFrame([{"text": NAMED, **dict.fromkeys(given)}, {"text": text, **given}])
    with pytest.raises(PromptError, match=rf"prompt 1: needs one name twice .*\({reason}"):
        with_names(table)


@pytest.mark.parametrize(
    ("io", "s", "text", "problem"),
    [
        ("Tom", "Tom", NAMED, "io and s are both 'Tom'"),
        ("Tom", "Kate", NAMED, "io is 'Tom', which is there 2 times, not 1"),
        ("Kate", "Tom", f"{NAMED} Tom", "s is 'Tom', which is there 3 times, not 2"),
        ("Kate", "Alice", NAMED, "s is 'Alice', which is there 0 times, not 2"),
    ],
)
def test_roles_that_contradict_the_sentence_are_refused(model, io, s, text, problem):
    table = pd.DataFrame({"text": [text], "io": [io], "s": [s]}, index=pd.Index([7], name="line"))
    with pytest.raises(PromptError, match=f"line 7: {problem}"):
        encode(model, with_names(table))


def test_a_missing_name_is_not_a_name(model):
    table = pd.DataFrame({"text": [NAMED, NAMED], "io": ["Kate", None], "s": ["Tom", "Tom"]})
    with pytest.raises(PromptError, match="prompt 1: no name in column io"):
        encode(model, table)


@pytest.mark.parametrize("legacy", [True, False])
def test_names_are_found_where_a_space_is_put_before_every_text(legacy):
    words = sorted({*NAMES, *re.findall(r"\w+", " ".join(ioi_prompts(500).text))})
    model = model_with(sentencepiece_tokenizer(words, legacy), n_ctx=200)
    table = ioi_prompts(20, tokenizer=model.tokenizer)
    table.loc[20, ["text", "io", "s"]] = "Tom and Kate left and Tom gave a ring to", "Kate", "Tom"
    batch = encode(model, table)
    pieces = model.tokenizer.convert_ids_to_tokens
    assert pieces(batch.io.tolist()) == [f"▁{name}" for name in table["io"]]
    for role, column in {"IO": "io", "S1": "s", "S2": "s"}.items():
        found = batch.tokens[torch.arange(21), batch.roles[role]]
        assert pieces(found.tolist()) == [f"▁{name}" for name in table[column]]
    assert batch.roles["S1"][20] == 0


# --- tokens --------------------------------------------------------------------------------------


def test_a_padding_token_without_an_embedding_is_not_used(model):
    tokenizer = word_tokenizer([NAMED])
    words = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    batch = encode(model_with(tokenizer, words=words), [NAMED, "Then, Tom"])
    assert batch.mask.sum(1).tolist() == [14, 3] and batch.tokens.max() < words
    with pytest.raises(PromptError, match=f"does not fit: it gives token {words}, the model has"):
        encode(model_with(tokenizer, words=words), [NAMED, "[PAD] Tom"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Then, mary came", r"not in the vocabulary: mary \(write Mary\)"),
        ("Mary and Tom came", "'Mary' is known only with a space before it"),
        ("Then, Tom Then", "'Then' is known only without a space before it"),
        ("Then,  Tom came", "a space too many"),
        ("Then, Tom came ", "a space too many"),
        ("Then, <|unknown|> came", r"<\|unknown\|> is a special token, no word: leave it out"),
    ],
)
def test_what_is_unknown_is_named(text, message):
    model = model_with(word_tokenizer(["Then, Tom came and"]))
    with pytest.raises(PromptError, match=f"prompt 1: {message}"):
        encode(model, ["Then, Tom came", text])


def test_a_name_that_is_another_token_at_the_start_is_refused():
    model = model_with(byte_tokenizer([" Tom", " Kate", " and", " gave", "Tom"]))
    table = pd.DataFrame({"text": ["Tom and Kate and Tom gave"], "io": ["Kate"], "s": ["Tom"]})
    with pytest.raises(PromptError, match="'Tom' is another token without a space before it"):
        encode(model, table)
    table = table.replace({"text": {"Tom and Kate": "So Tom and Kate and Tomatoes"}}, regex=True)
    with pytest.raises(PromptError, match="the token of 'Tom' is part of another word too"):
        encode(model, table)


@pytest.mark.parametrize("kind", ["words", "bytes", "legacy", "metaspace"])
@pytest.mark.parametrize("bos", [True, False])
def test_a_doubled_beginning_is_warned_of(kind, bos):
    words = ["Then", "Tom", "came"]
    model = {
        "words": lambda: word_tokenizer(["Then, Tom came", " Then"]),
        "bytes": lambda: byte_tokenizer(words),
        "legacy": lambda: sentencepiece_tokenizer(words, True),
        "metaspace": lambda: sentencepiece_tokenizer(words, False),
    }[kind]()
    model = model_with(model, bos=True)
    text = f"{model.tokenizer.bos_token}Then, Tom came"
    with warnings.catch_warnings(record=True, action="always") as caught:
        batch = encode(model, ["Then, Tom came", text, text], bos=bos)
        encode(model, ["Then, Tom came"])
    begin = model.tokenizer.bos_token_id
    assert batch.tokens[1:, :2].eq(begin).sum(1).tolist() == [1 + bos] * 2
    found = [str(warning.message) for warning in caught]
    assert len(found) == bos
    assert not bos or found[0].startswith(f"prompt 1: begins with {model.tokenizer.bos_token} twic")


@pytest.mark.parametrize(
    "text",
    [
        "Then, Tom came",
        " Then  Tom\tcame \n",
        "Zoë's naïve “Tom”",
        "你好 Tom",
        "a ▁b",
        "don 't , so .",
    ],
)
def test_tokens_that_read_as_the_prompt_are_accepted(text):
    for tokenizer in (
        byte_tokenizer(["Then", " Tom"]),
        sentencepiece_tokenizer(["Then", "Tom"], True),
        sentencepiece_tokenizer(["Then", "Tom"], False),
    ):
        assert encode(model_with(tokenizer, n_ctx=200), [text]).mask.all()


def test_tokens_that_do_not_read_as_the_prompt_are_refused():
    """As where the class named beside a tokenizer loses spaces, or words that it does not know."""
    spaces = byte_tokenizer(["Then", " Tom"])
    spaces.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(PromptError, match=r"wrong class: its tokens read 'ThenTom', the prompt is"):
        encode(model_with(spaces), ["Then Tom"])
    lost = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, ",": 1}, [])))
    with pytest.raises(PromptError, match="wrong class: its tokens read 'a'"):
        encode(model_with(lost), ["a Tom"])
