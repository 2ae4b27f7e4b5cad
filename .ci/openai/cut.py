#!/usr/bin/env python3
"""Cuts OpenAI's specification to what tidemill serves and prints it: how spec.json was made.

    .ci/openai/cut.py openapi.json >.ci/openai/spec.json

openapi.json is that of https://github.com/openai/openai-openapi (MIT License) at f85dbe2, version 2.3.0. Left out are what
nobody checks (descriptions, examples, code samples) and other paths. Changed are: a field that need not be there may be null,
a file's content is no JSON, an empty list has no first and no last id, an embedding may be text (`base64`), and with
`stream` a completion is a stream of events, as OpenAI's own answers have it; errors have their schema in every call, which is in none
there; and the `code` of a worker's error may be a number, as vLLM's is.
"""
import json, sys

CALLS = {
    "/files": ("get", "post"),
    "/files/{file_id}": ("get", "delete"),
    "/files/{file_id}/content": ("get",),
    "/batches": ("get", "post"),
    "/batches/{batch_id}": ("get",),
    "/batches/{batch_id}/cancel": ("post",),
    "/models": ("get",),
    "/models/{model}": ("get",),
    "/uploads": ("post",),
    "/uploads/{upload_id}/parts": ("post",),
    "/uploads/{upload_id}/complete": ("post",),
    "/uploads/{upload_id}/cancel": ("post",),
    "/embeddings": ("post",),
    "/completions": ("post",),
}
WORKERS = ("/embeddings", "/completions")
SAID = ("description", "example", "examples", "summary", "externalDocs", "title", "deprecated")


def plain(value, names=False):
    """Without what is for readers. Below `properties` the keys are names of fields, which stay."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if not isinstance(value, dict):
        return value
    keys = [key for key in value if names or not (key in SAID or key.startswith("x-"))]
    cut = {key: plain(value[key], not names and key == "properties") for key in keys}
    if not names and isinstance(cut.get("properties"), dict):
        optional = set(cut["properties"]) - set(cut.get("required", []))
        cut["properties"].update({name: nullable(cut["properties"][name]) for name in sorted(optional)})
    return cut


def nullable(schema):
    return {"anyOf": [schema, {"type": "null"}]}


def referred(value, found):
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            found.add(value["$ref"].rsplit("/", 1)[1])
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            referred(one, found)
    return found


whole = json.load(open(sys.argv[1]))
paths = {}
for path, methods in CALLS.items():
    paths[path] = {method: plain(whole["paths"][path][method]) for method in methods}
    for call in paths[path].values():
        call.pop("tags", None)
for path, calls in paths.items():
    for call in calls.values():
        refused = {"$ref": "#/components/schemas/ErrorResponse"}
        if path in WORKERS:
            error = {**plain(whole["components"]["schemas"]["Error"]), "required": ["type", "message", "param", "code"]}
            error["properties"]["code"] = {"type": ["string", "integer", "null"]}
            refused = {"type": "object", "properties": {"error": error}, "required": ["error"]}
        call["responses"] = {
            "200": {**call["responses"]["200"], "description": ""},
            "4XX": {"description": "", "content": {"application/json": {"schema": refused}}},
        }
paths["/files/{file_id}/content"]["get"]["responses"]["200"]["content"] = {
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
paths["/completions"]["post"]["responses"]["200"]["content"]["text/event-stream"] = {"schema": {}}
schemas = {}
while missing := referred([paths, schemas], {"Error", "ErrorResponse"}) - set(schemas):
    schemas.update({name: plain(whole["components"]["schemas"][name]) for name in missing})
ids = schemas["ListFilesResponse"]["properties"]
ids.update({name: nullable(ids[name]) for name in ("first_id", "last_id")})
values = schemas["Embedding"]["properties"]
values["embedding"] = {"anyOf": [values["embedding"], {"type": "string"}]}
info = {**{key: whole["info"][key] for key in ("title", "version", "license")},
        "description": "Cut by .ci/openai/cut.py from https://github.com/openai/openai-openapi at f85dbe2"}
cut = {"openapi": whole["openapi"], "info": info, "paths": paths, "components": {"schemas": dict(sorted(schemas.items()))}}
print(json.dumps(cut, indent=1, sort_keys=False))
