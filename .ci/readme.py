#!/usr/bin/env python3
"""Runs the README's examples as written, against the server that the README says to start.

Every fenced block behind a line "<!-- ci: run -->" is run in the order of the page, the shell blocks in one shell. A block
whose next block is fenced as "text" and marked "<!-- ci: output -->" must print each of that block's lines that has no
digits in it: ids, times and speeds differ from run to run.
"""
import pathlib, re, subprocess, sys

page = pathlib.Path(sys.argv[1]).read_text()
blocks = re.findall(r"<!-- ci: run -->\n```(\w+)\n(.*?)```", page, re.S)
if not blocks:
    sys.exit(f"{sys.argv[1]} has no block to run")
script = ["set -euo pipefail"]
for kind, text in blocks:
    if kind == "sh":
        script.append(text)
    elif kind == "python":
        script.append(f"python3 - <<'EXAMPLE'\n{text}\nEXAMPLE")
    else:
        sys.exit(f"a block of {kind} can't be run")
done = subprocess.run(["bash", "-c", "\n".join(script)], text=True, capture_output=True)
print(done.stdout, done.stderr, sep="\n")
if done.returncode:
    sys.exit(f"the examples of {sys.argv[1]} failed with {done.returncode}")
for wanted in re.findall(r"<!-- ci: output -->\n```text\n(.*?)```", page, re.S):
    for line in wanted.splitlines():
        if line.strip() and not re.search(r"\d|…", line) and line.strip() not in done.stdout:
            sys.exit(f"the README shows a line that the examples did not print: {line}")
print(f"{len(blocks)} blocks of {sys.argv[1]} ran as written")
