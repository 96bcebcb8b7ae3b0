// Runs `edgelm serve` from a JavaScript program, such as Electron's main process or any Node program.
//
// The server chooses a free port and prints it in one line of JSON. Its standard input is a pipe from this process: if
// this process ends, even if it is killed, the pipe closes and the server exits.

import { spawn } from "node:child_process";
import { createInterface } from "node:readline";

/**
 * Start a server and wait until its first model is loaded.
 *
 * program: path of `edgelm` or of a frozen command line; bundles: folders; options: more arguments of `edgelm serve`.
 * Returns { address, models, pid, stop, ended }: `stop()` ends the server, `ended` is a promise of its exit status.
 * Rejects with the server's last line on standard error if it cannot start.
 */
export function startSidecar(program, bundles, options = []) {
  const child = spawn(program, ["serve", ...bundles, "--port", "0", "--ready-json", ...options], {
    stdio: ["pipe", "pipe", "pipe"],
    windowsHide: true,
  });
  let words = "";
  child.stderr.setEncoding("utf8").on("data", (text) => {
    words = (words + text).slice(-2000);
  });
  const ended = new Promise((resolve) => child.once("close", (status) => resolve(status)));
  const stop = () => {
    child.stdin.end();
    return ended;
  };
  return new Promise((resolve, reject) => {
    child.once("error", reject);
    child.once("close", () => reject(new Error(words.trim().split("\n").pop() || "the server ended")));
    createInterface({ input: child.stdout }).once("line", (line) => {
      resolve({ ...JSON.parse(line), stop, ended });
    });
  });
}

/** Yield the text of an answer in pieces. signal: an AbortSignal; aborting also stops the server's computation. */
export async function* chat(sidecar, messages, { signal, ...settings } = {}) {
  const response = await fetch(`${sidecar.address}/v1/chat/completions`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ model: sidecar.models[0], messages, stream: true, ...settings }),
    signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  let rest = "";
  for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((one) => one.startsWith("data: ") && one !== "data: [DONE]")) {
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      const piece = event.choices[0]?.delta?.content;
      signal?.throwIfAborted(); // one read may contain several pieces
      if (piece) yield piece;
    }
  }
}
