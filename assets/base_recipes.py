"""The bases that `make_tiny_gsva.py` trains: their tokenizers, processors and sizes, and how their parts are called."""

import itertools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers import trainers as tokenizer_trainers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Sam2Config,
    SamConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from data_scripts import shapes
from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration, GsvaImageProcessor, GsvaProcessor
from modeling_gsva.image_processing_gsva import GsvaSamImageProcessor
from modeling_gsva.processing_gsva import ADDED_TOKENS, CHAT_TEMPLATES

# The images of the demo are drawn with seed 0, those of the bases with another one.
IMAGE_SEED = 1
IMAGE_SIDE, PATCH = 64, 8
GRID = IMAGE_SIDE // PATCH
COLOURS, SHAPES, SIZES = list(shapes.COLOURS), list(shapes.SHAPES), list(shapes.RADII)
PROMPTS = {
    "refer": {
        "question": "<image>\nsegment {expressions}.",
        "answer": "{slots}.",
        "slot": "{expression}:{token}",
        "separator": ", ",
        "lower": True,
    }
}


def build_tokenizer(special: list[str], turn: str, bos: str | None = None) -> Tokenizer:
    """
    Return a byte-level BPE tokenizer in which the words of *shapes* are single tokens.

    Args:
        special: the special tokens, which get the first ids.
        turn: an example of the template's words around a question and its answer.
        bos: the special token before each text.
    """
    corpus = []
    for index in range(2000):
        row = shapes.make_row(IMAGE_SEED, "train", index, "vqa")
        corpus += [entry["text"].replace("<image>\n", "\n") for entry in row["conversation"]]
    corpus += [turn] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus,
        tokenizer_trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, special.index(bos))]
        )
    return tokenizer


class AttributePrompts(nn.EmbeddingBag):
    """Prompts of the towers' stage: the sum of the embeddings of an expression's attributes or words."""

    def __init__(self, words: int, width: int):
        super().__init__(words, width, mode="sum")

    def forward(self, prompts: list[list[int]]) -> torch.Tensor:
        """Embed prompts, each a list of numbers of words, as (prompts, width)."""
        offsets = torch.tensor([0, *itertools.accumulate(len(prompt) for prompt in prompts)][:-1])
        return super().forward(torch.tensor([word for prompt in prompts for word in prompt]), offsets)


class LlavaV1Base:
    """`assets/tiny_gsva`: CLIP, LLaMA and SAM, composed as in the paper."""

    output_dir = "assets/tiny_gsva"
    work_dir = "runs/base"
    tower_stages = {"towers": ("vision", "masks")}  # what each stage of the towers trains
    steps = {"towers": 2000, "language": 2300}  # of each stage
    learns_places = False  # whether the towers learn where things are among others
    learns_prompts = False  # whether the language stage also learns the prompts of the towers' stage
    mask_stride = 1  # pixels between those at which the towers' stage compares masks
    generation_config = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_new_tokens": 128}

    def build_processor(self) -> GsvaProcessor:
        """Return the processor."""
        turn = "USER: \nsegment the red circle. ASSISTANT: the red circle:"
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=build_tokenizer(["<pad>", "<s>", "</s>"], turn, bos="<s>"),
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            padding_side="right",
            clean_up_tokenization_spaces=False,
            model_max_length=1024,
        )
        tokenizer.add_tokens(list(ADDED_TOKENS), special_tokens=False)
        image_processor = GsvaImageProcessor(
            size={"shortest_edge": IMAGE_SIDE},
            crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
            sam_size={"longest_edge": IMAGE_SIDE},
        )
        return GsvaProcessor(
            image_processor, tokenizer, patch_size=PATCH, chat_template=CHAT_TEMPLATES["plain"], prompts=PROMPTS
        )

    def build_config(self, processor: GsvaProcessor) -> GsvaConfig:
        """Return the configuration, of about two million parameters."""
        vocab_size = len(processor.tokenizer) - 1  # <image> has no embedding, as in the original
        return GsvaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, image_size=IMAGE_SIDE,
                patch_size=PATCH, projection_dim=96,
            ),
            text_config=LlamaConfig(
                vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=4, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            ),
            sam_config=SamConfig(
                vision_config={
                    "hidden_size": 96, "output_channels": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
                    "image_size": IMAGE_SIDE, "patch_size": PATCH, "window_size": 0, "global_attn_indexes": [0, 1, 2],
                    "num_pos_feats": 32, "mlp_dim": 384, "initializer_range": 0.02,
                },
                prompt_encoder_config={"hidden_size": 64, "image_size": IMAGE_SIDE, "patch_size": PATCH},
                mask_decoder_config={
                    "hidden_size": 64, "mlp_dim": 256, "num_attention_heads": 4, "iou_head_hidden_dim": 64,
                    "layer_norm_eps": 1e-5,
                },
            ),
            image_token_id=processor.image_token_id,
            seg_token_id=processor.seg_token_id,
            rej_token_id=processor.rej_token_id,
            # Do not drop the last of only three layers: they are trained here as one tower.
            vision_feature_layer=-1,
        )  # fmt: skip

    def build_prompts(self, width: int) -> nn.Module:
        """Return the module that makes the prompts of the towers' stage."""
        return AttributePrompts(len(COLOURS) + len(SHAPES) + len(SIZES), width)

    def tower_prompts(self, random: np.random.Generator, things: list[shapes.Thing]):
        """Yield for an image some prompts of the towers' stage, and the things that each names."""
        for _ in range(2):
            thing = things[random.integers(len(things))]
            named = random.random(3) < (0.6, 0.6, 0.25)
            if not named.any():
                named[random.integers(2)] = True
            attributes = [a for a, used in zip((thing.colour, thing.shape, thing.size), named) if used]
            same = [t for t in things if all(a in (t.colour, t.shape, t.size) for a in attributes)]
            yield [(COLOURS + SHAPES + SIZES).index(a) for a in attributes], same

    def build_model(self, config: GsvaConfig) -> GsvaForConditionalGeneration:
        """Return the model with new weights."""
        return GsvaForConditionalGeneration(config)

    def image_preparation(self, config: GsvaConfig, processor: GsvaProcessor | None):
        """Return the function that prepares an image for both towers."""

        def prepare(image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
            tensors = processor.image_processor(image, return_tensors="pt")
            return tensors["pixel_values"][0], tensors["sam_pixel_values"][0]

        return prepare

    def vision_features(self, model: GsvaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
        """Return the vision tower's output before the projector, (images, patches, channels)."""
        return model.model.get_vision_features(pixels)

    def encode(self, processor: GsvaProcessor, conversations: list[list[dict]]) -> list[tuple[list[int], list[int]]]:
        """Return ids and labels of conversations, each about one image."""
        return processor.encode_conversations(conversations)

    def kept_features(self, model: GsvaForConditionalGeneration, features: torch.Tensor) -> dict[str, Any]:
        """Return the argument of the forward pass that carries the output of `vision_features`."""
        return {"vision_features": features}


class WordPrompts(nn.Module):
    """Prompts of the towers' stage that mean more than the sum of their words."""

    def __init__(self, words: int, width: int):
        super().__init__()
        self.words, self.out = AttributePrompts(words, 4 * width), nn.Linear(4 * width, width)

    def forward(self, prompts: list[list[int]]) -> torch.Tensor:
        """Embed prompts, each a list of numbers of words, as (prompts, width)."""
        return self.out(F.gelu(self.words(prompts)))


# A chat template of Qwen's kind (ChatML). It marks what the assistant says, with the end of its turn.
CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}{% generation %}"
    "{{- message['content'] if message['content'] is string else message['content'] | map(attribute='text') | join }}"
    "{{- '<|im_end|>' }}{% endgeneration %}"
    "{%- elif message['content'] is string %}{{- message['content'] + '<|im_end|>' }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{{- '<image>\\n' if part['type'] == 'image' else part['text'] }}{%- endfor %}{{- '<|im_end|>' }}{%- endif %}"
    "{{- '\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


class TodayBase:
    """`assets/tiny_gsva_today`: a SigLIP-like tower and a Qwen3-like language model in transformers' LLaVA, and SAM 2."""

    output_dir = "assets/tiny_gsva_today"
    work_dir = "runs/base_today"
    learns_places = learns_prompts = True
    # Neither needs the other: they may run at the same time (`--stage vision` and `--stage masks`), with one thread each.
    tower_stages = {"vision": ("vision",), "masks": ("masks",)}
    steps = {"vision": 3000, "masks": 1100, "words": 200, "language": 500}
    mask_stride = 2
    generation_config = {"pad_token_id": 0, "eos_token_id": 2, "max_new_tokens": 128}
    sam_side, sam_stride = shapes.PICTURE_SIDE, 16  # the images' own size; the main map is 8 x 8, masks are 32 x 32

    def build_tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer of the vision-language model, of Qwen's kind."""
        turn = "<|im_start|>user\n\nsegment the red circle.<|im_end|>\n<|im_start|>assistant\nthe red circle:"
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=build_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], turn),
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            padding_side="left",
            clean_up_tokenization_spaces=False,
            model_max_length=1024,
        )
        tokenizer.add_tokens([AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
        return tokenizer

    def build_processor(self) -> GsvaProcessor:
        """Return the processor: LLaVA's, as transformers has it, and images for SAM 2 beside it."""
        processor = LlavaProcessor(
            self.image_processor(), self.build_tokenizer(), patch_size=PATCH, vision_feature_select_strategy="full",
            chat_template=CHATML,
        )  # fmt: skip
        return GsvaProcessor.from_base(processor, self.sam_config(), prompts=PROMPTS)

    def image_processor(self) -> SiglipImageProcessorPil:
        """Return SigLIP's preparation."""
        return SiglipImageProcessorPil(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE})

    def vlm_config(self, vocab_size: int, image_token_id: int) -> LlavaConfig:
        """Return the configuration of the vision-language model."""
        return LlavaConfig(
            vision_config=SiglipVisionConfig(
                hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, image_size=IMAGE_SIDE,
                patch_size=PATCH, vision_use_head=False,
            ),
            text_config=Qwen3Config(
                vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True,
                pad_token_id=0, eos_token_id=2,
            ),
            image_token_id=image_token_id, image_token_index=image_token_id, image_seq_length=GRID**2,
            vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True,
        )  # fmt: skip

    def sam_config(self) -> Sam2Config:
        """Return the configuration of the mask model, a Hiera of four stages with SAM 2's decoder of width 64."""
        widths, side = (32, 48, 96, 128), self.sam_side
        return Sam2Config(
            vision_config={
                "backbone_config": {
                    "model_type": "sam2_hiera_det_model", "hidden_size": widths[0], "embed_dim_per_stage": list(widths),
                    "blocks_per_stage": [1, 1, 4, 1], "num_attention_heads_per_stage": [1, 2, 4, 4],
                    "window_size_per_stage": [8, 4, 8, 4], "global_attention_blocks": [3, 4, 5],
                    "image_size": [side, side], "window_positional_embedding_background_size": [8, 8],
                },
                "backbone_channel_list": list(widths[::-1]), "fpn_hidden_size": 64,
                "backbone_feature_sizes": [[side // stride] * 2 for stride in (4, 8, 16)],
            },
            prompt_encoder_config={"hidden_size": 64, "image_size": side, "patch_size": self.sam_stride},
            mask_decoder_config={
                "hidden_size": 64, "mlp_dim": 256, "num_attention_heads": 4, "iou_head_hidden_dim": 64,
                "dynamic_multimask_via_stability": False,
            },
        )  # fmt: skip

    def build_config(self, processor: GsvaProcessor) -> GsvaConfig:
        """Return the configuration, of about two million parameters."""
        return self.config_of(
            len(processor.tokenizer), processor.image_token_id, processor.seg_token_id, processor.rej_token_id
        )

    def config_of(self, vocab_size: int, image_token_id: int, seg_token_id: int, rej_token_id: int) -> GsvaConfig:
        return GsvaConfig(
            vlm_config=self.vlm_config(vocab_size, image_token_id),
            sam_config=self.sam_config(),
            seg_token_id=seg_token_id,
            rej_token_id=rej_token_id,
        )

    # The words of expressions that say which things are meant.
    words = ("all", "shape", *COLOURS, *SHAPES, *SIZES, "leftmost", "rightmost", "top", "bottom")

    def build_prompts(self, width: int) -> nn.Module:
        """Return the module that makes the prompts of the towers' stage."""
        return WordPrompts(2 * len(self.words), width)

    def tower_prompts(self, random: np.random.Generator, things: list[shapes.Thing]):
        """Yield for an image the expressions that have targets, as numbers of words, and their targets."""
        for text, targets in shapes.make_expressions(random, things, 6):
            if targets:
                yield self.words_of(text), targets

    def words_of(self, expression: str) -> list[int]:
        """Return the numbers of an expression's words; those behind "and" have other numbers than those before."""
        numbers, half = [], 0
        for word in expression.split():
            half += word == "and"
            word = word if word in self.words else word.removesuffix("s")
            if word in self.words:
                numbers.append(self.words.index(word) + half * len(self.words))
        return numbers

    def build_model(self, config: GsvaConfig) -> GsvaForConditionalGeneration:
        """
        Return the model with new weights. Hiera's map of positions, zero in a new model, gets sines of several wavelengths:
        from zero the encoder did not learn in time where things are among others.
        """
        model = GsvaForConditionalGeneration(config)
        with torch.no_grad():
            code = model.sam.vision_encoder.backbone.pos_embed  # (1, channels, side, side)
            channels, side = code.shape[1] // 4, code.shape[-1]
            place = (torch.arange(side) + 0.5) / side - 0.5
            waves = torch.pi * place * 2.0 ** (torch.arange(channels) / 2)[:, None]  # (channels, side)
            rows, columns = waves[:, :, None].expand(-1, -1, side), waves[:, None].expand(-1, side, -1)
            code[0, : 4 * channels] = 0.5 * torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()])
        return model

    def image_preparation(self, config: GsvaConfig, processor: GsvaProcessor | None):
        """Return the function that prepares an image for both towers."""
        vision, sam = self.image_processor(), GsvaSamImageProcessor.for_config(config.sam_config)

        def prepare(image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
            return (
                vision(image, return_tensors="pt")["pixel_values"][0],
                sam(image, return_tensors="pt")["sam_pixel_values"][0],
            )

        return prepare

    def vision_features(self, model: GsvaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
        """Return the vision tower's output before the projector, (images, patches, channels)."""
        return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]

    def encode(self, processor: GsvaProcessor, conversations: list[list[dict]]) -> list[tuple[list[int], list[int]]]:
        """Return ids and labels of conversations, each about one image; all images take the same number of placeholders."""
        image = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE))
        return processor.encode_conversations(conversations, images=[image] * len(conversations))

    def kept_features(self, model: GsvaForConditionalGeneration, features: torch.Tensor) -> dict[str, Any]:
        """Return the argument of the forward pass that carries the output of `vision_features`."""
        projected = BaseModelOutputWithPooling(pooler_output=list(model.model.multi_modal_projector(features)))
        return {"mm_encoder_outputs": {"image": projected}}


BASES = {"llava_v1": LlavaV1Base, "today": TodayBase}
