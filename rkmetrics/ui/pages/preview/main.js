/** The preview: which dashboards there are, and the one that the address names. */

import { Address } from "./address.js";
import { h } from "./dom.js";
import { Page } from "./page.js";
import { getJson } from "./prometheus.js";

const place = (id) => document.getElementById(id);
const address = new Address();

/** What all titles begin with, such as "rkmetrics / ". */
function shared(titles) {
  const [first] = titles;
  const cut = first.lastIndexOf(" / ") + 3;
  return titles.length > 1 && cut > 2 && titles.every((each) => each.startsWith(first.slice(0, cut))) ? cut : 0;
}

function navigation({ dashboards }, key) {
  const cut = shared(dashboards.map(({ title }) => title));
  place("dashboards").replaceChildren(
    ...dashboards.map((each) =>
      h(
        "a",
        { href: address.of(each.key), "aria-current": each.key === key ? "page" : undefined },
        each.title.slice(cut),
      ),
    ),
  );
}

function overview({ dashboards }) {
  place("main").replaceChildren(
    h(
      "ul",
      { class: "overview" },
      dashboards.map((each) =>
        h("li", {}, h("a", { href: address.of(each.key) }, each.title), h("p", {}, each.description)),
      ),
    ),
  );
}

async function start() {
  const settings = await getJson("dashboards");
  const key = address.get("d") ?? (settings.dashboards.length === 1 ? settings.dashboards[0].key : null);
  place("prometheus").textContent = settings.prometheus;
  address.changed = () => navigation(settings, key);
  address.changed();
  if (key === null) return overview(settings);
  const dashboard = await getJson(`dashboards/${encodeURIComponent(key)}`);
  document.title = dashboard.title;
  place("title").textContent = dashboard.title;
  place("title").title = dashboard.description ?? "";
  const places = { bar: place("bar"), main: place("main"), status: place("status") };
  return new Page(dashboard, settings, places, address).refresh();
}

start().catch((error) => {
  place("main").replaceChildren(h("div", { class: "trouble", role: "alert" }, h("p", {}, error.message)));
});
