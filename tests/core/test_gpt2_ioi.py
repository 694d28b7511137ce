"""The shipped model does what its card says, and training it can be interrupted."""

import json
import random
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

import evidence
import stories
import train_gpt2_ioi as script
from sparse_signals.core.model import load_model
from sparse_signals.core.prompts import encode, ioi_prompts
from sparse_signals.core.sentences import NAMES, TEMPLATES

MODEL = script.ASSETS
TINY = script.Recipe(steps=6, patience=2, batch=2, context=24, width=32, layers=3, heads=1)


@pytest.fixture(scope="module")
def loaded():
    return load_model(MODEL, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def model():
    return GPT2LMHeadModel.from_pretrained(MODEL, attn_implementation="eager").eval()


def test_size_and_shape(model):
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 16 * 2**20
    assert {x.dtype for x in load_file(MODEL / "model.safetensors").values()} == {torch.float32}
    assert model.config.model_type == "gpt2"
    assert model.config.n_embd // model.config.n_head >= 32


def test_every_prompt_is_in_the_vocabulary(loaded):
    for giver in ("repeated", "third"):
        prompts = ioi_prompts(500, tokenizer=loaded.tokenizer, giver=giver)
        batch = encode(loaded, prompts, bos=True)
        assert ["".join(x[1:]) for x in batch.labels] == list(prompts["text"])
    assert len(evidence.prompts_of("unseen both", loaded, 40).table) == 40
    assert set(ioi_prompts(1500, tokenizer=loaded.tokenizer)["io"]) == set(NAMES)


@pytest.mark.slow
def test_gates(model, loaded):
    accuracy = evidence.accuracy_table(model, loaded, n=400)
    assert evidence.missed_gates(accuracy) == []


def test_gates_can_be_missed():
    rows = [(split, "ABBA", 0.96, 0.7, 1.0) for split in evidence.SPLITS]
    columns = ["split", "order", "top1", "prefers_io", "logit_difference"]
    missed = evidence.missed_gates(pd.DataFrame(rows, columns=columns))
    assert len(missed) == 2 and "unseen pairs" in missed[0] and "third gives" in missed[1]


def test_the_card_shows_two_composed_stages():
    stages = pd.read_csv(MODEL / "stages.csv").fillna("")
    assert evidence.missed_stages(stages) == []
    seeds = json.loads((MODEL / "seeds.json").read_text(encoding="utf-8"))
    assert len([x for x in seeds if x["recipe"]["optimizer"] == "muon"]) >= 3
    assert "{{" not in (MODEL / "README.md").read_text(encoding="utf-8")


def test_the_stages_compose(model, loaded):
    table = pd.read_csv(MODEL / "heads.csv", dtype={"head": str})
    batch = evidence.prompts_of("unseen both", loaded, 60)
    _, z = evidence.run_heads(model, batch)
    means = {(x, y): z[x][batch.mask].mean(0)[y] for x in range(len(z)) for y in range(z.shape[3])}
    stages = evidence.stage_evidence(model, batch, table, means)
    assert evidence.missed_stages(stages) == []


def test_nothing_held_out_is_trained_on():
    rng = random.Random(0)
    for level in (0, 1, 2):
        for _ in range(100):
            text = stories.window(rng, level)
            people = [name for name in NAMES if name in text.replace(".", "").split()]
            pairs = [(a, b) for a in people for b in people if a != b]
            assert not any(stories.held_out_pair(a, b) for a, b in pairs)
    used = {t.text for t in TEMPLATES if not t.held_out}
    assert used == {t.text for t in evidence.SEEN} and not used & {t.text for t in evidence.UNSEEN}


class Interrupted(Exception):
    pass


def test_interrupted_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    whole = script.train(TINY, tmp_path / "a.pt", every=1).state_dict()
    step = script.train_step

    def stops_at_four(run, *rest):
        if run.step == 4:
            raise Interrupted
        return step(run, *rest)

    monkeypatch.setattr(script, "train_step", stops_at_four)
    with pytest.raises(Interrupted):
        script.train(TINY, tmp_path / "b.pt", every=3)
    monkeypatch.setattr(script, "train_step", step)
    resumed = script.train(TINY, tmp_path / "b.pt", every=3).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(SystemExit, match="another recipe"):
        script.train(replace(TINY, seed=1), tmp_path / "b.pt")


def test_missed_gates_fail_the_script(tmp_path, monkeypatch):
    empty = pd.DataFrame()
    failed = evidence.Candidate(tmp_path, {}, empty, empty, empty, ["too low"], 0.5)
    monkeypatch.setattr(script, "train_and_measure", lambda *_: failed)
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="no seed passes"):
        script.main()
    assert not (tmp_path / "out").exists()
