/** The kinds of panels: what draws each, and what it needs. */

import { heatmap } from "./heatmap.js";
import { stateTimeline } from "./statetimeline.js";
import { barGauge, gauge, stat } from "./stat.js";
import { table } from "./table.js";
import { text } from "./text.js";
import { timeseries } from "./timeseries.js";

/**
 * draw(body, context) fills the body and returns what ends it, if something does. quiet: it shows by itself that there
 * is no data. tables: it is drawn from tables; "transformed" only where the panel transforms.
 * @type {Record<string, {draw: Function, quiet?: boolean, tables?: boolean | "transformed"}>}
 */
export const KINDS = {
  timeseries: { draw: timeseries },
  graph: { draw: timeseries },
  stat: { draw: stat, quiet: true, tables: "transformed" },
  gauge: { draw: gauge, quiet: true, tables: "transformed" },
  bargauge: { draw: barGauge, quiet: true, tables: "transformed" },
  table: { draw: table, tables: true },
  heatmap: { draw: heatmap },
  "state-timeline": { draw: stateTimeline },
  text: { draw: text, quiet: true },
};
