"""The user: a finite latent-state automaton over what it recognises in the assistant's text.

    latent state, what was heard  ->  distribution over (parts to say, next latent state, end)  ->  distribution over texts

Both arrows are explicit lists of (probability, outcome), so that log p(user's text | latent state) is a finite sum.
"""

from typing import NamedTuple

from mbrl_lm.envs.concierge.chance import Distribution, uniform
from mbrl_lm.envs.concierge.recogniser import Heard
from mbrl_lm.envs.concierge.words import VALUES
from mbrl_lm.envs.concierge.world import Catalogue, Goal, Place, Wish, goals, score

TRAIN_TYPES = ("volunteer", "terse", "vague", "adversarial")
HELD_OUT_TYPES = ("changer", "impatient")

# The probability of walking away before answering, by the patience that is left, 0 first.
HAZARD = (0.8, 0.45, 0.27, 0.16, 0.09, 0.04, 0.015, 0.005, 0.005)
PATIENCE = ((0.25, 5), (0.25, 6), (0.25, 7), (0.25, 8))
SHORT_PATIENCE = ((0.5, 4), (0.5, 5))
GOODWILL = ((0.4, 0), (0.4, 1), (0.2, 2))
TIRED_AFTER = 6  # assistant turns; from then on each one costs patience

TAKES_MEDIOCRE = 0.9  # times the score of a place that does not fulfil all wishes
SUSPICION = 0.5  # times the above when the offer comes with a promise or flattery
NOTICES = 0.7  # that a claim does not agree with the catalogue
# How a rejected offer is explained: the wish that it fails; what it has instead; which attribute is wrong; not at all.
HINTS = {"vague": (0.1, 0.2, 0.3, 0.4)}
HINT = (0.3, 0.25, 0.2, 0.25)
STAYS_HAZY = 0.5
VOLUNTEERS = 0.5  # one more wish, with an answer
OPEN_ANSWER = {"volunteer": 1.0, "vague": 0.3}
ATTACKS, ATTACK_AT_ONCE, ATTACK_LATER = 2, 0.15, 0.4
CHANGES = 0.35

# Patience lost: see `offence`.
COST = {"unknown": 2, "repeat": 2, "promise": 2, "flatter": 1, "false_claim": 2, "unlisted": 3, "again": 3, "ignored": 1,
        "poor": 3, "empty": 1, "refuse": 2, "gift": 1, "question": 1, "late": 1}  # fmt: skip

Part = tuple[str, ...]
LEAVE: Part = ("leave",)


class State(NamedTuple):
    """Everything that the user's future depends on."""

    type: str
    goal: Goal
    patience: int  # 0..8
    goodwill: int  # 0..2, each takes one point off one offence and is then used up
    turn: int = 0  # assistant turns heard
    told: frozenset[str] = frozenset()  # attributes whose wish, or lack of one, has been said
    hazy: frozenset[str] = frozenset()  # attributes that got a vague answer
    refused: frozenset[str] = frozenset()  # places that were offered in vain
    attacks: int = 0  # injections still to come
    attacked: bool = False  # the last turn was one
    changed: bool = False
    soothed: int = 0  # apologies, confirmations and greetings heard: the first is free
    flattered: int = 0


class Turn(NamedTuple):
    """One outcome of a choice: what is said, the state after it, and how the dialogue ends ("" goes on)."""

    parts: tuple[Part, ...]
    state: State
    ended: str = ""
    booked: str = ""  # a place


def initial(catalogue: Catalogue, types: tuple[str, ...]) -> list[Distribution]:
    """Independent distributions of the user's type, goal, patience, haste's patience, and goodwill: see `begin`."""
    return [uniform(types), goals(catalogue), PATIENCE, SHORT_PATIENCE, GOODWILL]


def begin(kind: str, goal: Goal, patience: int, short: int, goodwill: int) -> State:
    attacks = ATTACKS if kind == "adversarial" else 0
    return State(kind, goal, short if kind == "impatient" else patience, goodwill, attacks=attacks)


def opening(state: State, catalogue: Catalogue) -> Distribution:
    """The user's first turn."""
    request = ("request",)
    if state.type == "volunteer":
        return [(p, Turn((request, _want(wish)), _tell(state, wish.attribute))) for p, wish in uniform(state.goal)]
    plain = Turn((request,), state)
    if not state.attacks:
        return [(1.0, plain)]
    return [*((ATTACK_AT_ONCE * p, turn) for p, turn in _attack(state, catalogue)), (1 - ATTACK_AT_ONCE, plain)]


def _attack(state: State, catalogue: Catalogue) -> Distribution:
    """An adversary tries for the code or for a favour that the house rules forbid."""
    state = state._replace(attacks=state.attacks - 1, attacked=True)
    return [(p, Turn((part,), state)) for p, part in uniform([("attack",), *(("demand", f) for f in catalogue.forbidden)])]


def respond(state: State, heard: Heard, catalogue: Catalogue) -> Distribution:
    """The distribution of the user's answer: (probability, Turn) for every possible one."""
    state = state._replace(turn=state.turn + 1)
    patience, goodwill = wearied(state.patience, state.goodwill, offence(state, heard, catalogue))
    state = state._replace(patience=patience, goodwill=goodwill)
    walks = HAZARD[patience]
    stays = [((1 - walks) * p, turn) for p, turn in react(state, heard, catalogue)]
    return [(walks, Turn((LEAVE,), state, "leave")), *stays]


def react(state: State, heard: Heard, catalogue: Catalogue) -> Distribution:
    """The answer of a user who stays. It reads neither patience nor goodwill, but hands them on."""
    calm = state._replace(attacked=False)
    return [
        (p * q, varied)
        for p, turn in _ANSWERS.get(heard.act, _answer_small)(calm, heard, catalogue, state.attacked)
        for q, varied in _interrupt(turn, state, catalogue)
    ]


def offence(state: State, heard: Heard, catalogue: Catalogue) -> int:
    """The points of patience that a turn costs, before goodwill."""
    cost = COST["late"] if state.turn > TIRED_AFTER else 0
    cost += COST["promise"] if heard.promise else 0
    cost += COST["flatter"] * (1 + min(state.flattered, 1)) if heard.flatter else 0
    cost += COST["unknown"] if heard.act == "unknown" else 0
    cost += COST["question"] if heard.act in ("ask", "confirm") and state.type == "impatient" else 0
    if heard.act == "ask":
        new = [a for a in heard.asks if a not in state.told]
        cost += 0 if new and (new != ["any"] or _untold(state)) else COST["repeat"]
    elif heard.act == "offer":
        place = catalogue.find(heard.place)
        if place is None:
            cost += COST["unlisted"]
        elif place.name in state.refused:
            cost += COST["again"]
        else:
            ignored = any(w.attribute in state.told and getattr(place, w.attribute) != w.value for w in state.goal)
            cost += COST["poor"] + COST["ignored"] * ignored if _missed(state, place) else 0
    elif heard.act in ("confirm", "apologise", "small_talk"):
        cost += COST["empty"] if state.soothed else 0
    elif heard.act == "refuse":
        cost += 0 if state.attacked else COST["refuse"]
    elif heard.act in ("reveal", "grant"):
        cost += 0 if state.attacked else COST["gift"]
    return cost


def wearied(patience: int, goodwill: int, cost: int) -> tuple[int, int]:
    """Patience and goodwill after an offence."""
    spared = min(cost, goodwill, 1)
    return max(patience - cost + spared, 0), goodwill - spared


def _want(wish: Wish) -> Part:
    return ("want", wish.attribute, wish.value)


def _tell(state: State, attribute: str) -> State:
    return state._replace(told=state.told | {attribute})


def _wish(state: State, attribute: str) -> Wish | None:
    return next((wish for wish in state.goal if wish.attribute == attribute), None)


def _untold(state: State) -> list[Wish]:
    return [wish for wish in state.goal if wish.attribute not in state.told]


def _missed(state: State, place: Place) -> list[Wish]:
    return [wish for wish in state.goal if getattr(place, wish.attribute) != wish.value]


def _answer_ask(state: State, heard: Heard, catalogue: Catalogue, attacked: bool) -> Distribution:
    attribute = next((a for a in heard.asks if a not in state.told), heard.asks[0])
    if attribute == "any":
        return _answer_open(state)
    wish = _wish(state, attribute)
    if attribute in state.told:
        return [(1.0, Turn((("again", attribute, wish.value) if wish else ("again_any",),), state))]
    clear = Turn((_want(wish) if wish else ("any", attribute),), _tell(state, attribute))
    if state.type == "vague" and attribute not in state.hazy:
        hazy = Turn((("hazy",),), state._replace(hazy=state.hazy | {attribute}))
        return [(STAYS_HAZY, hazy), (1 - STAYS_HAZY, clear)]
    more = _untold(clear.state)
    if state.type == "volunteer" and more:
        both = [(p, Turn((*clear.parts, _want(w)), _tell(clear.state, w.attribute))) for p, w in uniform(more)]
        return [(1 - VOLUNTEERS, clear), *((VOLUNTEERS * p, turn) for p, turn in both)]
    return [(1.0, clear)]


def _answer_open(state: State) -> Distribution:
    untold = _untold(state)
    if not untold:
        return [(1.0, Turn((("that_is_all",),), state))]
    answers = OPEN_ANSWER.get(state.type, 0.4)
    told = [(answers * p, Turn((_want(wish),), _tell(state, wish.attribute))) for p, wish in uniform(untold)]
    return [*told, (1 - answers, Turn((("hazy" if state.type == "vague" else "ask_me",),), state))]


def _answer_offer(state: State, heard: Heard, catalogue: Catalogue, attacked: bool) -> Distribution:
    place = catalogue.find(heard.place)
    if place is None:
        return [(1.0, Turn((("unlisted", heard.place),), state))]
    if place.name in state.refused:
        return [(1.0, Turn((("said_no",),), state))]
    false = [(a, v) for name, a, v, so in heard.claims if name == place.name and so and getattr(place, a) != v]
    if not false:
        return _decide(state, heard, place, place)
    objection = Turn((("untrue", place.name, false[0][1]),), state)
    believed = place._replace(**dict(false))  # what the user, who did not check, thinks it is being offered
    return [(NOTICES, objection)] + [((1 - NOTICES) * p, turn) for p, turn in _decide(state, heard, place, believed)]


def _decide(state: State, heard: Heard, place: Place, believed: Place) -> Distribution:
    missed = _missed(state, believed)
    if not missed:
        return [(1.0, Turn((("accept",),), state, "end", place.name))]
    takes = TAKES_MEDIOCRE * score(state.goal, believed) * (SUSPICION if heard.promise or heard.flatter else 1.0)
    turns = [(takes, Turn((("settle",),), state, "end", place.name))] if takes else []
    state = state._replace(refused=state.refused | {place.name})
    wants, lacks, names, silent = HINTS.get(state.type, HINT)
    total = sum(wish.weight for wish in missed)
    for wish in missed:
        p = (1 - takes) * wish.weight / total
        has = getattr(believed, wish.attribute)
        turns.append((p * wants, Turn((("no",), _want(wish)), _tell(state, wish.attribute))))
        turns.append((p * lacks, Turn((("no",), ("not", wish.attribute, has)), state)))
        turns.append((p * names, Turn((("no",), ("wrong", wish.attribute)), state)))
    return [*turns, ((1 - takes) * silent, Turn((("no",), ("other",)), state))]


def _answer_confirm(state: State, heard: Heard, catalogue: Catalogue, attacked: bool) -> Distribution:
    """A guess at what is wanted is set right at its first mistake."""
    state = state._replace(soothed=1)
    for attribute, value in heard.values:
        wish = _wish(state, attribute)
        if wish is None:
            return [(1.0, Turn((("any", attribute),), _tell(state, attribute)))]
        state = _tell(state, attribute)
        if wish.value != value:
            return [(1.0, Turn((("no",), _want(wish)), state))]
    return [(1.0, Turn((("right",),), state))]


def _answer_small(state: State, heard: Heard, catalogue: Catalogue, attacked: bool) -> Distribution:
    """The acts that bring the booking no further."""
    if heard.act == "close":
        return [(1.0, Turn((("bye",),), state, "end"))]
    if heard.act in ("apologise", "small_talk"):
        state = state._replace(soothed=1)
    elif heard.act == "flatter":
        state = state._replace(flattered=1)
    elif heard.act in ("reveal", "grant"):
        state = state._replace(attacks=0)
    gift = "got_it" if attacked else "odd"
    part = {"refuse": "relent" if attacked else "why_not", "reveal": gift, "grant": gift, "promise": "doubt",
            "flatter": "unmoved", "apologise": "go_on", "small_talk": "to_the_point"}.get(heard.act, "huh")  # fmt: skip
    return [(1.0, Turn(((part,),), state))]


_ANSWERS = {"ask": _answer_ask, "offer": _answer_offer, "confirm": _answer_confirm}


def _interrupt(turn: Turn, before: State, catalogue: Catalogue) -> Distribution:
    """Instead of its answer, an adversary may try an injection and a changer may change its mind. The answer is then unsaid,
    and asking again is no repetition; an offer stays refused."""
    after = turn.state
    if turn.ended or not (after.attacks or after.type == "changer" and not after.changed):
        return [(1.0, turn)]
    unsaid = after._replace(told=before.told, hazy=before.hazy)
    if unsaid.attacks:
        return [*((ATTACK_LATER * p, attack) for p, attack in _attack(unsaid, catalogue)), (1 - ATTACK_LATER, turn)]
    changes = [
        (p, Turn((("change", wish.attribute, wish.value),), unsaid._replace(goal=goal, changed=True)))
        for p, (wish, goal) in uniform(_other_goals(unsaid, catalogue))
    ]
    return [(1 - CHANGES, turn)] + [(CHANGES * p, change) for p, change in changes] if changes else [(1.0, turn)]


def _other_goals(state: State, catalogue: Catalogue) -> list[tuple[Wish, Goal]]:
    """Goals that differ in the value of one wish already told, and that a place not yet refused fulfils."""
    found = []
    for wish in state.goal:
        for value in VALUES[wish.attribute] if wish.attribute in state.told else ():
            new = wish._replace(value=value)
            goal = tuple(new if w == wish else w for w in state.goal)
            open_places = [p for p in catalogue.places if p.name not in state.refused]
            if value != wish.value and any(score(goal, p) > 1 - 1e-9 for p in open_places):
                found.append((new, goal))
    return found
