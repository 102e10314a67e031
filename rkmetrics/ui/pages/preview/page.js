/** One dashboard on the page: rounds of asking, and when the next one is due. */

import { rangeControl, refreshControl, variableControls } from "./controls.js";
import { rebuilt } from "./dom.js";
import { Grid } from "./grid.js";
import { colour } from "./palette.js";
import { Client } from "./prometheus.js";
import { aligned, durationMs, intervals, rangeOf } from "./time.js";
import { Variables } from "./variables.js";

const FALLBACK = { from: "now-1h", to: "now" };

export class Page {
  #dashboard;
  #settings;
  #places;
  #address;
  #client = new Client();
  #variables;
  #grid;
  #timer = 0;
  #round = 0;
  #dueAt = Infinity;
  #chosen = true; // something that the bar has to show

  /**
   * @param {object} dashboard
   * @param {{prometheus: string, scrapeIntervalSeconds: number}} settings
   * @param {{bar: Element, main: Element, status: Element}} places
   * @param {import("./address.js").Address} address
   */
  constructor(dashboard, settings, places, address) {
    [this.#dashboard, this.#settings, this.#places, this.#address] = [dashboard, settings, places, address];
    this.#variables = new Variables(dashboard, settings.prometheus);
    this.#grid = new Grid(dashboard, () => this.refresh());
    places.main.replaceChildren(this.#grid.element);
    document.addEventListener("visibilitychange", () => this.#wake());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
      this.#grid.shown().forEach((panel) => panel.redraw()),
    );
  }

  get #range() {
    const { time = FALLBACK } = this.#dashboard;
    const [from, to] = [this.#address.get("from") ?? time.from, this.#address.get("to") ?? time.to];
    return rangeOf(from, to) ?? rangeOf(FALLBACK.from, FALLBACK.to);
  }

  get #interval() {
    return this.#address.get("refresh") ?? this.#dashboard.refresh ?? "";
  }

  /** Ask for everything that is shown; what an earlier round still waits for is given up. */
  async refresh() {
    const number = ++this.#round;
    clearTimeout(this.#timer);
    this.#client.supersede();
    this.#places.status.textContent = "…";
    const round = this.#begin(number);
    try {
      await this.#variables.load(this.#client, round.range, this.#address.variables());
      this.#show(round.range);
      round.annotations = await this.#annotations(round.range);
      const panels = this.#grid.shown();
      const fine = await Promise.all(panels.map((panel) => panel.refresh(round)));
      if (!round.over()) this.#finish(fine.filter((each) => !each).length);
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    } finally {
      if (!round.over()) this.#schedule();
    }
  }

  #begin(number) {
    return {
      client: this.#client,
      range: this.#range,
      variables: this.#variables,
      annotations: [],
      scrapeMs: this.#settings.scrapeIntervalSeconds * 1000,
      crosshair: (this.#dashboard.graphTooltip ?? 0) > 0,
      over: () => number !== this.#round,
      zoom: (from, to) => this.#change({ from: String(from), to: String(to) }),
      address: (url) => this.#address.translated(url),
    };
  }

  #finish(troubled) {
    const at = new Date().toLocaleTimeString();
    this.#places.status.textContent = troubled
      ? `${troubled} ${troubled === 1 ? "panel is" : "panels are"} in trouble (${at})`
      : `Updated ${at}`;
    this.#places.status.classList.toggle("bad", troubled > 0);
    document.body.dataset.round = String(this.#round); // of the last that was finished
  }

  /** Build the bar. Not under the hands of somebody who has a menu open, unless it is by what was chosen there. */
  #show(range) {
    const { bar } = this.#places;
    const open = bar.querySelector("details[open]");
    if (open && !this.#chosen) return;
    const name = open?.dataset.variable;
    this.#chosen = false;
    rebuilt(bar, () => {
      bar.replaceChildren(
        ...variableControls(this.#variables.list, (variable, values) => this.#change({ [`var-${variable}`]: values })),
        rangeControl(range, (from, to) => this.#change({ from, to })),
        refreshControl(
          this.#interval,
          (refresh) => this.#change({ refresh }),
          () => this.refresh(),
        ),
      );
      const menu = name && bar.querySelector(`details[data-variable="${CSS.escape(name)}"]`);
      if (menu) menu.open = true; // several can be chosen, one after the other
    });
  }

  #change(values) {
    this.#chosen = true;
    this.#address.change(values);
    this.refresh();
  }

  #schedule() {
    const ms = durationMs(this.#interval);
    this.#dueAt = Number.isNaN(ms) ? Infinity : Date.now() + Math.max(ms, 1000);
    this.#wake();
  }

  /** Nobody looks at a hidden tab: it asks again once it is seen, at once if it is late. */
  #wake() {
    clearTimeout(this.#timer);
    if (document.hidden || this.#dueAt === Infinity) return;
    this.#timer = setTimeout(() => this.refresh(), Math.max(0, this.#dueAt - Date.now()));
  }

  /** Moments that the dashboard marks on all plots. One that cannot be found is left out: panels tell of trouble. */
  async #annotations(range) {
    const marked = (this.#dashboard.annotations?.list ?? []).filter((each) => each.enable && each.expr);
    const { stepMs, rateMs } = intervals(
      range,
      200,
      this.#settings.scrapeIntervalSeconds * 1000,
      this.#settings.scrapeIntervalSeconds * 1000,
    );
    const { start, end } = aligned(range, stepMs);
    const found = await Promise.all(
      marked.map(async (each) => {
        const query = this.#variables.write(each.expr, range, {
          __rate_interval: `${rateMs}ms`,
          __interval: `${stepMs}ms`,
        });
        const result = await this.#client.range(query, start, end, stepMs).catch((error) => {
          if (error.name === "AbortError") throw error;
          return [];
        });
        return result
          .flatMap(({ values }) => moments(values, each))
          .map((seconds) => ({ seconds, colour: colour(each.iconColor) }));
      }),
    );
    return found.flat();
  }
}

/** When something happened: where the value says so, each value once; else where a series begins. */
function moments(values, { useValueForTime }) {
  if (useValueForTime) return [...new Set(values.map(([, text]) => Number(text) / 1000))];
  return values
    .filter(([seconds], at) => at === 0 || seconds - values[at - 1][0] > 2 * (values[1]?.[0] - values[0][0] || 0))
    .map(([seconds]) => seconds);
}
