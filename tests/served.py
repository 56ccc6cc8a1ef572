"""A server with a tiny model on a real socket, for the tests of gptcore.serving."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from gptcore import GPT, GPTConfig
from gptcore.heads import GPTForQuestionAnswering, GPTForSequenceClassification, GPTForTokenClassification
from gptcore.serving import embeddings
from gptcore.serving.guard import Guard
from gptcore.serving.limits import Limits
from gptcore.serving.load import load, serve
from gptcore.serving.served import Served
from gptcore.serving.server import listen, make_app, make_server
from gptcore.text.chat import TEMPLATES, with_template
from gptcore.text.tokenizer import Tokenizer

MODEL = "tiny"
POSITIONS = 128
HEADS = {
    "text-classification": (GPTForSequenceClassification, ["bad", "fine", "good"]),
    "token-classification": (GPTForTokenClassification, ["O", "B-PER", "I-PER"]),
    "question-answering": (GPTForQuestionAnswering, None),
}


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The events of a stream before [DONE]."""
        lines = self.data.decode().split("\n\n")
        assert lines[-1] == ""
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if line != "data: [DONE]"]


class Running(NamedTuple):
    """A server that runs in a thread."""

    port: int
    served: Served
    guard: Guard
    model: GPT

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send one request on a connection of its own; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            if body is not None:
                headers = {"Content-Type": "application/json", **headers}
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def complete(self, **body: Any) -> Answer:
        return self.request("POST", "/v1/completions", {"model": MODEL, "prompt": "the quick", **body})

    def connect(self, path: str, body: Any, more: bytes = b"") -> socket.socket:
        """Return a socket over which a request was sent, and nothing was read. more: follows in the same packet."""
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        )
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        sock.sendall(head.encode() + b"\r\n\r\n" + data + more)
        return sock

    def stats(self) -> dict[str, float]:
        return dict(self.served.engine.stats())

    def until_idle(self, seconds: float = 10.0) -> None:
        """Wait until no request is in the engine or the server."""
        wait_for(
            lambda: not self.guard.running and not self.stats()["running"] and not self.stats()["waiting"], seconds
        )


def is_closed(sock: socket.socket) -> bool:
    """Wait until the other side has closed a connection, over which it says nothing."""
    try:
        return sock.recv(64) == b""
    except ConnectionResetError:
        return True


@contextlib.contextmanager
def slow_steps(server: Running, seconds: float = 0.02) -> Iterator[None]:
    """Make each pass over the model take a while."""
    hook = server.model.ln_f.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        hook.remove()


def wait_for(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} seconds"
        time.sleep(0.002)


def tiny_tokenizer(folder: Any) -> Tokenizer:
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. héllo wörld € \n" * 20, encoding="utf-8")
    return with_template(Tokenizer.train(text, 300), TEMPLATES["chatml"])


def tiny_gpt(tokenizer: Tokenizer) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(
            vocab_size=tokenizer.vocab_size, n_positions=POSITIONS, n_embd=32, n_layer=1, n_head=2,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.eos_token_id, initializer_range=0.2,
        )
    ).eval()  # fmt: skip


@contextlib.contextmanager
def serving(
    served: Served, routers: Any, model: Any, origins: Sequence[str] = (), **settings: Any
) -> Iterator[Running]:
    """Serve until the end of the block."""
    guard = make_app(served, routers, **settings)
    server = make_server(guard, served.limits, origins)
    sock = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield Running(sock.getsockname()[1], served, guard, model)
    finally:
        server.should_exit = True
        thread.join(10)
        served.close()
        sock.close()
    assert not thread.is_alive()


@contextlib.contextmanager
def running(tokenizer: Tokenizer, limits: Limits | None = None, **settings: Any) -> Iterator[Running]:
    """Serve a tiny language model until the end of the block."""
    model = tiny_gpt(tokenizer)
    served = serve(model, tokenizer, MODEL, limits or Limits(client_seconds=5), template=TEMPLATES["chatml"])
    with serving(served, [embeddings.routes(served, model)], model, **settings) as started:
        yield started


def save_head(task: str, tokenizer: Tokenizer, folder: Any) -> None:
    """Save a tiny model with the head for a task of HEADS."""
    head, labels = HEADS[task]
    torch.manual_seed(1)
    head(tiny_gpt(tokenizer).config, id2label=labels).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def serving_folder(folder: Any) -> contextlib.AbstractContextManager[Running]:
    """Serve the model in a folder, as `gptcore serve` does."""
    served, routers = load(folder, "model", Limits())
    return serving(served, routers, served.engine.model)
