// The rule of every schedule: rules[name](grid) gives the rows of all ranks. Twins of the generators in
// pipekern/schedule, with which tests compare them action by action. A grid is {ranks, microbatches, chunks, memory};
// memory may be Infinity.
//
// An action is {op, stage, microbatch}; op is F, B, W or BW. One that is `paired` overlaps the action after it.

const range = (count, first = 0) => Array.from({ length: Math.max(count, 0) }, (_, index) => first + index);
const repeat = (count, ...items) => range(count).flatMap(() => items);
const action = (op, stage, microbatch) => ({ op, stage, microbatch });
const ofAll = (op, stage, count) => range(count).map((microbatch) => action(op, stage, microbatch));
const everyRank = (grid, row) => range(grid.ranks).map((rank) => row(rank, grid));

const placements = {
  loop: ({ ranks, chunks }) => range(chunks).flatMap(() => range(ranks)),
  zigzag: ({ ranks, chunks }) => range(chunks).flatMap((chunk) => (chunk % 2 ? range(ranks).reverse() : range(ranks))),
  opposed: ({ ranks }) => [...range(ranks), ...range(ranks).reverse()],
  in_order: ({ ranks }) => range(ranks),
};

// What the rules do not take: each limit gives the nearest value that is taken, and why.
const atLeast = (what, least) => (grid) => {
  const bound = least(grid);
  return grid[what] < bound ? { [what]: bound, why: `at least ${bound}` } : null;
};
const multiple = (what, unit, why) => (grid) => {
  const [value, step] = [grid[what], unit(grid)];
  if (value % step === 0) return null;
  const [below, above] = [value - (value % step), value - (value % step) + step];
  return { [what]: below && value - below < above - value ? below : above, why };
};

const evenRanks = multiple("ranks", () => 2, "an even number of ranks");
const evenMicrobatches = multiple("microbatches", () => 2, "an even number of micro-batches");
const multipleOfRanks = multiple("microbatches", ({ ranks }) => ranks, "a multiple of the ranks");
const limits = {
  "interleaved-1f1b": [multipleOfRanks],
  "zb-interleaved": [multipleOfRanks],
  "zb-h2": [atLeast("memory", ({ ranks, microbatches }) => Math.min(ranks, microbatches))],
  dualpipe: [evenRanks, evenMicrobatches, atLeast("microbatches", ({ ranks }) => 2 * ranks)],
  dualpipev: [atLeast("microbatches", ({ ranks }) => 2 * ranks)],
  chimera: [evenRanks, evenMicrobatches],
  hanayo: [atLeast("memory", () => 1)],
  "pipedream-2bw": [atLeast("microbatches", ({ ranks }) => ranks)],
};

const rules = {
  gpipe: (grid) =>
    everyRank(grid, (rank, { microbatches }) => ["F", "BW"].flatMap((op) => ofAll(op, rank, microbatches))),

  "1f1b": (grid) =>
    everyRank(grid, (rank, { ranks, microbatches }) =>
      warmUpPairsDrain(ofAll("F", rank, microbatches), ofAll("BW", rank, microbatches), ranks - rank - 1),
    ),

  "pipedream-2bw": (grid) => rules["1f1b"](grid),

  "interleaved-1f1b": (grid) => everyRank(grid, interleavedRow),

  "looped-bfs": (grid) =>
    everyRank(grid, (rank, { ranks, microbatches, chunks }) => {
      const stages = range(chunks).map((chunk) => rank + chunk * ranks);
      return [
        ...stages.flatMap((stage) => ofAll("F", stage, microbatches)),
        ...stages.reverse().flatMap((stage) => ofAll("BW", stage, microbatches)),
      ];
    }),

  "zb-h1": (grid) =>
    everyRank(grid, (rank, { ranks, microbatches }) => zeroBubble(rank, microbatches, ranks - rank - 1, rank)),

  "zb-h2": (grid) =>
    everyRank(grid, (rank, { ranks, microbatches, memory }) => {
      const held = Math.max(ranks, Math.floor(Math.min(memory, 2 * ranks - 1)));
      const warmUp = Math.min(2 * (ranks - rank - 1), held - rank - 1);
      return zeroBubble(rank, microbatches, warmUp, held - 1 - warmUp);
    }),

  "zb-interleaved": (grid) => weave(rules["interleaved-1f1b"](grid)),

  // With fewer than 2p - 1 micro-batches, the rows of 2p - 1 without the surplus.
  "zb-v": (grid) =>
    everyRank(grid, (rank, { ranks, microbatches }) => {
      const tokens = zbVRow(ranks, rank, Math.max(microbatches, 2 * ranks - 1));
      return numbered(tokens).filter((one) => one.microbatch < microbatches);
    }),

  "v-half": (grid) =>
    repeatedBlock(grid, (p, i) => [
      2 * i,
      3 * p - i - 2,
      3 * p + (p % 2 ? 0 : 3) + 2 * i - 1,
      6 * p + (p % 2 ? 0 : 3) - i - 2,
    ]),

  "v-min": (grid) =>
    repeatedBlock(grid, (p, i) => [i, 2 * p - i - 1, 2 * p + (p % 3 ? 0 : 2) + i, 4 * p + (p % 3 ? 0 : 2) - i - 1]),

  dualpipe: (grid) =>
    everyRank(grid, (rank, { ranks, microbatches }) => {
      const [there, back, each] = [rank, 2 * ranks - 1 - rank, microbatches / 2];
      const [near, far] = rank < ranks / 2 ? [there, back] : [back, there];
      return numbered(twoDirections(ranks / 2, Math.min(rank, ranks - 1 - rank), each, near, far), { [back]: each });
    }),

  dualpipev: (grid) =>
    everyRank(grid, (rank, { ranks, microbatches }) =>
      numbered(twoDirections(ranks, rank, microbatches, rank, 2 * ranks - 1 - rank)),
    ),

  chimera: (grid) => everyRank(grid, chimeraRow),

  hanayo: (grid) => oldestFirst(grid),

  seq1f1b: (grid) =>
    everyRank(grid, (rank, { ranks, microbatches, chunks: slices }) => {
      const backwards = range(microbatches).flatMap((microbatch) =>
        range(slices).map((piece) => action("BW", rank, (microbatch + 1) * slices - 1 - piece)),
      );
      return warmUpPairsDrain(ofAll("F", rank, microbatches * slices), backwards, ranks - rank - 2 + slices);
    }),
};

// `warmUp` forwards, then one forward and one backward in turn, then the remaining backwards.
function warmUpPairsDrain(forwards, backwards, warmUp) {
  const ahead = Math.min(warmUp, forwards.length);
  return [
    ...forwards.slice(0, ahead),
    ...forwards.slice(ahead).flatMap((forward, index) => [forward, backwards[index]]),
    ...backwards.slice(forwards.length - ahead),
  ];
}

// The k-th forward runs chunk ⌊k/p⌋ mod v, in groups of p micro-batches; the backwards take the chunks in reverse.
function interleavedRow(rank, { ranks, microbatches, chunks }) {
  const turns = range(microbatches * chunks).map((k) => {
    const place = k % (ranks * chunks);
    return { chunk: Math.floor(place / ranks), microbatch: Math.floor(k / (ranks * chunks)) * ranks + (place % ranks) };
  });
  return warmUpPairsDrain(
    turns.map(({ chunk, microbatch }) => action("F", chunk * ranks + rank, microbatch)),
    turns.map(({ chunk, microbatch }) => action("BW", (chunks - 1 - chunk) * ranks + rank, microbatch)),
    2 * (ranks - rank - 1) + (chunks - 1) * ranks,
  );
}

// One forward, one backward after `warmUp` forwards; each W follows the B that is `lag` behind its own.
function zeroBubble(rank, microbatches, warmUp, lag) {
  const order = warmUpPairsDrain(ofAll("F", rank, microbatches), ofAll("B", rank, microbatches), warmUp);
  const late = range(microbatches).slice(Math.max(microbatches - lag, 0));
  return [
    ...order.flatMap((one) =>
      one.op === "B" && one.microbatch >= lag ? [one, action("W", rank, one.microbatch - lag)] : [one],
    ),
    ...late.map((microbatch) => action("W", rank, microbatch)),
  ];
}

// The rows with every BW as a B, and its W where the rank would wait, or where one more forward would hold too much.
function weave(rows) {
  const last = Math.max(...rows.flat().map(({ stage }) => stage));
  const key = ({ op, stage, microbatch }) => `${op[0]} ${stage} ${microbatch}`;
  const peak = (row) => {
    let held = 0;
    return Math.max(...row.map(({ op }) => (held += op === "F" ? 1 : -1)));
  };
  const limit = Math.max(...rows.map(peak));
  const ranks = rows.map((row) => ({ row, at: 0, late: [], held: 0, woven: [] }));
  const done = new Set();
  const ready = ({ op, stage, microbatch }) =>
    op === "F"
      ? stage === 0 || done.has(key(action("F", stage - 1, microbatch)))
      : done.has(key(action("F", stage, microbatch))) &&
        (stage === last || done.has(key(action("B", stage + 1, microbatch))));
  while (ranks.some(({ row, at, late }) => at < row.length || late.length)) {
    const taken = ranks.flatMap((rank) => {
      const next = rank.row[rank.at];
      const goes = next && ready(next) && (next.op !== "F" || rank.held < limit || !rank.late.length);
      const one = goes ? action(next.op[0], next.stage, next.microbatch) : rank.late.shift();
      if (!one) return [];
      if (goes) rank.at += 1;
      if (one.op === "B") rank.late.push(action("W", one.stage, one.microbatch));
      rank.held += { F: 1, B: 0, W: -1 }[one.op];
      rank.woven.push(one);
      return [one];
    });
    taken.forEach((one) => done.add(key(one)));
  }
  return ranks.map(({ woven }) => woven);
}

// A token is an action without its micro-batch, or a pair of them: each operation of a stage takes the micro-batches in
// turn, from `first[stage]` or 0. A BW counts as a B and a W.
function numbered(tokens, first = {}) {
  const done = new Map();
  const next = ({ op, stage }) => {
    const microbatch = (first[stage] ?? 0) + (done.get(op[0] + stage) ?? 0);
    for (const part of op) done.set(part + stage, (done.get(part + stage) ?? 0) + 1);
    return action(op, stage, microbatch);
  };
  return tokens.flatMap((token) =>
    Array.isArray(token) ? [{ ...next(token[0]), paired: true }, next(token[1])] : [next(token)],
  );
}

function zbVRow(ranks, rank, microbatches) {
  const token = (op, chunk) => ({ op, stage: chunk ? 2 * ranks - 1 - rank : rank });
  const [f0, f1, b0, b1, w0, w1] = ["F", "B", "W"].flatMap((op) => [token(op, 0), token(op, 1)]);
  const below = ranks - rank;
  const ahead = 2 * below - 1 + rank;
  return [
    ...repeat(2 * below - 1, f0),
    ...repeat(rank, f1, f0),
    ...repeat(below, f1, b1, w1),
    ...repeat(microbatches - ahead, f0, b0, w0, f1, b1, w1),
    ...repeat(ahead - ranks, b0, w0, f1, b1, w1),
    ...repeat(rank, b0, b1),
    ...repeat(below, b0, w0),
    ...repeat(rank, w1),
    ...repeat(rank, w0),
  ];
}

// DualPipe's program of `rank` in a row of `ranks`. The forwards of stage `near` come from the outer end of the row,
// those of `far` from the inner one, whose rank is the last.
function twoDirections(ranks, rank, microbatches, near, far) {
  const token = (op) => [near, far].map((stage) => ({ op, stage }));
  const [[f0, f1], [b0, b1], [w0, w1], [whole0, whole1]] = ["F", "B", "W", "BW"].map(token);
  const inner = ranks - 1 - rank;
  const split = range(rank + 1, rank + 1).map((index) => (index % 2 ? b0 : b1));
  const weights = [...split.map((one) => (one === b0 ? w0 : w1)), ...repeat(inner, w0)];
  return [
    ...repeat(2 * inner, f0),
    ...repeat(rank + 1, f0, f1),
    ...repeat(inner, b1, w1, f1),
    // Pairs F0&B1 and F1&B0. The innermost rank does not fuse its first, which would wait.
    ...range(microbatches - 2 * ranks + rank + 1).flatMap((step) => [
      ...(step === 0 && inner === 0 ? [f0, whole1] : [[f0, whole1]]),
      [f1, whole0],
    ]),
    ...repeat(inner, whole1, [f1, whole0]),
    // B1 B0, the second half of them split; the W of these fill the drain.
    ...range(rank + 1).map((index) => (index % 2 ? whole0 : whole1)),
    ...split,
    ...weights.slice(0, inner).flatMap((weight) => [weight, b0]),
    ...weights.slice(inner),
  ];
}

// Two opposed pipelines of half the micro-batches, sorted by their time at BW = F.
function chimeraRow(rank, { ranks, microbatches }) {
  const half = microbatches / 2;
  const directions = [
    { stage: rank, first: 0, depth: rank },
    { stage: 2 * ranks - 1 - rank, first: half, depth: ranks - 1 - rank },
  ];
  const timed = directions.flatMap(({ stage, first, depth }) =>
    range(half).flatMap((index) => {
      const start = 2 * ((index % (ranks / 2)) + Math.floor(index / (ranks / 2)) * ranks);
      return [
        { time: start + depth, what: action("F", stage, first + index) },
        { time: start + 2 * ranks - 1 - depth, what: action("BW", stage, first + index) },
      ];
    }),
  );
  return timed.sort((one, other) => one.time - other.time).map(({ what }) => what);
}
