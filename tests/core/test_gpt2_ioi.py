"""The shipped model does what its card says, and training it can be interrupted."""

import random
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

import card
import evidence
import stories
import train_gpt2_ioi as script
from sparse_signals.core.model import load_model
from sparse_signals.core.prompts import encode, ioi_prompts
from sparse_signals.core.sentences import NAMES, TEMPLATES

MODEL = script.ASSETS
SHORT = (
    script.Lesson("drill", 1, 2),
    script.Lesson("naming", 2, 2),
    script.Lesson("answers", 3, 2),
)
TINY = script.Recipe(lessons=SHORT, batch=4, width=32, inner=16, heads=1, hinted=1)
BOOK = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def bench(model):
    return evidence.Bench(model, "unseen both", 80)


def shipped(name: str) -> pd.DataFrame:
    return pd.read_csv(MODEL / f"{name}.csv", keep_default_na=False, dtype={"head": str})


def test_size_and_shape():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 16 * 2**20
    assert {x.dtype for x in load_file(MODEL / "model.safetensors").values()} == {torch.float32}
    config = GPT2LMHeadModel.from_pretrained(MODEL).config
    assert config.model_type == "gpt2" and config.n_embd // config.n_head >= 32


def test_every_prompt_is_in_the_vocabulary(model):
    for giver in ("repeated", "third"):
        prompts = ioi_prompts(500, tokenizer=model.tokenizer, giver=giver)
        batch = encode(model, prompts, bos=True)
        assert ["".join(x[1:]) for x in batch.labels] == list(prompts["text"])
    assert len(evidence.prompts_of("unseen both", model, 40).table) == 40
    assert set(ioi_prompts(1500, tokenizer=model.tokenizer)["io"]) == set(NAMES)


def test_the_number_of_words_is_the_one_that_is_told(model):
    words = len(model.tokenizer) - len(model.tokenizer.all_special_ids)
    page = (script.ROOT / "book" / "command-line.md").read_text(encoding="utf-8")
    assert f"The shipped model knows {words} words." in page


def test_the_sentence_of_the_book_is_answered(model):
    table = pd.DataFrame({"text": [BOOK], "io": ["Mary"], "s": ["John"]})
    batch = encode(model, table, bos=True)
    assert evidence.end_logits(model, batch).argmax() == batch.io
    swapped = BOOK.replace("John gave", "Mary gave")
    best = evidence.end_logits(model, encode(model, [swapped], bos=True)).argmax()
    assert model.tokenizer.decode([int(best)]) == " John"


@pytest.mark.slow
def test_accuracy_is_that_of_the_card(model):
    again = evidence.accuracy_table(model, n=200)
    both = again.merge(shipped("accuracy"), on=["split", "giver", "order"], suffixes=("", " card"))
    assert len(both) == 16
    error = (0.25 / 100) ** 0.5  # of a share of 100 prompts, at most
    assert ((both["top1"] - both["top1 card"]).abs() < 4 * error).all()
    assert evidence.worst_top1(again) > 0.9


def test_the_stages_are_those_of_the_card(bench):
    stages = {stage: [] for stage in evidence.STAGES}
    for row in shipped("heads").itertuples():
        stages.get(row.stage, []).append(row.head)
    assert all(stages.values())
    found = evidence.stage_evidence(bench, stages).set_index(["ablated", "measure"])
    ours = shipped("stages").set_index(["ablated", "measure"])
    gap = (found["value"] - ours["value"].astype(float)).abs()
    bound = ours.index.get_level_values("measure").map(lambda x: 0.8 if "logit" in x else 0.1)
    assert (gap < bound).all()


def test_ablating_through_hooks_or_gates_is_the_same(bench):
    for roles in ((), ("end",), ("S2", "end")):
        one = bench.ablated(["0.0", "1.4", "2.2"], *roles)
        two = bench.without(["0.0", "1.4", "2.2"], *roles)
        torch.testing.assert_close(one.difference, two.difference)
        assert torch.equal(one.top1, two.top1)
        assert (one.difference - bench.clean.difference).abs().max() > 1e-3


def test_a_path_is_part_of_an_ablation(bench):
    senders, receivers = evidence.heads_of(bench.model, 0), evidence.heads_of(bench.model, 1)
    one = bench.ablated(senders, "S2", inputs="v", receivers=receivers)
    whole = bench.ablated(senders, "S2")
    clean = bench.clean.run.pattern
    torch.testing.assert_close(one.run.pattern[:2], clean[:2])  # values change no attention before
    assert (whole.run.pattern[1] - clean[1]).abs().max() > 0.1


def test_the_counterfactual_repeats_nobody(bench):
    batch = evidence.counterfactual(bench.batch, bench.model, evidence.UNSEEN)
    same = batch.tokens == bench.batch.tokens
    rows = torch.arange(len(same))
    assert not same[rows, bench.batch.roles["S1"]].any() and (~same).sum() == len(same)


def test_what_is_written_directly_adds_up(bench):
    table = evidence.direct_evidence(bench)
    assert table["share"].sum() == pytest.approx(1)
    assert table["written"].sum() == pytest.approx(float(bench.clean.difference.mean()))


def test_missed_gates_are_named(bench):
    gates = shipped("gates")
    assert len(gates) == 22 and gates["gate"].is_unique
    layers = pd.DataFrame(
        [("0", -6.0), ("1", 0.1), ("2", -0.1), ("0, 1", -6.0), ("0, 2", -6.1), ("1, 2", -2.0)],
        columns=["layers", "Δ logit difference"],
    )
    worked = evidence.working(layers, 8.0)  # 1 and 2 back each other up
    assert worked.tolist() == [0.75, 0.25, 0.25]
    losses = [(0.01, 0.02, 0.12), (0.3, 0.01, 0.9), (0.01, 0.01, 0.02), (-0.02, 0.01, 0.2)]
    losses = pd.DataFrame(losses, columns=["a alone", "b alone", "both"])
    ratio = evidence.redundancy(losses)
    assert ratio[[0, 3]].tolist() == pytest.approx([4.0, 20.0]) and ratio[[1, 2]].isna().all()


def test_the_card_is_whole(model):
    text = (MODEL / "README.md").read_text(encoding="utf-8")
    assert "{{" not in text
    for head in evidence.heads_of(model):
        assert f"| {head} |" in text
    assert len([x for x in shipped("seeds").columns if x.startswith("seed")]) >= 5


# --- stories -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", stories.KINDS)
def test_answers_are_those_named_once(kind):
    rng = random.Random(3)
    for _ in range(200):
        told = stories.story(rng, kind=kind)
        words = re.findall(r"\w+", told.text)
        count = {name: words.count(name) for name in NAMES if name in words}
        assert set(told.answers) == {name for name in count if count[name] == 1} != set()
        assert [x for x in count if count[x] > 1] == [told.repeated] * (told.repeated is not None)
        assert told.text.endswith(" to") and "[" not in told.text


def test_where_the_repeated_one_stands_does_not_tell():
    """Neither the last person named, nor the first, nor the last before the end, is a shortcut."""
    rng = random.Random(4)
    told = [x for x in (stories.story(rng) for _ in range(3000)) if x.repeated]
    named = [[w for w in re.findall(r"\w+", x.text) if w in NAMES] for x in told]
    last = sum(x.repeated == names[-1] for x, names in zip(told, named, strict=True)) / len(told)
    first = sum(x.repeated == names[0] for x, names in zip(told, named, strict=True)) / len(told)
    assert 0.5 < last < 0.95 and 0.3 < first < 0.7


def test_nothing_held_out_is_trained_on():
    rng = random.Random(0)
    for _ in range(2000):
        words = set(re.findall(r"\w+", stories.story(rng).text))
        people = [name for name in NAMES if name in words]
        assert not any(stories.held_out_pair(a, b) for a in people for b in people if a != b)
    used = {t.text for t in TEMPLATES if not t.held_out}
    assert used == {t.text for t in evidence.SEEN} and not used & {t.text for t in evidence.UNSEEN}
    assert stories.held_out_pair(
        *re.findall(r"\w+", stories.story(rng, True).text)[:0] or (NAMES[0], NAMES[10])
    )


def test_a_drill_says_again_after_a_name_that_was_there():
    rng, again = random.Random(5), 0
    for _ in range(200):
        entries = stories.drill(rng).rstrip(".").split(": ")[1].split(", ")
        names = [entry.split()[0] for entry in entries]
        marked = [entry.endswith(" again") for entry in entries]
        assert marked == [name in names[:n] for n, name in enumerate(names)]
        again += sum(marked)
    assert again > 200


def test_stories_are_in_the_vocabulary_and_fit():
    rng, tokenizer = random.Random(6), stories.build_tokenizer(64)
    texts = [stories.story(rng).text for _ in range(2000)] + [
        stories.drill(rng) for _ in range(500)
    ]
    rows = tokenizer(texts)["input_ids"]
    assert max(map(len, rows)) <= 64
    assert not any(tokenizer.unk_token_id in row for row in rows)


# --- training ------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def test_interrupted_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    whole = script.train(TINY, tmp_path / "a.pt", every=1).state_dict()
    step = script.train_step

    def stops(run, *rest):
        if run.step == 5:
            raise Interrupted
        return step(run, *rest)

    for every in (2, 3):  # at the end of a lesson, and within one
        path = tmp_path / f"{every}.pt"
        monkeypatch.setattr(script, "train_step", stops)
        with pytest.raises(Interrupted):
            script.train(TINY, path, every=every)
        monkeypatch.setattr(script, "train_step", step)
        resumed = script.train(TINY, path, every=every).state_dict()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(SystemExit, match="another recipe"):
        script.train(replace(TINY, seed=1), path)


def test_new_layers_change_nothing_at_first():
    tokenizer = stories.build_tokenizer(64)
    run = script.build_model(replace(TINY, copying=0.0), len(tokenizer))
    rows = script.rows_at(3, TINY, tokenizer)
    with script.depth(run.model, 1), torch.no_grad():
        early = run.model(rows.tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(run.model(rows.tokens).logits, early)


def test_hints_are_in_the_weights():
    run = script.build_model(TINY, 50)
    Q, K, V = run.model.transformer.h[2].attn.c_attn.weight.split(TINY.width, dim=1)
    torch.testing.assert_close(Q, -run.code @ K)  # of its only head
    torch.testing.assert_close(run.model.transformer.h[2].attn.c_proj.weight, TINY.copying * V.T)
    torch.testing.assert_close(run.code @ run.code.T, torch.eye(TINY.width))


def test_the_seed_that_misses_fewest_gates_is_chosen(tmp_path):
    class Found:
        def __init__(self, missed, worst):
            self.missed, self.worst = missed, worst

    seeds = [Found(["a"], 1.0), Found([], 0.98), Found([], 0.99), Found([], 0.99)]
    found = [script.Candidate(tmp_path, script.Recipe(n), x) for n, x in enumerate(seeds)]
    assert script.choose(found).recipe.seed == 2
    assert script.choose(found[:1]).recipe.seed == 0


def test_tables_of_the_card():
    table = pd.DataFrame({"head": ["0.0"], "value": [0.12345], "n": [3]})
    assert card.markdown(table) == "| head | value | n |\n| --- | --- | --- |\n| 0.0 | 0.123 | 3 |"
