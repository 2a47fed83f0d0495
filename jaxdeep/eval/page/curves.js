"use strict";
// Small charts of metrics, as SVG elements made one by one.

const WIDTH = 300, HEIGHT = 96, BUCKETS = 300;

/** A number as a person wants to read it. */
function number(x) {
  if (x === null || x === undefined) return "–";
  if (Number.isInteger(x)) return x.toLocaleString("en");
  const size = Math.abs(x);
  return size < 1e-3 || size >= 1e7 ? x.toExponential(2) : String(Number(x.toPrecision(4)));
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** The points of a curve; of many, the lowest and the highest of each bucket. */
function points(steps, values) {
  const known = steps.map((step, i) => [step, values[i]]).filter(([, y]) => typeof y === "number");
  if (known.length <= 2 * BUCKETS) return known;
  const out = [], size = known.length / BUCKETS;
  for (let b = 0; b < BUCKETS; b++) {
    const part = known.slice(Math.floor(b * size), Math.floor((b + 1) * size));
    let low = part[0], high = part[0];
    for (const point of part) {
      if (point[1] < low[1]) low = point;
      if (point[1] > high[1]) high = point;
    }
    out.push(...(low[0] <= high[0] ? [low, high] : [high, low]));
  }
  return out;
}

/** One metric of all runs: title, lines, and what is under the pointer. */
function chart(name, runs, open) {
  const curves = runs.map((run) => points(run.metrics.steps, run.metrics.values[name] || []));
  const all = curves.flat();
  const range = (i) => all.reduce(([a, b], p) => [Math.min(a, p[i]), Math.max(b, p[i])], [Infinity, -Infinity]);
  const [[x0, x1], [y0, y1]] = [range(0), range(1)];
  const x = (step) => (x1 > x0 ? ((step - x0) / (x1 - x0)) * WIDTH : WIDTH / 2);
  const y = (value) => (y1 > y0 ? HEIGHT - ((value - y0) / (y1 - y0)) * HEIGHT : HEIGHT / 2);
  const lines = curves.map((curve, i) =>
    curve.length === 1
      ? svg("circle", { cx: x(curve[0][0]), cy: y(curve[0][1]), r: 2.5, class: `dot run${i}` })
      : svg("path", { class: `line run${i}`, d: curve.map((p, n) => `${n ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("") }));
  const cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT, visibility: "hidden" });
  const last = curves.map((curve) => (curve.length ? number(curve[curve.length - 1][1]) : "–"));
  const told = el("output", {}, ...last.map((text, i) => el("b", { class: `run${i}` }, text)));
  const plot = svg("svg", { viewBox: `0 -3 ${WIDTH} ${HEIGHT + 6}`, preserveAspectRatio: "none", role: "img", "aria-label": `${name}: ${last.join(", ")}` }, ...lines, cursor);
  const at = (event) => {
    const box = plot.getBoundingClientRect();
    const step = x0 + ((event.clientX - box.left) / box.width) * (x1 - x0);
    return curves.map((curve) => curve.reduce((best, p) => (Math.abs(p[0] - step) < Math.abs(best[0] - step) ? p : best), curve[0] || [NaN, null]));
  };
  plot.addEventListener("pointermove", (event) => {
    const near = at(event);
    const step = near.find((p) => p[1] !== null)[0];
    cursor.setAttribute("x1", x(step));
    cursor.setAttribute("x2", x(step));
    cursor.setAttribute("visibility", "visible");
    told.replaceChildren(`step ${step} `, ...near.map((p, i) => el("b", { class: `run${i}` }, number(p[1]))));
  });
  plot.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    told.replaceChildren(...last.map((text, i) => el("b", { class: `run${i}` }, text)));
  });
  plot.addEventListener("click", (event) => open(at(event).find((p) => p[1] !== null)[0]));
  return el("figure", { class: "chart" },
    el("figcaption", {}, el("span", {}, name), told), plot,
    el("div", { class: "axis" }, el("span", {}, `${number(y0)} to ${number(y1)}`), el("span", {}, `steps ${x0} to ${x1}`)));
}

/** All metrics, by what stands before the first slash; each is drawn when it comes into sight. */
function curves(runs, open) {
  const groups = new Map();
  for (const run of runs) {
    for (const name of Object.keys(run.metrics.values)) {
      const prefix = name.includes("/") ? name.slice(0, name.indexOf("/")) : "other";
      if (!groups.has(prefix)) groups.set(prefix, new Set());
      groups.get(prefix).add(name);
    }
  }
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((e) => e.isIntersecting)) {
      seen.unobserve(entry.target);
      entry.target.replaceWith(chart(entry.target.dataset.name, runs, open));
    }
  }, { rootMargin: "300px" });
  return [...groups].map(([prefix, names]) => {
    const charts = [...names].map((name) => el("div", { class: "chart", "data-name": name }));
    charts.forEach((node) => seen.observe(node));
    return el("details", { class: "curves", open: "" }, el("summary", {}, prefix, el("small", {}, ` ${names.size}`)), el("div", { class: "charts" }, charts));
  });
}
