"""Long runs: what makes another run, who may write, what a damaged chunk is worth."""

import copy
from dataclasses import replace

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from batches import plain_batch
from sparse_signals.core import resume
from sparse_signals.core.model import load_model
from sparse_signals.core.prompts import encode
from sparse_signals.core.resume import alone_in, chunked, run_key, write_parquet
from sparse_signals.core.run import fitting_rows


def test_configuration_and_borders_make_another_run(tiny_llama, tokens, mask, monkeypatch):
    batch = plain_batch(tokens, mask)
    one = run_key(tiny_llama, batch, fitting_rows(tiny_llama, batch))
    assert one == run_key(tiny_llama, batch, fitting_rows(tiny_llama, batch))
    assert one != run_key(tiny_llama, batch, fitting_rows(tiny_llama, batch, limit=1))
    keys = {one, run_key(replace(tiny_llama, n_ctx=31), batch, fitting_rows(tiny_llama, batch))}
    with monkeypatch.context() as patch:
        patch.setattr(tiny_llama.bridge.original_model.config, "rms_norm_eps", 0.5)
        keys.add(run_key(tiny_llama, batch, fitting_rows(tiny_llama, batch)))
    assert len(keys) == 3


def test_code_tokenizer_and_number_format_make_another_run(monkeypatch):
    model = load_model(dtype=torch.float32)
    batch = encode(model, ["Then, Tom and Kate left the park"])
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.add_tokens(["Zebulon"])
    others = [replace(model, tokenizer=tokenizer), load_model(dtype=torch.float64)]
    keys = [run_key(x, batch, None) for x in (model, *others)]
    monkeypatch.setattr(resume, "code_version", lambda: "another")
    keys.append(run_key(model, batch, None))
    assert len(set(keys)) == 4


def test_one_at_a_time(tmp_path):
    folder = tmp_path / "folder"
    with alone_in(folder):
        with pytest.raises(BlockingIOError, match="another run is writing to"), alone_in(folder):
            pass
        assert folder.is_dir()
    assert not folder.exists()
    with alone_in(folder):
        (folder / "kept").touch()
    assert [path.name for path in folder.iterdir()] == ["kept"]


@pytest.mark.parametrize("content", [None, b"", b"PAR1 and no more"])
def test_a_damaged_chunk_is_computed_again(tmp_path, content):
    calls = []

    def work(rows):
        calls.append(rows.start)
        return {"table": pd.DataFrame({"n": [rows.start]})}

    chunks = [slice(0, 1), slice(1, 2)]
    first = list(chunked(chunks, work, folder=tmp_path / "run"))
    path = tmp_path / "run" / "00000" / "table.parquet"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    again = list(chunked(chunks, work, folder=tmp_path / "run"))
    assert calls == [0, 1, 0]
    for one, other in zip(first, again, strict=True):
        pd.testing.assert_frame_equal(one["table"], other["table"])


@pytest.mark.parametrize("lists", [[], [[], [1, 2]], [[], []]])
def test_list_columns_have_one_type(tmp_path, lists):
    table = pd.DataFrame({"n": range(len(lists)), "vectors": pd.Series(lists)})
    write_parquet(table, tmp_path / "a.parquet", lists=["vectors"])
    kind = pq.read_schema(tmp_path / "a.parquet").field("vectors").type
    assert str(kind.value_type) == "int64"
    assert [list(row) for row in pd.read_parquet(tmp_path / "a.parquet")["vectors"]] == lists
