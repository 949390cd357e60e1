"""The notebooks run from top to bottom, show their figures, and are stored without outputs."""

import json
import pathlib
import re

import own_process
import pytest

_FOLDER = pathlib.Path(__file__).parent.parent / "colabs"
_NAMES = ("quickstart", "gradient_analysis", "bring_your_own", "sweeps", "language", "on_policy")
_BADGE = (
    "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/abkd-jax/abkd_jax/blob/main/colabs/{}.ipynb)\n"
)
_INSTALL = """import importlib.util

if importlib.util.find_spec("abkd_jax") is None:
    %pip install -q "abkd_jax @ git+https://github.com/abkd-jax/abkd_jax"
"""
_NOWHERE = "http://127.0.0.1:9"  # a proxy that is not there, so that a download fails

_MINUTES = ("language", "on_policy")

every_notebook = pytest.mark.parametrize("name", _NAMES)


def read(name):
    """The notebook's JSON, and (type, source) of its cells."""
    notebook = json.loads((_FOLDER / f"{name}.ipynb").read_text())
    return notebook, [(c["cell_type"], "".join(c["source"])) for c in notebook["cells"]]


def environment(folder):
    """A user's, not the tests': one device, and nothing of the home directory."""
    places = ("TMPDIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")
    for place in places:
        (folder / place).mkdir()
    return own_process.environment(FAST="1") | {
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), _NOWHERE),
        **{place: str(folder / place) for place in places},
    }


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.nightly if name in _MINUTES else pytest.mark.long)
        for name in _NAMES
    ],
)
def test_runs(name, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_core.utils import run_sync

    (tmp_path / "cwd").mkdir()
    # With no folder to look into, python3 is this interpreter, installed as a kernel or not.
    kernels = KernelSpecManager(kernel_dirs=[])
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels)
    manager.connection_file = str(tmp_path / "connection.json")
    notebook = nbformat.read(_FOLDER / f"{name}.ipynb", as_version=4)
    where = {"metadata": {"path": str(tmp_path / "cwd")}}
    client = nbclient.NotebookClient(notebook, km=manager, timeout=None, resources=where)
    try:
        client.execute(env=environment(tmp_path))
    finally:
        run_sync(manager.shutdown_kernel)(now=True)  # nbclient leaves a manager that it was given

    shown = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    images = [out for out in shown if "image/png" in out.get("data", {})]
    # With ipywidgets, sliders take the place of one figure.
    figures = sum("display(" in s and "ipywidgets" not in s for _, s in read(name)[1])
    assert len(images) >= figures >= 3
    streams = "".join(out["text"] for out in shown if out["output_type"] == "stream")
    assert "warning" not in streams.lower(), streams
    assert not list((tmp_path / "cwd").iterdir())


@every_notebook
def test_is_stored_as_it_should_be(name):
    path = _FOLDER / f"{name}.ipynb"
    notebook, cells = read(name)
    assert path.stat().st_size < 60_000
    assert notebook["nbformat"] == 4
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z-]{2,20}", i) for i in ids)
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None
    assert cells[0][0] == "markdown" and cells[0][1].startswith(_BADGE.format(name))
    assert cells[1] == ("code", _INSTALL.rstrip("\n"))
    assert not re.search(r"/(home|root|tmp|work|Users|content)/", path.read_text())


@every_notebook
def test_every_figure_says_what_to_look_at(name):
    _, cells = read(name)
    looks = [kind == "markdown" and "**Look at** " in source for kind, source in cells]
    figures = [kind == "code" and "display(" in source for kind, source in cells]
    for index in (i for i, is_figure in enumerate(figures) if is_figure):
        assert any(looks[index - 1 : index + 2]), cells[index][1]
    assert sum(looks) >= sum(figures)


@every_notebook
def test_links_exist(name):
    _, cells = read(name)
    for kind, source in cells:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", source) if kind == "markdown" else ():
            assert (_FOLDER / link).exists(), link
