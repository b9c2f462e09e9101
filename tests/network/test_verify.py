"""Bounds of the difference of both networks: no input leaves them, and they are exact where nothing has to be relaxed."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.model.functional import from_function
from jpfq.network.difference import relaxations
from jpfq.network.difference.engine import bounds_of
from jpfq.network.difference.graph import graph_of
from jpfq.network.difference.interval import Interval, Triple
from tests.reference import difference as reference

FAST, TIGHT = jpfq.Bounding(mode="interval", together=64), jpfq.Bounding(together=64)
OTHERS = [f for name, f in relaxations.NAMED.items() if name != "gelu"]
OTHERS += [relaxations.Kink(0.1, 1.0), relaxations.TANH, relaxations.LOGISTIC]
FUNCTIONS = {
    "relu": (jax.nn.relu, lambda x: np.maximum(x, 0)),
    "leaky": (lambda x: jax.nn.leaky_relu(x, 0.25), lambda x: np.where(x >= 0, x, 0.25 * x)),
    "tanh": (jnp.tanh, np.tanh),
}


def dense(function, params, x):
    layers = list(zip(params["W"], params["b"], strict=True))
    for i, (W, b) in enumerate(layers):
        x = x @ W + b
        x = function(x) if i + 1 < len(layers) else x
    return x


def networks(seed, count, sizes, drift):
    """The parameters of random networks and of disturbed ones, and boxes."""
    rng = np.random.default_rng(seed)
    shapes = list(itertools.pairwise(sizes))
    f = {
        "W": [rng.standard_normal((count, a, b)) / np.sqrt(a) for a, b in shapes],
        "b": [rng.standard_normal((count, b)) / 3 for _, b in shapes],
    }
    q = jax.tree.map(lambda x: x + drift * rng.standard_normal(x.shape), f)
    middle = rng.standard_normal((count, sizes[0]))
    radius = 10.0 ** rng.uniform(-3, 0, (count, 1)) * rng.uniform(size=(count, sizes[0]))
    return f, q, middle - radius, middle + radius


@functools.cache
def program(name, sizes, linear):
    """The compiled bounds of all networks of these sizes, each in its own box."""
    shapes = list(itertools.pairwise(sizes))
    params = {"W": [jnp.zeros(s) for s in shapes], "b": [jnp.zeros(s[1]) for s in shapes]}
    functional = from_function(functools.partial(dense, FUNCTIONS[name][0]), params, {})
    graph, _ = graph_of(functional, {}, jax.ShapeDtypeStruct((1, sizes[0]), jnp.float32))
    run = functools.partial(bounds_of, graph, linear, False)
    leaves = lambda params: [*params["W"], *params["b"]]
    one = lambda f, q, lo, hi: run(leaves(f), leaves(q), [], [lo], [hi], 1).outputs[0]
    return jax.jit(jax.vmap(one))


def bounded(name, sizes, linear, f, q, lower, upper):
    with jax.enable_x64(True):
        found = program(name, sizes, linear)(
            *jax.tree.map(jnp.asarray, (f, q, lower[:, None, None], upper[:, None, None]))
        )
        return jax.tree.map(lambda x: np.asarray(x).reshape(len(lower), -1), found)


def attacked(name, f, q, lower, upper, rng, points=60, steps=6):
    """Differences at corners and inside, and where random steps towards the extremes lead."""
    function, layers = FUNCTIONS[name][1], lambda p: list(zip(p["W"], p["b"], strict=True))
    off = lambda x: np.stack([reference.evaluate(layers(p), x, function) for p in (f, q)])
    share = rng.uniform(size=(len(lower), points, lower.shape[1]))
    share[:, ::2] = np.round(share[:, ::2])
    at = lambda share: lower[:, None] + share * (upper - lower)[:, None]
    found = [off(at(share))]
    for _ in range(steps):  # from the best of each output and side, a step that halves
        d = found[-1][1] - found[-1][0]
        best = np.concatenate([d.argmax(1), d.argmin(1)], 1)
        share = np.take_along_axis(share, best[..., None], 1)
        share = np.repeat(share, max(1, points // share.shape[1]), 1)
        flip = rng.uniform(size=share.shape) < 0.15
        share = np.where(flip, np.round(rng.uniform(size=share.shape)), share)
        found.append(off(at(share)))
    return np.concatenate(found, 2)


def assert_sound(name, sizes, linear, count, seed, drift):
    given = networks(seed, count, sizes, drift)
    found = bounded(name, sizes, linear, *given)
    f, q = attacked(name, *given, np.random.default_rng(seed + 1))
    for side, values in ((found.f, f), (found.q, q), (found.d, q - f)):
        assert (values >= side.lo[:, None]).all()
        assert (values <= side.hi[:, None]).all()
    return found


@pytest.mark.parametrize("linear", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["interval", "linear"])
def test_no_input_leaves_the_bounds(linear):
    """Nor are they much wider than what was found: a bound of infinity would be sound, too."""
    found = assert_sound("relu", (4, 6, 5, 3), linear, 200, 0, 0.05)
    assert np.isfinite(found.d.hi - found.d.lo).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seed", "drift"), [("relu", 1, 0.01), ("relu", 2, 0.3), ("relu", 3, 0.05), ("tanh", 4, 0.05)]
)
def test_no_input_of_two_thousand_networks_leaves_the_bounds(name, seed, drift):
    for linear in (False, True):
        assert_sound(name, (4, 6, 5, 3), linear, 500, seed, drift)


@pytest.mark.slow
def test_they_hold_the_exact_extremes_and_equal_them_where_no_unit_is_ambiguous():
    """Extremes by enumeration of the pieces; bounds of boxes in one piece are exact up to the outward rounding."""
    given = f, q, lower, upper = networks(5, 200, (2, 3, 2), 0.05)
    found = bounded("relu", (2, 3, 2), True, *given)
    layers = lambda p, i: [(W[i], b[i]) for W, b in zip(p["W"], p["b"], strict=True)]
    whole = 0
    for i in range(len(lower)):
        least, most = reference.exact(layers(f, i), layers(q, i), lower[i], upper[i])
        scale = 1e-12 * (1 + np.abs(most))
        assert (found.d.lo[i] <= least + scale).all()
        assert (found.d.hi[i] >= most - scale).all()
        middle, radius = (lower[i] + upper[i]) / 2, (upper[i] - lower[i]) / 2
        first = [(middle @ W + b, radius @ np.abs(W)) for W, b in (layers(f, i)[0], layers(q, i)[0])]
        if all((np.abs(c) > r).all() for c, r in first) and (np.sign(first[0][0]) == np.sign(first[1][0])).all():
            whole += 1
            np.testing.assert_allclose(found.d.lo[i], least, rtol=0, atol=1e-11)
            np.testing.assert_allclose(found.d.hi[i], most, rtol=0, atol=1e-11)
    assert 40 < whole < 190


@pytest.mark.slow
def test_the_difference_is_bounded_far_better_than_both_networks_apart():
    given = networks(6, 200, (4, 6, 5, 3), 0.005)
    found = {linear: bounded("relu", (4, 6, 5, 3), linear, *given) for linear in (False, True)}
    width = lambda side: (side.hi - side.lo).mean()
    apart = {linear: width(x.f) + width(x.q) for linear, x in found.items()}
    assert width(found[True].d) <= width(found[False].d)
    assert apart[False] > 10 * width(found[True].d)
    assert apart[True] > 3 * width(found[True].d)


@pytest.mark.parametrize(
    "activation",
    [
        *(relaxations.Kink(0.0, 1.0), relaxations.Kink(1.0, 0.0, 0.5), relaxations.NAMED["gelu"]),
        *(pytest.param(a, marks=pytest.mark.slow) for a in OTHERS),
    ],
    ids=lambda a: getattr(a, "name", str(a)),
)
def test_lines_hold_what_they_bound(activation, x64):
    """Of functions in both networks and of their difference, at all places of a fine grid."""
    rng = np.random.default_rng(0)
    if isinstance(activation, relaxations.Kink):
        activation = relaxations.Kink(activation.left, activation.right, jnp.asarray(activation.at))
    f, d = rng.normal(0, 2, 80), rng.normal(0, 0.3, 80)
    wide, apart = 10.0 ** rng.uniform(-4, 0.5, 80), 10.0 ** rng.uniform(-4, 0, 80)
    interval = lambda middle, radius: Interval(jnp.asarray(middle - radius), jnp.asarray(middle + radius))
    x = Triple(interval(f, wide), interval(f + d, wide + apart), interval(d, apart))
    lines, ends = relaxations.relaxed(activation, x), relaxations.difference(activation, x)
    share = jnp.linspace(0, 1, 41)
    a = x.f.lo + (x.f.hi - x.f.lo) * share[:, None, None]
    t = x.d.lo + (x.d.hi - x.d.lo) * share[None, :, None]
    own, change, plane = activation(a), activation(a + t) - activation(a), lines.d
    assert (lines.f.slope[0] * a + lines.f.shift[0] <= own).all()
    assert (lines.f.slope[1] * a + lines.f.shift[1] >= own).all()
    assert (plane.f[0] * a + plane.q[0] * (a + t) + plane.shift[0] <= change + 1e-12).all()
    assert (plane.f[1] * a + plane.q[1] * (a + t) + plane.shift[1] >= change - 1e-12).all()
    assert (ends.lo <= change).all()
    assert (ends.hi >= change).all()


class Everything(nn.Module):
    """Each kind of layer that has bounds."""

    @nn.compact
    def __call__(self, x):
        norm = lambda x: nn.BatchNorm(use_running_average=True)(x)
        x = nn.max_pool(nn.relu(norm(nn.Conv(3, (3, 3))(x))), (2, 2), (2, 2))
        x = x + nn.gelu(nn.Conv(3, (3, 3))(x))
        x = nn.avg_pool(nn.leaky_relu(x), (2, 2), (1, 1), "SAME")
        x = nn.relu6(nn.Dense(5)(x.reshape(len(x), -1)))
        return nn.softmax(nn.Dense(3)(nn.silu(nn.Dense(4)(x))))


class Some(nn.Module):
    """Pooling, BatchNorm, a residual and a smooth function."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(2, (3, 3))(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = x + nn.gelu(nn.Conv(2, (1, 1))(x))
        return nn.Dense(3)(x.reshape(len(x), -1))


def off(quantized, apply, middle, radius, count=200):
    """Differences at inputs drawn from the boxes."""
    share = np.random.default_rng(1).uniform(-1, 1, (count, *middle.shape))
    share[::2] = np.sign(share[::2])
    inputs = jnp.asarray(middle[None] + radius * share, jnp.float32).reshape(-1, *middle.shape[1:])
    return np.asarray(quantized.apply(inputs) - apply(inputs)).reshape(count, len(middle), -1)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "settings"), [(Everything(), FAST), (Some(), TIGHT)], ids=["interval", "linear"])
def test_all_layers_have_bounds(model, settings):
    x = jax.random.normal(jax.random.key(0), (32, 4, 4, 1))
    variables = model.init(jax.random.key(1), x)
    rule = jpfq.Rule(".*", bits=4, plain=True, activation_bits=8)
    quantized = jpfq.quantize(model, [x], rule, variables=variables, progress=False)
    for radius in (1e-3, 0.1):
        found = jpfq.verify(quantized, model, around=x[:3], radius=radius, variables=variables, settings=settings)
        d = off(quantized, jax.jit(functools.partial(model.apply, variables)), np.asarray(x[:3]), radius)
        assert (d >= found.lower - 1e-6).all()  # float32 of the two networks themselves
        assert (d <= found.upper + 1e-6).all()
        assert (
            found.largest <= (1 + 1e-9 if settings is FAST else 20)
        ).all()  # softmax; and no more than such a network


def test_layers_are_computed_once():
    """Where XLA fuses layers, it computes each anew for every reader: the time then doubles with every layer."""
    params = {f"w{i}": np.eye(4, dtype=np.float32) for i in range(12)}

    def deep(params, x):
        return functools.reduce(lambda x, w: jax.nn.relu(x @ w), params.values(), x)

    functional = from_function(deep, params, {})
    graph, _ = graph_of(functional, {}, jax.ShapeDtypeStruct((1, 4), jnp.float32))
    with jax.enable_x64(True):
        leaves, ends = list(params.values()), [jnp.zeros((3, 1, 4))]
        run = jax.jit(functools.partial(bounds_of, graph, False, False), static_argnums=5)
        text = run.lower(leaves, leaves, [], ends, ends, 3).compile().as_text()
    assert text.count(" conditional(") == len(graph.nodes) == 24


PARAMS = {"a": np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32), "b": np.eye(5, 3, dtype=np.float32)}
X = np.random.default_rng(1).standard_normal((40, 6)).astype(np.float32)


def mlp(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


@functools.cache
def small(bits=4, activations=None):
    rule = jpfq.Rule(".*", bits=bits, plain=True, activations=activations)
    return jpfq.quantize(mlp, [jnp.asarray(X)], rule, params=PARAMS, progress=False)


@pytest.mark.slow
def test_rounded_inputs_are_accounted_for():
    """Beyond the grid, too: inputs far out of the range that was calibrated."""
    quantized = small(activations=jpfq.Activations(jpfq.Integer(4)))
    for scale in (1.0, 3.0):
        middle = scale * X[:6]
        found = jpfq.verify(quantized, mlp, around=middle, radius=0.05, params=PARAMS, settings=FAST)
        d = off(quantized, lambda x: mlp(PARAMS, x), middle, 0.05)
        assert (d >= found.lower - 1e-4).all()
        assert (d <= found.upper + 1e-4).all()
        assert found.largest.max() < 50


@pytest.mark.slow
def test_certified_classes_are_kept():
    quantized = small()
    certain = jpfq.predicts_alike(quantized, mlp, X, 0.01, params=PARAMS, settings=FAST)
    assert 0 < certain.sum() < len(X)
    inputs = X + 0.01 * np.random.default_rng(0).uniform(-1, 1, (50, *X.shape)).astype(np.float32)
    classes = [
        np.asarray(f(jnp.asarray(inputs.reshape(-1, 6)))).argmax(1).reshape(50, -1)
        for f in (quantized.apply, lambda x: mlp(PARAMS, x))
    ]
    assert ((classes[0] == classes[1]) & (classes[0] == classes[0][0])).all(0)[certain].all()


def test_a_box_is_a_pair_or_a_centre():
    quantized = small()
    pair = jpfq.verify(quantized, mlp, (X[:2] - 0.5, X[:2] + 0.5), params=PARAMS, settings=FAST)
    centre = jpfq.verify(quantized, mlp, around=X[:2], radius=0.5, params=PARAMS, settings=FAST)
    np.testing.assert_allclose(pair.lower, centre.lower, atol=1e-5)
    assert "difference" in str(pair)
    assert "2 boxes, interval bounds" in str(pair)
    np.testing.assert_array_equal(centre.largest, np.maximum(-centre.lower, centre.upper).max(1))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({}, r"takes box=\(lower, upper\), or around=x"),
        ({"box": (X, X), "around": X}, "one of the two"),
        ({"box": (X, X), "radius": 0.1}, "radius goes with around"),
        ({"box": X}, "a pair"),
        ({"box": (X, (X,))}, "differ in structure"),
        ({"box": (X, X[:3])}, "one shape"),
        ({"box": (X + np.eye(40, 6), X)}, r"above upper at \(0, 0\)"),
        ({"around": X}, "takes a radius"),
        ({"around": X, "radius": -0.1}, "at least 0; got -0.1"),
        ({"around": X, "radius": np.nan}, "at least 0; got nan"),
        ({"around": X, "radius": np.ones(5)}, "does not broadcast"),
        ({"around": np.where(X > 2, np.nan, X), "radius": 0.1}, "NaN or infinity"),
        ({"around": np.ones((4, 6), int), "radius": 1}, "integers, such as tokens, have no box"),
        ({"around": X[:, :3], "radius": 0.1}, "dot_general|shapes"),
        ({"around": X, "radius": 0.1, "settings": "linear"}, "takes a jpfq.Bounding"),
    ],
)
def test_bad_boxes_are_refused(given, complaint):
    with pytest.raises((ValueError, TypeError), match=complaint):
        jpfq.verify(small(), mlp, **given, params=PARAMS)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (lambda p, x: (x @ p["a"]) * (x @ p["a"]), "integer_pow|mul of data with data|square"),
        (lambda p, x: jnp.sin(x @ p["a"]), "equation sin of float32"),
        (lambda p, x: (x @ p["a"]).astype(jnp.bfloat16) @ p["b"].astype(jnp.bfloat16), "cast from float32 to bfloat16"),
        (lambda p, x: jnp.argmax(x @ p["a"], 1), "equation argmax"),
    ],
)
def test_what_has_no_bounds_is_refused_by_name(model, complaint):
    with pytest.raises(ValueError, match=complaint):
        jpfq.verify(small(), model, around=X, radius=0.1, params=PARAMS)


def test_other_networks_and_steps_of_the_moment_are_refused():
    with pytest.raises(ValueError, match="belongs to another network: its a is"):
        jpfq.verify(small(), mlp, around=X, radius=0.1, params=PARAMS | {"a": PARAMS["a"][:, :4]})
    dynamic = small(activations=jpfq.Activations(jpfq.Integer(8), per="row"))
    with pytest.raises(ValueError, match="inputs of a are rounded with steps taken while the network runs"):
        jpfq.verify(dynamic, mlp, around=X, radius=0.1, params=PARAMS)
    with pytest.raises(ValueError, match=r"takes the result of jpfq\.quantize; got dict"):
        jpfq.verify(PARAMS, mlp, around=X, radius=0.1, params=PARAMS)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="together is a positive number"):
        jpfq.Bounding(together=0)
    with pytest.raises(ValueError, match="mode"):
        jpfq.Bounding(mode="backward")  # pyright: ignore[reportArgumentType]
