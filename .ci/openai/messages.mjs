// The @anthropic-ai/sdk package for Node: Message Batches.
import assert from "node:assert";
import Anthropic from "@anthropic-ai/sdk";

const { batches } = new Anthropic().messages;
const params = { model: "sim-7b", max_tokens: 8, messages: [{ role: "user", content: "hello there" }] };
let batch = await batches.create({ requests: [1, 2, 3].map((at) => ({ custom_id: `n${at}`, params })) });
assert.equal(batch.request_counts.processing, 3);
while ((batch = await batches.retrieve(batch.id)).processing_status !== "ended") {
  await new Promise((resolve) => setTimeout(resolve, 100));
}
assert.equal(batch.request_counts.succeeded, 3);
const results = new Map();
for await (const one of await batches.results(batch.id)) results.set(one.custom_id, one.result);
assert.equal(results.size, 3);
assert.match(results.get("n2").message.content[0].text, /hello there$/);
const listed = [];
for await (const one of batches.list({ limit: 1 })) listed.push(one.id);
assert.equal(listed[0], batch.id);
await assert.rejects(batches.cancel(batch.id), Anthropic.BadRequestError);
const twice = [params, params].map((params) => ({ custom_id: "same", params }));
await assert.rejects(batches.create({ requests: twice }), (error) => {
  assert(error instanceof Anthropic.BadRequestError && error.requestID && /requests\[1\]/.test(error.message), error);
  return true;
});
assert.equal((await batches.delete(batch.id)).type, "message_batch_deleted");
await assert.rejects(batches.retrieve(batch.id), Anthropic.NotFoundError);
console.log("@anthropic-ai/sdk: all calls are as Anthropic's");
