"""The report says what the two JSON files say, in one file, whatever is missing from them."""

from __future__ import annotations

import base64
import copy
import io
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
from PIL import Image

from fewbit.report import answers, figures, page, scale, views, words
from fewbit.report.answers import not_as_requested
from fewbit.report.figures import Bars, Heatmap, Histogram, Points
from fewbit.report.scale import Axis
from fewbit.report.sections import LOG_VIEWS, SECTIONS, Section
from fewbit.request.command import sensitivity_command
from report.canned import canned

VOID = {"meta", "br", "img", "input", "link", "hr"}
LOADING = {"src", "href", "srcset", "poster", "data", "action"}
WHOLE = re.compile(
    r'<span class="whole">[^<]*</span>|<code.*?</code>|<pre.*?</pre>|<(script|style).*?</(script|style)>', re.DOTALL
)
QUESTIONS = ["Is it right?", "Is it good?", "Is it small and fast?", "What is not as requested?"]
ALL = [section for part in SECTIONS.values() for section in part]
OF_LOGS = [(name, section) for name, sections in LOG_VIEWS.items() for section in sections]
EVIL = '<script>alert("x")</script>'


class Reader(HTMLParser):
    """The page as a browser takes it: tags that must close, what is loaded, words outside scripts, pictures without words."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.loaded: list[str] = []
        self.words: list[str] = []
        self.styles: list[str] = []
        self.wordless = 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        said = dict(attrs).get("alt" if tag == "img" else "aria-label")
        self.wordless += (tag == "img" and not said) or (("role", "img") in attrs and not said)
        self.loaded += [value or "" for name, value in attrs if name in LOADING]
        self.styles += [value or "" for name, value in attrs if name == "style"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "style":
            self.styles.append(data)
        elif inside != "script":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def read(report: dict[str, Any], tables: dict[str, Any]) -> Reader:
    reader = Reader(page.render(report, tables))
    assert not reader.open
    assert not reader.wordless
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
    assert [uri for uri in whole.loaded if not uri.startswith(("#", "data:"))] == []
    assert whole.tags["link"] == 1  # the icon that is none, so that a browser does not ask for one
    assert not re.search(r"url\(|@import", " ".join(whole.styles))
    report, tables = canned()
    tables["images"][0]["thumbnail"] = "https://example.org/cat.png"
    assert read(report, tables).tags["img"] == whole.tags["img"] - 1


def test_the_page_is_drawn_without_torch() -> None:
    code = "import fewbit.report.page, fewbit.report.tables, fewbit.report.frontpage, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""


def test_every_figure_is_drawn(whole: Reader) -> None:
    _, tables = canned()
    singles = 7  # error, bits, outliers, curve, runs, codes with optimisations on; one is the histograms'
    logs = 1 + 2 + 1 + 1 + 2 + 1  # equalize, mixed precision, ranking, output search, joint search, reconstruct
    curves = 4  # an svg inside for the line of each
    flat = 2 + 1 + 1  # latency for each batch, files, stages
    assert whole.tags["figure"] == singles - 1 + logs + flat + len(tables["histograms"]) + len(tables["attention"])
    diamonds = page.render(*canned()).count('class="free"')
    assert whole.tags["svg"] == singles - 1 + logs + len(tables["histograms"]) + curves + diamonds
    assert whole.tags["script"] == 1


def test_the_four_answers_stand_in_order_before_any_figure_and_the_links_lead_to_the_parts(whole: Reader) -> None:
    html = page.render(*canned())
    places = [html.index(place) for place in [*QUESTIONS, "<nav", "<figure>"]]
    assert places == sorted(places)
    parts = [part.lower() for part in SECTIONS]
    assert [uri for uri in whole.loaded if uri.startswith("#")] == [f"#{part}" for part in parts]
    assert all(f'<section id="{part}">' in html for part in parts)


def test_the_same_two_dicts_give_the_same_text_and_stay_as_they_were() -> None:
    report, tables = canned()
    before = copy.deepcopy((report, tables))
    assert page.render(report, tables) == page.render(*canned())
    assert (report, tables) == before


# The words and the numbers


def test_the_answers_are_the_numbers_of_the_report(whole: Reader) -> None:
    for said in [
        "0 of 7,274,496 codes are wrong, at 148 sites",
        "40 ties besides",
        "The weights in the file are the plan's",
        "75.45 → 74.60 % top-1 accuracy",
        "Change on the same images −0.85 points, 95 % interval −1.55 to −0.15.",
        "AP50 57.50 % 55.25 % more",
        "92.35 % agreement in class with the float model.",
        "2,000 images scored in onnxruntime, 128 others for calibration.",
        "Left alone on request: patch_embed.proj stays at 8 bits; head stays at 8 bits.",
        "Too few calibration images.",
        "22.92 → 6.10 MB 3.75× smaller",
        "ONNX files; 4.31 bits a weight.",
        "onnxruntime: 11.84 → 6.91 ms, 1.71 × faster.",
        "37 fallbacks",
        "Most often 4 bits became 8 bits, at 24 sites: no 4-bit operand",
        "98.73 % of the multiply-accumulates run in integers.",
        "12 sites stayed float.",
        "2 ops left in float on purpose: float attention is faster here.",
    ]:
        assert said in whole.text


def test_the_tables_are_the_numbers_of_their_rows(whole: Reader) -> None:
    for said in [
        "8 bits no 4-bit operand for a product of two activations 24 sites blocks.0.attn.scores:q",  # shares are added
        "blocks.11.attn.scores:k 5.04 %",
        "openvino, as it ships logits 0.0934 0.2 yes 0.9998712 99.60 %",
        "openvino 8 74.96 ms 74.46 to 75.46 40.16 ms 40.16 to 41.16 1.867 9 1.5",
        "openvino 0.094 s 0.050 s 151.40 MB 98.70 MB 61.20 MB",
        "3,637,248 40 40 0",  # codes: compared, differing, ties, wrong
        "integer kernels in the runtime's optimised graph 74",
        "nodes of the file that compute in integers 70 nodes of the file that compute 75 integer operators of the plan 74",
        "QLinearMatMul: 49",
        "blocks.2.mlp.fc2:input 122.4 2 7, 199 25.00 % 1.54 % 2 0, 17 12.50 % clipped at 61.2 of 122",
        "difference between the ranges of two halves, median 9.00 %",
        "0004.png label class 4 float class 4 integer class 3",
        "64 72.00 % 82.00 % 70.00 % to 74.00 % 0.23 %",
        "processor x86-64 with VNNI",
    ]:
        assert said in whole.text, said


def test_without_labels_agreement_leads_and_no_accuracy_is_claimed() -> None:
    report, tables = canned()
    report["accuracy"].update(float=None, quantized=None)
    text = read(report, tables).text
    good = text[text.index("Is it good?") : text.index("Is it small and fast?")]
    assert good.startswith("Is it good? 92.35 % agreement in class with the float model")
    assert "This is agreement with the float model, not accuracy: no labels were used." in good
    assert "points" not in good


@pytest.mark.parametrize(
    ("differing", "wrong", "word"), [(0, 0, "yes"), (3, 0, "yes"), (3, 1, "no")], ids=["none", "ties", "wrong"]
)
def test_right_means_that_no_code_is_wrong(differing: int, wrong: int, word: str) -> None:
    report, tables = canned()
    report["verify"].update(codes_differing=differing, codes_wrong=wrong)
    assert f"Is it right? {word} {wrong} of 7,274,496 codes are wrong" in read(report, {}).text
    del report["verify"]["codes_wrong"]  # then the table counts
    tables["checks"] = [{**tables["checks"][0], "differing": differing, "ties": differing - wrong, "wrong": wrong}]
    text = read(report, tables).text
    assert f"Is it right? {word} {wrong} of 7,274,496 codes are wrong" in text
    assert ("off by at most 1" in text) == bool(wrong)


TIED = {"site": "blocks.0.fc1:input", "ties": 944, "compared": 4608}
GAPS = [
    ({"difference": 0.5, "spread": 2.0}, "by up to 0.5 in b, 25.00 % of its standard deviation."),
    ({"difference": 0.25, "spread": None}, "25.00 % of the numbers of b are others."),
    ({"difference": "inf", "spread": 2.0}, "b has another shape, or infinite numbers where the other has none."),
]


@pytest.mark.parametrize(("gap", "words"), GAPS, ids=["real numbers", "whole numbers", "another shape"])
@pytest.mark.parametrize("sites", [[TIED], [TIED, TIED, TIED], []], ids=["a site", "three sites", "none seen"])
def test_outputs_that_ties_move_are_told_by_how_much_in_place_of_float32_rounding(gap: dict, words: str, sites: list) -> None:
    report, tables = canned()
    small = {"place": "openvino, as it ships", "output": "a", "difference": 30.0, "usual": 0.1, "spread": 1000.0}
    report["verify"].update(tied_sites=sites, gaps=[small, {**small, "output": "b", **gap}])
    text = read(report, tables).text
    start = "The outputs of the file (openvino, as it ships) differ from what the simulation gives by itself"
    assert any(f"{start}{link} {words}" in text for link in ("", ":"))
    assert "no more than float32 rounding explains" not in text
    assert ("At blocks.0.fc1:input 944 of 4,608 codes are ties, more than chance brings" in text) == bool(sites)
    assert ("So it is at 2 sites besides." in text) == (len(sites) == 3)
    assert f"Is it right? {'yes, but for ties' if sites else 'yes'} 0 of" in text
    report["verify"]["problems"] = ["head: 1 of 9 codes"]
    assert "Is it right? no 0 of" in read(report, tables).text


def test_without_a_table_that_explains_them_codes_that_differ_are_not_right() -> None:
    report, _ = canned()
    del report["verify"]["codes_wrong"]
    text = read(report, {}).text
    assert "Is it right? no 40 of 7,274,496 codes differ" in text
    assert "ties besides" not in text


def test_a_model_that_became_slower_says_so() -> None:
    report, _ = canned()
    report["latency"] = {"onnxruntime": {"float_ms": 5.0, "quantized_ms": 10.0, "ratio": 0.5}}
    assert "5.00 → 10.00 ms, 2.00 × slower." in read(report, {}).text


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
    assert dirty.tags["script"] == whole.tags["script"]
    assert dirty.tags.keys() == whole.tags.keys()
    assert dirty.text.count(EVIL) > 600


# What is missing


@pytest.mark.parametrize("section", ALL, ids=[section.title for section in ALL])
def test_a_section_whose_table_is_empty_or_absent_does_not_appear(section: Section) -> None:
    tables = data(section)
    shown = section.shown(tables)
    assert shown is not None
    assert (shown["title"], bool(shown["blocks"])) == (section.title, True)
    assert section.shown({**tables, section.key: []}) is None
    assert section.shown({key: rows for key, rows in tables.items() if key != section.key}) is None


@pytest.mark.parametrize(("name", "section"), OF_LOGS, ids=[section.title for _, section in OF_LOGS])
def test_the_views_of_a_log_are_drawn_where_it_has_rows(name: str, section: Section) -> None:
    shown = section.shown(data(section, name))
    assert shown is not None
    assert [block["kind"] for block in shown["blocks"]] == ["figure"] or section.title == "Bits of each module"
    assert section.shown({}) is None


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
    assert (reader.tags["figure"], reader.tags["section"], reader.tags["h3"]) == (0, 0, 0)


def test_a_pass_that_nobody_knows_is_a_table_by_itself(whole: Reader) -> None:
    assert "My own <pass> Settings(8) sites: 1 site gain db a<b 1.5" in whole.text
    assert "Finetune Settings(7) steps: 500, loss: 0.125" in whole.text
    own = {"log": [{"name": "mine", "rows": [{"a": i, "b": [i, {"c": True}]} for i in range(30)]}]}
    reader = read({}, own)
    assert "Passes Mine All 30 rows a b 0 0, c: yes 1 1, c: yes" in reader.text
    assert reader.tags["details"] == 1


def test_numbers_without_an_end_are_told_and_not_drawn() -> None:
    report, tables = canned()
    tables["sites"][0].update(sqnr_db=float("inf"), bits=None)
    tables["sites"][1].update(sqnr_db=float("nan"))
    html = page.render(report, tables)
    assert "∞" in html
    assert not re.search(r"[\"= ](nan|inf)[\"%]", html)


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


def points(series: figures.Series) -> list[tuple[float, float]]:
    return [(mark.x, mark.y) for mark in series.marks]


def heights(figure: Any) -> dict[tuple[str, int], float]:
    """(name of the series, row) -> height of every bar of a figure."""
    return {(one.name, mark.index): mark.y - mark.base for one in figure["series"] for mark in one.marks}


def test_bars_stand_in_graph_order_coloured_by_group() -> None:
    rows = rows_of("Error by site")
    figure = view_of("Error by site", Bars)(rows)
    assert heights(figure) == {(row["role"], index): row["sqnr_db"] for index, row in enumerate(rows)}
    assert len({one.colour for one in figure["series"]}) == len(figure["series"]) == len({row["role"] for row in rows})
    assert figure["series"][0].marks[0].words.startswith("patch_embed.proj:input, ")
    assert figure["alt"].startswith(f"SQNR, dB, by site in graph order (ticks: blocks): {len(rows)} values, from ")
    assert all((mark.x + mark.to) / 2 == pytest.approx(mark.index) for one in figure["series"] for mark in one.marks)


def test_bars_that_are_all_equal_are_not_drawn_where_only_differences_matter() -> None:
    bars = view_of("Bits and grids", Bars)
    rows = rows_of("Bits and grids")
    assert heights(bars(rows)) == {(f"{row['bits']} bits", index): row["bits"] for index, row in enumerate(rows)}
    assert bars([{**row, "bits": 8} for row in rows]) is None


def test_flat_bars_have_their_number_at_the_end_float_beside_integer() -> None:
    rows = [row for row in rows_of("Latency") if row["batch"] == 8]
    block = view_of("Latency", Bars)(rows)
    assert [name for name, _ in block["legend"]] == ["float", "integer"]
    assert [[bar["words"] for bar in line["bars"]] for line in block["lines"]] == [
        ["94.72 ms", "55.28 ms"],
        ["74.96 ms", "40.16 ms"],
    ]
    longest = max(row["float_ms"] for row in rows)
    wide = [[row["float_ms"] / longest, row["quantized_ms"] / longest] for row in rows]
    assert [[bar["width"] / 100 for bar in line["bars"]] for line in block["lines"]] == [
        pytest.approx(w, abs=1e-4) for w in wide
    ]


def test_ties_and_wrong_codes_are_stacked() -> None:
    rows = [row for row in rows_of("Codes: simulation against runtime") if row["optimisations"] == "on"]
    rows[3] = {**rows[3], "wrong": 2}
    figure = view_of("Codes: simulation against runtime", Bars)(rows)
    assert heights(figure) == {(kind, i): row[kind] for i, row in enumerate(rows) for kind in ("ties", "wrong")}
    assert {mark.index: mark.base for mark in figure["series"][1].marks} == {i: row["ties"] for i, row in enumerate(rows)}


def test_a_line_goes_through_sorted_points_and_only_few_points_have_labels() -> None:
    summary = data(LOG_VIEWS["mixed precision"][1], "mixed precision")
    rows = [{"table": key, **row} for key in ("frontier", "uniform") for row in summary[key]]
    view = view_of("Size against estimated loss", Points, "mixed precision")
    figure = view(rows[::-1])  # whatever the order of the rows, the line goes from small to large
    series = {one.name: one for one in figure["series"]}
    for name, line in [("frontier", True), ("uniform", False)]:
        assert points(series[name]) == sorted((row["bytes"] * 1e-6, row["loss"]) for row in summary[name])
        assert series[name].line is line
    marked = [mark.x for mark in series["frontier"].marks if mark.diamond]
    assert marked == [row["bytes"] * 1e-6 for row in summary["frontier"] if row["taken"]]
    assert figure["y"].log
    assert [mark.label for mark in series["uniform"].marks] == [f"{bits} bits" for bits in (4, 5, 6, 7, 8)]
    assert {mark.label for mark in series["frontier"].marks} == {""}


def test_points_have_their_intervals_and_the_float_model_is_a_line() -> None:
    for title, value in (("Size and accuracy of the runs of this model", "accuracy"),
                         ("Accuracy against the number of calibration images", "score")):  # fmt: skip
        rows, view = rows_of(title), view_of(title, Points)
        figure = view(rows)
        ends = {(mark.x, mark.y): mark.ends for one in figure["series"] for mark in one.marks}
        assert ends == {(view.x.of(row), row[value]): tuple(row["interval"]) for row in rows}
        assert figure["across"] == (75.45, "float")
        assert view([{**row, "float": None} for row in rows])["across"] is None


def test_without_labels_the_curve_is_that_of_the_agreement() -> None:
    report, tables = canned()
    tables["curve"] = [{**row, "quantized": None, "float": None} for row in tables["curve"]]
    rows = page.joined(report, tables)["curve"]
    figure = view_of("Accuracy against the number of calibration images", Points)(rows)
    assert points(figure["series"][0]) == [(row["images"], row["agreement"]) for row in rows]
    assert figure["y"].title == "agreement in class, %"


def test_series_are_drawn_side_by_side_and_what_is_over_the_limit_is_a_diamond() -> None:
    rows, view = rows_of("Outlier channels and tokens"), view_of("Outlier channels and tokens", Points)
    figure = view([*rows, {**rows[0], "channel_ratio": 12.0, "token_ratio": None, "over": ["channel_ratio"]}])
    channels, tokens = figure["series"]
    assert [mark.y for mark in channels.marks if mark.diamond] == [42.0, 12.0]
    assert [mark.y for mark in tokens.marks if mark.diamond] == [14.8]  # each series for itself
    assert [mark.y for mark in tokens.marks] == [row["token_ratio"] for row in rows]  # what is not there is left out
    assert figure["across"] == (10.0, "limit")
    losses = rows_of("Loss of each evaluation", "joint search")
    each, best = view_of("Loss of each evaluation", Points, "joint search")(losses)["series"]
    assert ([mark.y for mark in each.marks], each.line) == ([row["loss"] for row in losses if row["loss"] is not None], False)
    assert ([mark.y for mark in best.marks], best.line) == ([row["best"] for row in losses], True)


@pytest.mark.parametrize("count", [4, len(figures.PALETTE) + 1], ids=["few", "many"])
def test_a_point_of_the_ranking_figure_is_its_head_without_and_with(count: int) -> None:
    title = "Order of attention scores with and without the ranking term"
    rows = rows_of(title, "ranking")[: 3 * count]
    figure = view_of(title, Points, "ranking")(rows)
    assert len(figure["series"]) == (count if count <= len(figures.PALETTE) else 1)
    assert sorted(point for one in figure["series"] for point in points(one)) == sorted(
        (100 * row["without"], 100 * row["with"]) for row in rows
    )
    assert (figure["x"].low, figure["x"].high) == (figure["y"].low, figure["y"].high)


def test_a_cell_of_a_heatmap_is_its_row_and_what_is_not_there_is_empty() -> None:
    flips = [{"op": op, "head": h, "flipped_share": s} for op, h, s in [("a", 0, 0.5), ("a", 1, 0.25), ("b", 0, 0.125)]]
    block = view_of("Order of attention scores by head", Heatmap)(flips)
    cells = {line["name"]: [cell and (cell["text"], cell["share"]) for cell in line["cells"]] for line in block["lines"]}
    assert cells == {"a": [("50.0", 1.0), ("25.0", 0.5)], "b": [("12.5", 0.25), None]}


def test_both_maps_of_a_pair_have_one_colour_scale() -> None:
    row = {"float": [[0.0, 0.9]], "quantized": [[0.9], [0.0], [0.45]], "x": "patch column", "y": "patch row"}
    block = view_of("Attention maps", Heatmap)([row])
    first, second = (Image.open(io.BytesIO(base64.b64decode(one["uri"].partition(",")[2]))) for one in block["pictures"])
    assert (first.size, second.size) == ((2, 1), (1, 3))
    assert first.convert("RGB").getpixel((0, 0)) == second.convert("RGB").getpixel((0, 1)) == (68, 1, 84)
    assert first.convert("RGB").getpixel((1, 0)) == second.convert("RGB").getpixel((0, 0)) == (253, 231, 37)
    assert block["words"] == "across: patch column, down: patch row, dark 0 to bright 0.9"


def test_a_histogram_has_the_counts_between_its_edges_and_shades_the_range() -> None:
    row = canned()[1]["histograms"][0]
    figure = Histogram("range")([row])
    (bars,) = figure["series"]
    edges = {
        (low, high): count for low, high, count in zip(row["edges"], row["edges"][1:], row["counts"], strict=False) if count
    }
    assert {(mark.x, mark.to): mark.y for mark in bars.marks} == edges
    assert figure["band"] == row["range"]
    assert figure["y"].log


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


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0, 50], "0 10 20 30 40 50"), ([0, 3], "0 1 2 3"), ([-0.3, 0.9], "−0.2 0 0.2 0.4 0.6 0.8"),
        ([2e6, 5e6], "2M 2.5M 3M 3.5M 4M 4.5M 5M"),
    ],
)  # fmt: skip
def test_ticks_are_round_and_whole_where_the_values_are(values: list[float], ticks: str) -> None:
    assert " ".join(label for _, label in scale.linear(values, left=0.0).ticks) == ticks


def test_a_place_on_an_axis_is_in_percent() -> None:
    even, decades = scale.Scale(10, 30, ()), scale.Scale(1, 100, (), log=True)
    assert [even.at(v) for v in (10, 15, 30, 99)] == [0, 25, 100, 100]
    assert [decades.at(v) for v in (0, 1, 10, 100)] == [0, 0, 50, 100]
    assert [label for _, label in scale.logarithmic([1, 2, 40], few=True).ticks] == ["1", "2", "40"]
    assert [label for _, label in scale.logarithmic([1e-7, 3e4]).ticks] == ["10⁻⁶", "10⁻⁴", "0.01", "1", "100", "10k"]


# Words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"min": 0.5, "max": 2}, "0.5 to 2"), ({"<4>": 1.0}, "<4>: 1"), ([1, "<b>"], "1, <b>"), (None, "–"),
        ([], "–"), (True, "yes"), (-0.123456, "−0.1235"), (1234567, "1,234,567"), (float("-inf"), "–∞"),
    ],
)  # fmt: skip
def test_any_value_of_a_table_is_text(value: Any, text: str) -> None:
    assert words.number(value) == text


@pytest.mark.parametrize(("ratio", "said"), [(1.5, "1.50 × faster"), (0.92, "1.09 × slower"), (1.001, "as fast")])
def test_what_is_slower_is_never_called_faster(ratio: float, said: str) -> None:
    assert words.speed(ratio).replace(words.UNIT, " ") == said


@pytest.mark.parametrize(
    ("model", "title"),
    [("/a/b/net.onnx", "net"), ("runs/net.pt2", "net"), ("../a/net.py:model", "net.py:model"), ("demo:detr", "demo:detr"),
     ("resnet50", "resnet50"), ("hf:facebook/dinov2-small", "hf:facebook/dinov2-small"), ("/models/dino", "dino")],
)  # fmt: skip
def test_the_title_is_a_name_and_no_path(model: str, title: str) -> None:
    assert words.title_of(model) == title


def test_rows_that_are_equal_in_some_keys_are_one_and_their_numbers_add_up() -> None:
    rows = canned()[0]["fallbacks"]
    groups = words.grouped(rows, ("requested", "actual", "why"))
    assert [len(group["site"]) for group in groups] == [24, 1, 12, 2]
    assert Counter(site for group in groups for site in group["site"]) == Counter(row["site"] for row in rows)
    assert [group["macs_share"] for group in groups] == pytest.approx([24 * 0.0021, 0.0137, 0.0, 0.1])


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.3.mlp.fc1:weight", "3"), ("layers.2.blocks.5.attn.qkv", "2.5"), ("layer1.0.conv2:input", "layer1.0"),
        ("patch_embed.proj:weight", "patch_embed"), ("head", "head"), ("stem.0", "stem.0"), ("blocks.1.add.1:output", "1"),
        ("model.decoder.layers.2.fc1", "decoder.2"), ("model.backbone.model.layer1.0.conv1", "layer1.0"),
    ],
)  # fmt: skip
def test_the_name_of_a_block_is_short(name: str, block: str) -> None:
    assert scale.block_of(name) == block


def test_labels_never_stand_closer_than_they_are_wide() -> None:
    names = ["stem", "stem", *(f"blocks.{block}.op" for block in range(60) for _ in range(8)), "head"]
    ticks = scale.block_ticks(names)
    wide = scale.CHARACTERS / len(names)
    for (a, first), (b, second) in pairwise(ticks):
        assert (b - a) * wide > (len(first) + len(second)) / 2
    assert [label for _, label in ticks] == [scale.block_of(names[int(place)]) for place, _ in ticks]
    assert len(ticks) > 15
    assert "head" not in dict(ticks).values()
    assert scale.block_ticks([f"a_name_of_many_letters_{i}" for i in "ab"]) == ((0, "a_name_of_man…"), (1, "a_name_of_man…"))


def test_few_sites_do_not_fill_a_page_and_their_labels_have_their_room() -> None:
    view, rows = view_of("Outlier channels and tokens", Points), rows_of("Outlier channels and tokens")[:3]
    figure = view([{**row, "site": name, "token_ratio": None} for row, name in zip(rows, "abc", strict=True)])
    assert (figure["most_pixels"], figure["x"].ticks) == (450, ((0, "a"), (1, "b"), (2, "c")))
    report, tables = canned()
    tables["outliers"] = [{**row, "token_ratio": None} for row in rows]
    html = page.render(report, tables)
    part = html[html.index("Outlier channels") : html.index("ratio to the median")]
    assert 'style="max-width:450px"' in part
    assert ("largest channel" in part, "largest token" in part) == (True, False)  # no point of it is drawn
    assert view(40 * rows)["most_pixels"] > 1140  # as wide as the page
    assert view_of("Size and accuracy of the runs of this model", Points)(rows_of(
        "Size and accuracy of the runs of this model"))["most_pixels"] == 0  # fmt: skip
    for count in (1, 2, 3, 4, 5):  # each label has its room, cut to 14 characters
        assert len(scale.block_ticks([f"{i}_of_a_long_name" for i in range(count)])) == count


def test_where_no_time_is_the_targets_own_the_reason_is_said() -> None:
    report, _ = canned()
    report["latency"] = {}
    assert "No time of the target is known." in read(report, {}).text
    report["fallbacks"].append({"site": "the runtime", "requested": "tensorrt", "actual": "onnxruntime", "kind": "runtime",
                                "why": "tensorrt is not here", "macs_share": 0.0})  # fmt: skip
    assert "No time of the target is known: tensorrt is not here." in read(report, {}).text


def test_what_is_far_out_is_drawn_at_the_end_and_told_in_words() -> None:
    rows = [
        {**row, "sqnr_db": value}
        for row, value in zip(rows_of("Error by site"), (20.0, 1e6, float("inf"), float("nan")), strict=False)
    ]
    figure = view_of("Error by site", Bars)(rows)
    assert sorted(heights(figure).values()) == [20.0, 80.0, 80.0]
    assert any("1000000.0 dB" in mark.words for one in figure["series"] for mark in one.marks)


def test_the_report_says_what_to_do() -> None:
    report, tables = canned()
    command = tables["run"]["command"]

    def said() -> str:
        return " ".join(part for step in answers.advice(report, tables) for part in step)

    text = read(report, tables).text
    assert f"What to do next {answers.advice(report, tables)[0][0]} {command} --max-drop 0.5 --out RUN-within-0.5" in text
    assert "fewbit sensitivity vit_tiny_patch32_224" in said()  # an older run says no more
    report["pays"] = {"pays": False}
    for typed in ("net.onnx --out 'my run' --force", "--force net.onnx --out='my run'", "--quick net.onnx"):
        tables["run"]["command"], tables["next"] = f"fewbit quantize {typed}", {"folder": "my run"}
        assert [step[1] for step in answers.advice(report, tables)[:2]] == [  # the run and its page stay
            "fewbit quantize net.onnx --only-what-pays --out 'my run-that-pays'",
            "fewbit quantize net.onnx --max-drop 0.5 --out 'my run-within-0.5'",
        ]
    tables["run"]["command"] += " --only-what-pays"
    assert all("Leave float what loses time" not in what for what, _ in answers.advice(report, tables))
    tables["run"]["command"], report["pays"] = command, None
    whole = "fewbit quantize net.onnx --images a --scored 9 --quick --mean 0 --out far"
    tables["next"] = {"sensitivity": sensitivity_command(whole), "folder": "far"}
    assert said().endswith("fewbit sensitivity net.onnx --images a --mean 0")  # the interval is below 0
    report["accuracy"]["interval"] = [-1.55, 0.15]
    assert "fewbit export far --to FOLDER" in said()
    assert "--max-drop" not in said()
    report["pays"] = {"pays": False}
    assert f"{command} --only-what-pays --out far-that-pays" in said()
    tables["run"]["command"] = "fewbit.quantize(...)"  # Python, which nobody types again
    assert "--only-what-pays" not in said()
    report["verify"]["problems"] = ["it is wrong"]
    assert "Do not use this file" in said()
    assert "export" not in said()


def test_a_site_has_the_share_of_its_modules_loss() -> None:
    report, tables = canned()
    shares = {row["site"]: row.get("module_share") for row in page.joined(report, tables)["sites"]}
    assert shares["blocks.0.mlp.fc2:input"] == tables["sensitivity"][0]["loss_share"]
    assert shares["blocks.1.mlp.fc2:weight"] == tables["sensitivity"][1]["loss_share"]
    columns = [head["text"] for head in view_of("All sites", views.Table)(page.joined(report, tables)["sites"])["head"]]
    assert columns[:4] == ["site", "SQNR", "module", "loss of its module"]
    tables["sensitivity"] = [{**tables["sensitivity"][0], "module": f"m{i}", "ops": [f"m{i}"]} for i in range(12)]
    tables["sites"] = [{**tables["sites"][0], "op": f"m{i}"} for i in range(12)]
    both = page.joined(report, tables)
    assert [len(both["sensitivity"]), *(row["module"] for row in both["sites"])] == [10, *(f"m{i}" for i in range(12))]
    tables["sensitivity"] = []  # as with --quick, where nothing is known of any
    columns = [head["text"] for head in view_of("All sites", views.Table)(page.joined(report, tables)["sites"])["head"]]
    assert columns[:3] == ["site", "SQNR", "clipped"]


@pytest.mark.parametrize(
    ("before", "after", "ratio", "said"),
    [
        (1.0, 0.5, 2.0, "2.00\u00a0× faster"),
        (1.0, 0.5, 2.06, "2.06\u00a0× faster in paired rounds"),
        (0.29, 0.28, 1.27, "1.27\u00a0× faster in paired rounds, and 1.04\u00a0× faster by these two medians: noise"),
        (0.51, 0.53, 1.07, "1.07\u00a0× faster in paired rounds, and 1.04\u00a0× slower by these two medians: noise"),
    ],
)
def test_a_ratio_of_pairs_that_the_two_medians_do_not_show_is_told_apart(
    before: float, after: float, ratio: float, said: str
) -> None:
    assert words.paired_speed(before, after, ratio) == said


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (None, "%", "–"), (0.0, "%", "0.00 %"), (100.0, "%", "100.00 %"), (100 * (0.1 + 0.2 + 0.7), "%", "100.00 %"),
        (1.4e-3, "%", "< 0.01 %"), (99.9986, "%", "> 99.99 %"), (0.0051, "%", "0.01 %"), (99.99, "%", "99.99 %"),
        (-1e-3, "%", "> −0.01 %"), (-0.0, "%", "0.00 %"), (22.914, "dB", "22.91 dB"), (-3.2, "dB", "−3.20 dB"),
        (99.9999, "dB", "100.00 dB"), (0.12345, "", "0.1235"), (float("inf"), "dB", "∞"), (float("nan"), "%", "not a number"),
    ],
)  # fmt: skip
def test_a_measure_has_its_unit_and_a_percentage_is_0_or_100_only_where_it_is(
    value: float | None, unit: str, said: str
) -> None:
    assert words.measured(value, unit).replace("\u00a0", " ") == said
    if unit == "%" and value is not None:
        assert words.share(value / 100).replace("\u00a0", " ") == said


def test_bytes_are_never_0_where_there_are_some() -> None:
    shown = {
        0: "0 B",
        1: "1 B",
        3_572: "3.57 kB",
        10_136: "10.14 kB",
        194_809: "194.81 kB",
        1_000_000: "1.00 MB",
        22_920_000: "22.92 MB",
        None: "–",
    }
    assert {value: words.megabytes(value).replace("\u00a0", " ") for value in shown} == shown


def test_sizes_of_a_column_have_one_unit() -> None:
    rows = [{"bytes": value} for value in (22_920_000, 0, 6_087, None)]
    block = views.Table(("file:bytes:MB",))(rows)
    assert block is not None
    assert [row[0]["text"].replace("\u00a0", " ") for row in block["rows"]] == ["22,920.00 kB", "0.00 kB", "6.09 kB", "–"]


def test_decibels_are_not_percent_and_their_fall_has_no_points() -> None:
    report, tables = canned()
    report["accuracy"].update(measure="PSNR", unit="dB", float=22.91, quantized=21.82)
    report["accuracy"]["rows"] = [
        {"what": "SSIM", "float": 99.99997, "quantized": 95.0, "unit": "%", "better": "more"},
        {"what": "AbsRel", "float": 0.1, "quantized": 0.12345, "unit": "", "better": "less"},
    ]
    for key, score in (("curve", "quantized"), ("runs", "accuracy")):
        tables[key] = [{**row, "measure": "PSNR", "unit": "dB", score: 21.82} for row in tables[key]]
    goal = {"index": 0, "what": "recipe mse", "drop": 1.09, "unit": "dB", "within": True, "taken": True}
    tables["goal"] = [goal, {**goal, "index": 1, "drop": 1.5, "unit": "%"}]
    html, text = page.render(report, tables), read(report, tables).text
    for said in (
        "22.91 → 21.82 dB PSNR", "Change on the same images −1.09 dB,", "SSIM > 99.99 % 95.00 % more",
        "AbsRel 0.1 0.1235 less", "64 21.82 dB 82.00 %", "recipe mse 1.09 dB", "recipe mse 1.50 points",
    ):  # fmt: skip
        assert said in text.replace("\u00a0", " "), said
    for said in ("PSNR, dB", "1 image: 21.82\u00a0dB", "64 images: 21.82\u00a0dB", "4.00 bits a weight, 21.82\u00a0dB"):
        assert said in html, said
    assert not re.search(r"(PSNR, |21\.82\W?)%|1 images", html.replace("\u00a0", ""))


def test_where_accuracy_is_not_used_the_page_does_not_say_that_there_are_no_labels() -> None:
    report, _ = canned()
    why = "The float model is right for 1 of 50 labels, no better than guessing among 10 classes, so accuracy is not used."
    report["accuracy"].update(float=None, quantized=None, why=why)
    text = read(report, {}).text
    assert "This is agreement with the float model, not accuracy." in text
    assert why in text
    assert "no labels" not in text


@pytest.mark.parametrize(("ms", "alone"), [(9.06, ", by these two medians alone 1.16\u00a0× slower"), (7.82 / 0.776, "")])
def test_why_a_file_does_not_pay_says_which_ratio_is_that_of_pairs(ms: float, alone: str) -> None:
    """Oracle: 9.06 / 7.82 = 1.16, and 1 / 0.776 = 1.29."""
    paid = {
        "runtime": "openvino", "batch": 1, "threads": 2, "ms": ms, "spread": [9.0, 9.1], "float_runtime": "openvino",
        "float_ms": 7.82, "float_spread": [7.0, 8.0], "rounds": 9, "ratio": 0.776, "interval": [0.7, 0.8], "pays": False,
    }  # fmt: skip
    ratio = "(median ratio 0.776, 95\u00a0% interval 0.700 to 0.800)"
    assert f"In paired rounds the file is 1.29\u00a0× slower {ratio}{alone}; a file pays" in answers.unpaid(paid)


def test_a_share_of_work_that_nobody_has_counted_is_not_0() -> None:
    report, _ = canned()
    row = {"requested": "a step", "actual": "steps", "why": "no grid", "kind": "site"}
    report["fallbacks"] = [{**row, "site": "a", "macs_share": 0.25}, {**row, "site": "b", "macs_share": None}]
    text = read(report, {}).text
    assert "a step steps no grid 2 ops a b" in text.replace("  ", " ")
    assert "a step steps no grid 2 ops a b 25.00" not in text.replace("  ", " ")


def test_a_missed_goal_is_not_as_requested() -> None:
    report, _ = canned()
    report["missed"] = ["top-1 accuracy fell by 7.23 points; --max-drop allows 0.001."]
    card = not_as_requested(report)
    assert (card.big, card.small, card.word, card.mood) == ("1", "missed goal, 37 fallbacks", "not kept", "bad")
    assert card.loud == report["missed"]
    assert "not kept 1 missed goal, 37 fallbacks" in read(report, {}).text
    card = not_as_requested({**report, "fallbacks": []})
    assert (card.big, card.small) == ("1", "missed goal")
    assert (not_as_requested({}).big, not_as_requested({}).word) == ("nothing", "")


def test_a_file_that_is_larger_is_not_called_smaller() -> None:
    assert [words.size(1.10, after) for after in (0.55, 1.10, 1.13)] == ["2.00× smaller", "as large", "1.03× larger"]


def test_no_line_ends_within_the_name_of_an_option() -> None:
    report, tables = canned()
    html = page.render({**report, "skipped": ["intervals"]}, tables)
    assert '<span class="whole">(--quick):</span>' in html
    sentences = re.findall(r"<(p|li)\b[^>]*>(.*?)</\1>", WHOLE.sub("", html), re.DOTALL)
    assert len(sentences) > 20
    assert not [text for _, text in sentences if re.search(r"--[a-z]", text)]
    assert re.search(r"\.whole \{ white-space: nowrap; \}", html)
