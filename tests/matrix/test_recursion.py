"""The recursion q = Q(A - L q): equals the plain loop in blocks of any size, in panels, with carries and with keys."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import Recursion, substitute
from jpfq.scalar import Rounding, ScaledGrid, register_dataclass
from tests.helpers import Dither, assert_codes_equal
from tests.reference import gpfq as reference

N, OUT = 40, 5
BLOCKS = [1, 16, 39, 40, None]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Carrying(Rounding):
    """Adds to each argument half of what it rounded away just before: a rounding with a memory."""

    def init(self):
        return jnp.zeros(()), jnp.zeros((), jnp.int32)

    def __call__(self, carry, a, context):
        (left, seen), levels = carry, context.levels
        target = a + levels.step * 0.5 * left.astype(a.dtype)
        code = levels.encode(target)
        return ((levels.position(target) - code).astype(left.dtype), seen + 1), code

    def error(self, levels):
        return levels.step


def system(seed, n=N, groups=1, scale=1.0):
    """A random target, feedback and levels of five bits, in float64."""
    rng = np.random.default_rng(seed)
    A, L = 2 * rng.standard_normal((n, OUT)), np.tril(rng.standard_normal((n, n)), -1) * scale / np.sqrt(n)
    step = rng.uniform(0.1, 0.4, (groups, OUT))
    return A, L, step


def levels_of(step):
    return ScaledGrid(jnp.asarray(step), jnp.zeros(step.shape), jnp.array(-16.0), jnp.array(15.0))


@functools.partial(jax.jit, static_argnames="block")
def run(A, L, step, order, rounding, key, block):
    return substitute(A, L, Recursion(levels_of(step), order, A.shape[1], rounding, key), block=block)


def solved(A, L, step, block, rounding=None, key=None, order=None):
    order = np.arange(A.shape[0]) if order is None else order
    return run(A, L, step, order, rounding or jpfq.rounding.Nearest(), key, block)


def by_loop(A, L, step):
    levels = reference.level_lists(A.shape, step, reference.integer(5)[0], np.zeros_like(step))
    return reference.recursion(A, L, levels)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_size_gives_the_codes_of_the_loop(x64, block):
    A, L, step = system(0)
    path, expected = solved(A, L, step, block), by_loop(A, L, step)
    assert_codes_equal(path.codes, expected.index - 16)
    np.testing.assert_allclose(path.q, expected.q, rtol=1e-14)
    position = expected.argument / step
    np.testing.assert_array_equal(path.saturated, (position < -16.5) | (position > 15.5))
    assert path.saturated.any()
    assert not path.saturated.all()


@pytest.mark.parametrize("block", [16, None])
def test_the_form_about_values(x64, block):
    """q = Q(A + L (v - q)) is q = Q(A' - L q) with A' = A + L v."""
    A, L, step = system(10)
    about = np.random.default_rng(0).standard_normal(A.shape)
    recursion = Recursion(levels_of(step), jnp.arange(N), OUT, jpfq.rounding.Nearest())
    path = jax.jit(lambda A, about: substitute(A, jnp.asarray(L), recursion, block=block, about=about))(A, about)
    assert_codes_equal(path.codes, by_loop(A + L @ about, L, step).index - 16)


@pytest.mark.parametrize("block", [16, None])
def test_groups_have_steps_of_their_own(x64, block):
    A, L, step = system(1, groups=4)
    assert_codes_equal(solved(A, L, step, block).codes, by_loop(A, L, step).index - 16)


def test_a_coordinate_keeps_the_step_of_its_original_index(x64):
    """Row t of the system is coordinate p[t] of the kernel, and takes the step of the group that p[t] lies in."""
    A, L, step = system(2, groups=4)
    p = np.random.default_rng(0).permutation(N)
    levels = reference.level_lists(A.shape, step, reference.integer(5)[0], np.zeros_like(step))
    expected = reference.recursion(A, L, levels[p])
    for block in (16, None):
        assert_codes_equal(solved(A, L, step, block, order=p).codes, expected.index - 16)


def test_no_feedback_is_rounding(x64):
    A, L, step = system(3)
    plain, zeros = solved(A, None, step, 16), solved(A, 0 * L, step, 16)
    assert_codes_equal(plain.codes, np.clip(np.floor(A / step + 0.5), -16, 15))
    assert_codes_equal(zeros.codes, plain.codes)


@pytest.mark.parametrize(("panel", "panels", "block"), [(8, 3, 4), (7, 8, 5), (20, 2, 16)])
def test_panels_change_nothing(x64, monkeypatch, panel, panels, block):
    module = importlib.import_module("jpfq.matrix.recursion")
    monkeypatch.setattr(module, "PANEL", panel)
    monkeypatch.setattr(module, "PANELS", panels)
    A, L, step = system(4)
    recursion = Recursion(levels_of(step), jnp.arange(N), OUT, jpfq.rounding.Nearest())
    codes = jax.jit(lambda A, L: substitute(A, L, recursion, block=block).codes)(A, L)
    assert_codes_equal(codes, by_loop(A, L, step).index - 16)


def test_a_matrix_of_several_panels(x64):
    module = importlib.import_module("jpfq.matrix.recursion")
    n = 2 * module.PANEL + 30
    A, L, step = system(5, n)
    codes = solved(A, L, step, 64).codes
    assert_codes_equal(codes, by_loop(A, L, step).index - 16)
    assert len(np.unique(codes)) == 32


@pytest.mark.parametrize("rounding", [Carrying(), Dither()], ids=["carry", "key"])
def test_carries_and_keys_do_not_see_the_blocks(x64, rounding):
    A, L, step = system(6)
    key = jax.random.key(0) if rounding.random else None
    plain = solved(A, L, step, None, rounding, key).codes
    assert_codes_equal(solved(A, L, step, 16, rounding, key).codes, plain)
    assert (plain != solved(A, L, step, None).codes).mean() > 0.1


def test_a_carry_reaches_the_next_coordinate(x64):
    A, _, step = system(7)
    expected = np.zeros((N, OUT))
    for o in range(OUT):
        left = 0.0
        for t in range(N):
            target = A[t, o] / step[0, o] + 0.5 * np.float32(left)
            expected[t, o] = np.clip(np.floor(target + 0.5), -16, 15)
            left = target - expected[t, o]
    assert_codes_equal(solved(A, None, step, None, Carrying()).codes, expected)


def test_draws_belong_to_the_original_coordinate_and_neuron():
    """Without feedback the order of the visit changes no code, though every coordinate draws."""
    A, _, step = (np.float32(x) for x in system(8))
    key, p = jax.random.key(1), np.random.default_rng(2).permutation(N)
    straight = np.asarray(solved(A, None, step, None, Dither(), key).codes)
    permuted = np.asarray(solved(A[p], None, step, None, Dither(), key, order=p).codes)
    assert_codes_equal(permuted, straight[p])
    other = np.asarray(solved(A, None, step, None, Dither(), jax.random.key(2)).codes)
    assert 0.1 < (other != straight).mean() < 0.9
    same = solved(np.repeat(A[:, :1], OUT, 1), None, np.repeat(step[:, :1], OUT, 1), None, Dither(), key).codes
    assert (np.diff(same, axis=1) != 0).any(axis=0).all()  # neurons draw differently


def test_neurons_are_independent(x64):
    A, L, step = system(9)
    together = np.asarray(solved(A, L, step, 16).codes)
    swap = np.arange(OUT)[::-1]
    assert_codes_equal(solved(A[:, swap], L, step[:, swap], 16).codes, together[:, swap])
