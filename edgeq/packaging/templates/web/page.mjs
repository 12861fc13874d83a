// The demo page: checks the package, takes a picture from a file or the camera, shows the answer. Nothing leaves it.
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
import { load } from "./edgeq.mjs";

const part = (id) => document.getElementById(id);

function say(words, kind) {
  part("status").textContent = words;
  part("status").className = kind;
}

async function main() {
  ort.env.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
  const model = await load({ ort });
  await navigator.serviceWorker?.register("./offline.mjs", { type: "module" });
  say([`Checked: every digest and the golden runs. Running '${model.variant}'.`, ...model.passedOver].join(" "), "good");
  part("tools").hidden = !model.manifest.preprocessing.layout;
  part("file").onchange = (event) => event.target.files[0] && show(model, event.target.files[0]);
  part("camera").onclick = () => openCamera(model).catch(fail);
}

async function show(model, source) {
  const bitmap = await createImageBitmap(source, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const start = performance.now();
  const answers = await model.answer(context.getImageData(0, 0, bitmap.width, bitmap.height));
  const took = performance.now() - start;
  part("shown").src = URL.createObjectURL(await canvas.convertToBlob());
  part("shown").hidden = false;
  const rows = Array.isArray(answers) ? answers[0] : Object.entries(answers).map(([label, { dims }]) => ({ label, score: dims }));
  part("answers").replaceChildren(...rows.map(({ label, score }) => row(label, Number.isFinite(score) ? score.toFixed(3) : String(score))));
  say(`${took.toFixed(1)} ms with '${model.variant}'. The picture stayed on this device.`, "good");
}

function row(...words) {
  const line = document.createElement("tr");
  line.append(...words.map((word) => Object.assign(document.createElement("td"), { textContent: word })));
  return line;
}

async function openCamera(model) {
  const video = part("video");
  video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  await video.play();
  video.hidden = part("shot").hidden = false;
  part("shot").onclick = () => show(model, video).catch(fail);
}

const fail = (fault) => say(`Refused: ${fault.message ?? fault}`, "bad");
addEventListener("unhandledrejection", (event) => fail(event.reason));
main().catch(fail);
