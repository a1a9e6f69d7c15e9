"""Every path on which a process may skip a part of the model, on two processes: the same collectives in the same order.

A process that skipped one would let the other wait until the time limit, and one that exchanged them would mix up gradients.
"""

from datetime import timedelta

import pytest
import tiny_bases as bases
import torch
from torch import nn

from trainers.arguments import ModelArguments
from trainers.freezing import plain_model, prepare_for_training

FAMILY = "llava"
LIMIT = timedelta(seconds=120)


def batch(model, kind: str) -> dict:
    """Return a batch of one conversation: "full", without a slot, with rejected slots alone, or of words alone."""
    images = bases.make_images(FAMILY, 1)
    with torch.no_grad():
        count = sum(len(part) for part in model.language.encode(images).features.pooler_output)
    slots = {"full": [bases.SEG, 9, bases.REJ], "no slot": [9, 10, 11], "all rejected": [bases.REJ, 9, bases.REJ]}
    truth = torch.zeros(0 if kind in ("no slot", "words") else 2, 40, 64, dtype=torch.uint8)
    if kind == "full":
        truth[0, :20] = 1
    sizes = torch.tensor([[40, 64]])
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    of_image = {"original_sizes": sizes, "reshaped_input_sizes": sizes, "sam_pixel_values": pixels, **images}
    if kind == "words":  # the collator gives the black image of `always_an_image`, which no conversation shows
        ids = torch.tensor([[1, 7, 8, 9, 11, 2]])
        return {
            "input_ids": ids, "labels": ids, "image_index": torch.tensor([-1]), "mask_labels": [truth], **of_image
        }  # fmt: skip
    ids = torch.tensor([[1, *[bases.IMAGE] * count, 7, 8, *slots[kind], 2]])
    return {"input_ids": ids, "labels": ids.masked_fill(ids == bases.IMAGE, -100), "mask_labels": [truth], **of_image}


def train(rank: int, way: str, kind: str, store: str, folder: str) -> None:
    """Run three backward passes: rank 0 has a full batch first, rank 1 last; the second passes are alike."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=LIMIT)
    model = bases.make_gsva(FAMILY, bases.mask_config("sam"))
    model = prepare_for_training(model, ModelArguments(lora_dropout=0.0)).train()
    plain = plain_model(model)
    batches = [batch(plain, kind if other else "full") for other in (rank == 1, False, rank == 0)]
    if way == "ddp":
        run = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in plain.vlm.get_decoder().layers:  # as configs/accelerate/fsdp2.yaml wraps them
            fully_shard(layer, mesh=mesh)
        run = fully_shard(model, mesh=mesh)
    for inputs in batches:
        run(**inputs)["loss"].backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            gradients[name] = parameter.grad.full_tensor() if way == "fsdp2" else parameter.grad
    torch.save(gradients, f"{folder}/{way}-{rank}.pt")
    torch.distributed.destroy_process_group()


def in_two(function, *arguments) -> None:
    torch.multiprocessing.start_processes(function, arguments, 2, start_method="fork")


@pytest.mark.parametrize("kind", ["no slot", "all rejected", "words"])
def test_a_rank_that_skips_a_part_trains_as_the_other_does(kind, tmp_path):
    for way in ("ddp", "fsdp2"):
        in_two(train, way, kind, f"file://{tmp_path / way}", str(tmp_path))
    ddp, other, fsdp2, last = (
        torch.load(tmp_path / f"{way}-{rank}.pt", weights_only=True) for way in ("ddp", "fsdp2") for rank in (0, 1)
    )
    assert ddp.keys() == other.keys() == fsdp2.keys() == last.keys()
    for name, gradient in ddp.items():
        assert torch.equal(gradient, other[name]) and torch.equal(fsdp2[name], last[name])
        torch.testing.assert_close(fsdp2[name], gradient, atol=1e-5, rtol=1e-4)
    assert any(float(gradient.abs().sum()) > 0 for name, gradient in ddp.items() if "mask_decoder" in name)
