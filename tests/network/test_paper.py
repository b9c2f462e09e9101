"""The published methods as rules: each with its paper's grid, steps and order, and nothing that we would add."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq import paper
from tests.network import zoo

PARAMS = {name: zoo.normal(seed, 16, 16) for seed, name in enumerate("ab")}
ROWS = np.asarray(zoo.normal(7, 40, 16))
BEFORE = jpfq.Rule(
    "a", bits=3, scale=jpfq.scale.AbsMax(), method=jpfq.MSQ(), order=jpfq.order.Natural(), finish=None, shrinkage=None
)


@pytest.fixture(autouse=True)
def _lenient():
    """No layers of Flax here: strict, as everywhere else."""


def fn(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def quantize(rules, x=ROWS, key=None):
    """The first layer by plain rounding, so that the second meets inputs of a network that is quantized already."""
    return jpfq.quantize(fn, [x], [BEFORE, *rules], params=PARAMS, key=key)


def prepared(recipe, quantized, x=ROWS):
    """The weights that the paper's scale is read off: those of the second layer, as prepared for the recursion."""
    X, Xq = (jnp.tanh(x @ params["a"]) for params in (PARAMS, quantized.params))
    W = PARAMS["b"]
    for part in recipe.prepare:
        W = W if part.needs_levels else part(W, jpfq.Gram.from_data(X, Xq), None)[0]
    return np.asarray(W)


def largest(W):
    return np.abs(W).max(0)


def extent(W):
    return np.maximum(W.max(0), 0) - np.minimum(W.min(0), 0)


# rules, number of levels that codes take, step
PRESETS = {
    "rtn": (paper.rtn(3, pattern="b"), 7, lambda W: largest(W) / 3),
    "gpfq20": (paper.gpfq20(5, C=3.0, pattern="b"), 5, lambda W: 3 * np.median(np.abs(W)) / 2),
    "gpfq22": (
        paper.gpfq22(2, C=1.3, p=0.9, pattern="b"),
        5,
        lambda W: 1.3 * np.quantile(np.abs(W), 0.9, 0).mean() / 2,
    ),
    "gpfq22 soft": (paper.gpfq22(2, soft=0.1, pattern="b"), 5, lambda W: 1.16 * largest(W).mean() / 2),
    "gpfq22 hard": (paper.gpfq22(2, hard=0.3, pattern="b"), 5, lambda W: 1.16 * largest(W).mean() / 2),
    "spfq": (paper.spfq(2, pattern="b"), 5, lambda W: 1.16 * largest(W).mean() / 2),
    "spfq of order 3": (paper.spfq(2, r=3, pattern="b"), 5, lambda W: 1.16 * largest(W).mean() / 2),
    "uni": (paper.uni(2, scaling=2.0, pattern="b"), 5, lambda W: 1.16 * largest(W).mean() / 2),
    "uni pruning": (paper.uni(2, prune=1, pattern="b"), 5, lambda W: 1.16 * largest(W).mean() / 2),
    "uni of one bit": (paper.uni(1, C=2.0, pattern="b"), 2, lambda W: 2 * 2 * largest(W).mean()),
    "maly_saab": (paper.maly_saab(pattern="b"), 2, lambda W: 2 * largest(W)),
    "optq": (paper.optq(2, pattern="b"), 4, lambda W: extent(W) / 3),
    "optq in groups": (paper.optq(2, group=8, pattern="b"), 4, lambda W: extent(W[:8]) / 3),
    "optq symmetric": (paper.optq(2, symmetric=True, pattern="b"), 4, lambda W: 2 * largest(W) / 3),
    "optq by size": (
        paper.optq(2, group=8, act_order=True, pattern="b"),
        4,
        lambda W: np.stack([extent(W[:8]), extent(W[8:])]) / 3,
    ),
    "qronos": (paper.qronos(2, beta=0.8, pattern="b"), 4, lambda W: 0.8 * extent(W) / 3),
    "qronos after MagR": (paper.qronos(2, magr=0.01, pattern="b"), 4, lambda W: extent(W) / 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_grid_and_the_steps_of_its_paper(name):
    rules, levels, step = PRESETS[name]
    (rule,) = rules
    recipe = rule.recipe()
    assert recipe.finish is None
    assert recipe.shrinkage is None
    assert isinstance(recipe.order, jpfq.order.Descending) == (name == "optq by size" or name.startswith("qronos"))

    draws = name.startswith(("spfq", "uni"))
    if draws:
        with pytest.raises(ValueError, match=r"of b draws random numbers: pass key=jax\.random\.key"):
            quantize(rules)
    x = ROWS[:5] if name == "maly_saab" else ROWS
    quantized = quantize(rules, x, jax.random.key(1) if draws else None)
    tensor = quantized.tensors["b"]
    assert tensor.grid.levels == levels + (name == "rtn")  # which never takes the lowest
    assert len(np.unique(tensor.codes)) == levels
    found = tensor.step[:1] if name == "optq in groups" else tensor.step  # later groups take theirs on the way
    np.testing.assert_allclose(found, np.atleast_2d(step(prepared(recipe, quantized, x))), rtol=1e-5)
    assert np.isfinite(quantized.output_error)


@pytest.mark.slow
def test_thresholds_are_in_units_of_the_weights():
    """Soft thresholds shrink what they keep; hard ones set to 0 what is small and no more."""
    shares = {name: float(quantize(PRESETS[f"gpfq22{name}"][0]).info["b"].sparsity) for name in ("", " soft", " hard")}
    assert shares[""] < min(shares[" soft"], shares[" hard"])
    with pytest.raises(ValueError, match="soft or hard, not both"):
        paper.gpfq22(4, soft=0.1, hard=0.1)


def test_presets_mean_all_kernels_that_rules_before_them_leave():
    quantized = quantize(paper.rtn(2))
    assert str(quantized.tensors["a"].grid) == "Integer(3)"
    assert str(quantized.tensors["b"].grid) == "Integer(2)"


@pytest.mark.slow
def test_presets_of_accumulators_fit_them():
    """AXE and EP-init with the steps of their papers; fewer bits by the widths alone, the most that fit."""
    for rules in (paper.axe(3, 8, 12, 8), paper.ep_init(3, 8, 12, 8)):
        quantized = jpfq.quantize(fn, [ROWS], rules, params=PARAMS)
        assert jpfq.certify(quantized, bits=12, tile=8).holds
        np.testing.assert_allclose(quantized.tensors["a"].step[0], largest(np.asarray(PARAMS["a"])) / 3, rtol=1e-5)
        assert 0 < quantized.output_error < 1
    products = {(2, a): 1 * (2**a - 1) for a in range(1, 9)}
    products |= {(b, a): (2 ** (b - 1) - 1) * (2**a - 1) for b in (3, 4) for a in range(1, 9)}
    for P, tile in ((9, None), (12, None), (12, 5), (32, None)):
        for rule in paper.fewer_bits({"a": 16}, P, tile, method=jpfq.GPFQ()):
            assert (rule.pattern, rule.method) == ("a", jpfq.GPFQ())
            chosen = (2 if rule.grid == jpfq.Ternary() else rule.grid.bits, rule.activation_bits)
            fitting = [pair for pair, most in products.items() if min(16, tile or 16) * most < 2 ** (P - 1)]
            assert sum(chosen) == max(map(sum, fitting))
            assert chosen in fitting
    with pytest.raises(ValueError, match="need more than 3 bits"):
        paper.fewer_bits({"a": 16}, 3)
