// The sections besides the map and the table of leaves: the header, kinds, memory, findings, differences.

function header(report) {
  const versions = Object.entries(report.versions).map(([name, version]) => `${name} ${version}`);
  byId("title").textContent = report.title;
  const what = report.title.toLowerCase() === report.what ? [] : [`a ${report.what}`];
  byId("subtitle").textContent = [...what, ...versions].join(" · ");
  const total = report.total;
  const tiles = [
    ["leaves", formatCount(total.leaves), "leaves"],
    ["leaves", formatCount(total.size), "elements"],
    ["map", formatBytes(total.nbytes), "in total"],
  ];
  if (report.memory)
    tiles.push([
      "memory",
      formatBytes(report.memory.total),
      `on each of ${formatCount(report.memory.devices)} devices`,
    ]);
  if (report.findings)
    tiles.push([
      "findings",
      formatCount(report.findings.length),
      report.findings.length === 1 ? "finding" : "findings",
      report.findings.length ? "warn" : "",
    ]);
  if (report.diff)
    tiles.push([
      "difference",
      formatCount(report.diff.leaves.length),
      report.diff.leaves.length === 1 ? "leaf differs" : "leaves differ",
    ]);
  byId("tiles").replaceChildren(
    ...tiles.map(([target, number, word, className]) =>
      make(
        "li",
        {},
        make("a", { href: `#${target}`, className: className || "" }, make("b", { textContent: number }), ` ${word}`),
      ),
    ),
  );
  const links = [...document.querySelectorAll("main > section")].filter((section) => !section.hidden);
  byId("nav").replaceChildren(
    ...links.map((section) =>
      make("a", { href: `#${section.id}`, textContent: section.querySelector("h2").textContent }),
    ),
  );
}

function headRow(columns) {
  return make(
    "thead",
    {},
    make(
      "tr",
      {},
      ...columns.map(([name, number]) =>
        make("th", { scope: "col", className: number ? "number" : "", textContent: name }),
      ),
    ),
  );
}

function cells(values, numbers) {
  return values.map((value, at) => make("td", { className: numbers.has(at) ? "number" : "" }, value));
}

// Splits a kind's handling, `frozen, placement=Sharded('data', None)`, at the commas outside of brackets.
function handlings(text) {
  if (text === "-" || !text) return ["-"];
  const words = [];
  let depth = 0;
  let word = "";
  for (const letter of text) {
    if ("([{".includes(letter)) depth++;
    if (")]}".includes(letter)) depth--;
    if (letter === "," && depth === 0) {
      words.push(word.trim());
      word = "";
    } else word += letter;
  }
  return [...words, word.trim()].map((one) =>
    make("span", { className: `tag ${one === "frozen" || one === "not saved" ? "strong" : ""}`, textContent: one }),
  );
}

function bar(share, hue) {
  const fill = make("span");
  paint(fill, hue);
  fill.style.width = `${100 * share}%`;
  return make("span", { className: "share", ariaHidden: "true" }, fill);
}

function tally(counts) {
  const names = Object.keys(counts);
  if (names.length < 2) return names[0] || "-";
  return names.map((name) => `${name} ${formatCount(counts[name])}`).join(", ");
}

function kindsSection(report, hueOf) {
  const columns = [
    ["kind"],
    ["leaves", true],
    ["elements", true],
    ["bytes", true],
    ["share"],
    ["dtypes"],
    ["types"],
    ["handling"],
  ];
  const numbers = new Set([1, 2, 3]);
  const total = report.total;
  const rows = report.kinds.map((kind) => {
    const name = make("span", { className: "kind" }, swatch(hueOf(kind.name)), kind.name);
    const share = make(
      "span",
      { className: "shares" },
      bar(total.nbytes ? kind.nbytes / total.nbytes : 0, hueOf(kind.name)),
      formatShare(kind.nbytes, total.nbytes),
    );
    const handling = make("span", { className: "tags" }, ...handlings(kind.handling));
    const counts = [formatCount(kind.leaves), formatCount(kind.size), formatBytes(kind.nbytes)];
    const row = make(
      "tr",
      { className: kind.leaves ? "" : "none" },
      ...cells([name, ...counts, share, tally(kind.dtypes), tally(kind.types), handling], numbers),
    );
    return row;
  });
  const sums = [
    "total",
    formatCount(total.leaves),
    formatCount(total.size),
    formatBytes(total.nbytes),
    "",
    "",
    "",
    "",
  ];
  byId("kinds-table").replaceChildren(
    headRow(columns),
    make("tbody", {}, ...rows),
    make("tfoot", {}, make("tr", {}, ...cells(sums, numbers))),
  );
}

function memorySection(memory, hueOf) {
  if (!memory) return;
  byId("memory").hidden = false;
  const axes = Object.entries(memory.mesh).map(([name, size]) => `${name}=${formatCount(size)}`);
  byId("memory-note").textContent =
    `${formatBytes(memory.total)} on each of ${formatCount(memory.devices)} devices, mesh ${axes.join(", ")}. ` +
    "Activations are not included, nor what the compiler needs itself.";
  const parts = memory.kinds.map((kind) => [kind.name, kind.per_device, hueOf(kind.name)]);
  const copied = memory.kinds.filter((kind) => kind.copies);
  parts.push(...copied.map((kind) => [`${kind.name} in ${kind.compute}`, kind.copies, hueOf(kind.name)]));
  if (memory.gradients) parts.push(["gradients", memory.gradients, null]);
  const shown = parts.filter(([, size]) => size > 0);
  byId("memory-bar").setAttribute("aria-label", shown.map(([name, size]) => `${name} ${formatBytes(size)}`).join(", "));
  byId("memory-bar").replaceChildren(
    ...shown.map(([name, size, hue]) => {
      const part = make("span", {
        title: `${name}: ${formatBytes(size)}`,
        textContent: size / memory.total > 0.08 ? name : "",
      });
      paint(part, hue);
      part.style.flexGrow = String(size);
      return part;
    }),
  );
  const host = memory.kinds.some((kind) => kind.host);
  const columns = [
    ["kind"],
    ["arrays", true],
    ["bytes", true],
    ["per device", true],
    ...(host ? [["host, per device", true]] : []),
    ["saved if sharded", true],
  ];
  const numbers = new Set([1, 2, 3, 4, 5]);
  const line = (name, hue, arrays, whole, here, there, saves) =>
    make(
      "tr",
      {},
      ...cells(
        [make("span", { className: "kind" }, swatch(hue), name), arrays, whole, here, ...(host ? [there] : []), saves],
        numbers,
      ),
    );
  const rows = memory.kinds
    .filter((kind) => kind.arrays)
    .map((kind) =>
      line(
        kind.name,
        hueOf(kind.name),
        formatCount(kind.arrays),
        formatBytes(kind.nbytes),
        formatBytes(kind.per_device),
        formatBytes(kind.host),
        kind.saving_if_sharded ? formatBytes(kind.saving_if_sharded) : "-",
      ),
    );
  rows.push(
    ...copied.map((kind) =>
      line(`${kind.name} in ${kind.compute}`, hueOf(kind.name), "", "", formatBytes(kind.copies), "", ""),
    ),
  );
  if (memory.gradients) rows.push(line("gradients", null, "", "", formatBytes(memory.gradients), "", ""));
  const sums = ["total", "", "", formatBytes(memory.total), ...(host ? [""] : []), ""];
  byId("memory-table").replaceChildren(
    headRow(columns),
    make("tbody", {}, ...rows),
    make("tfoot", {}, make("tr", {}, ...cells(sums, numbers))),
  );
}

const NAMED = 10; // leaves of a finding that are listed at first

function findingsSection(findings, openPath) {
  const host = byId("findings-list");
  if (!findings) {
    host.replaceChildren(
      make("p", { className: "notice", textContent: "Not checked: a checkpoint holds no objects to inspect." }),
    );
    return;
  }
  if (!findings.length) {
    host.replaceChildren(make("p", { className: "notice good", textContent: "No findings." }));
    return;
  }
  host.replaceChildren(...findings.map((finding) => findingCard(finding, openPath)));
}

function findingCard(finding, openPath) {
  const item = (leaf) => {
    const button = make("button", { type: "button", className: "link", textContent: leaf.path });
    button.addEventListener("click", () => openPath(leaf.path, leaf.kind));
    const facts = `${leaf.type}${formatShape(leaf.shape)} ${leaf.dtype || "-"}${leaf.note ? `  ${leaf.note}` : ""}`;
    return make("li", {}, button, " ", make("span", { className: "quiet", textContent: facts }));
  };
  const list = make("ul", { className: "named" }, ...finding.leaves.slice(0, NAMED).map(item));
  if (finding.leaves.length > NAMED) {
    const more = make("button", { type: "button", textContent: `${formatCount(finding.leaves.length - NAMED)} more` });
    more.addEventListener("click", () => {
      const next = finding.leaves.slice(list.children.length - 1, list.children.length - 1 + 100);
      more.parentElement.before(...next.map(item));
      const left = finding.leaves.length - (list.children.length - 1);
      if (left) more.textContent = `${formatCount(left)} more`;
      else more.parentElement.remove();
    });
    list.append(make("li", {}, more));
  }
  return make(
    "article",
    { className: "finding" },
    make("h3", {}, make("code", { textContent: finding.code })),
    make("p", { className: "fact", textContent: finding.message }),
    finding.leaves.length ? list : null,
    make("p", {}, make("span", { className: "label", textContent: "why " }), finding.why),
    make("p", { className: "label", textContent: "hint" }),
    make("pre", { tabIndex: 0 }, make("code", { textContent: finding.hint })),
  );
}

function differenceSection(diff, hueOf) {
  if (!diff) return;
  byId("difference").hidden = false;
  const counts = Object.entries(diff.counts).map(
    ([kind, what]) =>
      `${kind}: ${Object.entries(what)
        .map(([word, number]) => `${word} ${formatCount(number)}`)
        .join(", ")}`,
  );
  const left = diff.not_saved.length ? ` Not saved: ${diff.not_saved.join(", ")}.` : "";
  byId("difference-note").textContent = `From ${diff.first} to ${diff.second}. ${counts.join("; ")}.${left}`;
  if (!diff.leaves.length) {
    byId("difference-table").replaceChildren(make("p", { className: "notice good", textContent: "No leaf differs." }));
    return;
  }
  const largest = (row) =>
    row.largest === null ? "-" : typeof row.largest === "string" ? row.largest : row.largest.toPrecision(4);
  const order = (row) => (row.largest === null ? -1 : typeof row.largest === "string" ? Infinity : row.largest);
  return new BigTable(byId("difference-table"), {
    label: "leaves that differ",
    sum: (rows) => (rows.length === 1 ? " leaf" : " leaves"),
    rows: diff.leaves,
    search: (row) => [row.path, row.kind, ...row.what, row.why].join(" "),
    groups: { label: "kinds", names: [...new Set(diff.leaves.map((row) => row.kind))], of: (row) => row.kind },
    columns: [
      { title: "path", width: "", by: (row) => row.path, cell: (row) => pathCell(row.path.split("/")) },
      {
        title: "kind",
        width: "9rem",
        by: (row) => row.kind,
        cell: (row) => make("span", { className: "kind" }, swatch(hueOf(row.kind)), row.kind),
      },
      { title: "what", width: "9rem", by: (row) => row.what.join(", "), cell: (row) => row.what.join(", ") },
      { title: "why", width: "22rem", by: (row) => row.why, cell: (row) => row.why },
      { title: "largest", width: "8rem", number: true, by: order, cell: largest },
    ],
  });
}
