// Hands: pointer, wheel, two fingers, keys and buttons; then the start.
const tip = document.getElementById("tip");
function zoomAt(px, py, factor) {
  const before = scale();
  state.zoom = Math.min(200, Math.max(0.5, state.zoom * factor));
  const gain = 1 / before - 1 / scale();
  state.x += (px - width / 2) * gain; state.y += (py - height / 2) * gain;
  draw();
}
function move(dx, dy) { state.x -= dx / scale(); state.y -= dy / scale(); draw(); }
function zoomTo(rows) {
  const { xy } = maps[state.map];
  const ends = [0, 1].map((axis) => rows.reduce(([low, high], i) => [Math.min(low, xy[2 * i + axis]), Math.max(high, xy[2 * i + axis])], [Infinity, -Infinity]));
  if (!rows.length) return;
  [state.x, state.y] = ends.map(([low, high]) => (low + high) / 2);
  const [across, up] = ends.map(([low, high]) => high - low + 1e-4);
  state.zoom = Math.min(60, Math.max(0.5, 0.8 * Math.min(width / across, height / up) / room()));
  draw();
}
function pointAt(px, py) {
  const { grid } = maps[state.map], reach = 9;
  const at = (p, middle, from) => (p - middle / 2) / scale() + from;
  let best = -1, least = reach * reach;
  for (let cx = cellOf(at(px - reach, width, state.x)); cx <= cellOf(at(px + reach, width, state.x)); cx++)
    for (let cy = cellOf(at(py - reach, height, state.y)); cy <= cellOf(at(py + reach, height, state.y)); cy++)
      for (const i of grid.get(cx * (CELLS + 1) + cy) || []) {
        if (!isLit[i]) continue;
        const [x, y] = screen(i), gap = (x - px) ** 2 + (y - py) ** 2;
        if (gap < least) { least = gap; best = i; }
      }
  return best;
}

// --- pointers: one drags, clicks or draws the lasso; two pinch --------------------------------------------------
const pointers = new Map();
let drag = null;
const fingers = () => { const [a, b] = [...pointers.values()]; return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, apart: Math.hypot(a.x - b.x, a.y - b.y) || 1 }; };
canvas.onpointerdown = (e) => {
  canvas.setPointerCapture(e.pointerId);
  pointers.set(e.pointerId, { x: e.offsetX, y: e.offsetY });
  drag = pointers.size === 1 ? { x: e.offsetX, y: e.offsetY, moved: false } : null;
  loop = pointers.size === 1 && (e.shiftKey || lasso.ariaPressed === "true") ? [[e.offsetX, e.offsetY]] : null;
};
canvas.onpointermove = (e) => {
  if (pointers.size === 2 && pointers.has(e.pointerId)) {
    const before = fingers();
    pointers.set(e.pointerId, { x: e.offsetX, y: e.offsetY });
    const now = fingers();
    move(now.x - before.x, now.y - before.y);
    return zoomAt(now.x, now.y, now.apart / before.apart);
  }
  if (loop) { loop.push([e.offsetX, e.offsetY]); return draw(); }
  if (drag && (drag.moved || Math.hypot(e.offsetX - drag.x, e.offsetY - drag.y) > 3)) {
    move(e.offsetX - drag.x, e.offsetY - drag.y);
    drag = { x: e.offsetX, y: e.offsetY, moved: true };
    canvas.classList.add("dragging");
    return hideTip();
  }
  if (pointers.size < 2) hover(pointAt(e.offsetX, e.offsetY), e.offsetX, e.offsetY);
};
canvas.onpointerup = canvas.onpointercancel = (e) => {
  if (loop && loop.length > 2) selectInside(loop);
  else if (e.type === "pointerup" && drag && !drag.moved) choose(pointAt(e.offsetX, e.offsetY));
  pointers.delete(e.pointerId);
  drag = loop = null;
  canvas.classList.remove("dragging");
  hideTip();                                     // it would lie over the neighbours that were just lit up
  draw();
};
canvas.onpointerleave = () => { hideTip(); state.hover = -1; draw(); };
canvas.addEventListener("wheel", (e) => { e.preventDefault(); zoomAt(e.offsetX, e.offsetY, Math.exp(-e.deltaY * 0.0015)); }, { passive: false });
function hideTip() { tip.style.display = "none"; }
function hover(i, px, py) {
  tip.style.display = i < 0 ? "none" : "block";
  if (i >= 0) {
    tip.replaceChildren(element("b", "", labelOf(i)), ...(titleOf(i) ? [element("strong", "", titleOf(i))] : []), element("span", "", textOf(i)), kept(i));
    tip.style.left = Math.max(8, Math.min(px + 14, width - tip.offsetWidth - 8)) + "px";
    tip.style.top = Math.max(8, Math.min(py + 14, height - tip.offsetHeight - 8)) + "px";
  }
  if (i !== state.hover) { state.hover = i; draw(); }
}
function selectInside(corners) {                // a point is inside if a line to its right crosses the loop an odd number of times
  state.lasso = Uint8Array.from({ length: n }, (_, i) => {
    const [x, y] = screen(i);
    let inside = false;
    corners.forEach(([x1, y1], k) => {
      const [x2, y2] = corners[(k + 1) % corners.length];
      if (y1 > y !== y2 > y && x < x1 + (y - y1) / (y2 - y1) * (x2 - x1)) inside = !inside;
    });
    return inside ? 1 : 0;
  });
  setLasso(false);
  select();
}

// --- keys and buttons -------------------------------------------------------------------------------------------
const KEYS = {
  ArrowLeft: () => move(60, 0), ArrowRight: () => move(-60, 0), ArrowUp: () => move(0, 60), ArrowDown: () => move(0, -60),
  "+": () => zoomAt(width / 2, height / 2, 1.4), "=": () => zoomAt(width / 2, height / 2, 1.4), "-": () => zoomAt(width / 2, height / 2, 1 / 1.4), 0: () => home() };
canvas.onkeydown = (e) => { if (KEYS[e.key] && !e.ctrlKey && !e.metaKey) { e.preventDefault(); KEYS[e.key](); } };
document.onkeydown = (e) => {
  if (e.key === "Escape") { state.chosen >= 0 ? choose(-1) : clear(); }
  if (e.key === "/" && !/INPUT|SELECT/.test(document.activeElement.tagName)) { e.preventDefault(); box.focus(); }
};
const [lasso, zoomIn, zoomOut, reset, dark] = document.querySelectorAll("#tools button"), box = document.getElementById("search");
function named(made, name, text) {
  if (text) made.textContent = name;
  made.title = name; made.setAttribute("aria-label", name);
}
function setLasso(on) { lasso.ariaPressed = String(on); canvas.classList.toggle("lasso", on); }
function home() { state.zoom = 1; state.x = state.y = 0.5; draw(); }
function search(text) {
  state.query = text.trim().toLowerCase();
  state.matches = state.query ? Uint8Array.from(haystack, (hay) => hay.includes(state.query) ? 1 : 0) : null;
  select();
}
function clear() {
  box.value = ""; state.groups.clear(); state.lasso = null; setLasso(false);
  search(""); legend();
}
function show(map) {
  state.map = map;
  document.getElementById("maps").replaceChildren(...maps.map(({ name, note }, m) => {
    const made = button("", name, () => show(m));
    made.title = note;
    made.setAttribute("aria-pressed", m === map);
    return made;
  }));
  document.getElementById("note").textContent = `${maps[map].note} · ${say.note}`;
  describe();
  choose(state.chosen);
  home();
}
function describe() { canvas.setAttribute("aria-label", say.map(maps[state.map].name, n, by.name)); }
function colourBy(column) {
  by = data.columns[column];
  state.groups.clear(); wantedLabel = ""; labelsShown = LISTED;
  shade(); select(); legend(); describe();
}
function setTheme(name) {
  theme = document.documentElement.dataset.theme = name;
  shade(); legend(); choose(state.chosen);
}

document.documentElement.lang = zh ? "zh" : "en";
document.title = document.querySelector("h1").textContent = data.name;
document.querySelector("header p").textContent = say.points(n, data.all) + (data.longest === null ? "" : say.cut(data.longest));
box.placeholder = say.search;
box.setAttribute("aria-label", say.search);
box.oninput = () => search(box.value);
box.onkeydown = (e) => { if (e.key === "Enter" && state.matches) zoomTo(litRows()); };
named(lasso, say.lasso, true); named(zoomIn, say.zoomIn); named(zoomOut, say.zoomOut); named(reset, say.reset, true); named(dark, say.theme);
document.getElementById("maps").setAttribute("aria-label", say.maps);
document.getElementById("tools").setAttribute("aria-label", say.tools);
lasso.onclick = () => setLasso(lasso.ariaPressed !== "true");
zoomIn.onclick = KEYS["+"]; zoomOut.onclick = KEYS["-"];
reset.onclick = () => { clear(); home(); };
dark.onclick = () => setTheme(theme === "dark" ? "light" : "dark");
document.querySelector("#by span").textContent = say.by;
const choice = document.querySelector("#by select");
data.columns.forEach((column, c) => {
  if (column.kind === "text") return;
  const option = element("option", "", column.name);
  option.value = c;
  choice.append(option);
});
choice.value = data.colour;
choice.onchange = () => colourBy(Number(choice.value));
new ResizeObserver(draw).observe(canvas);
setTheme(theme); light(); show(0);
window.explorer = { state, screen, lit: (i) => isLit[i] === 1, neighbours, points: n, paint, drawnNames, colourOf };
