"""Models of the GPT-2 architecture whose attention heads are written by hand.

Every fact about a token (which token it is, where it stands, what a head told it) is a feature: a
direction of its own in the residual stream, +1 and -1 on two coordinates, so that all features are
orthogonal and none has a mean for LayerNorm to remove. A head matches features of the destination
with features of the source, and sends features of the source on. Where nothing matches it rests on
the first token, which sends nothing. A unit of an MLP sends a message where two features meet; an
MLP without units is zero.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from math import sqrt
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

HEADS, D_HEAD, POSITIONS = 4, 32, 12
D_MODEL, D_MLP = HEADS * D_HEAD, 32
MATCH, REST = 32.0, 13.0  # the score of a match, and of the first token for everyone
SPREAD = 0.05  # matches of a head differ by 5 % each, so that no two singular values are equal
MESSAGE = 0.25  # norm of what a head sends; a token and a position have norm 1
SHARP = 8.0  # what a unit of an MLP reads where both its features are; with one of them, -8
ANSWER_LOGIT = 10.0  # what a message ("answer", word) adds to the logit of the word
Feature = tuple[str, Hashable]  # ("token", "Mary"), ("position", 3), ("previous", "Mary")


@dataclass(frozen=True)
class Match:
    """A destination with feature `dest` scores a source with one of the features `src`."""

    dest: Feature
    src: tuple[Feature, ...]
    score: float = MATCH


@dataclass(frozen=True)
class Head:
    """A head by what it does: `send` maps a feature of the source to what the destination gets."""

    layer: int
    head: int
    match: tuple[Match, ...]
    send: tuple[tuple[Feature, Feature], ...] = ()
    loudness: float = MESSAGE

    @property
    def name(self) -> str:
        """Layer and head."""
        return f"{self.layer}.{self.head}"


@dataclass(frozen=True)
class Unit:
    """A unit of an MLP: a token that holds both features gets the message, about 2 `MESSAGE` long.

    It reads 2 `SHARP` (f + g − 3/2 p), with p the position, which every token has: `SHARP` for two
    features, −`SHARP` for one, whatever their size in the whole (a factor for all three).
    """

    layer: int
    both: tuple[Feature, Feature]
    message: Feature


@dataclass(frozen=True)
class Weights:
    """What is not zero in a handwritten model, but for gains, which are one."""

    W_E: Float[Tensor, "vocab d"]
    W_pos: Float[Tensor, "pos d"]
    W_U: Float[Tensor, "vocab d"]
    W_Q: Float[Tensor, "layer head d r"]
    W_K: Float[Tensor, "layer head d r"]
    W_V: Float[Tensor, "layer head d r"]
    W_O: Float[Tensor, "layer head r d"]
    W_in: Float[Tensor, "layer d mlp"]
    W_out: Float[Tensor, "layer mlp d"]
    b_Q: Float[Tensor, "layer head r"]


def handwritten_model(
    heads: Sequence[Head],
    vocabulary: Sequence[str],
    noise: float = 0.0,
    seed: int = 0,
    units: Sequence[Unit] = (),
) -> "GPT2LMHeadModel":
    """A transformers model, float64 on the CPU, of heads and units; tokens number the vocabulary.

    A token holds its name, its position and a few messages; for that many its scores are as
    wanted, within a few percent. `noise` and `seed` are those of `circuits.planted`.
    Raises ValueError for more features, matches, sends or units than there is room for.
    """
    weights = write_weights(heads, vocabulary, units)
    return _hf_model(add_noise(weights, noise, seed))


def write_weights(
    heads: Sequence[Head], vocabulary: Sequence[str], units: Sequence[Unit] = ()
) -> Weights:
    """The weights of a model with the given heads and units, without noise."""
    messages = [feature for head in heads for _, feature in head.send]
    basis = _basis([*messages, *(unit.message for unit in units)], vocabulary)
    layers = 1 + max(part.layer for part in (*heads, *units))
    qkvo = torch.zeros(4, layers, HEADS, D_MODEL, D_HEAD).double()
    b_Q = torch.zeros(qkvo.shape[1], HEADS, D_HEAD).double()
    qkvo[1, ..., -1] = sqrt(REST * sqrt(D_HEAD)) * _reader(basis, ("token", vocabulary[0]))
    b_Q[..., -1] = sqrt(REST * sqrt(D_HEAD))
    for head in heads:
        qkvo[:, head.layer, head.head] += _head_weights(head, basis)
    mlps = [_mlp_weights([x for x in units if x.layer == layer], basis) for layer in range(layers)]
    W_in, W_out = torch.stack(mlps, dim=1)
    return Weights(
        W_E=torch.stack([basis["token", word] for word in vocabulary]),
        W_pos=torch.stack([basis["position", place] for place in range(POSITIONS)]),
        W_U=ANSWER_LOGIT * torch.stack([_reader(basis, ("answer", word)) for word in vocabulary]),
        W_Q=qkvo[0],
        W_K=qkvo[1],
        W_V=qkvo[2],
        W_O=qkvo[3].mT,
        W_in=W_in,
        W_out=W_out.mT,
        b_Q=b_Q,
    )


def _basis(
    messages: Sequence[Feature], vocabulary: Sequence[str]
) -> dict[Feature, Float[Tensor, "d"]]:
    """A unit vector for every feature there is, orthogonal to the others and to the ones."""
    features = dict.fromkeys(("token", word) for word in vocabulary)
    features |= dict.fromkeys(("position", place) for place in range(POSITIONS))
    features |= dict.fromkeys(messages)
    if 2 * len(features) > D_MODEL:
        raise ValueError(f"{len(features)} features, but there is room for {D_MODEL // 2}")
    axes = torch.eye(D_MODEL).double()
    return dict(zip(features, (axes[0::2] - axes[1::2]) / sqrt(2), strict=False))


def _reader(basis: dict[Feature, Float[Tensor, "d"]], feature: Feature) -> Float[Tensor, "d"]:
    """The vector whose product with x̂ is 1 for a token that holds the feature (0 if none can).

    The squared norm of x is about 2, a token and a position, so x̂ ≈ x √(d/2).
    """
    size = 1.0 if feature[0] in ("token", "position") else MESSAGE
    return basis.get(feature, torch.zeros(D_MODEL).double()) / (size * sqrt(D_MODEL / 2))


def _head_weights(
    head: Head, basis: dict[Feature, Float[Tensor, "d"]]
) -> Float[Tensor, "qkvo d r"]:
    """W_Q, W_K, W_V and W_Oᵀ: one dimension of the head for each match, and for each send."""
    if max(len(head.match) + 1, len(head.send)) > D_HEAD:
        raise ValueError(f"head {head.name}: at most {D_HEAD - 1} matches and {D_HEAD} sends")
    W_Q, W_K, W_V, W_O = torch.zeros(4, D_MODEL, D_HEAD).double()
    for k, match in enumerate(head.match):
        size = sqrt(abs(match.score) * (1 + SPREAD * k) * sqrt(D_HEAD))
        W_Q[:, k] = size * _reader(basis, match.dest)
        W_K[:, k] = size * sum(_reader(basis, source) for source in match.src)
        W_K[:, k] *= 1 if match.score > 0 else -1
    for k, (source, message) in enumerate(head.send):
        W_V[:, k] = _reader(basis, source)
        W_O[:, k] = head.loudness * basis[message]
    return torch.stack([W_Q, W_K, W_V, W_O])


def _mlp_weights(
    units: Sequence[Unit], basis: dict[Feature, Float[Tensor, "d"]]
) -> Float[Tensor, "io d mlp"]:
    """W_in and W_outᵀ of one MLP, a column for each unit."""
    if len(units) > D_MLP:
        raise ValueError(f"an MLP has room for {D_MLP} units, not for {len(units)}")
    W_in, W_out = torch.zeros(2, D_MODEL, D_MLP).double()
    place = sum(_reader(basis, ("position", n)) for n in range(POSITIONS))
    for k, unit in enumerate(units):
        first, second = (_reader(basis, feature) for feature in unit.both)
        W_in[:, k] = 2 * SHARP * (first + second - 1.5 * place)
        W_out[:, k] = 2 * MESSAGE / SHARP * basis[unit.message]
    return torch.stack([W_in, W_out])


def add_noise(weights: Weights, noise: float, seed: int = 0) -> Weights:
    """Gaussian noise on every matrix; the levels are explained in `circuits.planted`."""
    generator = torch.Generator().manual_seed(seed)
    like = {"W_in": "W_V", "W_out": "W_O"}
    noisy = {}
    for name in (field.name for field in fields(weights) if field.name != "b_Q"):
        matrix = getattr(weights, name)
        typical = _root_mean_square(getattr(weights, like.get(name, name)).flatten())
        level = _root_mean_square(matrix.flatten(-2))
        level = torch.where(level > 0, level, typical)[..., None, None]
        draw = torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype)
        noisy[name] = matrix + noise * level * draw
    return replace(weights, **noisy)


def _root_mean_square(values: Float[Tensor, "... n"]) -> Float[Tensor, "..."]:
    """Of the values that are not zero; 0 if all are."""
    return (values.square().sum(-1) / (values != 0).sum(-1).clamp_min(1)).sqrt()


def _hf_model(w: Weights) -> "GPT2LMHeadModel":
    model = _zero_model(layers=len(w.W_Q), words=len(w.W_E))
    state = {"transformer.wte.weight": w.W_E, "transformer.wpe.weight": w.W_pos}
    state |= {"lm_head.weight": w.W_U}
    for layer in range(len(w.W_Q)):
        block = f"transformer.h.{layer}"
        qkv = torch.stack([w.W_Q[layer], w.W_K[layer], w.W_V[layer]])
        biases = torch.stack([w.b_Q[layer], *torch.zeros(2, HEADS, D_HEAD).double()])
        state[f"{block}.attn.c_attn.weight"] = qkv.permute(2, 0, 1, 3).reshape(D_MODEL, -1)
        state[f"{block}.attn.c_attn.bias"] = biases.flatten()
        state[f"{block}.attn.c_proj.weight"] = w.W_O[layer].flatten(0, 1)
        state[f"{block}.mlp.c_fc.weight"] = w.W_in[layer]
        state[f"{block}.mlp.c_proj.weight"] = w.W_out[layer]
    model.load_state_dict(model.state_dict() | state)
    return model.eval()


def _zero_model(layers: int, words: int) -> "GPT2LMHeadModel":
    """All parameters zero, but for the gains of LayerNorm; embedding and unembedding are apart."""
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(
        vocab_size=words,
        n_positions=POSITIONS,
        n_embd=D_MODEL,
        n_layer=layers,
        n_head=HEADS,
        n_inner=D_MLP,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    options = {"dtype": torch.float64, "attn_implementation": "eager"}
    with torch.random.fork_rng(devices=[]):  # transformers starts with random weights
        model = AutoModelForCausalLM.from_config(config, **options)
    for name, parameter in model.requires_grad_(False).named_parameters():
        parameter.fill_(float("ln_" in name and name.endswith("weight")))
    return model
