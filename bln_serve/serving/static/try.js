// The page to try a model: what it says comes from /models, what it sends goes to /models/NAME/predict.

import { showDrawing, whenDrawn } from "./drawing.js";
import { written } from "./written.js";

const MOST_BARS = 20; // entries of a row that are shown as bars
const MOST_ROWS = 10; // rows that are
const LONGEST_COMMAND = 4000; // characters of a body that stand in the curl command

const at = (id) => document.getElementById(id);
let models = [];
let model = null;

function element(tag, text, ...children) {
  const made = document.createElement(tag);
  made.append(...(text ? [text] : []), ...children);
  return made;
}

// ---- asking the service ----

async function ask(path, options = {}) {
  const headers = { accept: "application/json", ...options.headers };
  if (at("token").value) headers.authorization = `Bearer ${at("token").value}`;
  return fetch(path, { ...options, headers });
}

async function documentAt(path) {
  const answer = await ask(path);
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

async function load() {
  try {
    models = (await documentAt("models")).models;
  } catch (error) {
    models = [];
    at("notice").textContent = error.message;
    at("notice").className = "wrong";
    return showModels();
  }
  at("notice").textContent = models.length ? "" : "No model is loaded yet. Readiness says why.";
  at("notice").className = "";
  showModels();
}

// ---- the list ----

function showModels() {
  at("models").replaceChildren(
    ...models.map((each) => {
      const choice = document.createElement("input");
      Object.assign(choice, { type: "radio", name: "model", value: each.name });
      choice.addEventListener("change", () => choose(each));
      const label = element("label", "", choice, ` ${each.name}`);
      label.className = "model";
      label.append(element("small", `version ${each.version}, ${each.statistics ?? "no BLN"}, ${each.row_coupling}`));
      return label;
    }),
  );
  at("trying").hidden = at("answer").hidden = true;
  const wanted = models.find((each) => each.name === model?.name) ?? models[0];
  if (!wanted) return;
  at("models").querySelector(`input[value="${CSS.escape(wanted.name)}"]`).checked = true;
  choose(wanted);
}

async function choose(chosen) {
  model = chosen;
  at("answer").hidden = true;
  at("trying").hidden = false;
  showFacts();
  await startFromExample();
}

function showFacts() {
  const facts = [
    ["Policy", model.statistics ?? "none: no Batch Layer Normalization"],
    ["Row coupling", `${model.row_coupling} (${model.row_coupling_reason})`],
    ["May be sent", rowsInWords()],
    ...model.inputs.map((spec) => ["Input", described(spec)]),
    ...model.outputs.map((spec) => ["Output", described(spec)]),
  ];
  at("facts").replaceChildren(...facts.flatMap(([term, text]) => [element("dt", term), element("dd", text)]));
}

function rowsInWords() {
  if (model.row_coupling === "independent") return "any number of rows";
  const most = model.max_mini_batch_rows ? ` and at most ${model.max_mini_batch_rows}` : "";
  return `rows in mini-batches of ${model.mini_batch_rows}; each with at least ${model.min_mini_batch_rows}${most}`;
}

function described(spec) {
  const sizes = spec.shape.map((size) => size ?? "rows").join(", ");
  const range = spec.value_range ?? spec.typical_range;
  const within = range ? `, ${spec.value_range ? "from" : "typically from"} ${range[0]} to ${range[1]}` : "";
  return `${spec.name}: ${spec.dtype} (${sizes})${within}`;
}

// ---- the request ----

async function startFromExample() {
  const chosen = model;
  try {
    const example = await documentAt(`models/${encodeURIComponent(chosen.name)}/example`);
    if (chosen !== model) return; // another was chosen meanwhile
    at("body").value = written(example);
  } catch (error) {
    showOutcome(error.message, false);
  }
  at("row").value = 0;
  bodyChanged();
}

function bodyChanged() {
  showCurl();
  showDrawing(model);
}

function path() {
  return `models/${encodeURIComponent(model.name)}/predict`;
}

function showCurl() {
  let compact = at("body").value;
  try {
    compact = JSON.stringify(JSON.parse(compact));
  } catch {
    // sent as it stands, and refused with a sentence
  }
  const data = compact.length > LONGEST_COMMAND ? "@request.json" : `'${compact.replaceAll("'", "'\\''")}'`;
  const token = at("token").value ? ' -H "authorization: Bearer $TOKEN"' : "";
  const url = new URL(path(), document.baseURI).href;
  at("curl").textContent = `curl ${url} -H 'content-type: application/json'${token} --data ${data}`;
}

async function send() {
  at("send").disabled = true;
  const began = performance.now();
  try {
    const headers = { "content-type": "application/json" };
    const answer = await ask(path(), { method: "POST", headers, body: at("body").value });
    const text = await answer.text();
    showAnswer(answer.status, text, performance.now() - began);
  } catch (error) {
    showOutcome(`No answer: ${error.message}`, false);
  }
  at("send").disabled = false;
}

// ---- the answer ----

function showOutcome(text, right) {
  at("answer").hidden = false;
  at("outcome").textContent = text;
  at("outcome").className = right ? "" : "wrong";
  at("bars").replaceChildren();
  at("document").textContent = "";
}

function showAnswer(status, text, milliseconds) {
  const took = `${milliseconds.toFixed(1)} ms`;
  let found = {};
  try {
    found = JSON.parse(text);
  } catch {
    return showOutcome(`${status} in ${took}: ${text}`, false);
  }
  if (status !== 200) return showOutcome(`${status} in ${took}: ${found.error}`, false);
  const rows = found.mini_batches ? `mini-batches ${found.mini_batches}` : "each row alone";
  const policy = found.statistics ? `, statistics ${found.statistics}` : "";
  showOutcome(`${status} in ${took}: ${found.model} version ${found.version}${policy}, ${rows}`, true);
  at("document").textContent = written(found);
  showBars(found.predictions);
}

function showBars(predictions) {
  if (model.outputs.length !== 1) return;
  const [output] = model.outputs;
  if (output.shape.length !== 2 || output.shape[1] > MOST_BARS || output.shape[1] < 2) return;
  at("bars").replaceChildren(...predictions.slice(0, MOST_ROWS).map((row, index) => bars(row, index, output.labels)));
}

function bars(row, index, labels) {
  const [low, high] = [Math.min(0, ...row), Math.max(0, ...row)];
  const most = row.indexOf(Math.max(...row));
  const name = (entry) => labels?.[entry] ?? String(entry);
  const group = element("div", "", element("h4", `Row ${index}: most at ${name(most)}`));
  group.className = "answered";
  row.forEach((value, entry) => {
    const meter = document.createElement("meter");
    Object.assign(meter, { min: low, max: high > low ? high : low + 1 });
    meter.value = value;
    meter.setAttribute("aria-label", name(entry));
    const cells = [element("span", name(entry)), meter, element("span", value.toPrecision(4))];
    cells.forEach((cell) => cell.classList.toggle("most", entry === most));
    group.append(...cells);
  });
  return group;
}

// ---- wiring ----

async function copy() {
  const range = document.createRange();
  range.selectNodeContents(at("curl"));
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  // Browsers give the clipboard to secure addresses alone; elsewhere the selected text is copied by hand.
  await navigator.clipboard?.writeText(at("curl").textContent);
}

at("send").addEventListener("click", send);
at("example").addEventListener("click", startFromExample);
at("access").addEventListener("submit", (event) => {
  event.preventDefault();
  load();
});
at("copy").addEventListener("click", copy);
at("body").addEventListener("input", bodyChanged);
whenDrawn(bodyChanged);
load();
