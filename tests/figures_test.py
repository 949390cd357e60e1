"""The figures: points end up where they should, text is legible, bad input is refused."""

import itertools

import numpy as np
import pytest
from matplotlib import image
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.text import Annotation

from abkd_jax import figures

ALPHAS, BETAS = (0.0, 0.5, 1.0, 1.5), (-0.5, 0.0, 1.0)


def score(alpha, beta):
    return 10 * alpha + beta


def rows(order=1):
    return [
        {"x.alpha": a, "x.beta": b, "score": score(a, b)} for b in BETAS[::order] for a in ALPHAS
    ]


def a_map(points=None, **how):
    points = rows() if points is None else points
    labels = {"title": "title", "score_label": "accuracy (%)"}
    return figures.heat_map(points, "x.alpha", "x.beta", "score", **labels, **how)


def mesh_of(axes):
    (mesh,) = (part for part in axes.collections if isinstance(part, QuadMesh))
    return mesh


def value_at(axes, x, y):
    """The value of the cell that covers the point (x, y)."""
    mesh = mesh_of(axes)
    corners, values = mesh.get_coordinates(), mesh.get_array()
    column = np.searchsorted(corners[0, :, 0], x) - 1
    row = np.searchsorted(corners[:, 0, 1], y) - 1
    return values[row, column]


def marked(axes):
    """Where points are drawn on the axes."""
    points = [part for part in axes.collections if isinstance(part, PathCollection)]
    return [tuple(point) for part in points for point in part.get_offsets().tolist()]


def named(axes):
    """Text beside points, by where these are."""
    notes = [child for child in axes.get_children() if isinstance(child, Annotation)]
    return {tuple(note.xy): note.get_text() for note in notes if note.get_text()}


@pytest.mark.parametrize("order", (1, -1))
def test_a_heat_map_has_each_score_at_its_point(order):
    axes = a_map(rows(order), factor=100.0).axes[0]
    for a in ALPHAS:
        for b in BETAS:
            assert value_at(axes, a, b) == pytest.approx(100 * score(a, b)), (a, b)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("alpha", "beta")
    assert axes.get_xlim() == (-0.25, 1.75)
    assert axes.get_ylim() == (-0.75, 1.5)


def test_a_heat_map_leaves_out_what_is_not_finite():
    points = rows()
    points[2]["score"] = float("nan")
    points[5]["score"] = -float("inf")
    mask = np.ma.getmaskarray(mesh_of(a_map(points).axes[0]).get_array())
    assert np.argwhere(mask).tolist() == [[0, 2], [1, 1]]
    assert a_map([row | {"score": np.nan} for row in rows()]).axes


def test_outliers_below_have_their_number_and_none_of_the_colours():
    points = rows()
    points[0]["score"], points[5]["score"] = -70.0, -1e6
    figure = a_map(points, special=True)
    axes, bar = figure.axes
    low, high = mesh_of(axes).get_clim()
    assert -1 < low < high == score(1.5, 1.0)
    shown = {text.get_text(): text.get_position() for text in axes.texts if text.get_text()}
    assert shown["-70"] == (0.0, -0.5) and shown["-1e+06"] == (0.5, 0.0)
    under = mesh_of(axes).cmap(mesh_of(axes).norm(-70.0))
    assert to_hex(under) == "#ffffff" and under != mesh_of(axes).cmap(0.0)
    assert bar.get_ylabel() == "accuracy (%); white: below"
    assert a_map().axes[1].get_ylabel() == "accuracy (%)"


def test_a_plateau_keeps_its_colours_beside_some_collapsed_points():
    """93 % and 96 % differ in colour, 12 % and 93 % are told apart."""
    values = [12.0, 60.0, 95.8, 96.0, 96.1, 96.2, 96.2, 96.3, 96.3, 96.4, 96.4, 96.5]
    points = [row | {"score": value} for row, value in zip(rows(), values, strict=True)]
    axes = a_map(points).axes[0]
    assert mesh_of(axes).get_clim() == (95.8, 96.5)
    assert [text.get_text() for text in axes.texts] == ["12", "60"]


AXES = {
    "even": ((0.0, 0.5, 1.0, 1.5), "linear", (-0.25, 1.75)),
    "even but rounded": ((0.1, 0.2, 0.30000001, 0.4), "linear", (0.05, 0.45)),
    "even over a decade": ((1.0, 4.0, 7.0, 10.0), "linear", (-0.5, 11.5)),
    "two": ((1.0, 9.0), "linear", (-3.0, 13.0)),
    "negative": ((-4.0, 1.0, 10.0), "linear", (-6.5, 14.5)),
    "two, a decade": ((0.01, 0.1), "log", (10**-2.5, 10**-0.5)),
    "geometric": ((1.0, 2.0, 4.0), "log", (2**-0.5, 2**2.5)),
    "decades": ((1e-4, 1e-2, 1.0), "log", (1e-5, 10.0)),
    "nearly geometric": ((1e-3, 3e-3, 1e-2), "log", (1e-3 / 3**0.5, 1e-2 * (10 / 3) ** 0.5)),
    "from zero": ((0.0, 0.01, 0.1), "symlog", (-0.005, 10**-0.5)),
    "zero and two": ((0.0, 1.0, 4.0), "linear", (-0.5, 5.5)),
}


@pytest.mark.parametrize("values,scale,ends", AXES.values(), ids=AXES)
@pytest.mark.parametrize("axis", ("x", "y"))
def test_the_cells_of_a_heat_map_stand_at_the_swept_values(values, scale, ends, axis):
    other = "y" if axis == "x" else "x"
    points = [
        {axis: a, other: b, "score": 10 * i + b} for i, a in enumerate(values) for b in (0, 1)
    ]
    labels = {"title": "title", "score_label": "%"}
    axes = figures.heat_map(points, "x", "y", "score", **labels, special=True).axes[0]
    assert getattr(axes, f"get_{axis}scale")() == scale
    np.testing.assert_allclose(getattr(axes, f"get_{axis}lim")(), ends, rtol=1e-6)
    np.testing.assert_allclose(getattr(axes, f"get_{axis}ticks")(), values)
    corners = mesh_of(axes).get_coordinates()
    borders = corners[0, :, 0] if axis == "x" else corners[:, 0, 1]
    cells = zip(itertools.pairwise(borders), values, strict=True)
    assert all(low < a < high for (low, high), a in cells)
    for i, a in enumerate(values):
        assert value_at(axes, *((a, 1) if axis == "x" else (1, a))) == 10 * i + 1
    axes.figure.draw_without_rendering()


def test_the_title_names_the_axes_of_the_best_point():
    title = a_map(best={"x.alpha": 0.5, "x.beta": 1.0}).axes[0].get_title()
    assert title == "title; best (star): alpha 0.5, beta 1"


def test_axes_of_one_name_are_told_apart():
    x, y = "student.terms.task.weight", "student.terms.distill.weight"
    points = [{x: a, y: b, "s": a + b} for a in (0, 1) for b in (0, 1)]
    figure = figures.heat_map(points, x, y, "s", title="t", score_label="%", best=points[-1])
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("task.weight", "distill.weight")
    assert axes.get_title() == "t; best (star): task.weight 1, distill.weight 1"


@pytest.mark.parametrize("columns", (1, 2, 4))
def test_a_long_title_stays_in_its_column(columns):
    title = "a title of many words that is much longer than any panel is wide, and on and on"
    one = {"title": title, "x": "x", "y": "y", "curves": {"a": ([0, 1], [0, 1])}}
    figure = figures.lines([one] * columns, columns=columns)
    figure.draw_without_rendering()
    boxes = [axes.title.get_window_extent() for axes in figure.axes]
    assert boxes[0].x0 >= 0 and boxes[-1].x1 <= figure.bbox.x1
    assert all(box.y1 <= figure.bbox.y1 for box in boxes)
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    assert figure.axes[0].get_title().replace("\n", " ") == title


def test_a_heat_map_marks_the_best_and_the_special_points_that_it_covers():
    axes = a_map(special=True, best={"x.alpha": 0.5, "x.beta": 1.0}).axes[0]
    assert set(marked(axes)) == {(1, 0), (0, 1), (0.5, 0.5), (1, 1), (0, 0), (0.5, 1)}
    assert named(axes)[1.0, 0.0] == "forward KL"
    assert named(axes)[0.0, 1.0] == "reverse KL"
    assert not marked(a_map().axes[0])
    far = [row | {"x.beta": row["x.beta"] - 1} for row in rows()]
    assert set(marked(a_map(far, special=True).axes[0])) == {(1, 0), (0, 0)}


NO_GRIDS = {
    "hole": rows()[:-1],
    "row": rows()[: len(ALPHAS)],
    "twice": [*rows(), rows()[0]],
    "twice for another": [*rows()[:-1], rows()[0]],
}


@pytest.mark.parametrize("points", NO_GRIDS.values(), ids=NO_GRIDS)
def test_a_heat_map_refuses_what_is_no_grid(points):
    with pytest.raises(ValueError, match=r"needs a grid of two numbers.*found \d+ points"):
        a_map(points)


def panel(**how):
    values = np.asarray([[score(a, b) for a in ALPHAS] for b in BETAS]) + 6
    return {"title": "a map", "label": "%", "values": values} | how


def test_heat_maps_have_each_value_at_its_point():
    figure = figures.heat_maps([panel(), panel(log=True)], ALPHAS, BETAS)
    figure.draw_without_rendering()
    maps = [axes for axes in figure.axes if axes.get_title() == "a map"]
    assert len(maps) == 2
    for axes in maps:
        for a in ALPHAS:
            for b in BETAS:
                assert value_at(axes, a, b) == pytest.approx(score(a, b) + 6), (a, b)
        assert set(marked(axes)) == {(1, 0), (0, 1), (0.5, 0.5), (1, 1), (0, 0)}
    names = {(1, 0): "forward KL", (0, 1): "reverse KL", (0.5, 0.5): "Hellinger"}
    names |= {(1, 1): "Euclidean", (0, 0): "log-ratios"}
    assert [named(axes) for axes in maps] == [names, {}]
    assert mesh_of(maps[0]).get_clim() == (5.5, 22.0)
    assert mesh_of(maps[1]).norm(np.sqrt(5.5 * 22)) == pytest.approx(0.5)


def test_names_on_heat_maps_stay_inside_of_them():
    axis = np.linspace(-0.2, 1.2, 15)
    four = [panel(values=np.ones((15, 15)))] * 4
    figure = figures.heat_maps(four, axis, axis)
    figure.draw_without_rendering()
    notes = [note for note in figure.findobj(Annotation) if note.get_text()]
    assert len(notes) == 5
    for one, other in itertools.combinations(notes, 2):
        assert not one.get_window_extent().overlaps(other.get_window_extent())
    for note in notes:
        frame, box = note.axes.get_window_extent(), note.get_window_extent()
        assert frame.x0 < box.x0 and box.x1 < frame.x1, note.get_text()
        assert frame.y0 < box.y0 and box.y1 < frame.y1, note.get_text()


def test_heat_maps_leave_out_what_has_no_colour():
    nothing = panel(values=np.full((3, 4), np.nan))
    powers = panel(log=True)
    powers["values"][0, :3] = 0.0, -1.0, np.inf
    figure = figures.heat_maps([nothing, powers], ALPHAS, BETAS)
    figure.draw_without_rendering()
    assert mesh_of(figure.axes[1]).get_clim() == (pytest.approx(6.0), 22.0)


def test_heat_maps_refuse_values_of_another_shape():
    with pytest.raises(
        ValueError, match=r"'a map' must be \[3, 4\], beta by alpha; found \[4, 3\]"
    ):
        figures.heat_maps([panel(values=np.zeros((4, 3)))], ALPHAS, BETAS)


def test_lines_draw_curves_and_bands_where_they_are():
    xs, ys = np.asarray([1.0, 10.0, 100.0]), np.asarray([3.0, 5.0, 4.0])
    curves = {f"curve {i}": (xs, ys + i) for i in range(7)} | {"band": (xs, ys, [1.0, 0.0, 2.0])}
    one = {"title": "one", "x": "step", "y": "%", "log_x": True, "curves": curves}
    two = {"title": "two", "x": "step", "y": "%", "curves": {"alone": (xs, ys)}}
    figure = figures.lines([one, two, two], columns=2)
    first, second, _, empty = figure.axes
    for index, line in enumerate(first.lines[:7]):
        np.testing.assert_array_equal(line.get_xdata(), xs)
        np.testing.assert_array_equal(line.get_ydata(), ys + index)
    looks = [(line.get_color(), line.get_linestyle()) for line in first.lines]
    assert len(set(looks)) == len(curves)
    (band,) = first.collections
    corners = band.get_paths()[0].vertices
    assert {(1.0, 2.0), (1.0, 4.0), (100.0, 2.0), (100.0, 6.0)} <= {tuple(c) for c in corners}
    assert (first.get_xscale(), second.get_xscale()) == ("log", "linear")
    assert [text.get_text() for text in first.get_legend().get_texts()] == list(curves)
    assert second.get_legend() is None
    assert not empty.axison


def test_curves_that_coincide_are_all_seen():
    """Each is narrower than the one behind it, as the legend says."""
    curves = {name: ([1, 2], [1.0, 100.0]) for name in "abcd"}
    one = {"title": "one", "x": "x", "y": "y", "log_y": True, "nested": True, "curves": curves}
    figure = figures.lines([one, one | {"nested": False}], columns=2)
    figure.draw_without_rendering()
    nested, usual = ([line.get_linewidth() for line in axes.lines] for axes in figure.axes)
    assert all(behind >= before + 0.5 for behind, before in itertools.pairwise(nested))
    assert nested[-1] == 2 and usual == [2] * 4
    titles = [axes.get_legend().get_title() for axes in figure.axes]
    assert titles[0].get_text() == "wider: behind" and not titles[1].get_visible()
    assert figure.axes[0].get_yscale() == "log"
    assert {"1", "10", "100"} <= {text.get_text() for text in figure.axes[0].get_yticklabels()}


def test_a_legend_has_rows_of_one_length():
    figure = figures.new(3.0)
    figure.subplots()
    names = ["forward KL", "reverse KL", "Hellinger (.5, .5)", "ABKD (.8, .3)"]
    figures.legend(figure, figures.patches(names, dict.fromkeys(names, "black")))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    places = [text.get_window_extent() for text in legend.get_texts()]
    assert len({round(box.y0) for box in places}) == 2
    assert all(figure.bbox.x0 < box.x0 and box.x1 < figure.bbox.x1 for box in places)
    assert [round(box.x0) for box in places[:2]] == [round(places[0].x0)] * 2


def test_bars_stand_side_by_side_in_their_groups():
    axes = figures.new(3.0).subplots()
    figures.bars(axes, "ABC", {"p": [1.0, 2.0, 3.0], "q": [-1.0, 0.5, 0.0]})
    assert [text.get_text() for text in axes.get_xticklabels()] == list("ABC")
    spans = sorted(
        (bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in axes.patches
    )
    assert [height for *_, height in spans] == [1.0, -1.0, 2.0, 0.5, 3.0, 0.0]
    for (_, end, _), (start, _, _) in itertools.pairwise(spans):
        assert end <= start + 1e-9
    for group, position in enumerate(axes.get_xticks()):
        left, right = spans[2 * group], spans[2 * group + 1]
        assert (left[0] + right[1]) / 2 == pytest.approx(position)
    with pytest.raises(ValueError, match=r"'p' must have a value for each of 3 groups; found 2"):
        figures.bars(axes, "ABC", {"p": [1.0, 2.0]})


def test_text_is_large_enough_for_half_the_width():
    curves = {"a": ([0, 1], [0, 1]), "b": ([0, 1], [1, 0])}
    drawn = [
        a_map(special=True),
        figures.heat_maps([panel()], ALPHAS, BETAS),
        figures.lines([{"title": "t", "x": "x", "y": "y", "curves": curves}], columns=1),
    ]
    for figure in drawn:
        figure.draw_without_rendering()
        texts = figure.findobj(lambda part: hasattr(part, "get_fontsize"))
        assert texts
        for text in texts:
            assert not text.get_text() or text.get_fontsize() >= 11, text.get_text()


def test_a_saved_figure_has_its_width_in_pixels(tmp_path):
    figures.save(figures.new(2.0), tmp_path / "a.png")
    pixels = image.imread(tmp_path / "a.png")
    assert pixels.shape[:2] == (2 * figures.DPI, 8 * figures.DPI)
    figures.save(figures.new(2.0), tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
