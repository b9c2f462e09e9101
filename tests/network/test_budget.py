"""A budget of bits: the allocation is the best there is, sensitivities are derivatives, a budget beats one width for all."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jpfq
from jpfq.model.functional import from_function
from jpfq.network.analysis import analyse
from jpfq.network.budget import _influence, allocate
from tests.network import zoo

WIDTHS = (2, 3, 4, 8)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 10**6), st.floats(2.2, 7.8))
def test_no_other_allocation_is_much_better(seed, average):
    """Among all, for costs that fall fourfold per bit: within the share of one kernel, which need not divide."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, 4)
    costs = rng.uniform(0.1, 10, (4, 1)) * 4.0 ** -np.array(WIDTHS)
    chosen = allocate(costs, sizes, WIDTHS, average)
    spent = lambda choice: sum(size * WIDTHS[j] for size, j in zip(sizes, choice))
    cost = lambda choice: sum(costs[i, j] for i, j in enumerate(choice))
    allowed = [c for c in itertools.product(range(4), repeat=4) if spent(c) <= average * sizes.sum() + 1e-9]
    assert spent(chosen) <= average * sizes.sum() + 1e-9
    best = min(map(cost, allowed))
    less = average - max(sizes) * (8 - 2) / sizes.sum()  # what is left over when no step fits any more
    bound = min((cost(c) for c in allowed if spent(c) <= less * sizes.sum()), default=cost((0, 0, 0, 0)))
    assert best <= cost(chosen) <= bound * (1 + 1e-9)


def test_bits_go_where_they_help():
    costs = np.array([[16.0, 4.0, 1.0, 0.01], [0.16, 0.04, 0.01, 0.0001]])
    assert allocate(costs, [10, 10], WIDTHS, 3) == [2, 0]
    assert allocate(costs, [10, 10], WIDTHS, 2) == [0, 0]
    assert allocate(costs, [10, 10], WIDTHS, 8) == [3, 3]


def network(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


@pytest.mark.slow
def test_influence_is_the_mean_square_derivative():
    params = {"first": zoo.normal(0, 6, 8), "second": zoo.normal(1, 8, 5)}
    x = zoo.normal(2, 200, 6)
    functional = from_function(network, params, {})
    analysis = analyse(functional, [zoo.plain(bits=4)], x)
    runs = [
        _influence(analysis.program, functional.leaves, [x], analysis.sites, jax.random.key(i), None) for i in range(8)
    ]
    first, second = (np.mean([np.asarray(r[site.index][0]) for r in runs], 0) for site in analysis.sites)
    slope = 1 - np.tanh(np.asarray(x @ params["first"])) ** 2
    expected = np.mean(slope**2, 0) * np.sum(np.asarray(params["second"]) ** 2, 1)
    np.testing.assert_allclose(first, expected, rtol=0.1)
    np.testing.assert_allclose(second, np.ones(5))  # the last layer's outputs are the network's


@pytest.mark.slow
def test_a_budget_beats_one_width_for_all():
    """A network whose layers matter very differently, at the same number of bits."""
    params = {name: zoo.normal(i, 24, 24) / 24**0.5 for i, name in enumerate("abcd")}

    def fn(params, x):
        return sum(scale * jnp.tanh(x @ params[name]) for name, scale in zip("abcd", (10.0, 3.0, 1.0, 0.1)))

    batches = zoo.batches(100, 24)
    rules = jpfq.budget(fn, batches, 4, params=params, rule=zoo.plain(bits=4))
    bits = {rule.pattern: rule.bits for rule in rules}
    assert bits["a"] > bits["b"] > bits["d"]
    assert sum(bits.values()) <= 16
    budgeted, uniform = (jpfq.quantize(fn, batches, r, params=params) for r in (rules, zoo.plain(bits=4)))
    assert budgeted.output_error < 0.7 * uniform.output_error


@pytest.mark.parametrize(("average", "candidates"), [(1.5, (2, 4)), (9, (2, 4)), (2, (2,))])
def test_an_average_that_no_widths_give(average, candidates):
    params = {"first": zoo.normal(0, 6, 8), "second": zoo.normal(1, 8, 5)}
    with pytest.raises(ValueError, match="average_bits must lie between"):
        jpfq.budget(network, [zoo.normal(2, 9, 6)], average, candidates=candidates, params=params)


def test_a_grid_is_refused():
    params = {"first": zoo.normal(0, 6, 8), "second": zoo.normal(1, 8, 5)}
    rule = jpfq.Rule(".*", grid=jpfq.NF4())
    with pytest.raises(ValueError, match=r"budget chooses bits.* and no grid; got NF4\(\)"):
        jpfq.budget(network, [zoo.normal(2, 9, 6)], 3, rule=rule, params=params)


@pytest.mark.slow
def test_weights_whose_squares_float32_does_not_hold():
    """Scaling a kernel scales every cost alike, so that the widths stay."""
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    params = {"a": zoo.normal(1, 8, 6), "b": zoo.normal(2, 6, 4) * jnp.linspace(0.1, 3, 6)[:, None]}
    widths = lambda params: [rule.bits for rule in jpfq.budget(fn, [zoo.normal(0, 24, 8)], 3.5, params=params)]
    plain = widths(params)
    for a, b in ((50, 0), (62, 0), (-40, 0), (0, 66), (0, -62), (40, -70)):
        assert widths({"a": jnp.ldexp(params["a"], a), "b": jnp.ldexp(params["b"], b)}) == plain
