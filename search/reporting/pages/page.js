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

function sortBy(column, ascending) {
  const key = (row) => row.cells[column].dataset.value;
  const numeric = [...table.tBodies[0].rows].every((row) => key(row) === "" || !isNaN(key(row)));
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");  // what has no value comes last, either way
    const order = numeric ? Number(x) - Number(y) : x.localeCompare(y);
    return ascending ? order : -order;
  });
  table.tBodies[0].append(...rows);
  [...table.tHead.rows[0].cells].forEach((cell, i) => {
    if (i === column) cell.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    else cell.removeAttribute("aria-sort");
  });
}

function filterRows() {
  const words = document.getElementById("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const status = document.getElementById("status-filter").value;
  let shown = 0;
  const rows = [...table.tBodies[0].rows];
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !(words.every((word) => text.includes(word)) && (!status || row.dataset.status === status));
    shown += !row.hidden;
  }
  document.getElementById("shown").textContent = `${shown} of ${rows.length} trials`;
}

if (table) {
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    cell.querySelector("button").addEventListener("click", () => {
      sortBy(column, cell.getAttribute("aria-sort") !== "ascending");
    });
  });
  document.getElementById("filter").addEventListener("input", filterRows);
  document.getElementById("status-filter").addEventListener("change", filterRows);
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
