"""The page of a trace from the answer, opened from a file in a real browser."""

import re

import pytest

from circuit_pages import COLOURS, PHONE, Visit
from sparse_signals.app.cli import main

pytestmark = pytest.mark.site
MARY = "When Mary and John went to the store, John gave a drink to"
WITHOUT_SCRIPT = {"viewport": PHONE, "java_script_enabled": False}


@pytest.fixture(scope="session")
def addresses(tmp_path_factory):
    """The pages of one prompt and of eight."""
    folder = tmp_path_factory.mktemp("answers")
    for name, prompts in (("one", ["--prompt", MARY]), ("many", ["--n", "8"])):
        assert main(["answer", *prompts, "--quiet", "--out", str(folder / name)]) == 0
    return {name: (folder / name / "answer.html").as_uri() for name in ("one", "many")}


@pytest.mark.parametrize("name", ["one", "many"])
def test_page_is_whole_and_asks_nobody(browser, addresses, name):
    with Visit(browser, addresses[name]) as visit:
        visit.page.wait_for_load_state("networkidle")
        assert visit.problems == [] and visit.requests == [addresses[name]]
        assert visit.edges() == visit.rows() > 20
        visit.press("input[name=prune]", "Home")
        assert visit.edges() == visit.rows()
        assert re.match(rf"{visit.rows()} of {visit.rows()} edges", visit.page.inner_text("#count"))
        assert len(visit.page.locator("ol.paths li").all()) == 20
        assert visit.page.locator("#compared-title ~ .frame tbody tr").count() > 5


def test_question_comes_first_with_what_differs(browser, addresses):
    with Visit(browser, addresses["one"]) as visit:
        assert visit.page.inner_text("h1") == "Why “Mary” rather than “John”?"
        tokens = visit.page.locator("ol.tokens li")
        assert tokens.count() == 15
        changed = tokens.filter(has=visit.page.locator("i"))
        assert changed.count() == 1
        assert re.sub(r"\s+", " ", changed.inner_text()).split() == [
            "John", "in", "the", "counterfactual", "Mary", "100", "%",
        ]  # fmt: skip
        text = visit.page.inner_text("section[aria-label=Question]")
        assert "The logit of “Mary” less that of “John” is 10.7 here, and -3.98" in text
        first = visit.page.locator("ol.paths li").first.inner_text()
        assert "embedding at 10 John → " in first and first.endswith("→ answer")


def test_many_prompts_have_roles_and_a_table(browser, addresses):
    with Visit(browser, addresses["many"]) as visit:
        assert "S2" in visit.page.inner_text("table.bars")
        assert visit.page.locator("table.prompts tbody tr").count() == 8
        assert "(on average) alone carry" in visit.page.inner_text("section[aria-label=Question]")


def test_table_is_sorted_by_the_size_of_shares(browser, addresses):
    values = "rows => rows.map(row => Number(row.cells[5].dataset.value))"
    with Visit(browser, addresses["one"]) as visit:
        assert visit.page.get_attribute("th[data-key=share]", "aria-sort") == "descending"
        sizes = visit.page.locator("#edges tbody tr").evaluate_all(values)
        assert sizes == sorted(sizes, reverse=True) and min(sizes) > 0
        signs = visit.page.locator("#edges tbody tr td:nth-child(6)").all_inner_texts()
        assert any(text.startswith("−") for text in signs)
        visit.press("th[data-key=channel] button", "Enter")
        assert visit.state()["sort"] == ["channel"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "many"])
def test_axe_finds_nothing(browser, addresses, axe, name, scheme):
    with Visit(browser, addresses[name], scheme=scheme) as visit:
        visit.page.evaluate(axe)
        options = {"runOnly": COLOURS} if scheme == "dark" else {}
        found = visit.page.evaluate("options => axe.run(options)", options)["violations"]
        assert [(v["id"], v["nodes"][0]["html"][:200]) for v in found] == []


@pytest.mark.parametrize("name", ["one", "many"])
def test_phone_scrolls_downwards_only(browser, addresses, name):
    with Visit(browser, addresses[name], PHONE) as visit:
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_without_javascript_there_are_question_paths_and_tables(browser, addresses):
    context = browser.new_context(**WITHOUT_SCRIPT)
    page = context.new_page()
    page.goto(addresses["one"])
    assert "The graph needs JavaScript" in page.inner_text("body")
    assert page.locator("#edges tbody tr:visible").count() == 61
    assert page.locator("ol.paths li:visible").count() == 20
    context.close()
