"""Strict settings for all tests: no silent promotion of types or ranks; warnings are errors (pyproject.toml).

What one process of a run has compiled is there for the others: two workers, and the programs that tests start.
"""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # else by whoever started this process: a user, or the first of us
    programs = tempfile.mkdtemp(prefix="jpfq-programs-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": programs, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

import jax
import pytest

from jpfq.network import segments

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
