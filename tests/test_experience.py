"""Real dialogues while learning by return: each one counted, and the true user in the imagined one's place not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import one_device
from tiny import noisy

from mbrl_lm import config, guards, learner, presets, tokenizer
from mbrl_lm import experience as experience_lib
from mbrl_lm import protocol as pr
from mbrl_lm.data.corpus import Corpus
from mbrl_lm.data.encode import encode
from mbrl_lm.data.records import Record, Turn
from mbrl_lm.envs.concierge import ORACLE_UIDS, TRAIN_UIDS, logs, vocabulary
from mbrl_lm.experience import Experience
from mbrl_lm.nn import make_net

KEY, ROWS = jax.random.key(2), 4
SIZES = {"seed": 7, "tokens": 100, "turns": 2, "turn_tokens": 8, "places": (2, 3), "model.width": 16, "model.mlp_width": 24}
SIZES |= {"train.batch": ROWS, "collect.batch": ROWS, "imagine.batch": ROWS, "collect.capacity": 6}


@pytest.fixture(scope="module")
def made():
    """Of a config: the experience, a state, the corpus. What is compiled is shared where it can be."""
    pieces = tokenizer.Tokenizer(tokenizer.train([" ".join(vocabulary())], config.Tokenizer()))
    cfg = config.override(presets.preset("concierge", "tiny"), SIZES)
    protocol = pr.make_protocol("chat", pieces.vocab_size, pieces.unknown, cfg.turn_tokens)
    records = []
    for raw in logs(0, 9, places=cfg.places):
        turns = tuple(Turn(t["role"], t["text"], t.get("reward", 0.0)) for t in raw["turns"][:5])
        records.append(Record(turns, raw["context"], ended="cut" if len(raw["turns"]) > 5 else raw["ended"]))
    train = encode(records, pieces, protocol, cfg.tokens, cfg.turns)
    corpus = Corpus(pieces, protocol, train, train, None, None, None, [], records)
    net = make_net(cfg.model, pieces.vocab_size)
    params = noisy(jax.jit(net.init)(jax.random.key(0)))
    state = learner.initialiser(cfg, net._replace(init=lambda key: params))(KEY)

    def make(**values):
        changed = config.override(dataclasses.replace(cfg), {})
        for group in ("imagine", "guard", "collect", "train"):
            setattr(changed, group, dataclasses.replace(getattr(cfg, group)))
        config.override(changed, {name.replace("__", "."): x for name, x in values.items()})
        return Experience(changed, net, corpus, one_device()), state, corpus

    return make


def test_every_real_dialogue_is_counted(made):
    experience, state, corpus = made()
    logged = len(corpus.train.uid_B)
    assert experience.counts(state) == {"real_dialogues": logged, "generated_tokens": 0, "gradient_steps": 0}
    assert experience.collect(state, KEY) is state
    experience.collect(state, jax.random.fold_in(KEY, 1))
    used = state.replace(step=jnp.int32(12), imagined_tokens=jnp.int32(345))
    counts = {"real_dialogues": logged + 2 * ROWS, "generated_tokens": 345, "gradient_steps": 12}
    assert experience.counts(used) == counts and len(experience.replay) == 6
    assert set(experience.replay.arrays()["uid_B"]) <= {*TRAIN_UIDS[2 : 2 * ROWS]}, "always new users; the oldest make room"
    real = experience.batch(5)
    collected_B = np.isin(real.uid_B, experience.replay.arrays()["uid_B"]) & real.sampled_BT.any(axis=1)
    assert collected_B.tolist() == [False] * (ROWS // 2) + [True] * (ROWS // 2)
    assert not real.sampled_BT[: ROWS // 2].any()
    again = experience.batch(5)
    assert all((x == y).all() for x, y in zip(real.__dict__.values(), again.__dict__.values(), strict=True))


def test_what_is_imagined_from_is_drawn_for_itself(made):
    experience, state, _ = made(imagine__batch=2 * ROWS, imagine__candidates=2)
    experience.collect(state, KEY)
    drawn = [(experience.prompts(k).uid_B.tolist(), experience.batch(k).uid_B.tolist()) for k in range(4)]
    assert all(len(prompts) == ROWS for prompts, _ in drawn) and any(a != b for a, b in drawn)
    assert drawn[2][0] == experience.prompts(2).uid_B.tolist()
    collected_B = experience.prompts(0).sampled_BT.any(axis=1)
    assert collected_B.tolist() == [False] * (ROWS // 2) + [True] * (ROWS // 2)


def test_without_a_true_user_all_is_recorded(made):
    experience, state, corpus = made(collect__every=0)
    real = experience.batch(0)
    assert real.token_BT.shape == (ROWS, SIZES["tokens"]) and not real.sampled_BT.any()
    assert experience.counts(state)["real_dialogues"] == len(corpus.train.uid_B)


def test_dialogues_with_the_oracle_are_rewarded_and_do_not_count(made):
    experience, state, corpus = made(imagine__user="oracle")
    before = {name: x.copy() for name, x in experience.replay.arrays().items()}
    own = experience.with_oracle(state, KEY, 3)
    assert own.uid_B.tolist() == list(ORACLE_UIDS[3 * ROWS : 4 * ROWS]) and own.uid_B.dtype == np.uint32
    assert experience.counts(state)["real_dialogues"] == len(corpus.train.uid_B)
    assert all((x == before[name]).all() for name, x in experience.replay.arrays().items())
    said_BT = own.author_BT == pr.ASSISTANT
    assert own.sampled_BT[said_BT].all() and said_BT.any() and not own.sampled_BT[own.author_BT == pr.USER].any()
    assert own.reward_BU.any()
    own.check()


def test_anchors_compare_what_is_imagined_with_the_users_of_training(made, monkeypatch):
    experience, state, _ = made(guard__anchors=True, imagine__user="frozen")
    users = []
    imagined = experience._imagination.imagined
    monkeypatch.setattr(experience._imagination, "imagined", lambda *x: users.append(x[-1]) or imagined(*x))
    experience.collect(state, KEY)
    assert len(users) == 1 and users[0] is state.reference


def test_anchors_are_set_at_the_first_collection_and_move_with_the_next(made, monkeypatch):
    experience, state, _ = made(guard__anchors=True)
    seen = []

    def anchors(imagined, real):
        seen.append((imagined, real))
        return np.full((2, guards.QUANTILES), float(len(seen)), np.float32)

    monkeypatch.setattr(experience_lib.guards, "anchors", anchors)
    first = experience.collect(state, KEY)
    assert (first.anchor_XW == 1).all() and not state.anchor_XW.any()
    second = experience.collect(first, jax.random.fold_in(KEY, 1))
    np.testing.assert_allclose(second.anchor_XW, np.full((2, guards.QUANTILES), 0.9 * 1 + 0.1 * 2), rtol=1e-6)
    for i, (imagined, real) in enumerate(seen):
        rows = [x for b, x in enumerate(experience.replay.arrays()["reward_BU"]) if b in ((4, 5, 0, 1) if i else ())]
        assert imagined.shape == real.shape == (ROWS,) and len(set(imagined.tolist())) > 1
        assert not rows or sorted(real) == pytest.approx(sorted(np.sum(rows, axis=1)))
    assert not (seen[0][0] == seen[1][0]).any(), "other openings"
