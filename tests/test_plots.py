"""Pictures: what is in them, that they are complete PNG files, and that drawing leaves no traces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from trgnet import plots
from trgnet.data import IGNORE
from trgnet.plots import class_colors, plot_confusion, plot_curves, plot_graphs, plot_timeline

CLASSES = ["walk", "run", "jump"]
LABELS = np.repeat([0, 1, 0], [20, 30, 10])
RECORDS = [
    {"epoch": 1, "loss/total": 3.0, "loss/cross_entropy": 2.0},
    {"epoch": 2, "loss/total": 2.0, "loss/cross_entropy": 1.0, "test/refined/accuracy": 50.0,
     "test/refined/f1@50": 40.0, "test/refined/boundary_f1": 30.0, "test/frame/accuracy": 45.0},
    {"epoch": 3, "loss/total": 1.0, "loss/cross_entropy": float("nan"), "lr": 0.1},
]  # fmt: skip


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would have been written, in order."""
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    return figures


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def legend_of(owner) -> list[str]:
    legend = owner.legends[0] if isinstance(owner, Figure) else owner.get_legend()
    return [text.get_text() for text in legend.get_texts()]


def contains(picture: np.ndarray, color: tuple[float, float, float]) -> bool:
    return bool((np.abs(picture[..., :3] - np.array(color)) < 0.01).all(axis=-1).any())


class TestColors:
    @pytest.mark.parametrize("count", [1, 2, 12, 13, 52, 130])
    def test_classes_differ(self, count: int) -> None:
        colors = class_colors(count)
        assert len(set(colors)) == len(colors) == count
        assert all(0 <= channel <= 1 for color in colors for channel in color)

    @pytest.mark.parametrize("count", [12, 13, 52, 130])
    def test_neighbours_differ_clearly(self, count: int) -> None:
        colors = np.array(class_colors(count))
        assert np.linalg.norm(np.diff(colors, axis=0), axis=1).min() > 0.2


class TestTimeline:
    def test_picture_has_the_classes_that_occur(self, tmp_path: Path) -> None:
        path = tmp_path / "new folder" / "timeline.png"
        plot_timeline(path, [("truth", LABELS)], CLASSES, 10.0, confidence=np.linspace(0, 1, 60), title="a")
        picture = imread(path)
        walk, run, jump = class_colors(3)
        assert contains(picture, walk) and contains(picture, run) and not contains(picture, jump)
        assert [file.name for file in path.parent.iterdir()] == ["timeline.png"]

    def test_rows_seconds_and_legend(self, drawn: list[Figure]) -> None:
        plot_timeline("unused", [("truth", LABELS), ("network", LABELS)], CLASSES, 10.0, title="a")
        (axes,) = drawn[0].axes
        assert [label.get_text() for label in axes.get_yticklabels()] == ["truth", "network"]
        assert axes.get_xlim() == (0, 6)
        assert legend_of(drawn[0]) == ["0 walk", "1 run"]
        bars = axes.collections[0].get_paths()
        assert [tuple(bar.get_extents().intervalx) for bar in bars] == [(0, 2), (2, 5), (5, 6)]
        assert texts(axes) == ["0", "1", "0"] * 2
        assert axes.get_title(loc="left") == "a"

    def test_ignored_frames_stay_blank(self, drawn: list[Figure]) -> None:
        labels = np.array([IGNORE, 1, 1, IGNORE, 0])
        plot_timeline("unused", [("truth", labels), ("nothing", np.full(5, IGNORE))], CLASSES, 1.0)
        bars, nothing = drawn[0].axes[0].collections
        assert [tuple(bar.get_extents().intervalx) for bar in bars.get_paths()] == [(1, 3), (4, 5)]
        assert len(nothing.get_paths()) == 0
        assert legend_of(drawn[0]) == ["0 walk", "1 run"]

    def test_confidence_is_drawn_below(self, drawn: list[Figure]) -> None:
        confidence = np.linspace(0, 1, 60)
        plot_timeline("unused", [("truth", LABELS)], CLASSES, 10.0, confidence=confidence)
        bars, curve = drawn[0].axes
        np.testing.assert_array_equal(curve.patches[0].get_data().values, confidence)
        assert curve.get_position().y1 < bars.get_position().y0

    def test_bars_too_short_for_their_number_go_without(self, drawn: list[Figure]) -> None:
        plot_timeline("unused", [("network", np.arange(600) % 2)], CLASSES, 30.0)
        assert texts(drawn[0].axes[0]) == []

    @pytest.mark.parametrize(
        ("rows", "fps", "confidence", "message"),
        [
            ([], 10.0, None, "no row"),
            ([("truth", LABELS), ("network", LABELS[:-1])], 10.0, None, r"row 'network' .* shape \(59,\)"),
            ([("truth", LABELS[:0])], 10.0, None, "at least one"),
            ([("truth", LABELS / 1)], 10.0, None, "float64"),
            ([("truth", LABELS + 2)], 10.0, None, "label 3 in row 'truth', expected 0 to 2"),
            ([("truth", LABELS)], 10.0, np.zeros(59), r"confidence of shape \(59,\)"),
            ([("truth", LABELS)], 0.0, None, "frames per second"),
        ],
    )
    def test_bad_input(self, tmp_path: Path, rows, fps: float, confidence, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            plot_timeline(tmp_path / "timeline.png", rows, CLASSES, fps, confidence=confidence)
        assert not any(tmp_path.iterdir())


class TestConfusion:
    def test_cells_carry_share_and_count(self, drawn: list[Figure]) -> None:
        plot_confusion("unused", np.array([[1500, 500, 0], [1, 999, 0], [0, 0, 0]]), CLASSES)
        axes = drawn[0].axes[0]
        assert texts(axes) == ["75", "1,500", "25", "500", "<1", "1", "100", "999"]
        image = axes.get_images()[0].get_array()
        np.testing.assert_allclose(image[:2], [[75, 25, 0], [0.1, 99.9, 0]])
        assert image.mask[2].all() and not image.mask[:2].any()
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("prediction", "truth")

    @pytest.mark.parametrize(("size", "with_text"), [(20, True), (21, False)])
    def test_many_classes_go_without_text(self, drawn: list[Figure], size: int, with_text: bool) -> None:
        plot_confusion("unused", np.eye(size, dtype=np.int64), [f"class {k}" for k in range(size)])
        assert bool(texts(drawn[0].axes[0])) == with_text
        assert len(drawn[0].axes[0].get_yticklabels()) == size

    @pytest.mark.parametrize("size", [1, 3, 60])
    def test_picture(self, tmp_path: Path, size: int) -> None:
        plot_confusion(tmp_path / "confusion.png", np.eye(size, dtype=np.int64), ["a class"] * size)
        assert contains(imread(tmp_path / "confusion.png"), tuple(np.array([8, 48, 107]) / 255))

    @pytest.mark.parametrize(
        ("matrix", "message"),
        [(np.zeros((2, 3), int), r"shape \(2, 3\) for 3 classes"), (-np.eye(3, dtype=int), "count of -1")],
    )
    def test_bad_input(self, tmp_path: Path, matrix: np.ndarray, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            plot_confusion(tmp_path / "confusion.png", matrix, CLASSES)


class TestCurves:
    def test_losses_left_scores_right(self, drawn: list[Figure]) -> None:
        plot_curves("unused", RECORDS)
        losses, scores = drawn[0].axes
        assert legend_of(losses) == ["total", "cross entropy"]
        assert [line.get_xdata().tolist() for line in losses.lines] == [[1, 2, 3], [1, 2]]
        assert losses.get_yscale() == "log"
        assert legend_of(scores) == ["accuracy", "F1@50"]
        assert [line.get_xydata().tolist() for line in scores.lines] == [[[2, 50]], [[2, 40]]]

    def test_splits_differ_in_dashes(self, drawn: list[Figure]) -> None:
        plot_curves("unused", [{"epoch": 1, "test/refined/edit": 10.0, "validation/refined/edit": 20.0}])
        test, validation = drawn[0].axes[1].lines
        assert test.get_color() == validation.get_color()
        assert test.get_linestyle() != validation.get_linestyle()
        assert legend_of(drawn[0].axes[1]) == ["edit", "test, refined", "validation, refined"]

    def test_losses_that_reach_zero_keep_a_linear_axis(self, drawn: list[Figure]) -> None:
        plot_curves("unused", [{"epoch": 1, "loss/total": 0.0}])
        assert drawn[0].axes[0].get_yscale() == "linear"

    def test_picture_of_a_first_epoch_without_evaluation(self, tmp_path: Path) -> None:
        plot_curves(tmp_path / "curves.png", RECORDS[:1])
        assert imread(tmp_path / "curves.png").ndim == 3

    @pytest.mark.parametrize(("records", "message"), [([], "no record"), ([{"loss/total": 1.0}], "epoch")])
    def test_bad_input(self, tmp_path: Path, records: list, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            plot_curves(tmp_path / "curves.png", records)


class TestGraphs:
    def test_graphs_side_by_side_with_every_name(self, drawn: list[Figure]) -> None:
        names = [f"class {index}" for index in range(130)]
        plot_graphs("unused", {"joints": (np.eye(3), CLASSES), "actions": (np.eye(130), names)})
        joints, actions = drawn[0].axes[:2]
        assert joints.get_title(loc="left") == "joints" and actions.get_title(loc="left") == "actions"
        np.testing.assert_array_equal(joints.images[0].get_array(), np.eye(3))
        assert joints.images[0].get_clim() == actions.images[0].get_clim() == (0, 1)
        for axes, expected in ((joints, CLASSES), (actions, names)):
            assert [label.get_text() for label in axes.get_yticklabels()] == expected
            assert [label.get_text() for label in axes.get_xticklabels()] == expected

    @pytest.mark.parametrize("size", [1, 3, 52])
    def test_cells_are_large_enough_to_be_read(self, drawn: list[Figure], size: int) -> None:
        plot_graphs("unused", {"actions": (np.eye(size), ["x" * 40] * size)})
        drawn[0].draw_without_rendering()
        box = drawn[0].axes[0].get_window_extent()
        assert box.width == pytest.approx(box.height)
        assert box.height / size / drawn[0].dpi >= 0.11  # inches; the names are 7.5 points, 0.104 inches

    def test_picture(self, tmp_path: Path) -> None:
        plot_graphs(tmp_path / "graphs.png", {"actions": (np.eye(2), ["$a", "b$"])})
        assert contains(imread(tmp_path / "graphs.png"), tuple(np.array([8, 48, 107]) / 255))

    @pytest.mark.parametrize(
        ("graphs", "message"),
        [
            ({}, "no graph"),
            ({"joints": (np.eye(2), CLASSES)}, r"joints of shape \(2, 2\) for 3 names"),
            ({"joints": (np.zeros((0, 0)), [])}, "M >= 1"),
        ],
    )
    def test_bad_input(self, tmp_path: Path, graphs: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            plot_graphs(tmp_path / "graphs.png", graphs)


@pytest.mark.parametrize("name", ["a$^$", "$", "$x$"])
def test_names_are_no_formulas(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(*_: object) -> None:
        raise AssertionError("a name was read as a formula")

    monkeypatch.setattr("matplotlib.mathtext.MathTextParser.parse", parsed)
    plot_timeline(tmp_path / "timeline.png", [(name, LABELS)], [name, f"{name}{name}"], 10.0, title=name)
    plot_confusion(tmp_path / "confusion.png", np.eye(2, dtype=int), [name, f"{name}{name}"])
    plot_curves(tmp_path / "curves.png", [{"epoch": 1, f"loss/{name}": 1.0, f"{name}/refined/edit": 1.0}])


def test_a_failed_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "curves.png"
    plot_curves(path, [{"epoch": 1, "loss/total": 1.0}])
    before = path.read_bytes()

    def half_written(figure: Figure, target: Path, **_: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half_written)
    with pytest.raises(OSError, match="disk full"):
        plot_curves(path, [{"epoch": 1, "loss/total": 2.0}])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_are_repeatable(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plot_timeline(tmp_path / name, [("truth", LABELS)], CLASSES, 10.0)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_no_global_state_of_matplotlib_is_used() -> None:
    code = "import sys, trgnet.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0
