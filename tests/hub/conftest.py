"""Flax's own layers promote types and ranks silently, so the tests that run them must allow it."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _lenient():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
