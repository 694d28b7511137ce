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
    finish(place);
    figure.classList.add("chart-drawn");
  } catch (error) {
    place.remove();
    console.error(`A chart could not be drawn: ${error.message}`);
  }
}

function finish(place) {
  const svg = place.querySelector("svg.marks");
  place.style.setProperty("--drawn-width", `${svg.getAttribute("width")}px`);
  // the parts of a brush have a role but no name
  for (const part of svg.querySelectorAll('[role="graphics-symbol"]:not([aria-label])')) {
    part.setAttribute("aria-hidden", "true");
  }
}

document.addEventListener("DOMContentLoaded", async () => {
  await Promise.all([...document.querySelectorAll("script.chart-spec")].map(draw));
  document.dispatchEvent(new Event("charts-drawn"));
});
