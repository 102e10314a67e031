/** The box beside the pointer. One for the page, since only one plot has the pointer. */

import { h } from "../dom.js";
import { localText } from "../time.js";

const ROWS_SHOWN = 30;
const box = h("div", { class: "tooltip", role: "presentation", hidden: true });
document.body.append(box);
let owner = null; // the plot that it is about

/**
 * Show what is under the pointer, or with null that nothing is. Plots that only follow another's crosshair show nothing.
 * @param {{seconds: number, rows: {colour: string, name: string, text: string}[]} | null} found
 */
export function tell(plot, found) {
  if (found?.rows.length && plot.over.matches(":hover")) show(plot, found);
  else if (owner === plot) [box.hidden, owner] = [true, null];
}

function show(plot, { seconds, rows }) {
  const more = rows.length - ROWS_SHOWN;
  const lines = rows
    .slice(0, ROWS_SHOWN)
    .map(({ colour, name, text }) =>
      h(
        "div",
        { class: "row" },
        h("i", { style: { "background-color": colour } }),
        h("span", {}, name),
        h("b", {}, text),
      ),
    );
  const rest = more > 0 ? [h("div", { class: "when" }, `and ${more} more`)] : [];
  box.replaceChildren(h("div", { class: "when" }, localText(seconds * 1000)), ...lines, ...rest);
  [box.hidden, owner] = [false, plot];
  place(plot);
}

function place(plot) {
  const over = plot.over.getBoundingClientRect();
  const [x, y] = [over.left + plot.cursor.left, over.top + plot.cursor.top];
  const left = x + 16 + box.offsetWidth > innerWidth ? x - 16 - box.offsetWidth : x + 16;
  box.style.left = `${Math.max(4, left)}px`;
  box.style.top = `${Math.max(4, Math.min(y + 12, innerHeight - box.offsetHeight - 4))}px`;
}
