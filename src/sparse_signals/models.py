"""Load a language model, run it, and read exactly the activations that are asked for.

Every model ends up as a raw TransformerLens bridge around the transformers model: no folding and
no centring there. What the method needs folded is folded by `heads.py`, in float64.
"""

import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

GPT2_SMALL = ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e")
GPT2_SMALL_FILES = ("config.json", "model.safetensors", "vocab.json", "merges.txt")
NAMES = ("gpt2-ioi", "gpt2-small", "smollm2-135m")
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
REFUSED = {
    "mamba": "it has no attention",
    "mamba2": "it has no attention",
    "rwkv": "it has no attention",
    "bloom": "its positions are a bias on the scores (ALiBi)",
    "mpt": "its positions are a bias on the scores (ALiBi)",
    "t5": "its positions are a learned bias on the scores",
    "qwen3": "it normalises queries and keys, so scores are not bilinear",
    "gpt_neox": "it rotates only a part of each head",
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
HOOKS = {
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "q_raw": "attn.hook_q",
    "k_raw": "attn.hook_k",
    "pattern": "attn.hook_pattern",
    "scores": "attn.hook_attn_scores",
    "normalized": "ln1.hook_normalized",
    "scale": "ln1.hook_scale",
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}
ROTATED = {"q": "attn.hook_rot_q", "k": "attn.hook_rot_k"}
TOKENS_PER_BATCH = 2048


class ModelError(ValueError):
    """A model cannot be loaded or used; the message is one line and says what to do."""


@dataclass(frozen=True)
class Model:
    """A loaded model: TransformerLens bridge, tokenizer (None if it has none) and sizes."""

    name: str
    bridge: nn.Module
    tokenizer: Any
    bos: bool
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    n_ctx: int
    rotary: bool

    @property
    def device(self) -> torch.device:
        return next(self.bridge.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.bridge.parameters()).dtype


@dataclass(frozen=True)
class QKWeights:
    """Query and key weights of every head, raw, in float64; keys repeated per query head.

    q = (x̂ * gain + shift) W_Q + b_Q, k likewise, score = q·k / scale. `centred` says whether
    x̂ is x minus its mean (LayerNorm) or not (RMSNorm). Missing biases and shifts are zeros.
    """

    W_Q: Float[Tensor, "layer head d r"]
    b_Q: Float[Tensor, "layer head r"]
    W_K: Float[Tensor, "layer head d r"]
    b_K: Float[Tensor, "layer head r"]
    gain: Float[Tensor, "layer d"]
    shift: Float[Tensor, "layer d"]
    scale: Float[Tensor, "layer"]
    centred: bool


def load_model(
    name_or_directory: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Load a model by name (`gpt2-ioi`, `gpt2-small`, `smollm2-135m`) or HF-format directory.

    None means the environment variable MODEL, or `gpt2-ioi` if it is not set. The device is a
    GPU where there is one. Raises ModelError, in one line, for whatever cannot be loaded.
    """
    name = str(name_or_directory or os.environ.get("MODEL") or NAMES[0])
    if dtype not in (torch.float32, torch.float64):
        raise ModelError(f"dtype {dtype} is not supported: use torch.float32 or torch.float64")
    if name != "gpt2-small":
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    if name == "smollm2-135m":
        from sparse_signals.smollm2 import load_smollm2

        hf_model, tokenizer = load_smollm2(dtype)
    else:
        directory = _directory(name)
        hf_model, tokenizer = _read_directory(directory, dtype)
        name = name if name in NAMES else directory.resolve().name
    bos = name == "smollm2-135m" or (name != "gpt2-small" and _adds_bos(tokenizer))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return _bridge(hf_model.to(device).eval(), tokenizer, name, bos)


def _directory(name: str) -> Path:
    if name == "gpt2-small":
        return _download_gpt2_small()
    if name == "gpt2-ioi":
        directory = Path(__file__).parent / "assets" / "gpt2-ioi"
        if not directory.is_dir():
            raise ModelError("gpt2-ioi is missing: run `python scripts/train_gpt2_ioi.py`")
        return directory
    directory = Path(name).expanduser()
    if not directory.exists():
        raise ModelError(
            f"no model called {name!r}: use {', '.join(NAMES)}, or a directory in HF format"
        )
    if not directory.is_dir():
        raise ModelError(f"{name} is a file: give the directory that holds config.json")
    return directory


def _download_gpt2_small() -> Path:
    from huggingface_hub import snapshot_download

    repo, revision = GPT2_SMALL
    files = list(GPT2_SMALL_FILES)
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except Exception as error:
        raise ModelError(
            "gpt2-small is neither in the Hugging Face cache nor downloadable "
            f"({type(error).__name__}): with a network, run "
            f"`hf download {repo} {' '.join(files)} --revision {revision}` and try again"
        ) from error


def _read_directory(directory: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    architecture = _architecture(directory)
    if not list(directory.glob("*.safetensors")):
        raise ModelError(f"{directory} has no *.safetensors weights (pickled ones are not read)")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = getattr(transformers, architecture).from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(f"cannot read the weights in {directory}: {_one_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"{directory} lacks {len(missing)} weights, the first is {missing[0]}")
    return model, _read_tokenizer(directory)


def _architecture(directory: Path) -> str:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
    except FileNotFoundError:
        raise ModelError(f"{directory} has no config.json: not a model in HF format") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot read {directory / 'config.json'}: {_one_line(error)}") from error
    if kind not in ARCHITECTURES:
        reason = REFUSED.get(kind, "only learned or fully rotary positions without extras are")
        raise ModelError(
            f"architecture {kind!r} is not supported: {reason} "
            f"(supported: {', '.join(ARCHITECTURES)})"
        )
    if not config.get("scale_attn_weights", True):
        raise ModelError(f"{directory}: scale_attn_weights=false is not supported")
    rope = config.get("rope_parameters") or {}
    if (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1) != 1:
        raise ModelError(f"{directory}: heads that are only partly rotated are not supported")
    return ARCHITECTURES[kind]


def _read_tokenizer(directory: Path) -> Any:
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise ModelError(f"cannot read the tokenizer in {directory}: {_one_line(error)}") from error


def _adds_bos(tokenizer: Any) -> bool:
    if tokenizer is None or tokenizer.bos_token_id is None:
        return False
    return tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _bridge(hf_model: nn.Module, tokenizer: Any, name: str, bos: bool) -> Model:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    config = hf_model.config
    # No tokenizer for the bridge: it would go to the hub, and guess padding masks.
    bridge = build_bridge_from_module(
        hf_model, type(hf_model).__name__, hf_config=config, tokenizer=None, model_name=name
    )
    for block in bridge.blocks:
        if hf_model.dtype == torch.float64:  # transformers' RMSNorm would drop to float32
            block.ln1.use_native_layernorm_autograd = False
            block.ln2.use_native_layernorm_autograd = False
    n_heads = config.num_attention_heads
    return Model(
        name=name,
        bridge=bridge.requires_grad_(False),
        tokenizer=tokenizer,
        bos=bos,
        n_layers=config.num_hidden_layers,
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        d_model=config.hidden_size,
        d_head=bridge.blocks[0].attn.W_Q.shape[-1],
        # Within the window a sliding attention is an ordinary one.
        n_ctx=min(config.max_position_embeddings, getattr(config, "sliding_window", None) or 2**31),
        rotary=config.model_type != "gpt2",
    )


def activations(
    model: Model, tokens: Int[Tensor, "prompt pos"], names: Collection[str], progress: bool = False
) -> dict[str, Tensor]:
    """Run the model on prompts and keep the named activations, stacked over layers.

    q, k, v, z: [layer prompt head pos r], keys and values repeated per query head, q and k as
    they enter the score (rotated, if rotary; `q_raw` and `k_raw` are not). pattern, scores:
    [layer prompt head dest src], future scores hugely negative. normalized (x̂, before the
    gain), resid_pre, resid_post, attn_out, mlp_out: [layer prompt pos d].
    scale (what x was divided by to get x̂): [layer prompt pos].
    """
    unknown = sorted(set(names) - set(HOOKS))
    if unknown:
        raise ValueError(f"unknown activations {unknown}: choose among {sorted(HOOKS)}")
    kept: dict[str, Tensor] = {}

    def keeper(name: str, layer: int, rows: slice) -> Callable[..., None]:
        def keep(value: Tensor, hook: Any) -> None:
            value = _arranged(model, name, value)
            if name not in kept:
                kept[name] = value.new_empty(model.n_layers, len(tokens), *value.shape[1:])
            kept[name][layer, rows] = value

        return keep

    for rows, batch in _batches(model, tokens, progress):
        hooks = [
            (f"blocks.{layer}.{_hook(model, name)}", keeper(name, layer, rows))
            for name in names
            for layer in range(model.n_layers)
        ]
        last = torch.full((len(batch),), batch.shape[1] - 1, device=model.device)
        _run(model, batch, last, hooks)
    return kept


def logits(
    model: Model, tokens: Int[Tensor, "prompt pos"], at: Int[Tensor, "prompt"] | None = None
) -> Float[Tensor, "prompt vocab"]:
    """Logits at one position of each prompt (the last one unless `at` says which)."""
    if at is None:
        at = torch.full((len(tokens),), tokens.shape[1] - 1)
    at = at.to(model.device)
    runs = [_run(model, batch, at[rows]) for rows, batch in _batches(model, tokens)]
    return torch.cat(runs)


def _hook(model: Model, name: str) -> str:
    return ROTATED.get(name, HOOKS[name]) if model.rotary else HOOKS[name]


def _arranged(model: Model, name: str, value: Tensor) -> Tensor:
    if name == "scale":
        return value.squeeze(-1)
    if name not in ("q", "k", "v", "z", "q_raw", "k_raw"):
        return value
    value = value.transpose(1, 2)
    return value.repeat_interleave(model.n_heads // value.shape[1], dim=1)


def _batches(
    model: Model, tokens: Int[Tensor, "prompt pos"], progress: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    length = tokens.shape[1]
    if not 0 < length <= model.n_ctx:
        raise ValueError(f"prompts have {length} tokens; {model.name} takes 1 to {model.n_ctx}")
    size = max(1, TOKENS_PER_BATCH // length)
    for start in tqdm(range(0, len(tokens), size), disable=not progress, desc=model.name):
        rows = slice(start, start + size)
        yield rows, tokens[rows].to(model.device)


@torch.no_grad()
def _run(
    model: Model,
    tokens: Int[Tensor, "prompt pos"],
    at: Int[Tensor, "prompt"],
    hooks: Collection[tuple[str, Callable[..., None]]] = (),
) -> Float[Tensor, "prompt vocab"]:
    def pick(value: Tensor, hook: Any) -> Tensor:  # unembed one position only, it is expensive
        return value[torch.arange(len(value), device=value.device), at].unsqueeze(1)

    hooks = [*hooks, ("unembed.hook_in", pick)]
    return model.bridge.run_with_hooks(tokens, fwd_hooks=hooks)[:, 0]


def qk_weights(model: Model) -> QKWeights:
    """Query and key weights, norm gain and shift, and score divisor of every head, in float64."""
    blocks = model.bridge.blocks
    groups = model.n_heads // model.n_kv_heads

    def stack(values: list[Tensor]) -> Tensor:
        return torch.stack(values).detach().double()

    def biases(name: str, heads: int) -> Tensor:
        zero = torch.zeros(heads, model.d_head, device=model.device)
        found = [getattr(block.attn, name) for block in blocks]
        return stack([zero if bias is None else bias for bias in found])

    gain = stack([block.ln1.w for block in blocks])
    shifts = [getattr(block.ln1, "b", None) for block in blocks]
    divisors = [1 / block.attn.original_component.scaling for block in blocks]
    return QKWeights(
        W_Q=stack([block.attn.W_Q for block in blocks]),
        b_Q=biases("b_Q", model.n_heads),
        W_K=stack([block.attn.W_K for block in blocks]).repeat_interleave(groups, dim=1),
        b_K=biases("b_K", model.n_kv_heads).repeat_interleave(groups, dim=1),
        gain=gain,
        shift=torch.zeros_like(gain) if shifts[0] is None else stack(shifts),
        scale=torch.tensor(divisors, dtype=torch.float64, device=model.device),
        centred=not blocks[0].ln1.uses_rms_norm,
    )
