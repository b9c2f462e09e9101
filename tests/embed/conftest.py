"""Counting compilations."""

import jax
import pytest


@pytest.fixture
def compilations():
    """Counts XLA compilations: a list that grows by one with each."""
    seen = []
    listener = lambda event, duration, **_: seen.append(event) if event.endswith("backend_compile_duration") else None
    jax.monitoring.register_event_duration_secs_listener(listener)
    return seen
