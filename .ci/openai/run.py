#!/usr/bin/env python3
"""Programs that use other people's clients, against a real server: nothing in them is written for tidemill but the
base URL and the model.

    .ci/openai/run.py [--bin target/debug] [--only NAME…]

Starts the built programs on free ports, a server for each program, and runs two programs at a time. The Python packages are
those of `.ci/run tools`: the newest ones in the virtual environment, what needs the line before of `openai` in its folder
openai-2, and LiteLLM, which pins what it needs, in an environment of its own. Node's come from npm into target/ci-node.
"""
import argparse, concurrent.futures, contextlib, json, os, pathlib, signal, socket, subprocess, sys, tempfile, time
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
VENV = ROOT / os.environ.pop("TIDEMILL_CI_VENV", "target/ci-venv")
NODE = ROOT / "target/ci-node"
# The last one for Node.js 20.
NODE_PACKAGES = ["openai@6", "@anthropic-ai/sdk@1"]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(url, process):
    for _ in range(300):
        if process.poll() is not None:
            sys.exit(f"{process.args} ended with {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=1) as answer:
                return answer.read()
        except OSError:
            time.sleep(0.1)
    sys.exit(f"{url} does not answer")


def models_are_served(base):
    for _ in range(300):
        with urllib.request.urlopen(f"{base}/v1/models") as answer:
            if json.load(answer)["data"]:
                return
        time.sleep(0.1)
    sys.exit("no worker is healthy")


def node_packages():
    if not all((NODE / "node_modules" / package.rsplit("@", 1)[0]).exists() for package in NODE_PACKAGES):
        NODE.mkdir(parents=True, exist_ok=True)
        (NODE / "package.json").write_text('{"private": true, "type": "module"}')
        subprocess.run(["npm", "install", "--silent", "--no-fund", "--no-audit", *NODE_PACKAGES], cwd=NODE, check=True)
    # Node looks for packages beside the program.
    for program in HERE.glob("*.mjs"):
        (NODE / program.name).write_text(program.read_text())


def programs():
    """The longest first."""
    older = {"PYTHONPATH": str(VENV / "openai-2")}
    yield "schemathesis", [sys.executable, HERE / "schema.py"], {}
    yield "quickstarts", [sys.executable, HERE.parent / "readme.py", "docs/openai.md"], {}
    yield "litellm-proxy", [sys.executable, HERE / "gateway.py"], {}
    yield "litellm", [VENV / "litellm/bin/python", HERE / "lite.py"], {}
    yield "langchain", [sys.executable, HERE / "chains.py"], {}
    yield "python", [sys.executable, HERE / "sdk.py"], {}
    yield "python-2", [sys.executable, HERE / "sdk.py"], {**older, "EXPECT_OPENAI": "2"}
    yield "instructor", [sys.executable, HERE / "structured.py"], older
    yield "node", ["node", NODE / "sdk.mjs"], {}
    yield "anthropic", [sys.executable, HERE / "messages.py"], {}
    yield "anthropic-node", ["node", NODE / "messages.mjs"], {}
    yield "quickstarts-anthropic", [sys.executable, HERE.parent / "readme.py", "docs/anthropic.md"], {}


@contextlib.contextmanager
def serving(tidemill, worker):
    """A server of its own, so that no program sees another's files. Gives its address, and its log."""
    with tempfile.TemporaryDirectory() as data:
        log, port = pathlib.Path(data) / "log", free_port()
        server = subprocess.Popen(
            [tidemill, "serve", "--listen", f"127.0.0.1:{port}", "--worker", worker, "--data-dir", f"{data}/data"],
            stdout=log.open("w"), stderr=subprocess.STDOUT)
        try:
            base = f"http://127.0.0.1:{port}"
            wait_for(f"{base}/readyz", server)
            models_are_served(base)
            yield base, log
        finally:
            server.terminate()
            server.wait(timeout=30)


def run(tidemill, worker, name, command, more):
    """Whether it passed."""
    with serving(tidemill, worker) as (base, log):
        # LiteLLM's own Python comes after the one that is meant.
        folders = [tidemill.parent, pathlib.Path(sys.executable).parent, os.environ["PATH"], VENV / "litellm/bin"]
        env = {**os.environ, "OPENAI_BASE_URL": f"{base}/v1", "OPENAI_API_KEY": "any", "ANTHROPIC_BASE_URL": base,
               "ANTHROPIC_API_KEY": "any", "TIDEMILL": base, "TIDEMILL_SERVER": base,
               "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PATH": ":".join(map(str, folders)), **more}
        began = time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            said, outcome = process.communicate(timeout=400)[0][-12000:], process.returncode
        except subprocess.TimeoutExpired as error:
            said, outcome = f"no end within {error.timeout} s", 1
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what it has left running
        text = f"{name}: {'passed' if outcome == 0 else 'FAILED'} in {time.monotonic() - began:.1f} s"
        print("\n".join([text] if outcome == 0 else [text, said, log.read_text()[-4000:]]), flush=True)
        return outcome == 0


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--bin", default="target/debug")
    arguments.add_argument("--only", nargs="*", default=[])
    arguments = arguments.parse_args()
    tidemill, worker = ROOT / arguments.bin / "tidemill", free_port()
    sim = subprocess.Popen(
        [tidemill, "sim", "--listen", f"127.0.0.1:{worker}", "--models", "sim-7b,org/sim 8B", "--latency-ms", "20"])
    chosen = [program for program in programs() if not arguments.only or program[0] in arguments.only]
    try:
        wait_for(f"http://127.0.0.1:{worker}/health", sim)
        if any("node" in program[0] for program in chosen):
            node_packages()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            passed = list(pool.map(lambda program: run(tidemill, f"http://127.0.0.1:{worker}", *program), chosen))
    finally:
        sim.terminate()
        sim.wait(timeout=30)
    failed = [program[0] for program, good in zip(chosen, passed) if not good]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


main()
