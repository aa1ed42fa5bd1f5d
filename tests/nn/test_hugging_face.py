"""Hugging Face models fused: the same loss and gradients, whatever their classes are called. Needs transformers."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipekern as pk

transformers = pytest.importorskip("transformers", reason="needs transformers, and it is not installed")

SIZE = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 32,
}
GROUPED = SIZE | {"num_key_value_heads": 2, "head_dim": 4}
IMAGE = {name: SIZE[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
GPT2 = {
    "vocab_size": 37,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NAMES = ("Llama", "Qwen3", "Mixtral", "Gemma", "Phi3", "Bert", "GPT2", "ViT")
FACTOR = 2.0
# Layers are 2: what is replaced in all of them, and once.
EXPECTED = {
    "Llama": {"RMSNorm": 5, "SwiGLU": 2, "rope": 2},
    "Qwen3": {"RMSNorm": 9, "SwiGLU": 2, "rope": 2},
    "Mixtral": {"RMSNorm": 5, "rope": 2},  # its experts are one module with weights of three dimensions
    "Gemma": {"RMSNorm": 5, "GELU": 2, "rope": 2},
    "Phi3": {"RMSNorm": 5, "SwiGLU": 2, "rope": 2},
    "Bert": {"LayerNorm": 6, "GELU": 3},
    "GPT2": {"LayerNorm": 5, "GELU": 2},
    "ViT": {"LayerNorm": 5, "GELU": 2},
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")
    if name == "ViT":
        return transformers.AutoModel.from_config(config(**IMAGE, image_size=8, patch_size=4)).train()
    special = {
        "Bert": SIZE | {"is_decoder": True},
        "GPT2": GPT2,
        "Mixtral": GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 2},
    }
    options = special.get(name, GROUPED) | {"attention_dropout": 0.0, "attn_implementation": "eager"}
    if name == "Mixtral":
        options["experts_implementation"] = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config(**options)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return model


def run(model: Any, x: Tensor) -> list[Tensor]:
    """The loss, and the gradients of all parameters that have one."""
    if x.is_floating_point():
        loss = model(pixel_values=x.to(next(model.parameters()).dtype)).last_hidden_state.square().mean()
    else:
        loss = model(input_ids=x, labels=x).loss
    used = [p for name, p in model.named_parameters() if "pooler" not in name]
    return [loss.detach(), *torch.autograd.grad(loss, used)]


def apart(found: list[Tensor], exact: list[Tensor]) -> float:
    """The relative error of the loss and of each gradient, as root of the mean square."""
    errors = [float((a.double() - e).norm() / e.norm()) for a, e in zip(found, exact, strict=True) if e.any()]
    return math.hypot(*errors) / math.sqrt(len(errors))


def batch(name: str) -> Tensor:
    return torch.randn(2, 3, 8, 8) if name == "ViT" else torch.randint(3, 37, (2, 6))


@pytest.mark.parametrize("name", NAMES)
def test_fused(name: str) -> None:
    """float32, at most twice as far from float64 as the original; then given back, to the bit."""
    model, x = build(name), batch(name)
    theirs = run(model, x)
    exact = run(copy.deepcopy(model).double(), x)
    names = [*model.state_dict()]
    report = pk.nn.fuse(model)
    assert Counter(row.op for row in report.replaced) == EXPECTED[name]
    assert [*model.state_dict()] == names
    assert apart(run(model, x), exact) <= FACTOR * apart(theirs, exact)
    report.undo()
    assert all(map(torch.equal, run(model, x), theirs))


def test_bfloat16() -> None:
    model, x = build("Llama").bfloat16(), batch("Llama")
    theirs = run(model, x)
    exact = run(copy.deepcopy(model).double(), x)
    pk.nn.fuse(model)
    assert apart(run(model, x), exact) <= FACTOR * apart(theirs, exact)


def test_generates_the_same_text() -> None:
    """With a cache, and prompts that are padded on the left."""
    model: Any = build("Llama").double().eval()
    ids = torch.randint(3, 37, (2, 5))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    before = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    pk.nn.fuse(model)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), before)


def test_angles_that_do_not_repeat_are_left() -> None:
    """The fused rotation reads one half of the angles; a model whose halves differ keeps its own."""
    model: Any = build("Llama")
    makes = model.model.rotary_emb
    plain = makes.forward
    makes.forward = lambda *args: tuple(torch.cat((t[..., :2], -t[..., :2]), -1) for t in plain(*args))
    report = pk.nn.fuse(model)
    assert not [row for row in report.replaced if row.op == "rope"]
    assert ["repeat" in row.why for row in report.left] == [True, True]


def test_in_a_pipeline() -> None:
    """A fused model that is cut trains as the fused model does whole, in float64."""
    model: Any = build("Llama").double()
    assert pk.nn.fuse(model).replaced
    whole = copy.deepcopy(model)
    x, y = torch.randint(3, 37, (4, 6)), torch.randint(0, 37, (4, 6))

    def loss_fn(output: Any, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.logits.flatten(0, 1), target.flatten())

    with pk.Pipeline(model, loss_fn=loss_fn, microbatches=2, ranks=2, inputs=["input_ids"]) as pipe:
        loss, wanted = pipe.train_step(x, y), loss_fn(whole(x), y)
        wanted.backward()
        assert float(loss) == pytest.approx(float(wanted), rel=1e-12)
        for (name, own), other in zip(model.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-10, atol=1e-12, msg=name)
