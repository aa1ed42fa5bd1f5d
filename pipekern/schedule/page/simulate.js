// A schedule from its rule, and its exact timeline. The twin of pipekern/schedule/simulate.py.
//
// A schedule is {name, microbatches, slices, chains, synchronous, stageRank, rows}. Times are counted in integer
// ticks, so that every figure is exact: costs are decimals of at most three places.

const THOUSAND = 1000;
const gcd = (a, b) => (b ? gcd(b, a % b) : a);
const lcm = (a, b) => (a / gcd(a, b)) * b;

// The nearest grid that the schedule `name` takes, with a note for each value that had to change.
function nearest(name, wanted, facts) {
  const grid = { ...wanted };
  const notes = [];
  const { least, most, step } = facts.chunks;
  const chunks = least + Math.floor((Math.min(Math.max(grid.chunks, least), most) - least) / step) * step;
  if (chunks !== grid.chunks && least !== most)
    notes.push({ what: "chunks", value: chunks, why: step > 1 ? "an even number" : `at least ${least}` });
  grid.chunks = chunks;
  for (const limit of limits[name] ?? []) {
    const mend = limit(grid);
    if (!mend) continue;
    const { why, ...change } = mend;
    const [[what, value]] = Object.entries(change);
    grid[what] = value;
    notes.push({ what, value, why });
  }
  return { grid, notes };
}

function build(name, grid, facts) {
  return {
    name,
    microbatches: grid.microbatches,
    slices: facts.sliced ? grid.chunks : 1,
    chains: facts.chains,
    synchronous: facts.synchronous,
    stageRank: placements[facts.placement](grid),
    rows: rules[name](grid),
  };
}

// The number of stages into which each stage's rank has cut its share of the model.
function sharesOf({ stageRank, chains }) {
  const chain = (stage) => Math.floor(stage / (stageRank.length / chains));
  return stageRank.map(
    (rank, stage) => stageRank.filter((other, index) => other === rank && chain(index) === chain(stage)).length,
  );
}

// Costs in ticks, `scale` of them a microsecond. `pair` is null for the sum of its parts.
function inTicks(schedule, { forward, backward, weight, comm, pair }) {
  const shares = sharesOf(schedule);
  const parts = shares.reduce(lcm, 1) * schedule.slices;
  const ticks = (value, share) => Math.round(value * THOUSAND) * (parts / share);
  const each = (value) => shares.map((share) => ticks(value, share * schedule.slices));
  const [F, B, W] = [forward, backward, weight].map(each);
  const costs = { F, B, W, BW: B.map((value, stage) => value + W[stage]) };
  return { scale: THOUSAND * parts, costs, comm: ticks(comm, 1), pair: pair === null ? null : each(pair) };
}

// Makespan, span and busy in microseconds, bubbles, peaks and messages; spans and curves in ticks, `scale` of them a
// microsecond. Throws an Error where the order deadlocks.
function simulate(schedule, given) {
  const { scale, costs, comm, pair } = inTicks(schedule, given);
  const state = { ...results(schedule), comm, messages: 0, clock: schedule.rows.map(() => 0) };
  const spans = schedule.rows.map(() => []);
  const position = schedule.rows.map(() => 0);
  for (let moved = true; moved;) {
    moved = false;
    schedule.rows.forEach((row, rank) => {
      for (let index = position[rank]; index < row.length; index = position[rank]) {
        const group = row[index].paired && index + 1 < row.length ? [row[index], row[index + 1]] : [row[index]];
        if (group.some((one) => state.missing(one))) break;
        const start = Math.max(state.clock[rank], ...group.map((one) => state.arrival(one, rank)));
        const sum = group.reduce((total, one) => total + costs[one.op][one.stage], 0);
        const end = start + (pair && group.length > 1 ? pair[group[0].stage] : sum);
        for (const one of group) {
          state.finish(one, end);
          spans[rank].push({ ...one, start, end });
        }
        state.clock[rank] = end;
        position[rank] += group.length;
        moved = true;
      }
    });
  }
  refuseDeadlock(schedule, position, state);
  return {
    ...figures(state, spans, scale),
    ...memory(schedule, spans, given.kept),
    messages: state.messages,
    spans,
    scale,
  };
}

function refuseDeadlock({ rows }, position, state) {
  const word = ({ op, stage, microbatch }) => `${stage}${op}${microbatch}`;
  const all = rows.flat();
  const faults = rows.flatMap((row, rank) => {
    const at = position[rank];
    if (at === row.length) return [];
    const need = state.missing(row[at]) ?? state.missing(row[at + 1]);
    const maker = all.find(
      ({ op, stage, microbatch }) => op[0] === need.op && stage === need.stage && microbatch === need.microbatch,
    );
    const wanted = maker ? word(maker) : `${word(need)}, which no rank runs`;
    return [`rank ${rank} stuck at ${word(row[at])} (instruction ${at}): waits for ${wanted}`];
  });
  if (faults.length) throw new Error(`schedule deadlocks: ${faults.join("; ")}`);
}

// When each output and gradient is made, and what an action waits for.
function results({ stageRank, chains, slices, microbatches }) {
  const units = microbatches * slices;
  const depth = stageRank.length / chains;
  const output = new Map();
  const gradient = new Map();
  const at = (stage, microbatch) => stage * units + microbatch;
  const source = ({ op, stage }) => {
    if (op === "F") return stage % depth ? stage - 1 : null;
    return op === "W" || (stage + 1) % depth === 0 ? null : stage + 1;
  };
  const needs = (one) => {
    const { op, stage, microbatch } = one;
    if (op === "W") return [action("B", stage, microbatch)];
    const [kind, from] = [op === "F" ? "F" : "B", source(one)];
    const found = op === "F" ? [] : [action("F", stage, microbatch)];
    if (from !== null) found.push(action(kind, from, microbatch));
    const slice = op === "F" ? microbatch - 1 : microbatch + 1;
    if ((op === "F" ? microbatch : slice) % slices) found.push(action(kind, stage, slice));
    return found;
  };
  return {
    missing: (one) =>
      needs(one).find(({ op, stage, microbatch }) => !(op === "F" ? output : gradient).has(at(stage, microbatch))),
    arrival(one, rank) {
      const from = source(one);
      if (from === null || stageRank[from] === rank) return 0;
      this.messages += 1;
      return (one.op === "F" ? output : gradient).get(at(from, one.microbatch)) + this.comm;
    },
    finish({ op, stage, microbatch }, end) {
      if (op === "F") output.set(at(stage, microbatch), end);
      else if (op !== "W") gradient.set(at(stage, microbatch), end);
    },
  };
}

function figures({ clock }, spans, scale) {
  const busy = spans.map((row) =>
    row.reduce((sum, one, index) => sum + (row[index - 1]?.paired ? 0 : one.end - one.start), 0),
  );
  const makespan = Math.max(...clock);
  const span = Math.max(...spans.map((row, rank) => clock[rank] - (row[0]?.start ?? 0)));
  const total = busy.reduce((sum, one) => sum + one, 0);
  const idle = (length) => (length ? (length * clock.length - total) / (length * clock.length) : 0);
  return {
    makespan: makespan / scale,
    span: span / scale,
    busy: busy.map((one) => one / scale),
    bubble: idle(makespan),
    spanBubble: idle(span),
  };
}

// What every rank holds, in activations of one micro-batch through its whole share: whole from F to B, `kept` of it
// to W. A curve is a list of [tick, held], held from then on.
function memory(schedule, spans, kept) {
  const shares = sharesOf(schedule);
  const scale = shares.reduce(lcm, 1) * schedule.slices * THOUSAND;
  const stays = Math.round(kept * THOUSAND);
  const freed = { F: 0, B: THOUSAND - stays, W: stays, BW: THOUSAND };
  const curves = spans.map((row) => {
    let held = 0;
    return row.flatMap(({ op, stage, start, end }) => {
      const unit = scale / shares[stage] / schedule.slices / THOUSAND;
      held += op === "F" ? unit * THOUSAND : -unit * freed[op];
      return [[op === "F" ? start : end, held / scale]];
    });
  });
  return { curves, peaks: curves.map((curve) => curve.reduce((most, [, held]) => Math.max(most, held), 0)) };
}
