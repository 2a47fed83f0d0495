"use strict";
// Pages over the scripts that jaxdeep.eval.view writes. What a run says becomes text, never markup, and the
// names of scripts are made of what runs.js and run.js list, never of what is in the address.

const COLOURS = ["mask", "advantage", "probability", "gap"];
const FOLDED = new Set(["system", "call", "result"]);
const KEPT = 6; // scripts of tokens that are held
const HITS = 200;

const store = new Map(), held = [];
const $ = (id) => document.getElementById(id);
let runs = [], cells = [], find = "", pages = 0;

/** What every script of data calls. */
function view(key, payload) {
  store.set(key, payload);
}

function load(key) {
  if (store.has(key)) return Promise.resolve(store.get(key));
  return new Promise((resolve, reject) => {
    const script = el("script", { src: `${key}.js` });
    script.onload = () => (script.remove(), resolve(store.get(key)));
    script.onerror = () => reject(new Error(`${key}.js cannot be read: make these pages again`));
    document.head.append(script);
  });
}

/** The tokens of a rollout; only a few scripts of them are held. */
async function tokensOf(run, key, told) {
  const name = `${run.index}/${key}/${told.chunk}`;
  const chunk = await load(name);
  if (!held.includes(name)) held.push(name);
  if (held.length > KEPT) store.delete(held.shift());
  return chunk[told.place];
}

/** An element; strings among its children become text. */
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const recordOf = (run, key) => run.records.find((record) => record.key === key);
const titleOf = (record) => (record.step === null ? "evaluation" : `step ${record.step}`);
const path = (...parts) => `#/${parts.map(encodeURIComponent).join("/")}`;
const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);
const rewardsOf = (rollouts) => rollouts.map((r) => r.reward).filter((r) => r !== null);

/** The record of a run to put beside one of another: of the same name, else the nearest with the task. */
function beside(run, key, task) {
  const same = recordOf(run, key);
  if (same && (task === undefined || same.tasks.includes(task))) return same;
  const step = (runs[0].records.concat(runs[1].records).find((r) => r.key === key) || {}).step;
  const having = run.records.filter((r) => r.step !== null && r.tasks.includes(task));
  return having.sort((a, b) => Math.abs(a.step - step) - Math.abs(b.step - step))[0];
}

// Pages. Each is given a place of its own in the order of visits, and stops when another one was begun.

function show(title, trail, ...content) {
  document.title = `${title} · ${runs.map((run) => run.name).join(" and ")}`;
  $("path").replaceChildren(el("a", { href: "#/" }, runs.map((run) => run.name).join(" | ")), ...trail.flatMap((part) => [" › ", part]));
  $("main").replaceChildren(...content.flat());
}

function home() {
  const open = (step) => {
    const steps = runs.flatMap((run) => run.records).filter((record) => record.step !== null);
    steps.sort((a, b) => Math.abs(a.step - step) - Math.abs(b.step - step));
    if (steps.length) location.hash = path(steps[0].key);
  };
  const keys = new Map(runs.flatMap((run) => run.records.map((record) => [record.key, record])));
  const steps = [...keys.values()].sort((a, b) => (a.step ?? -1) - (b.step ?? -1));
  show("curves", [],
    el("section", { class: "runs" }, runs.map((run, i) => el("div", {}, el("h1", { class: `run${i}` }, run.name), el("p", { class: "quiet" }, run.path),
      run.config && el("details", {}, el("summary", {}, "configuration"), el("pre", {}, run.config))))),
    steps.length ? el("h2", {}, "Rollouts") : null,
    el("nav", { class: "steps" }, steps.map((record) => el("a", { class: "item", href: path(record.key), "data-text": titleOf(record) }, titleOf(record),
      runs.map((run, i) => el("b", { class: `run${i}` }, number((recordOf(run, record.key) || {}).reward)))))),
    el("h2", {}, "Metrics"), curves(runs, open));
}

function metricsAt(step) {
  const names = new Set(runs.flatMap((run) => Object.keys(run.metrics.values)));
  const value = (run, name) => (run.metrics.values[name] || [])[run.metrics.steps.indexOf(step)];
  return el("details", {}, el("summary", {}, "metrics of this step"), el("table", {}, [...names].map((name) =>
    el("tr", {}, el("th", {}, name), runs.map((run) => el("td", {}, number(value(run, name))))))));
}

/** One line about a rollout, which opens it. */
function row(run, key, told) {
  const facts = [told.stop.replaceAll("_", " "), `${number(told.metrics.turns ?? 0)} turns`, `${number(told.tokens)} tokens`];
  return el("a", { class: "item rollout", href: path(key, run.index, told.id) },
    el("b", { class: "reward", style: null }, number(told.reward)),
    el("span", { class: told.advantage > 0 ? "up" : told.advantage < 0 ? "down" : "quiet" }, told.advantage === null ? "left out" : `${told.advantage > 0 ? "+" : ""}${number(told.advantage)}`),
    el("span", { class: told.truncated || told.failure ? "bad" : "quiet" }, facts.join(" · ")),
    el("span", { class: "said" }, told.failure || told.said));
}

async function recordPage(key, mine) {
  const record = runs.map((run) => recordOf(run, key)).find(Boolean);
  if (!record) return show("not there", [], el("p", {}, "There is no such step."));
  const loaded = await Promise.all(runs.map((run) => (recordOf(run, key) ? load(`${run.index}/${key}/index`) : [])));
  if (mine !== pages) return;
  const groups = new Map();
  loaded.forEach((tasks, i) => tasks.forEach((task) => {
    if (!groups.has(task.task)) groups.set(task.task, { ...task, sides: runs.map(() => []) });
    groups.get(task.task).sides[i] = task.rollouts;
  }));
  show(titleOf(record), [titleOf(record)],
    el("h1", {}, titleOf(record), el("small", {}, ` ${groups.size} tasks`)), record.step === null ? null : metricsAt(record.step),
    [...groups.values()].map((group) => el("section", { class: "group card" },
      el("h2", {}, group.question || group.task), el("p", { class: "quiet" }, [group.task, ...group.answers].join(" · ")),
      el("div", { class: "sides" }, group.sides.map((rollouts, i) => el("div", { class: `side run${i}` },
        el("p", { class: "quiet" }, runs.length > 1 ? `${runs[i].name}: ` : "", rollouts.length ? `mean reward ${number(mean(rewardsOf(rollouts)))} of ${rollouts.length}` : "not in this step"),
        rollouts.map((told) => row(runs[i], key, told))))))));
  filter();
}

async function rolloutPage(key, index, id, other, mine) {
  const run = runs[index], record = run && recordOf(run, key);
  const tasks = record ? await load(`${index}/${key}/index`) : [];
  const task = tasks.find((t) => t.rollouts.some((r) => r.id === id));
  if (!task) return show("not there", [], el("p", {}, "There is no such rollout."));
  const sides = [{ run, key, told: task.rollouts.find((r) => r.id === id), among: tasks.flatMap((t) => t.rollouts) }];
  const second = runs[1 - index], its = second && beside(second, key, task.task);
  if (its) {
    const among = (await load(`${second.index}/${its.key}/index`)).find((t) => t.task === task.task).rollouts;
    const place = Math.min(task.rollouts.findIndex((r) => r.id === id), among.length - 1);
    sides.push({ run: second, key: its.key, told: among.find((r) => r.id === other) || among[place], among });
  }
  const words = await load(`${index}/vocabulary`);
  for (const side of sides) side.words = side.run === run ? words : await load(`${side.run.index}/vocabulary`);
  for (const side of sides) side.data = await tokensOf(side.run, side.key, side.told);
  if (mine !== pages) return;
  cells = [];
  const most = Math.max(1e-9, ...sides.flatMap((s) => s.among.map((r) => Math.abs(r.advantage || 0))));
  show(`rollout ${id}`, [el("a", { href: path(key) }, titleOf(record)), `rollout ${id}`],
    el("h1", {}, task.question || task.task), el("p", { class: "quiet" }, [task.task, ...task.answers].join(" · ")),
    el("div", { class: "sides" }, sides.map((side) => column(side, most))));
  $("main").dataset.sides = JSON.stringify(sides.map((s) => ({ key: s.key, index: s.run.index, id: s.told.id, ids: s.among.map((r) => r.id) })));
  paint();
  if (find) mark(find.toLowerCase());
}

function column(side, most) {
  const { run, told, data, words, key } = side;
  const facts = { stop: told.stop, failure: told.failure, reward: told.reward, ...told.rewards, advantage: told.advantage === null ? "left out of the loss" : told.advantage,
    tokens: told.tokens, sampled: told.sampled, ...told.metrics, seed: told.seed };
  const cell = { told, data, words, most, text: data.ids.map((token, i) => data.texts[i] ?? words[token] ?? ""), spans: [], at: new Int32Array(data.ids.length).fill(-1), parts: [] };
  cell.gap = Math.max(1e-9, ...(data.gaps || []).map(Math.abs));
  let start = 0, sampled = 0;
  for (const [end, own, kind, label] of data.parts) {
    if (own) for (let i = start; i < end; i++) cell.at[i] = sampled++;
    const body = el("div", { class: "tokens" });
    const from = start;
    const fill = () => body.childNodes.length || body.append(...spansOf(cell, from, end));
    const who = own ? "policy" : "world";
    const title = [el("b", {}, kind === "text" ? who : kind), " ", label, el("small", {}, ` ${end - start}`)];
    const node = FOLDED.has(kind) ? el("details", { class: `part ${who} ${kind}`, toggle: fill }, el("summary", {}, title), body)
      : el("div", { class: `part ${who} ${kind}` }, end - start > 6 ? el("div", { class: "who" }, title) : null, body);
    if (!FOLDED.has(kind)) fill();
    cell.parts.push({ start, end, node, fill });
    start = end;
  }
  cells.push(cell);
  const name = runs.length > 1 ? `${run.name}, ${titleOf(recordOf(run, key))}, rollout ${told.id}` : `rollout ${told.id}`;
  return el("article", { class: `side run${run.index}` }, el("h2", {}, name),
    el("dl", { class: "facts" }, Object.entries(facts).filter(([, value]) => value !== "").map(([term, value]) =>
      el("div", {}, el("dt", {}, term), el("dd", {}, typeof value === "string" ? value.replaceAll("_", " ") : number(value))))),
    el("p", { class: "legend" }), el("div", { class: "rolled" }, cell.parts.map((part) => part.node)));
}

function spansOf(cell, start, end) {
  const made = [];
  for (let i = start; i < end; i++) {
    const span = document.createElement("span");
    span.textContent = cell.text[i];
    span.cell = cell;
    span.at = i;
    if (/^\s*\n\s*$/.test(cell.text[i])) span.className = "line";
    cell.spans[i] = span;
    shade(span);
    made.push(span);
  }
  return made;
}

/** The colour of a token: a hue and a strength from 0 to 1. */
function shade(span) {
  const { cell, at } = span, own = cell.at[at], learned = cell.told.advantage;
  let hue = "", strength = 0;
  if (own >= 0) {
    const gap = cell.data.gaps && cell.data.gaps[own];
    switch ($("colour").querySelector("select").value) {
      case "mask": [hue, strength] = [learned === null ? "idle" : "own", 0.4]; break;
      case "advantage": [hue, strength] = [learned > 0 ? "up" : "down", Math.abs(learned || 0) / cell.most]; break;
      case "probability": [hue, strength] = ["down", Math.min(1, -cell.data.logps[own] / 5000)]; break;
      case "gap": [hue, strength] = [gap > 0 ? "up" : "down", Math.abs(gap || 0) / cell.gap]; break;
    }
  }
  span.classList.remove("up", "down", "own", "idle");
  if (hue && strength > 0.004) {
    span.classList.add(hue);
    span.style.setProperty("--s", strength.toFixed(2));
  }
}

function paint() {
  const colour = $("colour").querySelector("select").value;
  document.querySelectorAll(".legend").forEach((legend, i) => {
    const { told, data, gap, most } = cells[i];
    const key = (hue, text) => [el("i", { class: hue, "data-full": "" }, "   "), ` ${text} `];
    const said = {
      mask: [key("own", "written by the policy and learned"), key("idle", "written by the policy, not learned"), "plain: the world's"],
      advantage: told.advantage === null ? ["left out of the loss"] : [key("up", "pushed up"), key("down", "pushed down"), `full colour: ${number(most)}`],
      probability: [key("down", "unlikely to the sampler"), "full colour: below e⁻⁵ = 0.7 %"],
      gap: data.gaps ? [key("up", "likelier to the trainer"), key("down", "likelier to the sampler"), `full colour: ${number(gap / 1e6)} nats`] : ["nothing is stored: it was not trained on"],
    }[colour];
    legend.replaceChildren(...said.flat(2));
  });
  cells.forEach((cell) => cell.spans.forEach(shade));
}

/** Marks where a text is in the tokens that are shown, and goes to the first. */
function mark(text) {
  let first = null;
  for (const cell of cells) {
    const whole = cell.text.join("").toLowerCase();
    const begin = [];
    cell.text.reduce((sum, part, i) => ((begin[i] = sum), sum + part.length), 0);
    for (let at = whole.indexOf(text); at >= 0; at = whole.indexOf(text, at + text.length)) {
      for (const part of cell.parts) {
        for (let i = part.start; i < part.end; i++) {
          if (begin[i] >= at + text.length || begin[i] + cell.text[i].length <= at) continue;
          part.fill();
          part.node.open = true;
          cell.spans[i].classList.add("hit");
          first = first || cell.spans[i];
        }
      }
    }
  }
  if (first) first.scrollIntoView({ block: "center" });
}

/** Reads the tokens of every rollout, of one record or of all, one script at a time. */
async function searchPage(query, key, mine) {
  const text = query.toLowerCase(), found = el("div", { class: "card" }), state = el("p", { class: "quiet", role: "status" });
  show("search", [key ? el("a", { href: path(key) }, key) : "all steps", `“${query}”`], el("h1", {}, `“${query}”`), state, found);
  find = query;
  let seen = 0, hits = 0;
  const within = runs.flatMap((run) => run.records.filter((r) => !key || r.key === key).map((record) => ({ run, record })));
  const all = within.reduce((sum, { record }) => sum + record.count, 0);
  for (const { run, record } of within) {
    const words = await load(`${run.index}/vocabulary`);
    const tasks = await load(`${run.index}/${record.key}/index`);
    const rollouts = tasks.flatMap((task) => task.rollouts.map((told) => ({ told, task }))).sort((a, b) => a.told.id - b.told.id);
    let name = "";
    for (const { told, task } of rollouts) {
      const next = `${run.index}/${record.key}/${told.chunk}`;
      if (name && name !== next && !held.includes(name)) store.delete(name);
      name = next;
      const { ids, texts } = (await load(name))[told.place];
      if (mine !== pages) return;
      let whole = "";
      for (let i = 0; i < ids.length; i++) whole += texts[i] ?? words[ids[i]] ?? "";
      const at = whole.toLowerCase().indexOf(text);
      if (at >= 0 && hits++ < HITS) {
        found.append(el("a", { class: "item hitline", href: path(record.key, run.index, told.id) }, el("b", { class: `run${run.index}` }, `${titleOf(record)}, ${told.id}`), ` ${task.question} `,
          el("span", { class: "said" }, whole.slice(Math.max(0, at - 60), at), el("mark", {}, whole.slice(at, at + text.length)), whole.slice(at + text.length, at + text.length + 120))));
      }
      state.textContent = `${hits} of ${++seen} rollouts have it; ${all - seen} to read${hits > HITS ? `; the first ${HITS} are shown` : ""}`;
    }
    if (name && !held.includes(name)) store.delete(name);
  }
  state.dataset.done = "";
}

function filter() {
  const words = $("search").querySelector("input").value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const item of document.querySelectorAll("main .item:not(.hitline)")) {
    const group = item.closest(".group");
    const text = `${group ? group.querySelector("h2").textContent : ""} ${item.textContent}`.toLowerCase();
    item.hidden = !words.every((word) => text.includes(word));
  }
  for (const group of document.querySelectorAll(".group")) group.hidden = words.length > 0 && !group.querySelector(".item:not([hidden])");
}

async function route() {
  const mine = ++pages;
  const [first, ...rest] = location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  cells = [];
  delete $("main").dataset.sides;
  $("info").hidden = true;
  document.body.dataset.page = first === "search" ? "search" : rest.length ? "rollout" : first ? "record" : "home";
  if (document.body.dataset.page !== "rollout") find = "";
  try {
    if (first === "search") await searchPage(rest[0] || "", rest[1] || "", mine);
    else if (rest.length) await rolloutPage(first, Number(rest[0]), Number(rest[1]), Number(rest[2] ?? -1), mine);
    else if (first) await recordPage(first, mine);
    else home();
  } catch (error) {
    show("trouble", [], el("p", { class: "bad" }, String(error.message || error)));
  }
  document.body.dataset.ready = String(mine);
  if (!find) window.scrollTo(0, 0);
}

// What people do.

function tell(event) {
  const span = event.target;
  if (!span.cell) return;
  const { cell, at } = span, own = cell.at[at], { data, told } = cell;
  const parts = [`token ${at}`, JSON.stringify(cell.text[at]), `id ${data.ids[at]}`];
  if (own < 0) parts.push("the world's");
  else {
    const logp = data.logps[own] / 1e3, gap = data.gaps && data.gaps[own] / 1e6;
    parts.push(`sampled with p ${number(Math.exp(logp))}, log ${number(logp)}`);
    if (gap !== null) parts.push(`trainer ${gap < 0 ? "" : "+"}${number(gap)}`);
    parts.push(told.advantage === null ? "not learned" : `advantage ${number(told.advantage)}`);
  }
  $("info").textContent = parts.join("   ");
  $("info").hidden = false;
}

/** Moves to the next or previous of what the page is about. */
function move(by, other) {
  const sides = JSON.parse($("main").dataset.sides || "[]");
  if (sides.length) {
    const side = sides[other ? 1 : 0];
    if (!side) return;
    const id = side.ids[side.ids.indexOf(side.id) + by];
    if (id === undefined) return;
    location.hash = other ? path(sides[0].key, sides[0].index, sides[0].id, id) : path(side.key, side.index, id);
    return;
  }
  const items = [...document.querySelectorAll("main .item:not([hidden])")];
  const next = items[Math.min(Math.max(items.indexOf(document.activeElement) + by, 0), items.length - 1)];
  if (next) next.focus();
}

function moveStep(by) {
  const [key] = location.hash.replace(/^#\/?/, "").split("/");
  const keys = [...new Set(runs.flatMap((run) => run.records.map((record) => record.key)))].sort();
  const next = keys[keys.indexOf(key) + by];
  if (next) location.hash = path(next);
}

function up() {
  const parts = location.hash.replace(/^#\/?/, "").split("/");
  location.hash = parts.length > 1 && parts[0] !== "search" ? `#/${parts[0]}` : "#/";
}

const KEYS = {
  j: () => move(1), k: () => move(-1), J: () => move(1, true), K: () => move(-1, true),
  l: () => moveStep(1), h: () => moveStep(-1), u: up,
  c: () => {
    const select = $("colour").querySelector("select");
    select.value = COLOURS[(COLOURS.indexOf(select.value) + 1) % COLOURS.length];
    paint();
  },
  o: () => {
    const all = [...document.querySelectorAll(".rolled details")], open = all.some((node) => !node.open);
    all.forEach((node) => (node.open = open));
  },
  "/": () => $("search").querySelector("input").focus(),
  "?": () => $("keys").showModal(),
};

async function begin() {
  const count = await load("runs");
  for (let index = 0; index < count; index++) runs.push({ ...(await load(`${index}/run`)), index });
  $("colour").addEventListener("change", paint);
  $("help").addEventListener("click", KEYS["?"]);
  $("main").addEventListener("pointerover", tell);
  $("main").addEventListener("click", tell);
  $("search").addEventListener("input", filter);
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    const query = $("search").querySelector("input").value;
    const [key] = location.hash.replace(/^#\/?/, "").split("/");
    if (query) location.hash = path("search", query, ...(key && key !== "search" ? [key] : []));
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (KEYS[event.key]) {
      event.preventDefault();
      KEYS[event.key]();
    }
  });
  window.addEventListener("hashchange", route);
  route();
}

begin();
