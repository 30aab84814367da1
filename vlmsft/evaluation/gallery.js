"use strict";
(() => {
  const AT_ONCE = 20; // cards drawn before one has to scroll
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const { models, metrics, cards } = read("data");
  let pictures = null; // parsed with the first card that has one
  const control = Object.fromEntries(["task", "metric", "show", "sort", "text"].map((id) => [id, document.getElementById(id)]));
  const list = document.getElementById("cards");

  // --- scores ---

  const metricOf = (card) => control.metric.value || metrics[card.task][0];

  // mean over repeats that have a score; null without any
  const scoreOf = (card, model) => {
    const found = card.answers[model].map((answer) => answer.scores[metricOf(card)]?.[0]).filter((score) => score != null);
    return found.length ? found.reduce((sum, score) => sum + score, 0) / found.length : null;
  };

  // the largest step a metric makes in a task, so that tasks with other scales can be sorted together
  const ranges = new Map();
  const rangeOf = (card) => {
    const key = JSON.stringify([card.task, metricOf(card)]);
    if (!ranges.has(key)) {
      const scores = cards.filter((other) => other.task === card.task).flatMap((other) => models.map((_, model) => scoreOf(other, model)));
      const found = scores.filter((score) => score !== null);
      ranges.set(key, found.reduce((most, score) => Math.max(most, score), -Infinity) - found.reduce((least, score) => Math.min(least, score), Infinity));
    }
    return ranges.get(key) || 1;
  };

  const differenceOf = (card) => {
    const scores = models.map((_, model) => scoreOf(card, model)).filter((score) => score !== null);
    return scores.length > 1 ? (Math.max(...scores) - Math.min(...scores)) / rangeOf(card) : 0;
  };

  const againstBase = (card, model) => {
    const [ours, base] = [scoreOf(card, model), scoreOf(card, 0)];
    return ours === null || base === null ? 0 : ours - base;
  };

  // --- what is shown ---

  const isMissing = (card) => card.answers.some((repeats) => repeats.some((answer) => (answer.scores[metricOf(card)]?.[0] ?? null) === null));
  const isCut = (card) => card.answers.some((repeats) => repeats.some((answer) => answer.cut));
  const shows = [
    ["all", () => true],
    ["different scores", (card) => differenceOf(card) > 1e-9],
    ...models.slice(1).flatMap((name, index) => [
      [`${name} better than ${models[0]}`, (card) => againstBase(card, index + 1) > 1e-9],
      [`${name} worse than ${models[0]}`, (card) => againstBase(card, index + 1) < -1e-9],
    ]),
    ["a score is missing", isMissing],
    ["an answer was cut", isCut],
  ];
  const orNone = (score, none) => (score === null ? none : score);
  const sorts = [
    ["as asked", null],
    ["biggest difference", (card) => -differenceOf(card)],
    ...models.slice(1).flatMap((name, index) => [
      [`biggest gain of ${name}`, (card) => -againstBase(card, index + 1) / rangeOf(card)],
      [`biggest loss of ${name}`, (card) => againstBase(card, index + 1) / rangeOf(card)],
    ]),
    ...models.map((name, index) => [`lowest score of ${name}`, (card) => orNone(scoreOf(card, index), Infinity)]),
  ];

  // texts as they are searched; made at the first search
  const searchable = (card) =>
    (card.searchable ??= [card.id, card.question, ...card.references, ...card.answers.flat().map((answer) => answer.text ?? answer.error ?? "")]
      .join("\n")
      .toLowerCase());

  const chosen = () => {
    const words = control.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const isShown = shows[Number(control.show.value)][1];
    const found = cards.filter(
      (card) => (!control.task.value || card.task === control.task.value) && isShown(card) && words.every((word) => searchable(card).includes(word)),
    );
    const key = sorts[Number(control.sort.value)][1];
    if (!key) return found;
    const keyed = found.map((card) => [key(card), card]);
    return keyed.sort(([first], [second]) => (first === second ? 0 : first - second)).map(([, card]) => card);
  };

  // --- drawing: texts only, nothing a model wrote is read as markup ---

  const element = (tag, name, text) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text != null) made.textContent = text;
    return made;
  };

  const drawScores = (card, answer) => {
    const row = element("div", "scores");
    for (const metric of metrics[card.task]) {
      const [score, outOf, reason] = answer.scores[metric] ?? [null, null, "no score"];
      const digits = Number.isInteger(score) ? 0 : 1;
      const text = score === null ? "missing" : score.toFixed(digits) + (outOf === null ? "" : ` of ${outOf}`);
      const shown = element("span", metric === metricOf(card) ? "chosen" : "", `${metric} ${text}`);
      if (reason) shown.title = reason;
      row.append(shown);
      if (score === null && answer.text !== null) row.append(element("span", "warn", reason));
    }
    return row;
  };

  const drawAnswer = (card, model) => {
    const difference = model ? againstBase(card, model) : 0;
    const box = element("section", difference > 1e-9 ? "answer better" : difference < -1e-9 ? "answer worse" : "answer");
    box.append(element("h2", "", models[model]));
    card.answers[model].forEach((answer, repeat) => {
      if (card.answers[model].length > 1) box.append(element("div", "where", `repeat ${repeat + 1}`));
      box.append(drawScores(card, answer));
      if (answer.text === null) box.append(element("p", "warn", answer.error));
      else box.append(element("div", "text", answer.text || "(empty)"));
      if (answer.cut) box.append(element("p", "warn", "cut at max_new_tokens"));
    });
    return box;
  };

  const drawPictures = (card) => {
    const box = element("div", card.num_pictures > 1 ? "pictures several" : "pictures");
    if (card.pictures.length) pictures ??= read("pictures");
    for (const index of card.pictures) {
      const image = element("img");
      image.alt = "";
      image.src = `data:image/jpeg;base64,${pictures[index]}`;
      box.append(image);
    }
    const without = card.num_pictures - card.pictures.length;
    if (without) box.append(element("p", "faint", `${without} not shown`));
    return box;
  };

  const draw = (card) => {
    const box = element("article", card.num_pictures ? "card" : "card bare");
    if (card.num_pictures) box.append(drawPictures(card));
    const words = element("div");
    words.append(element("div", "where", `${card.task} ${card.id}`), element("div", "text question", card.question));
    for (const reference of card.references) words.append(element("div", "text faint", `→ ${reference}`));
    const answers = element("div", "answers");
    models.forEach((_, model) => answers.append(drawAnswer(card, model)));
    words.append(answers);
    box.append(words);
    return box;
  };

  let rest = [];
  const end = document.getElementById("end");
  const drawMore = () => {
    list.append(...rest.splice(0, AT_ONCE).map(draw));
    observer.unobserve(end); // observed anew it tells once more, also where the end is still in sight
    if (rest.length) observer.observe(end);
  };
  const observer = new IntersectionObserver((entries) => entries.at(-1).isIntersecting && drawMore(), { rootMargin: "1500px" });
  const redraw = () => {
    rest = chosen();
    document.getElementById("count").textContent = `${rest.length} of ${cards.length}`;
    list.replaceChildren();
    drawMore();
  };

  // --- controls ---

  const fill = (select, options) => select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  const fillMetrics = () => {
    const tasks = control.task.value ? [control.task.value] : Object.keys(metrics);
    const names = tasks.length === 1 ? metrics[tasks[0]] : metrics[tasks[0]].filter((name) => tasks.every((task) => metrics[task].includes(name)));
    fill(control.metric, [...(tasks.length === 1 ? [] : [["", "each task's first"]]), ...names.map((name) => [name, name])]);
  };
  fill(control.task, [["", "all"], ...Object.keys(metrics).map((task) => [task, task])]);
  fill(control.show, shows.map(([text], index) => [index, text]));
  fill(control.sort, sorts.map(([text], index) => [index, text]));
  fillMetrics();
  control.task.addEventListener("change", fillMetrics);
  for (const id of ["task", "metric", "show", "sort"]) control[id].addEventListener("change", redraw);
  control.text.addEventListener("input", redraw);
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  redraw();
})();
