"""Which families of transformers models do the tests fuse, as tiny models? docs/guides/families.md lists them."""

import torch
import transformers as hf
from by_hand_cases import MODELS as BY_HAND
from by_hand_cases import WINDOWS
from hf_cases import BART, BERT, DECODER, DISTILBERT, IDS, NO_DROPOUT, T5, VOCABULARY, WIDTHS

PICTURE = {**WIDTHS, "image_size": 32, "patch_size": 8}
SPEECH = {**IDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "dropout": 0.0,
          "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 1}  # fmt: skip
WAVES = {**WIDTHS, "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 4,
         "num_conv_pos_embedding_groups": 2, "hidden_dropout": 0.0, "layerdrop": 0.0}  # fmt: skip
OPT = {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "dropout": 0.0}
HEADS = {**DECODER, "head_dim": 8}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "experts_implementation": "eager"}
PATCHES = {"num_patches": 16, "patch_size": 8}
FLORENCE = {"text_config": {**BART, "model_type": "bart"}, "image_token_id": 49}
FLORENCE |= {"vision_config": {"depths": [1, 1], "embed_dim": [16, 32], "num_heads": [2, 2], "num_groups": [2, 2],
             "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True],
             "window_size": 2, "projection_dim": 32, "max_position_embeddings": 8}}  # fmt: skip
LANDMARKS = {"num_landmarks": 9, "segment_means_seq_len": 9}
FUNNEL = {"vocab_size": 50, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48}
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WITH_ALIBI = {"alibi": True, "new_decoder_architecture": False, "multi_query": False, "parallel_attn": False}
SWITCH = {
    **T5,
    "num_decoder_layers": 2,
    "num_experts": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
}


def tokens(*shape):
    return torch.randint(3, VOCABULARY, shape)


def text():
    return {"input_ids": tokens(2, 9)}


def pair():
    return {"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, 7), "use_cache": False}


def picture():
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def speech():
    return {"input_features": torch.randn(2, 80, 40), "decoder_input_ids": tokens(2, 7), "use_cache": False}


def waves():
    return {"input_values": torch.randn(2, 400)}


def melody():
    return {"input_features": torch.randn(2, 9, 32), "decoder_input_ids": tokens(2, 7), "use_cache": False}


def patches():
    seen = torch.ones(2, 16, dtype=torch.long)
    seen[1, 12:] = 0
    shapes = torch.tensor([[4, 4], [3, 4]])
    return {"pixel_values": torch.randn(2, 16, 192), "pixel_attention_mask": seen, "spatial_shapes": shapes}


def with_picture():
    """The first 17 tokens are the picture's places."""
    ids = torch.cat((torch.full((2, 17), 49), torch.randint(3, 49, (2, 5))), 1)
    return {"input_ids": ids, "decoder_input_ids": tokens(2, 7), "use_cache": False, **picture()}


def boxes():
    corner = torch.randint(0, 100, (2, 9, 2))
    return {**text(), "bbox": torch.cat((corner, corner + 50), 2)}


def entities():
    places = torch.tensor([[[1, 2, -1], [3, -1, -1]], [[2, -1, -1], [4, 5, 6]]])
    return {**text(), "entity_ids": tokens(2, 2) % 10, "entity_position_ids": places}


# Name in the documents -> (a tiny model, its inputs)
FAMILIES = {
    "BERT": (lambda: hf.BertModel(hf.BertConfig(**BERT)), text),
    "RoBERTa": (lambda: hf.RobertaModel(hf.RobertaConfig(**BERT)), text),
    "XLM-RoBERTa": (lambda: hf.XLMRobertaModel(hf.XLMRobertaConfig(**BERT)), text),
    "CamemBERT": (lambda: hf.CamembertModel(hf.CamembertConfig(**BERT)), text),
    "ELECTRA": (lambda: hf.ElectraModel(hf.ElectraConfig(**BERT, embedding_size=16)), text),
    "DistilBERT": (lambda: hf.DistilBertModel(hf.DistilBertConfig(**DISTILBERT, dropout=0.0)), text),
    "MPNet": (lambda: hf.MPNetModel(hf.MPNetConfig(**BERT)), text),
    "ModernBERT": (lambda: hf.ModernBertModel(hf.ModernBertConfig(**IDS, **WIDTHS)), text),
    "ViT": (lambda: hf.ViTModel(hf.ViTConfig(**PICTURE, **NO_DROPOUT)), picture),
    "CLIP, vision": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**PICTURE)), picture),
    "SigLIP, vision": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**PICTURE)), picture),
    "DPT": (lambda: hf.DPTModel(hf.DPTConfig(**PICTURE, **NO_DROPOUT)), picture),
    "Longformer": (lambda: hf.LongformerModel(hf.LongformerConfig(**BERT, attention_window=4)), text),
    "Whisper": (lambda: hf.WhisperModel(hf.WhisperConfig(**SPEECH, max_source_positions=20)), speech),
    "BART": (lambda: hf.BartModel(hf.BartConfig(**BART)), pair),
    "Marian": (lambda: hf.MarianModel(hf.MarianConfig(**BART, decoder_start_token_id=1)), pair),
    "mBART": (lambda: hf.MBartModel(hf.MBartConfig(**BART)), pair),
    "Pegasus": (lambda: hf.PegasusModel(hf.PegasusConfig(**BART)), pair),
    "M2M100": (lambda: hf.M2M100Model(hf.M2M100Config(**BART)), pair),
    "Wav2Vec2": (lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**WAVES)), waves),
    "Hubert": (lambda: hf.HubertModel(hf.HubertConfig(**WAVES)), waves),
    "OPT": (lambda: hf.OPTModel(hf.OPTConfig(**OPT, max_position_embeddings=40, word_embed_proj_dim=32)), text),
    "Llama": (lambda: hf.LlamaModel(hf.LlamaConfig(**DECODER)), text),
    "Mistral": (lambda: hf.MistralModel(hf.MistralConfig(**DECODER)), text),
    "Qwen2": (lambda: hf.Qwen2Model(hf.Qwen2Config(**DECODER)), text),
    "Qwen3": (lambda: hf.Qwen3Model(hf.Qwen3Config(**HEADS)), text),
    "Gemma": (lambda: hf.GemmaModel(hf.GemmaConfig(**HEADS)), text),
    "Phi-3": (lambda: hf.Phi3Model(hf.Phi3Config(**DECODER)), text),
    "OLMo 2": (lambda: hf.Olmo2Model(hf.Olmo2Config(**DECODER)), text),
    "GPT-NeoX": (lambda: hf.GPTNeoXModel(hf.GPTNeoXConfig(**IDS, **WIDTHS)), text),
    "T5": (lambda: hf.T5Model(hf.T5Config(**T5)), pair),
    "mT5": (lambda: hf.MT5Model(hf.MT5Config(**T5)), pair),
    "UMT5": (lambda: hf.UMT5Model(hf.UMT5Config(**T5)), pair),
    "Switch Transformers": (lambda: hf.SwitchTransformersModel(hf.SwitchTransformersConfig(**SWITCH)), pair),
    "LongT5": (lambda: hf.LongT5Model(hf.LongT5Config(**T5)), pair),
    "Pop2Piano": (lambda: hf.Pop2PianoForConditionalGeneration(hf.Pop2PianoConfig(**T5)), melody),
    "ESM": (lambda: hf.EsmModel(hf.EsmConfig(**BERT, mask_token_id=4)), text),
    "Swin": (lambda: hf.SwinModel(hf.SwinConfig(**WINDOWS)), picture),
    "Data2Vec, text": (lambda: hf.Data2VecTextModel(hf.Data2VecTextConfig(**BERT)), text),
    "Data2Vec, vision": (lambda: hf.Data2VecVisionModel(hf.Data2VecVisionConfig(**PICTURE, **NO_DROPOUT)), picture),
    "DINOv2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**PICTURE, mlp_ratio=2)), picture),
    "DINOv3": (lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**PICTURE, num_register_tokens=2)), picture),
    "SigLIP 2, vision": (lambda: hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**WIDTHS, **PATCHES)), patches),
    "Florence-2": (lambda: hf.Florence2ForConditionalGeneration(hf.Florence2Config(**FLORENCE)), with_picture),
    "Gemma 3": (lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(**HEADS, **SLIDING)), text),
    "Ministral 3": (lambda: hf.Ministral3Model(hf.Ministral3Config(**DECODER)), text),
    "Granite": (lambda: hf.GraniteModel(hf.GraniteConfig(**DECODER, residual_multiplier=0.5)), text),
    "Cohere 2": (lambda: hf.Cohere2Model(hf.Cohere2Config(**DECODER, **SLIDING)), text),
    "SmolLM3": (lambda: hf.SmolLM3Model(hf.SmolLM3Config(**DECODER)), text),
    "ModernBERT, decoder": (
        lambda: hf.ModernBertDecoderModel(hf.ModernBertDecoderConfig(**IDS, **WIDTHS, local_attention=4)),
        text,
    ),
    "Qwen3-MoE": (lambda: hf.Qwen3MoeModel(hf.Qwen3MoeConfig(**HEADS, **EXPERTS)), text),
    "MobileBERT": (lambda: hf.MobileBertModel(hf.MobileBertConfig(**BERT)), text),
    "SqueezeBERT": (lambda: hf.SqueezeBertModel(hf.SqueezeBertConfig(**BERT, embedding_size=32)), text),
    "Nystromformer": (lambda: hf.NystromformerModel(hf.NystromformerConfig(**BERT, **LANDMARKS)), text),
    "LiLT": (lambda: hf.LiltModel(hf.LiltConfig(**{**BERT, "hidden_size": 48}, channel_shrink_ratio=2)), boxes),
    "LUKE": (lambda: hf.LukeModel(hf.LukeConfig(**BERT, entity_vocab_size=10, entity_emb_size=16)), entities),
    "XLNet": (lambda: hf.XLNetModel(hf.XLNetConfig(vocab_size=50, d_model=32, n_layer=2, n_head=4, d_inner=48)), text),
    "Funnel": (lambda: hf.FunnelModel(hf.FunnelConfig(**FUNNEL)), text),
    "Falcon": (lambda: hf.FalconModel(hf.FalconConfig(**IDS, **FALCON)), text),
    "Falcon, ALiBi": (lambda: hf.FalconModel(hf.FalconConfig(**IDS, **FALCON, **WITH_ALIBI)), text),
    **{name: (make, inputs) for name, (_, make, inputs) in BY_HAND.items()},
}


def summary(report):
    """A family's row: the operators in use, and what was left with its reason."""
    operators = ("attention", "rms_norm", "layer_norm", "gated_ffn", "ffn", "linear", "decode")
    words = " ".join(entry.note.replace(".", " ").replace(",", " ") for entry in report.replaced).split()
    used = [name for name in operators if name in words]
    if any("relative position" in entry.note for entry in report.replaced):
        used[used.index("attention")] = "attention with T5's bias"
    left = sorted({f"{entry.kind}: {entry.note}" for entry in report.left})
    return ", ".join(used), "; ".join(left)
