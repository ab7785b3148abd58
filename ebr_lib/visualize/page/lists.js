// The side: the legend, the rows that are selected, and the neighbours of the point that was clicked.
function element(kind, name, text, ...inside) {
  const made = document.createElement(kind);
  if (name) made.className = name;
  if (text !== null) made.textContent = text;    // text of the data only ever becomes text
  made.append(...inside);
  return made;
}
function button(name, text, onclick, ...inside) {
  const made = element("button", name, text, ...inside);
  made.onclick = onclick;
  return made;
}
function dot(colour) { const made = element("i", "", null); made.style.background = colour; return made; }

// --- the legend -------------------------------------------------------------------------------------------------
const LISTED = 100;                              // rows of a list; a button shows more
let wantedLabel = "", labelsShown = LISTED;
function legend() {
  const box = document.getElementById("legend"), top = box.scrollTop;
  if (by.kind === "number") return box.replaceChildren(element("h2", "", by.name), ...numberScale());
  const fits = by.labels.map((_, code) => code).filter((code) => by.labels[code].toLowerCase().includes(wantedLabel));
  const keys = fits.slice(0, labelsShown).map((code) => key(code, by.labels[code], colours[by.colours[code]], by.sizes[code]));
  const without = by.codes.reduce((sum, code) => sum + (code < 0), 0);
  if (without && !wantedLabel && fits.length <= labelsShown) keys.push(key(-1, say.none, colours.at(-1), without));
  if (fits.length > labelsShown) keys.push(button("more", say.more(fits.length - labelsShown), () => { labelsShown += 10 * LISTED; legend(); }));
  box.replaceChildren(element("h2", "", by.name), ...(by.labels.length > 25 ? [labelSearch()] : []), ...keys);
  box.scrollTop = top;
}
function key(code, name, colour, size) {
  if (!size) return "";
  const made = button("key", null, () => pick(code), dot(css(colour)), element("span", "", middleCut(name)), element("em", "", count(size)));
  made.title = name;
  made.setAttribute("aria-pressed", state.groups.has(code));
  made.classList.toggle("off", state.groups.size > 0 && !state.groups.has(code));
  return made;
}
function pick(code) {
  state.groups.has(code) ? state.groups.delete(code) : state.groups.add(code);
  const focused = [...document.querySelectorAll("#legend .key")].indexOf(document.activeElement);
  select(); legend();
  document.querySelectorAll("#legend .key")[focused]?.focus();
}
function labelSearch() {
  const made = element("input", "", null);
  made.type = "search"; made.placeholder = say.find; made.value = wantedLabel;
  made.setAttribute("aria-label", say.find);
  made.oninput = () => {
    wantedLabel = made.value.trim().toLowerCase(); labelsShown = LISTED;
    legend();
    document.querySelector("#legend input").focus();
  };
  return made;
}
function numberScale() {
  const bar = element("div", "scale", null), ends = element("div", "ends", null);
  bar.style.background = `linear-gradient(to right, ${SCALES[theme].join(", ")})`;
  ends.append(...[by.low, by.high].map((v) => element("span", "", v.toLocaleString())));
  return [bar, ends];
}

// --- rows -------------------------------------------------------------------------------------------------------
function select() {                              // after the search, the legend or the lasso changed
  light();
  rowsShown = LISTED;
  const rows = some() ? litRows().length : 0;
  document.getElementById("hits").textContent = state.matches ? say.hits(rows) : "";
  choose(-1);
}
let rowsShown = LISTED;
function choose(i) {
  state.chosen = i;
  const box = document.getElementById("near");
  if (i >= 0) box.replaceChildren(...about(i));
  else if (some()) box.replaceChildren(...selected());
  else box.replaceChildren(element("h2", "", say.pick));
  box.scrollTop = 0;
  draw();
}
function about(i) {
  const card = element("div", "chosen", null, element("small", "", labelOf(i)));
  if (titleOf(i)) card.append(element("strong", "", titleOf(i)));
  card.append(element("span", "", textOf(i)), kept(i));
  const near = neighbours(i).map((j, rank) => item(j, (maps[state.map].cosines[i * wide + rank] / 10000).toFixed(3)));
  const back = some() ? [element("div", "acts", null, button("", say.back, () => choose(-1)))] : [];
  return [...back, card, element("h2", "", say.near + (n < data.all ? say.drawn : "")), ...near];
}
function selected() {
  const rows = litRows(), acts = element("div", "acts", null);
  acts.append(button("", say.zoom, () => zoomTo(rows)), button("", say.copy, (e) => copy(rows, e.target)), button("", say.csv, () => save(rows)),
    button("", say.clear, clear));
  const more = rows.length > rowsShown ? [button("more", say.more(Math.min(rows.length - rowsShown, 5 * LISTED)), () => {
    const top = document.getElementById("near").scrollTop;
    rowsShown += 5 * LISTED; choose(-1); document.getElementById("near").scrollTop = top;
  })] : [];
  return [element("h2", "", say.rows(rows.length)), acts, ...rows.slice(0, rowsShown).map((i) => item(i)), ...more];
}
function item(j, score) {
  const words = element("span", "", null);
  if (titleOf(j)) words.append(element("strong", "", titleOf(j)));
  words.append(element("span", "", textOf(j)), element("small", "", labelOf(j)));
  const made = button("item", null, () => choose(j), dot(colourOf(j)), words, ...(score ? [element("em", "", score)] : []));
  made.onmouseenter = made.onfocus = () => { state.hover = j; draw(); };
  made.onmouseleave = made.onblur = () => { state.hover = -1; draw(); };
  return made;
}
function kept(i) {                               // the columns that are not shown by themselves
  const list = element("dl", "kept", null);
  data.columns.forEach((column, c) => {
    if (column === by || c === data.text || c === data.title || !column.text(i)) return;
    list.append(element("dt", "", column.name), element("dd", "", column.text(i)));
  });
  return list.childElementCount ? list : "";
}

// --- rows leave the page ----------------------------------------------------------------------------------------
function table(rows, sign) {
  const cell = (text) => /["\n\r]/.test(text) || text.includes(sign) ? `"${text.replaceAll('"', '""')}"` : text;
  const lines = [data.columns.map((column) => column.name), ...rows.map((i) => data.columns.map((column) => column.text(i)))];
  return lines.map((line) => line.map(cell).join(sign)).join("\r\n") + "\r\n";
}
async function copy(rows, made) {
  const text = table(rows, "\t");
  try {
    await navigator.clipboard.writeText(text);
  } catch {                                      // not allowed in a frame, or no such thing
    const area = element("textarea", "", null);
    area.value = text;
    document.body.append(area); area.select(); document.execCommand("copy"); area.remove();
  }
  made.textContent = say.copied;
}
function save(rows) {                            // with a byte order mark: Excel reads UTF-8 only then
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(["\ufeff" + table(rows, ",")], { type: "text/csv" }));
  link.download = "rows.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
