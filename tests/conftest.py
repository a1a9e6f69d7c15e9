"""Fixtures of all tests: a tiny GSVA with seeded random weights and real code paths, and images drawn by seed."""

import numpy as np
import pytest

CLIP_SIDE, CLIP_PATCH = 32, 8  # 16 placeholders an image
NAMES = ["the circle", "a star", "the ring", "a red thing", "blue"]
SAM_SIDE, SAM_PATCH = 64, 8  # another size than CLIP's, so that mixing them up fails; masks of 32 x 32 logits


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums in one order, and no fight for the machine's cores; a machine without torch has nothing to set."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Skip the tests marked `gpu` or `gpu(2)` where there are not as many CUDA devices."""
    marked = [(item, marker) for item in items if (marker := item.get_closest_marker("gpu"))]
    if marked:
        import torch

        for item, marker in marked:
            needed = marker.args[0] if marker.args else 1
            if torch.cuda.device_count() < needed:
                reason = "needs a CUDA device" if needed == 1 else f"needs {needed} CUDA devices"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def make_tokenizer():
    """A byte-level tokenizer without training: its vocabulary is the 256 bytes, so any text can be written."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from modeling_gsva.processing_gsva import ADDED_TOKENS

    def make():
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: n for n, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            padding_side="right",
            clean_up_tokenization_spaces=False,
        )
        wrapped.add_tokens(list(ADDED_TOKENS), special_tokens=False)
        return wrapped

    return make


@pytest.fixture(scope="session")
def make_processor(make_tokenizer):
    from modeling_gsva import GsvaImageProcessor, GsvaProcessor
    from modeling_gsva.processing_gsva import CHAT_TEMPLATES

    def make(template="plain", **options):
        image_processor = GsvaImageProcessor(
            size={"shortest_edge": CLIP_SIDE},
            crop_size={"height": CLIP_SIDE, "width": CLIP_SIDE},
            sam_size={"longest_edge": SAM_SIDE},
        )
        return GsvaProcessor(
            image_processor, make_tokenizer(), patch_size=CLIP_PATCH, chat_template=CHAT_TEMPLATES[template], **options
        )

    return make


@pytest.fixture(scope="session")
def processor(make_processor):
    return make_processor()


@pytest.fixture(scope="session")
def make_model(processor):
    """Random weights large enough that inputs, slots and pictures give different outputs; `options` go to the config."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, SamConfig

    from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration

    def make(seed=0, **options):
        config = GsvaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=CLIP_SIDE,
                patch_size=CLIP_PATCH, projection_dim=24, initializer_range=0.2,
            ),
            text_config=LlamaConfig(
                vocab_size=len(processor.tokenizer) - 1,  # as in the original, <image> has no row
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
            ),
            sam_config=SamConfig(
                vision_config={
                    "hidden_size": 24, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "image_size": SAM_SIDE, "patch_size": SAM_PATCH, "window_size": 0, "global_attn_indexes": [0, 1],
                    "num_pos_feats": 8, "mlp_dim": 48, "initializer_range": 0.2,
                },
                prompt_encoder_config={"hidden_size": 16, "image_size": SAM_SIDE, "patch_size": SAM_PATCH},
                mask_decoder_config={
                    "hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
                    "layer_norm_eps": 1e-5,
                },
                initializer_range=0.2,
            ),
            image_token_id=processor.image_token_id,
            seg_token_id=processor.seg_token_id,
            rej_token_id=processor.rej_token_id,
            initializer_range=0.2,
            **options,
        )  # fmt: skip
        torch.manual_seed(seed)
        model = GsvaForConditionalGeneration(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:  # biases start at zero, norms at one
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif (
                    "mask_decoder" in name or "mask_projector" in name
                ):  # masks of different slots shall differ visibly
                    parameter.normal_(std=0.5)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def model(make_model):
    """For tests that do not change it."""
    return make_model()


@pytest.fixture(scope="session")
def make_picture():
    from PIL import Image

    def make(seed=0, width=40, height=30):
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))

    return make


@pytest.fixture(scope="session")
def asked(processor, make_picture):
    """Inputs of `segment`: images of different sizes, each with some of NAMES, every other of which is absent."""

    def make(images, expressions, single=False, **options):
        return processor(
            images=[make_picture(n, 40, 30 + n) for n in range(images)],
            expressions=[NAMES[:expressions]] * images,
            no_targets=[[n % 2 == 0 for n in range(expressions)]] * images,
            one_prompt_per_expression=single,
            return_tensors="pt",
            **options,
        )

    return make


@pytest.fixture(scope="session")
def learned(processor, make_picture):
    """A batch of training over the same."""

    def make(images, expressions):
        absent = [n % 2 == 0 for n in range(expressions)]
        talks = [processor.build_conversation(NAMES[:expressions], absent) for _ in range(images)]
        masks = [np.zeros((expressions, 30 + n, 40), np.uint8) for n in range(images)]
        for mask in masks:
            mask[1::2, 5:20, 5:20] = 1
        pictures = [make_picture(n, 40, 30 + n) for n in range(images)]
        return processor(images=pictures, conversations=talks, masks=masks, return_tensors="pt")

    return make


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, make_model, processor):
    """The tiny model and its processor as a saved directory."""
    folder = tmp_path_factory.mktemp("tiny_gsva")
    make_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory):
    from tiny_sentencepiece import train

    return train(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.fixture(scope="session")
def original(sentencepiece_model, tmp_path_factory):
    """A checkpoint of the original's kind with its bases, as files."""
    from original_checkpoint import make_original

    return make_original(tmp_path_factory.mktemp("original"), sentencepiece_model)
