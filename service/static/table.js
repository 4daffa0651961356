// The table of detections, sorted by class or score; each row highlights its box.

import { colourOf } from "./boxes.js";
import { asScore, byId, make } from "./dom.js";

const ORDERS = {
  score: (a, b) => b.score - a.score,
  class: (a, b) => a.label - b.label || b.score - a.score,
};

export class Table {
  /** @param {(detection: ?object) => void} onPoint called with the row that is pointed at or focused */
  constructor(onPoint) {
    this.onPoint = onPoint;
    this.sort = "score";
    this.flipped = false;
    this.shown = [];
    this.body = byId("rows");
    for (const button of document.querySelectorAll("[data-sort]")) {
      button.addEventListener("click", () => this.order(button.dataset.sort));
    }
    this.body.addEventListener("keydown", (event) => this.step(event));
    this.body.addEventListener("pointerleave", () => this.onPoint(null));
    this.body.addEventListener("focusout", () => this.onPoint(null));
  }

  order(sort) {
    this.flipped = sort === this.sort && !this.flipped;
    this.sort = sort;
    this.show(this.shown);
  }

  show(detections) {
    this.shown = detections;
    const sorted = [...detections].sort(ORDERS[this.sort]);
    if (this.flipped) sorted.reverse();
    this.rows = new Map(sorted.map((detection) => [detection, this.row(detection)]));
    this.body.replaceChildren(...this.rows.values());
    if (this.body.firstChild) this.body.firstChild.tabIndex = 0;
    // Scores start descending, names ascending; ARIA names the direction of the values.
    const up = this.sort === "class" ? !this.flipped : this.flipped;
    for (const button of document.querySelectorAll("[data-sort]")) {
      const own = button.dataset.sort === this.sort;
      const state = own ? (up ? "ascending" : "descending") : "none";
      button.closest("th").setAttribute("aria-sort", state);
    }
  }

  row(detection) {
    const box = detection.box.map((value) => Math.round(value)).join(", ");
    const row = make("tr", { tabIndex: -1 },
      make("td", {},
        make("span", { className: "class" }, make("span", { className: "swatch" }), detection.class)),
      make("td", { className: "number" },
        make("b", {}, asScore(detection.score)), ` ≥ ${asScore(detection.threshold)}`),
      make("td", { className: "number" }, box));
    row.style.setProperty("--colour", colourOf(detection.label));
    row.addEventListener("pointerenter", () => this.onPoint(detection));
    row.addEventListener("focus", () => this.onPoint(detection));
    return row;
  }

  /** Highlight the row of the box that is pointed at. */
  light(detection) {
    for (const [one, row] of this.rows ?? []) row.classList.toggle("lit", one === detection);
  }

  /** The table is one tab stop; arrows, Home and End move inside. */
  step(event) {
    const rows = [...this.body.children];
    const at = rows.indexOf(event.target);
    const last = rows.length - 1;
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: last }[event.key];
    if (to === undefined || at < 0) return;
    event.preventDefault();
    rows[at].tabIndex = -1;
    const next = rows[Math.min(Math.max(to, 0), last)];
    next.tabIndex = 0;
    next.focus();
  }
}
