// The page at /: collections, search, and measurements, all through the server's own routes.

import { bars, lines, meter } from "/static/charts.js";

const POLL_MS = 5000, JOB_MS = 250;
const $ = (id) => document.getElementById(id);
let known = [];

// ---- talking to the server ------------------------------------------------------------------

class Refused extends Error {}

async function ask(path, options = {}) {
  const headers = new Headers(options.headers ?? {});
  const token = sessionStorage.getItem("token");
  if (token) headers.set("Authorization", `Bearer ${token}`);
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) {
    $("token-form").hidden = false;
    $("links").hidden = true; // a plain link brings no token
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  const error = body?.error;
  throw new Refused(error ? [error.message, error.remedy].filter(Boolean).join("; ") : `HTTP ${answer.status}`);
}

const json = async (path, options) => (await ask(path, options)).json();

function post(path, value) {
  return json(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(value) });
}

// ---- words ----------------------------------------------------------------------------------

const count = (n) => n.toLocaleString("en");

function bytes(n) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (n < 1024 || unit === "GiB") return `${Number(n.toPrecision(3))} ${unit}`;
    n /= 1024;
  }
}

function cell(row, content, number = false) {
  const found = row.insertCell();
  if (number) found.className = "number";
  found.append(content);
}

// ---- collections ----------------------------------------------------------------------------

function showCollections({ collections, damaged }) {
  const vectors = collections.reduce((sum, c) => sum + c.vectors, 0);
  const held = collections.reduce((sum, c) => sum + c.memory.total, 0);
  const plain = collections.reduce((sum, c) => sum + c.float32_bytes, 0);
  $("sum-collections").textContent = count(collections.length);
  $("sum-vectors").textContent = count(vectors);
  $("sum-bytes").textContent = bytes(held);
  $("sum-ratio").textContent = plain ? `${(plain / held).toFixed(1)}×` : "–";
  $("collections").hidden = !collections.length;
  $("collections-empty").hidden = collections.length > 0;
  const rows = $("collections").tBodies[0];
  rows.replaceChildren();
  for (const c of collections) {
    const row = rows.insertRow();
    const name = document.createElement("th");
    name.scope = "row";
    name.textContent = c.name;
    row.append(name);
    cell(row, count(c.vectors), true);
    cell(row, c.settings.dim, true);
    cell(row, c.settings.bits, true);
    cell(row, c.settings.metric);
    cell(row, c.settings.mode);
    const share = c.float32_bytes ? c.memory.total / c.float32_bytes : 0;
    const held = document.createElement("div");
    held.className = "meter";
    const words = c.float32_bytes ? `${bytes(c.memory.total)}, ${(100 * share).toFixed(0)}%` : bytes(c.memory.total);
    held.append(meter(share, `${words} of float32`), words);
    cell(row, held);
  }
  const broken = Object.entries(damaged);
  $("damaged").hidden = !broken.length;
  $("damaged").textContent = broken.map(([name, why]) => `${name} cannot be opened: ${why}`).join("\n");
  showChoice(collections);
}

function showChoice(collections) {
  const choice = $("search-collection");
  const names = collections.map((c) => c.name);
  const changed = names.join() !== known.map((c) => c.name).join();
  known = collections;
  if (!changed) return;
  const before = choice.value;
  choice.replaceChildren(...names.map((name) => new Option(name)));
  if (names.includes(before)) choice.value = before;
  showIds();
}

async function showIds() {
  const name = $("search-collection").value;
  if (!name) return;
  const page = await json(`/v1/collections/${name}/points?limit=50`);
  $("some-ids").replaceChildren(...page.ids.map((id) => new Option(id)));
}

async function refresh() {
  try {
    showCollections(await json("/v1/collections"));
    $("state").textContent = "ready";
    $("state").className = "pill good";
  } catch (error) {
    $("state").textContent = error instanceof Refused ? "refused" : "not reached";
    $("state").className = "pill bad";
  }
}

// ---- search ---------------------------------------------------------------------------------

function parseVector(text) {
  const numbers = text.replace(/[[\]]/g, " ").split(/[\s,;]+/).filter(Boolean).map(Number);
  if (numbers.some((n) => !Number.isFinite(n))) throw new Refused("a vector is numbers, separated by commas or spaces");
  return numbers;
}

const parseId = (text) => (/^\d+$/.test(text) ? Number(text) : text);

async function search(event) {
  event?.preventDefault();
  const note = $("search-note"), list = $("results");
  const name = $("search-collection").value, id = $("search-id").value.trim(), vector = $("search-vector").value.trim();
  try {
    if (!name) throw new Refused("there is no collection to search in");
    if (!id && !vector) throw new Refused("name a point, or paste a vector");
    const asked = vector ? { queries: [parseVector(vector)] } : { like: [parseId(id)] };
    const start = performance.now();
    const found = await post(`/v1/collections/${name}/search`, { ...asked, metadata: true, k: Number($("search-k").value) });
    const ms = (performance.now() - start).toFixed(0);
    note.className = "quiet";
    note.textContent = `${found.ids[0].length} nearest of ${vector ? "the vector" : `point ${id}`} in ${ms} ms`;
    showResults(found.ids[0], found.scores[0], found.metadata[0], list);
  } catch (error) {
    note.className = "error";
    note.textContent = error.message;
    list.replaceChildren();
  }
}

function showResults(ids, scores, metadata, list) {
  const metric = known.find((c) => c.name === $("search-collection").value)?.settings.metric;
  const best = Math.max(...scores.map(Math.abs)) || 1;
  list.replaceChildren(...ids.map((id, i) => {
    const item = document.createElement("li"), rank = document.createElement("span");
    const score = document.createElement("span"), again = document.createElement("button");
    rank.className = "rank";
    rank.textContent = `${i + 1}.`;
    again.type = "button";
    again.className = "plain";
    again.textContent = id;
    again.title = "Search for points like this one";
    again.addEventListener("click", () => {
      $("search-id").value = id;
      $("search-vector").value = "";
      search();
    });
    score.className = "number";
    score.textContent = scores[i].toFixed(4);
    const share = metric === "l2" ? 1 - scores[i] / (2 * best) : scores[i] / best;
    item.append(rank, again, score, meter(share, `score ${scores[i].toFixed(4)}`));
    const known = Object.entries(metadata[i]).map(([name, value]) => `${name}: ${value}`);
    if (known.length) {
      const words = document.createElement("span");
      words.className = "metadata quiet";
      words.textContent = known.join(" · ");
      item.append(words);
    }
    return item;
  }));
}

async function searchAny() {
  const name = $("search-collection").value, total = known.find((c) => c.name === name)?.vectors ?? 0;
  if (total) {
    const page = await json(`/v1/collections/${name}/points?limit=1&offset=${Math.floor(Math.random() * total)}`);
    $("search-id").value = page.ids[0];
    $("search-vector").value = "";
  }
  await search();
}

// ---- measure --------------------------------------------------------------------------------

// A .npy file of (n, dim) normal numbers, by Box and Muller.
function randomNpy(n, dim) {
  let header = `{'descr': '<f4', 'fortran_order': False, 'shape': (${n}, ${dim}), }`;
  header += " ".repeat(63 - ((10 + header.length) % 64)) + "\n";
  const start = 10 + header.length, body = new ArrayBuffer(start + 4 * n * dim);
  const head = new Uint8Array(body), values = new DataView(body);
  head.set([0x93, ...new TextEncoder().encode("NUMPY"), 1, 0, header.length & 255, header.length >> 8]);
  head.set(new TextEncoder().encode(header), 10);
  for (let i = 0; i < n * dim; i++) {
    const radius = Math.sqrt(-2 * Math.log(1 - Math.random()));
    values.setFloat32(start + 4 * i, radius * Math.cos(2 * Math.PI * Math.random()), true);
  }
  return body;
}

async function finished(answer, progress) {
  if (answer.status !== 202) return answer.json();
  let job = await answer.json();
  progress.hidden = false;
  while (job.state === "waiting" || job.state === "running") {
    progress.value = job.progress;
    await new Promise((done) => setTimeout(done, JOB_MS));
    job = await json(`/v1/jobs/${job.id}`);
  }
  try {
    return await json(`/v1/jobs/${job.id}/result`);
  } finally {
    progress.hidden = true;
    await ask(`/v1/jobs/${job.id}`, { method: "DELETE" });
  }
}

async function measure(event) {
  event.preventDefault();
  const note = $("measure-note"), button = event.submitter ?? $("measure").querySelector("button");
  button.disabled = true;
  try {
    const fromFile = $("measure-source").value === "file", file = $("measure-file").files[0];
    if (fromFile && !file) throw new Refused("choose a .npy file of vectors (n, dim)");
    const body = fromFile ? file : randomNpy(Number($("measure-count").value), Number($("measure-dim").value));
    note.className = "quiet";
    note.textContent = "measuring…";
    const headers = { "Content-Type": "application/x-npy" };
    const report = await finished(await ask("/v1/benchmark", { method: "POST", headers, body }), $("measure-progress"));
    showReport(report);
    note.textContent = `${count(report.rows[0].vectors)} vectors of dim ${report.dim}, on ${report.device}`;
  } catch (error) {
    note.className = "error";
    note.textContent = error.message;
  } finally {
    button.disabled = false;
  }
}

function showReport({ rows }) {
  const hint = (r) => `${r.bits} bits: ${r.ratio.toFixed(1)}× smaller, error ${r.mse.toPrecision(3)}`;
  const series = (name, style, marks, value) => ({
    name, style, marks, points: rows.filter((r) => value(r) !== null).map((r) => [r.ratio, value(r), hint(r)]),
  });
  lines($("error-chart"), [
    series("measured", "one", true, (r) => r.mse),
    series("theory", "two", false, (r) => r.theory),
    series("Shannon's bound", "three", false, (r) => r.bound),
  ], { log: true, title: "smaller than float32", label: "Relative squared error by compression, measured and in theory" });
  lines($("recall-chart"), [series("recall@10", "one", true, (r) => r.recall)],
    { low: 0, high: 1, title: "smaller than float32", label: "Recall of the nearest ten by compression" });
  bars($("speed-chart"), rows.map((r) => ({
    name: String(r.bits), values: [r.encode_gb_s, r.decode_gb_s],
    labels: [`encode ${r.encode_gb_s.toFixed(2)} GB/s`, `decode ${r.decode_gb_s.toFixed(2)} GB/s`],
  })), ["encode", "decode"], { title: "bits a number", label: "Gigabytes of float32 encoded and decoded a second, by bits" });
  const body = $("measured").tBodies[0];
  body.replaceChildren();
  for (const r of rows) {
    const row = body.insertRow(), digits = (v) => (v === null ? "–" : String(Number(v.toPrecision(3))));
    const values = [r.bits, r.bytes_per_vector, `${r.ratio.toFixed(1)}×`, digits(r.mse), digits(r.theory), r.cosine.toFixed(4),
      digits(r.recall), digits(r.encode_gb_s), digits(r.decode_gb_s)];
    for (const value of values) cell(row, value, true);
  }
  $("measure-details").hidden = false;
}

function showSource() {
  const fromFile = $("measure-source").value === "file";
  for (const label of document.querySelectorAll("#measure .random")) label.hidden = fromFile;
  for (const label of document.querySelectorAll("#measure .file")) label.hidden = !fromFile;
}

// ---- theme, token, start --------------------------------------------------------------------

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "Light" : "Dark";
}

async function start() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  setTheme(localStorage.getItem("theme") ?? system);
  for (const place of document.querySelectorAll(".origin")) place.textContent = location.origin;
  $("theme").addEventListener("click", () => {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", next);
    setTheme(next);
  });
  $("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem("token", $("token").value);
    $("token-form").hidden = true;
    update();
  });
  $("search").addEventListener("submit", search);
  $("search-random").addEventListener("click", searchAny);
  $("search-collection").addEventListener("change", showIds);
  $("measure").addEventListener("submit", measure);
  $("measure-source").addEventListener("change", showSource);
  await update();
  setInterval(() => document.hidden || refresh(), POLL_MS);
}

async function update() {
  await refresh();
  const version = await json("/version").catch(() => null);
  if (version) $("version").textContent = `${version.quantforge} · torch ${version.torch} · ${version.device}`;
}

start();
