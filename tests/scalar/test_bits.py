"""Packing: the bytes are those of an independent packing, and give the codes back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpfq.scalar.bits import code_bits, pack, packed_size, unpack

LEVELS = [*(2**b for b in range(1, 17)), 3, 5, 6, 7, 9, 15, 17, 255, 257, 1000]
DIGITS = {2: 8, 3: 5, 4: 4, 5: 3, 6: 3, 16: 2, 9: 2, 15: 2, 256: 1, 255: 1}  # levels -> codes to a byte


def packed(codes, levels):
    """By Python's integers: one large number, bit by bit, or digits of a byte for ternary, 5 and 6 levels."""
    if levels in (3, 5, 6):
        n = DIGITS[levels]
        base = 4 if levels == 4 else levels
        padded = [*codes, *[0] * (-len(codes) % n)]
        return bytes(sum(c * base**i for i, c in enumerate(padded[k : k + n])) for k in range(0, len(padded), n))
    width = max(1, (levels - 1).bit_length())
    number = sum(int(c) << (i * width) for i, c in enumerate(codes))
    return number.to_bytes(packed_size(len(codes), levels), "little")


@pytest.mark.parametrize("levels", LEVELS)
def test_bytes_are_those_of_an_independent_packing_and_come_back(levels):
    codes = np.random.default_rng(levels).integers(0, levels, (2, 13)).astype(np.uint16)
    codes[0, :2] = 0, levels - 1
    words = pack(codes, levels)
    assert words.dtype == jnp.uint8
    for row, line in zip(np.asarray(words), codes.tolist(), strict=True):
        assert row.tobytes() == packed(line, levels)
    found = unpack(words, levels, 13)
    assert found.dtype == (jnp.uint8 if levels <= 256 else jnp.uint16)
    np.testing.assert_array_equal(found, codes)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data())
def test_any_codes_of_any_count_come_back(data):
    levels = data.draw(st.sampled_from([2, 3, 6, 8, 16, 33, 257]))
    count = data.draw(st.sampled_from([0, 1, 5, 8, 17]))
    codes = data.draw(st.lists(st.integers(0, levels - 1), min_size=count, max_size=count))
    words = pack(np.array(codes, np.uint16), levels)
    assert words.nbytes == packed_size(count, levels)
    np.testing.assert_array_equal(unpack(words, levels, count), codes)


def test_five_ternary_codes_take_a_byte_and_nothing_takes_more_than_its_bits():
    assert packed_size(5, 3) == 1
    assert code_bits(3) == 1.6
    for levels in range(1, 2**16, 37):
        assert np.log2(levels) <= code_bits(levels) <= max(1, np.ceil(np.log2(levels)))
        assert 0 <= packed_size(1000, levels) - 1000 * code_bits(levels) / 8 < 16


def test_unpacking_works_inside_jit_and_under_vmap():
    codes = np.random.default_rng(0).integers(0, 8, (4, 16)).astype(np.uint8)
    words = jax.vmap(lambda row: pack(row, 8))(codes)
    np.testing.assert_array_equal(words, pack(codes, 8))
    double = jax.jit(jax.vmap(lambda row: 2 * unpack(row, 8, 16)))
    np.testing.assert_array_equal(double(words), 2 * codes)


@pytest.mark.parametrize("levels", [0, 2**16 + 1, 2.0, True])
def test_levels_it_cannot_pack_are_refused(levels):
    with pytest.raises(ValueError, match="levels; got"):
        pack(np.zeros(3, np.uint8), levels)


def test_bytes_of_another_count_are_refused():
    with pytest.raises(ValueError, match="packed into 2 bytes; got 3"):
        unpack(np.zeros(3, np.uint8), 16, 4)
