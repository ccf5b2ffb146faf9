// What the page gains by a script: the viewer, sorting and a filter. Without it all figures are there to read.
// Texts go from one element into another as text, never as markup.
"use strict";

(() => {
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // ---- tables: every table.sortable

  const value = (cell, kind) => {
    if (kind === "text") return cell.textContent.trim().toLocaleLowerCase();
    return cell.dataset.v === undefined ? NaN : Number(cell.dataset.v);
  };

  function sort(table, head, direction) {
    const body = table.tBodies[0];
    const column = head.cellIndex, kind = head.dataset.sort, sign = direction === "ascending" ? 1 : -1;
    const rows = [...body.rows].map((row) => [value(row.cells[column], kind), row]);
    const missing = (key) => kind !== "text" && Number.isNaN(key);
    // Equal rows keep their order, and what was not measured stays last whichever way.
    rows.sort(([a], [b]) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      return sign * (kind === "text" ? a.localeCompare(b) : a - b);
    });
    body.append(...rows.map(([, row]) => row));
    all("th[aria-sort]", table).forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", direction);
  }

  function makeSortable(table) {
    for (const head of all("thead th[data-sort]", table)) {
      const button = make("button", { type: "button" });
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        // The first click shows what lost most, or the alphabet's beginning; the next one the other end.
        sort(table, head, head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending");
      });
    }
  }

  function makeFilter(table) {
    const rows = [...table.tBodies[0].rows];
    const count = make("output", { textContent: `${rows.length} prompts` });
    const field = make("input", { type: "search", placeholder: "words of a prompt" });
    field.setAttribute("aria-label", "Show only prompts with these words");
    field.addEventListener("input", () => {
      const words = field.value.toLocaleLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const text = row.querySelector("th").textContent.toLocaleLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      count.textContent = words.length ? `${shown} of ${rows.length} prompts` : `${rows.length} prompts`;
    });
    return [field, count];
  }

  // Which of base, tuned and change a table of prompts shows: all would not fit on most screens.
  function makeColumns(table) {
    const choice = make("fieldset", { className: "choice" }, make("legend", { textContent: "columns" }));
    for (const [name, text] of [["delta", "change"], ["level", "base and tuned"], ["every", "all"]]) {
      const radio = make("input", { type: "radio", name: "columns", value: name, checked: name === "delta" });
      radio.addEventListener("change", () => { table.dataset.columns = name; });
      choice.append(make("label", {}, radio, make("span", { textContent: text })));
    }
    table.dataset.columns = "delta";
    return choice;
  }

  all("table.sortable").forEach(makeSortable);
  const table = document.querySelector("table.prompts");
  if (table) {
    const tools = make("div", { className: "tools" }, ...makeFilter(table));
    if (table.querySelector("td.level")) tools.append(makeColumns(table));
    table.closest(".scroll").before(tools);
  }

  // ---- the viewer: base and tuned laid over one another

  const viewer = document.querySelector(".viewer");
  const figures = new Map();
  for (const figure of all("figure[data-n]")) {
    if (!figures.has(figure.dataset.n)) figures.set(figure.dataset.n, figure);
  }
  if (!viewer || !figures.size) return;

  const stage = viewer.querySelector(".stage"), range = viewer.querySelector("input[type=range]");
  const [under, over] = [make("img"), make("img", { className: "over" })];
  const select = make("select"), title = viewer.querySelector(".title"), scores = viewer.querySelector("tbody");
  const order = [...figures.keys()].sort((a, b) => a - b);

  function divide(percent) {
    range.value = Math.min(100, Math.max(0, percent));
    range.setAttribute("aria-valuetext", `left ${range.value} % base, the rest tuned`);
    stage.style.setProperty("--at", `${range.value}%`);
  }

  function cell(tag, from) {
    const made = make(tag, { textContent: from ? from.textContent : "" });
    if (from && from.dataset.tint) made.dataset.tint = from.dataset.tint;
    return made;
  }

  function show(n) {
    const figure = figures.get(n), row = document.querySelector(`tr[data-n="${n}"]`);
    const [base, tuned] = all("img", figure);
    for (const [image, source] of [[under, tuned], [over, base]]) {
      image.src = source.src;
      image.alt = source.alt;
      image.className = image === over ? "over" : "";
      image.classList.toggle("small", source.classList.contains("small"));
    }
    title.textContent = (row || figure).querySelector("bdi").textContent;
    viewer.querySelector(".which").textContent = `prompt ${n}`;
    viewer.querySelector(".seed").textContent = figure.dataset.seed;
    scores.replaceChildren();
    if (row) {
      const heads = all("th[data-reward]", table);
      heads.forEach((head, i) => {
        const [before, after, change] = [0, 1, 2].map((k) => row.cells[head.cellIndex - 2 + k]);
        const name = make("th", { textContent: head.dataset.reward, scope: "row" });
        const marks = [head.dataset.heldOut !== undefined && "held out", head.dataset.unit].filter(Boolean);
        if (marks.length) name.append(make("span", { textContent: ` ${marks.join(", ")}` }));
        scores.append(make("tr", {}, name, cell("td", before), cell("td", after), cell("td", change)));
      });
    }
    select.value = n;
    all("tr.current", table || viewer).forEach((other) => other.classList.remove("current"));
    if (row) row.classList.add("current");
  }

  function open(n) {
    show(n);
    viewer.scrollIntoView({ block: "nearest" });
    range.focus({ preventScroll: true });
  }

  function step(by) {
    show(order[(order.indexOf(select.value) + by + order.length) % order.length]);
  }

  for (const n of order) {
    const text = figures.get(n).querySelector("bdi").textContent;
    const short = [...text].length > 70 ? `${[...text].slice(0, 70).join("")}\u2026` : text;
    select.append(make("option", { value: n, textContent: `${n}  ${short}`, dir: "auto" }));
  }
  select.setAttribute("aria-label", "Prompt");
  const [back, on] = [make("button", { type: "button", textContent: "\u2190 previous" }),
    make("button", { type: "button", textContent: "next \u2192" })];
  back.addEventListener("click", () => step(-1));
  on.addEventListener("click", () => step(1));
  select.addEventListener("change", () => show(select.value));
  viewer.querySelector(".choose").append(back, select, on);

  stage.prepend(under, over);
  range.addEventListener("input", () => divide(Number(range.value)));
  const drag = (event) => {
    const box = stage.getBoundingClientRect();
    divide(Math.round((100 * (event.clientX - box.left)) / box.width));
  };
  stage.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    event.preventDefault(); // or the browser drags the picture away
    stage.setPointerCapture(event.pointerId);
    range.focus({ preventScroll: true });
    drag(event);
  });
  stage.addEventListener("pointermove", (event) => {
    if (stage.hasPointerCapture(event.pointerId)) drag(event);
  });

  // A figure of the grid and a prompt of the table lead to the viewer.
  for (const figure of all("figure[data-n]")) {
    const button = make("button", { type: "button", className: "pick" });
    button.setAttribute("aria-label", `Compare the pictures of prompt ${figure.dataset.n}`);
    button.addEventListener("click", () => open(figure.dataset.n));
    figure.querySelector(".pair").append(button);
  }
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-n]");
    const row = event.target.closest("tr[data-n]");
    const n = link ? link.dataset.n : row && row.dataset.n;
    if (!figures.has(n) || (!link && String(getSelection()))) return;
    event.preventDefault();
    open(n);
  });

  viewer.hidden = false;
  divide(50);
  show(order[0]);
})();
