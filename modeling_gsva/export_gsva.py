"""
Export the parts of a GSVA that work on images to ONNX: `python -m modeling_gsva.export_gsva MODEL_DIR OUTPUT_DIR`.

A server can then encode images and make masks without torch; the language model, between the two, gives `slot_states`.
Needs `pip install gsva-hf[onnx]`.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .configuration_gsva import GsvaConfig
from .llava_v1_gsva import LlavaV1Config
from .modeling_gsva import GsvaForConditionalGeneration

# Largest accepted difference to torch, relative to the largest output: float32 rounding over some thirty layers.
TOLERANCE = 1e-3


class _Part(nn.Module):
    """A method of the model as a module that `torch.export` takes."""

    def __init__(self, model: nn.Module, method: str):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *inputs: torch.Tensor):
        owner = self.model.model if self.method == "get_vision_features" else self.model
        return getattr(owner, self.method)(*inputs)


def example_inputs(model: GsvaForConditionalGeneration, images: int, slots: int) -> dict[str, dict[str, torch.Tensor]]:
    """Return random inputs for each graph by its name, in the order of its arguments; slots are spread over the images."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    vision, sam = config.vision_config, config.sam_config.vision_config
    side = sam.image_size // sam.patch_size

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(model.device)

    return {
        "vision_encoder": {"pixel_values": random(images, 3, vision.image_size, vision.image_size)},
        "image_encoder": {"sam_pixel_values": random(images, 3, sam.image_size, sam.image_size)},
        "mask_decoder": {
            "slot_states": random(slots, config.text_config.hidden_size),
            "sam_embeddings": random(images, sam.output_channels, side, side),
            "slot_images": torch.arange(slots, device=model.device) % images,
        },
    }


ONNX_GRAPHS = {  # name of the file → (method of the model, names of its outputs)
    "vision_encoder": ("get_vision_features", ("vision_features",)),
    "image_encoder": ("get_sam_embeddings", ("sam_embeddings",)),
    "mask_decoder": ("decode_masks", ("mask_logits", "iou_scores")),
}


def check_types(config: GsvaConfig) -> None:
    """Raise ValueError for a model whose graphs would not be the three that are written, before anything is written."""
    for name, kind, known in (
        ("base", config.vlm_config.model_type, LlavaV1Config.model_type),
        ("mask model", config.sam_config.model_type, "sam"),
    ):
        if kind != known:
            raise ValueError(
                f"Only a GSVA over LLaVA v1 with the masks of SAM can be exported to ONNX: images of a fixed size, one map of each. "
                f"This one's {name} is of type {kind!r}. Use it with torch."
            )


@torch.no_grad()
def export_onnx(model: GsvaForConditionalGeneration, folder: str | Path, check: bool = True) -> dict[str, float]:
    """
    Write `vision_encoder.onnx` (`get_vision_features`), `image_encoder.onnx` (`get_sam_embeddings`) and
    `mask_decoder.onnx` (`decode_masks`) by way of `torch.export`; weights lie beside each as `.onnx.data`. The numbers of
    images and of slots stay open; names and shapes of inputs and outputs are those of the methods.

    Args:
        model: in float32, like the files.
        folder: created if it does not exist. Files are replaced once they are complete.
        check: run every file with onnxruntime, with other numbers of images and slots as well, and compare it with the
            model.

    Returns:
        For each file's name the largest difference to the model, relative to the largest output (0.0 unless `check`).

    Raises:
        ValueError: another base than LLaVA v1 or another mask model than SAM, a part that is not in float32, or a file whose
            outputs differ by more than `TOLERANCE`.
    """
    check_types(model.config)
    parts = (model.model.vision_tower, model.sam, model.mask_projector)
    kinds = {parameter.dtype for part in parts for parameter in part.parameters()}
    if kinds != {torch.float32}:
        raise ValueError(f"The model is in {sorted(map(str, kinds))}; load it with dtype=torch.float32 to export it.")
    folder, model, differences = Path(folder), model.eval(), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, (method, outputs) in ONNX_GRAPHS.items():
        part, inputs = _Part(model, method), example_inputs(model, images=2, slots=3)[name]
        slots, images = torch.export.Dim("slots"), torch.export.Dim("images")
        dynamic = tuple({0: slots if key.startswith("slot_") else images} for key in inputs)
        program = torch.export.export(part, tuple(inputs.values()), dynamic_shapes=(dynamic,))
        # A temporary folder instead of the project's atomic writer: modeling_gsva ships as remote code and imports no
        # other package of the project.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export_") as aside:
            file = Path(aside) / f"{name}.onnx"
            torch.onnx.export(
                program,
                f=file,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=dynamic,  # for their names
                verbose=False,
            )
            differences[name] = _difference(model, file, name) if check else 0.0
            for written in sorted(file.parent.iterdir(), reverse=True):  # the weights first
                written.replace(folder / written.name)
    return differences


def _difference(model: GsvaForConditionalGeneration, file: Path, name: str) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    worst, (method, names) = 0.0, ONNX_GRAPHS[name]
    for images, slots in ((2, 3), (1, 1), (3, 5)):
        inputs = example_inputs(model, images, slots)[name]
        expected = _Part(model, method)(*inputs.values())
        expected = expected if isinstance(expected, tuple) else (expected,)
        outputs = session.run(list(names), {key: value.cpu().numpy() for key, value in inputs.items()})
        for key, value, truth in zip(names, outputs, expected, strict=True):
            truth = truth.cpu().numpy()
            difference = float(np.abs(value - truth).max() / np.abs(truth).max())
            if value.shape != truth.shape or not difference <= TOLERANCE:
                raise ValueError(
                    f"{name}.onnx gives other {key} than the model: shape {value.shape} instead of {truth.shape}, relative "
                    f"difference {difference:.1e}, {TOLERANCE} allowed. Another version of torch or onnxruntime may help."
                )
            worst = max(worst, difference)
    return worst


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m modeling_gsva.export_gsva", description=__doc__)
    parser.add_argument("model", help="directory or Hub id of a GSVA")
    parser.add_argument("output", help="folder for the .onnx files")
    parser.add_argument("--no_check", action="store_true", help="do not run the files with onnxruntime")
    options = parser.parse_args(arguments)
    model = GsvaForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32)
    for name, difference in export_onnx(model, options.output, check=not options.no_check).items():
        note = "" if options.no_check else f"  relative difference to torch {difference:.1e}"
        print(f"{Path(options.output) / name}.onnx{note}")


if __name__ == "__main__":
    main()
