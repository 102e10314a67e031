/** Text panels: a little Markdown, made into elements and never into markup. */

import { h, link } from "../dom.js";

const INLINE = /`([^`]+)`|\*\*([^*]+)\*\*|\*([^*]+)\*|\[([^\]]+)\]\(([^)\s]+)\)/g;

/** @returns {(Node | string)[]} */
function inline(text) {
  const parts = [];
  let at = 0;
  for (const found of text.matchAll(INLINE)) {
    parts.push(text.slice(at, found.index));
    const [whole, code, strong, soft, name, address] = found;
    parts.push(
      code
        ? h("code", {}, code)
        : strong
          ? h("strong", {}, strong)
          : soft
            ? h("em", {}, soft)
            : (link(address, name) ?? whole),
    );
    at = found.index + whole.length;
  }
  return [...parts, text.slice(at)];
}

function block(text) {
  const heading = /^(#{1,6})\s+(.*)$/.exec(text);
  if (heading) return h(`h${Math.min(6, heading[1].length + 2)}`, {}, inline(heading[2]));
  const lines = text.split("\n");
  if (lines.every((line) => /^\s*[-*]\s+/.test(line)))
    return h(
      "ul",
      {},
      lines.map((line) => h("li", {}, inline(line.replace(/^\s*[-*]\s+/, "")))),
    );
  return h("p", {}, inline(lines.join(" ")));
}

export function text(body, { panel, write }) {
  const { content = "", mode = "markdown" } = panel.options ?? {};
  const blocks =
    mode === "markdown"
      ? write(content)
          .split(/\n{2,}/)
          .map((each) => block(each.trim()))
      : [h("pre", {}, write(content))];
  body.append(h("div", { class: "text" }, blocks));
}
