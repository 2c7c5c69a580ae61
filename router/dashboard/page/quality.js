// Quality against cost: a point per policy with its interval, and the figures as a table.

import { bodyOf, el, svg } from "./dom.js";
import { amount, plain, seconds, usd } from "./format.js";

const HEIGHT = 320;
const LEFT = 44;
const RIGHT = 34;
const TOP = 14;
const BOTTOM = 46;

const COSTS = {
  usd: { label: "USD per 1,000 answers", of: (choice) => choice.usd_per_1000, show: usd },
  gco2e: {
    label: "gCO₂e per 1,000 answers",
    of: (choice) => choice.gco2e_per_1000,
    show: (value) => amount(value, "g"),
  },
};
let cost = "usd";

/** Draw the plot and the table. */
export function drawQuality(data) {
  const { choices } = data;
  bodyOf("quality").replaceChildren(
    ...(choices.length
      ? [el("div", { className: "sides" }, rated(data), table(choices))]
      : [el("p", { className: "empty" }, "Nothing was answered in this period.")]),
  );
}

function rated(data) {
  const found = data.choices.filter((choice) => choice.quality);
  if (found.length) {
    // Drawn at its size on the screen, so that its text is no smaller than the page's.
    const whole = bodyOf("quality").clientWidth;
    const width = whole > 700 ? (whole - 24) * (5 / 11) : whole;
    return el("div", {}, toggle(data), plot(found, Math.max(280, width)));
  }
  return el(
    "p",
    { className: "empty" },
    "Nobody has rated an answer in this period: send ",
    el("code", {}, "POST /v1/feedback"),
    ", or rate the answers of the chat box below.",
  );
}

function toggle(data) {
  const buttons = Object.entries(COSTS).map(([name, { label }]) =>
    el("button", {
      type: "button",
      "aria-pressed": String(name === cost),
      textContent: label.split(" ")[0],
      onclick: () => {
        cost = name;
        drawQuality(data);
      },
    }),
  );
  return el("div", { className: "toggle", role: "group", ariaLabel: "Cost" }, ...buttons);
}

function plot(choices, width) {
  const { label, of, show } = COSTS[cost];
  const step = niceStep(Math.max(...choices.map(of)) / (width < 450 ? 3 : 4));
  const most = step * Math.ceil((Math.max(...choices.map(of)) * 1.05) / step);
  const x = (value) => LEFT + (value / most) * (width - LEFT - RIGHT);
  const y = (value) => TOP + (1 - value) * (HEIGHT - TOP - BOTTOM);
  const parts = [];
  for (const level of [0, 0.25, 0.5, 0.75, 1]) {
    parts.push(
      svg("line", { x1: LEFT, x2: width - RIGHT, y1: y(level), y2: y(level), class: "grid" }),
      svg("text", { x: LEFT - 8, y: y(level) + 4, "text-anchor": "end" }, plain(level)),
    );
  }
  for (let tick = 0; tick <= most * 1.001; tick += step) {
    const at = { x: x(tick), y: HEIGHT - BOTTOM + 20, "text-anchor": "middle" };
    parts.push(svg("text", at, show(tick)));
  }
  const middle = { x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" };
  parts.push(svg("text", middle, label));
  const labels = [];
  for (const choice of [...choices].sort((a, b) => b.quality.mean - a.quality.mean)) {
    parts.push(point(choice, x(of(choice)), y, labels, width - 120));
  }
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": `Quality against ${label}` },
    ...parts,
  );
}

/** Return the point's marks; its name stands beside it, below the `labels` already placed there. */
function point(choice, x, y, labels, lastLeft) {
  const { mean, low, high } = choice.quality;
  const right = x > lastLeft;
  let at = y(mean) + 4;
  while (labels.some((label) => Math.abs(label.x - x) < 110 && Math.abs(label.y - at) < 15)) at += 3;
  labels.push({ x, y: at });
  const name = { x: right ? x - 11 : x + 11, y: at, "text-anchor": right ? "end" : "start" };
  return svg(
    "g",
    {},
    svg("title", {}, describe(choice)),
    svg("line", { x1: x, x2: x, y1: y(low), y2: y(high), class: "interval" }),
    svg("circle", { cx: x, cy: y(mean), r: 6 }),
    svg("text", { ...name, class: "name" }, choice.name),
  );
}

/** Return 1, 2 or 5 times a power of ten, at least `size`. */
function niceStep(size) {
  if (!(size > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(size));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= size);
}

function describe(choice) {
  const { mean, low, high, num_rated: rated } = choice.quality;
  return `${choice.name}: ${plain(mean)} [${plain(low)}, ${plain(high)}] from ${rated} ratings`;
}

function table(choices) {
  const names = ["", "quality [95%]", "rated", "USD / 1,000", "gCO₂e / 1,000", "mean time"];
  const rows = choices.map((choice) => {
    const { quality } = choice;
    const cells = [
      quality ? `${plain(quality.mean)} [${plain(quality.low)}, ${plain(quality.high)}]` : "–",
      `${quality?.num_rated ?? 0} of ${choice.requests}`,
      usd(choice.usd_per_1000),
      amount(choice.gco2e_per_1000, "g"),
      seconds(choice.latency_s),
    ];
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, choice.name),
      ...cells.map((cell) => el("td", { className: "number" }, cell)),
    );
  });
  const head = names.map((name, i) => el("th", { scope: "col", className: i ? "number" : "" }, name));
  return el(
    "div",
    { className: "scroll" },
    el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows)),
  );
}
