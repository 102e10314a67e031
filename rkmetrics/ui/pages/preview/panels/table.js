/** Tables, sorted by a click on a column. */

import { h, link } from "../dom.js";
import { display } from "../fields.js";
import { faded, over } from "../palette.js";
import { localText } from "../time.js";
import { compare } from "../transformations.js";

const ROWS_SHOWN = 500;

export function table(body, context) {
  const { panel, tables, state } = context;
  const filled = tables.filter((fields) => fields[0]?.values.length);
  state.sort ??= (panel.options?.sortBy ?? []).map(({ displayName, desc }) => ({ name: displayName, desc }))[0];
  const draw = () =>
    body.replaceChildren(
      h(
        "div",
        { class: "tables", tabindex: "0", role: "group", "aria-label": panel.title || "Table" },
        filled.map((fields) =>
          one(fields, context, (name) => {
            state.sort = { name, desc: state.sort?.name === name ? !state.sort.desc : true };
            draw();
            [...body.querySelectorAll("th button")].find((each) => each.dataset.name === name)?.focus();
          }),
        ),
      ),
    );
  draw();
}

function one(fields, context, sortBy) {
  const { state } = context;
  const columns = fields
    .map((field, at) => {
      const config = context.config(field);
      return { field, at, config, name: config.displayName || field.name };
    })
    .filter(({ config }) => !(config.custom?.hidden ?? config.custom?.hideFrom?.viz));
  const order = [...fields[0].values.keys()];
  const by = columns.find(({ name }) => name === state.sort?.name);
  if (by) order.sort((a, b) => (state.sort.desc ? -1 : 1) * compare(by.field.values[a], by.field.values[b]));
  const sorted = (column) => (column === by ? (state.sort.desc ? "descending" : "ascending") : undefined);
  const head = columns.map((column) =>
    h(
      "th",
      { scope: "col", class: column.field.type, "aria-sort": sorted(column) },
      h(
        "button",
        { type: "button", "data-name": column.name, onclick: () => sortBy(column.name) },
        column.name,
        h("span", { "aria-hidden": "true" }, column === by ? (state.sort.desc ? " ↓" : " ↑") : ""),
      ),
    ),
  );
  const rows = order.slice(0, ROWS_SHOWN).map((row) =>
    h(
      "tr",
      {},
      columns.map((column) => cell(column, row, context)),
    ),
  );
  return h(
    "table",
    {},
    h("thead", {}, h("tr", {}, head)),
    h("tbody", {}, rows),
    order.length > ROWS_SHOWN ? h("caption", {}, `${ROWS_SHOWN} of ${order.length} rows`) : null,
  );
}

/** Kinds of cells -> how they are coloured. */
const CELLS = {
  "color-text": (shown) => ({ color: shown.ink }),
  "color-background": (shown) => ({ "background-color": shown.colour, color: over(shown.colour) }),
  gauge: (shown, share) => ({
    "background-image": `linear-gradient(90deg, ${faded(shown.colour, 0.45)} ${share}%, transparent ${share}%)`,
  }),
};

function cell({ field, config }, row, context) {
  const value = field.values[row];
  const kind = config.custom?.cellOptions?.type;
  const shown =
    field.type === "time" && !config.unit
      ? { text: localText(value) }
      : field.type === "string"
        ? { ...display({ ...config, unit: undefined, noValue: "" }, value) }
        : display(config, value);
  const share = Number.isFinite(value)
    ? Math.min(100, Math.max(0, ((value - (config.min ?? 0)) / ((config.max ?? 100) - (config.min ?? 0))) * 100))
    : 0;
  const align = config.custom?.align && config.custom.align !== "auto" ? { "text-align": config.custom.align } : {};
  const style = { ...align, ...(CELLS[kind]?.(shown, share) ?? {}) };
  const to = config.links?.[0] && link(context.address(config.links[0].url, value), shown.text);
  return h("td", { class: field.type, style }, to || shown.text);
}
