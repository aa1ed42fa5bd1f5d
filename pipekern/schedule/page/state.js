// What the reader has chosen, as values and as the part of the address after #, and what follows from it.

const DATA = JSON.parse(document.getElementById("data").textContent);
const FACTS = DATA.schedules; // what each schedule is, from pipekern's registry
const OWN = "own"; // a schedule in the text form that is pasted or opened here
const GIVEN = DATA.texts.map(parse); // those in the text form that came with the page, chosen as own0, own1, …

// Each value has a slider. One that is `open` may be null, at the slider's right end: no limit, or the sum of the
// parts.
const VALUES = {
  p: { label: "Ranks", low: 1, high: 16, initial: 4, group: "sizes" },
  m: { label: "Micro-batches", low: 1, high: 64, initial: 8, group: "sizes" },
  v: { label: "Chunks a rank", low: 1, high: 8, initial: 2, group: "sizes" },
  F: { label: "Forward", low: 0, cost: true, initial: 1, group: "costs" },
  B: { label: "Input gradient", low: 0, cost: true, initial: 1, group: "costs" },
  W: { label: "Weight gradient", low: 0, cost: true, initial: 1, group: "costs" },
  c: { label: "Latency of a message", low: 0, cost: true, initial: 0, group: "costs" },
  pair: { label: "Overlapped F and BW", low: 0, cost: true, open: "sum", initial: null, group: "costs" },
  kept: { label: "Kept from B to W", low: 0, high: 1, step: 0.05, initial: 1, group: "room" },
  limit: { label: "Limit a rank", low: 0.5, step: 0.5, open: "none", initial: null, group: "room" },
};
// The last two are measured: table 5 of Qi et al., Zero Bubble Pipeline Parallelism, 2023.
const PRESETS = [
  { name: "unit", values: { F: 1, B: 1, W: 1, c: 0 } },
  { name: "slow links", values: { F: 1, B: 1, W: 1, c: 0.5 } },
  { name: "paper, 8", values: { p: 8, m: 24, F: 18522, B: 18086, W: 9337, c: 601 } },
  { name: "paper, 16", values: { p: 16, m: 48, F: 11347, B: 11248, W: 8132, c: 377 } },
];
const WHOLE = ["p", "m", "v"];
const HIGHEST = 1e7;

const initial = () => ({
  schedule: "1f1b",
  text: "",
  ...Object.fromEntries(Object.entries(VALUES).map(([key, { initial }]) => [key, initial])),
});

// A value as it can be used: at most three places, within what is possible; null where it is left open.
function tidy(key, value) {
  const { low, open, high } = VALUES[key];
  if (value === null || value === "" || !Number.isFinite(Number(value))) return open ? null : VALUES[key].initial;
  const most = WHOLE.includes(key) || key === "kept" ? high : HIGHEST;
  const inside = Math.min(Math.max(Number(value), low), most);
  return WHOLE.includes(key) ? Math.round(inside) : Math.round(inside * 1000) / 1000;
}

const isKnown = (name) =>
  Object.hasOwn(FACTS, name) || name === OWN || GIVEN.some((_, index) => name === `${OWN}${index}`);

function fromHash(hash) {
  const state = initial();
  for (const [key, value] of new URLSearchParams(hash.replace(/^#/, ""))) {
    if (key === "schedule" && isKnown(value)) state.schedule = value;
    if (key === "text") state.text = value;
    if (Object.hasOwn(VALUES, key)) state[key] = tidy(key, value);
  }
  return state;
}

function toHash(state) {
  const query = new URLSearchParams({ schedule: state.schedule });
  for (const key of Object.keys(VALUES)) if (state[key] !== null) query.set(key, state[key]);
  if (state.schedule === OWN && state.text) query.set("text", state.text);
  return `#${query}`;
}

// The schedule that the state names, the values it is built with, and what had to change for it.
function scheduleOf(state) {
  if (state.schedule.startsWith(OWN)) {
    const schedule = state.schedule === OWN ? parse(state.text) : GIVEN[state.schedule.slice(OWN.length)];
    return { schedule, facts: factsOf(schedule), grid: sizesOf(schedule), notes: [] };
  }
  const facts = FACTS[state.schedule];
  const wanted = { ranks: state.p, microbatches: state.m, chunks: state.v, memory: state.limit ?? Infinity };
  const { grid, notes } = nearest(state.schedule, wanted, facts);
  return { schedule: build(state.schedule, grid, facts), facts, grid, notes };
}

function sizesOf(schedule) {
  return {
    ranks: schedule.rows.length,
    microbatches: schedule.microbatches,
    chunks: Math.max(...sharesOf(schedule)) * schedule.slices,
    memory: Infinity,
  };
}

// What a text form says of itself; whether pipekern can run it, `pipekern schedule show` says.
const factsOf = ({ synchronous, chains, slices }) => ({
  synchronous,
  duplicates_weights: chains > 1 || !synchronous,
  sliced: slices > 1,
});

function resultOf(state) {
  const found = scheduleOf(state);
  return { ...found, result: simulate(found.schedule, costsOf(state)) };
}

const costsOf = ({ F, B, W, c, pair, kept }) => ({ forward: F, backward: B, weight: W, comm: c, pair, kept });

// The command that gives the same figures.
function commandOf(state, { schedule, grid, facts }) {
  const own = state.schedule.startsWith(OWN);
  const words = ["pipekern schedule simulate", own ? "FILE" : state.schedule];
  if (!own) words.push(`--ranks ${grid.ranks} --microbatches ${grid.microbatches}`);
  if (!own && facts.chunks.most > facts.chunks.least) words.push(`--chunks ${grid.chunks}`);
  if (!own && grid.memory !== Infinity && ["zb-h2", "hanayo"].includes(state.schedule))
    words.push(`--memory ${grid.memory}`);
  words.push(`--forward ${state.F} --backward ${state.B} --weight ${state.W}`);
  if (state.c) words.push(`--comm ${state.c}`);
  if (state.kept !== 1) words.push(`--kept ${state.kept}`);
  if (state.pair !== null && schedule.rows.flat().some(({ paired }) => paired)) words.push(`--pair ${state.pair}`);
  return words.join(" ");
}
