/** The bar above a dashboard: variables, time range, refresh. */

import { h } from "./dom.js";
import { durationMs, localText, PRESETS, rangeOf, rangeText } from "./time.js";
import { ALL } from "./variables.js";

const REFRESHES = ["", "5s", "10s", "30s", "1m", "5m", "15m"];

/** A button with a box below it, which Escape or a click elsewhere closes. */
function menu(name, label, content, attributes = {}) {
  const summary = h(
    "summary",
    { "aria-label": name ? `${name}: ${label}` : label },
    name ? h("span", { class: "label" }, name) : null,
    h("span", { class: "value" }, label),
  );
  const details = h("details", { class: "menu", ...attributes }, summary, h("div", { class: "box" }, content));
  details.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !details.open) return;
    details.open = false;
    summary.focus();
  });
  return details;
}

document.addEventListener("pointerdown", (event) => {
  for (const each of document.querySelectorAll("details.menu[open]"))
    if (!each.contains(event.target)) each.open = false;
});

/** @param {import("./variables.js").Variable[]} list @param {(name: string, values: string[]) => void} choose */
export function variableControls(list, choose) {
  return list
    .filter(({ hidden, model }) => !hidden && !["datasource", "constant", "adhoc"].includes(model.type))
    .map((variable) =>
      (variable.model.type === "textbox" ? typed : variable.multi ? several : single)(variable, choose),
    );
}

const trouble = ({ error }) => (error ? { "data-trouble": error, title: error } : {});

function single(variable, choose) {
  const options = variable.options.map(({ text, value }) =>
    h("option", { value, selected: variable.chosen.includes(value) }, text),
  );
  const select = h("select", { onchange: (event) => choose(variable.name, [event.target.value]) }, options);
  return h(
    "label",
    { class: "control", "data-variable": variable.name, ...trouble(variable) },
    h("span", { class: "label" }, variable.label),
    select,
  );
}

function typed(variable, choose) {
  const input = h("input", {
    type: "text",
    value: variable.chosen[0] ?? "",
    onchange: (event) => choose(variable.name, [event.target.value]),
  });
  return h(
    "label",
    { class: "control", "data-variable": variable.name },
    h("span", { class: "label" }, variable.label),
    input,
  );
}

function several(variable, choose) {
  const change = (value, checked) => {
    if (value === ALL) return choose(variable.name, checked ? [ALL] : []);
    const rest = variable.chosen.filter((each) => each !== ALL && each !== value);
    return choose(variable.name, checked ? [...rest, value] : rest);
  };
  const boxes = variable.options.map(({ text, value }) =>
    h(
      "label",
      { class: "choice" },
      h("input", {
        type: "checkbox",
        value,
        checked: variable.chosen.includes(value),
        onchange: (event) => change(value, event.target.checked),
      }),
      text,
    ),
  );
  const filter =
    variable.options.length > 10
      ? h("input", {
          type: "search",
          placeholder: "Filter",
          "aria-label": `Filter ${variable.label}`,
          oninput: (event) =>
            boxes.forEach(
              (box) => (box.hidden = !box.textContent.toLowerCase().includes(event.target.value.toLowerCase())),
            ),
        })
      : null;
  const nothing = variable.options.length
    ? null
    : h("p", { class: "hint" }, variable.error || "nothing to choose from");
  return menu(variable.label, variable.text() || "None", [filter, boxes, nothing].flat().filter(Boolean), {
    "data-variable": variable.name,
    ...trouble(variable),
  });
}

/** @param {(from: string, to: string) => void} choose */
export function rangeControl(range, choose) {
  const field = (name, value) =>
    h("label", {}, name, h("input", { type: "text", name, value, autocomplete: "off", spellcheck: "false" }));
  const written = (raw, ms) => (raw.startsWith("now") ? raw : localText(ms));
  const wrong = h("p", { class: "hint", role: "alert" });
  const form = h(
    "form",
    {
      class: "absolute",
      onsubmit: (event) => {
        event.preventDefault();
        const { From, To } = Object.fromEntries(new FormData(form));
        if (!rangeOf(From.trim(), To.trim()))
          wrong.textContent = "expected now-1h, or a time such as 2026-01-31 12:00, From before To";
        else choose(stored(From.trim()), stored(To.trim()));
      },
    },
    field("From", written(range.raw.from, range.from)),
    field("To", written(range.raw.to, range.to)),
    h("button", { type: "submit" }, "Apply"),
    wrong,
  );
  const presets = PRESETS.map((from) =>
    h(
      "button",
      {
        type: "button",
        class: "choice",
        "data-from": from,
        "aria-pressed": String(range.raw.from === from && range.raw.to === "now"),
        onclick: () => choose(from, "now"),
      },
      rangeText({ raw: { from, to: "now" } }),
    ),
  );
  const shift = (share, scale) => () => {
    const span = range.to - range.from;
    const middle = (range.from + range.to) / 2 + span * share;
    const to = Math.min(Date.now(), middle + (span * scale) / 2);
    choose(String(Math.round(to - span * scale)), String(Math.round(to)));
  };
  const step = (sign, title, share, scale) =>
    h("button", { type: "button", class: "step", title, "aria-label": title, onclick: shift(share, scale) }, sign);
  return h(
    "div",
    { class: "range" },
    step("‹", "Earlier", -0.5, 1),
    menu("", rangeText(range), [form, h("div", { class: "presets" }, presets)], {
      class: "menu right",
      "data-control": "range",
    }),
    step("›", "Later", 0.5, 1),
    step("−", "Zoom out", 0, 2),
  );
}

const stored = (text) => (text.startsWith("now") ? text : String(rangeOf(text, "now+100y").from));

/** @param {(interval: string) => void} choose @param {() => void} now */
export function refreshControl(interval, choose, now) {
  const known =
    REFRESHES.includes(interval) || Number.isNaN(durationMs(interval)) ? REFRESHES : [...REFRESHES, interval];
  const options = known.map((each) => h("option", { value: each, selected: each === interval }, each || "Off"));
  return h(
    "div",
    { class: "refresh" },
    h("button", { type: "button", title: "Refresh now", "aria-label": "Refresh now", onclick: now }, "↻"),
    h("select", { "aria-label": "Refresh each", onchange: (event) => choose(event.target.value) }, options),
  );
}
