// node talk.mjs EDGELM BUNDLE "a question": starts the server, streams the answer to standard output, stops the server.

import process from "node:process";

import { chat, startSidecar } from "./sidecar.mjs";

const [program, bundle, question = "Tell me about the sea."] = process.argv.slice(2);
const sidecar = await startSidecar(program, [bundle]);
console.error(`${sidecar.models[0]} at ${sidecar.address}, process ${sidecar.pid}`);
for await (const piece of chat(sidecar, [{ role: "user", content: question }], { max_tokens: 64 })) {
  process.stdout.write(piece);
}
console.log();
await sidecar.stop();
