// Drawing: points into the pixels of the canvas, since a path for each would be too slow for 50,000; names and rings over them.
const canvas = document.querySelector("canvas"), pen = canvas.getContext("2d", { willReadFrequently: true });
let width = 0, height = 0, image = null;

const room = () => Math.min(width, height - (width < 760 ? 100 : 0)) * 0.9;    // on a phone the buttons are above and below
const scale = () => room() * state.zoom;
const onScreen = (x, y) => [(x - state.x) * scale() + width / 2, (y - state.y) * scale() + height / 2];
const screen = (i) => onScreen(maps[state.map].xy[2 * i], maps[state.map].xy[2 * i + 1]);
const look = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

let waiting = false;
function draw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; paint(); });
}
function paint() {
  const ratio = devicePixelRatio || 1;
  width = canvas.clientWidth; height = canvas.clientHeight;
  const across = Math.round(width * ratio), down = Math.round(height * ratio);
  if (!across || !down) return;
  if (!image || image.width !== across || image.height !== down) {
    canvas.width = across; canvas.height = down;
    image = pen.createImageData(across, down);
  }
  const paper = rgbOf(look("--paper"));
  new Uint32Array(image.data.buffer).fill((255 << 24 | paper[2] << 16 | paper[1] << 8 | paper[0]) >>> 0);
  const radius = Math.min(6, Math.max(1.1, 170 / Math.sqrt(n + 400)) * Math.sqrt(state.zoom));
  const grey = rgbOf(GREYS[theme]), faint = state.chosen >= 0;
  if (some() || faint) dots(radius * ratio, ratio, (i) => faint || !isLit[i], () => grey, 0.35);
  if (!faint) dots(some() && n < 20000 ? radius * 1.25 * ratio : radius * ratio, ratio, (i) => isLit[i], (i) => colours[shades[i]], data.opacity);
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.putImageData(image, 0, 0);
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  if (faint) rays(radius);
  names();
  if (state.hover >= 0) ring(state.hover, radius + 4, look("--ink"));
  outline();
}

// the pixels that a disc touches and its share of each, for its centre at one of 4 × 4 places in a pixel
const PHASES = 4;
function discs(radius, reach, across) {
  return Array.from({ length: PHASES * PHASES }, (_, phase) => {
    const cx = (phase % PHASES + 0.5) / PHASES - 0.5, cy = (Math.floor(phase / PHASES) + 0.5) / PHASES - 0.5, places = [], shares = [];
    for (let y = -reach; y <= reach; y++)
      for (let x = -reach; x <= reach; x++) {
        const share = Math.min(1, radius + 0.5 - Math.hypot(x - cx, y - cy));
        if (share > 0) { places.push(4 * (y * across + x)); shares.push(share); }
      }
    return { places: Int32Array.from(places), shares: Float32Array.from(shares) };
  });
}
function dots(radius, ratio, wanted, colour, opacity) {
  const { xy } = maps[state.map], { data: pixels, width: across, height: down } = image;
  const reach = Math.floor(radius + 1), shapes = discs(radius, reach, across);
  const factor = scale() * ratio, x0 = across / 2 - state.x * factor, y0 = down / 2 - state.y * factor;
  for (const i of order) {
    const x = xy[2 * i] * factor + x0, y = xy[2 * i + 1] * factor + y0;
    if (x < reach || y < reach || x >= across - reach - 1 || y >= down - reach - 1 || !wanted(i)) continue;
    const column = Math.floor(x), row = Math.floor(y), start = 4 * (row * across + column);
    const { places, shares } = shapes[Math.floor((x - column) * PHASES) + PHASES * Math.floor((y - row) * PHASES)];
    const [r, g, b] = colour(i);
    for (let k = 0; k < places.length; k++) {
      const at = start + places[k], alpha = shares[k] * opacity;
      pixels[at] += (r - pixels[at]) * alpha;
      pixels[at + 1] += (g - pixels[at + 1]) * alpha;
      pixels[at + 2] += (b - pixels[at + 2]) * alpha;
    }
  }
}

function rays(radius) {
  const [x0, y0] = screen(state.chosen), others = neighbours(state.chosen);
  pen.strokeStyle = look("--edge"); pen.lineWidth = 1;
  for (const j of others) { const [x, y] = screen(j); pen.beginPath(); pen.moveTo(x0, y0); pen.lineTo(x, y); pen.stroke(); }
  for (const j of [...others, state.chosen]) {
    const [x, y] = screen(j);
    pen.fillStyle = colourOf(j); pen.beginPath(); pen.arc(x, y, radius + 2, 0, 7); pen.fill();
    ring(j, radius + 2, look("--ink"));
  }
  ring(state.chosen, radius + 7, look("--mark"));
}
function ring(i, radius, colour) {
  const [x, y] = screen(i);
  pen.strokeStyle = colour; pen.lineWidth = 2; pen.beginPath(); pen.arc(x, y, radius, 0, 7); pen.stroke();
}

// labels at their cores, the largest first, while there is room: zooming in makes room for more
const NAME = 12;
function names() {
  drawnNames.length = 0;
  if (by.kind !== "label" || state.chosen >= 0) return;
  const boxes = [], core = by.cores[state.map], ink = look("--ink"), paper = look("--paper");
  pen.font = `600 ${NAME}px system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif`;
  pen.textAlign = "center"; pen.textBaseline = "middle"; pen.lineJoin = "round"; pen.lineWidth = 3.5;
  for (let code = 0; code < by.labels.length && boxes.length < 150; code++) {
    if (isNaN(core[2 * code]) || (state.groups.size && !state.groups.has(code))) continue;
    const [x, y] = onScreen(...maps[state.map].unit(core[2 * code], core[2 * code + 1]));
    if (x < 0 || y < 0 || x > width || y > height) continue;
    const name = middleCut(by.labels[code], 24), half = widthOf(name) / 2 + 3;
    const box = [x - half, y - NAME * 0.75, x + half, y + NAME * 0.75];
    if (boxes.some((b) => box[0] < b[2] && b[0] < box[2] && box[1] < b[3] && b[1] < box[3])) continue;
    boxes.push(box); drawnNames.push(by.labels[code]);
    pen.strokeStyle = paper; pen.strokeText(name, x, y);
    pen.fillStyle = ink; pen.fillText(name, x, y);
  }
}
const drawnNames = [], widths = new Map();
function widthOf(name) {
  if (!widths.has(name)) widths.set(name, pen.measureText(name).width);
  return widths.get(name);
}
// labels that begin alike often end apart
function middleCut(name, most = 80) {
  const letters = [...name];
  return letters.length <= most ? name : letters.slice(0, most / 2).join("") + "…" + letters.slice(1 - most / 2).join("");
}

let loop = null;                                 // the lasso while it is drawn
function outline() {
  if (!loop) return;
  pen.beginPath();
  for (const [x, y] of loop) pen.lineTo(x, y);
  pen.closePath();
  pen.strokeStyle = look("--mark"); pen.lineWidth = 2; pen.setLineDash([5, 4]); pen.stroke(); pen.setLineDash([]);
}
