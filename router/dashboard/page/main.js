// Asks for the figures again and again, and hands them to whoever draws them.

import { ask, key } from "./api.js";
import { drawCharts, forgetCharts } from "./charts.js";
import { setUpChat } from "./chat.js";
import { onSchemeChange } from "./colours.js";
import { bodyOf, byId, el } from "./dom.js";
import { drawExperiments } from "./experiments.js";
import { amount, clock, percent, plain, seconds, usd } from "./format.js";
import { drawMix } from "./mix.js";
import { drawQuality } from "./quality.js";
import { setUpTarget } from "./target.js";

const DEFAULT_WINDOW = "15m";
const POLL_MS = 2000;
const EXPERIMENTS_EVERY_MS = 15000;

let period = new URLSearchParams(location.search).get("window") ?? DEFAULT_WINDOW;
let latest = null;
let timer = null;
let experimentsAt = -Infinity;
let drawnChoices = null;

async function refresh() {
  clearTimeout(timer);
  try {
    const data = await (await ask(`dashboard/data?window=${encodeURIComponent(period)}`)).json();
    show(data);
    if (performance.now() - experimentsAt > EXPERIMENTS_EVERY_MS) {
      experimentsAt = performance.now();
      drawExperiments((await (await ask("v1/experiments")).json()).data);
    }
  } catch (error) {
    fail(error);
    if (error.status === 401 || error.status === 403) return;
  }
  if (!document.hidden) timer = setTimeout(refresh, POLL_MS);
}

function show(data) {
  latest = data;
  byId("login").hidden = true;
  byId("dashboard").hidden = false;
  byId("forget").hidden = !key.get();
  byId("server").textContent = `${data.server.pool} · ${data.server.version}`;
  state(`live · ${clock(data.now_s)}`, "live");
  drawWindows(data);
  drawTiles(data);
  drawBudgets(data);
  drawCharts(data);
  // Drawn anew only when they change, so that a tooltip or a selection stays.
  const choices = JSON.stringify([data.choices, innerWidth]);
  if (choices !== drawnChoices) {
    drawnChoices = choices;
    drawMix(data);
    drawQuality(data);
  }
  setUpChat(data.server.names);
}

function fail(error) {
  if (error.status === 401 || error.status === 403) {
    byId("dashboard").hidden = true;
    byId("login").hidden = false;
    byId("refusal").textContent = key.get() ? error.message : "";
    state("needs a key", "stale");
    byId("key").focus();
    return;
  }
  const since = latest ? `, as of ${clock(latest.now_s)}` : "";
  state(`${error.message}${since}`, "stale");
}

function state(text, kind) {
  byId("state").textContent = text;
  byId("state").className = kind;
}

function drawWindows({ windows }) {
  const nav = byId("windows");
  if (!nav.childElementCount) {
    for (const name of windows) {
      nav.append(el("button", { type: "button", textContent: name, value: name, onclick: () => choose(name) }));
    }
  }
  for (const button of nav.children) button.setAttribute("aria-pressed", String(button.value === period));
}

function choose(name) {
  period = name;
  history.replaceState(null, "", `?window=${name}`);
  refresh();
}

function drawTiles({ totals, shadows, server, bucket_s: bucketS, series }) {
  const lengthS = bucketS * series.time_s.length;
  const unanswered = totals.requests - totals.answered;
  const shadowed = shadows.requests ? `shadows: ${usd(shadows.usd)} more` : "";
  const tiles = [
    ["Requests", totals.requests.toLocaleString("en"), `${plain((totals.requests / lengthS) * 60)} a minute`],
    ["Spent", usd(totals.usd), shadowed || `${usd(each(totals.usd, totals) * 1000)} per 1,000`],
    ["Energy", amount(totals.wh, "Wh"), `${amount(totals.joules_per_token, "J")} a token, ${range(totals, "wh", "Wh")}`],
    ["Carbon", amount(totals.gco2e, "gCO₂e"), `${amount(each(totals.gco2e, totals), "g")} a request, ${range(totals, "gco2e", "g")}`],
    ["Grid", `${plain(server.grid.gco2e_per_kwh)} g/kWh`, `source: ${server.grid.source}`],
    ["Not answered", totals.requests ? percent(unanswered / totals.requests) : "–",
      `${unanswered} of ${totals.requests}; server errors: ${totals.failed}`],
    ["Mean time", seconds(totals.latency_s), `first text ${seconds(totals.ttft_s)}`],
    ["Tokens", plain(totals.prompt_tokens + totals.output_tokens), `${plain(totals.output_tokens)} written`],
  ];
  byId("tiles").replaceChildren(
    ...tiles.map(([name, value, more]) =>
      el("div", { className: "tile", title: more }, el("h2", {}, name), el("strong", {}, value), el("small", {}, more)),
    ),
  );
}

const range = (totals, name, unit) =>
  `${amount(totals[`${name}_low`], unit)} to ${amount(totals[`${name}_high`], unit)}`;
const each = (amountOfAll, { requests }) => (requests ? amountOfAll / requests : null);

function drawBudgets({ budgets }) {
  byId("budgets").hidden = !budgets.length;
  bodyOf("budgets").replaceChildren(
    ...budgets.map(({ name, spent, limit, ends_s: endsS }) => {
      const share = limit ? spent / limit : 1;
      const label = `${plain(spent)} of ${plain(limit)}, until ${clock(endsS)}`;
      return el(
        "div",
        { className: "budget" },
        el("span", {}, name.replaceAll("_", " ")),
        el("meter", { min: 0, max: 1, low: 0.8, high: 0.95, optimum: 0, value: Math.min(1, share), title: label }),
        el("small", {}, `${percent(share)} · ${label}`),
      );
    }),
  );
}

setUpTarget();
byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(byId("key").value.trim());
  byId("key").value = "";
  refresh();
});
byId("forget").addEventListener("click", () => {
  key.forget();
  location.reload();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else refresh();
});
onSchemeChange(() => {
  forgetCharts();
  if (latest) show(latest);
});
refresh();
