"""Inputs of layers in the formats of weights: FP8 per row, MXFP4, NVFP4 and integers in blocks along the inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jpfq
from jpfq.calibrate.activation import ActivationQuantizer, choose
from jpfq.matrix.layout import ConvLayout, DotLayout
from tests.network import zoo
from tests.reference import inputs as reference

MX = jpfq.Activations(jpfq.E2M1(), group=32, step_dtype=jnp.float8_e8m0fnu)
NV = jpfq.Activations(jpfq.E2M1(), group=16, step_dtype=jnp.float8_e4m3fn)
FP8 = jpfq.Activations(jpfq.E4M3(), per="row")
INT4 = jpfq.Activations(jpfq.Integer(4), group=8)


run = jax.jit(lambda quantizer, x: quantizer(x))


def dense(n):
    return DotLayout((n, 4), (0,), (), (1,), (), False)


def skewed(seed, *shape):
    """Numbers of very different size along the last axis and from row to row."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * rng.lognormal(0, 2, shape[-1]) * rng.lognormal(0, 3, (*shape[:-1], 1))
    return jnp.asarray(x, jnp.float32)


def rounded(activations, x, layout=None, unit=None):
    quantizer = ActivationQuantizer(activations, layout or dense(x.shape[-1]), None, unit)
    return np.asarray(run(quantizer, x), np.float64)


def expected(activations, x, unit=None):
    """The same by the reference."""
    name, n = type(activations.grid).__name__, x.shape[-1]
    if activations.step_dtype == np.dtype(jnp.float8_e8m0fnu):
        steps = lambda largest: reference.powers(largest, 6.0)
    elif activations.step_dtype == np.dtype(jnp.float8_e4m3fn):
        steps = lambda largest: reference.nvfp4_steps(largest, unit)
    else:
        steps = lambda largest: largest / (7 if name == "Integer" else 448)
    levels = np.arange(-8.0, 8) if name == "Integer" else reference.values(name)
    return reference.in_blocks(x, activations.group or n, steps, levels)


@pytest.mark.parametrize("activations", [MX, NV, FP8, INT4], ids=lambda a: a.where)
@pytest.mark.parametrize("n", [64, 40])
def test_blocks_and_rows_are_those_of_the_reference(activations, n):
    """40 inputs leave a short block behind, for which zeros stand that move nothing."""
    x = skewed(0, 50, n).at[3].set(0)
    unit = reference.unit_of(float(jnp.abs(x).max()) / 6)
    found = rounded(activations, x, unit=jnp.float32(unit) if activations is NV else None)
    np.testing.assert_allclose(found, expected(activations, x, unit), rtol=3e-7)
    assert (found[3] == 0).all()
    if activations.step_dtype == np.dtype(jnp.float8_e8m0fnu):  # powers of two: every product is exact
        assert (found == expected(activations, x)).all()


@given(st.lists(st.integers(-256, 256), min_size=24, max_size=24), st.integers(-20, 20))
@settings(max_examples=60, deadline=None)
def test_ties_go_up_and_all_else_is_the_cast_of_ml_dtypes(numbers, exponent):
    """In a block with step 2^exponent; the cast takes the even neighbour at ties."""
    x = np.array([4.0, *numbers]) / 64 * 2.0**exponent
    x[0] = 4.0 * 2.0**exponent  # the largest: the step is 2^exponent exactly
    x = np.clip(x, -x[0], x[0])
    activations = dataclasses.replace(MX, group=None, per="row")
    found = rounded(activations, jnp.asarray(x, jnp.float32)[None])[0]
    step = 2.0**exponent
    cast = (x / step).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * step
    levels = reference.values("E2M1") * step
    tie = np.isin(x, (levels[1:] + levels[:-1]) / 2)
    assert (found[~tie] == cast[~tie]).all()
    assert (found[tie] > x[tie]).all()


def test_fp8_per_row_is_the_cast_of_ml_dtypes():
    x = skewed(1, 40, 96)
    step = np.abs(np.asarray(x, np.float64)).max(1, keepdims=True) / 448
    cast = (np.asarray(x) / step).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * step
    np.testing.assert_allclose(rounded(FP8, x), cast, rtol=3e-7)


def test_the_unit_of_nvfp4_is_that_of_the_largest_step_seen():
    """Rows of weight 0 do not count; later rows beyond it saturate, on the largest step that there is."""
    x = skewed(2, 30, 32)
    x = x.at[7].set(1e6)
    weights = jnp.ones((30, 1)).at[7].set(0)
    quantizer = choose(NV, dense(32), lambda: [(x, weights)])
    seen = jnp.abs(jnp.delete(x, 7, axis=0)).max()
    unit = reference.unit_of(float(seen) / 6)
    assert float(quantizer.unit) == unit
    found = np.asarray(quantizer(x), np.float64)
    np.testing.assert_allclose(np.delete(found, 7, 0), expected(NV, jnp.delete(x, 7, axis=0), unit), rtol=3e-7)
    np.testing.assert_allclose(found[7], 6 * 448 * unit)


@pytest.mark.parametrize("activations", [MX, FP8, INT4, NV], ids=lambda a: a.where)
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(activations, wrong):
    x = skewed(3, 2, 64).at[1, 5].set(wrong)
    found = rounded(activations, x, unit=jnp.float32(1) if activations is NV else None)
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1, 5])
    size = activations.group or 64
    assert np.isnan(found[1, :size]).all()
    assert np.isfinite(found[1, size:]).all()


@pytest.mark.parametrize("step_dtype", [None, jnp.float16, jnp.float8_e8m0fnu])
def test_zero_stays_a_level_whatever_steps_are_stored_in(step_dtype):
    """Zero points are fitted to the stored steps: a power of two may be less than what reaches from end to end."""
    x = jnp.abs(skewed(8, 200, 8)) * jnp.array([[1.0], [-1.0]] * 100)
    x = x.at[:, 0].set(0)
    found = rounded(jpfq.Activations(jpfq.Asymmetric(4), per="row", step_dtype=step_dtype), x)
    assert (found[:, 0] == 0).all()
    off = np.abs(found - x).max(1) / np.abs(x).max(1)
    assert off.max() < (0.55 / 15 if step_dtype != jnp.float8_e8m0fnu else 0.26)
    if step_dtype is None:
        np.testing.assert_allclose(found, reference.asymmetric(x, 4), rtol=1e-5)


def test_blocks_lie_along_the_inputs_of_every_kind_of_product():
    x = skewed(4, 3, 6, 4, 16)
    heads = DotLayout((4, 16, 8), (0, 1), (), (2, 3), (), False)  # two axes are contracted: 64 inputs in their order
    flat = np.asarray(x).reshape(18, 64)
    assert (rounded(MX, x, heads).reshape(18, 64) == expected(MX, flat)).all()
    first = DotLayout((6, 16, 8), (1,), (0,), (3,), (1,), False)  # a batch of matrices
    short = dataclasses.replace(MX, group=8)
    assert (rounded(short, x, first) == expected(short, np.asarray(x))).all()
    shape, specs = (3, 3, 16, 8), ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    ones = (1, 1)
    conv = ConvLayout(shape, ones, ((1, 1), (1, 1)), ones, ones, *specs, 1)
    assert (rounded(short, x, conv) == expected(short, np.asarray(x))).all()  # channels at each place
    grouped = ConvLayout((3, 3, 8, 8), ones, ((1, 1), (1, 1)), ones, ones, *specs, 2)
    wide = dataclasses.replace(MX, group=12)  # wider than the 8 channels of a group, which it does not leave
    assert (rounded(wide, x, grouped) == expected(short, np.asarray(x))).all()


def test_a_rotation_is_undone_after_rounding():
    x, rotation = skewed(5, 20, 48), jpfq.Hadamard(seed=3)
    R = np.asarray(rotation.rotate_rows(jnp.eye(48)), np.float64)
    np.testing.assert_allclose(R @ R.T, np.eye(48), atol=1e-6)
    np.testing.assert_allclose(rotation.rotate(x.T).T, rotation.rotate_rows(x), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(rotation.unrotate_rows(rotation.rotate_rows(x)), x, rtol=1e-4, atol=1e-3)
    found = rounded(dataclasses.replace(INT4, rotation=rotation), x)
    turned = np.asarray(rotation.rotate_rows(x))
    by_hand = expected(INT4, turned) @ R.T
    np.testing.assert_allclose(found, by_hand, rtol=1e-3, atol=1e-5 * np.abs(by_hand).max(1).max())


def test_derivatives_pass_straight_through_blocks():
    x = skewed(6, 4, 64)
    for activations in (INT4, dataclasses.replace(INT4, rotation=jpfq.Hadamard())):
        quantizer = ActivationQuantizer(activations, dense(64), None)
        along, against = zoo.normal(1, 4, 64), zoo.normal(2, 4, 64)
        both = lambda x, along, against: (jax.jvp(quantizer, (x,), (along,))[1], jax.vjp(quantizer, x)[1](against)[0])
        forwards, backwards = jax.jit(both)(x, along, against)
        np.testing.assert_allclose(forwards, along, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(backwards, against, rtol=1e-4, atol=1e-5)


def two_layers(n=64):
    params = {"a": zoo.normal(20, n, 32) / 8, "b": zoo.normal(21, 32, 6) / 6}
    return lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, zoo.batches(48, n, count=2)


@pytest.mark.parametrize("activations", [NV, pytest.param(FP8, marks=pytest.mark.slow)], ids=["nvfp4", "fp8"])
def test_the_network_runs_what_was_calibrated(activations, tmp_path):
    """`apply` is the reference's network; a saved result and packed kernels compute the same."""
    model, params, batches = two_layers()
    quantized = jpfq.quantize(model, batches, zoo.plain(bits=6, activations=activations), params=params)
    kernels = [np.asarray(quantized.params[name], np.float64) for name in "ab"]
    units = [quantized.inputs[name][0].unit for name in "ab"]
    assert all((unit is not None) == (activations is NV) for unit in units)
    units = [1.0 if unit is None else float(unit) for unit in units]
    hidden = np.tanh(expected(activations, batches[0], units[0]) @ kernels[0])
    by_hand = expected(activations, hidden, units[1]) @ kernels[1]
    found = quantized.apply(batches[0])
    error = np.abs(found - by_hand).max(1)
    assert np.median(error) < 1e-5 * np.abs(by_hand).max()
    assert error.max() < 0.05 * np.abs(by_hand).max()  # a tie moves one entry by one level
    exact = np.concatenate([model(params, b) for b in batches])
    off = np.concatenate([quantized.apply(b) for b in batches]) - exact
    assert quantized.output_error == pytest.approx(np.linalg.norm(off) / np.linalg.norm(exact), rel=1e-3)
    quantized.save(tmp_path / "saved")
    again = jpfq.load(tmp_path / "saved", model)
    assert again.inputs["a"][0].settings == quantized.inputs["a"][0].settings
    np.testing.assert_array_equal(again.apply(batches[0]), found)
    np.testing.assert_allclose(quantized.serve()(batches[0]), found, rtol=1e-4, atol=1e-4)
    assert (
        activations.where
        in jpfq.plan(model, batches[0], zoo.plain(bits=6, activations=activations), params=params).__str__()
    )


@pytest.mark.slow
def test_outlying_inputs_lose_less_in_smaller_blocks_and_rotated():
    model, params, batches = two_layers()
    batches = [b.at[:, 5].multiply(30) for b in batches]

    def error(activations, **more):
        rule = zoo.plain(bits=8, activations=activations, **more)
        return jpfq.quantize(model, batches, rule, params=params).output_error

    row = error(jpfq.Activations(jpfq.Integer(4), per="row"))
    assert error(INT4) < 0.7 * row
    rotation = jpfq.Hadamard()
    rotated = jpfq.Activations(jpfq.Integer(4), per="row", rotation=rotation)
    assert error(rotated, rotation=rotation) < 0.8 * row


def test_formats_round_inputs_in_their_own_way():
    activations = lambda name, *args: getattr(jpfq.formats, name)(*args, activations=True)[0].activations
    assert activations("mxfp4") == MX
    assert activations("nvfp4") == NV
    assert activations("fp8") == FP8
    assert activations("int4", 8) == INT4
    assert activations("int8") == jpfq.Activations(jpfq.Integer(8), per="row")
    for name in ("q4_0", "q8_0"):
        assert activations(name) == jpfq.Activations(jpfq.Integer(8), group=32, step_dtype=jnp.float16)
    assert jpfq.formats.mxfp4(activations=False)[0].activations is None
    assert jpfq.formats.mxfp4(activations=INT4)[0].activations is INT4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jpfq.Activations(group=0), "a positive number of inputs"),
        (lambda: jpfq.Activations(per="group"), r"per='group' goes with group=\.\."),
        (lambda: jpfq.Activations(per="row", group=8), r"per='row' and group=8"),
        (lambda: jpfq.Activations(jpfq.E2M1(), step_dtype=jnp.float8_e8m0fnu), "whose steps calibration fixes"),
        (lambda: jpfq.Activations(jpfq.E2M1(), per="row", step_dtype=jnp.int8), "step_dtype is one of"),
        (lambda: jpfq.Activations(rotation=jpfq.Hadamard()), "rotation goes with steps taken while"),
        (lambda: jpfq.Activations(per="row", rotation=True), r"rotation is a jpfq.Hadamard\(\); got True"),
        (lambda: jpfq.Activations(range=jpfq.ranges.KL(), group=8), r"range of each group is its own Max\(\)"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_no_integer_is_refused():
    sums = {"bits": 4, "accumulator": jpfq.Accumulator(16, tile=8)}
    with pytest.raises(ValueError, match=r"a step for each block of 8, so the sums of their codes are not"):
        jpfq.Rule(".*", activations=INT4, **sums)
    rotated = jpfq.Activations(jpfq.Integer(4), per="row", rotation=jpfq.Hadamard())
    with pytest.raises(ValueError, match="rotates inputs back after rounding"):
        jpfq.Rule(".*", activations=rotated, **sums)
    with pytest.raises(ValueError, match=r"E4M3.* is a table"):
        jpfq.Rule(".*", activations=FP8, **sums)
    model, params, batches = two_layers()
    for activations, reason in ((INT4, "block of 8"), (FP8, "is a table")):
        quantized = jpfq.quantize(model, batches, zoo.plain(bits=4, activations=activations), params=params)
        with pytest.raises(ValueError, match=reason):
            jpfq.certify(quantized, bits=16)
        with pytest.raises(ValueError, match=reason):
            quantized.apply_integer(batches[0])


def test_a_convolution_is_not_rotated():
    activations = jpfq.Activations(jpfq.Integer(4), per="row", rotation=jpfq.Hadamard())
    model = lambda p, x: zoo.convolve(x, p["k"])
    with pytest.raises(ValueError, match="k is a convolution, whose windows share inputs"):
        jpfq.quantize(
            model,
            [zoo.normal(0, 2, 5, 5, 4)],
            zoo.plain(bits=4, activations=activations),
            params={"k": zoo.normal(1, 3, 3, 4, 4)},
        )


@pytest.mark.slow
def test_a_sweep_over_blocks_is_the_single_runs():
    model, params, batches = two_layers()
    makers = [NV, MX, dataclasses.replace(NV, group=8)]
    space = jpfq.Space(lambda activations: zoo.plain(bits=6, activations=activations), activations=makers)
    sweep = jpfq.sweep(model, batches, space, params=params)
    for index, activations in enumerate(makers):
        alone = jpfq.quantize(model, batches, zoo.plain(bits=6, activations=activations), params=params)
        assert sweep.records[index]["output_error"] == pytest.approx(alone.output_error, rel=1e-5)
        np.testing.assert_array_equal(sweep[index].apply(batches[0]), alone.apply(batches[0]))


@pytest.mark.slow
def test_a_run_resumes_with_units(tmp_path):
    model, params, batches = two_layers()
    run = lambda: jpfq.quantize(
        model, batches, zoo.plain(bits=6, activations=NV), params=params, checkpoint=tmp_path / "run"
    )
    first = run()
    np.testing.assert_array_equal(first.apply(batches[0]), run().apply(batches[0]))
