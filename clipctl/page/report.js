// The page of `clipctl analyze --html`: sorting and filtering of tables, charts with one legend a section.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 600px)");
  const hidden = new Set();
  let printing = false;
  let drawing = 0;

  // --- tables ---

  const number = (cell) => (cell.dataset.value === undefined ? null : Number(cell.dataset.value));

  function compare(one, other) {
    const [a, b] = [number(one), number(other)];
    if (a !== null && b !== null) return a - b;
    return one.textContent.localeCompare(other.textContent, undefined, { numeric: true });
  }

  function sort(table, column, direction) {
    const rows = [...table.tBodies[0].rows];
    rows.sort((one, other) => {
      const [a, b] = [one.cells[column], other.cells[column]];
      const empty = (a.textContent === "") - (b.textContent === "");
      return empty || direction * compare(a, b);
    });
    table.tBodies[0].append(...rows);
    [...table.tHead.rows[0].cells].forEach((heading, at) => {
      heading.setAttribute("aria-sort", at !== column ? "none" : direction > 0 ? "ascending" : "descending");
    });
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      heading.firstElementChild.addEventListener("click", () => {
        sort(table, column, heading.getAttribute("aria-sort") === "ascending" ? -1 : 1);
      });
    });
  }

  function filter(input) {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = [...document.getElementById(input.dataset.filters).tBodies[0].rows];
    for (const row of rows) {
      const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    const shown = rows.filter((row) => !row.hidden).length;
    const count = document.querySelector(`[data-counts="${input.dataset.filters}"]`);
    count.textContent = words.length ? `${shown} of ${rows.length} rows` : `${rows.length} rows`;
  }

  for (const input of document.querySelectorAll("[data-filters]")) {
    input.addEventListener("input", () => filter(input));
  }

  // --- charts ---

  // Rows travel by column, and a column of few different values by its values and their places.
  function unpacked(packed) {
    const columns = packed.columns.map((column) =>
      Array.isArray(column) ? column : column.places.map((place) => column.values[place]));
    return columns[0].map((_, at) => Object.fromEntries(packed.keys.map((key, of) => [key, columns[of][at]])));
  }

  const look = () => (dark.matches && !printing
    ? { ink: "#e4e7eb", soft: "#a0a9b4", line: "#363c44", page: "#1b1f25" }
    : { ink: "#1b1f24", soft: "#5b6470", line: "#dfe3e8", page: "#ffffff" });

  function config() {
    const { ink, soft, line } = look();
    const titles = { titleColor: ink, labelColor: soft };
    return {
      background: "transparent",
      font: "system-ui, sans-serif",
      axis: { ...titles, labelFontSize: 11, titleFontSize: 11.5, titleFontWeight: "normal", gridColor: line, domainColor: soft,
        tickColor: soft },
      legend: { ...titles, labelFontSize: 11, titleFontSize: 11.5, titleFontWeight: "normal" },
      text: { color: ink },
      view: { stroke: null },
      aria: false,
    };
  }

  // What a chart says in black and white is said in the colours of the page.
  function inColours(value) {
    const { ink, page } = look();
    if (value === "#000000") return ink;
    if (value === "white") return page;
    return value;
  }

  // A copy of a chart as it is drawn now: rows unpacked, series that are switched off left out, its legend in HTML.
  function drawn(node) {
    if (Array.isArray(node)) return node.map(drawn);
    if (node === null || typeof node !== "object") return inColours(node);
    if (node.packed) return unpacked(node.packed).filter((row) => !hidden.has(row.label));
    const copy = Object.fromEntries(Object.entries(node).map(([key, value]) => [key, drawn(value)]));
    if (copy.scale && copy.scale.scheme === "greys" && dark.matches && !printing) copy.scale.reverse = true;
    if (copy.field === "label" && copy.scale && "domain" in copy.scale) copy.legend = null;
    else if (copy.legend && copy.legend.orient === "bottom" && narrow.matches) copy.legend.columns = 2;
    if (copy.axis && copy.axis.labelLimit === 0 && narrow.matches) copy.axis.labelLimit = 110;
    return copy;
  }

  async function draw(place) {
    const spec = drawn(data.charts[place.dataset.chart]);
    spec.width = "container";
    spec.autosize = { type: "fit-x", contains: "padding" };
    const old = place.embedded;
    place.embedded = await vegaEmbed(place, spec, {
      actions: false,
      ast: true,
      config: config(),
      // A chart whose series are all switched off has scales without an extent, which is no news.
      logLevel: hidden.size ? 1 : 2,
      mode: "vega-lite",
      renderer: "svg",
      tooltip: { theme: dark.matches ? "dark" : "light" },
    });
    if (old) old.finalize();
  }

  async function drawAll(places) {
    const mine = ++drawing;
    document.documentElement.dataset.ready = "false";
    for (const place of places) {
      if (mine !== drawing) return;
      await draw(place);
    }
    document.documentElement.dataset.ready = "true";
  }

  const charts = () => document.querySelectorAll(".chart");

  // --- legends ---

  function series(node, found) {
    if (node && typeof node === "object") {
      if (node.field === "label" && node.scale && node.scale.domain) {
        node.scale.domain.forEach((name, at) => {
          const mine = found.get(name) || {};
          const value = node.scale.range[at];
          found.set(name, Array.isArray(value) ? { ...mine, dash: value } : String(value).startsWith("#") ? { ...mine, colour: value } : mine);
        });
      }
      Object.values(node).forEach((inner) => series(inner, found));
    }
    return found;
  }

  function swatch({ colour, dash }) {
    const name = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(name, "svg");
    const line = document.createElementNS(name, "line");
    const of = { x1: 1, x2: 29, y1: 5, y2: 5, stroke: inColours(colour), "stroke-width": 2.5, "stroke-dasharray": (dash || []).join(" ") };
    Object.entries(of).forEach(([key, value]) => line.setAttribute(key, value));
    Object.entries({ width: 30, height: 10, "aria-hidden": "true" }).forEach(([key, value]) => svg.setAttribute(key, value));
    svg.append(line);
    return svg;
  }

  function legends() {
    for (const legend of document.querySelectorAll("[data-legend]")) {
      const mine = [...document.querySelectorAll(`.chart[data-view="${legend.dataset.legend}"]`)];
      const found = new Map();
      mine.forEach((place) => series(data.charts[place.dataset.chart], found));
      legend.replaceChildren(...[...found].map(([name, of]) => {
        const button = document.createElement("button");
        button.type = "button";
        button.setAttribute("aria-pressed", String(!hidden.has(name)));
        button.title = "show or hide";
        button.append(swatch(of), name);
        button.addEventListener("click", () => {
          if (!hidden.delete(name)) hidden.add(name);
          for (const other of document.querySelectorAll(".legend button")) {
            if (other.textContent === name) other.setAttribute("aria-pressed", String(!hidden.has(name)));
          }
          drawAll(charts());
        });
        return button;
      }));
    }
  }

  function all() {
    legends();
    return drawAll(charts());
  }

  dark.addEventListener("change", all);
  narrow.addEventListener("change", all);
  // Paper is white.
  addEventListener("beforeprint", () => { if (dark.matches) { printing = true; all(); } });
  addEventListener("afterprint", () => { if (printing) { printing = false; all(); } });
  all();
})();
