// Draws a pruning plan: `mountPlan(root, data)`, data being what report.py's page_data returns. Goes on where the
// dashboard's module ends, in its scope: figures, maps, charts, export, keyboard and themes are its.

const PLAN_PAGES = [
  ["choice", "Choice", "What every expert is worth to the domain, and which ones stay."],
  ["cut", "Cut", "Where each layer's ranking is cut, and how clearly."],
  ["mass", "Kept mass", "How much of each domain's score the kept experts hold."],
  ["agreement", "Agreement", "Would other demonstrations, another domain or another criterion have chosen the same experts?"],
  ["loss", "Loss", "What the masked model loses on held-out data."],
  ["size", "Size", "What the checkpoint weighs before and after."],
];
// what is pruned: neutral, so that colour is what stays
const PRUNED = { light: ["#f0ede6", "#c4beb1"], dark: ["#1d2125", "#4b525a"] };
const LINES = {
  light: ["#0f6a8b", "#c2600f", "#4d7f2a", "#8a4f9e", "#b03a57", "#7a6a2b"],
  dark: ["#62bfe0", "#ffa552", "#9ccf73", "#cfa0e2", "#f58ba3", "#d9c46a"],
};
const HOW_TO = {
  stats: ["Give the statistics that the plan was made from: ", el("code", {}, "--stats STATS"), "."],
  evaluation: ["Measure it by mask, before a file is written: ", el("code", {}, "gatewright prune evaluate"), ", then ", el("code", {}, "--evaluation FILE"), "."],
  size: ["Name the checkpoint: ", el("code", {}, "--model FOLDER"), ", and once it is written the pruned one: ", el("code", {}, "--pruned FOLDER"), "."],
};
const howTo = (name) => HOW_TO[name].map((node) => (typeof node === "string" ? node : node.cloneNode(true)));
const gib = (bytes) => (bytes >= 2 ** 30 ? `${number(bytes / 2 ** 30)} GiB` : bytes >= 2 ** 20 ? `${number(bytes / 2 ** 20)} MiB` : `${number(bytes / 2 ** 10)} KiB`);
function signed(value, places = 3) {
  if (value == null || !Number.isFinite(value)) return "–";
  const text = Math.abs(value).toFixed(places);
  return Number(text) === 0 ? text : `${value > 0 ? "+" : "−"}${text}`;
}
/** Decimal places that tell an evaluation's changes apart. */
const placesOf = ({ cases }) => (Math.max(0, ...cases.flatMap((one) => Object.values(one.delta).map(Math.abs))) < 0.1 ? 4 : 3);
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const leastAt = (values) => values.reduce((best, value, i) => (value < values[best] ? i : best), 0);

class PlanPages extends Pages {
  constructor(root, data, state) {
    super(root, data, state, { layer: 0, of: "ranked", sort: "id", cell: null, evaluation: 0, case: null });
    this.kept = data.plan.keep.map((ids) => new Set(ids));
  }
  get pages() { return PLAN_PAGES; }
  get drawers() { return DRAW_PLAN; }
  get name() { return this.data.title; }
  get layer() { return Math.min(this.state.layer, this.data.layers.length - 1); }
  get domains() { return Object.keys(this.data.plan.domains); }
  get colours() { return LINES[this.dark ? "dark" : "light"]; }
  layerName(layer) { return `layer ${this.data.layers[layer]}`; }
  /** The scores shown: as they were ranked, or of one domain; multiples of the layer's mean. */
  get scores() { const { scores } = this.data; return scores?.domains[this.state.of] ?? scores?.ranked ?? null; }

  here(name) {
    const { plan, layers, margins, kept_mass: held, stability } = this.data, at = this.layer, here = [];
    const where = this.layerName(at);
    if (name === "mass") for (const [domain, row] of Object.entries(held.domains)) here.push([domain, `${percent(row[at])} of ${held.measure} in ${where}, ${percent(mean(row))} on average`]);
    if (name === "margin" && margins) here.push(["Here", `${percent(margins[at])} in ${where}`]);
    if (name === "stability" && stability.layers) here.push(["Here", `${percent(stability.layers[at])} in ${where}`]);
    if (["mass", "stability", "shots", "overlap"].includes(name)) here.push(["Chance here", percent(plan.counts[at] / this.data.experts[at])]);
    if (name === "score") here.push(["Here", `${plan.criterion}; ${where} keeps ${plan.counts[at]} of ${this.data.experts[at]}`]);
    return here;
  }

  get keys() {
    return [["1 – 6", "pages"], ["[  ]", "layer before, layer after"], ["o", "order by id or by score"], ["Shift ← → ↑ ↓", "on a map: another cell"], ["Enter", "on a cell: look at its layer's cut"], ["t", "dark or light"], ["?", "this help"]];
  }
  actions() {
    return {
      "[": () => this.set({ layer: Math.max(0, this.layer - 1), cell: null }), "]": () => this.set({ layer: Math.min(this.data.layers.length - 1, this.layer + 1), cell: null }),
      o: () => this.set({ sort: this.state.sort === "id" ? "score" : "id" }),
    };
  }

  build() {
    const { parts } = this;
    parts.layer = el("select", { "aria-label": "Layer", onchange: (event) => this.set({ layer: Number(event.target.value), cell: null }) });
    parts.of = el("select", { "aria-label": "Scores of", onchange: (event) => this.set({ of: event.target.value }) });
    const label = (text, part) => el("label", {}, text, part);
    const several = Object.keys(this.data.scores?.domains ?? {}).length > 1;
    return [label("Layer", parts.layer), several ? label("Scores of", parts.of) : null].filter(Boolean);
  }
  controls() {
    const { data, parts, state } = this, { plan, model } = data;
    options(parts.layer, data.layers.map((layer, i) => [String(i), String(layer)]), String(this.layer));
    options(parts.of, [["ranked", "all domains, as ranked"], ...this.domains.map((name) => [name, name])], this.domains.includes(state.of) ? state.of : "ranked");
    parts.meta.textContent = [`${model.model_type}, ${data.layers.length} MoE layer${data.layers.length === 1 ? "" : "s"}`, `${keptText(data)} experts stay`,
      `${plain(plan.top_k)} a token`, `chosen by ${plan.criterion} on ${this.domains.join(" + ") || "nothing"}`, `router: ${plan.policy}`].join(" · ");
  }
  footer() {
    const { data } = this, { plan } = data;
    const lines = [
      `Plan ${plan.hash.slice(0, 12)}, made by gatewright ${plan.version}: criterion ${plan.criterion}, ${plan.budget} budget${this.domains.length > 1 ? `, ${plan.mixture} over domains` : ""}.`,
      data.scores ? `${this.domains.map((name) => `${name}: ${whole(data.scores.demos[name])} demonstrations, ${whole(data.scores.tokens[name])} tokens`).join("; ")}.` : "",
      `Shown by ${data.library}.`];
    return [el("div", {}, lines.filter(Boolean).map((line) => el("p", {}, line)))];
  }
}

function keptText({ plan, experts }) {
  const counts = [...new Set(plan.counts)].sort((x, y) => x - y), sizes = [...new Set(experts)].sort((x, y) => x - y);
  return `${counts.length === 1 ? counts[0] : `${counts[0]} to ${counts.at(-1)}`} of ${sizes.length === 1 ? sizes[0] : `${sizes[0]} to ${sizes.at(-1)}`}`;
}

const scorePlace = (ratio) => (Math.log2(Math.max(ratio, 1e-9)) + 3) / 6;
const keptStops = (theme) => theme.sequential.slice(1);
function scoreColour(app, ratio, kept) {
  return ratio == null ? null : mix(kept ? keptStops(app.theme) : PRUNED[app.dark ? "dark" : "light"], scorePlace(ratio));
}
/** Expert ids of a layer in the order shown. */
function shownOrder(app, layer, scores) {
  const ids = range(app.data.experts[layer]);
  return app.state.sort === "id" ? ids : ids.sort((x, y) => app.kept[layer].has(y) - app.kept[layer].has(x) || scores[layer][y] - scores[layer][x] || x - y);
}
const legendLine = (entries) => el("div", { class: "legend" }, entries.map(([text, colour, dash]) => el("span", {}, el("i", { style: dash ? `border-top:2px dashed ${colour}` : `background:${colour}` }), text)));
const byLayer = (app, rows) => [["layer", ...Object.keys(rows)], ...app.data.layers.map((layer, l) => [layer, ...Object.values(rows).map((row) => row[l])])];

const DRAW_PLAN = {
  choice(app, page) {
    const { data } = app;
    planTiles(app, page);
    if (data.plan.notes.length) page.append(el("ul", { class: "alerts", "aria-label": "Notes" }, data.plan.notes.map((note) => el("li", {}, el("p", {}, note)))));
    const grid = el("div", { class: "grid" }), { scores } = app;
    if (!scores) { page.append(grid); app.missing(grid, "Scores", howTo("stats")); return countsFigure(app, grid); }
    page.append(choice("Order of experts", [["id", "id"], ["score", "score"]], app.state.sort, (sort) => app.set({ sort })), grid);
    const E = data.model.num_experts, orders = range(data.layers.length).map((l) => shownOrder(app, l, scores));
    const of = data.scores.domains[app.state.of] ? ` for ${app.state.of}` : "";
    app.figure(grid, {
      id: "scores", title: `Score of every expert${of}`, explain: "score", wide: true,
      note: `Coloured experts stay, grey ones go${app.state.sort === "id" ? "" : "; each layer in the order of its ranking"}. A cross: kept, though no demonstration used it. Click a cell to see where its layer is cut.`,
      draw: (width) => [heatMap(app, { width, rows: data.layers.length, columns: E, label: "Score of every expert of every layer",
        colour: (r, c) => scoreColour(app, scores[r][orders[r][c]], app.kept[r].has(orders[r][c])),
        cellText: (r, c) => `${scores[r][orders[r][c]].toFixed(scores[r][orders[r][c]] < 9.95 ? 1 : 0)}×`,
        mark: (r, c) => (app.kept[r].has(orders[r][c]) && scores[r][orders[r][c]] === 0 ? "none" : null),
        rowText: (r) => String(data.layers[r]), columnText: (c) => String(app.state.sort === "id" ? c : c + 1), rowTitle: "layer", columnTitle: app.state.sort === "id" ? "expert" : "place",
        chosen: () => ({ row: app.layer, column: app.state.cell == null ? null : orders[app.layer].indexOf(app.state.cell) }),
        legend: { stops: keptStops(app.theme), texts: ["⅛×", "1×", "8×"], title: "of the layer's mean" },
        pick: (r, c) => app.set({ layer: r, cell: orders[r][c], page: "cut" }),
        tip: (r, c) => scoreTip(app, r, orders[r][c]) })],
      csv: () => [["layer", "expert", "kept", `${data.plan.criterion} as a multiple of the layer's mean`], ...data.layers.flatMap((layer, l) => range(data.experts[l]).map((e) => [layer, e, app.kept[l].has(e) ? 1 : 0, scores[l][e]]))],
    });
    countsFigure(app, grid);
  },

  cut(app, page) {
    const { data, theme, layer } = app, grid = el("div", { class: "grid" }), { scores } = app;
    page.append(grid);
    if (scores) app.figure(grid, {
      id: "profile", title: `Ranking of ${app.layerName(layer)}`, explain: "score", wide: true,
      note: `${data.plan.counts[layer]} of ${data.experts[layer]} stay.${data.margins ? ` At the cut, the last that stays is ${percent(data.margins[layer])} ahead.` : ""}${app.state.cell == null ? "" : ` Marked: expert ${app.state.cell}.`}`,
      draw: (width) => profile(app, layer, scores[layer], width),
      csv: () => [["place", "expert", "kept", "multiple of the layer's mean"], ...orderByScore(app, layer, scores[layer]).map((e, i) => [i + 1, e, app.kept[layer].has(e) ? 1 : 0, scores[layer][e]])],
    });
    else app.missing(grid, "Ranking", howTo("stats"));
    if (data.margins) {
      app.figure(grid, {
        id: "margins", title: "Margin at the cut, by layer", explain: "margin", note: `Median ${percent(median(data.margins))}; least ${percent(Math.min(...data.margins))} in ${app.layerName(leastAt(data.margins))}.`,
        draw: (width) => lineChart(app, { width, label: "Margin at the cut by layer", xText: "layer", yLow: 0, yText: percent, points: true, series: [{ x: data.layers, y: data.margins, colour: theme.a, label: "margin", text: percent }] }),
        csv: () => byLayer(app, { margin: data.margins }),
      });
      const sorted = [...data.margins].sort((x, y) => x - y);
      app.figure(grid, {
        id: "close", title: "Layers with the closest cuts", explain: "margin", png: false, note: "There, other demonstrations may choose otherwise. Click a layer to see its ranking.",
        draw: () => el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ["layer", "margin", "halves agree on"].map((text) => el("th", { scope: "col" }, text)))),
          el("tbody", {}, range(data.layers.length).sort((x, y) => data.margins[x] - data.margins[y]).slice(0, 7).map((l) => el("tr", {}, el("td", {}, el("button", { type: "button", class: "explain", "data-layer": l, onclick: () => app.set({ layer: l, cell: null }) }, app.layerName(l))), el("td", {}, percent(data.margins[l])), el("td", {}, data.stability.layers ? percent(data.stability.layers[l]) : "–")))))),
        csv: () => [["layer", "margin"], ...sorted.map((margin) => [data.layers[data.margins.indexOf(margin)], margin])],
      });
    } else app.missing(grid, "Margin", ["Max-min chooses a set, not the first of a ranking, so there is no cut between two neighbours."]);
  },

  mass(app, page) {
    const { data, theme } = app, rows = data.kept_mass.domains, names = Object.keys(rows), grid = el("div", { class: "grid" });
    page.append(grid);
    if (!names.length) return app.missing(grid, "Kept mass", ["The plan holds none: no domain's scores were known when it was made."]);
    const chance = data.plan.counts.map((count, l) => count / data.experts[l]);
    const legend = () => (names.length > 1 ? legendLine(names.map((name, i) => [name, app.colours[i % 6]])) : null);
    app.figure(grid, {
      id: "mass", title: "Kept score mass, by layer", explain: "mass", wide: true, note: `Share of ${data.kept_mass.measure} that the kept experts hold. Dashed: chance, the share of experts kept.`,
      draw: (width) => [lineChart(app, { width, height: 250, label: "Kept score mass by layer", xText: "layer", yHigh: 1, yText: percent, points: data.layers.length < 70,
        series: [...names.map((name, i) => ({ x: data.layers, y: rows[name], colour: app.colours[i % 6], label: name, text: percent, width: 2 })), { x: data.layers, y: chance, colour: theme.faint, dash: "4 4", label: "chance", text: percent }] }), legend()].filter(Boolean),
      csv: () => byLayer(app, { ...rows, chance }),
    });
    const curves = data.scores?.curves ?? {};
    if (Object.keys(curves).length) {
      const xs = range(data.model.num_experts).map((i) => i + 1), counts = [...new Set(data.plan.counts)];
      app.figure(grid, {
        id: "curve", title: "What other counts would keep", explain: "mass", note: `Mean over layers, by the same ranking.${counts.length === 1 ? ` Vertical: the plan's ${counts[0]}.` : ""} Dashed: chance.`,
        draw: (width) => lineChart(app, { width, height: 250, label: "Kept score mass by number of experts kept", xText: "experts kept", yLow: 0, yHigh: 1, yText: percent,
          series: [...Object.entries(curves).map(([name, row], i) => ({ x: xs, y: row, colour: app.colours[i % 6], label: name, text: percent, width: 2 })),
            { x: xs, y: xs.map((x) => x / xs.length), colour: theme.faint, dash: "4 4", label: "chance", text: percent },
            ...(counts.length === 1 ? [{ x: [counts[0], counts[0]], y: [0, 1], colour: theme.ink, opacity: 0.45, width: 1.2 }] : [])] }),
        csv: () => [["experts kept", ...Object.keys(curves)], ...xs.map((x, i) => [x, ...Object.values(curves).map((row) => row[i])])],
      });
    } else app.missing(grid, "What other counts would keep", howTo("stats"));
    app.figure(grid, {
      id: "mass-table", title: "Who pays", explain: "mass", png: false, note: "By domain: on average, and in the layer that keeps least.",
      draw: () => el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ["domain", "weight", "kept mass", "least", "in layer"].map((text) => el("th", { scope: "col" }, text)))),
        el("tbody", {}, names.map((name) => { const at = leastAt(rows[name]); return el("tr", {}, [name, number(data.plan.domains[name]), percent(mean(rows[name])), percent(rows[name][at]), String(data.layers[at])].map((text) => el("td", {}, text))); })))),
      csv: () => [["domain", "weight", "mean", "least"], ...names.map((name) => [name, data.plan.domains[name], mean(rows[name]), Math.min(...rows[name])])],
    });
  },

  agreement(app, page) {
    const { data, theme } = app, { stability, overlaps } = data, grid = el("div", { class: "grid" });
    page.append(grid);
    if (stability.layers) {
      app.figure(grid, {
        id: "halves", title: "Agreement of halves, by layer", explain: "stability", note: `${percent(stability.split_half)} on average, of ${percent(stability.chance)} by chance.`,
        draw: (width) => lineChart(app, { width, height: 230, label: "Agreement of halves by layer", xText: "layer", yHigh: 1, yText: percent, points: true, lines: [{ y: 0.9, label: "90 % is wanted" }],
          series: [{ x: data.layers, y: stability.layers, colour: theme.a, label: "halves agree on", text: percent, width: 2 }] }),
        csv: () => byLayer(app, { "agreement of halves": stability.layers }),
      });
      const shots = Object.entries(stability.shots);
      if (shots.length > 1) app.figure(grid, {
        id: "shots", title: "Choice from few demonstrations", explain: "shots", note: `Shared with the choice from all ${Object.values(stability.demos).map(whole).join(" + ")}. Dashed: chance.`,
        draw: (width) => lineChart(app, { width, height: 230, label: "Overlap of the choice from few demonstrations with the plan", xText: "demonstrations", yHigh: 1, yText: percent, points: true, lines: [{ y: stability.chance, label: "chance" }],
          series: [{ x: shots.map(([n]) => Number(n)), y: shots.map(([, value]) => value), colour: theme.b, label: "shared with the plan", text: percent, width: 2 }] }),
        csv: () => [["demonstrations", "shared with the plan"], ...shots.map(([n, value]) => [Number(n), value])],
      });
    } else app.missing(grid, "Agreement of halves", [`${stability.reason}.`]);
    if (!overlaps) return app.missing(grid, "Overlap of domains and criteria", howTo("stats"));
    const matrix = (id, title, note, pairs) => app.figure(grid, {
      id, title, explain: "overlap", note,
      draw: (width) => namedMatrix(app, pairs, Math.min(width, 150 + 62 * pairs.names.length), overlaps.chance),
      csv: () => [["", ...pairs.names], ...pairs.names.map((name, r) => [name, ...pairs.mean[r]])],
    });
    if (overlaps.domains) matrix("domains", "Overlap between domains", "Each domain alone, and the plan.", overlaps.domains);
    if (overlaps.criteria) matrix("criteria", "Overlap between criteria", `The plan is by ${data.plan.criterion}; chance ${percent(overlaps.chance)}.`, overlaps.criteria);
    const others = [overlaps.domains, overlaps.criteria].filter(Boolean)
      .flatMap((pairs) => pairs.names.slice(1).map((name, i) => [name, pairs.first[i + 1]]))
      .filter(([name], i, all) => all.findIndex(([other]) => other === name) === i);
    app.figure(grid, {
      id: "overlap-layers", title: "Overlap with the plan, by layer", explain: "overlap", wide: true, note: `Kept experts that another choice shares with the plan, at the same count.`,
      draw: (width) => heatMap(app, { width, indent: 104, rows: others.length, columns: data.layers.length, tall: 22, label: "Overlap of other choices with the plan by layer",
        colour: (r, c) => mix(theme.sequential, others[r][1][c]), cellText: (r, c) => percent(others[r][1][c]), rowText: (r) => clip(others[r][0], 15), columnText: (c) => String(data.layers[c]), columnTitle: "layer",
        legend: { stops: theme.sequential, texts: ["0", "½", "1"], title: "shared" }, pick: (r, c) => app.set({ layer: c }),
        tip: (r, c) => [el("b", {}, `${others[r][0]}, ${app.layerName(c)}`), tipRow("shared with the plan", percent(others[r][1][c])), tipRow("chance", percent(data.plan.counts[c] / data.experts[c]))] }),
      csv: () => byLayer(app, Object.fromEntries(others)),
    });
  },

  loss(app, page) {
    const { data, state } = app;
    if (!data.evaluations.length) return app.missing(page, "Loss", howTo("evaluation"));
    const at = Math.min(state.evaluation, data.evaluations.length - 1), evaluation = data.evaluations[at];
    if (data.evaluations.length > 1) page.append(choice("Evaluation", data.evaluations.map((one, i) => [i, one.name]), at, (picked) => app.set({ evaluation: picked, case: null })));
    const grid = el("div", { class: "grid" }), names = Object.keys(evaluation.loss), lines = caseLines(app, evaluation.cases);
    page.append(grid);
    const counts = new Set(evaluation.cases.map((one) => one.count ?? one.keep));
    // few curves are read one by one, many domains or a single count better side by side
    if (evaluation.cases.length && (names.length > 4 || counts.size === 1)) deltaFigure(app, grid, evaluation, names);
    else if (evaluation.cases.length) for (const name of names) app.figure(grid, {
      id: `loss-${names.indexOf(name)}`, title: `Loss on ${name}`, explain: "loss", wide: names.length === 1,
      note: `Against the whole model's ${number(evaluation.loss[name])} ${data.unit}.`,
      draw: (width) => [lineChart(app, { width, height: 240, label: `Loss on ${name} by number of experts kept`, xText: "experts kept", yText: (value) => `${value > 0 ? "+" : ""}${short(value)}`, points: true, lines: [{ y: 0, label: "whole model" }],
        series: lines.map((line) => ({ x: line.x, y: line.cases.map((one) => one.delta[name]), colour: line.colour, dash: line.dash, label: line.label, text: signed, width: 1.8 })) }),
        legendLine(lines.map((line) => [line.label, line.colour, line.dash]))],
      csv: () => [["criterion", "chosen on", "mode", "experts kept", "loss", "difference"], ...evaluation.cases.map((one) => [one.criterion, one.domains.join(" + "), one.mode, one.count, one.loss[name], one.delta[name]])],
    });
    app.figure(grid, {
      id: "cases", title: "All that was measured", explain: "loss", wide: true, png: false, note: `Loss in ${data.unit}, the difference to the whole model${moves(evaluation) ? ", and the share of routed pairs that have to move" : ""}. Bold: this plan.${moves(evaluation) ? " Click a row's criterion to see its layers below." : ""}`,
      draw: () => caseTable(app, evaluation, names), csv: () => caseRows(evaluation, names),
    });
    const own = evaluation.cases.findIndex((one) => one.plan_hash === data.plan.hash), shown = state.case ?? Math.max(0, own), one = evaluation.cases[shown];
    if (one && Object.values(one.layers).some((row) => row.length === data.layers.length)) app.figure(grid, {
      id: "rerouted", title: `Re-routed pairs by layer: ${caseText(one)}`, explain: "rerouted", wide: true, note: "Share of the whole model's routed pairs whose expert is pruned, on held-out text.",
      draw: (width) => [lineChart(app, { width, height: 230, label: "Re-routed pairs by layer", xText: "layer", yLow: 0, yText: percent, points: data.layers.length < 70,
        series: names.map((name, i) => ({ x: data.layers, y: one.layers[name], colour: app.colours[i % 6], label: name, text: percent, width: 2 })) }), names.length > 1 ? legendLine(names.map((name, i) => [name, app.colours[i % 6]])) : null].filter(Boolean),
      csv: () => byLayer(app, one.layers),
    });
  },

  size(app, page) {
    const { data } = app, { sizes } = data, grid = el("div", { class: "grid" });
    page.append(grid);
    if (!sizes) return app.missing(grid, "Size", howTo("size"));
    const rows = [["before", sizes.before], ["predicted", sizes.after], ...(sizes.real == null ? [] : [["real", sizes.real]])];
    app.figure(grid, {
      id: "size", title: "Weights on disk", explain: "size", wide: true, note: `${gib(sizes.before - sizes.after)} fewer, ${percent(1 - sizes.after / sizes.before)} of the checkpoint.${sizes.real == null ? "" : sizes.real === sizes.after ? " The pruned checkpoint has the predicted size to the byte." : ` The pruned checkpoint has ${whole(Math.abs(sizes.real - sizes.after))} bytes ${sizes.real > sizes.after ? "more" : "less"} than predicted.`}`,
      draw: (width) => sizeBars(app, rows, width), csv: () => [["", "bytes"], ...rows],
    });
    if (sizes.parallel?.length) app.figure(grid, {
      id: "parallel", title: "Weights of each of several GPUs", explain: "size", png: false, wide: true, note: "Experts and matrices divided over tensor-parallel ranks; activations and caches come on top.",
      draw: () => el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ["GPUs", "before", "after"].map((text) => el("th", { scope: "col" }, text)))),
        el("tbody", {}, sizes.parallel.map((row) => el("tr", {}, [whole(row.gpus), gib(row.before), gib(row.after)].map((text) => el("td", {}, text))))))),
      csv: () => [["GPUs", "before", "after"], ...sizes.parallel.map((row) => [row.gpus, row.before, row.after])],
    });
  },
};

function planTiles(app, page) {
  const { data } = app, { plan, kept_mass: held, margins, stability, sizes } = data, tiles = el("div", { class: "tiles" });
  const tile = (name, title, value, small) => tiles.append(el("div", { class: "tile" }, name ? app.explained(name, title) : el("span", { class: "explain" }, title), el("b", {}, value), el("small", {}, small.replaceAll(" %", "\u00a0%"))));
  tile("score", "Experts kept", keptText(data), data.layers.length === 1 ? "in one layer" : new Set(plan.counts).size > 1 ? `over ${whole(data.layers.length)} layers` : `in each of ${whole(data.layers.length)} layers`);
  const masses = Object.entries(held.domains);
  if (masses.length) {
    const [name, row] = masses.reduce((worst, one) => (mean(one[1]) < mean(worst[1]) ? one : worst));
    const at = leastAt(row);
    tile("mass", "Kept score mass", percent(mean(row)), `${masses.length > 1 ? `of ${name}, who keeps least; ` : ""}least ${percent(row[at])} in ${app.layerName(at)}`);
  }
  if (margins) tile("margin", "Margin at the cut", percent(median(margins)), `median; least ${percent(Math.min(...margins))}`);
  if (stability.layers) tile("stability", "Halves agree on", percent(stability.split_half), `of ${Object.values(stability.demos).map(whole).join(" + ")} demonstrations; chance ${percent(stability.chance)}`);
  for (const evaluation of data.evaluations) {
    const own = evaluation.cases.find((one) => one.plan_hash === plan.hash && one.mode !== "no-reroute");
    if (!own) continue;
    const name = app.domains.find((domain) => domain in own.delta), all = Object.values(own.delta);
    const where = name == null ? `on average over ${all.length} classes` : `on ${name}`;
    tile("loss", "Loss by mask", signed(name == null ? mean(all) : own.delta[name], placesOf(evaluation)), `${data.unit} ${where}${own.rerouted?.[name] == null ? "" : `; ${percent(own.rerouted[name])} of pairs move`}`);
    break;
  }
  if (sizes) tile("size", "Weights", gib(sizes.real ?? sizes.after), `before: ${gib(sizes.before)}`);
  page.append(tiles);
}

function countsFigure(app, grid) {
  const { data, theme } = app;
  if (new Set(data.plan.counts).size === 1) return;
  app.figure(grid, {
    id: "counts", title: "Experts kept, by layer", wide: true, note: "All layers' experts were ranked together, so layers keep different numbers.",
    draw: (width) => lineChart(app, { width, label: "Experts kept by layer", xText: "layer", yLow: 0, yHigh: data.model.num_experts, points: true,
      yText: plain, series: [{ x: data.layers, y: data.plan.counts, colour: theme.a, label: "kept", width: 2 }, { x: data.layers, y: data.experts, colour: theme.faint, dash: "4 4", label: "before" }] }),
    csv: () => byLayer(app, { kept: data.plan.counts, before: data.experts }),
  });
}

function scoreTip(app, layer, expert) {
  const { data } = app, { scores } = data, all = app.scores[layer];
  const place = 1 + all.filter((value, e) => value != null && (value > all[expert] || (value === all[expert] && e < expert))).length;
  return [el("b", {}, `${app.layerName(layer)}, expert ${expert}`), tipRow(app.kept[layer].has(expert) ? "stays" : "goes", `place ${place} of ${data.experts[layer]}`, scoreColour(app, all[expert], app.kept[layer].has(expert))),
    tipRow("of the layer's mean", times(all[expert])), ...Object.entries(scores.domains).map(([name, rows]) => tipRow(`for ${name}`, times(rows[layer][expert])))];
}

const orderByScore = (app, layer, row) => range(app.data.experts[layer]).sort((x, y) => row[y] - row[x] || x - y);

/** A layer's experts from best to worst: bars, coloured where they stay, the cut where the colour ends. */
function profile(app, layer, row, width) {
  const { theme, data } = app, ids = orderByScore(app, layer, row), E = ids.length, height = 250;
  const left = 46, right = 12, top = 14, bottom = 32, high = Math.max(1, row[ids[0]] ?? 1) * 1.04, wide = (width - left - right) / E;
  const y = (value) => top + (1 - value / high) * (height - top - bottom);
  const svg = el("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Scores of ${app.layerName(layer)} from best to worst`, "font-family": FONT, "font-size": 11 });
  for (const tick of ticks(0, high, 5)) {
    svg.append(el("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), stroke: theme.grid }));
    svg.append(el("text", { x: left - 7, y: y(tick) + 3.5, "text-anchor": "end", fill: theme.soft }, `${short(tick)}×`));
  }
  ids.forEach((expert, i) => {
    const stays = app.kept[layer].has(expert), value = row[expert] ?? 0, gap = wide > 4 ? 1 : 0;
    const tall = Math.max(1, y(0) - y(value));
    svg.append(el("rect", { x: left + i * wide, y: y(0) - tall, width: Math.max(0.5, wide - gap), height: tall, fill: stays ? theme.a : PRUNED[app.dark ? "dark" : "light"][1], "data-expert": expert }));
    if (expert === app.state.cell) svg.append(el("path", { d: `M${left + (i + 0.5) * wide} ${y(value) - 3}l-4 -7h8z`, fill: theme.b }));
  });
  const count = data.plan.counts[layer];
  if (ids.slice(0, count).every((expert) => app.kept[layer].has(expert)) && count < E) {
    const x = left + count * wide - (wide > 4 ? 0.5 : 0);
    svg.append(el("line", { x1: x, x2: x, y1: top, y2: height - bottom, stroke: theme.ink, "stroke-dasharray": "4 3", opacity: 0.7 }));
    const end = x > width - 150;
    svg.append(el("text", { x: x + (end ? -6 : 6), y: top + 8, "text-anchor": end ? "end" : "start", fill: theme.soft }, `cut after ${count}`));
  }
  axis(svg, theme, (place) => left + (place - 0.5) * wide, 1, E, left, width - right, height - bottom, "place");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), i = Math.floor((((event.clientX - box.left) * width) / box.width - left) / wide);
    i >= 0 && i < E ? app.tip(event, ...scoreTip(app, layer, ids[i])) : app.tip();
  });
  svg.addEventListener("pointerleave", () => app.tip());
  return svg;
}

/** Overlaps of all pairs, with whole names at both sides. */
function namedMatrix(app, { names, mean: values }, width, chance) {
  const { theme } = app, size = names.length, left = 104, top = 74, side = Math.min(56, (width - left - 8) / size), height = top + size * side + 6;
  const svg = el("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Overlap of ${names.join(", ")}`, "font-family": FONT, "font-size": 11 });
  names.forEach((name, r) => {
    svg.append(el("text", { x: left - 8, y: top + (r + 0.5) * side + 3.5, "text-anchor": "end", fill: r ? theme.soft : theme.ink, "font-weight": r ? 400 : 600 }, clip(name, 16)));
    svg.append(el("text", { transform: `translate(${left + (r + 0.5) * side},${top - 8}) rotate(-42)`, fill: r ? theme.soft : theme.ink, "font-weight": r ? 400 : 600 }, clip(name, 14)));
    names.forEach((other, c) => {
      const share = values[r][c], fill = mix(theme.sequential, share);
      const [red, green, blue] = fill.match(/\d+/g).map(Number), ink = 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? THEMES.light.ink : THEMES.dark.ink;
      const box = el("g", {}, el("rect", { x: left + c * side, y: top + r * side, width: side - 1, height: side - 1, fill }),
        side >= 30 ? el("text", { x: left + (c + 0.5) * side, y: top + (r + 0.5) * side + 3.5, "text-anchor": "middle", fill: ink, "font-size": 10.5 }, side >= 38 ? percent(share) : (100 * share).toFixed(0)) : null);
      box.addEventListener("pointermove", (event) => app.tip(event, el("b", {}, r === c ? name : `${name} and ${other}`), tipRow("shared", percent(share)), tipRow("chance", percent(chance))));
      box.addEventListener("pointerleave", () => app.tip());
      svg.append(box);
    });
  });
  return svg;
}

const caseText = (one) => [one.criterion, `${one.count ?? percent(one.keep)} kept`, one.domains.length ? `chosen on ${one.domains.join(" + ")}` : "", one.mode === "no-reroute" ? "no re-routing" : ""].filter(Boolean).join(", ");

/** Cases that differ in the count alone make a line. */
function caseLines(app, cases) {
  const several = (pick) => new Set(cases.map(pick)).size > 1;
  const name = (one) => [one.criterion, several((other) => other.domains.join()) ? `on ${one.domains.join(" + ")}` : "", several((other) => other.mode) && one.mode === "no-reroute" ? "no re-routing" : ""].filter(Boolean).join(" ");
  const lines = new Map();
  for (const one of cases) lines.set(name(one), [...(lines.get(name(one)) ?? []), one]);
  const { colours } = app;
  return [...lines].map(([label, found], i) => {
    const sorted = found.sort((x, y) => (x.count ?? x.keep) - (y.count ?? y.keep));
    return { label, cases: sorted, x: sorted.map((one) => one.count ?? one.keep), colour: label.startsWith("random") ? app.theme.faint : colours[i % colours.length], dash: label.startsWith("random") || i >= colours.length ? "5 4" : null };
  });
}

/** The difference of every case on every domain, as a map. */
function deltaFigure(app, grid, evaluation, names) {
  const { cases } = evaluation, { theme, data } = app, places = placesOf(evaluation), most = Math.max(1e-9, ...cases.flatMap((one) => names.map((name) => Math.abs(one.delta[name]))));
  app.figure(grid, {
    id: "delta", title: "Change of the loss", explain: "loss", wide: true, note: `In ${data.unit}: what each choice adds to the whole model's loss. Orange is worse, blue better.`,
    draw: (width) => heatMap(app, { width, indent: Math.min(168, 0.42 * width), rows: cases.length, columns: names.length, tall: 26, label: "Change of the loss of every case on every domain",
      colour: (r, c) => mix(theme.diverging, 0.5 + cases[r].delta[names[c]] / (2 * most)), cellText: (r, c) => signed(cases[r].delta[names[c]], places), rowText: (r) => clip(`${cases[r].criterion}, ${cases[r].count ?? percent(cases[r].keep)} kept${cases[r].mode === "no-reroute" ? ", no re-routing" : ""}`, Math.floor(Math.min(168, 0.42 * width) / 6)), columnText: (c) => clip(names[c], 12),
      legend: { stops: theme.diverging, texts: [signed(-most, places), "0", signed(most, places)], title: "against the whole model" },
      tip: (r, c) => [el("b", {}, `${caseText(cases[r])}: ${names[c]}`), tipRow("loss", number(cases[r].loss[names[c]])), tipRow("change", signed(cases[r].delta[names[c]], places + 1))] }),
    csv: () => caseRows(evaluation, names),
  });
}
const moves = (evaluation) => evaluation.cases.some((one) => one.rerouted != null);

const caseRows = (evaluation, names) => [["criterion", "chosen on", "experts kept", "mode", ...names.flatMap((name) => [`loss on ${name}`, `difference on ${name}`, `re-routed on ${name}`])],
  ...evaluation.cases.map((one) => [one.criterion, one.domains.join(" + "), one.count ?? one.keep, one.mode, ...names.flatMap((name) => [one.loss[name], one.delta[name], one.rerouted?.[name]])])];

function caseTable(app, evaluation, names) {
  const { data } = app, moved = moves(evaluation), places = placesOf(evaluation), heads = ["criterion", "chosen on", "kept", "mode", ...names.flatMap((name) => [name, "Δ", ...(moved ? ["moved"] : [])])];
  const whole_ = el("tr", {}, ["whole model", "", "", "", ...names.flatMap((name) => [number(evaluation.loss[name]), "", ...(moved ? [""] : [])])].map((text) => el("td", {}, text)));
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, heads.map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, whole_, evaluation.cases.map((one, i) => el("tr", one.plan_hash === data.plan.hash ? { style: "font-weight:650" } : {},
      el("td", {}, el("button", { type: "button", class: "explain", "data-case": i, onclick: () => app.set({ case: i }) }, one.criterion)),
      [one.domains.join(" + ") || "–", String(one.count ?? percent(one.keep)), one.mode, ...names.flatMap((name) => [number(one.loss[name]), signed(one.delta[name], places), ...(moved ? [percent(one.rerouted?.[name])] : [])])].map((text) => el("td", { style: one.plan_hash === data.plan.hash ? "font-weight:650" : null }, text)))))));
}

function sizeBars(app, rows, width) {
  const { theme } = app, left = 84, right = 96, tall = 34, height = rows.length * (tall + 10) + 4, most = Math.max(...rows.map(([, bytes]) => bytes));
  const svg = el("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Size before and after", "font-family": FONT, "font-size": 12 });
  rows.forEach(([name, bytes], i) => {
    const y = i * (tall + 10) + 2, long = (bytes / most) * (width - left - right);
    svg.append(el("text", { x: left - 10, y: y + tall / 2 + 4, "text-anchor": "end", fill: theme.soft }, name));
    svg.append(el("rect", { x: left, y, width: Math.max(1, long), height: tall, rx: 2, fill: i ? theme.a : PRUNED[app.dark ? "dark" : "light"][1] }));
    svg.append(el("text", { x: left + long + 9, y: y + tall / 2 + 4, fill: theme.ink, "font-weight": 600 }, gib(bytes)));
  });
  return svg;
}

/** Draws data (as of page_data) into root. */
async function mountPlan(root, data) {
  if (data?.format !== 1) {
    root.replaceChildren(`These data have format ${data?.format}, which this page cannot read: it reads format 1.`);
    return null;
  }
  return new PlanPages(root, data, root.gatewrightState).live();
}
