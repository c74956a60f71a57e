"use strict";
// What is under the pointer, in numbers. All of them are in the page.
for (const figure of document.querySelectorAll("figure.chart")) {
  const svg = figure.querySelector("svg[data-left]"), tip = figure.querySelector(".tip");
  const data = JSON.parse(figure.querySelector("script").textContent);
  const cursor = figure.querySelector(".cursor");
  const { left, right, first, last } = Object.fromEntries(Object.entries(svg.dataset).map(([k, v]) => [k, Number(v)]));

  const nearest = (xs, step) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] <= step) low = middle; else high = middle;
    }
    return Math.abs(xs[high] - step) < Math.abs(xs[low] - step) ? high : low;
  };
  const ofLines = (step) => {
    const rows = data.filter((line) => line.x.length).map((line) => {
      const i = nearest(line.x, step);
      const range = line.low && line.low[i] !== line.high[i] ? `, from ${line.low[i]} to ${line.high[i]}` : "";
      return `${line.name}: ${line.y[i]}${range} (step ${line.x[i]})`;
    });
    return rows.join("\n");
  };
  const ofCells = (step, y) => {
    const row = Math.floor((y - data.top) / data.row);
    const column = data.edges.findIndex((edge, i) => step >= edge && step < data.edges[i + 1]);
    if (row < 0 || row >= data.rows.length || column < 0) return "";
    const value = data.cells[row][column];
    const where = data.columns.length ? data.columns[column] : `from step ${data.edges[column]}`;
    return `${data.rows[row]}\n${where}: ${value === null ? "not measured" : value}`;
  };

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    const step = first + (x - left) / (right - left) * (last - first);
    const text = x < left || x > right ? "" : Array.isArray(data) ? ofLines(step) : ofCells(step, y);
    tip.hidden = !text;
    tip.textContent = text;
    const home = figure.getBoundingClientRect();
    const place = event.clientX - home.left;
    tip.style.left = `${place > home.width / 2 ? place - tip.offsetWidth - 12 : place + 12}px`;
    tip.style.top = `${event.clientY - home.top + 14}px`;
    if (cursor) {
      cursor.style.visibility = text ? "visible" : "hidden";
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
    }
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    if (cursor) cursor.style.visibility = "hidden";
  });
}
