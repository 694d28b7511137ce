// What scrolls must be reachable by keyboard: wide code, formulas, tables and charts.
"use strict";

const SCROLLING =
  "pre, mjx-container[display], .pst-scrollable-table-container, .text_html, .chart-live";

const watcher = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const { scrollWidth, clientWidth, scrollHeight, clientHeight } = target;
    if (scrollWidth > clientWidth || scrollHeight > clientHeight) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});

const watch = () => document.querySelectorAll(SCROLLING).forEach((part) => watcher.observe(part));

document.addEventListener("DOMContentLoaded", watch);
document.addEventListener("charts-drawn", watch);
window.addEventListener("load", () => window.MathJax?.startup?.promise?.then(watch));

// The theme labels its search button otherwise than the button reads.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".search-button-field").forEach((button) => {
    button.removeAttribute("aria-label");
  });
});
