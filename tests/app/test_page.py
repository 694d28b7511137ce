"""The page of a circuit, opened from a file in a real browser."""

from urllib.parse import parse_qs, urlsplit

import pytest

import example_circuits as made_up
from circuit_pages import BOXES, COLOURS, PHONE, Visit
from sparse_signals.app.page import write_page

pytestmark = pytest.mark.site
FACTS = {"model": "gpt2-ioi", "prompts": "256 (seed 0)"}
HOSTILE = "</script><script>alert('a')</script><!-- & \"q\""
EDGES = 300


@pytest.fixture(scope="session")
def address(tmp_path_factory):
    """A page with `EDGES` edges."""
    path = tmp_path_factory.mktemp("page") / "circuit.html"
    return write_page(path, made_up.pooled_edges(EDGES), title="Circuit", facts=FACTS).as_uri()


def test_page_is_whole_and_asks_nobody(browser, address):
    with Visit(browser, address) as visit:
        visit.page.wait_for_load_state("networkidle")
        assert visit.problems == []
        assert visit.requests == [address]
        assert "model: gpt2-ioi" in visit.page.inner_text(".facts")
        assert visit.edges() == visit.rows() > 20
        assert f"{visit.rows()} of {EDGES} edges" in visit.page.inner_text("#count")


def test_slider_prunes_graph_and_table_by_keyboard(browser, address):
    with Visit(browser, address) as visit:
        before = visit.edges()
        visit.press("input[name=prune]", "Home")
        assert visit.edges() == visit.rows() == EDGES > before
        assert visit.state() == {"prune": ["0"]}
        visit.press("input[name=prune]", "End")
        assert visit.edges() == visit.rows() < before


def test_click_pins_shift_adds_and_escape_unpins(browser, address):
    with Visit(browser, address) as visit:
        before = visit.rows()
        first = visit.pin(3)
        assert visit.state() == {"pin": [first]} and visit.pinned() == {first}
        ends = visit.page.locator("#edges tbody tr:visible").evaluate_all(
            "rows => rows.map(row => [row.dataset.writer, row.dataset.reader])"
        )
        assert 0 < len(ends) < before and all(first in pair for pair in ends)
        second = visit.pin(9, "Shift")
        assert set(visit.state()["pin"]) == {first, second} == visit.pinned()
        visit.page.keyboard.press("Escape")
        visit.page.wait_for_function("location.hash === ''")
        assert visit.rows() == before and visit.pinned() == set()


def test_click_on_nothing_unpins(browser, address):
    with Visit(browser, address) as visit:
        visit.pin(3)
        visit.page.locator("svg.marks").click(position={"x": 5, "y": 5})
        visit.page.wait_for_function("location.hash === ''")
        assert visit.pinned() == set()


def test_pointing_at_a_node_fades_the_other_edges(browser, address):
    faded = "svg.marks .mark-line path[opacity='0.12']"
    with Visit(browser, address) as visit:
        assert visit.page.locator(faded).count() == 0
        visit.page.locator(BOXES).first.hover(force=True)
        visit.page.wait_for_selector(faded, state="attached")
        assert 0 < visit.page.locator(faded).count() < visit.edges()
        assert "node" in visit.page.inner_text("#vg-tooltip-element")


def test_menu_chooses_a_node_by_keyboard(browser, address):
    with Visit(browser, address) as visit:
        visit.page.select_option("select[name=chosen]", label="MLP 0 at end")
        visit.page.wait_for_function("location.hash.includes('node=')")
        assert visit.state() == {"node": ["MLP 0 at end"]}
        assert "MLP 0 at end" in visit.page.inner_text("#count")
        assert visit.pinned() == {"MLP 0 at end"}


def test_address_restores_the_drawing(browser, address):
    with Visit(browser, address) as visit:
        visit.press("input[name=prune]", "ArrowLeft")
        visit.pin(3)
        visit.pin(9, "Shift")
        visit.page.locator("th[data-key=weight] button").press("Enter")
        visit.page.wait_for_function("location.hash.includes('sort')")
        seen = visit.seen()
        shared = visit.page.url
    assert set(parse_qs(urlsplit(shared).fragment)) == {"prune", "pin", "sort"}
    with Visit(browser, shared) as again:
        assert again.page.url == shared
        assert again.seen() == seen


def test_hash_that_makes_no_sense_is_ignored(browser, address):
    with Visit(browser, address) as visit:
        usual = visit.rows()
    with Visit(browser, f"{address}#prune=900&pin=nobody&node=%3Cb%3E&sort=-size") as visit:
        assert visit.problems == [] and visit.rows() == usual and visit.state() == {}


def test_table_is_sorted_by_its_headings(browser, address):
    values = "rows => rows.map(row => Number(row.cells[7].dataset.value))"
    head = "th[data-key=weight]"
    with Visit(browser, address) as visit:
        assert visit.page.get_attribute("th[data-key=prompts]", "aria-sort") == "descending"
        for order, backwards in (("descending", True), ("ascending", False)):
            visit.press(f"{head} button", "Enter")
            assert visit.page.get_attribute(head, "aria-sort") == order
            weights = visit.page.locator("#edges tbody tr").evaluate_all(values)
            assert weights == sorted(weights, reverse=backwards)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_graph_is_drawn_in_the_ink_of_the_page(browser, address, scheme):
    inks = """() => [...document.querySelectorAll('.role-axis-label text')]
      .map(text => getComputedStyle(text).fill)"""
    with Visit(browser, address, scheme=scheme) as visit:
        ink = visit.page.evaluate("getComputedStyle(document.querySelector('h1')).color")
        assert set(visit.page.evaluate(inks)) == {ink}
        assert ink == ("rgb(255, 255, 255)" if scheme == "dark" else "rgb(0, 0, 0)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser, address, axe, scheme):
    with Visit(browser, address, scheme=scheme) as visit:
        visit.page.evaluate(axe)
        options = {"runOnly": COLOURS} if scheme == "dark" else {}
        found = visit.page.evaluate("options => axe.run(options)", options)["violations"]
        assert [(v["id"], v["nodes"][0]["html"][:200]) for v in found] == []


def test_phone_scrolls_downwards_only(browser, address):
    with Visit(browser, address, PHONE) as visit:
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_hostile_text_stays_text(browser, tmp_path):
    edges = made_up.pooled_edges(60)
    edges["role"] = edges["role"].replace("S1", HOSTILE)
    edges["dest_role"] = edges["dest_role"].replace("S1", HOSTILE)
    edges["upstream"] = edges["upstream"].replace("MLP 0", f"MLP {HOSTILE}")
    facts = {HOSTILE: HOSTILE}
    path = write_page(tmp_path / "x.html", edges, title=HOSTILE, facts=facts)
    with Visit(browser, path.as_uri()) as visit:
        assert visit.problems == []
        assert visit.page.title() == visit.page.inner_text("h1") == HOSTILE
        assert visit.page.inner_text(".facts") == f"{HOSTILE}: {HOSTILE}"
        assert HOSTILE in visit.page.locator("#edges tbody").inner_text()
        name = visit.pin(0)
        assert visit.state()["pin"] == [name]


def test_page_replaces_another_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "circuit.html"
    path.write_text("old")
    assert write_page(path, made_up.pooled_edges(5), title="New", facts=FACTS) == path
    assert "<h1>New</h1>" in path.read_text() and list(tmp_path.iterdir()) == [path]


def test_page_that_cannot_be_made_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "circuit.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="no edges"):
        write_page(path, made_up.pooled_edges(5).iloc[:0], title="New", facts=FACTS)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("sparse_signals.core.resume.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_page(path, made_up.pooled_edges(5), title="New", facts=FACTS)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
