/** What every plot over time shares: the size, the time axis, the crosshair, zooming, marks of annotations. */

import { css, dark, faded } from "../palette.js";
import { tell } from "./tooltip.js";

/** Pixels that a label of the widest tick takes. */
function widest(plot, texts, at) {
  const longest = (texts ?? []).reduce((a, b) => (String(b).length > a.length ? String(b) : a), "");
  plot.ctx.font = plot.axes[at].font[0];
  return Math.ceil(plot.ctx.measureText(longest).width / devicePixelRatio) + 18;
}

const FONT = '12px system-ui, "Helvetica Neue", Arial, sans-serif';
const line = () => ({ stroke: css("grid"), width: 1 });

/** The time axis. */
export const timeAxis = () => ({
  stroke: css("muted"),
  font: FONT,
  grid: line(),
  ticks: { ...line(), size: 4 },
  size: 28,
  gap: 4,
  space: 70,
  values: [
    [31536000, "{YYYY}", null, null, null, null, null, null, 1],
    [2419200, "{YYYY}-{MM}", null, null, null, null, null, null, 1],
    [86400, "{MM}-{DD}", null, null, null, null, null, null, 1],
    [60, "{HH}:{mm}", null, null, null, null, null, null, 1],
    [1, "{HH}:{mm}:{ss}", null, null, null, null, null, null, 1],
  ],
});

/** An axis of values, as wide as its labels. */
export const valueAxis = (more) => ({
  stroke: css("muted"),
  font: FONT,
  grid: line(),
  ticks: { show: false },
  gap: 6,
  space: 32,
  size: (plot, texts, at) => (texts ? widest(plot, texts, at) : 40),
  ...more,
});

/** Draw the annotations of a dashboard as dashed lines with a foot. */
function marks(plot, annotations) {
  const { ctx, bbox } = plot;
  ctx.save();
  for (const { seconds, colour } of annotations) {
    const x = plot.valToPos(seconds, "x", true);
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.strokeStyle = ctx.fillStyle = colour;
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    const foot = 4 * devicePixelRatio;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top + bbox.height - foot);
    ctx.lineTo(x + foot, bbox.top + bbox.height + foot);
    ctx.lineTo(x - foot, bbox.top + bbox.height + foot);
    ctx.fill();
  }
  ctx.restore();
}

/**
 * Draw a plot into a host element, which has its size already.
 * @param {object} options uPlot's, without what is set here
 * @param {(place: number, plot: object) => object | null} hovered what `tell` shows of the index under the pointer
 */
export function plot(host, context, options, data, hovered) {
  const { range, annotations, zoom, crosshair } = context;
  const made = new uPlot(
    {
      width: Math.max(60, host.clientWidth),
      height: Math.max(50, host.clientHeight),
      legend: { show: false },
      ...options,
      cursor: {
        drag: { x: true, y: false, setScale: false },
        sync: crosshair ? { key: "rkmetrics", setSeries: false, scales: ["x", null] } : undefined,
        points: { size: 6 },
        y: false,
        ...options.cursor,
      },
      scales: { x: { time: true, range: () => [range.from / 1000, range.to / 1000] }, ...options.scales },
      hooks: {
        ...options.hooks,
        draw: [...(options.hooks?.draw ?? []), (self) => marks(self, annotations)],
        setCursor: [(self) => tell(self, self.cursor.left >= 0 ? hovered(self.cursor.idx, self) : null)],
        setSelect: [
          (self) => {
            if (self.select.width < 8) return;
            const at = (pixels) => Math.round(self.posToVal(pixels, "x") * 1000);
            zoom(at(self.select.left), at(self.select.left + self.select.width));
          },
        ],
      },
    },
    data,
    host,
  );
  const observer = new ResizeObserver(() => {
    const [width, height] = [host.clientWidth, host.clientHeight];
    if (width && height && (width !== made.width || height !== made.height)) made.setSize({ width, height });
  });
  observer.observe(host);
  return { plot: made, destroy: () => (observer.disconnect(), tell(made, null), made.destroy()) };
}

/** The colour of an area under a line of that colour. @param {number} percent */
export const area = (colour, percent) => faded(colour, (percent / 100) * (dark() ? 1 : 1.2));
