// Run by tests/test_sidecar.py: node sidecar.mjs CASE PROGRAM BUNDLE. Prints one line of JSON.
import process from "node:process";

import { chat, startSidecar } from "../../examples/sidecar/sidecar.mjs";

const [name, program, bundle] = process.argv.slice(2);
const HI = [{ role: "user", content: "hi" }];
const say = (value) => console.log(JSON.stringify(value));

const cases = {
  async answers() {
    const sidecar = await startSidecar(program, [bundle]);
    const pieces = [];
    for await (const piece of chat(sidecar, HI, { max_tokens: 8 })) pieces.push(piece);
    say({ models: sidecar.models, pieces: pieces.length, status: await sidecar.stop() });
  },
  async aborts() {
    const sidecar = await startSidecar(program, [bundle]);
    const stop = new AbortController();
    let pieces = 0;
    try {
      for await (const _ of chat(sidecar, HI, { max_tokens: 400, signal: stop.signal })) {
        pieces += 1;
        stop.abort();
      }
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    }
    say({ pieces, status: await sidecar.stop() });
  },
  async refuses() {
    try {
      await startSidecar(program, [bundle]);
    } catch (error) {
      say({ message: error.message });
    }
  },
  // The parent is killed while an answer is streamed.
  async dies() {
    const sidecar = await startSidecar(program, [bundle]);
    for await (const _ of chat(sidecar, HI, { max_tokens: 400 })) {
      process.stdout.write(JSON.stringify({ pid: sidecar.pid }) + "\n", () => process.kill(process.pid, "SIGKILL"));
      await new Promise(() => {});
    }
  },
};
await cases[name]();
