"""The page in a real browser: nothing too wide, filters, sorting, downloads, print."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser

Open = Callable[..., Any]
WIDTHS = (1280, 390)
TOO_WIDE = """() => {
  const inside = (element) => {
    for (let up = element; up; up = up.parentElement) {
      if (getComputedStyle(up).overflowX === "auto") return true;
    }
    return false;
  };
  return Array.from(document.body.querySelectorAll("*"))
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5 && !inside(e))
    .map((e) => e.tagName + " " + e.className.toString() + " " + e.textContent.slice(0, 40));
}"""
OUTSIDE = """() => {
  const found = [];
  for (const svg of document.querySelectorAll("svg.panel")) {
    const frame = svg.getBoundingClientRect();
    if (!frame.width) continue;
    for (const e of svg.querySelectorAll("text, circle, path, polyline, polygon")) {
      const box = e.getBoundingClientRect();
      const scale = frame.width / svg.viewBox.baseVal.width;
      const over = Math.max(frame.left - box.left, box.right - frame.right,
                            frame.top - box.top, box.bottom - frame.bottom);
      const name = svg.getAttribute("aria-label");
      if (over > 14 * scale) found.push(`${name}: ${e.outerHTML.slice(0, 80)}`);
    }
  }
  return found;
}"""
OVERLAPPING = """() => {
  const found = [];
  for (const svg of document.querySelectorAll("svg.panel")) {
    const texts = Array.from(svg.querySelectorAll("text"));
    const boxes = texts.map((e) => [e.textContent, e.getBoundingClientRect()]);
    for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
      const [a, p] = boxes[i], [b, q] = boxes[j];
      const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (wide > 1 && high > 3) found.push(`${svg.getAttribute("aria-label")}: ${a} | ${b}`);
    }
  }
  return found;
}"""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("which", ["report", "comparison"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window_or_outside_its_chart(
    which: str, width: int, scheme: str, pages: Any, opened: Open
) -> None:
    options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    page = opened(getattr(pages, which), **options).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(TOO_WIDE) == []
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(OVERLAPPING) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(scheme: str, pages: Any, opened: Open) -> None:
    """Contrast of every text colour in use, by the formula of WCAG 2."""
    page = opened(pages.report, color_scheme=scheme).page
    colours = page.evaluate(
        """() => {
          const found = new Set();
          for (const e of document.querySelectorAll("p, td, th, a, h1, h2, h3, span, text, li")) {
            const style = getComputedStyle(e);
            let up = e;
            const backOf = (element) => getComputedStyle(element).backgroundColor;
            while (up && backOf(up) === "rgba(0, 0, 0, 0)") up = up.parentElement;
            const back = up ? backOf(up) : "rgb(255, 255, 255)";
            found.add([e.tagName === "text" ? style.fill : style.color, back].join("|"));
          }
          return Array.from(found);
        }"""
    )
    assert len(colours) > 5
    weak = {pair: ratio for pair in colours if (ratio := contrast(*pair.split("|"))) < 4.5}
    assert weak == {}


def contrast(first: str, second: str) -> float:
    lights = sorted(map(luminance, (first, second)))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(colour: str) -> float:
    parts = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def column(page: Any, table: str, position: int) -> list[str]:
    """Return the texts of a column's visible cells."""
    return page.locator(f"#{table} tbody tr:visible td:nth-child({position})").all_inner_texts()


def test_tables_are_sorted_by_a_click(pages: Any, opened: Open) -> None:
    page = opened(pages.report).page
    header = page.locator("#accuracy-table th", has_text=re.compile("^n$"))
    button = header.get_by_role("button")
    button.click()
    rising = [int(text.replace("\u2009", "")) for text in column(page, "accuracy-table", 6)]
    assert rising == sorted(rising)
    assert header.get_attribute("aria-sort") == "ascending"
    button.press("Space")
    falling = [int(text.replace("\u2009", "")) for text in column(page, "accuracy-table", 6)]
    assert falling == rising[::-1]
    assert len(set(rising)) > 10


def test_tables_are_filtered_and_downloaded(pages: Any, opened: Open, tmp_path: Path) -> None:
    page = opened(pages.report).page
    block = page.locator("#accuracy-table")
    total = len(column(page, "accuracy-table", 1))
    block.locator("label", has_text="axis").locator("select").select_option("safety")
    block.locator("label", has_text="strength").locator("select").select_option("slightly")
    shown = column(page, "accuracy-table", 1)
    assert 0 < len(shown) < total
    assert set(column(page, "accuracy-table", 3)) == {"safety"}
    assert set(column(page, "accuracy-table", 5)) == {"slightly"}
    assert block.locator(".shown").inner_text() == f"{len(shown)} of {total}"
    first = block.locator("tbody tr:visible").first
    cells = ['=HYPERLINK("x")', "\u22120.5 [\u22120.7, +0.1]", "-1+cmd|x"]
    write = "(row, texts) => texts.forEach((text, i) => { row.cells[i].textContent = text; })"
    first.evaluate(write, cells)
    with page.expect_download() as waiting:
        block.locator("[data-csv]").click()
    path = tmp_path / "table.csv"
    waiting.value.save_as(path)
    assert waiting.value.suggested_filename == "made-up-accuracy-table.csv"
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    assert len(rows) == len(shown)
    assert {row["strength"] for row in rows} == {"slightly"}
    assert list(rows[0].values())[:3] == ['\'=HYPERLINK("x")', "-0.5 [-0.7, +0.1]", "'-1+cmd|x"]
    assert block.evaluate("block => block.open")


def test_every_figure_is_downloaded(pages: Any, opened: Open, tmp_path: Path) -> None:
    page = opened(pages.report).page
    links = page.locator("figure:visible a.download")
    assert links.count() > 10
    for number in range(links.count()):
        with page.expect_download() as waiting:
            links.nth(number).click()
        path = tmp_path / f"{number}.csv"
        waiting.value.save_as(path)
        header, *rows = path.read_text(encoding="utf-8").splitlines()
        assert header == "panel,series,x,y,low,high,report_json"
        assert rows


def test_answers_are_ordered_filtered_and_searched(pages: Any, opened: Open) -> None:
    page = opened(pages.report).page
    block = page.locator("#examples-5")
    items = block.locator("article:visible")

    def gains() -> list[float]:
        return [float(item.get_attribute("data-gain")) for item in items.all()]

    assert [abs(gain) for gain in gains()] == sorted(map(abs, gains()), reverse=True)
    order = block.locator("[data-order]")
    order.select_option("lost")
    assert gains() == sorted(gains())
    order.select_option("gained")
    assert gains() == sorted(gains(), reverse=True)
    first_page = items.count()
    block.locator("[data-more]").click()
    assert items.count() > first_page
    block.locator("[data-filter=kind]").select_option("benign")
    assert {item.get_attribute("data-kind") for item in items.all()} == {"benign"}
    block.locator("[data-filter=flags]").select_option("false_refusal")
    assert items.count() > 0
    for item in items.all():
        assert "false refusal" in item.inner_text()
    block.locator("[data-filter=kind]").select_option("")
    block.locator("[data-filter=flags]").select_option("")
    block.locator("[data-search]").fill("answer 7:")
    assert items.count() == 1
    assert block.locator(".shown").inner_text().startswith("1 of ")


def test_markup_in_texts_of_models_stays_text(pages: Any, opened: Open) -> None:
    page = opened(pages.report).page
    assert page.evaluate("window.hacked") is None
    block = page.locator("#examples-5")
    block.locator("[data-search]").fill("<img src=x")
    shown = block.locator("article:visible")
    assert shown.count() >= 1
    assert "</script><script>window.hacked=1</script>" in shown.first.inner_text()
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1


def test_hovering_a_line_shows_its_values(pages: Any, opened: Open) -> None:
    page = opened(pages.report).page
    panel = page.locator("#ppo-4 svg.panel").nth(2)
    panel.scroll_into_view_if_needed()
    box = panel.bounding_box()
    panel.hover(position={"x": box["width"] / 2, "y": box["height"] / 2})
    readout = page.locator("#ppo-4 .readout:visible")
    assert re.match(r"\d+: ", readout.inner_text())
    page.mouse.move(0, 0)
    assert readout.count() == 0


def test_without_a_script_everything_can_be_read(pages: Any, opened: Open) -> None:
    page = opened(pages.report, java_script_enabled=False).page
    assert page.locator("section:visible").count() == 9
    assert page.locator("svg.panel:visible").count() > 20
    assert page.locator("#accuracy-table tbody tr:visible").count() > 50
    assert page.locator("#examples-5 article:visible").count() > 20
    assert page.locator(".filters:visible, .more:visible, button:visible").count() == 0
    page.locator("#ece summary").click()
    assert page.locator("#ece tbody tr:visible").count() > 5


def test_print_has_every_section_and_whole_charts(pages: Any, opened: Open, tmp_path: Path) -> None:
    page = opened(pages.report).page
    titles = page.locator("h2").all_inner_texts()
    path = tmp_path / "page.pdf"
    page.pdf(path=path, format="A4")
    assert path.read_bytes().startswith(b"%PDF")
    # The same layout as in print, A4 less its margins: 186 mm are 703 pixels.
    page.set_viewport_size({"width": 703, "height": 1032})
    page.emulate_media(media="print")
    assert page.locator("h2:visible").all_inner_texts() == titles
    assert page.evaluate("document.documentElement.scrollWidth") <= 703
    assert page.evaluate(TOO_WIDE) == []
    assert page.evaluate(OUTSIDE) == []
    assert page.locator(".filters:visible, .download:visible, nav:visible").count() == 0
    for panel in page.locator(".panels .cell:visible").all()[:10]:
        assert panel.evaluate("e => getComputedStyle(e).breakInside") == "avoid"
        # Text of 11 units stays readable on paper: 6 pixels are 4.5 points.
        assert panel.bounding_box()["width"] / 360 * 11 > 8
    cut = page.locator(".scroll:visible").evaluate_all(
        """all => all
          .filter((e) => e.scrollHeight > e.clientHeight + 1 || e.scrollWidth > e.clientWidth + 1)
          .map((e) => e.getAttribute("aria-label"))"""
    )
    assert cut == []
