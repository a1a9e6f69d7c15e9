"""The model card holds the facts of the run's files, and no others."""

import json

from huggingface_hub import ModelCard

from trainers.arguments import parse_arguments
from trainers.card import write_card

RECORD = {
    "stage": "after", "protocol": "slots", "protocol_note": "every slot was the model's own choice", "convention": "rela",
    "dataset": "own", "split": "val", "samples": 3, "metrics": {"gIoU": 0.51234, "cIoU": 0.4, "N_acc": None},
    "notes": {"N_acc": "not defined here: no no-target expressions"},
}  # fmt: skip


def arguments(tmp_path, *words):
    return parse_arguments(["--output_dir", str(tmp_path / "pets"), "--use_cpu", "--dataset", "own", *words])


def test_a_card_with_results(tmp_path):
    folder = tmp_path / "pets"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps([RECORD]))
    (folder / "log_history.json").write_text(json.dumps([{"step": 25, "loss": 1.0}, {"step": 50, "loss": 0.5}]))
    (folder / "curves.png").write_bytes(b"")
    (folder / "pictures_after_slots.html").write_text("")
    path = write_card(
        *arguments(
            tmp_path, "--model", "a/base", "--data_dir", "/home/me/secret", "--learning_rate", "2e-4", "--lora_r", "4"
        )
    )
    card = ModelCard.load(path)
    assert card.data.library_name == "transformers" and card.data.license == "other"
    (first, second) = card.data.eval_results
    assert (first.metric_name, first.metric_value, first.dataset_split) == ("gIoU (slots, rela)", 0.51234, "val")
    assert second.metric_name == "cIoU (slots, rela)"  # what is not defined is not claimed
    for said in (
        "| own | val | after | slots | rela | 3 | 0.5123 | 0.4000 | - | - | - | - | - | - |",
        "slots: every slot was the model's own choice.",
        "| Pr@0.9 | malformed |",
        "- N_acc on own val: not defined here: no no-target expressions.",
        "| steps | 50 |",
        "learning rate 0.0002",
        "LoRA, rank 4, alpha 16",
        "![curves](curves.png)",
        "[pictures_after_slots.html](pictures_after_slots.html)",
        "Segment Anything | Apache-2.0",
        "Xia_2024_CVPR",
    ):
        assert said in card.text, said
    assert "/home/me/secret" not in path.read_text()  # a published card names no folder of the machine


def test_a_card_without_results_claims_none_and_states_the_bases_licence(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
    path = write_card(*arguments(tmp_path, "--model", str(tmp_path / "base"), "--train_language_model", "full"))
    card = ModelCard.load(path)
    assert card.data.license == "apache-2.0" and not card.data.eval_results
    assert "Not evaluated." in card.text and "The base's card states `apache-2.0`." in card.text
    assert "| language model | full |" in card.text


def test_a_card_shows_names_as_they_are(tmp_path):
    """Markup in names of data and runs is text: it neither breaks tables nor runs in a page."""
    record = {**RECORD, "dataset": "a|b <script>alert('x')", "protocol_note": "the model's & nobody's"}
    folder = tmp_path / "pets"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps([record]))
    text = write_card(*arguments(tmp_path, "--model", 'a "base"')).read_text()
    assert "| a\\|b &lt;script&gt;alert('x') | val | after |" in text
    assert "- slots: the model's &amp; nobody's." in text
    assert "<script>" not in text.partition("\n---\n")[2]  # the front matter is YAML
    assert text.count("```") % 2 == 0 and "&#" not in text


def test_a_card_names_base_and_mask_model_with_their_licences(tmp_path):
    """As the card of the start states them, or else by their types."""
    folder, start = tmp_path / "pets", tmp_path / "start"
    folder.mkdir()
    start.mkdir()
    config = {"model_type": "gsva", "vlm_config": {"model_type": "qwen3_vl"}, "sam_config": {"model_type": "sam2"}}
    (folder / "config.json").write_text(json.dumps(config))
    text = write_card(*arguments(tmp_path, "--model", str(start))).read_text()
    assert "| base | of the type qwen3_vl, licence not stated |" in text
    assert "| mask model | of the type sam2, licence not stated |" in text
    assert "LLaMA" not in text and "CLIP" not in text
    facts = "| base | Qwen/Qwen3-VL-4B-Instruct (qwen3_vl), licence apache-2.0 |\n| mask model | a/b (sam2), licence mit |\n"
    (start / "README.md").write_text(f"---\nlibrary_name: transformers\n---\n# start\n\n| | |\n| --- | --- |\n{facts}")
    text = write_card(*arguments(tmp_path, "--model", str(start))).read_text()
    assert facts in text and "| part | what, and its licence |" in text
