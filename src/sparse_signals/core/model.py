"""Load a language model, run it, and read exactly the activations that are asked for.

Every model ends up as a raw TransformerLens bridge around the transformers model: no folding and
no centring there. What the method needs folded is folded by `heads.svd`, in float64.
"""

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from sparse_signals.core.checkpoints import ModelError, find_checkpoint, one_line, read_checkpoint
from sparse_signals.core.double import compute_in_float64
from sparse_signals.core.names import HUB_MODELS, MODEL_NAMES, chosen_model
from sparse_signals.core.smollm2 import load_smollm2

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    "q_scale": "attn.q_norm.hook_scale",
    "k_scale": "attn.k_norm.hook_scale",
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}
IN_HEADS = ("q_scale", "k_scale")
ROTATED = {"q": "attn.hook_rot_q", "k": "attn.hook_rot_k"}
TOKENS_PER_BATCH = 1024
TRIED, TRIED_GAP = 8, 1e-3  # tokens on which a model is tried, and what rounding may do there
BIAS_ROW = "bias row"
T = TypeVar("T")


@dataclass(frozen=True)
class Writers:
    """Output weights of every head (values repeated per query head), and the output biases.

    A value bias passes through attention unchanged, because the weights of a row sum to 1: it
    counts as an output bias, b_V W_O is part of that of the layer, and a head is what it moved.
    """

    W_O: Float[Tensor, "layer head r d"]
    b_V: Float[Tensor, "layer head r"]
    bias: Float[Tensor, "layer d"]


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model: TransformerLens bridge, tokenizer (None if it has none) and sizes.

    What follows from its weights is computed once, when it is first asked for: the properties
    below, and whatever is marked `once_per_model` elsewhere.
    """

    name: str
    bridge: Any  # its parts are found by name when it is built
    tokenizer: Any
    bos: bool
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    n_ctx: int
    rotary: bool
    kept: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.bridge.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, in which the model computes."""
        return next(self.bridge.parameters()).dtype

    @property
    def rms(self) -> bool:
        """Whether normalisations divide only (RMSNorm), or centre first (LayerNorm)."""
        return self.bridge.ln_final.uses_rms_norm

    @property
    def parallel(self) -> bool:
        """Whether the MLP of a layer reads what its heads read, not what they write."""
        return self.bridge.cfg.parallel_attn_mlp

    @cached_property
    def head_gains(self) -> dict[str, Float[Tensor, "layer r"]]:
        """The gain of the RMSNorm of queries ("q") and keys ("k") inside heads; {} without one."""
        blocks = [block.attn for block in self.bridge.blocks]
        if not hasattr(blocks[0].original_component, "q_norm"):
            return {}
        return {
            "q": torch.stack([attn.q_norm.w for attn in blocks]),
            "k": torch.stack([attn.k_norm.w for attn in blocks]),
        }

    @cached_property
    def divisor(self) -> Float[Tensor, "layer"]:
        """What q·k is divided by to give the score: √r, times layer + 1 where the model says so."""
        divisors = [1 / block.attn.original_component.scaling for block in self.bridge.blocks]
        return torch.tensor(divisors, dtype=torch.float64, device=self.device)

    @cached_property
    def writers(self) -> Writers:
        """How heads write, in the dtype of the model."""
        blocks = [block.attn for block in self.bridge.blocks]
        W_O = torch.stack([attn.W_O for attn in blocks])
        b_V = W_O.new_zeros(self.n_layers, self.n_kv_heads, self.d_head)
        if blocks[0].b_V is not None:
            b_V = torch.stack([attn.b_V for attn in blocks])
        b_V = b_V.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
        bias = torch.einsum("lhr,lhrd->ld", b_V, W_O)
        if blocks[0].b_O is not None:
            bias = bias + torch.stack([attn.b_O for attn in blocks])
        return Writers(W_O, b_V, bias)

    @cached_property
    def components(self) -> pd.DataFrame:
        """The components in order: component, kind, layer, head (−1 where there is none), height.

        `height` is where a chart draws it. The last one, "bias row", is no part of the residual
        stream: it is the constant 1 of x̃, through which query, key and normalisation biases act.
        """
        rows = [("embedding", "embedding", -1, -1, -1.0)]
        if not self.rotary:
            rows.append(("position", "position", -1, -1, -1.0))
        for layer in range(self.n_layers):
            heads = range(self.n_heads)
            rows += [(head_name(layer, h), "head", layer, h, float(layer)) for h in heads]
            rows.append((f"bias {layer}", "bias", layer, -1, layer + 0.3))
            rows.append((f"MLP {layer}", "MLP", layer, -1, layer + 0.5))
        rows.append((BIAS_ROW, BIAS_ROW, -1, -1, -1.0))
        return pd.DataFrame(rows, columns=["component", "kind", "layer", "head", "height"])

    def components_below(self, layer: int) -> int:
        """How many of the components write before a layer; they are the first ones."""
        return (1 if self.rotary else 2) + layer * (self.n_heads + 2)

    @property
    def is_head(self) -> Bool[Tensor, "component"]:
        """Which of the components are heads, layer by layer."""
        return torch.tensor((self.components["kind"] == "head").tolist(), device=self.device)


def head_name(layer: Any, head: Any) -> Any:
    """layer.head, as in 9.9: of two numbers, or of two columns of numbers."""
    if isinstance(layer, pd.Series):
        return layer.astype(str) + "." + head.astype(str)
    return f"{layer}.{head}"


def once_per_model(function: Callable[[Model], T]) -> Callable[[Model], T]:
    """Keep what a function makes of a model with the model, and make it only once."""

    @wraps(function)
    def kept(model: Model) -> T:
        name = f"{function.__module__}.{function.__qualname__}"
        if name not in model.kept:
            model.kept[name] = function(model)
        return model.kept[name]

    return kept


@dataclass(frozen=True)
class QKWeights:
    """Query and key weights of every head, raw, in float64; keys repeated per query head.

    q = (x̂ * gain + shift) W_Q + b_Q, k likewise, score = q·k / divisor. `centred` says whether
    x̂ is x minus its mean (LayerNorm) or not (RMSNorm). Missing biases and shifts are zeros.
    Where heads normalise q and k, with `Model.head_gains`, they do it afterwards.
    """

    W_Q: Float[Tensor, "layer head d r"]
    b_Q: Float[Tensor, "layer head r"]
    W_K: Float[Tensor, "layer head d r"]
    b_K: Float[Tensor, "layer head r"]
    gain: Float[Tensor, "layer d"]
    shift: Float[Tensor, "layer d"]
    divisor: Float[Tensor, "layer"]
    centred: bool


def load_model(
    name_or_directory: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Load a model by name (`gpt2-ioi`, `gpt2-small`, `smollm2-135m`) or HF-format directory.

    None means the environment variable MODEL, or `gpt2-ioi` if it is not set. The device is a
    GPU where there is one. Raises ModelError, in one line, for whatever cannot be loaded.

    >>> model = load_model("gpt2-ioi")
    >>> model.name, model.rotary
    ('gpt2-ioi', False)
    >>> model.components.query("kind == 'head'")["component"].iloc[0]
    '0.0'
    """
    name = str(name_or_directory or chosen_model())
    if dtype not in (torch.float32, torch.float64):
        raise ModelError(f"dtype {dtype} cannot be used: choose torch.float32 or torch.float64")
    if name not in HUB_MODELS:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    try:
        return _load(name, device, dtype)
    except ModelError:
        raise
    except Exception as error:  # a configuration can be odd in more ways than can be listed
        raise ModelError(f"cannot use {name}: {one_line(error)}") from error


def _load(name: str, device: str | torch.device | None, dtype: torch.dtype) -> Model:
    if name == "smollm2-135m":
        hf_model, tokenizer = load_smollm2(dtype)
    else:
        directory = find_checkpoint(name)
        hf_model, tokenizer = read_checkpoint(directory, dtype)
        name = name if name in MODEL_NAMES else directory.resolve().name
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    hf_model = hf_model.to(device).eval()  # pyright: ignore[reportArgumentType]
    places = torch.arange(min(TRIED, _window(hf_model.config)), device=hf_model.device)
    tokens = (places % hf_model.config.vocab_size).repeat(len(places), 1)
    with torch.no_grad():
        expected = hf_model(tokens[:1]).logits[0]  # before its parts are wrapped
    model = _bridge(hf_model, tokenizer, name)
    gap = (logits(model, tokens, places) - expected).abs().max()
    if not gap <= TRIED_GAP * expected.abs().max():
        raise ModelError(f"cannot use {name}: a setting in config.json makes it another model")
    return model


def wrap_model(hf_model: "PreTrainedModel", name: str, tokenizer: Any = None) -> Model:
    """A transformers model that is in memory already (eager attention), where it is."""
    return _bridge(hf_model.eval(), tokenizer, name)


def _starts_with_bos(name: str, tokenizer: Any) -> bool:
    if name in MODEL_NAMES:
        return name != "gpt2-small"  # the paper's prompts have none
    if tokenizer is None or tokenizer.bos_token_id is None:
        return False
    return tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def _window(config: Any) -> int:
    """The longest prompt. Within its window a sliding attention is an ordinary one."""
    return min(config.max_position_embeddings, getattr(config, "sliding_window", None) or 2**31)


def _bridge(hf_model: "PreTrainedModel", tokenizer: Any, name: str) -> Model:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    config = hf_model.config
    # No tokenizer for the bridge: it would go to the hub, and guess padding masks.
    bridge = build_bridge_from_module(
        hf_model, type(hf_model).__name__, hf_config=config, tokenizer=None, model_name=name
    )
    rotary, n_heads = config.model_type != "gpt2", config.num_attention_heads
    if rotary and hf_model.dtype == torch.float64:
        compute_in_float64(bridge)
    if config.model_type == "gpt_neox":
        for block in bridge.blocks:
            _hook_rotation(block.attn)
    return Model(
        name=name,
        bridge=bridge.requires_grad_(False),
        tokenizer=tokenizer,
        bos=_starts_with_bos(name, tokenizer),
        n_layers=config.num_hidden_layers,
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        d_model=config.hidden_size,
        d_head=bridge.blocks[0].attn.W_Q.shape[-1],
        n_ctx=_window(config),
        rotary=rotary,
    )


def _hook_rotation(attn: Any) -> None:
    """Call the hooks of turned queries and keys, which attention with fused weights leaves out."""
    turn = attn._apply_rotary_pos_emb

    def hooked(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        q, k = turn(*inputs)
        return attn.hook_rot_q(q), attn.hook_rot_k(k)

    attn._apply_rotary_pos_emb = hooked


def activations(
    model: Model, tokens: Int[Tensor, "prompt pos"], names: Collection[str], progress: bool = False
) -> dict[str, Tensor]:
    """Run the model on prompts and keep the named activations, stacked over layers.

    q, k, v, z: [layer prompt head pos r], keys and values repeated per query head, q and k as
    they enter the score (rotated, if rotary; `q_raw` and `k_raw` are not). pattern, scores:
    [layer prompt head dest src], future scores hugely negative. normalized (x̂, before the
    gain), resid_pre, resid_post, attn_out, mlp_out: [layer prompt pos d].
    scale (what x was divided by to get x̂): [layer prompt pos]. q_scale, k_scale (what heads divided
    queries and keys by, 1 where they do not): [layer prompt head pos].
    """
    unknown = sorted(set(names) - set(HOOKS))
    if unknown:
        raise ValueError(f"unknown activations {unknown}: choose among {sorted(HOOKS)}")
    points = HOOKS | ROTATED if model.rotary else HOOKS
    there = [name for name in names if model.head_gains or name not in IN_HEADS]
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any, name: str, layer: int, rows: slice) -> None:
        value = _arranged(model, name, value)
        if name not in kept:
            kept[name] = value.new_empty(model.n_layers, len(tokens), *value.shape[1:])
        kept[name][layer, rows] = value

    for rows, batch in _batches(model, tokens, progress):
        hooks = [
            (f"blocks.{layer}.{points[name]}", partial(keep, name=name, layer=layer, rows=rows))
            for name in there
            for layer in range(model.n_layers)
        ]
        last = torch.full((len(batch),), batch.shape[1] - 1, device=model.device)
        _run(model, batch, last, hooks)
    one = torch.ones((), dtype=model.dtype, device=model.device)
    ones = one.expand(model.n_layers, len(tokens), model.n_heads, tokens.shape[1])
    return dict.fromkeys(set(names) - set(there), ones) | kept


def logits(
    model: Model,
    tokens: Int[Tensor, "prompt pos"],
    at: Int[Tensor, "prompt"] | None = None,
    hooks: Collection[tuple[str, Callable[..., Any]]] = (),
) -> Float[Tensor, "prompt vocab"]:
    """Logits at one position of each prompt (the last one unless `at` says which).

    Hooks are TransformerLens hooks, run on every batch of prompts.
    """
    if at is None:
        at = torch.full((len(tokens),), tokens.shape[1] - 1)
    at = at.to(model.device)
    runs = [_run(model, batch, at[rows], hooks) for rows, batch in _batches(model, tokens)]
    return torch.cat(runs)


def _arranged(model: Model, name: str, value: Tensor) -> Tensor:
    if name == "scale":
        return value.squeeze(-1)
    if name in IN_HEADS:
        return value.squeeze(-1).repeat_interleave(model.n_heads // value.shape[1], dim=1)
    if name not in ("q", "k", "v", "z", "q_raw", "k_raw"):
        return value
    value = value.transpose(1, 2).unsqueeze(2)
    return value.expand(-1, -1, model.n_heads // value.shape[1], -1, -1).flatten(1, 2)


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
    hooks: Collection[tuple[str, Callable[..., Any]]] = (),
) -> Float[Tensor, "prompt vocab"]:
    hooks = [*hooks, ("unembed.hook_in", partial(_pick, at=at))]
    return model.bridge.run_with_hooks(tokens, fwd_hooks=hooks)[:, 0]


def _pick(value: Tensor, hook: Any, at: Int[Tensor, "prompt"]) -> Tensor:
    """One position of each prompt: to unembed all is expensive."""
    return value[torch.arange(len(value), device=value.device), at].unsqueeze(1)


def qk_weights(model: Model) -> QKWeights:
    """Query and key weights, norm gain and shift, and score divisor of every head, in float64."""
    blocks = model.bridge.blocks
    groups = model.n_heads // model.n_kv_heads
    gain = _stacked([block.ln1.w for block in blocks])
    shifts = [getattr(block.ln1, "b", None) for block in blocks]
    shifts = [shift for shift in shifts if shift is not None]
    return QKWeights(
        W_Q=_stacked([block.attn.W_Q for block in blocks]),
        b_Q=_biases(model, "b_Q", model.n_heads),
        W_K=_stacked([block.attn.W_K for block in blocks]).repeat_interleave(groups, dim=1),
        b_K=_biases(model, "b_K", model.n_kv_heads).repeat_interleave(groups, dim=1),
        gain=gain,
        shift=_stacked(shifts) if shifts else torch.zeros_like(gain),
        divisor=model.divisor,
        centred=not blocks[0].ln1.uses_rms_norm,
    )


def _stacked(values: list[Tensor]) -> Tensor:
    return torch.stack(values).detach().double()


def _biases(model: Model, name: str, heads: int) -> Tensor:
    zero = torch.zeros(heads, model.d_head, device=model.device)
    found = [getattr(block.attn, name) for block in model.bridge.blocks]
    return _stacked([zero if bias is None else bias for bias in found])
