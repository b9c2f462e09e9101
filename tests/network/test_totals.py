"""What a result says of itself: the size of the whole model, what was left, and errors on data held out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jpfq
from jpfq.network.size import in_bytes
from jpfq.network.summary import counted
from tests.network import zoo


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (24, 16):
            x = nn.LayerNorm()(nn.relu(nn.Dense(width)(x)))
        return nn.Dense(5, name="head")(x) + self.param("shift", nn.initializers.zeros, (1, 5))


BATCHES = [zoo.normal(i, 40, 12) for i in range(3)]
VARIABLES = Normed().init(jax.random.key(0), BATCHES[0])
RULES = [jpfq.Rule("head/.*", skip=True), zoo.plain(bits=4)]
NUMBERS = 12 * 24 + 24 * 16 + 16 * 5 + (24 + 16 + 5) + 2 * (24 + 16) + 5  # kernels, biases, norms, the shift


@pytest.fixture(scope="module")
def quantized():
    return jpfq.quantize(Normed(), BATCHES[:2], RULES, variables=VARIABLES, held_out=BATCHES[2:])


def test_size_counts_every_parameter(quantized):
    packed = (12 * 24 + 24 * 16) // 2 + 4 * (24 + 16)  # codes of four bits, and a step of float32 per neuron
    rest = 4 * (NUMBERS - 12 * 24 - 24 * 16)
    assert quantized.size == (NUMBERS, packed + rest, 4 * NUMBERS)
    assert quantized.size.bits_per_weight == 8 * (packed + rest) / NUMBERS > quantized.bits_per_weight
    assert str(quantized.size) == f"{(packed + rest) / 1e3:.3g} kB of {4 * NUMBERS / 1e3:.3g} kB"
    told = quantized.summary()
    assert f"{quantized.bits_per_weight:.2f} bits per weight ({packed} bytes)" in told
    assert f"the whole model to {quantized.size.bits_per_weight:.2f} ({quantized.size})" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        zoo.plain(bits=3),
        zoo.plain(grid=jpfq.Asymmetric(4), scale=jpfq.scale.MinMSE(per=jpfq.scale.PerGroup(4))),
        zoo.plain(bits=4, scale=jpfq.scale.AbsMax(per=jpfq.scale.PerTensor()), step_dtype=jnp.bfloat16),
    ],
)
def test_plan_gives_the_size_of_the_result(rule):
    rules = [jpfq.Rule("head/.*", skip=True), rule]
    plan = jpfq.plan(Normed(), BATCHES[0], rules, variables=VARIABLES)
    result = jpfq.quantize(Normed(), BATCHES[:1], rules, variables=VARIABLES)
    assert plan.size == result.size
    assert plan.packed == {path: tensor.nbytes for path, tensor in result.tensors.items()}
    assert f"the whole model to {result.size.bits_per_weight:.2f} ({result.size})" in str(plan)


def test_biases_and_norms_are_counted_and_kernels_listed(quantized):
    assert quantized.skipped == {
        "head/kernel": "rule 0 ('head/.*') skips it",
        "shift": "used by add, not as the weight of a product",
    }
    told = quantized.summary()
    assert "Also left: 5 biases and 2 norm scales." in told
    listed = [
        line.split()[0] for line in told.splitlines() if line.startswith((" head/kernel", " shift", " Dense_0/b"))
    ]
    assert listed == ["head/kernel", "shift"]
    assert counted(["a/bias", "b", "c/scale", "tau"]) == (
        "2 biases, 1 norm scale and 1 other parameter that no product uses"
    )


def test_sizes_read_as_people_write_them():
    words = {0: "0 bytes", 999: "999 bytes", 1000: "1 kB", 3_940: "3.94 kB", 999_499: "999 kB", 999_500: "1 MB"}
    assert {n: in_bytes(n) for n in words} == words
    assert in_bytes(27_100_000_000) == "27.1 GB"


def relative(exact, quantized):
    return np.linalg.norm(np.asarray(exact) - np.asarray(quantized)) / np.linalg.norm(np.asarray(exact))


@pytest.mark.slow
def test_plan_gives_the_size_of_a_stack():
    """One table and one float32 over the steps of the whole kernel, in whole bytes."""

    def model(params, x):
        run = lambda x, w: (jnp.tanh(x @ w), None)
        return jax.lax.scan(run, x, params["stack"])[0]

    params, batch = {"stack": zoo.normal(1, 3, 12, 12)}, zoo.normal(2, 9, 12)
    three = jpfq.Levels([-1, 0.5, 2])
    by_group = jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(4))
    for rule in (zoo.plain(grid=three), zoo.plain(grid=jpfq.E2M1(), scale=by_group, step_dtype=jnp.float8_e4m3fn)):
        plan = jpfq.plan(model, batch, rule, params=params)
        assert plan.size == jpfq.quantize(model, [batch], rule, params=params).size


@pytest.mark.slow
def test_held_out_error_is_that_of_the_outputs(quantized):
    """And not of the batches that codes were chosen on, whose error is another."""
    outputs = lambda variables, x: Normed().apply(variables, x)
    for error, data in (
        (quantized.held_out_error, BATCHES[2]),
        (quantized.output_error, jnp.concatenate(BATCHES[:2])),
    ):
        assert error == pytest.approx(relative(outputs(VARIABLES, data), outputs(quantized.variables, data)), rel=1e-4)
    told = quantized.summary()
    shares = quantized.output_error, quantized.held_out_error
    assert "{:.2%} on the calibration batches, {:.2%} on the batches held out".format(*shares) in told
    alone = jpfq.quantize(Normed(), BATCHES[:2], RULES, variables=VARIABLES)
    assert alone.held_out_error is None
    assert "held out" not in alone.summary()
    for path, tensor in alone.tensors.items():
        np.testing.assert_array_equal(tensor.codes, quantized.tensors[path].codes)


@pytest.mark.slow
def test_held_out_batches_round_inputs_and_correct_biases_too():
    rule = zoo.plain(bits=3, activation_bits=4, correct_bias=True)
    held = [jpfq.Weighted(BATCHES[2], jnp.arange(40) < 30), BATCHES[2][:7]]
    result = jpfq.quantize(Normed(), BATCHES[:2], rule, variables=VARIABLES, held_out=held)
    counted = jnp.concatenate([BATCHES[2][:30], BATCHES[2][:7]])
    expected = relative(Normed().apply(VARIABLES, counted), result.apply(counted))
    assert result.held_out_error == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_held_out_is_saved_and_forgotten_by_training(quantized, tmp_path):
    quantized.save(tmp_path / "saved")
    again = jpfq.load(tmp_path / "saved", Normed())
    assert again.held_out == quantized.held_out
    assert again.size == quantized.size
    assert quantized.tuned(quantized.params).held_out_error is None


@pytest.mark.parametrize("held", [[], [jnp.zeros((4, 11))], [jnp.zeros(12)], BATCHES[0]])
def test_held_out_batches_that_do_not_fit_are_named(held):
    with pytest.raises(ValueError, match=r"^held_out: "):
        jpfq.quantize(Normed(), BATCHES[:1], 4, variables=VARIABLES, held_out=held)
