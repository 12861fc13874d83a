// Keeps what the page fetched, so that it works without a network; a new package brings a new cache.
import { MANIFEST_SHA256 } from "./digest.mjs";

const NAME = `edgeq ${MANIFEST_SHA256}`;
const RUNTIME = "./node_modules/onnxruntime-web/dist/";
const PARTS = ["./", "page.mjs", "edgeq.mjs", "pictures.mjs", "digest.mjs", "package/manifest.json",
  ...["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"].map((name) => RUNTIME + name)];

async function keep() {
  const cache = await caches.open(NAME);
  await cache.addAll(PARTS);
  const { files } = await (await cache.match("package/manifest.json")).json();
  await cache.addAll(Object.keys(files).filter((name) => files[name].needed).map((name) => `package/${name}`));
  for (const name of await caches.keys()) if (name.startsWith("edgeq ") && name !== NAME) await caches.delete(name);
}

async function answered(request) {
  return (await caches.match(request, { ignoreSearch: true })) ?? fetch(request);
}

addEventListener("install", (event) => event.waitUntil(keep().then(() => skipWaiting())));
addEventListener("activate", (event) => event.waitUntil(clients.claim()));
addEventListener("fetch", (event) => event.respondWith(answered(event.request)));
