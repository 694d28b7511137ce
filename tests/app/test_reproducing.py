"""`sparse-signals reproduce`: its files, what it prints, and what it refuses."""

import json
import shutil

import pandas as pd
import pytest

from reproduced import SHIPPED, save_published_size
from sparse_signals.app import reproducing
from sparse_signals.app.cli import main
from sparse_signals.app.notebook import published
from sparse_signals.app.reproducing import page_of, said, verdicts
from sparse_signals.core.prompts import ioi_prompts
from sparse_signals.interventions.published_facts import Estimate, catalogue, side_by_side


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    return save_published_size(tmp_path_factory.mktemp("reproducing") / "two-layers", layers=2)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(reproducing, "PROMPTS", 6)


def test_files_hold_every_fact(said_reproduced, out):
    code, output, error = said_reproduced()
    assert code == 0 and "answers, firings and their slices" in error
    table = pd.read_parquet(out / "numbers.parquet")
    assert table["fact"].tolist() == [entry.fact for entry in catalogue(published())]
    sheet = pd.read_csv(out / "numbers.csv")
    assert sheet["verdict"].tolist() == table["verdict"].tolist()
    assert sorted(path.name for path in out.iterdir()) == [
        "numbers.csv",
        "numbers.md",
        "numbers.parquet",
    ]
    page = (out / "numbers.md").read_text(encoding="utf-8")
    assert page.startswith("# Published numbers, computed again on two-layers\n")
    assert "* prompts: 6 (this project's sentences, seed 0), of " in page
    for text in (page, output):
        assert "plain_omega_singular_values" in text and " nan" not in text and " inf" not in text
    assert "needs texts of the Pile" in page and "nothing to trace" in page
    assert str(out / "numbers.md") in output and "logit_diff/mean" in output


@pytest.fixture
def said_reproduced(said, two_layers, few):
    return lambda *more: said("reproduce --model", two_layers, *more)


def test_quiet_says_nothing(said_reproduced):
    assert said_reproduced("--quiet") == (0, "", "")


def test_own_prompts_are_taken(said_reproduced, out, tmp_path):
    path = tmp_path / "prompts.csv"
    ioi_prompts(5, seed=3)[["text", "io", "s"]].to_csv(path, index=False)
    assert said_reproduced("--quiet", "--prompts", path)[0] == 0
    table = pd.read_parquet(out / "numbers.parquet").set_index("fact")
    assert json.loads(table.loc["setup/prompts", "computed"]) == 5
    assert "5 (prompts.csv), of 5 templates" in (out / "numbers.md").read_text(encoding="utf-8")


def test_an_interrupted_run_says_that_it_goes_on(said_reproduced, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(reproducing, "measure", stop)
    code, _, error = said_reproduced()
    assert code == 130 and "finished chunks are kept, the same command goes on there" in error


def test_other_models_are_refused(refused, tiny_directories, tmp_path):
    llama = shutil.copytree(tiny_directories["llama"], tmp_path / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, llama / name)
    error = refused(f"reproduce --model {llama}")
    assert "llama is no GPT-2, of which the published numbers are" in error


def test_without_the_weights_one_line_says_what_to_do(refused, monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr("huggingface_hub.hf_hub_download", missing)
    error = refused("reproduce")
    assert "gpt2-small is not in the Hugging Face cache" in error and "hf download" in error


def test_tables_show_intervals_and_lists():
    found = {
        "logit_diff/mean": Estimate(3.0, 2.5, 3.5),
        "slices_8_6_prompt_6/support": Estimate([43, 6]),
    }
    table = side_by_side(published(), found, {})
    shown = said(table).set_index("fact")
    assert shown.loc["logit_diff/mean", "computed"] == "3.00 [2.50, 3.50]"
    assert shown.loc["logit_diff/mean", "difference"] == "-0.0110"
    assert shown.loc["slices_8_6_prompt_6/support", "computed"] == "43, 6"
    assert shown.loc["logit_diff/sd", "computed"] == "undefined"
    counts = verdicts(table).set_index("section")
    assert counts.loc["logit_diff"].tolist() == [1, 0, 5, 0]
    assert counts.loc["all"].sum() == len(table)
    page = page_of(table, {"model": "a model, float32"})
    assert "| mean | 3.011 | 3.00 [2.50, 3.50] | -0.0110 | 0.254 | agrees |" in page
    assert main([]) == 0  # the command is one of those that the help lists
