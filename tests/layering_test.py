"""The floors of the library: imports go to lower floors, or sideways without a cycle.

A module's floor is that of the longest name in FLOORS which is its own or that of a package around
it. The package `abkd_jax` itself stands for its `__init__`, the public names.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = "abkd_jax"
FLOORS = {
    "types": 0,
    "binding": 0,
    "checks": 0,
    "numerics": 0,
    "schedules": 0,
    "figures": 0,
    "files": 0,
    "markdown": 0,
    "timing": 0,
    "costs": 0,
    "parallel": 0,
    "divergences": 1,
    "models": 1,
    "data": 1,
    "optimizers": 1,
    "metrics": 2,
    "losses": 2,
    "tasks": 3,
    "analysis": 3,
    "train": 4,
    "sources": 4,
    "generate": 2,
    "cache_teacher": 7,
    "respond": 7,
    "samples": 7,
    "config": 5,
    "run": 6,
    "sweep": 6,
    "report": 6,
    "main": 7,
}
PUBLIC_NAMES = 7  # abkd_jax/__init__.py
LINEN = "flax.linen"
LINEN_ALONE_IN = "models"
SCRIPTS = ("configs", "experiments")  # imported by nobody but a package of theirs by itself
TESTS = "tests"  # imported by no module of the library


def read(root: pathlib.Path, folder: str) -> dict[str, set[str]]:
    """What each module below a folder imports, by its name: "abkd_jax.losses.lift"."""
    modules = {}
    for path in sorted((root / folder).rglob("*.py")):
        *package, stem = path.relative_to(root).with_suffix("").parts
        name = ".".join(package if stem == "__init__" else [*package, stem])
        modules[name] = imports(ast.parse(path.read_text()), package)
    return modules


def imports(tree: ast.AST, package: list[str]) -> set[str]:
    """Dotted names imported anywhere in a file, functions and conditions included.

    `import a.b` and `from a import b` are both "a.b", and so is `import a` with a use of `a.b`.
    """
    found, aliases = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add(alias.name)
                whole = alias.name if alias.asname else alias.name.split(".")[0]
                aliases[alias.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            taken = {alias.asname or alias.name: f"{source}.{alias.name}" for alias in node.names}
            found |= set(taken.values())
            aliases |= taken
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in aliases:
                found.add(f"{aliases[node.value.id]}.{node.attr}")
    return found


def floor(name: str, floors: dict[str, int]) -> int | None:
    """The floor of a module of the library; None if FLOORS has none for it."""
    if name == LIBRARY:
        return PUBLIC_NAMES
    parts = name.split(".")[1:]
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((floors[part] for part in names if part in floors), None)


def edges(modules: dict[str, set[str]]) -> dict[str, set[str]]:
    """The modules that each one imports; any other name counts for the module that has it."""

    def module_of(name):
        while name not in modules and name != LIBRARY:
            name = name.rpartition(".")[0]
        return name

    return {
        module: {module_of(name) for name in names if within(name, LIBRARY)} - {module}
        for module, names in modules.items()
    }


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(root: pathlib.Path, floors: dict[str, int]) -> list[str]:
    """One sentence for each thing that the design does not allow."""
    modules, sentences = read(root, LIBRARY), []
    floor_of = {name: floor(name, floors) for name in [LIBRARY, *modules]}
    sideways = {}
    for name, others in edges(modules).items():
        own = floor_of[name]
        if own is None:
            sentences.append(
                f"{name} has no floor; add {name.split('.')[1]!r} to FLOORS in "
                "tests/layering_test.py, no lower than the highest that it imports."
            )
        known = {other for other in others if None not in (own, floor_of[other])}
        sideways[name] = {other for other in known if floor_of[other] == own}
        sentences += [
            f"{name} (floor {own}) imports {other} (floor {floor_of[other]}); imports go to lower "
            "floors or sideways."
            for other in sorted(known)
            if floor_of[other] > own
        ]
        inside = within(name, f"{LIBRARY}.{LINEN_ALONE_IN}")
        if not inside and any(within(imported, LINEN) for imported in modules[name]):
            sentences.append(f"{name} imports {LINEN}; only {LIBRARY}.{LINEN_ALONE_IN} does.")
    sentences += [
        f"{' imports '.join([*cycle, cycle[0]])}; imports form a cycle."
        for cycle in cycles(sideways)
    ]
    of_tests = {path.stem for path in (root / TESTS).glob("*.py")} | {TESTS}
    for folder in (LIBRARY, *SCRIPTS, TESTS):
        for name, imported in read(root, folder).items():
            own = ".".join(name.split(".")[:2])  # of "experiments.table" itself
            sources = {other.split(".")[0] for other in imported if not within(other, own)}
            refused = sources & set(SCRIPTS) | (sources & of_tests if folder == LIBRARY else set())
            sentences += [f"{name} imports {other}, which it may not." for other in sorted(refused)]
    return sentences


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """A cycle through each module that has one: the shortest, each cycle once."""
    found = {}
    for start in sorted(graph):
        paths, seen = [[start]], set()
        while paths:
            path = paths.pop(0)
            for following in sorted(graph.get(path[-1], ())):
                if following == start:
                    first = path.index(min(path))
                    found.setdefault(frozenset(path), path[first:] + path[:first])
                    paths = []
                    break
                if following not in seen:
                    seen.add(following)
                    paths.append([*path, following])
    return list(found.values())


def test_the_library_keeps_to_its_floors():
    assert violations(ROOT, FLOORS) == []


def test_the_library_was_read():
    modules = read(ROOT, LIBRARY)
    assert {"abkd_jax.types", "abkd_jax.losses", "abkd_jax.losses.lift"} <= set(modules)
    found = edges(modules)
    assert found["abkd_jax.sources.source"] == {"abkd_jax.data.sets", "abkd_jax.types"}
    assert {"abkd_jax.config.build", "abkd_jax.train.state"} <= found["abkd_jax.config.schema"]
    assert "abkd_jax.types" in found["abkd_jax.losses.lift"]
    users = [name for name, imported in modules.items() if LINEN in imported]
    assert users and all(within(name, "abkd_jax.models") for name in users)


# --- the checker itself -------------------------------------------------------------------------

SOUND = {
    "abkd_jax/__init__.py": "from abkd_jax.losses import on_logits\nfrom abkd_jax import train",
    "abkd_jax/types.py": "import jax\nfrom flax import struct",
    "abkd_jax/numerics.py": "import math",
    "abkd_jax/divergences.py": "from abkd_jax import numerics\nfrom abkd_jax.types import Bound",
    "abkd_jax/losses/__init__.py": "from abkd_jax.losses.lift import on_logits",
    "abkd_jax/losses/lift.py": "from abkd_jax.divergences import forward_kl",
    "abkd_jax/losses/total.py": "from . import lift\nfrom ..types import Bound",
    "abkd_jax/models/__init__.py": "from flax import linen as nn",
    "abkd_jax/config/build.py": "from abkd_jax import divergences, losses",
    "abkd_jax/train/__init__.py": "from abkd_jax.train.step import train_step",
    "abkd_jax/train/step.py": "from abkd_jax import binding\nimport abkd_jax.losses.total",
    "abkd_jax/run/loop.py": "from abkd_jax import train\nfrom abkd_jax.train import step",
    "abkd_jax/binding.py": "from abkd_jax import types",
    "abkd_jax/main.py": "from abkd_jax.run import loop\nimport abkd_jax",
    "configs/digits.py": "from abkd_jax import config",
    "experiments/table.py": "import abkd_jax",
    "experiments/large/__main__.py": "from experiments.large import part",
    "experiments/large/part.py": "import abkd_jax",
    "tests/some_test.py": "from abkd_jax import types",
}


def grow(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return violations(root, FLOORS)


def test_a_sound_tree_has_no_violations(tmp_path):
    assert grow(tmp_path, SOUND) == []


@pytest.mark.parametrize(
    "path,text,expected",
    [
        pytest.param(
            "abkd_jax/types.py",
            "from abkd_jax.losses import on_logits",
            "abkd_jax.types (floor 0) imports abkd_jax.losses (floor 2); "
            "imports go to lower floors or sideways.",
            id="upwards",
        ),
        pytest.param(
            "abkd_jax/divergences.py",
            "def f():\n    import abkd_jax.losses.lift as lift",
            "abkd_jax.divergences (floor 1) imports abkd_jax.losses.lift (floor 2); "
            "imports go to lower floors or sideways.",
            id="upwards, inside a function",
        ),
        pytest.param(
            "abkd_jax/losses/total.py",
            "from ..config import build",
            "abkd_jax.losses.total (floor 2) imports abkd_jax.config.build (floor 5); "
            "imports go to lower floors or sideways.",
            id="upwards, relative",
        ),
        pytest.param(
            "abkd_jax/train/step.py",
            "from abkd_jax.run import loop",
            "abkd_jax.train.step (floor 4) imports abkd_jax.run.loop (floor 6); "
            "imports go to lower floors or sideways.",
            id="upwards, to another package",
        ),
        pytest.param(
            "abkd_jax/config/build.py",
            "from abkd_jax import on_logits",
            "abkd_jax.config.build (floor 5) imports abkd_jax (floor 7); "
            "imports go to lower floors or sideways.",
            id="a public name",
        ),
        pytest.param(
            "abkd_jax/config/build.py",
            "import abkd_jax",
            "abkd_jax.config.build (floor 5) imports abkd_jax (floor 7); "
            "imports go to lower floors or sideways.",
            id="the public names",
        ),
        pytest.param(
            "abkd_jax/losses/lift.py",
            "from abkd_jax.losses import total",
            "abkd_jax.losses.lift imports abkd_jax.losses.total imports abkd_jax.losses.lift; "
            "imports form a cycle.",
            id="a cycle of two",
        ),
        pytest.param(
            "abkd_jax/losses/lift.py",
            "from abkd_jax.losses import on_logits",
            "abkd_jax.losses imports abkd_jax.losses.lift imports abkd_jax.losses; "
            "imports form a cycle.",
            id="a cycle through the package",
        ),
        pytest.param(
            "abkd_jax/extra/deep.py",
            "",
            "abkd_jax.extra.deep has no floor; add 'extra' to FLOORS in tests/layering_test.py, "
            "no lower than the highest that it imports.",
            id="no floor",
        ),
        pytest.param(
            "abkd_jax/train/step.py",
            "from flax import linen",
            "abkd_jax.train.step imports flax.linen; only abkd_jax.models does.",
            id="linen",
        ),
        pytest.param(
            "abkd_jax/train/step.py",
            "from flax.linen import Dense",
            "abkd_jax.train.step imports flax.linen; only abkd_jax.models does.",
            id="a part of linen",
        ),
        pytest.param(
            "abkd_jax/train/step.py",
            "import flax as f\n\nlayer = f.linen.Dense(3)",
            "abkd_jax.train.step imports flax.linen; only abkd_jax.models does.",
            id="linen through flax",
        ),
        pytest.param(
            "abkd_jax/train/step.py",
            "from configs import digits",
            "abkd_jax.train.step imports configs, which it may not.",
            id="a config",
        ),
        pytest.param(
            "configs/other.py",
            "from configs.digits import get_config",
            "configs.other imports configs, which it may not.",
            id="a config by a config",
        ),
        pytest.param(
            "experiments/large/other.py",
            "from experiments import table",
            "experiments.large.other imports experiments, which it may not.",
            id="an experiment by an experiment",
        ),
        pytest.param(
            "experiments/table.py",
            "from experiments.large import part",
            "experiments.table imports experiments, which it may not.",
            id="a part of another experiment",
        ),
        pytest.param(
            "tests/other_test.py",
            "from experiments import table",
            "tests.other_test imports experiments, which it may not.",
            id="an experiment by a test",
        ),
        pytest.param(
            "abkd_jax/numerics.py",
            "from tests.some_test import f",
            "abkd_jax.numerics imports tests, which it may not.",
            id="a test",
        ),
        pytest.param(
            "abkd_jax/numerics.py",
            "import some_test",
            "abkd_jax.numerics imports some_test, which it may not.",
            id="a test, as pytest imports them",
        ),
    ],
)
def test_the_checker_sees(path, text, expected, tmp_path):
    assert grow(tmp_path, SOUND | {path: text}) == [expected]


def test_a_long_cycle_is_one_sentence(tmp_path):
    ring = {
        "abkd_jax/losses/a.py": "from abkd_jax.losses import b",
        "abkd_jax/losses/b.py": "from abkd_jax.losses.c import f",
        "abkd_jax/losses/c.py": "import abkd_jax.losses.a",
    }
    assert grow(tmp_path, SOUND | ring) == [
        "abkd_jax.losses.a imports abkd_jax.losses.b imports abkd_jax.losses.c imports "
        "abkd_jax.losses.a; imports form a cycle."
    ]
