// What last week would have cost and been worth under a target: asked for, and shown by domain.

import { ask } from "./api.js";
import { bodyOf, byId, el } from "./dom.js";
import { percent, plain } from "./format.js";

/** Answer the form of the section. */
export function setUpTarget() {
  const form = byId("target").querySelector("form");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const body = bodyOf("target");
    const button = form.querySelector("button");
    const asked = ["amount", "resource", "per"].map((name) => [name, byId(name).value]);
    button.disabled = true;
    body.replaceChildren(el("p", { className: "empty" }, "Simulating …"));
    try {
      draw(body, await (await ask(`dashboard/target?${new URLSearchParams(asked)}`)).json());
    } catch (error) {
      body.replaceChildren(el("p", { className: "bad-text" }, error.message));
    } finally {
      button.disabled = false;
    }
  });
}

function draw(body, { sentence, resource, total, domains }) {
  const found = Object.entries(domains).sort(([, a], [, b]) => b.num_requests - a.num_requests);
  const names = ["domain", "requests", "fewer members", "cheaper ones", `${resource} was`, "would be", "quality was", "would be"];
  const head = names.map((name, i) => el("th", { scope: "col", className: i ? "number" : "" }, name));
  body.replaceChildren(el("p", {}, sentence));
  if (!found.length) return;
  body.append(
    el(
      "div",
      { className: "scroll" },
      el(
        "table",
        {},
        el("thead", {}, el("tr", {}, ...head)),
        el("tbody", {}, ...[...found, ["all", total]].map(([name, sums]) => row(name, sums, resource))),
      ),
    ),
  );
}

function row(name, sums, resource) {
  const cells = [
    sums.num_requests.toLocaleString("en"),
    percent(sums.num_fewer / sums.num_requests),
    percent(sums.num_cheaper / sums.num_requests),
    plain(sums.was[resource]),
    plain(sums.under[resource]),
    plain(sums.quality_was),
    plain(sums.quality_under),
  ];
  return el("tr", {}, el("th", { scope: "row" }, name), ...cells.map((cell) => el("td", { className: "number" }, cell)));
}
