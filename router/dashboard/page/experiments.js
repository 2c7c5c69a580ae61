// Experiments: what may be said now, and each arm's effect with its always-valid interval.

import { bodyOf, el } from "./dom.js";
import { percent, plain } from "./format.js";

const VERDICTS = {
  ship: ["ship", "good"],
  keep_control: ["keep the control", "neutral"],
  continue: ["go on", "neutral"],
  too_early: ["too early", "neutral"],
  blocked: ["blocked", "bad"],
};

/** Draw a card per experiment. */
export function drawExperiments(experiments) {
  bodyOf("experiments").replaceChildren(
    ...(experiments.length
      ? experiments.map(card)
      : [el("p", { className: "empty" }, "No experiment is configured.")]),
  );
}

function card(experiment) {
  const [verdict, tone] = VERDICTS[experiment.verdict] ?? [experiment.verdict, "neutral"];
  const { sample_ratio: ratio } = experiment;
  const facts = [
    experiment.status,
    `${experiment.num_units.toLocaleString("en")} ${experiment.unit}s`,
    `${experiment.num_requests.toLocaleString("en")} requests`,
    ...(experiment.judging_usd ? [`judged for ${plain(experiment.judging_usd)} USD`] : []),
    ratio.alarm ? `split is broken (p = ${plain(ratio.p)})` : "split as planned",
  ];
  return el(
    "article",
    {},
    el(
      "h3",
      {},
      experiment.name,
      " ",
      el("span", { className: `badge ${tone}` }, verdict),
    ),
    el("p", {}, experiment.recommendation),
    el("p", { className: "hint" }, facts.join(" · ")),
    ...experiment.notes.map((note) => el("p", { className: "hint" }, note)),
    el(
      "div",
      { className: "scroll" },
      el(
        "table",
        {},
        el("thead", {}, el("tr", {}, ...head())),
        el("tbody", {}, ...rows(experiment)),
      ),
    ),
  );
}

const head = () =>
  ["arm", "metric", "effect", "interval", "p"].map((name, i) =>
    el("th", { scope: "col", className: i > 1 ? "number" : "" }, name),
  );

function rows(experiment) {
  const { primary, secondary, segments } = experiment;
  const found = [...primary, ...secondary, ...segments].map((effect) => {
    const tone = effect.better === null ? "" : effect.better ? "good-text" : "bad-text";
    const relative = effect.relative === null ? "" : ` (${sign(effect.relative)}${percent(effect.relative)})`;
    return row(
      effect.treatment,
      effect.segment ? `${effect.metric}, ${effect.segment} ${effect.part}` : effect.metric,
      [`${sign(effect.estimate)}${plain(effect.estimate)}${relative}`, tone],
      effect.low === null ? "–" : `[${plain(effect.low)}, ${plain(effect.high)}]`,
      plain(effect.p),
    );
  });
  const guards = experiment.guardrails.map((guard) =>
    row(
      guard.treatment,
      `${guard.metric} (guardrail)`,
      [guard.breached ? "breached" : "holds", guard.breached ? "bad-text" : ""],
      `limit ${plain(guard.limit)}`,
      "",
    ),
  );
  return [...found, ...guards];
}

function row(arm, metric, [effect, tone], interval, p) {
  return el(
    "tr",
    {},
    el("th", { scope: "row" }, arm),
    el("td", {}, metric),
    el("td", { className: `number ${tone}` }, effect),
    el("td", { className: "number" }, interval),
    el("td", { className: "number" }, p),
  );
}

const sign = (value) => (value > 0 ? "+" : "");
