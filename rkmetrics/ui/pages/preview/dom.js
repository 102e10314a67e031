/** Elements from plain values. Text is always text: nothing of a query's answer can become markup. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * @param {Element} element
 * @param {Record<string, unknown>} attributes names that begin with "on" are listeners, `style` is an object
 * @param {(Node | string | null | undefined)[]} children
 */
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Make an HTML element. */
export const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);

/** Make an SVG element. */
export const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

/** A link that stays on this site, or one that leaves it without saying where it came from; null for a bad address. */
export function link(address, text, attributes = {}) {
  let url;
  try {
    url = new URL(address, document.baseURI);
  } catch {
    return null;
  }
  if (!["http:", "https:"].includes(url.protocol)) return null;
  return h("a", { href: url.href, rel: "noopener noreferrer", ...attributes }, text);
}

const FOCUSABLE = "button, summary, select, input, a, [tabindex]";
const SCROLLS = ".legend, .tables, .scrolled, .menu .box";

/** What had the focus: what says the same, nearest to the place where it was; legends are sorted by their numbers. */
function again(root, place, text) {
  const all = [...root.querySelectorAll(FOCUSABLE)];
  const same = all.map((each, at) => ({ each, away: Math.abs(at - place) })).filter(({ each }) => each.textContent === text);
  same.sort((a, b) => a.away - b.away);
  return same[0]?.each ?? all[place];
}

/** Build anew what is inside an element, and leave the focus and what was scrolled where they were. */
export function rebuilt(root, build) {
  const before = [...root.querySelectorAll(FOCUSABLE)];
  const focused = before.indexOf(document.activeElement);
  const text = before[focused]?.textContent;
  const tops = [...root.querySelectorAll(SCROLLS)].map((each) => each.scrollTop);
  build();
  if (focused >= 0) again(root, focused, text)?.focus({ preventScroll: true });
  root.querySelectorAll(SCROLLS).forEach((each, at) => (each.scrollTop = tops[at] ?? 0));
}
