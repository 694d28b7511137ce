// What the theme leaves undone for keyboards and phones.
"use strict";

const SCROLLING =
  "pre, mjx-container, .pst-scrollable-table-container, .text_html, .chart-live";

// What scrolls must be reachable by keyboard: wide code, formulas, tables and charts.
const watcher = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const { scrollWidth, clientWidth, scrollHeight, clientHeight } = target;
    const scrolls = getComputedStyle(target).overflowX === "auto";
    if (scrolls && (scrollWidth > clientWidth || scrollHeight > clientHeight)) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});

// A formula in a line of text cannot be broken: where it is wider than the page, it scrolls.
function markWideFormulas() {
  for (const formula of document.querySelectorAll("mjx-container:not([display])")) {
    const room = formula.closest("p, li, dd, td, figcaption, div").clientWidth;
    formula.classList.toggle("wide", formula.firstElementChild.offsetWidth > room);
  }
}

function watch() {
  markWideFormulas();
  document.querySelectorAll(SCROLLING).forEach((part) => watcher.observe(part));
}

// The theme labels some buttons otherwise than they read.
function unlabel() {
  for (const part of document.querySelectorAll(".search-button-field, summary[aria-label]")) {
    part.removeAttribute("aria-label");
  }
}

// The theme opens a solution only by a click beside the link in its title: here the link opens it too.
function openByTitle(event) {
  const title = event.target.closest(".toggle > .admonition-title");
  if (!title || event.target === title) return;
  event.preventDefault();
  event.stopPropagation();
  title.click();
}

// From one edition of a chapter to another, at the section that is being read.
function keepSection(event) {
  const link = event.target.closest(".editions a[rel=alternate]");
  if (!link) return;
  const above = [...document.querySelectorAll("article section[id]")].filter(
    (section) => section.getBoundingClientRect().top < window.innerHeight / 3,
  );
  link.hash = above.length > 1 ? above.at(-1).id : ""; // the first one is the whole page
}

document.addEventListener("click", keepSection, { capture: true });
document.addEventListener("click", openByTitle, { capture: true });
document.addEventListener("DOMContentLoaded", () => {
  unlabel();
  watch();
});
document.addEventListener("charts-drawn", watch);
window.addEventListener("resize", markWideFormulas);
window.addEventListener("load", () => window.MathJax?.startup?.promise?.then(watch));
