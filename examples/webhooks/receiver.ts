// A webhook receiver with nothing but Node.js: 23.6 or later runs this file as it is, older ones with tsx.
//
//   TIDEMILL_WEBHOOK_SECRET=whsec_... node receiver.ts 9000
//   TIDEMILL_WEBHOOK_SECRET=whsec_... npx tsx receiver.ts 9000

import { createHmac, timingSafeEqual } from "node:crypto";
import { createServer, type IncomingHttpHeaders } from "node:http";

const secret = process.env.TIDEMILL_WEBHOOK_SECRET ?? "";
const key = secret.startsWith("whsec_") ? Buffer.from(secret.slice(6), "base64") : Buffer.from(secret);
const seen = new Set<string>(); // in earnest: a table with a unique column

/** Throws unless the request is the sender's and fresh. */
function verify(headers: IncomingHttpHeaders, body: Buffer, now = Date.now() / 1000): void {
  const timestamp = String(headers["webhook-timestamp"]);
  if (!/^[0-9]{1,15}$/.test(timestamp)) throw new Error("the timestamp is no number");
  const age = now - Number(timestamp);
  if (age > 300 || age < -60) throw new Error("the timestamp is too old or too new");
  const right = createHmac("sha256", key).update(`${headers["webhook-id"]}.${timestamp}.`).update(body).digest();
  const fits = String(headers["webhook-signature"])
    .split(" ")
    .filter((entry) => entry.startsWith("v1,"))
    .map((entry) => Buffer.from(entry.slice(3), "base64"))
    .some((given) => given.length === right.length && timingSafeEqual(given, right));
  if (!fits) throw new Error("no signature matches");
}

createServer((request, response) => {
  const chunks: Buffer[] = [];
  request.on("data", (chunk) => chunks.push(chunk));
  request.on("end", () => {
    const body = Buffer.concat(chunks); // the bytes, before any parsing
    try {
      verify(request.headers, body);
    } catch (error) {
      console.log(`refused: ${(error as Error).message}`);
      response.writeHead(401).end();
      return;
    }
    const id = String(request.headers["webhook-id"]);
    if (!seen.has(id)) {
      seen.add(id); // delivered at least once: count it once
      const event = JSON.parse(body.toString());
      console.log(event.type, event.id, JSON.stringify(event.request_counts));
    }
    response.writeHead(204).end();
  });
}).listen(Number(process.argv[2] ?? 9000), "127.0.0.1");
