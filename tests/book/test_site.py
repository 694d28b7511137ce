"""The built site in a real browser. Skipped, with the reason, where there is no browser."""

import functools
import http.server
import json
import re
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from playwright.sync_api import Error

ROOT = Path(__file__).parents[2]
SITE = ROOT / "_build" / "html"
PAGES = sorted(str(p.relative_to(SITE)) for p in SITE.rglob("*.html") if "_static" not in p.parts)
CHAPTERS = [f"book/{path.stem}.html" for path in sorted((ROOT / "book").glob("*.ipynb"))]
EDITIONS = {  # pages of other editions, made of the same parts as their chapters
    f"book/{path.stem}-on-{path.parent.name}.html": path
    for path in sorted((ROOT / "editions").glob("*/*.ipynb"))
}
ONCE = [page for page in PAGES if page not in EDITIONS]
COLOURS = [
    "color-contrast",
    "link-in-text-block",
]  # what the dark mode can change
CLICKED = re.compile(r'"on": ?"[^"]*click')
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
# The other rows of a chart's data are like these, and take axe as long as the rest of the page.
FEW_ROWS = "document.querySelectorAll('.chart-data tr:nth-child(n+4)').forEach(row => row.remove())"
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

    def __init__(self, context, address):
        self.page = context.new_page()
        self.problems, self.requests = [], []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("requestfailed", lambda request: self.problems.append(request.url))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("response", self._response)
        self.page.set_default_timeout(120_000)  # the largest pages take their time on two cores
        self.page.goto(address)
        self.page.wait_for_function(READY)

    def _console(self, message):
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def _response(self, response):
        if response.status >= 400:
            self.problems.append(f"{response.status} {response.url}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.page.close()

    def theme(self):
        return self.page.evaluate("document.documentElement.dataset.theme")

    def wear(self, scheme):
        """Switch the page to the light or the dark mode, as a reader does."""
        for _ in range(3):
            if self.theme() != scheme:
                self.page.locator(".theme-switch-button:visible").first.click()
                self.page.mouse.move(0, 0)
        assert self.theme() == scheme
        self.page.evaluate("document.getAnimations().forEach(animation => animation.finish())")

    @contextmanager
    def on_a_phone(self):
        self.page.set_viewport_size(PHONE)
        yield
        self.page.set_viewport_size(DESKTOP)


@pytest.fixture(scope="session")
def context(browser):
    """One for all pages, as in a reader's browser: scripts and fonts are read once."""
    how = {"color_scheme": "light", "reduced_motion": "reduce"}
    with browser.new_context(viewport=DESKTOP, **how) as context:
        yield context


def each(names):
    """Run a test on each of these pages. All tests of a page run in turn and share one visit."""
    pages = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]
    return pytest.mark.parametrize("visit", pages, indirect=True)


@pytest.fixture(scope="module")
def visit(request, context, host):
    """A page of the site, shared by the tests that look at it."""
    with Visit(context, host + request.param) as visit:
        yield visit


def foreign(requests, home):
    return [url for url in requests if not url.startswith((home, "data:", "blob:"))]


def test_site_has_every_page_of_the_contents(host):
    assert {*CHAPTERS, *EDITIONS} <= set(PAGES)
    assert {"index.html", "book/index.html", "book/how-to-run.html", "search.html"} <= set(PAGES)


@each(PAGES)
def test_page_is_whole_and_asks_no_other_host(visit, host):
    visit.page.wait_for_load_state("networkidle")
    assert visit.problems == []
    assert foreign(visit.requests, host) == []


@each(PAGES)
def test_phone_scrolls_downwards_only(visit):
    with visit.on_a_phone():
        visit.page.wait_for_function(
            "width => document.documentElement.scrollWidth <= width", arg=PHONE["width"]
        )


@each(ONCE)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit, axe, scheme):
    options = {"resultTypes": ["violations"]}
    visit.wear(scheme)
    visit.page.evaluate(FEW_ROWS)
    visit.page.evaluate(axe)
    if scheme == "dark":
        options["runOnly"] = COLOURS
    found = visit.page.evaluate("options => axe.run(options)", options)["violations"]
    serious = [
        (violation["id"], node["html"][:200])
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]
    assert serious == []


@each(CHAPTERS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_are_drawn_in_the_ink_of_the_page(visit, scheme):
    inks = """() => [...document.querySelectorAll('svg.marks .role-axis-label text')]
      .map(text => getComputedStyle(text).fill)"""
    ink = "getComputedStyle(document.querySelector('.bd-article p:not([class])')).color"
    visit.wear(scheme)
    assert set(visit.page.evaluate(inks)) == {visit.page.evaluate(ink)}


def test_every_page_names_the_model_of_its_notebook(host):
    notebooks = {f"book/{path.stem}.html": path for path in (ROOT / "book").glob("*.ipynb")}
    for page, path in (notebooks | EDITIONS).items():
        edition = json.loads(path.read_text(encoding="utf-8"))["metadata"]["edition"]
        html = (SITE / page).read_text(encoding="utf-8")
        (line,) = re.findall(r'<p class="edition">(.*)</p>', html)
        current = re.findall(r'<li aria-current="page">(.*?)</li>', html)
        named = [edition["model"]] if "model" in edition else []
        assert current == named
        assert re.findall(r"with the model (\S+) \((.*?)\)", line) == [
            (model, edition["size"]) for model in named
        ]
        assert edition["torch"] in line and edition["device"] in line


def test_the_switch_keeps_the_section_that_is_read_and_leads_back(context, host):
    page = next(iter(EDITIONS))
    chapter = re.sub(r"-on-.*", ".html", page)
    with Visit(context, host + chapter) as visit:
        section = visit.page.evaluate(
            """() => { const all = [...document.querySelectorAll('article section[id]')];
            all[3].scrollIntoView({behavior: 'instant'}); return all[3].id }"""
        )
        for wanted in (page, chapter):
            visit.page.locator(".editions a[rel=alternate]").first.evaluate("link => link.click()")
            visit.page.wait_for_url(f"{host}{wanted}#{section}")
            visit.page.wait_for_function(READY)
        assert visit.problems == []


@each(CHAPTERS)
def test_chapter_describes_its_charts(visit):
    labels = "[...document.querySelectorAll('.chart-live')].map(c => c.getAttribute('aria-label'))"
    assert all(visit.page.evaluate(labels))
    tables = visit.page.locator("details.chart-data").count()
    assert tables == visit.page.locator("svg.marks").count() > 0


def changes(chart, act, seconds):
    """Whether the drawing becomes another one within some seconds of an act."""
    drawing = "chart => chart.querySelector('svg.marks').innerHTML"
    before = chart.evaluate_handle(drawing)
    act()
    return chart.evaluate(
        f"""async (chart, before) => {{
          const end = performance.now() + {1000 * seconds};
          const same = () => ({drawing})(chart) === before;
          while (same() && performance.now() < end) await new Promise(requestAnimationFrame);
          return !same();
        }}""",
        before,
    )


KEYS = {
    "select-one": ("ArrowDown", "End", "Home"),
    "range": ("End", "Home"),
}  # one step may do nothing


def answers_keys(chart, control):
    """Whether a key that its kind of control knows changes a chart. Sliders end at their start."""
    kind = control.evaluate("control => control.type")
    keys = KEYS.get(kind, ("ArrowRight", "ArrowLeft", "Space"))
    answers = any(changes(chart, functools.partial(control.press, key), 10) for key in keys)
    if kind == "range":  # where nothing is pruned
        control.press("Home")
    return answers


@each(CHAPTERS)
def test_every_control_of_a_chart_works_by_keyboard(visit):
    controls = [
        (chart, control)
        for chart in visit.page.locator(".chart-live").all()
        for control in chart.locator(".vega-bind :is(input, select)").all()
    ]
    assert controls
    assert [c.get_attribute("name") for x, c in controls if not answers_keys(x, c)] == []
    assert visit.problems == []


def answers_clicks(chart):
    """Whether a click on one of some of its marks changes a chart."""

    def click(mark):
        with suppress(Error):  # what scrolls may be out of sight
            mark.click(force=True, timeout=2000)
        chart.page.mouse.move(0, 0)

    marks = chart.locator("svg.marks [aria-roledescription]:not(g)").all()
    some = marks[1 :: max(3, len(marks) // 24)]
    return any(changes(chart, functools.partial(click, mark), 1) for mark in some)


@each(CHAPTERS)
def test_a_selection_works_by_mouse(visit):
    figures = visit.page.locator(".chart-drawn").all()
    offered = [
        figure.locator(".chart-live")
        for figure in figures
        if CLICKED.search(figure.locator("script.chart-spec").text_content())
    ]
    assert any(answers_clicks(chart) for chart in offered)
    assert visit.problems == []


@each(CHAPTERS)
def test_solution_opens_by_any_part_of_its_title(visit):
    solution = visit.page.locator(".solution.toggle").first
    inside = solution.locator("section").first
    title, link = (solution.locator(f".admonition-title{part}") for part in ("", " a"))
    button = solution.locator(".toggle-button")
    acts = (
        link.click,
        functools.partial(link.press, "Enter"),
        functools.partial(title.click, position={"x": 5, "y": 5}),
        button.click,
        functools.partial(button.press, "Enter"),
    )
    for number, act in enumerate(acts):
        assert inside.is_visible() == (number % 2 == 1)
        act()
    assert inside.is_visible()
    assert button.get_attribute("aria-expanded") == "true"
    assert visit.problems == []


def test_page_follows_the_colours_of_the_system(browser, host):
    with browser.new_context(color_scheme="dark") as context:
        assert Visit(context, host + "book/how-to-run.html").theme() == "dark"


def test_chapter_opens_from_a_file(context):
    address = (SITE / CHAPTERS[0]).as_uri()
    with Visit(context, address) as visit:
        # the theme asks for its icon font twice, once in a way that files do not allow
        assert [p for p in visit.problems if "font" not in p and "ERR_FAILED" not in p] == []
        assert foreign(visit.requests, SITE.as_uri()) == []


def test_search_finds_a_chapter(context, host):
    with Visit(context, host + "search.html?q=attention") as visit:
        visit.page.wait_for_selector("#search-results li a")
        assert "book/" in visit.page.locator("#search-results li a").first.get_attribute("href")
