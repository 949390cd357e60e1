"""What tests give to the processes that they start."""

import os


def environment(**more: str) -> dict[str, str]:
    """That of the tests, with conftest.py's cache, but with one device, as a user has it.

    All that a process compiles is kept, for others compile the same.
    """
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"  # the last counts
    kept = {"XLA_FLAGS": flags, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | kept | more
