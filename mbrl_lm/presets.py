"""What the data sets and their variants have otherwise than the defaults of `config.py`.

`tiny` stands beside every real variant: the same paths in seconds.
"""

from mbrl_lm.config import Config, ConfigError, override

TINY = {
    "tokens": 96,
    "widths": (48,),
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.mlp_width": 48,
    "train.supervised_steps": 6,
    "train.rl_steps": 4,
    "train.batch": 8,
    "train.warmup": 2,
    "imagine.batch": 8,
    "collect.batch": 8,
    "collect.every": 2,
    "collect.capacity": 16,
    "partner.steps": 4,
    "eval.every": 5,
    "eval.rl_every": 0,
    "eval.dialogues": 8,
    "eval.final_dialogues": 16,
    "eval.user_dialogues": 16,
    "eval.samples": 2,
    "checkpoint_every": 4,
    "log_every": 2,
}
NEGOTIATION = {
    "turns": 16,
    "turn_tokens": 40,
    "tokenizer.min_count": 21,
    "model.dropout": 0.2,
    "imagine.reward": "split",
    "imagine.replies": 16,
    "collect.every": 0,
    "eval.temperature": 0.5,
    "eval.every": 400,
    "eval.final_dialogues": 800,
    "loss.assistant": 1.0,
    "loss.kl": 0.2,
    "train.supervised_steps": 1600,
    "train.renamed": 0.8,
    "train.rl_steps": 100,
    "train.rl_learning_rate": 1e-4,
}
PAPER = NEGOTIATION | {  # an hour on two cores
    "model.width": 160,
    "model.heads": 5,
    "model.kv_heads": 5,
    "model.mlp_width": 448,
    "model.dropout": 0.4,
    "train.weight_decay": 0.1,
    "train.renamed": 0.86,
    "train.supervised_steps": 3950,
    "train.undropped": 0.04,
    "train.rl_steps": 150,
    "partner.share": 0.1,
    "partner.steps": 1500,
}
NO_RL = {"train.rl_steps": 0, "imagine.batch": 0, "collect.every": 0, "eval.dialogues": 0, "eval.final_dialogues": 0}
CHAT = NO_RL | {  # recorded conversations without a reward: the world model and its supervised policy
    "tokens": 384,
    "turns": 16,
    "turn_tokens": 64,
    "tokenizer.kind": "unigram",
    "train.supervised_steps": 1000,
}
CONCIERGE = {  # 2,000 logged and 500 online dialogues; eleven minutes on one core, most of it in a start for all rows
    "places": (4, 5),
    "val_logs": 300,
    "tokens": 168,
    "turns": 9,
    "turn_tokens": 24,
    "widths": (112,),
    "model.layers": 2,
    "model.width": 64,
    "model.mlp_width": 128,
    "model.kv_heads": 4,
    "model.speakers": True,
    "model.match_taps": 8,
    "model.match_width": 32,
    "model.tracked": True,
    "model.belief": 5,
    "model.dropout": 0.05,
    "model.word_dropout": 0.25,
    "loss.policy": 20.0,  # the other losses' gradients are three to ten times as long: RL is what is learnt first
    "loss.kl": 0.1,
    "loss.trust": 1.0,
    "loss.end": 0.5,
    "train.renamed": 1.0,
    "train.supervised_steps": 1500,
    "train.averaged": True,
    "train.rl_steps": 250,
    "train.learning_rate": 6e-3,
    "train.weight_decay": 1.0,
    "train.rl_learning_rate": 2e-3,
    "train.batch": 16,
    "train.rl_batch": 8,
    "train.micro_batch": 8,
    "imagine.reward": "learned",
    "imagine.batch": 16,
    "imagine.openings": 0.5,
    "imagine.share": (0.7, 0.7),
    "imagine.user": "frozen",
    "world_model.goals": 5,
    "collect.every": 5,
    "collect.batch": 10,
    "eval.every": 750,
    "eval.rl_every": 50,
    "eval.dialogues": 256,
    "checkpoint_every": 750,
}
SHORT = CONCIERGE | {  # the main job of launch/local.sh: three rows and their starts in ten minutes
    "train.supervised_steps": 450,
    "train.rl_steps": 60,
    "imagine.batch": 40,
    "collect.every": 3,
    "collect.batch": 25,
    "eval.every": 1000,
    "eval.rl_every": 1000,
    "eval.final_dialogues": 256,
}
LARGE = CONCIERGE | {  # catalogues of four to eight places, and logs enough for them
    "places": (4, 8),
    "logs": 16000,
    "val_logs": 500,
    "tokens": 176,
    "widths": (88,),
    "model.layers": 3,
    "model.width": 128,
    "model.mlp_width": 256,
    "model.dropout": 0.0,
    "model.word_dropout": 0.0,
    "loss.policy": 2.0,
    "loss.kl": 0.01,
    "loss.trust": 0.3,
    "train.renamed": 0.0,
    "train.averaged": False,
    "train.weight_decay": 0.01,
    "train.rl_steps": 300,
    "train.learning_rate": 3e-3,
    "train.rl_learning_rate": 2e-4,
    "imagine.batch": 64,
    "imagine.user": "live",
    "world_model.goals": 0,
    "model.belief": 0,
}
PRESETS = {
    "concierge": {
        "default": CONCIERGE,
        "short": SHORT,
        "large": LARGE,
        "tiny": LARGE
        | TINY
        | {"logs": 200, "val_logs": 50, "tokens": 176, "widths": (88,), "train.rl_batch": 0, "train.averaged": True},
    },
    "deal_or_no_deal": {"default": NEGOTIATION, "paper": PAPER, "tiny": NEGOTIATION | TINY | {"collect.every": 0}},
    **{name: {"default": CHAT, "tiny": CHAT | TINY | NO_RL} for name in ("multiwoz", "sgd", "chat_jsonl")},
}


def preset(data: str, variant: str = "default") -> Config:
    """The config of a data set and variant, before any flag.

    Raises:
      ConfigError: if there is none of that name.
    """
    if data not in PRESETS:
        raise ConfigError(f"--config.data={data} is unknown: use one of {', '.join(PRESETS)}")
    if variant not in PRESETS[data]:
        raise ConfigError(f"--variant={variant} is unknown for {data}: use one of {', '.join(PRESETS[data])}")
    return override(Config(data=data), PRESETS[data][variant])
