// OpenAI's client for Node against the server. usage: node client.mjs BASE_URL
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const say = (content) => [{ role: "user", content }];
const schema = { type: "object", properties: { n: { enum: [5] } }, required: ["n"], additionalProperties: false };
const tool = { type: "function", function: { name: "weather", parameters: { type: "object", properties: { city: { type: "string", maxLength: 20 } }, required: ["city"], additionalProperties: false } } };

const checks = {
  async chat() {
    const done = await client.chat.completions.create({ model: "fake", messages: say("hi") });
    assert.equal(done.choices[0].message.content, "Hello there");
  },
  async stream() {
    let text = "", usage;
    for await (const chunk of await client.chat.completions.create({ model: "fake", messages: say("hi"), stream: true, stream_options: { include_usage: true } })) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, "Hello there");
    assert.equal(usage.completion_tokens, 11);
  },
  async tools() {
    const done = await client.chat.completions.stream({ model: "fake", messages: say("weather?"), tools: [tool] }).finalChatCompletion();
    assert.equal(done.choices[0].finish_reason, "tool_calls");
    assert.deepEqual(JSON.parse(done.choices[0].message.tool_calls[0].function.arguments), { city: "Paris" });
  },
  async schema() {
    const done = await client.chat.completions.create({ model: "fake", messages: say("hi"), max_tokens: 200, response_format: { type: "json_schema", json_schema: { name: "n", schema, strict: true } } });
    assert.deepEqual(JSON.parse(done.choices[0].message.content), { n: 5 });
  },
  async responses() {
    const done = await client.responses.create({ model: "fake", input: "hi" });
    assert.equal(done.output_text, "Hello there");
  },
  async errors() {
    await assert.rejects(client.chat.completions.create({ model: "other", messages: say("hi") }), (error) => error.status === 404 && error.code === "model_not_found");
    await assert.rejects(client.chat.completions.create({ model: "fake", messages: say("x".repeat(5000)) }), (error) => error.code === "context_length_exceeded");
  },
  async cancel() {
    const stream = await client.chat.completions.create({ model: "fake", messages: say("long"), stream: true });
    for await (const chunk of stream) if (chunk.choices[0].delta.content) break;
    stream.controller.abort();
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(`ok: ${name}`);
}
