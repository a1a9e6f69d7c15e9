"""ModelTesterMixin, GenerationTesterMixin and ConfigTester of transformers on a tiny GSVA."""

import tempfile
import unittest

import hf_common
import torch
from safetensors.torch import load_file
from tiny_bases import mask_config
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration, GsvaModel
from modeling_gsva.llava_v1_gsva import LlavaV1Config, LlavaV1ForConditionalGeneration

common = hf_common.load("test_modeling_common")
ConfigTester = hf_common.load("test_configuration_common").ConfigTester
GenerationTesterMixin = hf_common.load("generation.test_utils").GenerationTesterMixin

# What the common tests ask a class's name for; a model inside transformers stands there by itself.
modeling_auto.MODEL_MAPPING_NAMES["gsva_llava_v1"] = "GsvaModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["gsva_llava_v1"] = "LlavaV1ForConditionalGeneration"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["gsva"] = "GsvaForConditionalGeneration"

PAD, BOS, EOS, SEG, REJ, IMAGE = range(6)


def draw_text(shape, vocab_size, **kwargs):
    """Random ids, but no `<image>`: the model refuses a placeholder without an image."""
    ids = draw_ids(shape, vocab_size, **kwargs)
    return ids.masked_fill(ids == IMAGE, IMAGE + 1)


draw_ids, common.ids_tensor = common.ids_tensor, draw_text


class GsvaModelTester:
    """Sizes as in tests/conftest.py, but a small vocabulary, in which `<image>` has a row: a common test embeds it."""

    batch_size, seq_length, is_training = (
        7,
        24,
        True,
    )  # 7 as the attention tests take, which else fill up with other rows
    num_hidden_layers, hidden_size, num_attention_heads, vocab_size = 2, 32, 4, 99
    image_size, patch_size, sam_size = 32, 8, 64  # 16 placeholders; masks of 32 x 32 logits

    def __init__(self, parent):
        self.parent = parent
        self.image_seq_length = (self.image_size // self.patch_size) ** 2
        self.sam_pixel_values = common.floats_tensor([self.batch_size, 3, self.sam_size, self.sam_size])

    def get_config(self):
        return GsvaConfig(
            vision_config={
                "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 2, "image_size": self.image_size, "patch_size": self.patch_size,
                "projection_dim": 24,
            },
            text_config={
                "model_type": "llama", "vocab_size": self.vocab_size, "hidden_size": self.hidden_size,
                "intermediate_size": 64, "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads, "num_key_value_heads": 2,
                "max_position_embeddings": 128, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
            },
            sam_config={
                "model_type": "sam",
                "vision_config": {
                    "hidden_size": 24, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "image_size": self.sam_size, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1],
                    "num_pos_feats": 8, "mlp_dim": 48, "initializer_range": 0.02,
                },
                "prompt_encoder_config": {"hidden_size": 16, "image_size": self.sam_size, "patch_size": 8},
                "mask_decoder_config": {
                    "hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
                    "layer_norm_eps": 1e-5,
                },
            },
            image_token_id=IMAGE,
            seg_token_id=SEG,
            rej_token_id=REJ,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size).clamp(min=IMAGE + 1)
        ids[:, 0] = BOS
        ids[:, 1 : 1 + self.image_seq_length] = IMAGE
        ids[:, -3], ids[:, -1] = SEG, REJ
        return self.get_config(), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": common.floats_tensor([self.batch_size, 3, self.image_size, self.image_size]),
        }

    def mask_inputs(self):
        """What the mask decoder needs, and a true mask for each slot."""
        sizes = torch.tensor([[30, 40]] * self.batch_size, device=torch_device)
        masks = torch.zeros(2, 30, 40, dtype=torch.uint8, device=torch_device)
        masks[0, 5:20, 10:30] = 1  # [SEG]; that of [REJ] stays empty
        return {
            "sam_pixel_values": self.sam_pixel_values,
            "original_sizes": sizes,
            "reshaped_input_sizes": torch.tensor([[48, 64]] * self.batch_size, device=torch_device),
            "mask_labels": [masks] * self.batch_size,
        }


class GsvaModelTest(common.ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (GsvaForConditionalGeneration,)
    additional_model_inputs = ["pixel_values"]
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True  # run it, whatever year the file names
    # What no `[SEG]` reads has none: the vision tower behind the layer that is read (LLaVA's choice), and SAM's embeddings
    # of points, boxes and masks, which are kept for the checkpoint's sake.
    test_all_params_have_gradient = False

    def setUp(self):
        self.model_tester = GsvaModelTester(self)
        self.config_tester = ConfigTester(self, config_class=GsvaConfig, has_text_modality=False)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if model_class is GsvaForConditionalGeneration and "input_ids" in inputs:
            inputs |= self.model_tester.mask_inputs()
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_correct_missing_keys(self):
        """A base's own directory names no mask model and no tokens: it loads with config=..., tests/modeling_gsva/test_bases.py."""
        base = self.model_tester.get_config().vlm_config.model_type
        with self.assertRaisesRegex(ValueError, f"holds a model of type '{base}', not a GSVA"):
            super().test_correct_missing_keys()


class GsvaTodayTester(GsvaModelTester):
    """Parts of today: transformers' LLaVA with SigLIP and Qwen3, and the masks of SAM 2."""

    def get_config(self):
        old = super().get_config()
        text = {
            **old.text_config.to_dict(),
            "model_type": "qwen3",
            "head_dim": self.hidden_size // self.num_attention_heads,
        }
        vision = {
            "model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": self.image_size, "patch_size": self.patch_size, "vision_use_head": False,
        }  # fmt: skip
        vlm = {
            "model_type": "llava", "text_config": text, "vision_config": vision, "image_token_index": IMAGE,
            "vision_feature_select_strategy": "full", "vision_feature_layer": -1,
        }  # fmt: skip
        return GsvaConfig(vlm_config=vlm, sam_config=mask_config("sam2"), seg_token_id=SEG, rej_token_id=REJ)

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        inputs["input_ids"][:, -1] = SEG  # a rejected slot has no object score, NaN, which the common tests refuse
        return config, inputs


class LlavaV1Tester(GsvaModelTester):
    def get_config(self):
        return super().get_config().vlm_config


class GsvaTodayTest(GsvaModelTest):
    """The same tests over a base and a mask model of today."""

    def setUp(self):
        self.model_tester = GsvaTodayTester(self)
        self.config_tester = ConfigTester(self, config_class=GsvaConfig, has_text_modality=False)

    def test_init_weights_can_init_buffers(self):
        """SAM 2 draws positions at random; the common test looks for their scale one configuration higher."""
        get_config = self.model_tester.get_config

        def without_randomness():
            config = get_config()
            config.sam_config.prompt_encoder_config.scale = 0
            return config

        self.model_tester.get_config = without_randomness
        super().test_init_weights_can_init_buffers()

    def test_reverse_loading_mapping(self):
        """The renaming is that of LLaVA v1 and its older directories; a base of today is saved under `vlm.` and its type's names."""
        model = GsvaForConditionalGeneration(self.model_tester.get_config())
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            saved = set(load_file(f"{folder}/model.safetensors"))
        assert {name.partition(".")[0] for name in saved} == {"vlm", "sam", "mask_projector"}


class GsvaLlavaV1Test(common.ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    """The original's vision-language model by itself."""

    all_model_classes = (GsvaModel, LlavaV1ForConditionalGeneration)
    additional_model_inputs = ["pixel_values"]
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True
    test_all_params_have_gradient = False  # the vision tower behind the layer that is read has none

    def setUp(self):
        self.model_tester = LlavaV1Tester(self)
        self.config_tester = ConfigTester(self, config_class=LlavaV1Config, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()
