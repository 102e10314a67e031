/** One panel: its frame, its queries, and what is drawn of their answers. */

import { explain } from "./about.js";
import { h, link, rebuilt } from "./dom.js";
import { configOf } from "./fields.js";
import { instantSeries, rangeSeries, tableOf, tablesOfSeries, timesOf } from "./frames.js";
import { KINDS } from "./panels/index.js";
import { aligned, durationMs, intervals, promDuration } from "./time.js";
import { transform } from "./transformations.js";

const longest = (list) => Math.max(0, ...list.map((each) => durationMs(each) || 0));

export class Panel {
  #model;
  #kind;
  #body = h("div", { class: "body" });
  #title = h("h3", {});
  #notes = h("p", { class: "notes" });
  #state = {}; // what a person has chosen in it; outlives a drawing
  #end = null; // ends what is drawn
  #last = null; // context of the last drawing
  #queries = []; // as they were sent

  constructor(model) {
    this.#model = model;
    this.#kind = KINDS[model.type];
    const { x = 0, y = 0, w = 12, h: height = 8 } = model.gridPos ?? {};
    this.place = { x, y, w, height };
    const about = h(
      "button",
      {
        type: "button",
        class: "about",
        title: model.description || "Queries and numbers",
        "aria-label": `About ${model.title || "this panel"}`,
        onclick: () => this.#explain(),
      },
      "i",
    );
    this.element = h(
      "article",
      {
        class: `panel ${model.transparent ? "transparent" : ""}`,
        "data-panel": model.id,
        "data-type": model.type,
        "data-state": "loading",
      },
      h("header", {}, this.#title, about),
      this.#body,
      this.#notes,
    );
  }

  /** Ask and draw anew; an error is drawn too. Returns whether all went well. @param {object} round see Page */
  async refresh(round) {
    this.element.setAttribute("aria-busy", "true");
    try {
      const context = await this.#ask(round);
      if (!round.over()) this.#draw(context);
      return true;
    } catch (error) {
      if (error.name === "AbortError") return true; // a newer round is on its way
      this.#trouble(error);
      return false;
    } finally {
      if (!round.over()) this.element.removeAttribute("aria-busy");
    }
  }

  /** Draw the same in other colours. */
  redraw() {
    if (this.#last) this.#draw(this.#last);
  }

  close() {
    this.#end?.();
    this.#end = this.#last = null;
  }

  async #ask(round) {
    const { client, range, variables } = round;
    const model = this.#model;
    this.#title.textContent = variables.write(model.title, range, {}, "text");
    if (!this.#kind) throw new Error(`panels of type ${model.type} are not known here`);
    const targets = targetsOf(model);
    const step = this.#step(targets, round);
    const scope = scopeOf(step);
    this.#queries = targets.map((target) => variables.write(target.expr, range, scope));
    const span = aligned(range, step.stepMs);
    const answers = await Promise.all(
      targets.map((target, at) =>
        isInstant(target, model)
          ? client.instant(this.#queries[at], range.to)
          : client.range(this.#queries[at], span.start, span.end, step.stepMs),
      ),
    );
    return { ...round, ...shape(model, this.#kind, targets, answers, span, step), ...this.#own(round) };
  }

  /** The step of its queries: as many points as it has pixels, and no shorter than it or its queries ask for. */
  #step(targets, { range, scrapeMs, variables }) {
    const asked = [this.#model.interval, ...targets.map((target) => target.interval)];
    const least = longest(asked.map((each) => variables.write(each, range))) || scrapeMs;
    const points = this.#model.maxDataPoints ?? Math.max(200, this.#body.clientWidth);
    return intervals(range, points, least, least);
  }

  /** What drawing needs to know of this panel. */
  #own({ range, variables, address }) {
    const model = this.#model;
    return {
      panel: model,
      state: this.#state,
      write: (text) => variables.write(text, range, {}, "text"),
      config: (field) => configOf(model.fieldConfig, { type: "number", ...field }),
      address: (url, value = "") => address(variables.write(url, range, { __value: String(value) }, "percentencode")),
    };
  }

  #draw(context) {
    const empty = context.count === 0 && !this.#kind.quiet;
    rebuilt(this.#body, () => {
      this.close();
      this.#last = context;
      this.#body.replaceChildren();
      if (empty) this.#body.append(nothing(this.#model, context.config({ name: "" }).noValue));
      else this.#end = this.#kind.draw(this.#body, context) ?? null;
    });
    this.element.dataset.state = context.count === 0 && this.#model.type !== "text" ? "empty" : "ok";
    this.#notes.textContent = context.unknown.length ? `Not applied here: ${context.unknown.join(", ")}` : "";
  }

  #trouble(error) {
    this.close();
    this.element.dataset.state = "error";
    const query = error.query ? h("code", {}, error.query) : null;
    this.#body.replaceChildren(h("div", { class: "trouble", role: "alert" }, h("p", {}, error.message), query));
  }

  #explain() {
    const { series = [], config, address } = this.#last ?? {};
    const links = address ? (this.#model.links ?? []).map((each) => link(address(each.url), each.title)) : [];
    const about = { title: this.#title.textContent, description: this.#model.description, queries: this.#queries };
    explain({ ...about, links: links.filter(Boolean), series, config });
  }
}

/** No data, and what the description says of that: "Empty while nothing starts." */
function nothing({ description = "" }, text = "No data") {
  const [why] = /Empty (?:where|while|when|is)[^.]*\./.exec(description) ?? [];
  return h("div", { class: "nothing" }, h("p", {}, text), why ? h("p", { class: "hint" }, why) : null);
}

/** The queries of a panel. Raises Error when it has some, and none is for Prometheus. */
function targetsOf({ targets = [] }) {
  const shown = targets.filter((target) => !target.hide);
  const found = shown.filter((target) => target.expr);
  if (shown.length && !found.length) throw new Error("this panel asks nothing of Prometheus");
  return found;
}

const isInstant = (target, model) => target.instant && (!target.range || model.type === "table");

const scopeOf = ({ stepMs, rateMs }) => ({
  __interval: promDuration(stepMs),
  __interval_ms: String(Math.round(stepMs)),
  __auto: promDuration(stepMs),
  __rate_interval: promDuration(rateMs),
  __rate_interval_ms: String(Math.round(rateMs)),
});

/** The answers as the kind of panel takes them: series on common times, or tables; count: of what there is to show. */
function shape(model, kind, targets, answers, span, { stepMs }) {
  const transformations = model.transformations ?? [];
  if (kind.tables === true || (kind.tables && transformations.length)) {
    const tables = targets.flatMap((target, at) =>
      target.format === "table"
        ? [tableOf(target, answers[at], targets.length > 1)]
        : tablesOfSeries(target, answers[at]),
    );
    const found = transform(
      tables.filter((fields) => fields[0].values.length),
      transformations,
    );
    return {
      ...found,
      series: [],
      times: [],
      stepMs,
      count: found.tables.reduce((sum, [first]) => sum + (first?.values.length ?? 0), 0),
    };
  }
  const times = timesOf(span, stepMs);
  const series = targets.flatMap((target, at) =>
    isInstant(target, model)
      ? instantSeries(target, answers[at], times.length)
      : rangeSeries(target, answers[at], span, stepMs),
  );
  const unknown = transformations.filter((each) => !each.disabled).map(({ id }) => id);
  return { series, tables: null, times, stepMs, unknown, count: series.length };
}
