"""The page of `experiments.evaluate`: tables and plots, made from the flat figures alone."""

import pathlib
import re
from collections.abc import Mapping, Sequence

from mbrl_lm.metrics import write_atomic

Figures = Mapping[str, float]

# Figure -> what it is called on the page, in the order of the rows.
POLICY = {
    "true/success": "success", "true/success/seen": "success, user types seen in training",
    "true/success/held_out": "success, user types held out", "true/return": "return", "true/outcome": "of it: outcome",
    "true/turn_cost": "of it: cost of turns", "true/hallucination": "of it: hallucination",
    "true/injection": "of it: injection", "true/left": "users who left", "true/hallucinated": "false claims a dialogue",
    "true/injected": "dialogues with a rule broken", "true/turns": "assistant turns", "true/asked": "questions asked",
    "partner/score_a": "points", "partner/score_b": "the partner's points", "partner/agreed": "deals, %",
    "partner/pareto": "of them Pareto efficient, %", "partner/turns": "turns",
    "drift/policy_under_reference": "perplexity of the policy's words under the reference",
    "drift/recorded_under_reference": "perplexity of recorded assistant words under the reference",
    "drift/recorded_under_policy": "perplexity of recorded assistant words under the policy",
}  # fmt: skip
PLANS = {
    "success": "true/success", "return": "true/return", "points": "partner/score_a",
    "the partner's points": "partner/score_b", "deals, %": "partner/agreed", "of them Pareto efficient, %": "partner/pareto",
}  # fmt: skip
PLAN_COST = {
    "plan/gain": "gained with the same users", "plan/overrated": "expected above what came, when the first turn was chosen",
    "plan/tokens_a_turn": "tokens a turn", "plan/seconds_a_turn": "seconds a turn",
}  # fmt: skip
GAP = {
    "gap/total": "exploitation gap", "gap/user_model": "user-model part", "gap/reward_model": "reward-model part",
    "gap/total/seen": "the gap of seen types", "gap/total/held_out": "of held-out types",
}  # fmt: skip
USER = {
    "nll": "nats per token", "nll_floor": "exact floor, nats per token",
    "kl": "KL(true, learned) per turn, from what was said",
    "kl_enumerated": "KL(true, learned) per turn, summed over all answers", "ece/leaves": "calibration error: leaves",
    "ece/accepts": "calibration error: accepts", "ece/satisfied": "calibration error: satisfied",
    "error/leaves": "distance from the true probability: leaves", "error/accepts": "distance: accepts",
    "error/satisfied": "distance: satisfied",
    "correlation/leaves": "correlation with the true probability: leaves", "correlation/accepts": "correlation: accepts",
    "correlation/satisfied": "correlation: satisfied", "action_sensitivity": "nats lost after a swapped assistant turn",
    "distinct_1/real": "distinct words, real", "distinct_1/imagined": "distinct words, imagined",
    "distinct_2/real": "distinct pairs of words, real", "distinct_2/imagined": "distinct pairs of words, imagined",
    "discriminator_auc": "AUC of a fresh discriminator",
}  # fmt: skip
WHERE = {"recorded": "recorded dialogues", "policy": "dialogues of the policy"}
HABITS = {"true": "true user", "imagined": "learned user"}
FOOLED = {
    "true_user_true_reward": "true user", "learned_user_true_reward": "learned user, true reward",
    "learned_user_learned_reward": "learned user, learned reward",
}  # fmt: skip


def cell(figures: Figures, name: str) -> str:
    """A figure with its interval, "" if there is none."""
    if name not in figures:
        return ""
    text = f"{figures[name]:.3f}"
    return text + (f" [{figures[f'{name}_low']:.3f}, {figures[f'{name}_high']:.3f}]" if f"{name}_low" in figures else "")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned for the terminal; rows without any figure are left out."""
    rows = [row for row in rows if any(row[1:])]
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def tables(figures: Figures) -> dict[str, str]:
    """Title -> table, of those that there are figures for."""
    kinds = sorted(set(_parts(figures, r"true/success/(\w+)(?<!_low)(?<!_high)$")) - {"seen", "held_out"})
    policy = [(name, POLICY[name]) for name in POLICY] + [(f"true/success/{kind}", f"success, {kind}") for kind in kinds]
    scripted = _parts(figures, r"scripted/(\w+)/return$")
    fooled = _parts(figures, r"fooled/(\w+)/true_user_true_reward$")
    left = sorted({int(k) for k in _parts(figures, r"habits/\w+/offers/left_(\d+)$")})
    counts = {"asks": "questions a dialogue", "offers": "offers a dialogue"}
    counts |= {"contradictory": "turns before which what the user said fits no place"}
    for k in left:
        counts |= {
            f"offers/left_{k}": f"of the offers, with {k} places left",
            f"fits/left_{k}": f"of these, of a place left ({k})",
        }
    counts |= {"accepted/fits": "offers of a place left that users take", "accepted/misfits": "other offers that users take"}
    hidden = sorted({int(k) for k in _parts(figures, r"user/\w+/turn_nll/hidden_(\d+)$")})
    by_turn = sorted({int(u) for u in _parts(figures, r"user/\w+/turn_nll/turn_(\d+)$")})
    against = [f"{what}, {WHERE[where]}" for where in WHERE for what in ("learned", "floor")]

    def learned_and_floor(rest: str) -> list[str]:
        return [cell(figures, f"user/{where}/{x}/{rest}") for where in WHERE for x in ("turn_nll", "turn_nll_floor")]

    made = {
        "The policy with the true user": table(
            ("", "true user or partner"), [(label, cell(figures, name)) for name, label in policy]
        ),
        "The same with its turns planned": table(
            ("", "the policy", "planned"),
            [(label, *(cell(figures, name) for name in (of, f"plan/{of}"))) for label, of in PLANS.items()
             if f"plan/{of}" in figures]
            + [(label, "", cell(figures, name)) for name, label in PLAN_COST.items()],
        ),
        "Exploitation: four returns of the same policy": table(
            ("", "learned reward", "true reward"),
            [("learned user", *(cell(figures, f"imagined/{x}") for x in ("return", "true_return"))),
             ("true user", *(cell(figures, f"true/{x}") for x in ("learned_return", "return")))],
        ),
        "The gap and its parts": table(("", "return"), [(label, cell(figures, name)) for name, label in GAP.items()]),
        "What the policy finds out before it offers, with either user": table(
            ("", *HABITS.values()),
            [(label, *(cell(figures, f"habits/{where}/{name}") for where in HABITS)) for name, label in counts.items()],
        ),
        "Scripted assistants with the true user": table(
            ("", "success", "return"),
            [(name, *(cell(figures, f"scripted/{name}/{x}") for x in ("success", "return"))) for name in scripted],
        ),
        "Scripted assistants with either user: whom the planted exploit fools": table(
            ("return", *FOOLED.values()), [(name, *(cell(figures, f"fooled/{name}/{x}") for x in FOOLED)) for name in fooled]
        ),
        "The learned user": table(
            ("", *WHERE.values()),
            [(label, *(cell(figures, f"user/{where}/{name}") for where in WHERE)) for name, label in USER.items()],
        ),
        "Nats of a user turn, by turn": table(
            ("turn", *against), [(str(u + 1), *learned_and_floor(f"turn_{u}")) for u in by_turn]
        ),
        "Nats of a user turn after answers that were imagined, the floor's not seen": table(
            ("imagined", *against), [(str(k), *learned_and_floor(f"hidden_{k}")) for k in hidden]
        ),
    }  # fmt: skip
    return {title: text for title, text in made.items() if text}


def write_page(workdir: pathlib.Path, step: int, figures: Figures, samples: str) -> pathlib.Path:
    """Writes `evaluation.md` and `evaluation.png`.

    Args:
      workdir: the run directory.
      step: the update that was judged.
      figures: name -> number.
      samples: dialogues to read.
    """
    lines = [f"# {workdir.name}, update {step}", ""]
    if _plot(workdir / "evaluation.png", figures):
        lines += ["![the learned user against the true one](evaluation.png)", ""]
    for title, text in tables(figures).items():
        lines += [f"## {title}", "", text, ""]
    lines += ["## Dialogues of the policy", "", "```", samples.strip(), "```", ""]
    write_atomic(workdir / "evaluation.md", "\n".join(lines))
    return workdir / "evaluation.md"


def _parts(figures: Figures, pattern: str) -> list[str]:
    """The first group of every name that matches, once each, in order."""
    return list(dict.fromkeys(found[1] for name in figures if (found := re.match(pattern, name))))


def _plot(path: pathlib.Path, figures: Figures) -> bool:
    """Nats and hazard by turn, learned against true; returns whether there was anything to draw."""
    panels = [
        ("nats of a user turn", "turn_nll", "turn_nll_floor", "exact floor"),
        ("probability of walking away", "hazard", "hazard_true", "true"),
    ]
    if not _parts(figures, r"user/(\w+)/hazard/turn_"):
        return False
    import matplotlib  # slow to import, and needed once

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, axes = pyplot.subplots(1, len(panels), figsize=(10, 3.5), layout="constrained")
    for axis, (title, learned, true, label) in zip(axes, panels, strict=True):
        for where, colour in zip(WHERE, ("tab:blue", "tab:orange"), strict=True):
            for name, style, of in ((learned, "-", "learned"), (true, "--", label)):
                turns = sorted(int(u) for u in _parts(figures, rf"user/{where}/{name}/turn_(\d+)$"))
                values = [figures[f"user/{where}/{name}/turn_{u}"] for u in turns]
                axis.plot([u + 1 for u in turns], values, style, color=colour, marker=".", label=f"{of}, {WHERE[where]}")
        axis.set(title=title, xlabel="turn of the user", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    chart.savefig(path, dpi=120)
    pyplot.close(chart)
    return True
