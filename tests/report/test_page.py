"""The report as a file: what is in it, what is not, and what it is made from."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from hf_oscqat.report.charts import COLOURS
from hf_oscqat.report.page import write_report
from hf_oscqat.report.recording import append_row, read_recording

SECTIONS = ["training", "shares", "layers", "paths", "distances", "batchnorm", "scales", "layer-table"]


@pytest.fixture(scope="module")
def one(tmp_path_factory, make_recording):
    """Page of one run."""
    return write_report([make_recording(tmp_path_factory.mktemp("one") / "freeze").parent])


@pytest.fixture(scope="module")
def two(tmp_path_factory, make_recording):
    """Page of two runs."""
    folder = tmp_path_factory.mktemp("two")
    make_recording(folder / "freeze")
    make_recording(folder / "lsq", freezing=False, seed=1)
    return write_report([folder / "freeze", folder / "lsq"])


class Page(HTMLParser):
    """Elements with their attributes, and which are left open."""

    VOID = {"meta", "link", "br"}

    def __init__(self, path):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.mark.parametrize("which", ["one", "two"])
def test_page_needs_nothing_from_anywhere(which, request):
    page = Page(request.getfixturevalue(which))
    for _, attributes in page.elements:
        for key in ("src", "href", "xlink:href", "action", "srcset"):
            assert attributes.get(key, "#").startswith(("#", "data:"))
        assert not re.search(r"url\((?!#)", attributes.get("style", ""))
    assert "default-src 'none'" in page.of("meta")[2]["content"]
    styles = re.findall(r"<style>.*?</style>", request.getfixturevalue(which).read_text(), flags=re.DOTALL)
    assert not re.search(r"@import|url\(", "".join(styles))


@pytest.mark.parametrize("which", ["one", "two"])
def test_charts_say_what_they_show_and_take_the_colours_of_the_page(which, request):
    path = request.getfixturevalue(which)
    page, text = Page(path), path.read_text(encoding="utf-8")
    charts = page.of("svg")
    assert len(charts) == (12 if which == "one" else 22)
    assert all(chart["aria-hidden"] == "true" for chart in charts)  # the caption says it
    assert len(page.of("figcaption")) == len(charts)
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert not [colour for colour in COLOURS if colour in drawings]
    assert "var(--oscillating)" in drawings


@pytest.mark.parametrize("which", ["one", "two"])
def test_anchors_lead_somewhere_and_ids_are_unique(which, request):
    page = Page(request.getfixturevalue(which))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [a["href"] for a in page.of("a")] == [f"#{name}" for name in SECTIONS]
    used = [a[key][1:] for _, a in page.elements for key in ("href", "xlink:href") if a.get(key, "").startswith("#")]
    used += re.findall(r"url\(#([^)]+)\)", request.getfixturevalue(which).read_text())
    used += [a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a]
    assert set(used) <= set(ids)


def columns_of(path):
    """The table of layers, as its cells by the words above them."""
    table = re.search(r'<table id="table">.*?</table>', path.read_text(encoding="utf-8"), flags=re.DOTALL).group()
    rows = re.findall(r"<tr>(.*?)</tr>", table, flags=re.DOTALL)
    head, *cells = [
        [re.sub(r"<[^>]*>", "", c).strip() for c in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row, flags=re.DOTALL)]
        for row in rows
    ]
    return dict(zip(head, zip(*cells, strict=True), strict=True))


def assert_shows(columns, recording, run=""):
    """Columns hold what was recorded of a run."""
    for name, values in (
        ("Bits", [layer.bits for layer in recording.layers]),
        ("Oscillating, end, %", 100 * recording.oscillating[-1]),
        ("Oscillating, peak, %", 100 * recording.oscillating.max(0)),
        ("Frozen, end, %", 100 * recording.frozen[-1]),
        ("Weight scale, end / start", recording.weight_scale[-1] / recording.weight_scale[0]),
        ("Batch-norm KL before", recording.batchnorm[200][0]),
        ("Batch-norm KL after", recording.batchnorm[200][1]),
    ):
        shown = [float(cell) for cell in columns[f"{run}{name}"]]
        assert shown == pytest.approx(list(values), rel=1e-2, abs=6e-3), name


def test_table_has_a_row_for_each_layer_with_what_was_recorded(one):
    recording, columns = read_recording(one.parent.parent), columns_of(one)
    assert columns["Layer"] == tuple(layer.name for layer in recording.layers)
    assert_shows(columns, recording)


def test_table_of_two_runs_has_what_was_recorded_of_each(two):
    folder, columns = two.parent.parent.parent, columns_of(two)
    recordings = [read_recording(folder / name) for name in ("freeze", "lsq")]
    assert not np.allclose(recordings[0].oscillating[-1], recordings[1].oscillating[-1])
    for run, recording in zip(("A: ", "B: "), recordings, strict=True):
        assert_shows(columns, recording, run)


def test_two_runs_stand_side_by_side(two):
    assert two.parent.name == "report_lsq"
    text = two.read_text(encoding="utf-8")
    assert "A: freeze" in text
    assert "B: lsq" in text
    rows = re.findall(r'<div class="charts">(.*?)</div>', text, flags=re.DOTALL)
    assert all(row.count("<figure>") == 2 for row in rows)
    assert "B: Oscillating, end, %" in text


def test_pictures_for_the_card_lie_beside_the_page(one):
    assert {path.name for path in one.parent.iterdir()} == {
        "report.html", "oscillation.png", "distances.png", "layers.png",
    }  # fmt: skip
    for path in one.parent.glob("*.png"):
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 5


def test_the_same_recording_gives_the_same_page(one, tmp_path):
    again = write_report([one.parent.parent], tmp_path)
    assert again.read_text(encoding="utf-8") == one.read_text(encoding="utf-8")


def test_steps_can_be_chosen_and_the_nearest_recorded_ones_are_shown(one, tmp_path):
    text = write_report([one.parent.parent], tmp_path, steps=[52, 199]).read_text(encoding="utf-8")
    assert re.findall(r">step ([\d,]+)</text>", text) == ["50", "200"]
    assert "Step by step, up to step 50." in text


def test_a_run_of_one_recording_without_log_has_a_page_too(make_recording, tmp_path):
    path = make_recording(tmp_path / "begun", steps=(1,))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"row":"log"' not in line))
    text = write_report([path.parent]).read_text(encoding="utf-8")
    assert "to 1 of 200" in text
    assert 'id="training"' not in text
    assert 'id="shares"' in text


def test_what_the_last_oscillations_come_from_is_in_the_table_at_the_top(make_recording, tmp_path):
    path = make_recording(tmp_path / "run")
    title = r"Of the last oscillations, by a moving scale</th>\s*<td[^>]*>"
    assert re.search(f"{title}–<", write_report([path.parent]).read_text(encoding="utf-8"))  # noqa: RUF001
    append_row(path, {"row": "log", "step": 200, "scalars": {"scale_caused_percent": 97.6}})
    assert re.search(f"{title}98%<", write_report([path.parent]).read_text(encoding="utf-8"))


def test_runs_of_different_models_can_be_compared(make_recording, tmp_path):
    make_recording(tmp_path / "small", layers=2, steps=(1, 10))
    make_recording(tmp_path / "large", layers=4, steps=(1, 10, 20))
    text = write_report([tmp_path / "small", tmp_path / "large"]).read_text(encoding="utf-8")
    assert text.count('<th scope="row" data-key="blocks') == 4


def test_names_are_text_and_no_markup(make_recording, tmp_path):
    path = make_recording(tmp_path / "run", steps=(1, 10))
    path.write_text(path.read_text().replace("mobilenetv2_050", "<script>alert(1)</script>"))
    text = write_report([path.parent]).read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_dollar_signs_in_the_names_of_runs_are_no_mathematics(make_recording, tmp_path):
    folders = [tmp_path / "$\\frac{$", tmp_path / "b$ and $"]
    for folder in folders:
        make_recording(folder)
    text = write_report(folders).read_text(encoding="utf-8")
    assert ">A: $\\frac{$, top-1</text>" in text


def test_three_runs_are_refused(one):
    with pytest.raises(ValueError, match="got 3 folders, expected that of one run, or of two"):
        write_report([one.parent.parent] * 3)


def test_a_run_is_not_compared_with_itself(one):
    run = one.parent.parent
    with pytest.raises(ValueError, match=r"got .* twice, expected two runs to compare"):
        write_report([run, run / ".." / run.name])
