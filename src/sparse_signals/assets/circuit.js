// Draw the circuit, keep the table in step with it, and keep the state of both in the address.
"use strict";

const SPEC = JSON.parse(document.getElementById("spec").textContent);
const GRAPH = document.getElementById("graph");
const CONTROLS = document.getElementById("controls");
const OPTIONS = { renderer: "svg", actions: false, mode: "vega-lite", bind: CONTROLS };
const TABLE = document.getElementById("edges");
const BODY = TABLE.tBodies[0];
const HEADS = [...TABLE.tHead.rows[0].cells];
const ROWS = [...BODY.rows];
const NODES = new Set(ROWS.flatMap((row) => [row.dataset.writer, row.dataset.reader]));
const param = (spec, name) => spec.params.find((each) => each.name === name);
const START = {
  prune: param(SPEC, "prune").value, node: null, pin: [],
  sort: TABLE.dataset.sort,
};
let state;
let drawn; // what vega-embed returned

// --- the address ---

function read() {
  const query = new URLSearchParams(location.hash.slice(1));
  const prune = query.has("prune") ? Number(query.get("prune")) : NaN;
  const sort = query.get("sort");
  const known = HEADS.some((head) => head.dataset.key === sort?.replace(/^-/, ""));
  return {
    prune: prune >= 0 && prune <= 100 ? prune : START.prune,
    node: NODES.has(query.get("node")) ? query.get("node") : null,
    pin: query.getAll("pin").filter((node) => NODES.has(node)),
    sort: known ? sort : START.sort,
  };
}

function write() {
  const query = new URLSearchParams();
  if (state.prune !== START.prune) query.set("prune", state.prune);
  if (state.node !== null) query.set("node", state.node);
  state.pin.forEach((node) => query.append("pin", node));
  if (state.sort !== START.sort) query.set("sort", state.sort);
  const hash = query.size ? `#${query}` : "";
  history.replaceState(null, "", location.href.split("#")[0] + hash);
}

// --- the table ---

function filter() {
  const active = new Set(state.node === null ? state.pin : [...state.pin, state.node]);
  let shown = 0;
  for (const row of ROWS) {
    const { writer, reader, percent } = row.dataset;
    const incident = !active.size || active.has(writer) || active.has(reader);
    row.hidden = !incident || Number(percent) < state.prune;
    shown += !row.hidden;
  }
  const of = active.size ? `, at the nodes: ${[...active].join("; ")}` : "";
  document.getElementById("count").textContent = `${shown} of ${ROWS.length} edges shown${of}`;
}

function sort() {
  const down = state.sort.startsWith("-");
  const place = HEADS.findIndex((head) => head.dataset.key === state.sort.replace(/^-/, ""));
  const value = (row) => row.cells[place].dataset.value ?? row.cells[place].textContent;
  const compare = (a, b) => value(a).localeCompare(value(b), "en", { numeric: true });
  const number = (a, b) => Number(value(a)) - Number(value(b));
  const order = HEADS[place].classList.contains("number") ? number : compare;
  BODY.append(...ROWS.sort((a, b) => (down ? order(b, a) : order(a, b))));
  HEADS.forEach((head, i) => {
    if (i === place) head.setAttribute("aria-sort", down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

function update(change) {
  state = { ...state, ...change };
  filter();
  sort();
  write();
}

// --- the graph ---

async function draw() {
  state = read();
  const spec = structuredClone(SPEC);
  delete spec.$schema; // written for JupyterLab's Vega-Lite 5; this page has 6, which reads the same
  param(spec, "prune").value = state.prune;
  param(spec, "chosen").value = state.node;
  if (state.pin.length) param(spec, "pinned").value = state.pin.map((node) => ({ node }));
  drawn?.finalize();
  CONTROLS.replaceChildren();
  drawn = await vegaEmbed(GRAPH, spec, OPTIONS);
  const { view } = drawn;
  view.addSignalListener("prune", (_, value) => update({ prune: value }));
  view.addSignalListener("chosen", (_, value) => update({ node: value }));
  view.addSignalListener("pinned", (_, value) => update({ pin: value.node ?? [] }));
  update({});
}

for (const head of HEADS) {
  head.querySelector("button").addEventListener("click", () => {
    const { key } = head.dataset;
    const first = head.classList.contains("number") ? `-${key}` : key; // the largest, or A, on top
    const other = first === key ? `-${key}` : key;
    update({ sort: state.sort === first ? other : first });
  });
}
window.addEventListener("keydown", (event) => {
  if (event.key === "Escape") drawn?.view.signal("chosen", null).run();
});
window.addEventListener("hashchange", draw);
draw();
