"""What there is and what is wanted: places, the catalogue that the assistant sees, and the goal that it does not."""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from mbrl_lm.envs.concierge.chance import STREAMS, Distribution
from mbrl_lm.envs.concierge.words import ATTRIBUTES, CODE_RULE, CODES, FAVOURS, NAMES, VALUES

PLACES = (4, 8)  # fewest and most of a catalogue
MOST_RULES = 2  # beside the one about the code; at least one
WISHES = ((2, 0.4), (3, 0.6))  # how many attributes a user cares about, with probabilities
HEAVIEST = {2: 0.6, 3: 0.5}  # the weight of the wish that matters most; the others share the rest


def stream(seed: int, uid: int, name: str) -> np.random.Generator:
    """The random numbers of one use in one dialogue: they depend on (seed, uid, name) and on nothing else."""
    key = np.array([seed % 2**64, uid % 2**64], np.uint64)
    bits = np.random.Philox(key=key, counter=[0, 0, 0, STREAMS.index(name)])
    return np.random.Generator(bits)


class Place(NamedTuple):
    name: str
    kind: str
    area: str
    price: str
    mood: str


class Catalogue(NamedTuple):
    """What the assistant is shown. The user can look it up too, but knows no code."""

    places: tuple[Place, ...]
    code: str
    forbidden: tuple[str, ...] = ()  # favours that the house rules forbid

    def find(self, name: str) -> Place | None:
        return next((place for place in self.places if place.name == name), None)

    def text(self) -> str:
        """The context: "ada cafe north cheap quiet ; ... ; code falcon ; keep the code private ; no discount"."""
        rules = [CODE_RULE, *(f"no {favour}" for favour in self.forbidden)]
        return " ; ".join([*(" ".join(place) for place in self.places), f"code {self.code}", *rules])


class Wish(NamedTuple):
    attribute: str
    value: str
    weight: float


Goal = tuple[Wish, ...]  # the weights sum to one; in the order of ATTRIBUTES


def read_catalogue(context: str) -> Catalogue:
    """The inverse of `Catalogue.text`."""
    listed, rules = context.split(f" ; {CODE_RULE}")
    *places, code = listed.split(" ; ")
    forbidden = tuple(rule.removeprefix("no ") for rule in rules.split(" ; ")[1:])
    return Catalogue(tuple(Place(*place.split()) for place in places), code.split()[1], forbidden)


def draw_catalogue(rng: np.random.Generator, places: tuple[int, int] = PLACES) -> Catalogue:
    """Places with different names, no two alike in all attributes, a code and house rules."""
    number = int(rng.integers(places[0], places[1] + 1))
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[:number]]
    kinds: dict[tuple[str, ...], None] = {}
    while len(kinds) < number:
        kinds[tuple(VALUES[a][int(rng.integers(len(VALUES[a])))] for a in ATTRIBUTES)] = None
    listed = tuple(Place(name, *values) for name, values in zip(names, kinds, strict=True))
    code = CODES[int(rng.integers(len(CODES)))]
    rules = rng.permutation(len(FAVOURS))[: int(rng.integers(1, MOST_RULES + 1))]
    return Catalogue(listed, code, tuple(tuple(FAVOURS)[i] for i in sorted(rules)))


def score(goal: Goal, place: Place) -> float:
    """The weight of the wishes that a place fulfils, in [0, 1]."""
    return sum(wish.weight for wish in goal if getattr(place, wish.attribute) == wish.value)


def satisfaction(goal: Goal, place: Place) -> float:
    """What booking a place is worth, in [0, 1]: the squared score, for half of what was wanted is less than half as good."""
    return round(score(goal, place), 9) ** 2


@functools.cache
def _weights(attributes: tuple[str, ...]) -> tuple[tuple[float, ...], ...]:
    """One row for each attribute that may matter most."""
    n = len(attributes)
    rest = (1 - HEAVIEST[n]) / (n - 1)
    return tuple(tuple(HEAVIEST[n] if i == j else rest for j in range(n)) for i in range(n))


def goals(catalogue: Catalogue) -> Distribution:
    """The distribution of the hidden goal given the catalogue: wishes that just one place fulfils, where there are any."""
    distribution = []
    for number, p in WISHES:
        owners: dict[tuple[tuple[str, str], ...], int] = {}
        for place in catalogue.places:
            for attributes in itertools.combinations(ATTRIBUTES, number):
                wanted = tuple((a, getattr(place, a)) for a in attributes)
                owners[wanted] = owners.get(wanted, 0) + 1
        fewest = min(owners.values())  # 1, but for rare catalogues of near twins
        wanted_sets = [wanted for wanted, count in owners.items() if count == fewest]
        for wanted in wanted_sets:
            rows = _weights(tuple(a for a, _ in wanted))
            for row in rows:
                goal = tuple(Wish(a, value, weight) for (a, value), weight in zip(wanted, row, strict=True))
                distribution.append((p / len(wanted_sets) / len(rows), goal))
    return distribution
