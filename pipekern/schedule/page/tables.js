// What stands around the picture: figures, badges, notes, the table of ranks, and all schedules beside each other.

const percent = (part) => `${(100 * part).toFixed(1)} %`;
const number = (value) => value.toLocaleString("en", { maximumFractionDigits: 3 });

// An element with attributes and children; text becomes a text node, never markup.
function element(tag, attributes = {}, ...children) {
  const spaced = tag.startsWith("svg:");
  const made = spaced ? document.createElementNS(SVG_SPACE, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}
const SVG_SPACE = "http://www.w3.org/2000/svg"; // a name, at which nothing is asked
const fillIn = (id, children) => document.getElementById(id).replaceChildren(...children);

function showFigures(result, facts, limit) {
  const most = Math.max(...result.peaks);
  const over = limit !== null && most > limit;
  const unit = (value, name) => [number(value), element("small", {}, ` ${name}`)];
  const tiles = [
    ["Bubble", [percent(result.bubble)]],
    ["Bubble by span", [percent(result.spanBubble)]],
    ["Makespan", unit(result.makespan, "µs")],
    ["Span", unit(result.span, "µs")],
    [over ? `Peak memory, over ${limit}` : "Peak memory", unit(most, "activations"), over],
    ["Messages", [number(result.messages)]],
  ];
  fillIn(
    "figures",
    tiles.map(([name, value, alert]) =>
      element("div", alert ? { class: "over" } : {}, element("dt", {}, name), element("dd", {}, ...value)),
    ),
  );
  const badges = [
    facts.synchronous ? "synchronous: weights as without a pipeline" : "asynchronous: weights one batch late",
    facts.duplicates_weights ? "every weight is kept twice" : "every weight is kept once",
  ];
  if (facts.runnable !== undefined) badges.push(facts.runnable ? "pipekern can train with it" : "simulated only");
  fillIn(
    "badges",
    badges.map((text) => element("li", {}, text)),
  );
}

function showRanks(schedule, result) {
  const head = ["rank", "first start", "last end", "busy", "idle by then", "peak", "stages"];
  const rows = result.spans.map((row, rank) => {
    const [first, last] = [(row[0]?.start ?? 0) / result.scale, (row.at(-1)?.end ?? 0) / result.scale];
    const stages = range(schedule.stageRank.length).filter((stage) => schedule.stageRank[stage] === rank);
    const idle = result.makespan ? 1 - result.busy[rank] / result.makespan : 0;
    return [
      rank,
      number(first),
      number(last),
      number(result.busy[rank]),
      percent(idle),
      number(result.peaks[rank]),
      stages.join(", "),
    ];
  });
  const line = (tag) => (cells) => element("tr", {}, ...cells.map((cell) => element(tag, {}, String(cell))));
  fillIn("ranks", [element("thead", {}, line("th")(head)), element("tbody", {}, ...rows.map(line("td")))]);
}

// Every schedule at the same values, and one from a text form that is shown, by bubble; one that does not take the
// values says what it takes.
function everySchedule(state, now) {
  const own = state.schedule.startsWith(OWN);
  const sizes = own ? { p: now.grid.ranks, m: now.grid.microbatches } : {};
  const rows = Object.keys(FACTS).map((name) => {
    const found = scheduleOf({ ...state, ...sizes, schedule: name, v: FACTS[name].chunks.least, limit: null });
    const misfits = found.notes.filter(({ what }) => what !== "chunks");
    if (misfits.length) return { name, why: misfits.map(({ what, why }) => `${what}: ${why}`).join("; ") };
    return lineOf(name, simulate(found.schedule, costsOf(state)));
  });
  if (own) rows.push({ ...lineOf(now.schedule.name, now.result), own: true });
  rows.sort(
    (one, other) => (one.why ? 1 : 0) - (other.why ? 1 : 0) || one.bubble - other.bubble || one.peak - other.peak,
  );
  return rows.map((row, index) => ({ ...row, index: index + 1 }));
}

const lineOf = (name, { bubble, spanBubble, makespan, peaks }) => ({
  name,
  bubble,
  spanBubble,
  makespan,
  peak: Math.max(...peaks),
});

function showAll(state, now, choose) {
  const rows = everySchedule(state, now).map((row) => ({ ...row, now: row.own ?? row.name === state.schedule }));
  const head = ["", "schedule", "bubble", "by span", "peak", "makespan, µs"];
  const most = Math.max(...rows.map(({ bubble }) => bubble ?? 0), 1e-9);
  const line = (row) => {
    const name = row.own ? row.name : element("button", { type: "button", onclick: () => choose(row.name) }, row.name);
    const cells = row.why
      ? [element("td", { colspan: 4, class: "why" }, row.why)]
      : [
          element(
            "td",
            {},
            element("span", { class: "share-of", style: `--part: ${(100 * row.bubble) / most}%` }),
            percent(row.bubble),
          ),
          ...[percent(row.spanBubble), number(row.peak), number(row.makespan)].map((text) => element("td", {}, text)),
        ];
    return element(
      "tr",
      row.now ? { class: "now" } : {},
      element("td", {}, row.why ? "" : String(row.index)),
      element("td", {}, name),
      ...cells,
    );
  };
  const titles = element("tr", {}, ...head.map((text) => element("th", {}, text)));
  fillIn("all", [element("thead", {}, titles), element("tbody", {}, ...rows.map(line))]);
  fillIn("scatter", [
    scatter(
      rows.filter(({ why }) => !why),
      state,
      choose,
    ),
  ]);
}

// Bubble against peak memory: the lower left corner is best. Schedules at one point share a dot.
function scatter(rows, state, choose) {
  const [width, height, left, bottom] = [420, 330, 46, 36];
  const most = {
    peak: Math.max(...rows.map(({ peak }) => peak), state.limit ?? 0) * 1.08,
    bubble: Math.max(...rows.map(({ bubble }) => bubble), 0.01) * 1.1,
  };
  const x = (peak) => left + ((width - left - 14) * peak) / most.peak;
  const y = (bubble) => height - bottom - ((height - bottom - 14) * bubble) / most.bubble;
  const text = (at, words, more = {}) => element("svg:text", { x: at[0], y: at[1], ...more }, words);
  const line = (from, to, kind) => element("svg:line", { x1: from[0], y1: from[1], x2: to[0], y2: to[1], class: kind });
  const [stepX, stepY] = [niceStep(most.peak / 6), niceStep(most.bubble / 5)];
  const parts = [
    ...range(Math.floor(most.peak / stepX) + 1).map((index) =>
      text([x(index * stepX), height - bottom + 16], number(index * stepX), { class: "axis", "text-anchor": "middle" }),
    ),
    ...range(Math.floor(most.bubble / stepY) + 1).flatMap((index) => [
      line([left, y(index * stepY)], [width - 14, y(index * stepY)], "rule"),
      text([left - 6, y(index * stepY) + 4], `${Math.round(100 * index * stepY * 10) / 10} %`, {
        class: "axis",
        "text-anchor": "end",
      }),
    ]),
    text([width - 14, height - 6], "peak memory of the fullest rank, activations", {
      class: "axis",
      "text-anchor": "end",
    }),
    text([left + 4, 12], "bubble of the makespan", { class: "axis" }),
  ];
  if (state.limit !== null) parts.push(line([x(state.limit), 14], [x(state.limit), height - bottom], "limit"));
  const places = new Map();
  for (const row of rows) {
    const key = `${Math.round(x(row.peak) / 12)} ${Math.round(y(row.bubble) / 12)}`;
    places.set(key, [...(places.get(key) ?? []), row]);
  }
  for (const group of places.values()) parts.push(dot(group, [x(group[0].peak), y(group[0].bubble)], choose, text));
  return element(
    "svg:svg",
    {
      viewBox: `0 0 ${width} ${height}`,
      role: "img",
      "aria-label": "Bubble against peak memory; the same figures are in the table",
    },
    ...parts,
  );
}

function dot(group, at, choose, text) {
  const names = group.map(({ index }) => index).join(" ");
  const now = group.some((row) => row.now) ? " now" : "";
  const half = Math.max(9, 4 + 3.4 * names.length);
  const shape = element("svg:rect", {
    x: at[0] - half,
    y: at[1] - 9,
    width: 2 * half,
    height: 18,
    rx: 9,
    class: `dot${now}`,
  });
  const title = element(
    "svg:title",
    {},
    group.map(({ name, bubble, peak }) => `${name}: bubble ${percent(bubble)}, peak ${number(peak)}`).join("\n"),
  );
  const target = group.find((row) => !row.own);
  return element(
    "svg:g",
    { onclick: () => target && choose(target.name) },
    title,
    shape,
    text([at[0], at[1] + 4], names, { "text-anchor": "middle" }),
  );
}
