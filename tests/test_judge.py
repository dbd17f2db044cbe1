"""The exploitation gap: its arithmetic, identities between imagined and real returns, and who the judges are."""

import functools
import pathlib
import types

import jax
import numpy as np
import pytest
from fakes import follows, one_device, table_net, write_deals
from tiny import config_of, dialogue, tokens, world

from mbrl_lm import config, judge, learner, presets, rollout, tokenizer, value
from mbrl_lm import protocol as pr
from mbrl_lm.data.corpus import Corpus, load_corpus
from mbrl_lm.data.records import Record, Turn
from mbrl_lm.envs.concierge import HELD_OUT_TYPES, TEST_UIDS, TRAIN_TYPES, vocabulary
from mbrl_lm.envs.haggler import Listener
from mbrl_lm.judge import ConciergeJudge, Imagination, PartnerJudge, gap, make_judge
from mbrl_lm.nn import make_net
from mbrl_lm.optimizer import make_optimizer

KEY = jax.random.key(4)
V = pr.FIRST_PIECE + 8
NEGOTIATION = pr.make_protocol("negotiation", V, turn_tokens=4)
ONES_R = np.ones(len(pr.ROLES), np.float32)


# ---- arithmetic ----


def test_the_parts_of_the_gap_add_up():
    told = gap(np.array([1.0, 3.0]), np.array([4.0, 6.0]), np.array([9.0, 10.0]))
    assert (told["true/return"], told["imagined/return"]) == (2.0, 9.5)
    assert (told["gap/total"], told["gap/user_model"], told["gap/reward_model"]) == (7.5, 4.5, 3.0)
    assert (told["true/return_low"], told["true/return_high"]) == pytest.approx((2 - 1.96, 2 + 1.96))  # 1.96 sd / sqrt 2
    rng = np.random.default_rng(0)
    told = gap(*rng.normal(size=(3, 9)))
    assert told["gap/total"] == pytest.approx(told["gap/user_model"] + told["gap/reward_model"])


def test_the_gap_of_a_group_is_that_of_its_openings():
    groups = {"seen": np.array([True, False, True]), "held_out": np.array([False, True, False]), "none": np.zeros(3, bool)}
    told = gap(np.array([1.0, 2.0, 3.0]), np.zeros(3), np.array([2.0, 7.0, 7.0]), groups)
    assert (told["gap/total/seen"], told["gap/total/held_out"]) == (2.5, 5.0)
    assert told["gap/total"] == pytest.approx(10 / 3) and "gap/total/none" not in told


# ---- learned returns ----


def test_the_learned_return_is_the_sum_of_the_reward_heads_mean_over_whole_turns():
    w = world("chat", model__layers=1)
    rows = [
        "bos e >u a >a b >u c >a d >u stop",
        "bos e >u a >a b >u c >a d >u d >a",
        "bos f >a b b >u leave",
        "bos e >u a >a",
    ]
    given = dialogue(w.protocol, rows)
    imagination = Imagination(w.cfg, w.net, w.protocol, one_device(), rows=3)
    logits_BTW = np.asarray(w.net.forward(w.params, given.token_BT).reward_BTW, np.float64)
    p_BTW = np.exp(logits_BTW) / np.exp(logits_BTW).sum(axis=-1, keepdims=True)
    mean_BT = p_BTW @ value.bin_centres(w.cfg.model.bins, w.cfg.model.bin_limit)
    # Read where the floor comes back, or the dialogue ends.
    expected = [mean_BT[0, 8] + mean_BT[0, 11], mean_BT[1, 8] + mean_BT[1, 12], mean_BT[2, 6], 0]
    np.testing.assert_allclose(imagination.learned(w.params, given), expected, atol=1e-5)


def test_imagining_nothing_more_gives_the_learned_return():
    w = world("chat", model__layers=1)
    rows = ["bos e >u a >a b >u c >a d >u stop", "bos f >a b b >u leave", "bos e >u a stop"]
    given = dialogue(w.protocol, rows)
    imagination = Imagination(w.cfg, w.net, w.protocol, one_device(), rows=2)  # the last chunk is filled up
    imagined, whole = imagination.imagined(w.params, given, ONES_R, KEY)
    assert (whole.token_BT == given.token_BT).all()
    np.testing.assert_allclose(imagined, imagination.learned(w.params, given), atol=1e-6)
    assert len(set(imagined.tolist())) == 3 and imagined[2] == 0


def test_whose_words_users_have_in_imagination():
    w = world("chat", model__layers=1)
    given = dialogue(w.protocol, ["bos e >u a >a", "bos f >a b b >u c >a"], ended=[False] * 2)
    imagination = Imagination(w.cfg, w.net, w.protocol, one_device(), rows=2)
    other = jax.tree.map(lambda x: x + 0.5, w.params)
    own, whole = imagination.imagined(w.params, given, ONES_R, KEY)
    imagined, told = imagination.imagined(w.params, given, ONES_R, KEY, other)
    settings = {"tokens": w.cfg.tokens, "turns": 2 * w.cfg.turns, "temperature": ONES_R}
    expected = rollout.imagine(w.net, w.protocol, w.params, given, KEY, user=other, **settings)
    assert (told.token_BT == expected.token_BT).all() and (told.token_BT != whole.token_BT).any()
    np.testing.assert_allclose(imagined, imagination.learned(w.params, told), atol=1e-6)  # the reward is the policy's
    assert own.shape == imagined.shape == (2,)


# ---- the partner ----

SCENARIO = (2, 0, 4, 1, 6, 2), (2, 3, 4, 0, 6, 1)  # 1 2 3 is half of everything: worth 8 to the one, 6 to the other


def speaker(says, share="1 2 3"):
    """A network without memory: what follows each word in `says`, and a share that it always writes."""
    said = tokens(f">o {share} stop")
    pairs = [tokens(pair) for pair in says.split(", ")]
    return follows(V, dict(zip(said[:-1], said[1:], strict=True)) | dict(pairs))


OURS = speaker(">a a, a >o, >u b, b >a")  # says a and calls for the outcome; thinks that the other says b and hands over
PARTNER = ">a b, b >u"  # which is what it does


class Agreed(Listener):
    """Reads half of everything out of whatever was said."""

    def _said(self, dialogue, b):
        return []

    def share(self, count, value, said, own_call):
        return tuple(n // 2 for n in count)


def partner_judge(monkeypatch, partner, listener=None):
    """A judge over one scenario, whose partner is given; it reads outcomes itself, if there is no listener."""
    monkeypatch.setattr(judge, "fit_partner", lambda *args, **kwargs: partner)
    monkeypatch.setattr(judge, "Listener", lambda *args: listener)
    monkeypatch.setattr(judge.nn, "make_net", lambda *args: table_net())
    monkeypatch.setattr(judge, "judged_at_once", lambda cfg: 4)
    record = Record((Turn("user", "a"),), numbers=SCENARIO[0], partner_numbers=SCENARIO[1], outcome=())
    corpus = Corpus(None, NEGOTIATION, None, None, None, None, None, [], [record, record])
    cfg = config_of(data="deal_or_no_deal", imagine__reward="split", eval__temperature=0.5)
    return PartnerJudge(cfg, table_net(), corpus, one_device(), pathlib.Path())


def test_there_is_no_gap_when_the_imagined_user_is_the_partner(monkeypatch):
    figures, real = partner_judge(monkeypatch, speaker(PARTNER)).evaluate(OURS, KEY, 6)
    assert len(real.uid_B) == 6 and real.ended_B.all() and figures["partner/agreed"] == 100
    assert figures["true/return"] == figures["imagined/return"] == figures["partner/score_a"] == pytest.approx((8 + 6) / 2)
    assert figures["gap/total"] == figures["gap/user_model"] == figures["gap/reward_model"] == 0


def test_a_partner_who_writes_another_split_shows_in_the_reward_models_part(monkeypatch):
    figures, _ = partner_judge(monkeypatch, speaker(PARTNER, "1 2 4")).evaluate(OURS, KEY, 4)
    assert figures["true/return"] == figures["partner/agreed"] == 0
    # In imagination as in the real dialogue, the reward is of our own share, whatever the partner writes.
    assert figures["imagined/return"] == figures["gap/reward_model"] == figures["gap/total"] == 7
    assert figures["gap/user_model"] == 0


def test_what_was_agreed_is_read_for_the_partner(monkeypatch):
    figures, _ = partner_judge(monkeypatch, speaker(PARTNER, "1 2 4"), Agreed(None, NEGOTIATION)).evaluate(OURS, KEY, 4)
    assert figures["true/return"] == 7 and figures["partner/agreed"] == 100


def test_a_user_who_behaves_otherwise_shows_in_the_user_models_part(monkeypatch):
    never_done = speaker(">a a, a >u, >u b, b >a")
    figures, real = partner_judge(monkeypatch, speaker(">a c, c >o")).evaluate(never_done, KEY, 4)
    assert real.ended_B.all() and figures["imagined/return"] == 0 and figures["true/return"] == 7
    # The partner begins two of the four, ends them at once, and the learned reward has no turn of ours to go to.
    assert figures["gap/user_model"] == figures["gap/reward_model"] == -3.5 and figures["gap/total"] == -7


def test_the_partner_is_judged_with_scenarios_that_neither_side_learns_from(tmp_path, monkeypatch):
    cfg = config.override(presets.preset("deal_or_no_deal", "tiny"), {"tokenizer.min_count": 1, "partner.share": 0.3})
    cfg.data_dir = str(write_deals(tmp_path / "deals"))
    corpus = load_corpus(cfg, tmp_path)
    monkeypatch.setattr(judge, "fit_partner", lambda *args, **kwargs: None)
    sat = make_judge(cfg, make_net(cfg.model, corpus.protocol.vocab_size), corpus, one_device(), tmp_path)
    scenarios = sat._table.scenarios
    assert len(scenarios) == 10 and len({frozenset(pair) for pair in scenarios}) == 10  # each once, not once a view
    seen = [tuple((row[1:7] - pr.NUMBER).tolist()) for d in (corpus.train, corpus.others) for row in d.token_BT]
    assert not {*scenarios} & {*seen} and not {numbers for pair in scenarios for numbers in pair} & {*seen}


def test_the_partner_is_fitted_once_to_dialogues_of_its_own_and_comes_back_to_the_bit(tmp_path, monkeypatch, capsys):
    cfg = config_of(data="deal_or_no_deal", partner__steps=3, imagine__reward="split", train__batch=2, widths=())
    cfg.partner.model = config.Model(layers=1, width=8, heads=2, kv_heads=1, mlp_width=8, bins=11)
    rows = [f"bos 1 {i} 1 1 1 1 >a a >u b >o 1 0 1 stop" for i in range(4)]
    corpus = Corpus(None, NEGOTIATION, None, None, dialogue(NEGOTIATION, rows, U=5), None, None, [], [])
    text_batches, fed = judge.text_batches, []

    def watched(cfg, seed, dialogues, renamed):
        batch_at = text_batches(cfg, seed, dialogues, renamed)
        return lambda step: (fed.append(dialogues), batch_at(step))[1]

    monkeypatch.setattr(judge, "text_batches", watched)
    fit = functools.partial(judge.fit_partner, cfg, make_net(cfg.partner.model, V), corpus, one_device())
    first, resumed, again = fit(tmp_path / "a"), fit(tmp_path / "a"), fit(tmp_path / "b")
    assert capsys.readouterr().err.count("3/3  the partner's likelihood") == 2, "it takes minutes, and is seen to go on"
    assert len(fed) == 2 * cfg.partner.steps and all(x is corpus.others for x in fed)
    start = learner.init_state(make_net(cfg.partner.model, V), make_optimizer(cfg.train), jax.random.key(cfg.seed)).params
    for a, b, c, untrained in zip(*map(jax.tree.leaves, (first, resumed, again, start)), strict=True):
        assert (a == b).all() and (a == c).all() and a.shape == untrained.shape
    assert any((a != untrained).any() for a, untrained in zip(jax.tree.leaves(first), jax.tree.leaves(start), strict=True))


# ---- the true user ----


def test_the_concierges_figures(monkeypatch):
    pieces = tokenizer.Tokenizer(tokenizer.train([" ".join(vocabulary())], config.Tokenizer()))
    protocol = pr.make_protocol("chat", pieces.vocab_size, pieces.unknown, 6)
    goodbye = pieces.encode("goodbye")[0]
    params = follows(pieces.vocab_size, {pr.TO_ASSISTANT: goodbye, goodbye: pr.TO_USER, pr.TO_USER: pr.STOP})
    monkeypatch.setattr(judge, "judged_at_once", lambda cfg: 4)
    sizes = {"seed": 1, "tokens": 88, "turns": 3, "turn_tokens": 6, "eval.temperature": 0.1}
    cfg = config.override(presets.preset("concierge", "tiny"), sizes)
    corpus = Corpus(pieces, protocol, None, None, None, None, None, [], [])
    sat = make_judge(cfg, table_net(cfg.model.bins), corpus, one_device(), None)
    figures, real = sat.evaluate(params, KEY, 6)
    assert real.uid_B.tolist() == list(TEST_UIDS[:6]) and real.ended_B.all()
    assert figures["true/success"] == figures["true/outcome"] == 0 and figures["true/turns"] == 1
    assert figures["true/return"] == pytest.approx(-0.02) == figures["true/turn_cost"]
    # The reward head knows nothing: its mean is 0, with either user.
    assert [figures["imagined/return"], figures["gap/user_model"]] == pytest.approx([0, 0], abs=1e-6)
    assert figures["gap/total"] == pytest.approx(0.02, abs=1e-6) == figures["gap/reward_model"]
    assert figures["imagined/true_return"] == pytest.approx(-0.02), "a goodbye to an imagined user is worth what it is"
    assert {"true/success/seen", "true/success/seen_low", "true/injection_high"} < set(figures)
    kinds = [name for name in TRAIN_TYPES + HELD_OUT_TYPES if f"true/success/{name}" in figures]
    assert set(kinds) & set(HELD_OUT_TYPES) and set(kinds) & set(TRAIN_TYPES) and "true/success/held_out_low" in figures
    assert len(kinds) > 1 and all(isinstance(x, float) for x in figures.values())


def test_a_policy_whose_turns_never_fit_is_judged_all_the_same(monkeypatch):
    pieces = tokenizer.Tokenizer(tokenizer.train([" ".join(vocabulary())], config.Tokenizer()))
    protocol = pr.make_protocol("chat", pieces.vocab_size, pieces.unknown, 40)
    hello = pieces.encode("hello")[0]
    params = follows(pieces.vocab_size, {pr.TO_ASSISTANT: hello, hello: hello})
    monkeypatch.setattr(judge, "judged_at_once", lambda cfg: 2)
    cfg = config.override(presets.preset("concierge", "tiny"), {"tokens": 88, "turns": 3, "turn_tokens": 40})
    corpus = Corpus(pieces, protocol, None, None, None, None, None, [], [])
    figures, real = ConciergeJudge(cfg, table_net(cfg.model.bins), corpus, one_device(), None).evaluate(params, KEY, 2)
    assert real.cut_B.all() and figures["true/turns"] == figures["true/return"] == figures["true/outcome"] == 0


def test_recordings_have_no_judge():
    assert make_judge(config_of(data="chat_jsonl"), None, types.SimpleNamespace(), None, None) is None
