"""What calibration has not seen of a network: sleeping units, experts without rows, batches that show nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq

ALONE = {"scale": jpfq.scale.MinMSE(), "finish": None, "shrinkage": None}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def apply(params, x):
    return jax.nn.relu(x @ params["a"] + params["b"]) @ params["c"]


@pytest.mark.slow
def test_units_that_sleep_keep_their_weights():
    """Units that are off on all 64 rows: as plain rounding has them, and new rows err no more than by it."""
    params = {"a": normal(0, 64, 256) / 8, "b": normal(4, 256) - 1.5, "c": normal(1, 256, 10) / 16}
    x, new = normal(9, 64, 64), normal(3, 2048, 64)
    found = {}
    for name, settings in {
        "plain": {"method": jpfq.MSQ()} | ALONE,
        "GPFQ": {"method": jpfq.GPFQ()} | ALONE,
        "best": {},
    }.items():
        found[name] = jpfq.quantize(apply, [x], [jpfq.Rule(".*", bits=8, **settings)], params=params)
    asleep = ~np.asarray(jax.nn.relu(x @ found["GPFQ"].params["a"] + params["b"])).any(0)
    assert found["GPFQ"].info["c"].dead == asleep.sum() > 40
    kernel = lambda name: np.asarray(found[name].params["c"])[asleep]
    np.testing.assert_array_equal(kernel("GPFQ"), kernel("plain"))
    error = lambda name: float(jnp.linalg.norm(apply(found[name].params, new) - apply(params, new)))
    assert error("best") < error("plain")


@pytest.mark.slow
def test_experts_are_counted_by_rows():
    """The third expert gets none: it is rounded to nearest, and the summary says so."""
    params = {"w": normal(0, 4, 16, 8)}
    x = normal(7, 4, 20, 16).at[2].set(0).at[1, 5:].set(0)
    model = lambda params, x: jnp.einsum("etd,edf->etf", x, params["w"])
    rules = [jpfq.Rule("w", bits=4, method=jpfq.GPFQ(), finish=None, shrinkage=None)]
    quantized = jpfq.quantize(model, [x, x], rules, params=params)
    info, tensor = quantized.info["w"], quantized.tensors["w"]
    np.testing.assert_array_equal(info.rows, [40, 10, 0, 40])
    assert info.dead == 16
    nearest = np.floor(np.asarray(params["w"])[2] / np.asarray(tensor.step)[2] + 0.5)
    np.testing.assert_array_equal(np.asarray(tensor.codes)[2], np.clip(nearest, -8, 7))
    assert (
        np.abs(np.asarray(quantized.params["w"])[2] - params["w"][2]) < 0.6 * np.asarray(tensor.step)[2]
    ).mean() > 0.95
    assert "Rows of the 4 matrices of w: 0 to 40. Rounded to nearest, as they have none: 2." in quantized.summary()


@pytest.mark.slow
@pytest.mark.parametrize("correct_bias", [False, True])
def test_small_and_large_inputs_give_the_same_codes(correct_bias):
    params = {"a": normal(0, 16, 8), "b": normal(1, 8), "c": normal(2, 8, 4)}
    codes = []
    for size in (1.0, 1e-20, 1e18):
        model = lambda params, x, size=size: ((x @ params["a"] + params["b"]) * size) @ params["c"]
        rule = jpfq.Rule(".*", bits=4, method=jpfq.GPFQ(), correct_bias=correct_bias, **ALONE)
        quantized = jpfq.quantize(model, [normal(3, 64, 16)], [rule], params=params)
        codes.append(np.asarray(quantized.tensors["c"].codes))
        assert quantized.info["c"].dead == 0
        assert 0.01 < quantized.info["c"].relative_error < 0.3
    np.testing.assert_array_equal(codes[1], codes[0])
    np.testing.assert_array_equal(codes[2], codes[0])


@pytest.mark.parametrize(
    "batch",
    [jnp.zeros((8, 16)), jnp.zeros((0, 16)), jpfq.Weighted(jnp.ones((8, 16)), jnp.zeros(8))],
    ids=["zeros", "no rows", "no weights"],
)
def test_batches_that_show_nothing_are_refused(batch):
    with pytest.raises(ValueError, match=r"The calibration data of a (show nothing|have no rows)"):
        jpfq.quantize(lambda params, x: x @ params["a"], [batch], 4, params={"a": normal(0, 16, 8)})
