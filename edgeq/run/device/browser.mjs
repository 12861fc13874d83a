// What runs in a browser as a device: it takes jobs from the server it came from and sends back what they give.
// The jobs and their arrays are those of agent.py; digests are checked here too, before each use.

const KINDS = {
  "<f4": ["float32", Float32Array], "<f8": ["float64", Float64Array], "<f2": ["float16", Uint16Array],
  "<i2": ["int16", Int16Array], "<u2": ["uint16", Uint16Array], "<i4": ["int32", Int32Array],
  "<u4": ["uint32", Uint32Array], "<i8": ["int64", BigInt64Array], "<u8": ["uint64", BigUint64Array],
  "|i1": ["int8", Int8Array], "|u1": ["uint8", Uint8Array], "|b1": ["bool", Uint8Array],
};
const DTYPES = Object.fromEntries(Object.entries(KINDS).map(([dtype, [type]]) => [type, dtype]));
const settings = await (await fetch("/settings")).json();
const ort = await import(`/ort/${settings.build}`);
ort.env.logLevel = "error";

class Failure extends Error {
  constructor(kind, message) { super(message); this.kind = kind; }
}

async function facts() {
  const adapter = settings.provider === "webgpu" && navigator.gpu ? await navigator.gpu.requestAdapter() : null;
  const { vendor = "", architecture = "", description = "" } = adapter?.info ?? {};
  return {
    machine: settings.provider, system: navigator.userAgent.match(/[A-Za-z]*Chrome\/[\d.]+|Firefox\/[\d.]+|$/)[0],
    cores: navigator.hardwareConcurrency, runtime: ort.env.versions.web, isolated: self.crossOriginIsolated,
    adapter: adapter ? [vendor, architecture, description].filter(Boolean).join(" ") || "unnamed" : "",
  };
}

async function file(name, digest) {
  const bytes = await (await fetch(`/files/${name}`)).arrayBuffer();
  if (digest !== await sha256(bytes)) throw new Failure("altered", `${name} isn't what was sent: its sha256 differs`);
  return bytes;
}

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function open(model, files) {
  const [main, ...others] = model.files;
  const folder = main.slice(0, main.indexOf("/") + 1);
  const externalData = await Promise.all(others.map(async (name) => (
    { path: name.slice(folder.length), data: new Uint8Array(await file(name, files[name])) })));
  try {
    return await ort.InferenceSession.create(await file(main, files[main]), {
      executionProviders: [settings.provider], externalData, extra: { session: nested(model.session) },
    });
  } catch (error) {
    throw error.kind ? error : new Failure("model", `${model.name} can't be loaded: ${first(error)}`);
  }
}

// "session.a.b": v -> {a: {b: v}}, as onnxruntime-web wants it.
function nested(entries) {
  const tree = {};
  for (const [key, value] of Object.entries(entries)) {
    const words = key.replace(/^session\./, "").split(".");
    words.slice(0, -1).reduce((branch, word) => (branch[word] ??= {}), tree)[words.at(-1)] = value;
  }
  return tree;
}

const first = (error) => String(error.message ?? error).split("\n")[0];

async function feedsOf(job) {
  const data = await file(job.feeds.file, job.files[job.feeds.file]);
  return job.feeds.index.map((row) => Object.fromEntries(row.map((one) => {
    const [type, Kind] = KINDS[one.dtype];
    const count = one.shape.reduce((a, b) => a * b, 1);
    return [one.name, new ort.Tensor(type, new Kind(data, one.offset, count), one.shape)];
  })));
}

async function run(session, model, feed, outputs) {
  try {
    return await session.run(feed, outputs);
  } catch (error) {
    throw new Failure("run", `${model.name} fails while running: ${first(error)}`);
  }
}

const taken = (session, feed) => Object.fromEntries(session.inputNames.map((name) => [name, feed[name]]));

async function outputs(job, name) {
  const [model] = job.models;
  const session = await open(model, job.files);
  const names = job.outputs.length ? job.outputs : session.outputNames;
  const [index, parts] = [[], []];
  let offset = 0;
  for (const feed of await feedsOf(job)) {
    const found = await run(session, model, taken(session, feed), names);
    index.push(names.map((key) => {
      const { data, dims, type } = found[key];
      const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength).slice();
      parts.push(bytes);
      offset += bytes.length;
      return { name: key, dtype: DTYPES[type], shape: dims, offset: offset - bytes.length };
    }));
  }
  await session.release();
  const bytes = await new Blob(parts).arrayBuffer();
  await fetch(`/made/${name}.out`, { method: "POST", body: bytes });
  return { index, files: { [`${name}.out`]: await sha256(bytes) } };
}

async function lap(contender, feed) {
  const start = performance.now();
  await contender.session.run(taken(contender.session, feed), contender.session.outputNames);
  return performance.now() - start;
}

async function compare(job) {
  const feeds = await feedsOf(job);
  const contenders = [];
  for (const model of job.models) {
    const start = performance.now();
    const one = { model, session: await open(model, job.files), laps: [] };
    one.load_ms = performance.now() - start;
    const loaded = performance.now();
    await run(one.session, model, taken(one.session, feeds[0]), one.session.outputNames);
    one.first_ms = performance.now() - loaded;
    one.perTurn = Math.min(Math.max(Math.round(20 / await lap(one, feeds[0])), 2), 20);
    contenders.push(one);
  }
  const start = performance.now();
  for (let round = 0; round < 2000 && (round < 3 || performance.now() - start < job.seconds * 1e3); round++) {
    const feed = feeds[round % feeds.length];
    const order = round % 2 ? [...contenders].reverse() : contenders;
    for (const one of order) {
      await lap(one, feed); // pays for the caches the others took
      for (let turn = 0; turn < one.perTurn; turn++) one.laps.push(await lap(one, feed));
    }
  }
  for (const one of contenders) await one.session.release();
  const timings = Object.fromEntries(contenders.map((one) => [one.model.name, {
    laps_ms: one.laps, laps_per_turn: one.perTurn, load_ms: one.load_ms, first_ms: one.first_ms }]));
  return { timings, before: {}, after: {} };
}

// Back to back for job.seconds, in windows; a page sees neither clocks nor heat nor energy.
async function sustained(job) {
  const [model] = job.models;
  const contender = { session: await open(model, job.files) };
  const feeds = await feedsOf(job);
  await run(contender.session, model, taken(contender.session, feeds[0]), contender.session.outputNames);
  const [windows, start] = [[], performance.now()];
  let count = 0;
  while (windows.length < 12 && (!windows.length || performance.now() < start + job.seconds * 1e3)) {
    const [end, laps] = [start + job.seconds * 1e3 * (windows.length + 1) / 12, []];
    while (!laps.length || performance.now() < end) laps.push(await lap(contender, feeds[count++ % feeds.length]));
    windows.push({ laps_ms: laps, at_s: (performance.now() - start) / 1e3 });
  }
  await contender.session.release();
  return { before: { at_s: 0 }, windows };
}

// A page can't tell how much memory a session takes; 0 says so.
async function memory(job) {
  const { timings } = await compare({ ...job, models: job.models.slice(0, 1), seconds: 0 });
  const [{ load_ms, first_ms }] = Object.values(timings);
  return { peak_bytes: 0, load_ms, first_ms };
}

const TASKS = { outputs, compare, memory, sustained };

async function answer({ name, job }) {
  ort.env.wasm.numThreads = job.threads;
  try {
    return await TASKS[job.task](job, name);
  } catch (error) {
    if (error.kind) return { error: [error.kind, error.message] };
    return { bug: `${error.stack ?? error}` };
  }
}

await fetch("/facts", { method: "POST", body: JSON.stringify(await facts()) });
for (;;) {
  const response = await fetch("/job");
  if (response.status !== 200) continue; // nothing to do yet
  const order = await response.json();
  await fetch("/result", { method: "POST", body: JSON.stringify(await answer(order)) });
}
