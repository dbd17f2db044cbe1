"""One typed config for every experiment, and its presets.

`--config.a.b=v` sets a field; what is not set comes from the preset of `--config.data` and `--variant`. A config whose parts
contradict each other is refused by `check` before anything is built.
"""

import dataclasses
from dataclasses import field


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
    conv_width: int = 3  # causal depthwise convolution before each attention; 1 = none
    dropout: float = 0.0
    tied: bool = True  # the embedding is also the output layer
    scan_layers: bool = False  # one compiled layer scanned over; unrolled is faster on a CPU
    remat: bool = False  # recompute activations in the backward pass
    dtype: str = "float32"  # of the trunk: float32 or bfloat16
    bins: int = 51  # of the value and reward heads, at symexp(linspace(-limit, limit))
    bin_limit: float = 3.0  # symexp(3) = 19


@dataclasses.dataclass
class Loss:
    """Weights of the joint objective; each component is normalised by its own count first."""

    policy_real: float = 1.0
    policy_imagined: float = 1.0  # eta
    user: float = 1.0  # negative log-likelihood of real user tokens: the world model
    outcome: float = 1.0  # the same for the outcome of a negotiation
    assistant: float = 0.0  # the same for logged assistant tokens, once RL has begun
    value: float = 0.5
    reward: float = 0.5
    end: float = 0.1
    kl: float = 0.1  # beta, KL(policy || reference) on assistant tokens
    entropy: float = 0.0


@dataclasses.dataclass
class Returns:
    discount: float = 0.97  # per assistant turn
    lambda_: float = 0.95
    scale_floor: float = 1.0  # advantages are divided by max(floor, range of the returns)
    scale_decay: float = 0.99
    target_decay: float = 0.98  # of the slow critic, per update


@dataclasses.dataclass
class Train:
    supervised_steps: int = 600  # likelihood of both speakers, before RL begins; 0 = joint from the first step
    rl_steps: int = 200
    batch: int = 32  # real dialogues of an update
    micro_batch: int = 4  # rows per device of one pass of gradient accumulation; 0 = the whole batch at once
    learning_rate: float = 2e-3
    rl_learning_rate: float = 3e-4
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0


@dataclasses.dataclass
class Imagine:
    batch: int = 32  # imagined dialogues of an update; 0 = none
    replies: int = 4  # user replies that are imagined before the bootstrap value
    temperature: float = 1.0
    reward: str = ""  # a name in reward.REWARDS


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


@dataclasses.dataclass
class Eval:
    every: int = 100  # updates
    dialogues: int = 128  # with the true user or the partner, while training
    final_dialogues: int = 512
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
    tokens: int = 192  # T, of a dialogue
    turns: int = 12  # U, assistant turns of a dialogue
    turn_tokens: int = 32  # the most tokens of one turn
    cpu_devices: int = 2  # virtual devices when there is no accelerator
    checkpoint_every: int = 100  # updates
    checkpoints: int = 3  # kept
    log_every: int = 10
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    returns: Returns = field(default_factory=Returns)
    train: Train = field(default_factory=Train)
    imagine: Imagine = field(default_factory=Imagine)
    collect: Collect = field(default_factory=Collect)
    partner: Partner = field(default_factory=Partner)
    eval: Eval = field(default_factory=Eval)
    mesh: Mesh = field(default_factory=Mesh)
