"""Tiny processors of transformers for every family that can be the base of a GSVA, with models over the same vocabulary."""

import importlib.util

import tiny_bases as bases
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration, GsvaProcessor
from modeling_gsva.prompts_gsva import BARE_TEMPLATE

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
WITH_PILLOW = ("llava", "llava_next", "gemma3", "paligemma")
WITH_TORCHVISION = ("llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "lfm2_vl", "qwen3_5")
FAMILIES = (*WITH_PILLOW, *WITH_TORCHVISION)

# Templates in the styles of the real ones: llava-hf (without a token that ends a turn), chatml (Qwen, InternVL), SmolVLM, Gemma.
LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def chatml(image: str) -> str:
    """Return a template that writes `image` for an image."""
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '" + image + "' }}{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN = chatml("<|vision_start|><|image_pad|><|vision_end|>")
TEMPLATES = {
    "llava": LLAVA, "llava_next": LLAVA, "llava_onevision": chatml("<image>"), "qwen2_5_vl": QWEN, "qwen3_vl": QWEN,
    "qwen3_5": QWEN, "internvl": chatml("<IMG_CONTEXT>\n"), "smolvlm": SMOLVLM, "gemma3": GEMMA, "paligemma": BARE_TEMPLATE,
    "lfm2_vl": "{{ bos_token }}" + chatml("<image>"),
}  # fmt: skip
CHAT = ["<|im_start|>", "<|im_end|>"]
# Special tokens by the attribute of the tokenizer that the family's processor reads.
TOKENS = {
    "llava": {"image_token": "<image>"},
    "llava_next": {"image_token": "<image>"},
    "llava_onevision": {"image_token": "<image>", "video_token": "<video>"},
    "qwen2_5_vl": {
        "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    },
    "internvl": {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "smolvlm": {
        "image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    },
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    "paligemma": {"image_token": "<image>"},
    "lfm2_vl": {
        "image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
    },
}  # fmt: skip
TOKENS["qwen3_vl"] = TOKENS["qwen3_5"] = TOKENS["qwen2_5_vl"]
OTHER_TOKENS = {
    "gemma3": ["<start_of_turn>", "<end_of_turn>"],
    "smolvlm": [*CHAT, *(f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3))],
    "lfm2_vl": [*CHAT, *(f"<|img_row_{row}_col_{column}|>" for row in (1, 2, 3) for column in (1, 2, 3))],
    "paligemma": [], "llava": [], "llava_next": [],
}  # fmt: skip


def byte_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that can write any text, with the family's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if family in ("llava", "llava_next", "gemma3"):  # Gemma's template writes it as well
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    ends = {"gemma3": "<end_of_turn>", "smolvlm": "<end_of_utterance>"}
    chats = [] if family in ("llava", "llava_next", "paligemma", "gemma3") else CHAT
    special = {"bos_token": "<s>", "eos_token": ends.get(family, chats[-1] if chats else "</s>"), "pad_token": "<pad>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    more = [*chats, *TOKENS[family].values(), *OTHER_TOKENS.get(family, [])]
    wrapped.add_tokens([AddedToken(token, special=True, normalized=False) for token in more], special_tokens=True)
    for name, token in TOKENS[family].items():
        wrapped._set_model_specific_special_tokens({name: token})
    return wrapped


def image_processor(family: str):
    """Return an image processor of the family's kind for tiny towers."""
    side = {"height": bases.PIXELS, "width": bases.PIXELS}
    small = {"shortest_edge": 14 * 14, "longest_edge": 14 * 14 * 12}
    qwen = {"patch_size": bases.PATCH, "merge_size": 2, "temporal_patch_size": 2, "size": small}
    name, options = {
        "llava": ("CLIPImageProcessorPil", {"size": {"shortest_edge": bases.PIXELS}, "crop_size": side}),
        "llava_next": (
            "LlavaNextImageProcessorPil",
            {"size": {"shortest_edge": bases.PIXELS}, "crop_size": side, "image_grid_pinpoints": bases.PINPOINTS},
        ),
        "llava_onevision": (
            "LlavaOnevisionImageProcessorPil",
            {"size": side, "image_grid_pinpoints": [[28, 28], *bases.PINPOINTS]},
        ),
        "qwen2_5_vl": ("Qwen2VLImageProcessorPil", qwen),
        "qwen3_vl": ("Qwen2VLImageProcessorPil", qwen),
        "qwen3_5": ("Qwen2VLImageProcessorPil", qwen),
        "internvl": (
            "GotOcr2ImageProcessorPil",
            {"size": side, "crop_to_patches": True, "min_patches": 1, "max_patches": 4},
        ),
        "smolvlm": (
            "SmolVLMImageProcessorPil",
            {"size": {"longest_edge": 2 * bases.PIXELS}, "max_image_size": {"longest_edge": bases.PIXELS}},
        ),
        "gemma3": ("Gemma3ImageProcessorPil", {"size": side}),
        "paligemma": ("SiglipImageProcessorPil", {"size": side}),
        "lfm2_vl": (
            "Lfm2VlImageProcessor",
            {
                "encoder_patch_size": bases.PATCH, "downsample_factor": 2, "tile_size": 28, "min_image_tokens": 4,
                "max_image_tokens": 4, "max_num_patches": 16, "max_tiles": 4, "min_tiles": 2,
            },
        ),
    }[family]  # fmt: skip
    made = getattr(transformers, name)(**options)
    if family == "paligemma":
        made.image_seq_length = (bases.PIXELS // bases.PATCH) ** 2
    return made


def base_processor(family: str, tokenizer=None):
    """Return the family's own processor. Those with videos need torchvision."""
    tokenizer = tokenizer or byte_tokenizer(family)
    patches = {
        "patch_size": bases.PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    name, video, options = {
        "llava": ("LlavaProcessor", None, patches),
        "llava_next": ("LlavaNextProcessor", None, patches),
        "llava_onevision": (
            "LlavaOnevisionProcessor",
            "LlavaOnevisionVideoProcessor",
            {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"},
        ),
        "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", {}),
        "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor", {}),
        "qwen3_5": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor", {}),
        "internvl": ("InternVLProcessor", "InternVLVideoProcessor", {"image_seq_length": 4}),
        "smolvlm": ("SmolVLMProcessor", "SmolVLMVideoProcessor", {"image_seq_len": 4}),
        "gemma3": ("Gemma3Processor", None, {"image_seq_length": 4}),
        "paligemma": ("PaliGemmaProcessor", None, {}),
        "lfm2_vl": ("Lfm2VlProcessor", None, {}),
    }[family]
    parts = [image_processor(family), tokenizer]
    if video:
        parts.append(getattr(transformers, video)())
    template = None if family == "paligemma" else TEMPLATES[family]
    return getattr(transformers, name)(*parts, chat_template=template, **options)


def make_processor(family: str, sam: str = "sam", **options) -> GsvaProcessor:
    """Return the processor of a GSVA over the family."""
    sam_config = transformers.AutoConfig.for_model(**{"model_type": sam, **bases.mask_config(sam)})
    if family == "paligemma":
        options.setdefault("chat_template", BARE_TEMPLATE)
    return GsvaProcessor.from_base(base_processor(family), sam_config, **options)


def make_model(family: str, processor: GsvaProcessor, sam: str = "sam", seed: int = 1) -> GsvaForConditionalGeneration:
    """Return a tiny GSVA whose vocabulary is the processor's."""
    config = bases.base_config(family)
    tokenizer, text = processor.tokenizer, config.get_text_config()
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    text.max_position_embeddings = 2048
    config.image_token_id = processor.image_token_id
    for name in ("vision_start_token_id", "vision_end_token_id", "video_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None and hasattr(config, name):
            setattr(config, name, token)
    config = GsvaConfig(
        vlm_config=config.to_dict(), sam_config=bases.mask_config(sam), seg_token_id=processor.seg_token_id,
        rej_token_id=processor.rej_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = bases.randomize(GsvaForConditionalGeneration(config))
    model.tie_weights()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model
