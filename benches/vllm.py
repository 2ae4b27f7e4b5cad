#!/usr/bin/env python3
"""Claims that need a real vLLM: what tidemill makes of it.

    benches/vllm.py adaptive  --vllm vllm.sh   the limit that tidemill finds, over fixed ones of 1, 8, 32, 128 and 256
    benches/vllm.py run-batch --vllm vllm.sh   the same requests through tidemill, over `vllm run-batch`
    benches/vllm.py prefix    --vllm vllm.sh   requests that share long prefixes, in random order: grouped, over as they come

    [--requests N] [--rounds N] [--binary target/release/tidemill] [--fixed 32,128]

`vllm.sh serve PORT [flags]` serves a model under the name "tiny", `vllm.sh run-batch IN OUT` runs a file on the same one. The
contenders take turns; medians are compared. A batch's time is from its creation to its completion by the server's clock;
loading the model is not in it. Writes target/bench/{adaptive,vllm,prefix}.json. Needs Python's standard library only.
"""
import argparse, contextlib, datetime, json, os, pathlib, platform, random, re, signal, socket, statistics, subprocess, sys
import tempfile, time, urllib.request

FIXED = [1, 8, 32, 128, 256]
WORDS = "tide mill wheel water gate stone grain flour river pond sluice miller ebb flood moon sea".split()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def get(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def wait(url, seconds, process, what):
    end = time.time() + seconds
    while time.time() < end:
        if process.poll() is not None:
            sys.exit(f"{what} exited with {process.returncode}")
        with contextlib.suppress(OSError):
            get(url)
            return
        time.sleep(0.1)
    sys.exit(f"{what} is not ready after {seconds} s: {url}")


def line(number, messages, tokens=16):
    body = {"model": "tiny", "messages": messages, "max_tokens": tokens}
    return json.dumps({"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body})


def questions(path, count, salt):
    """Chat requests that share nothing that a prefix cache could hold."""
    with open(path, "w") as file:
        for number in range(count):
            text = f"{salt} {number}: tell me about the number {number}, please."
            file.write(line(number, [{"role": "user", "content": text}]) + "\n")


def shared_prefixes(path, dice, options, alike):
    """Requests over a few long system prompts, in random order. Not alike: every prompt is the same to the model as with
    `alike`, but written with spaces of its own, so that nobody can tell by the bytes that two are the same."""
    prompts = [" ".join(dice.choice(WORDS) for _ in range(options.prefix_words)) for _ in range(options.prefixes)]
    numbers = list(range(options.requests))
    dice.shuffle(numbers)
    with open(path, "w") as file:
        for place, number in enumerate(numbers):
            system = {"role": "system", "content": prompts[number % options.prefixes]}
            user = {"role": "user", "content": f"What of number {number}?"}
            text = line(place, [system, user])
            if not alike:
                spaces = f"{place:012b}".replace("0", " ").replace("1", "\t")
                text = text.replace('"messages": [', f'"messages": [{spaces}', 1)
            file.write(text + "\n")


@contextlib.contextmanager
def vllm(options, folder, *flags):
    port = free_port()
    log = open(folder / "vllm.log", "a")
    server = subprocess.Popen(
        [options.vllm, "serve", str(port), *flags], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        wait(f"http://127.0.0.1:{port}/health", 600, server, f"vLLM (see {log.name})")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def batch(options, folder, worker, source, *flags):
    """Seconds that the batch took, and the worker's last limit."""
    port = free_port()
    with tempfile.TemporaryDirectory(dir=folder) as data:
        command = [options.binary, "serve", "--listen", f"127.0.0.1:{port}", "--data-dir", data, "--worker", worker, *flags]
        log = open(folder / "tidemill.log", "a")
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait(f"http://127.0.0.1:{port}/readyz", 60, server, f"tidemill (see {log.name})")

            def cli(*words):
                words = [options.binary, "--server", f"http://127.0.0.1:{port}", "--json", *map(str, words)]
                return subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()

            # The worker must have been seen healthy: that wait is not the batch's.
            while not json.loads(cli("workers", "list")[0]).get("models"):
                time.sleep(0.1)
            name = json.loads(cli("batch", "submit", source)[-1])["id"]
            cli("batch", "watch", name)
            ended = json.loads("".join(cli("batch", "get", name)))
            assert ended["status"] == "COMPLETED" and int(ended["request_counts"].get("failed", 0)) == 0, ended
            limit = json.loads(cli("workers", "list")[0])["limit"]
            began, end = (datetime.datetime.fromisoformat(ended[key]) for key in ("create_time", "completed_time"))
            return (end - began).total_seconds(), limit
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()


def prefix_counts(worker):
    page = get(worker + "/metrics")
    total = lambda name: sum(float(value) for value in re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", page, re.M))
    return total("prefix_cache_queries_total"), total("prefix_cache_hits_total")


def warm_up(options, folder, worker):
    source = folder / "warm.jsonl"
    questions(source, 200, "warm")
    batch(options, folder, worker, source)


def report(name, claim, table, extra):
    """Prints the table and writes it down."""
    print(f"\n{claim}\n\n| | " + " | ".join(table[0]) + " |\n|" + " --- |" * (len(table[0]) + 1))
    for row in table[1:]:
        print("| " + " | ".join(row) + " |")
    folder = pathlib.Path("target/bench")
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"cores": os.cpu_count(), "machine": platform.machine()}
    (folder / f"{name}.json").write_text(json.dumps({"claim": name, **machine, **extra}, indent=1) + "\n")


def adaptive(options, folder):
    contenders = {"adaptive": []} | {f"fixed {limit}": ["--worker-max-in-flight", str(limit)] for limit in options.fixed}
    times, limits = {name: [] for name in contenders}, []
    with vllm(options, folder) as worker:
        warm_up(options, folder, worker)
        for turn in range(options.rounds):
            for name, flags in contenders.items():
                source = folder / "input.jsonl"
                questions(source, options.requests, f"{turn} {name}")
                took, limit = batch(options, folder, worker, source, *flags)
                print(f"round {turn + 1}, {name}: {took:.2f} s, {options.requests / took:.0f} req/s, limit {limit}", flush=True)
                times[name].append(took)
                limits += [limit] if name == "adaptive" else []
    rates = {name: options.requests / statistics.median(took) for name, took in times.items()}
    best = max(rate for name, rate in rates.items() if name != "adaptive")
    table = [["req/s", "of the best fixed"]] + [[n, f"{r:.0f}", f"{r / best:.2f}"] for n, r in rates.items()]
    claim = f"{options.requests} chat requests, 16 tokens out, {options.rounds} rounds; adaptive limit at the end: {limits}"
    extra = {"requests": options.requests, "rounds": options.rounds, "seconds": times, "per_second": rates}
    report("adaptive", claim, table, {**extra, "limits": limits, "ratio": rates["adaptive"] / best})


def run_batch(options, folder):
    times = {"tidemill": [], "vllm run-batch": []}
    for turn in range(options.rounds):
        source, out = folder / "input.jsonl", folder / "output.jsonl"
        questions(source, options.requests, f"{turn}")
        ran = subprocess.run([options.vllm, "run-batch", source, out], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines = sum(1 for _ in open(out)) if out.exists() else 0
        assert ran.returncode == 0 and lines == options.requests, ran.stdout[-2000:]
        # Its own account of the run without the load: the progress bar's last rate is the mean of all.
        rate, unit = re.findall(r"([\d.]+)\s*(req/s|it/s|s/req|s/it)", ran.stdout)[-1]
        took = options.requests / float(rate) if unit.endswith("/s") else options.requests * float(rate)
        times["vllm run-batch"].append(took)
        with vllm(options, folder) as worker:
            warm_up(options, folder, worker)
            times["tidemill"].append(batch(options, folder, worker, source)[0])
        print(f"round {turn + 1}: " + ", ".join(f"{name} {took[-1]:.2f} s" for name, took in times.items()), flush=True)
    mine, theirs = (statistics.median(times[name]) for name in ("tidemill", "vllm run-batch"))
    table = [["seconds", "req/s"]]
    table += [[name, f"{s:.2f}", f"{options.requests / s:.0f}"] for name, s in (("tidemill", mine), ("vllm run-batch", theirs))]
    claim = f"{options.requests} chat requests, 16 tokens out, {options.rounds} rounds, without loading: {mine / theirs:.2f} of its time"
    report("vllm", claim, table, {"requests": options.requests, "rounds": options.rounds, "seconds": times, "ratio": mine / theirs})


def prefix(options, folder):
    times, rates = {"grouped": [], "as they come": []}, {"grouped": [], "as they come": []}
    flags = [] if options.in_flight == 0 else ["--worker-max-in-flight", str(options.in_flight)]
    with vllm(options, folder, "--num-gpu-blocks-override", str(options.blocks), *options.vllm_flags) as worker:
        warm_up(options, folder, worker)
        for turn in range(options.rounds):
            for name in times:
                source = folder / "input.jsonl"
                # Other prompts each turn: nothing of them is left in the cache from before.
                shared_prefixes(source, random.Random(f"{options.seed} {turn} {name}"), options, name == "grouped")
                before = prefix_counts(worker)
                took, _ = batch(options, folder, worker, source, *flags)
                queries, hits = (now - then for now, then in zip(prefix_counts(worker), before))
                times[name].append(took)
                rates[name].append(hits / max(queries, 1))
                print(f"round {turn + 1}, {name}: {options.requests / took:.0f} req/s, hit rate {rates[name][-1]:.2f}", flush=True)
    took = {name: statistics.median(all) for name, all in times.items()}
    table = [["req/s", "hit rate"]]
    table += [[name, f"{options.requests / took[name]:.0f}", f"{statistics.median(rates[name]):.2f}"] for name in took]
    ratio = took["as they come"] / took["grouped"]
    claim = f"{options.requests} requests over {options.prefixes} prefixes of {options.prefix_words} words in random order: {ratio:.2f}x"
    extra = {"requests": options.requests, "rounds": options.rounds, "prefixes": options.prefixes, "blocks": options.blocks}
    report("prefix", claim, table, {**extra, "in_flight": options.in_flight, "seconds": times, "hit_rates": rates, "ratio": ratio})


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("claim", choices=["adaptive", "run-batch", "prefix"])
    arguments.add_argument("--vllm", required=True, help="the script that serves a real vLLM")
    arguments.add_argument("--requests", type=int, help="default: 2000; prefix: 800")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--binary", default="target/release/tidemill")
    arguments.add_argument("--fixed", type=lambda text: [int(word) for word in text.split(",")], default=FIXED)
    arguments.add_argument("--prefixes", type=int, default=40)
    arguments.add_argument("--prefix-words", type=int, default=330)
    arguments.add_argument("--blocks", type=int, default=96, help="prefix: blocks of the KV cache")
    arguments.add_argument("--in-flight", type=int, default=8, help="prefix: requests at once; 0: adaptive")
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("vllm_flags", nargs="*", help="prefix: more flags for vllm serve, after --")
    options = arguments.parse_args()
    options.requests = options.requests or (800 if options.claim == "prefix" else 2_000)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="tidemill-bench-"))
    print(f"logs in {folder}")
    subprocess.run([options.vllm, "install"], check=True)
    {"adaptive": adaptive, "run-batch": run_batch, "prefix": prefix}[options.claim](options, folder)


if __name__ == "__main__":
    main()
