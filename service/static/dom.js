// Helpers of every part of the page.

export const byId = (id) => document.getElementById(id);

/** An element with properties and children; `data` and `aria` are maps. */
export function make(tag, { data = {}, aria = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, data);
  for (const [name, value] of Object.entries(aria)) element.setAttribute(`aria-${name}`, value);
  element.append(...children);
  return element;
}

/** A score or threshold with three decimals, or more if it would be shown as zero. */
export function asScore(value) {
  return value !== 0 && value < 0.01 ? value.toPrecision(2) : value.toFixed(3);
}

export const asPercent = (share) => `${Math.round(share * 100)} %`;

const words = new Intl.NumberFormat("en");

/** `1 box`, `2 boxes`, `1,234 boxes`. */
export function count(number, one, many = `${one}s`) {
  return `${words.format(number)} ${number === 1 ? one : many}`;
}

/** Debounce: call `action` after some milliseconds without another call. */
export function settled(milliseconds, action) {
  let timer;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...values), milliseconds);
  };
}
