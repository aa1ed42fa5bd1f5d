// The page itself: controls, what happens when they move, and the keys on the picture.

const $ = (id) => document.getElementById(id);
let state = fromHash(location.hash);
let now = null; // what is shown: {schedule, facts, grid, notes, result}
const NAMES = { ranks: "ranks", microbatches: "micro-batches", chunks: "chunks", memory: "limit" };
let waiting = 0; // timer of the comparison, which follows when the hand rests
const picture = new Picture($("picture"), $("ground"), $("canvas"));

// A slider and a number for every value.
function addControls() {
  for (const [key, { label, group, open, low, high, step }] of Object.entries(VALUES)) {
    const slider = element("input", {
      type: "range",
      id: key,
      min: low,
      max: high ?? low,
      step: step ?? (WHOLE.includes(key) ? 1 : "any"),
    });
    const box = element("input", {
      type: "number",
      min: low,
      step: WHOLE.includes(key) ? 1 : "any",
      "aria-label": label,
      placeholder: open ?? "",
    });
    slider.addEventListener("input", () => change({ [key]: fromSlider(key, slider) }));
    box.addEventListener("input", () => box.validity.valid && (box.value || open) && change({ [key]: box.value }, box));
    box.addEventListener("change", () => render());
    const name = element(
      "label",
      { for: key },
      element("b", {}, label),
      ` ${key === "limit" || key === "pair" || key === "kept" ? "" : key}`,
    );
    $(group).append(element("div", { class: "control", "data-key": key }, name, slider, box));
  }
}

// Costs go in hundredths of the slider, so that dragging gives round numbers; the right end of an open one is null.
function fromSlider(key, slider) {
  const [value, most] = [Number(slider.value), Number(slider.max)];
  if (VALUES[key].open && value >= most) return null;
  return VALUES[key].cost ? Math.round((value / most) * 100) * (most / 100) : value;
}

// The right end of a slider without a fixed one; it moves only when a value passes it or is far below.
function highOf(key) {
  if (VALUES[key].high) return VALUES[key].high;
  if (key === "limit") return Math.max(2 * now.grid.ranks, Math.ceil(state.limit ?? 0)) + 0.5;
  if (key === "pair") return Math.max(state.F + state.B + state.W, state.pair ?? 0, 0.01);
  const largest = Math.max(state.F, state.B, state.W, 0.01);
  const compute = largest > scaleEnd || largest < scaleEnd / 12 ? (scaleEnd = niceEnd(largest)) : scaleEnd;
  return key === "c" ? Math.max(compute / 5, niceEnd(state.c)) : compute;
}
let scaleEnd = 5;
const niceEnd = (value) => niceStep(Math.max(value * 2.5, 0.05));

function addChoices() {
  const group = (label, names) =>
    element("optgroup", { label }, ...names.map(([value, text]) => element("option", { value }, text)));
  const known = (runnable) =>
    Object.keys(FACTS)
      .filter((name) => FACTS[name].runnable === runnable)
      .map((name) => [name, name]);
  const given = GIVEN.map(({ name }, index) => [`${OWN}${index}`, `${name} (${index + 1})`]);
  const groups = [group("pipekern can train with", known(true)), group("simulated only", known(false))];
  if (given.length) groups.unshift(group("given", given));
  $("schedule").append(...groups, group("yours", [[OWN, "paste or open the text form…"]]));
  $("schedule").addEventListener("change", () => change({ schedule: $("schedule").value }));
  $("text").addEventListener("input", () => change({ text: $("text").value }));
  $("file").addEventListener("change", async () => change({ text: await $("file").files[0].text() }));
  const presets = PRESETS.map(({ name, values }) =>
    element("button", { type: "button", onclick: () => change(values) }, name),
  );
  document.querySelector(".presets").append(...presets);
}

function change(values, typing = null) {
  for (const [key, value] of Object.entries(values)) state[key] = key in VALUES ? tidy(key, value) : value;
  render(typing);
}

// Everything follows from the state. `typing` is the box that has the cursor, whose text is left alone. What is at
// fault leaves the last picture that could be made, faded.
function render(typing = null) {
  let fault = "";
  try {
    now = resultOf(state);
  } catch (error) {
    fault =
      state.schedule === OWN && !state.text ? "Paste a schedule in the text form, or open a file." : error.message;
    now ??= resultOf(initial());
  }
  $("fault").hidden = !fault;
  $("fault").textContent = fault;
  document.querySelector(".results").classList.toggle("stale", Boolean(fault));
  showControls(typing);
  showFigures(now.result, now.facts, state.limit);
  showRanks(now.schedule, now.result);
  picture.show(now.schedule, now.result, state.limit);
  showStatus();
  showNumbers(fault);
  $("command").textContent = commandOf(state, now);
  history.replaceState(null, "", toHash(state));
  clearTimeout(waiting);
  if (!fault) waiting = setTimeout(() => showAll(state, now, (schedule) => change({ schedule })), 60);
}

function showControls(typing) {
  const { facts, grid, notes } = now;
  const own = state.schedule.startsWith(OWN);
  const used = { p: grid.ranks, m: grid.microbatches, v: grid.chunks };
  $("schedule").value = state.schedule;
  $("about").textContent = own ? "Read from its text form: its sizes are its own." : facts.about;
  $("own").hidden = state.schedule !== OWN;
  if (document.activeElement !== $("text")) $("text").value = state.text;
  for (const control of document.querySelectorAll(".control")) {
    const key = control.dataset.key;
    const [slider, box] = control.querySelectorAll("input");
    const value = own && key in used ? used[key] : state[key];
    slider.max = highOf(key);
    slider.value = value ?? slider.max;
    if (VALUES[key].open) slider.setAttribute("aria-valuetext", value === null ? VALUES[key].open : String(value));
    if (box !== typing) box.value = value ?? "";
    slider.disabled = box.disabled = own && key in used;
    control.classList.toggle("used", key in used && used[key] !== value && !control.hidden);
    control.querySelector("label").dataset.used = `→ ${used[key]}`;
  }
  const hide = (key, hidden) => (document.querySelector(`[data-key="${key}"]`).hidden = hidden);
  hide("v", !own && facts.chunks.least === facts.chunks.most);
  hide("pair", !now.schedule.rows.flat().some(({ paired }) => paired));
  document.querySelector('[data-key="v"] b').textContent = facts.sliced ? "Slices a micro-batch" : VALUES.v.label;
  fillIn(
    "notes",
    notes.map(({ what, value, why }) =>
      element("li", {}, `${NAMES[what]} ${value} shown: ${now.schedule.name} takes ${why}`),
    ),
  );
}

// For those who read the page with a program, and for the tests.
function showNumbers(fault) {
  const { makespan, span, busy, bubble, spanBubble, peaks, messages } = now.result;
  const { ranks, microbatches, chunks } = now.grid;
  const numbers = {
    schedule: now.schedule.name,
    ranks,
    microbatches,
    chunks,
    makespan,
    span,
    busy,
    bubble,
    span_bubble: spanBubble,
    peak_activations: peaks,
    messages,
  };
  $("numbers").textContent = JSON.stringify(fault ? { fault } : numbers);
}

function showStatus() {
  const one = picture.chosen;
  if (!one) return ($("status").textContent = "");
  const { scale } = now.result;
  const chunk = picture.chunkOf[one.stage]
    ? `, chunk ${picture.chunkOf[one.stage]} of rank ${now.schedule.stageRank[one.stage]}`
    : "";
  const unit = now.facts.sliced
    ? `slice ${one.microbatch} (micro-batch ${Math.floor(one.microbatch / now.schedule.slices)})`
    : `micro-batch ${one.microbatch}`;
  $("status").textContent =
    `rank ${now.schedule.stageRank[one.stage]}: ${LOOKS[one.op].label} of ${unit} on stage ${one.stage}${chunk}, from ${number(one.start / scale)} to ${number(one.end / scale)} µs`;
}

function choose(one) {
  if (one === picture.chosen) return;
  picture.chosen = one;
  picture.redraw();
  showStatus();
}

// Left and right: the rank's action before and after. Up and down: what the rank above or below does at that time.
function step(key) {
  const rows = now.result.spans;
  const one = picture.chosen ?? rows[0][0];
  const rank = now.schedule.stageRank[one.stage];
  if (key === "ArrowLeft" || key === "ArrowRight") {
    const index = rows[rank].indexOf(one) + (picture.chosen ? (key === "ArrowLeft" ? -1 : 1) : 0);
    return rows[rank][index] ?? one;
  }
  const row = rows[rank + (key === "ArrowUp" ? -1 : 1)];
  return row?.find(({ end }) => end > one.start) ?? row?.at(-1) ?? one;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key.startsWith("Arrow")) {
    choose(step(event.key));
    const x = picture.xOf(picture.chosen.start);
    if (x < GUTTER || x > picture.width - 40) $("picture").scrollLeft += x - picture.width / 2;
  } else if (event.key === "Escape") choose(null);
  else if (event.key === "+" || event.key === "=") zoom(picture.zoom * 1.5);
  else if (event.key === "-") zoom(picture.zoom / 1.5);
  else return;
  event.preventDefault();
}

function zoom(factor, x) {
  picture.zoomTo(factor, x ?? (picture.chosen ? picture.xOf(picture.chosen.start) : undefined));
  $("zoom-value").textContent = `${Number(picture.zoom.toFixed(1))}×`;
}

function addPicture() {
  const place = (event) => [
    event.clientX - $("canvas").getBoundingClientRect().left,
    event.clientY - $("canvas").getBoundingClientRect().top,
  ];
  $("canvas").addEventListener("pointermove", (event) => choose(picture.at(...place(event))));
  $("canvas").addEventListener("pointerleave", () => choose(null));
  $("canvas").addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      zoom(picture.zoom * Math.exp(-event.deltaY / 200), place(event)[0]);
    },
    { passive: false },
  );
  $("picture").addEventListener("keydown", onKey);
  $("zoom-in").addEventListener("click", () => zoom(picture.zoom * 1.5));
  $("zoom-out").addEventListener("click", () => zoom(picture.zoom / 1.5));
  $("zoom-fit").addEventListener("click", () => zoom(1));
}

// The legend's samples are painted as the picture is.
function showLegend() {
  const sample = (op) => {
    const box = element("canvas", { width: 26, height: 14 });
    const pen = box.getContext("2d");
    [0, 1].forEach((chunk) => {
      pen.fillStyle = paintOf(pen, op, chunk, css("--ground")).fill;
      pen.fillRect(13 * chunk, 0, 13, 14);
    });
    return element("li", {}, box, LOOKS[op].label);
  };
  const words = element("li", {}, "fainter: a rank’s later chunk or other direction; ▲ peak of a rank");
  fillIn("legend", [...Object.keys(LOOKS).map(sample), words]);
}

function addSharing() {
  const say = (button, words) => {
    const before = button.textContent;
    button.textContent = words;
    setTimeout(() => (button.textContent = before), 1200);
  };
  const copy = (id, text) =>
    $(id).addEventListener("click", () =>
      navigator.clipboard.writeText(text()).then(
        () => say($(id), "Copied"),
        () => say($(id), "Not allowed here"),
      ),
    );
  const save = (name, href) => element("a", { href, download: name }).click();
  copy("copy-link", () => location.href);
  copy("copy-command", () => $("command").textContent);
  $("save-picture").addEventListener("click", () => save(`${now.schedule.name}.png`, $("canvas").toDataURL()));
  $("save-text").addEventListener("click", () =>
    save(`${now.schedule.name}.txt`, `data:text/plain;charset=utf-8,${encodeURIComponent(textOf(now.schedule))}`),
  );
}

addControls();
addChoices();
addPicture();
addSharing();
showLegend();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showLegend);
addEventListener("hashchange", () => {
  state = fromHash(location.hash);
  render();
});
render();
