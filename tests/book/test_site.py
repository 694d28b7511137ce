"""The built site in a real browser. Skipped, with the reason, where there is no browser."""

import functools
import http.server
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE = ROOT / "_build" / "html"
PAGES = sorted(str(p.relative_to(SITE)) for p in SITE.rglob("*.html") if "_static" not in p.parts)
CHAPTERS = [f"book/{path.stem}.html" for path in sorted((ROOT / "book").glob("*.ipynb"))]
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
READY = """() => document.readyState === 'complete'
  && document.querySelectorAll('svg.marks').length
     === document.querySelectorAll('script.chart-spec').length
  && document.querySelectorAll('mjx-container').length
     >= document.querySelectorAll('.math.notranslate').length"""

pytestmark = pytest.mark.site


@pytest.fixture(scope="session")
def host():
    """Address of a local server that shows the site."""
    if not (SITE / "index.html").exists():
        pytest.skip("no site here: run make book")
    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Visit:
    """A page that was opened and has drawn its charts and formulas; what went wrong on the way."""

    def __init__(self, browser, address, viewport=DESKTOP, scheme="light"):
        self.context = browser.new_context(viewport=viewport, color_scheme=scheme)
        self.page = self.context.new_page()
        self.problems, self.requests = [], []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("requestfailed", lambda request: self.problems.append(request.url))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("response", self._response)
        self.page.goto(address)
        self.page.wait_for_function(READY, timeout=60_000)

    def _console(self, message):
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def _response(self, response):
        if response.status >= 400:
            self.problems.append(f"{response.status} {response.url}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()


def foreign(requests, home):
    return [url for url in requests if not url.startswith((home, "data:", "blob:"))]


def test_site_has_every_page_of_the_contents(host):
    assert set(CHAPTERS) <= set(PAGES)
    assert {"index.html", "book/index.html", "book/how-to-run.html", "search.html"} <= set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_page_is_whole_and_asks_no_other_host(browser, host, name):
    with Visit(browser, host + name) as visit:
        visit.page.wait_for_load_state("networkidle")
        assert visit.problems == []
        assert foreign(visit.requests, host) == []


@pytest.mark.parametrize("name", PAGES)
def test_phone_scrolls_downwards_only(browser, host, name):
    with Visit(browser, host + name, PHONE) as visit:
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_serious(browser, host, axe, name, scheme):
    with Visit(browser, host + name, scheme=scheme) as visit:
        visit.page.evaluate(axe)
        found = visit.page.evaluate("axe.run()")["violations"]
        serious = [
            (violation["id"], node["html"][:200])
            for violation in found
            if violation["impact"] in ("serious", "critical")
            for node in violation["nodes"]
        ]
        assert serious == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", CHAPTERS)
def test_charts_are_drawn_in_the_ink_of_the_page(browser, host, name, scheme):
    inks = """() => [...document.querySelectorAll('svg.marks .role-axis-label text')]
      .map(text => getComputedStyle(text).fill)"""
    ink = "getComputedStyle(document.querySelector('.bd-article p:not([class])')).color"
    with Visit(browser, host + name, scheme=scheme) as visit:
        drawn = set(visit.page.evaluate(inks))
        assert drawn == {visit.page.evaluate(ink)}


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_names_its_edition_and_describes_its_charts(browser, host, name):
    labels = "[...document.querySelectorAll('.chart-live')].map(c => c.getAttribute('aria-label'))"
    with Visit(browser, host + name) as visit:
        assert "gpt2-ioi" in visit.page.inner_text(".edition")
        assert all(visit.page.evaluate(labels))
        tables = visit.page.locator("details.chart-data").count()
        assert tables == visit.page.locator("svg.marks").count() > 0


def live_charts(visit):
    return visit.page.locator(".chart-live").all()


def drawing(chart):
    return chart.locator("svg.marks").inner_html()


def changed(chart, before):
    """Whether the drawing becomes another one within a second."""
    for _ in range(20):
        if drawing(chart) != before:
            return True
        chart.page.wait_for_timeout(50)
    return False


def answers_keys(chart, control):
    for key in ("ArrowRight", "ArrowLeft", "ArrowDown", "Space"):
        before = drawing(chart)
        control.press(key)
        if changed(chart, before):
            return True
    return False


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_control_of_a_chart_works_by_keyboard(browser, host, name):
    with Visit(browser, host + name) as visit:
        controls = [
            (chart, control)
            for chart in live_charts(visit)
            for control in chart.locator(".vega-bind :is(input, select)").all()
        ]
        assert controls
        assert [c.get_attribute("name") for x, c in controls if not answers_keys(x, c)] == []


def answers_clicks(chart):
    """Whether a click on one of its first marks changes a chart."""
    marks = chart.locator('svg.marks [aria-roledescription$="mark"]:not(g)')
    for mark in marks.all()[1:40:3]:
        before = drawing(chart)
        mark.click(force=True, timeout=2000)
        chart.page.mouse.move(0, 0)
        if changed(chart, before):
            return True
    return False


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_selection_works_by_mouse(browser, host, name):
    with Visit(browser, host + name) as visit:
        assert any(answers_clicks(chart) for chart in live_charts(visit))


def test_chapter_opens_from_a_file(browser, host):
    address = (SITE / CHAPTERS[0]).as_uri()
    with Visit(browser, address) as visit:
        # the theme asks for its icon font twice, once in a way that files do not allow
        assert [p for p in visit.problems if "font" not in p and "ERR_FAILED" not in p] == []
        assert foreign(visit.requests, SITE.as_uri()) == []


def test_search_finds_a_chapter(browser, host):
    with Visit(browser, host + "search.html?q=attention") as visit:
        visit.page.wait_for_selector("#search-results li a")
        assert "book/" in visit.page.locator("#search-results li a").first.get_attribute("href")
