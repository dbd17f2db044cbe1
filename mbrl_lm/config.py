"""One typed config for every experiment, and its presets.

`--config.a.b=v` sets a field; what is not set comes from the preset of `--config.data` and `--variant`. A config whose parts
contradict each other is refused by `check` before anything is built.
"""

import dataclasses
from dataclasses import field
from typing import Any


class ConfigError(ValueError):
    """A config that cannot work; the message says what to change."""


@dataclasses.dataclass
class Tokenizer:
    kind: str = "word"  # a SentencePiece model type: word, unigram or bpe
    vocab_size: int = 2048  # at most; special tokens come on top
    min_count: int = 1  # kind=word: rarer words are unknown
    model_file: str = ""  # a given .model file instead of one trained on the corpus


@dataclasses.dataclass
class Model:
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    mlp_width: int = 384
    conv_width: int = 5  # causal depthwise convolution before each attention; 1 = none
    speakers: bool = False  # every token is told whose turn it stands in
    match_taps: int = 0  # tokens that each head compares with those before any other token: for looking things up
    match_width: int = 24  # of the codes that tell tokens apart
    tracked: bool = False  # what the user has said of what the context holds stays in view; asks match_taps
    dropout: float = 0.0
    word_dropout: float = 0.0  # of whole embeddings
    tied: bool = False  # the embedding is also the output layer
    scan_layers: bool = False  # one compiled layer scanned over; unrolled is faster on a CPU
    remat: bool = False  # recompute activations in the backward pass
    dtype: str = "float32"  # of the trunk: float32 or bfloat16
    roles: str = "shared"  # weights of the two speakers; adapter: a bottleneck for each on one trunk; separate: two trunks
    adapter_width: int = 32  # roles=adapter
    value_heads: int = 1  # E; the target of each is the smaller of two random ones
    user_heads: int = 0  # an ensemble for the imagined user's uncertainty
    bins: int = 51  # of the value and reward heads, at symexp(linspace(-limit, limit))
    bin_limit: float = 3.0  # symexp(3) = 19


@dataclasses.dataclass
class Loss:
    """Weights of the joint objective; each component is normalised by its own count first."""

    policy: float = 2.0  # divided between real and imagined dialogues by imagine.share
    user: float = 1.0  # of real user tokens: the world model
    outcome: float = 1.0  # the same for the outcome of a negotiation
    assistant: float = 0.0  # the same for logged assistant tokens, once RL has begun
    value: float = 0.5  # of imagined dialogues
    value_real: float = 0.5
    slow_value: float = 0.0  # pulls the values to those of the slow critic
    reward: float = 0.5
    end: float = 0.1
    kl: float = 0.1  # beta, KL(policy || reference) on assistant tokens
    trust: float = 0.0  # the same with the slow parameters instead of the reference: a trust region that moves on
    entropy: float = 0.0
    distil: float = 0.0  # likelihood of the turns that `plan` chooses, with which imagined dialogues then begin


@dataclasses.dataclass
class WorldModel:
    """What is asked of the user's tokens."""

    loss: str = "nll"  # or mae: clipped, nothing for tokens likelier than the threshold
    threshold: float = 0.2
    tokens: str = "all"  # words: without the tokens that close a turn; closing: these alone
    adaptive: bool = False  # in RL the weight falls as the return rises: 1 - mean return / returns.best
    shuffled: bool = False  # a placebo: the targets in RL are the user's turns of other dialogues


@dataclasses.dataclass
class Policy:
    """How an advantage is formed, and what is done with it."""

    baseline: str = "value"  # mean: of recent returns; leave_one_out, normalised: the other candidates (imagined rows)
    loss: str = "reinforce"  # a name in policy.LOSSES
    clip: float = 0.2  # loss=ppo
    temperature: float = 0.3  # loss=awr


@dataclasses.dataclass
class Returns:
    discount: float = 0.97  # per assistant turn
    lambda_: float = 0.95
    vtrace: bool = False  # of real dialogues, what followed a turn counts as far as the policy would have followed, too
    scale_floor: float = 1.0  # advantages are divided by max(floor, range of the returns)
    scale_decay: float = 0.99
    target_decay: float = 0.98  # of the slow critic, per update
    best: float = 1.0  # the highest return there is


@dataclasses.dataclass
class Train:
    supervised_steps: int = 600  # likelihood of both speakers, before RL begins; 0 = joint from the first step
    averaged: bool = False  # these end with the average of the latest parameters, the slow ones, instead of the last
    renamed: float = 0.0  # the first part of supervised_steps sees dialogues with what the task does not tell apart renamed
    rl_steps: int = 200
    rl_epochs: int = 1  # optimiser steps on the dialogues of one of them
    batch: int = 32  # real dialogues of an update, of full width
    rl_batch: int = 0  # the same of an update by return; 0 = as many
    micro_batch: int = 4  # rows per device of one pass of gradient accumulation; 0 = the whole batch at once
    optimizer: str = "muon"  # for the matrices of the trunk; adamw: for all parameters
    learning_rate: float = 2e-3
    rl_learning_rate: float = 3e-4
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0


@dataclasses.dataclass
class Imagine:
    batch: int = 32  # imagined dialogues of an update; 0 = none
    share: tuple[float, float] = (0.5, 0.5)  # of the policy gradient, when RL begins and when it ends
    replies: int = 4  # user replies that are imagined before the bootstrap value
    candidates: int = 1  # K dialogues of each prompt
    openings: float = 0.0  # of the prompts so many end where the assistant first speaks, the others at any of its turns
    user: str = "live"  # the present model; frozen: as when RL began; population: past ones; oracle: the true user
    population: int = 4  # user=population: the newest so many
    refresh: int = 25  # user=population: updates between two of them
    temperature: float = 1.0
    user_temperature: float = 1.0  # below 1, imagined users say what is likely, and contradict themselves less
    reward: str = ""  # a name in reward.REWARDS


@dataclasses.dataclass
class Guard:
    """What keeps the policy from exploiting an inaccurate imagined user."""

    penalty: float = 0.0  # kappa, off the reward for each unit of the user heads' disagreement above what real turns show
    truncation: float = 0.0  # disagreement at which an imagined dialogue is cut, in the same units; 0 = none
    discriminator: float = 0.0  # an imagined turn less likely to be real than this is cut off; 0 = none
    anchors: bool = False  # imagined returns are mapped to the real ones of the same openings


@dataclasses.dataclass
class Planner:
    """How `plan` looks ahead before the assistant says something."""

    candidates: int = 8  # C, turns that are considered; plan=gumbel: at every node of the tree
    futures: int = 4  # M, imagined of each candidate
    depth: int = 2  # imagined user replies before the value, or of the tree; 0: the value where the assistant has spoken
    kappa: float = 0.0  # off a candidate's worth for each standard deviation of its futures
    temperature: float = 0.0  # of the choice, by exp(worth / temperature); 0 = the best one; plan=gumbel: scale of the noise
    iterations: int = 3  # plan=mpc: rounds
    elites: int = 4  # plan=mpc: the best candidates, which the next round's begin like
    simulations: int = 16  # plan=gumbel
    budget: int = 0  # the most tokens that a decision may take, which futures or simulations are cut down to; 0 = no limit
    user: str = "reference"  # whose words the imagined user has: those of when RL began, or live, the present ones


@dataclasses.dataclass
class Collect:
    """Real dialogues with the environment's true user; every one is counted."""

    every: int = 4  # updates between two collections; 0 = none
    batch: int = 16  # dialogues of one collection
    capacity: int = 512  # newest dialogues kept


@dataclasses.dataclass
class Partner:
    """Deal or No Deal: the other side at evaluation, trained on scenarios the learner never sees."""

    share: float = 0.2  # of the training scenarios
    steps: int = 600
    model: Model = field(default_factory=lambda: Model(layers=3, width=96, heads=3, kv_heads=3, mlp_width=256, dropout=0.2))


@dataclasses.dataclass
class Eval:
    every: int = 100  # updates
    dialogues: int = 128  # with the true user or the partner, while training
    final_dialogues: int = 512
    user_dialogues: int = 256  # on which the learned user is compared with the exact one
    temperature: float = 0.5
    samples: int = 4  # dialogues written out to be read


@dataclasses.dataclass
class Mesh:
    data: int = -1  # -1: all devices that are left
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass
class Config:
    data: str = "concierge"  # a name in data.DATASETS
    data_dir: str = ""  # where its raw files are; concierge needs none
    seed: int = 0
    logs: int = 2000  # dialogues of mediocre assistants that the embedded environment is learnt from
    val_logs: int = 500  # held out of them
    places: tuple[int, int] = (4, 8)  # the fewest and the most of the embedded environment's catalogues
    noise: float = 0.0  # in the embedded environment, the probability of a filler before each word of a user
    signal: str = "return"  # of the embedded environment; rating: of each single reply; outcome: all at the end
    control: str = ""  # negative controls: user_gradient, on user turns, too; predictability, as a reward
    plan: str = "none"  # how turns are chosen by programs that look at a run, and by loss.distil: rollouts, mpc, gumbel
    start: str = ""  # the directory of a run by whose likelihood phase this one begins
    tokens: int = 192  # T, of a dialogue
    widths: tuple[int, ...] = (48, 96)  # narrower batches for shorter dialogues, while both speakers are learnt
    turns: int = 12  # U, assistant turns of a dialogue
    turn_tokens: int = 32  # the most tokens of one turn
    cpu_devices: int = 2  # virtual devices when there is no accelerator
    checkpoint_every: int = 100  # updates
    checkpoints: int = 3  # kept
    log_every: int = 10
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    world_model: WorldModel = field(default_factory=WorldModel)
    policy: Policy = field(default_factory=Policy)
    returns: Returns = field(default_factory=Returns)
    train: Train = field(default_factory=Train)
    imagine: Imagine = field(default_factory=Imagine)
    guard: Guard = field(default_factory=Guard)
    planner: Planner = field(default_factory=Planner)
    collect: Collect = field(default_factory=Collect)
    partner: Partner = field(default_factory=Partner)
    eval: Eval = field(default_factory=Eval)
    mesh: Mesh = field(default_factory=Mesh)


PLANS = ("none", "rollouts", "mpc", "gumbel")
GROUPED = ("leave_one_out", "normalised")  # baselines over the candidates of one prompt

# What differs from the defaults above. `tiny` stands beside every real variant: the same paths in seconds.
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
    "train.renamed": 0.9,
    "train.supervised_steps": 3800,
    "train.rl_steps": 150,
    "partner.share": 0.1,
}
NO_RL = {"train.rl_steps": 0, "imagine.batch": 0, "collect.every": 0, "eval.dialogues": 0, "eval.final_dialogues": 0}
CHAT = NO_RL | {  # recorded conversations without a reward: the world model and its supervised policy
    "tokens": 384,
    "turns": 16,
    "turn_tokens": 64,
    "tokenizer.kind": "unigram",
    "train.supervised_steps": 1000,
}
CONCIERGE = {  # 2,000 logged and 500 online dialogues; ten minutes on one core, half of it in a start that rows share
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
    "train.rl_learning_rate": 1e-3,
    "train.batch": 16,
    "train.rl_batch": 8,
    "train.micro_batch": 8,
    "imagine.reward": "learned",
    "imagine.batch": 64,
    "imagine.openings": 0.5,
    "imagine.share": (0.7, 0.7),
    "collect.every": 5,
    "collect.batch": 10,
    "eval.every": 750,
    "eval.dialogues": 256,
    "checkpoint_every": 750,
}
SHORT = CONCIERGE | {  # the main job of launch/local.sh: three rows and their starts in ten minutes
    "train.supervised_steps": 1000,
    "train.rl_steps": 150,
    "collect.every": 3,
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


def override(cfg: Config, values: dict[str, Any]) -> Config:
    """Sets fields by their dotted names, in place."""
    for name, value in values.items():
        *groups, last = name.split(".")
        holder = cfg
        for group in groups:
            holder = getattr(holder, group)
        if not hasattr(holder, last):
            raise AttributeError(f"there is no field {name}")
        setattr(holder, last, value)
    return cfg


def check(cfg: Config) -> None:
    """Refuses a config whose parts contradict each other.

    Raises:
      ConfigError: naming the first contradiction and what to change.
    """
    model, train, imagine, planner = cfg.model, cfg.train, cfg.imagine, cfg.planner
    online = cfg.data == "concierge"
    negotiation = cfg.data == "deal_or_no_deal"
    rl = train.rl_steps > 0
    doubts = cfg.guard.penalty or cfg.guard.truncation
    for wrong, message in (
        (not online and not cfg.data_dir, f"--config.data={cfg.data} reads raw files: give --config.data_dir=DIR"),
        (cfg.signal not in ("return", "rating", "outcome"), "signal must be return, rating or outcome"),
        (not 2 <= cfg.places[0] <= cfg.places[-1] <= 12 or len(cfg.places) != 2, "places is FEWEST,MOST, from 2 to 12"),
        (not 0 <= cfg.noise < 1, "noise is a probability below 1"),
        (cfg.noise and not online, "noise is put into the users of data=concierge only"),
        (cfg.signal != "return" and not online, f"signal={cfg.signal} is known for data=concierge only"),
        (model.width % model.heads, "model.heads must divide model.width"),
        (model.heads % model.kv_heads, "model.kv_heads must divide model.heads"),
        ((model.width // model.heads) % 2, "model.width / model.heads must be even: rotary embeddings turn pairs"),
        (model.roles not in ("shared", "adapter", "separate"), "model.roles is shared, adapter or separate"),
        (model.value_heads < 1 or model.user_heads < 0, "model.value_heads must be at least 1, model.user_heads at least 0"),
        (model.bins % 2 == 0, "model.bins must be odd: one bin stands at 0"),
        (model.conv_width < 1, "model.conv_width must be at least 1, which is none"),
        (not 0 <= model.dropout < 1, "model.dropout is a probability below 1"),
        (not 0 <= model.word_dropout < 1, "model.word_dropout is a probability below 1"),
        (model.tracked and not model.match_taps, "model.tracked compares tokens: set model.match_taps above 0"),
        (model.dtype not in ("float32", "bfloat16"), "model.dtype must be float32 or bfloat16"),
        (train.optimizer not in ("muon", "adamw"), "train.optimizer must be muon or adamw"),
        (min(train.supervised_steps, train.rl_steps) < 0, "numbers of steps cannot be negative"),
        (train.supervised_steps + train.rl_steps == 0, "train.supervised_steps and train.rl_steps are both 0"),
        (min(train.batch, cfg.turns, cfg.tokens // 16) < 1, "train.batch and turns must be at least 1, tokens at least 16"),
        (any(not 1 <= w <= cfg.tokens for w in cfg.widths), "widths are numbers of tokens, from 1 to that of `tokens`"),
        (not 0 <= train.renamed <= 1, "train.renamed is a part of train.supervised_steps, between 0 and 1"),
        (
            train.renamed and not (online or negotiation),
            f"train.renamed needs names to change, and {cfg.data} has none: set it to 0",
        ),
        (cfg.turn_tokens < 2, "turn_tokens must be at least 2: a word and the hand-over"),
        (rl and imagine.batch and not imagine.reward, "imagined dialogues need imagine.reward; or set imagine.batch=0"),
        (imagine.reward == "split" and not negotiation, "imagine.reward=split reads the outcome of deal_or_no_deal"),
        (imagine.reward == "learned" and not cfg.loss.reward, "imagine.reward=learned needs loss.reward > 0"),
        (not 0 <= imagine.openings <= 1, "imagine.openings is a part of the prompts, between 0 and 1"),
        (imagine.replies < 0, "imagine.replies cannot be negative"),
        (
            imagine.user not in ("live", "frozen", "population", "oracle"),
            "imagine.user is live, frozen, population or oracle",
        ),
        (imagine.user == "oracle" and not online, f"{cfg.data} has no true user to imagine with: change imagine.user"),
        (
            len(imagine.share) != 2 or not all(0 <= x <= 1 for x in imagine.share),
            "imagine.share is FIRST,LAST, each between 0 and 1",
        ),
        (cfg.control not in ("", "user_gradient", "predictability"), "control is user_gradient or predictability, or empty"),
        (
            doubts and not model.user_heads,
            "guard.penalty and guard.truncation ask an ensemble: set model.user_heads to 5",
        ),
        (
            cfg.start and not train.supervised_steps,
            "start takes a likelihood phase over: set train.supervised_steps",
        ),
        (cfg.plan not in PLANS, f"plan is {', '.join(PLANS[:-1])} or {PLANS[-1]}"),
        (
            cfg.loss.distil and (cfg.plan == "none" or not imagine.batch),
            "loss.distil imitates a planner in imagined dialogues: set plan, and imagine.batch above 0",
        ),
        (
            cfg.loss.distil and (imagine.user == "oracle" or not imagine.replies),
            "loss.distil imitates what a planner chose in imagination: set imagine.user to another than oracle, "
            "imagine.replies above 0",
        ),
        (cfg.plan != "none" and not imagine.reward, f"plan={cfg.plan} asks for a reward: set imagine.reward"),
        (
            min(planner.candidates, planner.futures, planner.iterations, planner.elites, planner.simulations) < 1,
            "planner.candidates, futures, iterations, elites and simulations must be at least 1",
        ),
        (min(planner.depth, planner.kappa, planner.temperature, planner.budget) < 0, "no planner.* may be negative"),
        (planner.user not in ("reference", "live"), "planner.user is reference or live"),
        (cfg.guard.discriminator >= 1, "guard.discriminator is a probability below 1"),
        (cfg.guard.anchors and not cfg.collect.every, "guard.anchors needs real dialogues: set collect.every"),
        (min(imagine.population, imagine.refresh) < 1, "imagine.population and imagine.refresh must be at least 1"),
        (imagine.candidates < 1 or imagine.batch % imagine.candidates, "imagine.candidates must divide imagine.batch"),
        (cfg.policy.loss not in ("reinforce", "ppo", "awr", "cloning"), "policy.loss is reinforce, ppo, awr or cloning"),
        (cfg.policy.baseline not in ("value", "mean", *GROUPED), f"policy.baseline is value, mean, {' or '.join(GROUPED)}"),
        (
            cfg.policy.baseline in GROUPED and imagine.candidates == 1,
            f"policy.baseline={cfg.policy.baseline} compares candidates of one prompt: set imagine.candidates above 1",
        ),
        (train.rl_epochs < 1, "train.rl_epochs must be at least 1"),
        (cfg.world_model.loss not in ("nll", "mae"), "world_model.loss must be nll or mae"),
        (cfg.world_model.tokens not in ("all", "words", "closing"), "world_model.tokens is all, words or closing"),
        (min(imagine.temperature, imagine.user_temperature, cfg.eval.temperature) <= 0, "a temperature must be above 0"),
        (cfg.collect.every and not online, f"{cfg.data} has no true user to collect dialogues with: set collect.every=0"),
        (cfg.eval.dialogues and not (online or negotiation), f"{cfg.data} has nobody to judge it: set eval.dialogues=0"),
        (not 0 < cfg.partner.share < 1, "partner.share is a share of the scenarios, between 0 and 1"),
        (not 0 <= cfg.returns.discount <= 1, "returns.discount is in [0, 1]"),
        (not 0 <= cfg.returns.lambda_ <= 1, "returns.lambda_ is in [0, 1]"),
        (cfg.tokenizer.model_file and cfg.tokenizer.min_count > 1, "tokenizer.min_count has no effect with a model_file"),
    ):
        if wrong:
            raise ConfigError(message)
