// Image list of a report: filters, sorts, pages, ticks. Names are set as text only, never as markup.
"use strict";

const report = (() => {
  // Positions in a row of data/rows-*.js; stpp/report/build.py writes them.
  const KEY = 0, LABELLING = 1, RELIABILITY = 2, CONFIDENCE = 3, IGNORED = 4, WIDTH = 5, HEIGHT = 6, PICTURE = 7, SHARES = 8;
  const PAGE = 48;
  const rows = [], ticked = new Set();
  let facts, view = [], page = 0, seed = 1;

  const at = (id) => document.getElementById(id);

  function element(name, text, className) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function shareOf(row, classId) {
    const shares = row[SHARES];
    for (let i = 0; i < shares.length; i += 2) if (shares[i] === classId) return shares[i + 1];
    return 0;
  }

  // Pseudo-random number from 0 to 1 by row position and seed: the same draw until "Draw again".
  function lot(place) {
    let h = Math.imul(place + 1, 0x9e3779b1) ^ Math.imul(seed, 0x85ebca6b);
    h = Math.imul(h ^ (h >>> 16), 0xc2b2ae35);
    return ((h ^ (h >>> 13)) >>> 0) / 4294967296;
  }

  function bound(id, otherwise) {
    const value = parseFloat(at(id).value);
    return Number.isFinite(value) ? value : otherwise;
  }

  function choose() {
    const text = at("search").value.toLowerCase(), labelling = at("labelling").value, classText = at("class").value;
    const classId = classText === "" ? -1 : Number(classText), least = bound("least", 0);
    const [lowR, highR] = [bound("reliability-low", -1), bound("reliability-high", 2)];
    const [lowC, highC] = [bound("confidence-low", -1), bound("confidence-high", 2)];
    const [lowI, highI] = [bound("ignored-low", -1) / 100, bound("ignored-high", 200) / 100];
    const needsReliability = at("reliability-low").value !== "" || at("reliability-high").value !== "";
    const pictured = at("pictured").checked, onlyTicked = at("only-ticked").checked;
    view = [];
    rows.forEach((row, place) => {
      const r = row[RELIABILITY];
      if (r === null ? needsReliability : r < lowR || r > highR) return;
      if (row[CONFIDENCE] < lowC || row[CONFIDENCE] > highC || row[IGNORED] < lowI || row[IGNORED] > highI) return;
      if (pictured && row[PICTURE] < 0 || onlyTicked && !ticked.has(row[KEY])) return;
      if (labelling !== "" && row[LABELLING] !== Number(labelling)) return;
      if (classId >= 0 && shareOf(row, classId) < least) return;
      if (text && !row[KEY].toLowerCase().includes(text)) return;
      view.push(place);
    });
    const most = Math.max(1, bound("number", 50));
    if (at("show").value === "random") view = view.sort((a, b) => lot(a) - lot(b)).slice(0, most);
    sort(classId);
    if (at("show").value === "worst") view = view.slice(0, most);
    page = 0;
    draw();
  }

  function sort(classId) {
    const by = at("sort").value, sign = at("order").value === "up" ? 1 : -1;
    const value = {
      reliability: (row) => row[RELIABILITY], confidence: (row) => row[CONFIDENCE], ignored: (row) => row[IGNORED],
      class: (row) => classId < 0 ? null : shareOf(row, classId), key: (row) => row[KEY],
    }[by];
    // Rows without a value come last in either order; equal values are sorted by name.
    view.sort((a, b) => {
      const [x, y] = [value(rows[a]), value(rows[b])];
      if (x === y) return a - b;
      if (x === null || y === null) return x === null ? 1 : -1;
      return sign * (x < y ? -1 : 1);
    });
  }

  function draw() {
    const pages = Math.max(1, Math.ceil(view.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    at("cards").replaceChildren(...view.slice(page * PAGE, (page + 1) * PAGE).map((place) => card(rows[place])));
    at("place").textContent = `${view.length} of ${rows.length} images, page ${page + 1} of ${pages}`;
    at("previous").disabled = page === 0;
    at("next").disabled = page === pages - 1;
    count();
  }

  function card(row) {
    const made = element("article", undefined, "card");
    made.tabIndex = 0;
    made.dataset.key = row[KEY];
    made.append(row[PICTURE] < 0 ? element("div", "not drawn", "none") : pictures(row));
    const name = element("h3");
    name.append(element("bdi", row[KEY]));
    const tick = element("label"), box = element("input");
    box.type = "checkbox";
    box.checked = ticked.has(row[KEY]);
    box.addEventListener("change", () => mark(made, box.checked));
    tick.append(box, " tick");
    made.classList.toggle("ticked", box.checked);
    made.append(name, figures(row), tick);
    return made;
  }

  function picture(row, kind, className, alt) {
    const made = element("img", undefined, className);
    made.loading = "lazy";
    made.alt = alt;
    made.src = `pictures/${row[PICTURE]}${kind}`;
    return made;
  }

  // Missing pictures: too few ignored pixels at this size, or labels of an older version without a confidence map.
  function optional(image) {
    image.addEventListener("error", () => image.remove());
    return image;
  }

  function pictures(row) {
    const views = element("div", undefined, "views"), stack = element("div", undefined, "stack");
    stack.append(picture(row, ".jpg", "", ""), picture(row, "-classes.png", "layer classes", "class overlay"));
    if (row[IGNORED] > 0) {
      stack.append(optional(picture(row, "-ignored.png", "layer ignored", "ignored pixels")));
    }
    views.append(picture(row, ".jpg", "", "the image"), stack,
      optional(picture(row, "-confidence.jpg", "confidence", "confidence of the label, dark where low")));
    return views;
  }

  function figures(row) {
    const list = element("dl");
    const add = (term, text) => list.append(element("dt", term), element("dd", text));
    if (row[RELIABILITY] !== null) {
      const known = facts.threshold !== null;
      add("reliability", row[RELIABILITY].toFixed(3) + (known ? row[RELIABILITY] >= facts.threshold ? ", reliable" : ", not reliable" : ""));
    }
    add("mean confidence", row[CONFIDENCE].toFixed(3));
    add("ignored", (100 * row[IGNORED]).toFixed(1) + " %");
    const shares = [];
    for (let i = 0; i < row[SHARES].length; i += 2) shares.push([row[SHARES][i + 1], facts.classes[row[SHARES][i]]]);
    shares.sort((a, b) => b[0] - a[0]);
    const most = shares.slice(0, 4).map(([share, name]) => `${name} ${share} %`).join(", ");
    add("classes", most + (shares.length > 4 ? ` and ${shares.length - 4} more` : ""));
    add("size", `${row[WIDTH]}×${row[HEIGHT]}`);
    if (facts.labellings.length > 1) add("labels", facts.labellings[row[LABELLING]]);
    return list;
  }

  function mark(made, on) {
    ticked[on ? "add" : "delete"](made.dataset.key);
    made.classList.toggle("ticked", on);
    made.querySelector("input").checked = on;
    remember();
    count();
  }

  function count() {
    at("ticked-count").textContent = `${ticked.size} ticked`;
    at("save").disabled = at("untick").disabled = ticked.size === 0;
  }

  // Ticks persist across reloads if the browser allows storage for local pages.
  const slot = () => `stpp-report ${facts.id}`;
  function remember() {
    try { localStorage.setItem(slot(), JSON.stringify([...ticked])); } catch { /* not allowed */ }
  }
  function recall() {
    try { for (const key of JSON.parse(localStorage.getItem(slot())) || []) ticked.add(key); } catch { /* nothing stored */ }
  }

  function save() {
    const link = element("a");
    link.href = URL.createObjectURL(new Blob([[...ticked].sort().join("\n") + "\n"], {type: "text/plain"}));
    link.download = "exclude.txt";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  function turn(by) {
    page += by;
    draw();
    at("images").scrollIntoView();
    const first = at("cards").firstElementChild;
    if (first) first.focus({preventScroll: true});
  }

  function pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("select, textarea, input:not([type=checkbox])");
    if (typing) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const focused = document.activeElement && document.activeElement.closest(".card");
    const actions = {
      ArrowRight: () => focused && (focused.nextElementSibling || focused).focus(),
      ArrowLeft: () => focused && (focused.previousElementSibling || focused).focus(),
      x: () => focused && mark(focused, !ticked.has(focused.dataset.key)),
      n: () => turn(1), p: () => turn(-1), "/": () => at("search").focus(),
    };
    if (Object.hasOwn(actions, event.key)) {
      actions[event.key]();
      event.preventDefault();
    }
  }

  function option(select, value, text) {
    const made = element("option", text);
    made.value = value;
    at(select).append(made);
  }

  function defaults() {
    if (!rows.some((row) => row[RELIABILITY] !== null)) at("sort").value = "confidence";
  }

  function start() {
    facts = JSON.parse(at("facts").textContent);
    if (!at("cards")) return;
    facts.labellings.forEach((name, i) => option("labelling", i, name));
    facts.classes.forEach((name, i) => option("class", i, name));
    defaults();
    recall();
    at("controls").addEventListener("submit", (event) => event.preventDefault());
    at("controls").addEventListener("input", choose);
    at("again").addEventListener("click", () => { seed += 1; at("show").value = "random"; choose(); });
    at("reset").addEventListener("click", () => { at("controls").reset(); defaults(); choose(); });
    at("previous").addEventListener("click", () => turn(-1));
    at("next").addEventListener("click", () => turn(1));
    at("save").addEventListener("click", save);
    at("untick").addEventListener("click", () => { ticked.clear(); remember(); draw(); });
    at("opacity").addEventListener("input", () => at("cards").style.setProperty("--opacity", at("opacity").value / 100));
    for (const layer of ["ignored", "confidence"]) {
      const box = at(`show-${layer}`);
      box.addEventListener("input", () => at("cards").classList.toggle(`hide-${layer}`, !box.checked));
    }
    document.addEventListener("keydown", pressed);
    choose();
  }

  document.addEventListener("DOMContentLoaded", start);
  return {add: (more) => { for (const row of more) rows.push(row); }};
})();
