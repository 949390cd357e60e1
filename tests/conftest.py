"""Eight host devices and a compilation cache that outlives the run, set before jax starts.

Both by the environment, so that the processes which tests start have the cache, too.
"""

import itertools
import os
import pathlib

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parents[1] / ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import pytest
from hypothesis import settings

from abkd_jax import figures, files


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Decoded images of this session are nobody else's."""
    os.environ["ABKD_JAX_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


_OF_PICTURES = ("figures_test", "report_test", "rows_test")


@pytest.fixture(scope="module", autouse=True)
def no_pictures(request):
    """Where no test looks at pictures their files are empty: to draw is a third of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem not in _OF_PICTURES:
            patch.setattr(figures, "save", _empty)
        yield


def _empty(figure, path):
    place = files.path_of(path, "path")
    place.parent.mkdir(parents=True, exist_ok=True)
    files.write(place, b"")
    return path


@pytest.fixture(scope="module")
def torch():
    """PyTorch, against which networks, losses and folders are held."""
    return pytest.importorskip("torch", reason="torch is the oracle: pip install -e '.[torch]'")


@pytest.fixture(scope="module")
def transformers(torch):
    """The library, which says no more than it must."""
    reason = "transformers is the oracle: pip install -e '.[torch]'"
    found = pytest.importorskip("transformers", reason=reason)
    found.utils.logging.set_verbosity_error()
    found.utils.logging.disable_progress_bar()
    return found


_LISTED = {
    mark: set((pathlib.Path(__file__).parent / f"{mark}.txt").read_text().splitlines())
    for mark in ("long", "nightly")
}


settings.register_profile("no clock", deadline=None)  # which a busy machine misses
settings.load_profile("no clock")


# The files that take longest begin first, so that no worker is left with one at the end.
_FIRST = (
    "survival language_run configs hosts colabs divergences loop decouple sweep experiments "
    "single_pass accelerator recomputed combinators chunk_run main feature_run relation step "
    "losses probing"
).split()


def pytest_collection_modifyitems(items):
    """Marks the tests of long.txt and nightly.txt, and puts the longest files first."""
    for item in items:
        for mark, listed in _LISTED.items():
            if item.nodeid in listed:
                item.add_marker(mark)
    place = {f"{name}_test": number for number, name in enumerate(_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(_FIRST)))


_MOST_MAPS = 20_000  # of the 65,530 that Linux allows a process: past them XLA's compiler crashes
_tests = itertools.count(1)


def pytest_runtest_teardown():
    """Now and then forgets the compiled programs, each of which holds some memory maps."""
    maps = pathlib.Path("/proc/self/maps")
    if next(_tests) % 20 == 0 and maps.exists():
        if maps.read_bytes().count(b"\n") > _MOST_MAPS:
            jax.clear_caches()
