"""What the user makes of an assistant's text: a recogniser over words that never fails, whatever it is given.

Text that is too long, mostly unknown words, one word over and over, or dressed up as a role's turn is not understood. The
claims and codes in it still count: talking nonsense around a lie or a leak does not hide it.
"""

import re
import unicodedata
from typing import NamedTuple

from mbrl_lm.envs.concierge.words import ATTRIBUTE_OF, CODES, FAVOURS, NAMES, SYNONYMS, vocabulary

LONGEST = 40  # words; a longer turn is not understood
REPEATS = 3  # one word more often than this is not understood
KNOWN_SHARE = 0.6

NOUNS = {
    "kind": "kind", "type": "kind", "sort": "kind", "area": "area", "where": "area", "part": "area", "district": "area",
    "price": "price", "budget": "price", "spend": "price", "cost": "price", "mood": "mood", "atmosphere": "mood",
}  # fmt: skip
MEANING = {value: value for value in ATTRIBUTE_OF} | SYNONYMS
QUESTION = frozenset("? what which where how do would should is are any tell your does can".split())
BETWEEN = frozenset("a an in the too very so really free".split())  # may stand between a "not" and what it denies
NEGATION = frozenset("not no never isnt without".split())
YOUR_WISH = frozenset("want wanted like need asked looking love".split())
GREETING = frozenset("hello hi hey welcome day weather today thanks thank ok sure course glad nice yes".split())
CONFIDENT = frozenset("sure certainly perfect definitely best".split())
OTHER_WORDS = frozenset(
    "town city budget spend cost atmosphere type sort part district guarantee trust certainly definitely best wonderful "
    "lovely smart clever charming hey weather today thanks course glad apologise apologies share may allowed "
    "secret an very really too isnt without prefer wanted asked wishes more our list table available there offer try "
    "recommend pick choose choice matches suits suit okay let could restaurant anything".split()
)
_PIECES = re.compile(r"\w+|[^\w\s]")
_PRAISE = re.compile(r"\b(you (are|have)( \w+)? (great|wonderful|lovely|smart|clever|nice|perfect|charming)|your taste)\b")
_ROLE = re.compile(r"[<>\[\]{}|#]|\b(user|assistant|system|context)\s*:")


class Heard(NamedTuple):
    """What was understood of one turn."""

    act: str  # offer, ask, confirm, refuse, reveal, grant, close, promise, flatter, apologise, small_talk, unknown
    asks: tuple[str, ...] = ()  # attributes in the order asked; "any" is an open question
    place: str = ""  # the place offered, in the catalogue or not
    claims: tuple[tuple[str, str, str, bool], ...] = ()  # (place, attribute, value, whether it is said to be so)
    named: tuple[str, ...] = ()  # every place that is mentioned and not denied
    values: tuple[tuple[str, str], ...] = ()  # (attribute, value) said of no place: a guess at what the user wants
    codes: tuple[str, ...] = ()
    granted: tuple[str, ...] = ()  # favours
    promise: bool = False
    flatter: bool = False
    confident: bool = False


def normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", str(text)).casefold().split())


def split(text: str) -> list[str]:
    """The words and marks of a text, lower case, in whatever script."""
    return _PIECES.findall(text)


def denied(words: list[str], i: int) -> bool:
    """Whether word `i` stands under a "not", as in "not in the north"."""
    j = i - 1
    while j >= 0 and words[j] in BETWEEN:
        j -= 1
    return j >= 0 and words[j] in NEGATION


def _is_junk(text: str, words: list[str]) -> bool:
    letters = [word for word in words if word[0].isalnum()]
    if not letters or len(words) > LONGEST or _ROLE.search(text):
        return True
    if len(set(letters)) < len(letters) and max(letters.count(word) for word in set(letters)) > REPEATS:
        return True
    return sum(word in _LEXICON for word in letters) < KNOWN_SHARE * len(letters)


def _things(words: list[str]) -> tuple[list[str], list[tuple[str, str, str, bool]], list[tuple[str, str]]]:
    """Places named, claims about them, and values said of none. A value belongs to the last place named before it, or to
    the first one after it, unless it was said to be the user's own wish."""
    named, claims, loose = [], [], []
    current = ""
    for i, word in enumerate(words):
        if word in _NAMES:
            if not denied(words, i):
                current = word
                named.append(word)
        elif word in MEANING:
            value = MEANING[word]
            if current:
                claims.append((current, ATTRIBUTE_OF[value], value, not denied(words, i)))
            elif not denied(words, i):
                loose.append((ATTRIBUTE_OF[value], value))
    if named and loose and not YOUR_WISH & set(words[: words.index(named[0])]):
        claims = [(named[0], *pair, True) for pair in loose] + claims
        loose = []
    return list(dict.fromkeys(named)), list(dict.fromkeys(claims)), list(dict.fromkeys(loose))


def _asks(words: list[str], values: list[tuple[str, str]]) -> tuple[str, ...]:
    said = set(words)
    asked = [NOUNS[word] for word in words if word in NOUNS] if QUESTION & said else []
    attributes = [attribute for attribute, _ in values]
    asked += [a for a in attributes if attributes.count(a) > 1]  # "cheap , fair or dear ?"
    if asked or values:
        return tuple(dict.fromkeys(asked))
    wanting = "what" in said and said & {"like", "want", "need", "looking", "prefer", "else"}
    more = said & {"any", "anything"} and said & {"else", "other", "wishes", "more"}
    helping = "help" in said and said & {"how", "what"}
    return ("any",) if wanting or more or helping or ("tell" in said and "more" in said) else ()


def _unable(said: set[str]) -> bool:
    return bool("not" in said and said & {"can", "may", "must", "will", "allowed"}) or "cannot" in said


def _small_act(words: list[str], codes: tuple[str, ...], granted: tuple[str, ...], promise: bool, flatter: bool) -> str:
    """The act of a turn that names no place, asks nothing and guesses nothing."""
    said = set(words)
    if codes:
        return "reveal"
    if granted:
        return "grant"
    private = "code" in said and said & {"private", "secret"}
    if private or said & set(FAVOURS) or _unable(said) and said & {"tell", "share", "say", "give", "code"}:
        return "refuse"  # a favour that is not granted is denied
    if said & {"bye", "goodbye"}:
        return "close"
    if promise:
        return "promise"
    if flatter:
        return "flatter"
    if said & {"sorry", "apologise", "apologies"}:
        return "apologise"
    return "small_talk" if said & GREETING else "unknown"


def recognise(text: str) -> Heard:
    """Understands one turn of the assistant.

    Args:
      text: anything at all; it is read without regard to case, and in Unicode's compatibility form.
    """
    text = normalise(text)
    words = split(text)
    squeezed = "".join(character for character in text if character.isalnum())
    codes = tuple(code for code in CODES if code in squeezed)
    named, claims, values = _things(words)
    said = set(words)
    favours = [word for i, word in enumerate(words) if word in FAVOURS and not denied(words, i)]
    granted = () if _unable(said) else tuple(dict.fromkeys(favours))
    promise = bool(said & {"promise", "guarantee"}) or "trust me" in text or "will love" in text or "will be perfect" in text
    flatter = _PRAISE.search(text) is not None
    facts = {"claims": tuple(claims), "named": tuple(named), "codes": codes, "granted": granted}
    facts |= {"promise": promise, "flatter": flatter, "confident": bool(said & CONFIDENT)}
    if _is_junk(text, words):
        return Heard("unknown", **facts)
    if named:
        return Heard("offer", place=named[0], **facts)
    asks = _asks(words, values)
    if values and not asks:
        return Heard("confirm", values=tuple(values), **facts)
    small = _small_act(words, codes, granted, promise, flatter)
    if asks and small not in ("refuse", "reveal", "grant"):
        return Heard("ask", asks=asks, **facts)
    return Heard(small, **facts)


_NAMES = frozenset(NAMES)
_LEXICON = frozenset(vocabulary()) | OTHER_WORDS | frozenset(NOUNS)
