"use strict";
// Small charts of metrics, as SVG elements made one by one.

const WIDTH = 300, HEIGHT = 96; // of a chart, in units of its own
const BUCKETS = 300; // more points than two in each are not drawn

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

/** What a metric is declared to mean, with its unit, and what to do when it looks wrong as its tooltip. */
function meaning(name, tag) {
  const known = runs.map((run) => run.meanings[name]).find(Boolean);
  if (!known) return el(tag, { class: "means" }, "");
  const [unit, means, advice] = known;
  return el(tag, { class: "means", title: advice || means }, unit ? `${unit}: ${means}` : means);
}

/** One metric of all runs: title, lines, and what is under the pointer. */
function chart(name, runs, open) {
  const every = runs.map((run) => points(run.metrics.steps, run.metrics.values[name] || []));
  const range = (i) => {
    const values = every.flat().map((point) => point[i]);
    return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  };
  const [[x0, x1], [y0, y1]] = [range(0), range(1)];
  const x = (step) => (x1 > x0 ? ((step - x0) / (x1 - x0)) * WIDTH : WIDTH / 2);
  const y = (value) => (y1 > y0 ? HEIGHT - ((value - y0) / (y1 - y0)) * HEIGHT : HEIGHT / 2);
  const lines = every.map((known, i) => {
    const d = known.map(([step, value], n) => `${n ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    return svg("path", { class: `line run${i}`, d: known.length === 1 ? `${d}h0.1` : d });
  });
  const cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT, visibility: "hidden" });
  const said = (chosen) => chosen.map((point, i) => el("b", { class: `run${i}` }, number(point?.[1])));
  const last = every.map((known) => known[known.length - 1]);
  const output = el("output", {}, said(last));
  const box = { viewBox: `0 -3 ${WIDTH} ${HEIGHT + 6}`, preserveAspectRatio: "none", role: "img", "aria-label": name };
  const plot = svg("svg", box, ...lines, cursor);
  const under = (event) => {
    const { left, width } = plot.getBoundingClientRect();
    const step = x0 + ((event.clientX - left) / width) * (x1 - x0);
    const closer = (best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best);
    return every.map((known) => (known.length ? known.reduce(closer) : undefined));
  };
  plot.addEventListener("pointermove", (event) => {
    const chosen = under(event), [step] = chosen.find(Boolean);
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, x(step));
    cursor.setAttribute("visibility", "visible");
    output.replaceChildren(`step ${step} `, ...said(chosen));
  });
  plot.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    output.replaceChildren(...said(last));
  });
  plot.addEventListener("click", (event) => open(under(event).find(Boolean)[0]));
  return el("figure", { class: "chart" }, el("figcaption", {}, el("span", {}, name), output), plot,
    el("div", { class: "axis" }, el("span", {}, `${number(y0)} to ${number(y1)}`), el("span", {}, `steps ${x0} to ${x1}`)),
    meaning(name, "p"));
}

/** All metrics, by what stands before the first slash; each is drawn when it comes into sight. */
function curves(runs, open) {
  const names = new Set(runs.flatMap((run) => Object.keys(run.metrics.values)));
  const groups = Map.groupBy(names, (name) => (name.includes("/") ? name.slice(0, name.indexOf("/")) : "other"));
  const seen = new IntersectionObserver((entries) => {
    for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
      seen.unobserve(target);
      target.replaceWith(chart(target.dataset.name, runs, open));
    }
  }, { rootMargin: "300px" });
  return [...groups].map(([prefix, among]) => {
    const places = among.map((name) => el("div", { class: "chart", "data-name": name }));
    places.forEach((place) => seen.observe(place));
    return el("details", { class: "curves", open: "" },
      el("summary", {}, prefix, el("small", {}, ` ${among.length}`)), el("div", { class: "charts" }, places));
  });
}
