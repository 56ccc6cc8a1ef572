"""Rules for the server, each from a hole that was found in another one; the names of the tests are the rules."""

import contextlib
import hmac
import http.client
import json
import logging
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served import MODEL, POSITIONS, Answer, is_closed, running, tiny_tokenizer, wait_for
from torch import Tensor

import gptcore.serving
from gptcore import cli
from gptcore.serving.guard import LOOPBACK, read_keys
from gptcore.serving.limits import HEADER_BYTES, MAX_CHOICES, MAX_PROMPTS, Limits
from gptcore.serving.rows import Row
from gptcore.text.chat import template_of
from gptcore.text.tokenizer import Tokenizer

KEYS = [b"first-key-0123456789", b"second-key-0123456789"]
BODY = 4096


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def server(tokenizer):
    """With limits so small that tests reach them."""
    limits = Limits(max_body_bytes=BODY, client_seconds=0.5, request_seconds=5, max_new_tokens=100)
    with running(tokenizer, limits, hosts=LOOPBACK) as started:
        yield started


@pytest.fixture(scope="module")
def locked(tokenizer):
    with running(tokenizer, keys=KEYS) as started:
        yield started


def read_answer(sock: socket.socket) -> http.client.HTTPResponse:
    answer = http.client.HTTPResponse(sock)
    answer.begin()
    return answer


# ---- counts and numbers (vLLM CVE-2026-34756, llama.cpp CVE-2026-21869) ------------------------------------------


@pytest.mark.parametrize(
    ("param", "change"),
    [
        ("n", {"n": MAX_CHOICES + 1}),
        ("best_of", {"best_of": 1_000_000}),
        ("prompt", {"prompt": ["a"] * (MAX_PROMPTS + 1)}),
        ("n", {"prompt": ["a"] * MAX_PROMPTS, "n": MAX_CHOICES}),
        ("stop", {"stop": ["a"] * 5}),
        ("stop", {"stop": "a" * 1000}),
        ("logprobs", {"logprobs": 6}),
        ("max_tokens", {"max_tokens": 101}),
        ("max_tokens", {"max_tokens": 2**80}),
        ("logit_bias", {"logit_bias": {str(i): 1 for i in range(301)}}),
        ("prompt", {"prompt": [1] * (POSITIONS + 1)}),
        ("prompt", {"prompt": "x" * 3000}),
    ],
)
def test_every_count_is_capped_before_any_work(server, monkeypatch, param, change):
    monkeypatch.setattr(server.served.engine, "submit", lambda request: pytest.fail("the engine was asked"))
    answer = server.complete(**change)
    assert (answer.status, answer.error["param"]) == (400, param)


@pytest.mark.parametrize("name", ["n", "max_tokens", "temperature", "top_p", "top_k", "seed", "logprobs",
                                  "presence_penalty", "frequency_penalty", "repetition_penalty"])  # fmt: skip
@pytest.mark.parametrize("value", ["-9", "true", '"1"', "NaN", "Infinity", "1e999", "[1]", "99999999999999999999"])
def test_every_number_is_range_checked(server, name, value):
    answer = server.request(
        "POST", "/v1/completions", f'{{"model": "tiny", "prompt": "a", "{name}": {value}}}'.encode()
    )
    assert (answer.status, answer.error["param"]) == (400, name)


@pytest.mark.parametrize(
    "bias", [{"-1": 1}, {"1.5": 1}, {"a": 1}, {"1": 101}, {"1": "5"}, {"99999": 1}, {"\u0663": 1}, {"01": 1}, [1]]
)
def test_logit_bias_is_checked(server, bias):
    answer = server.complete(logit_bias=bias)
    assert answer.status == 400
    assert answer.error["param"].startswith("logit_bias") or "logit_bias" in answer.error["message"]


@pytest.mark.parametrize("tokens", [[-1], [999], [2**70], [True], [1.5], [[-1]], [[]], []])
def test_token_ids_are_checked(server, tokens):
    assert server.complete(prompt=tokens).status == 400


# ---- headers, bodies, slow clients (vLLM CVE-2025-48956) ---------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * (HEADER_BYTES + 100),
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * (HEADER_BYTES // 6 + 100),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
        b"GET /h\xc3\xa9 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    ],
    ids=["long", "many", "tls", "path", "lengths", "negative"],
)
def test_huge_headers_and_what_is_not_http_are_refused(server, sent):
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(sent)
        answer = read_answer(sock)
    assert (answer.status, answer.getheader("Connection")) == (400, "close")
    assert json.loads(answer.read())["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("size", [BODY + 1, 12 * BODY, 400 * BODY])
def test_a_large_body_is_refused_and_the_client_can_read_why(server, size):
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        head = f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {size}"
        sock.sendall(head.encode() + b"\r\n\r\n" + b" " * min(size, 12 * BODY))
        text = sock.makefile("rb").read()
    assert text.startswith(b"HTTP/1.1 413 ")
    assert f"takes {BODY:,}".encode() in text


def test_a_chunked_body_is_counted_too(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        sock.sendall(b"".join(b"400\r\n" + b" " * 1024 + b"\r\n" for _ in range(5)) + b"0\r\n\r\n")
        assert sock.recv(64).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A"])
def test_slow_headers_end_the_connection(server, sent):
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(sent)
        assert is_closed(sock)  # before the time of the socket ends


def test_headers_that_trickle_are_slow_too(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        start = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):  # noqa: PT012 - where the connection ends
            while time.monotonic() - start < 8:
                sock.sendall(b"G")
                time.sleep(0.05)


def test_a_slow_body_gets_408(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        assert sock.recv(64).startswith(b"HTTP/1.1 408 ")


def test_a_connection_is_kept_for_a_second_request(server):
    """The time for headers ends with the headers, and begins again with the next ones."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        for pause in (0, 0.3, 0.3):
            time.sleep(pause)
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = sock.recv(4096)
            while b"}" not in answer:
                answer += sock.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200 ")


# ---- keys (vLLM CVE-2025-59425, its security.md) -----------------------------------------------------------------


def test_every_route_but_health_needs_the_key(locked):
    document = locked.request("GET", "/openapi.json", Authorization=f"Bearer {KEYS[0].decode()}").json
    routes = [(method.upper(), path) for path, item in document["paths"].items() for method in item]
    routes += [("GET", path) for path in ("/", "/page.js", "/openapi.json", "/docs", "/nope", "/health/", "//health")]
    assert len(routes) > 12
    for method, path in routes:
        answer = locked.request(method, path)
        assert answer.status == (200 if path == "/health" else 401), path
    assert answer.error["code"] == "invalid_api_key"
    assert locked.request("GET", "/health").status == 200


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(locked, key):
    assert locked.request("GET", "/v1/models", Authorization=f"Bearer {key.decode()}").status == 200
    basic = "Basic " + __import__("base64").b64encode(b"any:" + key).decode()  # as a browser sends it
    assert locked.request("GET", "/", Authorization=basic).status == 200


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer ", "Bearer x", "Bearer " + KEYS[0].decode()[:-1], "Basic !!",
                                   "Basic /w==", KEYS[0].decode(), "Bearer \xe9"])  # fmt: skip
def test_other_keys_do_not(locked, given):
    answer = locked.request("GET", "/v1/models", Authorization=given)
    assert (answer.status, answer.error["type"]) == (401, "authentication_error")


def test_keys_are_compared_in_constant_time(locked, monkeypatch):
    """All keys are compared, by digests of one length, whatever was given."""
    seen = []
    monkeypatch.setattr("gptcore.serving.guard.hmac.compare_digest", lambda a, b: seen.append((a, b)))
    for given in ("x", KEYS[0].decode()):
        seen.clear()
        assert locked.request("GET", "/v1/models", Authorization=f"Bearer {given}").status == 401
        assert [(type(a), len(a), len(b)) for a, b in seen] == [(bytes, 32, 32)] * len(KEYS)
    assert hmac is not None


@pytest.mark.parametrize(("text", "error"), [("", "has no key"), ("# only\n\n", "has no key"), ("short", "shorter"),
                                             ("with a space in it 123", "space"), ("é" * 20, "ASCII")])  # fmt: skip
def test_key_files_are_checked(tmp_path, text, error):
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=error):
        read_keys(str(path))
    path.write_bytes(b"# comment\n" + KEYS[0] + b"\n\n " + KEYS[1] + b"\r\n")
    assert read_keys(str(path)) == KEYS


def test_a_prefix_is_never_shared_across_keys(locked, monkeypatch):
    """vLLM CVE-2025-46570: the owner of a request, by which the engine keeps prefixes apart, is its key."""
    owners = []
    submit = locked.served.engine.submit
    monkeypatch.setattr(locked.served.engine, "submit", lambda request: owners.append(request.owner) or submit(request))
    for key in (*KEYS, KEYS[0]):
        body = {"model": MODEL, "prompt": "the", "max_tokens": 1}
        assert locked.request("POST", "/v1/completions", body, Authorization=f"Bearer {key.decode()}").status == 200
    assert owners[0] == owners[2] != owners[1]
    assert all(key.decode() not in owner for key in KEYS for owner in owners)


# ---- what is not accepted at all ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field", ["suffix", "user", "n_discard", "best_of", "tools", "response_format", "parallel_tool_calls"]
)
def test_no_field_is_accepted_and_ignored(server, field):
    for value in (None, 1, {"type": "json_object"}):
        answer = server.complete(**{field: value})
        assert (answer.status, answer.error["param"]) == (400, field)


def test_no_query_or_encoding_is_accepted_and_ignored(server):
    answer = server.request("POST", "/v1/completions?n=2", {"model": MODEL, "prompt": "a"})
    assert (answer.status, answer.error["message"].partition(";")[0]) == (
        400, "there is no query parameter here, but 'n=2'")  # fmt: skip
    answer = server.request("POST", "/tokenize", {"prompt": "a"}, **{"Content-Encoding": "gzip"})
    assert (answer.status, answer.error["message"].partition(";")[0]) == (400, "the body has Content-Encoding 'gzip'")


@pytest.mark.parametrize("field", ["guided_regex", "grammar", "guided_json"])
def test_no_grammar_of_a_client_is_run(server, field):
    """vLLM CVE-2025-48944: a bad regular expression ended the engine."""
    assert server.complete(**{field: "(a*)*b"}).error["param"] == field
    assert server.complete().status == 200


@pytest.mark.parametrize("field", ["prompt_embeds", "image", "lora_weights"])
def test_no_tensor_is_taken_from_a_client(server, field):
    """vLLM CVE-2025-62164."""
    for value in ("UEsDBAAAAAA=", [[0.5, 1.5]]):
        assert server.complete(**{field: value}).error["param"] == field


def test_no_request_ends_the_engine(server, monkeypatch):
    """vLLM CVE-2026-105756 (cache_salt): an error inside is that of one request, and those beside it end as ever."""
    choose = Row.choose

    def fail(row: Row, logits: Tensor) -> int:
        if row.request.seed == 13:
            raise SystemError("not foreseen")
        return choose(row, logits)

    monkeypatch.setattr(Row, "choose", fail)
    expected = server.complete(seed=1).json["choices"]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda seed: server.complete(seed=seed), [1, 13, 1, 13]))
    assert [answer.status for answer in answers] == [200, 500, 200, 500]
    assert answers[0].json["choices"] == answers[2].json["choices"] == expected
    assert answers[1].error["type"] == "server_error"


def test_every_cache_is_bounded(tokenizer):
    """vLLM CVE-2025-29770. Kept between requests are prefixes, and the labels of metrics."""
    with running(tokenizer) as server:
        prefix = server.served.engine._prefix
        prefix.limit = 64

        def kept() -> int:
            return len(prefix) + server.request("GET", "/metrics").data.count(b"\n")

        def ask(i: int) -> None:
            server.complete(prompt=[(i * j) % 300 for j in range(40)], max_tokens=1)
            server.request("GET", f"/path-{i}")
            server.request("M" * (i + 1), "/health")

        ask(50), kept()
        before = kept()
        assert len(prefix) == 32
        for i in range(20):
            ask(i)
        assert kept() < before + 32 + 8  # another reason why a text ended
        assert len(prefix) == 64


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}},
                                  {"type": "text", "text": "a", "image_url": "file:///etc/passwd"}])  # fmt: skip
def test_no_address_is_ever_fetched(server, part):
    body = {"model": MODEL, "messages": [{"role": "user", "content": [part]}]}
    assert server.request("POST", "/v1/chat/completions", body).status == 400


PATHS = ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page.js/../server.py", "/..%2fserver.py", "/server.py",
         "/v1/models/..%2f..%2fetc"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leads_to_a_file(server, path):
    assert server.request("GET", path).status == 404


def test_nothing_is_written_to_the_log_by_a_client(server, caplog):
    with caplog.at_level(logging.DEBUG):
        assert server.request("GET", "/%0aforged").status == 404
        assert server.complete(**{"forged\n": 1}).status == 400
        assert server.request("POST", "/tokenize", b"{forged").status == 400
    assert not [record for record in caplog.records if "forged" in record.getMessage()]


def test_a_model_folder_runs_no_code(tokenizer, tmp_path):
    """SGLang CVE-2026-5760: a chat template is one of a fixed set, or none."""
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    own = config["chat_template"]
    for template in (own, own + " ", "{{ ''.__class__.__mro__[1].__subclasses__() }}"):
        file.write_text(json.dumps({**config, "chat_template": template}), encoding="utf-8")
        known = template_of(Tokenizer.from_pretrained(tmp_path))
        assert (known is not None) == (template == own)


def test_no_pickle_and_no_eval_in_the_server():
    """SGLang CVE-2026-3059: nothing that can run code crosses the wire."""
    for path in Path(gptcore.serving.__file__).parent.glob("*.py"):
        assert not re.search(
            r"\bpickle\b|(?<!\.)\b(eval|exec)\(|torch\.load|jinja", path.read_text(encoding="utf-8")
        ), path


def test_loopback_is_the_default():
    assert cli.make_parser().parse(["serve", "model"]).host == "127.0.0.1"


HOSTS = {"127.0.0.1:1": 200, "localhost": 200, "[::1]:80": 200, "": 403, "evil.example": 403, "evil.example:8000": 403,
         "127.0.0.1.evil.example": 403}  # fmt: skip


@pytest.mark.parametrize(("host", "status"), HOSTS.items())
def test_other_hosts_cannot_name_this_machine(server, host, status):
    """DNS rebinding: a page of another site whose name resolves to 127.0.0.1."""
    assert server.request("GET", "/health", Host=host).status == status


SITE = "https://example.org"


def test_other_sites_get_nothing_unless_asked(server):
    """No CORS header, and no POST that a browser would send without asking first."""
    answer = server.request("GET", "/v1/models", Origin=SITE)
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    assert server.request("OPTIONS", "/v1/completions", Origin=SITE).status == 405
    plain = server.request("POST", "/tokenize", b'{"prompt": "a"}', **{"Content-Type": "text/plain"})
    assert plain.status == 400
    assert "application/json" in plain.error["message"]


def test_a_site_that_allow_origin_names_gets_answers_and_no_other(tokenizer):
    with running(tokenizer, origins=[SITE], keys=KEYS) as server:

        def ask(origin: str, method: str = "POST", headers: str = "authorization, content-type") -> Answer:
            asks = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}
            return server.request("OPTIONS", "/v1/completions", Origin=origin, **asks)

        assert (ask(SITE).status, ask(SITE).headers["Access-Control-Allow-Origin"]) == (200, SITE)
        for refused in (ask(SITE + ".evil.example"), ask("null"), ask(SITE, "DELETE"), ask(SITE, headers="x-other")):
            assert refused.status == 400
        key = f"Bearer {KEYS[0].decode()}"
        for origin, allowed in ((SITE, SITE), ("https://evil.example", None)):
            answer = server.request("GET", "/v1/models", Origin=origin, Authorization=key)
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (200, allowed)
            assert answer.headers["Access-Control-Allow-Credentials"] is None
        assert server.request("GET", "/v1/models", Origin=SITE).status == 401
    assert cli.make_parser().parse(["serve", "model"]).allow_origin == []


BODIES = {
    b"": "the body is missing; it is required",
    b"{": "the body is not JSON: Expecting property name",
    b"[]": "the body: ",
    b"null": "the body",
    b"1": "the body: ",
    b'"a"': "the body: ",
    b"\xff\xfe": "the body is not JSON: Expecting value",
    b'{"prompt": "\xff"}': "the body cannot be read as JSON: 'utf-8' codec can't decode byte 0xff",
    b"[" * 4000: "the body cannot be read as JSON: maximum recursion depth exceeded",
    b"{}": "prompt is missing; it is required",
    b'{"prompt": "a", "prompt": "b"}': "the body cannot be read as JSON: 'prompt' is there twice",
    b'{"prompt": "a", "return_token_strs": {"a": 1, "a": 1}}': "the body cannot be read as JSON: 'a' is there twice",
    b'{"prompt": ' + b"9" * 4000 + b"}": "prompt: input should be a valid string, not 9999999",
    b'{"prompt": ' + b"9" * 4080 + b"}": "prompt: input should be a valid string",
}


@pytest.mark.parametrize(("body", "message"), BODIES.items())
def test_a_body_of_any_kind_gets_an_answer(server, body, message):
    answer = server.request("POST", "/tokenize", body)
    assert answer.status == 400
    assert answer.error["message"].startswith(message)


def test_half_a_character_is_text_too(server):
    """A lone surrogate, which JSON allows, is three bytes for the tokenizer."""
    answer = server.complete(prompt="the \ud800", echo=True, model=MODEL, max_tokens=1)
    assert answer.json["choices"][0]["text"].startswith("the \ufffd")
    assert server.complete(model="\ud800").status == 404
    assert server.complete(stop="\ud800").status == 400
    assert server.complete(**{"\ud800": "\ud800"}).status == 400


def test_errors_have_one_shape(server):
    for answer in (server.request("GET", "/nope"), server.request("GET", "/v1/completions"), server.complete(model="x"),
                   server.request("POST", "/health", {})):  # fmt: skip
        assert sorted(answer.error) == ["code", "message", "param", "type"]
        assert answer.headers["x-request-id"].startswith("req_")
        assert answer.headers["content-type"] == "application/json"


def test_too_many_connections_get_503_and_one_that_closes_makes_room(tokenizer):
    with running(tokenizer, Limits(max_connections=2)) as server, contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(2)]
        wait_for(lambda: len(server.guard.connections) == 2)
        answer = server.request("GET", "/health")
        assert (answer.status, answer.headers["Retry-After"], answer.headers["Connection"]) == (503, "1", "close")
        assert answer.error["message"] == "more than 2 connections are open"
        idle[0].close()
        wait_for(lambda: len(server.guard.connections) == 1)
        assert server.request("GET", "/health").status == 200


@pytest.mark.parametrize("path", ["/", "/health", "/nope"])
def test_head_is_get_without_the_body(server, path):
    head, whole = (server.request(method, path) for method in ("HEAD", "GET"))
    assert (head.status, head.headers["Content-Length"], head.data) == (whole.status, str(len(whole.data)), b"")


def test_clients_of_http_1_0_get_an_answer_and_the_end(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert read_answer(sock).read() == b'{"status":"ok","details":{}}'
        assert is_closed(sock)


def test_limits_themselves_are_checked():
    with pytest.raises(ValueError, match="max_batch is 0, expected 1 or more"):
        Limits(max_batch=0)
    with pytest.raises(ValueError, match="request_seconds"):
        Limits(request_seconds=float("nan"))
