"""Map names of tensors: the original's (LLaVA, LLaMA, CLIP, segment-anything) and those of `GsvaForConditionalGeneration`."""

from __future__ import annotations

import re

# One row per kind of tensor: the original's name, a direction, our name. `#` stands for a number and `*` for the rest of the
# name, in the same order on both sides. The first row that fits decides. Rows with `<->` hold in both directions, rows with
# `<-` only from ours to the original.
KEYS = """
lm_head.*                                                    <-> lm_head.*
model.embed_tokens.*                                         <-> model.language_model.embed_tokens.*
model.layers.*                                               <-> model.language_model.layers.*
model.norm.*                                                 <-> model.language_model.norm.*
model.mm_projector.*                                         <-> model.multi_modal_projector.*
# transformers 5 has no level `vision_model` in CLIP's vision tower, but still writes it to disk
model.vision_tower.vision_tower.vision_model.*               <-  model.vision_tower.vision_model.*
model.vision_tower.vision_tower.vision_model.*               <-> model.vision_tower.*
model.text_hidden_fcs.0.*                                    <-> mask_projector.*
SAM.image_encoder.patch_embed.proj.*                         <-> sam.vision_encoder.patch_embed.projection.*
SAM.image_encoder.blocks.#.norm#.*                           <-> sam.vision_encoder.layers.#.layer_norm#.*
SAM.image_encoder.blocks.*                                   <-> sam.vision_encoder.layers.*
SAM.image_encoder.neck.0.*                                   <-> sam.vision_encoder.neck.conv1.*
SAM.image_encoder.neck.1.*                                   <-> sam.vision_encoder.neck.layer_norm1.*
SAM.image_encoder.neck.2.*                                   <-> sam.vision_encoder.neck.conv2.*
SAM.image_encoder.neck.3.*                                   <-> sam.vision_encoder.neck.layer_norm2.*
SAM.image_encoder.*                                          <-> sam.vision_encoder.*
SAM.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix <-> sam.shared_image_embedding.positional_embedding
SAM.prompt_encoder.point_embeddings.*                        <-> sam.prompt_encoder.point_embed.*
SAM.prompt_encoder.mask_downscaling.0.*                      <-> sam.prompt_encoder.mask_embed.conv1.*
SAM.prompt_encoder.mask_downscaling.1.*                      <-> sam.prompt_encoder.mask_embed.layer_norm1.*
SAM.prompt_encoder.mask_downscaling.3.*                      <-> sam.prompt_encoder.mask_embed.conv2.*
SAM.prompt_encoder.mask_downscaling.4.*                      <-> sam.prompt_encoder.mask_embed.layer_norm2.*
SAM.prompt_encoder.mask_downscaling.6.*                      <-> sam.prompt_encoder.mask_embed.conv3.*
SAM.prompt_encoder.*                                         <-> sam.prompt_encoder.*
SAM.mask_decoder.transformer.layers.#.norm#.*                <-> sam.mask_decoder.transformer.layers.#.layer_norm#.*
SAM.mask_decoder.transformer.norm_final_attn.*               <-> sam.mask_decoder.transformer.layer_norm_final_attn.*
SAM.mask_decoder.output_upscaling.0.*                        <-> sam.mask_decoder.upscale_conv1.*
SAM.mask_decoder.output_upscaling.1.*                        <-> sam.mask_decoder.upscale_layer_norm.*
SAM.mask_decoder.output_upscaling.3.*                        <-> sam.mask_decoder.upscale_conv2.*
SAM.mask_decoder.output_hypernetworks_mlps.#.layers.0.*      <-> sam.mask_decoder.output_hypernetworks_mlps.#.proj_in.*
SAM.mask_decoder.output_hypernetworks_mlps.#.layers.1.*      <-> sam.mask_decoder.output_hypernetworks_mlps.#.layers.0.*
SAM.mask_decoder.output_hypernetworks_mlps.#.layers.2.*      <-> sam.mask_decoder.output_hypernetworks_mlps.#.proj_out.*
SAM.mask_decoder.iou_prediction_head.layers.0.*              <-> sam.mask_decoder.iou_prediction_head.proj_in.*
SAM.mask_decoder.iou_prediction_head.layers.1.*              <-> sam.mask_decoder.iou_prediction_head.layers.0.*
SAM.mask_decoder.iou_prediction_head.layers.2.*              <-> sam.mask_decoder.iou_prediction_head.proj_out.*
SAM.mask_decoder.*                                           <-> sam.mask_decoder.*
""".replace("SAM.", "model.visual_model.")

# The place that each option's tensors have in the whole model of the original: their files hold the names without it.
PREFIXES = {"--clip": "model.vision_tower.vision_tower.", "--sam": "model.visual_model."}

# Levels that libraries put around any module (torch.compile, DeepSpeed and Lightning, FSDP, activation checkpointing), and
# around the whole model (DistributedDataParallel, PEFT).
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER_WRAPPERS = re.compile(r"^(module\.)*(base_model\.model\.)?")
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.(\w+))?\.weight")

# Tensors that are left out, and the reason.
DROPPED = {
    r".*rotary_emb\.inv_freq": "recomputed from rope_theta",
    r".*vision_model\.embeddings\.position_ids": "an index 0..N, recomputed by the vision tower",
    r"model\.vision_tower\.vision_tower\.(text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale)": (
        "CLIP's text half, which GSVA does not use"
    ),
}


def rules(table: str, direction: str) -> list[tuple[re.Pattern[str], str]]:
    r"""Return the rows of a key table as pairs of a pattern and its replacement.

    Args:
        table: Rows as in `KEYS`; lines that begin with `#` are comments.
        direction: "->" from the left to the right side, "<-" from the right to the left.

    >>> table = "block.#.w*  <-> layers.#.weight*"
    >>> rules(table, "->")
    [(re.compile('block\\.(\\d+)\\.w(.+)'), 'layers.\\g<1>.weight\\g<2>')]
    >>> pattern, replacement = rules(table, "<-")[0]
    >>> pattern.fullmatch("layers.7.weight.bias").expand(replacement)
    'block.7.w.bias'
    """
    pairs = []
    for left, arrow, right in (line.split() for line in table.splitlines() if line and not line.startswith("#")):
        if direction not in arrow.replace("<->", "<- ->").split():
            continue
        source, target = (left, right) if direction == "->" else (right, left)
        pattern = re.escape(source).replace(r"\#", r"(\d+)").replace(r"\*", r"(.+)")
        pieces = re.split(r"[#*]", target)
        replacement = pieces[0] + "".join(rf"\g<{number}>{piece}" for number, piece in enumerate(pieces[1:], start=1))
        pairs.append((re.compile(pattern), replacement))
    return pairs


_TO_OURS, _TO_ORIGINAL = rules(KEYS, "->"), rules(KEYS, "<-")


def _rename(key: str, pairs: list[tuple[re.Pattern[str], str]]) -> str | None:
    return next((match.expand(new) for pattern, new in pairs if (match := pattern.fullmatch(key))), None)


def to_ours(key: str) -> str | None:
    """Return the name in `GsvaForConditionalGeneration` of a tensor of the original, or None if the table has no row for it.

    >>> to_ours("model.visual_model.mask_decoder.output_hypernetworks_mlps.3.layers.2.bias")
    'sam.mask_decoder.output_hypernetworks_mlps.3.proj_out.bias'
    """
    return _rename(key, _TO_OURS)


def to_original(key: str) -> str | None:
    """Return the original's name of one of our tensors: the inverse of [`to_ours`].

    >>> to_original("model.language_model.layers.0.self_attn.q_proj.weight")
    'model.layers.0.self_attn.q_proj.weight'
    """
    return _rename(key, _TO_ORIGINAL)


def name_in_messages(key: str) -> str:
    """Return the original's name of one of our tensors, or `key` if the original has none."""
    return to_original(key) or key


def full_name(key: str, prefix: str = "") -> str:
    """Return the original's full name of a key as it stands in a file, without the names that libraries put around it.

    Args:
        prefix: The place of the file's tensors in the whole model, one of `PREFIXES`.

    >>> full_name("module.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
    'model.layers.0.self_attn.q_proj.weight'
    >>> full_name("_forward_module.module.model.layers.0._orig_mod.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    >>> full_name("image_encoder.pos_embed", PREFIXES["--sam"])
    'model.visual_model.image_encoder.pos_embed'
    """
    name = _OUTER_WRAPPERS.sub("", _WRAPPERS.sub("", key)).replace(".base_layer.", ".")
    return name if name.startswith(prefix) else prefix + name


def reason_to_drop(name: str) -> str | None:
    """Return why a tensor with this full name is left out, or None for one that is converted."""
    return next((reason for pattern, reason in DROPPED.items() if re.fullmatch(pattern, name)), None)


def lora_part(name: str) -> tuple[str, str, str | None] | None:
    """Return (name of the adapted weight, "A" or "B", name of the adapter) of a LoRA tensor, or None for any other.

    >>> lora_part("model.layers.0.self_attn.q_proj.lora_A.default.weight")
    ('model.layers.0.self_attn.q_proj.weight', 'A', 'default')
    """
    match = _LORA.fullmatch(name)
    return (f"{match[1]}.weight", match[2], match[3]) if match else None
