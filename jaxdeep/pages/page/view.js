"use strict";
// Pages over the scripts that jaxdeep.pages.view writes. What a run says becomes text, never markup, and the
// names of scripts are made of what runs.js and run.js list, never of what is in the address.

const HITS = 200; // of a search, at most, that are shown
const AHEAD = 4; // scripts that a search asks for before it needs them

const payloads = new Map(), asked = new Map(); // what scripts of data have said, and promises of it
const runs = [];
const state = { page: 0, find: "", move: null };
const $ = (id) => document.getElementById(id);

/** What every script of data calls. */
function view(key, payload) {
  payloads.set(key, payload);
}

/** What the script of that name says; it stays until it is dropped from `asked`. */
function load(key) {
  if (!asked.has(key)) {
    asked.set(key, new Promise((resolve, reject) => {
      const script = el("script", { src: `${key}.js` });
      script.onload = () => (script.remove(), resolve(payloads.get(key)), payloads.delete(key));
      script.onerror = () => reject(new Error(`${key}.js cannot be read: make these pages again`));
      document.head.append(script);
    }));
  }
  return asked.get(key);
}

/** An element; strings among its children become text, functions among its attributes listen. */
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children.flat(2).filter((child) => child !== null && child !== undefined));
  return node;
}

/** A number as a person wants to read it. */
function number(x) {
  if (x === null || x === undefined) return "–";
  if (Number.isInteger(x)) return x.toLocaleString("en");
  const size = Math.abs(x);
  return size < 1e-3 || size >= 1e7 ? x.toExponential(2) : String(Number(x.toPrecision(4)));
}

const here = () => location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
const path = (...parts) => `#/${parts.map(encodeURIComponent).join("/")}`;
const recordOf = (run, key) => run.records.find((record) => record.key === key);
const titleOf = (record) => (record.step === null ? "evaluation" : `step ${record.step}`);
const textOf = (chunk, words) => chunk.ids.map((id, i) => chunk.texts[i] ?? words[id] ?? "");

/** All records by name, in order: of two runs with the same step, that of the first. */
function records() {
  const every = new Map(runs.toReversed().flatMap((run) => run.records.map((record) => [record.key, record])));
  return [...every.values()].sort((a, b) => (a.step ?? -1) - (b.step ?? -1));
}

function nearest(among, step) {
  return among.filter((r) => r.step !== null).sort((a, b) => Math.abs(a.step - step) - Math.abs(b.step - step))[0];
}

function show(title, trail, ...content) {
  const names = runs.map((run) => run.name);
  document.title = `${title} · ${names.join(" and ")}`;
  $("path").replaceChildren(el("a", { href: "#/" }, names.join(" | ")), ...trail.flatMap((part) => [" › ", part]));
  $("main").replaceChildren(...content.flat());
}

function homePage() {
  const open = (step) => {
    const record = nearest(records(), step);
    if (record) location.hash = path(record.key);
  };
  const rewards = (key) => runs.map((run, i) => el("b", { class: `run${i}` }, number(recordOf(run, key)?.reward)));
  show("curves", [],
    el("section", { class: "runs" }, runs.map((run, i) => el("div", {},
      el("h1", { class: `run${i}` }, run.name), el("p", { class: "quiet" }, run.path),
      run.config ? el("details", {}, el("summary", {}, "configuration"), el("pre", {}, run.config)) : null))),
    records().length ? el("h2", {}, "Rollouts ", el("small", {}, "by step, with their mean reward")) : "",
    el("nav", { class: "steps" }, records().map((record) =>
      el("a", { class: "item", href: path(record.key) }, titleOf(record), rewards(record.key)))),
    runs.some((run) => run.metrics.steps.length) ? el("h2", {}, "Metrics") : "", curves(runs, open));
}

function metricsAt(step) {
  const names = new Set(runs.flatMap((run) => Object.keys(run.metrics.values)));
  const value = (run, name) => run.metrics.values[name]?.[run.metrics.steps.indexOf(step)];
  const heads = ["metric", ...(runs.length > 1 ? runs.map((run) => run.name) : ["value"]), "what it is"];
  return el("details", {}, el("summary", {}, "metrics of this step"), el("table", {},
    el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head))),
    [...names].map((name) => el("tr", {}, el("th", { scope: "row" }, name),
      runs.map((run) => el("td", {}, number(value(run, name)))), meaning(name, "td")))));
}

/** What stands in the lines below, one word a column. */
function heads() {
  return el("div", { class: "rollout heads" },
    ["reward", "advantage", "stop · turns · tokens", "last answer, or the failure"].map((head) => el("span", {}, head)));
}

/** One line about a rollout, which opens it. */
function line(run, key, rollout) {
  const { turns } = rollout.metrics;
  const facts = [rollout.stop.replaceAll("_", " "), `${number(turns)} turns`, `${number(rollout.tokens)} tokens`];
  const sign = rollout.advantage > 0 ? "+" : "";
  const about = { "data-stop": rollout.stop, "data-reward": rollout.reward ?? "" };
  return el("a", { class: "item rollout", href: path(key, run.index, rollout.id), ...about },
    el("b", {}, number(rollout.reward)),
    el("span", { class: rollout.advantage > 0 ? "up" : rollout.advantage < 0 ? "down" : "quiet" },
      rollout.advantage === null ? "" : sign + number(rollout.advantage)),
    el("span", { class: rollout.truncated || rollout.failure ? "bad" : "quiet" }, facts.join(" · ")),
    el("span", { class: "said" }, rollout.failure || rollout.said));
}

async function recordPage(key, mine) {
  const record = records().find((each) => each.key === key);
  if (!record) throw new Error("there is no such step");
  const loaded = await Promise.all(runs.map((run) => (recordOf(run, key) ? load(`${run.index}/${key}/index`) : [])));
  if (mine !== state.page) return;
  const groups = new Map();
  loaded.forEach((tasks, i) => tasks.forEach((task) => {
    if (!groups.has(task.task)) groups.set(task.task, { ...task, sides: runs.map(() => []) });
    groups.get(task.task).sides[i] = task.rollouts;
  }));
  const mean = (rollouts) => {
    const known = rollouts.filter((rollout) => rollout.reward !== null);
    return number(known.length ? known.reduce((sum, rollout) => sum + rollout.reward, 0) / known.length : null);
  };
  const side = (rollouts, i) => el("div", { class: `side run${i}` },
    el("p", { class: "quiet" }, runs.length > 1 ? `${runs[i].name}: ` : "",
      rollouts.length ? `mean reward ${mean(rollouts)} of ${rollouts.length}` : "not in this step"),
    rollouts.length ? heads() : "", rollouts.map((rollout) => line(runs[i], key, rollout)));
  offerStops(loaded.flat().flatMap((task) => task.rollouts.map((rollout) => rollout.stop)));
  show(titleOf(record), [titleOf(record)],
    el("h1", {}, titleOf(record), el("small", {}, ` ${groups.size} tasks`)),
    record.step === null ? "" : metricsAt(record.step),
    el("p", { class: "quiet", id: "shown", role: "status" }),
    [...groups.values()].map((group) => el("section", { class: "group card" },
      el("h2", {}, group.question || group.task),
      el("p", { class: "quiet" }, [group.task, ...group.answers].join(" · ")),
      el("div", { class: "sides" }, group.sides.map(side)))));
  filter();
}

/** Reads the tokens of every rollout, of one record or of all, one script after the other. */
async function searchPage(query, key, mine) {
  const found = el("div", { class: "card" }), status = el("p", { class: "quiet", role: "status" });
  const within = runs.flatMap((run) => run.records.filter((r) => !key || r.key === key).map((record) => ({ run, record })));
  const where = key && within.length ? el("a", { href: path(key) }, titleOf(within[0].record)) : "all steps";
  show("search", [where, `“${query}”`], el("h1", {}, `“${query}”`), status, found);
  state.find = query;
  const all = within.reduce((sum, { record }) => sum + record.count, 0);
  let seen = 0, hits = 0;
  for (const { run, record } of within) {
    const words = await load(`${run.index}/vocabulary`);
    const tasks = await load(`${run.index}/${record.key}/index`);
    const names = (n) => `${run.index}/${record.key}/${n}`;
    const every = tasks.flatMap((task) => task.rollouts.map((rollout) => ({ task, rollout })));
    const by = Map.groupBy(every, ({ rollout }) => rollout.chunk);
    for (let n = 0; by.has(n); n++) {
      for (let next = n; by.has(next) && next <= n + AHEAD; next++) load(names(next)).catch(() => null);
      const chunk = await load(names(n));
      if (mine !== state.page) return;
      for (const { task, rollout } of by.get(n).sort((a, b) => a.rollout.id - b.rollout.id)) {
        const whole = textOf(chunk[rollout.place], words).join("");
        const at = whole.toLowerCase().indexOf(query.toLowerCase());
        if (at < 0 || hits++ >= HITS) continue;
        const end = at + query.length;
        const around = [whole.slice(Math.max(0, at - 60), at), whole.slice(end, end + 120)];
        found.append(el("a", { class: "item hitline", href: path(record.key, run.index, rollout.id) },
          el("b", { class: `run${run.index}` }, `${titleOf(record)}, ${rollout.id}`), ` ${task.question}`,
          el("p", {}, around[0], el("mark", {}, whole.slice(at, end)), around[1])));
      }
      asked.delete(names(n));
      seen += by.get(n).length;
      status.textContent = `${hits} of ${seen} rollouts have it; ${all - seen} to read`
        + (hits > HITS ? `; the first ${HITS} are shown` : "");
    }
  }
  status.dataset.done = "";
}

/** The reasons of stops to choose from: those of this page, and the one that is chosen. */
function offerStops(present) {
  const chosen = $("stop").value, every = [...new Set([...present, ...(chosen ? [chosen] : [])])].sort();
  $("stop").replaceChildren(el("option", { value: "" }, "any"),
    ...every.map((stop) => el("option", { value: stop }, stop.replaceAll("_", " "))));
  $("stop").value = chosen;
}

/** Whether a line is of the rewards and the stop that are asked for. A rollout without a reward is in no range. */
function wanted({ dataset }) {
  const [least, most] = [$("least"), $("most")].map((input) => input.valueAsNumber);
  const reward = dataset.reward === "" ? NaN : Number(dataset.reward);
  if ($("stop").value && dataset.stop !== $("stop").value) return false;
  return (Number.isNaN(least) || reward >= least) && (Number.isNaN(most) || reward <= most);
}

function filter() {
  const words = $("query").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const item of document.querySelectorAll("main .item:not(.hitline)")) {
    const text = `${item.closest(".group")?.querySelector("h2").textContent} ${item.textContent}`.toLowerCase();
    item.hidden = !words.every((word) => text.includes(word)) || ("stop" in item.dataset && !wanted(item));
  }
  for (const group of document.querySelectorAll(".group")) group.hidden = !group.querySelector(".item:not([hidden])");
  const all = document.querySelectorAll("main a.rollout"), seen = [...all].filter((item) => !item.hidden);
  if ($("shown")) $("shown").textContent = seen.length < all.length ? `${seen.length} of ${all.length} rollouts are shown` : "";
}

async function route() {
  const mine = ++state.page;
  const [first, ...rest] = here();
  const page = first === "search" ? "search" : rest.length ? "rollout" : first ? "record" : "home";
  state.move = null;
  if (page !== "rollout") state.find = "";
  $("info").hidden = true;
  document.body.dataset.page = page;
  try {
    if (page === "search") await searchPage(rest[0], rest[1] || "", mine);
    else if (page === "rollout") await rolloutPage(first, ...rest.slice(0, 2).map(Number), Number(rest[2] ?? -1), mine);
    else if (page === "record") await recordPage(first, mine);
    else homePage();
  } catch (error) {
    show("trouble", [], el("p", { class: "bad" }, String(error.message)));
  }
  document.body.dataset.ready = String(mine);
  if (!document.querySelector(".hit")) window.scrollTo(0, 0);
}

/** Goes to the next or previous of what the page is about: rollouts, or lines to choose from. */
function move(by, other) {
  if (state.move) return state.move(by, other);
  const items = [...document.querySelectorAll("main .item:not([hidden])")];
  items[Math.min(Math.max(items.indexOf(document.activeElement) + by, 0), items.length - 1)]?.focus();
}

function moveStep(by) {
  const keys = records().map((record) => record.key);
  const next = keys[keys.indexOf(here()[0]) + by];
  if (next) location.hash = path(next);
}

const KEYS = {
  j: () => move(1), k: () => move(-1), J: () => move(1, true), K: () => move(-1, true),
  l: () => moveStep(1), h: () => moveStep(-1),
  u: () => (location.hash = here().length > 1 && here()[0] !== "search" ? path(here()[0]) : "#/"),
  c: () => {
    $("colour").selectedIndex = ($("colour").selectedIndex + 1) % $("colour").length;
    paint();
  },
  o: () => {
    const all = [...document.querySelectorAll(".rolled details")], open = all.some((node) => !node.open);
    all.forEach((node) => (node.open = open));
  },
  "/": () => $("query").focus(),
  "?": () => $("keys").showModal(),
};

document.addEventListener("DOMContentLoaded", async () => {
  const count = await load("runs");
  for (let index = 0; index < count; index++) runs.push({ ...(await load(`${index}/run`)), index });
  $("colour").addEventListener("change", paint);
  $("help").addEventListener("click", KEYS["?"]);
  $("main").addEventListener("pointerover", tell);
  $("main").addEventListener("click", tell);
  for (const id of ["query", "least", "most", "stop"]) $(id).addEventListener("input", filter);
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    const [key] = here();
    if ($("query").value) location.hash = path("search", $("query").value, ...(key && key !== "search" ? [key] : []));
  });
  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT)$/.test(event.target.tagName);
    if (typing && event.key === "Escape") event.target.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey || $("keys").open || !KEYS[event.key]) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  window.addEventListener("hashchange", route);
  route();
});
