/** States over time: a row for each series, a bar for as long as a state holds. */

import { h } from "../dom.js";
import { display } from "../fields.js";
import { css, faded, over } from "../palette.js";
import { plot, timeAxis, valueAxis } from "./plot.js";

const ROW_PIXELS = 26;

/** Runs of one state: {from, to} in places of the times, with what is shown. */
function runs(values, config, name, at, merge) {
  const found = [];
  values.forEach((value, i) => {
    if (value === null) return;
    const last = found.at(-1);
    const shown = display(config, value, name, at);
    if (merge && last?.to === i && last.shown.text === shown.text) last.to = i + 1;
    else found.push({ from: i, to: i + 1, shown });
  });
  return found;
}

export function stateTimeline(body, context) {
  const { panel, series, times, stepMs } = context;
  const { showValue = "auto", rowHeight = 0.9, mergeValues = true } = panel.options ?? {};
  const rows = series.map((each, at) => {
    const config = context.config(each);
    const name = config.displayName || each.name;
    return { name, config, runs: runs(each.values, config, name, at, mergeValues) };
  });
  const end = (place) => times[place] ?? times.at(-1) + stepMs / 1000;
  const inner = h("div", { class: "plot", style: { "min-height": `${rows.length * ROW_PIXELS + 34}px` } });
  const host = h(
    "div",
    { class: "scrolled", tabindex: "0", role: "group", "aria-label": panel.title || "States" },
    inner,
  );
  body.append(h("div", { class: "with-legend bottom" }, host, states(panel, rows)));

  const bars = (self) => {
    const { ctx, bbox } = self;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.font = `${12 * devicePixelRatio}px system-ui, sans-serif`;
    ctx.textBaseline = "middle";
    rows.forEach(({ config, runs: found }, row) => {
      const height = (bbox.height / rows.length) * rowHeight;
      const middle = self.valToPos(rows.length - row - 0.5, "y", true);
      for (const { from, to, shown } of found) {
        const [left, right] = [end(from), end(to)].map((each) => self.valToPos(each, "x", true));
        ctx.fillStyle = faded(shown.colour, (config.custom?.fillOpacity ?? 70) / 100);
        ctx.fillRect(left, middle - height / 2, right - left, height);
        const width = ctx.measureText(shown.text).width;
        if (showValue === "never" || (showValue === "auto" && width + 12 > right - Math.max(left, bbox.left))) continue;
        ctx.fillStyle = (config.custom?.fillOpacity ?? 70) < 50 ? css("text") : over(shown.colour);
        ctx.fillText(shown.text, Math.max(left, bbox.left) + 6 * devicePixelRatio, middle);
      }
    });
    ctx.restore();
  };
  const names = rows.map(({ name }) => (name.length > 32 ? `${name.slice(0, 31)}…` : name)).toReversed();
  const drawn = plot(
    inner,
    context,
    {
      scales: { y: { range: () => [0, rows.length] } },
      axes: [
        timeAxis(),
        valueAxis({
          scale: "y",
          grid: { show: false },
          splits: () => rows.map((_, at) => at + 0.5),
          values: () => names,
        }),
      ],
      series: [{}, { scale: "y", paths: () => null, points: { show: false } }],
      cursor: { points: { show: false } },
      hooks: { drawAxes: [bars] },
    },
    [times, times.map(() => null)],
    (_, self) => {
      const row = rows[rows.length - 1 - Math.floor(self.posToVal(self.cursor.top, "y"))];
      const seconds = self.posToVal(self.cursor.left, "x");
      const run = row?.runs.find(({ from, to }) => end(from) <= seconds && seconds < end(to));
      if (!run) return null;
      return { seconds, rows: [{ colour: run.shown.colour, name: row.name, text: run.shown.text }] };
    },
  );
  return drawn.destroy;
}

/** The states that occur, each with its colour. */
function states(panel, rows) {
  if (panel.options?.legend?.showLegend === false) return null;
  const found = new Map(rows.flatMap((row) => row.runs.map(({ shown }) => [shown.text, shown.colour])));
  const entries = [...found].map(([text, shade]) =>
    h("span", { class: "entry" }, h("i", { style: { "background-color": shade } }), text),
  );
  return h("div", { class: "legend-place" }, h("div", { class: "legend list" }, entries));
}
