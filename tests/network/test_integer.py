"""Integer execution: the products of the quantized network to float rounding, and what overflow does to them, exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.model.compat import bind
from jpfq.model.program import evaluate
from jpfq.network.integer import _product, integer_sites
from tests.network import zoo

T = 5


def at_sites(quantized, batch, tile, overflow):
    """Of every site, for one and the same input, the float and the integer product."""
    program, sites, _ = integer_sites(quantized._functional, quantized.tensors, quantized.inputs, quantized._shapes)
    known, pairs = {at.site.index: at for at in sites}, []

    def visit(index, eqn, values):
        if index not in known:
            return bind(eqn, values)
        at = known[index]
        (x,) = (x for v, x in zip(eqn.invars, values, strict=True) if v is at.site.data)
        rounded = [at.quantizer(x) if v is at.site.data else x for v, x in zip(eqn.invars, values, strict=True)]
        (exact,) = bind(eqn, rounded)
        x = x.astype(jnp.float32)
        pairs.append((exact, _product(at.site, at.quantizer, at.weights, x, jnp.int32(32), tile, overflow)))
        return [exact]

    def run(leaves, batch):
        pairs.clear()
        evaluate(program, leaves, batch, visit)
        return list(pairs)

    return jax.jit(run)(quantized._functional.leaves, jax.tree.leaves(batch))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("cnn", "experts", "scanned", "mlp")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lm", *SLOW])
def test_products_are_those_of_floats(name):
    """Strides, dilation, groups, padding, batched kernels, stacks, attention: with tiles, wrapped and saturated alike."""
    case = zoo.CASES[name]()
    signed = jpfq.Activations(jpfq.Integer(8)) if name == "experts" else None
    row = jpfq.Activations(jpfq.Asymmetric(8), per="row") if name == "lm" else None
    how = {"activations": signed or row} if signed or row else {"activation_bits": 8}
    quantized = jpfq.quantize(case.model, case.batches, zoo.plain(bits=4, **how), **case.given)
    for tile, overflow in ((T, "wrap"), (None, "saturate")):
        pairs = at_sites(quantized, case.batches[0], tile, overflow)
        assert len(pairs) >= len(quantized.tensors)
        for exact, found in pairs:
            assert exact.shape == found.shape
            scale = float(jnp.abs(exact.astype(jnp.float32)).max())
            loose = 2e-2 if exact.dtype == jnp.bfloat16 else 1e-5
            assert float(jnp.abs(exact.astype(jnp.float32) - found).max()) <= loose * scale
    whole = quantized.apply_integer(case.batches[0])
    exact = quantized.apply(case.batches[0])
    square = lambda x: float(sum(jnp.sum(y.astype(jnp.float32) ** 2) for y in jax.tree.leaves(x)))
    difference = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), exact, whole)
    assert square(difference) <= 1e-3 * square(exact)  # an input at a tie may round the other way
    assert jax.tree.map(lambda x: (x.shape, x.dtype), whole) == jax.tree.map(lambda x: (x.shape, x.dtype), exact)


PARAMS = {"a": zoo.normal(0, 12, 4)}


def layer(params, x):
    return x @ params["a"]


def one(**changes):
    """A layer of 12 inputs with zero point, and the integers of a batch."""
    quantized = jpfq.quantize(
        layer, [zoo.normal(2, 40, 12) + 0.3], zoo.plain(**{"bits": 4, "activation_bits": 8} | changes), params=PARAMS
    )
    levels = quantized.inputs["a"][0].levels
    x = zoo.normal(3, 20, 12)
    codes = np.clip(np.floor(np.asarray(x / levels.step + levels.zero, np.float64) + 0.5), levels.lo, levels.hi).astype(
        int
    )
    return quantized, x, codes, float(levels.step[0]), int(levels.zero[0])


def accumulated(x, k, P, tile, overflow):
    """Sums of a tile after the other, as a P-bit register does it: plain loops."""
    total, half = np.zeros((len(x), k.shape[1]), object), 2 ** (P - 1)
    for r, o in np.ndindex(*total.shape):
        for t in range(0, len(k), tile):
            held = 0
            for i in range(t, min(t + tile, len(k))):
                held += int(x[r, i]) * int(k[i, o])
                held = (held + half) % (2 * half) - half if overflow == "wrap" else min(max(held, -half), half - 1)
            total[r, o] += held
    return total


@pytest.mark.slow
@pytest.mark.parametrize("overflow", ["wrap", "saturate"])
def test_overflow_is_that_of_a_register(overflow):
    quantized, x, codes, step, zero = one()
    k = np.asarray(quantized.tensors["a"].codes, int)
    weight = np.asarray(quantized.tensors["a"].step, np.float64)
    apart = []
    for tile in (T, None):
        for P in (6, 10, 12, 32):
            guard = jpfq.Accumulator(P, tile)
            found = quantized.apply_integer(x, accumulator=guard, overflow=overflow)
            total = accumulated(codes, k, P, tile or 12, overflow)
            expected = (total - zero * k.sum(0)).astype(float) * step * weight
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
            apart.append(float(np.abs(found - np.asarray(quantized.apply(x))).max()))
    assert min(apart[:2]) > 0.1  # six and ten bits overflow
    assert max(apart[3], apart[7]) < 1e-5  # 32 do not


@pytest.mark.slow
def test_results_that_differ_in_numbers_share_one_program(compilations):
    """Bits, steps and zero points, codes, the accumulator; and another result is another all the same."""
    (first, x, *_), (second, *_) = one(), one(bits=3, activation_bits=6, scale=jpfq.scale.AbsMax(0.8))
    guard, other = jpfq.Accumulator(20, T), jpfq.Accumulator(24, T)
    outputs = [first.apply_integer(x, accumulator=guard)]
    compilations.clear()
    outputs.append(second.apply_integer(x, accumulator=other))
    assert not compilations
    for quantized, found in zip((first, second), outputs, strict=True):
        np.testing.assert_allclose(found, quantized.apply(x), rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(outputs[0] - outputs[1]).max()) > 0.1
    compilations.clear()
    first.apply_integer(x, accumulator=jpfq.Accumulator(20, T + 1))
    assert compilations


@pytest.mark.slow
def test_groups_are_scaled_tile_by_tile():
    quantized, x, *_ = one(scale=jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(4)))
    for tile in (4, 2):
        found = quantized.apply_integer(x, accumulator=jpfq.Accumulator(32, tile))
        np.testing.assert_allclose(found, quantized.apply(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="different steps"):
        quantized.apply_integer(x)


@pytest.mark.slow
def test_made_for_few_bits_nothing_overflows():
    """At the width they were made for, weights with AXE give what 32 bits give; those without do not."""
    P, tile = 12, 6
    made, x, *_ = one(accumulator=jpfq.Accumulator(P, tile))
    free, *_ = one()
    assert jpfq.certify(made, bits=P, tile=tile).holds
    worst = made.inputs["a"][0].levels
    site = jpfq.certify(free, bits=P, tile=tile).sites[0]
    inputs = np.stack([site.worst_input(0, o) for o in range(4)])  # what would take the free one beyond
    x = jnp.concatenate([x, jnp.asarray((inputs - float(worst.zero[0])) * float(worst.step[0]), x.dtype)])
    guard = jpfq.Accumulator(P, tile)
    for overflow in ("wrap", "saturate"):
        run = lambda q, guard: np.asarray(q.apply_integer(x, accumulator=guard, overflow=overflow))
        np.testing.assert_array_equal(run(made, guard), run(made, jpfq.Accumulator(32, tile)))
        assert np.abs(run(free, guard) - run(free, jpfq.Accumulator(32, tile))).max() > 1


@pytest.mark.slow
def test_meshes_of_explicit_axes_are_taken():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    put = lambda x, *spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
    x = put(zoo.normal(2, 40, 12), "data")
    rule = zoo.plain(bits=4, activation_bits=8, accumulator=jpfq.Accumulator(13))
    quantized = jpfq.quantize(layer, [x], rule, params={"a": put(PARAMS["a"])})
    alone = lambda x: np.asarray(quantized.apply(x))
    np.testing.assert_allclose(quantized.apply_integer(x), alone(x), rtol=1e-5, atol=1e-5)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(quantized.apply_integer(x), alone(x), rtol=1e-5, atol=1e-5)
        assert jpfq.certify(quantized, bits=13).holds


def test_refused():
    quantized, x, *_ = one()
    with pytest.raises(ValueError, match="'wrap' or 'saturate'"):
        quantized.apply_integer(x, overflow="clip")
    with pytest.raises(ValueError, match="Accumulator\\(16, tile=64\\)"):
        quantized.apply_integer(x, accumulator=16)
    free = jpfq.quantize(layer, [x], zoo.plain(bits=4), params=PARAMS)
    with pytest.raises(ValueError, match="activation_bits=8"):
        free.apply_integer(x)
    with pytest.raises(ValueError, match="0 is not a level"):
        one(activation_bits=None, activations=jpfq.Activations(jpfq.Equispaced(16)))[0].apply_integer(x)
