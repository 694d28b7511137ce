"""Pages with a circuit, opened in a real browser."""

from urllib.parse import parse_qs, urlsplit

PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}
PINNED = "name => new URLSearchParams(location.hash.slice(1)).getAll('pin').includes(name)"
COLOURS = ["color-contrast", "link-in-text-block"]  # what the dark mode can change
BOXES = "svg.marks .nodes_marks path"


class Visit:
    """A circuit's page that was opened and drawn, and what went wrong on the way."""

    def __init__(self, browser, address, viewport=DESKTOP, scheme="light"):
        self.context = browser.new_context(viewport=viewport, color_scheme=scheme)
        self.page = self.context.new_page()
        self.problems, self.requests = [], []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector("svg.marks")
        self.page.wait_for_function("document.getElementById('count').textContent")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def edges(self):
        return self.page.locator("svg.marks .mark-line path").count()

    def rows(self):
        return self.page.locator("#edges tbody tr:visible").count()

    def state(self):
        """What the address says."""
        return parse_qs(urlsplit(self.page.url).fragment)

    def pin(self, number, *keys):
        """Click the node with this number; its name."""
        box = self.page.locator(BOXES).nth(number)
        name = box.get_attribute("aria-label")
        box.click(force=True, modifiers=list(keys))
        self.page.wait_for_function(PINNED, arg=name)
        self.page.mouse.move(1, 1)
        return name

    def pinned(self):
        """Names of the nodes that are drawn as pinned or chosen."""
        boxes = self.page.locator(f"{BOXES}[fill='#C2188B']")
        return set(boxes.evaluate_all("all => all.map(box => box.getAttribute('aria-label'))"))

    def seen(self):
        """All drawn marks, in any order, and the table with its caption, in order."""
        shapes = "svg.marks :is(.mark-line path, .nodes_marks path, .labels_marks text)"
        marks = self.page.locator(shapes).evaluate_all("all => all.map(mark => mark.outerHTML)")
        parts = ("#count", "#edges")
        return [sorted(marks), *(self.page.locator(part).inner_html() for part in parts)]

    def press(self, selector, key):
        """Press a key on a control and wait for the address to follow."""
        before = self.page.url
        self.page.locator(selector).press(key)
        self.page.wait_for_function("old => location.href !== old", arg=before)
