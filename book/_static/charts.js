// Draw the charts of this page. The spec sits beside the picture, which stays if drawing fails.
"use strict";

const OPTIONS = { renderer: "svg", actions: false, mode: "vega-lite" };

async function draw(script) {
  const figure = script.closest(".chart");
  const spec = JSON.parse(script.textContent);
  delete spec.$schema; // written for JupyterLab's Vega-Lite 5; this page has 6, which reads the same
  const place = document.createElement("div");
  place.className = "chart-live";
  script.before(place);
  try {
    await vegaEmbed(place, spec, OPTIONS);
    figure.classList.add("chart-drawn");
    const svg = place.querySelector("svg.marks");
    place.style.setProperty("--drawn-width", `${svg.getAttribute("width")}px`);
  } catch (error) {
    place.remove();
    console.error(`A chart could not be drawn: ${error.message}`);
  }
}

// What scrolls must be reachable by keyboard.
function watchScroll(element) {
  const update = () => {
    const scrolls =
      element.scrollWidth > element.clientWidth || element.scrollHeight > element.clientHeight;
    if (scrolls) element.tabIndex = 0;
    else element.removeAttribute("tabindex");
  };
  new ResizeObserver(update).observe(element);
}

document.addEventListener("DOMContentLoaded", async () => {
  await Promise.all([...document.querySelectorAll("script.chart-spec")].map(draw));
  document.querySelectorAll(".chart-live, .chart-table, .output.text_html").forEach(watchScroll);
});
