// Draw the charts of this page. The spec sits beside the picture, which stays if drawing fails.
"use strict";

const OPTIONS = { renderer: "svg", actions: false, mode: "vega-lite", logLevel: 1 };

async function draw(script) {
  const figure = script.closest(".chart");
  const spec = JSON.parse(script.textContent);
  const place = document.createElement("div");
  place.className = "chart-live";
  script.before(place);
  try {
    const { view } = await vegaEmbed(place, spec, OPTIONS);
    figure.classList.add("chart-drawn");
    place.view = view;
    makeScrollable(place);
  } catch (error) {
    place.remove();
    figure.classList.add("chart-failed");
    console.error(`A chart could not be drawn: ${error.message}`);
  }
}

// A region that scrolls must be reachable by keyboard.
function makeScrollable(place) {
  const update = () => {
    const scrolls = place.scrollWidth > place.clientWidth + 1;
    if (scrolls) place.setAttribute("tabindex", "0");
    else place.removeAttribute("tabindex");
  };
  new ResizeObserver(update).observe(place);
}

document.addEventListener("DOMContentLoaded", () => {
  for (const script of document.querySelectorAll("script.chart-spec")) draw(script);
});
