// The tree that the map shows, of leaves by kind and path or by path alone, and the layout of its cells.

const MEASURES = ["nbytes", "size", "device"];
const CROWD = 120; // more children than this are grouped into ranges: `0 … 31`, `32 … 63`

// Makes the tree of all leaves. A group with a single member is merged with it: `a/b/c`, not three cells to click through.
function makeTree(leaves, byKind, title) {
  const root = makeNode(title, null);
  for (const leaf of leaves) {
    // The paths of optimizer state already show which kind it belongs to.
    const named = leaf.segments.length > 1 && leaf.segments[0] === leaf.kind;
    const keys = byKind && !named ? [leaf.kind, ...leaf.segments] : leaf.segments;
    let node = root;
    for (const key of keys.slice(0, -1)) {
      if (!node.groups.has(key)) node.groups.set(key, makeNode(key, null));
      node = node.groups.get(key);
    }
    node.members.push(makeNode(keys[keys.length - 1], leaf));
  }
  root.children = childrenOf(root);
  // A single kind does not get a level of its own.
  if (root.children.length === 1 && !root.children[0].leaf) root.children = root.children[0].children;
  root.children.forEach((child) => adopt(root, child));
  measure(root);
  return root;
}

function makeNode(name, leaf) {
  return {
    name,
    leaf,
    groups: new Map(),
    members: [],
    children: [],
    parent: null,
    leaves: 0,
    part: false,
    rest: false,
  };
}

function childrenOf(node) {
  return ranges([...node.groups.values()].map(contracted).concat(node.members));
}

// Groups many children into ranges, about as many as each range has members, in the order of the leaves.
function ranges(children) {
  if (children.length <= CROWD) return children;
  const length = Math.ceil(Math.sqrt(children.length));
  const made = [];
  for (let start = 0; start < children.length; start += length) {
    const members = children.slice(start, start + length);
    const range = makeNode(`${members[0].name} … ${members[members.length - 1].name}`, null);
    range.children = members;
    range.part = true;
    made.push(members.length > 1 ? range : members[0]);
  }
  return ranges(made);
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

// The cells to draw for a node's children: the largest individually, and all that would be too small (in square pixels)
// or too many as one, which is drawn no smaller than `rest`, a share of the area.
function cellsOf(node, name, area, { least, most, rest }) {
  const sized = node.children.filter((child) => child[name] > 0).sort((a, b) => b[name] - a[name]);
  const unit = area / (node[name] || 1);
  let shown = sized.length;
  while (shown > 1 && (shown > most || sized[shown - 1][name] * unit < least)) shown--;
  if (shown === sized.length - 1 && shown < most) shown++; // a single one is not a group
  const cells = sized.slice(0, shown).map((cell) => ({ node: cell, size: Math.max(cell[name] * unit, least) }));
  if (shown === sized.length) return cells;
  const others = restOf(node, sized.slice(shown));
  return [...cells, { node: others, size: Math.max(others[name] * unit, least, rest * area) }].sort(
    (a, b) => b.size - a.size,
  );
}

function restOf(node, children) {
  const rest = makeNode(`${formatCount(children.length)} more`, null);
  rest.children = children;
  rest.parent = node;
  rest.part = rest.rest = true; // part of its parent's children: not a key of a path
  sum(rest);
  return rest;
}

// Squarified treemap (Bruls, Huizing, van Wijk): rows along the shorter side; a row grows while its cells get squarer.
function squarify(cells, box) {
  const total = cells.reduce((sum, cell) => sum + cell.size, 0);
  const scale = total ? (box.width * box.height) / total : 0;
  const areas = cells.map((cell) => cell.size * scale);
  const placed = [];
  let { x, y, width, height } = box;
  for (let start = 0; start < areas.length;) {
    const side = Math.min(width, height);
    let end = start + 1;
    let row = areas[start];
    while (
      end < areas.length &&
      worst(areas, start, end + 1, row + areas[end], side) <= worst(areas, start, end, row, side)
    ) {
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

// The aspect ratio of a row's worst cell; sizes are descending, so it is the first or the last.
function worst(areas, start, end, row, side) {
  const square = side * side;
  return Math.max((square * areas[start]) / (row * row), (row * row) / (square * areas[end - 1]));
}
