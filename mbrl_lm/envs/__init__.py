"""Environments: text in, text out, batched on the host."""

from mbrl_lm.envs.concierge import Concierge

ENVS = {"concierge": Concierge}
