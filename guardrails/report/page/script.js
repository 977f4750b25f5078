"use strict";
const { runs } = JSON.parse(document.getElementById("data").textContent);
const many = runs.length > 1;
const page = document.getElementById("page");
const tip = document.getElementById("tip");
const SVG = "http://www.w3.org/2000/svg";
const MARKS = { climb: "▲", fall: "▼", frozen: "■", thawed: "□", failed: "✕", invalid: "!", resumed: "↻", lost: "✕", policy: "◆", closed: "●" };

// Text enters the page as text alone: through append() and textContent, never as markup.
function make(tag, attributes, ...children) {
  const drawn = ["svg", "g", "path", "line", "circle", "rect", "text"].includes(tag);
  const node = drawn ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

function show(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return String(value);
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}

const SENSE = { "<=": "≤", ">=": "≥", "==": "=" };
const percent = (part, whole) => (whole ? `${show((100 * part) / whole, 3)}%` : "–");

function span(seconds) {
  if (!(seconds >= 0)) return "–";
  if (seconds < 120) return `${show(seconds, 3)} s`;
  if (seconds < 7200) return `${show(seconds / 60, 3)} min`;
  return `${show(seconds / 3600, 3)} h`;
}

function facts(pairs) {
  return make("dl", { class: "facts" }, pairs.map(([name, value, extra]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value, extra ? make("small", {}, ` ${extra}`) : null))));
}

function table(head, rows, texts = []) {
  return make("div", { class: "scroll", tabindex: 0 }, make("table", {},
    make("thead", {}, make("tr", {}, head.map((cell) => make("th", { scope: "col" }, cell)))),
    make("tbody", {}, rows.map((row) => make("tr", {}, row.map((cell, column) =>
      make("td", texts.includes(column) ? { class: "text" } : {}, cell)))))));
}

// Contents are made when first opened: a long run's tables would slow the page down otherwise.
function fold(title, contents, open = false) {
  const node = make("details", {}, make("summary", {}, title));
  node.addEventListener("toggle", () => { if (node.open && node.children.length === 1) node.append(contents()); });
  node.open = open;
  return node;
}

// --- the tip: one box for all charts, by pointer, by touch and by keyboard

function tell(rows, sentence, x, y) {
  tip.replaceChildren(...rows.map(([name, value]) => make("div", { class: "row" }, make("span", {}, name), make("b", {}, value))));
  if (sentence) tip.append(make("p", {}, sentence));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = x + 14 + box.width > innerWidth - 8 ? x - 14 - box.width : x + 14;
  tip.style.left = `${Math.max(8, Math.min(left, innerWidth - box.width - 8))}px`;
  tip.style.top = `${Math.max(8, Math.min(y + 14, innerHeight - box.height - 8))}px`;
}

function hush() { tip.hidden = true; }

function speakable(node, rows, sentence) {
  const at = () => { const box = node.getBoundingClientRect(); tell(rows, sentence, box.right, box.bottom); };
  node.addEventListener("pointerenter", at);
  node.addEventListener("pointerleave", hush);
  node.addEventListener("focus", at);
  node.addEventListener("blur", hush);
  node.addEventListener("click", (event) => { event.stopPropagation(); at(); });
  return node;
}

// --- scales

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) found.push(Number((k * step).toPrecision(12)));
  return found;
}

function extent(lists, floor) {
  let low = Infinity, high = -Infinity;
  for (const list of lists) for (const value of list) if (value !== null) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low > high) return [0, 1];
  if (floor !== undefined && low >= floor) low = floor;
  // Numbers that differ in their last digits alone are one number: between them no tick has a place of its own.
  if (high - low <= 1e-12 * Math.max(Math.abs(low), Math.abs(high))) { const pad = Math.abs(low) * 0.1 || 1; return floor === low ? [low, low + pad] : [low - pad, high + pad]; }
  const pad = (high - low) * 0.06;
  return [low === floor ? low : low - pad, high + pad];
}

const everyStep = extent(runs.map((run) => [...run.first, ...run.last]));
const steps = [Math.min(...runs.map((run) => run.first[0] ?? 0)), Math.max(...runs.map((run) => run.last.at(-1) ?? 1))];
if (!(steps[1] > steps[0])) [steps[0], steps[1]] = everyStep;

const listed = (trace) => (trace.low.length ? [trace.mean, trace.low, trace.high] : [trace.mean]);

// --- a chart: lines, bands and steps over the run's points, redrawn when its width changes

function path(xs, ys, x, y, stepped) {
  let text = "", pen = false;
  ys.forEach((value, i) => {
    if (value === null) { pen = false; return; }
    const px = x(xs[i]).toFixed(1), py = y(value).toFixed(1);
    if (!pen) text += `M${px} ${py}`;
    else text += stepped ? `H${px}V${py}` : `L${px} ${py}`;
    pen = true;
  });
  return text;
}

function area(xs, lows, highs, x, y) {
  let text = "", from = 0;
  const close = (to) => {
    if (to <= from) return;
    const there = [], back = [];
    for (let i = from; i < to; i += 1) {
      there.push(`${x(xs[i]).toFixed(1)} ${y(highs[i]).toFixed(1)}`);
      back.unshift(`${x(xs[i]).toFixed(1)} ${y(lows[i]).toFixed(1)}`);
    }
    text += `M${there.join("L")}L${back.join("L")}Z`;
  };
  lows.forEach((value, i) => { if (value === null || highs[i] === null) { close(i); from = i + 1; } });
  close(lows.length);
  return text;
}

const cursors = new Map();

function chart(run, { label, series, domain, height = 190, rug, marks = [], describe, axis = true }) {
  const xs = run.first.map((first, i) => (first + run.last[i]) / 2);
  const legend = make("div", { class: "title" }, series.map(({ name, tone, band, dashed }) =>
    make("span", { class: `key ${tone}${band ? " band" : ""}${dashed ? " dash" : ""}` }, name)));
  const svg = make("svg", { role: "img", tabindex: 0, "aria-label": `${label}. Arrow keys move along the steps.` });
  const holder = make("div", { class: "chart" }, legend, svg);
  let at = -1, width = 0, moveTo = () => {};

  function draw() {
    width = Math.max(180, holder.clientWidth);
    const left = 46, right = 10, top = 6, bottom = (axis ? 20 : 6) + (rug ? 9 : 0);
    const x = (step) => left + ((step - steps[0]) / (steps[1] - steps[0] || 1)) * (width - left - right);
    const y = (value) => top + (1 - (value - domain[0]) / (domain[1] - domain[0])) * (height - top - bottom);
    const floor = height - bottom;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    const parts = [];
    for (const tick of ticks(domain[0], domain[1], height > 120 ? 5 : 3)) {
      const py = y(tick).toFixed(1);
      parts.push(make("line", { class: "gridline", x1: left, x2: width - right, y1: py, y2: py }));
      parts.push(make("text", { x: left - 6, y: Number(py) + 4, "text-anchor": "end" }, show(tick)));
    }
    if (axis) for (const tick of ticks(steps[0], steps[1], Math.max(4, width / 110)).filter(Number.isInteger))
      parts.push(make("text", { x: x(tick).toFixed(1), y: height - 4, "text-anchor": "middle" }, show(tick)));
    for (const { tone, trace, band, dashed, stepped } of series) {
      if (band) parts.push(make("path", { class: `area ${tone}`, d: area(xs, band[0], band[1], x, y) }));
      else {
        if (trace.low.length) parts.push(make("path", { class: `area ${tone}`, d: area(xs, trace.low, trace.high, x, y) }));
        parts.push(make("path", { class: `line ${tone}${dashed ? " dash" : ""}`, d: path(xs, trace.mean, x, y, stepped) }));
        if (xs.length === 1 && trace.mean[0] !== null) parts.push(make("circle", { class: `dot ${tone}`, cx: x(xs[0]), cy: y(trace.mean[0]), r: 3.5 }));
      }
    }
    if (rug) {
      const wide = Math.max(1.5, (width - left - right) / Math.max(1, xs.length) * 0.8);
      rug.forEach((count, i) => { if (count) parts.push(make("rect", { class: "rug", x: (x(xs[i]) - wide / 2).toFixed(1), y: floor + 2, width: wide.toFixed(1), height: 5 })); });
    }
    parts.push(make("line", { class: "axis", x1: left, x2: width - right, y1: floor, y2: floor }));
    const line = make("line", { class: "cursor", y1: top, y2: floor, visibility: "hidden" });
    const dots = series.filter((each) => each.trace).map((each) => make("circle", { class: `dot ${each.tone}`, r: 3.5, visibility: "hidden" }));
    svg.replaceChildren(...parts, line, ...dots, ...marks.map((mark) => draws(mark, x, y, floor)));

    moveTo = (index) => {
      const seen = index >= 0 ? "visible" : "hidden";
      line.setAttribute("visibility", seen);
      if (index >= 0) { line.setAttribute("x1", x(xs[index])); line.setAttribute("x2", x(xs[index])); }
      series.filter((each) => each.trace).forEach(({ trace }, k) => {
        const value = index >= 0 ? trace.mean[index] : null;
        dots[k].setAttribute("visibility", value === null ? "hidden" : "visible");
        if (value !== null) { dots[k].setAttribute("cx", x(xs[index])); dots[k].setAttribute("cy", y(value)); }
      });
    };
    svg.nearest = (clientX) => {
      const step = steps[0] + (((clientX - svg.getBoundingClientRect().left) / svg.clientWidth) * width - left) / (width - left - right) * (steps[1] - steps[0]);
      let low = 0, high = xs.length - 1;
      while (high - low > 1) { const middle = (low + high) >> 1; if (xs[middle] < step) low = middle; else high = middle; }
      return Math.abs(xs[low] - step) <= Math.abs(xs[high] - step) ? low : high;
    };
    svg.place = (index) => { const box = svg.getBoundingClientRect(); return [box.left + (x(xs[index]) / width) * box.width, box.top + 20]; };
  }

  function select(index, clientX, clientY) {
    at = index;
    for (const move of cursors.get(run)) move(index);
    if (index < 0) { hush(); return; }
    const when = run.first[index] === run.last[index] ? `step ${run.first[index]}` : `steps ${run.first[index]}–${run.last[index]}`;
    const [rows, sentence] = describe(index);
    tell([[when, ""], ...rows], sentence, clientX, clientY);
  }

  const follow = (event) => { if (xs.length) select(svg.nearest(event.clientX), event.clientX, event.clientY); };
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", () => select(-1));
  svg.addEventListener("blur", () => select(-1));
  svg.addEventListener("keydown", (event) => {
    if (!xs.length || event.target !== svg) return;
    const jump = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") { select(-1); return; }
    if (jump === undefined) return;
    event.preventDefault();
    const index = Math.max(0, Math.min(xs.length - 1, (at < 0 ? (jump < 0 ? xs.length : -1) : at) + jump));
    select(index, ...svg.place(index));
  });
  if (!cursors.has(run)) cursors.set(run, []);
  cursors.get(run).push((index) => moveTo(index));
  new ResizeObserver(() => { if (Math.max(180, holder.clientWidth) !== width) draw(); }).observe(holder);
  return holder;
}

function draws({ event, value }, x, y, floor) {
  const up = event.kind === "climb", px = x(event.step), py = value === null ? floor - 6 : y(value);
  const shape = up ? `M${px} ${py - 6}l5.5 9h-11z` : event.kind === "fall" ? `M${px} ${py + 6}l5.5 -9h-11z` : `M${px - 4} ${py - 4}h8v8h-8z`;
  const text = `${event.kind} at step ${event.step}: ${event.text}`;
  const node = make("g", { class: `mark ${event.kind}`, tabindex: 0, role: "img", "aria-label": text }, make("path", { d: shape }));
  return speakable(node, [[`${MARKS[event.kind]} ${event.kind}`, `step ${event.step}`]], event.text);
}

// --- what a run's parts look like

const names = (kind) => [...new Set(runs.flatMap((run) => run[kind].map((part) => part.name)))];

function each(kind, name, build) {
  const having = runs.map((run) => [run, run[kind].find((part) => part.name === name)]).filter(([, part]) => part);
  return make("div", { class: "grid" }, having.map(([run, part]) =>
    make("article", { class: "card" }, many ? make("h3", {}, run.name) : null, build(run, part))));
}

function constraint(name) {
  const all = runs.flatMap((run) => run.constraints.filter((part) => part.name === name));
  const costs = extent(all.flatMap((part) => [...listed(part.cost), ...listed(part.limit), part.lower, part.upper]), 0);
  const lambdas = extent(all.flatMap((part) => listed(part.multiplier)), 0);
  return section(`constraint-${names("constraints").indexOf(name)}`, name, "The mean cost of each step against its limit, and the multiplier λ that holds it there.",
    each("constraints", name, (run, part) => {
      const figures = part.figures;
      const describe = (i) => [[
        ["cost", show(part.cost.mean[i], 6)],
        ["95% band", `${show(part.lower[i])} to ${show(part.upper[i])}`],
        ["limit", `${SENSE[part.sense] || part.sense} ${show(part.limit.mean[i], 6)}`],
        ["λ", show(part.multiplier.mean[i], 6)],
        ...(part.violated[i] && run.stride > 1 ? [["violated", `${part.violated[i]} steps`]] : []),
        ...(part.invalid[i] ? [["not finite", `${part.invalid[i]} rows`]] : []),
      ], part.reasons[i] && (run.first[i] === run.last[i] ? part.reasons[i] : `step ${part.reason_steps[i]}: ${part.reasons[i]}`)];
      return [
        facts([
          ["limit", `${SENSE[part.sense] || part.sense} ${show(figures.last_limit)}`],
          ["mean cost, last quarter", show(figures.quarter_cost), `from step ${figures.quarter}`],
          ["limit broken in", percent(figures.violated, figures.measured), `of ${figures.measured} steps`],
          ["λ at the end", show(figures.last_multiplier)],
        ]),
        chart(run, {
          label: `Cost and limit of ${name} in ${run.name}`, domain: costs, height: 230, rug: part.violated, describe, axis: false,
          series: [
            { name: "95% band of the mean", tone: "cost", band: [part.lower, part.upper] },
            { name: "mean cost", tone: "cost", trace: part.cost },
            { name: "limit", tone: "limit", trace: part.limit, dashed: true, stepped: true },
          ],
        }),
        chart(run, { label: `Multiplier of ${name} in ${run.name}`, domain: lambdas, height: 110, describe, series: [{ name: "multiplier λ", tone: "lambda", trace: part.multiplier }] }),
        fold("Numbers", () => table(["step", "cost", "95% from", "to", "limit", "λ", "broken", "reason"], part.cost.mean.map((cost, i) => [
          run.first[i] === run.last[i] ? String(run.first[i]) : `${run.first[i]}–${run.last[i]}`,
          ...[cost, part.lower[i], part.upper[i], part.limit.mean[i], part.multiplier.mean[i]].map((value) => (value === null ? "–" : String(value))),
          String(part.violated[i]), part.reasons[i],
        ]), [7])),
      ];
    }));
}

function gate(name) {
  return section(`gate-${names("gates").indexOf(name)}`, name, "How far trust has been earned: the level from 0, the tightest, to 1, and the requirements it waits for.",
    each("gates", name, (run, part) => {
      const moves = run.events.filter((event) => event.subject === name && ["climb", "fall", "frozen", "thawed"].includes(event.kind));
      const place = (step) => run.last.findIndex((last) => last >= step);
      const count = (kind) => String(moves.filter((event) => event.kind === kind).length);
      return [
        facts([["level", show(part.last_level), `in ${part.rungs} rungs`], ["climbs", count("climb")], ["falls", count("fall")], ["freezes", count("frozen")]]),
        chart(run, {
          label: `Level of ${name} in ${run.name}`, domain: [-0.04, 1.06], height: 150, axis: part.requirements.length === 0,
          series: [{ name: "level", tone: "level", trace: part.level, stepped: true }],
          marks: moves.slice(0, 400).map((event) => ({ event, value: part.level.mean[place(event.step)] ?? null })),
          describe: (i) => [[["level", show(part.level.mean[i], 6)]], part.texts[i]],
        }),
        part.requirements.map((required, k) => chart(run, {
          label: `${required.name} in ${run.name}`, height: 120, axis: k === part.requirements.length - 1,
          domain: extent([...listed(required.mean), required.lower.mean, required.upper.mean, [required.at_least]]),
          series: [
            { name: "confidence bounds", tone: "level", band: [required.lower.low.length ? required.lower.low : required.lower.mean, required.upper.high.length ? required.upper.high : required.upper.mean] },
            { name: `${required.name}${required.audit ? " (audit)" : ""}`, tone: "level", trace: required.mean },
            { name: `at least ${show(required.at_least)}`, tone: "limit", dashed: true, trace: { mean: run.first.map(() => required.at_least), low: [], high: [] } },
          ],
          describe: (i) => [[["mean", show(required.mean.mean[i], 6)], ["lower bound", show(required.lower.mean[i], 6)], ["upper bound", show(required.upper.mean[i], 6)], ["needed", show(required.at_least)]], part.texts[i]],
        })),
      ];
    }));
}

function dial(name) {
  const domain = extent(runs.flatMap((run) => run.dials.filter((part) => part.name === name).flatMap((part) => listed(part.value))));
  return section(`dial-${names("dials").indexOf(name)}`, name, "A dial of the host that moves with the level.", each("dials", name, (run, part) =>
    chart(run, { label: `Dial ${name} in ${run.name}`, domain, height: 120, series: [{ name: "value", tone: "dial", trace: part.value, stepped: true }], describe: (i) => [[["value", show(part.value.mean[i], 6)]], ""] })));
}

// --- events, refinements, record

function words(text) { return text.match(/\s+|[^\s]+/g) || []; }

function difference(before, after) {
  const old = words(before), fresh = words(after), shorter = Math.min(old.length, fresh.length);
  let head = 0, tail = 0; // what both begin and end with needs no table
  while (head < shorter && old[head] === fresh[head]) head += 1;
  while (tail < shorter - head && old.at(-1 - tail) === fresh.at(-1 - tail)) tail += 1;
  const a = old.slice(head, old.length - tail), b = fresh.slice(head, fresh.length - tail);
  const common = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i -= 1) for (let j = b.length - 1; j >= 0; j -= 1)
    common[i][j] = a[i] === b[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
  const node = make("p", { class: "diff" });
  const put = (tag, text) => {
    const last = node.lastChild;
    if (last && last.nodeName.toLowerCase() === tag) last.textContent += text;
    else node.append(make(tag, {}, text));
  };
  let i = 0, j = 0;
  if (head) put("span", old.slice(0, head).join(""));
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { put("span", a[i]); i += 1; j += 1; }
    else if (j >= b.length || (i < a.length && common[i + 1][j] >= common[i][j + 1])) { put("del", a[i]); i += 1; }
    else { put("ins", b[j]); j += 1; }
  }
  if (tail) put("span", old.slice(old.length - tail).join(""));
  return node;
}

function refinements() {
  return section("refinements", "Refinements", "What the refiner changed in the model's texts; a few examples, removed words struck out and added ones marked.", make("div", { class: "grid" },
    runs.filter((run) => run.refinement).map((run) => make("article", { class: "card" }, many ? make("h3", {}, run.name) : null,
      facts([["rows", show(run.refinement.rows)], ["refined", show(run.refinement.refined), percent(run.refinement.refined, run.refinement.rows)], ["accepted", show(run.refinement.accepted), percent(run.refinement.accepted, run.refinement.refined)]]),
      run.refinement.examples.map((example) => make("div", {},
        make("div", { class: "prompt" }, `step ${example.step}${example.accepted ? "" : ", refused"}${example.prompt ? ` · ${example.prompt}` : ""}`),
        difference(example.before, example.after)))))));
}

function events() {
  return section("events", "What happened", "Climbs and falls of gates, failures, resumes: everything but the ordinary step.", make("div", { class: "grid" },
    runs.map((run) => make("article", { class: "card" }, many ? make("h3", {}, run.name) : null,
      run.events.length === 0 ? make("p", { class: "note" }, "Nothing but ordinary steps.") : null,
      run.events.length === 0 ? null : table(["step", "what", "of", "why"], run.events.map((event) => [
        event.times > 1 ? `${event.step}–${event.last}` : String(event.step),
        make("span", { class: event.kind }, `${MARKS[event.kind]} ${event.kind}${event.times > 1 ? ` ×${event.times}` : ""}`),
        event.subject, event.text]), [3]),
      run.events_left_out ? make("p", { class: "note" }, `${run.events_left_out} further events between them are in the ledger.`) : null))));
}

function verdict(run) {
  const found = run.verification;
  if (run.problem || (found && found.problem)) return ["bad", "altered", run.problem || found.problem];
  if (!found) return ["warn", "not verified", "The record was not checked when this page was made."];
  if (found.unreplayed) return ["warn", "chain intact, not replayed", found.unreplayed];
  if (!found.closed) return ["warn", "intact so far, not closed", `${found.steps} decisions replayed to the bit. There is no closing line: the run was still going, or was killed.`];
  return ["good", "verified", `The chain is whole, and ${found.steps} of ${found.steps} decisions follow from their evidence to the bit.`];
}

function record(run) {
  const [tone, , sentence] = verdict(run), found = run.verification;
  return make("article", { class: "card" }, many ? make("h3", {}, run.name) : null,
    make("p", { class: tone }, sentence),
    found ? make("p", { class: "note" }, `${found.lines} lines in ${found.files} ${found.files === 1 ? "file" : "files"}, head of the chain `, make("code", {}, found.head)) : null,
    found && found.lost ? make("p", { class: "warn" }, `${found.lost} steps could not be written by the run itself.`) : null,
    found ? found.notes.map((note) => make("p", { class: "note" }, note)) : null,
    run.plugins.length
      ? table(["plug-in", "kind", "distribution", "version"], run.plugins.map((part) => [part.name, part.kind, part.distribution, part.version]))
      : make("p", { class: "note" }, "No plug-in took part: schedulers and metrics are the package's own."),
    fold("Configuration", () => make("pre", { tabindex: 0 }, JSON.stringify(run.policy, null, 2))),
    fold("Environment", () => table(["", "version"], Object.entries(run.environment))));
}

function section(id, title, note, ...contents) {
  document.getElementById("contents").append(make("a", { href: `#${id}` }, title));
  return make("section", { id }, make("h2", {}, title), note ? make("p", { class: "note" }, note) : null, ...contents);
}

function overview() {
  const cards = runs.map((run) => {
    const [tone, short, sentence] = verdict(run);
    const since = new Date(run.started * 1000);
    return make("article", { class: "card" }, many ? make("h3", {}, run.name) : null,
      make("p", {}, make("span", { class: `badge ${tone}` }, short)),
      tone === "bad" ? make("p", { class: "banner bad" }, sentence) : null,
      facts([
        ["steps", show(run.steps)], ["trajectories", show(run.rows)], ["time", span(run.ended - run.started)],
        ["host", run.host || "–"], ["seed", run.seed === null ? "–" : String(run.seed)],
        ["begun", Number.isFinite(run.started) ? since.toISOString().slice(0, 16).replace("T", " ") : "–", "UTC"],
      ]));
  });
  const stride = Math.max(...runs.map((run) => run.stride));
  return make("section", { id: "runs" }, make("h1", {}, many ? `${runs.length} runs` : runs[0].name), make("div", { class: "grid" }, cards),
    make("p", { class: "note" }, "The 95% band of a step's mean cost is normal: mean ± 1.96 · s / √n, from the recorded spread s and rows n. Orange ticks under a chart are steps that broke the limit. ",
      stride > 1 ? `A point spans up to ${stride} steps: the line is their mean, the pale area goes from the smallest to the largest, and the reason is that of the worst. ` : "",
      "Point, tap, or focus a chart and use the arrow keys to read a step and its reason."));
}

function begin() {
  if (many) page.classList.add("many");
  document.title = `${many ? `${runs.length} runs` : runs[0].name} · Guardrails report`;
  page.append(overview(), ...names("constraints").map(constraint), ...names("gates").map(gate), ...names("dials").map(dial));
  if (runs.some((run) => run.refinement)) page.append(refinements());
  page.append(events(), section("record", "Record", "Whether the ledger was altered, and whether every decision follows from its evidence; what ran.", make("div", { class: "grid" }, runs.map(record))));
}

const theme = document.getElementById("theme"), root = document.documentElement;
const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
const name = () => { theme.textContent = dark() ? "Light" : "Dark"; theme.setAttribute("aria-label", dark() ? "Light theme" : "Dark theme"); };
theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; name(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
addEventListener("keydown", (event) => { if (event.key === "Escape") hush(); });
name();
begin();
