"""Writes the workload files of this folder from real model definitions, built on the meta device.

    pip install transformers diffusers          # beside the torch you have; no weights are downloaded
    python -m bench.workloads.build             # writes every file; needs no GPU and little memory

Only shapes are read. Tied parameters count once, as an optimizer sees them. The files are kept in the
repository, so the benchmark itself needs neither package.
"""

from __future__ import annotations

import importlib.metadata
import json
import textwrap
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
Shape = tuple[int, ...]

SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
"""The published configuration of SDXL 1.0's U-Net (2.57 billion parameters)."""


# ---- model definitions ------------------------------------------------------------------------------------


def shapes_of(make: Callable[[], torch.nn.Module]) -> list[Shape]:
    """Shapes of the trainable parameters, in the model's order, from a model that is never materialised."""
    with torch.device("meta"):
        model = make()
    return [tuple(p.shape) for p in model.parameters() if p.requires_grad]


def transformers_shapes(model: str, config: str, **options: Any) -> list[Shape]:
    """Shapes of a transformers model with the given configuration."""
    import transformers

    settings = getattr(transformers, config)(**options)
    return shapes_of(lambda: getattr(transformers, model)(settings))


def large_encoder(model: str, config: str, **options: Any) -> list[Shape]:
    """Shapes of a transformer of the size that BERT and ViT call large."""
    size = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    return transformers_shapes(model, config, **size, **options)


def llama3_8b() -> list[Shape]:
    """Llama 3 8B: grouped-query attention with 8 key-value heads, vocabulary of 128,256."""
    return transformers_shapes(
        "LlamaForCausalLM",
        "LlamaConfig",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )


def mixtral_like() -> list[Shape]:
    """Mixtral's architecture at a quarter of its width, with each expert's three matrices apart.

    transformers keeps all experts of a layer in two stacked tensors; released checkpoints, and most training
    code, keep them apart, which is what makes a mixture of experts a workload of many tensors.
    """
    experts, hidden, intermediate = 8, 1024, 3584
    stacked = transformers_shapes(
        "MixtralForCausalLM",
        "MixtralConfig",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_local_experts=experts,
    )
    apart: dict[Shape, list[Shape]] = {
        (experts, 2 * intermediate, hidden): [(intermediate, hidden)] * (2 * experts),
        (experts, hidden, intermediate): [(hidden, intermediate)] * experts,
    }
    return [shape for found in stacked for shape in apart.get(found, [found])]


def sdxl_unet() -> list[Shape]:
    """The U-Net of SDXL."""
    import diffusers

    return shapes_of(lambda: diffusers.UNet2DConditionModel(**SDXL_UNET))


# ---- derived lists ----------------------------------------------------------------------------------------


def shard(shapes: Iterable[Shape], ranks: int) -> list[Shape]:
    """What the first of `ranks` ranks holds when every tensor is split along its first dimension (FSDP2)."""
    return [(-(-shape[0] // ranks), *shape[1:]) for shape in shapes]


def one_group(shapes: Iterable[Shape]) -> list[dict[str, Any]]:
    """A single parameter group."""
    return [{"tensors": list(shapes)}]


def many_groups(shapes: list[Shape], count: int) -> list[dict[str, Any]]:
    """`count` groups of one tensor each, the last holding the rest, under falling learning rates."""
    dealt = [[shape] for shape in shapes[: count - 1]] + [shapes[count - 1 :]]
    return [{"lr_scale": round(1 - 0.5 * i / count, 4), "tensors": tensors} for i, tensors in enumerate(dealt)]


def by_dtype(shapes: list[Shape]) -> list[dict[str, Any]]:
    """Three groups: vectors in float32, embeddings in float16, matrices in bfloat16."""
    vectors = [s for s in shapes if len(s) < 2]
    embeddings = [s for s in shapes if len(s) == 2][:2]
    matrices = [s for s in shapes if len(s) == 2][2:]
    return [
        {"dtype": "float32", "tensors": vectors},
        {"dtype": "float16", "tensors": embeddings},
        {"dtype": "bfloat16", "tensors": matrices},
    ]


def workloads() -> Iterable[tuple[str, str, list[dict[str, Any]]]]:
    """`(name, description, groups)` of every file."""
    gpt2 = transformers_shapes("GPT2LMHeadModel", "GPT2Config")
    llama = llama3_8b()
    yield (
        "resnet50",
        "ResNet-50, 1000 classes",
        one_group(transformers_shapes("ResNetForImageClassification", "ResNetConfig", num_labels=1000)),
    )
    yield (
        "vit-l",
        "ViT-L/16, 1000 classes",
        one_group(large_encoder("ViTForImageClassification", "ViTConfig", num_labels=1000)),
    )
    yield (
        "bert-large",
        "BERT-large with its pretraining heads",
        one_group(large_encoder("BertForPreTraining", "BertConfig")),
    )
    yield "gpt2-124m", "GPT-2 124M", one_group(gpt2)
    yield (
        "gpt2-1.5b",
        "GPT-2 1.5B (XL)",
        one_group(transformers_shapes("GPT2LMHeadModel", "GPT2Config", n_embd=1600, n_layer=48, n_head=25)),
    )
    yield "llama3-8b", "Llama 3 8B", one_group(llama)
    yield "llama3-8b-shard8", "Llama 3 8B, one rank's share of 8", one_group(shard(llama, 8))
    yield "llama3-8b-shard64", "Llama 3 8B, one rank's share of 64", one_group(shard(llama, 64))
    yield "moe-2b", "Mixtral-like mixture of 8 experts, 24 layers, experts apart", one_group(mixtral_like())
    yield "sdxl-unet", "U-Net of SDXL", one_group(sdxl_unet())
    yield (
        "groups-465",
        "RF-DETR in 465 parameter groups, one tensor each, the last holding the rest",
        many_groups(transformers_shapes("RfDetrForObjectDetection", "RfDetrConfig"), 465),
    )
    yield "mixed-dtypes", "GPT-2 124M: vectors float32, embeddings float16, matrices bfloat16", by_dtype(gpt2)
    yield (
        "lora-448",
        "LoRA of rank 16 on 7 projections of 32 layers of width 4096: 448 tensors of 65,536 elements",
        one_group([(16, 4096), (4096, 16)] * 224),
    )
    yield "one-64x1024", "a single 64 x 1024 tensor", one_group([(64, 1024)])
    yield "over-2-31", "a single tensor of more than 2^31 elements", one_group([(2**31 + 4099,)])


# ---- files ------------------------------------------------------------------------------------------------


def run_lengths(shapes: Iterable[Shape]) -> list[list[Any]]:
    """Equal neighbours joined: `[[count, shape], …]`."""
    return [[len(list(run)), list(shape)] for shape, run in groupby(shapes)]


def to_text(name: str, description: str, source: str, groups: list[dict[str, Any]]) -> str:
    """The file's JSON, wrapped so that a change shows up as few lines."""
    head = json.dumps({"name": name, "description": description, "source": source}, indent=1)[:-2]
    written = [json.dumps({**group, "tensors": run_lengths(group["tensors"])}) for group in groups]
    body = ",\n".join("\n".join(textwrap.wrap(text, 110, break_long_words=False)) for text in written)
    return f'{head},\n "groups": [\n{body}\n ]\n}}\n'


def main() -> None:
    """Writes every workload file and prints its size."""
    versions = " and ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "diffusers"))
    source = f"bench/workloads/build.py with {versions}, on the meta device"
    for name, description, groups in workloads():
        (FOLDER / f"{name}.json").write_text(to_text(name, description, source, groups))
        tensors = sum(len(group["tensors"]) for group in groups)
        print(f"{name}: {tensors:,} tensors in {len(groups)} groups")


if __name__ == "__main__":
    main()
