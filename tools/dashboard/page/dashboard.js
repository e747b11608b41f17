// Draws the routing of recorded runs: `mount(root, data)`, data being what data.py's page_data returns. Used by the
// report, which holds its data, and by any page that fetches them. No library: maps are canvas, charts are SVG, and
// names from the data only ever become text nodes.

const PAGES = [
  ["health", "Health", "Is routing all right? One row a layer, the same steps on every axis."],
  ["load", "Load", "How many times its fair share each expert gets. Blue gets less, orange more; the neutral colour is fair."],
  ["decisions", "Decisions", "How sure the router is, how close its choices are, and what a token decides."],
  ["movement", "Movement", "How the choices for one frozen batch of tokens change over training."],
  ["structure", "Structure", "Which experts are chosen together, follow each other, and look alike."],
  ["meaning", "Meaning", "Which labels of the probe go to which experts. The neutral colour is what chance gives, k/E."],
];
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "Liberation Sans", sans-serif';
const THEMES = {
  light: {
    bg: "#fbfaf7", ink: "#1c2024", soft: "#5b626b", faint: "#6f7680", rule: "#e4e1d9", grid: "#eeebe3",
    a: "#0f6a8b", b: "#c2600f", warm: "#a8480a", warmBg: "#fdf1e4", band: "#e9e5da", none: "#fbfaf7", mark: "#1c2024",
    diverging: ["#1b4f8f", "#6ea3d0", "#f1eee6", "#eba55c", "#a8480a"],
    sequential: ["#f1eee6", "#bfd8cf", "#6aa9a0", "#22706f", "#0c3c47"],
    depth: ["#a9c9dd", "#4c8db3", "#0d3f5e"],
  },
  dark: {
    bg: "#14171a", ink: "#e8e6e1", soft: "#a5abb3", faint: "#7b828b", rule: "#2c3238", grid: "#22272c",
    a: "#62bfe0", b: "#ffa552", warm: "#ffb25e", warmBg: "#2e2417", band: "#272c31", none: "#14171a", mark: "#e8e6e1",
    diverging: ["#66a6e3", "#37658f", "#24292e", "#a5621f", "#ffb765"],
    sequential: ["#1d2226", "#24494d", "#38807f", "#74bfae", "#e0f5e4"],
    depth: ["#3b5566", "#4f9fc4", "#c6ecff"],
  },
};

// ---------------------------------------------------------------------------------------------- elements and numbers

const SVG = new Set(["svg", "g", "path", "line", "rect", "circle", "text", "clipPath", "defs", "title", "image"]);

/** An element; text children become text nodes, so nothing in the data is ever markup. */
export function el(tag, attributes = {}, ...children) {
  const made = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child != null));
  return made;
}

const whole = (value) => (value == null ? "–" : Math.round(value).toLocaleString("en-US"));

/** About three digits. */
export function number(value) {
  if (value == null || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (size >= 1000) return whole(value);
  if (size !== 0 && size < 0.001) return value.toExponential(1).replace("e-", "e−");
  const text = size >= 100 ? value.toFixed(0) : size >= 10 ? value.toFixed(1) : size >= 1 ? value.toFixed(2) : value.toFixed(3);
  return text.replace("-", "−");
}
const percent = (value) => {
  if (value == null || Number.isNaN(value)) return "–";
  const size = 100 * value;
  return `${size === 0 ? "0" : size < 0.1 ? "<0.1" : size < 10 ? size.toFixed(1) : size.toFixed(0)} %`;
};
const plain = (value) => (Number.isInteger(value) ? whole(value) : number(value));
const times = (ratio) => (Number.isNaN(ratio) ? "–" : ratio === 0 ? "none" : `${number(ratio)}×`);
const median = (values) => quantile(values, 0.5);
function quantile(values, share) {
  const sorted = values.filter((value) => Number.isFinite(value)).sort((x, y) => x - y);
  if (!sorted.length) return NaN;
  const place = share * (sorted.length - 1);
  const low = Math.floor(place);
  return sorted[low] + (place - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}
const range = (count) => Array.from({ length: count }, (_, i) => i);

/** The colour at t of 0 to 1 along the stops; null where t is not known. */
function mix(stops, t) {
  if (Number.isNaN(t)) return null;
  const place = Math.min(0.99999, Math.max(0, t)) * (stops.length - 1);
  const [from, to] = [stops[Math.floor(place)], stops[Math.floor(place) + 1]];
  const channel = (hex, i) => parseInt(hex.slice(1 + 2 * i, 3 + 2 * i), 16);
  const part = place % 1;
  return `rgb(${[0, 1, 2].map((i) => Math.round(channel(from, i) * (1 - part) + channel(to, i) * part)).join(",")})`;
}

// ------------------------------------------------------------------------------------------------------------- arrays

/** Arrays [...shape] out of a run's blob; `at(...)` is a number, NaN where nothing is known. */
class Packed {
  constructor(buffer, { type, shape, at, low, scale, missing, span }) {
    const kinds = { u1: Uint8Array, u2: Uint16Array, i2: Int16Array, i4: Int32Array, f4: Float32Array, f8: Float64Array };
    const size = shape.reduce((x, y) => x * y, 1);
    const codes = new kinds[type](buffer.slice(at, at + size * kinds[type].BYTES_PER_ELEMENT));
    this.shape = shape;
    if (span != null) {
      const table = range(256).map((code) => 2 ** (-span + ((code - 2) / 253) * 2 * span));
      [table[0], table[1]] = [NaN, 0];
      this.values = Float32Array.from(codes, (code) => table[code]);
    } else if (scale != null) this.values = Float32Array.from(codes, (code) => (code === missing ? NaN : low + scale * code));
    else this.values = codes;
  }
  at(...place) {
    let flat = 0;
    for (let axis = 0; axis < place.length; axis++) flat = flat * this.shape[axis] + place[axis];
    return this.values[flat];
  }
}

async function unpack(run) {
  const bytes = Uint8Array.from(atob(run.blob), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const walk = (value) => {
    if (Array.isArray(value)) return value.every((item) => typeof item !== "object" || item == null) ? value : value.map(walk);
    if (value == null || typeof value !== "object") return value;
    if (value.shape && value.type) return new Packed(buffer, value);
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, walk(item)]));
  };
  const { blob, ...rest } = run;
  return walk(rest);
}

// ------------------------------------------------------------------------------------------------------------- charts

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const made = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-6; tick += step) made.push(Math.abs(tick) < step * 1e-9 ? 0 : Number(tick.toPrecision(12)));
  return made;
}
const short = (value) => (Math.abs(value) >= 1e6 ? `${+(value / 1e6).toFixed(2)}M` : Math.abs(value) >= 1e4 ? `${+(value / 1e3).toFixed(1)}k` : `${+value.toFixed(4)}`).replace("-", "−");

function path(xs, ys, x, y) {
  let made = "", pen = false;
  for (let i = 0; i < xs.length; i++) {
    const value = ys[i];
    if (value == null || !Number.isFinite(value)) { pen = false; continue; }
    const px = x(xs[i]).toFixed(1), py = y(value).toFixed(1);
    made += `${pen ? "L" : "M"}${px} ${py}`;
    // a point without neighbours is still seen
    if (!pen && !(Number.isFinite(ys[i + 1]) && ys[i + 1] != null)) made += `h.01`;
    pen = true;
  }
  return made;
}
function area(xs, low, high, x, y) {
  const places = range(xs.length).filter((i) => Number.isFinite(low[i]) && Number.isFinite(high[i]));
  if (!places.length) return "";
  const up = places.map((i) => `${x(xs[i]).toFixed(1)} ${y(high[i]).toFixed(1)}`);
  const down = places.reverse().map((i) => `${x(xs[i]).toFixed(1)} ${y(low[i]).toFixed(1)}`);
  return `M${[...up, ...down].join("L")}Z`;
}

/**
 * A chart of lines over steps. series: {x, y, colour, label, width, dash, opacity}; bands: {x, low, high, colour};
 * lines: {y, label} across. Returns the SVG with `moveTo(step)`.
 */
export function lineChart(app, { width, height = 210, series, bands = [], lines = [], yLow, yHigh, yText = short, label, xText = "step", points = false }) {
  const theme = app.theme;
  lines = lines.filter((line) => Number.isFinite(line.y));
  const finite = (values) => values.filter((value) => value != null && Number.isFinite(value));
  const all = finite([...series.flatMap((s) => Array.from(s.y)), ...bands.flatMap((b) => [...b.low, ...b.high]), ...lines.map((l) => l.y)]);
  const steps = [...series.flatMap((s) => Array.from(s.x)), ...bands.flatMap((b) => Array.from(b.x))];
  const least = Math.min(...all), most = Math.max(...all);
  let low = yLow ?? least - 0.05 * (most - least || Math.abs(most) || 1);
  let high = yHigh ?? most + 0.06 * (most - least || Math.abs(most) || 1);
  if (!all.length) [low, high] = [0, 1];
  const left = 46, right = 12, top = 8, bottom = 32;
  const [first, last] = steps.length ? [Math.min(...steps), Math.max(...steps)] : [0, 1];
  const x = (step) => left + ((step - first) / (last - first || 1)) * (width - left - right);
  const y = (value) => top + (1 - (value - low) / (high - low || 1)) * (height - top - bottom);
  const svg = el("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, "font-family": FONT, "font-size": 11 });
  for (const tick of ticks(low, high, Math.max(3, Math.floor(height / 46)))) {
    svg.append(el("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), stroke: theme.grid }));
    svg.append(el("text", { x: left - 7, y: y(tick) + 3.5, "text-anchor": "end", fill: theme.soft }, yText(tick)));
  }
  axis(svg, theme, x, first, last, left, width - right, height - bottom, xText);
  for (const band of bands) svg.append(el("path", { d: area(band.x, band.low, band.high, x, y), fill: band.colour ?? theme.band, opacity: band.opacity ?? 1 }));
  for (const line of lines) {
    svg.append(el("line", { x1: left, x2: width - right, y1: y(line.y), y2: y(line.y), stroke: theme.faint, "stroke-dasharray": "4 4" }));
    if (line.label) svg.append(el("text", { x: width - right, y: y(line.y) - 5, "text-anchor": "end", fill: theme.soft, stroke: theme.bg, "stroke-width": 3, "paint-order": "stroke" }, line.label));
  }
  for (const s of series) {
    const d = path(s.x, s.y, x, y);
    svg.append(el("path", { d, fill: "none", stroke: s.colour, "stroke-width": s.width ?? 1.6, "stroke-dasharray": s.dash, opacity: s.opacity, "stroke-linejoin": "round", "stroke-linecap": "round" }));
    if (points) s.y.forEach((value, i) => Number.isFinite(value) && svg.append(el("circle", { cx: x(s.x[i]), cy: y(value), r: 2.2, fill: s.colour, opacity: s.opacity })));
  }
  const cursor = el("line", { y1: top, y2: height - bottom, stroke: theme.ink, opacity: 0.35, visibility: "hidden" });
  svg.append(cursor);
  svg.moveTo = (step) => {
    const inside = step != null && step >= first && step <= last;
    cursor.setAttribute("visibility", inside ? "visible" : "hidden");
    if (inside) { cursor.setAttribute("x1", x(step)); cursor.setAttribute("x2", x(step)); }
  };
  const named = series.filter((s) => s.label);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const step = first + (((event.clientX - box.left) * width) / box.width - left) / (width - left - right) * (last - first);
    if (step < first - (last - first) * 0.02 || step > last + (last - first) * 0.02) return app.tip();
    let nearest = null;
    for (const s of series) for (const candidate of s.x) if (nearest == null || Math.abs(candidate - step) < Math.abs(nearest - step)) nearest = candidate;
    const rows = named.map((s) => [s, closest(s.x, nearest)]).filter(([s, i]) => Number.isFinite(s.y[i]));
    const most = 9;
    app.tip(event, el("b", {}, `${xText} ${whole(nearest)}`), ...rows.slice(0, most).map(([s, i]) => tipRow(s.label, (s.text ?? number)(s.y[i]), s.colour)),
      rows.length > most ? el("div", { style: "color:var(--faint)" }, `and ${rows.length - most} more`) : null);
  });
  svg.addEventListener("pointerleave", () => app.tip());
  return svg;
}

function axis(svg, theme, x, first, last, left, right, bottom, text) {
  svg.append(el("line", { x1: left, x2: right, y1: bottom, y2: bottom, stroke: theme.rule }));
  for (const tick of ticks(first, last, Math.max(2, Math.floor((right - left) / 80))).filter(Number.isInteger))
    svg.append(el("text", { x: x(tick), y: bottom + 15, "text-anchor": x(tick) > right - 12 ? "end" : "middle", fill: theme.soft }, short(tick)));
  if (text) svg.append(el("text", { x: right, y: bottom + 28, "text-anchor": "end", fill: theme.faint }, text));
}
function closest(xs, step) {
  let best = 0;
  for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - step) < Math.abs(xs[best] - step)) best = i;
  return best;
}
const tipRow = (name, value, colour) => el("div", { class: "row" }, el("span", {}, colour ? el("i", { style: `background:${colour}` }) : null, name), el("span", {}, value));

/**
 * A map of cells on canvas. colour(r, c) -> CSS colour or null; mark(r, c) -> "more" | "less" | "none" | null draws the
 * sign of a clipped or empty cell; tip(r, c) -> nodes; pick(r, c) on click. `tree` draws a dendrogram above.
 */
export function heatMap(app, { width, rows, columns, colour, mark, rowText, columnText, tip, pick, label, legend, square = false, triangle = false, rowTitle, columnTitle, tree, tall, chosen, cellText, indent }) {
  const theme = app.theme;
  const left = indent ?? (rowText ? 46 : 20), top = (tree ? 58 : 0) + 4;
  const wide = Math.max(1, (width - left - 8) / columns);
  const side = square ? Math.min(wide, columns > 16 ? 26 : 36) : Math.min(wide, 110);
  const high = square ? side : tall ?? (rows <= 8 && side > 36 ? 34 : Math.min(20, Math.max(5, 420 / rows)));
  const bottom = 22 + (legend ? 34 : 0) + (columnTitle ? 14 : 0);
  const height = top + rows * high + bottom;
  const canvas = el("canvas", { role: "img", tabindex: 0, "aria-label": label });
  const dense = Math.min(3, Math.max(1, window.devicePixelRatio || 1));
  canvas.width = Math.round(width * dense); canvas.height = Math.round(height * dense);
  canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  const edge = (i, size, start) => Math.round((start + i * size) * dense) / dense;
  let at = null;
  canvas.paint = () => {
    pen.setTransform(dense, 0, 0, dense, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = `11px ${FONT}`;
    const gap = side > 7 && high > 7 ? 1 : 0;
    for (let r = 0; r < rows; r++) {
      const y = edge(r, high, top), h = edge(r + 1, high, top) - y - gap;
      for (let c = 0; c < (triangle ? r : columns); c++) {
        const fill = colour(r, c);
        if (fill == null) continue;
        const x = edge(c, side, left), w = edge(c + 1, side, left) - x - gap;
        pen.fillStyle = fill;
        pen.fillRect(x, y, Math.max(w, 0.5), Math.max(h, 0.5));
        const sign = mark?.(r, c);
        if (sign && w >= 6 && h >= 6) drawMark(pen, sign, x, y, w, h, theme);
        else if (cellText && w >= 34 && h >= 17) {
          // dark on light cells, light on dark ones
          const [red, green, blue] = fill.match(/\d+/g).map(Number);
          pen.fillStyle = 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? THEMES.light.ink : THEMES.dark.ink;
          pen.font = `10.5px ${FONT}`; pen.textAlign = "center"; pen.textBaseline = "middle";
          pen.fillText(cellText(r, c), x + w / 2, y + h / 2 + 0.5);
        }
      }
    }
    pen.fillStyle = theme.soft; pen.textBaseline = "middle"; pen.textAlign = "right";
    const everyRow = Math.ceil(13 / high);
    if (rowText) for (let r = 0; r < rows; r += everyRow) {
      pen.fillStyle = r === chosen?.().row ? theme.a : theme.soft;
      pen.font = `${r === chosen?.().row ? "600 " : ""}11px ${FONT}`;
      pen.fillText(rowText(r), left - 7, top + (r + 0.5) * high, left - 8);
    }
    pen.font = `11px ${FONT}`; pen.fillStyle = theme.soft; pen.textAlign = "center"; pen.textBaseline = "top";
    const room = columnText ? Math.max(22, 9 + pen.measureText(columnText(columns - 1)).width) : 26;
    const everyColumn = [1, 2, 4, 8, 16, 32, 64].find((n) => n * side >= room) ?? 64;
    if (columnText) for (let c = 0; c < columns; c += everyColumn) pen.fillText(columnText(c), left + (c + 0.5) * side, top + rows * high + 6);
    pen.fillStyle = theme.faint;
    if (columnTitle) { pen.textAlign = "left"; pen.fillText(columnTitle, left, top + rows * high + 21); }
    if (rowTitle) { pen.save(); pen.translate(rowText ? 7 : 9, top + rows * high / 2); pen.rotate(-Math.PI / 2); pen.textAlign = "center"; pen.fillText(rowTitle, 0, 0); pen.restore(); }
    if (legend) drawLegend(pen, legend, theme, left, height - 26, width - left - 4);
    if (tree) drawTree(pen, tree, theme, (leaf) => left + (leaf + 0.5) * side, 54, 48);
    for (const cell of [chosen?.().column != null ? chosen() : null, at && { row: at[0], column: at[1] }]) if (cell && cell.row >= 0) {
      pen.strokeStyle = theme.ink; pen.lineWidth = 1.6;
      pen.strokeRect(left + cell.column * side - 0.5, top + cell.row * high - 0.5, side, high);
    }
  };
  const locate = (event) => {
    const box = canvas.getBoundingClientRect();
    const c = Math.floor(((event.clientX - box.left) * width / box.width - left) / side), r = Math.floor(((event.clientY - box.top) * width / box.width - top) / high);
    return r >= 0 && r < rows && c >= 0 && c < (triangle ? r : columns) && colour(r, c) != null ? [r, c] : null;
  };
  const show = (cell, place) => {
    if (String(cell) !== String(at)) { at = cell; canvas.paint(); }
    canvas.cell = at;
    if (cell && tip) app.tip(place, ...tip(...cell)); else app.tip();
  };
  canvas.addEventListener("pointermove", (event) => show(locate(event), event));
  canvas.addEventListener("pointerleave", () => show(null));
  canvas.addEventListener("blur", () => show(null));
  canvas.addEventListener("click", (event) => { const cell = locate(event); if (cell && pick) pick(...cell); });
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.shiftKey && moves[event.key]) {
      const [r, c] = at ?? [triangle ? 1 : 0, 0];
      const next = at ? [Math.min(rows - 1, Math.max(0, r + moves[event.key][0])), Math.min(columns - 1, Math.max(0, c + moves[event.key][1]))] : [r, c];
      if (colour(...next) != null) {
        const box = canvas.getBoundingClientRect();
        show(next, { clientX: box.left + left + (next[1] + 1) * side, clientY: box.top + top + (next[0] + 1) * high });
      }
      event.preventDefault(); event.stopPropagation();
    } else if (event.key === "Enter" && at && pick) pick(...at);
  });
  canvas.paint();
  return canvas;
}

function drawMark(pen, sign, x, y, w, h, theme) {
  // a light or dark sign, whichever is seen: extremes are dark on light pages and light on dark ones
  pen.fillStyle = sign === "none" ? theme.faint : theme.bg;
  const cx = x + w / 2, cy = y + h / 2, size = Math.min(w, h, 10) / 4;
  pen.beginPath();
  if (sign === "more") { pen.moveTo(cx, cy - size); pen.lineTo(cx + size, cy + size * 0.8); pen.lineTo(cx - size, cy + size * 0.8); }
  else if (sign === "less") { pen.moveTo(cx, cy + size); pen.lineTo(cx + size, cy - size * 0.8); pen.lineTo(cx - size, cy - size * 0.8); }
  else { pen.strokeStyle = theme.bg; pen.lineWidth = 1.1; pen.moveTo(cx - size, cy - size); pen.lineTo(cx + size, cy + size); pen.moveTo(cx + size, cy - size); pen.lineTo(cx - size, cy + size); pen.stroke(); return; }
  pen.fill();
}

function drawLegend(pen, { stops, texts, title, signs }, theme, x, y, width) {
  const signed = signs ? "▲▼ beyond the scale   × none" : "";
  pen.font = `10.5px ${FONT}`;
  const long = Math.min(240, Math.max(120, width - 130)), beside = width - long - 12;
  for (let i = 0; i < long; i++) { pen.fillStyle = mix(stops, i / (long - 1)); pen.fillRect(x + i, y, 1.5, 8); }
  pen.fillStyle = theme.soft; pen.textBaseline = "top"; pen.font = `10.5px ${FONT}`;
  texts.forEach((text, i) => { pen.textAlign = i === 0 ? "left" : i === texts.length - 1 ? "right" : "center"; pen.fillText(text, x + (long * i) / (texts.length - 1), y + 11); });
  pen.textAlign = "left";
  const oneLine = pen.measureText(`${title}   ${signed}`).width <= beside;
  pen.fillText(oneLine ? `${title}   ${signed}` : title, x + long + 12, y - 2);
  if (!oneLine && signed) pen.fillText(pen.measureText(signed).width <= beside ? signed : "▲▼ beyond  × none", x + long + 12, y + 12);
}

function drawTree(pen, { order, merges }, theme, x, bottom, height) {
  if (!merges?.length) return;
  const top = Math.max(...merges.map((merge) => merge[2])) || 1, size = order.length;
  const place = new Map(order.map((leaf, i) => [leaf, [x(i), bottom]]));
  pen.strokeStyle = theme.faint; pen.lineWidth = 0.9;
  merges.forEach(([left, right, distance], i) => {
    const [ax, ay] = place.get(left), [bx, by] = place.get(right), y = bottom - (distance / top) * height;
    pen.beginPath(); pen.moveTo(ax, ay); pen.lineTo(ax, y); pen.lineTo(bx, y); pen.lineTo(bx, by); pen.stroke();
    place.set(size + i, [(ax + bx) / 2, y]);
  });
}

/** Colour, and the mark, of a ratio on the diverging log2 scale, clipped at 1/4 and 4. */
function ratioColour(theme, ratio) {
  return Number.isNaN(ratio) ? null : ratio === 0 ? theme.diverging[0] : mix(theme.diverging, (Math.log2(ratio) + 2) / 4);
}
const ratioMark = (ratio) => (ratio === 0 ? "none" : ratio > 4.05 ? "more" : ratio < 0.247 ? "less" : null);
const ratioLegend = (theme, title) => ({ stops: theme.diverging, texts: ["¼×", "½×", "1×", "2×", "4×"], title, signs: true });

// ------------------------------------------------------------------------------------------------------- pages of figures

/**
 * Pages of figures behind tabs: themes, tips, explanations, export, keyboard, print. A subclass says which pages there are
 * (`pages`: name, title, lead) and draws them (`drawers`), what stands beside the tabs (`build`, `controls`) and below
 * (`footer`), what its keys do (`keys`, `actions`) and what holds here and now of a measure (`here`).
 */
class Pages {
  constructor(root, data, state, defaults) {
    Object.assign(this, { root, data });
    this.state = { page: this.pages[0][0], theme: null, ...defaults, ...state };
    const page = location.hash.slice(1);
    if (!state && this.pages.some(([name]) => name === page)) this.state.page = page;
    this.quietly = matchMedia("(prefers-color-scheme: dark)");
    this.listeners = [];
  }
  get dark() { return this.state.theme ? this.state.theme === "dark" : this.quietly.matches; }
  get theme() { return THEMES[this.dark ? "dark" : "light"]; }

  tip(event, ...nodes) {
    const box = this.tipBox;
    if (!event) { box.hidden = true; return; }
    box.replaceChildren(...nodes.flat().filter((node) => node != null));
    box.hidden = false;
    const size = box.getBoundingClientRect();
    const x = event.clientX + 16 + size.width > innerWidth - 6 ? event.clientX - size.width - 14 : event.clientX + 16;
    const y = Math.min(event.clientY + 14, innerHeight - size.height - 6);
    box.style.left = `${Math.max(6, x)}px`; box.style.top = `${Math.max(6, y)}px`;
  }

  set(change, whole = true) {
    Object.assign(this.state, change);
    this.root.gatewrightState = this.state;
    whole ? this.draw() : this.move();
  }

  /** The dialog that explains a measure, with what holds here and now. */
  explain(name) {
    const entry = this.data.definitions[name];
    const box = el("dialog", { "aria-label": entry.name },
      el("button", { class: "close", "aria-label": "Close", onclick: () => box.close() }, "×"),
      el("h2", {}, entry.name), el("div", { class: "formula" }, entry.formula), el("div", {}, entry.text),
      el("dl", {}, [["Range", entry.range], ["By chance", entry.null], ["Reduction", entry.reduction], ...this.here(name, entry)].flatMap(([term, text]) => [el("dt", {}, term), el("dd", {}, text)])));
    this.open(box);
  }
  open(box) {
    box.addEventListener("close", () => box.remove());
    box.addEventListener("click", (event) => event.target === box && box.close());
    this.root.append(box);
    box.showModal();
  }
  help() {
    this.open(el("dialog", { "aria-label": "Keyboard" }, el("button", { class: "close", "aria-label": "Close", onclick: (event) => event.target.closest("dialog").close() }, "×"),
      el("h2", {}, "Keyboard"), el("dl", {}, this.keys.flatMap(([key, text]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, text)])),
      el("p", {}, "Click what is underlined with dots: it says how it is computed. CSV and PNG beside a figure save it.")));
  }

  explained(name, text) {
    return el("button", { class: "explain", type: "button", "data-explain": name, onclick: () => this.explain(name), title: "What is this?" }, text ?? this.data.definitions[name].name);
  }

  /**
   * A figure. draw(width) -> elements; with `moves` it is drawn anew when the step changes. csv() -> rows.
   */
  figure(parent, { id, title, explain, note, draw, csv, wide, moves, png = true }) {
    const body = el("div", { class: "body" });
    const caption = typeof note === "function" ? el("p", { class: "note" }) : el("p", { class: "note" }, note);
    const name = `${this.name}-${id}`.replace(/[^\w.-]+/g, "_");
    const tools = el("span", { class: "tools" },
      csv ? el("button", { type: "button", "aria-label": `Save ${title} as CSV`, "data-csv": id, onclick: () => save(`${name}.csv`, csvBlob(csv())) }, "CSV") : null,
      png ? el("button", { type: "button", "aria-label": `Save ${title} as PNG`, "data-png": id, onclick: () => picture(body, title, this.theme).then((blob) => save(`${name}.png`, blob)) }, "PNG") : null);
    const heading = el("h3", {}, explain ? this.explained(explain, title) : title);
    parent.append(el("section", { class: `fig${wide ? " wide" : ""}`, id: `fig-${id}`, "aria-label": title }, el("header", {}, heading, tools), caption, body));
    const paint = () => {
      const kept = body.contains(document.activeElement) && document.activeElement.tagName === "CANVAS";
      if (typeof note === "function") caption.textContent = note();
      body.replaceChildren(...[draw(Math.max(240, Math.floor(body.clientWidth || parent.clientWidth)))].flat());
      if (kept) body.querySelector("canvas")?.focus({ preventScroll: true });
      if (!moves) follow();
    };
    const follow = () => body.querySelectorAll("svg").forEach((svg) => svg.moveTo?.(this.step));
    paint();
    this.listeners.push(moves ? paint : follow);
  }

  missing(parent, title, how) {
    parent.append(el("div", { class: "missing wide" }, el("b", {}, `${title}: not recorded. `), ...how));
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || this.root.querySelector("dialog[open]")) return;
    if (/^(SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const actions = { "?": () => this.help(), t: () => this.set({ theme: this.dark ? "light" : "dark" }), ...this.actions(event) };
    if (event.key >= "1" && event.key <= String(this.pages.length)) actions[event.key] = () => this.set({ page: this.pages[event.key - 1][0] });
    if (actions[event.key]) { actions[event.key](); event.preventDefault(); }
  }

  /** The frame that all pages stand in; `build` of a subclass gives what stands beside the tabs. */
  start() {
    const { root, data } = this;
    root.classList.add("gatewright");
    this.tipBox = el("div", { class: "tip", hidden: true, role: "status" });
    const parts = (this.parts = {
      meta: el("p", { class: "meta" }),
      tabs: el("div", { class: "tabs", role: "tablist", "aria-label": "Pages" }),
      theme: el("button", { type: "button", onclick: () => this.set({ theme: this.dark ? "light" : "dark" }) }),
      main: el("main"), footer: el("footer", { class: "wrap" }),
    });
    for (const [i, [name, title]] of this.pages.entries())
      parts.tabs.append(el("button", { type: "button", role: "tab", id: `tab-${name}`, "data-page": name, onclick: () => this.set({ page: name }) }, el("kbd", { "aria-hidden": "true" }, i + 1), title));
    root.replaceChildren(
      el("div", { class: "wrap top" }, el("div", {}, el("h1", {}, data.title), parts.meta),
        parts.theme, el("button", { type: "button", "aria-label": "Keyboard help", onclick: () => this.help() }, "?")),
      el("div", { class: "bar" }, el("div", { class: "wrap" }, parts.tabs, el("div", { class: "controls" }, this.build()))),
      el("div", { class: "wrap" }, parts.main), parts.footer, this.tipBox);
  }

  draw() {
    const { root, parts, state } = this;
    root.dataset.theme = this.dark ? "dark" : "light";
    document.documentElement.style.background = this.theme.bg;
    parts.theme.textContent = this.dark ? "Light" : "Dark";
    this.controls();
    for (const tab of parts.tabs.children) tab.setAttribute("aria-selected", String(tab.dataset.page === state.page));
    if (!this.printing) { try { history.replaceState(null, "", `#${state.page}`); } catch { /* in a frame that may not */ } }
    const place = this.place();
    this.listeners = [];
    this.tip();
    parts.main.replaceChildren();
    for (const page of this.printing ? this.pages : this.pages.filter(([name]) => name === state.page)) this.drawPage(page);
    parts.footer.replaceChildren(...this.footer());
    this.width = parts.main.clientWidth;
    place();
  }

  /** Where the reader is; the function that it returns goes back there once all is drawn anew. */
  place() {
    const { main } = this.parts, y = scrollY, active = main.contains(document.activeElement) ? document.activeElement : null;
    const same = this.drawn === this.state.page;
    this.drawn = this.state.page;
    const figure = active?.closest(".fig")?.id;
    const focus = active?.dataset.choice != null ? `[data-choice="${active.dataset.choice}"]` : figure && active.tagName === "CANVAS" ? `#${figure} canvas` : null;
    return () => {
      // a new page begins at its top, below the bar
      scrollTo(0, same ? y : Math.min(y, this.parts.tabs.closest(".bar").previousElementSibling.offsetHeight));
      if (same && focus) main.querySelector(focus)?.focus({ preventScroll: true });
    };
  }

  drawPage([name, title, lead]) {
    const section = el("div", { class: "page", role: "tabpanel", "aria-labelledby": `tab-${name}` }, el("h2", {}, title), el("p", { class: "lead" }, lead));
    this.parts.main.append(section);
    this.drawers[name](this, section);
  }

  /** Draws, and draws anew when the window, the system's colours or the medium change; the keys work from here on. */
  live() {
    const { root } = this;
    root.gatewrightStop?.();
    root.gatewrightState = this.state;
    this.start();
    this.draw();
    const stop = new AbortController(), { signal } = stop;
    const again = () => this.draw();
    document.addEventListener("keydown", (event) => this.key(event), { signal });
    this.quietly.addEventListener("change", again, { signal });
    let wait;
    const sized = new ResizeObserver(() => {
      if (this.printing || this.parts.main.clientWidth === this.width) return;
      clearTimeout(wait);
      wait = setTimeout(again, 80);
    });
    sized.observe(this.parts.main);
    const print = (on) => {
      const { theme } = this.state;
      this.play?.(false);
      this.printing = on;
      root.classList.toggle("printing", on);
      if (on) { this.before = theme; this.state.theme = "light"; root.style.width = "688px"; } else { this.state.theme = this.before ?? null; root.style.width = ""; }
      this.draw();
    };
    addEventListener("beforeprint", () => print(true), { signal });
    addEventListener("afterprint", () => print(false), { signal });
    root.gatewrightStop = () => { stop.abort(); sized.disconnect(); this.play?.(false); };
    return this;
  }
}

// ---------------------------------------------------------------------------------------------------- the application

class App extends Pages {
  constructor(root, data, runs, state) {
    super(root, data, state, { run: 0, other: "", at: null, layer: null, sort: "id", cell: null, set: null, pinned: null });
    this.runs = runs;
    if (this.state.run >= runs.length) this.state.run = 0;
  }
  get pages() { return PAGES; }
  get drawers() { return DRAW; }
  get name() { return this.run.name; }
  get run() { return this.runs[this.state.run]; }
  get other() {
    const { other } = this.state;
    return other.startsWith("run") && Number(other.slice(3)) !== this.state.run ? this.runs[Number(other.slice(3))] : null;
  }
  get steps() { return this.run.last; }
  get at() { return this.state.at == null ? this.steps.length - 1 : Math.min(this.state.at, this.steps.length - 1); }
  get step() { return this.steps[this.at]; }
  get layer() { return Math.min(this.state.layer ?? this.run.alerts[0]?.layer ?? 0, this.run.layers.length - 1); }
  get deeper() { return this.dark ? "lighter" : "darker"; }
  layerName(layer) { return `layer ${this.run.layers[layer]?.layer ?? layer}`; }

  here(name, entry) {
    const { run, layer } = this, info = run.layers[layer];
    const here = [];
    if (run.last.length) {
      const N = run.tokens.at(this.at, layer), E = info.experts, k = info.top_k;
      const sampled = run.sampled.at(this.at, layer);
      here.push(["Window", `steps ${whole(run.first[this.at])} to ${whole(run.last[this.at])}`]);
      here.push(["N, E, k", `${whole(N)} tokens${sampled && entry.reduction.includes("sample") ? ` (${whole(sampled)} sampled)` : ""}, ${E} experts, ${k == null ? "varying" : plain(k)} a token, in ${this.layerName(layer)}`]);
      const value = run.curves[name]?.at(this.at, layer);
      if (value != null) here.push(["Here", number(value)]);
      const chance = nullOf(name, N, E, k);
      if (chance != null) here.push(["Chance here", chance]);
    }
    if (entry.reduction.includes("probe") && run.movement) here.push(["Probe", `${whole(run.movement.tokens)} tokens, ${run.movement.steps.length} times`]);
    return here;
  }
  move() {
    this.showStep();
    this.listeners.forEach((listener) => listener());
  }

  showStep() {
    const { slider, output } = this.parts;
    slider.value = this.at;
    const step = this.step;
    const text = this.steps.length ? `step ${whole(step)}` : "no windows yet";
    slider.setAttribute("aria-valuetext", text);
    output.replaceChildren(text, this.steps.length ? el("span", { class: "of" }, ` of ${whole(this.steps.at(-1))}`) : "");
  }

  play(on = !this.timer) {
    clearInterval(this.timer);
    this.timer = null;
    if (on && this.steps.length > 1) {
      if (this.at === this.steps.length - 1) this.state.at = 0;
      this.timer = setInterval(() => {
        if (!this.root.isConnected || this.at >= this.steps.length - 1) return this.play(false);
        this.set({ at: this.at + 1 }, false);
      }, Math.max(50, Math.min(250, 8000 / this.steps.length)));
    }
    this.parts.play.textContent = this.timer ? "❚❚" : "▶";
    this.parts.play.setAttribute("aria-label", this.timer ? "Pause" : "Play");
  }

  get keys() {
    return [["←  →", "a step back, a step on (with Shift: ten; on a map: another cell)"], ["Home  End", "first step, last step"], ["Space", "play, pause"], ["1 – 6", "pages"], ["[  ]", "layer before, layer after"], ["t", "dark or light"], ["Enter", "on a cell: keep it in view"], ["?", "this help"]];
  }

  actions(event) {
    const scrub = (to) => { this.play(false); this.set({ at: Math.max(0, Math.min(this.steps.length - 1, to)) }, false); };
    const far = event.shiftKey ? 10 : 1;
    return {
      ArrowLeft: () => scrub(this.at - far), ArrowRight: () => scrub(this.at + far), Home: () => scrub(0), End: () => scrub(Infinity),
      "[": () => this.set({ layer: Math.max(0, this.layer - 1), cell: null }), "]": () => this.set({ layer: Math.min(this.run.layers.length - 1, this.layer + 1), cell: null }),
      ...(event.target.tagName === "BUTTON" ? {} : { " ": () => this.play() }),
    };
  }

  build() {
    const { parts } = this;
    parts.run = el("select", { "aria-label": "Run", onchange: (event) => this.set({ run: Number(event.target.value), at: null, cell: null }) });
    parts.other = el("select", { "aria-label": "Compare with", onchange: (event) => this.set({ other: event.target.value, pinned: event.target.value === "step" ? this.at : null }) });
    parts.layer = el("select", { "aria-label": "Layer", onchange: (event) => this.set({ layer: Number(event.target.value), cell: null }) });
    parts.play = el("button", { type: "button", class: "play", "aria-label": "Play", onclick: () => this.play() }, "▶");
    parts.slider = el("input", { type: "range", min: 0, step: 1, "aria-label": "Training step", oninput: (event) => { this.play(false); this.set({ at: Number(event.target.value) }, false); } });
    parts.output = el("output", { "aria-live": "off" });
    const label = (text, part) => el("label", {}, text, part);
    const runs = label("Run", parts.run);
    if (this.runs.length < 2) { runs.hidden = true; runs.style.display = "none"; }
    return [runs, label("Compare with", parts.other), label("Layer", parts.layer), el("div", { class: "scrub" }, parts.play, parts.slider, parts.output)];
  }

  controls() {
    const { parts, run, state } = this;
    options(parts.run, this.runs.map((one, i) => [String(i), one.name]), String(state.run));
    const others = this.runs.map((one, i) => [`run${i}`, one.name]).filter((_, i) => i !== state.run);
    if (!others.some(([key]) => key === state.other) && state.other !== "step") state.other = "";
    const pinned = state.other === "step" ? Math.min(state.pinned ?? this.at, this.steps.length - 1) : null;
    options(parts.other, [["", "nothing"], ...others, ...(run.load ? [["step", pinned == null ? "this very step" : `step ${whole(run.last[pinned])}`]] : [])], state.other);
    options(parts.layer, run.layers.map((layer, i) => [String(i), layer.name === String(layer.layer) ? layer.name : `${layer.layer}  ${layer.name}`]), String(this.layer));
    parts.slider.max = Math.max(0, this.steps.length - 1);
    parts.slider.parentNode.style.display = this.steps.length < 2 ? "none" : "";
    const sizes = [...new Set(run.layers.map((layer) => layer.experts))], ks = [...new Set(run.layers.map((layer) => layer.top_k))];
    const routers = [...new Set(run.layers.map((layer) => layer.router).filter(Boolean))];
    parts.meta.textContent = [
      `${run.layers.length} MoE layer${run.layers.length === 1 ? "" : "s"} of ${sizes.join(" or ")} experts`,
      ks.length === 1 && ks[0] != null ? `${plain(ks[0])} a token` : "experts a token vary", routers.join(", "),
      this.steps.length ? (run.last.length === 1 ? "one window" : `steps ${whole(run.first[0])} to ${whole(this.steps.at(-1))} in ${run.last.length} windows`) : "",
      run.complete ? "" : "still running, or stopped early"].filter(Boolean).join(" · ");
    this.showStep();
  }

  footer() { return footer(this); }
}

/** Fills a <select> with [value, text] pairs. */
function options(select, entries, value) {
  select.replaceChildren(...entries.map(([key, text]) => el("option", { value: key }, text)));
  select.value = value;
}

function nullOf(name, N, E, k) {
  if (!N || !k || E < 2) return null;
  const spare = 1 - Math.min(1, k / E);
  const made = {
    collapse_aware_entropy: () => `about ${number(1 - (E - k) / (2 * N * k * (Math.log(E) - Math.log(Math.max(1, k)) || 1)))}`,
    max_violation: () => `up to about ${number(maxVioNull(N, E, k))}`,
    drift: () => `about ${number(Math.sqrt((E - k) / (Math.PI * N * k)))}`,
    load: () => `1 ± ${number(Math.sqrt(spare / ((N * k) / E)))}`,
    saturation: () => number(k / E), overlap: () => number(k / E), share: () => number(k / E),
    fluctuation: () => number(1 - k / E), fluctuation_first: () => number(1 - 1 / E), mass: () => number(k / E),
  }[name];
  return made ? made() : null;
}
const maxVioNull = (N, E, k) => (N && k && E > 1 ? Math.sqrt((2 * Math.log(E) * (1 - Math.min(1, k / E))) / ((N * k) / E)) : NaN);

function footer(app) {
  const { run } = app;
  const N = run.last.length ? range(run.layers.length).map((layer) => run.tokens.at(app.at, layer)) : [];
  const text = [
    ...run.notices.map((notice) => `Note: ${notice}.`),
    run.last.length ? `${run.last.length === 1 ? "One window" : `Training windows of ${whole(run.last.at(-1) - run.first.at(-1) + 1)} step${run.last.at(-1) === run.first.at(-1) ? "" : "s"}`}, N = ${whole(median(N))} tokens a layer (median); counts are added up over micro-batches and ranks before any ratio, load is taken before capacity, padding and experts that hold no weights are left out.` : "",
    run.movement ? `Movement and meaning come from a frozen probe of ${whole(run.movement.tokens)} tokens.` : "",
    run.sessions.length > 1 ? `The run was resumed at step ${run.sessions.slice(1).map(whole).join(", ")}; nothing is counted twice.` : "",
    `Recorded by gatewright ${run.version}, shown by ${app.data.library}. Configuration ${run.hash}.`];
  return [el("div", {}, text.filter(Boolean).map((line) => el("p", {}, line)))];
}

// ------------------------------------------------------------------------------------------------------------- export

const csvBlob = (rows) => new Blob([rows.map((row) => row.map((cell) => {
  const text = cell == null || Number.isNaN(cell) ? "" : typeof cell === "number" ? String(+cell.toPrecision(6)) : String(cell);
  // a quote before what a spreadsheet would take for a formula
  const safe = typeof cell === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}).join(",")).join("\r\n") + "\r\n"], { type: "text/csv" });

function save(name, blob) {
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  // a page around this one may want to know
  document.dispatchEvent(new CustomEvent("gatewright-saved", { detail: { name, size: blob.size, blob } }));
}

/** All charts and maps of a figure, where they stand, with its title, at twice the size. */
async function picture(body, title, theme) {
  const frame = body.getBoundingClientRect(), head = 34, scale = 2;
  const canvas = el("canvas", { width: Math.ceil(frame.width * scale), height: Math.ceil((frame.height + head) * scale) });
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.fillStyle = theme.bg;
  pen.fillRect(0, 0, frame.width, frame.height + head);
  pen.fillStyle = theme.ink; pen.font = `600 14px ${FONT}`;
  pen.fillText(title, 2, 20);
  for (const part of body.querySelectorAll("svg, canvas")) {
    const box = part.getBoundingClientRect();
    let image = part;
    if (part.tagName === "svg") {
      const copy = part.cloneNode(true);
      copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
      // as many pixels as the picture has, or the lines would be enlarged
      copy.setAttribute("width", box.width * scale); copy.setAttribute("height", box.height * scale);
      image = new Image();
      image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
      await image.decode();
    }
    pen.drawImage(image, box.left - frame.left, box.top - frame.top + head, box.width, box.height);
  }
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

// -------------------------------------------------------------------------------------------------------------- pages

const column = (packed, layer) => (packed ? range(packed.shape[0]).map((i) => packed.at(i, layer)) : []);
const HOW = {
  scores: ["The router gives no scores for its decisions (", el("code", {}, "Routing.scores"), "), or only counts are known."],
  probe: ["Give the recorder a frozen batch, and labels to see what experts mean: ", el("code", {}, "recorder.probe(run, labels={\"class\": ...}, show=images, every=100)"), "."],
  structure: ["Which experts occur together is sampled every ", el("code", {}, "structure_every"), " steps; this log holds no sample yet."],
  windows: ["No training window is in this log yet."],
};
const how = (name) => HOW[name].map((node) => (typeof node === "string" ? node : node.cloneNode(true)));

const HEALTH = [
  ["collapse_aware_entropy", "entropy, collapse-aware", (v) => v.toFixed(3), [0, 1]],
  ["max_violation", "MaxVio", number, [0, null]],
  ["dead", "dead", percent, [0, null]],
  ["drop_rate", "dropped", percent, [0, null]],
  ["balance", "balance loss", (v) => v.toFixed(3), [null, null]],
  ["information", "information", (v) => v.toFixed(3), [0, null]],
];
const ALERTED = { collapse: "collapse_aware_entropy", overload: "max_violation", starvation: "dead", drops: "drop_rate", "late drops": "drop_rate" };

const DRAW = {
  health(app, page) {
    const { run, other, theme } = app;
    if (!run.last.length) return app.missing(page, "Training windows", how("windows"));
    drawAlerts(app, page);
    drawTiles(app, page);
    const grid = el("div", { class: "grid" });
    page.append(grid);
    if (run.scalars.length) drawScalars(app, grid);
    const measures = HEALTH.filter(([name]) => run.curves[name]);
    if (!measures.length) return app.missing(grid, "Load", ["No layer sent a token to an expert that can be loaded."]);
    app.figure(grid, {
      id: "health", title: "Layer by layer", wide: true, png: true,
      note: `Each column has one scale. The shaded band in MaxVio is what uniformly random routing would give; a cell is tinted where an alert points at it.${other ? ` Dashed: ${other.name}.` : ""}`,
      draw: (width) => [healthLabels(app, measures, width), healthGrid(app, measures, width)],
      csv: () => [["layer", "first step", "last step", "tokens", ...measures.map(([name]) => name)],
        ...run.layers.flatMap((layer, l) => run.last.map((step, s) => [layer.layer, run.first[s], step, run.tokens.at(s, l), ...measures.map(([name]) => run.curves[name].at(s, l))]))],
    });
    const lacking = HEALTH.filter(([name]) => !run.curves[name]);
    if (lacking.length) app.missing(page, lacking.map(([name]) => app.data.definitions[name].name).join(", "), how("scores"));
  },

  load(app, page) {
    const { run, state, theme } = app;
    if (!run.load) return app.missing(page, "Load", how("windows"));
    const sorts = [["id", "expert id"], ["load", "load"], ...(run.structure?.order.length ? [["cluster", "cluster"]] : [])];
    if (!sorts.some(([name]) => name === state.sort)) state.sort = "id";
    page.append(choice("Sort by", sorts, state.sort, (name) => app.set({ sort: name })));
    const grid = el("div", { class: "grid" });
    page.append(grid);
    const shown = loadsShown(app);
    for (const [i, one] of shown.entries()) {
      app.figure(grid, {
        id: i ? `load-${i}` : "load", title: shown.length > 1 ? one.title : "Load of every expert", explain: "load", wide: true, moves: true, note: one.note,
        draw: (width) => loadMap(app, one, width),
        csv: () => [["layer", "expert", one.difference ? "log2 ratio of loads" : "times fair share"], ...run.layers.flatMap((layer, l) => range(layer.experts).map((e) => [layer.layer, e, one.value(l, e)]))],
      });
    }
    const layer = app.layer, E = run.layers[layer].experts;
    app.figure(grid, {
      id: "layer-load", title: `Layer ${run.layers[layer].layer} now`, explain: "load", moves: true,
      note: () => { const f = frameAt(run, app.step); return `${run.load.last.length > 1 ? `Steps ${whole(run.load.first[f])} to ${whole(run.load.last[f])}, ` : ""}${whole(run.load.assignments.at(f, layer))} assignments. Line: fair share.`; },
      draw: (width) => loadBars(app, layer, width),
      csv: () => [["expert", "times fair share"], ...range(E).map((e) => [e, run.load.ratio.at(frameAt(run, app.step), layer, e)])],
    });
    if (run.load.last.length > 1) app.figure(grid, {
      id: "history", title: `Layer ${run.layers[layer].layer} over time`, explain: "load",
      note: state.cell == null ? "Every expert's load, on a log2 scale. Click a cell of the map to pick one out." : `Expert ${state.cell} against the others of the layer.`,
      draw: (width) => loadHistory(app, layer, width),
      csv: () => [["last step", ...range(E).map((e) => `expert ${e}`)], ...run.load.last.map((step, f) => [step, ...range(E).map((e) => run.load.ratio.at(f, layer, e))])],
    });
    if (run.decisions.drops) app.figure(grid, {
      id: "drops", title: "Drops by position", explain: "drop_position", note: `Last tenth of the run, by sixteenth of the sequence. Bold: ${app.layerName(layer)}.`,
      draw: (width) => lineChart(app, { width, label: "Drop rate by position", xText: "sixteenth of the sequence", yLow: 0, yText: percent,
        series: layersThen(app, (l) => ({ x: range(16).map((i) => i + 1), y: range(16).map((i) => run.decisions.drops.at(l, i)), text: percent })) }),
      csv: () => [["layer", ...range(16).map((i) => i + 1)], ...run.layers.map((info, l) => [info.layer, ...range(16).map((i) => run.decisions.drops.at(l, i))])],
    });
  },

  decisions(app, page) {
    const { run, other, theme } = app, layer = app.layer;
    if (!run.last.length) return app.missing(page, "Training windows", how("windows"));
    const grid = el("div", { class: "grid" });
    page.append(grid);
    const fan = (name, title, text, extra = {}) => run.curves[name] && app.figure(grid, {
      id: name, title, explain: name,
      note: `All layers: median, middle half and range. Line: ${app.layerName(layer)}.${other?.curves[name] ? ` Dashed: ${other.name}, median.` : ""}`,
      draw: (width) => fanChart(app, name, { width, text, ...extra }), csv: () => curveRows(run, name),
    });
    fan("token_entropy", "Token entropy", number);
    if (run.curves.information) app.figure(grid, {
      id: "joint", title: "Information against load entropy", explain: "information", moves: true,
      note: `A dot a layer at this step, deeper ones ${app.deeper}; the trail is the chosen layer's.${other?.curves.information ? ` Hollow: ${other.name}.` : ""}`,
      draw: (width) => jointPlot(app, width),
      csv: () => [["layer", "collapse-aware entropy", "information"], ...run.layers.map((info, l) => [info.layer, run.curves.collapse_aware_entropy.at(app.at, l), run.curves.information.at(app.at, l)])],
    });
    if (run.decisions.margins) app.figure(grid, {
      id: "margins", title: `Margins of ${app.layerName(layer)}`, explain: "margin", note: "One ridge a stretch of training, latest at the front. Left of the line: close calls.",
      draw: (width) => ridges(app, layer, width),
      csv: () => [["last step", ...range(32).map((i) => `from ${run.decisions.edges[i]}`)], ...run.decisions.last.map((step, t) => [step, ...range(32).map((i) => run.decisions.margins.at(t, layer, i))])],
    });
    fan("close_calls", "Close calls", percent, { yLow: 0 });
    fan("mass", "Top-k mass", percent);
    fan("logit_scale", "Logit scale", number, { yLow: 0 });
    fan("z", "z-loss", number, { yLow: 0 });
    if (run.decisions.active) app.figure(grid, {
      id: "active", title: `Experts a token in ${app.layerName(layer)}`, explain: "active", moves: true, note: () => `At step ${whole(app.step)}.`,
      draw: (width) => activeBars(app, layer, width),
      csv: () => [["last step", ...range(17).map((i) => (i < 16 ? i : "16 and more"))], ...run.decisions.last.map((step, t) => [step, ...range(17).map((i) => run.decisions.active.at(t, layer, i))])],
    });
    if (!run.curves.token_entropy) app.missing(grid, "Token entropy, information, mass", how("scores"));
    if (!run.decisions.margins) app.missing(grid, "Margins", ["The router gives no logits for its decisions (", el("code", {}, "Routing.logits"), "), or only counts are known."]);
  },

  movement(app, page) {
    const { run, other, theme } = app, layer = app.layer, moved = run.movement;
    const grid = el("div", { class: "grid" });
    page.append(grid);
    if (moved) {
      const P = moved.steps.length, floor = (l) => (run.layers[l].top_k ?? 1) / run.layers[l].experts;
      const probeNote = `${whole(moved.tokens)} tokens, ${P} checkpoints.`;
      const dashed = (name, of) => (other?.movement ? [{ x: other.movement.steps, y: of(other.movement), colour: theme.b, dash: "5 4", label: other.name, width: 2 }] : []);
      app.figure(grid, {
        id: "saturation", title: "Saturation", explain: "saturation", note: `${probeNote} Deeper layers are ${app.deeper}; bold: ${app.layerName(layer)}.${other?.movement ? ` Dashed: ${other.name}, same layer.` : ""}`,
        draw: (width) => lineChart(app, { width, height: 250, label: "Saturation by layer", yLow: 0, yHigh: 1.02, lines: [{ y: floor(layer), label: "chance, k/E" }], points: P < 30,
          series: [...layersThen(app, (l) => ({ x: moved.steps, y: range(P).map((i) => moved.overlap.at(l, i, P - 1)) })), ...dashed("saturation", (m) => m.steps.map((_, i) => m.overlap.at(layer, i, m.steps.length - 1)))] }),
        csv: () => [["layer", ...moved.steps], ...run.layers.map((info, l) => [info.layer, ...range(P).map((i) => moved.overlap.at(l, i, P - 1))])],
      });
      app.figure(grid, {
        id: "overlap", title: `Overlap of checkpoints in ${app.layerName(layer)}`, explain: "overlap", note: `${probeNote} Share of a token's experts that two checkpoints have in common.`,
        draw: (width) => heatMap(app, { width: Math.min(width, 330), rows: P, columns: P, square: true, label: `Overlap of checkpoints of ${app.layerName(layer)}`,
          colour: (r, c) => mix(theme.sequential, moved.overlap.at(layer, r, c)), cellText: (r, c) => percent(moved.overlap.at(layer, r, c)), rowText: (r) => short(moved.steps[r]), columnText: (c) => short(moved.steps[c]), columnTitle: "step",
          legend: { stops: theme.sequential, texts: ["0", "½", "1"], title: "shared" },
          tip: (r, c) => [el("b", {}, `steps ${whole(moved.steps[r])} and ${whole(moved.steps[c])}`), tipRow("overlap", percent(moved.overlap.at(layer, r, c))), tipRow("chance", percent(floor(layer)))] }),
        csv: () => [["step", ...moved.steps], ...range(P).map((i) => [moved.steps[i], ...range(P).map((j) => moved.overlap.at(layer, i, j))])],
      });
      app.figure(grid, {
        id: "fluctuation", title: "Fluctuation", explain: "fluctuation", note: `Since the checkpoint before. Bold: ${app.layerName(layer)}; dotted: its first expert alone.`,
        draw: (width) => lineChart(app, { width, label: "Fluctuation by layer", yLow: 0, yText: percent, points: P < 30, lines: [],
          series: [...layersThen(app, (l) => ({ x: moved.steps.slice(1), y: range(P - 1).map((i) => 1 - moved.overlap.at(l, i, i + 1)), text: percent })),
            { x: moved.steps.slice(1), y: range(P - 1).map((i) => moved.first.at(layer, i + 1)), colour: theme.a, dash: "2 4", label: "first expert", text: percent }] }),
        csv: () => [["layer", ...moved.steps.slice(1)], ...run.layers.map((info, l) => [info.layer, ...range(P - 1).map((i) => 1 - moved.overlap.at(l, i, i + 1))])],
      });
      app.figure(grid, {
        id: "settled", title: "Settled at", explain: "settled", note: "The first checkpoint from which 95 % of tokens keep their first expert. Hollow: not before the end.",
        draw: (width) => settledDots(app, width), csv: () => [["layer", "settled at step"], ...run.layers.map((info, l) => [info.layer, moved.settled[l]])],
      });
    } else app.missing(grid, "Movement", how("probe"));
    if (run.curves.drift) app.figure(grid, {
      id: "drift", title: "Load drift", explain: "drift", wide: true, note: `Between neighbouring training windows, whose batches differ. Bold: ${app.layerName(layer)}; band: sampling alone.`,
      draw: (width) => lineChart(app, { width, height: 190, label: "Load drift by layer", yLow: 0, yText: percent,
        bands: [{ x: run.last, low: run.last.map(() => 0), high: run.last.map((_, s) => { const N = run.tokens.at(s, layer), k = run.layers[layer].top_k; return N && k ? Math.sqrt((run.layers[layer].experts - k) / (Math.PI * N * k)) : NaN; }) }],
        series: layersThen(app, (l) => ({ x: run.last, y: column(run.curves.drift, l), text: percent })) }),
      csv: () => curveRows(run, "drift"),
    });
  },

  structure(app, page) {
    const { other } = app;
    const both = [app.run, ...(other ? [other] : [])];
    if (!both.some((run) => run.structure)) return app.missing(page, "Structure", how("structure"));
    const grid = el("div", { class: "grid" });
    page.append(grid);
    for (const run of both) {
      const title = (text) => (other ? `${text}: ${run.name}` : text);
      if (!run.structure) { app.missing(grid, title("Structure"), how("structure")); continue; }
      drawStructure(app, grid, run, title, both.indexOf(run));
    }
  },

  meaning(app, page) {
    const { run, other, state } = app;
    if (!run.meaning) return app.missing(page, "Meaning", how("probe"));
    const sets = run.meaning.sets;
    if (run.meaning.shown) {
      const first = el("div", { class: "grid first" });
      page.append(first);
      drawShown(app, first, run.meaning.shown);
    }
    if (!sets.length) return;
    if (state.set == null || state.set >= sets.length) {
      // the label that tells most of the expert comes first
      const above = (set) => set.nmi.reduce((sum, [value, chance]) => sum + (value == null ? 0 : value - chance), 0);
      state.set = sets.reduce((best, set, i) => (above(set) > above(sets[best]) ? i : best), 0);
    }
    if (sets.length > 1) page.append(choice("Label", sets.map((set, i) => [i, set.name]), state.set, (set) => app.set({ set })));
    const grid = el("div", { class: "grid" });
    page.append(grid);
    for (const one of [run, ...(other?.meaning ? [other] : [])]) {
      const set = one === run ? sets[state.set] : one.meaning.sets.find((candidate) => candidate.name === sets[state.set].name);
      if (set) drawMeaning(app, grid, one, set, other?.meaning ? `: ${one.name}` : "", one === run ? "" : "-other");
    }
    drawNmi(app, grid);
  },
};

function choice(title, entries, chosen, pick) {
  return el("div", { class: "choice", role: "group", "aria-label": title }, el("span", {}, title),
    entries.map(([key, text]) => el("button", { type: "button", "aria-pressed": String(key === chosen), "data-choice": key, onclick: () => pick(key) }, text)));
}
const curveRows = (run, name) => [["layer", ...run.last], ...run.layers.map((info, l) => [info.layer, ...column(run.curves[name], l)])];

/** A thin line a layer, darker = deeper, and the chosen one bold and on top. */
function layersThen(app, make) {
  const { run, theme, layer } = app, L = run.layers.length;
  const one = (l, more) => ({ ...make(l), label: `layer ${run.layers[l].layer}`, ...more });
  return [...range(L).filter((l) => l !== layer).map((l) => one(l, { colour: mix(theme.depth, L > 1 ? l / (L - 1) : 1), width: 1, opacity: 0.55, label: L <= 8 ? `layer ${run.layers[l].layer}` : null })), one(layer, { colour: theme.a, width: 2.4 })];
}

// health

function drawAlerts(app, page) {
  const list = [app.run, ...(app.other ? [app.other] : [])].flatMap((run) => run.alerts.map((alert) => [run, alert]));
  if (!list.length) {
    page.append(el("p", { class: "well" }, "Nothing to report: no collapse, no starving or overloaded expert, no uneven drops, no drift."));
    return;
  }
  const where = { collapse: "load", overload: "load", starvation: "load", drops: "load", "late drops": "load", drift: "movement" };
  page.append(el("ul", { class: "alerts", "aria-label": "Alerts" }, list.map(([run, alert]) => el("li", {},
    el("button", { type: "button", onclick: () => app.set({ page: where[alert.kind], layer: alert.layer, cell: alert.experts.length && alert.experts.length < 4 ? alert.experts[0] : null }) },
      app.other ? el("span", { class: "run" }, run.name) : null, alert.sentence)))));
}

function drawTiles(app, page) {
  const { run } = app, tiles = el("div", { class: "tiles" });
  page.append(tiles);
  const paint = () => {
    const at = app.at, values = (name) => (run.curves[name] ? range(run.layers.length).map((l) => run.curves[name].at(at, l)) : []);
    const worst = (list, sign) => list.reduce((best, value, l) => (Number.isFinite(value) && (best < 0 || sign * value > sign * list[best]) ? l : best), -1);
    const tile = (name, value, small) => tiles.append(el("div", { class: "tile" }, app.explained(name), el("b", {}, value), el("small", {}, small)));
    tiles.replaceChildren();
    const entropy = values("collapse_aware_entropy"), low = worst(entropy, -1);
    if (low >= 0) tile("collapse_aware_entropy", median(entropy).toFixed(3), `median; lowest ${entropy[low].toFixed(3)}, ${app.layerName(low)}`);
    const vio = values("max_violation"), high = worst(vio, 1);
    if (high >= 0) {
      const chance = maxVioNull(run.tokens.at(at, high), run.layers[high].experts, run.layers[high].top_k);
      tile("max_violation", number(vio[high]), `highest, ${app.layerName(high)}${Number.isFinite(chance) ? `; chance up to ${number(chance)}` : ""}`);
    }
    const dead = values("dead").reduce((sum, share, l) => sum + Math.round((share || 0) * run.layers[l].experts), 0);
    tile("dead", whole(dead), `of ${whole(run.layers.reduce((sum, layer) => sum + layer.experts, 0))} experts get under a twentieth of their share`);
    const drops = values("drop_rate"), most = worst(drops, 1);
    if (most >= 0) tile("drop_rate", percent(drops[most]), drops[most] > 0 ? `highest, ${app.layerName(most)}` : "no layer drops anything");
    const information = values("information").filter(Number.isFinite);
    if (information.length) tile("information", number(median(information)), "median; 0 = tokens do not matter to the router");
  };
  paint();
  app.listeners.push(paint);
}

function drawScalars(app, grid) {
  const { run, other, theme } = app;
  for (const [i, scalar] of run.scalars.entries()) {
    const twin = other?.scalars.find((candidate) => candidate.name === scalar.name);
    app.figure(grid, {
      id: `scalar-${i}`, title: scalar.name, wide: run.scalars.length === 1, note: `${scalar.mean_of > 1 ? `Mean of ${scalar.mean_of} neighbouring values.` : "As logged."}${twin ? ` Dashed: ${other.name}.` : ""}`,
      draw: (width) => lineChart(app, { width, height: 170, label: scalar.name, series: [
        ...(twin ? [{ x: twin.steps, y: twin.values, colour: theme.b, dash: "5 4", label: other.name }] : []),
        { x: scalar.steps, y: scalar.values, colour: theme.a, label: twin ? run.name : scalar.name, width: 1.8 }] }),
      csv: () => [["step", scalar.name], ...scalar.steps.map((step, j) => [step, scalar.values[j]])],
    });
  }
}

/** How many measures stand side by side, and how wide each is. */
function healthPlan(measures, width) {
  const left = 36, gap = 18, across = Math.max(1, Math.min(measures.length, Math.floor((width - left) / 168)));
  const even = Math.ceil(measures.length / Math.ceil(measures.length / across));
  return { left, gap, across: even, cell: (width - left) / even - gap };
}

function healthLabels(app, measures, width) {
  const { across, left, gap, cell } = healthPlan(measures, width);
  if (across < measures.length) return [];
  return el("div", { style: `display:flex;padding-left:${left}px;font-size:12.5px;color:var(--soft)` }, measures.map(([name, title]) => el("span", { style: `width:${cell + gap}px` }, app.explained(name, title))));
}

function healthGrid(app, measures, width) {
  const { run, other, theme } = app, L = run.layers.length;
  const { left, gap, across, cell } = healthPlan(measures, width);
  const high = L > 30 ? 24 : 32, blocks = Math.ceil(measures.length / across), head = across < measures.length ? 24 : 6;
  const tall = blocks * (head + L * high + 26);
  const svg = el("svg", { width, height: tall, viewBox: `0 0 ${width} ${tall}`, role: "img", "font-family": FONT, "font-size": 11,
    "aria-label": `Health of ${L} layers: ${measures.map(([, title]) => title).join(", ")} over training` });
  const [first, last] = [run.last[0], run.last.at(-1)];
  const values = 54, plot = cell - values, cursors = [], texts = [];
  for (const [m, [name, title, text, [floor, ceiling]]] of measures.entries()) {
    const block = Math.floor(m / across), x0 = left + (m % across) * (cell + gap), y0 = block * (head + L * high + 26) + head;
    const all = [run, other].filter((one) => one?.curves[name]).flatMap((one) => Array.from(one.curves[name].values).filter(Number.isFinite));
    // the scale leaves the first few windows out where they would flatten the rest
    const most = Math.max(quantile(all, 0.995), floor ?? -Infinity), least = quantile(all, 0.005);
    const low = floor ?? least, high_ = ceiling ?? (most > low ? most : low + 1);
    const x = (step) => x0 + ((step - first) / (last - first || 1)) * plot;
    if (head > 10) {
      const label = el("text", { x: x0, y: y0 - 8, fill: theme.ink, "font-weight": 600, style: "cursor:pointer", "data-explain": name }, title);
      label.addEventListener("click", () => app.explain(name));
      svg.append(label);
    }
    for (let l = 0; l < L; l++) {
      const top = y0 + l * high, y = (value) => top + 3 + (1 - Math.min(1, Math.max(0, (value - low) / (high_ - low || 1)))) * (high - 8);
      const alerted = run.alerts.some((alert) => alert.layer === l && ALERTED[alert.kind] === name);
      if (alerted) svg.append(el("rect", { x: x0 - 5, y: top, width: cell + 5, height: high - 2, fill: theme.warmBg, rx: 3 }));
      if (name === "max_violation") {
        const chance = run.last.map((_, s) => maxVioNull(run.tokens.at(s, l), run.layers[l].experts, run.layers[l].top_k));
        svg.append(el("path", { d: area(run.last, chance.map(() => 0), chance, x, y), fill: theme.band }));
      } else svg.append(el("line", { x1: x0, x2: x0 + plot, y1: y(low), y2: y(low), stroke: theme.grid }));
      if (other?.curves[name]) svg.append(el("path", { d: path(other.last, column(other.curves[name], l), x, y), fill: "none", stroke: theme.b, "stroke-width": 1.1, "stroke-dasharray": "3 2" }));
      // a single window has no course: its value is a bar
      if (run.last.length === 1) svg.append(el("rect", { x: x0, y: top + high / 2 - 4, height: 8, rx: 1.5, fill: alerted ? theme.warm : theme.a, opacity: 0.85,
        width: Math.max(0, Math.min(1, (run.curves[name].at(0, l) - low) / (high_ - low || 1))) * plot || 0 }));
      svg.append(el("path", { d: path(run.last, column(run.curves[name], l), x, y), fill: "none", stroke: alerted ? theme.warm : theme.a, "stroke-width": 1.4, "stroke-linejoin": "round" }));
      const value = el("text", { x: x0 + cell - 2, y: top + high / 2 + 3, "text-anchor": "end", fill: alerted ? theme.warm : theme.soft, "font-weight": alerted ? 650 : 400 });
      svg.append(value);
      texts.push([value, name, l, text, alerted]);
      if (m % across === 0) svg.append(el("text", { x: left - 10, y: top + high / 2 + 3, "text-anchor": "end", fill: run.alerts.some((alert) => alert.layer === l) ? theme.warm : l === app.layer ? theme.a : theme.soft, "font-weight": l === app.layer ? 650 : 400 }, run.layers[l].layer));
    }
    const bottom = y0 + L * high;
    if (last > first) svg.append(el("text", { x: x0, y: bottom + 11, fill: theme.faint, "font-size": 10 }, short(first)), el("text", { x: x0 + plot, y: bottom + 11, fill: theme.faint, "text-anchor": "end", "font-size": 10 }, short(last)));
    const cursor = el("line", { y1: y0, y2: bottom - 2, stroke: theme.ink, opacity: last > first ? 0.3 : 0 });
    svg.append(cursor);
    cursors.push([cursor, x]);
  }
  svg.moveTo = (step) => {
    for (const [cursor, x] of cursors) { cursor.setAttribute("x1", x(step)); cursor.setAttribute("x2", x(step)); }
    for (const [node, name, l, text, alerted] of texts) {
      const value = run.curves[name].at(app.at, l);
      node.textContent = Number.isFinite(value) ? (alerted ? "▲ " : "") + text(value) : "–";
    }
  };
  const locate = (event) => {
    const box = svg.getBoundingClientRect(), px = ((event.clientX - box.left) * width) / box.width, py = ((event.clientY - box.top) * tall) / box.height;
    const block = Math.floor(py / (head + L * high + 26)), l = Math.floor((py - block * (head + L * high + 26) - head) / high);
    const m = block * across + Math.floor((px - left) / (cell + gap)), within = (px - left) % (cell + gap);
    if (px < left || l < 0 || l >= L || !measures[m]) return null;
    return [m, l, closest(run.last, first + (within / plot) * (last - first))];
  };
  svg.addEventListener("pointermove", (event) => {
    const found = locate(event);
    if (!found) return app.tip();
    const [m, l, s] = found, [name, , text] = measures[m];
    const chance = name === "max_violation" ? maxVioNull(run.tokens.at(s, l), run.layers[l].experts, run.layers[l].top_k) : null;
    app.tip(event, el("b", {}, `${app.layerName(l)}, step ${whole(run.last[s])}`), tipRow(app.data.definitions[name].name, text(run.curves[name].at(s, l))),
      chance ? tipRow("chance, up to", number(chance)) : null, tipRow("tokens", whole(run.tokens.at(s, l))), el("div", { style: "color:var(--faint)" }, run.layers[l].name));
  });
  svg.addEventListener("pointerleave", () => app.tip());
  svg.addEventListener("click", (event) => { const found = locate(event); if (found) app.set({ layer: found[1], cell: null }); });
  return svg;
}

// load

const frameAt = (run, step) => closest(run.load.last, step);

function loadsShown(app) {
  const { run, other, state } = app, now = () => frameAt(run, app.step);
  const at = (one, frame) => (l, e) => one.load.ratio.at(frame(), l, e);
  const said = (one, frame) => () => one.load.last.length === 1 ? "Rows are layers." : `Steps ${whole(one.load.first[frame()])} to ${whole(one.load.last[frame()])}. Rows are layers.`;
  const one = { title: run.name, value: at(run, now), frame: now, run, note: said(run, now) };
  const against = (title, run_, frame) => {
    const before = at(run_, frame);
    const value = (l, e) => { const [x, y] = [one.value(l, e), before(l, e)]; return x === 0 && y === 0 ? 0 : Math.log2(x) - Math.log2(y); };
    return { title, value, difference: true, run, note: () => `Orange: more load in ${state.other === "step" ? "the step now" : run.name}. ${run.load.last.length > 1 ? `Steps ${whole(run.load.last[now()])} and ${whole(run_.load.last[frame()])}.` : ""}` };
  };
  if (other?.load) {
    const there = () => frameAt(other, app.step);
    return [one, { title: other.name, value: at(other, there), frame: there, run: other, note: said(other, there) }, against(`Difference: ${run.name} over ${other.name}`, other, there)];
  }
  if (state.other === "step" && state.pinned != null) {
    const pinned = () => frameAt(run, run.last[Math.min(state.pinned, run.last.length - 1)]);
    return [one, against(`Difference to step ${whole(run.load.last[pinned()])}`, run, pinned)];
  }
  return [one];
}

/** The experts of a layer in the order of the columns. */
function orderOf(app, one, layer) {
  const size = app.run.layers[layer].experts, { sort } = app.state;
  if (sort === "load") {
    const value = one.difference ? one.value : one.value;
    return range(size).sort((x, y) => value(layer, y) - value(layer, x) || x - y);
  }
  const place = sort === "cluster" ? app.run.structure?.layers.indexOf(layer) ?? -1 : -1;
  return place >= 0 ? app.run.structure.order[place] : range(size);
}

function loadMap(app, one, width) {
  const { run, theme, state } = app, orders = run.layers.map((_, l) => orderOf(app, one, l));
  const columns = Math.max(...run.layers.map((layer) => layer.experts));
  const ratio = (r, c) => { const e = orders[r][c]; if (e == null) return NaN; const value = one.value(r, e); return one.difference ? 2 ** value : value; };
  return heatMap(app, {
    width, rows: run.layers.length, columns, label: `${one.title}: load of every expert by layer at step ${whole(app.step)}`,
    colour: (r, c) => ratioColour(theme, ratio(r, c)), mark: (r, c) => ratioMark(ratio(r, c)), cellText: (r, c) => `${ratio(r, c).toFixed(2)}×`,
    rowText: (r) => String(run.layers[r].layer), rowTitle: "layer", columnText: (c) => String(state.sort === "id" ? c : c + 1),
    columnTitle: { id: "expert", load: "rank by load, in each layer", cluster: "experts that are chosen together stand together, in each layer" }[state.sort],
    legend: ratioLegend(theme, one.difference ? "ratio of loads" : "of the fair share"),
    chosen: () => ({ row: app.layer, column: state.cell == null ? null : orders[app.layer].indexOf(state.cell) }),
    pick: (r, c) => app.set({ layer: r, cell: orders[r][c] }),
    tip: (r, c) => {
      const e = orders[r][c], value = one.value(r, e), name = el("b", {}, `layer ${run.layers[r].layer}, expert ${e}`);
      if (one.difference) return [name, tipRow("ratio of loads", times(2 ** value))];
      const frame = one.frame(), n = one.run.load.assignments.at(frame, r);
      return [name, tipRow("load", times(value)), tipRow("share", percent(value / run.layers[r].experts)), tipRow("assignments", whole((value * n) / run.layers[r].experts)), cellHistory(app, one.run, r, e)];
    },
  });
}

function cellHistory(app, run, layer, expert) {
  const { theme } = app, width = 220, height = 64;
  const y = (ratio) => 4 + ((2 - Math.max(-2, Math.min(2, Math.log2(ratio)))) / 4) * (height - 8);
  const steps = run.load.last, [first, last] = [steps[0], steps.at(-1)];
  const x = (step) => ((step - first) / (last - first || 1)) * (width - 26) + 22;
  const svg = el("svg", { width, height, "font-size": 9.5, style: "margin-top:6px" });
  for (const [ratio, text] of [[4, "4×"], [1, "1×"], [0.25, "¼×"]])
    svg.append(el("line", { x1: 22, x2: width - 4, y1: y(ratio), y2: y(ratio), stroke: ratio === 1 ? theme.faint : theme.grid }), el("text", { x: 18, y: y(ratio) + 3, "text-anchor": "end", fill: theme.soft }, text));
  svg.append(el("path", { d: path(steps, steps.map((_, f) => run.load.ratio.at(f, layer, expert)), x, (v) => y(v || 1e-9)), fill: "none", stroke: theme.a, "stroke-width": 1.6 }));
  const here = steps[frameAt(run, app.step)];
  svg.append(el("line", { x1: x(here), x2: x(here), y1: 2, y2: height - 2, stroke: theme.ink, opacity: 0.35 }));
  return svg;
}

function loadBars(app, layer, width) {
  const { run, theme, state } = app, [one] = loadsShown(app), order = orderOf(app, one, layer), E = order.length;
  const frame = frameAt(run, app.step), N = run.load.assignments.at(frame, layer), k = run.layers[layer].top_k;
  const values = order.map((e) => one.value(layer, e)), most = Math.max(2, ...values.filter(Number.isFinite)) * 1.05;
  const height = 230, left = 34, right = 6, bottom = 32, top = 8, side = (width - left - right) / E;
  const y = (value) => top + (1 - value / most) * (height - top - bottom);
  const svg = el("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Load of the experts of ${app.layerName(layer)}`, "font-family": FONT, "font-size": 11 });
  for (const tick of ticks(0, most, 4)) svg.append(el("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), stroke: theme.grid }), el("text", { x: left - 6, y: y(tick) + 3.5, "text-anchor": "end", fill: theme.soft }, `${number(tick).replace(/\.?0+$/, "")}×`));
  const spread = N && k ? 2 * Math.sqrt(((1 - Math.min(1, k / E)) * E) / N) : 0;
  svg.append(el("rect", { x: left, width: width - left - right, y: y(1 + spread), height: Math.max(1, y(1 - spread) - y(1 + spread)), fill: theme.band }));
  order.forEach((e, i) => {
    const value = values[i];
    if (!Number.isFinite(value)) return;
    const bar = el("rect", { x: left + i * side + side * 0.1, width: side * 0.8, y: y(value), height: Math.max(0.5, y(0) - y(value)), fill: e === state.cell ? theme.b : theme.a, opacity: e === state.cell ? 1 : 0.82 });
    bar.addEventListener("pointermove", (event) => app.tip(event, el("b", {}, `expert ${e}`), tipRow("load", times(value)), tipRow("share", percent(value / E))));
    bar.addEventListener("pointerleave", () => app.tip());
    bar.addEventListener("click", () => app.set({ cell: e }));
    svg.append(bar);
  });
  svg.append(el("line", { x1: left, x2: width - right, y1: y(1), y2: y(1), stroke: theme.ink, opacity: 0.6 }));
  const every = [1, 2, 4, 8, 16, 32, 64].find((n) => n * side >= 24) ?? 64;
  for (let i = 0; i < E; i += every) svg.append(el("text", { x: left + (i + 0.5) * side, y: height - bottom + 14, "text-anchor": "middle", fill: theme.soft }, order[i]));
  svg.append(el("text", { x: width - right, y: height - 4, "text-anchor": "end", fill: theme.faint }, "expert"));
  return svg;
}

function loadHistory(app, layer, width) {
  const { run, theme, state } = app, E = run.layers[layer].experts;
  const log = (ratio) => (Number.isNaN(ratio) ? NaN : Math.max(-4, Math.log2(ratio)));
  const line = (e) => run.load.last.map((_, f) => log(run.load.ratio.at(f, layer, e)));
  const series = range(E).filter((e) => e !== state.cell).map((e) => ({ x: run.load.last, y: line(e), colour: theme.a, width: 0.9, opacity: E > 24 ? 0.28 : 0.5, label: E <= 8 ? `expert ${e}` : null, text: (v) => times(2 ** v) }));
  if (state.cell != null && state.cell < E) series.push({ x: run.load.last, y: line(state.cell), colour: theme.b, width: 2.2, label: `expert ${state.cell}`, text: (v) => times(2 ** v) });
  return lineChart(app, { width, height: 230, label: `Load of the experts of ${app.layerName(layer)} over training`, series, yText: (v) => (Number.isInteger(v) ? (v < 0 ? `1/${2 ** -v}×` : `${2 ** v}×`) : ""), lines: [{ y: 0, label: "fair share" }] });
}

// decisions

function fanChart(app, name, { width, text, ...extra }) {
  const { run, other, theme } = app, L = run.layers.length;
  const at = (one, s) => range(L).map((l) => one.curves[name].at(s, l));
  const q = (one, share) => one.last.map((_, s) => quantile(at(one, s), share));
  const series = [{ x: run.last, y: q(run, 0.5), colour: theme.soft, width: 1.4, label: "median of layers", text }];
  if (other?.curves[name]) series.push({ x: other.last, y: q(other, 0.5), colour: theme.b, dash: "5 4", label: `${other.name}, median`, text });
  series.push({ x: run.last, y: column(run.curves[name], app.layer), colour: theme.a, width: 2.2, label: app.layerName(app.layer), text });
  const bands = L > 2 ? [{ x: run.last, low: q(run, 0), high: q(run, 1), colour: theme.a, opacity: 0.13 }, { x: run.last, low: q(run, 0.25), high: q(run, 0.75), colour: theme.a, opacity: 0.2 }] : [];
  return lineChart(app, { width, label: app.data.definitions[name].name, series, bands, yText: text === percent ? percent : short, ...extra });
}

function jointPlot(app, width) {
  const { run, other, theme } = app, L = run.layers.length, height = 260, left = 46, right = 14, top = 12, bottom = 36;
  const information = run.curves.information, entropy = run.curves.collapse_aware_entropy;
  const most = Math.min(1, Math.max(0.25, 1.25 * Math.max(...[run, other].filter((one) => one?.curves.information).flatMap((one) => Array.from(one.curves.information.values).filter(Number.isFinite)))));
  const x = (value) => left + value * (width - left - right), y = (value) => top + (1 - value / most) * (height - top - bottom);
  const svg = el("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Routing information against collapse-aware load entropy, a dot a layer", "font-family": FONT, "font-size": 11 });
  for (const tick of [0, 0.25, 0.5, 0.75, 1]) svg.append(el("line", { x1: x(tick), x2: x(tick), y1: top, y2: height - bottom, stroke: theme.grid }), el("text", { x: x(tick), y: height - bottom + 15, "text-anchor": "middle", fill: theme.soft }, String(tick)));
  for (const tick of ticks(0, most, 4)) svg.append(el("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), stroke: theme.grid }), el("text", { x: left - 7, y: y(tick) + 3.5, "text-anchor": "end", fill: theme.soft }, short(tick)));
  const corner = (text, px, py, anchor, colour) => svg.append(el("text", { x: px, y: py, "text-anchor": anchor, fill: colour, "font-style": "italic" }, text));
  svg.append(el("rect", { x: x(0), y: y(most * 0.22), width: x(0.3) - x(0), height: y(0) - y(most * 0.22), fill: theme.warmBg }));
  corner("collapse", x(0) + 7, y(0) - 8, "start", theme.warm);
  corner("specialised", x(1) - 4, y(most) + 14, "end", theme.soft);
  corner("indifferent", x(0.985), y(0) - 8, "end", theme.soft);
  svg.append(el("text", { x: width - right, y: height - 4, "text-anchor": "end", fill: theme.faint }, "collapse-aware load entropy"), el("text", { x: left, y: top - 2, fill: theme.faint }, "information"));
  const clip = (v) => Math.max(0, Math.min(1, v));
  const trail = range(app.at + 1).filter((s) => Number.isFinite(information.at(s, app.layer)) && Number.isFinite(entropy.at(s, app.layer)));
  svg.append(el("path", { d: trail.map((s, i) => `${i ? "L" : "M"}${x(clip(entropy.at(s, app.layer))).toFixed(1)} ${y(clip(information.at(s, app.layer))).toFixed(1)}`).join(""), fill: "none", stroke: theme.a, opacity: 0.45 }));
  const dot = (one, l, s, hollow) => {
    const [e, i] = [one.curves.collapse_aware_entropy.at(s, l), one.curves.information?.at(s, l)];
    if (!Number.isFinite(e) || !Number.isFinite(i)) return;
    const chosen = l === app.layer, colour = hollow ? theme.b : chosen ? theme.a : mix(theme.depth, L > 1 ? l / (L - 1) : 1);
    const made = el("circle", { cx: x(clip(e)), cy: y(clip(i)), r: chosen ? 6.5 : 4.5, fill: hollow ? "none" : colour, stroke: hollow ? colour : theme.bg, "stroke-width": 1.2 });
    made.addEventListener("pointermove", (event) => app.tip(event, el("b", {}, `${hollow ? `${one.name}, ` : ""}${app.layerName(l)}`), tipRow("load entropy", number(e)), tipRow("information", number(i))));
    made.addEventListener("pointerleave", () => app.tip());
    made.addEventListener("click", () => app.set({ layer: l }));
    svg.append(made);
  };
  if (other?.curves.information) range(L).forEach((l) => dot(other, l, closest(other.last, app.step), true));
  [...range(L).filter((l) => l !== app.layer), app.layer].forEach((l) => dot(run, l, app.at));
  return svg;
}

function ridges(app, layer, width) {
  const { run, theme } = app, { margins, edges, last } = run.decisions, T = margins.shape[0];
  const shown = [...new Set(range(Math.min(12, T)).map((i) => Math.round((i * (T - 1)) / Math.max(1, Math.min(12, T) - 1))))];
  const height = 270, left = 46, right = 12, top = 52, bottom = 34, bins = 31;
  const x = (bin) => left + (bin / bins) * (width - left - right), gap = (height - top - bottom) / shown.length;
  const most = Math.max(...shown.flatMap((t) => range(bins).map((b) => margins.at(t, layer, b + 1) || 0))) || 1;
  const svg = el("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Distribution of margins of ${app.layerName(layer)} over training`, "font-family": FONT, "font-size": 11 });
  for (const [bin, text] of [[0, "0.01"], [10, "0.1"], [20, "1"], [30, "10"]]) svg.append(el("line", { x1: x(bin), x2: x(bin), y1: 4, y2: height - bottom, stroke: bin === 10 ? theme.warm : theme.grid, "stroke-dasharray": bin === 10 ? "4 4" : null }), el("text", { x: x(bin), y: height - bottom + 15, "text-anchor": "middle", fill: theme.soft }, text));
  svg.append(el("text", { x: x(10) - 6, y: 12, "text-anchor": "end", fill: theme.warm }, "close calls"), el("text", { x: width - right, y: height - 4, "text-anchor": "end", fill: theme.faint }, "margin in standard deviations of the token's logits"));
  shown.forEach((t, i) => {
    const base = top + (i + 1) * gap, peak = Math.min(gap * 3, 54);
    const points = range(bins).map((b) => `${x(b + 0.5).toFixed(1)} ${(base - ((margins.at(t, layer, b + 1) || 0) / most) * peak).toFixed(1)}`);
    const shape = el("path", { d: `M${x(0.5)} ${base}L${points.join("L")}L${x(bins - 0.5)} ${base}Z`, fill: mix(theme.depth, shown.length > 1 ? i / (shown.length - 1) : 1), stroke: theme.bg, "stroke-width": 1.2, opacity: 0.92 });
    shape.addEventListener("pointermove", (event) => app.tip(event, el("b", {}, `up to step ${whole(last[t])}`), tipRow("below 0.1", percent(range(11).reduce((sum, b) => sum + (margins.at(t, layer, b) || 0), 0)))));
    shape.addEventListener("pointerleave", () => app.tip());
    svg.append(shape);
    if (i % Math.ceil(13 / gap) === 0 || i === shown.length - 1) svg.append(el("text", { x: left - 7, y: base + 1, "text-anchor": "end", fill: theme.soft, "font-size": 10 }, short(last[t])));
  });
  return svg;
}

function activeBars(app, layer, width) {
  const { run, theme } = app, t = closest(run.decisions.last, app.step), shares = range(17).map((i) => run.decisions.active.at(t, layer, i));
  const height = 210, left = 46, right = 8, bottom = 32, top = 20, side = (width - left - right) / 17, most = Math.max(...shares.filter(Number.isFinite), 0.01);
  const y = (value) => top + (1 - value / most) * (height - top - bottom);
  const svg = el("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `How many experts a token has in ${app.layerName(layer)}`, "font-family": FONT, "font-size": 11 });
  for (const tick of ticks(0, most, 3)) svg.append(el("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), stroke: theme.grid }), el("text", { x: left - 7, y: y(tick) + 3.5, "text-anchor": "end", fill: theme.soft }, percent(tick)));
  shares.forEach((share, i) => {
    if (share > 0) svg.append(el("rect", { x: left + i * side + side * 0.12, width: side * 0.76, y: y(share), height: Math.max(1, y(0) - y(share)), fill: theme.a, rx: 1.5 }));
    if (share >= 0.005 && side > 26) svg.append(el("text", { x: left + (i + 0.5) * side, y: y(share) - 4, "text-anchor": "middle", fill: theme.soft, "font-size": 10 }, percent(share)));
    if (side > 15 || i % 4 === 0) svg.append(el("text", { x: left + (i + 0.5) * side, y: height - bottom + 14, "text-anchor": "middle", fill: theme.soft }, i < 16 ? i : "16+"));
  });
  svg.append(el("text", { x: width - right, y: height - 4, "text-anchor": "end", fill: theme.faint }, "routed experts of a token"));
  return svg;
}

// movement

function settledDots(app, width) {
  const { run, theme } = app, { settled, steps } = run.movement, L = run.layers.length;
  const high = Math.max(7, Math.min(18, 220 / L)), left = 46, right = 14, top = 6, height = top + L * high + 36;
  const x = (step) => left + ((step - steps[0]) / (steps.at(-1) - steps[0] || 1)) * (width - left - right);
  const svg = el("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Step at which each layer settled", "font-family": FONT, "font-size": 11 });
  axis(svg, theme, x, steps[0], steps.at(-1), left, width - right, top + L * high + 2, "step");
  settled.forEach((step, l) => {
    const y = top + (l + 0.5) * high, colour = l === app.layer ? theme.a : mix(theme.depth, L > 1 ? l / (L - 1) : 1), end = step ?? steps.at(-1);
    svg.append(el("line", { x1: left, x2: x(end), y1: y, y2: y, stroke: colour, opacity: 0.35 }), el("circle", { cx: x(end), cy: y, r: Math.min(4.5, high / 2 - 0.5), fill: step == null ? theme.bg : colour, stroke: colour, "stroke-width": 1.3 }));
    if (l % Math.ceil(13 / high) === 0) svg.append(el("text", { x: left - 8, y: y + 3.5, "text-anchor": "end", fill: theme.soft }, run.layers[l].layer));
  });
  return svg;
}

// structure

function drawStructure(app, grid, run, title, number_) {
  const { theme } = app, shape = run.structure, id = (name) => (number_ ? `${name}-${number_}` : name);
  const place = shape.layers.reduce((best, layer, i) => (Math.abs(layer - app.layer) < Math.abs(shape.layers[best] - app.layer) ? i : best), 0);
  const layer = shape.layers[place], order = shape.order[place], E = order.length, name = `layer ${run.layers[layer].layer}`;
  const stand = layer === app.layer ? "" : ` ${app.layerName(app.layer)} is not among the layers that this page holds; the nearest is shown.`;
  const text = (i) => String(order[i]);
  const symmetric = (array) => (r, c) => array.at(place, order[r], order[c]);
  const tree = { order, merges: shape.merges[place] };
  const square = (width) => Math.min(width, 46 + 8 + (E > 16 ? 26 : 36) * E);
  if (shape.lift) {
    const value = symmetric(shape.lift);
    app.figure(grid, {
      id: id("lift"), title: title(`Chosen together, ${name}`), explain: "lift", note: `Step ${whole(shape.step)}, N = ${whole(shape.tokens[place])} tokens. Clustered; the same order serves page 2.${stand}`,
      draw: (width) => heatMap(app, { width: square(width), rows: E, columns: E, square: true, triangle: true, tree, label: `Co-activation lift in ${name}`, colour: (r, c) => ratioColour(theme, value(r, c)), mark: (r, c) => ratioMark(value(r, c)), cellText: (r, c) => value(r, c).toFixed(1),
        rowText: text, columnText: text, legend: ratioLegend(theme, "lift"), tip: (r, c) => [el("b", {}, `experts ${order[r]} and ${order[c]}`), tipRow(`P(${order[c]} | ${order[r]}) lift`, times(value(r, c))), tipRow(`P(${order[r]} | ${order[c]}) lift`, times(value(c, r)))] }),
      csv: () => [["expert", ...range(E)], ...range(E).map((i) => [i, ...range(E).map((j) => shape.lift.at(place, i, j))])],
    });
  } else if (shape.step != null) app.missing(grid, title("Chosen together"), ["Every token has one expert here, so no two are chosen together."]);
  if (shape.cosine && Number.isFinite(shape.cosine.at(place, 0, 0))) {
    const value = symmetric(shape.cosine);
    app.figure(grid, {
      id: id("cosine"), title: title(`Prototypes, ${name}`), explain: "cosine", note: `Cosine of the router's rows at step ${whole(shape.cosine_step)}, in the same order.`,
      draw: (width) => heatMap(app, { width: square(width), rows: E, columns: E, square: true, triangle: true, tree, label: `Cosine of prototypes in ${name}`, colour: (r, c) => mix(theme.diverging, (value(r, c) + 1) / 2), cellText: (r, c) => value(r, c).toFixed(1).replace("-", "−"), rowText: text, columnText: text,
        legend: { stops: theme.diverging, texts: ["−1", "0", "1"], title: "cosine" }, tip: (r, c) => [el("b", {}, `experts ${order[r]} and ${order[c]}`), tipRow("cosine", number(value(r, c)))] }),
      csv: () => [["expert", ...range(E)], ...range(E).map((i) => [i, ...range(E).map((j) => shape.cosine.at(place, i, j))])],
    });
  } else app.missing(grid, title("Prototypes"), ["The router of this layer has no row of numbers for each expert, or its rows were not sampled."]);
  const onward = shape.flow_layers?.indexOf(layer) ?? -1;
  if (shape.flow && onward >= 0) {
    const next = layer + 1, following = shape.layers.indexOf(next), to = following >= 0 ? shape.order[following] : range(run.layers[next].experts);
    const value = (r, c) => shape.flow.at(onward, order[r], to[c]);
    app.figure(grid, {
      id: id("flow"), title: title(`From ${name} to layer ${run.layers[next].layer}`), explain: "flow", note: "Rows: experts of the first layer; columns: of the next.",
      draw: (width) => heatMap(app, { width: square(width), rows: E, columns: to.length, square: true, label: `Flow from ${name} to the next`, colour: (r, c) => ratioColour(theme, value(r, c)), mark: (r, c) => ratioMark(value(r, c)), cellText: (r, c) => value(r, c).toFixed(1),
        rowText: text, columnText: (c) => String(to[c]), legend: ratioLegend(theme, "lift"), tip: (r, c) => [el("b", {}, `expert ${order[r]} → expert ${to[c]}`), tipRow("lift", times(value(r, c)))] }),
      csv: () => [["from", "to", "lift"], ...range(E).flatMap((r) => range(to.length).map((c) => [order[r], to[c], value(r, c)]))],
    });
  }
}

// meaning

function drawMeaning(app, grid, run, set, suffix, mark) {
  const { theme } = app;
  const layers = set.layers ?? range(run.layers.length);
  const place = layers.reduce((best, layer, i) => (Math.abs(layer - app.layer) < Math.abs(layers[best] - app.layer) ? i : best), 0);
  const layer = layers[place], info = run.layers[layer], E = info.experts, chance = (info.top_k ?? 1) / E;
  const name = `layer ${info.layer}`;
  if (set.kind === "chips") return drawChips(app, grid, run, set, layer, suffix, mark);
  const V = set.names.length;
  const structure = run.structure, at = structure ? structure.layers.indexOf(layer) : -1;
  const order = app.state.sort === "cluster" && at >= 0 ? structure.order[at] : range(E);
  const ratio = (r, c) => set.share.at(place, r, order[c]) / chance;
  if (set.grid) app.figure(grid, {
    id: `tiles${mark}`, title: `Where each expert looks, ${name}${suffix}`, explain: "share", wide: !suffix && E > 20, note: `One tile an expert, laid out as the ${set.name} grid.`,
    draw: (width) => gridTiles(app, set, place, E, chance, width),
    csv: () => [[set.name, ...range(E).map((e) => `expert ${e}`)], ...range(V).map((v) => [set.names[v], ...range(E).map((e) => set.share.at(place, v, e))])],
  });
  if (!set.grid || V <= 64) app.figure(grid, {
    id: `share${mark}`, title: `${set.name} × expert, ${name}${suffix}`, explain: "share", wide: E > 20 && !suffix, note: `Probe at step ${whole(run.meaning.step)}; against k/E = ${percent(chance)}.`,
    draw: (width) => heatMap(app, { width, rows: V, columns: E, tall: Math.max(9, Math.min(24, 460 / V)), label: `Share of each ${set.name}'s tokens that goes to each expert of ${name}`,
      colour: (r, c) => ratioColour(theme, ratio(r, c)), mark: (r, c) => ratioMark(ratio(r, c)), cellText: (r, c) => percent(set.share.at(place, r, order[c])), rowText: (r) => (set.grid ? set.grid[r].join(",") : clip(set.names[r], 7)), columnText: (c) => String(order[c]), columnTitle: "expert", legend: ratioLegend(theme, "of k/E"),
      tip: (r, c) => [el("b", {}, `${set.name} ${set.names[r]}, expert ${order[c]}`), tipRow("share of its tokens", percent(set.share.at(place, r, order[c]))), tipRow("against k/E", times(ratio(r, c))), tipRow("N", whole(set.counts[r]))] }),
    csv: () => [[set.name, "tokens", ...range(E).map((e) => `expert ${e}`)], ...range(V).map((v) => [set.names[v], set.counts[v], ...range(E).map((e) => set.share.at(place, v, e))])],
  });
}
const clip = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

function gridTiles(app, set, place, E, chance, width) {
  const { theme } = app, rows = Math.max(...set.grid.map(([r]) => r)) + 1, columns = Math.max(...set.grid.map(([, c]) => c)) + 1;
  const across = Math.max(3, Math.min(E, Math.floor(width / Math.max(E > 20 ? 62 : 88, columns * 9)))), tile = width / across - 10, cell = tile / columns, tall = cell * rows + 20, height = Math.ceil(E / across) * (tall + 6);
  const svg = el("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Share of each ${set.name} that goes to each expert, as small maps`, "font-family": FONT, "font-size": 10.5 });
  for (let e = 0; e < E; e++) {
    const x = (e % across) * (tile + 10), y = Math.floor(e / across) * (tall + 6);
    svg.append(el("text", { x, y: y + 11, fill: theme.soft }, e));
    set.grid.forEach(([r, c], v) => {
      const share = set.share.at(place, v, e);
      const box = el("rect", { x: x + c * cell, y: y + 16 + r * cell, width: cell - (cell > 6 ? 1 : 0), height: cell - (cell > 6 ? 1 : 0), fill: ratioColour(theme, share / chance) ?? theme.band });
      box.addEventListener("pointermove", (event) => app.tip(event, el("b", {}, `expert ${e}, ${set.name} ${set.names[v]}`), tipRow("share of its tokens", percent(share)), tipRow("against k/E", times(share / chance))));
      box.addEventListener("pointerleave", () => app.tip());
      svg.append(box);
    });
  }
  return svg;
}

function drawChips(app, grid, run, set, layer, suffix, mark) {
  const { theme } = app, info = run.layers[layer], E = info.experts, chance = (info.top_k ?? 1) / E;
  if (!set.names.length) return app.missing(grid, set.name, ["No value occurs ten times or more in the probe, so nothing can be said of any: use a larger probe."]);
  const chips = (e) => range(set.ids.shape[2]).map((i) => [set.ids.at(layer, e, i), set.shares.at(layer, e, i)]).filter(([v, share]) => v >= 0 && share > 1.5 * chance);
  const pair = (row) => (row ? [number(row[0]), `shuffled: ${number(row[1])}`] : ["–", ""]);
  const tile = (name, row) => el("div", { class: "tile" }, app.explained(name), el("b", {}, pair(row)[0]), el("small", {}, pair(row)[1]));
  grid.append(el("div", { class: "tiles wide" }, tile("context", set.context[layer]), tile("vocabulary", set.vocabulary[layer]), el("div", { class: "tile" }, el("span", { style: "color:var(--soft);font-size:12.5px" }, "Values that count"), el("b", {}, whole(set.names.length)), el("small", {}, `${whole(set.rare)} occur less than ten times and are left out`))));
  app.figure(grid, {
    id: `chips${mark}`, title: `What each expert of layer ${info.layer} takes${suffix}`, explain: "share", wide: true, png: false, note: `The values of ${set.name} with the largest share at the expert, where that is above 1.5 × k/E = ${percent(1.5 * chance)}; the stronger the colour, the larger.`,
    draw: () => el("div", { class: "chips" }, range(E).map((e) => el("div", {}, el("span", { class: "who" }, e), el("span", { class: "set" }, chips(e).map(([v, share]) => {
      const t = Math.min(1, Math.log2(share / chance) / 3), back = mix(theme.sequential, t * 0.9);
      return el("span", { class: "chip", style: `background:${back};color:${t > 0.66 ? theme.bg : theme.ink}`, title: `${percent(share)} of its ${whole(set.counts[v])} occurrences, ${times(share / chance)} of chance` }, visible(set.names[v]));
    }), chips(e).length ? null : el("span", { style: "color:var(--faint)" }, "nothing above chance"))))),
    csv: () => [["expert", set.name, "share", "occurrences"], ...range(E).flatMap((e) => chips(e).map(([v, share]) => [e, set.names[v], share, set.counts[v]]))],
  });
}
const visible = (text) => (text.trim() === "" || /[\n\t]/.test(text) ? text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅" : text);

/** The first samples of the probe, with the tokens of one expert marked in them. */
function drawShown(app, grid, shown) {
  const { run, state, theme } = app;
  const place = shown.layers.reduce((best, layer, i) => (Math.abs(layer - app.layer) < Math.abs(shown.layers[best] - app.layer) ? i : best), 0);
  const info = run.layers[shown.layers[place]], E = info.experts, T = shown.lengths.reduce((sum, n) => sum + n, 0);
  const experts = (t) => range(shown.index.shape[2]).map((k) => shown.index.at(place, t, k)).filter((e) => e >= 0);
  const taken = range(E).map(() => 0);
  for (let t = 0; t < T; t++) for (const e of experts(t)) taken[e]++;
  const expert = state.cell != null && state.cell < E ? state.cell : taken.indexOf(Math.max(...taken));
  const has = (t) => experts(t).includes(expert);
  const picker = el("label", { class: "choice" }, el("span", {}, "Expert"),
    el("select", { "aria-label": "Expert shown", onchange: (event) => app.set({ cell: Number(event.target.value) }) }, range(E).map((e) => el("option", { value: e, ...(e === expert ? { selected: "" } : {}) }, e))));
  const tip = (event, t) => app.tip(event, el("b", {}, `token ${t}`), tipRow(experts(t).length > 1 ? "experts" : "expert", experts(t).join(", ") || "none"));
  const draw = { images: shownImages, series: shownSeries, texts: shownTexts }[shown.kind];
  const unit = { images: "patches", series: "stretches", texts: "tokens" }[shown.kind];
  const starts = shown.lengths.map((_, i) => shown.lengths.slice(0, i).reduce((sum, n) => sum + n, 0));
  app.figure(grid, {
    id: "shown", title: `What expert ${expert} of layer ${info.layer} takes`, explain: "share", wide: true, png: shown.kind !== "texts",
    note: `The first ${whole(shown.lengths.length)} samples of the probe at step ${whole(run.meaning.step)}: ${whole(taken[expert])} of ${whole(T)} ${unit} go to this expert; chance is ${percent((info.top_k ?? 1) / E)}.`,
    draw: (width) => [picker, draw(shown, { width, theme, has, tip, starts, leave: () => app.tip() })],
    csv: () => [["sample", "token", "experts"], ...shown.lengths.flatMap((n, i) => range(n).map((j) => [i, j, experts(starts[i] + j).join(" ")]))],
  });
}

function shownImages(shown, { width, theme, has, tip, starts, leave }) {
  const [n, h, w, c] = shown.values.shape, [rows, columns] = shown.grid, gap = 12;
  const across = Math.max(2, Math.min(n, Math.floor(width / 118))), wide = Math.min(160, (width - gap * (across - 1)) / across), tall = wide * h / w;
  const height = Math.ceil(n / across) * (tall + gap), cell = [wide / columns, tall / rows];
  const svg = el("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Images of the probe; the patches of this expert are outlined, the others faded" });
  for (let i = 0; i < n; i++) {
    const x = (i % across) * (wide + gap), y = Math.floor(i / across) * (tall + gap), canvas = el("canvas", { width: w, height: h });
    const pen = canvas.getContext("2d"), pixels = pen.createImageData(w, h);
    for (let p = 0; p < h * w; p++) {
      for (let k = 0; k < 3; k++) pixels.data[4 * p + k] = shown.values.at(i, Math.floor(p / w), p % w, c === 3 ? k : 0);
      pixels.data[4 * p + 3] = 255;
    }
    pen.putImageData(pixels, 0, 0);
    svg.append(el("image", { x, y, width: wide, height: tall, href: canvas.toDataURL(), style: "image-rendering:pixelated", preserveAspectRatio: "none" }));
    const taken = [];
    for (let t = 0; t < rows * columns; t++) {
      const mine = has(starts[i] + t), inset = mine ? 1 : 0;
      const box = el("rect", { x: x + (t % columns) * cell[0] + inset, y: y + Math.floor(t / columns) * cell[1] + inset, width: cell[0] - 2 * inset, height: cell[1] - 2 * inset,
        ...(mine ? { class: "taken", fill: "transparent", stroke: theme.b, "stroke-width": 2 } : { fill: theme.bg, "fill-opacity": 0.62 }) });
      box.addEventListener("pointermove", (event) => tip(event, starts[i] + t));
      box.addEventListener("pointerleave", leave);
      if (mine) taken.push(box); else svg.append(box);
    }
    svg.append(...taken); // outlines lie above their neighbours' fading
  }
  return svg;
}

function shownSeries(shown, { width, theme, has, tip, starts, leave }) {
  const [n, points] = shown.values.shape, tall = 74, height = n * tall;
  const svg = el("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Series of the probe; the stretches of this expert are drawn bold" });
  for (let i = 0; i < n; i++) {
    const values = range(points).map((p) => shown.values.at(i, p)), low = Math.min(...values), high = Math.max(...values);
    const x = (p) => (p / Math.max(1, points - 1)) * width, y = (v) => i * tall + 8 + (1 - (v - low) / (high - low || 1)) * (tall - 20);
    svg.append(el("path", { d: path(range(points), values, x, y), fill: "none", stroke: theme.soft, "stroke-opacity": 0.6 }));
    const length = shown.lengths[i];
    for (let t = 0; t < length; t++) {
      const from = Math.floor((t * points) / length), to = Math.min(points, Math.floor(((t + 1) * points) / length) + 1), mine = has(starts[i] + t);
      const box = el("rect", { x: x(from), y: i * tall, width: Math.max(1, x(to - 1) - x(from)), height: tall - 6, fill: theme.b, "fill-opacity": mine ? 0.14 : 0, ...(mine ? { class: "taken" } : {}) });
      box.addEventListener("pointermove", (event) => tip(event, starts[i] + t));
      box.addEventListener("pointerleave", leave);
      svg.append(box);
      if (mine) svg.append(el("path", { d: path(range(to - from).map((j) => from + j), values.slice(from, to), x, y), fill: "none", stroke: theme.b, "stroke-width": 2.2, "pointer-events": "none" }));
    }
  }
  return svg;
}

function shownTexts(shown, { theme, has, tip, starts, leave }) {
  return el("div", { class: "texts" }, shown.lengths.map((length, i) => el("p", {}, range(length).map((t) => {
    const mine = has(starts[i] + t), one = el("span", mine ? { class: "taken", style: `background:${theme.band};box-shadow:inset 0 -2px ${theme.b}` } : {}, shown.values[starts[i] + t]);
    one.addEventListener("pointermove", (event) => tip(event, starts[i] + t));
    one.addEventListener("pointerleave", leave);
    return one;
  }))));
}


function drawNmi(app, grid) {
  const { run, other, theme } = app, sets = run.meaning.sets, L = run.layers.length;
  const colours = [theme.a, theme.b, theme.soft, theme.depth[0]];
  const corrected = (set) => range(L).map((l) => (set.nmi[l][0] == null ? NaN : set.nmi[l][0] - set.nmi[l][1]));
  const twin = (set) => other?.meaning?.sets.find((candidate) => candidate.name === set.name);
  const x = run.layers.map((info) => info.layer);
  app.figure(grid, {
    id: "nmi", title: "What a label tells of the expert, by layer", explain: "nmi", wide: true,
    note: `NMI above its mean under permuted labels; band: up to the 95th percentile of permutations.${other?.meaning ? ` Dashed: ${other.name}.` : ""}`,
    draw: (width) => [lineChart(app, { width, height: 220, label: "NMI of labels and experts by layer", xText: "layer", points: true,
      bands: [{ x, low: range(L).map(() => 0), high: range(L).map((l) => Math.max(...sets.map((set) => (set.nmi[l][2] ?? 0) - (set.nmi[l][1] ?? 0)))) }],
      series: sets.flatMap((set, i) => [{ x, y: corrected(set), colour: colours[i % 4], label: set.name, width: i === app.state.set ? 2.4 : 1.5 },
        ...(twin(set) ? [{ x, y: corrected(twin(set)), colour: colours[i % 4], dash: "5 4", label: `${set.name}, ${other.name}` }] : [])]) }),
      el("div", { style: "font-size:12.5px;color:var(--soft)" }, sets.map((set, i) => el("span", { style: "margin-right:18px" }, el("span", { style: `display:inline-block;width:16px;height:3px;vertical-align:middle;margin-right:6px;background:${colours[i % 4]}` }), set.name)))],
    csv: () => [["label", "layer", "NMI", "mean of permutations", "95th percentile"], ...sets.flatMap((set) => range(L).map((l) => [set.name, run.layers[l].layer, ...set.nmi[l]]))],
  });
  app.figure(grid, {
    id: "nmi-table", title: `In ${app.layerName(app.layer)}`, explain: "nmi", wide: true, png: false, note: `Probe of ${whole(run.meaning.tokens)} tokens at step ${whole(run.meaning.step)}.`,
    draw: () => el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ["label", "values", "NMI", "under permutation", "95th percentile", "above chance"].map((text) => el("th", { scope: "col" }, text)))),
      el("tbody", {}, sets.map((set) => { const [value, mean, high] = set.nmi[app.layer]; return el("tr", {}, [set.name, whole(set.names.length + (set.rare ?? 0)), number(value), number(mean), number(high), value == null ? "–" : value > high ? number(value - mean) : "within chance"].map((text) => el("td", {}, text))); })))),
    csv: () => [["label", "NMI", "mean of permutations", "95th percentile"], ...sets.map((set) => [set.name, ...set.nmi[app.layer]])],
  });
}

// -------------------------------------------------------------------------------------------------------------- mount

/**
 * Draws data (as of page_data) into root. Called again on the same root, it goes on with the page, step and layer that
 * were shown: so a page that refreshes its data does not lose the reader's place.
 */
export async function mount(root, data) {
  if (data?.format !== 1) {
    root.replaceChildren(`These data have format ${data?.format}, which this page cannot read: it reads format 1.`);
    return null;
  }
  const runs = await Promise.all(data.runs.map(unpack));
  return new App(root, data, runs, root.gatewrightState).live();
}
