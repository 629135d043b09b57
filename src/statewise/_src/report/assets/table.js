// A table of any length: only the visible rows are in the page, between two that take the space of the rest.

const ROW = 30; // pixels, as the style sheet has it
const AROUND = 8; // extra rows above and below the visible ones

const collator = new Intl.Collator("en", { numeric: true });

class BigTable {
  // columns: [{ title, cell(row) -> element or text, by(row) -> sort key, number, width }]
  // search(row) -> text that is searched; groups: { label, of(row), names } for a choice; sum(rows) -> text
  constructor(host, { rows, columns, search, label, groups, sum }) {
    Object.assign(this, { rows, columns, sum, groups });
    this.texts = rows.map((row) => printable(search(row)).toLowerCase());
    this.order = rows.map((_, at) => at);
    this.sorted = { column: null, up: true };
    this.only = null;
    this.build(host, label);
    this.filter();
  }

  build(host, label) {
    this.input = make("input", { type: "search", placeholder: "Search", spellcheck: false, autocomplete: "off" });
    this.input.setAttribute("aria-label", `Search ${label}`);
    this.input.addEventListener("input", () => this.filter());
    this.input.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.input.value) this.search("");
      if (event.key === "ArrowDown") {
        event.preventDefault(); // otherwise the focused element scrolls too
        this.view.focus();
      }
    });
    this.chip = make("button", { type: "button", className: "chip", hidden: true });
    this.chip.addEventListener("click", () => this.within(null, ""));
    this.count = make("span", { className: "count", role: "status" });
    this.heads = this.columns.map((column, at) => this.head(column, at));
    this.body = make("tbody");
    const widths = this.columns.map((column) => {
      const col = make("col");
      col.style.width = column.width;
      return col;
    });
    this.table = make("table", { className: "big" }, make("colgroup", {}, ...widths));
    // The first column takes the space that the others leave, but at least what it needs.
    this.table.style.minWidth = `${this.columns.reduce((sum, column) => sum + parseFloat(column.width || "17"), 0)}rem`;
    this.table.append(make("thead", {}, make("tr", { ariaRowIndex: "1" }, ...this.heads)), this.body);
    this.table.setAttribute("aria-label", label);
    this.view = make("div", { className: "view", tabIndex: 0, role: "region" }, this.table);
    this.view.setAttribute("aria-label", `${label}, scrollable`);
    this.view.addEventListener("scroll", () => this.later());
    this.view.addEventListener("keydown", (event) => this.key(event));
    const tools = make("div", { className: "bar tools" }, this.input, this.choice(), this.chip, this.count);
    host.replaceChildren(tools, this.view);
    new ResizeObserver(() => this.later()).observe(this.view);
  }

  head(column, at) {
    const button = make(
      "button",
      { type: "button" },
      column.title,
      make("span", { className: "arrow", ariaHidden: "true" }),
    );
    button.addEventListener("click", () => this.sort(at));
    const head = make("th", { scope: "col", className: column.number ? "number" : "" }, button);
    head.setAttribute("aria-sort", "none");
    return head;
  }

  choice() {
    if (!this.groups || this.groups.names.length < 2) return null;
    const { label, names } = this.groups;
    const options = names.map((name) => make("option", { value: name, textContent: name }));
    this.select = make(
      "select",
      { ariaLabel: label },
      make("option", { value: "", textContent: `All ${label}` }),
      ...options,
    );
    this.select.addEventListener("change", () => this.filter());
    return this.select;
  }

  // --- what is shown ------------------------------------------------------------------------------------------

  // Ascending, descending, then the original order; numbers start with the largest.
  sort(at) {
    const first = !this.columns[at].number;
    const { column, up } = this.sorted;
    if (column !== at) this.sorted = { column: at, up: first };
    else if (up === first) this.sorted = { column: at, up: !first };
    else this.sorted = { column: null, up: true };
    this.heads.forEach((head, number) => {
      const here = number === this.sorted.column;
      head.setAttribute("aria-sort", here ? (this.sorted.up ? "ascending" : "descending") : "none");
    });
    this.filter();
  }

  search(text) {
    this.input.value = text;
    this.filter();
  }

  // Shows only these rows, until the chip with their label is clicked.
  within(rows, label) {
    this.only = rows ? new Set(rows) : null;
    this.chip.hidden = !rows;
    this.chip.textContent = `${label} ✕`;
    this.chip.setAttribute("aria-label", `Show all rows, not only ${label}`);
    this.filter();
  }

  // Every word must match.
  filter() {
    const words = this.input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const group = this.select ? this.select.value : "";
    this.order = [];
    this.rows.forEach((row, at) => {
      if (this.only && !this.only.has(row)) return;
      if (group && this.groups.of(row) !== group) return;
      if (words.every((word) => this.texts[at].includes(word))) this.order.push(at);
    });
    this.arrange();
    this.view.scrollTop = 0;
    const all = this.order.length === this.rows.length;
    const number = all
      ? formatCount(this.rows.length)
      : `${formatCount(this.order.length)} of ${formatCount(this.rows.length)}`;
    this.count.textContent = `${number}${this.sum ? this.sum(this.order.map((at) => this.rows[at])) : ""}`;
    this.draw();
  }

  arrange() {
    const { column, up } = this.sorted;
    if (column === null) return;
    const keys = this.rows.map(this.columns[column].by);
    const compare = this.columns[column].number ? (a, b) => a - b : collator.compare;
    const sign = up ? 1 : -1;
    this.order.sort((a, b) => sign * compare(keys[a], keys[b]) || a - b);
  }

  // --- drawing ------------------------------------------------------------------------------------------------

  later() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.draw();
    });
  }

  draw() {
    const first = Math.max(0, Math.floor(this.view.scrollTop / ROW) - AROUND);
    const seen = Math.ceil((this.view.clientHeight || 400) / ROW) + 2 * AROUND;
    const last = Math.min(this.order.length, first + seen);
    this.table.setAttribute("aria-rowcount", String(this.order.length + 1));
    const rows = this.order.slice(first, last).map((at, number) => this.row(this.rows[at], first + number));
    if (!rows.length)
      rows.push(make("tr", {}, make("td", { colSpan: this.columns.length, textContent: "Nothing matches." })));
    this.body.replaceChildren(this.gap(first), ...rows, this.gap(this.order.length - last));
  }

  row(row, at) {
    const cells = this.columns.map((column) => {
      const shown = column.cell(row);
      const cell = make("td", { className: column.number ? "number" : "" }, shown);
      if (typeof shown === "string") cell.title = shown;
      return cell;
    });
    const element = make("tr", { ariaRowIndex: String(at + 2), className: at % 2 ? "odd" : "" }, ...cells);
    if (row === this.marked) element.classList.add("marked");
    return element;
  }

  gap(rows) {
    const gap = make("tr", { className: "gap", ariaHidden: "true" });
    gap.style.height = `${rows * ROW}px`;
    return gap;
  }

  // Shows one row, whatever the current search is.
  reveal(row) {
    this.marked = row;
    if (!this.order.some((at) => this.rows[at] === row)) {
      this.input.value = "";
      if (this.select) this.select.value = "";
      this.within(null, "");
    }
    const at = this.order.findIndex((one) => this.rows[one] === row);
    this.view.scrollTop = Math.max(0, at * ROW - this.view.clientHeight / 3);
    this.draw();
    this.view.scrollIntoView({ block: "center" });
    this.view.focus({ preventScroll: true });
  }

  key(event) {
    const page = this.view.clientHeight - 3 * ROW;
    const steps = { ArrowDown: ROW, ArrowUp: -ROW, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.target !== this.view || !(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = steps[event.key];
    this.view.scrollTop = Number.isFinite(step) ? this.view.scrollTop + step : step > 0 ? this.view.scrollHeight : 0;
    event.preventDefault();
  }
}

// A path with its last key in full: the front is cut off if there is no room.
// (Not by flex, which would add line breaks to copied text.)
function pathCell(segments) {
  const front = make("span", {
    className: "front",
    textContent: segments
      .slice(0, -1)
      .map((one) => `${one}/`)
      .join(""),
  });
  const end = make("span", { className: "end", textContent: segments[segments.length - 1] });
  front.style.maxWidth = `max(0px, calc(100% - ${end.textContent.length + 0.5}ch))`;
  return make("span", { className: "path", title: segments.join("/") }, front, end);
}
