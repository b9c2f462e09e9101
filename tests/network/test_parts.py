"""Parts that meet the network around a matrix: rotations, preparations on rows, groups, random numbers, factorisations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from tests.network import zoo

X = zoo.normal(0, 30, 16)
CHEAP = {"scale": jpfq.scale.AbsMax(), "bits": 4}
PARAMS = {"first": {"kernel": zoo.normal(1, 16, 16)}, "second": {"kernel": zoo.normal(2, 16, 16)}}


@pytest.fixture(autouse=True)
def _lenient():
    """No layers of Flax here: strict, as everywhere else."""


def fn(params, x):
    return jnp.tanh(x @ params["first"]["kernel"]) @ params["second"]["kernel"]


def both(rules, x=X, batches=1):
    """The calls that must refuse alike."""
    rules = [zoo.plain("first/.*", bits=4), rules]
    yield lambda: jpfq.plan(fn, x, rules, params=PARAMS, batches=batches)
    yield lambda: jpfq.quantize(fn, [x] * batches, rules, params=PARAMS)


@pytest.mark.slow
@pytest.mark.parametrize("method", [jpfq.OPTQ, jpfq.Qronos])
def test_a_factorisation_that_fails_names_its_kernel(method):
    """Of fewer rows than inputs, without damping."""
    rule = zoo.plain("second/.*", bits=3, method=method(damping=jpfq.damping.MeanDiagonal(0.0)))
    _, quantize = both(rule, X[:4])
    with pytest.raises(
        ValueError, match=r"failed for second/kernel, .* condition number (inf|\d\.\de\+\d+)\. "
    ) as caught:
        quantize()
    for remedy in ("damping=jpfq.damping.MeanDiagonal(0.05)", "more rows than inputs", "jpfq.GPFQ()"):
        assert remedy in str(caught.value)


def test_shrinkage_is_a_remedy_too():
    rules = jpfq.Rule("second/.*", bits=3, method=jpfq.OPTQ(damping=jpfq.damping.MeanDiagonal(0.0)), finish=None)
    assert np.isfinite(jpfq.quantize(fn, [X[:4]], rules, params=PARAMS).output_error)


def test_groups_that_do_not_divide_name_the_kernel():
    for scale in (
        jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(5)),
        jpfq.scale.MinError(jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(5))),
    ):
        for call in both(zoo.plain("second/.*", bits=3, scale=scale)):
            with pytest.raises(ValueError, match=r"second/kernel: PerGroup\(5\) does not divide its 16 inputs"):
                call()


@pytest.mark.slow
def test_a_kernel_walk_with_too_many_rows_names_the_kernel():
    rule = zoo.plain("second/.*", grid=jpfq.Binary(), prepare=jpfq.prepare.MalySaab(), method=jpfq.MSQ())
    for call in both(rule, X[:6], batches=3):
        with pytest.raises(ValueError, match=r"second/kernel has n = 16 inputs and m = 18 calibration rows"):
            call()
    for call in both(rule, X[:6], batches=2):
        call()


def image(params, x):
    x = zoo.convolve(x, params["conv"], (2, 1), groups=2)
    return jnp.tanh(x).reshape(x.shape[0], -1) @ params["dense"]


@pytest.mark.slow
def test_a_rotation_is_folded_into_kernels():
    """Dense and convolution; the kernel that the network gets is the one that the codes stand for."""
    params = {"conv": zoo.normal(0, 3, 2, 2, 6), "dense": zoo.normal(1, 36, 5)}  # of 12 and 36 inputs
    x = zoo.normal(2, 40, 4, 3, 4)
    rule = zoo.plain(bits=8, scale=jpfq.scale.AbsMax(), rotation=jpfq.Hadamard(3))
    quantized = jpfq.quantize(image, [x], rule, params=params)
    for name, kernel in params.items():
        tensor = quantized.tensors[name]
        found = quantized.params[name]
        np.testing.assert_array_equal(found, tensor.dequantize())
        assert float(jnp.linalg.norm(found - kernel) / jnp.linalg.norm(kernel)) < 0.02
        codes = tensor.codes.astype(tensor.step.dtype)
        plain = tensor.step * (codes - tensor.zero)  # not turned back it is another kernel
        assert float(jnp.linalg.norm(plain - kernel) / jnp.linalg.norm(kernel)) > 0.5
    exact, lossy = image(params, x), image(quantized.params, x)
    expected = float(jnp.linalg.norm(exact - lossy) / jnp.linalg.norm(exact))
    assert quantized.output_error == pytest.approx(expected, rel=1e-3)
    assert quantized.output_error < 0.02


@pytest.mark.parametrize(
    ("use", "shape"),
    [
        (lambda w, x: x @ w.reshape(16, 8), (4, 4, 8)),
        (lambda w, x: x @ w.T, (8, 16)),
        (lambda w, x: jnp.tanh(x @ w[0]) @ w[1], (2, 16, 16)),
        (lambda w, x: jnp.tanh(x @ w[:, :16]) @ w[:, 16:], (16, 32)),
    ],
    ids=["reshaped", "transposed", "stacked", "used twice"],
)
def test_a_rotation_is_refused_where_it_cannot_be_folded(use, shape):
    params = {"w": zoo.normal(1, *shape)}
    run = lambda params, x: use(params["w"], x)
    rule = zoo.plain(bits=4, rotation=jpfq.Hadamard())
    match = r"Hadamard cannot be folded into w \([\d, ]+\): .* Give it a rule without rotation"
    with pytest.raises(ValueError, match=match):
        jpfq.quantize(run, [X], rule, params=params)
    with pytest.raises(ValueError, match=match):
        jpfq.plan(run, X, rule, params=params)
    assert jpfq.plan(run, X, zoo.plain(bits=4), params=params).lines[0].path == "w"


def test_a_rotation_of_an_odd_number_of_inputs_names_the_kernel():
    params, run = {"w": zoo.normal(0, 15, 3)}, lambda params, x: x @ params["w"]
    rule = zoo.plain(bits=4, rotation=jpfq.Hadamard())
    with pytest.raises(ValueError, match="w has an odd number of inputs, 15"):
        jpfq.plan(run, X[:, :15], rule, params=params)
    with pytest.raises(ValueError, match="w has an odd number of inputs, 15"):
        jpfq.quantize(run, [X[:, :15]], rule, params=params)


@pytest.mark.slow
def test_codes_depend_on_the_key_and_on_nothing_else(x64):
    """Not on how the data are split, nor on the block of the recursion."""
    params, x = {name: {"kernel": zoo.normal(i, 16, 16)} for i, name in enumerate(PARAMS)}, zoo.normal(9, 30, 16)

    def codes(batches, seed=0, **settings):
        rule = zoo.plain(rounding=jpfq.rounding.Stochastic(), **CHEAP, **settings)
        tensors = jpfq.quantize(fn, batches, rule, params=params, key=jax.random.key(seed)).tensors
        return np.stack([tensor.codes for tensor in tensors.values()])

    whole = codes([x])
    np.testing.assert_array_equal(codes([x[:20], x[20:]]), whole)
    np.testing.assert_array_equal(codes([x], block=5), whole)
    assert (codes([x], seed=1) != whole).mean() > 0.1


@pytest.mark.slow
def test_kernels_of_equal_weights_and_inputs_draw_apart():
    """Each path has numbers of its own, and so has each expert."""
    W = zoo.normal(1, 16, 16)
    params = {"a": W, "b": W, "c": jnp.stack([W, W])}
    run = lambda p, x: (x @ p["a"], x @ p["b"], jnp.einsum("bi,eio->ebo", x, p["c"]))
    rule = zoo.plain(rounding=jpfq.rounding.Stochastic(), **CHEAP)
    tensors = jpfq.quantize(run, [X], rule, params=params, key=jax.random.key(0)).tensors
    drawn = [tensors["a"].codes, tensors["b"].codes, *tensors["c"].codes]
    for i, one in enumerate(drawn):
        for two in drawn[:i]:
            assert (one != two).mean() > 0.1
