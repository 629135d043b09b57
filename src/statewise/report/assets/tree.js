// The tree that the map shows: leaves by kind and path, or by path alone; and how cells are laid out.

const MEASURES = ["bytes", "elements", "device"];

// Makes the tree of all leaves. A group with a single member is one with it: `a/b/c`, not three cells to click through.
function makeTree(leaves, byKind, title) {
  const root = makeNode(title, null);
  for (const leaf of leaves) {
    const keys = byKind ? [leaf.kind, ...leaf.segments] : leaf.segments;
    let node = root;
    for (const key of keys.slice(0, -1)) {
      if (!node.groups.has(key)) node.groups.set(key, makeNode(key, null));
      node = node.groups.get(key);
    }
    node.members.push(makeNode(keys[keys.length - 1], leaf));
  }
  root.children = childrenOf(root);
  root.children.forEach((child) => adopt(root, child));
  measure(root);
  return root;
}

function makeNode(name, leaf) {
  return { name, leaf, groups: new Map(), members: [], children: [], parent: null, leaves: 0, rest: false };
}

function childrenOf(node) {
  return [...node.groups.values()].map(contracted).concat(node.members);
}

function contracted(node) {
  node.children = childrenOf(node);
  if (node.children.length !== 1) return node;
  const only = node.children[0];
  only.name = `${node.name}/${only.name}`;
  return only;
}

function adopt(parent, node) {
  node.parent = parent;
  node.children.forEach((child) => adopt(node, child));
}

function measure(node) {
  if (node.leaf) {
    for (const name of MEASURES) node[name] = node.leaf[name] || 0;
    node.leaves = 1;
    node.kinds = new Set([node.leaf.kind]);
    return;
  }
  node.children.forEach(measure);
  sum(node);
}

function sum(node) {
  for (const name of MEASURES) node[name] = node.children.reduce((total, child) => total + child[name], 0);
  node.leaves = node.children.reduce((total, child) => total + child.leaves, 0);
  node.kinds = new Set(node.children.flatMap((child) => [...child.kinds]));
}

// The leaves below a node.
function leavesBelow(node) {
  return node.leaf ? [node.leaf] : node.children.flatMap(leavesBelow);
}

// The cells to draw for a node's children: the largest as they are, all that would be too small or too many as one.
// A cell is never drawn smaller than `least` square pixels.
function cellsOf(node, name, area, least, most) {
  const sized = node.children.filter((child) => child[name] > 0).sort((a, b) => b[name] - a[name]);
  const unit = area / (node[name] || 1);
  let shown = sized.length;
  while (shown > 1 && (shown > most || sized[shown - 1][name] * unit < least)) shown--;
  if (shown === sized.length - 1 && shown < most) shown++; // one alone is no group
  const cells = sized.slice(0, shown);
  if (shown < sized.length) cells.push(restOf(node, sized.slice(shown)));
  return cells.map((cell) => ({ node: cell, size: Math.max(cell[name] * unit, least) }));
}

function restOf(node, children) {
  const rest = makeNode(`${formatCount(children.length)} more`, null);
  rest.children = children;
  rest.parent = node;
  rest.rest = true;
  sum(rest);
  return rest;
}

// Squarified treemap (Bruls, Huizing, van Wijk): rows along the shorter side, each as long as its cells get squarer.
function squarify(cells, box) {
  const total = cells.reduce((sum, cell) => sum + cell.size, 0);
  const scale = total ? (box.width * box.height) / total : 0;
  const areas = cells.map((cell) => cell.size * scale);
  const placed = [];
  let { x, y, width, height } = box;
  for (let start = 0; start < areas.length; ) {
    const side = Math.min(width, height);
    let end = start + 1;
    let row = areas[start];
    while (end < areas.length && worst(areas, start, end + 1, row + areas[end], side) <= worst(areas, start, end, row, side)) {
      row += areas[end++];
    }
    const thick = side ? row / side : 0;
    let along = 0;
    for (let at = start; at < end; at++) {
      const length = thick ? areas[at] / thick : 0;
      const cell =
        width >= height
          ? { x, y: y + along, width: thick, height: length }
          : { x: x + along, y, width: length, height: thick };
      placed.push({ node: cells[at].node, ...cell });
      along += length;
    }
    if (width >= height) [x, width] = [x + thick, Math.max(0, width - thick)];
    else [y, height] = [y + thick, Math.max(0, height - thick)];
    start = end;
  }
  return placed;
}

// How far from a square the worst cell of a row is; the sizes fall, so it is the first or the last.
function worst(areas, start, end, row, side) {
  const square = side * side;
  return Math.max((square * areas[start]) / (row * row), (row * row) / (square * areas[end - 1]));
}
