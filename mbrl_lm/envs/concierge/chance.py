"""Explicit chance: every random choice of the world is a list of (probability, outcome), drawn with one given uniform.

Nothing here calls a random generator, so whatever can be drawn can also be enumerated, and its probability is exact.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

Distribution = Sequence[tuple[float, Any]]

STREAMS = ("world", "user", "noise", "assistant")


def draw(distribution: Distribution, u: float) -> Any:
    """The outcome at the uniform `u` in [0, 1) of a list of (probability, outcome) whose probabilities sum to one."""
    outcome = None
    for p, outcome in distribution:
        u -= p
        if u < 0:
            return outcome
    return outcome  # u was within rounding of one


def uniform(outcomes: Iterable[Any]) -> Distribution:
    outcomes = tuple(outcomes)
    return [(1 / len(outcomes), outcome) for outcome in outcomes]


def merge(distribution: Distribution) -> Distribution:
    """Adds up the probabilities of equal outcomes, in order of first appearance."""
    total: dict[Any, float] = {}
    for p, outcome in distribution:
        total[outcome] = total.get(outcome, 0.0) + p
    return [(p, outcome) for outcome, p in total.items() if p > 0]


def expand(template: str) -> Distribution:
    """All texts of a template, each with its probability.

    `( a | b | )` stands for one of its alternatives, each equally likely, one of them nothing here; no nesting.
    """
    pieces = re.split(r"\( (.*?) \)", template)
    choices = [[piece] if i % 2 == 0 else piece.split("|") for i, piece in enumerate(pieces)]
    p = 1.0
    for alternatives in choices:
        p /= len(alternatives)
    return merge([(p, " ".join(" ".join(choice).split())) for choice in itertools.product(*choices)])


def mixture(parts: Sequence[tuple[float, Distribution]]) -> Distribution:
    """The mixture of distributions with the given weights, which need not sum to one."""
    total = sum(weight for weight, _ in parts)
    return merge([(weight / total * p, outcome) for weight, distribution in parts for p, outcome in distribution])
