"use strict";
// Texts are only ever set as textContent: nothing from the data or a query becomes markup.

const $ = (id) => document.getElementById(id);
const names = { base: "基座 base", index: "微调 fine-tuned", bm25: "关键词 keywords", served: "线上 as served" };
let shown = null; // the last answer, with its query
let marks = {}; // grade by id, of the query that is shown
let possible = false;
let asked = 0;

function make(tag, className, text) {
  const element = document.createElement(tag);
  element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function say(text, isError = false) {
  $("message").textContent = text;
  $("message").className = isError ? "error" : "";
}

async function call(path, body) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body: JSON.stringify(body) });
  const found = await answer.json();
  if (answer.status === 401) $("login").hidden = false;
  if (!answer.ok) throw new Error(found.error?.message ?? answer.statusText);
  return found;
}

function result(row, system) {
  const item = make("li", "");
  item.dataset.id = row.id ?? "";
  const middle = make("div", "");
  middle.append(make("div", "text", row.text ?? row.id ?? `#${row.row}`));
  const others = Object.entries(row.columns).filter(([, value]) => value !== null && value !== row.text);
  const score = system === "bm25" ? row.score.toFixed(1) : row.score.toFixed(3);
  middle.append(make("div", "more", [score, ...others.map(([name, value]) => `${name}: ${value}`)].join(" · ")));
  item.append(make("div", "rank", row.rank), middle);
  if (possible && row.id) item.append(buttons(row.id));
  return item;
}

function buttons(id) {
  const both = make("div", "marks");
  for (const [kind, grade, sign, label] of [["yes", 1, "✓", "正确 right"], ["no", 0, "✗", "错误 wrong"]]) {
    const button = make("button", kind, sign);
    button.type = "button";
    button.title = label;
    button.setAttribute("aria-label", label);
    button.dataset.grade = grade;
    button.addEventListener("click", () => mark(id, grade));
    both.append(button);
  }
  return both;
}

function paint() {
  for (const item of document.querySelectorAll("li")) {
    const grade = marks[item.dataset.id];
    item.className = grade === 1 ? "right" : grade === 0 ? "wrong" : "";
    for (const button of item.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.grade) === grade));
    }
  }
}

function show(found) {
  shown = found;
  marks = found.marks;
  const columns = found.systems.map((system) => {
    const column = make("section", "");
    column.dataset.name = system.name;
    const title = make("h2", "", names[system.name] + " ");
    title.append(make("small", "", system.title));
    const list = make("ol", "");
    list.append(...system.results.map((row) => result(row, system.name)));
    column.append(title, list);
    if (!system.results.length) column.append(make("p", "more", "没有结果 nothing found"));
    return column;
  });
  $("systems").replaceChildren(...columns);
  paint();
}

function count(state) {
  possible = state.possible;
  $("counts").textContent = possible
    ? `已标注 judged: ${state.queries} 个查询 queries, ${state.right} ✓, ${state.wrong} ✗`
    : "没有 ID 列，不能标注 · nothing can be judged: start serve with id_column";
  $("how").hidden = !state.right;
  $("command").textContent = state.command ?? "";
}

async function mark(id, grade) {
  const query = shown.query;
  const wanted = marks[id] === grade ? null : grade;
  try {
    count(await call("/marks", { query, id, grade: wanted }));
    if (query !== shown.query) return;
    if (wanted === null) delete marks[id];
    else marks[id] = wanted;
    paint();
    say("已保存 saved");
  } catch (error) {
    say(`未保存 not saved: ${error.message}`, true);
  }
}

async function ask() {
  const query = $("query").value.trim();
  if (!query) return;
  const number = ++asked;
  say("检索中 searching …");
  try {
    const found = await call("/compare", { query, k: Number($("k").value) });
    if (number !== asked) return; // a later query has been asked
    show(found);
    say("");
  } catch (error) {
    if (number === asked) say(error.message, true);
  }
}

async function start() {
  try {
    count(await call("/marks"));
    say("");
  } catch (error) {
    say(error.message, true);
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value.trim());
  $("login").hidden = true;
  await start();
});
start();
