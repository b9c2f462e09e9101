"""Work of NumPy in place of a program is done only where it is little and near."""

import jax
import jax.numpy as jnp
import numpy as np

from jpfq.matrix.host import LARGE, namespace, numpy_or_jit


@numpy_or_jit("power", unless=lambda x, power: power == 3)
def scaled(x, power):
    seen.append(type(x))
    return {"scaled": namespace(x).where(x > 0, x * 2**power, x), "given": None}


seen: list = []


def took(*args):
    """The kind of array that the function was given."""
    seen.clear()
    found = scaled(*args)
    assert isinstance(found["scaled"], jax.Array)
    assert found["given"] is None
    return seen[0] if seen else None


def test_small_arrays_of_this_machine_go_to_numpy_and_all_others_to_a_program():
    x = jnp.arange(-2.0, 3.0)
    assert took(x, 1) is np.ndarray
    assert took(x, 3) is not np.ndarray  # by its own word
    assert took(jnp.ones(LARGE), 1) is not np.ndarray
    jax.jit(lambda x: took(x, 1) is not np.ndarray or 1 / 0)(x)
    jax.vmap(lambda x: scaled(x, 1)["scaled"])(x[None])
    assert seen[-1] is not np.ndarray
    assert scaled(x, 1)["scaled"].tolist() == jax.jit(lambda x: scaled(x, 1)["scaled"])(x).tolist() == [-2, -1, 0, 2, 4]


def test_what_comes_out_lies_where_what_went_in_did():
    x = jnp.ones(4)
    assert not scaled(x, 1)["scaled"].committed
    there = jax.device_put(x, jax.devices()[0])
    out = scaled(there, 1)["scaled"]
    assert out.committed
    assert out.sharding == there.sharding


def test_what_goes_beyond_a_type_is_silent_as_in_jax():
    assert scaled(jnp.full(2, 3e38, jnp.float32), 2)["scaled"].tolist() == [np.inf] * 2
