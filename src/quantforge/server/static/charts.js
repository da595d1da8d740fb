// Charts as SVG elements: a line chart with a logarithmic or linear scale, and paired bars.

const NS = "http://www.w3.org/2000/svg";
const WIDTH = 380, HEIGHT = 250;
const BOX = { left: 46, right: 14, top: 12, bottom: 56 };

export function element(name, attributes = {}, text = null) {
  const found = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  if (text !== null) found.textContent = text;
  return found;
}

// A bar that fills a share of its track.
export function meter(share, label) {
  const svg = element("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none", role: "img", "aria-label": label });
  const width = 100 * Math.max(0, Math.min(1, share));
  svg.append(element("rect", { class: "track", width: 100, height: 8 }));
  svg.append(element("rect", { class: "fill", width, height: 8 }));
  return svg;
}

function scale(low, high, from, to, logarithmic) {
  const f = logarithmic ? Math.log10 : (value) => value;
  const span = f(high) - f(low) || 1;
  return (value) => from + ((f(value) - f(low)) / span) * (to - from);
}

function powersOfTen(low, high) {
  const found = [];
  for (let e = Math.ceil(Math.log10(low)); e <= Math.log10(high) + 1e-9; e++) found.push(10 ** e);
  return found;
}

function evenly(low, high) {
  const rough = (high - low) / 4, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * unit).find((m) => m >= rough);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step / 1e6; v += step) found.push(v);
  return found;
}

function short(value) {
  if (value !== 0 && Math.abs(value) < 0.01) return value.toExponential(0);
  return String(Number(value.toPrecision(3)));
}

function frame(figure, label) {
  figure.querySelector("svg")?.remove();
  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
  figure.append(svg);
  return svg;
}

function axisY(svg, ticks, y) {
  for (const tick of ticks) {
    const at = y(tick);
    svg.append(element("line", { class: "grid", x1: BOX.left, x2: WIDTH - BOX.right, y1: at, y2: at }));
    svg.append(element("text", { x: BOX.left - 6, y: at + 4, "text-anchor": "end" }, short(tick)));
  }
}

function axisX(svg, ticks, title) {
  const bottom = HEIGHT - BOX.bottom;
  svg.append(element("line", { class: "axis", x1: BOX.left, x2: WIDTH - BOX.right, y1: bottom, y2: bottom }));
  for (const [at, text] of ticks) svg.append(element("text", { x: at, y: bottom + 15, "text-anchor": "middle" }, text));
  const middle = (BOX.left + WIDTH - BOX.right) / 2;
  svg.append(element("text", { x: middle, y: bottom + 31, "text-anchor": "middle" }, title));
}

function legend(svg, series) {
  let x = BOX.left;
  for (const { name, style, marks } of series) {
    const y = HEIGHT - 8;
    if (marks === "bar") svg.append(element("rect", { class: `${style}-mark`, x, y: y - 9, width: 14, height: 10, rx: 2 }));
    else svg.append(element("line", { class: `${style}-line`, x1: x, x2: x + 20, y1: y - 4, y2: y - 4 }));
    svg.append(element("text", { class: "key", x: x + 25, y }, name));
    x += 40 + 6.4 * name.length;
  }
}

// series: [{name, style: "one" | "two" | "three", marks, points: [[x, y, label], ...]}]
export function lines(figure, series, { title, label, log = false, low = null, high = null }) {
  const shown = series.filter((s) => s.points.length);
  const all = shown.flatMap((s) => s.points);
  const ys = all.map((p) => p[1]).filter((v) => !log || v > 0);
  const xs = [...new Set(all.map((p) => p[0]))].sort((a, b) => a - b);
  const bottom = low ?? (log ? 10 ** Math.floor(Math.log10(Math.min(...ys))) : Math.min(...ys));
  const top = high ?? (log ? 10 ** Math.ceil(Math.log10(Math.max(...ys))) : Math.max(...ys));
  const x = scale(xs[0], xs.at(-1), BOX.left + 14, WIDTH - BOX.right - 14, true);
  const y = scale(bottom, top, HEIGHT - BOX.bottom, BOX.top, log);
  const svg = frame(figure, label);
  axisY(svg, log ? powersOfTen(bottom, top) : evenly(bottom, top), y);
  let last = -99;
  const ticks = [];
  for (const value of xs) {
    if (x(value) - last < 34) continue;
    ticks.push([x(value), `${Number(value.toPrecision(2))}×`]);
    last = x(value);
  }
  axisX(svg, ticks, title);
  for (const { style, points, marks } of shown) {
    const path = points.filter((p) => !log || p[1] > 0).map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`);
    svg.append(element("polyline", { class: `${style}-line`, points: path.join(" ") }));
    for (const [px, py, text] of marks ? points : []) {
      const dot = element("circle", { class: `${style}-mark`, cx: x(px), cy: y(py), r: 4.5 });
      dot.append(element("title", {}, text));
      svg.append(dot);
    }
  }
  legend(svg, shown);
}

// groups: [{name, values: [first, second], labels}]
export function bars(figure, groups, names, { title, label }) {
  const top = Math.max(...groups.flatMap((g) => g.values)) * 1.05 || 1;
  const y = scale(0, top, HEIGHT - BOX.bottom, BOX.top, false);
  const svg = frame(figure, label);
  axisY(svg, evenly(0, top), y);
  const room = (WIDTH - BOX.left - BOX.right) / groups.length, width = Math.min(16, room * 0.36);
  const ticks = groups.map((g, i) => [BOX.left + room * (i + 0.5), g.name]);
  groups.forEach((group, i) => {
    group.values.forEach((value, j) => {
      const left = BOX.left + room * (i + 0.5) + (j - 1) * (width + 1) + 0.5;
      const bar = element("rect", {
        class: `${j ? "two" : "one"}-mark`, x: left, y: y(value), width, height: Math.max(0, y(0) - y(value)), rx: 2,
      });
      bar.append(element("title", {}, group.labels[j]));
      svg.append(bar);
    });
  });
  axisX(svg, ticks, title);
  legend(svg, names.map((name, j) => ({ name, style: j ? "two" : "one", marks: "bar" })));
}
