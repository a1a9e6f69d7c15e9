"""Compare this port with golden numbers of the original, in any folder with the layout of golden_model.

    python tests/tools/parity.py GOLDEN_DIR --tokenizer tokenizer.model [--only eval train ...] [--work DIR]

The script unpacks the checkpoints, converts them through the command line, loads the results through the Auto classes and
prints one JSON line per comparison. It exits with 1 if one fails. The folder gives sizes, vocabulary, ranks and templates.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from paths import ROOT
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT))

from convert_checkpoint import to_ours
from metrics.gres import gres_metrics
from modeling_gsva.image_processing_gsva import upscale_mask_logits

# The tolerances. Absolute where nothing else is said; "rms" over all elements, "max" over the largest.
FEATURE_RMS = 1e-5  # CLIP features, hidden states, slot and SAM embeddings; their scale is 1
MASK_RMS, MASK_MAX = 5e-5, 5e-4  # low-resolution and final mask logits; their scale is 1 to 4
LOGIT_RMS = 5e-5  # of the language head; their scale is 2 to 15
NEAR_ZERO = 1e-3  # a mask pixel whose logit is nearer to 0 than this may fall on either side
AREA_PIXELS = 10
METRIC = 1e-6
LOSS_RELATIVE = 5e-6
GRADIENT_RELATIVE_RMS, GRADIENT_NORM_RELATIVE = 5e-5, 5e-4
ADAMW_RELATIVE = 5e-4
BF16_FACTOR = 2.0  # times the original's own distance between bf16 and fp32
MERGE_MAX = 5e-4  # merged LoRA against LoRA kept beside: the same outputs up to rounding, so a mask logit's own limit

# The original's two evaluation functions, as metrics/gres calls them.
CONVENTIONS = {"eval_gres": "gsva", "validate": "gsva_validate"}
PARTS = ("tokens", "images", "forward", "metrics", "variants", "bf16", "train", "adamw", "reverse")


class Report:
    """Prints a JSON line per comparison and remembers whether all held."""

    def __init__(self, stream=None):
        self.stream, self.rows = stream, []

    def add(self, case: str, quantity: str, value: float, limit: float) -> None:
        row = {"case": case, "quantity": quantity, "value": float(value), "limit": limit, "ok": bool(value <= limit)}
        self.rows.append(row)
        if self.stream:
            print(json.dumps(row), file=self.stream, flush=True)

    def close(self, case: str, quantity: str, ours, golden, rms: float, largest: float | None = None) -> None:
        """The rms difference, and the largest where it has a limit of its own; a wrong shape is infinitely far."""
        ours, golden = torch.as_tensor(ours).double(), torch.as_tensor(golden).double()
        if ours.shape != golden.shape:
            self.add(case, f"{quantity} shape {tuple(ours.shape)} for {tuple(golden.shape)}", float("inf"), rms)
            return
        difference = (ours - golden).abs()
        self.add(case, f"{quantity} rms", difference.square().mean().sqrt() if difference.numel() else 0.0, rms)
        if largest is not None:
            self.add(case, f"{quantity} max", difference.max() if difference.numel() else 0.0, largest)

    def same(self, case: str, quantity: str, ours, golden) -> None:
        """How many elements differ, a difference in length included; none may."""
        ours, golden = list(ours), list(golden)
        self.add(case, quantity, sum(a != b for a, b in zip(ours, golden)) + abs(len(ours) - len(golden)), 0)

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row["ok"] for row in self.rows)


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())


def unpack_masks(packed: torch.Tensor, shape: Iterable[int]) -> np.ndarray:
    """The golden folder's masks: zlib over packed bits → (slots, height, width) booleans."""
    shape = tuple(shape)
    bits = np.unpackbits(np.frombuffer(zlib.decompress(packed.numpy().tobytes()), np.uint8))
    return bits[: int(np.prod(shape))].reshape(shape).astype(bool)


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def parse_conversation(text: str, conv_type: str) -> list[dict]:
    """A conversation as the original wrote it (after its template) → messages."""
    text = text.replace("<im_start><image><im_end>", "<image>")
    if conv_type == "llava_llama_2":
        rounds = [r for r in re.split(r"</s>(?:<s>)?", text) if r]
        rounds = [r.removeprefix("[INST] ").split(" [/INST] ") for r in rounds]
        rounds = [(q.split("<</SYS>>\n\n")[-1], a.removesuffix(" ")) for q, a in rounds]
    else:
        rounds = [r.split("USER: ", 1)[1].split(" ASSISTANT: ") for r in text.split("</s>") if r]
    return [
        {"role": role, "content": t} for pair in rounds for role, t in zip(("user", "assistant"), pair, strict=True)
    ]


def collapse(ids: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """Where the placeholders of an image become the original's single -200: positions kept."""
    is_image = ids == image_token_id
    return ~is_image | (is_image.cumsum(-1) == 1)


class Golden:
    """A golden folder, unpacked and converted."""

    def __init__(self, root: Path, tokenizer: Path, work: Path):
        self.root, self.work = root, work
        self.spec = json.loads((root / "weights/model_spec.json").read_text())
        self.rank, self.conv_type = self.spec["lora_r"], self.spec.get("conv_type", "llava_v1")
        self.source = work / "original"
        if not self.source.exists():
            command = [
                sys.executable,
                str(root / "weights/unpack.py"),
                str(self.source),
                "--tokenizer",
                str(tokenizer),
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def converted(self, checkpoint: str, *options: str) -> Path:
        """Converts one of the checkpoints through the command line, once."""
        target = self.work / "-".join([checkpoint.removesuffix(".bin"), *(o.strip("-") for o in options)]).replace(
            "/", "_"
        )
        if not target.exists():
            base = self.source / "base"
            clip = next(p for p in base.iterdir() if p.name.startswith("clip"))
            command = [sys.executable, str(ROOT / "convert_checkpoint.py"), "--checkpoint", str(self.source / checkpoint),
                       "--llava", str(base / "llava"), "--clip", str(clip), "--sam", str(next(base.glob("*.pth"))),
                       "--lora_alpha", str(self.spec.get("lora_alpha", 16)), "--conv_type", self.conv_type,
                       "--output", str(target), *options]  # fmt: skip
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return target

    def load(self, directory: Path, dtype: torch.dtype = torch.float32):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True, dtype=dtype)
        return model.eval(), processor

    def evaluated(self, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
        return json.loads((self.root / f"eval/{name}.json").read_text()), load_file(
            self.root / f"eval/{name}.safetensors"
        )

    def picture(self, file: str) -> Image.Image:
        return Image.open(self.root / "data" / file).convert("RGB")

    def question(self, record: dict) -> tuple[list[str], str]:
        """Expressions and prompt of an evaluated picture, from the data set's own files."""
        if "sents" in record:
            return record["sents"], "refer"
        said = json.loads((self.root / "data" / record["image_file"]).with_suffix(".json").read_text())
        return said["text"][:1], "reason_sentence" if said["is_sentence"] else "reason_phrase"  # the first text only


def encode(golden: Golden, processor, record: dict):
    """Processor inputs of one evaluated picture with its gold answer; question and answer as one sequence."""
    expressions, prompt = golden.question(record)
    no_targets = [area == 0 for area in record["mask_areas"]]
    picture = golden.picture(record["image_file"])
    inputs = processor(
        images=[picture], expressions=[expressions], no_targets=[no_targets], prompt=prompt, return_tensors="pt"
    )
    return inputs, torch.cat([inputs["input_ids"], inputs["answer_ids"]], 1)


def check_tokens(report: Report, golden: Golden, processor, names: list[str]) -> None:
    for name in names:
        facts, tensors = golden.evaluated(name)
        for i, record in enumerate(facts["images"]):
            case, (_, full) = f"{name}/img{i}", encode(golden, processor, record)
            kept = collapse(full[0], processor.image_token_id)
            ids = full[0][kept].masked_fill(full[0][kept] == processor.image_token_id, -200)
            report.same(case, "input_ids", ids.tolist(), tensors[f"img{i}/input_ids"][0].tolist())
            report.same(case, "attention_mask", [1] * len(ids), tensors[f"img{i}/attention_mask"][0].tolist())
            messages = parse_conversation(record["conversation"], golden.conv_type)
            trained = processor(
                images=[golden.picture(record["image_file"])], conversations=[messages], return_tensors="pt"
            )
            report.same(case, "ids of the conversation", trained["input_ids"][0].tolist(), full[0].tolist())
            report.same(case, "labels", trained["labels"][0][kept].tolist(), tensors[f"img{i}/labels"][0].tolist())
    batches = json.loads((golden.root / "train/batches.json").read_text())
    tensors = load_file(golden.root / "train/train.safetensors")
    for case, batch in batches.items():
        inputs = training_inputs(golden, processor, case, batch, tensors)
        kept = collapse(inputs["input_ids"], processor.image_token_id)
        for row in range(len(kept)):
            ids = inputs["input_ids"][row][kept[row]]
            ids = ids.masked_fill(ids == processor.image_token_id, -200)
            report.same(f"{case}/{row}", "input_ids", ids.tolist(), tensors[f"{case}/input_ids"][row].tolist())
            for key, key_golden in (("labels", "labels"), ("attention_mask", "attention_mask")):
                ours = inputs[key][row][kept[row]].tolist()
                report.same(f"{case}/{row}", key, ours, tensors[f"{case}/{key_golden}"][row].tolist())


def check_images(report: Report, golden: Golden, processor, names: list[str]) -> None:
    seen = set()
    for name in names:
        facts, tensors = golden.evaluated(name)
        for i, record in enumerate(facts["images"]):
            if record["image_file"] in seen:
                continue
            seen.add(record["image_file"])
            case, picture = f"{name}/img{i}", golden.picture(record["image_file"])
            inputs = processor.image_processor([picture], return_tensors="pt")
            size = processor.image_processor.sam_size["longest_edge"]
            resized = processor.image_processor.resize_for_sam(np.asarray(picture).transpose(2, 0, 1), size)
            for quantity, ours, key in (
                ("decoded pixels sha256", np.asarray(picture), "decoded_rgb_sha256"),
                ("SAM resized pixels sha256", np.asarray(resized).transpose(1, 2, 0), "resized_u8_sha256"),
                ("SAM input sha256", inputs["sam_pixel_values"][0].numpy(), "sam_input_sha256"),
                ("CLIP input sha256", inputs["pixel_values"][0].numpy(), "clip_input_sha256"),
            ):
                report.same(case, quantity, [sha256(ours)], [record[key]])
            report.same(case, "reshaped size", inputs["reshaped_input_sizes"][0].tolist(), record["resize"])
            report.same(case, "original size", inputs["original_sizes"][0].tolist(), record["original_size"])
            for key, value in (("sam_input", "sam_pixel_values"), ("clip_input", "pixel_values")):
                golden_values = tensors[f"img{i}/{key}_strided"]
                stride = inputs[value].shape[-1] // golden_values.shape[-1]
                report.close(case, key, inputs[value][0][:, ::stride, ::stride], golden_values, 1e-6)


def run_image(golden: Golden, model, processor, record: dict) -> dict:
    inputs, _ = encode(golden, processor, record)
    return run_inputs(model, inputs, record)


@torch.no_grad()
def run_inputs(model, inputs: dict, record: dict) -> dict:
    """Everything the golden folder has about one evaluated picture, from our public calls on the model's device."""
    inputs = {n: v.to(model.device) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    full, config = torch.cat([inputs["input_ids"], inputs["answer_ids"]], 1), model.config
    image_index = torch.zeros(1, dtype=torch.long, device=model.device)
    vision = model.model.get_vision_features(inputs["pixel_values"])
    projected = model.model.get_image_features(None, image_index, vision).pooler_output[0]
    sam = model.get_sam_embeddings(inputs["sam_pixel_values"])
    all_seg = full.masked_fill(full == config.rej_token_id, config.seg_token_id)
    passes = [
        model.model(ids, vision_features=vision, image_index=image_index, use_cache=False).last_hidden_state[0]
        for ids in (full, all_seg)
    ]
    plain = model(full, vision_features=vision, sam_embeddings=sam, image_index=image_index)
    forced = model.segment(**inputs, method="teacher_forced", sam_embeddings=sam, vision_features=vision)
    slots = plain.slot_positions[:, 1]
    is_seg = full[0, slots] == config.seg_token_id
    decided = plain.logits[0, slots - 1]
    sizes = tuple(record["resize"]), tuple(record["original_size"]), config.sam_config.vision_config.image_size
    result = {
        "clip_selected": vision[0],
        "clip_projected": projected,
        "sam_embed": sam[0],
        "last_hidden_pass1": passes[0],
        "last_hidden_pass2": passes[1],
        "argmax": decided.argmax(-1),
        "decision_logits": torch.stack(
            [decided.max(-1).values, decided[:, config.seg_token_id], decided[:, config.rej_token_id]], 1
        ),
        "is_rejected": forced.is_rejected[0],
        "no_reeval": {
            "low_res": plain.mask_logits[0][is_seg],
            "iou_pred": plain.iou_scores[0][is_seg],
            "pred_embeddings": model.mask_projector(passes[0][slots - 1])[is_seg],
        },
        "reeval": {
            "low_res": forced.mask_logits[0],
            "iou_pred": forced.iou_scores[0],
            "pred_embeddings": model.mask_projector(passes[1][slots - 1]),
        },
    }
    for mode in ("no_reeval", "reeval"):
        low_res = result[mode]["low_res"]
        result[mode]["logits"] = (
            upscale_mask_logits(low_res, *sizes) if len(low_res) else low_res.new_zeros(0, *sizes[1])
        )
    return on_host(result)


def on_host(value):
    if isinstance(value, dict):
        return {name: on_host(part) for name, part in value.items()}
    return value.cpu()


def _strided(values: torch.Tensor, golden: torch.Tensor) -> torch.Tensor:
    """The slice of ours that the golden tensor holds (`::stride` over every dimension that is longer here)."""
    for dim, (ours, kept) in enumerate(zip(values.shape, golden.shape)):
        if ours != kept:
            stride = next((s for s in range(1, ours + 1) if -(-ours // s) == kept), 1)
            values = values.index_select(dim, torch.arange(0, ours, stride))
    return values


def golden_pairs(
    ours: dict, facts: dict, tensors: dict, key: str, mode: str
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """`{quantity: (ours, golden)}` for what is there of one picture in one mode."""
    stored = {name: tensors[f"{key}/{mode}/{name}"] for name in (
        "clip_selected", "clip_projected", "sam_embed_strided", "sam_embed_dense_strided", "sam_embed_chan_mean",
        "sam_embed_chan_std", "last_hidden_pass1", "last_hidden_pass2", "pred_embeddings", "iou_pred", "low_res_strided",
        "low_res_full_expr0", "mask_logits_strided",
    ) if f"{key}/{mode}/{name}" in tensors}  # fmt: skip
    sam, here, stride = ours["sam_embed"].float(), ours[mode], facts["mask_stride"]
    pairs = {}
    for name, golden in stored.items():
        if name == "sam_embed_chan_mean":
            value = sam.mean((1, 2))
        elif name == "sam_embed_chan_std":
            value = sam.std((1, 2))
        elif name.startswith("sam_embed"):
            value = _strided(sam, golden)
        elif name == "low_res_full_expr0":
            value = here["low_res"][0]
        elif name == "low_res_strided":
            value = _strided(here["low_res"], golden)
        elif name == "mask_logits_strided":
            value = here["logits"][:, ::stride, ::stride]
        elif name == "iou_pred":
            value = here["iou_pred"][:, None]
        else:
            value = _strided(here[name] if name in here else ours[name], golden)
        pairs[name] = value.float(), golden.float()
    return pairs


def check_picture(
    report: Report, case: str, ours: dict, facts: dict, tensors: dict, key: str, mode: str, rej_id: int
) -> None:
    for name, (value, golden) in golden_pairs(ours, facts, tensors, key, mode).items():
        is_mask = name.startswith(("low_res", "mask_logits"))
        report.close(case, name, value, golden, MASK_RMS if is_mask else FEATURE_RMS, MASK_MAX if is_mask else None)
    said = [token == rej_id for token in facts["output_ids_at_seg_rej"]]
    report.same(case, "decisions", ours["is_rejected"].tolist(), said)
    golden_logits = [[d[k] for k in ("argmax_logit", "seg_logit", "rej_logit")] for d in facts["decision"]]
    report.same(case, "arg-max before each slot", ours["argmax"].tolist(), [d["argmax_id"] for d in facts["decision"]])
    report.close(case, "logits before each slot", ours["decision_logits"], golden_logits, LOGIT_RMS)
    packed = tensors.get(f"{key}/{mode}/mask_ge0_packed")
    if packed is not None:
        logits = ours[mode]["logits"]
        flipped = (logits >= 0).numpy() != unpack_masks(packed, facts["mask_shape"])
        report.add(
            case, "mask pixels that differ, logit not near 0", flipped[logits.abs().numpy() >= NEAR_ZERO].sum(), 0
        )
        report.add(case, "mask pixels that differ", flipped.sum(), sum(facts["pixels_abs_lt_1e-3"]))


def metric_rows(ours: dict, truth: np.ndarray, function: str) -> list[dict]:
    """One row per expression. The original thresholds at >= 0 in eval_gres and at > 0 in validate."""
    logits = ours["reeval"]["logits"] if function == "eval_gres" else ours["no_reeval"]["logits"]
    masks = (logits >= 0 if function == "eval_gres" else logits > 0).numpy()
    return [
        {
            "is_no_target": not true.any(),
            "is_rejected": bool(rejected),
            "intersection": int((mask & true).sum()),
            "union": int((mask | true).sum()),
        }
        for mask, true, rejected in zip(masks, truth, ours["is_rejected"], strict=True)
    ]


def check_metrics(report: Report, case: str, rows: list[dict], golden: dict) -> None:
    ours = gres_metrics(rows, CONVENTIONS[golden["function"]])
    for key, value in golden["values"].items():
        name = {"giou": "gIoU", "ciou": "cIoU"}.get(key, key)
        report.add(case, f"metric {name}", abs(ours[name] - value), METRIC)
    areas = [(pair["inter"][1], pair["union"][1]) for pair in golden["per_mask_areas"]]
    # few pixels of 10^5 may fall on the other side of 0
    off = max(abs(row["intersection"] - i) + abs(row["union"] - u) for row, (i, u) in zip(rows, areas, strict=True))
    report.add(case, "largest difference of a foreground area in pixels", off, AREA_PIXELS)


def check_rooms(report: Report, golden: Golden, model, processor, names: list[str]) -> None:
    """The same metrics from the project's own road: data_scripts → evaluation → metrics."""
    import data_scripts
    from evaluation import EvaluationConfig, evaluate_rows

    for name in names:
        spec = golden.evaluated(name)[0]["val_dataset"]
        stored = find_metrics(golden, f"full_r{golden.rank}.bin", spec)
        dataset, split = spec.split("|")[0], spec.split("|")[-1]
        rows = data_scripts.load(
            dataset, str(golden.root / "data"), split=split, cache_dir=str(golden.work / "datasets")
        )
        plan = EvaluationConfig(rows, dataset, split, protocol="teacher_forced", batch_size=2)
        ours = gres_metrics(evaluate_rows(model, processor, plan).rows, CONVENTIONS[stored["function"]])
        for key, value in stored["values"].items():
            key = {"giou": "gIoU", "ciou": "cIoU"}.get(key, key)
            report.add(f"evaluate_rows/{spec}", f"metric {key}", abs(ours[key] - value), METRIC)


def find_metrics(golden: Golden, weights: str, spec: str) -> dict:
    metrics = json.loads((golden.root / "eval/metrics.json").read_text())
    return next(v for k, v in metrics.items() if k.split()[0] == weights and f" {spec}" in k)


def check_eval(report: Report, golden: Golden, model, processor, name: str, parts: set[str]) -> dict[str, dict]:
    facts, tensors = golden.evaluated(name)
    rows, results, weights = [], {}, f"full_r{golden.rank}.bin"
    stored = find_metrics(golden, weights, facts["val_dataset"])
    for i, record in enumerate(facts["images"]):
        ours = results[f"img{i}"] = run_image(golden, model, processor, record)
        for mode in ("no_reeval", "reeval"):
            if mode in record:
                check_picture(
                    report,
                    f"{name}/img{i}/{mode}",
                    ours,
                    record[mode],
                    tensors,
                    f"img{i}",
                    mode,
                    model.config.rej_token_id,
                )
        if "reeval" in record:
            pass1 = tensors[f"img{i}/no_reeval/last_hidden_pass1"]
            report.close(f"{name}/img{i}/reeval", "last_hidden_pass1", ours["last_hidden_pass1"], pass1, FEATURE_RMS)
        truth = unpack_masks(tensors[f"img{i}/gt_masks_packed"], record["masks_shape"])
        rows += metric_rows(ours, truth, stored["function"])
    if "metrics" in parts:
        check_metrics(report, name, rows, stored)
    return results


def check_variant(report: Report, golden: Golden, name: str, checkpoint: str, weights: str) -> None:
    """The pictures of grefcoco_val with other weights: tensors of the first ones, metrics over all."""
    model, processor = golden.load(golden.converted(checkpoint))
    facts, tensors = golden.evaluated("grefcoco_val")
    variant, values = golden.evaluated(name)
    rows = []
    for i, record in enumerate(facts["images"]):
        ours = run_image(golden, model, processor, record)
        if f"img{i}" in variant["images"]:
            check_picture(report, f"{name}/img{i}", ours, variant["images"][f"img{i}"], values, f"img{i}", "reeval",
                          model.config.rej_token_id)  # fmt: skip
        rows += metric_rows(ours, unpack_masks(tensors[f"img{i}/gt_masks_packed"], record["masks_shape"]), "eval_gres")
    check_metrics(report, name, rows, find_metrics(golden, weights, "grefcoco|"))


def check_bf16(report: Report, golden: Golden) -> None:
    """Ours in bf16 from the original in fp32, against the original's own distance between the two."""
    model, processor = golden.load(golden.converted(f"gsva_full_r{golden.rank}.bin"), torch.bfloat16)
    facts, exact = golden.evaluated("grefcoco_val")
    variant, values = golden.evaluated("variant_bf16")
    for key, mode_facts in variant["images"].items():
        ours = run_image(golden, model, processor, facts["images"][int(key.removeprefix("img"))])
        pairs = golden_pairs(ours, mode_facts, values, key, "reeval")
        for name, (value, golden_bf16) in pairs.items():
            reference = exact.get(f"{key}/reeval/{name}", exact.get(f"{key}/no_reeval/{name}"))
            if reference is not None and not name.startswith("sam_embed_chan"):
                own = rms(golden_bf16, reference)
                report.add(
                    f"variant_bf16/{key}",
                    f"{name} rms over the original's own",
                    rms(value, reference) / own,
                    BF16_FACTOR,
                )


def parameter_name(original: str) -> str:
    """A trainable parameter of the original → its name in our model wrapped by PEFT."""
    name = original.removeprefix("base_model.model.")
    if adapter := re.fullmatch(r"(.+)\.(lora_[AB])\.default\.weight", name):
        return f"{to_ours(adapter[1] + '.weight').removesuffix('.weight')}.{adapter[2]}.default.weight"
    return to_ours(name)


def training_inputs(golden: Golden, processor, case: str, batch: dict, tensors: dict):
    """A golden batch through our processor: pictures once each, conversations pointing to them, masks split over slots."""
    image_index = [image for image in range(len(batch["image_files"]))
                   for _ in range(batch["offset"][image], batch["offset"][image + 1])]  # fmt: skip
    masks, begin = [], {}
    for text, image in zip(batch["conversations"], image_index, strict=True):
        shape = batch["masks_shapes"][image]
        slots = len(re.findall(r"\[(?:SEG|REJ)\]", text))
        if not batch["do_segs"][image]:
            masks.append(np.zeros((0, *shape[1:]), np.uint8))
            continue
        whole = unpack_masks(tensors[f"{case}/masks_packed_{image}"], shape)
        masks.append(whole[begin.get(image, 0) : begin.get(image, 0) + slots].astype(np.uint8))
        begin[image] = begin.get(image, 0) + slots
    length = tensors[f"{case}/input_ids"].shape[1]
    return processor(
        images=[golden.picture(file) for file in batch["image_files"]],
        conversations=[parse_conversation(text, golden.conv_type) for text in batch["conversations"]],
        image_index=image_index,
        masks=masks,
        max_length=length - 1 + processor.image_seq_length,  # the original counts the image as one token
        return_tensors="pt",
    )


class Training:
    """A model with the original's trainable parameters, dropout off, and the golden batches."""

    def __init__(self, golden: Golden, lora: bool = True):
        self.golden = golden
        self.results = json.loads((golden.root / "train/results.json").read_text())
        self.batches = json.loads((golden.root / "train/batches.json").read_text())
        self.tensors = load_file(golden.root / "train/train.safetensors")
        if lora:
            from peft import PeftModel

            directory = golden.converted(f"gsva_full_r{golden.rank}.bin", "--keep_lora")
            base, self.processor = golden.load(directory)
            self.model = PeftModel.from_pretrained(base, directory / "adapter", is_trainable=True)
        else:
            self.model, self.processor = golden.load(golden.converted("gsva_full_r0.bin"))
        parameters = {
            name.removeprefix("base_model.model.").removeprefix("vlm."): p for name, p in self.model.named_parameters()
        }
        names = [n for n in self.results["trainable_parameters"] if lora or "lora_" not in n]
        self.trainable = {name: parameters[parameter_name(name)] for name in names}
        self.model.requires_grad_(False)
        for parameter in self.trainable.values():
            parameter.requires_grad_(True)
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        self.cache = {}

    def forward(self, case: str):
        """The frozen SAM and CLIP encoders run once per batch; what is trained starts after them."""
        if case not in self.cache:
            inputs = training_inputs(self.golden, self.processor, case, self.batches[case], self.tensors)
            model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
            with torch.no_grad():
                inputs["sam_embeddings"] = model.get_sam_embeddings(inputs.pop("sam_pixel_values"))
                inputs["vision_features"] = model.model.get_vision_features(inputs.pop("pixel_values"))
            self.cache[case] = inputs
        return self.model(**self.cache[case])

    def check_losses(self, report: Report, case: str, outputs, golden: dict, limit: float) -> None:
        for name in ("loss", "ce_loss", "mask_bce_loss", "mask_dice_loss"):
            report.add(case, f"{name} relative", abs(float(outputs[name].detach()) / golden[name] - 1), limit)

    def backward(self, case: str):
        self.model.zero_grad(set_to_none=True)
        outputs = self.forward(case)
        outputs.loss.backward()
        return outputs


def check_gradients(report: Report, training: Training, case: str) -> None:
    golden = training.results[case]
    outputs = training.backward(case)
    training.check_losses(report, case, outputs, golden, LOSS_RELATIVE)
    for i, embeddings in enumerate(outputs.mask_logits):
        stored = training.tensors.get(f"{case}/low_res_strided_{i}")
        if stored is not None and len(stored):
            ids = training.cache[case]["input_ids"][i]
            seg = ids[outputs.slot_positions[outputs.slot_positions[:, 0] == i, 1]] == training.processor.seg_token_id
            ours = _strided(embeddings[seg].detach(), stored)
            report.close(case, f"low_res conversation {i}", ours, stored, MASK_RMS, MASK_MAX)
    worst_norm = total = 0.0
    for name, parameter in training.trainable.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        total += float(gradient.double().square().sum())
        norm = golden["grad_norms"].get(name)
        if norm is None or ("mask_decoder" in name and name.endswith("k_proj.bias")):
            continue  # the true gradient of k_proj.bias is 0: softmax ignores a constant
        if norm == 0:
            report.add(case, f"gradient norm of {name}, which is 0", gradient.norm(), 0)
        else:
            worst_norm = max(worst_norm, abs(float(gradient.double().norm()) / norm - 1))
        stored = training.tensors.get(f"{case}/grad/{name}")
        if stored is not None:
            stride = 1 if gradient.numel() <= 20000 else gradient.numel() // 8192
            ours = gradient if stride == 1 else gradient.flatten()[::stride][: stored.numel()]
            distance = rms(ours.reshape(stored.shape), stored) / max(rms(stored, torch.zeros_like(stored)), 1e-30)
            report.add(case, f"gradient of {name} relative rms", distance, GRADIENT_RELATIVE_RMS)
    report.add(case, "largest relative difference of a gradient norm", worst_norm, GRADIENT_NORM_RELATIVE)
    report.add(
        case, "total gradient norm relative", abs(total**0.5 / golden["total_grad_norm"] - 1), GRADIENT_NORM_RELATIVE
    )
    for short, name in (("embed_tokens", "model.embed_tokens.weight"), ("lm_head", "lm_head.weight")):
        stored = training.tensors.get(f"{case}/grad_rows/{short}")
        if stored is not None:
            ours = training.trainable[f"base_model.model.{name}"].grad[training.results["grad_rows"]]
            distance = rms(ours, stored) / rms(stored, torch.zeros_like(stored))
            report.add(case, f"gradient rows of {short} relative rms", distance, GRADIENT_RELATIVE_RMS)


def check_adamw(report: Report, training: Training, name: str) -> None:
    golden, case = training.results[name], next(iter(training.batches))
    start = {key: p.detach().clone() for key, p in training.trainable.items()}
    optimizer = torch.optim.AdamW(training.trainable.values(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step, stored in enumerate(golden["steps"]):
        outputs = training.backward(case)
        training.check_losses(report, f"{name}/step{step}", outputs, stored, ADAMW_RELATIVE)
        if "lr" not in stored:
            break  # the last entry is the loss after the last step
        if "clip" in name:
            torch.nn.utils.clip_grad_norm_(training.trainable.values(), 1.0)
        optimizer.param_groups[0]["lr"] = stored["lr"]
        optimizer.step()
    for key, norm in golden["weight_norms_after"].items():
        ours = float(training.trainable[key].detach().double().norm())
        report.add(name, f"norm of {key} relative", abs(ours / norm - 1), ADAMW_RELATIVE)
    with torch.no_grad():
        for key, parameter in training.trainable.items():
            parameter.copy_(start[key])


def check_train(report: Report, golden: Golden, parts: set[str]) -> None:
    training = Training(golden)
    if "train" in parts:
        for case in training.batches:
            check_gradients(report, training, case)
    if "adamw" in parts:
        for name in training.results:
            if name.startswith("adamw") and not name.endswith("one_thread"):
                check_adamw(report, training, name)
    stored = training.results.get("T1_lora_r0")
    if "train" in parts and stored is not None:
        training = Training(golden, lora=False)
        outputs = training.backward(next(iter(training.batches)))
        training.check_losses(report, "T1_lora_r0", outputs, stored, LOSS_RELATIVE)
        norm = (
            sum(float(p.grad.double().square().sum()) for p in training.trainable.values() if p.grad is not None)
            ** 0.5
        )
        report.add(
            "T1_lora_r0",
            "total gradient norm relative",
            abs(norm / stored["total_grad_norm"] - 1),
            GRADIENT_NORM_RELATIVE,
        )


def check_kept_lora(report: Report, golden: Golden, merged: dict) -> None:
    """LoRA kept as an adapter gives what merged LoRA gives."""
    from peft import PeftModel

    directory = golden.converted(f"gsva_full_r{golden.rank}.bin", "--keep_lora")
    base, processor = golden.load(directory)
    model = PeftModel.from_pretrained(base, directory / "adapter").get_base_model()
    facts, _ = golden.evaluated("grefcoco_val")
    ours = run_image(golden, model, processor, facts["images"][0])
    for name in ("last_hidden_pass1", "last_hidden_pass2"):
        report.close("keep_lora", name, ours[name], merged[name], FEATURE_RMS)
    report.close("keep_lora", "low_res", ours["reeval"]["low_res"], merged["reeval"]["low_res"], MASK_RMS, MERGE_MAX)


def check_reverse(report: Report, golden: Golden) -> None:
    """There and back: the original's files again, key by key and bit by bit."""
    for checkpoint, options in ((f"gsva_full_r{golden.rank}.bin", ["--keep_lora"]), ("gsva_full_r0.bin", [])):
        directory = golden.converted(checkpoint, *options)
        back = golden.work / f"back_{checkpoint}"
        command = [sys.executable, str(ROOT / "convert_checkpoint.py"), "--checkpoint", str(directory), "--reverse"]
        subprocess.run([*command, "--output", str(back)], check=True, stdout=subprocess.DEVNULL)
        ours = torch.load(back, weights_only=True)
        original = torch.load(golden.source / checkpoint, weights_only=True)
        report.same(f"reverse/{checkpoint}", "keys", sorted(ours), sorted(original))
        unequal = sum(not torch.equal(ours[key], original[key]) for key in original if key in ours)
        report.add(f"reverse/{checkpoint}", "tensors that differ", unequal, 0)


def run(root: Path, tokenizer: Path, work: Path, parts: set[str], report: Report) -> None:
    golden = Golden(root, tokenizer, work)
    names = [n for n in ("grefcoco_val", "refcoco_val", "reasonseg_val") if (root / f"eval/{n}.json").exists()]
    model, processor = golden.load(golden.converted(f"gsva_full_r{golden.rank}.bin"))
    if "tokens" in parts:
        check_tokens(report, golden, processor, names)
    if "images" in parts:
        check_images(report, golden, processor, names)
    if parts & {"forward", "metrics"}:
        for name in names:
            results = check_eval(report, golden, model, processor, name, parts)
            if name == "grefcoco_val":
                check_kept_lora(report, golden, results["img0"])
    if "metrics" in parts:
        check_rooms(report, golden, model, processor, names)
    if "variants" in parts:
        check_variant(report, golden, "variant_lora_r0", "gsva_full_r0.bin", "full_r0.bin")
        trained = f"gsva_trainable_r{golden.rank}.bin"
        check_variant(report, golden, "variant_trainable_only", trained, f"trainable_r{golden.rank}.bin")
    if "bf16" in parts:
        check_bf16(report, golden)
    if parts & {"train", "adamw"}:
        check_train(report, golden, parts)
    if "reverse" in parts:
        check_reverse(report, golden)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden_dir", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="LLaMA's tokenizer.model")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--work", type=Path, help="keep the unpacked and converted checkpoints here")
    args = parser.parse_args(argv)
    report = Report(sys.stdout)
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        run(args.golden_dir.resolve(), args.tokenizer.resolve(), work.resolve(), set(args.only), report)
    failed = [row for row in report.rows if not row["ok"]]
    print(f"{len(report.rows)} comparisons, {len(failed)} failed", file=sys.stderr)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
