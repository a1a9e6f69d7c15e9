"""Equality with the original, by a compact set of its golden numbers (tests/tools/make_parity_fixture.py makes it).

The compact set holds conversations, pixels, CLIP and SAM features, hidden states of both passes, slot embeddings and decisions.
SAM's mask decoder is too large to commit. Masks, losses, gradients and optimizer steps are therefore compared with a plain
implementation of the specification (plain_gsva.py). If the folder of golden numbers is available, the slow test compares them
with tests/tools/parity.py.
"""

import copy
import io
import json
from pathlib import Path

import numpy as np
import parity
import pytest
import torch
from paths import FIXTURES, SHARED
from PIL import Image
from plain_gsva import Plain
from safetensors.torch import load_file
from tiny_sentencepiece import VOCAB_SIZE, train

import convert_checkpoint
from modeling_gsva.processing_gsva import CHAT_TEMPLATES

# Tolerances against the golden numbers stand in parity.py: FEATURE_RMS = 1e-5, LOGIT_RMS = 5e-5, pixels to the bit.
# Against the plain composition, float32 on both sides:
PLAIN_MASK_MAX = 1e-4
# On a card sums have another order; the original on a CPU is 1e-6 from its own float64, with TF32 it would be above 1e-3.
CARD_FEATURE_RMS = 1e-4
PLAIN_LOSS_RELATIVE = 5e-6
PLAIN_GRADIENT_RELATIVE_RMS = 2e-4  # the tiny model's weights are steep; against the golden gradients it is 5e-5
PLAIN_ADAMW_RELATIVE = 5e-4

FIXTURE = FIXTURES / "golden_model"


@pytest.fixture(scope="module")
def facts() -> dict:
    return json.loads((FIXTURE / "facts.json").read_text())


@pytest.fixture(scope="module")
def values() -> dict[str, torch.Tensor]:
    return load_file(FIXTURE / "values.safetensors")


@pytest.fixture(scope="module")
def converted(facts, tmp_path_factory) -> Path:
    """The fixture's weights as the original's .bin, through the command line. The mask decoder is random."""
    root = tmp_path_factory.mktemp("golden")
    state = {}
    for key, value in load_file(FIXTURE / "weights.safetensors").items():
        state[key] = (value.double() * 2.0 ** -facts["exponents"][key]).float() if key in facts["exponents"] else value
    torch.manual_seed(0)
    for key, shape in json.loads((FIXTURES / "original_keys.json").read_text()).items():
        if "mask_decoder" in key:
            state[f"base_model.model.{key}"] = 0.05 * torch.randn(shape)
    torch.save(state, root / "gsva.bin")
    for name, config in facts["configs"].items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
    train(root / "llava/tokenizer")
    convert_checkpoint.main(["--checkpoint", str(root / "gsva.bin"), "--llava", str(root / "llava"),
                             "--clip", str(root / "clip-tiny"), "--output", str(root / "out")])  # fmt: skip
    return root / "out"


@pytest.fixture(scope="module")
def golden_model(converted):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(converted, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(converted, trust_remote_code=True)


def case_inputs(facts, values, processor, number: int) -> dict[str, torch.Tensor]:
    """A golden picture with its golden ids, numbered as in the fixture, question and answer apart."""
    new = {int(old): number for old, number in facts["token_ids"].items()}
    patches = processor.image_seq_length
    ids, labels = (values[f"img{number}/{part}"][0].tolist() for part in ("input_ids", "labels"))
    expanded, answer = [], None
    for token, label in zip(ids, labels):
        if label != -100 and answer is None:
            answer = len(expanded)
        expanded += [processor.image_token_id] * patches if token == -200 else [new[token]]
    full = torch.tensor([expanded])
    inputs = processor.image_processor([Image.open(FIXTURE / f"img{number}.jpg")], return_tensors="pt")
    return dict(inputs) | {
        "input_ids": full[:, :answer], "attention_mask": torch.ones(1, answer, dtype=torch.long),
        "answer_ids": full[:, answer:], "answer_attention_mask": torch.ones(1, len(expanded) - answer, dtype=torch.long),
        "image_index": torch.zeros(1, dtype=torch.long),
    }  # fmt: skip


@pytest.mark.parametrize("number", [0, 1, 2])
def test_golden_features_states_and_decisions(number, facts, values, golden_model):
    model, processor = golden_model
    record, report = facts["cases"][number], parity.Report()
    assert model.config.text_config.vocab_size == VOCAB_SIZE + 4
    ours = parity.run_inputs(model, case_inputs(facts, values, processor, number), record)
    for mode in ("no_reeval", "reeval"):
        if mode not in record:
            continue
        old_ids = {new: int(old) for old, new in facts["token_ids"].items()}
        said = ours | {"argmax": torch.tensor([old_ids[int(token)] for token in ours["argmax"]])}
        parity.check_picture(
            report, mode, said, record[mode], values, f"img{number}", mode, facts["spec"]["rej_token_idx"]
        )
    names = {row["quantity"] for row in report.rows}
    assert {"last_hidden_pass1 rms", "pred_embeddings rms", "sam_embed_strided rms", "decisions"} <= names
    assert report.ok, [row for row in report.rows if not row["ok"]]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def exact_sums():
    """cuDNN takes TF32 for convolutions unless it is told not to."""
    usual, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = usual


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_distance_from_the_original(device, dtype, facts, values, golden_model, exact_sums, record_property):
    """In fp32 that of rounding, in bf16 at most twice the original's own distance between its bf16 and its fp32."""
    model, processor = golden_model
    model = copy.deepcopy(model).to(device, dtype)
    inputs = case_inputs(facts, values, processor, 0)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    ours, pairs = parity.run_inputs(model, inputs, facts["cases"][0]), {}
    for mode in ("no_reeval", "reeval"):
        pairs |= parity.golden_pairs(ours, facts["cases"][0][mode], values, "img0", mode)
    own = facts["bf16_rms"]
    assert set(own) <= set(pairs)
    for name, distance in own.items():
        found = parity.rms(*pairs[name])
        if dtype == torch.float32:
            record_property(f"fp32 from the original's fp32, rms: {name}", found)
            assert found < (parity.FEATURE_RMS if device == "cpu" else CARD_FEATURE_RMS), name
        else:
            record_property(
                f"bf16 from the original's fp32, over the original's own distance: {name}", found / distance
            )
            assert found < parity.BF16_FACTOR * distance, name


def test_second_pass_matters_in_the_fixture(values):
    """Otherwise the test above could not tell the passes apart."""
    first, second = values["img0/no_reeval/last_hidden_pass1"], values["img0/reeval/last_hidden_pass2"]
    assert parity.rms(first, second) > 100 * parity.FEATURE_RMS


@pytest.mark.parametrize("number", [0, 1, 2])
def test_golden_pixels(number, facts, golden_model):
    record, processor = facts["cases"][number], golden_model[1].image_processor
    picture = Image.open(io.BytesIO((FIXTURE / f"img{number}.jpg").read_bytes())).convert("RGB")
    if parity.sha256(np.asarray(picture)) != record["decoded_rgb_sha256"]:
        pytest.fail(
            "this Pillow decodes JPEG to other pixels than the original's cv2 did; nothing after it can be equal"
        )
    inputs = processor([picture], return_tensors="pt")
    resized = processor.resize_for_sam(np.asarray(picture).transpose(2, 0, 1), processor.sam_size["longest_edge"])
    assert parity.sha256(resized.transpose(1, 2, 0)) == record["resized_u8_sha256"]
    assert parity.sha256(inputs["sam_pixel_values"][0].numpy()) == record["sam_input_sha256"]
    assert parity.sha256(inputs["pixel_values"][0].numpy()) == record["clip_input_sha256"]
    assert inputs["reshaped_input_sizes"][0].tolist() == record["resize"]
    assert inputs["original_sizes"][0].tolist() == record["original_size"]


def test_golden_conversations(facts, golden_model):
    """The template writes every golden conversation to the letter, one and several rounds."""
    processor = golden_model[1]
    for text in facts["conversations"]:
        messages = parity.parse_conversation(text, "llava_v1")
        assert (
            processor.apply_chat_template(messages, chat_template=CHAT_TEMPLATES["llava_v1"], tokenize=False) == text
        )
    for case in facts["cases"]:
        if "sents" in case:
            absent = [area == 0 for area in case["mask_areas"]]
            messages = processor.build_conversation(case["sents"], absent)
            assert processor.apply_chat_template(messages, tokenize=False) == case["conversation"]


def test_conversation_to_messages_and_back_in_the_other_template(golden_model):
    rounds = [{"role": role, "content": text} for role, text in
              (("user", "<image>\nIs it red?"), ("assistant", "Yes."), ("user", "And big?"), ("assistant", "No, small."))]  # fmt: skip
    text = golden_model[1].apply_chat_template(rounds, chat_template=CHAT_TEMPLATES["llava_llama_2"], tokenize=False)
    assert text.startswith("[INST] <<SYS>>\nYou are") and text.endswith(
        "</s><s>[INST] And big? [/INST] No, small. </s>"
    )
    assert parity.parse_conversation(text, "llava_llama_2") == rounds


# ------------------------------------------------------------------------------------- against the plain composition
TRAINED = ("lm_head", "embed_tokens", "mask_decoder", "mask_projector", "self_attn.q_proj", "self_attn.v_proj")


@pytest.fixture
def training(make_model, processor, make_picture):
    """Two pictures, three conversations of several slots, a text-only one; and the same for the plain composition."""
    model = make_model(seed=3)
    pictures = [make_picture(0, 50, 38), make_picture(1, 30, 47)]

    def asked(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    conversations = [
        asked("<image>\nWhere are a, b, c?", "Sure, a [SEG], b [REJ], c [SEG]."),
        asked("<image>\nd?", "[SEG] it is") + asked("and now a longer question?", "none of this [REJ]"),
        asked("<image>\nb?", "b [REJ]."),
        asked("no picture", "and no mask"),
    ]
    image_index = [0, 1, 1, -1]
    rng = np.random.default_rng(5)
    masks = []
    for empty, image in zip([[0, 1, 0], [0, 1], [1], []], image_index):
        width, height = pictures[image].size
        truth = (rng.random((len(empty), height, width)) < 0.3).astype(np.uint8)
        masks.append(truth * (1 - np.array(empty, np.uint8).reshape(-1, 1, 1)))
    inputs = processor(
        images=pictures, conversations=conversations, image_index=image_index, masks=masks, return_tensors="pt"
    )
    batch = []
    for row, image in enumerate(image_index):
        kept = (
            parity.collapse(inputs["input_ids"][row], processor.image_token_id) & inputs["attention_mask"][row].bool()
        )
        ids = [-200 if i == processor.image_token_id else i for i in inputs["input_ids"][row][kept].tolist()]
        batch.append({
            "ids": ids, "labels": inputs["labels"][row][kept].tolist(), "pixels": inputs["pixel_values"][image],
            "sam_pixels": inputs["sam_pixel_values"][image], "reshaped": inputs["reshaped_input_sizes"][image].tolist(),
            "original": inputs["original_sizes"][image].tolist(), "truth": torch.as_tensor(masks[row]),
        })  # fmt: skip
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED) and "vision" not in name)
    return model.train(), inputs, batch


def test_masks_equal_the_plain_composition(training):
    model, inputs, batch = training
    outputs, plain = model(**inputs), Plain(model)
    compared = 0
    for row, item in enumerate(batch):
        states = plain.states(item["ids"], item["pixels"])
        shift = len(states) - len(item["ids"])
        for n, p in enumerate(
            p for p, token in enumerate(item["ids"]) if token in (model.config.seg_token_id, model.config.rej_token_id)
        ):
            wanted = torch.zeros_like(outputs.mask_logits[row][n])
            if item["ids"][p] == model.config.seg_token_id:
                wanted = plain.low_res(states[p + shift - 1][None], item["sam_pixels"])[0]
            torch.testing.assert_close(outputs.mask_logits[row][n], wanted, atol=PLAIN_MASK_MAX, rtol=0)
            compared += 1
    assert compared == 6


def test_losses_and_gradients_equal_the_plain_composition(training):
    model, inputs, batch = training
    wanted = Plain(model).losses(batch)
    wanted["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    outputs = model(**inputs)
    for name in ("loss", "ce_loss", "mask_bce_loss", "mask_dice_loss"):
        assert abs(float(outputs[name].detach()) / float(wanted[name].detach()) - 1) < PLAIN_LOSS_RELATIVE, name
    outputs.loss.backward()
    assert len(gradients) > 40
    for name, gradient in gradients.items():
        if name.endswith("k_proj.bias"):
            continue  # the true gradient is 0: softmax ignores a constant
        ours = dict(model.named_parameters())[name].grad
        scale = float(gradient.square().mean().sqrt())
        assert parity.rms(ours, gradient) <= PLAIN_GRADIENT_RELATIVE_RMS * scale + 1e-9, name


def test_losses_with_a_seg_cut_off_equal_the_plain_composition(training):
    """Conversation 0 loses its second [SEG]: its mask counts with zero logits."""
    model, inputs, batch = training
    second = (inputs["input_ids"][0] == model.config.seg_token_id).nonzero()[1, 0]
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        inputs[name][0, second:] = fill
    place = [n for n, token in enumerate(batch[0]["ids"]) if token == model.config.seg_token_id][1]
    batch[0] |= {"ids": batch[0]["ids"][:place], "labels": batch[0]["labels"][:place]}
    assert batch[0]["truth"][2].any()
    outputs, wanted = model(**inputs), Plain(model).losses(batch)
    assert [len(masks) for masks in outputs.mask_logits] == [2, 2, 1, 0]
    for name in ("loss", "ce_loss", "mask_bce_loss", "mask_dice_loss"):
        assert float(outputs[name].detach()) == pytest.approx(float(wanted[name].detach()), rel=5e-6), name


def test_five_adamw_steps_equal_the_plain_composition(training):
    model, inputs, batch = training
    start = {name: value.clone() for name, value in model.state_dict().items()}
    runs = []
    for loss in (lambda: model(**inputs).loss, lambda: Plain(model).losses(batch)["loss"]):
        model.load_state_dict(start)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0
        )
        runs.append([])
        for _ in range(6):
            optimizer.zero_grad()
            value = loss()
            runs[-1].append(float(value.detach()))
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert runs[0] == pytest.approx(runs[1], rel=PLAIN_ADAMW_RELATIVE)
    assert runs[0][-1] < runs[0][0], "the steps must have done something"


# --------------------------------------------------------------------------------------------- over the whole folder
@pytest.mark.slow
def test_every_golden_number(tmp_path):
    tokenizer = SHARED / "llama_tokenizer.model"
    if not tokenizer.is_file() or not (SHARED / "golden_model").is_dir():
        pytest.skip(f"the original's golden numbers are not at {SHARED.name}/ beside the checkout (or at GSVA_SHARED)")
    report = parity.Report()
    parity.run(SHARED / "golden_model", tokenizer, tmp_path, set(parity.PARTS), report)
    assert len(report.rows) > 500
    assert report.ok, [row for row in report.rows if not row["ok"]]


@pytest.mark.slow
@pytest.mark.parametrize("template", ["llava_v1", "llava_llama_2"])
def test_ids_and_labels_of_every_golden_conversation(template):
    """All conversations of the data pipeline's golden outputs, one and several rounds."""
    root = SHARED / "golden_data" / "golden"
    if not root.is_dir():
        pytest.skip(f"the original's golden numbers are not at {SHARED.name}/ beside the checkout (or at GSVA_SHARED)")
    from modeling_gsva import GsvaImageProcessor, GsvaProcessor

    tokenizer = convert_checkpoint.build_llama_tokenizer(SHARED / "llama_tokenizer.model")
    processor = GsvaProcessor(GsvaImageProcessor(), tokenizer, chat_template=CHAT_TEMPLATES[template])
    compared = several_rounds = refused = 0
    for file in sorted([*root.glob("val/*.json"), *root.glob("train/*.json")]):
        for sample in json.loads(file.read_text())["samples"]:
            conversation = sample["conv"][template]
            golden = conversation["tokens"]["legacy"]
            texts = conversation["conversations"]
            messages = [parity.parse_conversation(text, template) for text in texts]
            if any("<image>" in m["content"] for m in messages[0][2:]):
                continue  # a picture in a later round only: ours asks for one per conversation all the same
            for (ids, labels), wanted_ids, wanted_labels in zip(
                processor.encode_conversations(messages), golden["input_ids"], golden["labels"], strict=True
            ):
                kept = parity.collapse(torch.tensor(ids), processor.image_token_id).tolist()
                ids = [-200 if i == processor.image_token_id else i for i, keep in zip(ids, kept) if keep]
                labels = [label for label, keep in zip(labels, kept) if keep]
                wanted = [(i, label) for i, label in zip(wanted_ids, wanted_labels)]
                while len(wanted) > len(ids) and wanted[-1] == (0, -100):
                    wanted.pop()  # padding
                assert list(zip(ids, labels))[: len(wanted)] == wanted, file.name  # training texts are cut at 769
                compared += 1
                several_rounds += len(messages[0]) > 2
    assert compared > 240 and several_rounds > 5 and refused < 20
