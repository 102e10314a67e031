/** Answers of Prometheus as series and as tables, and the numbers that a series is reduced to. */

import { seriesText } from "./variables.js";

/**
 * @typedef {object} Series one line
 * @property {string} name the legend's
 * @property {string} refId
 * @property {Record<string, string>} labels
 * @property {(number | null)[]} values at the times of its panel
 *
 * @typedef {object} Field one column
 * @property {string} name
 * @property {"time" | "number" | "string"} type
 * @property {string} refId
 * @property {unknown[]} values
 */

const number = (text) => (text === "+Inf" ? Infinity : text === "-Inf" ? -Infinity : Number(text));

/** The name of a series: a template with {{label}}, or "__auto", or all of its labels. */
function legend(template, metric, several, differing) {
  if (template === "__auto") {
    const inside = differing.map((name) => metric[name] ?? "").filter(Boolean);
    return several && inside.length ? inside.join(" ") : (metric.__name__ ?? "Value");
  }
  if (!template) return seriesText(metric);
  return template.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, name) => metric[name] ?? "").trim();
}

function namesOf(target, result) {
  const labels = [...new Set(result.flatMap(({ metric }) => Object.keys(metric)))];
  const differing = labels.filter((name) => new Set(result.map(({ metric }) => metric[name])).size > 1);
  return result.map(({ metric }) => legend(target.legendFormat, metric, result.length > 1, differing));
}

/** @returns {number[]} seconds from start to end, each step */
export function timesOf({ start, end }, stepMs) {
  return Array.from({ length: Math.floor((end - start) / stepMs) + 1 }, (_, at) => (start + at * stepMs) / 1000);
}

/** @returns {Series[]} a range query's answer; what is not there at a time is null, so that a gap shows */
export function rangeSeries(target, result, { start, end }, stepMs) {
  const length = Math.floor((end - start) / stepMs) + 1;
  const names = namesOf(target, result);
  return result.map(({ metric, values = [] }, at) => {
    const row = new Array(length).fill(null);
    for (const [seconds, text] of values) row[Math.round((seconds * 1000 - start) / stepMs)] = number(text);
    return { name: names[at], refId: target.refId, labels: metric, values: row };
  });
}

/** @returns {Series[]} an instant query's answer: the one value is at the last time */
export function instantSeries(target, result, length) {
  const names = namesOf(target, result);
  return result.map(({ metric, value }, at) => {
    const values = new Array(length).fill(null);
    if (value) values[length - 1] = number(value[1]);
    return { name: names[at], refId: target.refId, labels: metric, values };
  });
}

/** @returns {Field[]} a table of a query's answer: the time, its labels, its value; the last one of a range */
export function tableOf(target, result, severalTargets) {
  const labels = [...new Set(result.flatMap(({ metric }) => Object.keys(metric)))].sort();
  const points = result.map(({ value, values }) => value ?? values?.at(-1) ?? [NaN, "NaN"]);
  const field = (name, type, values) => ({ name, type, refId: target.refId, values });
  return [
    field(
      "Time",
      "time",
      points.map(([seconds]) => seconds * 1000),
    ),
    ...labels.map((name) =>
      field(
        name,
        "string",
        result.map(({ metric }) => metric[name] ?? null),
      ),
    ),
    field(
      severalTargets ? `Value #${target.refId}` : "Value",
      "number",
      points.map(([, text]) => number(text)),
    ),
  ];
}

/** @returns {Field[][]} the same of a target that asks for series: a table for each */
export function tablesOfSeries(target, result) {
  return namesOf(target, result).map((name, at) => {
    const points = result[at].values ?? [result[at].value];
    const field = (title, type, values) => ({
      name: title,
      type,
      refId: target.refId,
      labels: result[at].metric,
      values,
    });
    return [
      field(
        "Time",
        "time",
        points.map(([seconds]) => seconds * 1000),
      ),
      field(
        name,
        "number",
        points.map(([, text]) => number(text)),
      ),
    ];
  });
}

const present = (values) => values.filter((each) => each !== null);
const finite = (values) => values.filter((each) => each !== null && !Number.isNaN(each));
const total = (values) => values.reduce((sum, each) => sum + each, 0);
const ofAny = (find) => (values) => (finite(values).length ? find(finite(values)) : null);
const least = (values) => values.reduce((a, b) => Math.min(a, b));
const most = (values) => values.reduce((a, b) => Math.max(a, b));

/**
 * What a series can be reduced to.
 * @type {Record<string, {label: string, of: (values: (number | null)[]) => number | null}>}
 */
export const CALCULATIONS = {
  lastNotNull: { label: "Last *", of: (values) => present(values).at(-1) ?? null },
  last: { label: "Last", of: (values) => values.at(-1) ?? null },
  firstNotNull: { label: "First *", of: (values) => present(values)[0] ?? null },
  first: { label: "First", of: (values) => values[0] ?? null },
  min: { label: "Min", of: ofAny(least) },
  max: { label: "Max", of: ofAny(most) },
  mean: { label: "Mean", of: ofAny((values) => total(values) / values.length) },
  sum: { label: "Total", of: ofAny(total) },
  count: { label: "Count", of: (values) => values.length },
  range: { label: "Range", of: ofAny((values) => most(values) - least(values)) },
  diff: { label: "Difference", of: ofAny((values) => values.at(-1) - values[0]) },
  delta: {
    label: "Delta",
    of: ofAny((values) => total(values.map((each, at) => (at && each > values[at - 1] ? each - values[at - 1] : 0)))),
  },
};

export const reduce = (calculation, values) => (CALCULATIONS[calculation] ?? CALCULATIONS.lastNotNull).of(values);
