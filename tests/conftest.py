"""Strict settings for all tests: no silent promotion of types or ranks; warnings are errors (pyproject.toml)."""

import gc
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
)

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the command writes nothing into the user's own
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import jax
import pytest

from jpfq.model import segments
from jpfq.storage import caching

MAPS = Path("/proc/self/maps")  # on Linux
MANY = 20_000  # of the 65,530 that a process may have by default; every compiled program takes several

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def compilations():
    """Counts XLA compilations: a list that grows by one with each."""
    seen = []
    listener = lambda event, duration, **_: seen.append(event) if event.endswith("backend_compile_duration") else None
    jax.monitoring.register_event_duration_secs_listener(listener)
    return seen


@pytest.fixture
def cache_settings():
    """JAX may keep compiled programs, as far as its settings say, and is told nothing of it; as before at the end."""
    names = (caching.SWITCH, caching.FOLDER, caching.LEAST_TIME)
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (True, None, caching.JAX_LEAST_TIME), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def close_figures():
    """No test finds the figures of another."""
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


@pytest.fixture(autouse=True, scope="module")
def let_programs_go():
    """Forgets what is compiled once it is much: a process that runs out of maps is killed by its next compilation."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY:
        segments._compiled.clear()
        jax.clear_caches()
        gc.collect()
