"""instructor's batches: a request a conversation, and an object of a class from each answer."""
import contextlib, io, json, os, pathlib, tempfile, time

from instructor.batch import BatchProcessor, BatchSuccess
from pydantic import BaseModel


class User(BaseModel):
    name: str
    age: int


# The simulated worker says again what it was asked, so it is asked for what must come out.
asked = [json.dumps({"name": f"user {number}", "age": number}) for number in range(10)]
processor = BatchProcessor("openai/sim-7b", User)
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    path = str(pathlib.Path(folder) / "in.jsonl")
    for target in (path, None):
        made = processor.create_batch_from_messages([[{"role": "user", "content": text}] for text in asked], target)
        batch = processor.submit_batch(made, metadata={"by": "instructor"})
        while (status := processor.get_batch_status(batch))["status"] != "completed":
            assert status["status"] in ("validating", "in_progress", "finalizing"), status
            time.sleep(0.1)
        assert status["request_counts"] == {"total": 10, "completed": 10, "failed": 0}, status
        results = processor.get_results(batch)
        assert len(results) == 10
        for number, result in enumerate(results):
            assert isinstance(result, BatchSuccess) and result.custom_id == f"request-{number}", result
            assert result.result == User(name=f"user {number}", age=number)
    listed = processor.list_batches(limit=5)
    assert batch in [job.id for job in listed], listed
print("instructor: every answer became its object")
