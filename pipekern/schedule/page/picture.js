// The picture on the canvas: a row a rank, time to the right, and below it on the same axis what every rank holds.
//
// Colours are Okabe and Ito's, which colour-blind readers can tell apart; each operation also has its own hatching. A
// rank's later chunks are paler. Only what is in view is drawn, so that zooming costs nothing.

const LOOKS = {
  F: { label: "F forward", colour: "#0072b2", hatch: null },
  B: { label: "B input gradient", colour: "#e69f00", hatch: "/" },
  W: { label: "W weight gradient", colour: "#009e73", hatch: "." },
  BW: { label: "BW whole backward", colour: "#f0e442", hatch: "\\" },
};
const GUTTER = 68;
const EDGE = 14; // right of the last end
const AXIS = 22;

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const channels = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
const mix = (colour, other, part) => {
  const ends = [channels(colour), channels(other)];
  const mixed = ends[0].map((value, index) => Math.round(value * (1 - part) + ends[1][index] * part));
  return "#" + mixed.map((value) => value.toString(16).padStart(2, "0")).join("");
};
// Black or white, whichever stands out more from the colour (WCAG 2 relative luminance).
const inkOn = (colour) => {
  const linear = channels(colour).map((value) => ((value / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.18 ? "#000000" : "#ffffff";
};

// The fill of an operation on a rank's n-th chunk: a pattern, its plain colour, and the ink for text on it.
function paintOf(context, op, chunk, ground) {
  const { colour, hatch } = LOOKS[op];
  const plain = mix(colour, ground, Math.min(0.25 * chunk, 0.6));
  const tile = new OffscreenCanvas(8, 8);
  const pen = tile.getContext("2d");
  pen.fillStyle = plain;
  pen.fillRect(0, 0, 8, 8);
  pen.strokeStyle = pen.fillStyle = mix(plain, "#000000", 0.38);
  for (const shift of [-8, 0, 8]) {
    pen.beginPath();
    if (hatch === "/") (pen.moveTo(shift, 8), pen.lineTo(shift + 8, 0));
    if (hatch === "\\") (pen.moveTo(shift, 0), pen.lineTo(shift + 8, 8));
    pen.stroke();
  }
  if (hatch === ".") for (const at of [1, 5]) pen.fillRect(at, at, 2, 2);
  return { plain, fill: hatch ? context.createPattern(tile, "repeat") : plain, ink: inkOn(plain) };
}

class Picture {
  constructor(frame, ground, canvas) {
    Object.assign(this, { frame, ground, canvas, zoom: 1, chosen: null });
    this.context = canvas.getContext("2d");
    frame.addEventListener("scroll", () => this.redraw());
    new ResizeObserver(() => this.layOut()).observe(frame);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.layOut());
  }

  show(schedule, result, limit) {
    Object.assign(this, { schedule, result, limit });
    const stages = schedule.rows.map((_, rank) =>
      range(schedule.stageRank.length).filter((stage) => schedule.stageRank[stage] === rank),
    );
    this.chunkOf = schedule.stageRank.map((rank, stage) => stages[rank].indexOf(stage));
    this.end = Math.max(...result.spans.map((row) => row.at(-1)?.end ?? 0), 1);
    this.top = Math.max(...result.peaks, limit ?? 0, 1e-9);
    if (this.chosen) this.chosen = this.find(this.chosen);
    this.layOut();
  }

  find({ op, stage, microbatch }) {
    for (const row of this.result.spans)
      for (const one of row) if (one.op === op && one.stage === stage && one.microbatch === microbatch) return one;
    return null;
  }

  // Sizes, from the frame's width and the number of ranks; then everything is drawn again.
  layOut() {
    if (!this.result) return;
    const ranks = this.result.spans.length;
    this.row = Math.min(36, Math.max(21, Math.floor(330 / ranks)));
    this.strip = Math.min(52, Math.max(20, Math.floor(300 / ranks)));
    this.width = this.frame.clientWidth;
    this.below = ranks * this.row + AXIS;
    this.height = this.below + ranks * this.strip + 8;
    const dense = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(this.width * dense);
    this.canvas.height = Math.round(this.height * dense);
    this.canvas.style.width = `${this.width}px`;
    this.canvas.style.height = `${this.height}px`;
    this.ground.style.width = `${GUTTER + (this.width - GUTTER - EDGE) * this.zoom + EDGE}px`;
    this.context.setTransform(dense, 0, 0, dense, 0, 0);
    this.inks = Object.fromEntries(
      ["ground", "ink", "muted", "line", "idle", "limit", "held"].map((name) => [name, css(`--${name}`)]),
    );
    this.paints = new Map();
    this.redraw();
  }

  get scale() {
    return ((this.width - GUTTER - EDGE) * this.zoom) / this.end;
  }

  xOf(tick) {
    return GUTTER + tick * this.scale - this.frame.scrollLeft;
  }

  tickAt(x) {
    return (x - GUTTER + this.frame.scrollLeft) / this.scale;
  }

  zoomTo(zoom, x = this.width / 2) {
    const tick = this.tickAt(x);
    this.zoom = Math.min(64, Math.max(1, zoom));
    this.layOut();
    this.frame.scrollLeft = GUTTER + tick * this.scale - x;
    this.redraw();
  }

  // The action at a point of the canvas, or null.
  at(x, y) {
    const row = this.result.spans[Math.floor(y / this.row)];
    if (!row || x < GUTTER) return null;
    const tick = this.tickAt(x);
    const there = row.filter(({ start, end }) => start <= tick && tick < end);
    return there[there.length > 1 && (y % this.row) * 2 > this.row ? 1 : 0] ?? null;
  }

  redraw() {
    const pen = this.context;
    pen.fillStyle = this.inks.ground;
    pen.fillRect(0, 0, this.width, this.height);
    pen.save();
    pen.beginPath();
    pen.rect(GUTTER, 0, this.width - GUTTER, this.height);
    pen.clip();
    this.drawAxis();
    this.result.spans.forEach((row, rank) => this.drawRow(row, rank));
    if (this.chosen) this.drawPath();
    this.result.curves.forEach((curve, rank) => this.drawCurve(curve, rank));
    pen.restore();
    this.drawNames();
  }

  paint(op, stage) {
    const key = op + this.chunkOf[stage];
    if (!this.paints.has(key)) this.paints.set(key, paintOf(this.context, op, this.chunkOf[stage], this.inks.ground));
    return this.paints.get(key);
  }

  drawRow(row, rank) {
    const [top, tall] = [rank * this.row + 2, this.row - 4];
    this.context.fillStyle = this.inks.idle;
    this.context.fillRect(this.xOf(0), top, this.end * this.scale, tall);
    row.forEach((one, index) => {
      if (one.paired) this.drawAction(one, top, tall / 2);
      else if (row[index - 1]?.paired) this.drawAction(one, top + tall / 2, tall / 2);
      else this.drawAction(one, top, tall);
    });
  }

  drawAction(one, top, tall) {
    const [x, wide] = [this.xOf(one.start), (one.end - one.start) * this.scale];
    if (x + wide < GUTTER || x > this.width || wide === 0) return;
    const pen = this.context;
    const { plain, fill, ink } = this.paint(one.op, one.stage);
    pen.globalAlpha = this.chosen && this.chosen.microbatch !== one.microbatch ? 0.22 : 1;
    pen.fillStyle = wide < 5 ? plain : fill;
    pen.fillRect(x, top, wide > 3 ? wide - 1 : wide, tall > 20 ? tall : tall - 0.5);
    const name = `${one.op[0]}${one.microbatch}`;
    pen.font = `${Math.min(12, tall - 2)}px system-ui, "DejaVu Sans", sans-serif`;
    if (wide > 14 && tall > 9 && pen.measureText(name).width + 4 < wide) {
      pen.textAlign = "center";
      pen.textBaseline = "middle";
      pen.lineWidth = 4;
      pen.lineJoin = "round";
      pen.strokeStyle = plain;
      pen.strokeText(name, x + wide / 2, top + tall / 2 + 1);
      pen.fillStyle = ink;
      pen.fillText(name, x + wide / 2, top + tall / 2 + 1);
    }
    pen.globalAlpha = 1;
    if (one === this.chosen) {
      pen.strokeStyle = this.inks.ink;
      pen.lineWidth = 2;
      pen.strokeRect(x, top, Math.max(wide - 1, 2), tall);
    }
  }

  // The chosen micro-batch's way: from the end of each F and B to the start of the next.
  drawPath() {
    const way = this.result.spans.flatMap((row, rank) => row.map((one) => ({ ...one, rank })));
    const steps = way.filter((one) => one.microbatch === this.chosen.microbatch && one.op !== "W");
    steps.sort(
      (one, other) =>
        (one.op !== "F") - (other.op !== "F") || (one.op === "F" ? one.stage - other.stage : other.stage - one.stage),
    );
    const pen = this.context;
    pen.strokeStyle = this.inks.ink;
    pen.lineWidth = 1.25;
    pen.beginPath();
    const middle = ({ rank }) => (rank + 0.5) * this.row;
    steps.slice(1).forEach((one, index) => {
      if (one.rank === steps[index].rank) return;
      pen.moveTo(this.xOf(steps[index].end), middle(steps[index]));
      pen.lineTo(this.xOf(one.start), middle(one));
    });
    pen.stroke();
  }

  drawAxis() {
    const pen = this.context;
    const longest = this.end / this.result.scale;
    const [unit, name] = longest >= 1e7 ? [1e6, "s"] : longest >= 1e4 ? [1e3, "ms"] : [1, "µs"];
    const step = niceStep((longest / unit / this.zoom) * (90 / (this.width - GUTTER)));
    pen.font = '11px system-ui, "DejaVu Sans", sans-serif';
    pen.textAlign = "center";
    pen.textBaseline = "top";
    for (let index = Math.max(0, Math.floor(this.tickAt(GUTTER) / this.result.scale / unit / step)); ; index++) {
      const x = this.xOf(index * step * unit * this.result.scale);
      if (x > Math.min(this.width, this.xOf(this.end) + 1)) break;
      pen.fillStyle = this.inks.line;
      pen.fillRect(x, 0, 1, this.height);
      pen.fillStyle = this.inks.muted;
      const text = `${Number((index * step).toPrecision(12))} ${name}`;
      const half = pen.measureText(text).width / 2;
      if (x + half < this.width) pen.fillText(text, Math.max(x, GUTTER + half), this.below - AXIS + 5);
    }
  }

  drawCurve(curve, rank) {
    const pen = this.context;
    const [floor, tall] = [this.below + (rank + 1) * this.strip - 2, this.strip - 5];
    const yOf = (held) => floor - (tall * held) / this.top;
    const outline = () => {
      pen.beginPath();
      pen.moveTo(this.xOf(0), floor);
      let last = 0;
      for (const [tick, held] of curve) {
        pen.lineTo(this.xOf(tick), yOf(last));
        pen.lineTo(this.xOf(tick), yOf(held));
        last = held;
      }
      pen.lineTo(this.xOf(this.end), yOf(last));
      pen.lineTo(this.xOf(this.end), floor);
    };
    pen.fillStyle = this.inks.held;
    outline();
    pen.fill();
    if (this.limit !== null) this.drawLimit(outline, yOf(this.limit), floor - tall - 2);
    pen.fillStyle = this.inks.line;
    pen.fillRect(GUTTER, floor, this.width, 1);
  }

  // What is above the limit is painted over, and the limit is a dashed line.
  drawLimit(outline, y, roof) {
    const pen = this.context;
    pen.save();
    outline();
    pen.clip();
    pen.fillStyle = this.inks.limit;
    pen.fillRect(GUTTER, roof, this.width, y - roof);
    pen.restore();
    pen.strokeStyle = this.inks.limit;
    pen.lineWidth = 1.5;
    pen.setLineDash([5, 4]);
    pen.beginPath();
    pen.moveTo(GUTTER, y);
    pen.lineTo(this.xOf(this.end), y);
    pen.stroke();
    pen.setLineDash([]);
  }

  drawNames() {
    const pen = this.context;
    pen.textAlign = "left";
    pen.textBaseline = "middle";
    pen.font = '12px system-ui, "DejaVu Sans", sans-serif';
    pen.fillStyle = this.inks.muted;
    pen.fillText("▲ peak", 10, this.below - AXIS / 2);
    this.result.peaks.forEach((peak, rank) => {
      pen.fillStyle = this.inks.ink;
      pen.fillText(`rank ${rank}`, 10, (rank + 0.5) * this.row);
      const over = this.limit !== null && peak > this.limit;
      pen.fillStyle = over ? this.inks.limit : this.inks.muted;
      pen.fillText(`${rank} ▲ ${shown(peak, 3)}`, 10, this.below + (rank + 0.5) * this.strip);
    });
  }
}

// 1, 2 or 5 times a power of ten, not below `least`.
function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(least || 1));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= least);
}

// A number with at most so many significant digits, and no trailing zeros.
const shown = (value, digits) =>
  Number(value.toPrecision(Math.max(digits, String(Math.trunc(value)).length))).toLocaleString("en", {
    maximumFractionDigits: 6,
  });
