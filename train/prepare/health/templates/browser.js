"use strict";
// The caption browser. Texts of the set reach the page as text nodes alone; the corrections live here until they are exported.
(() => {
const data = JSON.parse(document.getElementById("captions").textContent);
const $ = (id) => document.getElementById(id);
const PAGE = 48;
const plain = (text) => text.normalize("NFKC").toLowerCase().replaceAll("_", " ").replace(/\s+/g, " ").trim();
const forms = data.texts.map(plain);
const every = (one) => [one.fixed, one.flex, one.tail, one.prose, ...one.variants.flat()].flat();
const byKey = new Map(data.pictures.map((one) => [one.key, one]));

// Changes: key -> (plain tag -> {tag, change}); `before` are those of the file that the set was prepared with.
const changes = new Map(), before = new Map();
const mark = (key, tag, change) => JSON.stringify([key, plain(tag), change]);
function set(key, tag, change) {
  const mine = changes.get(key) || new Map();
  if (change) mine.set(plain(tag), {tag, change}); else mine.delete(plain(tag));
  if (mine.size) changes.set(key, mine); else changes.delete(key);
}
function restart() {
  changes.clear();
  for (const [key, tag, change] of data.corrections) set(key, tag, change);
}
for (const [key, tag, change] of data.corrections) before.set(mark(key, tag, change), true);
const changeOf = (key, tag) => changes.get(key)?.get(plain(tag))?.change;
const rows = () => [...changes].flatMap(([key, mine]) => [...mine.values()].map((one) => [key, one.tag, one.change]));

function make(kind, options = {}, ...inside) {
  const node = document.createElement(kind);
  for (const [name, value] of Object.entries(options)) if (name in node) node[name] = value; else node.setAttribute(name, value);
  node.append(...inside);
  return node;
}

// What a stage with that many tokens reads: the last flexible tags go first, as in training, here in the written order.
function cutOf(one, limit) {
  const parts = [...one.fixed.map((at) => [at, 0]), ...one.flex.map((at) => [at, 1]), ...[...one.tail, ...one.prose.slice(0, 1)].map((at) => [at, 2])];
  const size = (list) => list.reduce((sum, [at], place) => sum + (place + 1 < list.length ? data.tokens[at] : data.bare[at]), 0);
  const cut = new Set();
  let kept = parts;
  while (size(kept) > limit) {
    const flexible = kept.map(([, kind]) => kind).lastIndexOf(1);
    const gone = flexible < 0 ? kept.length - 1 : flexible;
    if (kept.length <= 1) break;
    cut.add(kept[gone][0]);
    kept = kept.filter((_, place) => place !== gone);
  }
  return {cut, total: size(parts)};
}

// Which pictures: every term must hold. A term is a tag of the set or a key, else a part of tags or keys; "-" in front: none of it.
function asked() {
  return $("find").value.split(",").map((term) => term.trim()).filter(Boolean).map((term) => {
    const without = term.startsWith("-") && !forms.includes(plain(term)), word = plain(without ? term.slice(1) : term);
    const exact = forms.flatMap((form, at) => form === word ? [at] : []);
    const near = exact.length || !word ? exact : forms.flatMap((form, at) => form.includes(word) ? [at] : []);
    return {word, without, key: byKey.has(term) ? term : null, exact: exact.length > 0, at: new Set(near)};
  }).filter((term) => term.word);
}
const has = (one, term) => term.key ? one.key === term.key : every(one).some((at) => term.at.has(at)) || (!term.exact && one.key.toLowerCase().includes(term.word));
const filters = {
  "all pictures": () => true,
  ...Object.fromEntries((data.tokens ? [75, 150, 225] : []).map((limit) => [`over ${limit} tokens`, (one) => cutOf(one, limit).total > limit])),
  "near-duplicates": (one) => one.near,
  "without fixed part": (one) => !one.fixed.length,
  "empty captions": (one) => !every(one).length,
  ...Object.fromEntries(data.stages.map((stage, at) => [`selected for ${stage}`, (one) => one.stages.includes(at)])),
  "in no selection": (one) => !one.stages.length,
  "corrected": (one) => changes.has(one.key),
};

let found = [], shown = 0;
function search() {
  const terms = asked(), only = filters[$("only").value];
  found = data.pictures.filter((one) => only(one) && terms.every((term) => has(one, term) !== term.without));
  if ($("only").value === "near-duplicates") found.sort((a, b) => a.near - b.near);
  $("found").textContent = `${found.length.toLocaleString("en")} of ${data.pictures.length.toLocaleString("en")} pictures`
    + terms.map((term) => ` ${term.without ? "without" : "with"} ${term.exact ? `the tag “${term.word}”` : `“${term.word}” in a tag or in their name`}`).join(" and");
  related(terms);
  const one = terms.length === 1 && terms[0].exact && !terms[0].without ? terms[0] : null;
  $("bulk").hidden = !one || !found.length;
  $("dropall").textContent = one ? `Drop “${one.word}” from ${found.length === 1 ? "this picture" : `these ${found.length.toLocaleString("en")} pictures`}` : "";
  shown = 0;
  $("cards").replaceChildren();
  more();
}
function related(terms) {
  const counts = new Map(), loose = terms.filter((term) => !term.exact && !term.without).flatMap((term) => [...term.at]);
  for (const one of found) for (const at of new Set([...one.fixed, ...one.flex, ...one.tail])) counts.set(at, (counts.get(at) || 0) + 1);
  const first = [...counts].filter(([at]) => !loose.length || loose.includes(at)).sort((a, b) => b[1] - a[1]).slice(0, 16);
  $("nearby").replaceChildren(...first.map(([at, count]) => make("button", {
    type: "button", className: "tag", onclick: () => { $("find").value = data.texts[at]; search(); },
  }, data.texts[at], make("small", {}, ` ${count}`))));
}
function more() {
  $("cards").append(...found.slice(shown, shown + PAGE).map(card));
  shown = Math.min(shown + PAGE, found.length);
  $("more").hidden = shown >= found.length;
  $("more").textContent = `Show more (${(found.length - shown).toLocaleString("en")} left)`;
}

function card(one) {
  const limit = Number($("limit").value), {cut, total} = data.tokens ? cutOf(one, limit) : {cut: new Set(), total: null};
  const redraw = () => { frame.replaceWith(card(one)); tell(); };
  const chip = (at) => {
    const text = data.texts[at], dropped = changeOf(one.key, text) === "drop", lost = cut.has(at);
    if (one.policy.includes(at)) return make("span", {className: `tag policy${lost ? " cut" : ""}`, title: "from the policy: score, rating or date"}, text);
    return make("button", {
      type: "button", className: `tag${dropped ? " dropped" : ""}${lost ? " cut" : ""}`, "aria-pressed": String(dropped),
      title: `${dropped ? "dropped: click to keep" : "click to drop"}${lost ? `; cut at ${limit} tokens` : ""}`,
      onclick: () => { set(one.key, text, dropped ? null : "drop"); redraw(); },
    }, text);
  };
  const mine = [...(changes.get(one.key)?.values() || [])], written = new Set(every(one).map((at) => forms[at]));
  const away = mine.filter(({tag, change}) => change === "drop" && !written.has(plain(tag)))
    .map(({tag}) => make("button", {type: "button", className: "tag dropped", "aria-pressed": "true", title: "dropped: click to keep", onclick: () => { set(one.key, tag, null); redraw(); }}, tag));
  const added = mine.filter(({change}) => change === "add")
    .map(({tag}) => make("button", {type: "button", className: "tag added", title: "added: click to take it back", onclick: () => { set(one.key, tag, null); redraw(); }}, `+ ${tag}`));
  const split = one.fixed.length ? [...one.fixed.map(chip), make("span", {className: "bar3", title: "the fixed part ends here"}, "|||")] : [];
  const box = make("input", {placeholder: "add a tag", "aria-label": `add a tag to ${one.key}`, autocomplete: "off", spellcheck: false});
  box.addEventListener("keydown", (event) => {
    const tag = box.value.trim();
    if (event.key !== "Enter" || !tag || /[,\n]/.test(tag) || tag.includes(data.separator)) return;
    if (changeOf(one.key, tag) === "drop") set(one.key, tag, null);
    else if (!written.has(plain(tag))) set(one.key, tag, "add");
    redraw();
  });
  const facts = [total === null ? "" : `${total} tokens`, one.stages.map((at) => data.stages[at]).join(", ") || "in no selection"].filter(Boolean).join(" · ");
  const group = one.near ? [" · ", make("button", {type: "button", className: "link", onclick: () => alike(one)}, "near-duplicates")] : [];
  const picture = one.thumb ? make("img", {src: `data:image/jpeg;base64,${one.thumb}`, alt: ""}) : make("span", {className: "hidden"}, "not shown");
  const frame = make("article", {className: "card", "data-key": one.key},
    make("div", {className: "thumb"}, picture),
    make("div", {className: "said"},
      make("code", {}, one.key), make("p", {className: "note"}, facts, ...group),
      make("p", {className: "tags"}, ...split, ...one.flex.map(chip), ...one.tail.map(chip), ...added.filter((node) => !written.has(plain(node.textContent.slice(2)))), ...away),
      ...one.prose.map((at) => make("p", {className: "prose"}, chip(at))),
      ...one.variants.map((parts) => make("p", {className: "tags", title: "another caption of the same picture"}, make("small", {}, "or: "), ...parts.flat().map(chip))),
      box));
  return frame;
}
function alike(one) {
  found = data.pictures.filter((other) => other.near === one.near);
  $("found").textContent = `${found.length} pictures that look alike`;
  $("bulk").hidden = true;
  shown = 0;
  $("cards").replaceChildren();
  more();
}

function tell() {
  const now = rows(), kept = now.filter((row) => before.has(mark(...row))).length;
  const fresh = now.length - kept, gone = before.size - kept;
  $("changes").hidden = !now.length && !gone;
  $("count").textContent = [`${now.length} corrections`, fresh ? `${fresh} new` : "", gone ? `${gone} taken back` : ""].filter(Boolean).join(", ");
  $("undo").hidden = !fresh && !gone;
}
const quoted = (cell) => /[",\n\r]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell;
function written() {
  const sorted = rows().map((row) => row.map(quoted).join(",")).sort();
  return ["key,tag,change", ...sorted].join("\n") + "\n";
}
function download() {
  const url = URL.createObjectURL(new Blob([written()], {type: "text/csv"}));
  make("a", {href: url, download: "corrections.csv"}).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
  exported = written();
}
let exported = null;
function bulk(change) {
  const [term] = asked();
  for (const one of found) {
    const at = every(one).find((place) => term.at.has(place));
    if (!one.policy.includes(at)) set(one.key, data.texts[at], change);
  }
  const until = shown;
  shown = 0;
  $("cards").replaceChildren();
  while (shown < until) more();
  tell();
}

restart();
$("only").append(...Object.keys(filters).map((name) => make("option", {}, name)));
const uses = new Map();
for (const one of data.pictures) for (const at of every(one)) uses.set(at, (uses.get(at) || 0) + 1);
$("known").append(...[...uses].sort((a, b) => b[1] - a[1]).slice(0, 500).map(([at]) => make("option", {value: data.texts[at]})));
if (!data.tokens) $("limit").parentElement.hidden = true;
let waiting = 0;
$("find").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 120); });
$("only").addEventListener("change", search);
$("limit").addEventListener("change", search);
$("more").addEventListener("click", more);
$("dropall").addEventListener("click", () => bulk("drop"));
$("keepall").addEventListener("click", () => bulk(null));
$("export").addEventListener("click", download);
$("undo").addEventListener("click", () => { restart(); search(); tell(); });
// Without a click a browser refuses to ask, and says so on its console.
addEventListener("beforeunload", (event) => {
  if (!$("undo").hidden && exported !== written() && navigator.userActivation?.hasBeenActive) event.preventDefault();
});
$("browser").hidden = false;
search();
tell();
})();
