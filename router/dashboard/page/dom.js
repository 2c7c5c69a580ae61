// Builds elements. Text is only ever set as text: names and answers come from outside.

/** Return a new element with properties, `data-*` by `dataset`, and children (nodes or text). */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  return fill(element, properties, children);
}

/** The same for SVG, whose properties are attributes. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Return the element with this id. */
export const byId = (id) => document.getElementById(id);

/** Return the part of a section that changes. */
export const bodyOf = (id) => byId(id).querySelector(":scope > div");

/** Set an inline style by script, which the page's content security policy allows. */
export function styled(element, styles) {
  Object.assign(element.style, styles);
  return element;
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name === "dataset") Object.assign(element.dataset, value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
