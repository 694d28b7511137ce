"""`sparse-signals answer`: each way of asking, what it writes, one line for what goes wrong."""

import re
import shutil
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from shipped import shipped
from sparse_signals.app import answer_page, answering
from sparse_signals.attribution import answer as module
from sparse_signals.attribution.answer import reference_mean, trace_answer, vocabulary_mean
from sparse_signals.attribution.tables import Asked, role_names
from sparse_signals.core import run as core_run
from sparse_signals.core.model import activations
from sparse_signals.core.prompts import encode
from sparse_signals.core.questions import questions
from sparse_signals.core.tasks import task_prompts
from sparse_signals.tracing.circuit import FORMATS, read_circuit

MARY = "When Mary and John went to the store, John gave a drink to"
FLIPPED = MARY.replace("John gave", "Mary gave")
BOOK = Path(__file__).parents[2] / "book" / "command-line.md"
NAMELESS = "Then, the bus left and it was late"
SIZE = 192  # of the stream of the shipped model
OTHERS = ["Then, the bus left and it was red", "Then, the bus left and it was long"]


@pytest.fixture(autouse=True)
def shared(loaded_once):
    """The shipped model is loaded once."""


@pytest.fixture(autouse=True)
def page(monkeypatch):
    """Pages that are not drawn, which would take a while; what they were asked to show."""
    asked = []

    def write(path, *given):
        path.write_text("page", encoding="utf-8")
        asked.append(given)
        return path

    monkeypatch.setattr(answer_page, "write_answer_page", write)
    return asked


@pytest.fixture
def model():
    return shipped(None, dtype=torch.float32)


def tables(out):
    return {name: pd.read_parquet(out / f"{name}.parquet") for name in ("edges", "tokens", "paths")}


def same(one, other):
    for name, table in tables(one).items():
        pd.testing.assert_frame_equal(table, tables(other)[name])


def asked_of(out):
    return read_circuit(out / "circuit.json").facts["asked"]


# --- ways of asking ------------------------------------------------------------------------------


def test_a_prompt_with_its_answers_is_traced_as_the_library_does(said, out, model):
    line = f'answer --answer Mary --wrong John --counterfactual "{FLIPPED}" --prompt'
    code, output, _ = said(line, MARY)
    asked = questions(model, pd.DataFrame(
        {"text": [MARY], "answer": "Mary", "wrong": "John", "counterfactual": FLIPPED}
    ))  # fmt: skip
    traced = trace_answer(model, asked.batch, asked.counterfactual, objective=asked.objective)
    found = tables(out)
    assert found["edges"]["value"].tolist() == pytest.approx(traced.edges["value"].tolist())
    assert found["edges"]["graph"].sum() == traced.prompts["edges"].item()
    assert found["tokens"]["share"].tolist() == pytest.approx(traced.tokens["share"].tolist())
    assert found["paths"]["text"].tolist() == traced.paths["text"].tolist()
    row = traced.prompts.iloc[0]
    assert code == 0 and f"{row['edges']} edges carry {100 * row['explained']:.0f}\xa0%" in output
    assert "asked: logit(Mary) − logit(John)" in output and "10 John 100\xa0%" in output
    assert f"F(x) {row['f']:.1f}, F(x′) −{-row['counterfactual_f']:.2f}" in output
    assert traced.paths["text"][0] in output and "the counterfactuals given" in output
    first = traced.edges[traced.edges["graph"]].sort_values("share", key=abs).iloc[-1]
    assert re.search(rf"strongest edges:\n.*\n *{first['upstream']} .* {first['channel']}", output)
    names = ["answer.html", "circuit.graphml", "circuit.json", "circuit.parquet", "edges.parquet",
             "paths.parquet", "tokens.parquet"]  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == names


def test_names_alone_ask_for_the_indirect_object_against_the_flip(said, out, tmp_path):
    flip = tmp_path / "flip"
    assert said("answer --quiet --prompt", MARY) == (0, "", "")
    line = f'answer --quiet --answer Mary --wrong John --counterfactual "{FLIPPED}" --out {flip}'
    assert said(f"{line} --prompt", MARY)[0] == 0
    same(out, flip)
    assert (
        "IO in the place of the second S"
        in read_circuit(out / "circuit.json").facts["compared with"]
    )


def test_a_file_of_questions(said, out, tmp_path, model):
    table = task_prompts("induction", 4, seed=2, tokenizer=model.tokenizer)
    table[["text", "answer", "wrong", "counterfactual"]].to_csv(tmp_path / "q.csv", index=False)
    assert said(f"answer --quiet --prompts {tmp_path / 'q.csv'}") == (0, "", "")
    assert set(tables(out)["edges"]["prompt"]) == {0, 1, 2, 3}
    facts = read_circuit(out / "circuit.json").facts
    assert facts["prompts"] == "4 from q.csv" and facts["asked"] == "logit difference"


@pytest.mark.parametrize("line", ["--n 6", "--task induction --n 6", "--task ioi --kind abc --n 6"])
def test_a_task_is_pooled_by_role_and_by_template(said, out, page, line, model):
    code, output, _ = said(f"answer {line} --seed 1")
    assert code == 0 and "6 prompts" in output and ", means" in output
    traced, asked, pooled, clusters = page[0]
    assert clusters == asked.template.tolist() and max(clusters) < 6
    expected = traced.pool(clusters)
    expected = expected[expected["prompts"] > 0].reset_index(drop=True)
    pd.testing.assert_frame_equal(pooled, expected)
    edges, roles = tables(out)["edges"], role_names(traced.batch)
    assert (edges["role"] == roles[edges["prompt"], edges["token"]]).all()
    kind = "abc" if "abc" in line else "unrepeated" if "induction" in line else "flip"
    assert traced.facts["compared with"].endswith(kind)
    if "ioi" in line or line == "--n 6":
        assert {"S2", "end"} <= set(pooled["dest_role"])


def test_prompts_of_a_form_are_compared_with_their_mean(said, out, page, model, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([NAMELESS, *OTHERS]), encoding="utf-8")
    code, _, error = said(f"answer --prompts {path}")
    assert code == 0 and "mean embeddings of the prompts of as many tokens" in error
    assert "no answer is given" in error
    traced, asked, *_ = page[0]
    assert (
        "mean embeddings" in traced.facts["compared with"] and "likeliest" in traced.facts["note"]
    )
    batch = encode(model, [NAMELESS, *OTHERS])
    expected = trace_answer(model, batch, reference_mean(model, batch), objective=asked.objective)
    pd.testing.assert_frame_equal(traced.prompts, expected.prompts)


def test_a_prompt_alone_is_compared_with_the_mean_word(said, out, page, model):
    code, output, error = said("answer --answer late --prompt", NAMELESS)
    assert code == 0 and "mean embedding of the vocabulary after the first token" in error
    assert "compared with: no other prompt, but the mean embedding of the vocabulary" in output
    traced, asked, *_ = page[0]
    vectors = vocabulary_mean(model, asked.batch)
    assert torch.equal(vectors[0, 0], model.bridge.embed.W_E[asked.batch.tokens[0, 0]])
    expected = trace_answer(model, asked.batch, vectors, objective=asked.objective)
    pd.testing.assert_frame_equal(traced.tokens, expected.tokens)
    assert asked_of(out) == "ln P(late)"


def test_another_node_can_be_asked(said, out, page):
    assert said("answer --n 4 --at 2.4:end --quiet")[0] == 0
    traced, *_ = page[0]
    assert asked_of(out) == "what 2.4 at end adds to logit difference"
    top = traced.edges.loc[traced.edges["down_layer"].idxmax()]
    assert top["downstream"] == "2.4" and "answer" not in set(traced.edges["downstream"])
    expected = trace_answer(traced.model, traced.batch, page[0][1].counterfactual,
                            objective=page[0][1].objective, asked=Asked("2.4", "end"))  # fmt: skip
    assert traced.edges["value"].tolist() == pytest.approx(expected.edges["value"].tolist())
    assert said("answer --n 2 --at mlp1:14 --quiet")[0] == 0
    assert asked_of(out).startswith("what MLP 1 at 14 adds")


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_direction_can_be_asked(said, out, page, model, tmp_path, suffix):
    w = torch.randn(model.d_model, generator=torch.Generator().manual_seed(3))
    path = tmp_path / f"w{suffix}"
    if suffix == ".npy":
        np.save(path, w.double().numpy())
    else:
        save_file({"w": w}, path)
    assert said(f"answer --n 4 --quiet --direction {path}")[0] == 0
    traced, asked, *_ = page[0]
    assert asked_of(out) == f"the last stream at the last token along w{suffix}"
    assert asked.notes == () and "note" not in traced.facts
    for column, batch in (("f", asked.batch), ("counterfactual_f", asked.counterfactual)):
        stream = activations(model, batch.tokens, ("resid_post",))["resid_post"][-1]
        expected = stream[torch.arange(4), batch.last] @ w
        assert traced.prompts[column].tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    change = traced.prompts["f"] - traced.prompts["counterfactual_f"]
    assert traced.prompts["difference"].tolist() == pytest.approx(change.tolist(), abs=1e-4)
    into = traced.edges[traced.edges["downstream"] == "answer"]
    assert set(into["channel"]) == {"direct"} and len(into) > 10
    view = answer_page.pooled_view(traced, asked, traced.pool(), [0, 1, 2, 3])
    assert view["title"] == "Why this much along a direction in 4 prompts?"
    assert view["sentences"][0].startswith("F, the last stream at the last token along w")
    one = answer_page.prompt_view(traced, asked)
    assert "logit" not in one["title"] + one["sentences"][0]


@pytest.mark.parametrize(("array", "say"), [
    (np.ones(3), r"has the shape (3,): gpt2-ioi needs"),
    (np.full(SIZE, np.nan), "not real and finite"),
    (np.ones(SIZE) * 1j, "not real and finite"),
    (np.zeros(SIZE), "is 0 everywhere"),
    (np.array(["a"] * SIZE), "cannot be read"),
    (np.array([{}], dtype=object), "cannot be read"),
])  # fmt: skip
def test_a_direction_that_is_none_is_one_line(refused, tmp_path, array, say):
    np.save(tmp_path / "w.npy", array)
    assert say in refused(f"answer --n 2 --direction {tmp_path / 'w.npy'}")


def test_files_that_hold_no_direction_are_one_line(refused, tmp_path):
    save_file({"a": torch.ones(SIZE), "b": torch.ones(SIZE)}, tmp_path / "two.safetensors")
    for name in ("bad.safetensors", "bad.npy"):
        (tmp_path / name).write_bytes(b"nothing")
    told = {
        "w.txt": "is a .npy or .safetensors file, not w.txt", "none.npy": "cannot be read",
        "bad.npy": "cannot be read", "bad.safetensors": "cannot be read",
        "two.safetensors": "has 2 tensors: leave one",
    }  # fmt: skip
    for name, say in told.items():
        assert say in refused(f"answer --n 2 --direction {tmp_path / name}")
    assert "leave out --at" in refused(f"answer --at 2.4:end --direction {tmp_path / 'w.npy'}")


def test_settings_reach_the_trace(said, out):
    assert said("answer --n 2 --part 0.5 --least 0.05 --paths 3 --dtype float64 --quiet")[0] == 0
    facts = read_circuit(out / "circuit.json").facts
    assert "part 0.5, least 0.05, beam 64, paths 3, dtype float64" in facts["settings"]
    assert set(tables(out)["paths"]["path"]) == {0, 1, 2}
    assert tables(out)["edges"]["strength"].min() >= 0.05


# --- files ---------------------------------------------------------------------------------------


def test_documented_columns_are_those_of_the_files(said, out):
    assert said("answer --n 2 --quiet")[0] == 0
    section = BOOK.read_text(encoding="utf-8").split("## Files of answer")[1].split("\n## ")[0]
    edges, circuit = section.split("`circuit.parquet`, ")
    for name, text in (("edges", edges), ("circuit", circuit)):
        rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
        documented = [cell for row in rows for cell in re.findall(r"`(.*?)`", row)]
        columns = list(pd.read_parquet(out / f"{name}.parquet").columns)
        assert sorted(documented) == sorted(columns)
    for name in ("tokens", "paths"):
        listed = section.split(f"`{name}.parquet`")[1].split("(")[1].split(")")[0]
        columns = list(pd.read_parquet(out / f"{name}.parquet").columns)
        assert sorted(re.findall(r"`(.*?)`", listed)) == sorted(columns)


@pytest.mark.parametrize("prompts", ["--n 4", f'--prompt "{MARY}"'])
def test_graph_files_hold_the_same_without_loss(said, out, prompts):
    assert said(f"answer --quiet {prompts}")[0] == 0
    one, *others = (read_circuit(out / f"circuit{suffix}") for suffix in FORMATS[:3])
    assert (one.edges["share"].abs().diff().dropna() <= 0).all() and len(one.edges) > 10
    for other in others:
        assert other.facts == one.facts
        pd.testing.assert_frame_equal(other.edges, one.edges, check_dtype=False)
    graph = nx.read_graphml(out / "circuit.graphml", force_multigraph=True)
    place = "14 to" if "--prompt" in prompts else "end"
    assert f"answer@{place}" in graph


def test_a_run_that_was_cut_off_goes_on(said, out, monkeypatch):
    assert said("answer --n 4 --quiet")[0] == 0
    whole = tables(out)
    shutil.rmtree(out)
    monkeypatch.setattr(core_run, "CHUNK_PROMPTS", 1)
    calls, real = [], module.tables_of

    def failing(runs, *more):
        calls.append(len(runs.batch.tokens))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(runs, *more)

    monkeypatch.setattr(module, "tables_of", failing)
    code, _, error = said("answer --n 4")
    assert code == 130 and "2 of 4 chunks of prompts are kept" in error
    assert said("answer --n 4 --quiet")[0] == 0
    assert calls == [1] * 5 and not (out / ".partial").exists()
    for name, table in tables(out).items():
        numbers = table.select_dtypes("number").columns
        assert len(table) == pytest.approx(len(whole[name]), abs=3)
        assert table[numbers].sum()["value"] == pytest.approx(whole[name]["value"].sum(), rel=1e-3)


def test_prompts_whose_answer_does_not_differ_are_named(said, out, tmp_path):
    rows = [(MARY, FLIPPED), (MARY, MARY)]
    table = pd.DataFrame(rows, columns=["text", "counterfactual"])
    table.assign(answer="Mary", wrong="John").to_csv(tmp_path / "q.csv", index=False)
    code, _, error = said(f"answer --prompts {tmp_path / 'q.csv'}")
    assert code == 0 and "hardly differs on 1 of 2 prompts, which are left out: 1" in error
    assert set(tables(out)["edges"]["prompt"]) == {0}


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "say"), [
    ("answer --answer Mary", "--answer goes with --prompt"),
    (f'answer --answer a --answer b --prompt "{MARY}"', "2× for 1 prompts: give it once"),
    (f'answer --kind abc --prompt "{MARY}"', "--kind is a counterfactual of a --task"),
    ("answer --task riddles", "no task 'riddles'"),
    ("answer --task ioi --kind none", "is 'flip' or 'abc'"),
    ("answer --part 2", "--part must be above 0"),
    ("answer --at head", "is no node: write layer.head:token"),
    ("answer --n 2 --at 9.9:end", "has no"),
    ("answer --n 2 --at 2.4:verb", "no role 'verb'"),
    (f'answer --answer Mary --wrong Mary --prompt "{MARY}"', "same token"),
    (f'answer --counterfactual "Then, Mary left" --prompt "{MARY}"', "must have the same number"),
    (f'answer --counterfactual "{MARY}" --prompt "{MARY}"', "hardly differs"),
    (f'answer --answer zebra-fish --prompt "{MARY}"', "zebra"),
])  # fmt: skip
def test_bad_input_is_one_line(refused, line, say):
    assert say in refused(line)


def test_names_that_contradict_the_sentence_are_refused(refused, tmp_path):
    pd.DataFrame({"text": [MARY], "io": "Kate", "s": "John"}).to_csv(tmp_path / "q.csv")
    assert "Kate" in refused(f"answer --prompts {tmp_path / 'q.csv'}")


def test_without_altair_everything_but_the_page_is_written(said, out, monkeypatch):
    monkeypatch.setattr(answering, "find_spec", lambda name: None)
    code, _, error = said("answer --n 2")
    assert code == 0 and "no answer.html" in error
    assert not (out / "answer.html").exists() and (out / "circuit.json").exists()
