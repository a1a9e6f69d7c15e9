"""LoRA, QLoRA, half precision and activation checkpointing: trained weights, quantized weights, tensors that autograd keeps."""

import copy
import io
import json
import re

import numpy as np
import pytest
import torch

from trainers.arguments import GsvaTrainingArguments, ModelArguments
from trainers.data import GsvaCollator
from trainers.freezing import prepare_for_training

EXPRESSIONS = ["a thing", "a unicorn"]


@pytest.fixture(scope="module")
def base(make_model, processor, tmp_path_factory):
    """A base as convert_checkpoint.py leaves it: a directory with model and processor."""
    folder = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def batch(processor, make_picture):
    talk = processor.build_conversation(EXPRESSIONS, [False, True])
    masks = np.zeros((2, 30, 40), np.uint8)
    masks[0, 5:20, 5:30] = 1
    return GsvaCollator(processor)([{"image": make_picture(), "conversations": [talk], "masks": [masks]}])


class Pictures:
    """A data set of two pictures, with one present and one absent expression each."""

    rows = (0, 1)

    def __init__(self, processor, make_picture):
        self.processor, self.make_picture = processor, make_picture

    def __len__(self):
        return 2

    def __getitem__(self, index):
        masks = np.zeros((2, 30, 40), np.uint8)
        masks[0, 5:20, 5:30] = 1
        talk = self.processor.build_conversation(EXPRESSIONS, [False, True])
        return {"image": self.make_picture(index % 2), "conversations": [talk], "masks": [masks]}


def as_png(picture) -> bytes:
    picture.save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


def rows(processor, make_picture):
    """The same pictures as rows to evaluate on."""
    from data_scripts.schema import empty_mask, encode_mask, expression

    examples = Pictures(processor, make_picture)
    return [
        {
            "image": {"path": None, "bytes": as_png(examples[n]["image"])},
            "image_id": str(n),
            "height": 30,
            "width": 40,
            "expressions": [
                expression(EXPRESSIONS[0], encode_mask(examples[n]["masks"][0][0])),
                expression(EXPRESSIONS[1], empty_mask(30, 40), num_targets=0),
            ],
        }
        for n in range(2)
    ]


def test_lora_sits_on_the_language_models_q_and_v_and_nowhere_else(make_model):
    model = prepare_for_training(make_model(), ModelArguments())
    wrapped = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert wrapped == {
        f"base_model.model.vlm.model.language_model.layers.{layer}.self_attn.{projection}"
        for layer in range(2)
        for projection in ("q_proj", "v_proj")
    }  # CLIP's and SAM's attention has modules of the same names
    in_full = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    parts = {re.sub(r"\.modules_to_save\.default.*", "", name).rpartition(".")[2] for name in in_full}
    assert parts == {"embed_tokens", "lm_head", "mask_decoder", "mask_projector"}
    assert all(".modules_to_save." in name for name in in_full)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_only_the_language_models_layers_are_quantized(base, kind):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    from trainers.loading import load_model

    _, model = load_model(ModelArguments(model=str(base), quantization=kind))
    kinds = {name for name, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)}
    linears = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("vlm.model.language_model.layers.")
    }
    assert kinds == linears and len(kinds) == 2 * 7
    for name, parameter in model.named_parameters():
        if not name.startswith("vlm.model.language_model.layers."):
            assert parameter.dtype == torch.float32, name


def test_a_qlora_step_on_the_processor_then_adapter_then_merge(base, processor, make_picture, tmp_path, monkeypatch):
    """The road of `run_gres.py --quantization 4bit`: train, save small, merge into the unrounded base, load again."""
    from bitsandbytes.nn import Params4bit
    from peft import PeftModel

    from modeling_gsva import GsvaForConditionalGeneration
    from trainers.arguments import DataArguments
    from trainers.loading import load_model
    from trainers.training import train

    args = ModelArguments(model=str(base), quantization="4bit", lora_dropout=0.0)
    _, model = load_model(args)
    rounded = {n: p.clone() for n, p in model.named_parameters() if isinstance(p, Params4bit)}
    assert len(rounded) == 14
    monkeypatch.setattr("trainers.training.training_data", lambda *_: Pictures(processor, make_picture))
    training = GsvaTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        save_strategy="no", do_train=True, logging_steps=1,
    )  # fmt: skip
    trained = train(processor, model, args, DataArguments(), training)

    assert isinstance(trained, PeftModel)
    for name, parameter in trained.named_parameters():
        if isinstance(parameter, Params4bit):
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, rounded[plain]) and not parameter.requires_grad
    losses = [entry["loss"] for entry in json.loads((tmp_path / "log_history.json").read_text()) if "loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]

    unrounded = GsvaForConditionalGeneration.from_pretrained(base)
    merged = GsvaForConditionalGeneration.from_pretrained(tmp_path)
    q = "model.language_model.layers.0.self_attn.q_proj"
    lora = trained.base_model.model.get_submodule(q)
    step = lora.lora_B["default"].weight @ lora.lora_A["default"].weight * (args.lora_alpha / args.lora_r)
    assert step.abs().max() > 0
    torch.testing.assert_close(merged.get_submodule(q).weight, unrounded.get_submodule(q).weight + step)
    k = q.replace("q_proj", "k_proj")
    assert torch.equal(merged.get_submodule(k).weight, unrounded.get_submodule(k).weight)
    assert not torch.equal(merged.lm_head.weight, unrounded.lm_head.weight)

    # The adapter alone gives the same model over the base.
    _, again = load_model(ModelArguments(model=str(tmp_path / "adapter")))
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter)
    with pytest.raises(ValueError, match="is an adapter"):
        load_model(ModelArguments(model=str(tmp_path / "adapter"), quantization="4bit"))


def test_an_adapter_holds_nothing_that_is_frozen(make_model, tmp_path):
    from safetensors import safe_open

    from trainers.publishing import save_adapter

    model = prepare_for_training(make_model(), ModelArguments())
    folder = save_adapter(model, tmp_path)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names and not any("vision" in name or "multi_modal" in name for name in names)
    assert all("lora_" in n or re.search(r"(embed_tokens|lm_head|mask_decoder|mask_projector)", n) for n in names)
    assert not (tmp_path / ".adapter").exists()


def saved_in(model, batch, towers) -> tuple[dict[str, int], int]:
    """Bytes that autograd keeps of what is computed in each tower, and in all."""
    where, kept, total, hooks = ["elsewhere"], dict.fromkeys([*towers, "elsewhere"], 0), 0, []
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for tower in towers:
        module = next(m for n, m in model.named_modules() if n.endswith(tower))
        hooks.append(module.register_forward_pre_hook(lambda *_, tower=tower: where.append(tower)))
        hooks.append(module.register_forward_hook(lambda *_: where.pop() and None))

    def pack(tensor):
        nonlocal total
        if tensor.untyped_storage().data_ptr() not in parameters:
            size = tensor.numel() * tensor.element_size()
            kept[where[-1]] += size
            total += size
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    for hook in hooks:
        hook.remove()
    loss.backward()
    return kept, total


def test_autograd_keeps_nothing_of_frozen_towers_and_less_with_checkpointing(make_model, batch):
    towers = ("vision_tower", "sam.vision_encoder", "language_model")
    model = prepare_for_training(make_model(), ModelArguments(lora_dropout=0.0)).train()
    twin = copy.deepcopy(model)
    plain, plain_total = saved_in(model, batch, towers)
    twin.activation_checkpointing_enable()
    twin.enable_input_require_grads()  # what makes frozen towers build graphs elsewhere
    checked, checked_total = saved_in(twin, batch, towers)
    for kept in (plain, checked):
        assert kept["vision_tower"] == kept["sam.vision_encoder"] == 0
        assert kept["language_model"] > 0
    assert checked_total < plain_total
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    for name, parameter in twin.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bf16_trains_float32_weights_and_evaluates(base, processor, make_picture, dtype, tmp_path):
    from evaluation import EvaluationConfig
    from trainers.freezing import cast_trained
    from trainers.loading import load_model
    from trainers.trainer import GsvaTrainer

    _, model = load_model(ModelArguments(model=str(base), dtype=dtype))
    model = cast_trained(prepare_for_training(model, ModelArguments()), torch.float32)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.base_model.model.model.vision_tower.dtype == getattr(torch, dtype)
    args = GsvaTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, bf16=True, max_steps=1, per_device_train_batch_size=2,
        save_strategy="no", activation_checkpointing=True,
    )  # fmt: skip
    trainer = GsvaTrainer(
        model=model, args=args, train_dataset=Pictures(processor, make_picture), data_collator=GsvaCollator(processor),
        processing_class=processor, evaluation=EvaluationConfig(rows(processor, make_picture), "pictures", "all"),
    )  # fmt: skip
    result = trainer.train()
    assert np.isfinite(result.training_loss) and result.training_loss > 0
    assert 0 <= trainer.evaluate()["eval_gIoU"] <= 1
