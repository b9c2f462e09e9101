"""Settings as pytrees: whole through flatten and unflatten, and never taken for one another."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest

import jpfq
from jpfq.scalar import register_dataclass

# Grouped by what stands in one place of a recipe.
SETTINGS = {
    "grids": [jpfq.Ternary(), jpfq.Binary(), jpfq.Infinite()]
    + [jpfq.Integer(4), jpfq.Integer(4, narrow=True), jpfq.Asymmetric(4), jpfq.Symmetric(4), jpfq.Equispaced(4)],
    "scales": [
        make(0.5, per=jpfq.scale.PerTensor()) for make in (jpfq.scale.AbsMax, jpfq.scale.Median, jpfq.scale.Quantile)
    ]
    + [
        jpfq.scale.AbsMax(0.5),
        jpfq.scale.AbsMax(0.5, per=jpfq.scale.PerGroup(4)),
        jpfq.scale.AbsMax(0.5, per=jpfq.scale.PerGroup(8)),
    ]
    + [
        jpfq.scale.MinMSE(),
        jpfq.scale.MinMSE(norm=2.4),
        jpfq.scale.MinMSE(weighted=True),
        jpfq.scale.MinError(),
        jpfq.scale.MinError(rounds=3),
    ]
    + [jpfq.scale.Fixed(0.5), jpfq.scale.AbsMax(0.5, per=jpfq.scale.PerGroup(8, refit=True))],
    "methods": [jpfq.GPFQ(), jpfq.MSQ(), jpfq.UNI(), jpfq.OPTQ(), jpfq.QEP(), jpfq.GPTAQ()]
    + [jpfq.Qronos(), jpfq.Qronos(exact=True), jpfq.OPTQ(jpfq.damping.TopEigenvalue(0.01))],
    "orders": [jpfq.order.Natural(), jpfq.order.Descending(), jpfq.order.MinPivot()],
    "prepare": [
        jpfq.prepare.Align(),
        jpfq.prepare.Align(2),
        jpfq.prepare.LeastSquares(),
        jpfq.prepare.MagR(),
        jpfq.prepare.MalySaab(),
    ],
    "roundings": [
        jpfq.rounding.Nearest(),
        jpfq.rounding.Stochastic(),
        jpfq.rounding.SoftThreshold(0.1),
        jpfq.rounding.SoftThreshold(0.1, "step"),
    ]
    + [
        jpfq.rounding.HardThreshold(0.1),
        jpfq.rounding.Prune(0.1),
        jpfq.rounding.Prune(0.1, then=jpfq.rounding.Nearest()),
    ],
    "finish": [
        jpfq.finish.Refit(),
        jpfq.finish.Descend(),
        jpfq.finish.Descend(2),
        jpfq.finish.CosineDescend(3),
        jpfq.finish.CosineDescend(),
    ],
}


@pytest.mark.parametrize("place", SETTINGS)
def test_settings_differ_in_structure(place):
    """The programs that `jit` keeps are found by structure: two settings of one structure would share a program."""
    for a, b in itertools.combinations(SETTINGS[place], 2):
        assert jax.tree.structure(a) != jax.tree.structure(b), f"{a} and {b}"
        assert not jax.tree.structure(a) == jax.tree.structure(b), f"{a} and {b}"  # noqa: SIM201, another method in C++
        assert not jax.tree.structure((a, 1)) == jax.tree.structure((b, 1)), f"{a} and {b}"  # noqa: SIM201


@pytest.mark.parametrize("setting", [s for group in SETTINGS.values() for s in group], ids=repr)
def test_settings_survive(setting):
    assert jax.tree.map(lambda x: x, setting) == setting
    assert jax.tree.structure(dataclasses.replace(setting)) == jax.tree.structure(setting)


def test_numbers_are_leaves_and_are_named():
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(jpfq.scale.Quantile(0.9, 1.1))
    ]
    assert paths == [".p", ".c"]
    assert jax.tree.leaves(jpfq.scale.Quantile(0.9, 1.1)) == [0.9, 1.1]
    assert jax.tree.structure(jpfq.scale.AbsMax(0.5)) == jax.tree.structure(jpfq.scale.AbsMax(2.0))


def test_jit_never_takes_one_class_for_another():
    """Many classes without fields, so that the hashes of some collide."""

    def make(i):
        @register_dataclass
        @dataclasses.dataclass(frozen=True)
        class Adds:
            def __call__(self, x):
                return x + i

        return Adds()

    run = jax.jit(lambda add, x: add(x))
    adders = [make(i) for i in range(60)]
    assert [int(run(add, jnp.int32(0))) for add in adders] == list(range(60))
    assert [int(run(add, jnp.int32(0))) for add in adders] == list(range(60))
