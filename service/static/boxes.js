// Boxes on a canvas over the picture.

// Okabe and Ito's colours, distinguishable with any kind of colour vision.
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442"];
// After seven classes the colours repeat with another stroke.
const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3]];

const FONT = "600 12px system-ui, sans-serif";
const LABEL_HEIGHT = 18;
const PAD = 5;
const ROOMY = 48; // pixels that a caption may always take

export const colourOf = (label) => COLOURS[label % COLOURS.length];
const dashOf = (label) => DASHES[Math.floor(label / COLOURS.length) % DASHES.length];

/** Black or white, whichever has more contrast on a colour (WCAG's relative luminance). */
export function inkOn(colour) {
  const [r, g, b] = [1, 3, 5].map((at) => {
    const part = parseInt(colour.slice(at, at + 2), 16) / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  const light = 0.2126 * r + 0.7152 * g + 0.0722 * b;
  return (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) ? "#000" : "#fff";
}

export class Boxes {
  /**
   * @param {HTMLCanvasElement} canvas as large as the picture that it covers
   * @param {(index: ?number) => void} onPoint called with the index of the box under the pointer
   */
  constructor(canvas, onPoint) {
    this.canvas = canvas;
    this.shown = [];
    this.lit = null;
    this.size = { width: 1, height: 1 };
    new ResizeObserver(() => requestAnimationFrame(() => this.draw())).observe(canvas);
    const point = (event) => onPoint(this.at(event.offsetX, event.offsetY));
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse") onPoint(null);
    });
  }

  /** Show detections `{box, score, label, class, threshold}` of an image of this size. */
  show(detections, size) {
    this.shown = detections;
    this.size = size;
    this.lit = null;
    this.draw();
  }

  light(detection) {
    this.lit = detection;
    this.draw();
  }

  get scale() {
    return [this.canvas.clientWidth / this.size.width, this.canvas.clientHeight / this.size.height];
  }

  place({ box: [x1, y1, x2, y2] }) {
    const [sx, sy] = this.scale;
    return [x1 * sx, y1 * sy, (x2 - x1) * sx, (y2 - y1) * sy];
  }

  /** The smallest box at a point: larger ones can be pointed at elsewhere. */
  at(x, y) {
    let best = null;
    let least = Infinity;
    for (const detection of this.shown) {
      const [left, top, width, height] = this.place(detection);
      const inside = x >= left && x <= left + width && y >= top && y <= top + height;
      if (inside && width * height < least) [best, least] = [detection, width * height];
    }
    return best;
  }

  draw() {
    const { canvas } = this;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = FONT;
    pen.textBaseline = "middle";
    for (const detection of [...this.shown].reverse()) {
      pen.globalAlpha = this.lit && this.lit !== detection ? 0.35 : 1;
      this.outline(pen, detection, 2);
    }
    pen.globalAlpha = 1;
    if (this.lit) {
      this.outline(pen, this.lit, 3.5);
      this.label(pen, this.lit, `${this.lit.class}  ${this.lit.caption}`, []);
    } else {
      const taken = [];
      for (const one of this.shown) this.label(pen, one, this.caption(pen, one), taken);
    }
    canvas.dataset.boxes = this.shown.length;
    canvas.dataset.lit = this.lit ? this.shown.indexOf(this.lit) : "";
  }

  /** A stroke in the class's colour over a dark one, visible on any picture. */
  outline(pen, detection, width) {
    const place = this.place(detection);
    pen.lineJoin = "round";
    pen.setLineDash([]);
    pen.strokeStyle = "rgb(0 0 0 / 50%)";
    pen.lineWidth = width + 1.5;
    pen.strokeRect(...place);
    pen.setLineDash(dashOf(detection.label));
    pen.strokeStyle = colourOf(detection.label);
    pen.lineWidth = width;
    pen.strokeRect(...place);
  }

  /** Class and score; the score alone if both are wider than the box, whose colour is the class. */
  caption(pen, detection) {
    const score = detection.score.toFixed(2);
    const text = `${detection.class} ${score}`;
    const [, , width] = this.place(detection);
    return pen.measureText(text).width + 2 * PAD <= Math.max(width, ROOMY) ? text : score;
  }

  /** Draw a caption above its box, or inside if there is no room; none over another caption. */
  label(pen, detection, text, taken) {
    const [left, top] = this.place(detection);
    const width = pen.measureText(text).width + 2 * PAD;
    const x = Math.max(0, Math.min(left - 1, this.canvas.clientWidth - width));
    const y = top >= LABEL_HEIGHT ? top - LABEL_HEIGHT : top;
    const covers = ([a, b, w]) => x < a + w && a < x + width && Math.abs(y - b) < LABEL_HEIGHT;
    if (taken.some(covers)) return;
    taken.push([x, y, width]);
    pen.fillStyle = colourOf(detection.label);
    pen.beginPath();
    pen.roundRect(x, y, width, LABEL_HEIGHT, 4);
    pen.fill();
    pen.fillStyle = inkOn(colourOf(detection.label));
    pen.fillText(text, x + PAD, y + LABEL_HEIGHT / 2 + 0.5);
  }
}
