// Reads the data and builds the page.

const report = shown(JSON.parse(byId("data").textContent), "");

// Makes all text of the data printable; hints keep their line breaks.
function shown(value, name) {
  if (typeof value === "string")
    return name === "hint" ? value.split("\n").map(printable).join("\n") : printable(value);
  if (Array.isArray(value)) return value.map((one) => shown(one, name));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, one]) => [printable(key), shown(one, key)]));
}

const used = report.kinds.filter((kind) => kind.leaves).map((kind) => kind.name);
const hues = new Map(used.map((name, at) => [name, HUES[at % HUES.length]]));
const hueOf = (kind) => (hues.has(kind) ? hues.get(kind) : null);

for (const leaf of report.leaves) {
  leaf.device = leaf.per_device || 0;
  leaf.dtype = leaf.dtype || "-";
  if (!leaf.segments.length) leaf.segments = ["."];
}

function themeButton() {
  const button = byId("theme");
  const names = { auto: "Auto", light: "Light", dark: "Dark" };
  const next = { auto: "light", light: "dark", dark: "auto" };
  let theme = "auto";
  try {
    theme = localStorage.getItem("statewise-theme") || "auto";
  } catch {
    // A page opened from a file may not be allowed to store anything.
  }
  function set(name) {
    theme = name in names ? name : "auto";
    document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${names[theme]}`;
    button.setAttribute("aria-label", `Theme: ${names[theme]}; press for ${names[next[theme]]}`);
  }
  button.addEventListener("click", () => {
    set(next[theme]);
    try {
      localStorage.setItem("statewise-theme", theme);
    } catch {
      // As above.
    }
  });
  set(theme);
}

function leavesSection() {
  const has = (test) => report.leaves.some(test);
  const aliases = (leaf) => leaf.aliases.join(", ");
  const columns = [
    { title: "path", width: "", by: (leaf) => leaf.path, cell: (leaf) => pathCell(leaf.segments) },
    {
      title: "kind",
      width: "8.5rem",
      by: (leaf) => leaf.kind,
      cell: (leaf) => make("span", { className: "kind" }, swatch(hueOf(leaf.kind)), leaf.kind),
    },
    { title: "type", width: "7.5rem", by: (leaf) => leaf.type, cell: (leaf) => leaf.type },
    { title: "shape", width: "8.5rem", by: (leaf) => formatShape(leaf.shape), cell: (leaf) => formatShape(leaf.shape) },
    { title: "dtype", width: "6rem", by: (leaf) => leaf.dtype, cell: (leaf) => leaf.dtype },
    {
      title: "elements",
      width: "7rem",
      number: true,
      by: (leaf) => leaf.size,
      cell: (leaf) => formatCount(leaf.size),
    },
    { title: "bytes", width: "6rem", number: true, by: (leaf) => leaf.nbytes, cell: (leaf) => formatBytes(leaf.nbytes) },
  ];
  if (report.memory) {
    columns.push({
      title: "placement",
      width: "8.5rem",
      by: (leaf) => leaf.placement || "",
      cell: (leaf) => leaf.placement || "-",
    });
    columns.push({
      title: "per device",
      width: "6.5rem",
      number: true,
      by: (leaf) => leaf.device,
      cell: (leaf) => formatBytes(leaf.device),
    });
  }
  if (has((leaf) => leaf.aliases.length))
    columns.push({ title: "aliases", width: "11rem", by: aliases, cell: (leaf) => aliases(leaf) || "-" });
  if (has((leaf) => leaf.note))
    columns.push({ title: "note", width: "14rem", by: (leaf) => leaf.note || "", cell: (leaf) => leaf.note || "" });
  const search = (leaf) =>
    [
      leaf.path,
      leaf.kind,
      leaf.type,
      formatShape(leaf.shape),
      leaf.dtype,
      aliases(leaf),
      leaf.placement || "",
      leaf.note || "",
    ].join(" ");
  const sum = (leaves) =>
    `${leaves.length === 1 ? " leaf" : " leaves"}, ${formatBytes(leaves.reduce((total, leaf) => total + leaf.nbytes, 0))}`;
  const groups = { label: "kinds", names: used, of: (leaf) => leaf.kind };
  return new BigTable(byId("leaves-table"), { label: "leaves", rows: report.leaves, columns, search, groups, sum });
}

function mapSection(table) {
  const map = new Treemap(byId("treemap"), {
    crumbs: byId("crumbs"),
    readout: byId("readout"),
    spoken: byId("spoken"),
    hueOf,
    openLeaf: (leaf) => table.reveal(leaf),
  });
  const measures = [
    ["nbytes", "Bytes"],
    ["size", "Elements"],
  ];
  if (report.memory) measures.push(["device", "Per device"]);
  choices(byId("map-size"), measures, "nbytes", (name) => map.measure(name));
  const show = (how) => map.show(makeTree(report.leaves, how === "kind", "all"));
  choices(
    byId("map-group"),
    [
      ["kind", "By kind"],
      ["path", "By path"],
    ],
    "kind",
    show,
  );
  byId("map-list").addEventListener("click", () => {
    const whole = map.node === map.root;
    table.within(whole ? null : leavesBelow(map.node), map.titleOf(map.node));
    byId("leaves").scrollIntoView();
    table.view.focus({ preventScroll: true });
  });
  byId("legend").replaceChildren(...used.map((name) => make("li", {}, swatch(hueOf(name)), name)));
  show("kind");
}

themeButton();
const table = leavesSection();
kindsSection(report, hueOf);
memorySection(report.memory, hueOf);
findingsSection(report.findings, (path, kind) => {
  const leaf = report.leaves.find((one) => one.path === path && (kind === null || one.kind === kind));
  if (leaf) table.reveal(leaf);
  else {
    table.search(path);
    byId("leaves").scrollIntoView();
  }
});
differenceSection(report.diff, hueOf);
header(report);
mapSection(table);
