"""The report says what the two JSON files say, in one file, whatever is missing from them."""

from __future__ import annotations

import ast
import copy
import json
import re
import sys
from collections import Counter
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from fewbit.report import answers, figures, page, pieces, sections
from report.canned import canned

VOID = {"meta", "br", "img", "input", "link", "hr"}
LOADING = {"src", "href", "srcset", "poster", "data", "action"}
TABLES = sorted(canned()[1])
PLOTLY = get_plotlyjs()
QUESTIONS = ["Is it right?", "Is it good?", "Is it small and fast?", "What did we not get?"]


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


def brief() -> tuple[dict[str, Any], dict[str, Any]]:
    """The canned run with one histogram and one attention head, for tests that draw the page many times."""
    report, tables = canned()
    tables["histograms"] = tables["histograms"][:1]
    tables["attention"] = tables["attention"][:1]
    for key in ("float", "quantized", "flipped_share"):
        tables["attention"][0][key] = tables["attention"][0][key][:1]
    return report, tables


@pytest.fixture(scope="module")
def whole() -> Reader:
    return read(*canned())


# The file


def test_the_page_loads_nothing_from_anywhere(whole: Reader) -> None:
    assert whole.loaded
    assert [uri for uri in whole.loaded if not uri.startswith(("#", "data:image/"))] == []
    assert whole.tags["link"] == 0
    assert not re.search(r"url\(|@import", " ".join(whole.styles))


def test_an_image_that_would_have_to_be_loaded_is_left_out() -> None:
    report, tables = brief()
    tables["images"][0]["thumbnail"] = "https://example.org/cat.png"
    assert read(report, tables).tags["img"] == read(*brief()).tags["img"] - 1


def test_tags_balance_and_there_is_one_plotly_and_a_json_for_every_figure(whole: Reader) -> None:
    _, tables = canned()
    heads = sum(len(row["float"]) for row in tables["attention"])
    singles = (
        15  # error, bits, units, outliers, flips, ranking, latency, size, codes, frontier, joint, norms, curve, runs, seconds
    )
    assert len(whole.figures) == singles + len(tables["histograms"]) + heads
    assert whole.tags["script"] == len(whole.figures) + 2
    assert whole.tags["figure"] == whole.tags["figcaption"] + heads


def test_the_four_answers_stand_in_order_before_any_figure() -> None:
    html = page.render(*canned())
    places = [html.index(question) for question in QUESTIONS]
    assert places == sorted(places)
    assert places[-1] < html.index("<figure>")


def test_the_same_two_dicts_give_the_same_bytes_and_stay_as_they_were(tmp_path: Path) -> None:
    report, tables = canned()
    before = copy.deepcopy((report, tables))
    page.write(tmp_path / "a.html", report, tables)
    page.write(tmp_path / "b.html", *canned())
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (report, tables) == before


def test_main_reads_the_run_folder_and_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, tables = brief()
    assert page.main([str(tmp_path)]) == 2
    assert "report.json" in capsys.readouterr().err
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "tables.json").write_text(json.dumps(tables))
    assert page.main([str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page.render(report, tables)


def test_figures_and_page_import_only_what_draws() -> None:
    drawing = (figures, pieces, answers, sections, page)
    allowed = {"fewbit.errors", "fewbit.report", *(module.__name__ for module in drawing)}
    for module in drawing:
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                assert name in allowed or top == "plotly" or top in sys.stdlib_module_names, name


# The words and the numbers


def test_the_answers_are_the_numbers_of_the_report(whole: Reader) -> None:
    for said in [
        "40 of 7,274,496 codes differ",
        "at 148 sites",
        "Worst site: blocks.0.attn.values:value, off by at most 1.",
        "75.45 → 74.60 % accuracy",
        "−0.85 points; 95 % interval 72.65 % to 76.46 %.",
        "92.35 % agreement with the float model, cosine 0.99412.",
        "2,000 images scored in onnxruntime; 128 for calibration.",
        "Exempt: patch_embed.proj stays at 8 bits; head stays at 8 bits.",
        "22.92 → 6.10 MB 3.75× smaller",
        "weights packed 3.36 MB, 4.31 bits a weight.",
        "onnxruntime: 11.84 → 6.91 ms, 1.71× as fast.",
        "37 requests refused",
        "98.73 % of multiply-accumulates run in integers.",
        "12 sites stayed float.",
        "74 of 74 integer kernels",
        "1 of these 8 answers changed;",
        "openvino 0.0934 0.9998712 99.60 %",
        "openvino 0.251 → 0.419 s 151 → 99 MB 61 MB",
        "26 modules, 5,647,872 weights, 5.29 bits a weight on average.",
        "helps: 21 of 36; above it are 15. The mean over heads is 2.10 % with it and 2.14 % without.",
        "4 runs of the same model, scored on the same images. Bars are 95 % intervals.",
    ]:
        assert said in whole.text


def test_without_labels_agreement_leads_and_no_accuracy_is_claimed() -> None:
    report, tables = brief()
    report["accuracy"].update(float=None, quantized=None)
    text = read(report, tables).text
    good = text[text.index("Is it good?") : text.index("Is it small and fast?")]
    assert good.startswith("Is it good? 92.35 % agreement with the float model")
    assert "No labels, so no accuracy" in good
    assert "points" not in good


@pytest.mark.parametrize(
    ("differing", "wrong", "word"), [(0, 0, "yes"), (3, 0, "yes"), (3, 1, "no")], ids=["none", "ties", "wrong"]
)
def test_right_means_that_no_code_is_wrong(differing: int, wrong: int, word: str) -> None:
    report, tables = brief()
    report["verify"].update(codes_differing=differing, codes_wrong=wrong)
    assert f"Is it right? {word} {differing} of" in read(report, tables).text
    del report["verify"]["codes_wrong"]  # then the table counts
    tables["checks"] = [{**tables["checks"][0], "differing": differing, "ties": differing - wrong, "wrong": wrong}]
    assert f"Is it right? {word} {differing} of" in read(report, tables).text


def test_without_a_table_that_explains_them_codes_that_differ_are_not_right() -> None:
    report, _ = canned()
    del report["verify"]["codes_wrong"]
    text = read(report, {}).text
    assert "Is it right? no 40 of" in text
    assert "is a tie" not in text


def test_a_model_that_became_slower_says_so() -> None:
    report, tables = brief()
    report["latency"] = {"onnxruntime": {"float_ms": 5.0, "quantized_ms": 10.0, "ratio": 0.5}}
    assert "5.00 → 10.00 ms, slower , 0.50× as fast" in read(report, tables).text


def test_answers_that_are_numbers_get_the_names_of_their_classes() -> None:
    report, tables = brief()
    tables["images"] = [{"name": "a.png", "thumbnail": None, "label": 0, "float": 1, "quantized": 7}]
    tables["run"]["classes"] = ["cat", "<dog>"]
    assert "a.png label cat float <dog> integer 7" in read(report, tables).text


def test_refusals_collapse_and_their_shares_add_up() -> None:
    fallbacks = canned()[0]["fallbacks"]
    groups = answers.collapsed(fallbacks)
    keys = [(group["requested"], group["actual"], group["why"]) for group in groups]
    assert len(keys) == len(set(keys)) == len({(r["requested"], r["actual"], r["why"]) for r in fallbacks}) == 3
    assert Counter(site for group in groups for site in group["sites"]) == Counter(r["site"] for r in fallbacks)
    assert sum(g["macs_share"] for g in groups) == pytest.approx(sum(r["macs_share"] for r in fallbacks))
    assert groups[0]["macs_share"] == pytest.approx(24 * 0.0021)


def test_the_refusal_table_shows_each_group_once(whole: Reader) -> None:
    part = whole.text[whole.text.index("What was refused requested") : whole.text.index("Where does quantization hurt?")]
    assert part.count("no 4-bit operand") == 1
    assert "24 sites" in part
    assert "5.04 %" in part


def test_what_a_user_wrote_is_shown_and_never_run() -> None:
    evil = '<script>alert("x")</script>'
    report, tables = canned()
    report.update(model=evil, target=evil, recipe=evil, bits=evil, exemptions=[evil])
    report["verify"]["worst_site"] = report["accuracy"]["runtime"] = evil
    report["calibration"].update(source=evil, warnings=[evil])
    report["latency"] = {evil: report["latency"]["onnxruntime"]}
    for rows in (report["fallbacks"], tables["sites"], tables["histograms"], tables["attention"], tables["flips"]):
        for key in {"site", "role", "op", "requested", "actual", "why", "grid", "method", "image", "block"} & rows[0].keys():
            if not (key == "grid" and isinstance(rows[0][key], list)):
                rows[0][key] = evil
    for key, name in [
        ("latency", "runtime"), ("size", "what"), ("outputs", "runtime"), ("frontier", "label"), ("frontier", "kind"),
        ("units", "unit"), ("units", "kind"), ("ranking", "op"), ("loads", "runtime"), ("runs", "label"), ("runs", "kind"),
        ("joint", "what"), ("norms", "kind"), ("curve", "runtime"), ("synthetic", "label"),
        ("outliers", "site"), ("outliers", "done"),
    ]:  # fmt: skip
        tables[key][0][name] = evil
    tables["runs"][-1]["label"] = evil
    tables["ranking"] = tables["ranking"][:2]  # few ops have names in the legend
    tables["images"][0].update(name=evil, label=evil, float=evil, quantized=evil, thumbnail=f'data:image/png,"{evil}')
    tables["kernels"]["ops"] = {evil: 1}
    tables["run"].update(command=evil, versions={evil: evil})
    tables["seconds"] = {evil: 1.0}
    clean, dirty = read(*canned()), read(report, tables)
    scripts = re.findall(r'<script type="application/json">(.*?)</script>', page.render(report, tables), flags=re.S)
    assert len(scripts) == len(dirty.figures)
    assert not [found for found in scripts if "<" in found]
    assert dirty.tags["script"] == clean.tags["script"]
    assert dirty.text.count(evil) > 30
    labels = json.dumps([figure["data"] for figure in dirty.figures])
    assert "<script" not in labels
    assert "&lt;script" in labels


# What is missing

MISSING = {
    "sites": "No sites were listed",
    "histograms": "No histograms were kept",
    "attention": "No attention maps were kept",
    "flips": "no ranks were counted",
    "ranking": "no heads were compared",
    "latency": "No latency was measured",
    "loads": "No load was measured",
    "size": "No file was weighed",
    "checks": "No codes were compared",
    "outputs": "No outputs were compared",
    "kernels": "optimised graph was not looked at",
    "seconds": "No stage was timed",
    "images": "No scored images were kept",
    "run": "The command and versions were not recorded",
    "frontier": "No widths were searched",
}
WORDLESS = {
    "units",
    "runs",
    "joint",
    "norms",
    "curve",
    "outliers",
    "synthetic",
}  # only some runs have them, and nobody misses them elsewhere


def test_every_table_has_its_sentence(whole: Reader) -> None:
    assert sorted({*MISSING, *WORDLESS}) == TABLES
    assert [sentence for sentence in MISSING.values() if sentence in whole.text] == []


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "absent"])
@pytest.mark.parametrize("key", TABLES)
def test_a_missing_table_says_so_in_a_sentence_and_leaves_the_rest(key: str, empty: bool) -> None:
    report, tables = brief()
    report.pop("seconds")
    tables[key] = type(tables[key])()
    if not empty:
        del tables[key]
    text = read(report, tables).text
    assert [name for name, sentence in MISSING.items() if sentence in text] == [key for key in [key] if key not in WORDLESS]


@pytest.mark.parametrize("key", sorted(canned()[0]))
def test_a_report_without_one_of_its_keys_is_still_a_page(key: str) -> None:
    report, tables = brief()
    del report[key]
    text = read(report, tables).text
    assert all(question in text for question in QUESTIONS)


def test_with_nothing_at_all_there_are_four_questions_and_a_sentence_for_every_table() -> None:
    reader = read({}, {})
    assert all(said in reader.text for said in [*QUESTIONS, *MISSING.values()])
    assert reader.figures == []


def test_numbers_that_json_has_no_word_for_do_not_reach_the_browser() -> None:
    report, tables = brief()
    tables["sites"][0].update(sqnr_db=float("inf"), bits=None)
    tables["sites"][1].update(sqnr_db=float("nan"))
    html = page.render(report, tables)
    assert "∞" in html
    scripts = re.findall(r'<script type="application/json">(.*?)</script>', html, flags=re.S)
    assert not [found for found in scripts if re.search(r"\b(NaN|Infinity)\b", found)]


def test_what_the_page_leaves_out_for_room_is_counted(whole: Reader) -> None:
    report, tables = canned()
    tables["histograms"] *= 2
    tables["attention"] *= 5
    text = read(report, tables).text
    assert "more are in tables.json" not in whole.text
    assert "outside it is clipped. 3 more are in tables.json." in text
    assert "looks at. 2 more are in tables.json." in text


# Figures are their rows


def test_a_bar_of_the_error_figure_is_the_sqnr_of_its_site() -> None:
    sites = canned()[1]["sites"]
    figure = figures.error_by_site(sites)
    drawn = {x: (y, trace.name) for trace in figure.data for x, y in zip(trace.x, trace.y, strict=True)}
    assert drawn == {index: (row["sqnr_db"], row["role"]) for index, row in enumerate(sites)}


def test_a_bar_of_the_bits_figure_is_the_bits_of_its_site_and_a_float_site_has_none() -> None:
    sites = canned()[1]["sites"]
    sites[5]["bits"] = None
    drawn = {x: y for trace in figures.bits_by_site(sites).data for x, y in zip(trace.x, trace.y, strict=True)}
    assert drawn == {index: row["bits"] for index, row in enumerate(sites)}


def test_a_histogram_has_the_counts_between_its_edges_and_shades_the_range_kept() -> None:
    row = canned()[1]["histograms"][0]
    figure = figures.range_kept(row)
    (bars,) = figure.data
    assert list(bars.y) == row["counts"]
    assert list(bars.x) == row["edges"][:-1]
    assert [x + width for x, width in zip(bars.x, bars.width, strict=True)] == pytest.approx(row["edges"][1:])
    assert [figure.layout.shapes[0].x0, figure.layout.shapes[0].x1] == row["kept"]
    assert figure.layout.yaxis.type == "log"


def test_the_attention_map_of_a_class_token_is_its_row_over_the_patch_grid() -> None:
    tokens = [[100 * q + k for k in range(7)] for q in range(7)]
    row = {"float": [tokens], "quantized": [tokens], "grid": [2, 3], "class_token": True, "flipped_share": [0.25]}
    figure = figures.attention_pair(row, 0)
    assert [[list(line) for line in trace.z] for trace in figure.data] == [[[1, 2, 3], [4, 5, 6]]] * 2
    assert figure.layout.title.text == "head 0: 25.00 % of ranks flipped"
    whole = figures.attention_pair({**row, "class_token": False}, 0)
    assert [list(line) for line in whole.data[0].z] == tokens


def test_both_maps_of_a_pair_have_one_colour_scale() -> None:
    row = {"op": "a", "image": "b", "float": [[[0.1, 0.9]]], "quantized": [[[0.5, 0.5]]], "flipped_share": [0.0]}
    assert {(trace.zmin, trace.zmax) for trace in figures.attention_pair(row, 0).data} == {(0, 0.9)}


def test_a_cell_of_the_flips_figure_is_its_share_in_percent_and_a_head_that_is_not_there_is_empty() -> None:
    flips = [{"op": op, "head": h, "flipped_share": s} for op, h, s in [("a", 0, 0.5), ("a", 1, 0.25), ("b", 0, 0.125)]]
    (cells,) = figures.flips_by_head(flips).data
    assert [list(line) for line in cells.z] == [[50.0, 25.0], [12.5, None]]


def test_latency_bars_are_the_milliseconds_given_float_beside_integer() -> None:
    rows = canned()[1]["latency"]
    traces = figures.latency(rows).data
    assert [x for t in traces if t.name == "float" for x in t.x] == [row["float_ms"] for row in rows]
    assert [x for t in traces if t.name == "integer" for x in t.x] == [row["quantized_ms"] for row in rows]


def points(trace: Any) -> list[tuple[float, float]]:
    return list(zip(trace.x, trace.y, strict=True))


def test_the_frontier_is_its_rows_on_a_log_axis_and_only_few_points_have_labels() -> None:
    rows = canned()[1]["frontier"]
    figure = figures.frontier(rows[::-1])  # whatever the order of the rows, the line goes from small to large
    drawn = {trace.name: (points(trace), trace.mode) for trace in figure.data}
    for kind, mode in [
        ("a width for each module", "lines+markers"), ("one width", "markers+text"), ("this run", "markers+text"),
    ]:  # fmt: skip
        expected = sorted((row["bytes"] / 1e6, row["loss"]) for row in rows if row["kind"] == kind)
        assert drawn[kind] == (expected, mode)
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis.title.text == "estimated loss (the sum over modules)"
    size = {trace.name: trace.marker.size for trace in figure.data}
    assert size["this run"] == size["one width"] > 2 * size["a width for each module"]


def test_a_joint_search_shows_every_evaluation_the_best_so_far_and_where_it_started(whole: Reader) -> None:
    rows = canned()[1]["joint"]
    points, line = figures.joint(rows).data
    assert list(points.y) == [row["loss"] for row in rows]
    assert list(line.y) == [row["best"] for row in rows]
    measured, parabola, start = figures.norms(canned()[1]["norms"]).data
    assert (len(measured.x), len(parabola.x), list(start.x)) == (10, 41, [3.2])
    assert "200 evaluations on 128 images, 85 free steps" in whole.text
    assert "The time was up" in whole.text
    assert "The search starts at p = 3.2. The parabola's R² is 0.980." in whole.text


def test_the_curve_has_a_point_for_each_number_of_images_with_its_interval_and_the_float_model() -> None:
    rows = canned()[1]["curve"]
    figure = figures.curve(rows)
    assert points(figure.data[0]) == [(row["images"], row["quantized"]) for row in rows]
    tops = [y + up for y, up in zip(figure.data[0].y, figure.data[0].error_y.array, strict=True)]
    bottoms = [y - down for y, down in zip(figure.data[0].y, figure.data[0].error_y.arrayminus, strict=True)]
    assert list(zip(bottoms, tops, strict=True)) == [tuple(row["interval"]) for row in rows]
    assert figure.layout.shapes[0].y0 == rows[0]["float"]
    bare = figures.curve([{**row, "float": None, "quantized": None} for row in rows])
    assert points(bare.data[0]) == [(row["images"], row["agreement"]) for row in rows]
    assert not bare.layout.shapes


def test_what_speaks_against_the_calibration_images_stands_beside_the_accuracy(whole: Reader) -> None:
    report, tables = brief()
    warning = report["calibration"]["warnings"][0]
    assert whole.text.index(warning) < whole.text.index("Pictures")
    assert "128 images of a folder" in whole.text
    report["calibration"]["warnings"] = []
    text = read(report, tables).text
    assert warning not in text
    assert "Nothing speaks against them." in text


def test_synthetic_images_stand_in_a_row_with_the_classes_that_they_were_made_for() -> None:
    report, tables = brief()
    tables["run"]["classes"] = ["ant", "bee", "cat", "dog"]
    shown = read(report, tables)
    assert "What did the model make up?" in shown.text
    assert "ant bee cat dog" in shown.text
    tables["synthetic"] = []
    bare = read(report, tables)
    assert "What did the model make up?" not in bare.text
    assert bare.tags["img"] == shown.tags["img"] - 4


def test_a_frontier_that_was_scored_shows_accuracy_and_no_loss() -> None:
    rows = [{"kind": "one width", "label": str(b), "bytes": b * 10**6, "accuracy": 70.0 + b, "loss": 1.0} for b in (4, 8)]
    figure = figures.frontier(rows)
    assert [points(trace) for trace in figure.data] == [[(4.0, 74.0), (8.0, 78.0)]]
    assert figure.layout.yaxis.title.text == "accuracy, %"
    assert figure.layout.yaxis.type != "log"


def test_a_bar_of_the_modules_is_its_bits_coloured_by_kind_with_all_losses_in_the_hover() -> None:
    units = canned()[1]["units"]
    figure = figures.bits_by_unit(units)
    names = {"attention": "attention", "mlp": "mlp", "op": "other"}
    drawn = {x: (y, t.name, data) for t in figure.data for x, y, data in zip(t.x, t.y, t.customdata, strict=True)}
    assert len({trace.marker.color for trace in figure.data}) == len(figure.data) == 3
    for index, row in enumerate(units):
        bits, kind, (unit, weights, nuclear, losses) = drawn.pop(index)
        assert (bits, kind, unit) == (row["bits"], names[row["kind"]], row["unit"])
        assert weights == f"{row['weights']:,}"
        assert nuclear == ("none" if row["nuclear"] is None else f"{row['nuclear']:.4g}")
        assert losses.split("<br>") == [f"loss at {b} bits: {loss:.3g}" for b, loss in row["losses"].items()]
    assert not drawn


@pytest.mark.parametrize("count", [4, len(figures.PALETTE) + 1], ids=["few", "many"])
def test_a_point_of_the_ranking_figure_is_its_head_without_and_with(count: int) -> None:
    rows = canned()[1]["ranking"][: 3 * count]
    figure = figures.ranking(rows)
    diagonal, *heads = figure.data
    assert all(x == y for x, y in points(diagonal))
    assert len(heads) == (count if count <= len(figures.PALETTE) else 1)
    found = {tuple(data): point for t in heads for data, point in zip(t.customdata, points(t), strict=True)}
    assert found == {(r["op"], r["head"]): (100 * r["without"], 100 * r["with"]) for r in rows}
    assert figure.layout.xaxis.range == figure.layout.yaxis.range
    assert max(max(point) for point in found.values()) < figure.layout.xaxis.range[1]


def test_runs_are_points_with_their_intervals_and_the_float_model_is_a_line() -> None:
    rows = canned()[1]["runs"]
    figure = figures.runs(rows)
    for kind in {row["kind"] for row in rows} - {"float"}:
        (trace,) = (trace for trace in figure.data if trace.name == kind)
        members = [row for row in rows if row["kind"] == kind]
        assert points(trace) == [(row["bytes"] / 1e6, row["accuracy"]) for row in members]
        ends = zip(trace.y, trace.error_y.arrayminus, trace.error_y.array, strict=True)
        assert [end for y, low, high in ends for end in (y - low, y + high)] == pytest.approx(
            [end for row in members for end in row["interval"]]
        )
    assert [trace.text for trace in figure.data if "module" in trace.name] == [("mixed:5",)]
    assert [(shape.y0, shape.y1) for shape in figure.layout.shapes] == [(75.45, 75.45)]
    assert figure.layout.shapes[0].name == "float model, 75.45 %, 22.92 MB"
    assert figure.layout.yaxis.title.text == "accuracy, %"
    agreement = figures.runs([{**row, "measure": "agreement"} for row in rows])
    assert agreement.layout.yaxis.title.text == "agreement with the float model, %"


def test_tables_of_an_older_run_still_make_a_page() -> None:
    report, tables = brief()
    for key in ("units", "ranking", "loads", "runs"):
        del tables[key]
    tables["frontier"] = [{"label": "8", "kind": "uniform", "bits": 8.0, "bytes": 6_100_000, "accuracy": 75.3, "omega": 0.04}]
    reader = read(report, tables)
    assert "Which module gets how many bits?" not in reader.text
    assert "How much accuracy does a byte buy?" not in reader.text


def test_size_and_seconds_bars_are_their_rows() -> None:
    tables = canned()[1]
    assert [1e6 * x for x in figures.size(tables["size"]).data[0].x] == pytest.approx([r["bytes"] for r in tables["size"]])
    (bars,) = figures.seconds(tables["seconds"]).data
    assert dict(zip(bars.y, bars.x, strict=True)) == tables["seconds"]


def test_codes_that_differ_are_drawn_for_the_settings_that_have_some(whole: Reader) -> None:
    checks = canned()[1]["checks"]
    ties, wrong = figures.codes_by_site(checks).data
    on = [row for row in checks if row["optimisations"] == "on"]
    assert (list(ties.y), list(wrong.y)) == ([row["ties"] for row in on], [row["wrong"] for row in on])
    assert "Graph optimisations off: none of 3,637,248 codes differs, at 148 sites." in whole.text


def test_what_stands_out_is_drawn_and_listed_with_what_was_done() -> None:
    rows = canned()[1]["outliers"]
    channels, tokens = figures.outliers_by_site(rows, 10.0).data
    assert [y for y in channels.y if y > 10] == [42.0]
    assert [y for y in tokens.y if y > 10] == [14.8]
    assert len(channels.x) == len(rows)
    told = sections.outliers(rows, "")
    for said in ("blocks.2.mlp.fc2:input", "7, 199", "25.00", "1.54", "at 0, 17", "12.50", "clipped at 61.2 of 122"):
        assert said in told
    assert "blocks.3.mlp.fc2:input" not in told.partition("<tbody>")[2]
    beside = sections.outliers([{**row, "done": "stays float"} for row in rows], "")
    assert "In float, so nothing was to be done: blocks.2.mlp.fc2:input." in beside
    assert "stands out elsewhere" in beside
    quiet = [{**row, "any": False} for row in rows]
    assert "No channel and no token stands out." in sections.outliers(quiet, "")
    maps = figures.outliers_by_site([{**row, "token_ratio": None} for row in rows], 10.0).data
    assert len(maps[1].x) == 0


def test_every_figure_asks_in_its_title_and_names_both_axes_or_labels_its_bars() -> None:
    tables = canned()[1]
    for draw, key in [
        (figures.error_by_site, "sites"),
        (figures.bits_by_site, "sites"),
        (figures.flips_by_head, "flips"),
        (figures.codes_by_site, "checks"),
        (figures.frontier, "frontier"),
        (figures.bits_by_unit, "units"),
        (figures.ranking, "ranking"),
        (figures.runs, "runs"),
        (figures.joint, "joint"),
        (figures.norms, "norms"),
        (figures.curve, "curve"),
        (partial(figures.outliers_by_site, limit=10.0), "outliers"),
    ]:
        layout = draw(tables[key]).layout
        assert "?" in layout.title.text
        assert layout.xaxis.title.text
        assert layout.yaxis.title.text
    for figure in (
        figures.latency(tables["latency"]),
        figures.size(tables["size"]),
        figures.seconds(tables["seconds"]),
    ):
        assert "?" in figure.layout.title.text
        assert all(isinstance(label, str) for trace in figure.data for label in trace.y)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.3.mlp.fc1:weight", "3"),
        ("layers.2.blocks.5.attn.qkv", "2.5"),
        ("layer1.0.conv2:input", "layer1.0"),
        ("patch_embed.proj:weight", "patch_embed"),
        ("head", "head"),
    ],
)
def test_the_name_of_a_block_is_short(name: str, block: str) -> None:
    assert figures.block_of(name) == block


def test_ticks_never_stand_closer_than_their_labels_are_wide() -> None:
    names = ["stem", "stem", *(f"blocks.{block}.op" for block in range(60) for _ in range(8)), "head"]
    places, labels = figures.block_ticks(names)
    assert min(b - a for a, b in pairwise(places)) >= len(names) / figures.MANY_TICKS
    assert labels == [figures.block_of(names[place]) for place in places]
    assert "stem" not in labels


def test_units_of_a_reconstruction_are_listed_with_what_was_kept():
    rows = [
        {"unit": "a<b", "before": 0.5, "after": 0.25, "steps": 1200, "kept": True, "seconds": 60.0, "images": 16, "held": 4},
        {"unit": "head", "before": 0.125, "after": 0.125, "tried": 0.75, "steps": 3, "kept": False},
    ]
    text = sections.rebuilt(rows, 12.5)
    assert "<td>a&lt;b</td><td>0.5</td><td>0.25</td><td>1,200</td><td>yes</td>" in text
    assert "<td>head</td><td>0.125</td><td>0.75</td><td>3</td><td>no</td>" in text
    assert "4 images of 16" in text
    assert "1 of 2 units" in text
    assert "12.5" in text
    assert sections.rebuilt([], None) == ""
