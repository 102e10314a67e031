/** Heatmaps of classic histograms: series by `le`, each with all that is below it, become a row for each bucket. */

import { h } from "../dom.js";
import { heat } from "../palette.js";
import { format } from "../units.js";
import { plot, timeAxis, valueAxis } from "./plot.js";

const bound = ({ labels, name }) => Number((labels.le ?? name).replace("Inf", "Infinity"));

/**
 * Rows from the lowest bucket up, without empty ones at the ends.
 * @returns {{from: number, to: number, counts: (number | null)[]}[]}
 */
function buckets(series) {
  const sorted = series.filter((each) => !Number.isNaN(bound(each))).sort((a, b) => bound(a) - bound(b));
  const rows = sorted.map((each, at) => ({
    from: at ? bound(sorted[at - 1]) : 0,
    to: bound(each),
    counts: each.values.map((value, i) =>
      value === null ? null : Math.max(0, value - (at ? (sorted[at - 1].values[i] ?? 0) : 0)),
    ),
  }));
  const busy = rows.map(({ counts }) => counts.some((each) => each > 0));
  const [first, last] = [busy.indexOf(true), busy.lastIndexOf(true)];
  return first < 0 ? rows : rows.slice(Math.max(0, first - 1), last + 2);
}

export function heatmap(body, context) {
  const { panel, times, stepMs } = context;
  const rows = buckets(context.series);
  const config = context.config({ name: "", type: "number", refId: "" });
  const unit = panel.options?.yAxis?.unit ?? config.unit;
  const { scheme = "Oranges", exponent = 0.5 } = panel.options?.color ?? {};
  const least = panel.options?.filterValues?.le ?? 1e-9;
  const most = rows.flatMap(({ counts }) => counts).reduce((a, b) => Math.max(a, b ?? 0), 0);
  const label = (value) => (value === Infinity ? "+Inf" : format(unit, value));
  const host = h("div", { class: "plot" });
  body.append(
    h(
      "div",
      { class: "with-legend bottom" },
      host,
      scale(scheme, most, (value) => format("none", Number(value.toPrecision(3)))),
    ),
  );

  const cells = (self) => {
    const { ctx } = self;
    const gap = Math.min(1, panel.options?.cellGap ?? 1) * devicePixelRatio;
    const edges = rows.concat({}).map((_, at) => Math.round(self.valToPos(at, "y", true)));
    ctx.save();
    ctx.beginPath();
    ctx.rect(self.bbox.left, self.bbox.top, self.bbox.width, self.bbox.height);
    ctx.clip();
    times.forEach((seconds, at) => {
      const left = Math.round(self.valToPos(seconds - stepMs / 1000, "x", true));
      const width = Math.max(1, Math.round(self.valToPos(seconds, "x", true)) - left - gap);
      rows.forEach(({ counts }, row) => {
        if (counts[at] === null || counts[at] <= least) return;
        ctx.fillStyle = heat(scheme, (counts[at] / most) ** exponent);
        ctx.fillRect(left, edges[row + 1], width, edges[row] - edges[row + 1] - gap);
      });
    });
    ctx.restore();
  };
  const splits = (self) => {
    const every = Math.max(1, Math.ceil(18 / (self.bbox.height / devicePixelRatio / rows.length)));
    return rows.map((_, at) => at + 1).filter((at) => (rows.length - at) % every === 0);
  };
  const drawn = plot(
    host,
    context,
    {
      scales: { y: { range: () => [0, rows.length] } },
      axes: [
        timeAxis(),
        valueAxis({
          scale: "y",
          splits,
          grid: { show: false },
          values: (_, at) => at.map((each) => label(rows[each - 1].to)),
        }),
      ],
      series: [{}, { scale: "y", paths: () => null, points: { show: false } }],
      cursor: { y: true, points: { show: false } },
      hooks: { drawAxes: [cells] },
    },
    [times, times.map(() => null)],
    (_, self) => {
      const [at, row] = [
        times.findIndex((each) => each >= self.posToVal(self.cursor.left, "x")),
        Math.floor(self.posToVal(self.cursor.top, "y")),
      ];
      const count = rows[row]?.counts[at];
      if (count == null) return null;
      const name = `${label(rows[row].from)} to ${label(rows[row].to)}`;
      const shade = heat(scheme, (count / (most || 1)) ** exponent);
      return { seconds: times[at], rows: [{ colour: shade, name, text: format("none", count) }] };
    },
  );
  return drawn.destroy;
}

/** Few to many, as colours with their numbers. */
function scale(scheme, most, text) {
  const shades = Array.from({ length: 24 }, (_, at) =>
    h("i", { style: { "background-color": heat(scheme, at / 23) } }),
  );
  return h(
    "div",
    { class: "scale" },
    h("span", {}, "0"),
    h("span", { class: "shades", "aria-hidden": "true" }, shades),
    h("span", {}, text(most)),
  );
}
