// `npm start`: this folder on http://localhost:8000, isolated so that WebAssembly may use threads.
import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { extname, join, normalize } from "node:path";

const TYPES = { ".html": "text/html", ".mjs": "text/javascript", ".json": "application/json", ".wasm": "application/wasm" };
const root = import.meta.dirname;

createServer((request, response) => {
  const path = join(root, normalize(decodeURIComponent(new URL(request.url, "http://localhost").pathname)));
  const file = existsSync(path) && statSync(path).isDirectory() ? join(path, "index.html") : path;
  if (!file.startsWith(root) || !existsSync(file)) return response.writeHead(404).end();
  response.writeHead(200, {
    "content-type": TYPES[extname(file)] ?? "application/octet-stream",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
  });
  createReadStream(file).pipe(response);
}).listen(Number(process.env.PORT ?? 8000), "127.0.0.1", function () {
  console.log(`http://localhost:${this.address().port}`);
});
