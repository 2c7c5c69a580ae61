// Numbers for people: three significant digits, and units that fit.

const PREFIXES = [
  [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""], [1e-3, "m"], [1e-6, "µ"], [1e-9, "n"],
];

/** Return the prefix in which `value` reads best, as [factor, letter]. */
export function prefixFor(value) {
  const size = Math.abs(value);
  return PREFIXES.find(([factor]) => size >= factor) ?? (size > 0 ? PREFIXES.at(-1) : [1, ""]);
}

/** Return `value` with three significant digits and no more zeros than it needs. */
export function plain(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

/** Return `value` in `unit` with a prefix: "1.2 mg". */
export function amount(value, unit) {
  if (value === null || value === undefined) return "–";
  const [factor, letter] = prefixFor(value);
  return `${plain(value / factor)} ${letter}${unit}`;
}

/** Return US dollars without exponent or prefix, as money is written. */
export function usd(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "$0";
  const size = Math.abs(value);
  if (size >= 100) return `$${value.toLocaleString("en", { maximumFractionDigits: 0 })}`;
  if (size >= 1) return `$${value.toFixed(2)}`;
  const digits = Math.min(12, 2 - Math.floor(Math.log10(size)));
  return `$${value.toFixed(digits).replace(/0+$/, "")}`;
}

/** Return seconds: "850 ms", "3.2 s". */
export function seconds(value) {
  if (value === null || value === undefined) return "–";
  return value < 1 ? `${plain(value * 1000)} ms` : `${plain(value)} s`;
}

/** Return a share of one: "12.5%". */
export const percent = (value) => `${plain(value * 100)}%`;

/** Return a span of time: 10 → "10 s", 900 → "15 min". */
export function span(lengthS) {
  if (lengthS < 60) return `${lengthS} s`;
  if (lengthS < 3600) return `${lengthS / 60} min`;
  return `${lengthS / 3600} h`;
}

/** Return the time of day of a Unix time, in this browser's zone. */
export const clock = (timeS) => new Date(timeS * 1000).toLocaleTimeString("en-GB");
