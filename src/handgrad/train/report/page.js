// Draws the curves of the page, and again whenever its width, the axis, the zoom or the chosen runs change.
// What there is to draw lies in the page as JSON; curves.py says how.
"use strict";

const data = document.getElementById("data") && JSON.parse(document.getElementById("data").textContent);
const hidden = new Set(); // runs that are switched off
let axis = "step"; // or "tokens", "seconds"
let zoom = null; // [from, to] on that axis; null for all

const escape = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
const round = (number) => Math.round(number * 100) / 100;

// Where a step of a run lies on the chosen axis.
function place(run, step) {
  if (axis === "tokens") return step * data.runs[run].batch_tokens;
  if (axis === "step") return step;
  const [steps, seconds] = data.runs[run].seconds;
  const right = steps.findIndex((other) => other >= step);
  if (right <= 0) return right ? seconds[seconds.length - 1] : seconds[0];
  const part = (step - steps[right - 1]) / (steps[right] - steps[right - 1]);
  return seconds[right - 1] + part * (seconds[right] - seconds[right - 1]);
}

// A number in at most four digits.
function short(number) {
  const size = Math.abs(number);
  if (size !== 0 && (size < 1e-3 || size >= 1e15)) return number.toExponential(2).replace(/\.?0+e/, "e");
  const power = size < 1e4 ? 0 : Math.min(Math.floor(Math.log10(size) / 3), 4);
  return `${Number((number / 1000 ** power).toPrecision(4))}${["", "k", "M", "B", "T"][power]}`;
}

// A number in five digits.
function exact(number) {
  const size = Math.abs(number);
  if (size >= 1e5) return Math.round(number).toLocaleString("en");
  return size && size < 1e-3 ? number.toExponential(3) : number.toPrecision(5);
}

function clock(seconds) {
  const total = Math.round(seconds);
  const [hours, minutes, rest] = [Math.floor(total / 3600), Math.floor(total / 60) % 60, total % 60];
  const two = (n) => String(n).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

// A place on the axis, for people.
function onAxis(x) {
  if (axis === "step") return x.toLocaleString("en");
  return axis === "tokens" ? short(x) : x < 10 && x % 1 ? `${short(x)} s` : clock(x);
}

// About `count` round numbers between low and high.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((n) => n * power >= rough * 0.999) * power;
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++)
    found.push(Number((n * step).toPrecision(12)));
  return found;
}

// 1, 2, 5, 10, 20 ... between low and high; every power of ten if those are many.
function logTicks(low, high) {
  const all = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const n of [1, 2, 5]) if (n * 10 ** power >= low && n * 10 ** power <= high) all.push(n * 10 ** power);
  const tens = all.filter((n) => Number.isInteger(Math.round(Math.log10(n) * 1e6) / 1e6));
  return all.length > 7 && tens.length > 1 ? tens.filter((_, i) => i % Math.ceil(tens.length / 6) === 0) : all;
}

// The range of values: those inside the zoom; with `tail`, not those of the first steps of a long curve.
function range(panel, curves, from, to) {
  let values = [];
  for (const curve of curves) {
    const start = panel.tail && !zoom && curve.x.length > 100 ? to * 0.04 : from;
    values.push(...curve.y.filter((_, i) => curve.x[i] >= start && curve.x[i] <= to));
  }
  if (!values.length) values = curves.flatMap((curve) => curve.y);
  values.push(...panel.lines.map((line) => line.y));
  let low = values.reduce((a, b) => Math.min(a, b), Infinity);
  const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  if (panel.log) return [low / 1.15, high * 1.15];
  if (panel.zero) low = Math.min(low, 0);
  const room = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
  return [panel.zero && low === 0 ? 0 : low - room, high + room];
}

// Fills the place of a panel with its SVG, a box for values, and a key.
function draw(panel, plot, number) {
  const width = Math.max(plot.clientWidth, 160), height = panel.wide ? Math.min(360, Math.max(230, width * 0.36)) : 200;
  const [left, right, top, bottom] = [50, 14, 10, 28];
  const shown = panel.series.filter((s) => !hidden.has(s.run));
  const curves = shown.map((s) => ({ ...s, x: s.x.map((step) => place(s.run, step)) }));
  const ends = panel.series.concat(panel.marks.map((mark) => ({ run: mark.run, x: [mark.x] })));
  const end = ends.reduce((far, s) => Math.max(far, place(s.run, s.x[s.x.length - 1])), 0);
  const [from, to] = zoom || [0, end || 1];
  const [low, high] = curves.length ? range(panel, curves, from, to) : [0, 1];
  const px = (x) => round(left + ((x - from) / (to - from)) * (width - left - right));
  const share = (y) => (panel.log ? Math.log(y / low) / Math.log(high / low) : (y - low) / (high - low));
  const py = (y) => round(height - bottom - share(y) * (height - top - bottom));
  const colour = (n) => `style="--c:var(--c${n % 8})"`;
  const across = (y) => `x1="${left}" x2="${width - right}" y1="${py(y)}" y2="${py(y)}"`;
  const write = (x, y, anchor, text) => `<text x="${x}" y="${y}" text-anchor="${anchor}">${escape(text)}</text>`;

  const parts = [];
  for (const y of panel.log ? logTicks(low, high) : ticks(low, high, 4))
    parts.push(`<line class="rule" ${across(y)}/>`, write(left - 8, py(y) + 4, "end", short(y)));
  for (const x of ticks(from, to, Math.min(6, width / 80))) {
    const isLast = px(x) > width - right - 20; // its middle would stand out of the picture
    parts.push(write(px(x) + (isLast ? 12 : 0), height - 8, isLast ? "end" : "middle", onAxis(x)));
  }
  const inside = `width="${width - left - right + 10}" height="${height - top - bottom + 6}"`;
  parts.push(`<clipPath id="clip${number}"><rect x="${left - 5}" y="${top - 6}" ${inside}/></clipPath>`);
  parts.push(`<g clip-path="url(#clip${number})">`);
  for (const line of panel.lines) parts.push(`<line class="base" ${across(line.y)}/>`);
  for (const kind of ["raw", "line", "dots"])
    for (const curve of curves.filter((c) => c.kind === kind)) {
      const points = curve.x.map((x, i) => [px(x), py(curve.y[i])]);
      const path = points.map(([x, y], i) => `${i ? "L" : "M"}${x},${y}`).join("");
      const own = colour(curve.colour), dashes = curve.run < 8 ? "" : " dashed";
      const look = (kind === "raw" ? "raw" : "line") + dashes + (data.runs.length > 1 ? " many" : "");
      parts.push(`<path class="${look}" ${own} data-run="${curve.run}" d="${path}"/>`);
      if (kind === "dots" ? points.length <= 60 : points.length === 1)
        for (const [x, y] of points) parts.push(`<circle class="dot" ${own} r="3" cx="${x}" cy="${y}"/>`);
    }
  for (const mark of panel.marks.filter((m) => !hidden.has(m.run))) {
    const x = px(place(mark.run, mark.x)), y = height - bottom, number = data.runs.length > 1 ? mark.run : 4;
    const triangle = `M${x - 4},${y}L${x + 4},${y}L${x},${y - 8}Z`;
    parts.push(`<path class="mark" ${colour(number)} d="${triangle}"><title>${escape(mark.text)}</title></path>`);
  }
  parts.push("</g>");
  for (const line of panel.lines) parts.push(write(width - right, py(line.y) - 5, "end", line.label));
  parts.push(`<rect class="chosen" y="${top}" height="${height - top - bottom}" width="0"/>`);
  parts.push(`<line class="cursor" y1="${top}" y2="${height - bottom}"/>`);
  const frame = `viewBox="0 0 ${width} ${height}" height="${height}" role="img" aria-label="${escape(panel.title)}"`;
  plot.innerHTML = `<svg ${frame}>${parts.join("")}</svg><div class="tip"></div>`;

  const named = curves.filter((c) => c.label && data.runs.length === 1);
  const key = named.map((c) => `<span><i ${colour(c.colour)}></i>${escape(c.label)}</span>`).join("");
  plot.previousElementSibling.innerHTML = (key && `<span class="key">${key}</span>`) + escape(panel.title);
  listen(plot, curves.filter((c) => c.kind !== "raw"), { from, to, left, right, width, px });
}

// Values under the pointer; dragging a mouse chooses a stretch to look at.
function listen(plot, curves, { from, to, left, right, width, px }) {
  const [svg, tip] = plot.children, cursor = svg.querySelector(".cursor"), chosen = svg.querySelector(".chosen");
  const at = (event) => {
    const box = svg.getBoundingClientRect();
    const part = (((event.clientX - box.left) / box.width) * width - left) / (width - left - right);
    return from + Math.min(Math.max(part, 0), 1) * (to - from);
  };
  const nearest = (curve, x) => {
    const far = curve.x.map((value) => Math.abs(value - x));
    return far.indexOf(far.reduce((a, b) => Math.min(a, b)));
  };
  let begin = null;
  const look = (event) => {
    if (!curves.length) return;
    const x = at(event);
    const found = curves.map((curve) => [curve, nearest(curve, x)]);
    const [closest, index] = found.reduce((a, b) => (Math.abs(b[0].x[b[1]] - x) < Math.abs(a[0].x[a[1]] - x) ? b : a));
    const value = closest.x[index];
    cursor.setAttribute("x1", px(value));
    cursor.setAttribute("x2", px(value));
    const rows = found.map(([curve, i]) => {
      const name = data.runs.length > 1 ? data.runs[curve.run].name : curve.label;
      const isElsewhere = curve.kind === "dots" && curve.x[i] !== value; // dots are few and far between
      const where = isElsewhere ? ` <em>at ${onAxis(curve.x[i])}</em>` : "";
      const swatch = `<i style="--c:var(--c${curve.colour % 8})"></i>`;
      return `<div><b>${exact(curve.y[i])}</b>${swatch}${escape(name)}${where}</div>`;
    });
    const head = { step: `step ${onAxis(value)}`, tokens: `${onAxis(value)} tokens`, seconds: clock(value) };
    tip.innerHTML = head[axis] + rows.join("");
    const isRight = px(value) > width / 2;
    tip.style.left = isRight ? "auto" : `${px(value) + 12}px`;
    tip.style.right = isRight ? `${width - px(value) + 12}px` : "auto";
    tip.style.visibility = cursor.style.visibility = "visible";
    if (begin === null) return;
    chosen.setAttribute("x", px(Math.min(begin, x)));
    chosen.setAttribute("width", px(Math.max(begin, x)) - px(Math.min(begin, x)));
  };
  svg.onpointermove = look;
  svg.onpointerleave = () => { tip.style.visibility = cursor.style.visibility = "hidden"; };
  svg.onpointerdown = (event) => {
    look(event); // a finger that taps does not move
    if (event.pointerType !== "mouse" || event.button) return;
    begin = at(event);
    svg.setPointerCapture(event.pointerId);
  };
  svg.onpointerup = (event) => {
    const [start, end] = [begin, at(event)].sort((a, b) => a - b);
    const isDrag = begin !== null && px(end) - px(start) > 8;
    begin = null;
    if (isDrag) { zoom = [start, end]; drawAll(); }
  };
}

function drawAll() {
  document.querySelectorAll(".plot").forEach((plot, i) => draw(data.panels[i], plot, i));
  document.getElementById("whole").hidden = zoom === null;
}

if (data) {
  document.querySelectorAll("button.run").forEach((button) => {
    button.onclick = () => {
      const run = Number(button.dataset.run), isShown = hidden.has(run);
      isShown ? hidden.delete(run) : hidden.add(run);
      button.setAttribute("aria-pressed", isShown);
      drawAll();
    };
  });
  document.querySelectorAll("button.axis").forEach((button) => {
    button.onclick = () => {
      [axis, zoom] = [button.dataset.axis, null];
      document.querySelectorAll("button.axis").forEach((b) => b.setAttribute("aria-pressed", b === button));
      drawAll();
    };
  });
  document.getElementById("whole").onclick = () => { zoom = null; drawAll(); };
  let width = 0;
  new ResizeObserver(([{ contentRect }]) => {
    if (contentRect.width !== width) { width = contentRect.width; drawAll(); }
  }).observe(document.querySelector(".curves"));
  drawAll();
}
