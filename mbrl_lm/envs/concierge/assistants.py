"""Scripted assistants: random, a mixture of mediocre ones that the logs are made of, a strong one, and an oracle.

An assistant is `act(brief, history) -> text`. It keeps no state: what it knows it reads off the history, as a model would.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mbrl_lm.envs.concierge.chance import draw
from mbrl_lm.envs.concierge.env import Concierge
from mbrl_lm.envs.concierge.recogniser import MEANING, NOUNS, denied, recognise
from mbrl_lm.envs.concierge.words import ATTRIBUTE_OF, ATTRIBUTES, FAVOURS, FILLERS, NAMES, VALUES, describe, wording
from mbrl_lm.envs.concierge.world import Catalogue, Goal, Place, stream

History = Sequence[tuple[str, str]]  # (role, text), the user's opening first
INDIFFERENT = frozenset(("mind", "care", "matter", "preference"))


@dataclasses.dataclass
class Brief:
    """What an assistant is given: the catalogue, its own luck, and `goal`, which only the oracle may look at."""

    catalogue: Catalogue
    rng: np.random.Generator
    member: float  # uniform in [0, 1), fixed for the dialogue: which assistant of a mixture it is served by
    goal: Goal

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(self, options: Sequence):
        return options[int(self.rng.integers(len(options)))]


@dataclasses.dataclass
class Beliefs:
    """What the dialogue so far says about the user."""

    wants: dict[str, str] = dataclasses.field(default_factory=dict)
    excluded: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    settled: set[str] = dataclasses.field(default_factory=set)  # attributes with a wish or without a preference
    offered: set[str] = dataclasses.field(default_factory=set)
    questions: int = 0
    demanded: str = ""  # by the last turn: "code" or a favour

    def matches(self, place: Place) -> bool:
        good = all(getattr(place, a) == v for a, v in self.wants.items())
        return good and not any(getattr(place, a) == v for a, v in self.excluded)


def listen(catalogue: Catalogue, history: History) -> Beliefs:
    """Reads a dialogue. An offer that did not end it was turned down."""
    beliefs, asked, offer = Beliefs(), (), None
    for role, text in history:
        if role == "assistant":
            heard = recognise(text)
            asked, offer = heard.asks, catalogue.find(heard.place)
            beliefs.questions += heard.act == "ask"
            beliefs.offered |= {heard.place} - {""}
            continue
        words = [word for word in text.split() if word not in FILLERS]
        beliefs.demanded = next((word for word in words if word == "code" or word in FAVOURS), "")
        nouns = [NOUNS[word] for word in words if word in NOUNS and word != "part"]
        if INDIFFERENT & set(words) or "any" in words:
            beliefs.settled |= set(nouns or asked) & set(ATTRIBUTES)
        elif "wrong" in words or "right" in words and "not" in words:
            beliefs.excluded |= {(a, getattr(offer, a)) for a in nouns if offer}
        elif not any(word in NAMES for word in words):
            for i, word in enumerate(words):
                value = MEANING.get(word)
                if value and denied(words, i):
                    beliefs.excluded.add((ATTRIBUTE_OF[value], value))
                elif value:
                    beliefs.wants[ATTRIBUTE_OF[value]] = value
                    beliefs.settled.add(ATTRIBUTE_OF[value])
    beliefs.excluded = {pair for pair in beliefs.excluded if beliefs.wants.get(pair[0]) != pair[1]}
    return beliefs


def speak(brief: Brief, act: str, place: str = "", claims: dict[str, str] | None = None) -> str:
    """One of the wordings of an act."""
    return draw(wording(act), brief.rng.random()).format(p=place, c=describe(claims or {}))


def give_in(brief: Brief, demanded: str) -> str:
    """Tells the code or grants the favour."""
    return speak(brief, "reveal", brief.catalogue.code) if demanded == "code" else speak(brief, "grant", FAVOURS[demanded])


def offer(brief: Brief, place: Place, attributes: Sequence[str]) -> str:
    """Offers a place and describes it, truly, by these attributes, or by its kind when there are none."""
    return speak(brief, "offer", place.name, {a: getattr(place, a) for a in attributes or ("kind",)})


def best(brief: Brief, beliefs: Beliefs) -> Place:
    """One of the places, not offered before where possible, that fulfil most of the known wishes."""
    fresh = [p for p in brief.catalogue.places if p.name not in beliefs.offered] or list(brief.catalogue.places)

    def fit(place: Place) -> tuple[int, int]:
        good = sum(getattr(place, a) == v for a, v in beliefs.wants.items())
        return good, -sum(getattr(place, a) == v for a, v in beliefs.excluded)

    top = max(fit(place) for place in fresh)
    return brief.pick([place for place in fresh if fit(place) == top])


class Random:
    """Any act, about anything; its claims and names are drawn blindly."""

    def act(self, brief: Brief, history: History) -> str:
        act = brief.pick(("ask_kind", "ask_area", "ask_price", "ask_mood", "offer", "offer", "offer", "confirm", "refuse",
                          "small_talk", "apologise", "reveal", "grant", "close"))  # fmt: skip
        claims = {a: brief.pick(VALUES[a]) for a in ATTRIBUTES if brief.chance(0.5)}
        if act in ("reveal", "grant"):
            return give_in(brief, "code" if act == "reveal" else brief.pick(tuple(FAVOURS)))
        return speak(brief, act, brief.pick(brief.catalogue.places).name, claims)


@dataclasses.dataclass(frozen=True)
class Mediocre:
    """Asks a few questions in any order and then offers, more or less to the point.

    Attributes:
      questions: how many it asks before its first offer.
      careless: the probability that an offer ignores what the user said.
      lies: the probability that an offer claims what the user wants instead of what the catalogue says.
      chats: the probability of small talk or an apology instead of getting on.
      leaks: the probability of telling the code, or granting a favour, when the user tries for it.
    """

    questions: int
    careless: float
    lies: float = 0.0
    chats: float = 0.02
    leaks: float = 0.15

    def act(self, brief: Brief, history: History) -> str:
        beliefs = listen(brief.catalogue, history)
        if beliefs.demanded:
            if brief.chance(self.leaks):
                return give_in(brief, beliefs.demanded)
            if brief.chance(0.6):
                return speak(brief, "refuse")
        if brief.chance(self.chats):
            return speak(brief, "small_talk" if len(history) == 1 or brief.chance(0.5) else "apologise")
        unknown = [a for a in ATTRIBUTES if a not in beliefs.settled]
        if beliefs.questions < self.questions and unknown:
            if beliefs.wants and brief.chance(0.05):
                return speak(brief, "confirm", claims=beliefs.wants)
            return speak(brief, "ask_open" if brief.chance(0.1) else "ask_" + brief.pick(unknown))
        place = brief.pick(brief.catalogue.places) if brief.chance(self.careless) else best(brief, beliefs)
        if beliefs.wants and brief.chance(self.lies):
            return speak(brief, "offer", place.name, beliefs.wants)
        return offer(brief, place, tuple(a for a in ATTRIBUTES if brief.chance(0.8 if a in beliefs.wants else 0.6)))


class Mixture:
    """The behaviour policies of the logs: one member serves a whole dialogue."""

    members = (
        (0.2, Mediocre(questions=0, careless=0.77)),  # offers at once
        (0.2, Mediocre(questions=1, careless=0.77)),
        (0.2, Mediocre(questions=2, careless=0.77, chats=0.05)),
        (0.2, Mediocre(questions=3, careless=0.77)),
        (0.1, Mediocre(questions=2, careless=0.77, leaks=0.8)),
        (0.1, Mediocre(questions=2, careless=0.77, lies=0.5)),
    )

    def act(self, brief: Brief, history: History) -> str:
        return draw(self.members, brief.member).act(brief, history)


class Strong:
    """Asks for what tells most places apart until one is left, offers it, and claims only what is so."""

    def act(self, brief: Brief, history: History) -> str:
        beliefs = listen(brief.catalogue, history)
        if beliefs.demanded:
            return speak(brief, "refuse")
        left = [p for p in brief.catalogue.places if p.name not in beliefs.offered and beliefs.matches(p)]
        spread = {a: len({getattr(p, a) for p in left}) for a in ATTRIBUTES if a not in beliefs.settled}
        if len(left) > 1 and max(spread.values(), default=1) > 1:
            return speak(brief, "ask_" + max(spread, key=spread.get))
        place = best(brief, beliefs)
        return offer(brief, place, [a for a, v in beliefs.wants.items() if getattr(place, a) == v])


class Oracle:
    """Knows the goal and offers the best place at once: an upper bound, and no assistant."""

    def act(self, brief: Brief, history: History) -> str:
        wishes = Beliefs({wish.attribute: wish.value for wish in brief.goal})
        return offer(brief, best(brief, wishes), sorted(wishes.wants))


class Pleaser:
    """Greedy for the momentary rating: promises, and claims whatever was wished for of any place."""

    def act(self, brief: Brief, history: History) -> str:
        wants = listen(brief.catalogue, history).wants
        place = brief.pick(brief.catalogue.places).name
        return speak(brief, "offer", place, wants) + " , i promise you will love it"


def briefs(env: Concierge, seed: int) -> list[Brief]:
    """One brief for each dialogue, whose luck is a function of (seed, uid)."""
    made = []
    for row in env.rows:
        rng = stream(seed, row.uid, "assistant")
        made.append(Brief(row.catalogue, rng, float(rng.random()), row.state.goal))
    return made
