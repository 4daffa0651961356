// One slider per class, starting at the model's threshold, with the evidence for it.

import { colourOf } from "./boxes.js";
import { asPercent, asScore, byId, count, make } from "./dom.js";

const STEP = 0.005; // the width of a bin of the card's score histograms
const MANY = 8; // classes; of more, those without a box in the image fold away

const SOURCES = {
  policy: (policy) => policy,
  prior: (policy) => `${policy}, lifted to the prior`,
  fallback: () => "a fallback, for want of evidence",
  manual: () => "set by hand",
};

/** Held-out precision and recall at a threshold, from the bins wholly above it. */
export function evidence(statistics, label, threshold) {
  const matched = statistics.positive_scores[label];
  const bins = matched.length;
  let first = 0; // edges are float32, as scores and thresholds are
  while (first < bins && Math.fround(first / bins) < threshold) first += 1;
  const above = (histogram) => histogram.slice(first).reduce((sum, n) => sum + n, 0);
  const hits = above(matched);
  const all = hits + above(statistics.negative_scores[label]);
  const boxes = statistics.ground_truths[label];
  return { precision: all ? hits / all : null, recall: boxes ? hits / boxes : null };
}

function judged({ precision, recall }) {
  const parts = [];
  if (precision !== null) parts.push(`precision ${asPercent(precision)}`);
  if (recall !== null) parts.push(`recall ${asPercent(recall)}`);
  return parts.join(", ");
}

/** The source of a model's threshold, and its precision and recall on held-out images. */
function explained(entry, policy) {
  const lead = `Model: ${asScore(entry.threshold)}, ${SOURCES[entry.source](policy)}`;
  const known = judged(entry);
  const boxes = count(entry.ground_truths, "held-out box", "held-out boxes");
  return [
    known ? `${lead} · ${known}` : lead,
    `${boxes} · trained on ${count(entry.support, "anchor")}`,
  ];
}

export class Panel {
  /** @param {() => void} onMove called at every movement of a slider */
  constructor(onMove) {
    this.onMove = onMove;
    this.rows = [];
    this.moved = new Map();
    byId("reset").addEventListener("click", () => this.reset());
  }

  /** Show a model's classes, every slider at the model's threshold. */
  use(card) {
    this.card = card;
    this.moved.clear();
    byId("policy").textContent =
      "A box stands if its score reaches the threshold of its class. These come with the model; each"
      + " tick is a box.";
    this.rows = card.thresholds.map((entry, label) => this.row(entry, label));
    byId("present").replaceChildren(...this.rows.map((row) => row.item));
    byId("absent").replaceChildren();
    byId("rest").hidden = true;
    byId("panel").hidden = false;
    this.rows.forEach((_, label) => this.tell(label));
  }

  /** The threshold in force, as the float32 that the service compares. */
  threshold(label) {
    const own = this.card.thresholds[label];
    return Math.fround(this.moved.get(own.name) ?? own.threshold);
  }

  reset() {
    this.moved.clear();
    this.rows.forEach((row, label) => {
      row.slider.value = this.threshold(label);
      this.tell(label);
    });
    this.onMove();
    this.rows[0].slider.focus();
  }

  row(entry, label) {
    const id = `class-${label}`;
    const slider = make("input", {
      type: "range", id, min: 0, max: 1, step: STEP, aria: { describedby: `${id}-why` },
    });
    slider.value = entry.threshold;
    slider.addEventListener("input", () => {
      this.moved.set(entry.name, slider.valueAsNumber);
      this.tell(label);
      this.onMove();
    });
    const parts = {
      slider,
      passing: make("span", { className: "passing" }),
      value: make("span", { className: "value" }),
      now: make("p", { className: "now fine" }),
      ticks: make("canvas", { className: "ticks", aria: { hidden: "true" } }),
    };
    const [first, second] = explained(entry, this.card.threshold_policy);
    parts.item = make("li", { data: { class: entry.name } },
      make("div", { className: "row" },
        make("label", { htmlFor: id }, make("span", { className: "swatch" }), entry.name),
        parts.passing, parts.value),
      make("div", { className: "track" }, parts.ticks, make("span", { className: "shipped" }), slider),
      parts.now,
      make("p", { className: "why fine", id: `${id}-why` },
        first, make("br"), second));
    parts.item.style.setProperty("--colour", colourOf(label));
    parts.item.style.setProperty("--shipped", entry.threshold);
    return parts;
  }

  /** Show a row's threshold, with its held-out evidence if it is not the model's. */
  tell(label) {
    const { slider, value, now, item } = this.rows[label];
    const threshold = this.threshold(label);
    const moved = this.moved.has(this.card.thresholds[label].name);
    value.textContent = asScore(threshold);
    slider.setAttribute("aria-valuetext", asScore(threshold));
    item.classList.toggle("moved", moved);
    const known = moved ? judged(evidence(this.card.statistics, label, threshold)) : "";
    now.textContent = known && `Yours: ${asScore(threshold)} · ${known}`;
    item.style.setProperty("--at", threshold);
    byId("reset").disabled = this.moved.size === 0;
  }

  /** Show how many of the boxes found pass, and every score as a tick. */
  update(detections, passing) {
    const found = this.rows.map(() => []);
    for (const { label, score } of detections) found[label].push(score);
    const standing = this.rows.map(() => 0);
    for (const { label } of passing) standing[label] += 1;
    this.rows.forEach((row, label) => {
      const all = Math.max(found[label].length, standing[label]);
      row.passing.textContent = `${standing[label]} of ${count(all, "box", "boxes")}`;
      row.item.dataset.passing = standing[label];
      this.tick(row.ticks, found[label], label);
    });
  }

  tick(canvas, scores, label) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
    const pen = canvas.getContext("2d");
    const threshold = this.threshold(label);
    pen.fillStyle = getComputedStyle(canvas).color;
    for (const score of scores) {
      const stands = score >= threshold;
      pen.globalAlpha = stands ? 1 : 0.35;
      const height = canvas.height * (stands ? 1 : 0.55);
      const x = score * (canvas.width - ratio);
      pen.fillRect(x, canvas.height - height, Math.max(1, 1.5 * ratio), height);
    }
  }

  /** Fold classes without a box in this image, if there are many. */
  fold(detections) {
    if (this.rows.length <= MANY) return;
    const seen = new Set(detections.map((one) => one.label));
    const items = (wanted) => this.rows.filter((_, i) => seen.has(i) === wanted).map((r) => r.item);
    byId("present").replaceChildren(...items(true));
    byId("absent").replaceChildren(...items(false));
    byId("rest").hidden = seen.size === this.rows.length;
    byId("rest-title").textContent =
      `${count(this.rows.length - seen.size, "class", "classes")} without a box in this image`;
  }
}
