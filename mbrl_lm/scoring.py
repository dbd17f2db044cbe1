"""Log-probabilities, entropies and head outputs of given dialogues, by teacher forcing; differentiable.

Likelihoods come in two kinds. `nll_BT` is the plain cross-entropy over the whole vocabulary: what perplexity and the world
model's loss are made of. `logp_BT` is the log-probability under the distribution that the sampling loop draws from (the
protocol's mask, the temperature): what policy gradients and importance ratios are made of, so that a ratio starts at 1.
"""

import flax.struct
import jax
import jax.numpy as jnp

from mbrl_lm import protocol as pr
from mbrl_lm.nn import Net
from mbrl_lm.types import Array, Dialogue, Heads, Params

CHUNK_LOGITS = 1 << 21  # logits of one chunk of T: enough to fill the cores, few enough to stay near the caches


@flax.struct.dataclass
class Scores:
    """Per token, given the tokens before it; position 0 (BOS) holds zeros. Heads are read *at* a token, having seen it."""

    nll_BT: Array  # f32, nats
    user_heads_nll_BTE: Array  # f32, the same of each user head
    logp_BT: Array  # f32, nats; 0 where the protocol does not allow the token
    entropy_BT: Array  # f32, of the sampling distribution
    kl_BT: Array  # f32, KL(this || reference) of the sampling distributions; zeros without a reference
    reference_logp_BT: Array  # f32, logp_BT under the reference
    slow_kl_BT: Array  # f32, KL(this || slow parameters); zeros without these
    allowed_BT: Array  # bool, the protocol lets this speaker write this token here
    likeliest_BT: Array  # bool, no token that is allowed here is likelier
    heads: Heads  # at every token; the logits among them are for nobody


def policy_logits(protocol: pr.Protocol, logits: Array, role: Array, place: Array, temperature: Array | float) -> Array:
    """The logits that are sampled from: what `role` may not write at `place` of its turn is at -1e30.

    `temperature` is one number, or one for each role.
    """
    temperature = jnp.broadcast_to(temperature, (len(pr.ROLES),))[role][..., None]
    return jnp.where(pr.may_write(protocol, role, place), logits / temperature, -1e30)


def _log_prob(logits_BTV: Array, token_BT: Array) -> Array:
    """Of tokens, over the whole vocabulary."""
    logits_BTV, token_BTV = jnp.broadcast_arrays(logits_BTV, token_BT[..., None])
    taken_BT = jnp.take_along_axis(logits_BTV, token_BTV[..., :1], axis=-1)[..., 0]
    return taken_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def _chunk_scores(net: Net, protocol: pr.Protocol, params, others, temperature, x):
    """Scores of the tokens of one chunk; `x` holds the trunk outputs one position *before* each token.

    `others`: parameters to compare with, the reference and the slow ones; their trunk outputs come in the same order.
    """
    trunk_BTD, others_BTD, token_BT, target_BT, author_BT, place_BT = x
    heads = net.heads(params, trunk_BTD, author_BT)
    logits_BTV = heads.logits_BTV

    def taken(a_BTV):
        return jnp.take_along_axis(a_BTV, token_BT[..., None], axis=-1)[..., 0]

    nll_BT = -_log_prob(logits_BTV, target_BT)
    masked_BTV = policy_logits(protocol, logits_BTV, author_BT, place_BT, temperature)
    allowed_BT = taken(masked_BTV) > -1e29
    logp_BTV = jax.nn.log_softmax(masked_BTV)
    p_BTV = jnp.exp(logp_BTV)
    entropy_BT = -jnp.sum(jnp.where(p_BTV > 0, p_BTV * logp_BTV, 0.0), axis=-1)
    out = {"nll_BT": nll_BT, "logp_BT": jnp.where(allowed_BT, taken(logp_BTV), 0.0), "entropy_BT": entropy_BT}
    out |= {
        "user_heads_nll_BTE": -_log_prob(heads.user_BTEV, target_BT[..., None]),
        "allowed_BT": allowed_BT,
        "likeliest_BT": allowed_BT & (taken(masked_BTV) >= jnp.max(masked_BTV, axis=-1)),
    }

    def beside(other, other_BTD):
        """The divergence from other parameters, and what they say of the token."""
        if other is None:
            return jnp.zeros_like(nll_BT), jnp.zeros_like(nll_BT)
        other_BTV = net.heads(other, other_BTD, author_BT).logits_BTV
        other_BTV = jax.nn.log_softmax(policy_logits(protocol, other_BTV, author_BT, place_BT, temperature))
        kl_BT = jnp.sum(jnp.where(p_BTV > 0, p_BTV * (logp_BTV - other_BTV), 0.0), axis=-1)
        return kl_BT, jnp.where(allowed_BT, taken(other_BTV), 0.0)

    (kl_BT, reference_logp_BT), (slow_kl_BT, _) = (beside(*other) for other in zip(others, others_BTD, strict=True))
    return out | {"kl_BT": kl_BT, "reference_logp_BT": reference_logp_BT, "slow_kl_BT": slow_kl_BT}


def score(
    net: Net,
    protocol: pr.Protocol,
    params: Params,
    dialogue: Dialogue,
    *,
    temperature: Array | float = 1.0,
    reference: Params | None = None,
    slow: Params | None = None,
    dropout_key: Array | None = None,
    target_BT: Array | None = None,
) -> Scores:
    """Scores every token of given dialogues.

    Logits exist for one chunk of T at a time and are recomputed in the backward pass: memory does not grow with T x V.

    Args:
      net: the network.
      protocol: the protocol; its masks enter `logp_BT`, `entropy_BT` and `kl_BT` only.
      params: differentiated.
      dialogue: (B, T).
      temperature: of the sampling distribution, one or per role.
      reference, slow: parameters to measure the KL divergence from; not differentiated.
      dropout_key: turns dropout on.
      target_BT: tokens whose `nll_BT` is asked for, if not the dialogue's own.
    """
    token_BT, author_BT = dialogue.token_BT, dialogue.author_BT.astype(jnp.int32)
    (B, T), V = token_BT.shape, protocol.vocab_size
    trunk_BTD = net.trunk(params, token_BT, dropout_key)
    others = jax.lax.stop_gradient((reference, slow))
    before_BTD = jnp.roll(trunk_BTD, 1, axis=1)
    others_BTD = tuple(None if p is None else jnp.roll(net.trunk(p, token_BT), 1, axis=1) for p in others)
    chunks = next(n for n in range(1, T + 1) if T % n == 0 and B * (T // n) * V <= CHUNK_LOGITS or n == T)

    def split(a):
        return a.reshape(B, chunks, T // chunks, *a.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def chunk_scores(x):
        return _chunk_scores(net, protocol, params, others, temperature, x)

    target_BT = token_BT if target_BT is None else target_BT
    x = (before_BTD, others_BTD, token_BT, target_BT, author_BT, pr.place_in_turn(dialogue.turn_BT))
    per_token = chunk_scores(x) if chunks == 1 else jax.lax.map(chunk_scores, jax.tree.map(split, x))
    if chunks > 1:
        per_token = jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(B, T, *a.shape[3:]), per_token)
    per_token = jax.tree.map(lambda a: a.at[:, 0].set(jnp.zeros((), a.dtype)), per_token)
    return Scores(**per_token, heads=net.heads(params, trunk_BTD))  # XLA drops the logits, which nothing reads
