"""The anthropic package for Python: live calls."""
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
print(f"anthropic {anthropic.__version__}: all calls are as Anthropic's")
