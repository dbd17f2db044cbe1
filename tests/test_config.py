"""Presets work; parts that contradict each other are refused, and the message names a field to change."""

import pytest

from mbrl_lm import config, contradictions, presets

CONTRADICTIONS = [
    ("concierge", {"model.heads": 3}, "model.heads must divide"),
    ("concierge", {"widths": (0,)}, "widths are numbers of tokens"),
    ("concierge", {"widths": (1000,)}, "widths are numbers of tokens"),
    ("concierge", {"train.supervised_steps": 0, "train.rl_steps": 0}, "are both 0"),
    ("concierge", {"imagine.reward": ""}, "need imagine.reward"),
    ("concierge", {"imagine.reward": "split"}, "reads the outcome of deal_or_no_deal"),
    ("concierge", {"imagine.openings": 1.5}, "imagine.openings is a part"),
    ("concierge", {"imagine.candidates": 5}, "imagine.candidates must divide"),
    ("concierge", {"imagine.user": "nobody"}, "imagine.user is live, frozen, population or oracle"),
    ("concierge", {"imagine.refresh": 0}, "at least 1"),
    ("concierge", {"policy.loss": "luck"}, "policy.loss is"),
    ("concierge", {"policy.baseline": "luck"}, "policy.baseline is"),
    ("concierge", {"policy.baseline": "leave_one_out"}, "set imagine.candidates above 1"),
    ("concierge", {"train.rl_epochs": 0}, "train.rl_epochs"),
    ("concierge", {"world_model.loss": "luck"}, "world_model.loss"),
    ("concierge", {"world_model.tokens": "luck"}, "world_model.tokens"),
    ("concierge", {"world_model.goals": 1}, "world_model.goals is at least 2"),
    ("concierge", {"world_model.goals": -1}, "world_model.goals is at least 2"),
    ("concierge", {"train.supervised_steps": 0}, "found in the likelihood phase"),
    ("concierge", {"model.belief": 6}, "at most as many goals as there are"),
    ("concierge", {"model.belief": -1}, "at most as many goals as there are"),
    ("deal_or_no_deal", {"world_model.goals": 4}, "needs contexts that list items"),
    ("concierge", {"signal": "luck"}, "signal must be"),
    ("concierge", {"places": (1, 4)}, "places is FEWEST,MOST"),
    ("concierge", {"places": (5, 4)}, "places is FEWEST,MOST"),
    ("concierge", {"places": (4, 13)}, "places is FEWEST,MOST"),
    ("concierge", {"imagine.share": (0.5, 1.5)}, "imagine.share is FIRST,LAST"),
    ("concierge", {"imagine.share": (0.5,)}, "imagine.share is FIRST,LAST"),
    ("concierge", {"control": "luck"}, "control is user_gradient or predictability"),
    ("concierge", {"control": "user_gradient"}, "set imagine.user to live or population"),
    ("concierge", {"model.roles": "luck"}, "model.roles is"),
    ("concierge", {"model.value_heads": 0}, "model.value_heads must be"),
    ("concierge", {"guard.penalty": 0.1}, "set model.user_heads"),
    ("concierge", {"guard.truncation": 2.0}, "set model.user_heads"),
    ("concierge", {"guard.discriminator": 1.0}, "guard.discriminator is a probability"),
    ("concierge", {"guard.anchors": True, "collect.every": 0}, "set collect.every"),
    ("concierge", {"start": "somewhere", "train.supervised_steps": 0}, "set train.supervised_steps"),
    ("concierge", {"noise": 1.0}, "noise is a probability"),
    ("concierge", {"plan": "luck"}, "plan is none, rollouts, mpc or gumbel"),
    ("concierge", {"plan": "rollouts", "imagine.reward": "", "imagine.batch": 0}, "plan=rollouts asks for a reward"),
    ("concierge", {"planner.futures": 0}, "at least 1"),
    ("concierge", {"planner.depth": -1}, "may be negative"),
    ("concierge", {"planner.sides": 2}, "planner.sides=2 gives both sides of deal_or_no_deal values"),
    ("deal_or_no_deal", {"planner.sides": 3}, "planner.sides is 1 or 2"),
    ("deal_or_no_deal", {"planner.sides": 2, "planner.depth": 0, "plan": "mpc"}, "set planner.depth above 0"),
    ("deal_or_no_deal", {"planner.sides": 2, "planner.reward": "learned"}, "set planner.reward to split or sure_split"),
    ("concierge", {"planner.user": "luck"}, "planner.user is reference or live"),
    ("concierge", {"loss.distil": 1.0}, "set plan"),
    ("concierge", {"loss.distil": 1.0, "plan": "mpc", "imagine.user": "oracle"}, "to another than oracle"),
    ("concierge", {"imagine.user_temperature": 0.0}, "a temperature must be above 0"),
    ("chat_jsonl", {"train.renamed": 0.5}, "train.renamed needs"),
    ("deal_or_no_deal", {"data_dir": ""}, "give --config.data_dir"),
    ("deal_or_no_deal", {"noise": 0.1}, "data=concierge only"),
    ("deal_or_no_deal", {"signal": "rating"}, "data=concierge only"),
    ("deal_or_no_deal", {"signal": "outcome"}, "data=concierge only"),
    ("deal_or_no_deal", {"imagine.user": "oracle"}, "no true user to imagine with"),
    ("concierge", {"imagine.user": "oracle", "imagine.candidates": 2}, "once and to the end: set imagine.candidates=1"),
    ("concierge", {"imagine.user": "oracle", "imagine.replies": 0}, "once and to the end"),
    ("concierge", {"imagine.user": "oracle", "imagine.batch": 0}, "once and to the end"),
    ("deal_or_no_deal", {"imagine.sides": 3}, "imagine.sides is 1 or 2"),
    ("deal_or_no_deal", {"imagine.generosity": 0.1}, "set imagine.sides=2"),
    ("deal_or_no_deal", {"imagine.waste": 0.1}, "set imagine.sides=2"),
    ("deal_or_no_deal", {"imagine.sides": 2, "loss.distil": 1.0, "plan": "mpc"}, "set imagine.sides=1"),
    ("deal_or_no_deal", {"returns.token_discount": 0.0}, "returns.token_discount is in"),
    ("deal_or_no_deal", {"train.undropped": 1.0}, "train.undropped is a part"),
    ("deal_or_no_deal", {"planner.reward": "luck"}, "imagine.reward and planner.reward are learned, split, sure_split"),
    ("concierge", {"planner.reward": "sure_split"}, "reads the outcome of deal_or_no_deal"),
    ("concierge", {"imagine.sides": 2}, "set it to 1"),
    ("deal_or_no_deal", {"collect.every": 4}, "set collect.every=0"),
    ("chat_jsonl", {"eval.dialogues": 4}, "set eval.dialogues=0"),
]


def preset(data: str, variant: str = "default") -> config.Config:
    return config.override(presets.preset(data, variant), {"data_dir": "" if data == "concierge" else "somewhere"})


@pytest.mark.parametrize("data, variant", [(data, variant) for data, some in presets.PRESETS.items() for variant in some])
def test_presets_are_consistent(data, variant):
    contradictions.check(preset(data, variant))


@pytest.mark.parametrize("data, values, message", CONTRADICTIONS)
def test_contradictions_are_refused(data, values, message):
    with pytest.raises(config.ConfigError) as caught:
        contradictions.check(config.override(preset(data), values))
    assert message in str(caught.value)
