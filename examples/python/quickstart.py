"""A whole batch from Python: upload, create, watch, results. Run it from the repository's root, with a server on port 4080:

    pip install grpcio grpcio-tools
    python examples/python/quickstart.py

It compiles the protos as it starts; a real client would generate code once: python -m grpc_tools.protoc -I proto …
"""
import json
import os
import sys
import time
import uuid

import grpc

sys.path.insert(0, "proto")
pb, services = grpc.protos_and_services("tidemill/v1/batch.proto")

MODEL = os.environ.get("MODEL", "sim-7b")
channel = grpc.insecure_channel(os.environ.get("TIDEMILL", "127.0.0.1:4080"))
tidemill = services.BatchServiceStub(channel)


def request(number):
    body = {"model": MODEL, "messages": [{"role": "user", "content": f"Say {number}."}], "max_tokens": 8}
    return {"custom_id": f"say-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def upload(lines):
    """First the spec, then the bytes in chunks of at most 1 MiB."""
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    yield pb.UploadFileRequest(spec=pb.FileSpec(filename="say.jsonl", total_bytes=len(data)))
    for start in range(0, len(data), 1 << 20):
        yield pb.UploadFileRequest(chunk=data[start : start + (1 << 20)])


def watch(batch_id):
    """Every state change, and progress in between; resumes where it broke off."""
    revision = 0
    while True:
        try:
            for event in tidemill.WatchBatch(pb.WatchBatchRequest(batch_id=batch_id, after_revision=revision)):
                revision = max(revision, event.revision)
                yield event
            return  # the server ends the stream after the last state
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
            time.sleep(1)


file = tidemill.UploadFile(upload(request(number) for number in range(20)))
print(f"uploaded {file.id}: {file.line_count} requests for {', '.join(file.models)}")

# The request id makes a repeated call harmless: it returns the batch that the first one made.
batch = tidemill.CreateBatch(pb.CreateBatchRequest(input_file_id=file.id, request_id=str(uuid.uuid4())))
for event in watch(batch.id):
    kind = event.WhichOneof("event")
    if kind == "state_changed":
        batch = event.state_changed
        print(pb.BatchStatus.Name(batch.status))
    elif kind == "progress":
        counts = event.progress.request_counts
        print(f"{counts.completed + counts.failed} of {counts.total}")

for result in tidemill.StreamResults(pb.StreamResultsRequest(batch_id=batch.id)):
    line = json.loads(result.line)
    if result.succeeded:
        print(result.custom_id, "->", line["response"]["body"]["choices"][0]["message"]["content"])
    else:
        print(result.custom_id, "failed:", line["error"] or line["response"]["body"])
print(f"{batch.usage.output_tokens} tokens generated")
