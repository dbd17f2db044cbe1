"""Networks. The only place that imports flax.linen; everyone else sees `Net`, a tuple of pure functions."""

from mbrl_lm.nn.transformer import Net, make_net

__all__ = ["Net", "make_net"]
