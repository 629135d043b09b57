// The map: cells that can be zoomed into, by mouse, touch or keyboard.
//
// It draws the children of one node, and inside each of them whatever there is room for; never more than MOST elements,
// however many leaves there are. Only the outer cells are focusable, one at a time (a roving tabindex).

const MOST = 900;
const OUTER = { least: 600, most: 120, rest: 0.03 };
const INNER = { least: 160, most: 60, rest: 0 };
const HEADER = 20;

class Treemap {
  constructor(host, parts) {
    this.host = host;
    this.parts = parts; // crumbs, readout, spoken: elements; hueOf, titleOf, openLeaf: functions
    this.name = "nbytes";
    this.cells = [];
    host.addEventListener("keydown", (event) => this.key(event));
    host.addEventListener("click", (event) => this.click(event));
    host.addEventListener("pointerover", (event) => this.point(event));
    host.addEventListener("pointerleave", () => this.read(null));
    host.addEventListener("focusin", (event) => this.rove(this.cellAt(event.target)));
    new ResizeObserver(() => this.draw()).observe(host);
  }

  show(root) {
    this.root = root;
    this.zoom(root);
  }

  measure(name) {
    this.name = name;
    this.draw();
  }

  // --- zooming ------------------------------------------------------------------------------------------------

  zoom(node, from = null) {
    const focused = this.host.contains(document.activeElement);
    this.node = node;
    this.draw();
    const back = this.cells.find((cell) => isWithin(from, cell.node));
    this.rove(back || this.cells[0]);
    if (focused && this.current) this.current.element.focus();
    this.parts.spoken.textContent = `${this.titleOf(node)}: ${this.describe(node)}`;
  }

  enter(cell) {
    if (cell.node.leaf) this.parts.openLeaf(cell.node.leaf);
    else this.zoom(cell.node);
  }

  leave() {
    if (this.node.parent) this.zoom(this.node.parent, this.node);
  }

  click(event) {
    const cell = this.cellAt(event.target);
    if (cell) this.enter(cell);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const cell = this.cellAt(event.target);
    if (event.key === "Escape") this.leave();
    else if (!cell) return;
    else if (event.key === "Enter" || event.key === " ") this.enter(cell);
    else if (event.key === "Home") this.cells[0].element.focus();
    else if (event.key === "End") this.cells[this.cells.length - 1].element.focus();
    else if (event.key in DIRECTIONS) {
      const next = neighbor(this.cells, cell, DIRECTIONS[event.key]);
      if (next) next.element.focus();
    } else return;
    event.preventDefault();
  }

  cellAt(element) {
    const outer = element.closest(".cell[data-cell]");
    return outer ? this.cells[Number(outer.dataset.cell)] : undefined;
  }

  // The one cell that Tab reaches.
  rove(cell) {
    if (!cell) return;
    if (this.current) this.current.element.tabIndex = -1;
    this.current = cell;
    cell.element.tabIndex = 0;
    this.read(cell.node);
  }

  // --- drawing ------------------------------------------------------------------------------------------------

  draw() {
    const box = { x: 0, y: 0, width: this.host.clientWidth, height: this.host.clientHeight };
    if (!this.node || !box.width || !box.height) return;
    const kept = this.current && this.host.contains(document.activeElement) ? this.current.node : null;
    this.nodes = [];
    this.current = null;
    const placed = squarify(cellsOf(this.node, this.name, box.width * box.height, OUTER), box);
    const quotas = shares(placed, MOST - placed.length);
    this.cells = placed.map((place, number) => {
      const element = this.cell(place, quotas[number]);
      element.dataset.cell = String(number);
      element.tabIndex = -1;
      element.setAttribute("role", "button");
      element.setAttribute("aria-label", this.label(place.node));
      return { ...place, element };
    });
    const empty = make("p", { className: "notice", textContent: `Nothing here has any ${WORDS[this.name]}.` });
    this.host.replaceChildren(...(placed.length ? this.cells.map((cell) => cell.element) : [empty]));
    this.host.setAttribute(
      "aria-label",
      `Map of ${this.titleOf(this.node)}, ${plural(placed.length, "cell", "cells")}`,
    );
    this.rove(this.cells[0]);
    const same = kept && this.cells.find((cell) => cell.node === kept);
    if (same) same.element.focus();
    this.crumbs();
    this.read(this.node);
  }

  // The element of one cell, with at most `quota` others inside.
  cell({ node, x, y, width, height }, quota) {
    const element = make("div", { className: node.leaf ? "cell leaf" : node.rest ? "cell rest" : "cell group" });
    element.dataset.node = String(this.nodes.push(node) - 1);
    Object.assign(element.style, { left: `${x}px`, top: `${y}px`, width: `${width}px`, height: `${height}px` });
    paint(element, node.kinds.size === 1 ? this.parts.hueOf([...node.kinds][0]) : null);
    const named = width > 34 && height > 15;
    if (named) {
      const size = width > 110 ? make("span", { className: "size", textContent: this.format(node[this.name]) }) : null;
      element.append(make("div", { className: "name" }, make("span", { textContent: node.name }), size));
    }
    const room = { x: 2, y: named ? HEADER : 2, width: width - 6, height: height - (named ? HEADER : 2) - 4 };
    const doll = node.rest && node.parent.rest;
    if (!node.leaf && !doll && room.width > 24 && room.height > 16 && quota > 0) {
      const limits = { ...INNER, most: Math.min(INNER.most, quota - 1) };
      const placed = limits.most > 0 ? squarify(cellsOf(node, this.name, room.width * room.height, limits), room) : [];
      const quotas = shares(placed, quota - placed.length);
      element.append(...placed.map((place, number) => this.cell(place, quotas[number])));
    }
    return element;
  }

  crumbs() {
    const trail = [];
    for (let node = this.node; node; node = node.parent) trail.unshift(node);
    const parts = trail.map((node, at) => {
      const here = at === trail.length - 1;
      const button = make("button", { type: "button", textContent: node.name, disabled: here });
      if (here) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => this.zoom(node, trail[at + 1]));
      return button;
    });
    this.parts.crumbs.replaceChildren(...parts.flatMap((part, at) => (at ? ["›", part] : [part])));
  }

  // --- text --------------------------------------------------------------------------------------------------

  point(event) {
    const inner = event.target.closest(".cell");
    if (inner) this.read(this.nodes[Number(inner.dataset.node)]);
  }

  read(node) {
    const shown = node || (this.current && this.current.node) || this.node;
    if (!shown) return;
    const title = make("strong", { textContent: this.titleOf(shown) });
    this.parts.readout.replaceChildren(title, ` ${this.describe(shown)}`);
  }

  titleOf(node) {
    const names = [];
    for (let one = node; one && one.parent; one = one.parent) if (!one.part || one === node) names.unshift(one.name);
    return names.join("/") || node.name;
  }

  describe(node) {
    const of = formatShare(node[this.name], this.root[this.name]);
    const what = node.leaf
      ? [node.leaf.kind, `${node.leaf.type}${formatShape(node.leaf.shape)} ${node.leaf.dtype}`]
      : [plural(node.leaves, "leaf", "leaves")];
    return [
      ...what,
      `${this.format(node[this.name])} ${this.name === "nbytes" ? "" : WORDS[this.name]}`.trim(),
      of,
    ].join(" · ");
  }

  label(node) {
    return `${node.name}, ${this.describe(node)}, Enter ${node.leaf ? "shows it in the table" : "zooms in"}`;
  }

  format(number) {
    return this.name === "size" ? formatCount(number) : formatBytes(number);
  }
}

const WORDS = { nbytes: "bytes", size: "elements", device: "on each device" };
const DIRECTIONS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

// Distributes a number of elements by area.
function shares(places, number) {
  const total = places.reduce((sum, place) => sum + place.width * place.height, 0) || 1;
  return places.map((place) => Math.floor((Math.max(0, number) * place.width * place.height) / total));
}

// Whether a node is a cell's, or inside it. The group of the remaining cells is a new object each time it is drawn.
function isWithin(node, group) {
  if (!node) return false;
  const member = node.rest ? node.children[0] : node;
  if (group.rest) return group.children.some((child) => isWithin(member, child));
  for (let one = member; one; one = one.parent) if (one === group) return true;
  return false;
}

// The nearest cell in a direction: it begins where this one ends; straight ahead is preferred to diagonal.
function neighbor(cells, from, [dx, dy]) {
  const gapOf = (cell) => {
    const ahead = dx
      ? dx > 0
        ? cell.x - (from.x + from.width)
        : from.x - (cell.x + cell.width)
      : dy > 0
        ? cell.y - (from.y + from.height)
        : from.y - (cell.y + cell.height);
    const aside = dx
      ? Math.max(0, cell.y - (from.y + from.height), from.y - (cell.y + cell.height))
      : Math.max(0, cell.x - (from.x + from.width), from.x - (cell.x + cell.width));
    const off = dx
      ? Math.abs(middle(cell, "y", "height") - middle(from, "y", "height"))
      : Math.abs(middle(cell, "x", "width") - middle(from, "x", "width"));
    return ahead < -1 ? Infinity : ahead + 1000 * Math.max(0, aside) + 0.01 * off;
  };
  const found = cells.filter((cell) => cell !== from).map((cell) => [gapOf(cell), cell]);
  found.sort((a, b) => a[0] - b[0]);
  return found.length && found[0][0] < Infinity ? found[0][1] : null;
}

function middle(cell, start, extent) {
  return cell[start] + cell[extent] / 2;
}
