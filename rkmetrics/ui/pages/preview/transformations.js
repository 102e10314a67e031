/** Grafana's transformations of tables, as many as dashboards for Prometheus use: a table of functions of tables. */

import { CALCULATIONS, reduce } from "./frames.js";

const length = (fields) => fields[0]?.values.length ?? 0;
const rowsOf = (fields) => Array.from({ length: length(fields) }, (_, at) => fields.map(({ values }) => values[at]));
const withRows = (fields, rows) => fields.map((field, at) => ({ ...field, values: rows.map((row) => row[at]) }));
const named = (fields, name) => fields.find((field) => field.name === name);

/** One table of all: rows that agree in what they share become one row. */
function merge(tables) {
  const fields = [];
  for (const field of tables.flat()) if (!named(fields, field.name)) fields.push({ ...field, values: [] });
  const keys = fields.map((field) => field.name).filter((name) => tables.every((table) => named(table, name)));
  const values = new Set(fields.filter((field) => field.type === "number").map((field) => field.name));
  const rows = new Map();
  for (const table of tables) {
    for (let at = 0; at < length(table); at++) {
      const cells = Object.fromEntries(table.map((field) => [field.name, field.values[at]]));
      const key = JSON.stringify(keys.filter((name) => !values.has(name)).map((name) => cells[name]));
      const free =
        tables.length > 1
          ? rows
              .get(key)
              ?.find((row) => Object.keys(cells).every((name) => !values.has(name) || row[name] === undefined))
          : undefined;
      if (free) Object.assign(free, cells);
      else rows.set(key, [...(rows.get(key) ?? []), cells]);
    }
  }
  const all = [...rows.values()].flat();
  return [fields.map((field) => ({ ...field, values: all.map((row) => row[field.name] ?? null) }))];
}

function organize(tables, { excludeByName = {}, indexByName = {}, renameByName = {} }) {
  return tables.map((fields) => {
    const kept = fields.filter((field) => !excludeByName[field.name]);
    const place = (field, at) => indexByName[field.name] ?? 1000 + at;
    const order = kept.map((field, at) => [place(field, at), field]).sort((a, b) => a[0] - b[0]);
    return order.map(([, field]) => ({ ...field, name: renameByName[field.name] || field.name }));
  });
}

/** Join tables by one column; rows without a partner stay. */
function joinByField(tables, { byField }) {
  const key = byField ?? "Time";
  const joinable = tables.filter((fields) => named(fields, key));
  const keys = [...new Set(joinable.flatMap((fields) => named(fields, key).values))];
  const columns = joinable.flatMap((fields) => {
    const places = new Map(named(fields, key).values.map((value, at) => [value, at]));
    return fields
      .filter((field) => field.name !== key)
      .map((field) => ({
        ...field,
        values: keys.map((value) => (places.has(value) ? field.values[places.get(value)] : null)),
      }));
  });
  return joinable.length ? [[{ ...named(joinable[0], key), values: keys }, ...columns]] : [];
}

function sortBy(tables, { sort = [] }) {
  return tables.map((fields) => {
    const at = fields.findIndex((field) => field.name === sort[0]?.field);
    if (at < 0) return fields;
    const way = sort[0].desc ? -1 : 1;
    return withRows(
      fields,
      rowsOf(fields).sort((a, b) => way * compare(a[at], b[at])),
    );
  });
}

/** An order of cells: numbers as numbers, empty ones last. */
export function compare(a, b) {
  if (a == null || b == null) return Number(a == null) - Number(b == null);
  return typeof a === "number" && typeof b === "number"
    ? a - b
    : String(a).localeCompare(String(b), "en", { numeric: true });
}

function reduceRows(tables, { reducers = ["lastNotNull"] }) {
  const fields = tables.flat().filter((field) => field.type === "number");
  const names = { name: "Field", type: "string", refId: "", values: fields.map((field) => field.name) };
  return [
    [
      names,
      ...reducers.map((each) => ({
        name: CALCULATIONS[each]?.label ?? each,
        type: "number",
        refId: "",
        values: fields.map((field) => reduce(each, field.values)),
      })),
    ],
  ];
}

/** Labels of series become columns beside the values. */
function labelsToFields(tables) {
  return tables.map((fields) =>
    fields.flatMap((field) => [
      ...Object.entries(field.type === "number" ? (field.labels ?? {}) : {}).map(([name, value]) => ({
        name,
        type: "string",
        refId: field.refId,
        values: field.values.map(() => value),
      })),
      field,
    ]),
  );
}

const everyField = (change) => (tables, options) =>
  tables.map((fields) => fields.flatMap((field) => change(field, options)));

/**
 * @typedef {import("./frames.js").Field[][]} Tables
 * @type {Record<string, (tables: Tables, options: any) => Tables>}
 */
const TRANSFORMATIONS = {
  merge,
  organize,
  joinByField,
  seriesToColumns: joinByField,
  sortBy,
  reduce: reduceRows,
  labelsToFields,
  renameByRegex: everyField((field, { regex, renamePattern }) => [
    { ...field, name: field.name.replace(new RegExp(regex), renamePattern) },
  ]),
  filterFieldsByName: everyField((field, { include = {} }) =>
    (include.names ? include.names.includes(field.name) : new RegExp(include.pattern ?? "").test(field.name))
      ? [field]
      : [],
  ),
  limit: (tables, { limitField = 10 }) =>
    tables.map((fields) => withRows(fields, rowsOf(fields).slice(0, Number(limitField)))),
};

/** Apply what is known. @returns {{tables: import("./frames.js").Field[][], unknown: string[]}} */
export function transform(tables, list = []) {
  const unknown = [];
  for (const { id, options = {}, disabled } of list) {
    if (disabled) continue;
    if (TRANSFORMATIONS[id]) tables = TRANSFORMATIONS[id](tables, options);
    else unknown.push(id);
  }
  return { tables, unknown };
}
