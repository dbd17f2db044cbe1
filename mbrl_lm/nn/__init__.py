"""Networks. The only place that imports flax.linen; everyone else sees `Net`, a tuple of pure functions."""

from mbrl_lm.nn.roles import make_net
from mbrl_lm.nn.transformer import Net

__all__ = ["Net", "make_net"]
