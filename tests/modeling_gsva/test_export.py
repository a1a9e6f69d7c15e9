"""The ONNX files, run by onnxruntime, give the outputs of the model."""

import contextlib
import copy
import io
from pathlib import Path

import numpy as np
import pytest
import tiny_bases as bases
import torch
from paths import BASE as TRAINED

from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor, export_gsva

onnxruntime = pytest.importorskip("onnxruntime")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # float32 rounding; logits are up to some tens


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The command of the documentation: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("onnx")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        export_gsva.main([str(TRAINED), str(folder / "parts")])
    return folder / "parts", printed.getvalue()


@pytest.fixture(scope="module")
def trained():
    return GsvaForConditionalGeneration.from_pretrained(TRAINED, dtype=torch.float32)


def run(folder, name, **inputs):
    return onnxruntime.InferenceSession(folder / f"{name}.onnx").run(None, inputs)


def test_the_command_writes_three_checked_files(exported):
    folder, printed = exported
    names = {f"{name}.onnx" for name in ("image_encoder", "mask_decoder", "vision_encoder")}
    assert {path.name for path in folder.iterdir()} == names | {f"{name}.data" for name in names}
    for line in printed.splitlines()[-3:]:
        file, _, difference = line.partition("  relative difference to torch ")
        assert Path(file).name in names and 0 < float(difference) < 1e-5


def test_inputs_and_outputs_have_names_and_open_sizes(exported, trained):
    session = onnxruntime.InferenceSession(exported[0] / "mask_decoder.onnx")
    shapes = {value.name: value.shape for value in [*session.get_inputs(), *session.get_outputs()]}
    hidden, vision = trained.config.text_config.hidden_size, trained.config.sam_config.vision_config
    side = vision.image_size // vision.patch_size
    assert shapes == {
        "slot_states": ["slots", hidden],
        "sam_embeddings": ["images", vision.output_channels, side, side],
        "slot_images": ["slots"],
        "mask_logits": ["slots", 4 * side, 4 * side],
        "iou_scores": ["slots"],
    }


def test_pictures_and_masks_without_torch(exported, trained, make_picture):
    """What a server does: onnxruntime encodes the pictures, the language model answers, onnxruntime makes the masks."""
    folder, processor = exported[0], GsvaProcessor.from_pretrained(TRAINED)
    pictures, expressions = [make_picture(0), make_picture(1, 20, 50)], [["the red circle", "all stars"], ["a dog"]]
    inputs = processor(images=pictures, expressions=expressions, return_tensors="pt")
    (embeddings,) = run(folder, "image_encoder", sam_pixel_values=inputs["sam_pixel_values"].numpy())
    (features,) = run(folder, "vision_encoder", pixel_values=inputs["pixel_values"].numpy())
    wanted = trained.segment(**inputs)
    calls = []
    trained.mask_projector.register_forward_hook(lambda module, states, output: calls.append(states[0]))
    trained.segment(
        **{name: value for name, value in inputs.items() if "pixel_values" not in name},
        vision_features=torch.from_numpy(features),
        sam_embeddings=torch.from_numpy(embeddings),
    )
    states = torch.cat(calls).numpy()
    kept = ~torch.cat(wanted.is_rejected).numpy()
    slot_images = np.array([0, 0, 1])[kept]
    masks, iou = run(folder, "mask_decoder", slot_states=states, sam_embeddings=embeddings, slot_images=slot_images)
    np.testing.assert_allclose(masks, torch.cat(wanted.mask_logits).numpy()[kept], **TOLERANCE)
    np.testing.assert_allclose(iou, torch.cat(wanted.iou_scores).numpy()[kept], **TOLERANCE)


def test_a_file_of_other_weights_is_noticed(exported, trained):
    with torch.no_grad():
        trained.sam.mask_decoder.iou_token.weight.add_(0.1)
        with pytest.raises(ValueError, match=r"mask_decoder\.onnx gives other mask_logits than the model"):
            export_gsva._difference(trained, exported[0] / "mask_decoder.onnx", "mask_decoder")


def test_other_precisions_are_refused_and_nothing_is_left_half_written(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"bfloat16.*dtype=torch\.float32"):
        export_gsva.export_onnx(copy.deepcopy(model).bfloat16(), tmp_path)

    def killed(program, f, **options):
        f.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.onnx, "export", killed)
    with pytest.raises(KeyboardInterrupt):
        export_gsva.export_onnx(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_other_bases_and_mask_models_are_refused_by_name(kind, tmp_path):
    model = bases.make_gsva("llava", bases.mask_config(kind))
    message = "Only a GSVA over LLaVA v1 with the masks of SAM can be exported to ONNX.* base is of type 'llava'"
    with pytest.raises(ValueError, match=message):
        export_gsva.export_onnx(model, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
