"""One process of a run of several, as `hosts_test.py` starts them, and the runs that it makes.

    python hosts_run.py HOST:PORT NUM_PROCESSES PROCESS_ID FOLDER RUN...

It writes what it saw to FOLDER/seen_PROCESS_ID.json.
"""

import json
import pathlib
import runpy
import shutil
import signal
import sys
from unittest import mock

import jax
import numpy as np
from etils import epath
from jax import numpy as jnp

from abkd_jax import data, parallel, train_and_evaluate
from abkd_jax.data.digits import digits
from abkd_jax.data.options import Found, Options, data_set
from abkd_jax.train import hosts

STEPS = 20
INTERVALS = dict(checkpoint_every=10, log_every=10, steps_per_call=1)
TEXT = pathlib.Path(__file__).parents[1] / "configs" / "text.py"


class Records:
    """The examples of a split, one by one."""

    def __init__(self, split):
        self.inputs, self.labels = np.asarray(split.inputs), np.asarray(split.labels)

    def __getitem__(self, row):
        return {"inputs": self.inputs[row], "labels": self.labels[row]}


@data_set
def streamed(*, data_seed: int, options: Options) -> Found:
    """The digits as streams."""
    how = dict(data_seed=data_seed, validation=97)

    def read():
        found = digits(**how)
        parts = ("train", "full", "validation", "test")
        splits = {name: getattr(found, name) for name in parts}
        streams = {x: data.Stream(Records(s), np.arange(len(s))) for x, s in splits.items()}
        return found.replace(**streams)

    return digits.describe(**how), read


@data_set
def others(*, data_seed: int, options: Options) -> Found:
    """Digits, of which each process has others to train on."""
    how = dict(data_seed=data_seed, validation=97)
    own = dict(how, data_seed=data_seed + jax.process_index())
    return digits.describe(**how), lambda: digits(**how).replace(train=digits(**own).train)


def sgd():
    return dict(fn="sgd", learning_rate=0.05, momentum=0.9)


def network(model, **terms):
    task = dict(fn="cross_entropy", weight=1.0)
    return dict(model=model, optimizer=sgd(), terms=dict(task=task, **terms))


def online(**changes):
    """Two networks with batch norm that learn together, by a loss that couples a batch."""
    cnn = dict(fn="cnn", widths=(4,), batch_norm=True)
    coupled = dict(fn="dist", weight=1.0, temperature=2.0)
    pair = dict(teacher=network(cnn, distill=coupled), student=network(cnn, distill=coupled))
    pair["student"] |= dict(init_seed=1, ema_decay=0.5)
    together = dict(learn=("teacher", "student"), select="student")
    return (
        _config(data=dict(fn="digits", validation=97), **pair, phases=dict(both=together)) | changes
    )


def stream(**changes):
    """A network that learns of a stream, after a teacher whose class means it is held to."""
    mlp = dict(fn="mlp", widths=(8,))
    means = dict(fn="on_logits", weight=1.0, divergence=dict(fn="alpha_beta", alpha=0.8, beta=0.5))
    return (
        _config(
            data=dict(fn="hosts_run.streamed"),
            teacher=network(mlp),
            student=network(mlp, distill=means),
            phases=dict(
                teacher=dict(learn=("teacher",), split="full"),
                distill=dict(learn=("student",), see=("teacher",)),
            ),
            plugins=("hosts_run",),
            steps_per_call=3,  # whose batches a stream stacks
        )
        | changes
    )


def split(**changes):
    """A network whose largest kernel is split over all devices."""
    model = dict(fn="mlp", widths=(256, 256))
    alone = dict(alone=dict(learn=("student",), split="labelled"))
    data = dict(fn="digits", validation=97, labelled=30)
    return _config(data=data, student=network(model), phases=alone, fsdp=4) | changes


def decoder(**changes):
    """A decoder that learns in chunks of tokens, and is split over two of each four devices."""
    return _text("", chunk=16, fsdp=2, **changes)


def on_policy(**changes):
    """A decoder that learns more and more on its own text."""
    return _text(",source=generated('student',fraction=linear(0,1))", **changes)


def _text(argument, **changes):
    made = runpy.run_path(str(TEXT))["get_config"](f"runlocal{argument}")
    with made.unlocked():
        del made.baseline, made.phases["baseline"]
        made.phases.teacher.num_steps = 4
        made.teacher.optimizer, made.student.optimizer = sgd(), sgd()
        made.update(dict(num_steps=STEPS, **INTERVALS) | changes)
    return made


def _config(**groups):
    return dict(batch_size=64, num_steps=STEPS, **INTERVALS) | groups


RUNS = dict(online=online, stream=stream, split=split, decoder=decoder, on_policy=on_policy)


def told(function):
    """What a refusal says."""
    try:
        return ["returned", function()]
    except (ValueError, OSError) as error:
        return [type(error).__name__, f"{error}"]


def agreements(folder):
    """What the processes say to each other, by what is asked."""
    own = jax.process_index()
    of_each = dict(data=dict(fn="hosts_run.others"), plugins=("hosts_run",))

    def refuses(*processes, kind=ValueError):
        if own in processes:
            raise kind("the disk is full." if kind is OSError else f"no {len(processes)}.")
        return own

    def refuses_before():
        refuses(1)
        return hosts.by_first(lambda: "of 0")

    found = {
        "all": told(lambda: hosts.everyone(refuses)),
        "one": told(lambda: hosts.everyone(lambda: refuses(1))),
        "each": told(lambda: hosts.everyone(lambda: refuses(0, 1))),
        "system": told(lambda: hosts.everyone(lambda: refuses(0, kind=OSError))),
        "nested": told(lambda: hosts.everyone(refuses_before)),
        "first": told(lambda: hosts.by_first(lambda: refuses() + 7)),
        "first refuses": told(lambda: hosts.by_first(lambda: refuses(0))),
        "agreed": told(lambda: hosts.agree(own + 3)),
        "equal": told(lambda: hosts.equal({"config.x": 1, "config.y": 2})),
        "unequal": told(lambda: hosts.equal({"config.x": 1, "config.y": own})),
        "shared": told(lambda: hosts.check_shared(folder)),
        "buckets": told(lambda: hosts.check_shared(epath.Path(f"gs://bucket/of_{own}"))),
        "kinds": told(lambda: hosts.check_shared([folder, epath.Path("gs://bucket/run")][own])),
        "not shared": told(lambda: hosts.check_shared(folder / f"of_{own}", seconds=1)),
        "config": told(lambda: train_and_evaluate(online(batch_size=64 << own), folder / "none")),
        "data": told(lambda: train_and_evaluate(online(**of_each), folder / "none")),
    }
    version = {"the version of jax": f"0.10.{own}"}
    with mock.patch.object(hosts, "versions", lambda: version):
        found["version"] = told(lambda: train_and_evaluate(online(), folder / "none"))
    mesh = parallel.mesh(0, batch_size=8)
    rows = parallel.joined(np.arange(4.0) + 4 * own, mesh)
    found["rows"] = parallel.fetched(rows).tolist()
    found["sum"] = float(jnp.sum(rows))
    wishes = hosts.Wishes(mesh)
    asked = [signal.SIGTERM if own == 1 and call == 2 else None for call in range(6)]
    found["wishes"] = [wishes.agreed(wish) for wish in asked]
    return found


def digests(config, workdir):
    result = train_and_evaluate(config(), workdir)
    return {name: network["sha256"] for name, network in result["networks"].items()}


def damaged(folder):
    """The digests of a run that goes on without its last checkpoint, of which a copy is left."""
    run = folder / "online"
    if hosts.is_first():  # as if it had been killed while it wrote that
        for path in (run / "report.md", run / "result.json"):
            path.unlink()
        shutil.copytree(run, folder / "copy")
        for path in (run / "checkpoints" / f"{STEPS}" / "state").rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    hosts.barrier()
    return digests(online, run)


def main():
    coordinator, count, own, folder, *names = sys.argv[1:]
    place = hosts.Place(False, coordinator, int(count), int(own), coordinator_timeout=60)
    hosts.start(place)
    folder = pathlib.Path(folder)
    (folder / f"of_{own}").mkdir()
    with hosts.together():
        seen = {"sha256": {name: digests(RUNS[name], folder / name) for name in names}}
        if "online" in names:
            seen |= agreements(folder) | {"again": damaged(folder)}
        (folder / f"seen_{own}.json").write_text(json.dumps(seen))
        if own == "1":
            raise ValueError("the data of process 1 are gone.")
        hosts.barrier()


if __name__ == "__main__":
    main()
