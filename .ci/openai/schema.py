"""schemathesis over OpenAI's own specification, cut to what is served (spec.json): whatever is sent, no answer is a 5xx, and
every answer has the specification's shape. Real ids, bodies and states are put in as examples, so that calls succeed, too.

    schema.py [SECONDS]
"""
import json, os, pathlib, subprocess, sys, tempfile, time, urllib.request
from collections import Counter

from openai import OpenAI

SECONDS = sys.argv[1] if len(sys.argv) > 1 else "40"
HERE = pathlib.Path(__file__).resolve().parent
client = OpenAI()
spec = json.loads((HERE / "spec.json").read_text())


def lines(count, model="sim-7b"):
    body = {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}]}
    line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    return "".join(json.dumps({"custom_id": f"r{number}", **line}) + "\n" for number in range(count))


def upload(text):
    return client.files.create(file=("in.jsonl", text.encode()), purpose="batch").id


def batch(file):
    return {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}


def body(path, kind, value, method="post"):
    spec["paths"][path][method]["requestBody"]["content"][kind]["example"] = value


def ids(path, values):
    for call in spec["paths"][path].values():
        [parameter] = [one for one in call["parameters"] if one["in"] == "path"]
        parameter["examples"] = {str(number): {"value": value} for number, value in enumerate(values)}


small, spare, waits = upload(lines(3)), upload(lines(3)), upload(lines(3, "a model that nobody serves"))
running, ended = client.batches.create(**batch(waits)).id, client.batches.create(**batch(small)).id
cancelled = client.batches.cancel(client.batches.create(**batch(waits)).id).id
while client.batches.retrieve(ended).status != "completed":
    time.sleep(0.1)
results = client.batches.retrieve(ended).output_file_id
ids("/files/{file_id}", [small, results])
ids("/files/{file_id}/content", [results])
ids("/batches/{batch_id}", [running, ended, cancelled])
ids("/batches/{batch_id}/cancel", [running, ended, cancelled])
ids("/models/{model}", ["sim-7b", "org/sim 8B"])
body("/batches", "application/json", {**batch(spare), "metadata": {"team": "search"}})
body("/files", "multipart/form-data", {"file": lines(2), "purpose": "batch"})
body("/embeddings", "application/json", {"model": "sim-7b", "input": "hello"})
body("/completions", "application/json", {"model": "sim-7b", "prompt": "hello"})

with tempfile.TemporaryDirectory() as folder:
    given, report = pathlib.Path(folder) / "spec.json", pathlib.Path(folder) / "report.ndjson"
    given.write_text(json.dumps(spec))
    done = subprocess.run(
        [pathlib.Path(sys.executable).parent / "schemathesis", "run", given, "--url", os.environ["OPENAI_BASE_URL"],
         "--checks", "not_a_server_error,response_schema_conformance,content_type_conformance",
         "--max-time", SECONDS, "--seed", "14", "--no-color", "--generation-database", "none", "--warnings", "off",
         "--suppress-health-check", "all", "--request-timeout", "30", "--continue-on-failure",
         "--report", "ndjson", "--report-ndjson-path", report], text=True, capture_output=True, cwd=folder)
    if os.environ.get("KEEP"):
        pathlib.Path(os.environ["KEEP"]).write_text(report.read_text())
    print(done.stdout[-8000:], done.stderr[-2000:], sep="\n")
    sys.exit(done.returncode)
