"""llama.cpp itself runs what `export_gguf` writes, with the logits of gptcore: pytest tests/sweep/llama_cpp.py

Needs the package xllamacpp, llama.cpp in a wheel; so pytest does not collect this file by default.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import xllamacpp

from gptcore import GPT, GPTConfig, Tokenizer
from gptcore.export import export_gguf, export_gguf_adapter
from gptcore.lora import add_adapter

PROMPT = "the kernels of a GPT, 12 files; naïve über"


def completion(path: Path, *adapters: Path) -> Any:
    options = xllamacpp.CommonParams()
    options.model.path = str(path)
    options.n_ctx, options.n_parallel, options.warmup = 128, 1, False
    options.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0) for adapter in adapters]
    answer = xllamacpp.Server(options).handle_completions(
        {"prompt": PROMPT, "n_predict": 20, "temperature": 0, "logprobs": 5, "ignore_eos": True}
    )
    return answer if isinstance(answer, dict) else json.loads(answer)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("dtype", "bound"), [("f32", 0.01), ("f16", 0.01), ("bf16", 0.05), ("q8_0", 0.05), ("q4_0", 0.05)]
)
def test_llama_cpp_computes_the_same(tmp_path: Path, dtype: str, bound: float, tied: bool) -> None:
    torch.manual_seed(0)
    text = tmp_path / "text.txt"
    text.write_text(
        "".join(path.read_text(encoding="utf-8") for path in Path("gptcore").glob("*.py")), encoding="utf-8"
    )
    file = Tokenizer.train(text, vocab_size=500).save_pretrained(tmp_path)
    state = json.loads(file.read_text())
    added = state["added_tokens"][0]
    state["added_tokens"].append(added | {"content": "naïve über", "id": 500, "special": False, "normalized": True})
    file.write_text(json.dumps(state))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode(PROMPT)[-1] == 500
    end = tokenizer.eos_token_id
    config = GPTConfig(
        vocab_size=512, n_positions=128, n_embd=64, n_layer=3, n_head=4, initializer_range=0.15, eos_token_id=end,
        bos_token_id=end, tie_word_embeddings=tied,
    )  # fmt: skip
    model = GPT(config).eval()
    export_gguf(model, tokenizer, tmp_path / "m.gguf", dtype)
    assert Tokenizer.from_pretrained(tmp_path / "m.gguf").encode(PROMPT) == tokenizer.encode(PROMPT)
    if dtype in ("q8_0", "q4_0"):  # both round the inputs of layers to 8 bits
        model = GPT.from_pretrained(tmp_path / "m.gguf")

    answer = completion(tmp_path / "m.gguf")
    ids = tokenizer.encode(PROMPT)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert len(likeliest) == 5
    for token in likeliest:
        assert token["logprob"] == pytest.approx(float(logits.log_softmax(-1)[token["id"]]), abs=bound)
    if dtype == "f32":
        new = model.generate([ids], 20, eos_token_id=-1)[0, len(ids) :].tolist()
        assert answer["choices"][0]["text"] == tokenizer.decode(new)


@pytest.mark.parametrize("settings", [{}, {"rslora": True, "target_modules": ["c_attn.q", "mlp.c_fc"]}])
def test_llama_cpp_adds_an_adapter(tmp_path: Path, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    text = tmp_path / "text.txt"
    text.write_text(PROMPT * 30, encoding="utf-8")
    tokenizer = Tokenizer.train(text, vocab_size=300)
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size, n_positions=128, n_embd=64, n_layer=3, n_head=4, initializer_range=0.15,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = GPT(config).eval()
    export_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    add_adapter(model, r=4, alpha=12, **{"target_modules": "all-linear", **settings})
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    export_gguf_adapter(model, tmp_path / "a.gguf")
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode(PROMPT)])).logits[0, -1].log_softmax(-1)
    plain, adapted = (
        completion(tmp_path / "m.gguf", *adapters)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        for adapters in ((), (tmp_path / "a.gguf",))
    )
    for token in adapted:
        assert token["logprob"] == pytest.approx(float(logits[token["id"]]), abs=0.01)
    assert any(abs(token["logprob"] - float(logits[token["id"]])) > 0.1 for token in plain)
