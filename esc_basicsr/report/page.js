"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const COLOURS = 8;
const HEIGHT = 240;
const ROOM = { left: 62, right: 14, top: 12, bottom: 30 };

const state = { hidden: new Set(), smoothing: 0.8, isLog: false };
const redraws = []; // one for each chart

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function draw(name, attributes = {}, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

const colour = (of) => `var(--c${of % COLOURS})`;
const dash = (of) => DASHES[(of + Math.floor(of / COLOURS)) % DASHES.length];

function swatch(of) {
  const svg = draw("svg", { class: "swatch", viewBox: "0 0 30 12", "aria-hidden": "true" });
  const line = draw("line", { x1: 0, x2: 30, y1: 6, y2: 6, "stroke-width": 3, "stroke-dasharray": dash(of) });
  line.style.stroke = colour(of);
  svg.append(line);
  return svg;
}

// Numbers

function written(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return value.toExponential(3);
  return String(Number(value.toPrecision(size >= 10 ? 5 : 4)));
}

const whole = (value) => Math.round(value).toLocaleString("en-GB");

function tickStep(range, count) {
  const rough = range / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
}

function ticks(low, high, count) {
  const step = tickStep(high - low, count);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) {
    found.push(Number((k * step).toPrecision(12)));
  }
  return found;
}

function shortIteration(value) {
  if (value >= 1e6) return `${Number((value / 1e6).toPrecision(4))}M`;
  if (value >= 1e4) return `${Number((value / 1e3).toPrecision(4))}k`;
  return String(value);
}

function tickText(value) {
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-4 || size >= 1e5) ? value.toExponential().replace("e+", "e") : String(value);
}

// An exponential moving average, without the pull towards zero at its beginning.
function smoothed(values, weight) {
  let sum = 0;
  let total = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

// Charts

function addChart(chart) {
  const averaged = Math.max(...chart.curves.map((curve) => curve.each));
  const note = averaged > 1 ? ` each point the mean of up to ${averaged}` : "";
  const svg = draw("svg", { class: "chart", tabindex: 0, role: "img", "data-chart": chart.name });
  const reading = make("div", { class: "reading", role: "status" });
  const figure = make("figure", {}, make("figcaption", {}, chart.title, make("small", {}, note)), svg, reading);
  document.getElementById("charts").append(figure);
  let view = null;

  function redraw() {
    const curves = chart.curves
      .filter((curve) => !state.hidden.has(curve.of))
      .map((curve) => ({
        ...curve,
        shown: chart.noisy && state.smoothing > 0 ? smoothed(curve.y, state.smoothing) : curve.y,
      }));
    view = plot(svg, chart, curves);
    svg.setAttribute("aria-label", described(chart, curves));
    hush();
  }

  function hush() {
    reading.replaceChildren();
    if (view) view.cursor.replaceChildren();
  }

  function read(x) {
    if (!view) return;
    const { cursor, curves, toX, toY } = view;
    cursor.replaceChildren(draw("line", { class: "cursor", x1: toX(x), x2: toX(x), y1: ROOM.top, y2: HEIGHT - ROOM.bottom }));
    const lines = [make("div", {}, `iteration ${whole(x)}`)];
    for (const curve of curves) {
      const index = nearest(curve.x, x);
      const dot = draw("circle", { cx: toX(curve.x[index]), cy: toY(curve.shown[index]), r: 4 });
      dot.style.fill = colour(curve.of);
      cursor.append(dot);
      const at = curve.x[index] === x ? "" : ` (at ${whole(curve.x[index])})`;
      const raw = curve.shown === curve.y ? "" : ` (logged ${written(curve.y[index])})`;
      const name = make("span", { class: "name" }, data.names[curve.of]);
      const value = make("b", {}, `${written(curve.shown[index])}${raw}${at}`);
      lines.push(make("div", {}, swatch(curve.of), name, value));
    }
    reading.replaceChildren(...lines);
    const left = toX(x);
    const beyond = left + reading.offsetWidth + 24 > figure.clientWidth;
    reading.style.left = `${Math.max(4, beyond ? left - reading.offsetWidth - 4 : left + 24)}px`;
    reading.style.top = "3.2rem";
    view.at = x;
  }

  svg.addEventListener("pointermove", (event) => {
    if (!view) return;
    const x = view.fromX(event.clientX - svg.getBoundingClientRect().left);
    read(view.all[nearest(view.all, x)]);
  });
  svg.addEventListener("pointerleave", hush);
  svg.addEventListener("blur", hush);
  svg.addEventListener("keydown", (event) => {
    if (!view) return;
    const { all } = view;
    const index = view.at === undefined ? all.length - 1 : nearest(all, view.at);
    const stride = event.shiftKey ? 10 : 1;
    const next = { ArrowLeft: index - stride, ArrowRight: index + stride, Home: 0, End: all.length - 1 }[event.key];
    if (event.key === "Escape") hush();
    if (next === undefined) return;
    event.preventDefault();
    read(all[Math.min(all.length - 1, Math.max(0, next))]);
  });
  redraws.push(redraw);
  redraw();
  new ResizeObserver(() => {
    if (svg.clientWidth !== view?.width) redraw();
  }).observe(svg);
}

function described(chart, curves) {
  const ends = curves.map((curve) => {
    const last = curve.x.length - 1;
    return `${data.names[curve.of]} ${written(curve.shown[last])} at iteration ${whole(curve.x[last])}`;
  });
  return `${chart.title}. ${ends.length ? `Last values: ${ends.join("; ")}.` : "No experiment is shown."}`;
}

function nearest(sorted, x) {
  let low = 0;
  let high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= x) low = middle;
    else high = middle;
  }
  return Math.abs(sorted[high] - x) < Math.abs(sorted[low] - x) ? high : low;
}

// Draws the curves, and says where values lie; null if there are none.
function plot(svg, chart, curves) {
  svg.replaceChildren();
  const width = svg.clientWidth;
  const values = curves.flatMap((curve) => [...curve.y, ...curve.shown]);
  if (!values.length || width < 120) return null;
  const positive = values.every((value) => value > 0);
  const isLog = state.isLog && positive && !chart.name.startsWith("metrics/");
  const map = isLog ? Math.log10 : (value) => value;
  const unmap = isLog ? (value) => 10 ** value : (value) => value;

  const all = [...new Set(curves.flatMap((curve) => curve.x))].sort((a, b) => a - b);
  const lowX = all[0];
  const highX = all.at(-1) > lowX ? all.at(-1) : lowX + 1;
  let low = values.reduce((a, b) => Math.min(a, b));
  let high = values.reduce((a, b) => Math.max(a, b));
  [low, high] = [map(low), map(high)];
  if (high === low) [low, high] = [low - Math.abs(low || 1) * 0.05, high + Math.abs(high || 1) * 0.05];
  const margin = (high - low) * 0.05;
  [low, high] = [low - margin, high + margin];

  const right = width - ROOM.right;
  const bottom = HEIGHT - ROOM.bottom;
  const toX = (x) => ROOM.left + ((x - lowX) / (highX - lowX)) * (right - ROOM.left);
  const fromX = (x) => lowX + ((x - ROOM.left) / (right - ROOM.left)) * (highX - lowX);
  const toY = (y) => bottom - ((map(y) - low) / (high - low)) * (bottom - ROOM.top);

  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  for (const y of marks(low, high, isLog, unmap)) {
    svg.append(draw("line", { class: "grid", x1: ROOM.left, x2: right, y1: toY(y), y2: toY(y) }));
    svg.append(draw("text", { x: ROOM.left - 6, y: toY(y) + 4, "text-anchor": "end" }, tickText(y)));
  }
  svg.append(draw("text", { x: ROOM.left - 6, y: bottom + 20, "text-anchor": "end" }, "iteration"));
  for (const x of ticks(lowX, highX, Math.max(2, Math.floor((right - ROOM.left) / 90)))) {
    if (!Number.isInteger(x)) continue;
    svg.append(draw("line", { class: "grid", x1: toX(x), x2: toX(x), y1: bottom, y2: bottom + 5 }));
    svg.append(draw("text", { x: toX(x), y: bottom + 20, "text-anchor": "middle" }, shortIteration(x)));
  }
  const path = (xs, ys) => xs.map((x, i) => `${i ? "L" : "M"}${toX(x).toFixed(1)} ${toY(ys[i]).toFixed(1)}`).join("");
  for (const kind of ["raw", "curve"]) {
    for (const curve of curves) {
      if (kind === "raw" && curve.shown === curve.y) continue;
      const line = draw("path", { class: kind, d: path(curve.x, kind === "raw" ? curve.y : curve.shown) });
      line.style.stroke = colour(curve.of);
      if (kind === "curve") line.setAttribute("stroke-dasharray", dash(curve.of));
      svg.append(line);
      if (kind === "curve" && curve.x.length <= 40) {
        curve.x.forEach((x, i) => {
          const dot = draw("circle", { cx: toX(x), cy: toY(curve.shown[i]), r: 2.5 });
          dot.style.fill = colour(curve.of);
          svg.append(dot);
        });
      }
    }
  }
  const cursor = draw("g");
  svg.append(cursor);
  return { width, cursor, curves, all, toX, fromX, toY };
}

function marks(low, high, isLog, unmap) {
  if (!isLog) return ticks(low, high, 5);
  const powers = ticks(Math.ceil(low), Math.floor(high), 4).filter(Number.isInteger).map((power) => Number(`1e${power}`));
  if (high - low >= 2 && powers.length > 1) return powers;
  return ticks(unmap(low), unmap(high), 5).filter((value) => value > 0);
}

function redrawAll() {
  for (const redraw of redraws) redraw();
}

function addControls() {
  const controls = document.getElementById("controls");
  data.names.forEach((name, of) => {
    const box = make("input", { type: "checkbox" });
    box.checked = true;
    box.addEventListener("change", () => {
      if (box.checked) state.hidden.delete(of);
      else state.hidden.add(of);
      redrawAll();
    });
    controls.append(make("label", {}, box, swatch(of), make("span", { class: "name" }, name)));
  });
  const smoothing = make("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: state.smoothing });
  const shown = make("output", {}, state.smoothing.toFixed(2));
  smoothing.addEventListener("input", () => {
    state.smoothing = Number(smoothing.value);
    shown.textContent = state.smoothing.toFixed(2);
    redrawAll();
  });
  const log = make("input", { type: "checkbox" });
  log.addEventListener("change", () => {
    state.isLog = log.checked;
    redrawAll();
  });
  controls.append(make("label", {}, "Smoothing", smoothing, shown), make("label", {}, log, "Logarithmic (not metrics)"));
}

// Images

function panelName(panel, panels) {
  if (panel.kind !== "SR") {
    const alike = panels.filter((other) => other.kind === panel.kind);
    return alike.length > 1 ? `${panel.kind} ${alike.indexOf(panel) + 1}` : panel.kind;
  }
  return `SR, ${data.names[panel.of]}, iteration ${whole(panel.iter)}`;
}

function addImages() {
  if (!data.images.length) return;
  document.getElementById("images").hidden = false;
  const byId = (id) => document.getElementById(id);
  const choose = { image: make("select"), left: make("select"), right: make("select") };
  const labels = { image: "Image", left: "Left", right: "Right" };
  for (const [key, select] of Object.entries(choose)) byId("choices").append(make("label", {}, labels[key], select));
  data.images.forEach((image, index) => choose.image.append(make("option", { value: index }, image.name)));
  const wanted = { left: "bicubic", right: null };
  let panels = [];

  function showImage() {
    const image = data.images[choose.image.value];
    panels = image.panels
      .map((panel) => ({ ...panel, name: panelName(panel, image.panels) }))
      .sort((a, b) => (a.of ?? -1) - (b.of ?? -1) || (b.iter ?? 0) - (a.iter ?? 0));
    const newest = panels.findIndex((panel) => panel.kind === "SR");
    for (const side of ["left", "right"]) {
      choose[side].replaceChildren(...panels.map((panel, index) => make("option", { value: index }, panel.name)));
      const same = panels.findIndex((panel) => panel.name === wanted[side]);
      choose[side].value = same >= 0 ? same : newest;
    }
    const compare = byId("compare");
    const zoom = Math.max(1, Math.round(560 / image.width));
    compare.style.width = `${image.width * zoom}px`;
    byId("sides").style.width = compare.style.width;
    compare.style.aspectRatio = `${image.width} / ${image.height}`;
    showSides();
  }

  function showSides() {
    for (const side of ["left", "right"]) {
      const panel = panels[choose[side].value];
      byId(side).src = data.sources[panel.src];
      byId(side).alt = `${data.images[choose.image.value].name}: ${panel.name}`;
      const caption = panel.metrics ? `${panel.name}: ${panel.metrics}` : panel.name;
      byId(`${side}-caption`).textContent = side === "left" ? `◀\u00a0${caption}` : `${caption}\u00a0▶`;
    }
    byId("divider").setAttribute(
      "aria-label",
      `Divider between ${panels[choose.left.value].name} and ${panels[choose.right.value].name}`,
    );
  }

  function moveDivider() {
    byId("compare").style.setProperty("--at", `${byId("divider").value}%`);
  }

  choose.image.addEventListener("change", showImage);
  for (const side of ["left", "right"]) {
    choose[side].addEventListener("change", () => {
      wanted[side] = panels[choose[side].value].name;
      showSides();
    });
  }
  byId("divider").addEventListener("input", moveDivider);
  moveDivider();
  showImage();
}

addControls();
data.charts.forEach(addChart);
addImages();
