#!/usr/bin/env python3
"""Runs a batch against a real vLLM, kills tidemill and stops vLLM in the middle, and checks that nothing is lost.

    real_vllm.py --vllm .ci/vllm.py [--requests 200] [--kills 1] [--stops 3]
                 [--binary target/debug/tidemill]

Starts `vllm.py serve` (or uses --worker URL), then `tidemill serve` on a fresh data directory, and submits chat requests.
While the batch runs, it kills and restarts tidemill at random moments, and then stops vLLM with SIGTERM and starts it
again, as systemd and Kubernetes do. Then it compares the results with the input: every custom_id exactly once, in input
order, each answer with all of its tokens, the usage of all lines together that of the batch.
Needs nothing but Python's standard library.
"""
import argparse, json, os, pathlib, random, signal, socket, subprocess, sys, tempfile, time, urllib.request


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_http(url, seconds, process, what):
    end = time.time() + seconds
    while time.time() < end:
        if process.poll() is not None:
            sys.exit(f"{what} exited with {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    sys.exit(f"{what} is not ready after {seconds} s: {url}")


def tokens_of(number, most):
    """How many tokens a request asks for, and must get: no two neighbours end together."""
    return most // 2 + number * 7 % (most // 2) + 1


def write_input(path, count, most):
    with open(path, "w") as file:
        for number in range(count):
            body = {
                "model": "tiny",
                "messages": [{"role": "user", "content": f"Tell me about the number {number}, please."}],
                "max_tokens": tokens_of(number, most),
                # An answer that is shorter was cut off.
                "ignore_eos": True,
            }
            line = {"custom_id": f"request-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
        # One request that the worker refuses: its answer belongs into the error file.
        body = {"model": "tiny", "messages": "not a list"}
        line = {"custom_id": "refused", "method": "POST", "url": "/v1/chat/completions", "body": body}
        file.write(json.dumps(line) + "\n")


class Server:
    def __init__(self, binary, data, port, worker, log):
        self.command = [binary, "serve", "--listen", f"127.0.0.1:{port}", "--data-dir", data, "--worker", worker]
        self.url, self.log, self.process = f"http://127.0.0.1:{port}", log, None

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=self.log)
        wait_http(self.url + "/readyz", 30, self.process, "tidemill")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Vllm:
    """A real vLLM, started by the script; or one that runs already."""

    def __init__(self, script, port, folder):
        self.command, self.url = [script, "serve", str(port)], f"http://127.0.0.1:{port}"
        self.folder, self.process = folder, None

    def start(self):
        log = open(self.folder / "vllm.log", "a")
        self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        wait_http(self.url + "/health", 600, self.process, "vLLM")

    def running(self):
        """Requests that it runs at this moment."""
        try:
            with urllib.request.urlopen(self.url + "/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            return 0
        lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def stop(self):
        """SIGTERM, as systemd and Kubernetes send it, and some time later the end of whatever is left."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            print("vLLM did not end within 20 s of SIGTERM")
        self.kill()

    def kill(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


def check(source, output, errors, batch, most):
    wanted = [json.loads(line)["custom_id"] for line in open(source)]
    good = [json.loads(line) for line in open(output)]
    bad = [json.loads(line) for line in open(errors)] if os.path.exists(errors) else []
    ids = [line["custom_id"] for line in good]
    assert len(ids) == len(set(ids)), "a custom_id twice in the output file"
    assert sorted(ids + [line["custom_id"] for line in bad]) == sorted(wanted), "lines lost or doubled"
    failed = {line["custom_id"] for line in bad}
    assert failed == {"refused"}, f"unexpected errors: {bad[:3]}"
    assert bad[0]["response"]["status_code"] == 400 and bad[0]["error"] is None, bad[0]
    assert ids == [name for name in wanted if name not in failed], "the output is not in input order"
    total = 0
    for line in good:
        assert line["error"] is None and line["response"]["status_code"] == 200, line
        body = line["response"]["body"]
        assert body["object"] == "chat.completion" and body["choices"], line
        wanted_tokens = tokens_of(int(line["custom_id"].split("-")[1]), most)
        assert body["choices"][0]["finish_reason"] == "length", line
        assert body["usage"]["completion_tokens"] == wanted_tokens, (wanted_tokens, line)
        total += body["usage"]["total_tokens"]
    assert total == int(batch["usage"]["total_tokens"]), (total, batch["usage"])
    counts = batch["request_counts"]
    assert (int(counts["completed"]), int(counts["failed"])) == (len(good), len(bad)), counts
    return total


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--vllm", help="the script that serves a real vLLM")
    arguments.add_argument("--worker", help="a running vLLM instead")
    arguments.add_argument("--requests", type=int, default=200)
    arguments.add_argument("--kills", type=int, default=1)
    arguments.add_argument("--stops", type=int, default=0, help="how often to stop vLLM with SIGTERM")
    arguments.add_argument("--tokens", type=int, default=200, help="the most tokens of an answer")
    arguments.add_argument("--binary", default="target/debug/tidemill")
    arguments.add_argument("--seed", type=int, default=int(time.time()))
    options = arguments.parse_args()
    dice = random.Random(options.seed)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="tidemill-real-vllm-"))
    print(f"folder {folder}, seed {options.seed}")
    if options.worker:
        assert not options.stops, "--stops needs --vllm: only a vLLM that was started here is stopped"
        run(options, dice, folder, options.worker, None)
        return
    subprocess.run([options.vllm, "install"], check=True)
    vllm = Vllm(options.vllm, free_port(), folder)
    try:
        vllm.start()
        run(options, dice, folder, vllm.url, vllm)
    finally:
        if vllm.process:
            vllm.kill()


def run(options, dice, folder, worker, vllm):
    source = folder / "input.jsonl"
    write_input(source, options.requests, options.tokens)
    server = Server(options.binary, str(folder / "data"), free_port(), worker, open(folder / "tidemill.log", "a"))
    server.start()

    def cli(*words):
        command = [options.binary, "--server", server.url, "--json", *map(str, words)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    try:
        batch = json.loads(cli("batch", "submit", source).splitlines()[-1])["id"]
        started = time.time()
        kills, stops, done, last = 0, 0, 0, -1
        while True:
            state = json.loads(cli("batch", "get", batch))
            counts = state.get("request_counts", {})
            done = int(counts.get("completed", 0)) + int(counts.get("failed", 0))
            if done != last:
                print(f"{time.time() - started:6.1f} s  {state['status']:<12} {done} of {counts.get('total')}, {kills} kills, {stops} stops")
                last = done
            if state["status"] in ("COMPLETED", "FAILED", "EXPIRED", "CANCELLED"):
                break
            if kills < options.kills:
                # The first one early, so that a fast machine is still in the middle.
                time.sleep(dice.uniform(0.2, 0.8) if kills == 0 else dice.uniform(0.5, 4))
                server.kill()
                kills += 1
                server.start()
            elif stops < options.stops and vllm.running() > 0:
                # In the middle of the answers that run now.
                time.sleep(dice.uniform(0.1, 0.6))
                print(f"{time.time() - started:6.1f} s  SIGTERM to vLLM, which runs {vllm.running():.0f} requests")
                vllm.stop()
                stops += 1
                vllm.start()
            else:
                time.sleep(0.1)
        assert state["status"] == "COMPLETED", state
        assert kills == options.kills, f"the batch was over after {kills} kills: ask for more requests"
        assert stops == options.stops, f"the batch was over after {stops} stops of vLLM: ask for more requests"
        cli("batch", "results", batch, "--output", folder / "output.jsonl", "--errors", folder / "errors.jsonl")
        tokens = check(source, folder / "output.jsonl", folder / "errors.jsonl", state, options.tokens)
        with urllib.request.urlopen(server.url + "/metrics", timeout=5) as answer:
            metrics = [line for line in answer.read().decode().splitlines() if line.startswith("tidemill_tries_failed")]
        print("\n".join(metrics))
        print(
            f"ok: {options.requests + 1} requests, {kills} kills of tidemill, {stops} stops of vLLM, {tokens} tokens, "
            f"{time.time() - started:.1f} s"
        )
    finally:
        server.kill()


if __name__ == "__main__":
    main()
