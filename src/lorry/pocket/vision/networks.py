"""The two networks and what prepares their inputs, untrained: classes of transformers at a tiny size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..diffusion.tokenizer import clip_tokenizer
from ..tokenizer import build as letters
from .world import SIDE

#: Words of captions that the diffusion models' captions do not have.
WORDS = ("centre", "mirrored", "rim", "core")
#: Tokens of a caption, pixels of a patch, width and layers of the tower for pictures, and of that for texts.
TOKENS, PATCH, WIDTH, LAYERS, TEXT_LAYERS = 32, 8, 128, 4, 3
IMAGE = "<image>"
#: Pixels from 0 to 1 are brought to -1 to 1.
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

#: A picture is a placeholder, a user's turn a prompt without its ``>``, the assistant's turn the answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set parts = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}{% set parts = message['content'] %}{% endif %}"
    "{% for part in parts if part['type'] == 'image' %}<image>{% endfor %}"
    "{% for part in parts if part['type'] == 'text' %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + '\n' }}{% endgeneration %}"
    "{% else %}{{ part['text'] + '>' }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def pixels(shown: Tensor) -> Tensor:
    """What the processors make of pictures that have the right size.

    Parameters
    ----------
    shown
        (pictures, 3, 48, 48) in uint8.

    Returns
    -------
    Tensor
        Of the same shape, float32 from -1 to 1.
    """
    return shown.float() / 127.5 - 1


def _image_processor() -> Any:
    from transformers import CLIPImageProcessorPil

    side = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side, image_mean=MEAN, image_std=STD)


def clip_processor() -> Any:
    """A new ``CLIPProcessor``: pictures of 48 x 48 pixels, captions of at most 32 words."""
    from transformers import CLIPProcessor

    return CLIPProcessor(_image_processor(), clip_tokenizer(WORDS, TOKENS))


def clip_network(seed: int) -> Any:
    """An untrained ``CLIPModel`` of about 1.5 million parameters, float32."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = clip_tokenizer(WORDS, TOKENS)
    shared = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": 4}
    text = {
        **shared,
        "num_hidden_layers": TEXT_LAYERS,
        "max_position_embeddings": TOKENS,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**shared, "num_hidden_layers": LAYERS, "image_size": SIDE, "patch_size": PATCH}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def vlm_processor() -> Any:
    """A new ``LlavaProcessor``: pictures of 48 x 48 pixels, one token for each character."""
    from transformers import LlavaProcessor

    tokenizer = letters()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    return LlavaProcessor(
        image_processor=_image_processor(),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def vlm_network(clip: Any, language: Any, seed: int) -> Any:
    """A ``LlavaForConditionalGeneration`` of a trained CLIP and a trained language model, its projector untrained.

    Parameters
    ----------
    clip
        A ``CLIPModel``, whose tower for pictures is copied.
    language
        A ``LlamaForCausalLM``, which is copied and gets an embedding for the placeholder of pictures.
    seed
        Of what is new.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tokenizer = vlm_processor().tokenizer
    text = {**language.config.to_dict(), "vocab_size": len(tokenizer)}
    config = LlavaConfig(
        vision_config=clip.config.vision_config.to_dict(),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-2,
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    tower = {name.removeprefix("vision_model."): value for name, value in clip.vision_model.state_dict().items()}
    own = model.model.vision_tower
    (own.vision_model if hasattr(own, "vision_model") else own).load_state_dict(tower)
    for ours, theirs in (
        (model.model.language_model, language.model),
        (model.lm_head, language.lm_head),
    ):
        here = ours.state_dict()
        for name, value in theirs.state_dict().items():
            here[name][: len(value)].copy_(value)
    return model
