/** What is shown, as it stands in the address: dashboard, time range, refresh, variables. Grafana's names for them. */

const DASHBOARD = /(?:^|\/)d\/([\w-]+)/;

export class Address {
  #search = new URLSearchParams(location.search);

  /** Called after each change. */
  changed = () => {};

  get(name) {
    return this.#search.get(name);
  }

  /** @returns {Record<string, string[]>} values that are chosen, by variable */
  variables() {
    const names = [...new Set(this.#search.keys())].filter((name) => name.startsWith("var-"));
    return Object.fromEntries(names.map((name) => [name.slice("var-".length), this.#search.getAll(name)]));
  }

  /** @param {Record<string, string | string[]>} values the new ones; an empty list takes a name away */
  change(values) {
    for (const [name, value] of Object.entries(values)) {
      this.#search.delete(name);
      for (const each of [value].flat()) this.#search.append(name, each);
    }
    history.replaceState(null, "", `?${this.#search}`);
    this.changed();
  }

  /** The address of another dashboard, at the same time and with the same choices. */
  of(key) {
    const search = new URLSearchParams(this.#search);
    search.set("d", key);
    return `?${search}`;
  }

  /** A link as dashboards write it: /d/uid?... is a page of ours, anything else is left as it is. */
  translated(url) {
    const found = DASHBOARD.exec(url.split("?")[0]);
    if (!found) return url;
    const search = new URLSearchParams(this.#search);
    for (const [name, value] of new URLSearchParams(url.split("?")[1] ?? "")) search.set(name, value);
    search.set("d", found[1]);
    return `?${search}`;
  }
}
