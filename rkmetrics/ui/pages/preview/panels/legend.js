/** The legend: names as buttons that show and hide a series, with its numbers beside them where the panel asks. */

import { h } from "../dom.js";
import { display } from "../fields.js";
import { CALCULATIONS, reduce } from "../frames.js";

/** The entries in the order that the panel asks for; Grafana names the column by its heading, "Last *". */
export function ordered({ calcs = [], sortBy, sortDesc = false }, entries) {
  const by = calcs.find((each) => (CALCULATIONS[each]?.label ?? each) === sortBy);
  if (!by && sortBy !== "Name") return entries;
  const key = ({ name, values }) => (by ? reduce(by, values) : name);
  const least = (value) => value === null || value === undefined || Number.isNaN(value);
  const compare = (a, b) => {
    if (least(a.key) || least(b.key)) return Number(least(a.key)) - Number(least(b.key)); // what has no number is last
    return (a.key < b.key ? -1 : Number(a.key > b.key)) * (sortDesc ? -1 : 1);
  };
  return entries
    .map((entry) => ({ entry, key: key(entry) }))
    .sort(compare)
    .map(({ entry }) => entry);
}

/**
 * @param {{name: string, colour: string, config: object, values: (number|null)[]}[]} entries
 * @param {Set<string>} off names that are hidden
 * @param {(name: string, alone: boolean) => void} toggle
 */
export function legend(options, entries, off, toggle) {
  const { showLegend = true, displayMode = "list", placement = "bottom", calcs = [] } = options ?? {};
  if (!showLegend || displayMode === "hidden") return null;
  const shown = ordered(
    options ?? {},
    entries.filter(({ config }) => !config.custom?.hideFrom?.legend),
  );
  const button = ({ name, colour }) =>
    h(
      "button",
      {
        type: "button",
        class: "entry",
        "aria-pressed": String(!off.has(name)),
        title: `${name}: show or hide; with Ctrl, it alone`,
        onclick: (event) => toggle(name, event.ctrlKey || event.metaKey || event.shiftKey),
      },
      h("i", { style: { "background-color": colour } }),
      name || "Value",
    );
  if (displayMode !== "table") {
    const numbers = ({ config, values }) =>
      calcs.map((each) =>
        h(
          "span",
          { class: "number" },
          `${CALCULATIONS[each]?.label ?? each}: ${display(config, reduce(each, values)).text}`,
        ),
      );
    return h(
      "div",
      { class: `legend list ${placement}` },
      shown.map((entry) => h("span", {}, button(entry), numbers(entry))),
    );
  }
  const head = h(
    "tr",
    {},
    h("th", { scope: "col" }, "Name"),
    calcs.map((each) => h("th", { scope: "col" }, CALCULATIONS[each]?.label ?? each)),
  );
  const rows = shown.map((entry) =>
    h(
      "tr",
      {},
      h("td", {}, button(entry)),
      calcs.map((each) => h("td", { class: "number" }, display(entry.config, reduce(each, entry.values)).text)),
    ),
  );
  return h(
    "div",
    { class: `legend table ${placement}`, tabindex: "0", role: "group", "aria-label": "Legend" },
    h("table", {}, h("thead", {}, head), h("tbody", {}, rows)),
  );
}
