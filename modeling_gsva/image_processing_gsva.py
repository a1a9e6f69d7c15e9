"""Images → the mask model's tensor, with or without CLIP's beside it; masks back to the image's own size."""

import base64
import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import httpx
from PIL import Image, ImageOps
from transformers import PreTrainedConfig
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs

# facebookresearch/segment-anything, modeling/sam.py; SAM 2 has the same (sam2/utils/transforms.py: ImageNet's, times 255).
SAM_MEAN, SAM_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
# Whether a type of mask model takes images stretched to its square input, or with their ratio and padded; its mean and its
# standard deviation per channel, in units of 0-255. This is the one place where a mask model's images are decided.
# SAM 3: transformers, models/sam3/image_processing_sam3.py.
SAM_3 = [255 * value for value in IMAGENET_STANDARD_MEAN], [255 * value for value in IMAGENET_STANDARD_STD]
SAM_PREPARATIONS: dict[str, tuple[bool, list[float], list[float]]] = {
    "sam": (False, SAM_MEAN, SAM_STD),
    "sam_hq": (False, SAM_MEAN, SAM_STD),
    "sam2": (True, SAM_MEAN, SAM_STD),
    "sam3_tracker": (True, *SAM_3),
}


def mask_input_size(sam_config: PreTrainedConfig) -> int:
    """
    Return the side of a mask model's square input in pixels.

    Raises:
        ValueError: the input is not square.
    """
    size = getattr(sam_config.vision_config, "image_size", None)
    size = sam_config.prompt_encoder_config.image_size if size is None else size
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(
            f"The mask model's input is {size} (height, width); GSVA takes mask models with square inputs."
        )
    return sides.pop()


def sam_preparation(sam_config: PreTrainedConfig) -> dict[str, Any]:
    """
    Return the fields of an image processor that say how a mask model's images are prepared, by the model's type.

    Raises:
        ValueError: a type of which that is not known.
    """
    kind, side = sam_config.model_type, mask_input_size(sam_config)
    if kind not in SAM_PREPARATIONS:
        raise ValueError(
            f"How images are prepared for a mask model of type {kind!r} is not known; take one of "
            f"{', '.join(SAM_PREPARATIONS)}."
        )
    is_stretched, mean, std = SAM_PREPARATIONS[kind]
    size = {"height": side, "width": side} if is_stretched else {"longest_edge": side}
    return {"sam_size": size, "sam_image_mean": list(mean), "sam_image_std": list(std)}


class GsvaImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict, which mypy cannot see
    r"""
    sam_size (`dict[str, int]`): the square SAM input in pixels and how an image gets into it. `{"longest_edge": side}`: with
        its ratio, zeros right and below. `{"height": side, "width": side}`: stretched to the whole square.
    sam_image_mean (`list[float]`): mean of the SAM input per channel, in units of 0-255.
    sam_image_std (`list[float]`): standard deviation of the SAM input per channel, in units of 0-255.
    max_image_pixels (`int`): images with more pixels are refused before they are decoded; None leaves it to Pillow.
    """

    sam_size: dict[str, int]
    sam_image_mean: list[float]
    sam_image_std: list[float]
    max_image_pixels: int | None


class GsvaSamImageProcessor(PilBackend):
    r"""
    Prepares images for the mask model alone, with Pillow (torchvision is not needed):

    - `sam_pixel_values` (images, 3, side, side): for SAM and SAM-HQ the longest side resized bilinearly and zeros right and
      below, for SAM 2 and SAM 3's tracker both sides resized bilinearly to the square whatever the image's ratio; mean and
      standard deviation of the model. Pillow resizes bytes to bytes.
    - `original_sizes` and `reshaped_input_sizes` (images, 2): (height, width) before and after that resize.

    EXIF orientation is applied, as cv2.imread does in the original. Images may be PIL images, arrays or tensors
    (height, width, 3) or (3, height, width), paths, URLs, open files or the bytes of an image file. All are read as
    what they show, with 8 bits per channel: 16-bit values are scaled by their range, floats of 0 to 1 (as
    torchvision's ToTensor gives) by 255, and booleans are black and white. Values of unknown range are refused.

    Raises:
        ValueError: not an image, or one that cannot be decoded, has a side of zero pixels or more than `max_image_pixels`.
    """

    do_convert_rgb = True
    rescale_factor: float | None = None  # bytes are normalized as they are
    sam_size: Any = {"longest_edge": 1024}  # facebookresearch/segment-anything, build_sam.py
    sam_image_mean = SAM_MEAN
    sam_image_std = SAM_STD
    # PIL.Image.MAX_IMAGE_PIXELS: a quarter of a gigabyte in RGB. Pillow itself only warns there, and refuses at twice that.
    max_image_pixels = 1024**3 // 4 // 3
    valid_kwargs = GsvaImageProcessorKwargs
    model_input_names = ["sam_pixel_values", "original_sizes", "reshaped_input_sizes"]

    @classmethod
    def for_config(cls, sam_config: PreTrainedConfig, **fields):
        """
        Return the image processor of a mask model, decided by its type, with further `fields` of the class.

        Raises:
            ValueError: a type of mask model whose images are not known.
        """
        return cls(**{**sam_preparation(sam_config), **fields})

    @property
    def mask_input_size(self) -> int:
        """Side of the mask model's square input in pixels."""
        return self.sam_size.longest_edge or self.sam_size.height

    def _standardize_kwargs(self, sam_size=None, **kwargs) -> dict:
        kwargs = super()._standardize_kwargs(**kwargs)
        if sam_size is not None and not isinstance(sam_size, SizeDict):
            sam_size = SizeDict(**get_size_dict(sam_size, default_to_square=False, param_name="sam_size"))
        if sam_size is not None and not sam_size.longest_edge and (sam_size.height or 0) != sam_size.width:
            raise ValueError(
                f"sam_size={dict(sam_size)} is not a square: give {{'longest_edge': side}} for images with their ratio, or "
                "{'height': side, 'width': side} for images stretched to it."
            )
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
                    image = _open_image(image_url_or_urls)
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
                "shape (height, width, 3), a path, a URL or the bytes of an image file."
            )
        if image_url_or_urls.ndim not in (2, 3, 4):  # 4: a batch
            self._raise_shape(image_url_or_urls)
        return image_url_or_urls[None] if image_url_or_urls.ndim == 2 else image_url_or_urls  # grey: (height, width)

    @staticmethod
    def _open(source: str, timeout: float | None) -> Image.Image:
        """Open a path, a URL or base64 and read only the header (`load_image` would decode all pixels)."""
        if source.startswith(("http://", "https://")):
            return _open_image(
                io.BytesIO(httpx.get(source, follow_redirects=True, timeout=timeout).raise_for_status().content)
            )
        if os.path.isfile(source):
            return _open_image(source)
        try:
            content = base64.b64decode("".join(source.rpartition(",")[2].split()), validate=True)
        except ValueError:
            raise FileNotFoundError("there is no such file") from None
        return _open_image(io.BytesIO(content))

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
            image, input_data_format = np.array(upright_rgb(image)), "channels_last"
        array = to_bytes(image)
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

    def preprocess(self, images, *args, **kwargs):
        do_rescale = kwargs.get("do_rescale")
        if (self.do_rescale if do_rescale is None else do_rescale) is False and _are_fractions(images):
            # By do_rescale=False callers say that pixels are between 0 and 1. They become bytes here, so rescale these.
            kwargs["do_rescale"] = True
        return super().preprocess(images, *args, **kwargs)

    def read_images(self, images) -> list[Image.Image]:
        """Return one image or several, in any form, as RGB images that are upright: other image processors can take them."""
        arrays = self._prepare_image_like_inputs(images, do_convert_rgb=True)
        return [Image.fromarray(np.ascontiguousarray(np.moveaxis(array, 0, -1))) for array in arrays]

    def _raise_shape(self, image):
        raise ValueError(
            f"An image has shape {tuple(image.shape)}; give (height, width, 3), (3, height, width) or, grey, (height, "
            "width), and at least one pixel."
        )

    def _preprocess(self, images, sam_size, sam_image_mean, sam_image_std, return_tensors=None, **kwargs):
        mean = np.asarray(sam_image_mean, dtype=np.float32).reshape(3, 1, 1)
        std = np.asarray(sam_image_std, dtype=np.float32).reshape(3, 1, 1)
        side = sam_size.longest_edge or sam_size.height
        sam_pixel_values, reshaped_input_sizes = [], []
        for image in images:
            image = image[:3]
            if sam_size.longest_edge:
                image = self.resize_for_sam(image, side)
            elif image.shape[-2:] != (side, side):
                image = self.resize(image, size=sam_size, resample=PILImageResampling.BILINEAR)
            height, width = image.shape[-2:]
            padded = np.zeros((3, side, side), dtype=np.float32)
            padded[:, :height, :width] = (image.astype(np.float32) - mean) / std
            sam_pixel_values.append(padded)
            reshaped_input_sizes.append((height, width))
        features = {
            "sam_pixel_values": sam_pixel_values,
            "original_sizes": [image.shape[-2:] for image in images],
            "reshaped_input_sizes": reshaped_input_sizes,
        }
        return BatchFeature(data=features, tensor_type=return_tensors)

    def resize_for_sam(self, image: np.ndarray, longest_edge: int) -> np.ndarray:
        """Resize (3, height, width) so that its longest side is `longest_edge`, rounded half up as SAM does."""
        height, width = image.shape[-2:]
        scale = longest_edge / max(height, width)
        size = SizeDict(height=max(int(height * scale + 0.5), 1), width=max(int(width * scale + 0.5), 1))
        if (size.height, size.width) == (height, width):
            return image
        return self.resize(image, size=size, resample=PILImageResampling.BILINEAR)


class GsvaImageProcessor(GsvaSamImageProcessor):
    r"""
    Prepares each image for a mask model as [`GsvaSamImageProcessor`] does, and for LLaVA v1's vision tower:
    `pixel_values` (images, 3, height, width), shortest side resized bicubically, centre crop, CLIP's mean and standard
    deviation, as openai/clip-vit-large-patch14 is configured. The language model never sees the margins of an image that is
    not square (the original's behaviour, which changes published numbers).
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
    rescale_factor = 1 / 255
    do_normalize = True
    model_input_names = ["pixel_values", *GsvaSamImageProcessor.model_input_names]

    def _preprocess(self, images, sam_size, sam_image_mean, sam_image_std, return_tensors=None, **kwargs):
        features = PilBackend._preprocess(self, images, return_tensors=None, **kwargs)
        features.update(super()._preprocess(images, sam_size, sam_image_mean, sam_image_std))
        return BatchFeature(data=dict(features), tensor_type=return_tensors)


def upright_rgb(image: Image.Image) -> Image.Image:
    """
    Return a PIL image as it is shown: upright by its EXIF orientation, as RGB with 8 bits per channel. Alpha is dropped,
    and 16-bit grey is scaled by its range, which Pillow itself would clip. `data_scripts.images.upright_rgb` has the same
    rules, since this file is copied without it; a test holds the two equal.

    Raises:
        ValueError: the range of its pixels is not known (32 bits, floating point), or Pillow cannot convert its colours.
    """
    is_ppm = image.format == "PPM"  # whose "I" Pillow has scaled to 16 bits
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and is_ppm):
        return Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8)).convert("RGB")  # 65535 = 255 x 257
    if image.mode in ("I", "F"):
        low, high = np.asarray(image).min(), np.asarray(image).max()
        if image.mode == "F" or not 0 <= low <= high <= 255:
            raise ValueError(
                f"its pixels are {'floating point' if image.mode == 'F' else '32-bit'} numbers from {low} to {high}, whose "
                f"range is not known; save it with 8 bits per channel"
            )
        return Image.fromarray(np.asarray(image).astype(np.uint8)).convert("RGB")
    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    try:
        return image.convert("RGB")
    except ValueError:
        raise ValueError(f"its pixels are {image.mode}, which Pillow does not convert; save it as RGB") from None


def to_bytes(image) -> np.ndarray:
    """
    Return an array or tensor of pixels as uint8 of 0 to 255: booleans as black and white, uint16 scaled by its range,
    floats of 0 to 1 scaled by 255, other numbers of 0 to 255 as they are.

    Raises:
        ValueError: values that are not real numbers, are below 0 or above 255, or NaN.
    """
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = image.float() if image.dtype == torch.bfloat16 else image
    array = np.asarray(image)
    if array.dtype.kind not in "buif":
        raise ValueError(
            f"The pixels of an image are {array.dtype}, not numbers: give bytes of 0 to 255 or floats of 0 to 1."
        )
    if array.dtype == np.uint8 or not array.size:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16:
        return (array / 257 + 0.5).astype(np.uint8)
    low, high = array.min(), array.max()
    if not 0 <= low <= high <= 255:  # true for NaN as well
        raise ValueError(
            f"The pixels of an image are {array.dtype} from {low} to {high}: give bytes of 0 to 255, floats of 0 to 1, or "
            f"uint16, before they are normalized."
        )
    scale = 255 if array.dtype.kind == "f" and high <= 1 else 1
    return (array.astype(np.float64) * scale + 0.5).astype(np.uint8)


def _are_fractions(images) -> bool:
    """Return whether images are floats of 0 to 1."""
    if isinstance(images, (list, tuple)):
        return any(map(_are_fractions, images))
    if isinstance(images, torch.Tensor):
        return images.is_floating_point() and images.numel() > 0 and bool(images.max() <= 1)
    return isinstance(images, np.ndarray) and images.dtype.kind == "f" and images.size > 0 and bool(images.max() <= 1)


def _open_image(source) -> Image.Image:
    """Open an image file without decoding its pixels. Raises ValueError for HEIC, which Pillow alone cannot open."""
    try:
        return Image.open(source)
    except Image.UnidentifiedImageError:
        if isinstance(source, io.IOBase):
            source.seek(0)
            header = source.read(12)
        else:
            with open(source, "rb") as file:
                header = file.read(12)
        # brands of HEIC in the header of its container (ISO/IEC 23008-12)
        if header[4:8] == b"ftyp" and header[8:12] in (
            b"heic",
            b"heix",
            b"hevc",
            b"hevx",
            b"heim",
            b"heis",
            b"mif1",
            b"msf1",
        ):
            raise ValueError(
                "it is HEIC, which Pillow alone does not open: convert it to JPEG or PNG, or install pillow-heif and call "
                "pillow_heif.register_heif_opener() first"
            ) from None
        if isinstance(source, io.IOBase):  # Pillow's message would name the object's place in memory
            raise ValueError("these bytes are of no image format that Pillow knows") from None
        raise


def upscale_mask_logits(
    mask_logits: torch.Tensor, reshaped_input_size: tuple[int, int], original_size: tuple[int, int], input_size: int
) -> torch.Tensor:
    """
    Resize SAM's low-resolution logits to the image: bilinear to the padded square, cut to the part that held the image,
    bilinear to the image's own size (segment-anything, modeling/sam.py: postprocess_masks). Every mask takes this way; where
    images are stretched, that part is the whole square.

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


__all__ = ["GsvaImageProcessor", "GsvaSamImageProcessor", "mask_input_size", "sam_preparation", "upscale_mask_logits"]
