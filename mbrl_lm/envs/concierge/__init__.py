"""The concierge: an embedded world with an exactly known user, who looks for a place in a catalogue.

world.py       places, the catalogue (the assistant's context), the hidden goal
words.py       how everything is put into words, with probabilities
recogniser.py  what the user makes of the assistant's text
user.py        the user: a finite latent-state automaton
env.py         a batch of dialogues, rewards and ratings
assistants.py  scripted assistants;  logs.py  playing them, and the logs that learning starts from
habits.py      how dialogues go, read off their text
"""

from mbrl_lm.envs.concierge.assistants import Mixture, Oracle, Pleaser, Random, Strong
from mbrl_lm.envs.concierge.env import LOG_UIDS, ORACLE_UIDS, TEST_UIDS, TRAIN_UIDS, TURN_LIMIT, Concierge, Reply
from mbrl_lm.envs.concierge.habits import habits
from mbrl_lm.envs.concierge.logs import converse, logs, mean_interval, play
from mbrl_lm.envs.concierge.user import HELD_OUT_TYPES, TRAIN_TYPES
from mbrl_lm.envs.concierge.words import vocabulary

__all__ = [
    "HELD_OUT_TYPES", "LOG_UIDS", "ORACLE_UIDS", "TEST_UIDS", "TRAIN_TYPES", "TRAIN_UIDS", "TURN_LIMIT", "Concierge",
    "Mixture", "Oracle", "Pleaser", "Random", "Reply", "Strong", "converse", "habits", "logs", "mean_interval", "play",
    "vocabulary",
]  # fmt: skip
