"""langchain-openai: live calls, one, many at once, and streamed. It has no batch API."""
import asyncio

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

model = ChatOpenAI(model="sim-7b", max_tokens=8, max_retries=0)
said = model.invoke("hello there you")
assert said.content.endswith("hello there you") and said.usage_metadata["output_tokens"] == 8, said
assert said.response_metadata["model_name"] == "sim-7b"
many = model.batch([f"question {number}" for number in range(20)])
assert [one.content.split()[-1] for one in many] == [str(number) for number in range(20)]
pieces = [chunk.content for chunk in model.stream("hello there you")]
assert len([piece for piece in pieces if piece]) > 3 and "".join(pieces).endswith("hello there you"), pieces
chain = ChatPromptTemplate.from_messages([("system", "Be kind."), ("human", "{question}")]) | model
assert chain.invoke({"question": "why not"}).content.endswith("why not")


async def at_once():
    return await asyncio.gather(*(model.ainvoke(f"question {number}") for number in range(20)))


assert [one.content.split()[-1] for one in asyncio.run(at_once())] == [str(number) for number in range(20)]
responses = ChatOpenAI(model="sim-7b", use_responses_api=True, max_retries=0)
assert responses.invoke("hello there").text.endswith("hello there")
# Otherwise it counts tokens with a file that it downloads.
embeddings = OpenAIEmbeddings(model="sim-7b", check_embedding_ctx_length=False)
vectors = embeddings.embed_documents(["a", "b", "a"])
assert len(vectors) == 3 and vectors[0] == vectors[2] and embeddings.embed_query("a") == vectors[0]
print("langchain-openai: all calls work")
