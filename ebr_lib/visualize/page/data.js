// What the page holds: points on maps, columns of their rows, words in two languages; and what is selected now.
const data = JSON.parse(document.getElementById("data").textContent);
const zh = navigator.language.startsWith("zh");
const count = (n) => n.toLocaleString();
const say = zh ? {
  search: "搜索所有列", hits: (n) => `${count(n)} 个点匹配`, reset: "复位", by: "着色", find: "查找标签", lasso: "套索", zoomIn: "放大", zoomOut: "缩小",
  theme: "深色或浅色", maps: "降维图", tools: "工具", cut: (most) => `；超过 ${count(most)} 字的文本在此截断，之后的内容搜不到`,
  points: (n, all) => n < all ? `显示 ${count(all)} 个点中的 ${count(n)} 个（按标签抽样）` : `${count(n)} 个点`,
  near: "原始空间中的最近邻（余弦相似度）", drawn: "，仅限图中的点", pick: "点击一个点，查看它在原始空间中的十个最近邻。套索（或按住 Shift 拖动）可圈选多行。",
  note: "滚轮或双指缩放，拖动平移，点击图例筛选。图上各组之间的距离意义不大。", none: "无标签", rows: (n) => `选中 ${count(n)} 行`,
  zoom: "缩放到这里", copy: "复制", csv: "导出 CSV", copied: "已复制", back: "← 返回列表", more: (n) => `再显示 ${count(n)} 个`, clear: "清除",
  map: (name, n, by) => `${name}：${count(n)} 个点，按 ${by} 着色。方向键平移，+ − 缩放，0 复位。` } : {
  search: "Search all columns", hits: (n) => `${count(n)} points match`, reset: "Reset", by: "Colour by", find: "Find a label", lasso: "Lasso", zoomIn: "Zoom in",
  zoomOut: "Zoom out", theme: "Dark or light", maps: "Maps", tools: "Tools", cut: (most) => `; texts are cut to ${count(most)} characters here, and not searched beyond`,
  points: (n, all) => n < all ? `${count(n)} of ${count(all)} points, sampled by label` : `${count(n)} points`,
  near: "Nearest in the original space (cosine)", drawn: ", among the points shown",
  pick: "Click a point to see its ten nearest neighbours in the original space. Lasso (or Shift and drag) selects rows.",
  note: "Wheel or pinch to zoom, drag to move, click the legend to filter. Distances between groups on a map mean little.", none: "no label",
  rows: (n) => `${count(n)} rows selected`, zoom: "Zoom to them", copy: "Copy", csv: "CSV", copied: "Copied", back: "← Back to the rows",
  more: (n) => `Show ${count(n)} more`, clear: "Clear",
  map: (name, n, by) => `${name} map of ${count(n)} points, coloured by ${by}. Arrow keys move, + and − zoom, 0 resets.` };

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
const n = data.points;
const spaces = data.spaces.map(({ near, cosines }) => ({ near: new Int32Array(bytes(near)), cosines: new Int16Array(bytes(cosines)) }));
const wide = spaces[0].near.length / Math.max(1, n);

// --- columns: labels (codes with names), numbers (texts with values) or texts -----------------------------------
for (const column of data.columns) {
  if (column.kind === "label") {
    column.codes = new Int32Array(bytes(column.codes));
    column.cores = column.cores.map((core) => new Float32Array(bytes(core)));
    column.sizes = column.labels.map(() => 0);
    for (const code of column.codes) if (code >= 0) column.sizes[code]++;
    column.text = (i) => column.codes[i] < 0 ? "" : column.labels[column.codes[i]];
  } else {
    column.text = (i) => column.texts[i];
  }
  if (column.kind === "number") {
    column.values = Float64Array.from(column.texts, (text) => text === "" ? NaN : Number(text));
    const known = column.values.filter((v) => !isNaN(v)).sort();
    const at = (share) => known[Math.min(known.length - 1, Math.floor(share * known.length))];
    column.low = at(0.02); column.high = at(0.98);      // a few extreme values would leave one colour for all others
  }
}
const textOf = (i) => data.columns[data.text].text(i);
const titleOf = (i) => data.title === null ? "" : data.columns[data.title].text(i);
let by = data.columns[data.colour];
const labelOf = (i) => by.text(i) || (by.kind === "label" ? say.none : "");
const haystack = Array.from({ length: n }, (_, i) => data.columns.map((column) => column.text(i)).join("\n").toLowerCase());

// --- colours: each point has a shade, a place among the colours of its column; the last is that of no value -----
const LEVELS = 32;
const SCALES = {
  light: ["#0d0887", "#4903a0", "#7a02a8", "#a51f99", "#c6417d", "#d95a6a"], dark: ["#c63d80", "#d9586a", "#ed7a52", "#fb9f3a", "#fdca26", "#f0f921"] };
const GREYS = { light: "#8b909a", dark: "#767b85" };
let theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
const rgbOf = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
function scaleAt(share) {
  const stops = SCALES[theme].map(rgbOf), place = share * (stops.length - 1), k = Math.min(stops.length - 2, Math.floor(place));
  return stops[k].map((v, c) => Math.round(v + (stops[k + 1][c] - v) * (place - k)));
}
let shades = new Uint8Array(n), colours = [];
function shade() {
  if (by.kind === "label") {
    colours = [...data.palettes[theme], GREYS[theme]].map(rgbOf);
    shades = Uint8Array.from(by.codes, (c) => c < 0 ? colours.length - 1 : by.colours[c]);
  } else {
    colours = [...Array.from({ length: LEVELS }, (_, k) => scaleAt(k / (LEVELS - 1))), rgbOf(GREYS[theme])];
    const span = by.high - by.low || 1;
    shades = Uint8Array.from(by.values, (v) => isNaN(v) ? LEVELS : Math.round(Math.min(1, Math.max(0, (v - by.low) / span)) * (LEVELS - 1)));
  }
  // points without a value are drawn first, then large labels, so that these do not cover small ones
  const weight = (i) => by.kind !== "label" ? (isNaN(by.values[i]) ? 1 : 0) : by.codes[i] < 0 ? n + 1 : by.sizes[by.codes[i]];
  order = Int32Array.from({ length: n }, (_, i) => i).sort((a, b) => weight(b) - weight(a) || a - b);
}
let order = new Int32Array(n);
const css = ([r, g, b]) => `rgb(${r},${g},${b})`;
const colourOf = (i) => css(colours[shades[i]]);

// --- maps: points scaled to a unit square, and a grid to find them by -------------------------------------------
const CELLS = 128;
const cellOf = (v) => Math.min(CELLS, Math.max(0, Math.floor(v * CELLS)));
const maps = data.maps.map(({ name, note, space, coords }) => {
  const raw = new Float32Array(bytes(coords));
  const low = [Infinity, Infinity], high = [-Infinity, -Infinity];
  for (let i = 0; i < raw.length; i++) { low[i % 2] = Math.min(low[i % 2], raw[i]); high[i % 2] = Math.max(high[i % 2], raw[i]); }
  const side = Math.max(high[0] - low[0], high[1] - low[1]) || 1;
  const unit = (x, y) => [(x - (low[0] + high[0]) / 2) / side + 0.5, 0.5 - (y - (low[1] + high[1]) / 2) / side];
  const xy = new Float32Array(raw.length), grid = new Map();
  for (let i = 0; i < n; i++) {
    [xy[2 * i], xy[2 * i + 1]] = unit(raw[2 * i], raw[2 * i + 1]);
    const cell = cellOf(xy[2 * i]) * (CELLS + 1) + cellOf(xy[2 * i + 1]);
    if (!grid.has(cell)) grid.set(cell, []);
    grid.get(cell).push(i);
  }
  return { name, note, xy, grid, unit, ...spaces[space] };
});

// --- what is selected: a point is lit if the search, the legend and the lasso all hold it ------------------------
const state = { map: 0, query: "", matches: null, groups: new Set(), lasso: null, hover: -1, chosen: -1, zoom: 1, x: 0.5, y: 0.5 };
const isLit = new Uint8Array(n).fill(1);
const some = () => state.matches !== null || state.groups.size > 0 || state.lasso !== null;
function light() {
  for (let i = 0; i < n; i++)
    isLit[i] = (!state.groups.size || state.groups.has(by.codes[i])) && (!state.matches || state.matches[i]) && (!state.lasso || state.lasso[i]) ? 1 : 0;
}
const litRows = () => Array.from(order.keys()).filter((i) => isLit[i]);
// in the original space of the map that is shown: before and after are two
const neighbours = (i) => Array.from(maps[state.map].near.subarray(i * wide, (i + 1) * wide)).filter((j) => j >= 0);
