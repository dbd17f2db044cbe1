"""The main job: one language model learns what users say from real dialogues, and what to say from real and imagined ones.

    python -m experiments.dream --workdir=W
    python -m experiments.dream --workdir=W --config.data=deal_or_no_deal --config.data_dir=DIR [--variant=paper]

The same command resumes an interrupted run from W; a finished one says so. The figures of both are in BUILD_NOTES.md.
"""

import functools
import time

import jax
import numpy as np

from mbrl_lm import app, config, learner, nn, report, rollout, sharding
from mbrl_lm import protocol as pr
from mbrl_lm.checkpoint import Checkpoints
from mbrl_lm.data.batches import batches, join, lengths, take, text_batches
from mbrl_lm.data.corpus import load_corpus
from mbrl_lm.envs.concierge import TRAIN_UIDS
from mbrl_lm.envs.true_user import TrueUser
from mbrl_lm.heldout import Heldout
from mbrl_lm.judge import make_judge
from mbrl_lm.metrics import Delayed, Writer, results
from mbrl_lm.replay import Replay
from mbrl_lm.sharding import pjit
from mbrl_lm.types import Dialogue


def dream(net: nn.Net, protocol: pr.Protocol, cfg: config.Config, params, real: Dialogue, key) -> Dialogue:
    """Continues real dialogues from one of their assistant points: a turn, the user's imagined reply, the next turn, ..."""
    point_key, write_key = jax.random.split(key)
    uid_B = jax.numpy.arange(cfg.imagine.batch, dtype=jax.numpy.uint32)
    rows = jax.tree.map(lambda x: x[uid_B % cfg.train.batch], real).replace(uid_B=uid_B)
    prompt = rollout.from_an_opening(protocol, rows, point_key)
    turns = max(2 * cfg.imagine.replies, 1)
    return rollout.imagine(
        net, protocol, params, prompt, write_key, tokens=cfg.tokens, turns=turns, temperature=cfg.imagine.temperature
    )


def main(run: app.Run):
    if run.finished():
        return
    cfg, began = run.config, time.monotonic()
    mesh = sharding.make_mesh(cfg.mesh)
    app.say(f"reading {cfg.data}")
    corpus = load_corpus(cfg, run.workdir)
    protocol, tokenizer = corpus.protocol, corpus.tokenizer
    net = nn.make_net(cfg.model, protocol.vocab_size)
    optimizer = learner.make_optimizer(cfg.train)
    seed = jax.random.key(cfg.seed)

    # What is compiled: the start, the two updates, imagination. Real dialogues with the true user are written turn by turn.
    init_state = functools.partial(learner.init_state, net, optimizer)
    init = pjit(init_state, mesh)
    begin_rl = pjit(learner.begin_rl, mesh, donate=(0,))
    by_likelihood = learner.compile_update(net, protocol, cfg, optimizer, mesh, rl=False)
    by_return = learner.compile_update(net, protocol, cfg, optimizer, mesh, rl=True)
    imagine = pjit(functools.partial(dream, net, protocol, cfg), mesh)
    user = TrueUser(cfg, net, protocol, tokenizer, mesh, cfg.collect.batch) if cfg.collect.every else None

    # Who it is judged by: held-out recordings, and someone that nothing was trained on.
    heldout = Heldout(net, protocol, tokenizer, mesh, corpus.val)
    app.say("getting ready to judge")
    judge = make_judge(cfg, net, corpus, mesh, run.workdir)

    # The data of a step are a function of (seed, step), but for the replay, which is saved with every checkpoint.
    switch, total = cfg.train.supervised_steps, cfg.train.supervised_steps + cfg.train.rl_steps
    online = cfg.train.batch // 2 if user else 0
    replay = Replay(max(cfg.collect.capacity, 1), cfg.tokens, cfg.turns)
    text_at = text_batches(cfg, cfg.seed, corpus.train, corpus.renamed)
    logged_at = batches(corpus.train, cfg.seed, cfg.train.batch - online)

    def real_at(step) -> Dialogue:
        if not online:
            return logged_at(step)
        return join([logged_at(step), replay.sample(cfg.seed, step, online)])

    def evaluate(state, dialogues, key):
        """Figures and dialogues to read."""
        figures = heldout.closed_loop(state.params)
        if judge is None or not dialogues:
            some = take(corpus.val, np.arange(cfg.train.batch) % len(corpus.val.uid_B))
            return figures, jax.device_get(retold(state.params, some, key))
        verdict = judge.evaluate(state.params, key, dialogues)
        return figures | verdict.figures, verdict.dialogues

    def retell(params, real, key):
        prompt = rollout.from_an_opening(protocol, real, key)
        return rollout.imagine(net, protocol, params, prompt, key, tokens=cfg.tokens, turns=4)

    retold = pjit(retell, mesh)

    def rendered(dialogues):
        return "\n".join(tokenizer.render(row) for row in dialogues.token_BT[: cfg.eval.samples].tolist())

    with Checkpoints(run.checkpoints, cfg.checkpoints) as checkpoints:
        start, before_s = checkpoints.latest(), 0.0
        if start is None:
            state = init(seed)
        else:
            shapes = sharding.abstract(jax.eval_shape(init_state, seed), mesh)
            start, state, arrays, meta = checkpoints.restore(shapes, replay.arrays())
            replay.load(arrays)
            before_s = meta["wall_s"]
        app.write_params(run.workdir / "params.txt", state.params)

        with Writer(run.workdir, total, start, show=("word_ppl/val", "user_nll/val", "true/return")) as writer:
            delayed = Delayed()

            def emit(line):
                if line is not None:
                    writer.write(*line)

            for step in range(start or 0, total):
                key = jax.random.fold_in(seed, step)
                if step < switch:
                    writer.phase("likelihood")
                    real = text_at(step)
                    state, metrics = by_likelihood(state, real, None, key)
                else:
                    writer.phase("imagination")
                    if step == switch:
                        state = begin_rl(state)
                    if user and (step - switch) % cfg.collect.every == 0:
                        uids = TRAIN_UIDS[replay.collected : replay.collected + cfg.collect.batch]
                        talk_key = jax.random.fold_in(key, 1)
                        replay.add(user.play(state.params, talk_key, uids, "train", cfg.imagine.temperature)[0])
                    real = real_at(step)
                    imagined = imagine(state.params, real, jax.random.fold_in(key, 2)) if cfg.imagine.batch else None
                    state, metrics = by_return(state, real, imagined, jax.random.fold_in(key, 3))

                done = step + 1
                writer.tick(done, int(lengths(real).sum()))
                if done % cfg.log_every == 0:
                    emit(delayed.push(done, metrics))
                if done < total and (done % cfg.eval.every == 0 or done == switch):
                    emit(delayed.flush())
                    figures, dialogues = evaluate(state, cfg.eval.dialogues, seed)
                    writer.write(done, figures | {"real_dialogues": len(corpus.train.uid_B) + replay.collected})
                    writer.samples(done, rendered(dialogues))
                stop = run.stop_requested()
                if stop or done % cfg.checkpoint_every == 0 or done == total:
                    emit(delayed.flush())
                    checkpoints.save(done, state, replay.arrays(), {"wall_s": before_s + time.monotonic() - began})
                if stop:
                    return

            writer.phase("last evaluation")
            figures, dialogues = evaluate(state, cfg.eval.final_dialogues, seed)
            figures |= heldout.open_loop(state.params, seed)
            figures |= {
                "real_dialogues": len(corpus.train.uid_B) + replay.collected,
                "gradient_steps": total,
                "logs/return": float(corpus.train.reward_BU.sum(axis=1).mean()),
            }
            writer.write(total, figures)
            writer.samples(total, rendered(dialogues))

    figures["wall_s"] = before_s + time.monotonic() - began
    page = report.write_report(run.workdir, figures, rendered(dialogues))
    results(run.workdir, figures)
    app.say(report.headline(run.workdir, figures))
    app.say(f"the report is {page}")


if __name__ == "__main__":
    app.run(main)
