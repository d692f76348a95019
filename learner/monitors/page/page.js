// The page of runs: charts, completions, servers, settings. All text of a run is set as text, never as HTML.
"use strict";
(() => {
  const given = JSON.parse(document.getElementById("data").textContent);
  const CHART_HEIGHT = 190, CARDS = 20, COLORS = ["c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8"];
  const UNSEEN = /[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]/gu;
  const NONE = "\u2013";
  const root = document.getElementById("page");
  const dark = matchMedia("(prefers-color-scheme: dark)");

  // ---- small tools -------------------------------------------------------------------------------------------------
  /** Write characters that control how others are shown, and lone surrogates, as their codes. */
  const clean = (value) =>
    String(value ?? "").replace(UNSEEN, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));

  /** Make an element; strings become text, functions listen to the event of their name. */
  function el(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (typeof value === "function") made.addEventListener(name, value);
      else if (name === "value" || name === "checked" || name === "hidden" || name === "open") made[name] = value;
      else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, clean(value));
    }
    made.append(...children.flat().map((child) => (child instanceof Node ? child : clean(child))));
    return made;
  }
  const say = (element, text) => { if (element.textContent !== clean(text)) element.textContent = clean(text); };
  const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

  function number(value) {
    if (!isNumber(value)) return NONE;
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < 1e-3) return value.toExponential(1).replace(".0e", "e");
    if (size >= 1e6) return value.toExponential(2);
    return size >= 1000 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(3)));
  }
  const short = (value) => (isNumber(value) && Math.abs(value) >= 1000 ? `${Number((value / 1000).toPrecision(3))}k` : number(value));
  const three = (value) => (isNumber(value) ? value.toFixed(3) : NONE);

  function spell(seconds) {
    if (seconds < 120) return `${Math.round(seconds)} s`;
    if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
    return `${(seconds / 3600).toFixed(1)} h`;
  }

  function download(name, rows) {
    const field = (value) => {
      const text = value === null || value === undefined ? "" : String(value);
      const safe = /^[=+\-@\t\r]/.test(text) && !isNumber(value) ? `'${text}` : text; // no formula of a spreadsheet
      return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
    };
    const text = rows.map((row) => row.map(field).join(",")).join("\r\n") + "\r\n";
    const link = el("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  // ---- the data ----------------------------------------------------------------------------------------------------
  const runs = new Map(); // name -> {name, head, width, columns, rows: Map(index -> row), batches}
  let names = given.messages.map((message) => message.run);
  let shown = names[0] ?? null;
  let compared = [];

  function apply(message) {
    let run = runs.get(message.run);
    if (!run) runs.set(message.run, (run = { name: message.run, head: {}, width: 1, columns: [], rows: new Map(), batches: [] }));
    if (message.head) run.head = message.head;
    if (message.table) {
      const { anew, width, columns, rows } = message.table;
      if (anew) run.rows.clear();
      run.width = width;
      run.columns = columns;
      for (const [index, ...cells] of rows) run.rows.set(index, cells);
      run.sorted = null;
    }
    if (message.batches) {
      const key = (kind, step) => `${kind} ${step}`;
      const known = new Map([...run.batches, ...message.batches.new].map((batch) => [key(batch.kind, batch.step), batch]));
      run.batches = message.batches.kept.map(([kind, step]) => known.get(key(kind, step))).filter(Boolean);
    }
    if (shown === null) shown = message.run;
  }

  /** Indices of a run's rows, in order. */
  const order = (run) => (run.sorted ??= [...run.rows.keys()].sort((a, b) => a - b));

  /** A column as {x: steps, mean, low, high}, without the rows that lack it. */
  function column(run, name) {
    const at = run.columns.indexOf(name), found = { x: [], mean: [], low: [], high: [] };
    if (at < 0) return found;
    for (const index of order(run)) {
      const cell = run.rows.get(index)[at];
      if (cell === null || cell === undefined) continue;
      const [mean, low, high] = Array.isArray(cell) ? cell : [cell, cell, cell];
      if (!isNumber(mean)) continue;
      found.x.push(index * run.width);
      found.mean.push(mean);
      found.low.push(low);
      found.high.push(high);
    }
    return found;
  }

  function trailingMean(values) {
    const window = Math.max(3, Math.floor(values.length / 10));
    let sum = 0;
    return values.map((value, i) => {
      sum += value - (i >= window ? values[i - window] : 0);
      return sum / Math.min(i + 1, window);
    });
  }

  /** The lines of a chart: {label, look, color, x, mean, low, high}; of several runs the first line of each. */
  function linesOf(spec) {
    const main = runs.get(shown);
    if (!main) return [];
    const seriesOf = (run) => {
      if (spec.series !== "functions") return spec.series;
      const functions = run.columns.filter((name) => name.startsWith("rewards/"));
      return functions.length > 1 ? functions.map((name) => [name, name.slice(8, -5), "line"]) : [];
    };
    const line = (run, [name, label, look], color) => {
      const found = column(run, name);
      if (look === "mean") found.mean = found.low = found.high = trailingMean(found.mean);
      return { label, look: look === "mean" ? "line" : look, color, ...found };
    };
    const several = [shown, ...compared].map((name) => runs.get(name)).filter(Boolean);
    if (several.length > 1) {
      return several.flatMap((run, i) => {
        const first = seriesOf(run).slice(0, 1);
        return first.map((series) => ({ ...line(run, series, i), label: `${run.name}: ${series[1]}` }));
      }).filter((found) => found.x.length);
    }
    return seriesOf(main).map((series, i) => line(main, series, i)).filter((found) => found.x.length);
  }

  // ---- charts ------------------------------------------------------------------------------------------------------
  const charts = [];
  let scale = "robust";

  const styleOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const quantile = (sorted, share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];

  /** The range in which all but a few outliers of some values lie; the whole one where there are none. */
  function robust(values) {
    const sorted = [...values].sort((a, b) => a - b), n = sorted.length;
    let low = sorted[0], high = sorted[n - 1];
    if (n < 8) return [low, high];
    const below = quantile(sorted, 0.06), above = quantile(sorted, 0.94), span = above - below;
    if (span > 0 && high > above + 2 * span) high = above + span / 2;
    if (span > 0 && low < below - 2 * span) low = below - span / 2;
    return [low, high];
  }

  class Chart {
    constructor(spec) {
      this.spec = spec;
      this.index = null;
      this.plot = el("div", {
        class: "plot", role: "slider", tabindex: 0, "aria-label": `${spec.title}: step under the cursor`,
        "aria-orientation": "horizontal", keydown: (event) => this.key(event),
        blur: () => this.move(null),
      });
      this.legend = el("ul", { class: "legend" });
      this.at = el("p", { class: "at soft" });
      this.cut = el("p", { class: "cut soft" });
      this.table = el("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": `${spec.title}: table` });
      const csv = el("button", { type: "button", click: () => this.download() }, "Download as CSV");
      this.details = el("details", { class: "numbers", toggle: () => this.fillTable() },
        el("summary", { "aria-label": `${spec.title} as a table` }, "Table"), csv, this.table);
      this.figure = el("figure", { class: "chart", "aria-label": spec.title },
        el("figcaption", {}, el("h3", {}, spec.title), el("p", {}, spec.note)),
        this.legend, this.at, this.plot, this.cut, this.details);
      this.lines = [];
    }

    /** Whether values are drawn by their power of ten. */
    get log() { return scale === "log" || (scale === "robust" && Boolean(this.spec.log)); }

    update() {
      const before = JSON.stringify([this.lines.map((line) => [line.label, line.look, line.color]), this.drawnLog]);
      this.lines = linesOf(this.spec);
      this.figure.hidden = this.lines.length === 0;
      if (this.figure.hidden) return;
      const tables = this.lines.map((line) => [line.x, this.drawn(line.mean), this.drawn(line.low), this.drawn(line.high)]);
      this.data = uPlot.join(tables, tables.map(() => [1, 1, 1, 1]));
      const after = JSON.stringify([this.lines.map((line) => [line.label, line.look, line.color]), this.log]);
      if (!this.uplot || before !== after || this.stale) this.build();
      else this.replaceData();
      this.describe();
      this.readOut();
      if (this.details.open) this.fillTable();
    }

    /** Draw the new data; a view that was zoomed in stays where it is. */
    replaceData() {
      const { min, max } = this.uplot.scales.x, [x] = this.uplot.data;
      const zoomed = min > x[0] || max < x[x.length - 1];
      this.uplot.setData(this.data, !zoomed);
      if (zoomed) this.uplot.redraw();
    }

    drawn(values) { return this.log ? values.map((v) => (v > 0 ? Math.log10(v) : null)) : values; }
    format(value) { return this.log ? number(10 ** value) : number(value); }

    build() {
      this.uplot?.destroy();
      this.stale = false;
      this.drawnLog = this.log;
      const axis = { stroke: styleOf("soft"), grid: { stroke: styleOf("rule"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
      const series = [{}], bands = [];
      this.lines.forEach((line, i) => {
        const color = styleOf(COLORS[line.color % COLORS.length]), dots = line.look === "dots";
        const few = line.x.length < 2;
        series.push({
          stroke: color, width: dots ? 0 : 1.8, spanGaps: true, paths: dots ? () => null : undefined,
          points: { show: dots || few || line.look === "marks" || undefined, size: dots ? 4 : 7, fill: color, stroke: color, width: 0 },
        });
        for (const _ of "lh") series.push({ stroke: "transparent", width: 0, spanGaps: true, points: { show: false } });
        bands.push({ series: [3 * i + 3, 3 * i + 2], fill: `${color}2e` });
      });
      this.uplot = new uPlot({
        width: this.plot.clientWidth || 300, height: CHART_HEIGHT, series, bands, legend: { show: false },
        padding: [8, 14, 0, 0],
        cursor: {
          y: false, drag: { x: true, y: false }, sync: { key: "steps" },
          points: { size: 7, show: (u, i) => ((i - 1) % 3 ? false : this.point(u, i)) },
          dataIdx: (u, i, hovered) => hovered,
        },
        scales: { x: { time: false, range: (u, low, high) => [low, high > low ? high : low + 1] }, y: { range: (u) => this.range(u) } },
        axes: [
          { ...axis, space: 46, incrs: [1, 2, 5].flatMap((m) => [...Array(7)].map((_, p) => m * 10 ** p)).sort((a, b) => a - b), size: 26 },
          { ...axis, size: 50, space: 28, incrs: this.log ? [1, 2, 3, 5, 10] : undefined, values: (u, splits) => splits.map((v) => this.tick(v)) },
        ],
        hooks: { setCursor: [(u) => { this.index = u.cursor.idx ?? null; this.readOut(); }] },
      }, this.data, this.plot);
      this.legend.replaceChildren(...this.lines.map((line) => {
        line.value = el("b");
        return el("li", {}, el("span", { class: `key ${COLORS[line.color % COLORS.length]} ${line.look}` }), `${line.label} `, line.value);
      }));
      this.values = this.lines.map((line) => line.value);
    }

    point(u, i) {
      const color = styleOf(COLORS[this.lines[(i - 1) / 3].color % COLORS.length]);
      const made = el("div");
      made.style.background = color;
      return made;
    }

    tick(value) { return this.log ? number(10 ** value) : short(Number(value.toPrecision(6))); }

    /** The range of the vertical axis for the steps in view; counts what lies outside. */
    range(u) {
      const [x] = this.data, from = u.scales.x.min ?? x[0], to = u.scales.x.max ?? x[x.length - 1];
      let low = Infinity, high = -Infinity, all = [];
      this.lines.forEach((line, i) => {
        const values = this.data[3 * i + 1].filter((v, j) => isNumber(v) && x[j] >= from && x[j] <= to);
        if (!values.length) return;
        const [a, b] = scale === "robust" ? robust(values) : [Math.min(...values), Math.max(...values)];
        low = Math.min(low, a);
        high = Math.max(high, b);
        all = all.concat(values);
      });
      if (low > high) [low, high] = [0, 1];
      [low, high] = this.around(low, high);
      const outside = all.filter((v) => v > high || v < low), parts = [];
      if (outside.some((v) => v > high)) parts.push(`up to ${this.format(Math.max(...outside))}`);
      if (outside.some((v) => v < low)) parts.push(`down to ${this.format(Math.min(...outside))}`);
      say(this.cut, parts.length
        ? `${outside.length} ${outside.length > 1 ? "values are" : "value is"} outside, ${parts.join(" and ")}; Scale: full shows all` : "");
      return [low, high];
    }

    /** Round numbers around the values, from 0 where none is negative. */
    around(low, high) {
      if (this.log) return [Math.floor(low), Math.max(Math.ceil(high), Math.floor(low) + 1)];
      if (this.spec.unit && low >= 0 && high <= 1) return [0, 1];
      const from = Math.min(low, 0), room = 0.05 * (high - from);
      return [from < 0 ? from - room : 0, high > from ? high + room : from + 1];
    }

    stepText(index) {
      const x = this.data[0][index], widths = [shown, ...compared].map((name) => runs.get(name)?.width ?? 1);
      const width = Math.max(...widths);
      return width > 1 ? `steps ${x}\u2013${x + width - 1}` : `step ${x}`;
    }

    /** Show the values under the cursor, or the last ones. */
    readOut() {
      if (!this.uplot || !this.values) return;
      const index = this.index !== null && this.index < this.data[0].length ? this.index : null;
      const texts = this.lines.map((line, i) => {
        const values = this.data[3 * i + 1];
        let at = index ?? values.length - 1;
        if (index === null) while (at > 0 && !isNumber(values[at])) at -= 1;
        const [mean, low, high] = [0, 1, 2].map((k) => this.data[3 * i + 1 + k][at]);
        const spread = isNumber(mean) && isNumber(low) && isNumber(high) && low < high && line.look !== "dots";
        const text = isNumber(mean) ? this.format(mean) + (spread && index !== null ? ` (${this.format(low)} to ${this.format(high)})` : "") : NONE;
        say(this.values[i], text);
        return `${line.label} ${text}`;
      });
      const where = index === null ? "last value" : this.stepText(index);
      say(this.at, where);
      this.plot.setAttribute("aria-valuetext", clean(`${where}: ${texts.join(", ")}`));
      this.plot.setAttribute("aria-valuenow", String(this.data[0][index ?? this.data[0].length - 1]));
    }

    describe() {
      const [x] = this.data;
      this.plot.setAttribute("aria-valuemin", String(x[0]));
      this.plot.setAttribute("aria-valuemax", String(x[x.length - 1]));
    }

    key(event) {
      const last = this.data[0].length - 1, at = this.index ?? last;
      const to = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1, PageDown: at - 10, PageUp: at + 10, Home: 0, End: last }[event.key];
      if (event.key === "Escape") this.move(null);
      else if (to === undefined) return;
      else this.move(Math.max(0, Math.min(last, to)));
      event.preventDefault();
    }

    move(index) {
      if (!this.uplot) return;
      const left = index === null ? -10 : this.uplot.valToPos(this.data[0][index], "x");
      this.uplot.setCursor({ left, top: index === null ? -10 : CHART_HEIGHT / 3 });
      this.index = index;
      this.readOut();
    }

    rows() {
      const real = (v) => (isNumber(v) ? (this.log ? Number((10 ** v).toPrecision(6)) : v) : null);
      return [
        ["step", ...this.lines.map((line) => line.label)],
        ...this.data[0].map((x, j) => [x, ...this.lines.map((_, i) => real(this.data[3 * i + 1][j]))]),
      ];
    }

    fillTable() {
      if (!this.details.open || !this.data) return;
      const [head, ...body] = this.rows(), top = this.table.scrollTop;
      this.table.replaceChildren(el("table", {},
        el("caption", { class: "hidden" }, `${this.spec.title}: ${this.spec.note}`),
        el("thead", {}, el("tr", {}, head.map((text) => el("th", { scope: "col" }, text)))),
        el("tbody", {}, body.reverse().map(([step, ...cells]) => el("tr", {}, el("th", { scope: "row" }, step), cells.map((cell) => el("td", {}, number(cell))))))));
      this.table.scrollTop = top;
    }

    download() { download(`${fileName()}-${this.spec.title.toLowerCase().replaceAll(" ", "-")}.csv`, this.rows()); }
    resize() { if (this.uplot && this.plot.clientWidth) this.uplot.setSize({ width: this.plot.clientWidth, height: CHART_HEIGHT }); }
  }

  const fileName = () => String(runs.get(shown)?.head.run_id ?? "run").replace(/[^\w.-]/g, "_");

  function downloadAll() {
    const run = runs.get(shown);
    if (!run) return;
    const rows = order(run).map((index) => [index * run.width, ...run.columns.map((_, i) => {
      const cell = run.rows.get(index)[i];
      return Array.isArray(cell) ? cell[0] : cell ?? null;
    })]);
    download(`${fileName()}.csv`, [["step", ...run.columns], ...rows]);
  }

  // ---- head --------------------------------------------------------------------------------------------------------
  const title = el("h1"), facts = el("p", { class: "soft" }), why = el("p", { class: "why", role: "alert" }), link = el("span", { class: "link", role: "status" });
  const bar = el("div", { class: "bar", role: "progressbar", "aria-label": "steps done", "aria-valuemin": 0, "aria-valuemax": 100 }, el("span"));
  const tiles = el("ul", { class: "tiles" }), picker = el("div", { class: "picker" });

  function showHead() {
    const run = runs.get(shown);
    if (!run) { say(title, "Lockstep"); say(facts, given.live ? "No run has begun here yet." : "This page holds no run."); return; }
    const { head } = run, last = head.last ?? {}, totals = head.totals ?? {};
    const age = Date.now() / 1000 - head.updated;
    const silent = given.live && head.state === "training" && age > 600 ? `no news for ${spell(age)}` : null;
    const state = silent ?? ({ stopped: "stopped early" }[head.state] ?? head.state);
    title.replaceChildren(clean(head.run_id), " ", state ? el("span", { class: `state ${silent ? "stopped" : head.state}` }, state) : "");
    say(why, head.error ?? "");
    why.hidden = !head.error;
    document.title = `${clean(head.run_id)} \u00b7 Lockstep`;
    const written = new Date(1000 * head.updated).toISOString().slice(0, 19).replace("T", " ");
    say(facts, `${head.model ? `${head.model} \u00b7 ` : ""}${spell(totals.seconds ?? 0)} in ${head.steps} steps \u00b7 ${given.live ? "last news" : "written"} ${written} UTC`);
    const done = Math.min(100, (100 * (last.step ?? 0)) / (last.max_steps || 1));
    bar.setAttribute("aria-valuenow", done.toFixed(0));
    bar.firstChild.style.width = `${done.toFixed(1)}%`;
    const servers = head.servers ?? [];
    const up = servers.length ? `${servers.filter((server) => server.up).length} of ${servers.length}` : NONE;
    const push = last.push_seconds;
    const values = [
      ["step", last.max_steps ? `${last.step ?? 0} / ${last.max_steps}` : "0"],
      ["reward", three(last.reward)],
      ["evaluation", three(last.eval_reward)],
      ["lag, batches", number(last.lag)],
      ["bubble", totals.seconds ? `${((100 * (totals.wait_seconds ?? 0)) / totals.seconds).toFixed(0)} %` : NONE],
      ["push", isNumber(push) ? `${number(push)} s` : NONE],
      ["tokens/s, servers", short(last.rollout_tokens_per_second)],
      ["tokens/s, whole steps", short(last.trained_tokens_per_second)],
      ["servers up", up],
    ];
    tiles.replaceChildren(...values.map(([name, value]) => el("li", {}, el("span", {}, name), el("b", {}, value))));
  }

  let drawnPicker = "";
  function showPicker() {
    picker.hidden = names.length < 2;
    const now = JSON.stringify([names, shown, compared]);
    if (picker.hidden || now === drawnPicker) return; // a list that is open must not be replaced
    drawnPicker = now;
    const focused = document.activeElement?.dataset?.pick;
    const choose = el("select", { id: "run", "data-pick": "run", change: (event) => { shown = event.target.value; compared = compared.filter((name) => name !== shown); watch(); } },
      names.map((name) => el("option", { value: name }, name)));
    choose.value = shown;
    const boxes = names.filter((name) => name !== shown).map((name) => el("label", {}, el("input", {
      type: "checkbox", value: name, checked: compared.includes(name), "data-pick": `with ${name}`,
      change: (event) => { compared = event.target.checked ? [...compared, name].slice(-7) : compared.filter((other) => other !== name); watch(); },
    }), " ", name));
    picker.replaceChildren(el("label", { for: "run" }, "Run "), choose, el("fieldset", {}, el("legend", {}, "laid over it"), boxes));
    if (focused) [...picker.querySelectorAll("[data-pick]")].find((part) => part.dataset.pick === focused)?.focus();
  }

  // ---- completions -------------------------------------------------------------------------------------------------
  const ORDERS = {
    all: ["all groups", null],
    best: ["best completions", (a, b) => (b.sample.reward ?? -Infinity) - (a.sample.reward ?? -Infinity)],
    worst: ["worst completions", (a, b) => (a.sample.reward ?? Infinity) - (b.sample.reward ?? Infinity)],
    longest: ["longest completions", (a, b) => long(b.sample) - long(a.sample)],
    flat: ["zero-variance groups", null],
    cut: ["cut-off completions", null],
  };
  const long = (sample) => sample.tokens ?? String(sample.completion ?? "").length;
  const isFlat = (group) => group.samples.length > 1 && new Set(group.samples.map((sample) => sample.reward)).size === 1;
  const seen = { at: null, order: "all", everywhere: false, prompt: null, cards: CARDS };

  const slider = el("input", { type: "range", id: "step", min: 0, max: 0, value: 0, input: (event) => { const { batches } = runs.get(shown); const at = Number(event.target.value); seen.at = at === batches.length - 1 ? null : batchKey(batches[at]); seen.cards = CARDS; seen.prompt = null; showCompletions(); } });
  const where = el("output", { for: "step" });
  const filter = el("select", { id: "filter", change: (event) => { seen.order = event.target.value; seen.cards = CARDS; seen.prompt = null; showCompletions(); } },
    Object.entries(ORDERS).map(([name, [label]]) => el("option", { value: name }, label)));
  const everywhere = el("input", { type: "checkbox", id: "everywhere", change: (event) => { seen.everywhere = event.target.checked; seen.cards = CARDS; seen.prompt = null; showCompletions(); } });
  const cards = el("div", { class: "cards" }), count = el("p", { class: "soft", role: "status" });
  const more = el("button", { type: "button", click: () => { seen.cards += CARDS; showCompletions(); } }, "Show more");
  const completions = el("section", { "aria-labelledby": "completions", hidden: true },
    el("h2", { id: "completions" }, "Completions"),
    el("div", { class: "tools" },
      el("label", { for: "step" }, "Step "), slider, where,
      el("span", { class: "pair" }, el("label", { for: "filter" }, "Show "), filter),
      el("label", { for: "everywhere" }, everywhere, " of all steps kept")),
    count, cards, more);
  const batchKey = (batch) => `${batch.kind} ${batch.step}`;
  const nameOf = (batch) => (batch.kind === "evaluation" ? `evaluation at step ${batch.step}` : `step ${batch.step}`);

  function factsOf(sample) {
    const made = [["reward", three(sample.reward)]], functions = Object.entries(sample.rewards ?? {});
    if (functions.length > 1) made.push(...functions.map(([name, value]) => [name, three(value)]));
    made.push(["advantage", isNumber(sample.advantage) ? (sample.advantage < 0 ? "" : "+") + sample.advantage.toFixed(2) : NONE]);
    if (Array.isArray(sample.spans) && sample.spans.length) {
      const parts = sample.spans.map(([step, , end, kv], i) => `step ${step}${kv === "carried" ? " (carried KV)" : ""}${i < sample.spans.length - 1 ? ` to token ${end}` : ""}`);
      made.push(["weights of", parts.join(", ")]);
    }
    if (isNumber(sample.lag)) made.push(["lag", sample.lag]);
    if (sample.calls) made.push(["calls", `${sample.calls}${sample.trajectories > 1 ? `, in ${sample.trajectories} conversations` : ""}`]);
    const end = { length: ", cut off", repetition: ", repeating" }[sample.finish_reason] ?? "";
    if (sample.tokens) made.push(["tokens", `${sample.tokens}${end}`]);
    return el("p", { class: "facts" }, made.map(([name, value]) => [el("span", {}, `${name} `, el("b", {}, value)), " "]).flat());
  }
  // Of an agent's conversation: what was sampled, and is trained on, is shaded.
  const textOf = (sample) => (Array.isArray(sample.turns)
    ? sample.turns.map(([sampled, text]) => el(sampled ? "mark" : "span", { class: "turn", title: sampled ? "sampled, trained on" : "not trained on" }, text))
    : sample.completion);
  const completionOf = (sample) => el("li", { class: "sample" }, factsOf(sample), el("pre", { class: "completion", tabindex: 0, "aria-label": "completion" }, textOf(sample)));

  const thumbnails = (group) => { const images = (group.images ?? []).filter((url) => url.startsWith("data:image/")); return images.length ? el("p", { class: "images" }, images.map((url, i) => el("img", { src: url, alt: `image ${i + 1} of the prompt` }))) : ""; };

  function groupCard(batch, group, samples, own) {
    const same = own ? [] : runs.get(shown).batches.filter((other) => other.groups.some((g) => g.key === group.key));
    const columns = Object.entries(group.columns ?? {}), rewards = group.samples.map((sample) => sample.reward).filter(isNumber);
    const mean = rewards.length ? rewards.reduce((a, b) => a + b, 0) / rewards.length : null;
    const left = group.size - group.samples.length;
    return el("article", { class: "group" },
      el("h3", {}, nameOf(batch), el("span", {}, "group reward ", el("b", {}, three(mean))), el("span", {}, `${group.size} completions`),
        isFlat(group) ? el("span", { class: "flag" }, "zero variance") : ""),
      own ? "" : el("pre", { class: "prompt", tabindex: 0, "aria-label": "prompt" }, group.prompt),
      own ? "" : thumbnails(group),
      own || !columns.length ? "" : el("dl", { class: "row" }, columns.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
      same.length > 1 ? el("button", { type: "button", class: "same", click: () => { seen.prompt = group.key; showCompletions(); completions.querySelector(".back").focus(); } }, `This prompt over time (${same.length} times)`) : "",
      el("ol", { class: "samples" }, samples.map(completionOf)),
      left > 0 ? el("p", { class: "soft" }, `${left} more of this group are not kept`) : "");
  }

  /** The same prompt at each of its steps, side by side. */
  function overTime(run) {
    const found = run.batches.flatMap((batch) => batch.groups.filter((group) => group.key === seen.prompt).map((group) => [batch, group]))
      .sort(([a], [b]) => a.step - b.step);
    if (!found.length) { seen.prompt = null; return false; }
    const [, newest] = found[found.length - 1];
    say(count, `one prompt, ${found.length} times`);
    cards.replaceChildren(
      el("button", { type: "button", class: "back", click: () => { seen.prompt = null; showCompletions(); filter.focus(); } }, "Back to all prompts"),
      el("pre", { class: "prompt", tabindex: 0, "aria-label": "prompt" }, newest.prompt),
      thumbnails(newest),
      el("dl", { class: "row" }, Object.entries(newest.columns ?? {}).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
      el("div", { class: "side", role: "region", tabindex: 0, "aria-label": "completions of one prompt, by step" }, found.map(([batch, group]) => groupCard(batch, group, group.samples, true))));
    more.hidden = true;
    return true;
  }

  let drawnCompletions = null;
  function showCompletions() {
    const run = runs.get(shown), batches = run?.batches ?? [];
    completions.hidden = batches.length === 0;
    if (!batches.length) return;
    let at = batches.findIndex((batch) => batchKey(batch) === seen.at);
    if (at < 0) { at = batches.length - 1; seen.at = null; }
    slider.max = batches.length - 1;
    slider.value = at;
    slider.disabled = seen.everywhere;
    const text = `${nameOf(batches[at])} (${at + 1} of ${batches.length}${seen.at === null ? ", newest" : ""})`;
    slider.setAttribute("aria-valuetext", text);
    say(where, seen.everywhere ? "all" : text);
    const from = seen.everywhere ? batches : [batches[at]];
    const now = JSON.stringify([shown, seen, from.map(batchKey), seen.prompt && batches.length]);
    if (now === drawnCompletions && drawnFrom === from[from.length - 1]) return;
    drawnCompletions = now;
    drawnFrom = from[from.length - 1];
    if (seen.prompt !== null && overTime(run)) return;
    const groups = from.flatMap((batch) => batch.groups.map((group) => ({ batch, group })));
    const by = ORDERS[seen.order][1];
    let made, total;
    if (by || seen.order === "cut") {
      let single = groups.flatMap(({ batch, group }) => group.samples.map((sample) => ({ batch, group, sample })));
      if (seen.order === "cut") single = single.filter(({ sample }) => sample.finish_reason === "length" || sample.finish_reason === "repetition");
      else single.sort(by);
      total = `${single.length} completions`;
      made = single;
    } else {
      made = (seen.order === "flat" ? groups.filter(({ group }) => isFlat(group)) : groups).map((one) => ({ ...one, sample: null }));
      const kept = made.reduce((sum, { group }) => sum + group.samples.length, 0);
      const all = from.reduce((sum, batch) => sum + batch.completions, 0);
      total = `${made.length} groups, ${kept} completions${seen.order === "all" && kept < all ? ` of ${all}; the others are not kept` : ""}`;
    }
    say(count, made.length ? total : "none here");
    cards.replaceChildren(...made.slice(0, seen.cards).map(({ batch, group, sample }) => groupCard(batch, group, sample ? [sample] : group.samples, false)));
    more.hidden = made.length <= seen.cards;
  }
  let drawnFrom = null;

  // ---- servers and settings ----------------------------------------------------------------------------------------
  const about = el("section");
  let drawnAbout = "";
  function showAbout() {
    const head = runs.get(shown)?.head ?? {}, now = JSON.stringify([shown, head.servers, head.settings]);
    if (now === drawnAbout) return;
    drawnAbout = now;
    const servers = (head.servers ?? []).map((server) => el("li", {},
      el("b", {}, server.url), el("span", { class: server.up ? "up" : "down" }, server.up ? "serving" : "away"),
      el("span", {}, `step ${server.step ?? NONE}`), el("span", {}, `${Number(server.tokens ?? 0).toLocaleString("en-US")} tokens`),
      server.error ? el("p", {}, server.error) : ""));
    const settings = Object.entries(head.settings ?? {}).map(([name, rows]) => el("details", {}, el("summary", {}, name),
      el("dl", { class: "settings" }, Object.entries(rows).map(([key, value]) => el("div", {}, el("dt", {}, key), el("dd", {}, value))))));
    about.replaceChildren(
      ...(servers.length ? [el("h2", {}, "Rollout servers"), el("ul", { class: "servers" }, servers)] : []),
      ...(settings.length ? [el("h2", {}, "Settings"), ...settings] : []));
  }

  // ---- all together ------------------------------------------------------------------------------------------------
  const scales = el("select", { id: "scale", change: (event) => { scale = event.target.value; show(); } },
    [["robust", "without outliers"], ["full", "full"], ["log", "logarithmic"]].map(([value, label]) => el("option", { value }, label)));
  const grid = el("div", { class: "charts" });
  root.replaceChildren(
    el("header", {}, title, facts, why, link, bar), picker, tiles,
    el("div", { class: "tools" }, el("h2", { id: "charts" }, "Charts"), el("span", { class: "pair" }, el("label", { for: "scale" }, "Scale "), scales),
      el("button", { type: "button", click: downloadAll }, "Download all as CSV")),
    grid, completions, about);
  for (const spec of given.charts) {
    const chart = new Chart(spec);
    charts.push(chart);
    grid.append(chart.figure);
  }

  function show() {
    showHead();
    showPicker();
    for (const chart of charts) chart.update();
    showCompletions();
    showAbout();
  }

  let waiting = null;
  function showSoon() {
    waiting ??= setTimeout(() => { waiting = null; show(); }, 100);
  }

  let events = null;
  /** Ask the server for the runs that are shown; a page with its data inside has them already. */
  function watch() {
    show();
    if (!given.live) return;
    events?.close();
    const query = (shown === null ? [] : [shown, ...compared]).map((name) => `run=${encodeURIComponent(name)}`).join("&");
    events = new EventSource(`events${query ? `?${query}` : ""}`);
    events.addEventListener("runs", (event) => { names = JSON.parse(event.data); showSoon(); });
    events.addEventListener("run", (event) => { apply(JSON.parse(event.data)); showSoon(); });
    events.onopen = () => { link.className = "link on"; say(link, "live"); };
    events.onerror = () => { link.className = "link off"; say(link, "not connected; this is what came until then"); };
  }

  if (given.live) setInterval(showHead, 30000); // how long there has been no news
  for (const message of given.messages) apply(message);
  dark.addEventListener("change", () => { for (const chart of charts) chart.stale = true; show(); });
  new ResizeObserver(() => { for (const chart of charts) chart.resize(); }).observe(grid);
  watch();
})();
