/** What a panel is about, in words and numbers: the same for who cannot see a plot. */

import { h } from "./dom.js";
import { display } from "./fields.js";
import { CALCULATIONS, reduce } from "./frames.js";

const SERIES_SHOWN = 200;
const SHOWN = ["lastNotNull", "min", "max"];

function numbers(series, config) {
  const head = SHOWN.map((each) => h("th", { scope: "col", class: "number" }, CALCULATIONS[each].label));
  const row = (each) => {
    const cells = SHOWN.map((calculation) => display(config(each), reduce(calculation, each.values)).text);
    return h(
      "tr",
      {},
      h("th", { scope: "row" }, each.name),
      cells.map((text) => h("td", { class: "number" }, text)),
    );
  };
  return h(
    "table",
    {},
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Series"), head)),
    h("tbody", {}, series.slice(0, SERIES_SHOWN).map(row)),
  );
}

/** Open a dialog with description, links, queries as they were sent, and the series' numbers. */
export function explain({ title, description = "", links, queries, series, config }) {
  const dialog = h(
    "dialog",
    { class: "about", "aria-label": title },
    h("h2", {}, title),
    h("p", {}, description),
    links.map((each) => h("p", {}, each)),
    queries.map((query) => h("pre", {}, query)),
    series.length ? numbers(series, config) : null,
    h("form", { method: "dialog" }, h("button", {}, "Close")),
  );
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}
