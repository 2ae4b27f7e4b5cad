#!/usr/bin/env python3
"""Programs that use other people's clients, against a real server: nothing in them is written for tidemill but the
base URL and the model.

    .ci/openai/run.py [--bin target/debug] [--only NAME…]

Starts the built programs on free ports. The Python packages are those of `.ci/run tools`: the newest ones in the virtual
environment, and the line before in its folder openai-2. Node's come from npm into target/ci-node.
"""
import argparse, json, os, pathlib, socket, subprocess, sys, tempfile, time, urllib.request

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NODE = ROOT / "target/ci-node"
# The last one for Node.js 20.
NODE_PACKAGES = ["openai@6"]


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
    if not all((NODE / "node_modules" / package.split("@")[0]).exists() for package in NODE_PACKAGES):
        NODE.mkdir(parents=True, exist_ok=True)
        (NODE / "package.json").write_text('{"private": true, "type": "module"}')
        subprocess.run(["npm", "install", "--silent", "--no-fund", "--no-audit", *NODE_PACKAGES], cwd=NODE, check=True)
    # Node looks for packages beside the program.
    for program in HERE.glob("*.mjs"):
        (NODE / program.name).write_text(program.read_text())


def programs():
    older = pathlib.Path(os.environ.get("OPENAI_2", ROOT / os.environ.get("TIDEMILL_CI_VENV", "target/ci-venv") / "openai-2"))
    yield "python", [sys.executable, HERE / "sdk.py"], {}
    yield "python-2", [sys.executable, HERE / "sdk.py"], {"PYTHONPATH": str(older), "EXPECT_OPENAI": "2"}
    yield "node", ["node", NODE / "sdk.mjs"], {}
    yield "anthropic", [sys.executable, HERE / "messages.py"], {}
    yield "quickstarts", [sys.executable, HERE.parent / "readme.py", "docs/openai.md"], {}


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--bin", default="target/debug")
    arguments.add_argument("--only", nargs="*", default=[])
    arguments = arguments.parse_args()
    tidemill = ROOT / arguments.bin / "tidemill"
    data = tempfile.TemporaryDirectory()
    log = open(pathlib.Path(data.name) / "log", "w")
    worker, port = free_port(), free_port()
    base = f"http://127.0.0.1:{port}"
    sim = subprocess.Popen(
        [tidemill, "sim", "--listen", f"127.0.0.1:{worker}", "--models", "sim-7b,org/sim 8B", "--latency-ms", "20"],
        stdout=log, stderr=log)
    server = subprocess.Popen(
        [tidemill, "serve", "--listen", f"127.0.0.1:{port}", "--worker", f"http://127.0.0.1:{worker}",
         "--data-dir", f"{data.name}/data"], stdout=log, stderr=log)
    failed = []
    try:
        wait_for(f"http://127.0.0.1:{worker}/health", sim)
        wait_for(f"{base}/readyz", server)
        models_are_served(base)
        for name, command, more in programs():
            if arguments.only and name not in arguments.only:
                continue
            if name == "node":
                node_packages()
            path = f"{ROOT / arguments.bin}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
            env = {**os.environ, "OPENAI_BASE_URL": f"{base}/v1", "OPENAI_API_KEY": "any", "ANTHROPIC_BASE_URL": base,
                   "ANTHROPIC_API_KEY": "any", "TIDEMILL": base, "TIDEMILL_SERVER": base, "PATH": path, **more}
            began = time.monotonic()
            done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=300)
            print(f"{name}: {'passed' if done.returncode == 0 else 'FAILED'} in {time.monotonic() - began:.1f} s")
            if done.returncode:
                failed.append(name)
                print(done.stdout[-4000:], done.stderr[-6000:], sep="\n")
    finally:
        for process in (server, sim):
            process.terminate()
            process.wait(timeout=30)
        log.close()
        if failed:
            print(open(log.name).read()[-4000:])
        data.cleanup()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


main()
