// The openai package for Node: chunked uploads, the file before the other fields, pages, streams, errors.
import assert from "node:assert/strict";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import OpenAI, { toFile } from "openai";

const client = new OpenAI();
const MODEL = "sim-7b";
const line = (n) => JSON.stringify({ custom_id: `r${n}`, method: "POST", url: "/v1/chat/completions",
  body: { model: MODEL, max_tokens: 8, messages: [{ role: "user", content: `question ${n}` }] } });
const text = Array.from({ length: 20 }, (_, n) => line(n) + "\n").join("");

const folder = fs.mkdtempSync(path.join(os.tmpdir(), "tidemill-"));
const file = path.join(folder, "in.jsonl");
fs.writeFileSync(file, text);
// A read stream goes as chunks without a length.
const streamed = await client.files.create({ file: fs.createReadStream(file), purpose: "batch" });
assert.equal(streamed.bytes, Buffer.byteLength(text));
assert.equal(streamed.filename, "in.jsonl");
const blob = await client.files.create({ file: await toFile(Buffer.from(text), "b.jsonl"), purpose: "batch",
  expires_after: { anchor: "created_at", seconds: 7200 } });
assert.equal(blob.expires_at, blob.created_at + 7200);
const ids = [];
for await (const one of client.files.list({ limit: 1 })) if ([streamed.id, blob.id].includes(one.id)) ids.push(one.id);
assert.deepEqual(ids, [blob.id, streamed.id]);
assert.equal(await (await client.files.content(streamed.id)).text(), text);

// In parts, the second one first.
const bytes = Buffer.from(text);
const upload = await client.uploads.create({ bytes: bytes.length, filename: "parts.jsonl", mime_type: "text/jsonl",
  purpose: "batch" });
const part = async (piece) => (await client.uploads.parts.create(upload.id, { data: await toFile(piece, "part") })).id;
const [tail, head] = [await part(bytes.subarray(500)), await part(bytes.subarray(0, 500))];
const whole = await client.uploads.complete(upload.id, { part_ids: [head, tail] });
assert.deepEqual([whole.status, whole.file.filename], ["completed", "parts.jsonl"]);
assert.equal(await (await client.files.content(whole.file.id)).text(), text);
assert.deepEqual(await client.uploads.complete(upload.id, { part_ids: [head, tail] }), whole);
assert.equal((await client.files.delete(whole.file.id)).deleted, true);

let batch = await client.batches.create({ input_file_id: streamed.id, endpoint: "/v1/chat/completions",
  completion_window: "24h" });
for (let tries = 0; batch.status !== "completed" && tries < 600; tries++) {
  await new Promise((done) => setTimeout(done, 100));
  batch = await client.batches.retrieve(batch.id);
}
assert.equal(batch.status, "completed");
assert.deepEqual(batch.request_counts, { total: 20, completed: 20, failed: 0 });
const output = await (await client.files.content(batch.output_file_id)).text();
assert.deepEqual(output.trim().split("\n").map((one) => JSON.parse(one).custom_id), Array.from({ length: 20 }, (_, n) => `r${n}`));
await assert.rejects(client.batches.cancel(batch.id), (error) => error instanceof OpenAI.ConflictError && !!error.requestID);

// A refusal must arrive although the file is still being sent.
const many = path.join(folder, "many.jsonl");
fs.writeFileSync(many, text.repeat(2000));
await assert.rejects(client.files.create({ file: fs.createReadStream(many), purpose: "fine-tune" }),
  (error) => error instanceof OpenAI.BadRequestError && error.param === "purpose");
await assert.rejects(client.files.create({ file: fs.createReadStream(many), purpose: "batch" }),
  (error) => error instanceof OpenAI.BadRequestError && error.code === "duplicate_custom_id");
await assert.rejects(client.files.retrieve("file-x"), (error) => error instanceof OpenAI.NotFoundError);

const model = await client.models.retrieve("org/sim 8B");
assert.equal(model.id, "org/sim 8B");
const stream = await client.chat.completions.create({ model: MODEL, stream: true, max_tokens: 8,
  messages: [{ role: "user", content: "hello there" }] });
let said = "";
for await (const chunk of stream) said += chunk.choices[0]?.delta?.content ?? "";
assert.match(said, /hello there$/);
for (const one of [streamed, blob]) assert.equal((await client.files.delete(one.id)).deleted, true);
fs.rmSync(folder, { recursive: true });
console.log("openai for Node: all calls are as OpenAI's");
