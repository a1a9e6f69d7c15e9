"""Make tests/fixtures/golden_model from a folder with the layout of golden_model.

    python tests/tools/make_parity_fixture.py GOLDEN_DIR

The fixture holds bit-exact copies of: the weights of CLIP, projector, LLaMA, LoRA, mask projector and SAM's encoders; the rows
of embedding and language head for the tokens of its images (with new token ids, see `token_ids`); three evaluated images with
their ids, hashes and golden tensors; and every conversation of the training batches with its supervised text. It leaves out
SAM's mask decoder, whose 4 million 16-bit weights take 8 MB, and LLaMA's sentencepiece model, which may not be distributed.
tests/test_parity.py says what replaces them.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from parity import rms
from paths import FIXTURES
from safetensors.torch import load_file, save_file
from tiny_sentencepiece import VOCAB_SIZE

TARGET = FIXTURES / "golden_model"
# Pictures: nine slots of which the second is the first [REJ] (two different passes); no target at all; ReasonSeg.
CASES = [("grefcoco_val", 1), ("grefcoco_val", 3), ("reasonseg_val", 0)]
TENSORS = ("clip_selected", "clip_projected", "sam_embed_strided", "sam_embed_chan_mean", "sam_embed_chan_std",
           "last_hidden_pass1", "last_hidden_pass2", "pred_embeddings")  # fmt: skip
EVERY = {"clip_selected": 8, "clip_projected": 8, "last_hidden_pass1": 4, "last_hidden_pass2": 4}  # rows kept
# How far the original's bf16 is from its own fp32 is kept as one number for each of these.
BF16_TENSORS = ("clip_projected", "sam_embed_strided", "last_hidden_pass1", "last_hidden_pass2", "pred_embeddings")
PREFIX = "base_model.model."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden_dir", type=Path)
    root = parser.parse_args().golden_dir
    spec = json.loads((root / "weights/model_spec.json").read_text())
    weights, packed = (
        load_file(root / "weights/packed.safetensors"),
        json.loads((root / "weights/packed.json").read_text()),
    )
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir(parents=True)

    values, cases, used = {}, [], set()
    for name, number in CASES:
        facts, tensors = (
            json.loads((root / f"eval/{name}.json").read_text()),
            load_file(root / f"eval/{name}.safetensors"),
        )
        record, key = facts["images"][number], f"img{len(cases)}"
        shutil.copyfile(root / "data" / record["image_file"], TARGET / f"{key}.jpg")
        used |= set(tensors[f"img{number}/input_ids"][0].tolist())
        for part in ("input_ids", "labels"):
            values[f"{key}/{part}"] = tensors[f"img{number}/{part}"]
        for mode in ("no_reeval", "reeval"):
            used |= {decision["argmax_id"] for decision in record.get(mode, {}).get("decision", [])}
            for tensor in TENSORS:
                if (stored := tensors.get(f"img{number}/{mode}/{tensor}")) is not None:
                    values[f"{key}/{mode}/{tensor}"] = stored[:: EVERY.get(tensor, 1)].clone()
        cases.append({"name": f"{name}/img{number}", **record})
    bf16, bf16_rms = load_file(root / "eval/variant_bf16.safetensors"), {}
    for tensor in BF16_TENSORS:  # of the first image, in the rows that the fixture keeps
        exact = values.get(f"img0/reeval/{tensor}", values.get(f"img0/no_reeval/{tensor}"))
        bf16_rms[tensor] = rms(bf16[f"img{CASES[0][1]}/reeval/{tensor}"][:: EVERY.get(tensor, 1)], exact)
    batches = json.loads((root / "train/batches.json").read_text())
    texts = [text for batch in batches.values() for text in batch["conversations"]] + [
        case["conversation"] for case in cases
    ]

    # Tokens: the four added ones after a vocabulary of VOCAB_SIZE, <unk>, <s>, </s> first, the others in between.
    added = [spec["seg_token_idx"], spec["rej_token_idx"]]
    added += [i for i in range(spec["vocab_size"]) if i >= spec["vocab_size"] - 2]
    plain = [0, 1, 2, *sorted(used - {0, 1, 2, -200, *added})]
    assert len(plain) <= VOCAB_SIZE, f"{len(plain)} tokens are used; keep fewer pictures or raise VOCAB_SIZE"
    token_ids = {old: new for new, old in enumerate(plain)} | {old: VOCAB_SIZE + n for n, old in enumerate(added)}

    state, exponents = {}, {}
    for key, entry in packed["tensors"].items():
        if key.startswith("BASE:") or "mask_decoder" in key:
            continue
        if key.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = weights[key].double() * 2.0 ** -entry["exponent"]
            for row, exponent in entry.get("rows", {}).items():
                rows[int(row)] = weights[f"{key}#row{row}"].double() * 2.0**-exponent
            small = torch.zeros(VOCAB_SIZE + 4, rows.shape[1])
            small[list(token_ids.values())] = rows[list(token_ids)].float()
            state[key] = small
        else:
            state[key], exponents[key] = weights[key], entry["exponent"]
    save_file(state, TARGET / "weights.safetensors")
    save_file(values, TARGET / "values.safetensors")
    configs = {
        name: json.loads((root / f"weights/base_config/{name}/config.json").read_text())
        for name in ("llava", "clip-tiny")
    }
    facts = {"spec": spec, "exponents": exponents, "token_ids": {str(old): new for old, new in token_ids.items()},
             "configs": configs, "cases": cases, "conversations": sorted(set(texts)), "bf16_rms": bf16_rms}  # fmt: skip
    (TARGET / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    size = sum(path.stat().st_size for path in TARGET.iterdir())
    print(f"wrote {TARGET}: {size / 1e6:.1f} MB, {len(token_ids)} tokens")


if __name__ == "__main__":
    main()
