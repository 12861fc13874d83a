// Opens the edgeq package in ./package with onnxruntime-web, and refuses it when a byte or a result is wrong.
//
//   import * as ort from "onnxruntime-web/wasm";
//   import { load } from "./edgeq.mjs";
//   const model = await load({ ort });
//   const [answer] = await model.answer(imageData);   // [{ label, index, score }, …], best first
import { MANIFEST_SHA256 } from "./digest.mjs";
import { canaryPicture, preprocess } from "./pictures.mjs";

const RUNS = 5; // of a golden run, to tell which variant is fastest
const CLEARLY = 0.95; // a later variant must beat the preferred one by more than noise
const PROVIDERS = { CPUExecutionProvider: "wasm", WebGpuExecutionProvider: "webgpu" };
const ARRAYS = {
  float32: Float32Array, float64: Float64Array, int8: Int8Array, uint8: Uint8Array, int16: Int16Array,
  uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array, int64: BigInt64Array, uint64: BigUint64Array,
  bool: Uint8Array,
};

/**
 * A checked model. Throws an Error that says what is wrong.
 * ort: the module onnxruntime-web; base: where ./package lies; trust: Uint8Array(32), an Ed25519 key that must have
 * signed it; fresh: repeat the golden runs although they went well before.
 */
export async function load({ ort, base = new URL("./package/", import.meta.url), trust = null, fresh = false }) {
  const text = await fetched(base, "manifest.json");
  if ((await sha256(text)) !== MANIFEST_SHA256) throw new Error("manifest.json is altered: its sha256 isn't the page's");
  if (trust) await checkSignature(text, JSON.parse(decode(await fetched(base, "manifest.sig"))), trust);
  const manifest = JSON.parse(decode(text));
  const files = await checkedFiles(base, manifest);
  if (manifest.canary.at) checkCanary(manifest);
  const choice = await chosen(ort, manifest, files, fresh);
  for (const words of choice.passedOver) console.info(`edgeq: ${words}; running '${choice.variant.name}'`);
  return opened(ort, manifest, choice);
}

async function fetched(base, name) {
  const response = await fetch(new URL(name, base));
  if (!response.ok) throw new Error(`${name} can't be fetched: status ${response.status}`);
  return new Uint8Array(await response.arrayBuffer());
}

const decode = (bytes) => new TextDecoder().decode(bytes);
const unhex = (text) => Uint8Array.from(text.match(/../g), (pair) => parseInt(pair, 16));

async function sha256(bytes) {
  if (!globalThis.crypto?.subtle) throw new Error("digests need a secure page: open it by https or on localhost");
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function checkSignature(text, words, trust) {
  const key = await crypto.subtle.importKey("raw", trust, "Ed25519", false, ["verify"]);
  if (!(await crypto.subtle.verify("Ed25519", key, unhex(words.signature), text)))
    throw new Error("manifest.sig is no signature of manifest.json by the trusted key");
}

async function checkedFiles(base, manifest) {
  const names = Object.keys(manifest.files).filter((name) => manifest.files[name].needed);
  const files = Object.fromEntries(await Promise.all(names.map(async (name) => [name, await fetched(base, name)])));
  for (const name of names)
    if ((await sha256(files[name])) !== manifest.files[name].sha256)
      throw new Error(`${name} is altered: its sha256 isn't the manifest's`);
  return files;
}

function checkCanary({ canary, preprocessing }) {
  const { data } = preprocess(canaryPicture(canary.height, canary.width), preprocessing);
  canary.at.forEach((index, row) => {
    if (!(Math.abs(data[index] - canary.values[row]) <= canary.tolerance))
      throw new Error(`preprocessing makes ${data[index]} of the canary picture at ${index}, expected ${canary.values[row]}`);
  });
}

/** The first variant that runs and repeats its golden runs, unless a later one is clearly faster; remembered. */
async function chosen(ort, manifest, files, fresh) {
  const place = `edgeq ${MANIFEST_SHA256}`;
  const stamp = `${navigator.userAgent} ${ort.env.versions.web ?? ort.env.versions.common}`;
  const known = fresh ? null : remembered(place, stamp);
  const passedOver = [];
  let best = null;
  for (const variant of manifest.variants) {
    if (known && variant.name !== known.variant) continue;
    try {
      const session = await open(ort, variant, files);
      if (known) return { session, variant, passedOver: known.passedOver };
      const milliseconds = await repeatGolden(ort, session, variant, files[manifest.golden], manifest.variants.length > 1);
      if (best && milliseconds >= CLEARLY * best.milliseconds) continue;
      if (best) passedOver.push(`'${best.variant.name}' isn't used: ${best.milliseconds} ms a run, '${variant.name}' ${milliseconds}`);
      best = { session, variant, milliseconds, passedOver };
    } catch (fault) {
      passedOver.push(`'${variant.name}' isn't used: ${fault.message ?? fault}`);
    }
  }
  if (!best) throw new Error(`no variant runs here: ${passedOver.join("; ")}`);
  localStorage.setItem(place, JSON.stringify({ stamp, variant: best.variant.name, passedOver }));
  return best;
}

function remembered(place, stamp) {
  const found = JSON.parse(localStorage.getItem(place) ?? "{}");
  return found.stamp === stamp ? found : null;
}

async function open(ort, variant, files) {
  const provider = PROVIDERS[variant.requires.provider];
  if (!provider) throw new Error(`browsers have no ${variant.requires.provider}`);
  const others = Object.keys(files).filter((name) => !name.endsWith(".onnx"));
  const externalData = others.map((path) => ({ path, data: files[path] }));
  return ort.InferenceSession.create(files[variant.model], { executionProviders: [provider], externalData });
}

/** Throws unless all golden runs are repeated; the median of some more in ms, 0 when nobody asks for times. */
async function repeatGolden(ort, session, { golden }, bytes, timed) {
  let feeds = null;
  for (const [index, run] of golden.runs.entries()) {
    const inputs = Object.entries(run.inputs).map(([name, reference]) => [name, tensor(ort, bytes, reference)]);
    const results = await session.run(Object.fromEntries(inputs));
    feeds ??= Object.fromEntries(inputs);
    for (const [name, tolerance] of Object.entries(golden.tolerances)) {
      const [got, want] = [results[name], tensor(ort, bytes, run.outputs[name])];
      if (String(got.dims) !== String(want.dims) || !near(got.data, want.data, tolerance))
        throw new Error(`'${name}' differs from golden sample ${index} by more than ${tolerance}`);
    }
  }
  const laps = [];
  for (let lap = 0; timed && feeds && lap < RUNS; lap++) {
    const start = performance.now();
    await session.run(feeds);
    laps.push(performance.now() - start);
  }
  return laps.sort((a, b) => a - b)[RUNS >> 1] ?? 0;
}

function tensor(ort, bytes, { dtype, shape, offset, bytes: size }) {
  if (!ARRAYS[dtype]) throw new Error(`golden runs of type ${dtype} can't be repeated in a browser`);
  return new ort.Tensor(dtype, new ARRAYS[dtype](bytes.slice(offset, offset + size).buffer), shape);
}

const near = (got, want, tolerance) =>
  got.length === want.length &&
  want.every((value, i) => Math.abs(Number(got[i]) - Number(value)) <= tolerance || Object.is(got[i], value));

function opened(ort, manifest, { session, variant, passedOver }) {
  const run = (feeds) => session.run(feeds);
  const answer = async (picture) => {
    if (!manifest.preprocessing.layout) throw new Error("the package holds no preprocessing for pictures: use run()");
    const { data, dims, dtype } = preprocess(picture, manifest.preprocessing);
    const results = await run({ [session.inputNames[0]]: new ort.Tensor(dtype, data, dims) });
    const how = manifest.postprocessing;
    return how.output ? postprocess(results[how.output], how, manifest.labels) : results;
  };
  return { run, answer, variant: variant.name, passedOver, manifest };
}

/** Scores [..., classes] -> a list a row of { label, index, score }, best first. */
export function postprocess({ data, dims }, how, labels) {
  const classes = dims[dims.length - 1];
  return Array.from({ length: data.length / classes }, (_, row) => {
    let scores = Array.from(data.subarray(row * classes, (row + 1) * classes), Number);
    if (how.activation === "softmax") {
      const top = scores.reduce((a, b) => Math.max(a, b), -Infinity);
      scores = scores.map((score) => Math.exp(score - top));
      const sum = scores.reduce((a, b) => a + b, 0);
      scores = scores.map((score) => score / sum);
    } else if (how.activation === "sigmoid") scores = scores.map((score) => 1 / (1 + Math.exp(-score)));
    return scores
      .map((score, index) => ({ label: labels[index] ?? String(index), index, score }))
      .sort((a, b) => b.score - a.score || a.index - b.index)
      .slice(0, how.top || undefined)
      .filter(({ score }) => score >= how.threshold);
  });
}
