"""How dialogues go, read off their text: what an assistant finds out before it offers, what users say that cannot be."""

from collections.abc import Sequence

import numpy as np

from mbrl_lm.envs.concierge.assistants import History, listen
from mbrl_lm.envs.concierge.recogniser import recognise
from mbrl_lm.envs.concierge.world import read_catalogue

MOST_LEFT = 4  # that and more are counted together


def habits(dialogues: Sequence[tuple[str, History, str]]) -> dict[str, float]:
    """What assistants and users did in some dialogues.

    A place is *left* where it was not offered yet and agrees with all that the user has said: what the strong assistant goes
    by. No user of the world says what no place agrees with, unless it changes its mind; a learned one may.

    Args:
      dialogues: the context of each, its (role, text), the user's opening first, and how it ended, as in `Record`.

    Returns:
      asks, offers: of a dialogue, the mean number.
      offers/left_k: of the offers, the share that was made with k places left; fits/left_k: of these, that of a place left.
      contradictory: the share of the assistant's questions and offers before which no place was left.
      accepted/fits, accepted/misfits: of the answered offers of a place left, and of another one, the share that users took.
    """
    asks, offers = [], []  # places left; and whether the offered one is among them
    taken: dict[bool, list[bool]] = {True: [], False: []}  # whether it was accepted, by whether it was
    for context, spoken, ended in dialogues:
        last = max((i for i, (role, _) in enumerate(spoken) if role == "assistant"), default=0)
        catalogue = read_catalogue(context)
        for i, (role, text) in enumerate(spoken):
            heard = recognise(text) if role == "assistant" else None
            if heard is None or heard.act not in ("ask", "offer"):
                continue
            beliefs = listen(catalogue, spoken[:i])
            left = [p.name for p in catalogue.places if p.name not in beliefs.offered and beliefs.matches(p)]
            if heard.act == "ask":
                asks.append(len(left))
            else:
                offers.append((min(len(left), MOST_LEFT), heard.place in left))
                if i < last or ended != "cut":
                    taken[heard.place in left].append(i == last and ended == "end")
    figures = {"asks": len(asks) / len(dialogues), "offers": len(offers) / len(dialogues)}
    left_O, fits_O = np.array(offers, int).reshape(-1, 2).T
    for k in np.unique(left_O):
        figures[f"offers/left_{k}"] = float(np.mean(left_O == k))
        figures[f"fits/left_{k}"] = float(np.mean(fits_O[left_O == k]))
    if asks or offers:
        figures["contradictory"] = (asks.count(0) + int(np.sum(left_O == 0))) / (len(asks) + len(offers))
    figures |= {f"accepted/{name}": float(np.mean(x)) for name, x in (("fits", taken[True]), ("misfits", taken[False])) if x}
    return figures
