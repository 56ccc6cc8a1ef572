"""Run a command that serves a model, and check that it answers and ends after SIGTERM; for .ci/run."""

import json
import re
import signal
import subprocess
import sys
import urllib.request

process = subprocess.Popen([*sys.argv[1:], "--port", "0"], stdout=subprocess.PIPE, text=True)
try:
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    address = next(found[1] for line in lines if (found := re.match(r"page +(http\S+)/", line)))
    with urllib.request.urlopen(address) as page:
        assert b"page.js" in page.read()
    body = json.dumps({"model": "model", "prompt": "The", "max_tokens": 20}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        print(json.load(answer)["choices"][0]["text"])
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
finally:
    process.kill()
