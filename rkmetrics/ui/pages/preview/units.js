/** Numbers as people read them: Grafana's unit ids, as many of them as dashboards for Prometheus use. */

const SECOND = [
  [1e-6, 1e-9, "ns"],
  [1e-3, 1e-6, "µs"],
  [1, 1e-3, "ms"],
  [60, 1, "s"],
  [3600, 60, "min"],
  [86400, 3600, "hour"],
  [604800, 86400, "day"],
  [31536000, 604800, "week"],
  [Infinity, 31536000, "year"],
];
const PLURAL = new Set(["hour", "day", "week", "year"]);
const SI = ["", "k", "M", "G", "T", "P", "E"];
const IEC = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
const SHORT = ["", " K", " Mil", " Bil", " Tri", " Quadr", " Quint"];

/** Digits after the point that make three significant ones, as in Grafana. */
const digits = (value) => (Number.isInteger(value) ? 0 : Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value)))));

/** @param {number} value @param {number | null | undefined} decimals null: as many as the value needs */
export function plain(value, decimals) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "+Inf" : "-Inf";
  const text = value.toFixed(decimals ?? Math.min(digits(value), 15));
  return decimals == null && text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

function stepped(value, decimals, base, prefixes, unit, gap = " ") {
  let at = 0;
  let rest = value;
  while (Math.abs(rest) >= base && at < prefixes.length - 1) [rest, at] = [rest / base, at + 1];
  return plain(rest, decimals) + (prefixes[at] || unit ? gap : "") + prefixes[at].trim() + unit;
}

function duration(seconds, decimals) {
  const [, size, name] = SECOND.find(([limit]) => Math.abs(seconds) < limit) ?? SECOND.at(-1);
  if (seconds === 0) return "0 s";
  const text = plain(seconds / size, decimals);
  return `${text} ${name}${PLURAL.has(name) && text !== "1" ? "s" : ""}`;
}

/** 1 day 2 hours 3 minutes, two parts of it. */
function inWords(seconds) {
  const parts = [
    ["d", 86400],
    ["h", 3600],
    ["m", 60],
    ["s", 1],
  ];
  let rest = Math.abs(Math.round(seconds));
  const words = parts.flatMap(([name, size]) => {
    const count = Math.floor(rest / size);
    rest -= count * size;
    return count ? [`${count}${name}`] : [];
  });
  return (seconds < 0 ? "-" : "") + (words.slice(0, 2).join(" ") || "0s");
}

const counted = (unit) => (value, decimals) => `${stepped(value, decimals, 1000, SHORT, "")} ${unit}`;
const metric = (unit) => (value, decimals) => stepped(value, decimals, 1000, SI, unit);
const binary = (unit) => (value, decimals) => stepped(value, decimals, 1024, IEC, unit);
const times = (factor) => (value, decimals) => duration(value * factor, decimals);
const answer = (yes, no) => (value) => (value ? yes : no);
const moment = (value) => new Date(value).toLocaleString();

/** @type {Record<string, (value: number, decimals?: number | null) => string>} */
const UNITS = {
  none: plain,
  short: (value, decimals) => stepped(value, decimals, 1000, SHORT, ""),
  percent: (value, decimals) => `${plain(value, decimals)}%`,
  percentunit: (value, decimals) => `${plain(Number((value * 100).toPrecision(12)), decimals)}%`,
  s: duration,
  ms: times(1e-3),
  µs: times(1e-6),
  ns: times(1e-9),
  m: times(60),
  h: times(3600),
  d: times(86400),
  dtdurations: inWords,
  dtdurationms: (value) => inWords(value / 1000),
  clocks: inWords,
  dthms: inWords,
  dtdhms: inWords,
  bytes: binary("B"),
  decbytes: metric("B"),
  bits: binary("b"),
  decbits: metric("b"),
  kbytes: (value, decimals) => binary("B")(value * 1024, decimals),
  Bps: metric("B/s"),
  binBps: binary("B/s"),
  bps: metric("b/s"),
  binbps: binary("b/s"),
  cps: counted("c/s"),
  ops: counted("ops/s"),
  reqps: counted("req/s"),
  rps: counted("rd/s"),
  wps: counted("wr/s"),
  iops: counted("io/s"),
  eps: counted("evt/s"),
  mps: counted("msg/s"),
  cpm: counted("c/m"),
  opm: counted("ops/m"),
  hertz: metric("Hz"),
  celsius: (value, decimals) => `${plain(value, decimals)} °C`,
  bool: answer("True", "False"),
  bool_yes_no: answer("Yes", "No"),
  bool_on_off: answer("On", "Off"),
  dateTimeAsIso: moment,
  dateTimeAsLocal: moment,
  dateTimeFromNow: (value) => `${inWords((Date.now() - value) / 1000)} ago`,
  sishort: metric(""),
  string: (value) => String(value),
  locale: (value) => value.toLocaleString(),
};

/** @param {string | undefined} unit @param {number} value */
export function format(unit, value, decimals) {
  if (!Number.isFinite(value)) return plain(value, 0);
  const found = UNITS[unit || "none"];
  if (found) return found(value, decimals);
  const [kind, ...rest] = unit.split(":");
  if (kind === "prefix") return rest.join(":") + plain(value, decimals);
  return `${plain(value, decimals)} ${kind === "suffix" ? rest.join(":") : unit}`.trimEnd();
}

export const isBinary = (unit) => ["bytes", "bits", "kbytes", "binBps", "binbps"].includes(unit);
export const isTime = (unit) => ["s", "ms", "µs", "ns", "m", "h", "d"].includes(unit);
