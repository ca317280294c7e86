"""How exact a fast kernel has to be: about as exact as the plain one, from the same inputs.

A fixed tolerance is several times the rounding of a step, and so are many mistakes: one token of 600 that attention leaves out
changes its result by 4 %, a neighbour's share of a split by 2 %. What plain ops in the same precision are off is the rounding itself.
"""

from __future__ import annotations

import torch

FACTOR = 1.3
GATE_FACTOR = 3
"""Of silu(g) * u: one number may make a row, and the plain ops be nearly right there by chance"""
TINY = 2.0**-12
"""Of a row's size: what may be lost where the plain ops happen to be exact; an eighth of what rounding to bfloat16 loses at most"""


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, in float64."""
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def errors(actual: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """[rows] relative errors of rows, in float64; NaN where a number is."""
    difference = (actual.double() - exact.double()).flatten(1)
    return difference.norm(dim=1) / exact.double().flatten(1).norm(dim=1).clamp(min=1e-30)


def no_worse(
    actual: torch.Tensor,
    plain: torch.Tensor,
    exact: torch.Tensor,
    factor: float = FACTOR,
    *,
    what: object = "",
    tiny: float = TINY,
) -> None:
    """Each row's error is about that of `plain`, and no single number is much farther off than any of `plain`.

    Args:
        actual: [rows, ...] of the kernel under test.
        plain: the same of the plain ops, in the same precision and from the same inputs.
        exact: the same in float32 or float64.
        factor: of errors; more where a row has so few numbers that they differ by chance.
        what: for the message.
        tiny: of a row's size, always allowed.
    """
    assert actual.shape == plain.shape == exact.shape
    assert not actual.isnan().any(), f"{what}: {int(actual.isnan().sum())} NaN"
    ours, theirs = errors(actual, exact), errors(plain, exact)
    # The norms of n random numbers each are 1 / sqrt(n) apart.
    allowed = (factor + 4 / exact[0].numel() ** 0.5) * theirs + tiny
    worst = int((ours / allowed).argmax())
    assert (ours <= allowed).all(), f"{what}: row {worst} is {ours[worst]:.3%} off, plain {theirs[worst]:.3%}"
    size = exact.double().flatten(1).square().mean(1).sqrt().unsqueeze(1).clamp(min=1e-30)
    # Where two numbers that are nearly the same are rounded, they may become neighbours.
    apart = torch.finfo(actual.dtype).eps if actual.dtype.itemsize == 2 else 0.0

    def farthest(t: torch.Tensor) -> torch.Tensor:
        wide = exact.double().flatten(1)
        return (((t.double().flatten(1) - wide).abs() - apart * wide.abs()) / size).amax(1)

    most, by_plain = farthest(actual), farthest(plain).clamp(min=0)
    bound = 4 * by_plain.clamp(min=float(by_plain.median())) + 16 * tiny
    worst = int((most - bound).argmax())
    assert (most <= bound).all(), (
        f"{what}: a number of row {worst} is {most[worst]:.3} off, plain {by_plain[worst]:.3}"
    )


def loud(length: int, window: int | None, rng: torch.Generator) -> list[int]:
    """Old tokens of a context at places where something may begin or end: both ends, the window's, multiples of 16 and of 256.

    With larger values than the others have (see `loudness`) each changes the result by far more than rounding does.
    """
    first = max(0, length - window) if window else 0
    tens = (torch.randint(1 + length // 16, (6,), generator=rng) * 16).tolist()
    found = {0, 1, first - 1, first, first + 1, length - 3, length - 2}
    found |= {at + side for at in (*tens, *range(0, min(length, 2048) + 1, 256)) for side in (-1, 0)}
    return sorted(at for at in found if 0 <= at < length - 1)


def loudness(length: int, window: int | None) -> float:
    """Factor of the values of `loud` tokens: a few dozen count as much as thousands of others."""
    return max(1.0, min(length, window or length) ** 0.5 / 4)
