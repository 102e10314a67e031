/** Where panels lie: Grafana's 24 columns, in sections that a row's title opens and closes. */

import { h } from "./dom.js";
import { Panel } from "./panel.js";

/** Panels of a dashboard under their rows. @returns {{title: string | null, collapsed: boolean, panels: Panel[]}[]} */
function sections(dashboard) {
  const found = [{ title: null, collapsed: false, panels: [] }];
  const inOrder = [...dashboard.panels].sort(
    (a, b) => (a.gridPos?.y ?? 0) - (b.gridPos?.y ?? 0) || (a.gridPos?.x ?? 0) - (b.gridPos?.x ?? 0),
  );
  for (const model of inOrder) {
    if (model.type === "row")
      found.push({
        title: model.title,
        collapsed: Boolean(model.collapsed),
        panels: (model.panels ?? []).map((each) => new Panel(each)),
      });
    else found.at(-1).panels.push(new Panel(model));
  }
  return found.filter(({ title, panels }) => title !== null || panels.length);
}

export class Grid {
  #sections;

  /** @param {() => void} opened called when a row was opened: its panels have not asked yet */
  constructor(dashboard, opened) {
    this.#sections = sections(dashboard).map((section) => ({ ...section, details: this.#section(section, opened) }));
    this.element = h(
      "div",
      { class: "sections" },
      this.#sections.map(({ details }) => details),
    );
  }

  #section({ title, collapsed, panels }, opened) {
    const top = Math.min(...panels.map(({ place }) => place.y));
    for (const { element, place } of panels) {
      element.style.setProperty("--x", place.x + 1);
      element.style.setProperty("--w", place.w);
      element.style.setProperty("--y", place.y - top + 1);
      element.style.setProperty("--h", place.height);
    }
    const grid = h(
      "div",
      { class: "grid" },
      panels.map(({ element }) => element),
    );
    if (title === null) return h("section", {}, grid);
    const details = h("details", { class: "section", open: !collapsed }, h("summary", {}, h("h2", {}, title)), grid);
    details.addEventListener(
      "toggle",
      () => details.open && panels.some(({ element }) => element.dataset.state === "loading") && opened(),
    );
    return details;
  }

  /** Panels that are not under a closed row. */
  shown() {
    return this.#sections
      .filter(({ details }) => details.tagName !== "DETAILS" || details.open)
      .flatMap(({ panels }) => panels);
  }

  close() {
    for (const { panels } of this.#sections) panels.forEach((panel) => panel.close());
  }
}
