"""Which linear map stands for every operation on the way back from F: secants, gradients, RelP."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """How operations are made linear. Secants of both runs, the default, are exact.

    `points`: instead, the derivatives at some points from x′ (0) to x (1), where embeddings go from
    one to the other; shares are the mean over them. `relevance`: there, coefficients of relevance
    propagation in the place of derivatives. A normalisation divides by a constant, a nonlinearity
    multiplies by g(z)/z, and of a product each factor gets one half. Softmax and scores keep their
    derivatives: attention held constant too (the AH-rule) would leave queries and keys no share.
    Source: Syed et al. 2023 (gradients), Hanna et al. 2024 (points in between), Jafari et al. 2025
    (RelP). Raises ValueError for no point, and for relevance without points.
    """

    points: tuple[float, ...] | None = None
    relevance: bool = False

    def __post_init__(self) -> None:
        if self.points is not None and not self.points:
            raise ValueError("gradients are taken at one point or more, and none is given")
        if self.relevance and self.points is None:
            raise ValueError("relevance is propagated at points: give one, such as 1.0 for x")

    @property
    def exact(self) -> bool:
        """Whether shares add up to F(x) − F(x′)."""
        return self.points is None


SECANT = Rule()
RELP = Rule((1.0,), relevance=True)


def gradients(*points: float) -> Rule:
    """The mean of the gradients at points: 1.0 is x (EAP), 0.0 is x′."""
    return Rule(points)


def integrated(steps: int) -> Rule:
    """Integrated gradients: those in the middle of every step from x′ to x."""
    return gradients(*((step + 0.5) / steps for step in range(steps)))
