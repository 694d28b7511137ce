"""Every secant alone: exact, with a transpose that is its adjoint, and the gradient at a point."""

from functools import partial

import pytest
import torch

from sparse_signals.attribution.secants import (
    NEAR,
    Gated,
    LogProbability,
    Mixing,
    Norm,
    Pointwise,
    ReadOut,
    Score,
    Softmax,
    derivative,
    logarithmic_mean,
    slopes,
)

GELU = partial(torch.nn.functional.gelu, approximate="tanh")
FUNCTIONS = {
    "gelu": torch.nn.functional.gelu,
    "gelu tanh": GELU,
    "silu": torch.nn.functional.silu,
    "relu": torch.nn.functional.relu,
    "sigmoid": torch.sigmoid,
}
PROMPTS, TOKENS, HEADS, WIDTH, R = 3, 5, 2, 7, 4
EPSILON, DIVISOR = 1e-5, 2.5


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- each operation: inputs of a run, what it does, its secant of two runs -----------------------


def stream(seed):
    return (2 * normal(PROMPTS, TOKENS, WIDTH, seed=seed) + normal(WIDTH, seed=9),)


def scale_of(x, centred):
    x = x - x.mean(-1, keepdim=True) if centred else x
    return (x.square().mean(-1) + EPSILON).sqrt()


def norm(centred):
    gain, shift = normal(WIDTH, seed=7), normal(WIDTH, seed=8)

    def operation(x):
        y = x - x.mean(-1, keepdim=True) if centred else x
        return gain * y / scale_of(x, centred).unsqueeze(-1) + shift

    def secant(x, other):
        scales = (scale_of(each, centred) for each in (x, other))
        return Norm.between(x, other, *scales, gain, centred)

    return stream, operation, secant


def score():
    def inputs(seed):
        q, k = (normal(PROMPTS, HEADS, TOKENS, R, seed=10 * seed + n) for n in range(2))
        return q, k

    def secant(q, k, other_q, other_k):
        return Score.between(q, other_q, k, other_k, DIVISOR)

    return inputs, lambda q, k: q @ k.mT / DIVISOR, secant


def softmax(size=1.0, masked=True):
    past = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() if masked else torch.tensor(True)

    def inputs(seed):
        return (size * normal(PROMPTS, HEADS, TOKENS, TOKENS, seed=seed),)

    def logs(a):
        return a.masked_fill(~past, -torch.inf).log_softmax(-1)

    return inputs, lambda a: logs(a).exp(), lambda a, b: Softmax.between(logs(a), logs(b))


def mixing():
    def inputs(seed):
        weights = normal(PROMPTS, HEADS, TOKENS, TOKENS, seed=seed).softmax(-1)
        return weights, normal(PROMPTS, HEADS, TOKENS, R, seed=seed + 20)

    def secant(weights, v, other_weights, other_v):
        return Mixing.between(weights, other_weights, v, other_v)

    return inputs, lambda weights, v: weights @ v, secant


def pointwise(name):
    function = FUNCTIONS[name]

    def secant(z, other):
        return Pointwise.between(function, z, other, function(z), function(other))

    return stream, function, secant


def gated():
    function = torch.nn.functional.silu

    def inputs(seed):
        return *stream(seed), normal(PROMPTS, TOKENS, WIDTH, seed=seed + 30)

    def secant(u, w, other_u, other_w):
        value, other_value = function(u), function(other_u)
        slope = Pointwise.between(function, u, other_u, value, other_value)
        return Gated.between(slope, value, other_value, w, other_w)

    return inputs, lambda u, w: function(u) * w, secant


def read_out():
    _, operation, secant = norm(True)
    vector = normal(PROMPTS, WIDTH, seed=5)

    def inputs(seed):
        return (stream(seed)[0][:, 0],)

    return (
        inputs,
        lambda x: (operation(x) * vector).sum(-1),
        lambda x, other: ReadOut(secant(x, other), vector),
    )


def log_probability():
    right = torch.nn.functional.one_hot(torch.arange(PROMPTS), WIDTH).bool()
    right[0, 3:5] = True

    def inputs(seed):
        return (3 * stream(seed)[0][:, 0],)

    def operation(logits):
        return logits.log_softmax(-1).masked_fill(~right, -torch.inf).logsumexp(-1)

    def secant(logits, other):
        return LogProbability.between(logits.log_softmax(-1), other.log_softmax(-1), right)

    return inputs, operation, secant


OPERATIONS = {
    "LayerNorm": norm(True),
    "RMSNorm": norm(False),
    "score": score(),
    "softmax": softmax(),
    "softmax, not masked": softmax(masked=False),
    "sharp softmax": softmax(30.0),
    "softmax of huge scores": softmax(1e4),
    "mixing": mixing(),
    **{name: pointwise(name) for name in FUNCTIONS},
    "gated": gated(),
    "read-out": read_out(),
    "log-probability": log_probability(),
}


@pytest.fixture(params=OPERATIONS)
def operation(request):
    return OPERATIONS[request.param]


def apart(inputs, other):
    return [x - y for x, y in zip(inputs, other, strict=True)]


def size(x):
    return float(x.abs().max())


def listed(x):
    return list(x) if isinstance(x, tuple) else [x]


# --- what is true of all of them -----------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_secant_is_exact(operation, seed):
    inputs, function, secant = operation
    x, other = inputs(seed), inputs(seed + 50)
    expected = function(*x) - function(*other)
    found = secant(*x, *other).apply(*apart(x, other))
    assert size(found - expected) < 1e-12 * max(1.0, size(expected))
    assert size(expected) > 1e-3


@pytest.mark.parametrize("step", [1e-1, 1e-3, 3e-5, 1e-5, 1e-7, 1e-12, 1e-15])
def test_it_stays_exact_where_runs_nearly_agree(operation, step):
    """Up to the rounding of what is subtracted, which is all that can be known of it."""
    inputs, function, secant = operation
    x = inputs(0)
    other = [each + step * normal(*each.shape, seed=60) for each in x]
    expected = function(*x) - function(*other)
    found = secant(*x, *other).apply(*apart(x, other))
    assert size(found - expected) < 4e-15 * max(map(size, (*x, function(*x))))


def test_the_transpose_is_the_adjoint(operation):
    inputs, function, secant = operation
    x, other = inputs(0), inputs(1)
    found = secant(*x, *other)
    y, change = normal(*function(*x).shape, seed=2), inputs(3)
    forward = (y * found.apply(*change)).sum()
    parts = zip(listed(found.transpose(y)), change, strict=True)
    backward = sum((cotangent * each).sum() for cotangent, each in parts)
    assert float(forward) == pytest.approx(float(backward), rel=1e-12)


def test_of_a_run_with_itself_it_is_the_gradient(operation):
    inputs, function, secant = operation
    x = [each.requires_grad_() for each in inputs(0)]
    y = normal(*function(*x).shape, seed=2)
    expected = torch.autograd.grad((function(*x) * y).sum(), x)
    x = [each.detach() for each in x]
    for found, gradient in zip(listed(secant(*x, *x).transpose(y)), expected, strict=True):
        assert size(found - gradient) < 1e-12 * max(1.0, size(gradient))


def test_both_orders_have_the_same_secant(operation):
    inputs, _, secant = operation
    x, other, change = inputs(0), inputs(1), inputs(2)
    found = [secant(*pair).apply(*change) for pair in ((*x, *other), (*other, *x))]
    assert size(found[0] - found[1]) < 1e-12 * max(1.0, size(found[0]))


# --- softmax at its worst ------------------------------------------------------------------------


def difference(a, other):
    """What the secant of a softmax makes of a difference, and the true one."""
    logs = a.log_softmax(-1), other.log_softmax(-1)
    change = (a - other).nan_to_num(0.0)
    return Softmax.between(*logs).apply(change), logs[0].exp() - logs[1].exp()


@pytest.mark.parametrize("gap", [0.0, 1e-300, 1e-12, 1e-3, 1.0, 40.0, 690.0, 800.0, 1e5])
def test_logarithmic_means_are_finite_and_right(gap):
    high = torch.tensor([0.0, -3.0, -700.0, -1e4], dtype=torch.float64)
    low = high - gap
    found, gap = logarithmic_mean(high, low), high - low
    assert torch.equal(found, logarithmic_mean(low, high))
    expected = high.exp() * torch.where(gap == 0, 1.0, -torch.expm1(-gap) / gap)
    assert torch.allclose(found, expected, rtol=1e-14, atol=0)
    assert (found <= high.exp()).all() and (found >= low.exp()).all()
    assert ((found > 0) == (high > -1e4)).all()


def test_masked_sources_have_no_weight():
    log = torch.tensor([[0.0, -torch.inf], [-0.1, -torch.inf]], dtype=torch.float64)
    assert torch.equal(logarithmic_mean(log, log)[:, 1], torch.zeros(2, dtype=torch.float64))
    assert torch.isfinite(Softmax.between(log, log).apply(normal(2, 2))).all()


def test_it_jumps_from_one_source_to_another():
    """All weight goes elsewhere, so far that none of the old is left."""
    a = torch.tensor([[1e4, 0.0, -1e4, 3.0]], dtype=torch.float64)
    other = torch.tensor([[0.0, 1e4, 1e4 - 1, 3.0]], dtype=torch.float64)
    found, expected = difference(a, other)
    assert size(found - expected) < 1e-12


def test_weights_below_the_smallest_number_are_no_trouble():
    a = torch.tensor([[0.0, -800.0, -745.0]], dtype=torch.float64)
    found, expected = difference(a, a + torch.tensor([0.0, 30.0, -30.0], dtype=torch.float64))
    assert torch.isfinite(found).all() and size(found - expected) < 1e-15


def test_it_is_blind_to_a_shift_of_the_row():
    inputs, _, secant = softmax()
    found, change = secant(*inputs(0), *inputs(1)), inputs(2)[0]
    shift = 100 * normal(PROMPTS, HEADS, TOKENS, 1, seed=4)
    assert size(found.apply(change + shift) - found.apply(change)) < 1e-12
    assert size(found.transpose(change).sum(-1)) < 1e-12


# --- nonlinearities at their worst ---------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slopes_are_mean_derivatives(name, dtype):
    """(g(z) − g(z′))/(z − z′) = ∫ g′ between them, on both sides of where the rule changes."""
    function = FUNCTIONS[name]
    z = torch.linspace(-4, 4, 401, dtype=torch.float64).to(dtype)[:, None]
    gap = NEAR[dtype] * torch.tensor([0, 1e-6, 0.1, 0.99, 1.01, 10, 100], dtype=dtype)
    other = z + gap
    found = slopes(function, z.expand(other.shape), other, function(z).expand(other.shape),
                   function(other))  # fmt: skip
    points, weights = torch.tensor(GAUSS, dtype=torch.float64).T
    at = z.double()[..., None] + (other - z).double()[..., None] * points
    expected = (derivative(function, at) * weights).sum(-1)
    off = (found - expected).abs()
    if name == "relu":  # no quadrature knows where the kink is
        off = off[(z > 0).expand(off.shape) | (other < 0)]
    assert size(off) < {torch.float32: 2e-4, torch.float64: 1e-10}[dtype]


GAUSS = (
    (0.5 - 0.4305681557970263, 0.1739274225687269),
    (0.5 - 0.1699905217924281, 0.3260725774312731),
    (0.5 + 0.1699905217924281, 0.3260725774312731),
    (0.5 + 0.4305681557970263, 0.1739274225687269),
)


def test_a_kink_between_two_close_numbers_is_seen():
    z, other = torch.tensor([[1e-6], [-3e-6]], dtype=torch.float64)
    relu = torch.relu
    assert float(slopes(relu, z, other, relu(z), relu(other))) == pytest.approx(0.25, rel=1e-9)
