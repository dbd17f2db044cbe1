"""The judge of a trained run: its policy with the true user, its user model against the exact one. One command, one page.

    python -m experiments.evaluate --workdir=W [--config.eval.final_dialogues=512] [--config.eval.temperature=0.5]
    python -m experiments.evaluate --workdir=W --config.plan=rollouts [--config.planner.candidates=8] ...

With a planner, the same users are talked to once more, and every turn is planned. Everything is written to W/evaluation.md
with its plots, and, once the run is finished, into W/results.json.
"""

import dataclasses

import jax
import numpy as np

from mbrl_lm import app, evaluation_report, judge, trained, yardsticks
from mbrl_lm.config import Config
from mbrl_lm.data.batches import rows_for
from mbrl_lm.data.encode import decode
from mbrl_lm.envs.concierge import TEST_UIDS, habits
from mbrl_lm.envs.learned_user import LearnedUser
from mbrl_lm.envs.true_user import TrueUser
from mbrl_lm.evaluation import Evaluation, language_drift
from mbrl_lm.types import Dialogue
from mbrl_lm.user_report import UserReport

POLICY_UIDS = TEST_UIDS[100_000:]  # users of the training types, on whom the learned user is tested


def concierge(cfg: Config, model: trained.Trained) -> dict[str, float]:
    """What can be said only where the true user is exactly known."""
    corpus, params, key = model.corpus, model.state.params, jax.random.key(cfg.seed)
    uids = POLICY_UIDS[: cfg.eval.user_dialogues]
    rows = rows_for(len(uids))
    user = LearnedUser(cfg, model.net, corpus.protocol, corpus.tokenizer, model.mesh)
    app.say("scripted assistants, with the true and the learned user")
    figures = yardsticks.with_true_user(cfg, TEST_UIDS[: cfg.eval.final_dialogues])
    if cfg.imagine.reward:
        imagination = judge.Imagination(cfg, model.net, corpus.protocol, model.mesh, rows)
        figures |= yardsticks.with_learned_user(cfg, corpus, imagination, user, params, key, uids)
    app.say("the learned user against the exact one")
    talk = TrueUser(cfg, model.net, corpus.protocol, corpus.tokenizer, model.mesh, rows)
    induced, _ = talk.play(params, key, uids, "train", cfg.eval.temperature)
    induced, imagined = decode(induced, corpus.tokenizer), []
    if cfg.imagine.reward:
        openings, temperature_R = talk.openings(uids, "train"), judge.temperatures(cfg)
        dialogues = imagination.imagined(params, openings, temperature_R, key, model.imagined_user(cfg))[1]
        imagined = decode(dialogues, corpus.tokenizer)
    for where, records in (("true", induced), ("imagined", imagined)):
        found = habits([(record.context, record.spoken, record.ended) for record in records]) if records else {}
        figures |= {f"habits/{where}/{name}": x for name, x in found.items()}
    compare = UserReport(user, params, corpus.protocol.vocab_size, model.mesh, cfg.seed)
    for where, records in (("recorded", decode(corpus.val, corpus.tokenizer)), ("policy", induced)):
        told = compare.report(records[: len(uids)], "train", cfg.noise)
        figures |= {f"user/{where}/{name}": x for name, x in told.items()}
    return figures


def planned(run: app.Run, model: trained.Trained, plain: Dialogue) -> dict[str, float]:
    """The same with every turn planned; what that gains with the same users, and costs."""
    cfg = run.config
    app.say(f"the same with plan={cfg.plan}")
    judge_ = judge.make_judge(cfg, model.net, model.corpus, model.mesh, run.workdir, model.planned_user(cfg))
    params, key = model.state.params, jax.random.key(cfg.seed)
    figures, dialogues = judge_.evaluate(params, key, cfg.eval.final_dialogues, model.imagined_user(cfg))
    told = {f"plan/{name}": x for name, x in figures.items() if name.startswith(("true/", "partner/"))}
    told |= {name: x for name, x in figures.items() if name.startswith("plan/")}
    gain_B = (dialogues.reward_BU - plain.reward_BU).sum(axis=1)
    return told | judge.interval("plan/gain", gain_B.astype(np.float64))


def main(run: app.Run):
    model = trained.load(run.config, run.workdir)
    params, seed = model.state.params, jax.random.key(run.config.seed)
    app.say(f"judging update {model.step} of {run.workdir}")
    plain = dataclasses.replace(run.config, plan="none")
    evaluation = Evaluation(plain, model.net, model.corpus, model.mesh, run.workdir)
    figures, samples, dialogues = evaluation.final(params, seed, model.imagined_user(plain))
    if run.config.plan != "none":
        figures |= planned(run, model, dialogues)
    if run.config.train.supervised_steps:  # else the reference is a network at its random start
        figures |= language_drift(model.net, model.corpus, model.mesh, params, model.state.reference, dialogues)
    if run.config.data == "concierge":
        figures |= concierge(plain, model)
    page = evaluation_report.write_page(run.workdir, model.step, figures, samples)
    for title, text in evaluation_report.tables(figures).items():
        app.say(f"\n{title}\n\n{text}")
    app.say("")
    app.record(run, figures)
    app.say(f"the page is {page}")


if __name__ == "__main__":
    app.run(main, of_run=True)
