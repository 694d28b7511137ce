"""The command line: what it writes, how it goes on, one line for all that can go wrong."""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from random_models import ROTARY, SIZES, save_random_model
from shipped import MOVERS, root_of, shipped
from sparse_signals.app import commands
from sparse_signals.app.cli import (
    ANSWER_EXAMPLES,
    EXAMPLES,
    REPRODUCE_EXAMPLES,
    SIGNALS,
    SIGNALS_EXAMPLES,
    TRACE_EXAMPLES,
    main,
    make_parser,
)
from sparse_signals.app.commands import firing_table, trace_table
from sparse_signals.core import run as core_run
from sparse_signals.core.model import load_model
from sparse_signals.core.names import MODEL_NAMES
from sparse_signals.core.prompts import encode, ioi_prompts
from sparse_signals.core.reading import with_names
from sparse_signals.core.resume import alone_in
from sparse_signals.core.rotary import rotation
from sparse_signals.core.run import run
from sparse_signals.core.stats import DRAWS
from sparse_signals.signals.firings import find_firings
from sparse_signals.signals.slices import slices, sparsity, support
from sparse_signals.tracing import circuit as circuits
from sparse_signals.tracing import contributions as contributing
from sparse_signals.tracing import trace as tracing
from sparse_signals.tracing.circuit import FORMATS, Circuit, pool, read_circuit
from sparse_signals.tracing.contributions import Settings
from sparse_signals.tracing.roots import Root, strongest_roots
from sparse_signals.tracing.trace import trace, trace_chunk

SHIPPED = files("sparse_signals") / "assets" / "gpt2-ioi"
BOOK = Path(__file__).parents[2] / "book"
WORDS = len(json.loads((SHIPPED / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
NAMED = "Then, Tom and Kate left the park and Tom gave a ring to"
NAMELESS = "Then, the bus left and it was late"


@pytest.fixture(autouse=True)
def shared(loaded_once):
    """The shipped model is loaded once."""


@pytest.fixture(scope="module")
def ioi():
    model = shipped(None, dtype=torch.float32)
    return run(model, encode(model, ioi_prompts(8, 3, tokenizer=model.tokenizer)))


@pytest.fixture(scope="module")
def rotary(tmp_path_factory):
    """A random Llama with the words of the shipped model."""
    directory = tmp_path_factory.mktemp("rotary") / "tiny"
    save_random_model(directory, "llama", **{**ROTARY, "vocab_size": WORDS})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, directory)
    return directory


@pytest.fixture(autouse=True)
def page(monkeypatch):
    """Circuits with a page that is not drawn, which would take a while."""

    def write(circuit, path):
        path.write_text(str(circuit.facts), encoding="utf-8")

    entry = SimpleNamespace(load=lambda: write)
    monkeypatch.setattr(circuits, "entry_points", lambda **_: [entry])


@pytest.fixture
def chunks_of_one(monkeypatch):
    """A chunk for every prompt."""
    monkeypatch.setattr(core_run, "CHUNK_PROMPTS", 1)


@pytest.fixture
def stopping(monkeypatch):
    """Make work on chunks raise an error at the n-th call, and return the chunks worked on."""

    def prepare(n, error=KeyboardInterrupt):
        calls = []

        def failing(real, first):
            calls.append(first)
            if len(calls) == n:
                raise error
            return real()

        def firings(part, settings, first):
            return failing(lambda: real_firings(part, settings, first), first)

        def chunk(part, roots, settings, first):
            return failing(lambda: real_chunk(part, roots, settings, first), first)

        monkeypatch.setattr(commands, "firing_table", firings)
        monkeypatch.setattr(tracing, "trace_chunk", chunk)
        return calls

    real_firings, real_chunk = firing_table, trace_chunk
    return prepare


def lists(column):
    return column.map(list).tolist()


# --- help ----------------------------------------------------------------------------------------


def test_help_comes_at_once_and_says_what_there_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "sparse_signals", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
    assert "examples:" in text and "Exit codes" in text
    assert main([]) == 0 and capsys.readouterr().out == text
    with pytest.raises(SystemExit) as stopped:
        main(["trace", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in MODEL_NAMES)


def test_nothing_heavy_is_imported_before_the_arguments_are_read():
    code = (
        "import sys, sparse_signals as ss, sparse_signals.__main__; dir(ss);"
        "print({'torch', 'pandas', 'numpy'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == "set()"


def examples():
    """What the help and the page in the book tell people to type."""
    parts = (EXAMPLES, SIGNALS_EXAMPLES, TRACE_EXAMPLES, ANSWER_EXAMPLES, REPRODUCE_EXAMPLES)
    text = "\n".join(parts)
    page = (BOOK / "command-line.md").read_text(encoding="utf-8")
    shell = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL))
    found = re.findall(r"^ *sparse-signals (.*?)(?: +#.*)?$", f"{text}\n{shell}", re.MULTILINE)
    return sorted(set(found))


def test_examples_are_understood():
    assert len(examples()) >= 10
    for example in examples():
        command = make_parser().parse_args(shlex.split(example)).command
        assert command in ("signals", "trace", "answer", "fetch", "reproduce")


@pytest.mark.slow
@pytest.mark.parametrize(
    "example", [x for x in examples() if not re.search("--(model|prompts)|reproduce|^fetch", x)]
)
def test_examples_on_the_shipped_model_run(example, said, tmp_path, monkeypatch):
    def few(n, *more, **names):
        return ioi_prompts(min(n, 8), *more, **names)

    monkeypatch.setattr(commands, "ioi_prompts", few)
    monkeypatch.chdir(tmp_path)
    np.save("probe.npy", np.ones(192))  # the shipped model has as many dimensions
    assert said(example)[0] == 0


def test_documented_columns_are_those_of_the_files(said, out):
    assert said("signals --ioi 2 --quiet")[0] == said("trace --ioi 2 --quiet")[0] == 0
    columns = list(pd.read_parquet(out / "firings.parquet").columns)
    assert ", ".join(columns) in " ".join(SIGNALS.split()).replace(" (singular pairs, from 0)", "")
    page = (BOOK / "command-line.md").read_text(encoding="utf-8")
    for name in ("firings", "edges", "circuit"):
        section = page.split(f"## {name}.parquet")[1].split("\n## ")[0]
        documented = [cell for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
                      for cell in re.findall(r"`(.*?)`", row)]  # fmt: skip
        assert documented == list(pd.read_parquet(out / f"{name}.parquet").columns)


def test_the_console_script_is_main():
    scripts = [x for x in entry_points(group="console_scripts") if x.name == "sparse-signals"]
    if not scripts:
        pytest.skip("installed before the script was there: pip install -e . again")
    assert scripts[0].load() is main


# --- signals -------------------------------------------------------------------------------------


def test_signals_are_those_of_the_library(said, out, ioi):
    code, output, error = said("signals --ioi 8 --seed 3 --level 0.4 --fraction 0.9")
    table = pd.read_parquet(out / "firings.parquet")
    pairs = find_firings(ioi, 0.4)
    parts = slices(ioi, pairs)
    expected = pairs.table()[list(table.columns[:7])]
    pd.testing.assert_frame_equal(table[expected.columns], expected)
    measures = sparsity(parts, 0.9).rename(columns={"support": "size"})
    pd.testing.assert_frame_equal(table[measures.columns], measures)
    chosen = support(parts, 0.9)
    assert lists(table["support"]) == [row.nonzero().flatten().tolist() for row in chosen]
    assert table["error"].max() < 1e-12
    assert code == 0 and f"8 prompts: {len(table):,} firings" in output
    assert f"worst error of the sums: {table['error'].max():.1e}" in output
    assert str(out / "firings.parquet") in output and "100%" in error
    assert [path.name for path in out.iterdir()] == ["firings.parquet"]


def test_signals_need_no_names_and_quiet_says_nothing(said, out, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text(f"{NAMELESS}\n\n{NAMED}\n", encoding="utf-8")
    assert said(f"signals --prompts {path} --quiet") == (0, "", "")
    one = pd.read_parquet(out / "firings.parquet")
    assert said("signals --quiet --prompt", NAMELESS, "--prompt", NAMED) == (0, "", "")
    pd.testing.assert_frame_equal(one, pd.read_parquet(out / "firings.parquet"))
    assert set(one["prompt"]) == {0, 1}


def test_fraction_all_lists_every_slice(said, out, ioi):
    assert said("signals --ioi 2 --quiet --fraction all") == (0, "", "")
    table = pd.read_parquet(out / "firings.parquet")
    assert len(table) and set(table["size"]) == {ioi.model.d_head}
    assert lists(table["support"]) == [list(range(ioi.model.d_head))] * len(table)


def test_float64_and_context_reach_the_model(said, out):
    said("signals --ioi 4 --quiet")
    single = pd.read_parquet(out / "firings.parquet")
    said("signals --ioi 4 --quiet --dtype float64")
    double = pd.read_parquet(out / "firings.parquet")
    assert 0 < (single["score"] - double["score"]).abs().max() < 1e-3
    said("signals --ioi 4 --quiet --context --level 2.5")
    assert (pd.read_parquet(out / "firings.parquet").eval("attention * (dest + 1)") >= 2.5).all()


def test_prompts_on_which_nothing_fires_give_an_empty_table(said, out):
    code, output, _ = said("signals --ioi 2 --context --level 1000")
    assert code == 0 and "0 firings" in output
    assert len(pd.read_parquet(out / "firings.parquet")) == 0


def test_signals_that_were_cut_off_go_on(said, out, monkeypatch, stopping):
    assert said("signals --ioi 5")[0] == 0
    whole = pd.read_parquet(out / "firings.parquet")
    shutil.rmtree(out)
    monkeypatch.setattr(core_run, "CHUNK_PROMPTS", 2)
    calls = stopping(2)
    code, output, error = said("signals --ioi 5")
    assert code == 130 and output == ""
    assert error.endswith(
        "sparse-signals: stopped; 1 of 3 chunks of prompts are kept, "
        "the same command goes on there\n"
    )
    assert [path.name for path in out.iterdir()] == [".partial"]
    assert said("signals --ioi 5")[0] == 0
    assert calls == [0, 2, 2, 4]
    assert [path.name for path in out.iterdir()] == ["firings.parquet"]
    same_firings(pd.read_parquet(out / "firings.parquet"), whole)


def same_firings(one, other):
    """Equal up to the order, which puts layers before prompts within a chunk."""
    places = ["prompt", "layer", "head", "dest", "src"]
    one, other = (t.sort_values(places, ignore_index=True) for t in (one, other))
    assert lists(one["support"]) == lists(other["support"])
    columns = one.columns.drop(["support", "error"])
    pd.testing.assert_frame_equal(one[columns], other[columns], rtol=1e-4)


# --- trace ---------------------------------------------------------------------------------------


def test_trace_writes_all_files_and_they_agree(said, out, ioi):
    code, output, _ = said("trace --ioi 8 --seed 3 --top 2 --share 0.6")
    assert code == 0
    files = ["circuit.graphml", "circuit.html", "circuit.json", "circuit.parquet", "edges.parquet"]
    assert sorted(path.name for path in out.iterdir()) == files
    roots = strongest_roots(ioi.model, ioi.batch, 2, each=True)
    traced = trace(ioi, roots, share=0.6)
    facts = {
        "model": "gpt2-ioi",
        "prompts": "8 on IOI, seed 3",
        "roots": ", ".join(map(str, roots)),
        "settings": "level 0.5, fraction all, share 0.6, weighting exact, dtype float32",
    }
    expected = Circuit(pool(traced.edges, ioi.batch, draws=DRAWS), facts)
    for suffix in FORMATS[:3]:
        circuit = read_circuit(out / f"circuit{suffix}")
        assert circuit.facts.items() >= facts.items() and circuit.facts["version"]
        pd.testing.assert_frame_equal(circuit.edges, expected.edges, check_dtype=False)
    assert (out / "circuit.html").read_text(encoding="utf-8") == str(circuit.facts)
    first = expected.edges.iloc[0]
    assert f"{len(traced.edges):,} edges" in output and "worst error of the sums" in output
    assert re.search(rf"strongest edges:\n.*\n *{first.upstream} .* {first.downstream} ", output)
    assert len(output.split("strongest edges:\n")[1].splitlines()) == 11


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ("--preset published", "level 0.5, fraction 1.0, share 0.7, weighting published"),
        ("--preset published --share 0.6 --fraction all --weighting exact",
         "level 0.5, fraction all, share 0.6, weighting exact"),
        ("--weighting attention --level auto",
         "level auto, fraction all, share 0.7, weighting attention"),
    ],
)  # fmt: skip
def test_settings_stand_beside_the_preset_and_pooled_roots_are_the_same(
    said, out, ioi, options, settings
):
    assert said(f"trace --ioi 8 --seed 3 --top 2 --pooled --quiet {options}")[0] == 0
    facts = read_circuit(out / "circuit.json").facts
    assert facts["settings"] == f"{settings}, dtype float32"
    level = None if "auto" in options else 0.5
    roots = strongest_roots(ioi.model, ioi.batch, 2, Settings(level=level))
    assert facts["roots"] == ", ".join(map(str, roots)) and len(roots) == 2


def test_edges_know_roles_and_support(said, out, ioi):
    start = root_of(MOVERS[0], "end", "IO")
    assert said(f"trace --ioi 8 --seed 3 --firing {start}")[0] == 0
    edges = pd.read_parquet(out / "edges.parquet")
    traced = trace(ioi, [start])
    assert len(edges) == len(traced.edges)
    expected = traced.firings.set_index("firing")["vectors"].loc[edges["firing"]]
    assert lists(edges["vectors"]) == lists(expected)
    here = (edges["layer"] == start.layer) & (edges["head"] == start.head)
    roots = edges[here & (edges["dest_roles"] == "end")]
    assert len(roots) and roots["src_roles"].str.split(", ").map(lambda x: "IO" in x).all()
    token = edges["dest_roles"].where(edges["side"] == "dest", edges["src_roles"])
    assert (edges["token_roles"] == token).all() and edges["dest_roles"].notna().all()


def test_a_token_may_have_several_roles(ioi):
    batch = encode(ioi.model, with_names(pd.DataFrame({"text": [NAMED]})))
    traced = trace(run(ioi.model, batch), [Root(0, 0)], level=0.05)
    after = traced.edges.assign(src=int(batch.roles["S1"]) + 1)
    edges = trace_table(replace(traced, edges=after))
    assert set(edges["src_roles"].str.split(", ").iloc[0]) == {"S1+1", "IO-1"}


@pytest.mark.parametrize("options", ["", "--weighting published"])
def test_trace_of_a_rotary_model_without_names(said, out, rotary, options):
    line = f"trace --model {rotary} --level 0.05 --top 1 {options} --prompt"
    assert said(line, NAMED)[0] == 0
    named = read_circuit(out / "circuit.json")
    root = named.facts["roots"].split(":")[0]
    line = f"trace --model {rotary} --level 0.05 --root {root} {options} --prompt"
    code, output, error = said(line, NAMED, "--prompt", NAMED.replace("Tom", "Kate"))
    assert code == 0 and f"{root}:end" in output
    assert "no roles but end and other: prompt 1: needs one name twice" in error
    edges = pd.read_parquet(out / "edges.parquet")
    assert {*edges["dest_roles"], *edges["src_roles"]} <= {"end", "other"}
    assert read_circuit(out / "circuit.json").facts["prompts"] == "2 given"


def test_a_trace_that_was_cut_off_goes_on(said, out, chunks_of_one, stopping):
    assert said("trace --ioi 4 --root 1.4")[0] == 0
    whole = pd.read_parquet(out / "edges.parquet"), read_circuit(out / "circuit.parquet").edges
    shutil.rmtree(out)
    calls = stopping(3, OSError("No space left on device"))
    code, _, error = said("trace --ioi 4 --root 1.4")
    assert code == 2 and error.endswith("sparse-signals: No space left on device\n")
    said("signals --ioi 1")  # in the same folder, leaves the finished chunks of the trace alone
    assert calls.pop() == 0
    assert said("trace --ioi 4 --root 1.4")[0] == 0
    assert calls == [0, 1, 2, 2, 3] and not (out / ".partial").exists()
    pd.testing.assert_frame_equal(read_circuit(out / "circuit.parquet").edges, whole[1])
    edges = pd.read_parquet(out / "edges.parquet")
    assert lists(edges.pop("vectors")) == lists(whole[0].pop("vectors"))
    pd.testing.assert_frame_equal(edges, whole[0])


def test_swapped_names_are_another_run(said, out, tmp_path, chunks_of_one, stopping):
    """Same tokens, other roles: finished chunks of the one are not those of the other."""
    sheet, calls = tmp_path / "a.csv", stopping(2)
    for io, s in (("Kate", "Tom"), ("Tom", "Kate")):
        text = NAMED.replace("and Tom", "and Alice")
        rows = [{"text": text, "io": io, "s": s, "third": "Alice"}] * 2
        pd.DataFrame(rows).to_csv(sheet, index=False)
        said(f"trace --prompts {sheet} --firing 0.0:IO --level 0.01")
    assert len(calls) == 4


def test_the_first_token_is_a_choice(said, out):
    said("signals --ioi 4 --quiet")
    usual = pd.read_parquet(out / "firings.parquet")
    said("signals --ioi 4 --quiet --bos")
    pd.testing.assert_frame_equal(pd.read_parquet(out / "firings.parquet"), usual)
    for command, name in (("signals", "firings"), ("trace --root 1.4 --level 0.1", "edges")):
        said(f"{command} --ioi 4 --quiet --level 0.1")
        longest = pd.read_parquet(out / f"{name}.parquet")["dest"].max()
        said(f"{command} --ioi 4 --quiet --level 0.1 --no-bos")
        assert pd.read_parquet(out / f"{name}.parquet")["dest"].max() == longest - 1


@pytest.mark.parametrize("command", ["signals", "trace --root 1.4 --level 0.01"])
def test_a_doubled_first_token_is_warned_of_once(said, command):
    code, _, error = said(f"{command} --prompt", f"<|endoftext|>{NAMED}")
    assert code == 0 and error.count("begins with <|endoftext|> twice") == 1
    _, _, error = said(f"{command} --no-bos --prompt", f"<|endoftext|>{NAMED}")
    assert "twice" not in error


@pytest.mark.parametrize("io", ["Tom", "Alice"])
def test_names_that_contradict_the_sentence(refused, tmp_path, io):
    path = tmp_path / "a.csv"
    path.write_text(f'text, io\n"{NAMED}", Kate\n"{NAMED}", {io}\n', encoding="utf-8-sig")
    assert f"line 3: needs one name twice and another once: '{NAMED}' (io is '{io}', there " in (
        refused(f"trace --prompts {path}")
    )


# --- everything that can go wrong ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bogus", "invalid choice: 'bogus'"),
        ("signals --bogus", "unrecognized arguments: --bogus"),
        ("signals --root 1.4", "unrecognized arguments: --root"),
        ("signals --ioi 3 --prompt Then", "--prompt: not allowed with argument --ioi"),
        ("signals --ioi none", "'none' is not a whole number from 1"),
        ("signals --ioi 0", "'0' is not a whole number from 1"),
        ("signals --seed x", "--seed: invalid int value: 'x'"),
        ("trace --root 9", "'9' is no head: write layer.head, as in 9.6"),
        ("trace --root=-1.4", "'-1.4' is no head"),
        ("trace --firing 1.4", "'1.4' is no firing: write layer.head:destination"),
        ("trace --firing 1.4:end:", "'1.4:end:' is no firing"),
        ("trace --firing 1.4:end:IO:S1:S2", "'1.4:end:IO:S1:S2' is no firing"),
        ("signals --fraction every", "'every' is not a number"),
        ("trace --firing x:end", "'x' is no head"),
        ("trace --top 2 --root 1.4", "--top chooses the roots: leave it out"),
        ("trace --pooled --root 1.4", "--pooled chooses the roots: leave it out"),
        ("trace --weighting attention --fraction 1", "--fraction must be all: attention hears"),
        ("trace --level auto --context", "--level must be a number where it is a multiple"),
        ("trace --level x", "--level: 'x' is not a number"),
        ("trace --level nan", "'nan' is not a number"),
        ("signals --level 1.5", "--level must be above 0 and at most 1"),
        ("signals --level 0 --context", "--level must be above 0"),
        ("signals --fraction -0.5", "--fraction must be above 0 and at most 1"),
        ("trace --share 2", "--share must be above 0 and at most 1"),
        ("trace --weighting other", "invalid choice: 'other' (choose from"),
        ("signals --dtype float16", "invalid choice: 'float16'"),
        ("signals --model nope", "no model called 'nope': use gpt2-ioi"),
        ("signals --model ~nobody-of-this-name/model", "no model called '~nobody-of-this-name"),
        ("signals --prompts .", "prompts come from a .txt or .csv file"),
        ("signals --prompt 'Then \udcff'", "not text in UTF-8: 'utf-8' codec can't encode"),
        ("signals --ioi -5", "'-5' is not a whole number from 1"),
        ("trace --firing 1.4:end+99999999999999999999", "no role 'end+99999999999999999999'"),
        ("trace --firing 1.4:99", "no position 99: the longest prompt has"),
        ("signals --prompts missing.txt", "no such file: missing.txt"),
        ("signals --prompts data.json", "prompts come from a .txt or .csv file, not data.json"),
        ("signals --prompt ''", "an empty prompt"),
        ("signals --prompt 'Then, Zebulon came'", "not in the vocabulary: Zebulon (the model kno"),
        ("trace --root 7.2", "root 7.2:end is no head of gpt2-ioi, which has 4 layers of 6"),
        ("trace --firing 1.3:2:2", "never fires on these prompts (attention of at least 0.5): 1."),
        ("trace --firing 1.4:IX", "no role 'IX' in these prompts: they have IO, S1, S2"),
        ("trace --root 0.0 --weighting published", "choose roots of a later layer"),
        ("trace --context --level 1000", "no head fires from the last token"),
    ],
)
def test_bad_usage_and_input(refused, line, message):
    assert message in refused(line)


@pytest.mark.parametrize("option", ["", "--firing 1.4:end:IO", "--firing 1.4:S2"])
def test_names_are_asked_for_where_they_are_needed(refused, option):
    message = refused(f"trace {option} --prompt", NAMELESS)
    assert "needs one name twice and another once: 'Then, the bus" in message
    assert message.endswith("say where to start: --root L.H")


def test_names_of_several_tokens(refused, tmp_path):
    path = tmp_path / "a.csv"
    pd.DataFrame([{"text": NAMED, "io": "Kate left", "s": "Tom"}]).to_csv(path, index=False)
    message = refused(f"trace --prompts {path}")
    assert "not a single token with a space before it: Kate left" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt holds no prompts"),
        ("a.csv", b"prompt\nThen\n", "needs a column 'text'"),
        ("a.csv", b"text\nThen, the bus\n", "a text with commas needs quotes around it: 'Then'"),
        ("a.txt", b"\xff\xfe\x00", "a.txt is not a .txt file in UTF-8"),
        ("a.txt", b"Then, the bus" + 60 * b" late", "65 tokens, the limit is 64"),
    ],
)
def test_bad_files_of_prompts(refused, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    assert message in refused(f"signals --prompts {path}")


def test_a_folder_is_no_file_of_prompts(refused, tmp_path):
    (tmp_path / "a.txt").mkdir()
    assert "no such file" in refused(f"signals --prompts {tmp_path / 'a.txt'}")


def test_a_model_that_needs_the_network(refused, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    message = refused("trace --model gpt2-small")
    assert "gpt2-small is not in the Hugging Face cache" in message and "hf download" in message


def test_models_that_cannot_be_used(refused, tiny_directories, tmp_path):
    assert "has no config.json" in refused(f"signals --model {tmp_path}")
    tiny = tiny_directories["gpt2"]
    message = refused(f"signals --model {tiny} --prompt Then")
    assert "tiny-gpt2 has no tokenizer: put its tokenizer.json beside the model" in message
    damaged = Path(shutil.copytree(tiny, tmp_path / "damaged"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    assert "cannot read the weights in" in refused(f"signals --model {damaged}")


@pytest.mark.parametrize(
    "change", [{"model_type": []}, {"rope_parameters": "default"}, {"rope_scaling": [1]}]
)
def test_configurations_of_other_kinds(refused, rotary, tmp_path, change):
    config = json.loads((rotary / "config.json").read_text())
    if "rope_scaling" in change:
        del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert re.search("cannot (read|use) ", refused(f"signals --model {tmp_path}"))


@pytest.mark.parametrize("name", ["config.json", "a.txt"])
def test_files_that_may_not_be_read(refused, rotary, tmp_path, monkeypatch, name):
    """Whoever runs the tests may read all files, so reading is what is forbidden."""
    real = open

    def forbidden(path, *more, **names):
        if Path(str(path)).name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *more, **names)

    (tmp_path / "a.txt").write_text(NAMED)
    monkeypatch.setattr("io.open", forbidden)  # what paths open files with
    message = refused(f"signals --model {rotary} --prompts {tmp_path / 'a.txt'}")
    assert message.endswith(f"{name}'") and "Permission denied" in message


def test_a_tokenizer_of_another_model(refused, tmp_path):
    directory = save_random_model(tmp_path / "other", "gpt2", **SIZES)
    shutil.copy(SHIPPED / "tokenizer.json", directory)
    (directory / "tokenizer_config.json").write_text(
        json.dumps({**json.loads((SHIPPED / "tokenizer_config.json").read_text())})
    )
    message = refused(f"signals --model {directory} --prompt", "Then, the bus left")
    assert "the tokenizer of other does not fit" in message and "the model has 50" in message


def test_folders_that_cannot_be_written_to(said, tmp_path):
    path = tmp_path / "file"
    path.touch()
    (tmp_path / "taken" / ".partial").mkdir(parents=True)
    (tmp_path / "taken" / ".partial" / "signals").touch()
    code, _, error = said(f"signals --ioi 2 --out {tmp_path / 'taken'}")
    assert code == 2 and re.search(r"(Not a directory|File exists): '.*signals'\n$", error)
    for out in (path, path / "below"):
        code, _, error = said(f"signals --ioi 2 --out {out}")
        assert code == 2
        assert re.search(rf"cannot write to {out} \((it is a file|not a directory)\)", error)
        assert error.endswith("name a folder with --out\n")


def test_prompts_may_be_as_long_as_the_model_allows(said, out):
    model = load_model("gpt2-ioi")
    text = "Then" + (model.n_ctx - 2) * " late"
    assert said("signals --quiet --prompt", text) == (0, "", "")
    assert torch.tensor(pd.read_parquet(out / "firings.parquet")["dest"]).max() < model.n_ctx


# --- going on, and not mixing --------------------------------------------------------------------

CHANGES = [
    {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    {"rope_parameters": {"rope_theta": 20.0, "rope_type": "default"}},
    {"rms_norm_eps": 0.5},
]


@pytest.fixture(scope="module")
def unchanged():
    """What a command gave before the configuration was changed."""
    return {}


@pytest.mark.parametrize(
    "command", ["signals", "trace --root 2.0 --root 2.1 --root 1.0 --root 1.1"]
)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_another_configuration_is_another_run(
    said, rotary, tmp_path, chunks_of_one, stopping, unchanged, command, change
):
    directory = Path(shutil.copytree(rotary, tmp_path / "model"))

    def result(name):
        folder = tmp_path / name
        code, _, error = said(f"{line} --out {folder}")
        files = ("firings", "edges")
        tables = [pd.read_parquet(path) for f in files for path in folder.glob(f"{f}.parquet")]
        return code, error, repr([table.to_dict("list") for table in tables])

    line = f"{command} --model {directory} --ioi 2 --level 0.05 --quiet"
    if command not in unchanged:
        unchanged[command] = result("unchanged")
        assert unchanged[command][0] == 0
    stopping(2)
    assert "1 of 2 chunks of prompts are kept" in result("out")[1]
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    fresh = result("fresh")
    assert result("out") == fresh != unchanged[command]


def test_a_stopped_run_says_when_it_kept_nothing(said, out, chunks_of_one, stopping, monkeypatch):
    stopping(1)
    code, _, error = said("signals --ioi 2 --quiet")
    assert (code, error) == (130, "\nsparse-signals: stopped; nothing is kept\n")
    assert not list(out.iterdir())


def test_roots_that_were_found_are_kept(said, out, chunks_of_one, stopping, monkeypatch):
    calls, real = [], strongest_roots
    monkeypatch.setattr(
        commands,
        "strongest_roots",
        lambda *given, **how: calls.append(given) or real(*given, **how),
    )
    stopping(1)
    code, _, error = said("trace --ioi 2 --top 2 --quiet")
    assert code == 130 and error.endswith("the roots are kept, the same command goes on there\n")
    assert said("trace --ioi 2 --top 2 --quiet")[0] == 0
    assert len(calls) == 1 and not (out / ".partial").exists()


def test_one_run_at_a_time_in_a_folder(said, out):
    with alone_in(out / ".partial" / "signals"):
        code, output, error = said("signals --ioi 2 --quiet")
    assert code == 2 and output == ""
    assert error.startswith("sparse-signals: another run is writing to ") and error.count("\n") == 1
    assert said("signals --ioi 2 --quiet")[0] == 0
    assert [path.name for path in out.iterdir()] == ["firings.parquet"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_a_killed_run_leaves_nothing_that_stays(said, out, chunks_of_one, stopping, monkeypatch):
    line, real = "signals --ioi 3 --quiet", pd.DataFrame.to_parquet
    written = []

    def killing(table, *more, **names):
        written.append(table)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        real(table, *more, **names)

    with warnings.catch_warnings(action="ignore"):  # of threads, which the child does not use
        child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        pd.DataFrame.to_parquet = killing
        main([*line.split(), "--out", str(out)])
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left = [path.name for path in out.rglob("*")]
    assert any(name.startswith(".firings.parquet.") for name in left)
    assert any(name.startswith(".unfinished-") for name in left)
    calls = stopping(0)
    assert said(line)[0] == 0
    assert calls == [1, 2]
    assert [path.name for path in out.iterdir()] == ["firings.parquet"]


# --- results that cannot be trusted, memory, silent roots ----------------------------------------


def too_large(real):
    def changed(*given, **names):
        found = real(*given, **names)
        return replace(found, q=1.1 * found.q)

    return changed


@pytest.mark.parametrize("line", ["signals", "trace --root 1.4", "trace --weighting published"])
def test_attention_that_is_not_what_was_cached_stops_a_run(refused, monkeypatch, line):
    for module in (commands, tracing):
        monkeypatch.setattr(module, "run", too_large(core_run.run))
    message = refused(f"{line} --ioi 2")
    assert "the attention weights of gpt2-ioi do not add up (worst error" in message


@pytest.mark.parametrize("weighting", ["exact", "published"])
def test_another_rotation_than_the_model_s_stops_a_run(refused, monkeypatch, rotary, weighting):
    monkeypatch.setattr(contributing, "rotation", lambda model, places: rotation(model, places + 1))
    line = (
        f"trace --model {rotary} --ioi 2 --level 0.05 --root 2.0 --root 2.1 --weighting {weighting}"
    )
    assert "the contributions of tiny do not add up (worst error" in refused(line)


@pytest.mark.parametrize("line", ["signals", "trace"])
def test_prompts_that_do_not_fit_into_memory(refused, monkeypatch, line):
    monkeypatch.setattr(core_run, "free_memory", lambda device: 1000)
    message = refused(f"{line} --prompt", NAMED)
    assert re.search(r"a prompt of \d+ tokens needs about .* GiB are free: shorten the", message)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9. GiB for an array"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    ],
)
def test_memory_that_runs_out_is_said_in_one_line(refused, stopping, error):
    stopping(1, error)
    message = refused("signals --ioi 2")
    assert message == (
        "sparse-signals: out of memory: shorten the prompts, or take a smaller model"
    )


def test_other_errors_are_not_taken_for_it(said, stopping):
    stopping(1, RuntimeError("a fault of ours"))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        said("signals --ioi 2")


def test_silent_roots_are_named_and_the_others_go_on(said, out):
    start = root_of(MOVERS[-1], "end", "IO")  # the one that looks at IO least
    alone = said(f"trace --ioi 8 --seed 3 --firing {start} --quiet")
    expected = pd.read_parquet(out / "edges.parquet")
    line = f"trace --ioi 8 --seed 3 --firing {start} --firing 1.3:2:2"
    code, _, error = said(line)
    assert code == 0 and alone == (0, "", "")
    assert "1.3:2:2 does not fire on 8 of 8 prompts: 0, 1, 2, 3, 4, 5, 6, 7\n" in error
    at = (expected["layer"] == start.layer) & (expected["head"] == start.head)
    firing = set(expected[at & (expected["dest_roles"] == "end")]["prompt"])
    silent = [number for number in range(8) if number not in firing]
    assert 0 < len(silent) < 8
    named = ", ".join(map(str, silent))
    assert f"{start} does not fire on {len(silent)} of 8 prompts: {named}\n" in error
    assert said(f"{line} --quiet") == (0, "", "")
    edges = pd.read_parquet(out / "edges.parquet")
    assert lists(edges.pop("vectors")) == lists(expected.pop("vectors"))
    pd.testing.assert_frame_equal(edges, expected)


def test_nothing_is_opened_where_no_root_fires(refused, monkeypatch):
    monkeypatch.setattr(contributing, "coordinates", None)
    monkeypatch.setattr(core_run.Run, "outputs", None)
    assert "never fires on these prompts" in refused("trace --ioi 4 --firing 1.3:2:2")


@pytest.mark.parametrize(
    ("prompts", "rows"), [("--ioi 2", True), ("--no-bos --prompt Then", False)]
)
def test_lists_have_one_type(said, out, prompts, rows):
    assert said(f"signals {prompts} --quiet")[0] == 0
    schema = pq.read_schema(out / "firings.parquet")
    assert str(schema.field("support").type) in ("list<element: int64>", "list<item: int64>")
    assert (pq.read_metadata(out / "firings.parquet").num_rows > 0) == rows
