"""`solve` with an accumulator: the guarantee through searches and finishers, steps that suit it, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.scalar import AXE, FitScale
from tests.helpers import PLAIN, problem, problem32
from tests.scalar.test_accumulator import assert_fits, reached

N, OUT = 48, 5
U8, S8 = jpfq.Asymmetric(8), jpfq.Integer(8)


def gram(seed=0):
    return problem32(seed, m=120, n=N, out=OUT, dead=(4,))


def solve(P, T, inputs=U8, bits=4, seed=0, **settings):
    return jpfq.solve(*gram(seed), bits=bits, accumulator=jpfq.Accumulator(P, T), inputs=inputs, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("T", "settings"),
    [
        (16, {}),  # what is recommended: a search for steps, then descent with steps free
        (None, {"method": jpfq.OPTQ(), "scale": jpfq.scale.AbsMax(), "finish": jpfq.finish.Descend(2), "block": 8}),
        pytest.param(
            7,
            {
                "scale": jpfq.scale.AbsMax(per=jpfq.scale.PerTensor()),
                "finish": jpfq.finish.CosineDescend(1),
                "order": jpfq.order.MinPivot(),
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            12,
            {
                "scale": jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(24)),
                "finish": jpfq.finish.CosineDescend(2),
                "method": jpfq.GPFQ(),
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["recommended", "descend", "one step", "groups"],
)
def test_every_finish_keeps_the_bound(T, settings):
    """For all widths by one program, inputs of one sign and of both; `Info` says how far sums go."""
    P = jnp.arange(9, 33, 1)
    for lo, hi in ((0, 255), (-128, 127)):
        run = jax.vmap(
            lambda P, lo, hi: jpfq.solve(
                *gram(), bits=4, accumulator=jpfq.Accumulator(P, T), inputs=(lo, hi), **settings
            ),
            in_axes=(0, None, None),
        )
        tensor, info = compiled(T, run)(P, jnp.int32(lo), jnp.int32(hi))
        for width, codes, ends in zip(P, tensor.codes, info.reach.ends, strict=True):
            assert_fits(codes, (lo, hi), width, T or N)
            np.testing.assert_array_equal(np.moveaxis(ends[0], -1, 0), np.stack(reached(codes, (lo, hi), T or N)))
        errors = np.asarray(info.relative_error)
        assert errors[0] > 2 * errors[-1]  # the bound binds at 9 bits and not at 32
        assert np.abs(np.asarray(tensor.codes[0])).sum() > 0
        if not settings and lo == 0:  # a wide accumulator changes nothing
            np.testing.assert_array_equal(tensor.codes[-1], jpfq.solve(*gram(), bits=4)[0].codes)


_compiled: dict = {}


def compiled(T, run):
    """One program for all inputs."""
    return _compiled.setdefault(T, jax.jit(run))


@pytest.mark.slow
def test_descent_under_the_bound_lowers_the_error():
    """From codes that fit to codes that fit."""
    settings = {"scale": jpfq.scale.AbsMax(), "shrinkage": None, "method": jpfq.GPFQ()}
    errors = [
        float(solve(13, 16, finish=finish, **settings)[1].relative_error) for finish in (None, jpfq.finish.Descend(2))
    ]
    assert errors[0] > errors[1]


@pytest.mark.slow
def test_steps_chosen_with_the_accumulator_in_view_lose_less():
    """By far, where the bound binds: the published order of things keeps the steps and drops weights."""
    own = {"finish": None, "shrinkage": None}
    for inputs in (U8, S8):
        fixed = solve(13, None, inputs, scale=jpfq.scale.AbsMax(), **own)[1].relative_error
        fitted = solve(13, None, inputs, **own)[1].relative_error
        assert fitted < 0.8 * fixed


@pytest.mark.slow
def test_the_data_form_gives_the_codes_of_the_gram_form():
    X, Xq, W = (jnp.asarray(x, jnp.float32) for x in problem(2, m=40, n=N, out=OUT))
    rows = jpfq.Rows(X, Xq)
    how = PLAIN | {
        "scale": jpfq.scale.AbsMax(),
        "method": jpfq.GPFQ(),
        "accumulator": jpfq.Accumulator(14, 16),
        "inputs": U8,
    }
    data, _ = jpfq.solve(W, rows, bits=4, form="data", **how)
    made, _ = jpfq.solve(W, rows.gram(), bits=4, form="gram", **how)
    assert (np.asarray(data.codes) != np.asarray(made.codes)).mean() < 0.01
    assert_fits(data.codes, (0, 255), 14, 16)


@pytest.mark.slow
def test_other_roundings_within():
    """Random ones draw, thresholds prune, and the bound holds; it comes with no bound on the error but a finite one."""
    drawn, _ = solve(12, 16, rounding=jpfq.rounding.Stochastic(), key=jax.random.key(0), scale=jpfq.scale.AbsMax())
    again, _ = solve(12, 16, rounding=jpfq.rounding.Stochastic(), key=jax.random.key(1), scale=jpfq.scale.AbsMax())
    assert (np.asarray(drawn.codes) != np.asarray(again.codes)).any()
    pruned, info = solve(
        16, 16, rounding=jpfq.rounding.HardThreshold(1.5, "step"), scale=jpfq.scale.AbsMax(), finish=None
    )
    assert not (np.abs(np.asarray(pruned.codes)) == 1).any()
    for tensor, P in ((drawn, 12), (again, 12), (pruned, 16)):
        assert_fits(tensor.codes, (0, 255), P, 16)
    assert info.relative_error < info.relative_bound < np.inf


@pytest.mark.slow
def test_an_odd_number_of_levels_counts_about_its_zero():
    tensor, _ = jpfq.solve(
        *gram(),
        grid=jpfq.Equispaced(7),
        accumulator=jpfq.Accumulator(12, 16),
        inputs=U8,
        scale=jpfq.scale.AbsMax(),
        finish=None,
    )
    assert_fits(np.asarray(tensor.codes, int) - 3, (0, 255), 12, 16)


def test_defaults_are_the_recommended_ones_around_the_bound():
    recipe = jpfq.Rule(".*", bits=4, activation_bits=8, accumulator=jpfq.Accumulator(16, 64)).recipe()
    free = jpfq.Rule(".*", bits=4).recipe()
    assert isinstance(recipe.rounding, AXE)
    assert recipe.rounding.then == free.rounding
    assert recipe.rounding.sums.lo == 0
    assert recipe.rounding.sums.hi == 255
    assert (recipe.method, recipe.finish, recipe.order) == (free.method, free.finish, free.order)
    assert isinstance(recipe.scale.base, FitScale)


REFUSED = {
    "no room for a code": ({"accumulator": jpfq.Accumulator(8), "inputs": U8}, "9 bits at least"),
    "nor with signs": ({"accumulator": jpfq.Accumulator(8), "inputs": S8}, "9 bits at least"),
    "float inputs": ({}, "not quantized"),
    "not a guard": ({"accumulator": 16, "inputs": U8}, "Accumulator\\(16, tile=64\\)"),
    "no codes": ({"inputs": 8}, "\\(mu, nu\\)"),
    "codes without 0": ({"inputs": (3, 9)}, "mu <= 0"),
    "zero point": ({"bits": None, "grid": jpfq.Asymmetric(4), "inputs": U8}, "zero point"),
    "no zero": ({"bits": None, "grid": jpfq.Binary(), "inputs": U8}, "the weight 0"),
    "straddling groups": (
        {"inputs": U8, "scale": jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(24))},
        "straddle the tiles",
    ),
    "given groups": ({"inputs": U8, "scale": jpfq.scale.Fixed(np.ones((3, OUT)))}, "straddle the tiles of 32"),
    "refit groups": (
        {
            "inputs": U8,
            "scale": jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(16, refit=True)),
            "order": jpfq.order.Natural(),
            "finish": None,
        },
        "refit=False",
    ),
    "rotated inputs": ({"inputs": U8, "rotation": jpfq.Hadamard()}, "rotates inputs"),
    "radius": ({"inputs": U8, "rounding": jpfq.rounding.SoftThreshold(0.1, "radius")}, "unit='step'"),
    "feedback of GPFQ": (
        {"inputs": U8, "accumulator": jpfq.Accumulator(16, feedback="shrunk"), "method": jpfq.GPFQ()},
        "without it",
    ),
    "EP-init with feedback": ({"inputs": U8, "accumulator": jpfq.EPInit(16, 32), "scale": jpfq.scale.AbsMax()}, "MSQ"),
    "EP-init, then descent": (
        {"inputs": U8, "accumulator": jpfq.EPInit(16, 32), "method": jpfq.MSQ(), "finish": jpfq.finish.Descend()},
        "break the bound",
    ),
    "inputs alone": ({"accumulator": None, "inputs": U8}, "inputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        jpfq.solve(*gram(), **{"bits": 4, "accumulator": jpfq.Accumulator(16, 32)} | settings)
