"""The untrained parts of the two pocket pipelines: real classes of diffusers and transformers at small widths."""

from __future__ import annotations

from typing import Any

from .tokenizer import TOKENS, clip_tokenizer, t5_tokenizer

#: Latents are 8 x 16 x 16: half of the picture's height and width.
LATENT_CHANNELS, LATENT_SIZE = 8, 16
#: Width of a text encoder, and of its pooled output.
TEXT_WIDTH = 64


def autoencoder() -> Any:
    """An ``AutoencoderKL`` of one halving."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )


def clip_text(vocabulary: int, start: int, end: int, *, projection: bool) -> Any:
    """A ``CLIPTextModel``, or a ``CLIPTextModelWithProjection``, of three layers: SDXL reads the last but one."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act="gelu",
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5_text(vocabulary: int) -> Any:
    """A ``T5EncoderModel`` of two layers."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def unet() -> Any:
    """A ``UNet2DConditionModel`` with the blocks of SDXL's, by name, and one transformer layer in each attention."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=(1, 4, 4),  # despite its name the number of heads, as in SDXL's own file
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 8,
        use_linear_projection=True,
        norm_num_groups=8,
    )


def transformer() -> Any:
    """A ``FluxTransformer2DModel`` of two double and eight single blocks, each at first the identity (DiT's start)."""
    from diffusers import FluxTransformer2DModel
    from torch import nn

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=8,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=False,
    )
    for name, module in model.named_modules():
        if name == "proj_out" or (name.endswith(".linear") and ".norm" in f".{name}"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def sdxl_pipeline(model: Any) -> Any:
    """An untrained ``StableDiffusionXLPipeline`` around an autoencoder: v-prediction with a zero terminal SNR."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    words = clip_tokenizer()
    texts = [clip_text(len(words), words.bos_token_id, words.eos_token_id, projection=one) for one in (False, True)]
    return StableDiffusionXLPipeline(
        vae=model,
        text_encoder=texts[0],
        text_encoder_2=texts[1],
        tokenizer=words,
        tokenizer_2=clip_tokenizer(),
        unet=unet(),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
        ),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def flux_pipeline(model: Any) -> Any:
    """An untrained ``FluxPipeline`` around an autoencoder: flow matching without a shift of its times."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    words, pieces = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        vae=model,
        text_encoder=clip_text(len(words), words.bos_token_id, words.eos_token_id, projection=False),
        tokenizer=words,
        text_encoder_2=t5_text(len(pieces)),
        tokenizer_2=pieces,
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
