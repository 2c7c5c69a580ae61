// The chat box: one question to several policies or models at once, streamed side by side.

import { ask, events } from "./api.js";
import { byId, el } from "./dom.js";
import { amount, percent, plain, seconds, usd } from "./format.js";

const MOST = 4;
let running = null;

/** Offer `names` to choose from, once, and answer when the form is sent. */
export function setUpChat(names) {
  const section = byId("chat");
  const chips = section.querySelector(".chips");
  if (chips.childElementCount) return;
  const other = names.find((name) => name.startsWith("policy/") && name !== `policy/${names[0]}`);
  const first = new Set([names[0], other ?? names[1]]);
  for (const name of names) {
    const box = el("input", { type: "checkbox", name: "target", value: name, checked: first.has(name) });
    chips.append(el("label", {}, box, el("span", {}, name)));
  }
  chips.addEventListener("change", () => limit(chips));
  const form = section.querySelector("form");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(chosen(chips), byId("question").value);
  });
  byId("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  limit(chips);
}

const chosen = (chips) => [...chips.querySelectorAll(":checked")].map((box) => box.value);

function limit(chips) {
  const full = chosen(chips).length >= MOST;
  for (const box of chips.querySelectorAll("input")) box.disabled = full && !box.checked;
}

function send(names, question) {
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  const answers = names.map((name) => ({ name, parts: columns(name) }));
  byId("chat").querySelector(".answers").replaceChildren(...answers.map(({ parts }) => parts.card));
  for (const { name, parts } of answers) answer(name, question, parts, signal);
}

function columns(name) {
  const text = el("p", { className: "text pending" });
  const facts = el("dl", {});
  const rating = el("div", { className: "rating" });
  const card = el("article", { className: "answer" }, el("h3", {}, name), text, facts, rating);
  return { card, text, facts, rating };
}

async function answer(name, question, parts, signal) {
  const began = performance.now();
  let first = null;
  try {
    const body = {
      model: name,
      messages: [{ role: "user", content: question }],
      temperature: 0,
      stream: true,
      user: "dashboard",
    };
    for await (const chunk of events(await ask("v1/chat/completions", { body, signal }))) {
      const added = chunk.choices[0]?.delta?.content;
      if (added) {
        first ??= performance.now() - began;
        parts.text.append(added);
      }
      if (chunk.shoal) {
        show(parts, chunk, { whole: performance.now() - began, first });
      }
    }
  } catch (error) {
    if (error.name === "AbortError") return;
    parts.text.classList.add("bad-text");
    parts.text.append(error.message);
  } finally {
    parts.text.classList.remove("pending");
  }
}

function show(parts, { id, shoal }, { whole, first }) {
  const tokens = Object.values(shoal.tokens).reduce((sum, t) => sum + t.prompt + t.output, 0);
  const members = shoal.members.map((name, i) =>
    shoal.weights.length > 1 ? `${name} ${percent(shoal.weights[i])}` : name,
  );
  const facts = {
    "answered by": members.join(", ") || "–",
    why: shoal.reason,
    time: `${seconds(whole / 1000)} (first text ${seconds(first === null ? null : first / 1000)})`,
    tokens: plain(tokens),
    cost: usd(shoal.cost.usd),
    carbon: `${amount(shoal.cost.gco2e, "g")} (${amount(shoal.cost.wh, "Wh")})`,
  };
  if (shoal.arm) facts.experiment = `${shoal.experiment}: ${shoal.arm}`;
  for (const [name, value] of Object.entries(facts)) {
    if (value) parts.facts.append(el("dt", {}, name), el("dd", {}, value));
  }
  for (const [thumb, label] of [["up", "Good"], ["down", "Bad"]]) {
    parts.rating.append(
      el("button", {
        type: "button",
        textContent: label,
        onclick: () => rate(parts.rating, id, thumb),
      }),
    );
  }
}

async function rate(rating, id, thumb) {
  try {
    await ask("v1/feedback", { body: { id, thumb } });
    rating.replaceChildren(thumb === "up" ? "Rated good." : "Rated bad.");
  } catch (error) {
    rating.append(el("span", { className: "bad-text" }, error.message));
  }
}
