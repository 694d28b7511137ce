"""Find and read checkpoints in HF format, or say in one line why that cannot be done."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparse_signals.core.names import MODEL_NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GPT2_SMALL = ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e")
GPT2_SMALL_FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}
NO_ATTENTION = "it has no attention"
SCORE_BIAS = "its positions are added to the scores"
JOINT_NORM = "it normalises the sum of what the heads of a layer write"
REFUSED = {
    "mamba": NO_ATTENTION,
    "mamba2": NO_ATTENTION,
    "rwkv": NO_ATTENTION,
    "bloom": SCORE_BIAS,
    "mpt": SCORE_BIAS,
    "t5": SCORE_BIAS,
    "gemma2": f"{JOINT_NORM}, and caps scores and logits",
    "gemma3_text": JOINT_NORM,
}
# Settings that would make scores something else than q·k / scale over all tokens so far.
USUAL = {
    "scale_attn_weights": True,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "is_causal": True,
}
# NeoX may turn a part of each head, and the bridge takes its fused weights apart with their biases.
USUAL_OF = {"gpt_neox": {"attention_bias": True}}
USUAL_ELSEWHERE = {"partial_rotary_factor": 1}
# The angles of these depend on nothing but the position, up to the longest prompt.
ROTATIONS = ("default", "linear", "dynamic", "yarn", "llama3")


class ModelError(ValueError):
    """A model cannot be loaded; the message is one line and says what to do."""


def one_line(error: BaseException) -> str:
    """The type and message of an error, on one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def find_checkpoint(name: str) -> Path:
    """The directory of the shipped model, of GPT-2 small (downloaded if need be), or `name`."""
    if name == "gpt2-small":
        return _gpt2_small()
    if name == "gpt2-ioi":
        directory = Path(str(files("sparse_signals"))) / "assets" / "gpt2-ioi"
        if not (directory / "config.json").exists():
            raise ModelError("gpt2-ioi is not there: run `python scripts/train_gpt2_ioi.py`")
        return directory
    directory = Path(os.path.expanduser(name))  # which leaves a user that is not there as it is
    if not directory.exists():
        raise ModelError(
            f"no model called {name!r}: use {', '.join(MODEL_NAMES)}, or a directory in HF format"
        )
    if not directory.is_dir():
        raise ModelError(f"{name} is not a directory: give the one that holds config.json")
    return directory


def _gpt2_small() -> Path:
    from huggingface_hub import hf_hub_download

    repo, revision = GPT2_SMALL
    try:
        paths = [hf_hub_download(repo, file, revision=revision) for file in GPT2_SMALL_FILES]
    except Exception as error:
        raise ModelError(
            "gpt2-small is not in the Hugging Face cache and cannot be downloaded "
            f"({type(error).__name__}): on a machine with a network run `hf download {repo} "
            f"{' '.join(GPT2_SMALL_FILES)} --revision {revision}`, then load it again"
        ) from error
    return Path(paths[0]).parent


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings from transformers inside the block."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_checkpoint(directory: Path, dtype: torch.dtype) -> tuple["PreTrainedModel", Any]:
    """Model (eager attention, on the CPU) and tokenizer, None without tokenizer files.

    Only safetensors are read, no code from the directory is run and nothing is downloaded.
    Raises ModelError for a broken or missing configuration, an architecture whose scores are
    not q·k with learned or rotary positions, and weights that are pickled, damaged,
    incomplete, of the wrong shape, or not finite.
    """
    architecture = _architecture(directory)
    if not list(directory.glob("*.safetensors")):
        raise ModelError(f"{directory} has no *.safetensors weights; other formats are not read")
    import transformers

    try:
        with quiet_transformers():
            model, report = getattr(transformers, architecture).from_pretrained(
                directory,
                dtype=dtype,
                attn_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported below, in one line
                output_loading_info=True,
            )
    except Exception as error:
        raise ModelError(f"cannot read the weights in {directory}: {one_line(error)}") from error
    _check_weights(directory, model, report)
    return model, _read_tokenizer(directory)


def _check_weights(directory: Path, model: nn.Module, report: dict[str, Any]) -> None:
    bad_shapes = [key for key, *_ in report["mismatched_keys"]]
    for keys, problem in (
        (bad_shapes, "do not fit config.json, in shape"),
        (report["missing_keys"], "are incomplete, without"),
        (report["unexpected_keys"], "do not fit config.json, which has no"),
    ):
        if keys:
            first, more = min(keys), f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ModelError(f"the weights in {directory} {problem}: {first}{more}")
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise ModelError(f"the weights in {directory} are damaged: some are not finite")


def _architecture(directory: Path) -> str:
    """The transformers class for the directory's config.json, if the book can treat it."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = str(config["model_type"])
    except FileNotFoundError:
        raise ModelError(f"{directory} has no config.json: not a model in HF format") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot read {path}: {one_line(error)}") from error
    if kind not in ARCHITECTURES:
        reason = REFUSED.get(kind, "its attention has not been checked")
        raise ModelError(
            f"cannot use {directory}, a model of type {kind!r}: {reason} "
            f"(types that work: {', '.join(ARCHITECTURES)})"
        )
    _check_settings(directory, config, USUAL | USUAL_OF.get(kind, USUAL_ELSEWHERE))
    return ARCHITECTURES[kind]


def _check_settings(directory: Path, config: dict[str, Any], good: dict[str, Any]) -> None:
    ropes = [config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)]
    if wrong := [rope for rope in ropes if not isinstance(rope, dict)]:
        raise ModelError(f"cannot use {directory}: its rotation is {json.dumps(wrong[0])}")
    ropes += [each for rope in ropes for each in rope.values() if isinstance(each, dict)]
    for table in [config, *ropes]:
        for setting, usual in good.items():
            if table.get(setting, usual) != usual:
                value, only = json.dumps(table[setting]), json.dumps(usual)
                raise ModelError(f"cannot use {directory}: its {setting} is {value}, not {only}")
    for rope in ropes:
        for setting in {"rope_type", "type"} & set(rope):
            if rope[setting] not in ROTATIONS:
                raise ModelError(
                    f"cannot use {directory}: its {setting} is {json.dumps(rope[setting])}, and "
                    f"the rotations that are modelled are {', '.join(ROTATIONS)}"
                )


def _read_tokenizer(directory: Path) -> Any:
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise ModelError(f"cannot read the tokenizer in {directory}: {one_line(error)}") from error
