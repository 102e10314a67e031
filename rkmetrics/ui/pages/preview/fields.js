/** Field configuration: defaults and overrides, and what they make of one value: text and colour. */

import { byName, classic, colour, ink, isScale, scaled } from "./palette.js";
import { format, plain } from "./units.js";

/** Kinds of matchers -> whether a field is meant. */
const MATCHERS = {
  byName: (options, field) => field.name === options,
  byNames: (options, field) => (options.names ?? []).includes(field.name),
  byRegexp: (options, field) => pattern(options).test(field.name),
  byType: (options, field) => field.type === options,
  byFrameRefID: (options, field) => field.refId === options,
};

const pattern = (text) => {
  const [, body, flags] = /^\/(.*)\/(\w*)$/s.exec(text) ?? [null, text, ""];
  return new RegExp(body, flags.replace("g", ""));
};

/**
 * The configuration of one field.
 * @param {{name: string, type: string, refId: string}} field
 */
export function configOf(fieldConfig, field) {
  const config = { ...fieldConfig?.defaults, custom: { ...fieldConfig?.defaults?.custom } };
  for (const { matcher, properties } of fieldConfig?.overrides ?? []) {
    if (!MATCHERS[matcher.id]?.(matcher.options, field)) continue;
    for (const { id, value } of properties) {
      if (id.startsWith("custom.")) put(config.custom, id.slice("custom.".length).split("."), value);
      else config[id] = value;
    }
  }
  return config;
}

function put(target, [first, ...rest], value) {
  target[first] = rest.length ? put({ ...target[first] }, rest, value) : value;
  return target;
}

/** Kinds of value mappings -> what a value becomes; undefined where the mapping is not about it. */
const MAPPINGS = {
  value: (options, value) => options[String(value)],
  range: ({ from, to, result }, value) =>
    typeof value === "number" && (from == null || value >= from) && (to == null || value <= to) ? result : undefined,
  regex: (options, value) => (pattern(options.pattern).test(String(value)) ? options.result : undefined),
  special: ({ match, result }, value) => (SPECIAL[match]?.(value) ? result : undefined),
};
const SPECIAL = {
  null: (value) => value == null,
  nan: (value) => Number.isNaN(value),
  "null+nan": (value) => value == null || Number.isNaN(value),
  true: (value) => value === true,
  false: (value) => value === false,
  empty: (value) => value === "",
};

function mapped(config, value) {
  for (const { type, options } of config.mappings ?? []) {
    const found = MAPPINGS[type]?.(options, value);
    if (found) return found;
  }
  return undefined;
}

/** Steps of the thresholds as [from, colour name], the first from minus infinity. */
export function steps(config) {
  const { mode, steps: list = [] } = config.thresholds ?? {};
  const [low, high] = [config.min ?? 0, config.max ?? 100];
  const at = (value) => (mode === "percentage" ? low + ((high - low) * value) / 100 : value);
  return list.map(({ value, color }, n) => [n === 0 || value == null ? -Infinity : at(value), color]);
}

const stepOf = (config, value) => steps(config).findLast(([from]) => value >= from)?.[1] ?? "text";

/** The name of a value's colour: by mapping, threshold, scale, or the series. @param {number} at the series' number */
function named(config, value, found, name, at) {
  if (found?.color) return found.color;
  const mode = config.color?.mode ?? "thresholds";
  if (mode === "fixed" || mode === "shades") return config.color.fixedColor ?? "text";
  if (mode === "palette-classic-by-name") return byName(name);
  if (mode.startsWith("palette-")) return classic(at);
  if (isScale(mode)) return scaled(mode, (value - (config.min ?? 0)) / ((config.max ?? 100) - (config.min ?? 0)));
  return stepOf(config, value);
}

/**
 * A value as it is shown.
 * @param {number | string | null} value
 * @returns {{text: string, colour: string, ink: string, empty: boolean}}
 */
export function display(config, value, name = "", at = 0) {
  const found = mapped(config, value);
  if (value == null && !found)
    return { text: config.noValue ?? "-", colour: colour("text"), ink: ink("text"), empty: true };
  const shade = named(config, Number(value), found, name, at);
  const text = found?.text ?? (typeof value === "string" ? value : format(config.unit, value, config.decimals));
  return { text, colour: colour(shade), ink: ink(shade), empty: false };
}

/** A value without mappings: on an axis, in a tooltip's corner. */
export const onAxis = (config, value, decimals) =>
  Number.isFinite(value) ? format(config.unit, value, decimals) : plain(value);

/** The colour of a series as a whole; of one that is coloured by value, that of its last. */
export function seriesColour(config, { name, at, last }) {
  return colour(named(config, last ?? 0, undefined, name, at));
}
