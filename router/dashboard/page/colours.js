// Colours from the style sheet, so that light and dark are decided in one place.

const NUM_SERIES = 8;
const given = new Map();

/** Return the value of the style sheet's variable `name`. */
export const colour = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** Return the class that colours `name`; a name keeps its colour while the page is open. */
export function seriesClass(name) {
  if (!given.has(name)) given.set(name, given.size % NUM_SERIES);
  return `series-${given.get(name)}`;
}

/** Call `then` whenever the person switches between light and dark. */
export function onSchemeChange(then) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", then);
}
