// Routing mix: one bar per policy, split by who answered.

import { seriesClass } from "./colours.js";
import { bodyOf, el, styled } from "./dom.js";
import { percent } from "./format.js";

/** Draw the bars. */
export function drawMix({ choices }) {
  const box = bodyOf("mix");
  if (!choices.length) {
    box.replaceChildren(el("p", { className: "empty" }, "Nothing was answered in this period."));
    return;
  }
  const total = choices.reduce((sum, choice) => sum + choice.requests, 0);
  const names = new Map();
  const rows = choices.map((choice) => {
    const bar = el("div", { className: "bar" });
    for (const { members, requests } of choice.answered_by) {
      const name = members.join(" + ") || "nobody";
      names.set(name, (names.get(name) ?? 0) + requests);
      const share = requests / choice.requests;
      const text = `${name}: ${percent(share)} (${requests} of ${choice.requests})`;
      const part = el("span", { className: seriesClass(name), title: text });
      bar.append(styled(part, { flexGrow: String(requests) }));
    }
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, choice.name, el("small", {}, ` ${choice.kind}`)),
      el("td", { className: "wide" }, bar),
      el("td", { className: "number" }, choice.requests.toLocaleString("en")),
      el("td", { className: "number" }, percent(choice.requests / total)),
    );
  });
  const legend = [...names].sort((a, b) => b[1] - a[1]).map(([name, requests]) =>
    el(
      "li",
      {},
      el("span", { className: `swatch ${seriesClass(name)}` }),
      `${name} ${percent(requests / total)}`,
    ),
  );
  box.replaceChildren(
    el(
      "table",
      {},
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          ...["decided by", "answered by", "answers", "share"].map((name, i) =>
            el("th", { scope: "col", className: i > 1 ? "number" : "" }, name),
          ),
        ),
      ),
      el("tbody", {}, ...rows),
    ),
    el("ul", { className: "legend" }, ...legend),
  );
}
