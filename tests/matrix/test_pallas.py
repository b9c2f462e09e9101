"""The kernel: codes of the scan for all that it can run, a refusal for the rest, and programs for TPU and GPU."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import Kernel, Recursion, chosen, substitute
from jpfq.scalar import ScaledGrid, register_dataclass
from tests.helpers import Dither, assert_codes_equal
from tests.matrix.test_recursion import OUT, Carrying, N, by_loop, levels_of, system

KERNEL = Kernel(tile=4, interpret=True)  # two tiles, the second with three neurons that are not there


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Budget(Carrying):
    """A rounding with inputs of its own at each coordinate and neuron, and a carry of two numbers for each neuron."""

    def init(self):
        return jnp.zeros(2)

    def __call__(self, carry, a, context):
        share, more = context.inputs
        code = context.levels.encode(a + share * carry[0] + more)
        return jnp.stack([context.levels.position(a) - code, carry[1] + 1]), code


@functools.partial(jax.jit, static_argnames=("kernel", "block", "rounding"))
def run(A, L, step, order, about, inputs, rounding, kernel, block):
    recursion = Recursion(levels_of(step), order, A.shape[1], rounding, kernel=kernel)
    return substitute(A, L, recursion, block=block, about=about, inputs=inputs)


def both(A, L, step, rounding, order=None, about=None, inputs=(), block=10):
    order = np.arange(len(A)) if order is None else order
    about = np.zeros_like(A) if about is None else about
    return (run(A, L, step, order, about, inputs, rounding, kernel, block) for kernel in (KERNEL, None))


@pytest.mark.parametrize(
    "rounding", [jpfq.rounding.SoftThreshold(0.3), jpfq.rounding.HardThreshold(1.0, "step"), Carrying(), Budget()]
)
def test_codes_are_those_of_the_scan(x64, rounding):
    """Blocks of ten coordinates, which is no power of two; groups of steps; an order; about values."""
    A, L, step = system(0, groups=4)
    rng = np.random.default_rng(1)
    inputs = (rng.standard_normal(N), rng.standard_normal((N, OUT))) if isinstance(rounding, Budget) else ()
    fast, plain = both(A, L, step, rounding, rng.permutation(N), rng.standard_normal(A.shape), inputs)
    assert_codes_equal(fast.codes, plain.codes)
    np.testing.assert_allclose(fast.q, plain.q, rtol=1e-14)
    np.testing.assert_array_equal(fast.saturated, plain.saturated)
    assert 0 < np.mean(fast.saturated) < 1


@pytest.mark.slow
def test_codes_are_those_of_the_loop(x64):
    A, L, step = system(2)
    for block, L_ in ((10, L), (None, L), (10, None)):  # blocks, one block of all, and no feedback
        fast, _ = both(A, L_, step, jpfq.rounding.Nearest(), block=block)
        assert_codes_equal(fast.codes, by_loop(A, 0 * L if L_ is None else L_, step).index - 16)


def test_many_matrices_at_once(x64):
    """Under vmap, with the setting of the rounding swept over; a zero point."""
    A, L, step = (np.stack(x) for x in zip(*(system(seed) for seed in (3, 4)), strict=True))

    def solved(A, L, step, lam, kernel):
        levels = ScaledGrid(step, jnp.full_like(step, 1.0), jnp.array(-3.0), jnp.array(4.0))
        recursion = Recursion(levels, jnp.arange(N), OUT, jpfq.rounding.SoftThreshold(lam), kernel=kernel)
        return substitute(A, L, recursion, block=10).codes

    fast, plain = (
        jax.jit(jax.vmap(functools.partial(solved, kernel=k)))(A, L, step, jnp.array([0.1, 0.9]))
        for k in (KERNEL, None)
    )
    assert_codes_equal(fast, plain)
    few, many = np.mean(np.asarray(fast) == 1, (1, 2))  # weights that are 0
    assert few < many < 1


def test_steps_that_are_refit_on_the_way(x64):
    A, L, step = system(5)
    refit = lambda W: levels_of(jnp.abs(W).max(0, keepdims=True) / 15)

    def solved(kernel):
        recursion = Recursion(
            levels_of(jnp.repeat(step, 4, 0)), jnp.arange(N), OUT, jpfq.rounding.Nearest(), refit=refit, kernel=kernel
        )
        return substitute(jnp.asarray(A), jnp.asarray(L), recursion, block=10)

    fast, plain = (jax.jit(functools.partial(solved, k))() for k in (KERNEL, None))
    assert_codes_equal(fast.codes, plain.codes)
    np.testing.assert_allclose(fast.refit.step, plain.refit.step, rtol=1e-12)


def recursion(rounding, key=None, kernel=None):
    return Recursion(levels_of(np.ones((1, OUT))), jnp.arange(N), OUT, rounding, key, kernel=kernel)


def test_the_scan_runs_unless_a_kernel_is_given():
    assert chosen(recursion(jpfq.rounding.Nearest())) is None
    for platform in ("cpu", "gpu", "tpu"):  # on none of them was it measured
        assert chosen(recursion(jpfq.rounding.Nearest()), platform) is None
    assert chosen(recursion(jpfq.rounding.Nearest(), kernel=KERNEL)) is KERNEL


def test_where_it_wins_it_runs_what_it_can(monkeypatch):
    monkeypatch.setattr("jpfq.matrix.pallas.WINS", ("tpu",))
    assert chosen(recursion(jpfq.rounding.Nearest()), "tpu") == Kernel()
    assert chosen(recursion(jpfq.rounding.Nearest()), "gpu") is None
    assert chosen(recursion(Dither(), jax.random.key(0)), "tpu") is None
    assert chosen(recursion(jpfq.rounding.SoftThreshold(jnp.ones(3))), "tpu") is None


def test_a_kernel_that_is_asked_for_says_what_it_cannot_do():
    A = jnp.zeros((N, OUT))
    for rounding, key, match in (
        (Dither(), jax.random.key(0), "it draws random numbers.* Leave Recursion.kernel at None"),
        (jpfq.rounding.SoftThreshold(jnp.ones(3)), None, r"SoftThreshold\(.*\) holds arrays"),
    ):
        with pytest.raises(ValueError, match=match):
            substitute(A, None, recursion(rounding, key, KERNEL))
    for tile in (0, 96, 2.0):
        with pytest.raises(ValueError, match=f"a power of two; got {re.escape(repr(tile))}"):
            Kernel(tile)


@pytest.mark.parametrize(("platform", "target"), [("tpu", "tpu_custom_call"), ("cuda", "triton")])
def test_it_lowers_without_a_device(platform, target):
    """Blocks of 64 in float32, with a carry and groups: one call, in the loop over blocks. That it compiles and is right
    on a device no test here can see."""
    if platform == "cuda" and tuple(map(int, jax.__version__.split(".")[:2])) > (0, 10):
        pytest.skip("after 0.10 JAX lowers for Triton, which it means to give up, only where there is a GPU")

    def solved(A, L, step, lam):
        levels = ScaledGrid(step, jnp.zeros_like(step), jnp.array(-8.0), jnp.array(7.0))
        return substitute(A, L, Recursion(levels, jnp.arange(256), 256, Carrying(), kernel=Kernel()), about=A).codes

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((256, 256), (256, 256), (4, 256), ())]
    text = jax.jit(solved).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert len(re.findall(rf"custom_call @[\w$.]*{target}", text)) == 1
