"""The openai package for Python, with strict checks of every answer of files, batches and models."""
import hashlib, io, itertools, json, os, pathlib, tempfile, time

import openai
from openai import OpenAI

MODEL, SLASHED = "sim-7b", "org/sim 8B"
ONCE = f"once-{os.getpid()}"
assert openai.__version__.startswith(os.environ.get("EXPECT_OPENAI", "")), openai.__version__
strict = OpenAI(_strict_response_validation=True)
client = OpenAI(max_retries=0)


def lines(count, model=MODEL):
    def line(number):
        messages = [{"role": "user", "content": f"question {number}"}]
        body = {"model": model, "max_tokens": 8, "messages": messages}
        return json.dumps({"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body})
    return "".join(line(number) + "\n" for number in range(count)).encode()


def raises(kind, call):
    try:
        call()
    except kind as error:
        assert type(error) is kind, error
        assert error.request_id and error.request_id.startswith("req_"), error
        return error
    raise AssertionError(f"no {kind.__name__}")


def until_ended(batch_id):
    for _ in range(600):
        batch = strict.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch
        time.sleep(0.1)
    raise AssertionError(batch)


# Files
from_memory = strict.files.create(file=io.BytesIO(lines(20)), purpose="batch")
assert from_memory.status == "processed" and strict.files.wait_for_processing(from_memory.id).id == from_memory.id
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "in put.jsonl"
    path.write_bytes(lines(20))
    from_disk = strict.files.create(
        file=path, purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
assert (from_disk.filename, from_disk.bytes) == ("in put.jsonl", len(lines(20)))
assert from_disk.expires_at == from_disk.created_at + 3600
assert strict.files.content(from_disk.id).content == lines(20)
with client.files.with_streaming_response.content(from_disk.id) as response:
    assert b"".join(response.iter_bytes()) == lines(20)
assert [file.id for file in strict.files.list(limit=1, purpose="batch")] == [from_disk.id, from_memory.id], "pages"
assert strict.files.list(order="asc", limit=1, purpose="batch").data[0].id == from_memory.id

# Uploads in parts
text = lines(2000)
chunked = strict.uploads.upload_file_chunked(
    file=text, filename="chunks.jsonl", bytes=len(text), mime_type="text/jsonl", purpose="batch", part_size=100_000,
    md5=hashlib.md5(text).hexdigest())
assert (chunked.status, chunked.file.filename, chunked.file.bytes) == ("completed", "chunks.jsonl", len(text)), chunked
assert strict.files.content(chunked.file.id).content == text
assert strict.files.delete(chunked.file.id).deleted
upload = strict.uploads.create(bytes=20, filename="a", mime_type="text/jsonl", purpose="batch")
part = strict.uploads.parts.create(upload.id, data=b"x" * 20)
assert part.upload_id == upload.id and upload.status == "pending" and upload.expires_at > upload.created_at
bad = raises(openai.BadRequestError, lambda: client.uploads.complete(upload.id, part_ids=[part.id]))
assert bad.code == "invalid_json_line", bad
assert strict.uploads.cancel(upload.id).status == "cancelled"
raises(openai.BadRequestError, lambda: client.uploads.complete(upload.id, part_ids=[part.id]))
raises(openai.NotFoundError, lambda: client.uploads.cancel("upload_x"))

# Batches
batch = strict.batches.create(
    input_file_id=from_disk.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"team": "search"},
    extra_body={"priority": 1}, extra_headers={"Idempotency-Key": ONCE})
again = strict.batches.create(
    input_file_id=from_disk.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"team": "search"},
    extra_body={"priority": 1}, extra_headers={"Idempotency-Key": ONCE})
assert again.id == batch.id
other = raises(openai.ConflictError, lambda: client.batches.create(
    input_file_id=from_disk.id, endpoint="/v1/chat/completions", completion_window="24h",
    extra_headers={"Idempotency-Key": ONCE}))
assert other.code == "idempotency_conflict", other
assert strict.files.delete(from_disk.id).deleted, "an input in use goes at once, and its batch goes on"
ended = until_ended(batch.id)
assert (ended.status, ended.request_counts.completed, ended.request_counts.failed) == ("completed", 20, 0), ended
assert ended.output_file_id and ended.error_file_id is None and ended.metadata == {"team": "search"}
results = [json.loads(line) for line in strict.files.content(ended.output_file_id).text.splitlines()]
assert [one["custom_id"] for one in results] == [f"r{number}" for number in range(20)]
assert all(one["response"]["status_code"] == 200 for one in results)
assert ended.usage.total_tokens == sum(one["response"]["body"]["usage"]["total_tokens"] for one in results)
others = [strict.batches.create(
    input_file_id=from_memory.id, endpoint="/v1/chat/completions", completion_window="24h").id for _ in range(3)]
listed = [one.id for one in itertools.islice(strict.batches.list(limit=1), 4)]
assert listed == [*reversed(others), batch.id], listed
for other in others:
    try:
        assert strict.batches.cancel(other).status in ("cancelling", "cancelled")
    except openai.ConflictError:
        pass  # it was faster
    assert until_ended(other).status in ("completed", "cancelled")

# Errors
bad = raises(openai.BadRequestError, lambda: client.files.create(file=io.BytesIO(b"{}\nno\n"), purpose="batch"))
assert (bad.code, bad.param) == ("missing_required_parameter", "file") and len(bad.body["errors"]["data"]) == 2, bad
wrong = raises(openai.BadRequestError, lambda: client.files.create(file=io.BytesIO(lines(1)), purpose="fine-tune"))
assert wrong.param == "purpose"
raises(openai.NotFoundError, lambda: client.files.retrieve(from_disk.id))
raises(openai.NotFoundError, lambda: client.batches.retrieve("batch_x"))
began = time.monotonic()
late = raises(openai.ConflictError, lambda: OpenAI().batches.cancel(batch.id))
assert "Cannot cancel a batch with status 'completed'" in str(late) and time.monotonic() - began < 0.4, "no retry"
raises(openai.BadRequestError, lambda: client.batches.create(
    input_file_id="file-x", endpoint="/v1/chat/completions", completion_window="24h"))

# Live
models = [model.id for model in strict.models.list()]
assert models == [SLASHED, MODEL] and strict.models.retrieve(SLASHED).id == SLASHED
messages = [{"role": "user", "content": "hello there you"}]
said = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8).choices[0].message.content
stream = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8, stream=True)
pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
assert len(pieces) > 3 and said.endswith("hello there you") and "".join(pieces).endswith("hello there you")
assert client.completions.create(model=MODEL, prompt="a").choices[0].text
assert len(client.embeddings.create(model=MODEL, input=["a", "b"]).data) == 2
assert client.responses.create(model=MODEL, input="hello").output_text.endswith("hello")
events = [event.type for event in client.responses.create(model=MODEL, input="hello", stream=True)]
assert events[0] == "response.created" and events[-1] == "response.completed", events
nothing = raises(openai.NotFoundError, lambda: client.chat.completions.create(model="nothing", messages=messages))
assert nothing.code == "model_not_found"
strict.files.delete(from_memory.id)
print(f"openai {openai.__version__}: all calls are as OpenAI's")
