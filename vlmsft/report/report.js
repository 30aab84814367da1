"use strict";
// What the page does: the table, the differences, the answers, and which of the figures that Python made is shown.
(async () => {
  const byId = (id) => document.getElementById(id);
  const data = await (await unpacked("data")).json();
  const table = byId("table");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const again = new Map([...document.querySelectorAll(".again")].map((one) => [Number(one.dataset.run), one]));
  const MOST_ANSWERS = 8; // runs side by side
  const MOST_RAW = 20; // runs whose unsmoothed curve stays behind the smoothed one
  const SPARSE = 25; // points below which each has a mark

  // base64 of gzip -> Response
  function unpacked(id) {
    const letters = atob(byId(id).textContent);
    const bytes = new Uint8Array(letters.length);
    for (let place = 0; place < bytes.length; place += 1) bytes[place] = letters.charCodeAt(place);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
  }

  function element(name, properties = {}, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  }

  // --- theme -------------------------------------------------------------------------------------------------------

  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  let isDark = prefersDark.matches; // kept: Chromium drops a change whose new value was read before its event
  const theme = () => root.dataset.theme || (isDark ? "dark" : "light");

  function showTheme() {
    byId("theme").textContent = theme() === "dark" ? "Light" : "Dark";
    byId("theme").setAttribute("aria-label", `Switch to ${theme() === "dark" ? "light" : "dark"} colours`);
    redraw();
  }

  // --- plots: drawn when they come into view ---------------------------------------------------------------------------

  const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  const plots = new Map(); // div -> {figure: () => {data, layout} or null, missing: what to say then, stale, visible}
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        plots.get(entry.target).visible = entry.isIntersecting;
        if (entry.isIntersecting) drawSoon(entry.target);
      }
    },
    { rootMargin: "300px" }
  );

  function plot(id, figure, missing) {
    const div = byId(id);
    if (!div) return;
    plots.set(div, { figure, missing, stale: true, visible: false });
    watcher.observe(div);
  }

  // one at a time, so that the page answers in between
  const waiting = new Set();
  function drawSoon(div) {
    if (!waiting.size) setTimeout(drawNext);
    waiting.add(div);
  }

  function drawNext() {
    const [div] = waiting;
    waiting.delete(div);
    draw(div);
    if (waiting.size) setTimeout(drawNext);
  }

  function draw(div) {
    const one = plots.get(div);
    if (!one.stale || !one.visible) return;
    one.stale = false;
    const figure = one.figure();
    if (!figure) {
      Plotly.purge(div);
      div.replaceChildren(element("p", { className: "missing", textContent: one.missing }));
      return;
    }
    if (div.firstElementChild?.className === "missing") div.replaceChildren();
    Plotly.react(div, figure.data, { ...figure.layout, template: data.templates[theme()] }, CONFIG);
  }

  function redraw(...ids) {
    for (const [div, one] of plots) {
      if (ids.length && !ids.some((id) => div.id.startsWith(id))) continue;
      one.stale = true;
      if (one.visible) drawSoon(div);
    }
  }

  // --- table -------------------------------------------------------------------------------------------------------

  const heads = [...table.tHead.rows[0].cells];
  const runOf = (row) => Number(row.dataset.run);
  const valueOf = (row, column) => row.cells[column].dataset.value;
  const inTable = () => [...body.rows].filter((row) => !row.hidden);
  const plotted = () => inTable().filter((row) => row.querySelector("input").checked).map(runOf);

  function compare(a, b) {
    const [x, y] = [Number(a), Number(b)];
    if (!Number.isNaN(x) && !Number.isNaN(y)) return x - y;
    if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
    return a.localeCompare(b);
  }

  function sort(column) {
    const isDown = heads[column].getAttribute("aria-sort") === "ascending";
    heads.forEach((head) => head.hasAttribute("aria-sort") && head.setAttribute("aria-sort", "none"));
    heads[column].setAttribute("aria-sort", isDown ? "descending" : "ascending");
    for (const head of heads) {
      const arrow = head.querySelector("span");
      if (arrow) arrow.textContent = { ascending: " \u2191", descending: " \u2193" }[head.getAttribute("aria-sort")] || "";
    }
    const lacks = (row) => valueOf(row, column) === "" || valueOf(row, column) === "nan"; // last, either way
    const sorted = [...body.rows].sort(
      (a, b) => lacks(a) - lacks(b) || (isDown ? -1 : 1) * compare(valueOf(a, column), valueOf(b, column))
    );
    body.append(...sorted);
    showAnswers();
  }

  // "done max_lr>=0.001" -> functions of a row; throws the name of a column that isn't there
  function conditions(text) {
    return text.trim().split(/\s+/).filter(Boolean).map((word) => {
      const parts = word.match(/^([^<>=]+)(<=|>=|=|<|>)(.+)$/);
      if (!parts) return (row) => row.textContent.toLowerCase().includes(word.toLowerCase());
      const column = heads.findIndex((head) => namesOf(head).includes(parts[1].toLowerCase()));
      if (column < 0) throw parts[1];
      return (row) => holds(valueOf(row, column), parts[2], parts[3]);
    });
  }

  function namesOf(head) {
    const title = head.textContent.replace(/[\u2191\u2193]/, "").trim().toLowerCase();
    return [title, title.replace(/[\s,]+/g, "_"), (head.dataset.key || "").toLowerCase()];
  }

  function holds(value, operator, wanted) {
    if (operator === "=") return value === wanted || (value !== "" && Number(value) === Number(wanted));
    if (value === "" || Number.isNaN(Number(value)) || Number.isNaN(Number(wanted))) return false;
    const difference = Number(value) - Number(wanted);
    return { "<": difference < 0, ">": difference > 0, "<=": difference <= 0, ">=": difference >= 0 }[operator];
  }

  function filter() {
    let wanted;
    try {
      wanted = conditions(byId("filter").value);
    } catch (name) {
      byId("count").textContent = `There is no column ${name}`;
      return;
    }
    for (const row of rows) {
      row.hidden = !wanted.every((condition) => condition(row));
      again.get(runOf(row)).hidden = row.hidden;
    }
    showChosen();
  }

  function showChosen() {
    byId("count").textContent = `${inTable().length} of ${rows.length} runs, ${plotted().length} plotted`;
    redraw("curve-");
    showLegend();
    showAnswers();
  }

  function tick(isOn) {
    inTable().forEach((row) => (row.querySelector("input").checked = isOn));
    showChosen();
  }

  // --- differences -------------------------------------------------------------------------------------------------

  function showDifferences() {
    const [a, b] = ["diff-a", "diff-b"].map((id) => Number(byId(id).value));
    const { keys, values, num_same } = data.config;
    const found = keys.filter((_, place) => values[place][a] !== values[place][b]);
    const same = num_same + keys.length - found.length;
    byId("diff-count").textContent = found.length
      ? `${found.length} of ${same + found.length} keys differ`
      : a === b ? "Choose two runs" : `All ${same} keys are the same`;
    const head = ["key", data.runs[a].label, data.runs[b].label].map((text) => element("th", { textContent: text, scope: "col" }));
    const lines = found.map((key) => {
      const of_key = values[keys.indexOf(key)];
      const cells = [key, ...[a, b].map((run) => (of_key[run] === null ? "not there" : of_key[run]))];
      return element("tr", {}, ...cells.map((text) => element("td", { textContent: text })));
    });
    byId("diff-table").replaceChildren(
      ...(found.length ? [element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...lines)] : [])
    );
  }

  // --- curves ------------------------------------------------------------------------------------------------------

  // exponential moving average, without the pull to 0 of the first points; gaps stay gaps
  function smooth(values, weight) {
    let mean = 0, norm = 0;
    return values.map((value) => {
      if (value === null) return null;
      mean = weight * mean + (1 - weight) * value;
      norm = weight * norm + (1 - weight);
      return mean / norm;
    });
  }

  // steps -> places on another axis, straight between the points that are known
  function onAxis(steps, axes, name) {
    if (name === "step") return steps;
    const known = axes.step, places = axes[name];
    let at = 1;
    return steps.map((step) => {
      while (at < known.length - 1 && known[at] < step) at += 1;
      if (known.length < 2 || known[at] === known[at - 1]) return places[0];
      const share = (step - known[at - 1]) / (known[at] - known[at - 1]);
      return places[at - 1] + Math.min(1, Math.max(0, share)) * (places[at] - places[at - 1]);
    });
  }

  function trace(run, steps, values, axis, extra) {
    return {
      type: "scatter", name: data.runs[run].plain, x: onAxis(steps, data.series[run].axes, axis), y: values,
      mode: values.length <= SPARSE ? "lines+markers" : "lines",
      line: { color: data.runs[run].color, dash: data.runs[run].dash, width: 1.6 }, marker: { size: 5 }, ...extra,
    };
  }

  function curveFigure(curve) {
    const axis = byId("axis").value, weight = Number(byId("smoothing").value);
    const runs = plotted().filter((run) => data.series[run].curves[curve.column] && data.series[run].axes[axis]);
    if (!runs.length) return null;
    const lines = runs.flatMap((run) => {
      const [steps, values, at = steps, from = values] = data.series[run].curves[curve.column];
      if (!weight || values.length < 3) return [trace(run, steps, values, axis, {})];
      const smoothed = trace(run, at, smooth(from, weight), axis, { mode: "lines" });
      const raw = trace(run, steps, values, axis, { opacity: 0.25, showlegend: false, hoverinfo: "skip", mode: "lines" });
      return runs.length <= MOST_RAW ? [raw, smoothed] : [smoothed];
    });
    const isLog = curve.is_loss && byId("log").checked;
    const layout = structuredClone(curve.layout);
    layout.xaxis.title.text = data.axes[axis];
    layout.yaxis.type = isLog ? "log" : "linear";
    return { data: lines, layout };
  }

  function showLegend() {
    const runs = plotted().slice(0, data.most_legend_runs);
    const items = runs.map((run) => element("span", {}, swatch(run), data.runs[run].label));
    const more = plotted().length - runs.length;
    byId("legend").replaceChildren(...items, ...(more > 0 ? [`and ${more} more: point at a line to see its name`] : []));
  }

  // --- answers -----------------------------------------------------------------------------------------------------

  function showAnswers() {
    if (!byId("answers-list")) return;
    const runs = plotted().filter((run) => data.answers.has[run]);
    const shown = runs.slice(0, MOST_ANSWERS);
    byId("answers-note").textContent =
      `The last validation's, of ${shown.length} of ${runs.length} plotted runs with answers` +
      (runs.length > shown.length ? ": the first in the table's order; sort it, filter it or untick runs to see others." : ".") +
      (data.answers.num_pictures_left_out ? ` ${data.answers.num_pictures_left_out} pictures are left out to keep this page small.` : "");
    byId("answers-list").replaceChildren(...data.answers.questions.map((question) => questionCard(question, shown)).filter(Boolean));
  }

  function questionCard(question, shown) {
    const texts = shown.filter((run) => question.answers[run] !== undefined).map((run) => {
      const { text, step } = question.answers[run];
      const isSame = text.trim() === question.reference.trim();
      const who = element("div", { className: "who" }, swatch(run), `${data.runs[run].label}, step ${step}`);
      const note = isSame ? [element("p", { className: "done", textContent: "= reference" })] : [];
      return element("div", { className: "text" }, who, element("p", { textContent: text || "(empty)" }), ...note);
    });
    if (!texts.length) return null;
    const pictures = question.pictures.map((picture) =>
      picture === null
        ? element("span", { className: "missing", textContent: "picture not there" })
        : element("img", { src: `data:image/jpeg;base64,${data.answers.pictures[picture]}`, alt: "picture of the question" })
    );
    const asked = element("div", {}, element("p", { textContent: question.question }),
      element("p", { className: "faint", textContent: `reference: ${question.reference}` }));
    return element("article", { className: "question" },
      element("div", { className: "asked" }, ...pictures, asked), element("div", { className: "texts" }, ...texts));
  }

  function swatch(run) {
    const made = element("i", { className: "swatch" });
    made.style.background = data.runs[run].color;
    return made;
  }

  // --- copying -----------------------------------------------------------------------------------------------------

  async function copy(button) {
    const text = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text); // not allowed: the user's own Ctrl-C then
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }

  // --- all together ------------------------------------------------------------------------------------------------

  function fill(id, options, chosen) {
    byId(id)?.replaceChildren(...options.map(([value, text, disabled]) =>
      element("option", { value, textContent: text, disabled: !!disabled, selected: value === chosen })));
  }

  const onInput = (id, action) => byId(id)?.addEventListener("input", action);

  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => sort(column)));
  onInput("filter", filter);
  body.addEventListener("change", showChosen);
  byId("tick-all").addEventListener("click", () => tick(true));
  byId("tick-none").addEventListener("click", () => tick(false));
  document.querySelectorAll(".copy").forEach((button) => button.addEventListener("click", () => copy(button)));

  const choices = data.runs.map((run, index) => [String(index), run.label]);
  fill("diff-a", choices, "0");
  fill("diff-b", choices, String(Math.min(1, choices.length - 1)));
  onInput("diff-a", showDifferences);
  onInput("diff-b", showDifferences);
  showDifferences();

  onInput("axis", () => redraw("curve-"));
  onInput("log", () => redraw("curve-"));
  onInput("smoothing", () => {
    byId("smoothing-value").textContent = byId("smoothing").value;
    redraw("curve-");
  });
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    showTheme();
  });
  prefersDark.addEventListener("change", (event) => {
    isDark = event.matches;
    showTheme();
  });
  showTheme();
  showChosen();

  await new Promise((painted) => setTimeout(painted)); // the table needn't wait for what follows
  data.series = await (await unpacked("series")).json();
  for (const run of data.series) {
    for (const curve of Object.values(run.curves)) {
      for (const steps of [curve[0], curve[2]]) steps?.forEach((step, place) => (steps[place] = step + (steps[place - 1] || 0)));
    }
  }
  const hasAxis = (name) => data.series.some((run) => run.axes[name]);
  fill("axis", Object.entries(data.axes).map(([name, title]) =>
    [name, hasAxis(name) ? title : `${title} (not logged)`, !hasAxis(name)]), "step");
  document.head.append(element("script", { textContent: await (await unpacked("plotly")).text() }));
  data.curves.forEach((curve, place) =>
    plot(`curve-${place}`, () => curveFigure(curve), `No plotted run has ${curve.layout.title.text} on this axis.`));
  for (const [name, ids] of Object.entries(data.choosers)) {
    const selects = ids.map(({ id, options, chosen }) => (fill(id, options, chosen), id));
    selects.forEach((id) => onInput(id, () => redraw(`${name}-plot`)));
    const figure = () => data.figures[name][selects.map((id) => byId(id).value).join("|")] || null;
    plot(`${name}-plot`, figure, name === "heat" ? "Choose two different keys." : "No run has both numbers.");
  }
  root.dataset.ready = "true";
})();
