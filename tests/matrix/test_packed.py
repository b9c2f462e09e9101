"""Packed: the same tensor, in as many bytes as its bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.scalar.bits import packed_size
from tests.network.saved import assert_same, tensor

GRIDS = [jpfq.Integer(4), jpfq.Integer(8), jpfq.Asymmetric(3), jpfq.Ternary(), jpfq.Infinite(), jpfq.Symmetric(200)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_unpacked_it_is_the_tensor_it_was_made_of(grid):
    kernel = tensor((12, 4), (3, 4), grid)
    packed = jpfq.Packed.of(kernel)
    assert_same(packed.unpack(), kernel)
    assert_same(jax.jit(jpfq.Packed.dequantize)(packed), kernel.dequantize())


@pytest.mark.parametrize("shape", [(64, 1), (16, 5), (5, 16), (3, 3, 8, 1), (7, 5, 3)])
def test_codes_are_packed_along_the_axis_that_wastes_least(shape):
    kernel = tensor(shape, (1,) * len(shape), jpfq.Integer(4))
    packed = jpfq.Packed.of(kernel)
    least = min(packed_size(n, 16) * (kernel.codes.size // n) for n in shape)
    assert packed.words.nbytes == least
    assert_same(packed.unpack(), kernel)


def test_four_bits_take_an_eighth_of_float32_and_their_steps():
    packed = jpfq.Packed.of(tensor((64, 32), (1, 32), jpfq.Integer(4)))
    assert packed.words.dtype == jnp.uint8
    assert packed.nbytes == 64 * 32 // 2 + 4 * 32 + 4  # codes, steps, one zero point
    assert packed.nbytes <= 0.16 * 4 * 64 * 32
    fitted = jpfq.Packed.of(tensor((64, 32), (2, 32), jpfq.Asymmetric(4)))
    assert fitted.nbytes == 64 * 32 // 2 + 4 * 64 + 64  # a zero point is a byte


def test_swept_grids_and_mixed_trees_are_taken():
    swept = tensor((12, 4), (1, 4), jpfq.Integer(jnp.asarray(4)))
    tree = {"a": [jpfq.Packed.of(swept), jnp.ones(3)], "b": swept}
    found = jpfq.dequantize(tree)
    assert_same(found["a"][0], swept.dequantize())
    assert_same(found["b"], swept.dequantize())
    np.testing.assert_array_equal(found["a"][1], np.ones(3))


def test_a_grid_of_plain_numbers_is_part_of_the_program_and_words_are_its_input():
    kernel = tensor((12, 4), (1, 4), jpfq.Integer(4))
    traced = jax.make_jaxpr(lambda packed, x: x @ jpfq.dequantize(packed))(jpfq.Packed.of(kernel), jnp.ones((2, 12)))
    kinds = [v.aval.dtype for v in traced.jaxpr.invars]
    assert kinds == [jnp.uint8, jnp.float32, jnp.float32, jnp.float32]
    assert max(v.aval.size for v in traced.jaxpr.invars) == 24  # and nothing of the size of the kernel
