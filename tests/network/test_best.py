"""The recommended recipe: what a bare number of bits means, and that it is worth its time."""

import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from tests.network import zoo

RECOMMENDED = {
    "scale": jpfq.scale.MinError(),
    "shrinkage": jpfq.Shrinkage(),
    "order": jpfq.order.Descending(),
    "method": jpfq.Qronos(),
    "rounding": jpfq.rounding.Nearest(),
    "finish": jpfq.finish.CosineDescend(passes=4),
}
NOTHING_MORE = {"finish": None, "shrinkage": None}


@pytest.fixture(autouse=True)
def _lenient():
    """No layers of Flax here: strict, as everywhere else."""


def mlp():
    """Three layers of equal shape, and correlated inputs of unequal sizes, as in a trained network."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((24, 24)) * np.geomspace(1, 0.1, 24)[:, None] / 2
    data = [(rng.standard_normal((100, 24)) @ mix).astype(np.float32) for _ in range(3)]
    sizes = np.exp(0.5 * rng.standard_normal((3, 24, 1)))
    params = {name: W.astype(np.float32) for name, W in zip("abc", sizes * rng.standard_normal((3, 24, 24)) / 4)}
    fn = lambda params, x: jnp.maximum(jnp.maximum(x @ params["a"], 0) @ params["b"], 0) @ params["c"]
    return fn, data, params


@pytest.fixture(scope="module")
def quantized():
    """The MLP under any rules."""
    fn, data, params = mlp()
    return lambda rules: jpfq.quantize(fn, data, rules, params=params)


def test_bits_alone_mean_the_recommended_parts(quantized):
    bare = quantized(3)
    assert str(bare.tensors["a"].grid) == "Integer(3)"
    for rules in (jpfq.best(3), jpfq.best(grid=jpfq.Integer(3)), jpfq.Rule(".*", bits=3, **RECOMMENDED)):
        again = quantized(rules)
        for name in "abc":
            np.testing.assert_array_equal(again.tensors[name].codes, bare.tensors[name].codes)
            np.testing.assert_array_equal(again.tensors[name].step, bare.tensors[name].step)


@pytest.mark.slow
def test_the_recommended_beat_path_following_and_that_beats_rounding(quantized):
    best, gpfq, msq = (
        quantized(rules).output_error for rules in (3, zoo.plain(bits=3), zoo.plain(bits=3, method=jpfq.MSQ()))
    )
    assert best < 0.8 * gpfq
    assert gpfq < 0.8 * msq


def test_other_alphabets_run_in_the_same_program(quantized, compilations):
    quantized(3)
    compilations.clear()
    results = [quantized(jpfq.best(grid=grid)) for grid in (jpfq.Ternary(), jpfq.Binary(), jpfq.Symmetric(4))]
    assert compilations == []
    assert [len(np.unique(result.tensors["b"].codes)) for result in results] == [3, 2, 9]
    ternary, binary, nine = (result.output_error for result in results)
    assert nine < ternary < binary


def test_best_takes_bits_a_grid_a_pattern_or_nothing():
    recipe = lambda *args, **kwargs: jpfq.best(*args, **kwargs)[0].recipe()
    assert recipe() == recipe(4) == recipe(grid=jpfq.Integer(4))
    assert recipe(1).grid == jpfq.Binary()
    assert jpfq.best(2, pattern="head/.*")[0].matches("head/kernel")
    assert not jpfq.best(2, pattern="head/.*")[0].matches("body/kernel")
    with pytest.raises(ValueError, match="one of them"):
        jpfq.best(3, grid=jpfq.Ternary())


def test_what_is_left_out_is_recommended_and_none_is_none():
    rule = jpfq.Rule(".*", bits=3)
    found = {name: getattr(rule.recipe(), name) for name in RECOMMENDED}
    assert found == RECOMMENDED
    assert (rule.recipe().rotation, rule.recipe().prepare) == (None, ())
    for name, part in RECOMMENDED.items():  # naming one part leaves the others
        assert jpfq.Rule(".*", bits=3, **{name: part}).recipe() == rule.recipe()
    for name in NOTHING_MORE:
        recipe = jpfq.Rule(".*", bits=3, **{name: None}).recipe()
        assert {part: getattr(recipe, part) for part in RECOMMENDED} == RECOMMENDED | {name: None}
    same = jpfq.Rule(".*", bits=3, scale=None, method=None, order=None, prepare=None, rounding=None)
    assert same.recipe() == rule.recipe()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rounding": jpfq.rounding.Stochastic()}, {"finish": None}),  # the finish would round what is drawn to nearest
        ({"rounding": jpfq.rounding.SoftThreshold(0.1)}, {"finish": None}),
        ({"scale": jpfq.scale.Fixed(0.1)}, {"finish": jpfq.finish.Descend()}),  # a step that is given stays
        ({"form": "data"}, {"method": jpfq.GPFQ(), "scale": jpfq.scale.MinMSE(), **NOTHING_MORE}),
        ({"prepare": jpfq.prepare.MalySaab()}, {"prepare": (jpfq.prepare.MalySaab(),), "shrinkage": None}),
        ({"scale": jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(8, refit=True))}, {"order": jpfq.order.Natural()}),
    ],
)
def test_recommendations_make_way_for_what_is_named(given, expected):
    recipe = jpfq.Rule(".*", bits=3, **given).recipe()
    assert {name: getattr(recipe, name) for name in expected} == expected


def test_plain_is_the_method_and_nothing_around_it():
    named = {"scale": jpfq.scale.MinMSE(), "order": jpfq.order.Natural(), "finish": None, "shrinkage": None}
    for method in (jpfq.GPFQ(), jpfq.OPTQ(), jpfq.MSQ()):
        plain = jpfq.Rule(".*", bits=4, method=method, plain=True).recipe()
        assert plain == jpfq.Rule(".*", bits=4, method=method, **named).recipe()
    kept = jpfq.Rule(".*", bits=4, plain=True, scale=jpfq.scale.AbsMax(), finish=jpfq.finish.Refit()).recipe()
    assert (kept.scale, kept.finish) == (jpfq.scale.AbsMax(), jpfq.finish.Refit())
    with pytest.raises(ValueError, match=r"skips its kernels, so \['plain'\] mean nothing"):
        jpfq.Rule(".*", skip=True, plain=True)
