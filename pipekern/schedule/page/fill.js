// The rules that fill time step by step: V-Half and V-Min (a repeated block, then filled), and Hanayo (oldest first).

const PERIOD = 6;
const LOOK_AHEAD = 2 * PERIOD;

// The block of every rank repeated; `starts(ranks, rank)` are the steps of the first F0, F1, B1 and B0. Then filled
// twice within the memory that this takes: from the end backwards, and from the start forwards.
function repeatedBlock(grid, starts) {
  const rows = everyRank(grid, (rank) => blockRow(grid, rank, starts(grid.ranks, rank)));
  const cap = Math.max(...rows.map(mostHeld));
  const last = 2 * grid.ranks - 1;
  const key = (one) => (one.microbatch * (last + 1) + one.stage) * 3 + "FBW".indexOf(one.op);
  const before = new Map(rows.flat().map((one) => [key(one), inputs(one, last).map(key)]));
  const after = new Map([...before.keys()].map((one) => [one, []]));
  for (const [one, sources] of before) for (const source of sources) after.get(source).push(one);
  const reversed = (all) => all.map((row) => [...row].reverse());
  const late = fill(reversed(rows), { needs: (one) => after.get(key(one)), key, cap, grows: "W", shrinks: "F" });
  return fill(reversed(late), { needs: (one) => before.get(key(one)), key, cap, grows: "F", shrinks: "W" });
}

function blockRow({ ranks, microbatches }, rank, starts) {
  const [there, back] = [rank, 2 * ranks - 1 - rank];
  const kinds = [
    ["F", there],
    ["F", back],
    ["B", back],
    ["B", there],
  ];
  const steps = new Map();
  kinds.forEach(([op, stage], index) => {
    for (const microbatch of range(microbatches))
      steps.set(starts[index] + PERIOD * microbatch, action(op, stage, microbatch));
  });
  const [row, weights] = [[], []];
  for (const step of range(Math.max(...steps.keys()) + 1)) {
    const one = steps.get(step);
    if (one) row.push(one);
    else if (weights.length) row.push(weights.shift());
    if (one?.op === "B") weights.push({ ...one, op: "W" });
  }
  return [...row, ...weights];
}

// The most chunks that a row holds from F to W.
function mostHeld(row) {
  let [held, most] = [0, 0];
  for (const { op } of row) {
    held += (op === "F") - (op === "W");
    most = Math.max(most, held);
  }
  return most;
}

// What an action of a chain of stages 0 … last, with B and W apart, waits for.
function inputs({ op, stage, microbatch }, last) {
  if (op === "W") return [action("B", stage, microbatch)];
  if (op === "F") return stage ? [action("F", stage - 1, microbatch)] : [];
  const own = action("F", stage, microbatch);
  return stage < last ? [own, action("B", stage + 1, microbatch)] : [own];
}

// Unit steps; in each, every rank runs the first of its next actions that can run and keeps within the cap. `grows`
// is the operation that takes memory and `shrinks` the one that gives it back: backwards in time these are W and F.
function fill(rows, { needs, key, cap, grows, shrinks }) {
  const change = (one) => (one.op === grows) - (one.op === shrinks);
  const left = rows.map((row) => [...row]);
  const held = left.map(() => 0);
  const out = left.map(() => []);
  const done = new Set();
  const runsNow = (row, now) => {
    let peak = now;
    for (let index = 0; index < Math.min(row.length, LOOK_AHEAD); index++) {
      const fits = index === 0 || row[index].op !== grows || peak < cap;
      if (fits && needs(row[index]).every((one) => done.has(one))) return index;
      now += change(row[index]);
      peak = Math.max(peak, now);
    }
    return -1;
  };
  while (left.some((row) => row.length)) {
    const made = [];
    left.forEach((row, rank) => {
      const index = runsNow(row, held[rank]);
      if (index < 0) return;
      const [one] = row.splice(index, 1);
      held[rank] += change(one);
      out[rank].push(one);
      made.push(key(one));
    });
    for (const one of made) done.add(one);
  }
  return out;
}

// Hanayo: at BW = 2F, whoever is free takes the oldest backward it has, else the oldest forward. A micro-batch that
// leaves lets another one in, where memory caps those that are on their way.
function oldestFirst(grid) {
  const stageRank = placements.zigzag(grid);
  const [last, limit] = [stageRank.length - 1, Math.floor(Math.min(grid.memory, grid.microbatches))];
  const rows = everyRank(grid, () => []);
  const waiting = everyRank(grid, () => []);
  const free = rows.map(() => 0);
  const agenda = new Map(); // time → [{rank, one}], without `one` where a rank only becomes free
  const note = (time, event) => agenda.set(time, [...(agenda.get(time) ?? []), event]);
  let events = limit;
  for (const microbatch of range(limit)) note(0, { rank: 0, one: action("F", 0, microbatch) });
  for (let now = 0; events; now++) {
    const touched = new Set();
    for (const { rank, one } of agenda.get(now) ?? []) {
      events -= 1;
      touched.add(rank);
      if (one) insert(waiting[rank], one);
    }
    agenda.delete(now);
    for (const rank of touched) {
      if (free[rank] > now || !waiting[rank].length) continue;
      const chosen = waiting[rank].shift();
      rows[rank].push(chosen);
      free[rank] = now + (chosen.op === "F" ? 1 : 2);
      note(free[rank], { rank });
      events += 1;
      const next = following(chosen, last, limit);
      if (next.microbatch >= grid.microbatches) continue;
      note(free[rank], { rank: stageRank[next.stage], one: next });
      events += 1;
    }
  }
  return rows;
}

// Into a list that is sorted: backwards first, then the older micro-batch, then the later stage.
function insert(sorted, one) {
  const order = (other) =>
    (one.op === "F") - (other.op === "F") || one.microbatch - other.microbatch || other.stage - one.stage;
  const place = sorted.findIndex((other) => order(other) < 0);
  sorted.splice(place < 0 ? sorted.length : place, 0, one);
}

function following({ op, stage, microbatch }, last, limit) {
  if (op === "F") return stage < last ? action("F", stage + 1, microbatch) : action("BW", stage, microbatch);
  return stage ? action("BW", stage - 1, microbatch) : action("F", 0, microbatch + limit);
}
