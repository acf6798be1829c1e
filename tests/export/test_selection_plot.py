"""The picture of a selection: what it shows, that nothing lies on anything else, and that its bytes are its data's."""

import struct
import subprocess
import sys
from itertools import combinations
from math import nan
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from support.selections import NEVER, ranked, sixteen

from bln_serve.errors import MissingExtraError
from bln_serve.export.selection.plot import WIDTH_PX, draw, write
from bln_serve.export.selection.ranking import Selection
from bln_serve.statistics import RowCoupling

ORIGINS = ("as trained", "calibrated", "reference batch")
FAR = {"PPMM": [1.0, 1.2], "MPMM": [1.1, 1.2], "MMMM": [1.2, 1.4], "PPPP": [1.3, 1.5], "MMPP": [22.0, 22.5]}
KINDS = {
    "sixteen": sixteen(dropped=3),
    "all origins": sixteen(origins=ORIGINS, metrics=("sparse_categorical_accuracy", "accuracy")),
    "m = 1": ranked({"MMMM": [1.0, 2.0], "PMMM": [1.5, 2.0], "PPMM": [nan, 1], "MPMM": [nan, 1], "PPPP": NEVER}, m=1),
    "within the noise": ranked({"MMMM": [1.0, 2.0, 3.0], "PPMM": [1.2, 1.9, 3.0]}),
    "limited": sixteen(coupling="independent"),
    "one mini-batch": sixteen(mini_batches=1),
    "one entry": ranked({"PPMM": [1.0, 2.0]}),
    "far": ranked(FAR),
    "small differences": ranked({"MMMM": [0.0349] * 9, "PPMM": [0.0349 + (-1) ** n * 0.0012 + 3e-6 for n in range(9)]}),
    "all alike": ranked({"PPMM": [0.0, 0.0], "MMMM": [0.0, 0.0]}),
    "far and chosen": ranked({**{f"M{code}": [1.0, 1.1] for code in ("MMM", "PMM", "MPM")}, "PPMM": [22.0, 22.5]}),
}


def texts(picture: Figure) -> list[str]:
    (panel,) = picture.axes
    legend = [text for each in picture.legends for text in each.get_texts()]
    return [each.get_text() for each in [*picture.texts, *panel.texts, *legend]]


def points(picture: Figure) -> list[tuple[float, str, str]]:
    """Return each point's place, marker and colour, in order."""
    (panel,) = picture.axes
    found = [
        (float(line.get_ydata()[0]), str(line.get_marker()), to_hex(line.get_color()))  # type: ignore[index]
        for line in panel.lines
        if line.get_marker() in tuple("osD>")
    ]
    return sorted(found)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_png_1200_pixels_wide_and_its_bytes_are_its_datas(kind: str, tmp_path: Path) -> None:
    for name in "ab":
        write(KINDS[kind], tmp_path / name)
    written = (tmp_path / "a").read_bytes()
    assert written == (tmp_path / "b").read_bytes()
    assert written.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", written[16:24])
    assert width == WIDTH_PX
    assert 25 * len(KINDS[kind].entries) < height < 25 * len(KINDS[kind].entries) + 260
    assert not any(word in written for word in (b"tEXt", b"tIME", b"iTXt", b"zTXt"))


def test_other_losses_are_another_picture(tmp_path: Path) -> None:
    write(KINDS["far"], tmp_path / "a")
    write(ranked({**FAR, "MMMM": [1.25, 1.4]}), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


def test_what_a_program_sets_for_its_own_pictures_changes_nothing(tmp_path: Path) -> None:
    write(KINDS["far"], tmp_path / "a")
    with mpl.rc_context({"text.color": "white", "font.size": 30, "lines.linewidth": 9, "savefig.facecolor": "black"}):
        write(KINDS["far"], tmp_path / "b")
        assert mpl.rcParams["font.size"] == 30
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_has_its_name_and_the_choice_its_star_and_title(kind: str) -> None:
    selection = KINDS[kind]
    found = texts(draw(selection))
    for entry in selection.entries:
        assert entry.policy in found
        assert entry.origin in found
    chosen = selection.entries[selection.chosen]
    assert f"{chosen.name} is chosen" in found
    assert found.count("\N{BLACK STAR}") == 1
    assert selection.reason.split(";", maxsplit=1)[0] in " ".join(found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_star_and_the_band_lie_on_the_chosen_line(kind: str) -> None:
    (panel,) = (picture := draw(KINDS[kind])).axes
    (star,) = (text for text in panel.texts if text.get_text() == "\N{BLACK STAR}")
    (band,) = panel.patches
    assert star.get_position()[1] == KINDS[kind].chosen
    assert band.get_y() + 0.5 == KINDS[kind].chosen  # type: ignore[attr-defined]
    assert picture.axes


def test_colour_and_marker_say_the_row_coupling_of_every_finite_loss() -> None:
    signs = {RowCoupling.INDEPENDENT: "o", RowCoupling.POSITIONAL: "s", RowCoupling.MINI_BATCH: "D"}
    selection = KINDS["sixteen"]
    found = points(draw(selection))
    assert [(place, marker) for place, marker, _ in found] == [
        (float(place), signs[entry.row_coupling]) for place, entry in enumerate(selection.entries)
    ]
    assert len({(marker, color) for _, marker, color in found}) == 3


def test_a_loss_lies_where_the_axis_says_with_its_standard_error() -> None:
    selection = ranked({"MMMM": [1.0, 2.0, 3.0], "PPMM": [1.2, 1.9, 3.0]})
    (panel,) = draw(selection).axes
    (bars,) = (each for each in panel.containers if each.has_xerr)  # type: ignore[attr-defined]
    point, _, (bar,) = bars.lines  # type: ignore[attr-defined]
    (low, high) = bar.get_segments()[0][:, 0]
    loss, error = selection.entries[1].loss, selection.entries[1].standard_error
    assert (point.get_xdata()[0], (high - low) / 2) == pytest.approx((loss, error), rel=1e-12)


def test_a_nan_and_an_unusable_one_have_no_point_and_say_why() -> None:
    picture = draw(KINDS["m = 1"])
    assert [place for place, *_ in points(picture)] == [0, 1]
    assert texts(picture).count("NaN") == 2
    assert f"unusable: {NEVER}" in texts(picture)


def test_far_losses_are_arrows_at_the_edge_and_the_others_keep_their_room() -> None:
    picture = draw(KINDS["far"])
    assert [marker for _, marker, _ in points(picture)] == ["o", "D", "D", "s", ">"]
    low, high = picture.axes[0].get_xlim()
    assert (1.0 < low < 1.1, 1.4 < high < 3.0) == (True, True)
    assert "farther" in texts(picture)
    assert "farther" not in texts(draw(KINDS["sixteen"]))


def test_the_chosen_one_is_never_far() -> None:
    limited = ranked({"MMMM": [1.0, 1.1], "MPMM": [1.0, 1.1], "PMMM": [1, 1], "PMMP": [1, 1], "PPMM": [9.0, 9.5]})
    assert points(draw(limited))[-1][1] == ">"
    limited = ranked(
        {"MMMM": [1.0, 1.1], "MPMM": [1.0, 1.1], "PMMM": [1, 1], "PMMP": [1, 1], "PPMM": [9.0, 9.5]},
        coupling="independent",
    )
    assert points(draw(limited))[-1][1] == "o"


def test_what_is_beyond_the_limit_is_hollow() -> None:
    (panel,) = draw(KINDS["limited"]).axes
    hollow = {
        str(line.get_marker()): str(line.get_markerfacecolor()) == "white"
        for line in panel.lines
        if line.get_marker() in tuple("osD")
    }
    assert hollow == {"o": False, "s": True, "D": True}
    assert "mini-batch rows, not allowed" in texts(draw(KINDS["limited"]))


def test_one_mini_batch_has_no_error_bars() -> None:
    legend = "standard error of the paired difference to the lowest"
    assert legend not in texts(draw(KINDS["one mini-batch"]))
    assert legend in texts(draw(KINDS["sixteen"]))
    assert not any("\N{PLUS-MINUS SIGN}" in text for text in texts(draw(KINDS["one mini-batch"])))


def overlapping(selection: Selection) -> list[tuple[str, str]]:
    """Return the texts that lie on each other, or nearly so side by side, or reach out of the picture."""
    picture = draw(selection)
    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    (panel,) = picture.axes
    written = [
        *picture.texts,
        *panel.texts,
        panel.xaxis.label,
        *panel.get_xticklabels(),
        *(t for each in picture.legends for t in each.get_texts()),
    ]
    # Half the width of a letter on either side, so that two words do not read as one.
    boxes = [(each.get_text(), each.get_window_extent().padded(3, 0)) for each in written if each.get_text()]
    out = [(text, "the edge") for text, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > picture.bbox.x1]
    return out + [(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)]


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_lies_on_another(kind: str) -> None:
    assert overlapping(KINDS[kind]) == []


def test_columns_that_touch_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bln_serve.export.selection.plot._LOSS", 732)
    assert ("0.0350", "0.000136 \N{PLUS-MINUS SIGN} 0.000422") in overlapping(KINDS["small differences"])


def test_the_check_of_overlaps_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bln_serve.export.selection.plot._LINE_PX", 8)
    assert overlapping(KINDS["sixteen"])


def test_the_longest_texts_fit() -> None:
    long = ranked(
        {"MMMM": [1.0, 2.0], "PPMM": [1.5, 2.75], "MPMM": " ".join([NEVER] * 9)},
        metrics=("sparse_top_k_categorical_accuracy", "sparse_categorical_accuracy"),
        data="a_rather_long_name_of_a_file_with_rows.npz",
        coupling="positional",
    )
    assert overlapping(long) == []


def test_a_dollar_sign_begins_no_formula(tmp_path: Path) -> None:
    write(
        ranked({"PPMM": [1.0, 2.0], "MMMM": r"$\nothing$"}, data=r"$\sum$.npz", metrics=("$x^$",)), tmp_path / "a.png"
    )


def test_it_needs_no_display_and_no_pyplot(tmp_path: Path) -> None:
    program = (
        "import sys\nsys.path.insert(0, 'tests')\nfrom pathlib import Path\nfrom support.selections import ranked\n"
        "from bln_serve.export.selection import plot\nassert 'matplotlib' not in sys.modules\n"
        f"plot.write(ranked({{'PPMM': [1.0, 2.0]}}), Path({str(tmp_path / 'a.png')!r}))\n"
        "assert not {'matplotlib.pyplot', 'tensorflow'} & set(sys.modules)\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent: Any = None
    monkeypatch.setitem(sys.modules, "matplotlib", absent)
    with pytest.raises(MissingExtraError, match=r"selection.png needs packages .* pip install 'bln-serve\[export\]'"):
        write(KINDS["one entry"], tmp_path / "a.png")
