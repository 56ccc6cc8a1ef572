"""GPT against the formulas of the papers, its initialisation, its loss, padding, packing and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gptcore import ops
from gptcore.config import PRESETS, GPTConfig
from gptcore.model import GPT

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# Weights ten times as large as at a real start, so that attention is far from uniform and every part matters
SMALL = GPTConfig(vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4, initializer_range=0.2, **NO_DROPOUT)
VARIANTS = {
    "gpt2": {},
    "gpt1": {"norm_position": "post"},
    "gpt3": {"attention_window": 3},
    "sinusoidal": {"position_embedding": "sinusoidal"},
    "untied": {"tie_word_embeddings": False},
    "erf": {"activation_function": "gelu"},
    "n_inner": {"n_inner": 40},
    "unscaled": {"scale_attn_weights": False},
    "inverse_layer": {"scale_attn_by_inverse_layer_idx": True},
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small(**settings: object) -> GPT:
    """A small model without dropout, whose layer norms and biases are not the 1 and 0 that hide a missing one."""
    model = GPT(dataclasses.replace(SMALL, **settings))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ids(*shape: int) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, shape)


def textbook(model: GPT, tokens: Tensor) -> Tensor:
    """Logits (T, V) of one text (T,), in float64, by the formulas and one head at a time."""
    c, w = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    T, C, D = len(tokens), c.n_embd, c.head_dim
    if c.position_embedding == "learned":
        x = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    else:
        x = w["wte.weight"][tokens] * C**0.5
        for t in range(T):
            for i in range(C // 2):
                x[t, 2 * i] += math.sin(t / 10000 ** (2 * i / C))
                x[t, 2 * i + 1] += math.cos(t / 10000 ** (2 * i / C))

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normal = centred / (centred.pow(2).mean(-1, keepdim=True) + c.layer_norm_epsilon).sqrt()
        return normal * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def attention(x: Tensor, layer: int) -> Tensor:
        q, k, v = linear(x, f"h.{layer}.attn.c_attn").split(C, -1)
        age = torch.arange(T)[:, None] - torch.arange(T)  # how many tokens ago the key was
        seen = age >= 0
        if c.attention_window is not None and layer % 2 == 1:
            seen &= age < c.attention_window
        scale = D**-0.5 if c.scale_attn_weights else 1.0
        if c.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        heads = []
        for head in range(c.n_head):
            part = slice(head * D, (head + 1) * D)
            scores = (q[:, part] @ k[:, part].T * scale).masked_fill(~seen, -math.inf)
            heads.append(scores.softmax(-1) @ v[:, part])
        return linear(torch.cat(heads, -1), f"h.{layer}.attn.c_proj")

    def mlp(x: Tensor, layer: int) -> Tensor:
        x = linear(x, f"h.{layer}.mlp.c_fc")
        if c.activation_function == "gelu":
            x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
        else:
            x = 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
        return linear(x, f"h.{layer}.mlp.c_proj")

    for layer in range(c.n_layer):
        if c.norm_position == "pre":
            x = x + attention(norm(x, f"h.{layer}.ln_1"), layer)
            x = x + mlp(norm(x, f"h.{layer}.ln_2"), layer)
        else:
            x = norm(x + attention(x, layer), f"h.{layer}.ln_1")
            x = norm(x + mlp(x, layer), f"h.{layer}.ln_2")
    if c.norm_position == "pre":
        x = norm(x, "ln_f")
    return x @ w["wte.weight" if c.tie_word_embeddings else "lm_head.weight"].T


# ---- what it computes


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_formulas(variant: str) -> None:
    model, x = small(**VARIANTS[variant]), ids(2, 13)
    expected = torch.stack([textbook(model, row) for row in x])
    assert expected.std() > 0.3
    torch.testing.assert_close(model(x).logits.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "gpt2"])
def test_every_setting_makes_a_difference(variant: str) -> None:
    model = small()
    other = small(**VARIANTS[variant])
    same = {name: tensor for name, tensor in model.state_dict().items() if name in other.state_dict()}
    if variant != "n_inner":  # whose shapes differ
        other.load_state_dict(same, strict=False)
    x = ids(2, 13)
    assert (model(x).logits - other(x).logits).abs().max() > 5e-4  # the forms of GELU differ by 1e-3 here


@pytest.mark.parametrize("variant", ["gpt2", "gpt1", "gpt3"])
def test_the_default_backend_and_plain_pytorch_agree(variant: str) -> None:
    model, x = small(**VARIANTS[variant]), ids(2, 19)
    out = model(x, labels=x)
    grads = torch.autograd.grad(out.loss, list(model.parameters()))
    with ops.use("torch"):
        expected = model(x, labels=x)
        expected_grads = torch.autograd.grad(expected.loss, list(model.parameters()))
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)
    for (name, _), grad, expected_grad in zip(model.named_parameters(), grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_loss_is_the_mean_over_the_labels_that_count() -> None:
    model, x = small(), ids(3, 11)
    labels = x.clone()
    labels[0, :5] = -100
    labels[2] = -100
    out = model(x, labels=labels)
    nll = -out.logits.log_softmax(-1)[:, :-1].gather(-1, x[:, 1:, None])[..., 0]
    counts = labels[:, 1:] != -100
    torch.testing.assert_close(out.loss, (nll * counts).sum() / counts.sum())
    assert out.loss.dtype == torch.float32
    assert model(x).loss is None
    nothing = model(x, labels=torch.full_like(x, -100)).loss
    nothing.backward()
    assert nothing == 0
    assert all(bool((p.grad == 0).all()) for p in model.parameters())


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    """ln V, and d * 0.02^2 / 2 for the spread of the logits: x is of unit variance, a weight of 0.02^2."""
    model, x = GPT(GPTConfig(n_layer=2, n_positions=128)).eval(), torch.randint(0, 50257, (4, 128))
    expected = math.log(50257) + 768 * 0.02**2 / 2
    with torch.no_grad():
        assert abs(float(model(x, labels=x).loss) - expected) < 0.01 * expected


@pytest.mark.parametrize("tokens", [1, 2])
def test_short_sequences(tokens: int) -> None:
    model, x = small(), ids(2, tokens)
    expected = torch.stack([textbook(model, row) for row in x])
    torch.testing.assert_close(model(x).logits.double(), expected, rtol=1e-4, atol=1e-4)
    assert (model(x, labels=x).loss == 0) == (tokens == 1)


# ---- parameters and their initial values


PUBLISHED_SIZES = {
    "gpt": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-125m": 125_226_240,
    "gpt3-350m": 355_871_744,
    "gpt3-760m": 760_300_032,
    "gpt3-1.3b": 1_315_723_264,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_853_386_240,
    "gpt3-175b": 174_604_259_328,
    "gpt-nano": 2_509_536,
    "gpt-micro": 7_259_008,
    "gpt-mini": 12_368_064,
    "gpt-baby": 30_044_544,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_of_the_presets(name: str) -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name))
    assert model.num_parameters() == PUBLISHED_SIZES[name]
    c = model.config
    assert model.num_parameters(non_embedding=True) == PUBLISHED_SIZES[name] - (c.vocab_size + c.n_positions) * c.n_embd
    norms = (2 * c.n_layer + (c.norm_position == "pre")) * 2 * c.n_embd
    assert model.num_parameters(non_embedding=True) == c.n_layer * (12 * c.n_embd**2 + 9 * c.n_embd) + norms


def test_an_untied_head_counts() -> None:
    model = small(tie_word_embeddings=False)
    assert model.num_parameters() - small().num_parameters() == 97 * 48
    assert model.num_parameters(non_embedding=True) - small().num_parameters(non_embedding=True) == 97 * 48


def test_flops_of_gpt2() -> None:
    """As in nanoGPT's transformer_sizing.ipynb: matrix products only, attention as if it were not causal."""
    with torch.device("meta"):
        model = GPT(GPTConfig.preset("gpt2"))
        untied = GPT(GPTConfig.preset("gpt2", tie_word_embeddings=False))
    assert model.estimate_flops() == model.estimate_flops(1024) == untied.estimate_flops(1024) == 291_648_307_200
    assert model.estimate_flops(backward=True) == 874_944_921_600
    assert model.estimate_flops(100, 7) == 7 * model.estimate_flops(100)
    palm = 6 * model.num_parameters() * 1024 + 12 * 12 * 768 * 1024 * 1024  # its appendix B, 6N + 12LHQT
    assert abs(model.estimate_flops(backward=True) / palm - 1) < 0.01


def test_flops_of_packed_documents_count_their_real_lengths() -> None:
    model = small()
    documents = [5, 1, 7, 0, 3]
    cu_seqlens = torch.tensor([0, *documents]).cumsum(0)
    each = sum(model.estimate_flops(n) for n in documents if n > 0)
    assert model.estimate_flops(cu_seqlens=cu_seqlens) == model.estimate_flops(cu_seqlens=cu_seqlens.tolist()) == each
    assert each < model.estimate_flops(sum(documents))


def test_flops_of_banded_layers_count_the_band() -> None:
    dense, banded = small(), small(attention_window=3)  # one of three layers is
    assert dense.estimate_flops(10) - banded.estimate_flops(10) == 4 * 48 * 10 * (10 - 3)
    assert dense.estimate_flops(3) == banded.estimate_flops(3)


def test_flops_are_those_that_pytorch_counts() -> None:
    """FlopCounterMode sees each matrix product of plain PyTorch, in which attention is one over whole rows."""
    model, x = small(tie_word_embeddings=False), ids(2, 16)
    with FlopCounterMode(display=False) as counter, ops.use("torch"):
        model(x)
    assert counter.get_total_flops() == model.estimate_flops(16, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"length": 0}, r"document lengths are \[0\], expected no negative number and a positive sum"),
        ({"batch_size": 0}, r"lengths are \[\]"),
        ({"cu_seqlens": [0, 4, 2]}, r"lengths are \[4, -2\]"),
        ({"cu_seqlens": [0, 4], "length": 4}, r"got cu_seqlens and length=4, batch_size=1; pass cu_seqlens alone"),
    ],
)
def test_flops_of_nothing_are_refused(call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small().estimate_flops(**call)


def test_names_are_those_of_the_published_weights() -> None:
    block = [
        f"h.0.{name}.{kind}"
        for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    ]
    names = ["wte.weight", "wpe.weight", *block, "ln_f.weight", "ln_f.bias"]
    assert list(GPT(dataclasses.replace(SMALL, n_layer=1)).state_dict()) == names
    untied = GPT(dataclasses.replace(SMALL, n_layer=1, tie_word_embeddings=False))
    assert list(untied.state_dict()) == [*names, "lm_head.weight"]


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_initial_values(norm_position: str) -> None:
    config = GPTConfig(vocab_size=300, n_positions=128, n_embd=128, n_layer=8, n_head=2, norm_position=norm_position)
    for name, parameter in GPT(config).named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / 4 if "c_proj" in name and norm_position == "pre" else 0.02
            assert abs(float(parameter.detach().std()) / std - 1) < 0.03, name
            assert abs(float(parameter.detach().mean())) < 0.05 * std, name


def test_initialisation_follows_the_global_seed_and_works_after_the_meta_device() -> None:
    models = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        models.append(GPT(SMALL).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["wte.weight"], models[2]["wte.weight"])
    with torch.device("meta"):
        late = GPT(SMALL)
    early = GPT(SMALL)
    for model in (late.to_empty(device="cpu"), early):
        torch.manual_seed(7)
        model.init_weights()
    assert all(torch.equal(tensor, late.state_dict()[name]) for name, tensor in early.state_dict().items())


def test_the_tied_weight_gets_the_gradients_of_both_its_uses() -> None:
    tied, untied, x = small(), small(tie_word_embeddings=False), ids(2, 9)
    untied.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.wte.weight})
    tied(x, labels=x).loss.backward()
    untied(x, labels=x).loss.backward()
    assert untied.lm_head is not None
    torch.testing.assert_close(tied.wte.weight.grad, untied.wte.weight.grad + untied.lm_head.weight.grad)


def test_the_gradients_of_a_tied_weight_are_added_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, pointers = small(), ids(2, 9), []

    def output_weight(model: GPT, make: Callable[[GPT], Tensor] = GPT.output_weight) -> Tensor:
        weight = make(model)
        assert weight.grad_fn is not None
        weight.grad_fn.register_hook(lambda gradients, _: pointers.append(gradients[0].data_ptr()))
        return weight

    monkeypatch.setattr(GPT, "output_weight", output_weight)
    model(x, labels=x, return_logits=False).loss.backward()
    assert pointers == [model.wte.weight.grad.data_ptr()]


@pytest.mark.parametrize("which", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_each_dropout_acts_in_training_only(which: str) -> None:
    model, x = small(**{which: 0.5}), ids(2, 9)
    plain = small()
    plain.load_state_dict(model.state_dict())
    assert not torch.equal(model(x).logits, model(x).logits)
    torch.manual_seed(3)
    first = model(x).logits
    torch.manual_seed(3)
    assert torch.equal(model(x).logits, first)
    assert torch.equal(model.eval()(x).logits, plain(x).logits)


# ---- padding and packing


def test_padding_on_either_side_changes_nothing() -> None:
    model, texts = small(), [ids(n) for n in (5, 9, 1, 12)]
    T = 12
    for side in ("left", "right", "both"):
        rows, mask = torch.full((4, T), 7), torch.zeros(4, T, dtype=torch.int64)
        starts = [{"left": T - len(text), "right": 0, "both": (T - len(text)) // 2}[side] for text in texts]
        for row, (start, text) in enumerate(zip(starts, texts, strict=True)):
            rows[row, start : start + len(text)] = text
            mask[row, start : start + len(text)] = 1
        out = model(rows, mask, labels=rows)
        losses = []
        for row, (start, text) in enumerate(zip(starts, texts, strict=True)):
            alone, here = model(text[None], labels=text[None]), out.logits[row, start : start + len(text)]
            torch.testing.assert_close(here, alone.logits[0], rtol=1e-4, atol=1e-4)
            losses.append(alone.loss * (len(text) - 1))
        torch.testing.assert_close(out.loss, torch.stack(losses).sum() / sum(len(text) - 1 for text in texts))
        torch.testing.assert_close(model(rows, mask.bool(), labels=rows).loss, out.loss)


@pytest.mark.parametrize("variant", ["gpt2", "gpt1", "gpt3", "sinusoidal"])
@pytest.mark.parametrize("rows", [1, 3])
def test_packed_documents_are_separate_documents(variant: str, rows: int) -> None:
    model = small(**VARIANTS[variant])
    lengths = [5, 1, 1, 7, 3, 4]  # rows of 7 end where documents do
    texts = [ids(n) for n in lengths]
    packed = torch.cat(texts).view(rows, 21 // rows)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    out = model(packed, labels=packed, cu_seqlens=cu_seqlens)
    grads = torch.autograd.grad(out.loss, list(model.parameters()))
    alone = [model(text[None], labels=text[None]) for text in texts]
    torch.testing.assert_close(
        out.logits.flatten(0, 1), torch.cat([one.logits[0] for one in alone]), rtol=1e-4, atol=1e-4
    )
    loss = sum(one.loss * (n - 1) for one, n in zip(alone, lengths, strict=True)) / sum(n - 1 for n in lengths)
    torch.testing.assert_close(out.loss, loss)
    for grad, expected in zip(grads, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5)
    assert (out.logits - model(packed).logits).abs().max() > 0.1  # not the same as one long text


def test_packed_rows_may_be_longer_than_any_text_may_be() -> None:
    model = small()
    x, cu_seqlens = ids(1, 3 * SMALL.n_positions), torch.arange(4) * SMALL.n_positions
    torch.testing.assert_close(
        model(x, cu_seqlens=cu_seqlens).logits.view(3, SMALL.n_positions, -1),
        model(x.view(3, -1)).logits, rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="sequence of 96 tokens, but this model has 32 positions"):
        model(x, cu_seqlens=torch.tensor([0, 96]))


def test_position_ids() -> None:
    model, x = small(), ids(2, 9)
    assert torch.equal(model(x, position_ids=torch.arange(9)).logits, model(x).logits)
    later = model(x, position_ids=torch.arange(9).expand(2, 9) + torch.tensor([[0], [4]])).logits
    torch.testing.assert_close(later[0], model(x).logits[0])
    assert (later[1] - model(x).logits[1]).abs().max() > 1e-2


# ---- how it is run


def test_bfloat16_autocast_is_close_to_float32() -> None:
    model, x = small(), ids(4, 17)
    expected = model(x, labels=x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, labels=x)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    error = (out.logits.float() - expected.logits).norm() / expected.logits.norm()
    assert 1e-4 < error < 3e-2
    assert abs(float((out.loss / expected.loss).detach()) - 1) < 1e-2
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_the_loss_of_a_bfloat16_model_is_computed_in_float32() -> None:
    model, x = small().bfloat16(), ids(2, 9)
    out = model(x, labels=x)
    assert out.logits.dtype == torch.bfloat16
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), x[:, 1:].flatten()))


@pytest.mark.slow
def test_it_compiles_into_one_graph() -> None:
    model, x = small(), ids(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, out = model(x, labels=x), compiled(x, labels=x)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)
    parameters = list(model.parameters())
    for grad, wanted in zip(
        torch.autograd.grad(out.loss, parameters), torch.autograd.grad(expected.loss, parameters), strict=True
    ):
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_padding_and_packing_compile_into_one_graph() -> None:
    model, x, mask = small(), ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, mask, x).loss, model(x, mask, x).loss)
    cu_seqlens = torch.tensor([0, 3, 9, 18])
    torch.testing.assert_close(
        compiled(x, labels=x, cu_seqlens=cu_seqlens).loss, model(x, labels=x, cu_seqlens=cu_seqlens).loss
    )


def test_functional_call_uses_the_weights_it_is_given() -> None:
    model, other, x = small(), small(), ids(2, 9)
    out = torch.func.functional_call(model, dict(other.named_parameters()), (x,), {"labels": x})
    torch.testing.assert_close(out.loss, other(x, labels=x).loss)
    assert not torch.equal(out.loss, model(x, labels=x).loss)


def test_logits_to_keep() -> None:
    model, x = small(), ids(2, 9)
    every = model(x).logits
    torch.testing.assert_close(model(x, logits_to_keep=2).logits, every[:, -2:])
    torch.testing.assert_close(model(x, logits_to_keep=torch.tensor([0, 5])).logits, every[:, [0, 5]])
    assert torch.equal(model(x, logits_to_keep=0).logits, every)  # all of them, as in transformers
