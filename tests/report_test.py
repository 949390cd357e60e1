"""The report: its tables, captions and figures, for every kind of run and for broken files."""

import copy
import itertools
import json
import math
import re

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_hex

from abkd_jax import report
from abkd_jax.tasks import Column, classification, classification_figures

TASK = classification()
RELIABILITY = dict(
    count=[0, 10, 30, 60],
    confidence=[None, 0.4, 0.6, 0.9],
    accuracy=[None, 0.3, 0.5, 0.8],
)


def scores(accuracy, class_accuracy, **changes):
    given = dict(
        accuracy=accuracy,
        top5=0.99126,
        nll=0.123456,
        brier=0.087654,
        ece=0.034567,
        adaptive_ece=0.021234,
        class_accuracy=class_accuracy,
        count=1234,
        temperature=1.54321,
        reliability=RELIABILITY,
        scaled=dict(
            nll=0.1,
            brier=0.08,
            ece=0.01,
            adaptive_ece=0.02,
            reliability=dict(
                count=[5, 5, 30, 60],
                confidence=[0.2, 0.35, 0.55, 0.85],
                accuracy=[0.25, 0.3, 0.5, 0.8],
            ),
        ),
    )
    return given | changes


def network(accuracy, class_accuracy, *, best=None, **changes):
    last = scores(accuracy, class_accuracy, **changes)
    return dict(parameters=12345, steps=1500, last=last, best=best)


def phase(name, learn, *, see=(), split="train", folder=None):
    folder = name if folder is None else folder
    group = dict(name=name, folder=folder, learn=list(learn), see=list(see), split=split)
    return group | dict(seeds=1)


OFFLINE = dict(
    phases=[
        phase("teacher", ["teacher"], split="full"),
        phase("baseline", ["baseline"], split="labelled"),
        phase("distill", ["student"], see=["teacher"], folder=""),
    ],
    num_classes=6,
    class_names=None,
    evaluated_on="test",
    selected_on="validation",
    networks=dict(
        teacher=network(0.98765, [1.0] * 6),
        baseline=network(0.8, [0.8, 0.8, 0.8, 0.8, 0.8, None]),
        student=network(0.95432, [0.9, 0.7, 0.8, 0.85, 0.95, 1.0]),
    ),
)


def online(**networks):
    return dict(
        phases=[phase("mutual", networks, folder="")],
        num_classes=2,
        class_names=["no", "yes"],
        evaluated_on="test",
        selected_on="test",
        networks=networks,
    )


ONLINE = online(a=network(0.9, [0.9, 0.9]), b=network(0.8, [0.8, 0.8]))
WARM = OFFLINE | dict(
    phases=[
        phase("warm", ["student"], split="labelled"),
        phase("distill", ["student"], see=["teacher"], folder=""),
    ],
    networks={name: OFFLINE["networks"][name] for name in ("teacher", "student")},
)
SMALL = dict(fn="mlp", widths=(16,))
CONFIG = dict(
    config=dict(
        data=dict(fn="digits", validation=297, labelled=120),
        teacher=dict(model=dict(fn="mlp", widths=(256,)), weights=None),
        baseline=dict(model=SMALL),
        student=dict(
            model=SMALL,
            terms=dict(
                distill=dict(
                    fn="on_logits",
                    weight=1.0,
                    divergence=dict(
                        fn="alpha_beta", alpha=dict(fn="linear", start=1.0, end=0.3), beta=0.5
                    ),
                )
            ),
        ),
        phases=dict(teacher={}, baseline={}, distill={}),
    ),
    versions=dict(jax="0.10.2", flax="0.12.1"),
    commit="abc1234",
    device="cpu: 2 cores",
)


def fill(workdir, result, *, config=CONFIG, rows=True, images=None, num_examples=8):
    """Writes the files of a run; a config without some of its networks or phases gets these."""
    config, result = json.loads(json.dumps([config, result]))
    names, num_classes = list(result["networks"]), result["num_classes"]
    for name in names:
        config["config"].setdefault(name, dict(model=SMALL))
    for part in result["phases"]:
        config["config"]["phases"].setdefault(part["name"], {})
        if rows:
            write_rows(workdir / part["folder"], part["learn"], result["selected_on"])
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "result.json").write_text(json.dumps(result))
    rng = np.random.default_rng(0)
    arrays = {"labels": np.arange(num_examples) % num_classes}
    for name in names:
        arrays[f"probabilities/{name}"] = rng.dirichlet(np.ones(num_classes), num_examples)
    if images is not None:
        arrays["images"] = images
    np.savez(workdir / "examples.npz", **arrays)
    return workdir


def write_rows(folder, names, split, key="accuracy"):
    rows = [
        {"step": step, "time/seconds": 0.5}
        | {f"{name}/loss": 10.0 ** (1 - step / 100) for name in names}
        for step in (100, 200, 300)
    ]
    values = {f"{split}/{name}/{key}": 0.25 + 0.5 * i for i, name in enumerate(names)}
    write_lines(folder, [*rows[:2], {"step": 200, "time/seconds": 0.25} | values, rows[2]])


def write_lines(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def written(workdir, *args, task=TASK, **how):
    """The page of a run with such files."""
    return report.write(fill(workdir, *args, **how), task).read_text()


def cells(page, header, name):
    """A row of the table whose header begins so, as {column: cell}."""
    lines = page.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(header))
    columns = [cell.strip() for cell in lines[start].strip("|").split("|")]
    for line in itertools.takewhile(bool, lines[start + 2 :]):
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if row[: len(name)] == list(name):
            return dict(zip(columns, row, strict=True))
    raise AssertionError(f"{name} is not in the table")


def without(result, key):
    changed = copy.deepcopy(result)
    for value in changed["networks"].values():
        value["last"][key] = None
    return changed


# --- the page -------------------------------------------------------------------------------------


def test_the_table_is_rounded_as_its_columns_say(tmp_path):
    page = written(tmp_path, OFFLINE)
    assert cells(page, "| network | accuracy", ["student"]) == {
        "network": "student",
        "accuracy %": "95.43",
        "top-5 %": "99.13",
        "NLL (nats)": "0.1235",
        "ECE %": "3.46",
        "adaptive ECE %": "2.12",
        "Brier": "0.0877",
        "parameters": "12,345",
        "steps": "1,500",
        "time": "1.8 s",  # 3 * 0.5 + 0.25
    }
    assert cells(page, "| network | accuracy", ["teacher"])["accuracy %"] == "98.77"
    assert "After the last step, on 1,234 test examples:" in page


def test_the_page_says_what_was_run_with_what(tmp_path):
    page = written(tmp_path, OFFLINE)
    assert page.startswith("# Knowledge distillation on digits\n")
    assert (
        "A run on the data set `digits` with the networks `teacher`, `baseline`, `student`. "
        "Phase `teacher` trained `teacher` on all labels. "
        "Phase `baseline` trained `baseline` on the 120 labelled examples alone. "
        "Phase `distill` trained `student` from `teacher` on all examples, of which 120 have their "
        "labels. The student is distilled by "
        "`alpha_beta(alpha=linear(start=1.0, end=0.3), beta=0.5)`. "
        "The 120 labels are 20 of each of the 6 classes.\n"
    ) in page
    assert "Made with jax 0.10.2, flax 0.12.1; commit `abc1234`; on cpu: 2 cores." in page


def test_no_number_of_labels_is_told_where_all_are_used(tmp_path):
    config = copy.deepcopy(CONFIG)
    config["config"]["data"]["labelled"] = 0
    page = written(tmp_path, OFFLINE, config=config)
    assert "Phase `distill` trained `student` from `teacher`. " in page and " 0 " not in page[:900]


def test_a_network_that_then_learned_on_all_is_no_baseline(tmp_path):
    """What the student gains within classes is told against one on the labels alone."""
    *before, last = OFFLINE["phases"]
    phases = [*before, phase("more", ["baseline"], split="full"), last]
    assert "## Classes" in written(tmp_path, OFFLINE)
    assert "## Classes" not in written(tmp_path, OFFLINE | {"phases": phases})


def test_a_loaded_teacher_a_loss_without_divergence_and_no_commit(tmp_path):
    config = copy.deepcopy(CONFIG) | {"commit": None}
    config["config"]["teacher"]["weights"] = dict(fn="run", workdir="some/where")
    distill = dict(fn="dkd", weight=1.0, where="where", other="teacher", temperature=4.0)
    config["config"]["student"]["terms"]["distill"] = distill
    config["config"]["data"] = dict(fn="tfds", name="some_set")
    page = written(tmp_path, OFFLINE | {"phases": OFFLINE["phases"][1:]}, config=config)
    assert page.startswith("# Knowledge distillation on some\\_set\n")
    assert "A run on the data set `some_set` with" in page
    assert "The teacher was loaded by `run(workdir=some/where)`." in page
    assert "Phase `distill` trained `student` from `teacher`. " in page
    assert "The student is distilled by `dkd(temperature=4.0)`." in page
    assert "labels" not in page.split("## Results")[0] and "was given" not in page
    assert "; commit unknown;" in page
    assert cells(page, "| network | accuracy", ["teacher"])["time"] == "-"
    assert cells(page, "| network | accuracy", ["student"])["time"] == "1.8 s"


def test_a_given_teacher(tmp_path):
    config = copy.deepcopy(CONFIG)
    config["config"]["teacher"] = dict(model=dict(fn="given"))
    page = written(tmp_path, OFFLINE | {"phases": OFFLINE["phases"][1:]}, config=config)
    assert "The teacher was given." in page and "loaded" not in page


def test_scaling_has_a_table_of_before_and_after(tmp_path):
    page = written(tmp_path, OFFLINE)
    assert list(cells(page, "| network | scaling", ["teacher", "before"]).values()) == (
        "teacher before 1 0.1235 3.46 2.12 0.0877".split()
    )
    assert list(cells(page, "| network | scaling", ["teacher", "after"]).values()) == (
        "teacher after 1.543 0.1000 1.00 2.00 0.0800".split()
    )


def test_without_validation_data_there_is_no_scaling(tmp_path):
    page = written(tmp_path, without(without(OFFLINE, "scaled"), "temperature"))
    assert "There is no temperature scaling, for no validation data" in page
    assert "| network | scaling" not in page


@pytest.mark.parametrize(
    "selected,said",
    [
        ("validation", "highest validation accuracy, measured on test data, which had no part"),
        (
            "test",
            "highest test accuracy. These figures are selected on test data, as the published",
        ),
    ],
)
def test_the_best_step_says_what_it_was_selected_on(tmp_path, selected, said):
    result = copy.deepcopy(OFFLINE) | {"selected_on": selected}
    best = dict(step=1200, score=0.9712, scores=scores(0.96, [1.0] * 6))
    result["networks"]["student"]["best"] = best
    result["networks"]["teacher"]["best"] = best | {"step": 1500}  # the last one
    page = written(tmp_path, result)
    assert said in page
    row = cells(page, "| network | step", ["student"])
    assert row["step"] == "1,200"
    assert row[f"{selected} accuracy %"] == "97.12" and row["accuracy %"] == "96.00"
    assert cells(page, "| network | step", ["teacher"])["step"] == "1,500 (last)"
    assert "Without a best step, for it did not learn in this run: `baseline`." in page


def test_best_steps_that_are_the_last_ones_are_a_sentence(tmp_path):
    result = copy.deepcopy(OFFLINE)
    best = dict(step=1500, score=0.9712, scores=scores(0.96, [1.0] * 6))
    for name in ("student", "baseline"):
        result["networks"][name]["best"] = best
    page = written(tmp_path, result)
    said = "By validation accuracy the last step of every network that learned is its best one."
    assert said in page and "| network | step" not in page


def test_no_best_step_is_no_table(tmp_path):
    assert "highest" not in written(tmp_path, OFFLINE)


@pytest.mark.parametrize("missing", [None, math.nan])
def test_the_classes_that_gain_and_lose(tmp_path, missing):
    result = copy.deepcopy(OFFLINE)
    result["networks"]["baseline"]["last"]["class_accuracy"][5] = missing
    page = written(tmp_path, result)
    # Class 2 does not differ, and class 5 is not in the baseline's test set.
    assert (
        "- gained most: class 4 (+15.0 points, 80.0 → 95.0 %), "
        "class 0 (+10.0 points, 80.0 → 90.0 %), class 3 (+5.0 points, 80.0 → 85.0 %)\n"
        "- lost most: class 1 (-10.0 points, 80.0 → 70.0 %)\n"
    ) in page


def test_classes_that_do_not_differ_are_not_listed(tmp_path):
    result = copy.deepcopy(OFFLINE)
    result["networks"]["student"] = result["networks"]["baseline"]
    assert "## Classes" not in written(tmp_path, result)


@pytest.mark.parametrize("baseline", [dict(model=dict(fn="cnn")), dict(model=SMALL)])
@pytest.mark.parametrize("split", ["labelled", "train"])
def test_classes_are_compared_with_the_same_model_on_the_labels_alone(tmp_path, baseline, split):
    config, result = copy.deepcopy(CONFIG), copy.deepcopy(OFFLINE)
    config["config"]["baseline"] = baseline
    result["phases"][1]["split"] = split
    page = written(tmp_path, result, config=config)
    compared = "Accuracy of the student within a class, against the baseline (the student on its"
    assert (compared in page) == (split == "labelled" and baseline["model"] == SMALL)


def test_an_online_run(tmp_path):
    page = written(tmp_path, ONLINE)
    assert "A run on the data set `digits` with the networks `a`, `b`." in page
    assert "Phase `mutual` trained `a`, `b` together on all examples" in page
    assert "so the time is that of all" in page
    for name in "ab":
        assert cells(page, "| network | accuracy", [name])["time"] == "1.8 s"
    assert "## Classes" not in page and "thin line" not in page


def test_a_network_of_two_phases(tmp_path):
    config = copy.deepcopy(CONFIG)
    config["config"]["teacher"]["weights"] = dict(fn="run", workdir="some/where")
    config["config"]["phases"]["warm"] = dict(student=dict(terms=dict(task=dict(fn="ce"))))
    page = written(tmp_path, WARM, config=config)
    assert (
        "Phase `warm` trained `student` on the 120 labelled examples alone. "
        "Phase `distill` trained `student` from `teacher` on all examples, of which 120 have their "
        "labels. The student is distilled by `alpha_beta("
    ) in page
    assert page.count("distilled by") == 1
    told = cells(page, "| network | accuracy", ["student"])
    assert (told["time"], told["steps"]) == ("3.5 s", "1,800")  # of both phases
    best = dict(step=400, score=0.5, scores=scores(0.9, [0.5] * 6))
    result = copy.deepcopy(WARM)
    result["networks"]["student"]["best"] = best
    (tmp_path / "best").mkdir()
    assert "| student | 700 |" in written(tmp_path / "best", result, config=config)
    assert page.count("| student | 95.43 |") == 1
    assert "At a thin line a network's next phase begins.*" in page
    for axes, points in zip(
        curves(report.load(tmp_path)).axes,
        (
            [[100, 1], [200, 0.1], [300, 0.01], [400, 1], [500, 0.1], [600, 0.01]],
            [[200, 25], [500, 25]],
        ),
        strict=True,
    ):
        (line,) = axes.lines
        np.testing.assert_allclose(line.get_xydata(), points)
        (border,) = (part for collection in axes.collections for part in collection.get_segments())
        assert border[:, 0].tolist() == [300, 300]


def test_several_init_seeds(tmp_path):
    """Every cell has the spread of the seeds, and every seed a curve."""
    result = copy.deepcopy(OFFLINE)
    first = result["networks"]["student"]
    seeds = []
    for i, accuracy in enumerate((0.95, 0.93, 0.91)):
        last = scores(accuracy, [0.9 - i / 10] * 6, temperature=1.0 + i)
        best = dict(step=1500 - 300 * i, score=0.9, scores=scores(accuracy + 0.01, [1.0] * 6))
        seeds.append(first | dict(init_seed=i, last=last, best=best))
    result["networks"]["student"] = seeds[0] | dict(seeds=seeds)
    result["phases"][2]["seeds"] = 3
    fill(tmp_path, result)
    for i in (1, 2):
        write_rows(tmp_path / f"seed_{i}", ["student"], "validation")
    page = report.write(tmp_path, TASK).read_text()
    row = cells(page, "| network | accuracy", ["student"])
    assert (row["accuracy %"], row["NLL (nats)"]) == ("93.00 +- 2.00", "0.1235 +- 0.0000")
    assert (row["seeds"], row["time"]) == ("3", "5.2 s")  # of all
    row = cells(page, "| network | accuracy", ["teacher"])
    assert (row["accuracy %"], row["seeds"], row["time"]) == ("98.77", "1", "1.8 s")
    row = cells(page, "| network | step", ["student"])
    assert (row["step"], row["accuracy %"]) == ("900 to 1,500 (last)", "94.00 +- 2.00")
    row = cells(page, "| network | scaling", ["student", "after"])
    assert (row["T"], row["Brier"]) == ("2.000 +- 1.000", "0.0800 +- 0.0000")
    assert "; mean +- standard deviation over init seeds, and the time of all of them:" in page
    assert "Trained for 3 init seeds: `student`." in page
    assert "Figures are of the first init seed; curves of the others are faint." in page
    # 90, 80 and 70 % of class 0, against 80 % of the baseline's one seed.
    assert "means over the init seeds:" in page and "class 0 (" not in page
    losses, _ = curves(report.load(tmp_path)).axes
    assert [line.get_alpha() for line in losses.lines] == [None, None, None, 0.35, 0.35]


def test_a_task_has_columns_sections_and_figures_of_its_own(tmp_path):
    def refused(*_):
        raise AssertionError("a report asks nothing else of a task")

    task = TASK._replace(
        **dict.fromkeys(("check", "sums", "summary", "score", "rows", "scores", "sample"), refused),
        score_column=Column("rouge_l", "Rouge-L %", 100, 1),
        columns=(Column("nll", "NLL"), Column("rouge_l", "Rouge-L %", 100, 1)),
        sections=lambda run: [f"## Prompts\n\nThere are {len(run.examples['prompts'])}."],
        figures=lambda _: {},
    )
    best = dict(step=7, score=0.25, scores=dict(nll=3.0, rouge_l=0.24))
    last = dict(nll=2.0, rouge_l=0.21)
    result = online(a=dict(parameters=5, steps=9, last=last, best=best))
    fill(tmp_path, result, rows=False)
    write_rows(tmp_path, ["a"], "test", "rouge_l")
    np.savez(tmp_path / "examples.npz", prompts=np.array(["x", "y"]))
    page = report.write(tmp_path, task).read_text()
    assert "After the last step, on test examples:" in page
    row = cells(page, "| network | NLL", ["a"])
    assert (row["NLL"], row["Rouge-L %"], row["time"]) == ("2.0000", "21.0", "1.8 s")
    assert "At the step of the highest test rouge l. These" in page
    row = cells(page, "| network | step", ["a"])
    assert (row["test Rouge-L %"], row["Rouge-L %"], row["NLL"]) == ("25.0", "24.0", "3.0000")
    assert "## Prompts\n\nThere are 2." in page and "## Calibration" not in page
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["learning_curves.png"]
    right = report.learning_curves(report.load(tmp_path), task.score_column).axes[1]
    assert (right.get_title(), right.get_ylabel()) == ("Test rouge l", "Rouge-L (%)")
    assert right.lines[0].get_ydata().tolist() == [25]


def test_analysis_is_a_section_with_a_figure(tmp_path):
    fill(tmp_path, OFFLINE)
    metrics = ("entropy", "mass_flow/true_class", "gradient_cosine")
    rows = [
        {"step": step, "time/seconds": 2.0, "time/analysis_seconds": 0.5}
        | {f"analysis/student/{metric}": step / 10 for metric in metrics}
        for step in (1, 2)
    ]
    write_lines(tmp_path, rows)
    page = report.write(tmp_path, TASK).read_text()
    # 4 s of the student, 1.75 s of each of the others.
    assert "## Analysis\n\nMeasuring this took 1.0 s, 13.3 % of the time" in page
    assert "![Analysis](figures/analysis.png)\n\n*Figure 4. How each network's" in page
    assert (tmp_path / "figures" / "analysis.png").exists()
    figure = report.analysis(report.load(tmp_path))
    assert [axes.get_title() for axes in figure.axes if axes.axison] == [
        "entropy",
        "mass flow: true class",
        "gradient cosine",
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(OFFLINE["networks"])
    assert [axes.get_ylabel() for axes in figure.axes[:3]] == ["nats", "probability", "cosine"]
    for axes in figure.axes[:3]:
        (line,) = axes.lines
        assert line.get_label() == "student"
        np.testing.assert_allclose(line.get_xydata(), [[1, 0.1], [2, 0.2]])


def test_names_cannot_break_the_page(tmp_path):
    result = copy.deepcopy(OFFLINE) | {"class_names": ["a*b_c|"] * 6}
    page = written(tmp_path, result)
    assert r"class a\*b\_c\| (+15.0 points" in page


def test_nothing_measured_is_a_dash(tmp_path):
    result = without(without(OFFLINE, "nll"), "ece")
    row = cells(written(tmp_path, result), "| network | acc", ["student"])
    assert row["NLL (nats)"] == row["ECE %"] == "-"


@pytest.mark.parametrize(
    "seconds,text",
    [([], "-"), ([None, 1.26], "1.3 s"), ([59.0, 66.4], "2 min 05 s"), ([7500], "2 h 05 min")],
)
def test_times(tmp_path, seconds, text):
    fill(tmp_path, ONLINE, rows=False)
    write_lines(tmp_path, [{"step": 1, "time/seconds": value} for value in seconds])
    page = report.write(tmp_path, TASK).read_text()
    assert cells(page, "| network | accuracy", ["a"])["time"] == text


# --- files ----------------------------------------------------------------------------------------


def test_the_figures_are_in_the_page_with_captions_and_as_large_as_they_should_be(tmp_path):
    path = report.write(fill(tmp_path, OFFLINE), TASK)
    assert path == tmp_path / "report.md"
    page = path.read_text()
    sizes = {}
    for number, name in enumerate(("learning_curves", "reliability", "examples"), start=1):
        assert re.search(rf"!\[.+\]\(figures/{name}\.png\)\n\n\*Figure {number}\. .+\.\*\n", page)
        sizes[name] = matplotlib.image.imread(tmp_path / "figures" / f"{name}.png").shape[:2]
    assert sizes["learning_curves"] == (600, 1200)
    assert sizes["reliability"][1] == sizes["examples"][1] == 1200


def test_the_report_is_a_function_of_the_files(tmp_path):
    fill(tmp_path, OFFLINE, images=np.zeros((8, 5, 5, 1), np.uint8))

    def contents():
        report.write(tmp_path, TASK)
        made = [tmp_path / "report.md", *sorted((tmp_path / "figures").iterdir())]
        return [path.read_bytes() for path in made]

    first = contents()
    assert len(first) == 4
    assert contents() == first


@pytest.mark.parametrize("name", ["config.json", "result.json", "examples.npz"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe"])
def test_a_missing_or_broken_file_is_one_sentence(tmp_path, name, content):
    fill(tmp_path, OFFLINE)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} is missing or unreadable")):
        report.write(tmp_path, TASK)


@pytest.mark.parametrize(
    "name,path",
    [
        ("config.json", "versions"),
        ("config.json", "config.data"),
        ("config.json", "config.data.fn"),
        ("config.json", "config.student.model"),
        ("result.json", "num_classes"),
        ("result.json", "networks.student.best"),
        ("result.json", "networks.student.last.class_accuracy"),
        ("result.json", "networks.teacher.last.scaled.ece"),
    ],
)
def test_an_incomplete_file_is_one_sentence(tmp_path, name, path):
    fill(tmp_path, OFFLINE)
    content = json.loads((tmp_path / name).read_text())
    *groups, key = path.split(".")
    inner = content
    for group in groups:
        inner = inner[group]
    del inner[key]
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} lacks {path!r}.")):
        report.write(tmp_path, TASK)
    assert not (tmp_path / "report.md").exists() and not (tmp_path / "figures").exists()


def test_examples_without_labels_are_refused(tmp_path):
    fill(tmp_path, OFFLINE)
    np.savez(tmp_path / "examples.npz", images=np.zeros((1, 2, 2, 1)))
    with pytest.raises(ValueError, match=r"examples\.npz lacks 'labels'"):
        report.write(tmp_path, TASK)


# --- the figures ----------------------------------------------------------------------------------


def seen(line):
    """The points of a line that are drawn."""
    points = line.get_xydata()
    return points[np.isfinite(points).all(axis=1)]


def curves(run):
    return report.learning_curves(run, TASK.score_column)


def texts(figure):
    """All that is written in a figure, with its size."""
    figure.canvas.draw()
    for axes in figure.axes:
        yield axes.title
        yield axes.xaxis.label
        yield axes.yaxis.label
        yield from axes.get_xticklabels() + axes.get_yticklabels()
    for legend in figure.legends:
        yield from legend.get_texts()


@pytest.mark.parametrize(
    "figure", [curves, classification_figures.reliability, classification_figures.examples]
)
def test_a_figure_is_legible_at_half_its_width(tmp_path, figure):
    made = figure(report.load(fill(tmp_path, OFFLINE)))
    assert made.get_size_inches()[0] == 8
    assert min(text.get_fontsize() for text in texts(made) if text.get_text()) >= 11


def test_learning_curves_show_the_rows(tmp_path):
    figure = curves(report.load(fill(tmp_path, OFFLINE)))
    left, right = figure.axes
    assert (left.get_title(), left.get_xlabel(), left.get_ylabel()) == (
        "Training loss",
        "step",
        "loss",
    )
    assert (right.get_title(), right.get_ylabel()) == ("Validation accuracy", "accuracy (%)")
    assert [line.get_label() for line in left.lines] == ["teacher", "baseline", "student"]
    for line in left.lines:
        np.testing.assert_allclose(line.get_xydata(), [[100, 1], [200, 0.1], [300, 0.01]])
    for line in right.lines:
        np.testing.assert_allclose(line.get_xydata(), [[200, 25]])
        assert line.get_marker() == "o"  # one point is no line
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["teacher", "baseline", "student"]


@pytest.mark.parametrize("count,marker", [(20, "o"), (21, "None")])
def test_many_points_are_a_line_alone(tmp_path, count, marker):
    fill(tmp_path, ONLINE, rows=False)
    write_lines(tmp_path, [{"step": 1 + i, "a/loss": 1.0} for i in range(count)])
    (line,) = curves(report.load(tmp_path)).axes[0].lines
    assert line.get_marker() == marker


def test_learning_curves_on_test_data(tmp_path):
    right = curves(report.load(fill(tmp_path, ONLINE))).axes[1]
    assert right.get_title() == "Test accuracy"
    assert [line.get_ydata()[0] for line in right.lines] == [25, 75]


@pytest.mark.parametrize(
    "losses,scale",
    [
        ([1.0, 0.01], "linear"),
        ([1.0, 0.009], "log"),
        ([1.0, 0.0], "linear"),
        ([None, None], "linear"),
        ([None, 1.0, 1e-3], "log"),
    ],
)
def test_a_loss_of_more_than_two_decades_is_on_a_log_axis(tmp_path, losses, scale):
    fill(tmp_path, ONLINE, rows=False)
    write_lines(tmp_path, [{"step": step, "a/loss": loss} for step, loss in enumerate(losses)])
    left = curves(report.load(tmp_path)).axes[0]
    assert left.get_yscale() == scale
    np.testing.assert_array_equal(np.isnan(left.lines[0].get_ydata()), [x is None for x in losses])


def test_no_rows_are_said(tmp_path):
    fill(tmp_path, OFFLINE, rows=False)
    figure = curves(report.load(tmp_path))
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["no rows in metrics.jsonl"] * 2
    assert not figure.legends
    report.write(tmp_path, TASK)


def test_reliability_shows_the_bins(tmp_path):
    run = report.load(fill(tmp_path, OFFLINE))
    figure = classification_figures.reliability(run)
    assert len(figure.axes) == 6
    panel, below = figure.axes[:2]
    assert panel.get_title() == "teacher\nECE 3.5 → 1.0 %"
    assert panel.get_ylabel() == "accuracy (%)" and below.get_xlabel() == "confidence (%)"
    bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in panel.patches]
    np.testing.assert_allclose(bars, [(25, 25, 30), (50, 25, 50), (75, 25, 80)])  # one is empty
    diagonal, scaled, few = panel.lines
    np.testing.assert_allclose(diagonal.get_xydata(), [[0, 0], [100, 100]])
    np.testing.assert_allclose(seen(scaled), [[55, 50], [85, 80]], rtol=1e-6)
    np.testing.assert_allclose(seen(few), [[20, 25], [35, 30]], rtol=1e-6)
    assert scaled.get_linestyle() == "-" and few.get_linestyle() == "None"
    assert few.get_markerfacecolor() == "white" != scaled.get_markerfacecolor()
    assert below.get_ylabel() == "share (%)"
    np.testing.assert_allclose([bar.get_height() for bar in below.patches], [0, 10, 30, 60])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["as trained", "temperature-scaled", "perfect", "fewer than 10 examples"]


def test_reliability_of_a_handful_of_examples_is_hollow_and_breaks_the_line(tmp_path):
    diagram = dict(
        count=[9, 10, 1, 40, 0, 40],
        confidence=[0.1, 0.25, 0.4, 0.6, None, 0.9],
        accuracy=[0.5, 0.2, 1.0, 0.7, None, 0.8],
    )
    result = online(a=network(0.9, [0.9, 0.9], reliability=diagram))
    result["networks"]["a"]["last"]["scaled"]["reliability"] = diagram
    run = report.load(fill(tmp_path, result))
    panel = classification_figures.reliability(run).axes[0]
    filled = {bar.get_height(): bar.get_fill() for bar in panel.patches}
    assert filled == {50: False, 20: True, 100: False, 70: True, 80: True}
    assert [bar.get_linestyle() == ":" for bar in panel.patches if not bar.get_fill()] == [True] * 2
    assert {to_hex(bar.get_edgecolor()[:3]) for bar in panel.patches} == {run.colours["a"].lower()}
    _, scaled, few = panel.lines
    np.testing.assert_allclose(
        scaled.get_xydata()[1:], [[25, 20], [np.inf] * 2, [60, 70], [90, 80]], rtol=1e-6
    )
    np.testing.assert_allclose(seen(few), [[10, 50], [40, 100]], rtol=1e-6)


def test_without_small_bins_none_are_spoken_of(tmp_path):
    diagram = dict(count=[10, 30], confidence=[0.4, 0.9], accuracy=[0.3, 0.8])
    result = online(a=network(0.9, [0.9, 0.9], reliability=diagram, scaled=None))
    figure = classification_figures.reliability(report.load(fill(tmp_path, result)))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["as trained", "perfect"]


def test_reliability_without_scaling(tmp_path):
    figure = classification_figures.reliability(
        report.load(fill(tmp_path, without(OFFLINE, "scaled")))
    )
    assert figure.axes[0].get_title() == "teacher\nECE 3.5 %"
    assert len(figure.axes[0].lines) == 1
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["as trained", "perfect"]


def test_reliability_has_four_panels_a_row_at_most(tmp_path):
    result = online(**{name: network(0.9, [0.9, 0.9]) for name in "abcde"})
    figure = classification_figures.reliability(report.load(fill(tmp_path, result)))
    figure.canvas.draw()
    panels = figure.axes[::2]
    places = [panel.get_position() for panel in panels]
    assert len({round(place.y0, 3) for place in places[:4]}) == 1
    assert places[4].y1 < places[0].y0
    assert places[4].x0 == pytest.approx(places[0].x0, abs=0.01)


def test_a_network_has_one_colour(tmp_path):
    run = report.load(fill(tmp_path, OFFLINE))
    lines, diagrams = curves(run), classification_figures.reliability(run)
    bars = classification_figures.examples(run)
    for index, name in enumerate(run.networks):
        colour = to_hex(lines.axes[0].lines[index].get_color())
        assert colour == run.colours[name].lower()
        assert to_hex(diagrams.axes[2 * index].patches[0].get_facecolor()) == colour
        assert to_hex(bars.axes[0].containers[index][0].get_facecolor()) == colour
    assert len({run.colours[name] for name in run.networks}) == 3


def test_examples_show_the_true_class_and_the_likeliest(tmp_path):
    fill(tmp_path, ONLINE | {"num_classes": 9, "class_names": None})
    probabilities = np.full((1, 9), 0.004)
    probabilities[0, [1, 2, 3, 4, 5, 6]] = [0.3, 0.2, 0.1, 0.15, 0.05, 0.05]
    other = np.full((1, 9), 0.001)
    other[0, 8] = 0.992
    np.savez(
        tmp_path / "examples.npz",
        labels=np.array([7]),
        **{"probabilities/a": probabilities, "probabilities/b": other},
    )
    (axes,) = classification_figures.examples(report.load(tmp_path)).axes
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels] == ["7 ✓", "8", "1", "2", "4", "3"]
    assert [label.get_fontweight() for label in labels] == ["bold"] + ["normal"] * 5
    a, b = axes.containers
    np.testing.assert_allclose([bar.get_width() for bar in a], [0.4, 0.4, 30, 20, 15, 10])
    np.testing.assert_allclose([bar.get_width() for bar in b], [0.1, 99.2, 0.1, 0.1, 0.1, 0.1])
    assert axes.get_xlabel() == "probability (%)"
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the true class is on top


def test_a_class_of_one_per_cent_is_likely_enough_to_be_shown(tmp_path):
    fill(tmp_path, ONLINE | {"num_classes": 4, "class_names": None})
    given = {"probabilities/a": np.array([[0.97, 0.009, 0.011, 0.01]])}
    given["probabilities/b"] = given["probabilities/a"]
    np.savez(tmp_path / "examples.npz", labels=np.array([0]), **given)
    (axes,) = classification_figures.examples(report.load(tmp_path)).axes
    assert len(axes.get_yticklabels()) == 3
    np.testing.assert_allclose([bar.get_width() for bar in axes.containers[0]], [97, 1.1, 1])


@pytest.mark.parametrize(
    "shape,dtype,high,expected",
    [
        ((8, 4, 4, 1), np.uint8, 255, (4, 4)),
        ((8, 4, 4, 3), np.uint8, 255, (4, 4, 3)),
        ((8, 4, 4, 1), np.float32, 1, (4, 4)),
        ((8, 4, 4, 3), np.float32, 1, (4, 4, 3)),
    ],
)
def test_examples_show_their_images(tmp_path, shape, dtype, high, expected):
    images = np.full(shape, high, dtype)
    images[:, 0, 0] = 0
    figure = classification_figures.examples(report.load(fill(tmp_path, OFFLINE, images=images)))
    assert len(figure.axes) == 16
    pictures = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(pictures) == 8
    for picture in pictures:
        assert picture.shape == expected
        assert picture[0, 0].max() == 0 and picture[1, 1].min() == 1
    report.write(tmp_path, TASK)


@pytest.mark.parametrize("images", [None, np.zeros((8, 16)), np.zeros((8, 4, 4, 2))])
def test_what_is_no_image_is_not_drawn(tmp_path, images):
    figure = classification_figures.examples(report.load(fill(tmp_path, OFFLINE, images=images)))
    assert len(figure.axes) == 8 and not any(axes.images for axes in figure.axes)


@pytest.mark.parametrize("num_examples,shown", [(3, 3), (20, 8)])
def test_eight_examples_at_most(tmp_path, num_examples, shown):
    figure = classification_figures.examples(
        report.load(fill(tmp_path, OFFLINE, num_examples=num_examples))
    )
    assert len(figure.axes) == shown
    labelled = [axes.get_xlabel() for axes in figure.axes]
    assert labelled[-2:] == ["probability (%)"] * 2 and not any(labelled[:-2])


def choose(workdir, result, candidates):
    """The page, where the examples of a run were chosen among so many."""
    fill(workdir, result)
    with np.load(workdir / "examples.npz") as file:
        arrays = dict(file)
    choice = {"positions": np.arange(8), "candidates": np.asarray(candidates)}
    np.savez(workdir / "examples.npz", **arrays, **choice)
    return report.write(workdir, TASK).read_text()


def test_the_page_says_how_the_examples_were_chosen(tmp_path):
    assert "some network finds likely. They are the first ones.*" in written(tmp_path, OFFLINE)
    apart = "on which the networks differ most, by the Jensen-Shannon divergence of their"
    assert f"They are those 8 of the 1,234 {apart}" in choose(tmp_path, OFFLINE, 1234)
    assert f"They are those 8 of the first 1,000 {apart}" in choose(tmp_path, OFFLINE, 1000)
    alone = choose(tmp_path, online(a=network(0.9, [0.9, 0.9])), 1234)
    assert "They are those 8 of the 1,234 of the highest entropy" in alone


def test_no_examples_are_said(tmp_path):
    (axes,) = classification_figures.examples(
        report.load(fill(tmp_path, OFFLINE, num_examples=0))
    ).axes
    assert axes.texts[0].get_text() == "no examples in examples.npz"


def test_a_hundred_classes_with_long_names(tmp_path):
    names = [f"a_${i}_name_that_is_much_too_long_for_its_place_{i}" for i in range(100)]
    result = online(the_only_network_with_a_long_name=network(0.5, [0.5] * 100))
    result |= {"num_classes": 100, "class_names": names}
    fill(tmp_path, result)
    report.write(tmp_path, TASK)
    figure = classification_figures.examples(report.load(tmp_path))
    figure.canvas.draw()
    shown = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert "a_$0_na…lace_0 ✓" in shown
    assert all(axes.get_position().width > 0.15 for axes in figure.axes)


def test_one_network_and_two_classes(tmp_path):
    result = online(a=network(0.9, [0.9, None]))
    page = written(tmp_path, result)
    assert cells(page, "| network | accuracy", ["a"])["accuracy %"] == "90.00"
    assert "trained at once" not in page
