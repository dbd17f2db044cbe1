"""One typed config for every experiment.

`--config.a.b=v` sets a field; what is not set comes from the preset of `--config.data` and `--variant`, in `presets.py`. A
config whose parts contradict each other is refused before anything is built, by `contradictions.py`.
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
    tracked: bool = False  # what the user has said that the context speaks of stays in view; asks match_taps
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
    belief: int = 0  # so many of the likeliest world_model.goals: the policy and the value are told how likely they are
    bins: int = 51  # of the value and reward heads, at symexp(linspace(-limit, limit))
    bin_limit: float = 3.0  # symexp(3) = 19


@dataclasses.dataclass
class Loss:
    """Weights of the joint objective; each component is normalised by its own count first."""

    policy: float = 2.0  # divided between real and imagined dialogues by imagine.share
    user: float = 1.0  # of real user tokens: the world model
    belief: float = 0.5  # of what the user may want, where model.belief tells the policy
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
    goals: int = 0  # at most so many items of its context, one of which a user wants and is imagined knowing; 0 = none
    shuffled: bool = False  # a placebo: the targets in RL are the user's turns of other dialogues; no views of its own


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
    token_discount: float = 1.0  # of an advantage, for each token that follows in its dialogue (Lewis et al. 2017)
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
    undropped: float = 0.0  # the last part of supervised_steps goes without dropout, at its low rates
    renamed: float = 0.0  # the first part of supervised_steps sees dialogues with what the task does not tell apart renamed
    rl_steps: int = 200
    rl_epochs: int = 1  # optimiser steps on the dialogues of one of them
    batch: int = 32  # real dialogues of an update, of full width
    rl_batch: int = 0  # the same of an update by return; 0 = as many
    micro_batch: int = 4  # rows per device of one pass of gradient accumulation; 0 = the whole batch at once
    optimizer: str = "muon"  # for the matrices of the trunk; adamw: for all parameters
    learning_rate: float = 2e-3
    rl_learning_rate: float = 3e-4
    value_rate: float = 1.0  # times the rate, that of the value heads
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
    sides: int = 1  # 2: in negotiations the imagined user has values of its own, speaks from that seat, and must agree
    generosity: float = 0.0  # sides=2: a point of the other side's counts so much; to a planner of one side, on average
    waste: float = 0.0  # sides=2: off the reward for each point that a deal leaves to neither: both together could have more


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
    future_tokens: int = 0  # a future of more tokens is cut, and worth its value; 0 = no limit
    kappa: float = 0.0  # off a candidate's worth for each standard deviation of its futures
    temperature: float = 0.0  # of the choice, by exp(worth / temperature); 0 = the best one; plan=gumbel: scale of the noise
    iterations: int = 3  # plan=mpc: rounds
    elites: int = 4  # plan=mpc: the best candidates, which the next round's begin like
    simulations: int = 16  # plan=gumbel
    budget: int = 0  # the most tokens that a decision may take, which futures or simulations are cut down to; 0 = no limit
    reward: str = ""  # a name in reward.REWARDS; that of imagine.reward, if none is given
    user: str = "reference"  # whose words the imagined user has: those of when RL began, or live, the present ones
    sides: int = 1  # 2: in negotiations the imagined user has values of its own, as what it has said makes them likely


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
    rl_every: int = 0  # the same while learning by return; 0 = as many
    dialogues: int = 128  # with the true user or the partner, while training
    final_dialogues: int = 512
    user_dialogues: int = 256  # on which the learned user is compared with the exact one
    temperature: float = 0.5
    split: str = "val"  # whose dialogues, and scenarios of negotiations, a run is judged by; or test
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


REWARDS = ("", "learned", "split", "sure_split")
PLANS = ("none", "rollouts", "mpc", "gumbel")
GROUPED = ("leave_one_out", "normalised")  # baselines over the candidates of one prompt


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
