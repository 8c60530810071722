"""The report says what the two JSON files say, in one file, whatever is missing from them."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from fewbit.report import figures, page, pieces, views
from fewbit.report.figures import Axis, Bars, Heatmap, Histogram, Points
from fewbit.report.sections import LOG_VIEWS, SECTIONS, Section
from report.canned import canned

VOID = {"meta", "br", "img", "input", "link", "hr"}
LOADING = {"src", "href", "srcset", "poster", "data", "action"}
PLOTLY = get_plotlyjs()
QUESTIONS = ["Is it right?", "Is it good?", "Is it small and fast?", "What did we not get?"]
ALL = [section for part in SECTIONS.values() for section in part]
OF_LOGS = [(name, section) for name, sections in LOG_VIEWS.items() for section in sections]
EVIL = '<script>alert("x")</script>'


class Reader(HTMLParser):
    """The page as a browser takes it: tags that must close, what is loaded, words outside scripts, figures as JSON."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.loaded: list[str] = []
        self.words: list[str] = []
        self.styles: list[str] = []
        self.figures: list[dict[str, Any]] = []
        self.json = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.json = ("type", "application/json") in attrs
        self.loaded += [value or "" for name, value in attrs if name in LOADING]
        self.styles += [value or "" for name, value in attrs if name == "style"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "script" and self.json:
            self.figures.append(json.loads(data))
        elif inside == "style":
            self.styles.append(data)
        elif inside != "script":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def read(report: dict[str, Any], tables: dict[str, Any]) -> Reader:
    html = page.render(report, tables)
    assert html.count(PLOTLY) == 1
    reader = Reader(html.replace(PLOTLY, "plotly"))  # four megabytes that hold no tag of ours
    assert not reader.open
    return reader


def data(section: Section, name: str = "") -> dict[str, Any]:
    """What a section is drawn from: the canned tables, or the log entry of that name."""
    report, tables = canned()
    if not name:
        return page.joined(report, tables)
    entry = next(entry for entry in tables["log"] if entry["name"] == name)
    return {**entry["summary"], "rows": entry["rows"]}


def rows_of(title: str, name: str = "") -> list[dict[str, Any]]:
    """The rows of a section's table."""
    section = next(s for s in (ALL if not name else LOG_VIEWS[name]) if s.title == title)
    return list(data(section, name)[section.key])


def view_of(title: str, kind: type, name: str = "") -> Any:
    """The view of that kind in a section."""
    section = next(s for s in (ALL if not name else LOG_VIEWS[name]) if s.title == title)
    inner = [view.view if isinstance(view, views.Each) else view for view in section.views]
    return next(view for view in inner if isinstance(view, kind))


@pytest.fixture(scope="module")
def whole() -> Reader:
    return read(*canned())


# The file


def test_the_page_loads_nothing_from_anywhere(whole: Reader) -> None:
    assert whole.loaded
    assert [uri for uri in whole.loaded if not uri.startswith(("#", "data:image/"))] == []
    assert whole.tags["link"] == 0
    assert not re.search(r"url\(|@import", " ".join(whole.styles))
    report, tables = canned()
    tables["images"][0]["thumbnail"] = "https://example.org/cat.png"
    assert read(report, tables).tags["img"] == whole.tags["img"] - 1


def test_the_page_is_drawn_without_torch() -> None:
    code = "import fewbit.report.page, fewbit.report.tables, fewbit.report.frontpage, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""


def test_every_figure_has_its_json_and_there_is_one_plotly(whole: Reader) -> None:
    _, tables = canned()
    singles = 9  # error, bits, outliers, flips, curve, runs, codes with optimisations on, files, stages
    logs = 1 + 2 + 1 + 1 + 2 + 1  # equalize, mixed precision, ranking, output search, joint search, reconstruct
    batches = 2
    assert len(whole.figures) == singles + logs + batches + len(tables["histograms"]) + len(tables["attention"])
    assert whole.tags["script"] == len(whole.figures) + 2


def test_the_four_answers_stand_in_order_before_any_figure_and_the_links_lead_to_the_parts(whole: Reader) -> None:
    html = page.render(*canned())
    places = [html.index(place) for place in [*QUESTIONS, "<nav>", "<figure>"]]
    assert places == sorted(places)
    assert [uri for uri in whole.loaded if uri.startswith("#")] == [f"#{part.lower()}" for part in SECTIONS]
    assert all(f'<section id="{part.lower()}">' in html for part in SECTIONS)


def test_the_same_two_dicts_give_the_same_text_and_stay_as_they_were() -> None:
    report, tables = canned()
    before = copy.deepcopy((report, tables))
    assert page.render(report, tables) == page.render(*canned())
    assert (report, tables) == before


# The words and the numbers


def test_the_answers_are_the_numbers_of_the_report(whole: Reader) -> None:
    for said in [
        "40 of 7,274,496 codes differ",
        "at 148 sites",
        "Worst site: blocks.0.attn.values:value, off by at most 1.",
        "75.45 → 74.60 % top-1 accuracy",
        "−0.85 points; 95 % interval of this change −1.55 to −0.15.",
        "AP50 57.5 55.2",
        "92.35 % agreement in class with the float model.",
        "2,000 images scored in onnxruntime; 128 for calibration.",
        "Exempt: patch_embed.proj stays at 8 bits; head stays at 8 bits.",
        "Too few calibration images.",
        "22.92 → 6.10 MB 3.75× smaller",
        "weights packed 3.36 MB, 4.31 bits a weight.",
        "onnxruntime: 11.84 → 6.91 ms, 1.71× as fast.",
        "37 fallbacks",
        "Most often 4 bits became 8 bits, at 24 sites: no 4-bit operand",
        "98.73 % of multiply-accumulates run in integers.",
        "12 sites stayed float.",
    ]:
        assert said in whole.text


def test_the_tables_are_the_numbers_of_their_rows(whole: Reader) -> None:
    for said in [
        "8 bits no 4-bit operand for a product of two activations 24 sites blocks.0.attn.scores:q",  # shares are added
        "blocks.11.attn.scores:k 5.04 %",
        "openvino, as it ships logits 0.0934 0.2 yes 0.9998712 99.60 %",
        "openvino 0.094 s 0.050 s 151.40 MB 98.70 MB 61.20 MB",
        "3,637,248 40 40 0",  # codes: compared, differing, ties, wrong
        "integer kernels in the runtime's optimised graph 74",
        "QLinearMatMul: 49",
        "blocks.2.mlp.fc2:input 122.4 7, 199 25.00 % 1.54 % 0, 17 12.50 % clipped at 61.2 of 122",
        "ranges of two halves differ by (median over sites) 9.00 %",
        "0004.png label class 4 float class 4 integer class 3",
        "64 72.00 % 82.00 % 70 to 74 0.23 %",
        "processor x86-64 with VNNI",
    ]:
        assert said in whole.text, said


def test_without_labels_agreement_leads_and_no_accuracy_is_claimed() -> None:
    report, tables = canned()
    report["accuracy"].update(float=None, quantized=None)
    text = read(report, tables).text
    good = text[text.index("Is it good?") : text.index("Is it small and fast?")]
    assert good.startswith("Is it good? 92.35 % agreement in class with the float model")
    assert "No labels, so no accuracy" in good
    assert "points" not in good


@pytest.mark.parametrize(
    ("differing", "wrong", "word"), [(0, 0, "yes"), (3, 0, "yes"), (3, 1, "no")], ids=["none", "ties", "wrong"]
)
def test_right_means_that_no_code_is_wrong(differing: int, wrong: int, word: str) -> None:
    report, tables = canned()
    report["verify"].update(codes_differing=differing, codes_wrong=wrong)
    assert f"Is it right? {word} {differing} of" in read(report, {}).text
    del report["verify"]["codes_wrong"]  # then the table counts
    tables["checks"] = [{**tables["checks"][0], "differing": differing, "ties": differing - wrong, "wrong": wrong}]
    assert f"Is it right? {word} {differing} of" in read(report, tables).text


def test_without_a_table_that_explains_them_codes_that_differ_are_not_right() -> None:
    report, _ = canned()
    del report["verify"]["codes_wrong"]
    text = read(report, {}).text
    assert "Is it right? no 40 of" in text
    assert "is a tie:" not in text


def test_a_model_that_became_slower_says_so() -> None:
    report, _ = canned()
    report["latency"] = {"onnxruntime": {"float_ms": 5.0, "quantized_ms": 10.0, "ratio": 0.5}}
    assert "5.00 → 10.00 ms, slower , 0.50× as fast" in read(report, {}).text


def planted(value: Any) -> Any:
    """The same value with every string in it evil; data URIs and what the answers compare with stay."""
    if isinstance(value, dict):
        return {k: v if k in ("name", "kind") and str(v) in LOG_VIEWS else planted(v) for k, v in value.items()}
    if isinstance(value, list):
        return [planted(v) for v in value]
    return EVIL if isinstance(value, str) and value not in ("off", "on") and not value.startswith("data:") else value


def test_what_a_user_wrote_is_shown_and_never_run(whole: Reader) -> None:
    report, tables = planted(canned()[0]), planted(canned()[1])
    report["latency"] = {EVIL: report["latency"]["onnxruntime"]}
    tables["kernels"]["ops"] = {EVIL: 1}
    tables["log"][-1]["rows"][0][EVIL] = EVIL
    tables["log"][-1]["summary"] = {EVIL: EVIL}
    tables["images"][0]["thumbnail"] = f'data:image/png,"{EVIL}'
    dirty = read(report, tables)
    scripts = re.findall(r'<script type="application/json">(.*?)</script>', page.render(report, tables), flags=re.S)
    assert len(scripts) == len(dirty.figures)
    assert not [script for script in scripts if "<" in script]
    assert dirty.tags["script"] == whole.tags["script"]
    assert dirty.text.count(EVIL) > 300
    labels = json.dumps(dirty.figures)
    assert "<script" not in labels
    assert labels.count("&lt;script") > 300


# What is missing


@pytest.mark.parametrize("section", ALL, ids=[section.title for section in ALL])
def test_a_section_whose_table_is_empty_or_absent_does_not_appear(section: Section) -> None:
    tables = data(section)
    assert f"<h3>{pieces.text(section.title)}</h3>" in section.html(tables)
    assert section.html({**tables, section.key: []}) == ""
    assert section.html({key: rows for key, rows in tables.items() if key != section.key}) == ""


@pytest.mark.parametrize(("name", "section"), OF_LOGS, ids=[section.title for _, section in OF_LOGS])
def test_the_views_of_a_log_are_drawn_where_it_has_rows(name: str, section: Section) -> None:
    assert section.html(data(section, name)).count("<figure>") == 1
    assert section.html({}) == ""


KEYS = [*sorted(canned()[0]), *sorted(canned()[1])]


@pytest.mark.parametrize("key", [*KEYS[::3], *(pytest.param(k, marks=pytest.mark.slow) for i, k in enumerate(KEYS) if i % 3)])
def test_without_one_of_its_tables_the_report_is_still_a_page(key: str) -> None:
    report, tables = canned()
    tables["log"] = tables["log"][:2]
    report.pop(key, None)
    tables.pop(key, None)
    text = read(report, tables).text
    assert all(question in text for question in QUESTIONS)


def test_with_nothing_at_all_there_are_four_questions_and_nothing_else() -> None:
    reader = read({}, {})
    assert all(question in reader.text for question in QUESTIONS)
    assert (reader.figures, reader.tags["section"], reader.tags["h3"]) == ([], 0, 0)


def test_a_pass_that_nobody_knows_is_a_table_by_itself(whole: Reader) -> None:
    assert "My own <pass> Settings(8) sites: 1 site gain db note a<b 1.5 –" in whole.text
    assert "Finetune Settings(7) steps: 500, loss: 0.125" in whole.text
    own = {"log": [{"name": "mine", "rows": [{"a": i, "b": [i, {"c": True}]} for i in range(30)]}]}
    reader = read({}, own)
    assert "Passes Mine All 30 rows a b 0 0, c: yes 1 1, c: yes" in reader.text
    assert reader.tags["details"] == 1


def test_numbers_that_json_has_no_word_for_do_not_reach_the_browser() -> None:
    report, tables = canned()
    tables["sites"][0].update(sqnr_db=float("inf"), bits=None)
    tables["sites"][1].update(sqnr_db=float("nan"))
    html = page.render(report, tables)
    assert "∞" in html
    scripts = re.findall(r'<script type="application/json">(.*?)</script>', html, flags=re.S)
    assert not [script for script in scripts if re.search(r"\b(NaN|Infinity)\b", script)]


@pytest.mark.slow
def test_what_the_page_leaves_out_for_room_is_counted(whole: Reader) -> None:
    report, tables = canned()
    tables["histograms"] *= 2
    tables["attention"] *= 5
    text = read(report, tables).text
    assert "more are in tables.json" not in whole.text
    assert text.count("3 more are in tables.json.") == 1
    assert text.count("6 more are in tables.json.") == 1


# Figures are their rows


def points(trace: Any) -> list[tuple[float, float]]:
    return list(zip(trace.x, trace.y, strict=True))


def drawn(figure: go.Figure) -> dict[tuple[str, float], float]:
    """(name of the trace, x) -> y of everything in a figure."""
    return {(trace.name, x): y for trace in figure.data for x, y in points(trace)}


def test_bars_stand_in_graph_order_coloured_by_group() -> None:
    rows = rows_of("Error by site")
    figure = view_of("Error by site", Bars)(rows)
    assert drawn(figure) == {(row["role"], index): row["sqnr_db"] for index, row in enumerate(rows)}
    assert len({trace.marker.color for trace in figure.data}) == len(figure.data) == len({row["role"] for row in rows})
    assert figure.data[0].customdata[0].startswith("<b>patch_embed.proj:input</b><br>")
    assert figure.layout.yaxis.title.text == "SQNR, dB"


def test_bars_that_are_all_equal_are_not_drawn_where_only_differences_matter() -> None:
    bars = view_of("Bits and grids", Bars)
    rows = rows_of("Bits and grids")
    assert drawn(bars(rows)) == {(f"{row['bits']} bits", index): row["bits"] for index, row in enumerate(rows)}
    assert bars([{**row, "bits": 8} for row in rows]) is None


def test_flat_bars_have_their_number_at_the_end_float_beside_integer() -> None:
    rows = [row for row in rows_of("Latency") if row["batch"] == 8]
    before, after = view_of("Latency", Bars)(rows).data
    assert (before.name, list(before.x)) == ("float", [row["float_ms"] for row in rows])
    assert (after.name, list(after.x)) == ("integer", [row["quantized_ms"] for row in rows])
    assert list(after.text) == ["55.28 ms", "40.16 ms"]
    assert after.y[0] == "onnxruntime, threads: 2<br>1.71 times as fast"
    files = rows_of("Files")
    (bars,) = view_of("Files", Bars)(files).data
    assert [1e6 * x for x in bars.x] == pytest.approx([row["bytes"] for row in files])


def test_ties_and_wrong_codes_are_stacked() -> None:
    rows = [row for row in rows_of("Codes: simulation against runtime") if row["optimisations"] == "on"]
    rows[3] = {**rows[3], "wrong": 2}
    figure = view_of("Codes: simulation against runtime", Bars)(rows)
    ties, wrong = figure.data
    assert (list(ties.y), list(wrong.y)) == ([row["ties"] for row in rows], [row["wrong"] for row in rows])
    assert figure.layout.barmode == "stack"


def test_a_line_goes_through_sorted_points_and_only_few_points_have_labels() -> None:
    summary = data(LOG_VIEWS["mixed precision"][1], "mixed precision")
    rows = [{"table": key, **row} for key in ("frontier", "uniform") for row in summary[key]]
    view = view_of("Size against estimated loss", Points, "mixed precision")
    figure = view(rows[::-1])  # whatever the order of the rows, the line goes from small to large
    traces = {trace.name: trace for trace in figure.data}
    for name, mode in [("frontier", "lines+markers"), ("uniform", "markers+text")]:
        assert points(traces[name]) == sorted((row["bytes"] * 1e-6, row["loss"]) for row in summary[name])
        assert traces[name].mode == mode
    marks = [x for x, symbol in zip(traces["frontier"].x, traces["frontier"].marker.symbol, strict=True) if symbol == "diamond"]
    assert marks == [row["bytes"] * 1e-6 for row in summary["frontier"] if row["taken"]]
    assert figure.layout.yaxis.type == "log"
    assert list(traces["uniform"].text) == [f"{bits} bits" for bits in (4, 5, 6, 7, 8)]


def test_points_have_their_intervals_and_the_float_model_is_a_line() -> None:
    for title, value in (("Size against accuracy: runs of this model", "accuracy"),
                         ("Accuracy against the number of calibration images", "score")):  # fmt: skip
        rows, view = rows_of(title), view_of(title, Points)
        figure = view(rows)
        ends = {}
        for t in figure.data:
            for x, y, low, high in zip(t.x, t.y, t.error_y.arrayminus, t.error_y.array, strict=True):
                ends[x, y] = (y - low, y + high)
        assert ends == {(view.x.of(row), row[value]): pytest.approx(tuple(row["interval"])) for row in rows}
        assert [(shape.y0, shape.y1) for shape in figure.layout.shapes] == [(75.45, 75.45)]
        assert not view([{**row, "float": None} for row in rows]).layout.shapes


def test_without_labels_the_curve_is_that_of_the_agreement() -> None:
    report, tables = canned()
    tables["curve"] = [{**row, "quantized": None, "float": None} for row in tables["curve"]]
    rows = page.joined(report, tables)["curve"]
    figure = view_of("Accuracy against the number of calibration images", Points)(rows)
    assert points(figure.data[0]) == [(row["images"], row["agreement"]) for row in rows]
    assert figure.layout.yaxis.title.text == "agreement in class, %"


def test_series_are_drawn_side_by_side_and_what_is_over_the_limit_is_a_diamond() -> None:
    rows, view = rows_of("Outlier channels and tokens"), view_of("Outlier channels and tokens", Points)
    figure = view([*rows, {**rows[0], "token_ratio": None}])
    channels, tokens = figure.data
    assert [y for y, symbol in zip(channels.y, channels.marker.symbol, strict=True) if symbol == "diamond"] == [42.0]
    assert list(tokens.y) == [row["token_ratio"] for row in rows] + [None]
    assert figure.layout.shapes[0].y0 == 10.0
    assert figure.layout.annotations[0].y == 1.0  # plotly wants the logarithm
    losses = rows_of("Loss of each evaluation", "joint search")
    each, best = view_of("Loss of each evaluation", Points, "joint search")(losses).data
    assert (list(each.y), each.mode) == ([row["loss"] for row in losses], "markers")
    assert (list(best.y), best.mode) == ([row["best"] for row in losses], "lines+markers")


@pytest.mark.parametrize("count", [4, len(figures.PALETTE) + 1], ids=["few", "many"])
def test_a_point_of_the_ranking_figure_is_its_head_without_and_with(count: int) -> None:
    title = "Order of attention scores with and without the ranking term"
    rows = rows_of(title, "ranking")[: 3 * count]
    figure = view_of(title, Points, "ranking")(rows)
    assert len(figure.data) == (count if count <= len(figures.PALETTE) else 1)
    assert sorted(point for trace in figure.data for point in points(trace)) == sorted(
        (100 * row["without"], 100 * row["with"]) for row in rows
    )
    assert figure.layout.xaxis.range == figure.layout.yaxis.range


def test_a_cell_of_a_heatmap_is_its_row_and_what_is_not_there_is_empty() -> None:
    flips = [{"op": op, "head": h, "flipped_share": s} for op, h, s in [("a", 0, 0.5), ("a", 1, 0.25), ("b", 0, 0.125)]]
    (cells,) = view_of("Order of attention scores by head", Heatmap)(flips).data
    assert [list(line) for line in cells.z] == [[50.0, 25.0], [12.5, None]]
    assert (cells.zmin, cells.zmax) == (0, 50.0)


def test_both_maps_of_a_pair_have_one_colour_scale() -> None:
    row = {"float": [[0.1, 0.9]], "quantized": [[0.5, 0.5]], "x": "patch column", "y": "patch row"}
    figure = view_of("Attention maps", Heatmap)([row])
    assert [[list(line) for line in trace.z] for trace in figure.data] == [row["float"], row["quantized"]]
    assert {(trace.zmin, trace.zmax) for trace in figure.data} == {(0, 0.9)}
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("patch column", "patch row")


def test_a_histogram_has_the_counts_between_its_edges_and_shades_the_range() -> None:
    row = canned()[1]["histograms"][0]
    figure = Histogram("range")([row])
    (bars,) = figure.data
    assert (list(bars.y), list(bars.x)) == (row["counts"], row["edges"][:-1])
    assert [x + width for x, width in zip(bars.x, bars.width, strict=True)] == pytest.approx(row["edges"][1:])
    assert [figure.layout.shapes[0].x0, figure.layout.shapes[0].x1] == row["range"]
    assert figure.layout.yaxis.type == "log"


def axes() -> Iterator[Axis]:
    for section in [*ALL, *(section for _, section in OF_LOGS)]:
        for view in section.views:
            inner = view.view if isinstance(view, views.Each) else view
            if isinstance(inner, (Bars, Points)):
                yield inner.y
            if isinstance(inner, Points) and not inner.along:
                yield inner.x


def test_every_axis_says_what_stands_on_it() -> None:
    assert len(list(axes())) > 20
    assert all(axis.title for axis in axes())


# Pieces


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"min": 0.5, "max": 2}, "0.5 to 2"), ({"<4>": 1.0}, "&lt;4&gt;: 1"), ([1, "<b>"], "1, &lt;b&gt;"), (None, "–"),
        ([], "–"), (True, "yes"), (-0.123456, "−0.1235"), (1234567, "1,234,567"), (float("-inf"), "–∞"),
    ],
)  # fmt: skip
def test_any_value_of_a_table_is_text(value: Any, text: str) -> None:
    assert pieces.number(value) == text


def test_rows_that_are_equal_in_some_keys_are_one_and_their_numbers_add_up() -> None:
    rows = canned()[0]["fallbacks"]
    groups = pieces.grouped(rows, ("requested", "actual", "why"))
    assert [len(group["site"]) for group in groups] == [24, 1, 12]
    assert Counter(site for group in groups for site in group["site"]) == Counter(row["site"] for row in rows)
    assert [group["macs_share"] for group in groups] == pytest.approx([24 * 0.0021, 0.0137, 0.0])


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.3.mlp.fc1:weight", "3"), ("layers.2.blocks.5.attn.qkv", "2.5"), ("layer1.0.conv2:input", "layer1.0"),
        ("patch_embed.proj:weight", "patch_embed"), ("head", "head"),
    ],
)  # fmt: skip
def test_the_name_of_a_block_is_short(name: str, block: str) -> None:
    assert figures.block_of(name) == block


def test_ticks_never_stand_closer_than_their_labels_are_wide() -> None:
    names = ["stem", "stem", *(f"blocks.{block}.op" for block in range(60) for _ in range(8)), "head"]
    places, labels = figures.block_ticks(names)
    assert min(b - a for a, b in pairwise(places)) >= len(names) / figures.MANY_TICKS
    assert labels == [figures.block_of(names[place]) for place in places]
    assert "stem" not in labels
