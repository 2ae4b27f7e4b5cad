"""LiteLLM's client: files, batches and live calls of the provider `hosted_vllm`. It checks every answer's shape."""
import asyncio, json, os, pathlib, tempfile, time

import litellm
import openai

WHERE = {"custom_llm_provider": "hosted_vllm", "api_base": os.environ["OPENAI_BASE_URL"], "api_key": "any"}
LIVE = {"api_base": WHERE["api_base"], "api_key": "any"}
MESSAGES = [{"role": "user", "content": "hello there you"}]
ENDED = ("completed", "failed", "expired", "cancelled")


def lines(count):
    body = {"model": "sim-7b", "max_tokens": 8, "messages": MESSAGES}
    line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    return "".join(json.dumps({"custom_id": f"r{number}", **line}) + "\n" for number in range(count))


def create(file):
    return litellm.create_batch(
        completion_window="24h", endpoint="/v1/chat/completions", input_file_id=file, metadata={"key": "value"}, **WHERE)


def until_ended(batch):
    for _ in range(600):
        batch = litellm.retrieve_batch(batch_id=batch.id, **WHERE)
        if batch.status in ENDED:
            return batch
        time.sleep(0.1)
    raise AssertionError(batch)


# One after the other, as LiteLLM's own test of OpenAI's batches has them.
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "in.jsonl"
    path.write_text(lines(20))
    file = litellm.create_file(file=open(path, "rb"), purpose="batch", **WHERE)
batch = create(file.id)
assert batch.id and batch.object == "batch" and batch.endpoint == "/v1/chat/completions"
assert (batch.input_file_id, batch.metadata) == (file.id, {"key": "value"})
assert batch.id in [one.id for one in litellm.list_batches(limit=2, **WHERE).data]
assert litellm.file_retrieve(file_id=file.id, **WHERE).filename == "in.jsonl"
assert litellm.file_content(file_id=file.id, **WHERE).content == lines(20).encode()
assert litellm.file_delete(file_id=file.id, **WHERE).deleted, "also of an input in use"
ended = until_ended(batch)
assert (ended.status, ended.request_counts.completed) == ("completed", 20) and ended.output_file_id, ended
results = litellm.file_content(file_id=ended.output_file_id, **WHERE).text.splitlines()
assert [json.loads(line)["custom_id"] for line in results] == [f"r{number}" for number in range(20)]
try:
    litellm.cancel_batch(batch_id=batch.id, **WHERE)
    raise AssertionError("a batch that has ended is cancelled")
except openai.ConflictError:
    pass


async def at_once():
    file = await litellm.acreate_file(file=("in.jsonl", lines(500).encode()), purpose="batch", **WHERE)
    batch = await litellm.acreate_batch(
        completion_window="24h", endpoint="/v1/chat/completions", input_file_id=file.id, **WHERE)
    cancelled = await litellm.acancel_batch(batch_id=batch.id, **WHERE)
    assert cancelled.status in ("cancelling", "cancelled"), cancelled
    return batch


assert until_ended(asyncio.run(at_once())).status == "cancelled"

said = litellm.completion(model="hosted_vllm/sim-7b", messages=MESSAGES, max_tokens=8, **LIVE)
assert said.choices[0].message.content.endswith("hello there you") and said.usage.completion_tokens == 8, said
stream = litellm.completion(model="hosted_vllm/sim-7b", messages=MESSAGES, max_tokens=8, stream=True, **LIVE)
assert "".join(chunk.choices[0].delta.content or "" for chunk in stream).endswith("hello there you")
embeddings = litellm.embedding(model="hosted_vllm/sim-7b", input=["a", "b"], **LIVE)
assert len(embeddings.data) == 2
try:
    litellm.completion(model="hosted_vllm/nothing", messages=MESSAGES, **LIVE)
    raise AssertionError("a model that nobody serves answers")
except openai.NotFoundError:
    pass
print("litellm: the whole flow works")
