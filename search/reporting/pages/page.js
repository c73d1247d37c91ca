"use strict";
// Draws the charts, switches between light and dark, sorts and filters the table. Talks to no server.

const root = document.documentElement;
const charts = [...document.querySelectorAll("[data-chart]")];

function colour(name) {
  return getComputedStyle(root).getPropertyValue(`--${name}`).trim();
}

// What a chart's layout takes from the page's colours, for Plotly.relayout.
function chartColours(layout) {
  const [text, line, surface] = ["text", "line", "surface"].map(colour);
  const found = {"font.color": text, "hoverlabel.bgcolor": surface, "hoverlabel.font.color": text};
  for (const name of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))) {
    found[`${name}.gridcolor`] = line;
    found[`${name}.linecolor`] = line;
    found[`${name}.zerolinecolor`] = line;
  }
  (layout.annotations || []).forEach((_, i) => { found[`annotations[${i}].bgcolor`] = surface; });
  return found;
}

async function draw(chart) {
  const {data, layout} = JSON.parse(document.getElementById(chart.dataset.chart).textContent);
  layout.font = {family: getComputedStyle(document.body).fontFamily, size: 13};
  await Plotly.newPlot(chart, data, layout, {responsive: true, displaylogo: false, displayModeBar: false});
  await Plotly.relayout(chart, chartColours(layout));
}

// --- Light and dark ---

function remembered() {
  try { return localStorage.getItem("theme"); } catch { return null; }
}

function setTheme(theme) {
  root.dataset.theme = theme;
  const button = document.getElementById("theme");
  button.textContent = theme === "dark" ? "Light" : "Dark";
  button.setAttribute("aria-label", `Switch to ${theme === "dark" ? "light" : "dark"} colours`);
  for (const chart of charts.filter((one) => one.layout)) Plotly.relayout(chart, chartColours(chart.layout));
}

const preferred = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
setTheme(remembered() || preferred);
document.getElementById("theme").addEventListener("click", () => {
  const theme = root.dataset.theme === "dark" ? "light" : "dark";
  setTheme(theme);
  try { localStorage.setItem("theme", theme); } catch { /* a browser that keeps nothing for files */ }
});

// Paper is white and narrower than most screens.
let onScreen;
addEventListener("beforeprint", () => {
  onScreen = root.dataset.theme;
  setTheme("light");
  for (const chart of charts) Plotly.relayout(chart, {width: 680});
});
addEventListener("afterprint", () => {
  setTheme(onScreen);
  for (const chart of charts) Plotly.relayout(chart, {width: null, autosize: true});
});

// --- The table ---

const table = document.getElementById("trials-table");
const PAGE = 200;  // rows that "Show more" adds

// Each trial as its values and its row; of a long table, most rows are made when they are to be seen.
class Entry {
  constructor(status, values, text, make) {
    Object.assign(this, {status, values, text, make});
  }

  get row() { return (this.made ||= this.make()); }
}

function entryOf(row) {
  const values = [...row.cells].map((cell) => cell.dataset.value);
  return new Entry(row.dataset.status, values, row.textContent.toLowerCase(), () => row);
}

function laterEntry([isBest, status, cells], like) {
  const text = cells.map(([, shown]) => shown).join(" ").toLowerCase();
  return new Entry(status, cells.map(([value]) => value), text, () => {
    const row = like.cloneNode(true);
    row.dataset.status = status;
    row.className = isBest ? "best" : "";
    cells.forEach(([value, shown], i) => {
      row.cells[i].dataset.value = value;
      row.cells[i].textContent = shown;
    });
    return row;
  });
}

let entries = [], matching = [], limit = Infinity;

function sortBy(column, ascending) {
  const key = (entry) => entry.values[column];
  const numeric = entries.every((entry) => key(entry) === "" || !isNaN(key(entry)));
  entries.sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");  // what has no value comes last, either way
    const order = numeric ? Number(x) - Number(y) : x.localeCompare(y);
    return ascending ? order : -order;
  });
  [...table.tHead.rows[0].cells].forEach((cell, i) => {
    if (i === column) cell.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    else cell.removeAttribute("aria-sort");
  });
  filterRows();
}

function filterRows() {
  const words = document.getElementById("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const status = document.getElementById("status-filter").value;
  matching = entries.filter((entry) =>
    words.every((word) => entry.text.includes(word)) && (!status || entry.status === status));
  if (limit !== Infinity) limit = PAGE;
  showRows();
}

function showRows() {
  table.tBodies[0].replaceChildren(...matching.slice(0, limit).map((entry) => entry.row));
  const hidden = Math.max(0, matching.length - limit);
  const first = hidden ? `, the first ${limit} of them here` : "";
  document.getElementById("shown").textContent = `${matching.length} of ${entries.length} trials${first}`;
  document.getElementById("more").hidden = !hidden;
}

if (table) {
  const rows = [...table.tBodies[0].rows];
  const later = JSON.parse(document.getElementById("later-rows").textContent);
  entries = [...rows.map(entryOf), ...later.map((saved) => laterEntry(saved, rows[0]))];
  if (later.length) limit = PAGE;
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    cell.querySelector("button").addEventListener("click", () => {
      sortBy(column, cell.getAttribute("aria-sort") !== "ascending");
    });
  });
  document.getElementById("filter").addEventListener("input", filterRows);
  document.getElementById("status-filter").addEventListener("change", filterRows);
  document.getElementById("more").addEventListener("click", () => { limit += PAGE; showRows(); });
  filterRows();
}

// One after the other, so that the page can be read and scrolled from the start.
(async () => {
  for (const chart of charts) {
    await draw(chart);
    await new Promise((resolve) => setTimeout(resolve));
  }
  root.dataset.drawn = charts.length;
})();
