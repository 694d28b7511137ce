"""Prompts, their tokens and their roles; bad input is refused with the reason."""

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparse_signals.core.checkpoints import NAMES
from sparse_signals.core.prompts import PromptError, encode, ioi_prompts, read_prompts, role_table
from sparse_signals.core.sentences import OBJECTS, PLACES, TEMPLATES


def word_tokenizer(texts, without=()):
    """One token a word, with its space, for the words of `texts` only."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    words |= {f"Ġ{name}" for name in NAMES}
    words -= {f"Ġ{name}" for name in without}
    vocabulary = ["<|endoftext|>", "<|unknown|>", *sorted(words)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "<|unknown|>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    special = {"bos_token": "<|endoftext|>", "unk_token": "<|unknown|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(ioi_prompts(2000, seed=1).text)


def test_material_is_large_enough_and_clean():
    assert len(NAMES) == len(set(NAMES)) >= 100
    assert len({template.text for template in TEMPLATES}) >= 15
    assert any(t.held_out for t in TEMPLATES) and not all(t.held_out for t in TEMPLATES)
    for template in TEMPLATES:
        assert all(template.text.count(f" [{slot}]") == 1 for slot in "ABS")
        assert template.text.endswith(" to")
    assert not set(PLACES) & set(OBJECTS)


def test_prompts_are_reproducible_and_balanced():
    table = ioi_prompts(40, seed=3)
    pd.testing.assert_frame_equal(table, ioi_prompts(40, seed=3))
    assert not table.equals(ioi_prompts(40, seed=4))
    assert (table["order"] == "ABBA").sum() == 20
    for row in table.itertuples():
        first = min((row.io, row.s), key=row.text.index)
        assert (first == row.io) == (row.order == "ABBA")


def test_third_giver_repeats_nobody(tokenizer):
    table = ioi_prompts(50, giver="third", order="ABBA")
    assert set(table["order"]) == {"ABBA"}
    assert all(len({row.io, row.s, row.third}) == 3 for row in table.itertuples())
    batch = encode(table, tokenizer, bos=True, max_length=48)
    assert "S2" not in batch.roles and "third" in batch.roles


def test_roles_point_at_their_tokens(tokenizer):
    batch = encode(ioi_prompts(60), tokenizer, bos=True, max_length=48)
    rows = torch.arange(60)
    for role, ids in {"IO": batch.io, "S1": batch.s, "S2": batch.s}.items():
        assert torch.equal(batch.tokens[rows, batch.roles[role]], ids)
    assert (batch.roles["S1"] < batch.roles["S2"]).all()
    assert torch.equal(batch.roles["S1+1"], batch.roles["S1"] + 1)
    ends = [batch.labels[i][pos] for i, pos in enumerate(batch.roles["end"].tolist())]
    assert set(ends) == {" to"}


def test_padding_is_on_the_right_and_bos_is_explicit(tokenizer):
    with_bos = encode(ioi_prompts(30), tokenizer, bos=True, max_length=48)
    without = encode(ioi_prompts(30), tokenizer, bos=False, max_length=48)
    assert (with_bos.tokens[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(with_bos.mask.sum(1), without.mask.sum(1) + 1)
    assert torch.equal(with_bos.roles["S2"], without.roles["S2"] + 1)
    assert (with_bos.mask.int().diff(dim=1) <= 0).all()
    assert [len(x) for x in with_bos.labels] == with_bos.mask.sum(1).tolist()
    text = ["".join(labels) for labels in without.labels]
    assert text == list(without.table["text"])


def test_role_table_holds_sets(tokenizer):
    text = ["The bus was late, and Mary waited with John by the park. Then John gave a ring to"]
    table = pd.DataFrame({"text": text, "io": ["Mary"], "s": ["John"]})
    roles = role_table(encode(table, word_tokenizer(text), bos=True, max_length=48))
    of = roles.groupby("pos")["role"].agg(set)
    john = roles[roles["token"] == " John"]["pos"].unique()
    assert of[john[0]] == {"S1"} and of[john[1]] == {"S2"}
    assert of[john[0] + 1] == {"S1+1"} and of[john[0] - 1] == {"S1-1"}
    assert of[0] == {""} and of[of.index[-1]] == {"end"}


def test_plain_texts_have_no_roles(tokenizer):
    batch = encode(["The bus was late"], tokenizer, bos=False, max_length=48)
    assert batch.roles == {} and batch.io is None and batch.s is None
    assert set(role_table(batch)["role"]) == {""}


def test_single_token_names_only():
    small = word_tokenizer(ioi_prompts(500).text, without=["Mary", "Paul"])
    table = ioi_prompts(300, tokenizer=small)
    assert not set(table["io"]) & {"Mary", "Paul"}
    with pytest.raises(PromptError, match=r"single token.*: Mary"):
        ioi_prompts(3, tokenizer=small, names=["Mary", "John", "Alice"])
    with pytest.raises(PromptError, match=r"single token.*: Mary"):
        named = pd.DataFrame({"text": ["The bus was late"], "io": ["Mary"], "s": ["John"]})
        encode(named, small, bos=False, max_length=48)


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
def test_bad_texts(texts, message, tokenizer):
    with pytest.raises(PromptError, match=message):
        encode(texts, tokenizer, bos=True, max_length=8)


def test_a_name_that_is_missing_is_refused(tokenizer):
    table = ioi_prompts(2).assign(io="Matthew")
    with pytest.raises(PromptError, match="no IO in prompt 0"):
        encode(table, tokenizer, bos=True, max_length=48)


def test_prompts_from_files(tmp_path, tokenizer):
    table = ioi_prompts(6)
    lines, sheet = tmp_path / "a.txt", tmp_path / "a.csv"
    lines.write_text("\n\n".join(table["text"]) + "\n", encoding="utf-8")
    table[["text", "io", "s"]].to_csv(sheet, index=False)
    columns = ["text", "io", "s", "order"]
    pd.testing.assert_frame_equal(read_prompts(lines)[columns], table[columns])
    pd.testing.assert_frame_equal(read_prompts(sheet)[columns[:3]], table[columns[:3]])
    assert encode(read_prompts(sheet), tokenizer, bos=True, max_length=48).roles.keys() >= {"S2"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{}", "a .txt or .csv"),
        ("a.txt", "\n", "holds no prompts"),
        ("a.csv", "prompt\nhello\n", "column 'text'"),
        ("a.txt", "Mary and John came. Paul spoke to\n", "one name twice"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(PromptError, match=message):
        read_prompts(path)
    with pytest.raises(PromptError, match="no such file"):
        read_prompts(tmp_path / "missing.txt")
