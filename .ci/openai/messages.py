"""The anthropic package for Python: live calls and Message Batches."""
import time

import anthropic

client = anthropic.Anthropic(max_retries=0)
messages = [{"role": "user", "content": "hello there"}]
said = client.messages.create(model="sim-7b", max_tokens=8, messages=messages)
assert said.content[0].text.endswith("hello there") and said.stop_reason == "max_tokens", said
with client.messages.stream(model="sim-7b", max_tokens=8, messages=messages) as stream:
    assert "".join(stream.text_stream).endswith("hello there")
assert client.messages.count_tokens(model="sim-7b", messages=messages).input_tokens == 2
try:
    client.messages.create(model="nothing", max_tokens=8, messages=messages)
    raise AssertionError("no error")
except anthropic.NotFoundError as error:
    assert error.request_id and error.body["error"]["type"] == "not_found_error", error

# Message Batches, to the end.
batches = client.messages.batches
params = {"model": "sim-7b", "max_tokens": 8, "messages": messages}
requests = [{"custom_id": f"r{at}", "params": params} for at in range(20)]
requests.append({"custom_id": "bad", "params": {**params, "max_tokens": 0}})
made = batches.create(requests=requests)
assert made.type == "message_batch" and made.request_counts.processing == 21 and made.results_url is None, made
assert made.created_at < made.expires_at and made.id.startswith("msgbatch_")
while (batch := batches.retrieve(made.id)).processing_status != "ended":
    time.sleep(0.1)
counts = batch.request_counts
assert (counts.succeeded, counts.errored, counts.processing) == (20, 1, 0) and batch.ended_at, batch
results = {result.custom_id: result.result for result in batches.results(made.id)}
assert len(results) == 21 and results["r7"].message.content[0].text.endswith("hello there"), results
error = results["bad"].error
assert error.type == "error" and error.error.type == "invalid_request_error" and error.error.message, error

# Cancelled before any worker has it, listed and paged, deleted.
elsewhere = {**params, "model": "served-by-nobody"}
others = [batches.create(requests=[{"custom_id": "a", "params": elsewhere}]).id for _ in range(3)]
assert [batch.id for batch in batches.list(limit=2)] == [*reversed(others), made.id], "over all pages"
page = batches.list(limit=1, before_id=made.id)
assert [batch.id for batch in page.data] == [others[0]] and page.has_more
assert [batch.id for batch in page.get_next_page().data] == [others[1]]
for other in others:
    assert batches.cancel(other).processing_status in ("canceling", "ended")
    while (batch := batches.retrieve(other)).processing_status != "ended":
        time.sleep(0.1)
    assert batch.request_counts.canceled == 1 and batch.cancel_initiated_at, batch
    assert [result.result.type for result in batches.results(other)] == ["canceled"]
    deleted = batches.delete(other)
    assert (deleted.id, deleted.type) == (other, "message_batch_deleted")


def refused(kind, call, *words):
    try:
        call()
    except kind as error:
        said = error.body["error"]["message"]
        assert error.request_id and all(word in said for word in words), error
        return
    raise AssertionError(f"no {kind}")


refused(anthropic.NotFoundError, lambda: batches.retrieve(others[0]))
bad = anthropic.BadRequestError
refused(bad, lambda: batches.create(requests=[]), "requests")
refused(bad, lambda: batches.create(requests=requests[:2] + requests[:1]), "requests[2]", "r0")
refused(bad, lambda: batches.create(requests=[{"custom_id": "s", "params": {**params, "stream": True}}]), "stream", '"s"')
refused(bad, lambda: batches.cancel(made.id), "ended")
batches.delete(made.id)
print(f"anthropic {anthropic.__version__}: all calls are as Anthropic's")
