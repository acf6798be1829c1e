// Drawing a row of an image-like input: (rows, height, width), or (rows, height, width, channels) with up to 4 channels.
// The body's text is what counts: it is read before each mark and written after it.

import { written } from "./written.js";

const LARGEST = 64; // cells a side

const at = (id) => document.getElementById(id);
let model = null;
let cursor = [0, 0];
let changed = () => {};

// Have this called after each change of the body.
export function whenDrawn(call) {
  changed = call;
}

function image() {
  const [spec] = model.inputs;
  if (model.inputs.length !== 1 || spec.dtype === "bool") return null;
  const [, height, width, channels] = spec.shape;
  const flat = spec.shape.length === 3;
  const small = Math.max(height, width) <= LARGEST;
  if (!small || !(flat || (spec.shape.length === 4 && channels <= 4))) return null;
  const [low, high] = spec.value_range ?? spec.typical_range ?? [0, 1];
  return { height, width, channels: flat ? 0 : channels, low, high };
}

function drawnRow() {
  try {
    const body = JSON.parse(at("body").value);
    const rows = body.instances;
    const { height, width } = image();
    const row = rows[Number(at("row").value)];
    return row.length === height && row.every((line) => line.length === width) ? { body, rows, row } : null;
  } catch {
    return null; // not JSON at the moment, or not of this shape: there is nothing to draw on
  }
}

export function showDrawing(chosen) {
  model = chosen;
  const form = image();
  const drawn = form && drawnRow();
  at("drawing").hidden = !drawn;
  if (!drawn) return;
  at("row").max = drawn.rows.length - 1;
  const canvas = at("canvas");
  canvas.width = form.width;
  canvas.height = form.height;
  canvas.setAttribute("aria-label", `Row ${at("row").value} as an image of ${form.height} by ${form.width}`);
  const pixels = new ImageData(form.width, form.height);
  drawn.row.flat().forEach((cell, index) => {
    const shade = (value) => 255 * Math.min(1, Math.max(0, (value - form.low) / (form.high - form.low || 1)));
    const [red, green, blue] = form.channels >= 3 ? cell : Array(3).fill(form.channels ? cell[0] : cell);
    pixels.data.set([shade(red), shade(green), shade(blue), 255], 4 * index);
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function paint(y, x, value) {
  const form = image();
  const drawn = drawnRow();
  if (!drawn || y < 0 || x < 0 || y >= form.height || x >= form.width) return;
  drawn.row[y][x] = form.channels ? Array(form.channels).fill(value) : value;
  at("body").value = written(drawn.body);
  changed();
}

function cellAt(event) {
  const box = at("canvas").getBoundingClientRect();
  const form = image();
  const y = Math.floor(((event.clientY - box.top) / box.height) * form.height);
  return [y, Math.floor(((event.clientX - box.left) / box.width) * form.width)];
}

function clearRow() {
  const form = image();
  const drawn = drawnRow();
  if (!drawn) return;
  const empty = () => (form.channels ? Array(form.channels).fill(form.low) : form.low);
  drawn.rows[Number(at("row").value)] = Array.from({ length: form.height }, () =>
    Array.from({ length: form.width }, empty),
  );
  at("body").value = written(drawn.body);
  changed();
}

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function keyOnCanvas(event) {
  const form = image();
  if (event.key === " ") {
    paint(...cursor, form.high);
  } else if (MOVES[event.key]) {
    const [down, right] = MOVES[event.key];
    cursor = [(cursor[0] + down + form.height) % form.height, (cursor[1] + right + form.width) % form.width];
    showDrawing(model);
    const context = at("canvas").getContext("2d");
    context.fillStyle = "#e0a030";
    context.fillRect(cursor[1], cursor[0], 1, 1);
  } else {
    return;
  }
  event.preventDefault();
}

at("row").addEventListener("input", () => showDrawing(model));
at("clear").addEventListener("click", clearRow);
at("canvas").addEventListener("keydown", keyOnCanvas);
at("canvas").addEventListener("pointerdown", (event) => {
  at("canvas").setPointerCapture(event.pointerId);
  paint(...cellAt(event), image().high);
});
at("canvas").addEventListener("pointermove", (event) => {
  if (event.buttons) paint(...cellAt(event), image().high);
});
