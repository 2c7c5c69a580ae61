// The four charts over time.

import { colour } from "./colours.js";
import { byId, el } from "./dom.js";
import { plain, prefixFor, span } from "./format.js";

const HEIGHT = 170;

const CHARTS = [
  {
    id: "spend", title: "Spend", unit: "USD", perBucket: true, bars: true,
    series: [{ name: "usd", label: "spend", colour: "series-0" }], range: "usd",
  },
  {
    id: "carbon", title: "Carbon", unit: "gCO₂e", perBucket: true, bars: true,
    series: [{ name: "gco2e", label: "carbon", colour: "series-1" }], range: "gco2e",
  },
  {
    id: "requests", title: "Requests", unit: "", perBucket: true, bars: true,
    series: [
      { name: "requests", label: "all", colour: "series-3" },
      { name: "unanswered", label: "not answered", colour: "bad" },
    ],
  },
  {
    id: "latency", title: "Mean time", unit: "s", perBucket: false, bars: false,
    series: [
      { name: "latency_s", label: "whole answer", colour: "series-4" },
      { name: "ttft_s", label: "first text", colour: "series-2" },
    ],
  },
];

const drawn = new Map();

/** Draw or update the charts from the server's figures. */
export function drawCharts(data) {
  const columns = { ...data.series };
  columns.unanswered = columns.requests.map((all, i) => all - columns.answered[i]);
  for (const chart of CHARTS) draw(chart, columns, data.bucket_s);
}

/** Draw them anew: the colours have changed. */
export function forgetCharts() {
  for (const { plot } of drawn.values()) plot.destroy();
  drawn.clear();
}

function draw(chart, columns, bucketS) {
  const figure = byId(chart.id);
  // A figure's error is a band from what it is at least to what it is at most.
  const ends = chart.range ? [`${chart.range}_high`, `${chart.range}_low`] : [];
  const raw = [...chart.series.map(({ name }) => name), ...ends].map((name) => columns[name]);
  const largest = Math.max(...raw.flat().map((value) => value ?? 0));
  const [factor, letter] = chart.unit ? prefixFor(largest) : [1, ""];
  const values = raw.map((column) => column.map((v) => (v === null ? null : v / factor)));
  const content = [columns.time_s, ...values];
  const key = `${bucketS} ${letter}`;
  const shown = drawn.get(chart.id);
  if (shown && shown.key === key) {
    shown.plot.setData(content);
    return;
  }
  shown?.plot.destroy();
  const unit = letter + chart.unit;
  const heading = [unit, chart.perBucket ? `per ${span(bucketS)}` : ""].filter(Boolean).join(" ");
  const box = el("div", { className: "plot" });
  figure.replaceChildren(el("figcaption", {}, chart.title, el("small", {}, ` ${heading}`)), box);
  const plot = new window.uPlot(options(chart, box.clientWidth, unit, bucketS), content, box);
  drawn.set(chart.id, { plot, key });
  watch(box, plot);
}

function options(chart, width, unit, bucketS) {
  const axis = {
    stroke: colour("muted"),
    grid: { stroke: colour("line"), width: 1 },
    ticks: { show: false },
    font: "12px system-ui, sans-serif",
  };
  const bars = chart.bars ? window.uPlot.paths.bars({ size: [0.85, 40], align: 1 }) : undefined;
  return {
    width,
    height: HEIGHT,
    cursor: { y: false, points: { show: !chart.bars } },
    legend: { show: true, live: true },
    scales: {
      x: { range: (_, low, high) => [low, high + bucketS] },
      y: { range: (_, low, high) => [0, high > 0 ? high * 1.1 : 1] },
    },
    axes: [
      { ...axis, space: 70, size: 30, values: times },
      { ...axis, size: 52, values: (_, ticks) => ticks.map(plain) },
    ],
    series: [
      { label: "time", value: (_, timeS) => (timeS === null ? "" : when(timeS)) },
      ...chart.series.map((series) => ({
        label: series.label,
        stroke: colour(series.colour),
        fill: chart.bars ? colour(series.colour) : undefined,
        width: chart.bars ? 0 : 2,
        paths: bars,
        points: { show: !chart.bars, size: 5, fill: colour(series.colour) },
        value: (_, value) => (value === null ? "" : `${plain(value)} ${unit}`),
      })),
      ...(chart.range ? ["at most", "at least"] : []).map((label) => ({
        label,
        stroke: colour("muted"),
        width: 1,
        dash: [4, 3],
        paths: window.uPlot.paths.stepped({ align: 1 }),
        points: { show: false },
        value: (_, value) => (value === null ? "" : `${plain(value)} ${unit}`),
      })),
    ],
    bands: chart.range ? [{ series: [chart.series.length + 1, chart.series.length + 2], fill: `${colour("muted")}22` }] : [],
  };
}

function times(plot, ticks) {
  const days = plot.scales.x.max - plot.scales.x.min > 2 * 86400;
  return ticks.map((timeS) => {
    const time = new Date(timeS * 1000);
    return days
      ? time.toLocaleDateString("en", { day: "numeric", month: "short" })
      : time.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  });
}

function when(timeS) {
  const options = { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit" };
  return new Date(timeS * 1000).toLocaleString("en-GB", options);
}

function watch(box, plot) {
  const observer = new ResizeObserver(() => {
    if (!box.isConnected) observer.disconnect();
    else if (box.clientWidth !== plot.width) plot.setSize({ width: box.clientWidth, height: HEIGHT });
  });
  observer.observe(box);
}
