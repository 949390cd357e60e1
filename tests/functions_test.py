"""docs/functions.md: that it lists what a config can name, as the functions are now."""

import ast
import importlib.util
import inspect
import pathlib
import re

from abkd_jax import analysis
from abkd_jax.config import build

_ROOT = pathlib.Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("functions", _ROOT / "experiments" / "functions.py")
functions = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(functions)


def test_the_page_is_as_its_command_writes_it():
    assert (_ROOT / "docs" / "functions.md").read_text() == functions.page()


def test_every_function_that_a_config_can_name_is_listed_once_with_its_keywords():
    listed = re.findall(r"^- `(\w+)\((.*)\)`: \S", functions.page(), re.MULTILINE)
    of = [
        (name, *keywords_of(f"def {name}({'*, ' * bool(found)}{found}): 0"))
        for name, found in listed
    ]
    expected = []
    for kind, described in build.KINDS.items():
        for name, fn in build.names(kind).items():
            found = inspect.getfullargspec(fn).kwonlyargs
            expected.append((name, *(p for p in found if p not in described.fixed.split())))
    assert sorted(of) == sorted(expected)


def keywords_of(definition):
    return [argument.arg for argument in ast.parse(definition).body[0].args.kwonlyargs]


def test_a_default_is_the_one_of_the_signature():
    page = functions.page()
    assert "- `sgd(learning_rate, momentum=0.0, weight_decay=0.0," in page
    assert "`policy_gradient(loss=k2, reward=k1, discount=1.0)`" in page
    assert all(f"`{name}`" in page for name in analysis.PROBES)
