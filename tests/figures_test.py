"""The figures: points end up where they should, text is legible, bad input is refused."""

import itertools

import numpy as np
import pytest
from matplotlib import image
from matplotlib.collections import PathCollection, QuadMesh
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


def test_outliers_below_do_not_take_the_colours():
    points = rows()
    points[0]["score"] = -1e6
    figure = a_map(points)
    low, high = mesh_of(figure.axes[0]).get_clim()
    assert -1 < low < high == score(1.5, 1.0)


def test_a_heat_map_marks_the_best_and_the_special_points_that_it_covers():
    axes = a_map(special=True, best={"x.alpha": 0.5, "x.beta": 1.0}).axes[0]
    assert set(marked(axes)) == {(1, 0), (0, 1), (0.5, 0.5), (1, 1), (0, 0), (0.5, 1)}
    assert named(axes)[1.0, 0.0] == "forward KL"
    assert named(axes)[0.0, 1.0] == "reverse KL"
    assert "0.5, 1" in axes.get_title()
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
        assert named(axes) == {(1, 0): "FKL", (0, 1): "RKL"}
        assert set(marked(axes)) == {(1, 0), (0, 1), (0.5, 0.5), (1, 1), (0, 0)}
    assert mesh_of(maps[0]).get_clim() == (5.5, 22.0)
    assert mesh_of(maps[1]).norm(np.sqrt(5.5 * 22)) == pytest.approx(0.5)


def test_names_on_heat_maps_stay_inside_of_them():
    axis = np.linspace(-0.2, 1.2, 15)
    four = [panel(values=np.ones((15, 15)))] * 4
    figure = figures.heat_maps(four, axis, axis)
    figure.draw_without_rendering()
    notes = [note for note in figure.findobj(Annotation) if note.get_text()]
    assert len(notes) == 8
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
