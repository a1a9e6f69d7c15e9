"""Train three steps on two processes, of which one has nothing for a part of the model, by any strategy, on CPUs or on cards."""

import os
from datetime import timedelta

import tiny_bases as bases
import torch
from torch import nn

from trainers.arguments import ModelArguments
from trainers.freezing import plain_model, prepare_for_training

FAMILY = "llava"
LIMIT = timedelta(seconds=120)
STEPS = 3


def batch(model, kind: str) -> dict:
    """
    Return a batch of one conversation: "full", without a slot, with rejected slots alone, of words alone, or with the features
    that `--feature_cache` has kept of its image.
    """
    images = bases.make_images(FAMILY, 1)
    with torch.no_grad():
        count = sum(len(part) for part in model.language.encode(images).features.pooler_output)
    slots = {"full": [bases.SEG, 9, bases.REJ], "no slot": [9, 10, 11], "all rejected": [bases.REJ, 9, bases.REJ]}
    truth = torch.zeros(0 if kind in ("no slot", "words") else 2, 40, 64, dtype=torch.uint8)
    if kind in ("full", "kept features"):
        truth[0, :20] = 1
    sizes = torch.tensor([[40, 64]])
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    of_image = {"original_sizes": sizes, "reshaped_input_sizes": sizes, "sam_pixel_values": pixels, **images}
    if kind == "words":  # the collator gives the black image of `always_an_image`, which no conversation shows
        ids = torch.tensor([[1, 7, 8, 9, 11, 2]])
        return {
            "input_ids": ids, "labels": ids, "image_index": torch.tensor([-1]), "mask_labels": [truth], **of_image
        }  # fmt: skip
    if kind == "kept features":
        of_image["sam_embeddings"] = model.get_sam_embeddings(of_image.pop("sam_pixel_values")).detach()
    ids = torch.tensor([[1, *[bases.IMAGE] * count, 7, 8, *slots.get(kind, slots["full"]), 2]])
    return {"input_ids": ids, "labels": ids.masked_fill(ids == bases.IMAGE, -100), "mask_labels": [truth], **of_image}


def _ddp(model, plain, device):
    run = nn.parallel.DistributedDataParallel(model)
    return lambda inputs: run(**inputs)["loss"].backward(), lambda parameter: parameter.grad


def _fsdp2(model, plain, device):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (2,))
    for layer in plain.vlm.get_decoder().layers:  # as configs/accelerate/fsdp2.yaml wraps them
        fully_shard(layer, mesh=mesh)
    run = fully_shard(model, mesh=mesh)
    return lambda inputs: run(**inputs)["loss"].backward(), lambda parameter: parameter.grad.full_tensor()


def _zero(model, plain, device, stage):
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": STEPS, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, 0.0), config=config)
    done = []

    def step(inputs):
        if done:  # gradients are there before the engine's step only
            engine.step()
        engine.backward(engine(**inputs)["loss"])
        done.append(True)

    # DeepSpeed takes the mean over the steps of an accumulation, the others their sum.
    return step, lambda parameter: safe_get_full_grad(parameter) * STEPS


def train(rank: int, way: str, kind: str, masks: str, store: str, folder: str, device_type: str = "cpu") -> None:
    """
    Accumulate three backward passes and save the gradients: rank 0 has a full batch first and the other kind last, rank 1 the
    reverse; the second batches are alike. `masks` is the mask model.
    """
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
    }  # as a launcher sets them for DeepSpeed
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=store, rank=rank, world_size=2, timeout=LIMIT)
    model = bases.make_gsva(FAMILY, bases.mask_config(masks))
    if masks == "sam2":  # which learns from rejected slots as well, whether there is an object
        model.config.object_score_loss_weight = 1.0
    batches = [batch(model, kind if other else "full") for other in (rank == 1, False, rank == 0)]
    model = prepare_for_training(model, ModelArguments(lora_dropout=0.0)).train().to(device)
    ways = {"ddp": _ddp, "fsdp2": _fsdp2, "zero2": lambda *of: _zero(*of, 2), "zero3": lambda *of: _zero(*of, 3)}
    step, gradient_of = ways[way](model, plain_model(model), device)
    for inputs in batches:
        step({
            name: [part.to(device) for part in value] if isinstance(value, list) else value.to(device)
            for name, value in inputs.items()
        })  # fmt: skip
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradients[name] = gradient_of(parameter).float().cpu()
    torch.save(gradients, f"{folder}/{way}-{rank}.pt")
    torch.distributed.destroy_process_group()


def in_two(function, *arguments, start_method: str = "fork") -> None:
    """Run a function in two processes; its first argument is the rank. CUDA cannot be forked."""
    torch.multiprocessing.start_processes(function, arguments, 2, start_method=start_method)
