"""The README's examples run, and say what they claim."""

import pathlib
import re

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_README = (_ROOT / "README.md").read_text()
_PYTHON = re.findall(r"```python\n(.*?)```", _README, re.DOTALL)


@pytest.mark.parametrize("index", range(len(_PYTHON)))
def test_examples_run(index, capsys):
    exec(compile(_PYTHON[index], f"README example {index}", "exec"), {})
    printed = capsys.readouterr().out
    assert ("print(" in _PYTHON[index]) == bool(printed)
    assert "nan" not in printed


def test_adding_a_divergence_takes_fewer_than_15_lines():
    example = next(code for code in _PYTHON if "power_distance" in code)
    assert len(example.strip().splitlines()) < 15


def test_files_it_names_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", _README):
        assert (_ROOT / link).exists(), link
    for module in re.findall(r"python -m ([\w.]+)", _README):
        assert (_ROOT / (module.replace(".", "/") + ".py")).exists(), module
