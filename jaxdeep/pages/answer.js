"use strict";
// The levels of a report, and the source of a claim beside it. Everything is made as text nodes.

const AROUND = 3000; // characters of a source before and after a place that are shown
const $ = (id) => document.getElementById(id);
const claims = [...document.querySelectorAll("a.claim")];
const levels = [...document.querySelectorAll("details.node")];
const beside = $("beside");
let chosen = -1, opener = null;

function element(tag, text) {
  const node = document.createElement(tag);
  node.append(text);
  return node;
}

/** Opens every level that hides an element; what is in a summary is not hidden by its own level. */
function unfold(node) {
  for (let at = node.parentElement; at; at = at.parentElement)
    if (at.tagName === "DETAILS" && !at.querySelector(":scope > summary").contains(node)) at.open = true;
}

/** Shows the place that a link leads to, with the cited words marked, beside the report. */
function show(link) {
  const place = $(link.getAttribute("href").slice(1));
  if (!place) return;
  for (const claim of claims) claim.classList.toggle("chosen", claim === link);
  const [status, title, note, links, text] = [".status", "h2", ".note", ".links", ".text"].map((s) => beside.querySelector(s));
  const said = place.querySelector(".status"), out = place.querySelector(".out"), why = place.querySelector(".note");
  status.textContent = said.textContent;
  status.className = said.className;
  title.textContent = out.textContent;
  note.textContent = why ? why.textContent : "";
  links.replaceChildren();
  if (out.tagName === "A") {
    const open = out.cloneNode(false);
    open.textContent = place.dataset.source ? "open the page at this place" : "open the page";
    links.append(open);
  }
  text.replaceChildren();
  if (place.dataset.source) {
    const whole = $(place.dataset.source).querySelector("pre").textContent;
    const start = Number(place.dataset.start), end = Number(place.dataset.end);
    const from = Math.max(0, start - AROUND), to = Math.min(whole.length, end + AROUND);
    const marked = element("mark", whole.slice(start, end));
    text.append((from ? "… " : "") + whole.slice(from, start), marked, whole.slice(end, to) + (to < whole.length ? " …" : ""));
    beside.hidden = false;
    beside.scrollTop = Math.max(0, marked.offsetTop - beside.clientHeight / 3);
  }
  beside.hidden = false;
  opener = link;
}

function close() {
  beside.hidden = true;
  for (const claim of claims) claim.classList.remove("chosen");
  if (opener) opener.focus();
  opener = null;
}

function move(by) {
  if (!claims.length) return;
  const here = claims.indexOf(document.activeElement);
  chosen = here >= 0 ? here + by : chosen < 0 ? (by > 0 ? 0 : claims.length - 1) : chosen + by;
  chosen = Math.min(Math.max(chosen, 0), claims.length - 1);
  unfold(claims[chosen]);
  claims[chosen].focus();
  if (!beside.hidden) show(claims[chosen]);
}

function toggle() {
  const open = levels.some((level) => !level.open);
  for (const level of levels) level.open = open;
  $("all").setAttribute("aria-pressed", String(open));
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a.claim, a.number");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  show(link);
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  if (event.key === "j") move(1);
  else if (event.key === "k") move(-1);
  else if (event.key === "o") toggle();
  else if (event.key === "?") $("keys").showModal();
  else if (event.key === "Escape") close();
});

$("all").addEventListener("click", toggle);
$("help").addEventListener("click", () => $("keys").showModal());
$("close").addEventListener("click", close);

let folded = [];
window.addEventListener("beforeprint", () => {
  folded = levels.filter((level) => !level.open);
  for (const level of folded) level.open = true;
});
window.addEventListener("afterprint", () => {
  for (const level of folded) level.open = false;
});
