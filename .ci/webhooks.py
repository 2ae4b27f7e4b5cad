#!/usr/bin/env python3
"""What tidemill sends, checked by verifiers that others wrote: the standardwebhooks package, OpenAI's SDK, and a receiver
that serialises the JSON again. And the receivers that are shipped, each run on a real delivery.

    .ci/webhooks.py [--bin target/debug]

Starts the built programs on free ports. TypeScript runs with Node.js and npm packages in a temporary folder. Go's receiver
is not run here: it needs Go.
"""
import argparse, base64, datetime, hashlib, hmac, http.server, json, os, pathlib, queue, secrets, shutil, socket, subprocess
import sys, tempfile, threading, time, urllib.error, urllib.request

from openai import InvalidWebhookSignatureError, OpenAI
from standardwebhooks import Webhook, WebhookVerificationError

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples/hello.jsonl"
DEADLINE = 60
openai = OpenAI(api_key="none is needed to verify")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def new_secret():
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def is_standard(secret, body, headers):
    try:
        Webhook(secret).verify(body, headers)
        return True
    except WebhookVerificationError:
        return False


def is_openai(secret, body, headers):
    try:
        openai.webhooks.unwrap(body, headers, secret=secret)
        return True
    except InvalidWebhookSignatureError:
        return False


def is_reserialised(secret, body, headers):
    again = json.dumps(json.loads(body), sort_keys=True).encode()
    right = "sha256=" + hmac.new(secret.encode(), again, hashlib.sha256).hexdigest()
    return hmac.compare_digest(right, headers["x-webhook-signature"])


VERIFIERS = {"standardwebhooks": is_standard, "openai": is_openai, "json.dumps": is_reserialised}


def verdicts(secret, delivery):
    return {name: check(secret, *delivery) for name, check in VERIFIERS.items()}


def expect(what, found, wanted):
    if found != wanted:
        sys.exit(f"{what}: {found} instead of {wanted}")
    print(f"ok: {what}")


def all_say(verdict):
    return dict.fromkeys(VERIFIERS, verdict)


def tampered(delivery):
    body, headers = delivery
    return body.replace(b'"failed": 0', b'"failed": 1'), headers


class Receiver:
    """Takes whatever comes and keeps it."""

    def __init__(self):
        self.deliveries = deliveries = queue.Queue()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                deliveries.put((body, {name.lower(): value for name, value in self.headers.items()}))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_port}/hook"

    def next(self):
        return self.deliveries.get(timeout=DEADLINE)


class Server:
    """tidemill, its simulated worker, and its command line."""

    def __init__(self, binaries, folder):
        self.program, self.folder, self.running = binaries / "tidemill", folder, []
        worker, self.port = free_port(), free_port()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TIDEMILL_")}
        self.environment = environment | {"TIDEMILL_SERVER": f"http://127.0.0.1:{self.port}"}
        self.environment["TIDEMILL_MASTER_KEY"] = base64.b64encode(secrets.token_bytes(32)).decode()
        self.start("sim", self.program, "sim", "--listen", f"127.0.0.1:{worker}", "--models", "sim-7b")
        self.start("serve", self.program, "serve", "--listen", f"127.0.0.1:{self.port}", "--data-dir", folder / "data",
                   "--worker", f"http://127.0.0.1:{worker}", "--webhook-allow-cidr", "127.0.0.0/8", "--webhook-retry-schedule", "1s,2s",
                   "--flush-interval", "200ms")
        until("the server is ready", lambda: is_up(f"http://127.0.0.1:{self.port}/readyz"))

    def start(self, name, *command, **settings):
        log = open(self.folder / f"{name}.log", "wb")
        environment = self.environment | settings.pop("environment", {})
        one = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log, env=environment, **settings)
        self.running.append(one)
        return one

    def log(self, name):
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def cli(self, *words):
        done = subprocess.run([str(self.program), *map(str, words)], text=True, capture_output=True, env=self.environment)
        if done.returncode:
            sys.exit(f"tidemill {' '.join(map(str, words))} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *words):
        return json.loads(self.cli("--json", "batch", "submit", EXAMPLE, *words).splitlines()[0])["id"]

    def stop(self):
        for one in self.running:
            one.terminate()
        for one in self.running:
            one.wait(timeout=30)


def is_up(url):
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except urllib.error.HTTPError:
        return False
    except OSError:
        return False


def until(what, check):
    by = time.monotonic() + DEADLINE
    while not check():
        if time.monotonic() > by:
            sys.exit(f"never: {what}")
        time.sleep(0.05)


def vectors():
    """Those that the Rust tests check too, so that both sides mean the same by them."""
    for secret, id, timestamp, body, signature in [
        ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, '{"test": 2432232314}',
         "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="),
        ("whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD", "msg_27UH4WbU6Z5A5EzD8u03UvzRbpk", 1649367553,
         '{"email":"test@example.com","username":"test_user"}', "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw="),
    ]:
        at = datetime.datetime.fromtimestamp(timestamp, datetime.timezone.utc)
        expect("standardwebhooks signs the vector alike", Webhook(secret).sign(id, at, body), signature)
        headers = {"webhook-id": id, "webhook-timestamp": str(timestamp), "webhook-signature": signature}
        openai.webhooks.verify_signature(body, headers, secret=secret, tolerance=10**10)
        print("ok: openai accepts the vector")


def batch_webhook(server):
    receiver, secret = Receiver(), new_secret()
    batch = server.submit("--webhook-url", receiver.url, "--webhook-secret", secret)
    delivery = receiver.next()
    body, headers = delivery
    expect("a batch's webhook tells of it", (json.loads(body)["id"], headers["x-webhook-event"]), (batch, "completed"))
    expect("all verifiers accept it", verdicts(secret, delivery), all_say(True))
    expect("none accepts another body", verdicts(secret, tampered(delivery)), all_say(False))
    expect("none accepts another secret", verdicts(new_secret(), delivery), all_say(False))
    old = delivery[1] | {"webhook-timestamp": str(int(headers["webhook-timestamp"]) - 301)}
    expect("a changed timestamp is noticed", (is_standard(secret, body, old), is_openai(secret, body, old)), (False, False))


def rotation(server):
    receiver = Receiver()
    made = json.loads(server.cli("webhooks", "endpoints", "create", receiver.url))
    endpoint, first = made["endpoint"]["id"], made["secret"]
    server.submit("--webhook-endpoint", endpoint)
    expect("an endpoint's secret signs", verdicts(first, receiver.next()), all_say(True))
    second = json.loads(server.cli("webhooks", "endpoints", "rotate-secret", endpoint))["secret"]
    server.submit("--webhook-endpoint", endpoint)
    delivery = receiver.next()
    expect("in the overlap the new secret signs", verdicts(second, delivery), all_say(True))
    expect("in the overlap the old one signs too, but for X-Webhook-Signature", verdicts(first, delivery),
           all_say(True) | {"json.dumps": False})
    for secret in (first, second):
        expect("none accepts another body", verdicts(secret, tampered(delivery)), all_say(False))
    third = json.loads(server.cli("webhooks", "endpoints", "rotate-secret", endpoint, "--overlap", "0s"))["secret"]
    server.cli("webhooks", "endpoints", "test", endpoint)
    delivery = receiver.next()
    expect("a test event is signed like any other", verdicts(third, delivery), all_say(True))
    expect("without overlap the old secret is gone", verdicts(second, delivery), all_say(False))


def shipped(server, name, command, secret):
    """A receiver from examples/ prints a real delivery, and refuses what is not signed."""
    port = int(command[-1])
    running = server.start(name, *command, environment={"TIDEMILL_WEBHOOK_SECRET": secret})
    url = f"http://127.0.0.1:{port}/"

    def forged():
        try:
            request = urllib.request.Request(url, data=b"{}", headers={"content-type": "application/json"})
            return urllib.request.urlopen(request, timeout=2).status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    until(f"{name} listens", lambda: running.poll() is None and forged() is not None)
    expect(f"{name} refuses what is not signed", (forged(), "refused" in server.log(name)), (401, True))
    batch = server.submit("--webhook-url", url, "--webhook-secret", secret)
    verified = lambda: any("batch.completed" in line and batch in line for line in server.log(name).splitlines())
    until(f"{name} reports a verified event", verified)
    print(f"ok: {name} verifies a delivery")


def typescript(folder):
    node = folder / "node"
    node.mkdir()
    receiver = node / "receiver.ts"
    shutil.copy(ROOT / "examples/webhooks/receiver.ts", receiver)
    (node / "package.json").write_text('{"type": "module", "private": true}')
    packages = ["tsx@4", "typescript@5", "@types/node@20"]
    quiet = ["--silent", "--no-audit", "--no-fund"]
    subprocess.run(["npm", "install", *quiet, *packages], cwd=node, check=True)
    check = ["node_modules/.bin/tsc", "--noEmit", "--strict", "--target", "es2022", "--module", "nodenext", "receiver.ts"]
    subprocess.run(check, cwd=node, check=True)
    return ["node", "--import", f"file://{node}/node_modules/tsx/dist/loader.mjs", receiver]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", type=pathlib.Path, default=ROOT / "target/debug")
    binaries = parser.parse_args().bin.resolve()
    with tempfile.TemporaryDirectory(prefix="tidemill-webhooks-") as name:
        folder = pathlib.Path(name)
        server = Server(binaries, folder)
        try:
            vectors()
            batch_webhook(server)
            rotation(server)
            receivers = {
                "receiver.py": [sys.executable, ROOT / "examples/webhooks/receiver.py"],
                "receiver.ts": typescript(folder),
                "webhook_receiver.rs": [binaries / "examples/webhook_receiver"],
            }
            for name, command in receivers.items():
                shipped(server, name, [*command, free_port()], new_secret())
            log = server.log("serve")
            expect("the server's log has no panic and no secret", ("panicked" in log, "whsec_" in log), (False, False))
        except BaseException:
            for log in folder.glob("*.log"):
                print(f"--- {log.name}", log.read_text(errors="replace")[-4000:], sep="\n", file=sys.stderr)
            raise
        finally:
            server.stop()
    print("every verifier accepts what tidemill sends, and nothing else")


if __name__ == "__main__":
    main()
