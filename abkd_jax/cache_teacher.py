"""The command that writes a teacher's cache.

    python -m abkd_jax.cache_teacher --config="configs/text.py:teacher='runs/text/teacher'" \\
        --k=16 --out=runs/cache

It runs the teacher once over the training rows of the config's text, and keeps the k likeliest
classes of each predicted token, and the others as one. A run of `teacher='runs/cache'` learns from
these, without the teacher. The same command goes on where it was stopped. Several processes
(docs/scaling.md) each write shards of their own.
"""

import functools

from absl import app, flags

from abkd_jax.config import command
from abkd_jax.data import TopCache
from abkd_jax.run.caching import cache_teacher
from abkd_jax.train import hosts

_CONFIG = command.define_config()
_OUT = flags.DEFINE_string("out", None, "The folder of the cache, which is made.")
_NETWORK = flags.DEFINE_string("network", "teacher", "Of the config, with weights.")
_K = flags.DEFINE_integer("k", 64, "Likeliest classes that are kept.")
_SHARD_ROWS = flags.DEFINE_integer("shard_rows", 1024, "Rows of a shard.")
_PLACE = command.define_fields(hosts.Place, "Of several processes: docs/scaling.md.")
_FLAGS = ("config", "out", "network", "k", "shard_rows", *hosts.Place._fields)
parse = functools.partial(command.parse, known=_FLAGS)


@command.entry
def main() -> None:
    """Writes the cache, and prints its size."""
    command.required(_CONFIG, _OUT)
    how = {"network": _NETWORK.value, "k": _K.value, "shard_rows": _SHARD_ROWS.value}
    hosts.start(_PLACE())
    with hosts.together():
        cache = cache_teacher(_CONFIG.value, _OUT.value, **how)
        hosts.barrier()
    if hosts.is_first():
        _tell(cache)


def _tell(cache: TopCache) -> None:
    rows, count = cache.about["rows"], cache.about["predicted"]
    print(
        f"{cache.folder}: {rows:,} rows, {count:,} predicted tokens, {cache.size / 1e6:,.1f} MB, "
        f"{cache.size / count:,.1f} bytes/token; teacher {cache.about['teacher'][:12]}"
    )


if __name__ == "__main__":
    with command.interruptible():
        command.keep_programs()
        app.run(main, flags_parser=parse)
