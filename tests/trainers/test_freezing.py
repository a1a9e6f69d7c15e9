"""What is trained, over every family of bases and every mask model: found by what it is, not by names."""

import re

import pytest
import tiny_bases as bases
import torch
from torch import nn

from trainers.arguments import ModelArguments
from trainers.freezing import (
    lora_targets,
    moved_table,
    parts_of,
    parts_table,
    plain_model,
    prepare_for_training,
    snapshot,
)

FAMILIES = (*bases.FIRST_RANK, *bases.SECOND_RANK)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return bases.make_gsva(request.param, bases.mask_config("sam2"))


def batch_of(model, family: str, full: bool = True) -> dict:
    """A conversation about an image with a slot of each kind; without `full` one of words alone."""
    if not full:
        ids = torch.tensor([[1, 7, 8, 9, 11, 2]])
        return {"input_ids": ids, "labels": ids}
    images = bases.make_images(family, 1)
    with torch.no_grad():
        count = sum(len(part) for part in model.language.encode(images).features.pooler_output)
    ids = torch.tensor([[1, *[bases.IMAGE] * count, 7, 8, bases.SEG, 9, bases.REJ, 2]])
    labels = ids.masked_fill(ids == bases.IMAGE, -100)
    truth = torch.zeros(2, 40, 64, dtype=torch.uint8)
    truth[0, :20] = 1
    side, sizes = bases.SIDES[model.config.sam_config.model_type], torch.tensor([[40, 64]])
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(2))
    return {
        "input_ids": ids, "labels": labels, "mask_labels": [truth], "original_sizes": sizes, "reshaped_input_sizes": sizes,
        "sam_pixel_values": pixels, **images,
    }  # fmt: skip


def towers(model) -> list[nn.Module]:
    """The vision side as transformers finds it."""
    return [model.vlm.get_encoder(modality="image"), model.sam.vision_encoder, model.sam.prompt_encoder]


def test_lora_reaches_the_language_model_alone(model):
    pattern = lora_targets(model)
    chosen = {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)}
    decoder = model.vlm.get_decoder()
    layers = {id(part) for part in decoder.modules()}
    parts = dict(model.named_modules())
    assert chosen and all(id(parts[name]) in layers for name in chosen)
    ends = {name.rpartition(".")[2] for name in chosen}
    assert ends - {"in_proj_qkv"} == {"q_proj", "v_proj"}
    assert ("in_proj_qkv" in ends) == (model.config.vlm_config.model_type == "qwen3_5")
    text = model.config.get_text_config()
    attention = list(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)
    assert len([name for name in chosen if name.endswith("q_proj")]) == len(attention) - sum(
        kind in ("conv", "linear_attention") for kind in attention
    )


@pytest.mark.parametrize(
    ("family", "way"),
    [*((family, "lora") for family in FAMILIES), ("gemma3", "full"), ("llava_next", "full"), ("smolvlm", "frozen")],
)
def test_what_is_trained(family, way):
    model = bases.make_gsva(family, bases.mask_config("sam2"))
    prepared = prepare_for_training(model, ModelArguments(train_language_model=way))
    plain = plain_model(prepared)
    assert not any(p.requires_grad for tower in towers(plain) for p in tower.parameters())
    for trained in (plain.get_input_embeddings(), plain.get_output_embeddings(), plain.mask_projector):
        assert any(p.requires_grad for p in trained.parameters())
    decoder = plain.vlm.get_decoder()
    assert all(p.requires_grad for p in decoder.parameters()) == (way == "full")
    inside = {id(p) for p in (*decoder.parameters(), *plain.get_output_embeddings().parameters())}
    inside |= {id(p) for part in (plain.sam.mask_decoder, plain.mask_projector) for p in part.parameters()}
    assert all(id(p) in inside for p in plain.parameters() if p.requires_grad)
    # SAM 2's last layers of the image maps are in its decoder; images are encoded by frozen parts.
    assert not any(p.requires_grad for p in plain.masks.encoding_parts()["mask_decoder.conv_s0"].parameters())
    is_tied = model.config.tie_word_embeddings
    assert (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight) == is_tied
    counted = sum(p.numel() for p in prepared.parameters() if p.requires_grad)
    last = parts_table(prepared).splitlines()[-1].replace(",", "").split()
    assert int(last[1]) == counted
    names = {line.split("  ")[0] for line in parts_table(prepared).splitlines()[1:]}
    assert "sam.mask_decoder" in names and "mask_projector" in names and not any("vlm" in name for name in names)
    assert (way == "lora") == ("LoRA of the language model" in names)
    assert moved_table(prepared, snapshot(prepared)).count("      0 of") == len(
        [line for line in parts_table(prepared).splitlines()[1:-1] if line.split()[-2] != "0"]
    )


@pytest.mark.parametrize("kind", bases.MASK_MODELS)
@pytest.mark.parametrize("way", ["lora", "full"])
def test_all_that_is_trained_gets_a_gradient_and_nothing_else(kind, way):
    """With an image and slots as well as without."""
    model = bases.make_gsva("gemma3", bases.mask_config(kind))
    prepared = prepare_for_training(model, ModelArguments(train_language_model=way)).train()
    with torch.no_grad():  # LoRA begins at zero, where half of it has no gradient
        for name, parameter in prepared.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    prepared(**batch_of(plain_model(prepared), "gemma3"))["loss"].backward()
    for name, parameter in prepared.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    prepared.zero_grad()
    prepared(**batch_of(plain_model(prepared), "gemma3", full=False))["loss"].backward()
    assert all(p.grad is not None for p in prepared.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_two_processes_one_of_them_without_an_image_or_a_slot(family, tmp_path):
    """Data parallel training waits for the gradient of every trained parameter in each process, and averages them."""
    store = f"file://{tmp_path / 'store'}"
    torch.multiprocessing.start_processes(train_in_parallel, (family, store, str(tmp_path)), 2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(float(first[name].abs().sum()) > 0 for name in first if "mask_decoder" in name)


def train_in_parallel(rank: int, family: str, store: str, folder: str) -> None:
    """Run two backward passes of one of two processes; the second process has an image and slots in the second pass only."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = prepare_for_training(bases.make_gsva(family, bases.mask_config("sam2")), ModelArguments(lora_dropout=0.0))
    parallel = nn.parallel.DistributedDataParallel(model.train())
    for full in (rank == 0, True, rank == 1):
        parallel(**batch_of(plain_model(model), family, full))["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    torch.save(gradients, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_language_model_of_unknown_names_lists_its_layers(model):
    if model.config.vlm_config.model_type != "smolvlm":
        pytest.skip("one family shows it")
    renamed = bases.make_gsva("smolvlm")
    for layer in renamed.vlm.get_decoder().layers:
        for name in ("q_proj", "v_proj"):
            layer.self_attn.add_module(f"my_{name[0]}", getattr(layer.self_attn, name))
            delattr(layer.self_attn, name)
    with pytest.raises(
        ValueError, match=r"LlamaModel has no projections .*its linear layers are .*my_q, my_v.*--lora_target"
    ):
        prepare_for_training(renamed, ModelArguments())
    assert lora_targets(renamed, ["my_q"]) == r".*text_model\.layers\.\d+\.self_attn\.(my_q)"
    with pytest.raises(ValueError, match="no linear layer named what; its linear"):
        lora_targets(renamed, ["my_q", "what"])


def test_names_of_the_papers_model(make_model):
    """Adapters of earlier versions name the same layers."""
    model = make_model()
    assert lora_targets(model) == r".*language_model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"
    assert parts_of(model).encoders == ("vlm.model.vision_tower", "vlm.model.multi_modal_projector")
    adapter = prepare_for_training(model, ModelArguments()).peft_config["default"]
    assert set(adapter.modules_to_save) == {"embed_tokens", "lm_head", "mask_decoder", "mask_projector"}


def test_fused_projections():
    """Phi-3 has one layer for queries, keys and values."""
    from transformers import AutoConfig

    from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration

    text = {**bases.TEXT, "model_type": "phi3", "sliding_window": None}
    config = AutoConfig.for_model(
        "llava", text_config=text, vision_config={**bases.TOWER, "model_type": "clip_vision_model"}, image_token_index=bases.IMAGE
    )  # fmt: skip
    config = GsvaConfig(
        vlm_config=config.to_dict(),
        sam_config=bases.mask_config("sam"),
        seg_token_id=bases.SEG,
        rej_token_id=bases.REJ,
    )
    model = GsvaForConditionalGeneration(config)
    assert lora_targets(model) == r".*language_model\.layers\.\d+\.self_attn\.(qkv_proj)"
    assert lora_targets(model, ["o_proj", "qkv_proj"]).endswith(r"\.(o_proj|qkv_proj)")
