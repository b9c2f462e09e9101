"""Curvature from the float network's derivatives, and what coupled neurons do for its outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.calibrate import curvature
from jpfq.model.adapters import adapt
from jpfq.network.analysis import analyse
from tests.network import zoo

KEY = jax.random.key(0)


def found(fn, params, batches, coupling, weights=None):
    """F by path, for models whose every kernel has one site."""
    functional = adapt(fn, None, params, None)
    analysis = analyse(functional, [zoo.plain(bits=4)], batches[0])
    sites = dict(enumerate(analysis.sites))
    batches, weights = [[x] for x in batches], weights or [None] * len(batches)
    couplings = dict.fromkeys(sites, coupling)
    F = curvature.curvatures(analysis.program, functional.leaves, batches, weights, sites, couplings, KEY)
    return {sites[i].path: np.asarray(F[i]) for i in F}


def test_of_one_output_it_is_the_square_of_the_derivative(x64):
    """For a dense layer, a convolution in groups and experts; by jax.grad, sample by sample."""
    params = {"conv": zoo.normal(0, 3, 2, 6), "up": zoo.normal(1, 2, 6, 5), "head": zoo.normal(2, 10, 1)}
    convolve = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=2
    )

    def fn(params, x, shifts=(0.0, 0.0)):
        x = jnp.tanh(convolve(x, params["conv"]) + shifts[0])
        x = jnp.tanh(jnp.einsum("ebwi,eio->ebwo", jnp.stack([x, 2 * x]), params["up"]) + shifts[1])
        return (x.mean(2).transpose(1, 0, 2).reshape(-1, 10) @ params["head"])[:, 0]

    batches, coupling = [zoo.normal(seed, 4, 5, 4) for seed in (3, 4)], jpfq.Coupling(samples=2)
    F = found(fn, params, batches, coupling)
    conv, up, head = 0, 0, 0
    for sample in np.concatenate(batches):
        zeros = (jnp.zeros((1, 5, 6)), jnp.zeros((2, 1, 5, 5)))
        a, b = jax.grad(lambda shifts: fn(params, sample[None], shifts)[0])(zeros)
        a = a.reshape(5, 2, 3)  # groups of the convolution
        conv, up = conv + np.einsum("wgo,wgp->gop", a, a), up + np.einsum("ebwo,ebwp->eop", b, b)
        head = head + np.ones((1, 1, 1))
    for name, value in (("conv", conv), ("up", up), ("head", head)):
        np.testing.assert_allclose(F[name], coupling.samples * value, rtol=1e-9)


def test_of_logits_it_is_fishers_information():
    """J^T (diag p - p p^T) J in the mean over draws; and of outputs J^T J."""
    W, head = zoo.normal(0, 4, 3), zoo.normal(1, 3, 6)
    fn = lambda params, x: x @ params["W"] @ head
    x, samples = zoo.normal(2, 8, 4), 4000
    p = jax.nn.softmax(x @ W @ head)
    fisher = jnp.einsum("oc,rcd,pd->op", head, jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None], head)
    for of, exact in (("logits", fisher), ("outputs", 8 * head @ head.T)):
        F = found(fn, {"W": W}, [x], jpfq.Coupling(of=of, samples=samples))["W"][0] / samples
        assert np.linalg.norm(F - exact) < 0.05 * np.linalg.norm(exact), of


def test_rows_of_weight_zero_do_not_count():
    fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
    params, x = {"a": zoo.normal(0, 4, 3), "b": zoo.normal(1, 3, 1)}, zoo.normal(2, 9, 4)
    mask = jnp.arange(9) < 6
    one, two = found(fn, params, [x], jpfq.Coupling(), [[mask]]), found(fn, params, [x[:6]], jpfq.Coupling())
    for name in params:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5)


def network():
    """Thirty-two neurons of which the outputs see three directions."""
    a, b, c = zoo.normal(0, 16, 32) / 4, zoo.normal(1, 32, 3) / 6, zoo.normal(2, 3, 5)
    return lambda params, x: jnp.tanh(x @ params["a"]) @ (b @ c), {"a": a}, zoo.batches(64, 16)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["outputs", "logits"])
def test_the_error_of_the_outputs_shrinks(of):
    fn, params, batches = network()
    alone = jpfq.quantize(fn, batches, zoo.plain(bits=3), params=params)
    coupled = jpfq.quantize(fn, batches, zoo.plain(bits=3, coupling=jpfq.Coupling(of, block=4)), params=params)
    assert coupled.output_error < 0.7 * alone.output_error
    assert coupled.info["a"].relative_error > alone.info["a"].relative_error


@pytest.mark.slow
def test_batches_of_two_sizes_and_the_hosts_memory_change_nothing():
    """With one output the curvature is exact, whatever is drawn."""
    fn, params, _ = network()
    one = lambda params, x: fn(params, x)[:, :1]
    x, rule = zoo.normal(5, 90, 16), zoo.plain(bits=3, coupling=jpfq.Coupling(block=4))
    whole = jpfq.quantize(one, [x], rule, params=params)
    parts = jpfq.quantize(one, [x[:40], x[40:80], x[80:]], rule, params=params, offload=True)
    assert np.mean(np.asarray(whole.tensors["a"].codes) == np.asarray(parts.tensors["a"].codes)) > 0.99


@pytest.mark.slow
def test_kernels_of_other_rules_stay_as_they_were():
    """Those before the coupled one get the codes they had; and each kernel can have settings of its own."""
    fn = lambda params, x: jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]
    params = {"a": zoo.normal(0, 8, 8), "b": zoo.normal(1, 8, 8), "c": zoo.normal(2, 8, 8)}
    rules = [
        zoo.plain("b", bits=3, coupling=jpfq.Coupling(block=4)),
        zoo.plain("c", bits=3, coupling=jpfq.Coupling("logits", block=4)),
        zoo.plain(bits=3),
    ]
    mixed = jpfq.quantize(fn, zoo.batches(40, 8), rules, params=params)
    plain = jpfq.quantize(fn, zoo.batches(40, 8), zoo.plain(bits=3), params=params)
    np.testing.assert_array_equal(mixed.tensors["a"].codes, plain.tensors["a"].codes)
    assert set(mixed.tensors) == set("abc")
    assert np.any(np.asarray(mixed.tensors["b"].codes) != np.asarray(plain.tensors["b"].codes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"of": "loss"}, "'logits' or 'outputs'; got 'loss'"),
        ({"block": 0}, "block is an integer of at least 1; got 0"),
        ({"samples": 1.5}, "samples is an integer of at least 1; got 1.5"),
        ({"damping": 0}, "damping is a positive number; got 0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        jpfq.Coupling(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"form": "data", "finish": None, "shrinkage": None}, {"scale": jpfq.scale.AbsMax(per=jpfq.scale.PerTensor())}],
)
def test_what_does_not_go_with_it(settings):
    with pytest.raises(ValueError, match="coupling quantizes neurons one after the other"):
        jpfq.Rule(".*", bits=4, coupling=jpfq.Coupling(), **settings)
    assert jpfq.Rule(".*", bits=4, coupling=jpfq.Coupling(), form="auto").recipe().form == "gram"
    with pytest.raises(ValueError, match=r"coupling takes a setting such as jpfq\.Coupling\(\)"):
        jpfq.Rule(".*", bits=4, coupling="logits")


def test_the_plan_knows_of_the_curvature():
    """Matrices (out, out) and a backward pass."""
    fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
    params = {"a": jax.ShapeDtypeStruct((8, 4096), np.float32), "b": jax.ShapeDtypeStruct((4096, 2), np.float32)}
    plans = [
        jpfq.plan(
            fn, jax.ShapeDtypeStruct((rows, 8), np.float32), zoo.plain(bits=3, form="gram", coupling=how), params=params
        )
        for rows, how in ((16, None), (16, jpfq.Coupling()), (10**6, jpfq.Coupling()))
    ]
    alone, coupled, tall = (plan.memory for plan in plans)
    assert coupled - alone == 4 * (4096**2 + 2**2)
    assert tall >= 2 * 4 * 10**6 * 2 * 4096  # what the layer makes before and after tanh, and its derivative


@pytest.mark.parametrize("last", [lambda x: jnp.argmax(x, -1), lambda x: x * jnp.inf, jnp.floor])
def test_outputs_without_derivatives_are_refused(last):
    fn = lambda params, x: last(x @ params["head"])
    rule = zoo.plain(bits=4, coupling=jpfq.Coupling())
    with pytest.raises(ValueError, match="by the output of head"):
        jpfq.quantize(fn, zoo.batches(9, 6), rule, params={"head": zoo.normal(7, 6, 3)})


@pytest.mark.slow
def test_all_widths_share_one_compilation(compilations):
    fn, params, batches = network()
    for bits in (3, 4):
        compilations.clear()
        jpfq.quantize(fn, batches, zoo.plain(bits=bits, coupling=jpfq.Coupling()), params=params)
    assert len(compilations) == 1  # the backward pass, which is compiled for each call
