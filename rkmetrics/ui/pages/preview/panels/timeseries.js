/** Lines, areas, bars and points over time. */

import { h } from "../dom.js";
import { display, onAxis, seriesColour, steps } from "../fields.js";
import { reduce } from "../frames.js";
import { colour as colourOf, faded } from "../palette.js";
import { isBinary, isTime } from "../units.js";
import { legend } from "./legend.js";
import { area, plot, timeAxis, valueAxis } from "./plot.js";

const BINARY = Array.from({ length: 51 }, (_, power) => 2 ** power);
const SECONDS = [1e-9, 2e-9, 5e-9]
  .flatMap((each) => Array.from({ length: 9 }, (_, power) => each * 10 ** power))
  .sort((a, b) => a - b)
  .concat([
    1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 432000, 864000,
  ]);
const POWERS = Array.from({ length: 30 }, (_, power) => power - 12).flatMap((power) =>
  [1, 2, 2.5, 5].map((each) => each * 10 ** power),
);
const WHOLE = POWERS.filter(Number.isInteger);

/** Draw into a panel's body. context.state outlives the drawing: which series are switched off. */
export function timeseries(body, context) {
  const { panel, series, state } = context;
  state.off ??= new Set();
  const entries = series
    .map((each, at) => {
      const config = context.config(each);
      const name = config.displayName || each.name;
      return {
        ...each,
        name,
        config,
        colour: seriesColour(config, { name, at, last: reduce("lastNotNull", each.values) }),
      };
    })
    .filter(({ config }) => !config.custom?.hideFrom?.viz);
  let drawn = null;
  const host = h("div", { class: "plot" });
  const place = h("div", { class: "legend-place" });
  const draw = () => {
    drawn?.destroy();
    host.replaceChildren();
    place.replaceChildren(...[legend(panel.options?.legend, entries, state.off, toggle)].filter(Boolean));
    drawn = lines(
      host,
      context,
      entries.filter(({ name }) => !state.off.has(name)),
    );
  };
  const toggle = (name, alone) => {
    const others = entries.map((each) => each.name).filter((each) => each !== name);
    if (alone) state.off = others.every((each) => state.off.has(each)) ? new Set() : new Set(others);
    else if (!state.off.delete(name)) state.off.add(name);
    draw();
    [...place.querySelectorAll("button")].find((each) => each.textContent === name)?.focus();
  };
  body.append(h("div", { class: `with-legend ${panel.options?.legend?.placement ?? "bottom"}` }, host, place));
  draw();
  return () => drawn?.destroy();
}

/** One scale for each unit and side, so that seconds and bytes do not share an axis. */
const scaleOf = ({ config }) => `${config.unit ?? "short"}${config.custom?.axisPlacement === "right" ? " right" : ""}`;

function lines(host, context, entries) {
  const stacks = stacked(entries);
  const keys = [...new Set(entries.map(scaleOf))];
  const scales = Object.fromEntries(keys.map((key) => [key, scale(key, entries, stacks)]));
  const axes = keys.map((key, at) =>
    axis(
      key,
      at,
      entries.filter((each) => scaleOf(each) === key),
    ),
  );
  const options = {
    scales,
    axes: [timeAxis(), ...axes],
    series: [{}, ...entries.map((entry, at) => style(entry, stacks.values[at]))],
    bands: stacks.bands,
    hooks: { drawAxes: [(self) => thresholds(self, entries, scaleOf)] },
  };
  const sort = context.panel.options?.tooltip?.sort;
  const data = [
    context.times,
    ...stacks.values.map((values) => values.map((each) => (Number.isFinite(each) ? each : null))),
  ];
  return plot(host, context, options, data, (at) => {
    const rows = entries.map((entry) => ({ entry, value: entry.values[at] })).filter(({ value }) => value != null);
    if (sort === "desc" || sort === "asc")
      rows.sort((a, b) => (sort === "desc" ? b.value - a.value : a.value - b.value));
    const told = ({ entry, value }) => ({
      colour: entry.colour,
      name: entry.name,
      text: display(entry.config, value).text,
    });
    return { seconds: context.times[at], rows: rows.map(told) };
  });
}

/** Sums of what is stacked, from the bottom up, and the bands between them. */
function stacked(entries) {
  const tops = new Map();
  const bands = [];
  const values = entries.map(({ config, values: own }, at) => {
    const { mode = "none", group = "A" } = config.custom?.stacking ?? {};
    if (mode === "none") return own;
    const below = tops.get(group);
    const sum = own.map((each, i) => (each === null ? (below?.sum[i] ?? null) : (below?.sum[i] ?? 0) + each));
    if (below) bands.push({ series: [at + 1, below.at + 1] });
    tops.set(group, { sum, at });
    return sum;
  });
  const percent = entries.some(({ config }) => config.custom?.stacking?.mode === "percent");
  if (!percent) return { values, bands };
  const whole = tops.values().next().value?.sum ?? [];
  return {
    bands,
    values: values.map((row) => row.map((each, i) => (each === null || !whole[i] ? null : each / whole[i]))),
  };
}

function scale(key, entries, { values }) {
  const mine = entries.flatMap((entry, at) => (scaleOf(entry) === key ? [{ entry, row: values[at] }] : []));
  const { min, max, custom } = mine[0].entry.config;
  if (custom?.scaleDistribution?.type === "log") return { distr: 3, log: custom.scaleDistribution.log ?? 10 };
  return { range: () => bounds(mine.flatMap(({ row }) => row).filter(Number.isFinite), min, max, custom) };
}

/** Lowest and highest value of an axis: what the panel fixes, and a little room above what it leaves free. */
function bounds(values, min, max, custom = {}) {
  if (values.every((each) => each === 0)) return [min ?? 0, max ?? 1];
  const [low, high] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  const [softLow, softHigh] = [Math.min(low, custom.axisSoftMin ?? low), Math.max(high, custom.axisSoftMax ?? high)];
  const room = (softHigh - softLow || Math.abs(softHigh) || 1) * 0.08;
  const bottom = min ?? (softLow >= 0 && softLow - room < 0 ? 0 : softLow - room);
  const top = max ?? softHigh + room;
  return [bottom, top > bottom ? top : bottom + 1];
}

function axis(key, at, entries) {
  const { config } = entries[0];
  const right = config.custom?.axisPlacement === "right" || (at > 0 && config.custom?.axisPlacement !== "left");
  const whole = entries.every(({ values }) => values.every((each) => each === null || Number.isInteger(each)));
  const incrs = isBinary(config.unit)
    ? BINARY
    : isTime(config.unit)
      ? SECONDS.map((each) => each / (config.unit === "ms" ? 1e-3 : 1))
      : whole
        ? WHOLE
        : POWERS;
  return valueAxis({
    scale: key,
    side: right ? 1 : 3,
    incrs,
    label: config.custom?.axisLabel || undefined,
    labelSize: 20,
    ...(at ? { grid: { show: false } } : {}),
    values: (_, splits) =>
      splits.map((each) => (each === null ? null : onAxis(config, Number(each.toPrecision(12)), config.decimals))),
    show: config.custom?.axisPlacement !== "hidden",
  });
}

const PATHS = {
  linear: () => uPlot.paths.linear(),
  smooth: () => uPlot.paths.spline(),
  stepBefore: () => uPlot.paths.stepped({ align: -1 }),
  stepAfter: () => uPlot.paths.stepped({ align: 1 }),
  bars: () => uPlot.paths.bars({ size: [0.7, 40] }),
  points: () => () => null,
};

function style(entry, values) {
  const {
    config: { custom = {} },
    colour,
  } = entry;
  const {
    drawStyle = "line",
    lineInterpolation = "linear",
    lineWidth = 1,
    fillOpacity = 0,
    showPoints = "auto",
    spanNulls,
  } = custom;
  const solid = (custom.stacking?.mode ?? "none") !== "none" && custom.fillOpacity == null ? 60 : fillOpacity;
  return {
    label: entry.name,
    scale: scaleOf(entry),
    stroke: colour,
    width: drawStyle === "points" ? 0 : Math.max(lineWidth, drawStyle === "bars" ? 1 : 0) * 1.25,
    dash: custom.lineStyle?.fill === "dash" ? custom.lineStyle.dash : undefined,
    fill: solid && drawStyle !== "points" ? area(colour, solid) : undefined,
    spanGaps: spanNulls === true,
    paths: (PATHS[drawStyle === "line" ? lineInterpolation : drawStyle] ?? PATHS.linear)(),
    points:
      drawStyle === "points" || showPoints === "always"
        ? { show: true, size: custom.pointSize ?? 5, fill: colour }
        : { show: true, size: 4, fill: colour, filter: () => lonely(values) },
  };
}

/** Places of values without a neighbour, which no line would show. */
function lonely(values) {
  const there = (at) => values[at] !== null && values[at] !== undefined && Number.isFinite(values[at]);
  return values.flatMap((_, at) => (there(at) && !there(at - 1) && !there(at + 1) ? [at] : []));
}

/** Lines or areas at the thresholds, where the panel asks for them. */
function thresholds(self, entries, keyOf) {
  const [first] = entries;
  const mode = first?.config.custom?.thresholdsStyle?.mode ?? "off";
  if (mode === "off") return;
  const { ctx, bbox } = self;
  const list = steps(first.config);
  ctx.save();
  list.forEach(([from, name], at) => {
    const y = (value) => Math.min(bbox.top + bbox.height, Math.max(bbox.top, self.valToPos(value, keyOf(first), true)));
    const [low, high] = [
      Number.isFinite(from) ? y(from) : bbox.top + bbox.height,
      at + 1 < list.length ? y(list[at + 1][0]) : bbox.top,
    ];
    if (mode.includes("area")) {
      ctx.fillStyle = faded(colourOf(name), 0.1);
      ctx.fillRect(bbox.left, high, bbox.width, low - high);
    }
    if ((mode.includes("line") || mode.includes("dashed")) && Number.isFinite(from)) {
      ctx.strokeStyle = colourOf(name);
      ctx.setLineDash(mode.includes("dashed") ? [8, 6] : []);
      ctx.beginPath();
      ctx.moveTo(bbox.left, low);
      ctx.lineTo(bbox.left + bbox.width, low);
      ctx.stroke();
    }
  });
  ctx.restore();
}
