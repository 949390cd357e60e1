"""The cache of compiled programs of the commands: where it is, who decides, and torn entries."""

import os
import pathlib
import subprocess
import sys

SCRIPT = """
from abkd_jax.config import command
command.keep_programs()
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(jax.config.jax_compilation_cache_dir)
print(float(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((3, 3)))))
"""


def told(folder, **variables):
    """What a process of its own prints: its cache, and the result of a program."""
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    environment = kept | {"XDG_CACHE_HOME": str(folder), **variables}
    argv = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def entries(folder):
    return [path for path in pathlib.Path(folder).rglob("*-cache") if path.is_file()]


def test_programs_are_kept_and_a_torn_one_is_compiled_anew(tmp_path):
    cache, result = told(tmp_path)
    assert pathlib.Path(cache).parent == tmp_path / "abkd_jax" / "programs" and result == "27.0"
    (found,) = [path for path in entries(cache) if "lambda" in path.name]
    found.write_bytes(found.read_bytes()[:100])
    assert told(tmp_path) == [cache, "27.0"]


def test_who_says_where_is_heard(tmp_path):
    own = str(tmp_path / "own")
    assert told(tmp_path / "home", JAX_COMPILATION_CACHE_DIR=own) == [own, "27.0"]
    assert entries(own)
    switched_off = told(tmp_path / "home", JAX_ENABLE_COMPILATION_CACHE="false")
    assert switched_off == ["None", "27.0"] and not entries(tmp_path / "home")
