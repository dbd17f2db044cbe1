"""Which optimiser works on which parameter, and at what rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

from mbrl_lm import config, nn
from mbrl_lm.optimizer import ADAM_RMS, _trunk_matrices, make_optimizer

MODEL = config.Model(layers=2, width=32, heads=4, kv_heads=2, mlp_width=48)


@pytest.mark.parametrize("scanned", [False, True])
def test_the_trunks_matrices_are_read_off_their_letters(scanned):
    params = nn.make_net(config.Model(**{**MODEL.__dict__, "scan_layers": scanned}), 50).init(jax.random.key(0))
    axes = _trunk_matrices(params)
    block, s = axes["blocks" if scanned else "blocks_0"], int(scanned)
    assert block["attention"]["wq_DNH"] == MuonDimensionNumbers((s,), (s + 1, s + 2))
    assert block["attention"]["wo_NHD"] == MuonDimensionNumbers((s, s + 1), (s + 2,))
    assert block["mlp"]["down_FD"] == MuonDimensionNumbers((s,), (s + 1,))
    assert block["conv"]["tap_XD"] is None and block["norm_mlp"]["scale_D"] is None
    assert axes["embed_VD"] is axes["unembed_DV"] is axes["value_EDW"] is axes["end_D"] is None


def test_a_step_of_muon_turns_all_directions_alike_and_has_the_size_of_adams():
    params = nn.make_net(MODEL, 50).init(jax.random.key(0))
    train = config.Train(supervised_steps=0, rl_learning_rate=1.0, weight_decay=0.0, clip=1e9)
    optimizer = make_optimizer(train)
    gradient = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), params)
    step, _ = optimizer.update(gradient, optimizer.init(params), params)
    up_DF = np.asarray(step["blocks_0"]["mlp"]["up_DF"])
    singular = np.linalg.svd(up_DF, compute_uv=False)
    assert singular.max() / singular.min() < 2  # of the gradient it is about 9
    np.testing.assert_allclose(np.sqrt(np.mean(up_DF**2)), ADAM_RMS, rtol=0.2)
    assert np.ptp(np.abs(step["embed_VD"])) < 1e-3  # of Adam, whose first step has one size everywhere


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_value_heads_take_longer_steps(kind):
    params = nn.make_net(MODEL, 50).init(jax.random.key(0))
    gradient = jax.tree.map(jnp.ones_like, params)
    steps = []
    for factor in (1.0, 5.0):
        optimizer = make_optimizer(config.Train(supervised_steps=0, optimizer=kind, value_rate=factor))
        steps.append(optimizer.update(gradient, optimizer.init(params), params)[0])
    np.testing.assert_allclose(steps[1].pop("value_EDW"), 5 * steps[0].pop("value_EDW"), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, *steps)


def test_the_rate_falls_to_that_of_rl_and_then_to_a_tenth_of_it():
    train = config.Train(supervised_steps=10, rl_steps=20, warmup=2, learning_rate=1.0, rl_learning_rate=0.1)
    train.weight_decay = 0.0
    optimizer = make_optimizer(config.Train(**{**train.__dict__, "optimizer": "adamw"}))
    params = {"scale_D": jnp.ones(3)}
    state, sizes = optimizer.init(params), []
    for _ in range(31):
        step, state = optimizer.update({"scale_D": jnp.full(3, 0.01)}, state, params)
        sizes.append(float(-step["scale_D"][0]))
    np.testing.assert_allclose([sizes[i] for i in (0, 1, 2, 10, 20, 30)], [0, 0.5, 1.0, 0.1, 0.055, 0.01], atol=2e-3)
