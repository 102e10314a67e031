/** Single numbers: stat, gauge and bar gauge. */

import { h, svg } from "../dom.js";
import { display, steps } from "../fields.js";
import { reduce } from "../frames.js";
import { colour, faded, over } from "../palette.js";
import { localText } from "../time.js";

/** The numbers of a panel: one of each series, or each value of a table. */
function numbersOf({ panel, series, tables, times, config }) {
  const { calcs = ["lastNotNull"], values: everyValue = false } = panel.options?.reduceOptions ?? {};
  const fields = tables
    ? tables
        .flat()
        .filter((field) => field.type === "number")
        .map((field) => ({ ...field, labels: {} }))
    : series;
  return fields.flatMap((each, at) => {
    const own = config(each);
    const name = own.displayName || each.name;
    const values = everyValue ? each.values : [reduce(calcs[0], each.values)];
    return values.map((value) => ({
      name,
      value,
      config: own,
      values: each.values,
      seen: calcs[0] === "lastNotNull" ? lastSeen(each.values, times) : "",
      shown: display(own, value, name, at),
    }));
  });
}

/**
 * When there was a value for the last time, if it is not there now. Grafana shows such a number as any other: the one of
 * a process that died in between looks well.
 */
function lastSeen(values, times) {
  const last = values.findLastIndex((each) => each !== null);
  return last >= 0 && last < times.length - 2 ? localText(times[last] * 1000).slice(11) : "";
}

const since = (seen) => (seen ? h("div", { class: "since" }, `gone since ${seen}`) : null);

/** Nothing to show is one place with the panel's word for it. */
function orNothing(numbers, { config }) {
  if (numbers.length) return numbers;
  const own = config({ name: "", type: "number", refId: "" });
  return [
    {
      name: "",
      value: null,
      config: own,
      values: [],
      seen: "",
      shown: display({ ...own, noValue: own.noValue ?? "No data" }, null),
    },
  ];
}

const tiles = (panel, list) => {
  const upright = panel.options?.orientation === "vertical";
  return h("div", { class: `tiles ${upright ? "upright" : ""}` }, list);
};

const classes = (always, chosen) => [always, ...Object.keys(chosen).filter((each) => chosen[each])].join(" ");

/** The letters that the longest text has, which set the size of all. */
const letters = (numbers) => Math.max(4, ...numbers.map(({ shown }) => shown.text.length));

export function stat(body, context) {
  const { panel } = context;
  const numbers = orNothing(numbersOf(context), context);
  const { colorMode = "value", graphMode = "none", textMode = "auto" } = panel.options ?? {};
  const named = textMode === "value_and_name" || (textMode === "auto" && numbers.length > 1);
  body.append(
    tiles(
      panel,
      numbers.map(({ name, values, seen, shown }) => {
        const filled = colorMode.startsWith("background") && !shown.empty;
        const style = {
          "--letters": letters(numbers),
          color: filled ? over(shown.colour) : colorMode === "none" ? "" : shown.ink,
        };
        if (filled) style["background-color"] = shown.colour;
        return h(
          "div",
          { class: classes("tile", { empty: shown.empty, gone: seen }), style },
          named || textMode === "name" ? h("div", { class: "name" }, name) : null,
          textMode === "name" ? null : h("div", { class: "number" }, shown.text),
          since(seen),
          graphMode === "area" ? spark(values, shown.colour) : null,
        );
      }),
    ),
  );
}

/** The course of a number, without axes. */
function spark(values, shade) {
  const there = values.flatMap((each, at) => (Number.isFinite(each) ? [[at, each]] : []));
  if (there.length < 2) return null;
  const [low, high] = [Math.min(...there.map(([, each]) => each)), Math.max(...there.map(([, each]) => each))];
  const y = (each) => 38 - (high > low ? ((each - low) / (high - low)) * 34 : 0);
  const x = (at) => (at / (values.length - 1)) * 100;
  const line = there.map(([at, each]) => `${x(at).toFixed(2)},${y(each).toFixed(2)}`).join(" ");
  return svg(
    "svg",
    { class: "spark", viewBox: "0 0 100 40", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("polygon", { points: `${x(there[0][0])},40 ${line} ${x(there.at(-1)[0])},40`, fill: faded(shade, 0.15) }),
    svg("polyline", {
      points: line,
      fill: "none",
      stroke: shade,
      "stroke-width": 1.5,
      "vector-effect": "non-scaling-stroke",
    }),
  );
}

const SWEEP = 240; // degrees of a gauge

/** A part of a ring, from and to as shares of the sweep. */
function arc(from, to, radius, width, shade) {
  const point = (share) => {
    const angle = ((share * SWEEP - SWEEP / 2 - 90) * Math.PI) / 180;
    return `${(100 + radius * Math.cos(angle)).toFixed(2)} ${(100 + radius * Math.sin(angle)).toFixed(2)}`;
  };
  const large = (to - from) * SWEEP > 180 ? 1 : 0;
  return svg("path", {
    d: `M ${point(from)} A ${radius} ${radius} 0 ${large} 1 ${point(to)}`,
    fill: "none",
    stroke: shade,
    "stroke-width": width,
  });
}

export function gauge(body, context) {
  const { panel } = context;
  const numbers = orNothing(numbersOf(context), context);
  const markers = panel.options?.showThresholdMarkers !== false;
  body.append(
    tiles(
      panel,
      numbers.map(({ name, value, config, seen, shown }) => {
        const share = shareOf(config);
        const bounds = steps(config).map(([from, shade], at, all) => [
          share(from),
          share(all[at + 1]?.[0] ?? Infinity),
          shade,
        ]);
        const filled = Number.isFinite(value) ? share(value) : 0;
        return h(
          "div",
          {
            class: classes("tile gauge", { empty: shown.empty, gone: seen }),
            style: { "--letters": letters(numbers) },
          },
          svg(
            "svg",
            { viewBox: "8 8 184 146", role: "img", "aria-label": `${name} ${shown.text}` },
            arc(0, 1, 74, 22, "var(--track)"),
            filled > 0 ? arc(0, filled, 74, 22, shown.colour) : null,
            markers
              ? bounds.filter(([from, to]) => to > from).map(([from, to, shade]) => arc(from, to, 89, 5, colour(shade)))
              : null,
            svg(
              "text",
              {
                x: 100,
                y: 112,
                "text-anchor": "middle",
                class: "number",
                fill: shown.empty ? "var(--muted)" : shown.ink,
                "font-size": Math.min(32, 170 / shown.text.length),
              },
              shown.text,
            ),
          ),
          since(seen) ?? h("div", { class: "name" }, numbers.length > 1 ? name : ""),
        );
      }),
    ),
  );
}

const shareOf = ({ min = 0, max, unit }) => {
  const most = max ?? (unit === "percentunit" ? 1 : 100);
  return (value) => Math.min(1, Math.max(0, (value - min) / (most - min || 1)));
};

export function barGauge(body, context) {
  const numbers = orNothing(numbersOf(context), context);
  const most = Math.max(...numbers.map(({ value }) => (Number.isFinite(value) ? value : 0)), 0);
  body.append(
    h(
      "div",
      { class: "bars" },
      numbers.map(({ name, value, config, shown }) => {
        const share = shareOf({ ...config, max: config.max ?? (most || 1) })(value ?? 0);
        return h(
          "div",
          { class: "bar" },
          h("span", { class: "name" }, name),
          h(
            "span",
            { class: "track" },
            h("i", { style: { width: `${share * 100}%`, "background-color": shown.colour } }),
          ),
          h("b", { style: { color: shown.ink } }, shown.text),
        );
      }),
    ),
  );
}
