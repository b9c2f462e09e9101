"""Flax's own layers promote types and ranks silently, so the tests that run them must allow it."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _lenient():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def compilations():
    """Counts XLA compilations: a list that grows by one with each."""
    seen = []
    listener = lambda event, duration, **_: seen.append(event) if event.endswith("backend_compile_duration") else None
    jax.monitoring.register_event_duration_secs_listener(listener)
    return seen
