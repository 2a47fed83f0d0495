"use strict";
// One rollout, or two of the same task: every token as a piece of text with a colour.

const FOLDED = new Set(["system", "call", "result"]);
const KEPT = 6; // scripts of tokens that are held
const held = [];
let cells = []; // what is shown: tokens, their texts, their elements

const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value || 0)), 1e-9);

/** The tokens of a rollout; only a few scripts of them are held. */
async function tokensOf(run, key, rollout) {
  const name = `${run.index}/${key}/${rollout.chunk}`;
  const chunk = await load(name);
  if (!held.includes(name)) held.push(name);
  if (held.length > KEPT) asked.delete(held.shift());
  return chunk[rollout.place];
}

/** The record of a run that has the task: of the same name, else of the nearest step. */
function beside(run, key, task) {
  const having = run.records.filter((record) => record.tasks.includes(task));
  return having.find((r) => r.key === key) || nearest(having, records().find((r) => r.key === key).step);
}

async function rolloutPage(key, index, id, other, mine) {
  const record = runs[index] && recordOf(runs[index], key);
  const tasks = record ? await load(`${index}/${key}/index`) : [];
  const task = tasks.find((each) => each.rollouts.some((rollout) => rollout.id === id));
  if (!task) throw new Error("there is no such rollout");
  const place = task.rollouts.findIndex((rollout) => rollout.id === id);
  const sides = [{ run: runs[index], record, rollout: task.rollouts[place], among: tasks.flatMap((t) => t.rollouts) }];
  const second = runs[1 - index], its = second && beside(second, key, task.task);
  if (its) {
    const theirs = await load(`${second.index}/${its.key}/index`);
    const among = theirs.find((each) => each.task === task.task).rollouts;
    const rollout = among.find((each) => each.id === other) || among[Math.min(place, among.length - 1)];
    sides.push({ run: second, record: its, rollout, among });
  }
  for (const side of sides) {
    side.words = await load(`${side.run.index}/vocabulary`);
    side.data = await tokensOf(side.run, side.record.key, side.rollout);
  }
  if (mine !== state.page) return;
  cells = [];
  show(`rollout ${id}`, [el("a", { href: path(key) }, titleOf(record)), `rollout ${id}`],
    el("h1", {}, task.question || task.task),
    el("p", { class: "quiet" }, [task.task, ...task.answers].join(" · ")),
    el("div", { class: "sides" }, sides.map(column)));
  state.move = (by, inOther) => {
    const side = sides[inOther ? 1 : 0];
    const next = side && side.among[side.among.indexOf(side.rollout) + by];
    if (next) location.hash = inOther ? path(key, index, id, next.id) : path(key, index, next.id);
  };
  paint();
  if (state.find) mark(state.find.toLowerCase());
}

function column({ run, record, rollout, among, data, words }) {
  const cell = { rollout, data, text: textOf(data, words), spans: [], parts: [] };
  cell.sampled = new Int32Array(data.ids.length).fill(-1); // the number of a token among the sampled ones
  cell.scale = { advantage: largest(among.map((each) => each.advantage)), gap: largest(data.gaps || []) };
  let start = 0, sampled = 0;
  for (const [end, own, kind, label] of data.parts) {
    if (own) for (let at = start; at < end; at++) cell.sampled[at] = sampled++;
    cell.parts.push(part(cell, start, end, own ? "policy" : "world", kind, label));
    start = end;
  }
  cells.push(cell);
  const { stop, failure, reward, advantage, tokens, seed, policy } = rollout;
  const facts = { stop, failure, reward, ...rollout.rewards, advantage, tokens, sampled, ...rollout.metrics, seed, policy };
  const said = Object.entries(facts).filter(([, value]) => value !== "");
  const name = runs.length > 1 ? `${run.name}, ${titleOf(record)}, rollout ${rollout.id}` : `rollout ${rollout.id}`;
  return el("article", { class: `side run${run.index}` }, el("h2", {}, name),
    el("dl", { class: "facts" }, said.map(([term, value]) => el("div", {}, el("dt", {}, term),
      el("dd", {}, typeof value === "string" ? value.replaceAll("_", " ") : number(value))))),
    el("p", { class: "legend" }), el("div", { class: "rolled" }, cell.parts.map((each) => each.node)));
}

/** Tokens that are shown as one, or the heading of a branch; what is folded is filled when it is opened. */
function part(cell, start, end, who, kind, label) {
  if (kind === "branch") return { start, end, fill: () => null, node: el("h3", { class: "branch" }, label) };
  const body = el("div", { class: "tokens" });
  const fill = () => body.childNodes.length || body.append(...spans(cell, start, end));
  const title = [el("b", {}, kind === "text" ? who : kind), ` ${label}`, el("small", {}, ` ${end - start}`)];
  const attributes = { class: `part ${who} ${kind}`, toggle: fill };
  if (FOLDED.has(kind)) return { start, end, fill, node: el("details", attributes, el("summary", {}, title), body) };
  fill();
  const head = end - start > 6 ? el("div", { class: "who" }, title) : null;
  return { start, end, fill, node: el("div", attributes, head, body) };
}

function spans(cell, start, end) {
  return cell.text.slice(start, end).map((text, i) => {
    const span = document.createElement("span");
    span.textContent = text;
    span.cell = cell;
    span.at = start + i;
    if (/^\s*\n\s*$/.test(text)) span.className = "line";
    cell.spans[start + i] = span;
    shade(span);
    return span;
  });
}

/** The colour of a sampled token: a hue, and a strength from 0 to 1. */
function hue({ rollout, data, scale }, own) {
  const gap = data.gaps ? data.gaps[own] : 0;
  switch ($("colour").value) {
    case "mask": return [rollout.advantage === null ? "idle" : "own", 0.4];
    case "advantage": return [rollout.advantage > 0 ? "up" : "down", Math.abs(rollout.advantage || 0) / scale.advantage];
    case "probability": return ["down", Math.min(1, -data.logps[own] / 5000)];
    default: return [gap > 0 ? "up" : "down", Math.abs(gap) / scale.gap];
  }
}

function shade(span) {
  const own = span.cell.sampled[span.at];
  const [name, strength] = own < 0 ? ["", 0] : hue(span.cell, own);
  span.classList.remove("up", "down", "own", "idle");
  if (strength < 0.005) return;
  span.classList.add(name);
  span.style.setProperty("--s", strength.toFixed(2));
}

/** Colours all that is shown, and says what the colours mean. */
function paint() {
  const key = (name, text) => [el("i", { class: name }, "   "), text];
  document.querySelectorAll(".legend").forEach((legend, i) => {
    const { rollout, data, scale } = cells[i];
    const said = {
      mask: [...key("own", "the policy's, learned"), ...key("idle", "the policy's, not learned"), "plain: the world's"],
      advantage: rollout.advantage === null ? ["it has no part in the loss"]
        : [...key("up", "pushed up"), ...key("down", "pushed down"), `full colour: ${number(scale.advantage)}`],
      probability: [...key("down", "unlikely to the sampler"), "full colour: 0.7 % or less"],
      gap: data.gaps ? [...key("up", "likelier to the trainer"), ...key("down", "likelier to the sampler"),
        `full colour: ${number(scale.gap / 1e6)} nats`] : ["no gaps are stored for it: it was not trained on"],
    };
    legend.replaceChildren(...said[$("colour").value].map((each) => el("span", {}, each)));
  });
  for (const cell of cells) cell.spans.forEach(shade);
}

/** Marks where a text is, unfolds that, and goes to the first place. */
function mark(text) {
  for (const cell of cells) {
    const whole = cell.text.join("").toLowerCase(), begins = [0];
    for (const each of cell.text) begins.push(begins[begins.length - 1] + each.length);
    for (let at = whole.indexOf(text); at >= 0; at = whole.indexOf(text, at + text.length)) {
      const first = begins.findIndex((begin) => begin > at) - 1;
      const last = begins.findIndex((begin) => begin >= at + text.length);
      for (const { fill, node } of cell.parts.filter((each) => each.start < last && each.end > first)) {
        fill();
        node.open = true;
      }
      cell.spans.slice(first, last).forEach((span) => span.classList.add("hit"));
    }
  }
  document.querySelector(".hit")?.scrollIntoView({ block: "center" });
}

/** Says all that is known of the token under the pointer. */
function tell({ target: { cell, at } }) {
  if (!cell) return;
  const { data, rollout } = cell, own = cell.sampled[at];
  const parts = [`token ${at}`, JSON.stringify(cell.text[at]), `id ${data.ids[at]}`];
  if (own >= 0) {
    parts.push(`p ${number(Math.exp(data.logps[own] / 1e3))}`, `log p ${number(data.logps[own] / 1e3)}`);
    if (data.gaps) parts.push(`trainer minus sampler ${number(data.gaps[own] / 1e6)}`);
    parts.push(rollout.advantage === null ? "not learned" : `advantage ${number(rollout.advantage)}`);
  }
  $("info").textContent = parts.join("   ");
  $("info").hidden = false;
}
