"""Eight host devices and a compilation cache that outlives the run, set before jax starts."""

import itertools
import os
import pathlib

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

_CACHE = pathlib.Path(__file__).parent.parent / ".jax_cache"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Decoded images of this session are nobody else's."""
    os.environ["ABKD_JAX_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


_LONG = set((pathlib.Path(__file__).parent / "long.txt").read_text().splitlines())


def pytest_collection_modifyitems(items):
    """Marks the tests of long.txt."""
    for item in items:
        if item.nodeid in _LONG:
            item.add_marker(pytest.mark.long)


_MOST_MAPS = 20_000  # of the 65,530 that Linux allows a process: past them XLA's compiler crashes
_tests = itertools.count(1)


def pytest_runtest_teardown():
    """Now and then forgets the compiled programs, each of which holds some memory maps."""
    maps = pathlib.Path("/proc/self/maps")
    if next(_tests) % 20 == 0 and maps.exists():
        if maps.read_bytes().count(b"\n") > _MOST_MAPS:
            jax.clear_caches()
