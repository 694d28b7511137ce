"""A random GPT-2 of twelve layers of twelve heads, with the shipped tokenizer, and its prompts."""

import json
import shutil
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch

from random_models import save_random_model
from sparse_signals.app.notebook import published
from sparse_signals.core.model import Model, load_model
from sparse_signals.core.prompts import Batch, encode, ioi_prompts

SHIPPED = Path(str(files("sparse_signals"))) / "assets" / "gpt2-ioi"
PROMPT = "After Andrew and Mary went to the school, Mary gave a ring to Andrew"


def save_published_size(directory: Path, layers: int = 12, sharper: float = 4.0) -> Path:
    """As many heads as GPT-2 small (with twelve layers), of 4; attention is very sharp."""
    from transformers import GPT2LMHeadModel

    config = json.loads((SHIPPED / "config.json").read_text(encoding="utf-8"))
    sizes = {
        "vocab_size": config["vocab_size"],
        "hidden_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "max_position_embeddings": 64,
    }
    save_random_model(directory, "gpt2", **sizes, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel.from_pretrained(directory)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_attn.weight" in name:
                parameter.mul_(sharper)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, directory / name)
    return directory


def ioi_batch(model: Model, n: int) -> Batch:
    return encode(model, ioi_prompts(n, tokenizer=model.tokenizer), bos=False)


@cache
def loaded(directory: Path) -> Model:
    return load_model(directory, device="cpu", dtype=torch.float64)


def facts_of_shipped_words() -> dict:
    """The facts file, with the sliced prompt in words that the shipped tokenizer has."""
    facts = published()
    facts["slices_8_6_prompt_6"]["prompt"] = PROMPT
    return facts
