// Formatting of numbers and text, and helpers that make elements. Text is only ever set as text, never as HTML.

const UNITS = ["KiB", "MiB", "GiB", "TiB", "PiB"];

// Like `format_bytes` in tables.py.
function formatBytes(number) {
  if (Math.abs(number) < 1024) return `${number} B`;
  let size = number;
  for (const unit of UNITS) {
    size /= 1024;
    if (Math.abs(size) < 1023.95 || unit === UNITS[UNITS.length - 1]) {
      return `${size.toLocaleString("en-US", { minimumFractionDigits: 1, maximumFractionDigits: 1 })} ${unit}`;
    }
  }
}

function formatCount(number) {
  return number.toLocaleString("en-US");
}

function formatShare(part, whole) {
  const share = whole ? (100 * part) / whole : 0;
  return share > 0 && share < 0.1 ? "< 0.1 %" : `${share.toFixed(1)} %`;
}

function formatShape(shape) {
  if (shape === null) return "-";
  return `(${shape.join(", ")}${shape.length === 1 ? "," : ""})`;
}

function plural(number, one, several) {
  return `${formatCount(number)} ${number === 1 ? one : several}`;
}

// Like `printable` in tables.py: characters that a terminal or a browser would act on are shown as escapes.
const ESCAPES = { 9: "\\t", 10: "\\n", 13: "\\r" };
function printable(text) {
  return text.replace(/(?! )[\p{C}\p{Z}]/gu, (c) => {
    const code = c.codePointAt(0);
    if (ESCAPES[code]) return ESCAPES[code];
    const hex = code.toString(16);
    if (code < 0x100) return `\\x${hex.padStart(2, "0")}`;
    return code < 0x10000 ? `\\u${hex.padStart(4, "0")}` : `\\U${hex.padStart(8, "0")}`;
  });
}

// Makes an element with properties, and children: elements or text.
function make(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function byId(id) {
  return document.getElementById(id);
}

// Colors are given by a hue; the style sheet makes a light and a dark color of it.
const HUES = [255, 155, 65, 310, 20, 205, 110, 340, 280, 85];

function swatch(hue) {
  const element = make("span", { className: "swatch", ariaHidden: "true" });
  paint(element, hue);
  return element;
}

function paint(element, hue) {
  if (hue === null) element.classList.add("mixed");
  else element.style.setProperty("--hue", hue);
}

// A choice of one, as buttons that stay pressed.
function choices(host, options, chosen, choose) {
  const buttons = options.map(([key, label]) => {
    const button = make("button", { type: "button", textContent: label });
    button.dataset.key = key;
    button.addEventListener("click", () => {
      press(key);
      choose(key);
    });
    return button;
  });
  function press(key) {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.key === key));
  }
  press(chosen);
  host.replaceChildren(...buttons);
}
