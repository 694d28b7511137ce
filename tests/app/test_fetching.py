"""`sparse-signals fetch`: where the weights are, and what stands in the way."""

from sparse_signals.app import fetching
from sparse_signals.app.cli import main
from sparse_signals.core.checkpoints import ModelError


def test_it_says_where_the_weights_are_and_how_large(monkeypatch, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(bytes(3_000_000))

    def fetch(say):
        say("Downloading ...")
        return tmp_path

    monkeypatch.setattr(fetching, "fetch_smollm2", fetch)
    monkeypatch.setattr(fetching, "find_checkpoint", {"gpt2-small": tmp_path}.get)
    assert main(["fetch", "smollm2-135m"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"Downloading ...\nsmollm2-135m is in {tmp_path}: 3 MB (")
    assert main(["fetch", "gpt2-small"]) == 0
    assert capsys.readouterr().out.startswith(f"gpt2-small is in {tmp_path}: 3 MB (")


def test_what_cannot_be_fetched_is_one_line(monkeypatch, capsys):
    def fetch(say):
        raise ModelError("it cannot be downloaded")

    monkeypatch.setattr(fetching, "fetch_smollm2", fetch)
    assert main(["fetch", "smollm2-135m"]) == 2
    assert capsys.readouterr() == ("", "sparse-signals: it cannot be downloaded\n")
    assert main(["fetch", "gpt2-ioi"]) == 2
    assert "(choose from" in capsys.readouterr().err
    assert main(["fetch"]) == 2
    assert "required: NAME" in capsys.readouterr().err
