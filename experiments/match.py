r"""One trained negotiator at the table with several partners, most of whom nothing was trained against.

    python -m experiments.match --workdir=M --config.start=RUN --config.data=deal_or_no_deal --config.data_dir=DIR \
        --variant=paper [--config.plan=rollouts --config.planner.candidates=10 ...] [--config.eval.split=test]

RUN is the directory of a run of experiments.dream; how its policy talks and plans is what this command says. The partners:

    p1         the likelihood model that RL began with, as in Lewis et al. (2017)
    p2         of another architecture and seed, fitted to scenarios that are nobody else's; these are few, and
               too few to read outcomes by, which rules do for it
    hard       a script that demands much and gives in slowly
    agreeable  a script that says little and takes what it gets
    self       the policy's own parameters in the other seat

Each partner's figures are kept in M as soon as they are there; the same command goes on with the others.
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np

from mbrl_lm import app, command_line, judge, metrics, trained
from mbrl_lm.config import Config, ConfigError
from mbrl_lm.data.batches import rows_for
from mbrl_lm.data.corpus import Corpus
from mbrl_lm.data.encode import decode
from mbrl_lm.envs import haggler, negotiation
from mbrl_lm.heldout import Heldout
from mbrl_lm.types import Dialogue, Params

PARTNERS = ("p1", "p2", *haggler.STYLES, "self")


def as_trained(cfg: Config) -> Config:
    """The config of the run at `cfg.start`, with this program's way of talking, planning and judging.

    Raises:
      ConfigError: there is no such run, or it is no negotiator.
    """
    if not cfg.start:
        raise ConfigError("--config.start=RUN is missing: it names the directory of the run that is to negotiate")
    theirs = command_line.read_config(pathlib.Path(cfg.start))
    if theirs.data != "deal_or_no_deal":
        raise ConfigError(f"--config.start={cfg.start} was trained on {theirs.data}: give a run of deal_or_no_deal")
    own = {name: getattr(cfg, name) for name in ("plan", "planner", "eval", "partner", "mesh", "seed")}
    return dataclasses.replace(theirs, start=theirs.start or cfg.start, **own)


def partner_of(name: str, cfg: Config, model: trained.Trained, likelihood: Params) -> judge.Opposite:
    """Who sits opposite.

    Args:
      name: one of PARTNERS.
      cfg: of the run.
      model: the negotiator.
      likelihood: what RL began with.
    """
    corpus = model.corpus
    if name in haggler.STYLES:
        return judge.Opposite(haggler.Haggler(name, corpus.tokenizer, corpus.protocol))
    if name != "p2":
        return judge.Opposite(model.net, model.state.params if name == "self" else likelihood)
    return judge.held_out_partner(cfg, corpus, model.mesh, pathlib.Path(cfg.start))


def messages(corpus: Corpus) -> set[str]:
    """What somebody wrote in the training data, as the model would."""
    code = corpus.tokenizer
    return {code.decode(code.encode(turn.text)) for record in corpus.train_records for turn in record.turns}


def said(dialogues: Dialogue, corpus: Corpus, known: set[str]) -> dict[str, float]:
    """How long the policy's messages are, and how many of them are among the known ones, in percent."""
    records = decode(dialogues, corpus.tokenizer)
    own = [turn.text for record in records for turn in record.turns if turn.role == "assistant" and turn.text]
    return {
        "words_a_message": float(np.mean([len(text.split()) for text in own])) if own else 0.0,
        "copied": 100 * float(np.mean([text in known for text in own])) if own else 0.0,
    }


def play(cfg: Config, model: trained.Trained, opposite: judge.Opposite, known: set[str]):
    """The figures of a policy with one partner, dialogues to read, and its points in each, in the scenarios' order."""
    corpus, scenarios = model.corpus, negotiation.scenarios(model.corpus.val_records)
    table = negotiation.Table(
        cfg, corpus.protocol, model.net, opposite.partner, model.mesh, scenarios, rows_for(cfg.eval.final_dialogues),
        imagined_user=model.planned_user(cfg), listener=opposite.listener,
    )  # fmt: skip
    results, dialogues = table.play(
        model.state.params, opposite.params, jax.random.key(cfg.seed), cfg.eval.final_dialogues, cfg.eval.temperature
    )
    figures = negotiation.summary(results) | said(dialogues, corpus, known) | negotiation.plan_cost(results)
    for side in ("score_a", "score_b"):
        figures[f"{side}_se"] = float(results[side].std(ddof=1) / np.sqrt(len(results[side])))
    samples = "\n".join(map(corpus.tokenizer.render, dialogues.token_BT[: cfg.eval.samples].tolist()))
    return figures, samples, results["score_a"].tolist()


def main(run: app.Run):
    if run.finished():
        return
    start = pathlib.Path(run.config.start)
    cfg = as_trained(run.config)
    model = trained.load(cfg, start)
    in_rl = model.step > cfg.train.supervised_steps
    likelihood = model.state.reference if in_rl else model.state.params
    known, commit, figures = messages(model.corpus), app.commit(), {}
    for name in PARTNERS:
        kept = run.workdir / f"{name}.json"
        if not kept.exists():
            app.say(f"at the table with {name}")
            opposite = partner_of(name, cfg, model, likelihood)
            found, samples, scores = play(cfg, model, opposite, known)
            metrics.write_atomic(run.workdir / f"{name}.txt", samples + "\n")
            metrics.write_atomic(kept, json.dumps({"commit": commit, "figures": found, "score_a": scores}) + "\n")
        found = json.loads(kept.read_text(encoding="utf-8"))["figures"]
        figures |= {f"{name}/{figure}": x for figure, x in found.items()}
        app.say(f"{name:<10} {found['score_a']:.2f} v {found['score_b']:.2f} points, {found['agreed']:.1f} % agreed, "
                f"{found['pareto']:.1f} % of the deals Pareto efficient")  # fmt: skip
        if run.stop_requested():
            return
    heldout = Heldout(model.net, model.corpus.protocol, model.corpus.tokenizer, model.mesh, model.corpus.val)
    figures |= heldout.closed_loop(model.state.params) | heldout.outcomes(model.state.params)
    metrics.results(run.workdir, figures)


if __name__ == "__main__":
    app.run(main)
