"""Tiny pipelines of real classes, built once, with a real tokenizer made of a small vocabulary."""

import functools
import json
import string
import tempfile
from pathlib import Path

import torch

WORDS = ("a", "photo", "of", "red", "blue", "square", "circle", "cat", "dog", "sks", "style", "in", "picture", "and")
SIZE = 16


@functools.cache
def clip_tokenizer():
    """CLIP's tokenizer over letters and a few words."""
    from transformers import CLIPTokenizer

    vocabulary = [c for c in string.ascii_lowercase] + [f"{c}</w>" for c in string.ascii_lowercase]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = [parts[0] + parts[1], *parts[2:]]
            vocabulary.append(parts[0])
    vocabulary = list(dict.fromkeys([*vocabulary, "<|startoftext|>", "<|endoftext|>"]))
    folder = Path(tempfile.mkdtemp())
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def clip_text(projection=False, width=16, seed=0):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5(width=16):
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(3)
    config = T5Config(vocab_size=len(clip_tokenizer()), d_model=width, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def vae(channels=4):
    from diffusers import AutoencoderKL

    torch.manual_seed(4)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SIZE,
        scaling_factor=0.5,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def stable_diffusion():
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(5)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae(), clip_text(), clip_tokenizer(), unet, scheduler, None, None, requires_safety_checker=False
    )


def stable_diffusion_xl():
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(6)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
    ).eval()
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading")
    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae(), clip_text(seed=1), clip_text(True, seed=2), tokenizer, tokenizer, unet, scheduler, add_watermarker=False
    )


def flow_scheduler(**options):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def stable_diffusion_3():
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(7)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    ).eval()
    tokenizer = clip_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=flow_scheduler(shift=3.0),
        vae=vae(),
        text_encoder=clip_text(True, seed=1),
        tokenizer=tokenizer,
        text_encoder_2=clip_text(True, seed=2),
        tokenizer_2=tokenizer,
        text_encoder_3=t5(32),
        tokenizer_3=tokenizer,
    )


def flux():
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(8)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    return FluxPipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=clip_text(seed=1),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(16),
        tokenizer_2=clip_tokenizer(),
        transformer=transformer,
    )


def qwen_image():
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    own = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<pad>", *WORDS])}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>", pad_token="<pad>")
    torch.manual_seed(9)
    text = dict(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    )
    vision = dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, fullatt_block_indexes=[0]
    )
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    torch.manual_seed(10)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    coder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    ).eval()
    return QwenImagePipeline(flow_scheduler(use_dynamic_shifting=True), coder, encoder, tokenizer, transformer)


MAKERS = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "qwen": qwen_image,
}


@functools.cache
def pipeline(name):
    """One pipeline for the whole run; a test leaves it as it found it."""
    made = MAKERS[name]()
    made.set_progress_bar_config(disable=True)
    return made


def facts(pipeline):
    """What must be as before: weights, hooks, processors, requires_grad, training modes."""
    found = {}
    for name, model in pipeline.components.items():
        if not isinstance(model, torch.nn.Module):
            continue
        found[name] = {
            "weights": {k: hash(v.detach().numpy().tobytes()) for k, v in model.named_parameters()},
            "grad": {k: v.requires_grad for k, v in model.named_parameters()},
            "hooks": {k: (len(m._forward_hooks), len(m._forward_pre_hooks)) for k, m in model.named_modules()},
            "types": {k: type(m) for k, m in model.named_modules()},
            "processors": {k: type(m.processor) for k, m in model.named_modules() if hasattr(m, "processor")},
            "training": [m.training for m in model.modules()],
        }
    return found
