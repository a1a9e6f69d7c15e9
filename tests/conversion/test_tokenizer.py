"""The rebuilt tokenizer against sentencepiece."""

import json
import re
import shutil

import pytest
import torch
from conversions import load, peft_names, run, sample_inputs, write_form
from tiny_sentencepiece import TEXT

from conversion import build_llama_tokenizer
from convert_checkpoint import main


def legacy_ids(pieces, text: str, added: dict[str, int]) -> list[int]:
    """What the slow, legacy tokenizer does: cut at added tokens, encode every piece of text on its own."""
    known = {"<unk>": 0, "<s>": 1, "</s>": 2} | added
    parts = re.split("(" + "|".join(map(re.escape, sorted(known, key=len, reverse=True))) + ")", text)
    return [1] + [i for part in parts if part for i in ([known[part]] if part in known else pieces.encode(part))]


PROMPTS = ["Sure,the man:[SEG], a unicorn:[REJ].", "USER: <im_start><image><im_end>\n What are  two dogs in this image?</s>USER:",
           "", " leading and trailing ", "[SEG][REJ] [SEG]", "caf\u00e9 \u7532\u9aa8 \U0001f600", "<s>again"]  # fmt: skip


@pytest.mark.parametrize("base", [{}, {"[PAD]": 320, "<im_patch>": 321, "<im_start>": 322, "<im_end>": 323}])
def test_ids_are_the_legacy_tokenizer_s(base, sentencepiece_model, tmp_path):
    import sentencepiece
    from transformers import AutoTokenizer

    (tmp_path / "base").mkdir()
    (tmp_path / "base/tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    (tmp_path / "base/added_tokens.json").write_text(json.dumps(base))
    tokenizer = build_llama_tokenizer(tmp_path / "base")
    first = 320 + len(base)
    added = base | {"[SEG]": first, "[REJ]": first + 1}
    if not base:
        added |= {"<im_start>": 322, "<im_end>": 323}
    added["<image>"] = 320 + len(added)
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in added} == added
    tokenizer.save_pretrained(tmp_path / "saved")
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    for text in PROMPTS + TEXT[:3]:
        wanted = legacy_ids(pieces, text, added)
        assert tokenizer(text).input_ids == wanted
        assert reloaded(text).input_ids == wanted
    assert (reloaded.pad_token, reloaded.padding_side, reloaded.bos_token_id, reloaded.eos_token_id) == (
        "<unk>",
        "right",
        1,
        2,
    )


@pytest.mark.parametrize("change, message", [
    ({"legacy": False}, "bare"),
    ({"tokenizer_class": "PreTrainedTokenizerFast"}, "PreTrainedTokenizerFast"),
    ({"add_eos_token": True}, "add_eos_token"),
])  # fmt: skip
def test_tokenizers_of_another_kind_are_refused(change, message, sentencepiece_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **change}))
    with pytest.raises(ValueError, match="legacy LLaMA") as error:
        build_llama_tokenizer(tmp_path)
    assert message in str(error.value)


def test_models_of_another_kind_are_refused(tmp_path):
    import sentencepiece

    for name, options in {"unigram": {"model_type": "unigram", "vocab_size": 285}, "nfkc": {"model_type": "bpe",
                          "vocab_size": 320, "normalization_rule_name": "nmt_nfkc"}}.items():  # fmt: skip
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT), model_prefix=str(tmp_path / name),
                                                 byte_fallback=True, minloglevel=2, **options)  # fmt: skip
        with pytest.raises(ValueError, match="not a LLaMA sentencepiece model"):
            build_llama_tokenizer(tmp_path / f"{name}.model")
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        build_llama_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(FileNotFoundError, match="sentencepiece model of LLaMA"):
        build_llama_tokenizer(tmp_path / "nowhere.model")


def test_added_tokens_with_gaps_are_refused(sentencepiece_model):
    with pytest.raises(ValueError, match="gaps"):
        build_llama_tokenizer(sentencepiece_model, added_tokens={"<extra>": 330})


def test_a_base_that_has_tokens_of_its_own_shifts_the_slots(original, tmp_path):
    """LLaVA's later bases bring [PAD] and <im_patch>: ids come from the tokenizer, one row each."""
    base = tmp_path / "base"
    shutil.copytree(original / "llava", base)
    (base / "added_tokens.json").write_text(json.dumps({"<im_patch>": 321, "[PAD]": 320}))
    state = peft_names(original)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = state[f"base_model.model.{key}"]
        state[f"base_model.model.{key}"] = torch.cat([rows[:320], torch.zeros(2, 32), rows[320:]])
    torch.save(state, tmp_path / "gsva.bin")
    main(["--checkpoint", str(tmp_path / "gsva.bin"), "--output", str(tmp_path / "out"), "--llava", str(base), "--clip",
          str(original / "clip")])  # fmt: skip
    run(original, write_form("peft 0.4 names", original, original), tmp_path / "plain")
    model, processor = load(tmp_path / "out")
    assert (model.config.seg_token_id, model.config.rej_token_id, model.config.image_token_id) == (322, 323, 326)
    assert model.lm_head.weight.shape == (326, 32)
    inputs = sample_inputs(processor)
    plain, plain_processor = load(tmp_path / "plain")
    wanted = plain.segment(**sample_inputs(plain_processor))
    torch.testing.assert_close(model.segment(**inputs).scores[0], wanted.scores[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(SystemExit, match="326 rows.*gives 324"):
        run(original, tmp_path / "gsva.bin", tmp_path / "refused")
