"""Roundings: `Nearest` takes the level of least square distance and carries nothing."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import jpfq
from jpfq.scalar import Levels
from tests.reference import gpfq as reference


@jax.jit
def visit(step, a):
    return jpfq.Nearest()((), a, Levels(step, jnp.float32(0), jnp.float32(-3), jnp.float32(3)), None)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(-6, 6), st.integers(-64, 64))
def test_nearest_minimises_the_square_distance(exponent, sixteenths):
    step, a = 2.0**exponent, 2.0**exponent * sixteenths / 16
    levels = [step * k for k in range(-3, 4)]
    carry, code = visit(jnp.float32(step), jnp.float32(a))
    assert carry == ()
    assert code == reference.nearest(a, levels) - 3
    assert (a - step * float(code)) ** 2 == min((a - p) ** 2 for p in levels)


def test_nearest_is_a_stateless_setting_without_numbers():
    assert jpfq.Nearest().init() == ()
    assert not jpfq.Nearest.random
    assert jax.tree.leaves(jpfq.Nearest()) == []
    assert jpfq.Nearest() == jpfq.Nearest()


def test_mapped_over_neurons_it_is_encode():
    levels = Levels(*(jnp.float32(x) for x in (0.3, 0, -8, 7)))
    a = jnp.asarray(np.random.default_rng(0).standard_normal(50) * 3, jnp.float32)
    _, codes = jax.vmap(lambda x: jpfq.Nearest()((), x, levels, None))(a)
    np.testing.assert_array_equal(codes, levels.encode(a))
    assert len(set(codes.tolist())) > 10
