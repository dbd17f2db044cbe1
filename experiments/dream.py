"""The main job: one language model learns what users say from real dialogues, and what to say from real and imagined ones.

    python -m experiments.dream --workdir=W
    python -m experiments.dream --workdir=W --config.data=deal_or_no_deal --config.data_dir=DIR [--variant=paper]

The same command resumes an interrupted run from W; a finished one says so. The figures of both are in BUILD_NOTES.md.
"""

import dataclasses
import functools

import jax
import numpy as np

from mbrl_lm import app, config, deal, goals, learner, nn, outcome, rollout, sharding, trained
from mbrl_lm import protocol as pr
from mbrl_lm.data.batches import text_batches
from mbrl_lm.data.corpus import load_corpus
from mbrl_lm.envs import negotiation
from mbrl_lm.evaluation import Evaluation
from mbrl_lm.experience import Experience
from mbrl_lm.loop import Loop
from mbrl_lm.optimizer import make_optimizer
from mbrl_lm.planner import make_planner
from mbrl_lm.sharding import pjit
from mbrl_lm.types import Dialogue, TrainState

READINGS = 1  # of an imagined outcome from either seat, which takes a sixth of the time of all


def dream(net: nn.Net, protocol: pr.Protocol, cfg: config.Config, state: TrainState, real: Dialogue, key) -> Dialogue:
    """Continues real dialogues from one of their assistant points: a turn, the user's imagined reply, the next turn, ...

    Each point is continued `imagine.candidates` times; these rows stand together. With `loss.distil` a planner chooses the
    first turn, for the policy to imitate (expert iteration: Anthony et al. 2017).
    """
    point_key, write_key = jax.random.split(key)
    user = learner.imagined_user(cfg.imagine, state, jax.random.fold_in(key, 2))
    prompt = rollout.from_an_opening(protocol, real, point_key, cfg.imagine.openings)
    prompt = prompt.replace(uid_B=jax.numpy.arange(prompt.uid_B.shape[0], dtype=jax.numpy.uint32))
    turns = max(2 * cfg.imagine.replies, 1)
    own, users = cfg.imagine.temperature, cfg.imagine.user_temperature
    temperature_R = pr.temperatures(assistant=own, user=users, outcome=own)
    if cfg.loss.distil:
        words = state.reference if cfg.planner.user == "reference" else user
        plan = make_planner(cfg, net, protocol)
        prompt = plan(state.params, prompt, jax.random.fold_in(key, 3), temperature_R, words).dialogue
        turns -= 1
    return goals.imagine(
        cfg.world_model.goals, net, protocol, state.params, prompt, write_key, tokens=cfg.tokens, turns=turns,
        temperature=temperature_R, user=user, copies=cfg.imagine.candidates,
    )  # fmt: skip


def dream_of_both(
    net: nn.Net, protocol: pr.Protocol, cfg: config.Config, outcomes: int, state: TrainState, sides, key
) -> Dialogue:
    """Whole negotiations with an imagined user that has values of its own.

    The model speaks from either seat, and the user reads the outcome for both; the reward is the points of the deal, with a
    part of what it gives the other side, and less a part of what it leaves to neither.

    Args:
      net, protocol, cfg: of the run.
      outcomes: the most that a negotiation can have.
      state: of the run.
      sides: the prompts as the policy and as the user see them.
      key: of the samples.
    """
    user = learner.imagined_user(cfg.imagine, state, jax.random.fold_in(key, 2))
    speakers = state.params, state.params if user is None else user
    views = [rollout.View(net, params, side) for params, side in zip(speakers, sides, strict=True)]
    temperature_R = negotiation.temperatures(cfg.imagine.temperature)
    ours, theirs = rollout.converse(
        protocol, *views, key, tokens=cfg.tokens, temperature=temperature_R, copies=cfg.imagine.candidates
    )
    ours = outcome.read(net, protocol, speakers[1], ours, outcomes, READINGS)
    result = deal.result_for_both(ours, deal.values(theirs), outcomes)
    ended_B = jax.numpy.ones_like(ours.ended_B)  # who runs out of tokens has no deal
    return deal.earned(ours, deal.payoff(result, cfg.imagine)).replace(ended_B=ended_B, cut_B=~ended_B)


def main(run: app.Run):
    if run.finished():
        return
    cfg, seed = run.config, jax.random.key(run.config.seed)
    mesh = sharding.make_mesh(cfg.mesh)
    app.say(f"reading {cfg.data}")
    corpus = load_corpus(cfg, run.workdir)
    net = nn.make_net(cfg.model, corpus.protocol.vocab_size)
    optimizer = make_optimizer(cfg.train)

    # What is compiled: the two updates and imagination. Real dialogues with the true user are written turn by turn.
    settle, begin_rl, remember = (
        pjit(change, mesh, donate=(0,)) for change in (learner.settle, learner.begin_rl, learner.remember)
    )
    by_likelihood = learner.compile_update(net, corpus.protocol, cfg, optimizer, mesh, rl=False)
    undropped = learner.compile_update(net, corpus.protocol, cfg, optimizer, mesh, rl=False, dropout=False)
    by_return = learner.compile_update(net, corpus.protocol, cfg, optimizer, mesh, rl=True)

    # The data of a step are a function of (seed, step), but for the replay, which is saved with every checkpoint.
    switch, total = cfg.train.supervised_steps, cfg.train.supervised_steps + cfg.train.rl_steps
    text_at = text_batches(cfg, cfg.seed, corpus.train, corpus.renamed)
    plain = dataclasses.replace(cfg, plan="none")  # the policy itself talks and is judged; planners: experiments.evaluate
    experience = Experience(plain, net, corpus, mesh)
    if cfg.imagine.sides == 2:
        outcomes = negotiation.outcomes(experience.scenarios)
        imagine, prompts_at = functools.partial(dream_of_both, net, corpus.protocol, cfg, outcomes), experience.openings
    else:
        imagine, prompts_at = functools.partial(dream, net, corpus.protocol, cfg), experience.prompts
    imagine = pjit(imagine, mesh)

    app.say("getting ready to judge")
    evaluation = Evaluation(plain, net, corpus, mesh, run.workdir)
    take_over = functools.partial(trained.take_over, cfg, net, mesh) if cfg.start else None
    with Loop(run, mesh, learner.initialiser(cfg, net), total, experience.replay, take_over) as loop:
        for step in loop:
            key, since = jax.random.fold_in(seed, step), step - switch
            if since < 0:
                loop.phase("likelihood")
                real = text_at(step)
                learn = by_likelihood if since < -round(cfg.train.undropped * switch) else undropped
                loop.state, metrics = learn(loop.state, real, None, key)
                if since == -1 and cfg.train.averaged:
                    loop.state = settle(loop.state)
            else:
                loop.phase("imagination")
                if since == 0:
                    loop.state = begin_rl(loop.state)
                if cfg.collect.every and since % cfg.collect.every == 0:
                    loop.state = experience.collect(loop.state, jax.random.fold_in(key, 1))
                real = experience.batch(step)
                if cfg.imagine.user == "population" and since % cfg.imagine.refresh == 0:
                    loop.state = remember(loop.state, np.int32(since // cfg.imagine.refresh % cfg.imagine.population))
                imagined, imagine_key = None, jax.random.fold_in(key, 2)
                if cfg.imagine.user == "oracle":
                    imagined = experience.with_oracle(loop.state, imagine_key, step)
                elif cfg.imagine.batch:
                    imagined = imagine(loop.state, prompts_at(step), imagine_key)
                loop.state, metrics = by_return(loop.state, real, imagined, jax.random.fold_in(key, 3))
            loop.learnt(metrics, real)
            if loop.evaluates:
                figures, samples, _ = evaluation.interim(loop.state.params, seed, learner.judged_user(cfg, loop.state))
                loop.write(figures | experience.counts(loop.state), samples)
        if loop.finished:
            loop.phase("last evaluation")
            figures, samples, _ = evaluation.final(loop.state.params, seed, learner.judged_user(cfg, loop.state))
            figures |= experience.counts(loop.state) | {f"logs/{cfg.signal}": corpus.train.reward_BU.sum(axis=1).mean()}
            loop.write(figures, samples)
    if loop.finished:
        app.conclude(run, figures | {"wall_s": loop.wall_s}, samples)


if __name__ == "__main__":
    app.run(main)
