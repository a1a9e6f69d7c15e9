"""A plain second implementation of GSVA's forward pass and losses, step by step from their specification.

It takes one conversation at a time, without padding, placeholders or batches, and writes out every formula. The model in
modeling_gsva must give the same results. Only the weights are taken from that model, inside modules of transformers.
"""

import torch
import torch.nn.functional as F


class Plain:
    def __init__(self, model):
        self.config, self.sam = model.config, model.sam
        self.clip, self.llama, self.projector = (
            model.model.vision_tower,
            model.model.language_model,
            model.model.multi_modal_projector,
        )
        self.head, self.hidden_fcs = model.lm_head, model.mask_projector

    def states(self, ids: list[int], pixels: torch.Tensor | None) -> torch.Tensor:
        """`ids` as the original has them, -200 where the picture goes → (length + patches - 1, hidden) of the final norm."""
        embed = self.llama.embed_tokens
        if -200 not in ids:
            return self.llama(inputs_embeds=embed(torch.tensor([ids]))).last_hidden_state[0]
        place = ids.index(-200)
        patches = self.clip(pixels[None], output_hidden_states=True).hidden_states[-2][0, 1:]  # without class token
        parts = [embed(torch.tensor(ids[:place])), self.projector(patches), embed(torch.tensor(ids[place + 1 :]))]
        return self.llama(inputs_embeds=torch.cat(parts)[None]).last_hidden_state[0]

    def low_res(self, states: torch.Tensor, sam_pixels: torch.Tensor) -> torch.Tensor:
        """(slots, hidden), (3, side, side) → (slots, h, w): mask 0 of the decoder, each slot a prompt without points."""
        first, _, last = self.hidden_fcs
        prompts = F.linear(F.linear(states, first.weight, first.bias).relu(), last.weight, last.bias)
        image = self.sam.vision_encoder(sam_pixels[None]).last_hidden_state
        masks, _ = self.sam.mask_decoder(
            image_embeddings=image,
            image_positional_embeddings=self.sam.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=prompts[None, :, None],  # (1 picture, slots, 1 token, channels)
            dense_prompt_embeddings=self.sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand_as(image),
            multimask_output=False,
        )
        return masks[0, :, 0]

    def masks(self, low_res: torch.Tensor, reshaped: list[int], original: list[int]) -> torch.Tensor:
        side = self.config.sam_config.vision_config.image_size
        masks = F.interpolate(low_res[:, None], (side, side), mode="bilinear", align_corners=False)
        masks = masks[..., : reshaped[0], : reshaped[1]]
        return F.interpolate(masks, original, mode="bilinear", align_corners=False)[:, 0]

    def losses(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        """A batch of `{ids, labels, pixels, sam_pixels, reshaped, original, truth}`, `truth` (slots, height, width)."""
        config, patches = self.config, None
        entropy, tokens, bce, dice, count = 0.0, 0, 0.0, 0.0, 0
        for item in batch:
            ids, states = item["ids"], self.states(item["ids"], item["pixels"])
            patches = len(states) - len(ids) + 1  # positions of the picture
            place = ids.index(-200) if -200 in ids else len(ids)

            def position(p, place=place, patches=patches):
                return p if p < place else p + patches - 1

            for p, label in enumerate(item["labels"]):
                if label != -100:
                    logits = self.head(states[position(p) - 1])
                    entropy, tokens = entropy + logits.logsumexp(0) - logits[label], tokens + 1
            slots = [p for p, token in enumerate(ids) if token in (config.seg_token_id, config.rej_token_id)]
            for number, truth in enumerate(item["truth"]):
                count += 1
                truth = truth.to(states.dtype)
                logits = torch.zeros_like(truth)  # for a [REJ], and for a slot that truncation cut off
                if truth.any() and number < len(slots):
                    low_res = self.low_res(states[position(slots[number]) - 1][None], item["sam_pixels"])
                    logits = self.masks(low_res, item["reshaped"], item["original"])[0]
                p_true = logits.sigmoid()
                bce = bce - (truth * F.logsigmoid(logits) + (1 - truth) * F.logsigmoid(-logits)).mean()
                overlap, areas = 2 * (p_true * truth).sum() / 1000, p_true.sum() / 1000 + truth.sum() / 1000
                dice = dice + 1 - (overlap + 1e-6) / (areas + 1e-6)
        parts = {
            "ce_loss": 1.0 * entropy / tokens,
            "mask_bce_loss": 2.0 * bce / (count + 1e-8),
            "mask_dice_loss": 0.5 * dice / (count + 1e-8),
        }
        return {**parts, "loss": sum(parts.values())}
