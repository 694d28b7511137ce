"""Every operation of a transformer as an exact linear map of differences: its secant.

Two runs give an operation f the inputs x and x′, and Δ is the first minus the second. A secant of f
is a matrix J, made of the values of both runs, with J Δx = f(x) − f(x′) exactly: no step, no limit.
`apply` takes differences of inputs to that of the output, `transpose` a cotangent of the output to
those of the inputs. The secant of a run with itself is the derivative. A bar is the mean of both.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Function = Callable[[Tensor], Tensor]
Place = tuple[Int[Tensor, "..."], ...]  # indices of the first dimensions

# Below it the quotient of differences is worse than the derivative in the middle, of which the
# error is g‴ Δz² / 24, while that of the quotient is rounding / Δz.
NEAR = {torch.float32: 1e-2, torch.float64: 2e-5}
LAST_PLACES = 16  # units in the last place that a number of a run may be wrong by


@dataclass(frozen=True)
class Norm:
    """n = gain ∘ Cx / s + shift with s² = |Cx|²/d + ε, and C taking off the mean, or nothing.

    Δn = gain ∘ (inverse · CΔx − pull · (middle·CΔx) middle), since Δ(s²) = (2/d) Cx̄·CΔx. It has
    inverse = ½(1/s + 1/s′), pull = 2/(d s s′ (s + s′)) and middle = Cx̄. LayerNorm and RMSNorm.
    """

    inverse: Float[Tensor, "*tokens"]
    pull: Float[Tensor, "*tokens"]
    middle: Float[Tensor, "*tokens d"]
    gain: Float[Tensor, "d"]
    centred: bool

    @classmethod
    def between(
        cls,
        x: Float[Tensor, "*tokens d"],
        other: Float[Tensor, "*tokens d"],
        scale: Float[Tensor, "*tokens"],
        other_scale: Float[Tensor, "*tokens"],
        gain: Float[Tensor, "d"],
        centred: bool,
    ) -> "Norm":
        """From the streams of two runs and what they were divided by, s and s′."""
        middle = _centred(torch.lerp(x, other, 0.5), centred)
        product = scale * other_scale
        total = scale + other_scale
        return cls(
            total / (2 * product), 2 / (x.shape[-1] * product * total), middle, gain, centred
        )

    def at(self, place: Place) -> "Norm":
        """The secant at some of the tokens."""
        inverse, pull, middle = (x[place] for x in (self.inverse, self.pull, self.middle))
        return Norm(inverse, pull, middle, self.gain, self.centred)

    def apply(self, change: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Δx → Δn."""
        return self.gain * self.folded(_centred(change, self.centred))

    def transpose(self, cotangent: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The cotangent of n → that of x."""
        return self.folded(_centred(self.gain * cotangent, self.centred))

    def folded(self, y: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The symmetric part alone, of what gain and centring were applied to already."""
        return self.pulled(y * self.inverse.unsqueeze(-1))

    def pulled(self, y: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The same of what was multiplied with `inverse` too, in its memory."""
        along = torch.linalg.vecdot(y, self.middle) * (-self.pull / self.inverse)
        return y.addcmul_(along.unsqueeze(-1), self.middle)


def _centred(x: Float[Tensor, "... d"], centred: bool) -> Float[Tensor, "... d"]:
    return x - x.mean(-1, keepdim=True) if centred else x


@dataclass(frozen=True)
class Score:
    """a = q·k / divisor: Δa_ij = (q̄_i·Δk_j + k̄_j·Δq_i) / divisor."""

    q: Float[Tensor, "*heads dest r"]
    k: Float[Tensor, "*heads src r"]
    divisor: float

    @classmethod
    def between(
        cls,
        q: Float[Tensor, "*heads dest r"],
        other_q: Float[Tensor, "*heads dest r"],
        k: Float[Tensor, "*heads src r"],
        other_k: Float[Tensor, "*heads src r"],
        divisor: float,
    ) -> "Score":
        """From the queries and keys of two runs, as they enter the score."""
        return cls(torch.lerp(q, other_q, 0.5), torch.lerp(k, other_k, 0.5), divisor)

    def apply(
        self, q: Float[Tensor, "*heads dest r"], k: Float[Tensor, "*heads src r"]
    ) -> Float[Tensor, "*heads dest src"]:
        """(Δq, Δk) → Δa."""
        return (self.q @ k.mT + q @ self.k.mT) / self.divisor

    def transpose(
        self, cotangent: Float[Tensor, "*heads dest src"]
    ) -> tuple[Float[Tensor, "*heads dest r"], Float[Tensor, "*heads src r"]]:
        """The cotangent of a → those of q and k."""
        cotangent = cotangent / self.divisor
        return cotangent @ self.k, cotangent.mT @ self.q


@dataclass(frozen=True)
class Softmax:
    """A = softmax(a): ΔA_j = L_j (Δa_j − Σ_l L_l Δa_l / Σ_l L_l). Symmetric.

    `weight` is L, the logarithmic mean (A − A′)/(ln A − ln A′), and A where both agree. ln A is a
    shifted by what the row sums to, and the shift follows from ΣΔA = 0; so a shift of a is nothing.
    """

    weight: Float[Tensor, "*rows src"]

    @classmethod
    def between(
        cls, log: Float[Tensor, "*rows src"], other_log: Float[Tensor, "*rows src"]
    ) -> "Softmax":
        """From ln A of two runs, −∞ in both where a source is masked."""
        return cls(logarithmic_mean(log, other_log))

    def apply(self, change: Float[Tensor, "*rows src"]) -> Float[Tensor, "*rows src"]:
        """Δa → ΔA."""
        mean = torch.linalg.vecdot(self.weight, change) / self.weight.sum(-1)
        return self.weight * (change - mean.unsqueeze(-1))

    def transpose(self, cotangent: Float[Tensor, "*rows src"]) -> Float[Tensor, "*rows src"]:
        """The cotangent of A → that of a."""
        return self.apply(cotangent)


def logarithmic_mean(
    log: Float[Tensor, "*shape"], other_log: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """(A − A′)/(ln A − ln A′) of the exponentials of two numbers, A where they are the same.

    max(A, A′)·(1 − e^{−|δ|})/|δ| with δ = ln A − ln A′: finite where A − A′ is lost to rounding.
    """
    same = log == other_log  # as −∞ is, of which the difference is not a number
    gap = (log - other_log).abs().masked_fill(same, 1.0)
    ratio = (torch.expm1(-gap) / -gap).masked_fill(same, 1.0)
    return torch.maximum(log, other_log).exp() * ratio


@dataclass(frozen=True)
class Mixing:
    """z_i = Σ_j A_ij v_j: Δz_i = Σ_j (Ā_ij Δv_j + v̄_j ΔA_ij)."""

    weights: Float[Tensor, "*heads dest src"]
    v: Float[Tensor, "*heads src r"]

    @classmethod
    def between(
        cls,
        weights: Float[Tensor, "*heads dest src"],
        other_weights: Float[Tensor, "*heads dest src"],
        v: Float[Tensor, "*heads src r"],
        other_v: Float[Tensor, "*heads src r"],
    ) -> "Mixing":
        """From the attention weights and values of two runs."""
        return cls(torch.lerp(weights, other_weights, 0.5), torch.lerp(v, other_v, 0.5))

    def apply(
        self, weights: Float[Tensor, "*heads dest src"], v: Float[Tensor, "*heads src r"]
    ) -> Float[Tensor, "*heads dest r"]:
        """(ΔA, Δv) → Δz."""
        return self.weights @ v + weights @ self.v

    def transpose(
        self, cotangent: Float[Tensor, "*heads dest r"]
    ) -> tuple[Float[Tensor, "*heads dest src"], Float[Tensor, "*heads src r"]]:
        """The cotangent of z → those of A and v."""
        return cotangent @ self.v.mT, self.weights.mT @ cotangent


@dataclass(frozen=True)
class Pointwise:
    """g of every number alone: Δg = slope ∘ Δz with slope (g(z) − g(z′))/(z − z′)."""

    slope: Float[Tensor, "*shape"]

    @classmethod
    def between(
        cls,
        function: Function,
        z: Float[Tensor, "*shape"],
        other: Float[Tensor, "*shape"],
        value: Float[Tensor, "*shape"],
        other_value: Float[Tensor, "*shape"],
    ) -> "Pointwise":
        """From the inputs of two runs and what g makes of them."""
        return cls(slopes(function, z, other, value, other_value))

    def at(self, place: Place) -> "Pointwise":
        """The secant at some of the tokens."""
        return Pointwise(self.slope[place])

    def apply(self, change: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Δz → Δg."""
        return self.slope * change

    def transpose(self, cotangent: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The cotangent of g → that of z."""
        return self.slope * cotangent


def slopes(
    function: Function,
    z: Float[Tensor, "*shape"],
    other: Float[Tensor, "*shape"],
    value: Float[Tensor, "*shape"],
    other_value: Float[Tensor, "*shape"],
) -> Float[Tensor, "*shape"]:
    """(g(z) − g(z′))/(z − z′), or g′ in the middle where z ≈ z′ and no kink is between them.

    g′ is taken where it gives the same difference up to rounding, so either is exact.
    """
    gap = z - other
    found = ((value - other_value) / gap).contiguous()
    near = (gap.abs() < NEAR[z.dtype]).flatten().nonzero().flatten()
    gap, middle, size = (x.flatten()[near] for x in (gap, torch.lerp(z, other, 0.5), value))
    quotient = found.view(-1)[near]
    inside = derivative(function, middle)
    rounding = LAST_PLACES * torch.finfo(z.dtype).eps * (middle.abs() + size.abs())
    agree = ((inside - quotient) * gap).abs() <= rounding
    found.view(-1)[near] = torch.where(agree | (gap == 0), inside, quotient)
    return found


def derivative(function: Function, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """g′ of every number alone."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return torch.autograd.grad(function(z).sum(), z)[0]


@dataclass(frozen=True)
class Gated:
    """g(u) ∘ w, what a gated MLP does between its weights: Δ = slope ∘ w̄ ∘ Δu + ḡ ∘ Δw."""

    slope: Float[Tensor, "*shape"]
    factor: Float[Tensor, "*shape"]

    @classmethod
    def between(
        cls,
        gate: Pointwise,
        value: Float[Tensor, "*shape"],
        other_value: Float[Tensor, "*shape"],
        w: Float[Tensor, "*shape"],
        other_w: Float[Tensor, "*shape"],
    ) -> "Gated":
        """From the secant of g and the values of two runs, g(u) and w."""
        return cls(gate.slope * torch.lerp(w, other_w, 0.5), torch.lerp(value, other_value, 0.5))

    def at(self, place: Place) -> "Gated":
        """The secant at some of the tokens."""
        return Gated(self.slope[place], self.factor[place])

    def apply(
        self, u: Float[Tensor, "*shape"], w: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """(Δu, Δw) → Δ(g(u) ∘ w)."""
        return self.slope * u + self.factor * w

    def transpose(
        self, cotangent: Float[Tensor, "*shape"]
    ) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """The cotangent of g(u) ∘ w → those of u and w."""
        return self.slope * cotangent, self.factor * cotangent


@dataclass(frozen=True)
class ReadOut:
    """F = vector·n, of the last normalisation n: ΔF = vector·Δn."""

    norm: Norm
    vector: Float[Tensor, "prompt d"]

    def apply(self, change: Float[Tensor, "prompt d"]) -> Float[Tensor, "prompt"]:
        """Δx → ΔF."""
        return torch.linalg.vecdot(self.norm.apply(change), self.vector)

    def transpose(self, cotangent: Float[Tensor, "prompt"]) -> Float[Tensor, "prompt d"]:
        """The cotangent of F → that of x."""
        return self.norm.transpose(cotangent.unsqueeze(-1) * self.vector)


@dataclass(frozen=True)
class LogProbability:
    """F = ln Σ_a e^{l_a} − ln Σ_v e^{l_v}, a of the right tokens and v of all.

    ΔF = Σ_a R_a Δl_a / Σ_a R_a − Σ_v L_v Δl_v / Σ_v L_v, with the logarithmic means R of the
    probabilities among right tokens and L of those among all, as in `Softmax`.
    `vector` is what ΔF is of the change of logits.
    """

    vector: Float[Tensor, "prompt vocab"]

    @classmethod
    def between(
        cls,
        log: Float[Tensor, "prompt vocab"],
        other_log: Float[Tensor, "prompt vocab"],
        right: Bool[Tensor, "prompt vocab"],
    ) -> "LogProbability":
        """From the log-probabilities of two runs, and which tokens are right in every prompt."""
        among = (x.masked_fill(~right, -torch.inf).log_softmax(-1) for x in (log, other_log))
        means = (logarithmic_mean(*pair) for pair in (tuple(among), (log, other_log)))
        ours, every = (weight / weight.sum(-1, keepdim=True) for weight in means)
        return cls(ours - every)

    def apply(self, change: Float[Tensor, "prompt vocab"]) -> Float[Tensor, "prompt"]:
        """Δl → ΔF."""
        return torch.linalg.vecdot(self.vector, change)

    def transpose(self, cotangent: Float[Tensor, "prompt"]) -> Float[Tensor, "prompt vocab"]:
        """The cotangent of F → that of the logits."""
        return cotangent.unsqueeze(-1) * self.vector
