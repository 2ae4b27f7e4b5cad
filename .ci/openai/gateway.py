"""LiteLLM's proxy in front of tidemill, as a provider `hosted_vllm`: it hands files and batches over, instead of running the
lines itself as it does where it finds no files API."""
import json, os, pathlib, secrets, socket, subprocess, sys, tempfile, time

from openai import OpenAI

direct = OpenAI()
CONFIG = f"""
model_list:
  - model_name: sim-7b
    litellm_params: {{model: hosted_vllm/sim-7b, api_base: "{os.environ['OPENAI_BASE_URL']}", api_key: any}}
general_settings: {{master_key: os.environ/LITELLM_MASTER_KEY}}
"""
MESSAGES = [{"role": "user", "content": "hello there you"}]
LINES = "".join(json.dumps({
    "custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions",
    "body": {"model": "sim-7b", "max_tokens": 8, "messages": MESSAGES}}) + "\n" for number in range(20)).encode()


def check(proxy):
    file = proxy.files.create(file=("in.jsonl", LINES), purpose="batch")
    batch = proxy.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"by": "proxy"})
    # Its ids name the model besides; here they are as tidemill made them.
    [ours] = direct.batches.list().data
    assert ours.metadata == {"by": "proxy"} and direct.files.content(ours.input_file_id).content == LINES, ours
    for _ in range(600):
        batch = proxy.batches.retrieve(batch.id)
        if batch.status == "completed":
            break
        time.sleep(0.1)
    assert (batch.status, batch.request_counts.completed) == ("completed", 20), batch
    assert direct.batches.retrieve(ours.id).request_counts.completed == 20, "the proxy has run the lines"
    results = [json.loads(line) for line in proxy.files.content(batch.output_file_id).text.splitlines()]
    assert [one["custom_id"] for one in results] == [f"r{number}" for number in range(20)]
    assert batch.id in [one.id for one in proxy.batches.list(limit=5).data]
    assert proxy.files.delete(file.id).deleted
    assert ours.input_file_id not in [file.id for file in direct.files.list()]

    said = proxy.chat.completions.create(model="sim-7b", messages=MESSAGES, max_tokens=8)
    assert said.choices[0].message.content.endswith("hello there you")
    stream = proxy.chat.completions.create(model="sim-7b", messages=MESSAGES, max_tokens=8, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces).endswith("hello there you"), pieces
    assert len(proxy.embeddings.create(model="sim-7b", input=["a", "b"]).data) == 2


with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    config, log = pathlib.Path(folder) / "litellm.yaml", pathlib.Path(folder) / "log"
    config.write_text(CONFIG)
    # It refuses to start with a key that others know.
    os.environ["LITELLM_MASTER_KEY"] = f"sk-{secrets.token_hex(16)}"
    command = ["litellm", "--config", config, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT)
    try:
        proxy = OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key=os.environ["LITELLM_MASTER_KEY"],
            default_headers={"x-litellm-model": "sim-7b"}, max_retries=0)
        while True:
            assert process.poll() is None, "the proxy has ended"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        check(proxy)
    except BaseException:
        print(log.read_text()[-6000:], file=sys.stderr)
        raise
    finally:
        process.terminate()
        process.wait(timeout=30)
print("litellm's proxy: hands over batches and live calls")
