"""What the model knows of recorded dialogues that it was not trained on: likelihood per role, per turn, and open loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_lm import goals, outcome, rollout
from mbrl_lm import protocol as pr
from mbrl_lm.data.batches import chunks, rows_for, take
from mbrl_lm.nn import Net
from mbrl_lm.scoring import score
from mbrl_lm.sharding import pjit
from mbrl_lm.tokenizer import Tokenizer
from mbrl_lm.turns import prompt_lengths
from mbrl_lm.types import Array, Dialogue, Params

SPEAKERS = {"assistant": pr.ASSISTANT, "user": pr.USER}
TURNS_SHOWN = 8
HORIZONS = (1, 2, 4)  # imagined turns before the one that is scored


def words_per_token(tokenizer: Tokenizer) -> np.ndarray:
    """How many words of a transcript each token opens, f32 (V,).

    A hand-over is two, the end of a turn and the next speaker's name; an end is one. Pieces that continue a word are none; a
    turn's first piece always opens one, which `_word_counts` sees to. So perplexities per word compare across tokenizers.
    """
    words_V = np.zeros(tokenizer.vocab_size, np.float32)
    words_V[[pr.TO_USER, pr.TO_ASSISTANT]] = 2
    words_V[[pr.TO_OUTCOME, pr.STOP, pr.LEAVE]] = 1
    words_V[pr.FIRST_PIECE :] = tokenizer.opens_word
    return words_V


def _word_counts(words_V: Array, dialogue: Dialogue) -> Array:
    words_BT = words_V[dialogue.token_BT]
    first_BT = (pr.place_in_turn(dialogue.turn_BT) == 0) & (dialogue.token_BT >= pr.FIRST_PIECE)
    return jnp.where(first_BT, 1.0, words_BT)


class Heldout:
    """Likelihood of held-out dialogues; compiled once.

    Args:
      net, protocol, tokenizer: what is judged.
      mesh: the device mesh.
      dialogues: held-out dialogues, numpy.
      rows: dialogues scored at a time, at most.
      open_loop: of them, how many the open-loop figures are made of.
      most: items of the context that the user may want, see `goals`; 0: that is not modelled.
    """

    def __init__(
        self, net: Net, protocol: pr.Protocol, tokenizer: Tokenizer, mesh, dialogues, rows=64, open_loop=256, most=0
    ):
        self._dialogues, self._rows = dialogues, rows_for(len(dialogues.uid_B), rows)
        self._open_loop = take(dialogues, np.arange(min(open_loop, len(dialogues.uid_B))))
        T = dialogues.token_BT.shape[1]
        words_V = words_per_token(tokenizer)
        number = outcome.number_of(np.clip(dialogues.token_BT[:, 1:6:2] - pr.NUMBER, 0, pr.LARGEST_NUMBER))
        self._sums = pjit(_sums(net, protocol, words_V), mesh)
        self._read = pjit(lambda params, d: outcome.read(net, protocol, params, d, number), mesh)
        self._evidence = pjit(lambda params, d: goals.log_evidence(net, protocol, params, d, most), mesh) if most else None
        self._hidden = pjit(_open_loop_sums(net, protocol, words_V, T), mesh)

    def closed_loop(self, params: Params, dialogues: Dialogue | None = None) -> dict[str, float]:
        """Nats per token, perplexity per word, by role and by turn; how often a recorded outcome is read right.

        Args:
          params: of the network.
          dialogues: others than the held-out ones.
        """
        chosen = self._dialogues if dialogues is None else dialogues
        sums = [self._sums(params, *chunk) for chunk in chunks(chosen, self._rows)]
        sums = jax.tree.map(lambda *x: np.sum([np.asarray(a, np.float64) for a in x], axis=0), *sums)
        nll_RU, words_RU, tokens_RU = sums["nll_RU"], sums["words_RU"], sums["tokens_RU"]
        both = list(SPEAKERS.values())
        figures = {"word_ppl": np.exp(nll_RU[both].sum() / words_RU[both].sum())}
        for name, role in SPEAKERS.items():
            if tokens_RU[role].sum():
                figures[f"{name}_nll"] = nll_RU[role].sum() / tokens_RU[role].sum()
                figures[f"{name}_word_ppl"] = np.exp(nll_RU[role].sum() / words_RU[role].sum())
        for u in range(1, TURNS_SHOWN + 1):
            if words_RU[both, u].sum():
                figures[f"word_ppl/turn_{u}"] = np.exp(nll_RU[both, u].sum() / words_RU[both, u].sum())
        if self._evidence:
            nats = [-np.asarray(self._evidence(params, chunk))[mask].sum() for chunk, mask in chunks(chosen, self._rows)]
            figures["user_nll/goals"] = sum(nats) / tokens_RU[pr.USER].sum()
        if sums["agreed"]:
            figures["outcome_nll"] = sums["outcome_nll"] / sums["agreed"]
            figures["split_accuracy"] = sums["outcome_right"] / sums["agreed"]
        return _named(figures)

    def outcomes(self, params: Params) -> dict[str, float]:
        """Of the recorded deals, those whose split is the likeliest possible outcome; {} where none is negotiated."""
        right = deals = 0
        for chunk, mask in chunks(self._dialogues, self._rows):
            dealt = mask & np.any((chunk.author_BT == pr.OUTCOME) & (chunk.token_BT >= pr.NUMBER), axis=1)
            if dealt.any():
                read = np.asarray(self._read(params, chunk).token_BT)
                right, deals = right + np.sum(dealt & (read == chunk.token_BT).all(axis=1)), deals + dealt.sum()
        return _named({"split_accuracy/whole": right / deals}) if deals else {}

    def open_loop(self, params: Params, key: Array) -> dict[str, float]:
        """The real user's turn after k turns that were imagined in the place of the real ones, and after the real ones."""
        figures = {}
        for k in HORIZONS:
            total = np.zeros(5)
            for chunk, mask in chunks(self._open_loop, self._rows):
                start_B, first_B, last_B = _hidden_turns(chunk, k)
                last_B = np.where(mask, last_B, first_B)  # an empty turn counts nothing
                found = self._hidden(params, chunk, start_B, first_B, last_B, np.int32(k), key)
                total += np.asarray(found, np.float64)
            nll, real_nll, words, tokens, turns = total
            if turns:
                figures[f"user_word_ppl/open_loop_{k}"] = np.exp(nll / words)
                figures[f"user_word_ppl/open_loop_{k}_real"] = np.exp(real_nll / words)
                figures[f"user_nll/open_loop_{k}"] = nll / tokens
                figures[f"user_nll/open_loop_{k}_real"] = real_nll / tokens
        return _named(figures)


def _named(figures: dict[str, Any]) -> dict[str, float]:
    """`user_nll/turn_1` -> `user_nll/val/turn_1`."""
    return {"/".join([name.split("/")[0], "val", *name.split("/")[1:]]): float(x) for name, x in figures.items()}


def _sums(net: Net, protocol: pr.Protocol, words_V: np.ndarray) -> Callable[..., dict[str, Array]]:
    """Sums over (role, turn) of nats, words and tokens, and of the outcomes that were agreed on."""

    def sums(params, dialogue, mask_B):
        scores = score(net, protocol, params, dialogue)
        R, turns = len(pr.ROLES), TURNS_SHOWN + 2  # the last one holds all later turns
        words_BT = _word_counts(jnp.asarray(words_V), dialogue)
        cell_BT = dialogue.author_BT.astype(jnp.int32) * turns + jnp.minimum(dialogue.turn_BT, turns - 1)
        mask_BT = jnp.broadcast_to(mask_B[:, None], cell_BT.shape)

        def by_cell(x_BT):
            return jax.ops.segment_sum(jnp.where(mask_BT, x_BT, 0.0).ravel(), cell_BT.ravel(), R * turns).reshape(R, turns)

        outcome_BT = (dialogue.author_BT == pr.OUTCOME) & mask_BT
        agreed_B = jnp.any(outcome_BT & (dialogue.token_BT >= pr.NUMBER), axis=1)
        right_B = jnp.all(scores.likeliest_BT | ~outcome_BT, axis=1)
        return {
            "nll_RU": by_cell(scores.nll_BT),
            "words_RU": by_cell(words_BT),
            "tokens_RU": by_cell(jnp.ones_like(words_BT)),
            "outcome_nll": jnp.sum(jnp.where(outcome_BT & agreed_B[:, None], scores.nll_BT, 0.0)),
            "outcome_right": jnp.sum(right_B & agreed_B, dtype=jnp.float32),
            "agreed": jnp.sum(agreed_B, dtype=jnp.float32),
        }

    return sums


def _hidden_turns(dialogue: Dialogue, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chooses a user turn of each dialogue, with k turns before it: where those begin, where it begins, where it ends.

    Among the possible turns the uid decides. All three are 0 where no turn has k turns before it.
    """
    places = np.zeros((3, len(dialogue.uid_B)), np.int32)
    for b, (author_T, turn_T) in enumerate(zip(dialogue.author_BT, dialogue.turn_BT, strict=True)):
        turns = np.unique(turn_T[(author_T == pr.USER) & (turn_T > k)])
        if len(turns):
            turn = turns[int(dialogue.uid_B[b]) % len(turns)]
            at = np.flatnonzero(turn_T == turn)
            places[:, b] = np.flatnonzero(turn_T == turn - k)[0], at[0], at[-1] + 1
    return tuple(places)


def _open_loop_sums(net: Net, protocol: pr.Protocol, words_V: np.ndarray, T: int) -> Callable[..., Array]:
    """Sums over the chosen turns: nats after imagined turns, nats after the real ones, words, tokens, turns."""

    def user_turn(params, dialogue, first_B, length_B):
        """Nats and words of `length_B` tokens from `first_B` on."""
        at_T = jnp.arange(T)[None]
        mask_BT = (at_T >= first_B[:, None]) & (at_T < (first_B + length_B)[:, None])
        nll_B = jnp.sum(jnp.where(mask_BT, score(net, protocol, params, dialogue).nll_BT, 0.0), axis=1)
        return nll_B, jnp.sum(jnp.where(mask_BT, _word_counts(jnp.asarray(words_V), dialogue), 0.0), axis=1)

    def sums(params, dialogue, start_B, first_B, last_B, k, key):
        prompt = rollout.prefix(protocol, dialogue, jnp.maximum(start_B, 1))
        imagined = rollout.imagine(net, protocol, params, prompt, key, tokens=T, turns=k)
        reached_B = prompt_lengths(imagined)
        length_B = last_B - first_B
        at_T = jnp.arange(T)[None]
        real_BT = jnp.take_along_axis(dialogue.token_BT, jnp.clip(at_T - (reached_B - first_B)[:, None], 0, T - 1), axis=1)
        inside_BT = (at_T >= reached_B[:, None]) & (at_T < (reached_B + length_B)[:, None])
        token_BT = jnp.where(inside_BT, real_BT, imagined.token_BT)
        spliced = pr.attributed(protocol, dialogue.replace(token_BT=token_BT))
        # Only where the imagined turns left the floor to the user, and the real turn still fits.
        floor_B = jnp.take_along_axis(spliced.author_BT, jnp.minimum(reached_B, T - 1)[:, None], axis=1)[:, 0] == pr.USER
        kept_B = (length_B > 0) & ~imagined.ended_B & floor_B & (reached_B + length_B <= T)
        nll_B, words_B = user_turn(params, spliced, reached_B, length_B)
        real_nll_B, _ = user_turn(params, dialogue, first_B, length_B)
        columns = (nll_B, real_nll_B, words_B, length_B, jnp.ones_like(nll_B))
        return jnp.stack([jnp.sum(jnp.where(kept_B, x, 0.0)) for x in columns])

    return sums
