/** Time ranges and intervals, as Grafana writes them: now-1h, now-1d/d, milliseconds, 5m. */

const UNIT_MS = { ms: 1, s: 1e3, m: 6e4, h: 36e5, d: 864e5, w: 6048e5, M: 2592e6, y: 31536e6 };
const UNIT_NAMES = { s: "second", m: "minute", h: "hour", d: "day", w: "week", M: "month", y: "year" };
const RELATIVE = /^now(?:([+-])(\d+)([smhdwMy]))?(?:\/([smhdwMy]))?$/;
const DURATION = /^(\d+(?:\.\d+)?)(ms|[smhdwMy])$/;
const ROUNDED = [
  1, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 15e3, 2e4, 3e4, 6e4, 12e4, 3e5, 6e5, 9e5, 12e5, 18e5, 36e5, 72e5,
  108e5, 216e5, 432e5, 864e5, 6048e5, 2592e6,
];

export const PRESETS = ["5m", "15m", "30m", "1h", "3h", "6h", "12h", "24h", "2d", "7d", "30d"].map(
  (each) => `now-${each}`,
);

/** The milliseconds of 5m, 1h, 500ms; NaN for what is none. */
export function durationMs(text) {
  const found = DURATION.exec(text ?? "");
  return found ? Number(found[1]) * UNIT_MS[found[2]] : NaN;
}

/** Milliseconds as PromQL writes a duration. */
export function promDuration(ms) {
  for (const unit of ["d", "h", "m", "s"]) {
    if (ms >= UNIT_MS[unit] && ms % UNIT_MS[unit] === 0) return `${ms / UNIT_MS[unit]}${unit}`;
  }
  return `${Math.max(1, Math.round(ms))}ms`;
}

/** The milliseconds since 1970 of now-1h, of a number, or of a date; NaN for what is none. `end`: of a rounded unit. */
export function moment(text, now, end) {
  const found = RELATIVE.exec(text);
  if (!found) return /^\d+$/.test(text) ? Number(text) : Date.parse(text);
  const [, sign, count, unit, rounding] = found;
  const at = now + (sign === "-" ? -1 : 1) * Number(count ?? 0) * (UNIT_MS[unit] ?? 0);
  return rounding ? rounded(at, rounding, end) : at;
}

function rounded(at, unit, end) {
  const day = new Date(at);
  if (UNIT_MS[unit] < UNIT_MS.d) {
    const floor = Math.floor(at / UNIT_MS[unit]) * UNIT_MS[unit];
    return end ? floor + UNIT_MS[unit] - 1 : floor;
  }
  day.setHours(0, 0, 0, 0);
  if (unit === "w") day.setDate(day.getDate() - ((day.getDay() + 6) % 7));
  if (unit === "M" || unit === "y") day.setDate(1);
  if (unit === "y") day.setMonth(0);
  if (!end) return day.getTime();
  if (unit === "M") day.setMonth(day.getMonth() + 1);
  else if (unit === "y") day.setFullYear(day.getFullYear() + 1);
  else day.setDate(day.getDate() + (unit === "w" ? 7 : 1));
  return day.getTime() - 1;
}

/** @returns {{from: number, to: number, raw: {from: string, to: string}} | null} null when it is none */
export function rangeOf(from, to, now = Date.now()) {
  const range = { from: moment(from, now, false), to: moment(to, now, true), raw: { from, to } };
  return range.from < range.to ? range : null;
}

/** What a range is called. */
export function rangeText({ from, to, raw }) {
  const [, count, unit] = /^now-(\d+)([smhdwMy])$/.exec(raw.from) ?? [];
  if (count && raw.to === "now") return `Last ${count} ${UNIT_NAMES[unit]}${count === "1" ? "" : "s"}`;
  if (RELATIVE.test(raw.from) && RELATIVE.test(raw.to)) return `${raw.from} to ${raw.to}`;
  return `${localText(from)} to ${localText(to)}`;
}

/** As a person writes it and a datetime-local input takes it. */
export function localText(ms) {
  const day = new Date(ms);
  return new Date(ms - day.getTimezoneOffset() * 6e4).toISOString().slice(0, 19).replace("T", " ");
}

/**
 * What a panel's queries count with.
 * @param {number} points the most that the panel can show
 * @param {number} leastMs the shortest step: of the panel, or the scrape interval
 */
export function intervals(range, points, leastMs, scrapeMs) {
  const span = range.to - range.from;
  const wanted = Math.max(span / Math.max(points, 1), span / 10000);
  const round = ROUNDED.find((each, at) => wanted <= (each + (ROUNDED[at + 1] ?? Infinity)) / 2);
  const stepMs = Math.max(round ?? wanted, leastMs);
  return { stepMs, rateMs: Math.max(stepMs + scrapeMs, 4 * scrapeMs) };
}

/** Ends on multiples of the step, so that points do not wander from refresh to refresh. */
export function aligned({ from, to }, stepMs) {
  return { start: Math.floor(from / stepMs) * stepMs, end: Math.floor(to / stepMs) * stepMs };
}
