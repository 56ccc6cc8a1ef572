"""Export: GGUF read back with gguf's own reader, and folders that transformers opens."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import stat
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from gptcore import GPT, GPTConfig, Tokenizer, cli
from gptcore.hf.gguf import export_gguf, export_hf

TEXT = "the cat sat on the mat, the hat\n\non a naïve émigré cat 12345 😀 " * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return Tokenizer.train(path, vocab_size=285)


def make(**settings: object) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=320, n_positions=24, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2)
    model = GPT(dataclasses.replace(config, **settings)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def read(path: Path) -> tuple[dict[str, object], dict[str, np.ndarray], dict[str, str]]:
    """Return the metadata, the tensors as float32, and the type of each."""
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return metadata, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


def expected_tensors(model: GPT) -> dict[str, np.ndarray]:
    """The metadata that llama.cpp reads, spelt out."""
    names = {"token_embd.weight": "wte.weight", "position_embd.weight": "wpe.weight"}
    names |= {f"output_norm.{kind}": f"ln_f.{kind}" for kind in ("weight", "bias")}
    for layer in range(model.config.n_layer):
        for theirs, ours in [
            ("attn_norm", "ln_1"), ("attn_qkv", "attn.c_attn"), ("attn_output", "attn.c_proj"), ("ffn_norm", "ln_2"),
            ("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj"),
        ]:  # fmt: skip
            names |= {f"blk.{layer}.{theirs}.{kind}": f"h.{layer}.{ours}.{kind}" for kind in ("weight", "bias")}
    if model.lm_head is not None:
        names["output.weight"] = "lm_head.weight"
    return {theirs: model.state_dict()[ours].float().numpy() for theirs, ours in names.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_tensors_of_a_gguf_file(tokenizer: Tokenizer, tmp_path: Path, dtype: str, tied: bool) -> None:
    model = make(tie_word_embeddings=tied)
    export_gguf(model, tokenizer, tmp_path / "m.gguf", dtype)
    _, tensors, kinds = read(tmp_path / "m.gguf")
    expected = expected_tensors(model)
    assert tensors.keys() == expected.keys()  # so that a tied head is not there
    for name, values in expected.items():
        assert tensors[name].shape == values.shape, name
        if values.ndim == 1 or name == "position_embd.weight" or dtype == "f32":
            assert kinds[name] == "F32"
            assert np.array_equal(tensors[name], values), name
            continue
        in_8_bits = dtype == "q8_0" or (dtype == "q4_0" and name in ("token_embd.weight", "output.weight"))
        assert kinds[name] == ("Q8_0" if in_8_bits else dtype.upper()), name
        if dtype in ("f16", "bf16"):
            rounded = torch.from_numpy(values).to(torch.float16 if dtype == "f16" else torch.bfloat16)
            assert np.array_equal(tensors[name], rounded.float().numpy()), name
        elif not in_8_bits:  # a step of largest / 8, since the largest of the other sign is cut off
            largest = np.abs(values.reshape(-1, 32)).max(1, keepdims=True)
            off = np.abs(tensors[name] - values).reshape(-1, 32)
            assert (off <= largest * (1 / 8 + 2**-7)).all(), name
            assert off.max() > 1e-3
        else:  # half a step of largest / 127, and what the 16-bit scale is off by, 127 times
            largest = np.abs(values.reshape(-1, 32)).max(1, keepdims=True)
            off = np.abs(tensors[name] - values).reshape(-1, 32)
            assert (off <= largest * (0.5 / 127 + 2**-11) + 1e-7).all(), name
            assert off.max() > 1e-5
    # GGUF lists lengths the other way round: (in, out) of the fused projection
    shapes = {t.name: t.shape.tolist() for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert shapes["blk.0.attn_qkv.weight"] == [64, 192]
    assert shapes["blk.0.ffn_up.weight"] == [64, 256]
    assert shapes["token_embd.weight"] == [64, 320]


def test_metadata_of_a_gguf_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = make(n_inner=96, layer_norm_epsilon=1e-6, eos_token_id=tokenizer.eos_token_id)
    export_gguf(model, tokenizer, tmp_path / "m.gguf", "q8_0", name="cats")
    metadata, _, _ = read(tmp_path / "m.gguf")
    wanted = {
        "general.architecture": "gpt2",
        "general.name": "cats",
        "general.file_type": 7,  # mostly q8_0
        "general.quantization_version": 2,
        "gpt2.context_length": 24,
        "gpt2.embedding_length": 64,
        "gpt2.block_count": 2,
        "gpt2.feed_forward_length": 96,
        "gpt2.attention.head_count": 4,
        "gpt2.attention.layer_norm_epsilon": pytest.approx(1e-6),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: metadata.get(name) for name in wanted} == wanted
    tokens, types, merges = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges"))
    assert len(tokens) == len(types) == 320
    assert [tokenizer.token_to_id(token) for token in tokens[:285]] == list(range(285))
    assert tokens[285:] == [f"[PAD{i}]" for i in range(285, 320)]
    end = tokenizer.eos_token_id
    assert [types[i] for i in range(320)] == [3 if i == end else 1 if i < 285 else 5 for i in range(320)]
    assert len(merges) == 285 - 256 - 1
    assert all(merge.replace(" ", "", 1) in tokens and merge.count(" ") == 1 for merge in merges)


def test_added_tokens_in_a_gguf_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    state = json.loads(tokenizer.save_pretrained(tmp_path).read_text())
    added = state["added_tokens"][0]
    state["added_tokens"] += [
        added | {"content": word, "id": tokenizer.vocab_size + i, "special": i == 0}
        for i, word in enumerate(["[A]", "b b"])
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    export_gguf(make(), Tokenizer.from_pretrained(tmp_path), tmp_path / "m.gguf")
    metadata, _, _ = read(tmp_path / "m.gguf")
    end = tokenizer.vocab_size
    assert metadata["tokenizer.ggml.tokens"][end : end + 2] == ["[A]", "b b"]
    assert metadata["tokenizer.ggml.token_type"][end : end + 3] == [3, 4, 5]  # control, user defined, unused


def test_no_token_of_a_gguf_file_is_there_twice(tokenizer: Tokenizer, tmp_path: Path) -> None:
    state = json.loads(tokenizer.save_pretrained(tmp_path).read_text())
    names = ["[PAD310]", "[PAD286]", "[[PAD310]]"]  # as fillers are called, here and elsewhere
    state["added_tokens"] += [
        state["added_tokens"][0] | {"content": name, "id": tokenizer.vocab_size + i} for i, name in enumerate(names)
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    export_gguf(make(), Tokenizer.from_pretrained(tmp_path), tmp_path / "m.gguf")
    tokens = read(tmp_path / "m.gguf")[0]["tokenizer.ggml.tokens"]
    assert tokens[tokenizer.vocab_size :][:3] == names
    assert len(set(tokens)) == len(tokens) == 320


def test_nothing_but_a_regular_file_is_replaced(tokenizer: Tokenizer, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, kind in (("fifo", "FIFO"), ("folder", "folder")):
        before = (tmp_path / name).stat()
        with pytest.raises(FileExistsError, match=f"{name} is a {kind} and is not replaced"):
            export_gguf(make(), tokenizer, tmp_path / name)
        assert (tmp_path / name).stat().st_ino == before.st_ino
    with pytest.raises(NotADirectoryError, match="fifo"):
        export_hf(make(), tokenizer, tmp_path / "fifo")
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_the_dtype_is_the_models_unless_another_is_asked_for(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for dtype, kind in [
        (torch.float32, "F32"),
        (torch.float16, "F16"),
        (torch.bfloat16, "BF16"),
        (torch.float64, "F32"),
    ]:
        export_gguf(make().to(dtype), tokenizer, tmp_path / "m.gguf")
        assert read(tmp_path / "m.gguf")[2]["token_embd.weight"] == kind


@pytest.mark.parametrize(
    ("settings", "dtype", "message"),
    [
        ({"norm_position": "post"}, "f32", "llama.cpp's gpt2 would compute something else .* norm_position is 'post'"),
        ({"attention_window": 5}, "f32", "attention_window is 5"),
        ({"position_embedding": "sinusoidal"}, "f32", "position_embedding is 'sinusoidal'"),
        ({"activation_function": "gelu"}, "f32", "activation_function is 'gelu'"),
        ({"scale_attn_weights": False}, "f32", "scale_attn_weights is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "f32", "scale_attn_by_inverse_layer_idx is True"),
        ({"n_embd": 48}, "q8_0", "q8_0 packs 32 numbers of a row together, but n_embd is 48; use f16 or bf16"),
        ({"n_inner": 33}, "q8_0", "n_inner is 33"),
        ({}, "q4_1", "dtype 'q4_1' is not supported; it should be f32, f16, bf16, q8_0 or q4_0"),
        ({"vocab_size": 284}, "f32", "the tokenizer has 285 tokens, but the model only 284"),
    ],
)
def test_what_llama_cpp_would_not_run_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, settings: dict, dtype: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export_gguf(make(**settings), tokenizer, tmp_path / "m.gguf", dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dtype", "value"), [("f16", 7e4), ("q8_0", 1e8), ("q4_0", 1e7)])
def test_numbers_that_do_not_fit_are_refused(tokenizer: Tokenizer, tmp_path: Path, dtype: str, value: float) -> None:
    model = make()
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[3, 4] = value
    with pytest.raises(ValueError, match=f"h.1.mlp.c_fc.weight holds .*, which {dtype} cannot; export bf16 or f32"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", dtype)
    export_gguf(model, tokenizer, tmp_path / "m.gguf", "bf16")
    with torch.no_grad():
        model.ln_f.weight[0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"ln_f.weight is not finite"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", "bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_tokenizers_that_llama_cpp_does_not_have_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.raises(ValueError, match="a tokenizer of kind 'char' does not; train one of kind 'bpe'"):
        export_gguf(make(), Tokenizer.train(tmp_path / "text.txt", kind="char"), tmp_path / "m.gguf")
    endless = Tokenizer.train(tmp_path / "text.txt", vocab_size=280, special_tokens=())
    with pytest.raises(ValueError, match=r"llama.cpp needs to know which token ends a text"):
        export_gguf(make(), endless, tmp_path / "m.gguf")


def test_a_full_disk_leaves_the_old_file(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "m.gguf").write_text("old")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_gguf(make(), tokenizer, tmp_path / "m.gguf")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("m.gguf", "old")]


def test_gguf_needs_an_extra(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'pip install "gptcore\[export\]"'):
        export_gguf(make(), tokenizer, tmp_path / "m.gguf")


# ---- a folder for transformers


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_a_folder_for_transformers(tokenizer: Tokenizer, tmp_path: Path, norm_position: str) -> None:
    model = make(norm_position=norm_position)
    ids = torch.tensor([tokenizer.encode("the cat sat on the mat")])
    expected = model(ids).logits
    export_hf(model, tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert Tokenizer.from_pretrained(tmp_path).encode(TEXT) == tokenizer.encode(TEXT)
    export_hf(model, tokenizer, tmp_path / "half", "bf16")
    assert {p.dtype for p in GPT.from_pretrained(tmp_path / "half").parameters()} == {torch.bfloat16}


def test_what_transformers_would_compute_otherwise_is_not_exported(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"transformers would compute something else .* attention_window is 5"):
        export_hf(make(attention_window=5), tokenizer, tmp_path / "hf")
    with pytest.raises(ValueError, match="a folder for transformers is f32, f16 or bf16, not q8_0"):
        export_hf(make(), tokenizer, tmp_path / "hf", "q8_0")
    assert not (tmp_path / "hf").exists()


# ---- the command


def test_the_export_command(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder = make(), str(tmp_path / "model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = tmp_path / "m.gguf"
    assert cli.main(["export", folder, "--to", "gguf", "--dtype", "q8_0", "-o", str(file)]) == 0
    assert capsys.readouterr().out.split() == [str(file), f"{file.stat().st_size:,}", "bytes"]
    assert read(file)[2]["token_embd.weight"] == "Q8_0"
    assert read(file)[0]["general.name"] == "model"
    assert cli.main(["export", folder, "-o", str(file)]) == 1
    assert f"{file} exists; replace it with --overwrite" in capsys.readouterr().err
    assert cli.main(["export", folder, "-o", str(file), "--overwrite"]) == 0
    assert read(file)[2]["token_embd.weight"] == "F32"
    assert cli.main(["export", folder, "--to", "hf", "--dtype", "f16", "-o", str(tmp_path / "hf")]) == 0
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").dtype == torch.float16
    assert cli.main(["export", folder, "--to", "hf", "--dtype", "q8_0", "-o", str(tmp_path / "no")]) == 1
    assert "f32, f16 or bf16, not q8_0" in capsys.readouterr().err
