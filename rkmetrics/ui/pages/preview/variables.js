/** Template variables: what can be chosen, what is chosen, and what that makes of a query. */

import { durationMs, promDuration } from "./time.js";

export const ALL = "$__all";
const REFERENCE = /\$\{(\w+)(?:\.[\w.]+)?(?::(\w+))?\}|\$(\w+)|\[\[(\w+)(?::(\w+))?\]\]/g;
const QUERY = /^\s*(\w+)\(([\s\S]*)\)\s*$/;

/** A value inside a quoted regular expression of PromQL: special characters escaped for both. */
const asPattern = (value) => value.replace(/\\/g, "\\\\\\\\").replace(/[$^*{}[\]'+?.()|]/g, "\\\\$&");
const asLiteral = (value) => value.replace(/\\/g, "\\\\").replace(/"/g, '\\"');
const quoted = (mark) => (values) => values.map((each) => mark + each.replaceAll(mark, `\\${mark}`) + mark).join(",");

/** @type {Record<string, (values: string[], name: string) => string>} formats of ${name:format} */
const FORMATS = {
  regex: (values) => group(values.map((each) => each.replace(/[/\\^$*+?.()|[\]{}]/g, "\\$&"))),
  pipe: (values) => values.join("|"),
  csv: (values) => values.join(","),
  raw: (values) => values.join(","),
  text: (values) => values.join(" + "),
  json: (values) => JSON.stringify(values.length === 1 ? values[0] : values),
  glob: (values) => (values.length > 1 ? `{${values.join(",")}}` : values.join("")),
  doublequote: quoted('"'),
  singlequote: quoted("'"),
  percentencode: (values) => encodeURIComponent(values.length > 1 ? `{${values.join(",")}}` : values.join("")),
  queryparam: (values, name) => values.map((each) => `var-${name}=${encodeURIComponent(each)}`).join("&"),
};

const group = (values) => (values.length > 1 ? `(${values.join("|")})` : values.join(""));

/** One variable of a dashboard. options: {text, value}; chosen: values, or [ALL]. */
export class Variable {
  constructor(model) {
    this.model = model;
    this.name = model.name;
    this.label = model.label || model.name;
    this.multi = Boolean(model.multi);
    this.hidden = model.hide === 2;
    this.options = [];
    this.chosen = [];
    this.error = "";
  }

  /** Take options; of what was chosen stays what is still there, else what the dashboard begins with. */
  offer(options, wanted) {
    this.error = "";
    this.options = this.model.includeAll ? [{ text: "All", value: ALL }, ...options] : options;
    const there = new Set(this.options.map((each) => each.value));
    const kept = (values) => values.filter((each) => there.has(each));
    const first = this.options.length ? [this.options[0].value] : [];
    this.chosen = [wanted, this.chosen, startingWith(this.model)].map(kept).find((each) => each.length) ?? first;
    if (this.chosen.length > 1) this.chosen = this.chosen.filter((each) => each !== ALL);
  }

  get all() {
    return this.chosen.includes(ALL);
  }

  /** What is chosen, as values that can stand for themselves. */
  values() {
    return this.all ? this.options.map((each) => each.value).filter((each) => each !== ALL) : this.chosen;
  }

  text() {
    if (this.all) return "All";
    const texts = new Map(this.options.map((each) => [each.value, each.text]));
    return this.chosen.map((each) => texts.get(each) ?? each).join(" + ");
  }

  /** What a reference becomes. Where nothing can be chosen from, All still matches whatever there is. */
  write(format) {
    if (format === "text") return this.text();
    const fixed = this.all && this.model.allValue;
    if (fixed) return fixed;
    const values = this.values();
    if (this.all && !values.length) return ".*";
    if (format) return (FORMATS[format] ?? FORMATS.glob)(values, this.name);
    return this.multi || this.model.includeAll ? group(values.map(asPattern)) : values.map(asLiteral).join("");
  }
}

function startingWith({ current }) {
  const value = current?.value ?? [];
  return (Array.isArray(value) ? value : [value]).map((each) => (each === "All" ? ALL : String(each)));
}

/** All variables of a dashboard. */
export class Variables {
  constructor(dashboard, prometheusName) {
    this.list = (dashboard.templating?.list ?? []).map((model) => new Variable(model));
    this.prometheusName = prometheusName;
  }

  /** Find what can be chosen, one after the other as they may refer to each other. A failed look-up keeps the last. */
  async load(client, range, wanted) {
    for (const variable of this.list) {
      try {
        variable.offer(await this.#options(variable, client, range), wanted[variable.name] ?? []);
      } catch (error) {
        if (error.name === "AbortError") throw error;
        variable.error = error.message;
        if (!variable.chosen.length)
          variable.chosen = wanted[variable.name] ?? (variable.model.includeAll ? [ALL] : []);
      }
    }
  }

  async #options(variable, client, range) {
    const find = OPTIONS[variable.model.type];
    if (!find) throw new Error(`variables of type ${variable.model.type} are not known here`);
    const found = await find(variable.model, {
      client,
      range,
      write: (text) => this.write(text, range),
      name: this.prometheusName,
    });
    return variable.model.type === "query" ? ordered(picked(found, variable.model.regex), variable.model.sort) : found;
  }

  /** Replace references in a text. scope: further names, such as __interval. */
  write(text, range, scope = {}, format = undefined) {
    const globals = { ...globalsOf(range), ...scope };
    return String(text ?? "").replace(REFERENCE, (whole, a, aFormat, b, c, cFormat) => {
      const name = a ?? b ?? c;
      if (name in globals) return globals[name];
      const variable = this.list.find((each) => each.name === name);
      return variable ? variable.write(aFormat ?? cFormat ?? format) : whole;
    });
  }

  /** Names that a text refers to. */
  namesIn(text) {
    return [...String(text).matchAll(REFERENCE)].map((found) => found[1] ?? found[3] ?? found[4]);
  }
}

function globalsOf({ from, to }) {
  const seconds = Math.max(1, Math.round((to - from) / 1000));
  return {
    __range: `${seconds}s`,
    __range_s: String(seconds),
    __range_ms: String(Math.round(to - from)),
    __from: String(Math.round(from)),
    __to: String(Math.round(to)),
  };
}

/** Type of variable -> what finds its options. */
const OPTIONS = {
  query: async (model, { client, range, write }) => {
    const text = write(typeof model.query === "string" ? model.query : (model.query?.query ?? model.definition));
    const [, call, inside] = QUERY.exec(text) ?? [null, "", ""];
    if (call === "label_values") {
      const at = inside.lastIndexOf(",");
      return client.labelValues(inside.slice(at + 1).trim(), at < 0 ? "" : inside.slice(0, at).trim(), range);
    }
    if (call === "label_names") return client.labelNames(range);
    if (call === "metrics") {
      return (await client.labelValues("__name__", "", range)).filter((each) => new RegExp(inside).test(each));
    }
    const result = await client.instant(call === "query_result" ? inside : text, range.to);
    return result.map(({ metric, value }) => `${seriesText(metric)} ${value[1]} ${Math.round(value[0] * 1000)}`);
  },
  custom: (model) =>
    parts(model.query).map((part) => {
      const [text, value] = part.split(/\s+:\s+/);
      return { text, value: value ?? text };
    }),
  interval: (model, { range }) => {
    const auto = Math.max((range.to - range.from) / (model.auto_count || 30), durationMs(model.auto_min) || 1);
    const steps = parts(model.query).map((each) => ({ text: each, value: each }));
    return model.auto ? [{ text: "auto", value: promDuration(Math.ceil(auto / 1000) * 1000) }, ...steps] : steps;
  },
  datasource: (_, { name }) => [{ text: name, value: name }],
  constant: (model) => [{ text: model.query, value: model.query }],
  textbox: (model) => [{ text: model.query ?? "", value: model.query ?? "" }],
  adhoc: () => [],
};

const parts = (text) =>
  (text ?? "")
    .split(/(?<!\\),/)
    .map((each) => each.trim().replaceAll("\\,", ","))
    .filter(Boolean);

export const seriesText = ({ __name__ = "", ...labels }) => {
  const inside = Object.entries(labels)
    .map(([name, value]) => `${name}="${value}"`)
    .join(", ");
  return inside ? `${__name__}{${inside}}` : __name__ || "Value";
};

/** Keep what the regex of a variable finds; its first group is the value. */
function picked(values, regex) {
  if (!regex) return values.map((each) => ({ text: each, value: each }));
  const [, body, flags] = /^\/(.*)\/(\w*)$/s.exec(regex) ?? [null, regex, ""];
  const pattern = new RegExp(body, flags.replace("g", ""));
  const found = values.flatMap((each) => {
    const match = pattern.exec(each);
    const value = match && (match.groups?.value ?? match[1] ?? each);
    return match ? [{ text: match.groups?.text ?? value, value }] : [];
  });
  return [...new Map(found.map((each) => [each.value, each])).values()];
}

const ORDERS = [
  null,
  (a, b) => a.localeCompare(b, "en"),
  (a, b) => parseFloat(a) - parseFloat(b),
  (a, b) => a.localeCompare(b, "en", { sensitivity: "base" }),
  (a, b) => a.localeCompare(b, "en", { numeric: true }),
];

/** Grafana's sort: 0 none, then pairs of up and down: letters, numbers, letters in any case, natural. */
function ordered(options, sort = 0) {
  const order = ORDERS[Math.min(Math.ceil(sort / 2), ORDERS.length - 1)];
  if (!order) return options;
  return options.toSorted((a, b) => order(a.text, b.text) * (sort % 2 ? 1 : -1));
}
