"""Small models of transformers with random weights, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from tests.runtime.models import Batch

WORDS, TIME = 61, 12
_DECODER = {
    "vocab_size": WORDS, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_ENCODER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}


class Kind(NamedTuple):
    """A model, its batches, and the forward's parameters that they give; ``dtype`` float64 where it has it."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    inputs: list[str] | None = None
    dtype: torch.dtype = torch.float64


def loss_fn(output: Any, target: Tensor) -> Tensor:
    """Cross-entropy of the logits."""
    return F.cross_entropy(output.logits.flatten(0, -2), target.flatten())


def text(samples: int) -> Batch:
    return Batch(torch.randint(WORDS, (samples, TIME)), torch.randint(WORDS, (samples, TIME)))


def masked(samples: int) -> Batch:
    """Sequences that end early: a mask that the model's own code looks at."""
    words, targets = text(samples)
    lengths = torch.randint(3, TIME + 1, (samples, 1))
    return Batch({"input_ids": words, "attention_mask": (torch.arange(TIME) < lengths).long()}, targets)


def pairs(samples: int) -> Batch:
    words, targets = text(samples)
    return Batch({"input_ids": words, "decoder_input_ids": targets.roll(1, 1)}, targets)


def images(samples: int, size: int = 32) -> Batch:
    return Batch(torch.randn(samples, 3, size, size, dtype=torch.float64), torch.randint(5, (samples,)))


def large_images(samples: int) -> Batch:
    """So that the last batch normalisation is over more than a pixel a sample: else last bits grow 30-fold a step."""
    return images(samples, 128)


def gpt2() -> nn.Module:
    """Embedding and head are one weight; dropout is on."""
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=24, n_layer=4, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER))


def qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_DECODER, head_dim=12))


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**_DECODER, num_local_experts=4))


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**_ENCODER, vocab_size=WORDS))


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=WORDS, d_model=24, d_kv=12, d_ff=48, num_layers=3, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**_ENCODER, image_size=32, patch_size=8, num_labels=5)
    )


def resnet18() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[2, 2, 2, 2], layer_type="basic", num_labels=5
    )
    return transformers.ResNetForImageClassification(config)


MODELS: dict[str, Kind] = {
    "gpt-2": Kind(gpt2, text),
    "llama": Kind(llama, masked, ["input_ids", "attention_mask"]),
    "qwen3": Kind(qwen3, text),
    "mixtral": Kind(mixtral, text, dtype=torch.float32),  # its grouped product has no float64
    "bert": Kind(bert, masked, ["input_ids", "attention_mask"]),
    "t5": Kind(t5, pairs, ["input_ids", "decoder_input_ids"]),
    "vit": Kind(vit, images),
    "resnet-18": Kind(resnet18, large_images),
}
