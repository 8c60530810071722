"""Both pages in a browser, on a desk and on a phone, light and dark: nothing is cut, labels do not touch, tables sort."""

from __future__ import annotations

import json
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from fewbit.report import frontpage, page
from report.canned import canned, searched

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DARK, LIGHT = 0, 1  # as Chromium counts
PROBE = """<script>
const box = (one) => one.getBoundingClientRect();
const all = (where, from = document) => [...from.querySelectorAll(where)];
const touch = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
const edge = (one) => box(one).left - one.scrollLeft + one.scrollWidth + 1;
const size = (one) => parseFloat(getComputedStyle(one).fontSize);
const shown = all("body *").filter((one) => box(one).width && !one.closest("svg"));
const touching = all("svg[role=img]").flatMap((figure) => {
  const ticks = all(":scope > text", figure);
  const pairs = ticks.flatMap((a, i) => ticks.slice(i + 1).map((b) => [a, b]));
  return pairs.filter(([a, b]) => touch(box(a), box(b))).map(([a, b]) => `${a.textContent} and ${b.textContent}`);
});
const button = all("th > button").find((one) => one.textContent === "HEADING");
const table = button.closest("table"), head = button.parentElement, column = head.cellIndex;
const sorts = [1, 2].map(() => {
  button.click();
  return [head.getAttribute("aria-sort"), [...table.tBodies[0].rows].map((row) => row.cells[column].textContent)];
});
const short = all(".box tbody th").filter((one) => /^\\S{6,16}$/.test(one.textContent.trim()));
const high = (one) => {
  const words = document.createRange();
  words.selectNodeContents(one.querySelector("span") ?? one);
  return new Set([...words.getClientRects()].map((line) => line.top)).size;
};
const wide = all(".box, .scroll").filter((one) => one.scrollWidth > one.clientWidth);
parent.postMessage(JSON.stringify({
  width: innerWidth, dark: matchMedia("(prefers-color-scheme: dark)").matches, page: document.documentElement.scrollWidth,
  cut: shown.filter((one) => box(one).right > innerWidth + 1 && !one.closest(".box, .scroll, code"))
    .map((one) => one.outerHTML.slice(0, 80)),
  spilling: all(".card").filter((one) => one.scrollWidth > one.clientWidth).map((one) => one.textContent),
  small: shown.concat(all("svg text")).filter((one) => size(one) < 12).map((one) => one.outerHTML.slice(0, 80)),
  paper: getComputedStyle(document.body).backgroundColor, touching, sorts, wide: wide.length,
  clipped: all(".scroll svg > text").filter((one) => box(one).right > edge(one.closest(".scroll"))).map((one) => one.innerHTML),
  unreachable: wide.filter((one) => one.tabIndex < 0).length, unscoped: all("th:not([scope])").length,
  names: short.length, broken: short.filter((one) => high(one) > 1).map((one) => one.textContent),
  picked: document.getElementById("command")?.textContent ?? null,
}), "*");
</script></body>"""
FRAME = """<!doctype html><iframe style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe><pre></pre><script>
addEventListener("message", (event) => {{ document.querySelector("pre").textContent = event.data; }});
</script>"""


def opened(html: str, folder: Path, width: int, scheme: int, heading: str) -> dict[str, Any]:
    """What a browser says of a page after two clicks on a heading of a table. No window is narrower than 500: a frame is."""
    inner = escape(html.replace("</body>", PROBE.replace("HEADING", heading)))
    path = folder / "page.html"
    path.write_text(FRAME.format(width=width, page=inner), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=20000"]
    options += [f"--user-data-dir={folder}/chromium", "--window-size=1500,1000"]
    options += [f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", f"file://{path}"]
    done = subprocess.run([str(CHROMIUM), *options], capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    return dict(json.loads(unescape(done.stdout.rpartition("<pre>")[2].partition("</pre>")[0])))


def long_names() -> str:
    """A report whose last sites have a name too long for their place, and so many codes that a line has no room for them."""
    report, tables = canned()
    report["verify"] |= {"codes_compared": 290_715_152, "sites": 210}
    for row in tables["sites"][-14:]:
        row["site"] = "the_classifier_of_every_class_that_there_is:weight"
    return page.render(report, tables)


def few_sites() -> str:
    """A report of a model of three sites, whose names have all the room that there is."""
    report, tables = canned()
    for key in ("sites", "outliers"):
        tables[key] = [{**row, "site": f"{i}_of_a_long_name"} for i, row in enumerate(tables[key][:3])]
    return page.render(report, tables)


PAGES = {"report": (long_names(), "SQNR"), "few sites": (few_sites(), "SQNR"), "search": (frontpage.render(searched()), "time")}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with")
@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_in_a_browser(name: str, width: int, scheme: int, tmp_path: Path) -> None:
    html, heading = PAGES[name]
    assert len(html.encode()) < 1_000_000
    found = opened(html, tmp_path, width, scheme, heading)
    assert (found["width"], found["dark"]) == (width, scheme == DARK)
    assert found["page"] <= width
    assert (found["names"] > 1, found["broken"]) == (name != "search", [])
    assert found["spilling"] == found["cut"] == found["clipped"] == found["small"] == found["touching"] == []
    assert (found["unreachable"], found["unscoped"]) == (0, 0)
    assert (max(map(int, found["paper"][4:-1].split(","))) < 64) == (scheme == DARK)
    (up, rising), (down, falling) = found["sorts"]
    numbers = [float(cell.split("\u00a0")[0].replace("−", "-")) for cell in rising]
    assert (up, down) == ("ascending", "descending")
    assert len(numbers) > 1
    assert (numbers, sorted(falling)) == (sorted(numbers), sorted(rising))
    assert falling == rising[::-1] or len(set(rising)) < len(rising)
    assert found["picked"] == (searched()["points"][0]["command"] if name == "search" else None)
