// The text form of a schedule, both ways: the twin of Schedule.parse and str(schedule) in pipekern/schedule/ir.py.

// Reads the text form, as `pipekern schedule show` prints it; throws an Error that names the fault.
function parse(text) {
  const [head = "", ...lines] = text.split(/\r?\n/).filter((line) => !line.startsWith("#"));
  const form =
    /^pipekern-schedule name=(.+) microbatches=(\d+) stage_rank=(\d+(?:,\d+)*)(?: chains=(\d+))?(?: slices=(\d+))?( asynchronous)?$/;
  const match = head.match(form);
  if (!match) throw new Error(`the first line is not “pipekern-schedule name=… microbatches=… stage_rank=…”`);
  const stageRank = match[3].split(",").map(Number);
  const rows = lines
    .slice(0, Math.max(...stageRank) + 1)
    .map((line) => line.split(/\s+/).filter(Boolean).flatMap(parseWord));
  const [microbatches, chains, slices] = [match[2], match[4] ?? 1, match[5] ?? 1].map(Number);
  const schedule = { name: match[1], microbatches, chains, slices, stageRank, rows, synchronous: !match[6] };
  const faults = faultsOf(schedule);
  if (faults.length)
    throw new Error(faults.slice(0, 8).join("; ") + (faults.length > 8 ? `; and ${faults.length - 8} more` : ""));
  return schedule;
}

// What is unknown, on the wrong rank, there twice, or missing.
function faultsOf({ microbatches, chains, slices, stageRank, rows }) {
  const [units, depth] = [microbatches * slices, stageRank.length / chains];
  if (!units || !Number.isInteger(depth))
    return [`${stageRank.length} stages and ${units} micro-batches are no schedule of ${chains} chains`];
  const faults = [];
  const count = new Map();
  rows.forEach((row, rank) =>
    row.forEach(({ op, stage, microbatch }) => {
      const first = Math.floor((microbatch * chains) / units) * depth;
      const word = `${stage}${op}${microbatch}`;
      if (microbatch >= units || stage < first || stage >= first + depth)
        faults.push(`${word}: there is no such stage or micro-batch`);
      else if (stageRank[stage] !== rank)
        faults.push(`rank ${rank} runs ${word}, but stage ${stage} is on rank ${stageRank[stage]}`);
      for (const part of op)
        count.set(`${stage}${part}${microbatch}`, (count.get(`${stage}${part}${microbatch}`) ?? 0) + 1);
    }),
  );
  const trains = rows.flat().some(({ op }) => op !== "F");
  for (const microbatch of range(units))
    for (const stage of range(depth, Math.floor((microbatch * chains) / units) * depth))
      for (const op of trains ? ["F", "B", "W"] : ["F"]) {
        const word = `${stage}${op}${microbatch}`;
        if (count.get(word) !== 1) faults.push(`${word} runs ${count.get(word) ?? 0} times`);
      }
  return faults;
}

function parseWord(word) {
  const parts = word.split("&");
  return parts.map((part, index) => {
    const match = part.match(/^(\d+)(BW|F|B|W)(\d+)$/);
    if (!match) throw new Error(`“${part}” is not an action; write stage, F, B, W or BW, micro-batch: 1BW0`);
    const one = action(match[2], Number(match[1]), Number(match[3]));
    return index < parts.length - 1 ? { ...one, paired: true } : one;
  });
}

// The text form, which pipekern reads back.
function textOf(schedule) {
  const { name, microbatches, stageRank, chains, slices, rows, synchronous } = schedule;
  const head = `pipekern-schedule name=${name} microbatches=${microbatches} stage_rank=${stageRank.join(",")}`;
  const marks =
    (chains > 1 ? ` chains=${chains}` : "") +
    (slices > 1 ? ` slices=${slices}` : "") +
    (synchronous ? "" : " asynchronous");
  const lines = rows.map((row) =>
    row
      .map(({ op, stage, microbatch, paired }) => `${stage}${op}${microbatch}${paired ? "&" : " "}`)
      .join("")
      .trimEnd(),
  );
  return [head + marks, ...lines].join("\n") + "\n";
}
