"""Take the picture of the README from the built site: book/_static/page.png."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "_build" / "html" / "book" / "04-ioi-tracing.html"
PICTURE = ROOT / "book" / "_static" / "page.png"
SIZE = {"width": 1180, "height": 820}
DRAWN = """() => MathJax.startup.promise.then(() =>
  document.querySelectorAll('svg.marks').length
    === document.querySelectorAll('script.chart-spec').length)"""
SHOW = """() => {
  const { top } = document.querySelector('.chart-drawn').getBoundingClientRect();
  scrollBy({ top: top - 60, behavior: 'instant' });
}"""


def main() -> int:
    """Show the first circuit of chapter 4 below the bar of the page, and take the picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(PAGE.as_uri(), timeout=120_000)
        page.wait_for_function(DRAWN, timeout=120_000)
        page.evaluate(SHOW)
        page.screenshot(path=PICTURE)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
