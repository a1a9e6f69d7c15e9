"""GsvaImageProcessor: one image → the CLIP tensor and the SAM tensor, and masks back to the image's own size."""

import base64
import io
import os
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import httpx
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs


class GsvaImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict, which mypy cannot see
    r"""
    sam_size (`dict[str, int]`): `{"longest_edge": int}`, the side of the square SAM input in pixels.
    sam_image_mean (`list[float]`): mean of the SAM input per channel, in units of 0-255.
    sam_image_std (`list[float]`): standard deviation of the SAM input per channel, in units of 0-255.
    max_image_pixels (`int`): images with more pixels are refused before they are decoded; None leaves it to Pillow.
    """

    sam_size: dict[str, int]
    sam_image_mean: list[float]
    sam_image_std: list[float]
    max_image_pixels: int | None


class GsvaImageProcessor(PilBackend):
    r"""
    Prepares each image twice, with Pillow alone (torchvision is not needed):

    - `pixel_values` (images, 3, height, width), for the vision tower: shortest side resized bicubically, centre crop,
      CLIP's mean and standard deviation, as openai/clip-vit-large-patch14 is configured. The language model never sees
      the margins of an image that is not square (the original's behaviour, which changes published numbers).
    - `sam_pixel_values` (images, 3, longest_edge, longest_edge), for SAM: longest side resized bilinearly, mean and
      standard deviation of segment-anything, zeros right and below.
    - `original_sizes` and `reshaped_input_sizes` (images, 2): (height, width) before and after the SAM resize.

    EXIF orientation is applied, as cv2.imread does in the original. Images may be PIL images, arrays (height, width, 3)
    or (3, height, width), paths, URLs, open files or the bytes of an image's file.

    Raises:
        ValueError: not an image, or one that cannot be decoded, has a side of zero pixels or more than `max_image_pixels`.
    """

    # openai/clip-vit-large-patch14, preprocessor_config.json
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 224}
    crop_size = {"height": 224, "width": 224}
    default_to_square = False
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    # facebookresearch/segment-anything, modeling/sam.py and build_sam.py
    sam_size = {"longest_edge": 1024}
    sam_image_mean = [123.675, 116.28, 103.53]
    sam_image_std = [58.395, 57.12, 57.375]
    # PIL.Image.MAX_IMAGE_PIXELS: a quarter of a gigabyte in RGB. Pillow itself only warns there, and refuses at twice that.
    max_image_pixels = 1024**3 // 4 // 3
    valid_kwargs = GsvaImageProcessorKwargs
    model_input_names = ["pixel_values", "sam_pixel_values", "original_sizes", "reshaped_input_sizes"]

    def _standardize_kwargs(self, sam_size=None, **kwargs) -> dict:
        kwargs = super()._standardize_kwargs(**kwargs)
        if sam_size is not None and not isinstance(sam_size, SizeDict):
            sam_size = SizeDict(**get_size_dict(sam_size, default_to_square=False, param_name="sam_size"))
        kwargs["sam_size"] = sam_size
        return kwargs

    def fetch_images(self, image_url_or_urls, timeout: float | None = None):
        """
        Overrides the parent to open local paths as well, and to name the image that is missing or cannot be decoded.
        `timeout` (seconds) is for URLs.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image, timeout) for image in image_url_or_urls]
        if image_url_or_urls is None:
            raise ValueError("An image is None: give a PIL image, an array, a path or a URL.")
        if isinstance(image_url_or_urls, Mapping) and image_url_or_urls.keys() & {"bytes", "path"}:
            # datasets' image that is not decoded: its bytes, or else the path of its file
            return self.fetch_images(image_url_or_urls.get("bytes") or image_url_or_urls.get("path"), timeout)
        if isinstance(image_url_or_urls, (bytes, bytearray, memoryview)):
            image_url_or_urls = io.BytesIO(image_url_or_urls)
        if isinstance(image_url_or_urls, (str, os.PathLike, Image.Image)) or hasattr(image_url_or_urls, "read"):
            name = getattr(image_url_or_urls, "filename", getattr(image_url_or_urls, "name", image_url_or_urls))
            if isinstance(name, io.BytesIO):
                name = f"{name.getbuffer().nbytes} bytes"
            try:
                if isinstance(image_url_or_urls, Image.Image):
                    image = image_url_or_urls
                elif hasattr(image_url_or_urls, "read"):
                    image = Image.open(image_url_or_urls)
                else:
                    image = self._open(os.fspath(image_url_or_urls), timeout)
                self._check_pixels(image)
                image.load()  # Pillow opens lazily: a truncated file shows only here
                return image
            except Exception as error:
                raise ValueError(
                    f"{str(name)!r} cannot be read as an image ({error}). Give the path or URL of an image that Pillow can "
                    "open."
                ) from error
        if not isinstance(image_url_or_urls, (np.ndarray, torch.Tensor)):
            raise ValueError(
                f"An image of type {type(image_url_or_urls).__name__} is not supported: give a PIL image, an array of "
                "shape (height, width, 3), the bytes of a file, a path or a URL."
            )
        if image_url_or_urls.ndim not in (2, 3, 4):  # 4: a batch
            self._raise_shape(image_url_or_urls)
        return image_url_or_urls[None] if image_url_or_urls.ndim == 2 else image_url_or_urls  # grey: (height, width)

    @staticmethod
    def _open(source: str, timeout: float | None) -> Image.Image:
        """Open a path, a URL or base64 and read only the header (`load_image` would decode all pixels)."""
        if source.startswith(("http://", "https://")):
            return Image.open(
                io.BytesIO(httpx.get(source, follow_redirects=True, timeout=timeout).raise_for_status().content)
            )
        if os.path.isfile(source):
            return Image.open(source)
        try:
            return Image.open(io.BytesIO(base64.b64decode("".join(source.rpartition(",")[2].split()), validate=True)))
        except ValueError:
            raise FileNotFoundError("there is no such file") from None

    def _check_pixels(self, image: Image.Image) -> None:
        if self.max_image_pixels is not None and image.width * image.height > self.max_image_pixels:
            raise ValueError(
                f"it is {image.height} x {image.width} (height x width), more than max_image_pixels="
                f"{self.max_image_pixels} of the image processor; raise that if it is right"
            )

    def process_image(self, image, do_convert_rgb=None, input_data_format=None, **kwargs) -> np.ndarray:
        """
        Return the image as an array (3, height, width). Alpha is dropped, as cv2.imread does in the original, and not
        laid on white; with `do_convert_rgb=False` an array of four channels keeps them for the vision tower.
        """
        if isinstance(image, Image.Image):
            image, input_data_format = np.array(ImageOps.exif_transpose(image).convert("RGB")), "channels_last"
        array = np.asarray(image)
        if input_data_format is None:
            first = array.shape[0] == 3 or array.shape[-1] not in (1, 3, 4)
            input_data_format = "channels_first" if first else "channels_last"
        if input_data_format == "channels_last":
            array = np.moveaxis(array, -1, 0)
        if array.size == 0 or len(array) not in (1, 3, 4):
            self._raise_shape(image)
        if len(array) == 1:
            return np.repeat(array, 3, axis=0)
        return array if do_convert_rgb is False else array[:3]

    def _raise_shape(self, image):
        raise ValueError(
            f"An image has shape {tuple(image.shape)}; give (height, width, 3), (3, height, width) or, grey, (height, "
            "width), and at least one pixel."
        )

    def _preprocess(self, images, sam_size, sam_image_mean, sam_image_std, return_tensors=None, **kwargs):
        # PilBackend makes the vision tower's tensor; SAM's is added.
        features = super()._preprocess(images, return_tensors=None, **kwargs)
        mean = np.asarray(sam_image_mean, dtype=np.float32).reshape(3, 1, 1)
        std = np.asarray(sam_image_std, dtype=np.float32).reshape(3, 1, 1)
        sam_pixel_values, reshaped_input_sizes = [], []
        for image in images:
            image = self.resize_for_sam(image[:3], sam_size.longest_edge)
            height, width = image.shape[-2:]
            padded = np.zeros((3, sam_size.longest_edge, sam_size.longest_edge), dtype=np.float32)
            padded[:, :height, :width] = (image.astype(np.float32) - mean) / std
            sam_pixel_values.append(padded)
            reshaped_input_sizes.append((height, width))
        features["sam_pixel_values"] = sam_pixel_values
        features["original_sizes"] = [image.shape[-2:] for image in images]
        features["reshaped_input_sizes"] = reshaped_input_sizes
        return BatchFeature(data=dict(features), tensor_type=return_tensors)

    def resize_for_sam(self, image: np.ndarray, longest_edge: int) -> np.ndarray:
        """Resize (3, height, width) so that its longest side is `longest_edge`, rounded half up as SAM does."""
        height, width = image.shape[-2:]
        scale = longest_edge / max(height, width)
        size = SizeDict(height=max(int(height * scale + 0.5), 1), width=max(int(width * scale + 0.5), 1))
        if (size.height, size.width) == (height, width):
            return image
        return self.resize(image, size=size, resample=PILImageResampling.BILINEAR)


def upscale_mask_logits(
    mask_logits: torch.Tensor, reshaped_input_size: tuple[int, int], original_size: tuple[int, int], input_size: int
) -> torch.Tensor:
    """
    Resize SAM's low-resolution logits to the image: bilinear to the padded square, cut to the part that held the image,
    bilinear to the image's own size (segment-anything, modeling/sam.py: postprocess_masks). Every mask takes this way.

    Args:
        mask_logits: (slots, height, width) of one image.
        reshaped_input_size: (height, width) of the image inside SAM's input.
        original_size: (height, width) of the image.
        input_size: side of SAM's square input in pixels.

    Returns:
        (slots, original height, original width), in float32.
    """
    height, width = (int(side) for side in reshaped_input_size)
    logits = F.interpolate(
        mask_logits[:, None].float(), (input_size, input_size), mode="bilinear", align_corners=False
    )
    logits = logits[..., :height, :width]
    return F.interpolate(logits, tuple(int(side) for side in original_size), mode="bilinear", align_corners=False)[
        :, 0
    ]


__all__ = ["GsvaImageProcessor", "upscale_mask_logits"]
