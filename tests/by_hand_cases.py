"""Which tiny transformers models compute attention by hand, and what do they take? Each has a row in by_hand.py."""

import torch
import transformers as hf
from hf_cases import BART, BERT, IDS, NO_DROPOUT, WIDTHS, tokens
from transformers.models.clap.modeling_clap import ClapAudioModel
from transformers.models.donut.modeling_donut_swin import DonutSwinModel

DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
XLM = {"vocab_size": 50, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40, "dropout": 0.0}
XLM |= {"attention_dropout": 0.0, "pad_index": 0, "bos_index": 1, "eos_index": 2}
XGLM = {**IDS, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 40}
XGLM |= dict.fromkeys(("dropout", "activation_dropout", "attention_dropout", "layerdrop"), 0.0)
TROCR = {**IDS, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "dropout": 0.0}
TROCR |= {"max_position_embeddings": 40, "cross_attention_hidden_size": 32, "use_cache": False}
WINDOWS = {**NO_DROPOUT, "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2], "num_heads": [2]}
WINDOWS |= {"window_size": 4}
SPEECH = {**BART, **WIDTHS, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "decoder_start_token_id": 1}
SPEECH |= dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "positional_dropout"), 0.0)
STAGES = {"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "sequence_reduction_ratios": [2, 1]}
STAGES |= {"hidden_sizes": [16, 32], "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [2, 4]}
STAGES |= {"mlp_ratios": [2, 2], "hidden_dropout_prob": 0.0}
WAVES = {**WIDTHS, "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 4}
WAVES |= {"num_conv_pos_embedding_groups": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
WAVES |= {"num_buckets": 8, "max_bucket_distance": 20}
GPTJ = {"vocab_size": 50, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
GPTJ |= {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NEO = {"vocab_size": 50, "max_position_embeddings": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
NEO |= {"attention_types": [[["global", "local"], 1]], "window_size": 4, "bos_token_id": 1, "eos_token_id": 2}
NEO |= {"resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0}
MPT = {"vocab_size": 50, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}


def mask(length=9, left=1):
    """Padding on the right in one row, on the left in the other."""
    found = torch.ones(2, length, dtype=torch.long)
    found[0, length - 2 :] = 0
    found[1, :left] = 0
    return found


def text(left=1):
    return {"input_ids": tokens(2, 9), "attention_mask": mask(left=left)}


def prompt():
    return {**text(left=0), "use_cache": False}


def pair():
    return {**text(), "decoder_input_ids": tokens(2, 7), "use_cache": False}


def picture(size=32):
    return {"pixel_values": torch.randn(2, 3, size, size)}


def bert(name, **more):
    return lambda: getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**BERT, **more))


def encoded():
    """A decoder's call with the states of an encoder."""
    return {**text(), "encoder_hidden_states": torch.randn(2, 5, 32), "use_cache": False}


def with_boxes():
    return {**text(), "visual_feats": torch.randn(2, 4, 16), "visual_pos": torch.rand(2, 4, 4)}


def with_features():
    return {**text(), "visual_embeds": torch.randn(2, 4, 16)}


# Name in the documents -> (row of by_hand.py, a tiny model, its inputs)
MODELS = {
    "BigBird, full attention": ("big_bird.BigBirdSelfAttention", bert("BigBird", attention_type="original_full"), text),
    "BigBird-Pegasus, full attention": (
        "bigbird_pegasus.BigBirdPegasusSelfAttention",
        lambda: hf.BigBirdPegasusModel(hf.BigBirdPegasusConfig(**BART, attention_type="original_full")),
        pair,
    ),
    "BLIP, vision": (
        "blip.BlipAttention",
        lambda: hf.BlipVisionModel(hf.BlipVisionConfig(**WIDTHS, image_size=32, patch_size=8, attention_dropout=0.0)),
        picture,
    ),
    "BLOOM": (
        "bloom.BloomAttention",
        lambda: hf.BloomModel(hf.BloomConfig(**IDS, hidden_size=32, n_layer=2, n_head=4)),
        prompt,
    ),
    "CANINE": (
        "canine.CanineSelfAttention",
        bert("Canine", local_transformer_stride=4, upsampling_kernel_size=4, num_hash_buckets=16, num_hash_functions=2),
        lambda: {"input_ids": tokens(2, 16), "attention_mask": mask(16)},
    ),
    "CodeGen": ("codegen.CodeGenAttention", lambda: hf.CodeGenModel(hf.CodeGenConfig(**GPTJ)), prompt),
    "ConvBERT": ("convbert.ConvBertSelfAttention", bert("ConvBert", embedding_size=32), text),
    "DeBERTa": ("deberta.DisentangledSelfAttention", lambda: hf.DebertaModel(hf.DebertaConfig(**DEBERTA)), text),
    "DeBERTa v2": (
        "deberta_v2.DisentangledSelfAttention",
        lambda: hf.DebertaV2Model(hf.DebertaV2Config(**DEBERTA, position_buckets=4)),
        text,
    ),
    "Donut, vision": (
        "donut:donut_swin.DonutSwinSelfAttention",
        lambda: DonutSwinModel(hf.DonutSwinConfig(**WINDOWS)),
        picture,
    ),
    "FlauBERT": ("flaubert.MultiHeadAttention", lambda: hf.FlaubertModel(hf.FlaubertConfig(**XLM)), text),
    "FLAVA, text": ("flava.FlavaSelfAttention", lambda: hf.FlavaTextModel(hf.FlavaTextConfig(**BERT)), text),
    "GIT": (
        "git.GitSelfAttention",
        lambda: hf.GitModel(hf.GitConfig(**BERT, vision_config={**WIDTHS, "image_size": 16, "patch_size": 8})),
        lambda: {**text(), **picture(16), "use_cache": False},
    ),
    "GPT-J": ("gptj.GPTJAttention", lambda: hf.GPTJModel(hf.GPTJConfig(**GPTJ)), prompt),
    "GPT-Neo": ("gpt_neo.GPTNeoSelfAttention", lambda: hf.GPTNeoModel(hf.GPTNeoConfig(**NEO)), prompt),
    "GroupViT, vision": (
        "groupvit.GroupViTAttention",
        lambda: hf.GroupViTVisionModel(
            hf.GroupViTVisionConfig(
                **WIDTHS, image_size=32, patch_size=8, depths=[1, 1], num_group_tokens=[4, 0], num_output_groups=[4, 4]
            )
        ),
        picture,
    ),
    "LED": (
        "led.LEDDecoderAttention",
        lambda: hf.LEDModel(
            hf.LEDConfig(
                **{**BART, "max_position_embeddings": 0},
                attention_window=4,
                max_encoder_position_embeddings=40,
                max_decoder_position_embeddings=40,
            )
        ),
        pair,
    ),
    "LXMERT": (
        "lxmert.LxmertAttention",
        lambda: hf.LxmertModel(
            hf.LxmertConfig(**BERT, l_layers=1, x_layers=1, r_layers=1, visual_feat_dim=16, visual_pos_dim=4)
        ),
        with_boxes,
    ),
    "Megatron-BERT": ("megatron_bert.MegatronBertSelfAttention", bert("MegatronBert"), text),
    "MobileViT": (
        "mobilevit.MobileViTSelfAttention",
        lambda: hf.MobileViTModel(
            hf.MobileViTConfig(
                image_size=32,
                hidden_sizes=[16, 16, 16],
                neck_hidden_sizes=[8] * 6 + [16],
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        ),
        picture,
    ),
    "MPT": ("mpt.MptAttention", lambda: hf.MptModel(hf.MptConfig(**MPT)), prompt),
    "MVP": ("mvp.MvpAttention", lambda: hf.MvpModel(hf.MvpConfig(**BART)), pair),
    "PVT": ("pvt.PvtEfficientSelfAttention", lambda: hf.PvtModel(hf.PvtConfig(**STAGES)), picture),
    "RemBERT": (
        "rembert.RemBertSelfAttention",
        bert("RemBert", input_embedding_size=16, output_embedding_size=16, classifier_dropout_prob=0.0),
        text,
    ),
    "RoFormer": ("roformer.RoFormerSelfAttention", bert("RoFormer"), text),
    "SpeechT5": (
        "speecht5.SpeechT5Attention",
        lambda: hf.SpeechT5Model(hf.SpeechT5Config(**SPEECH)),
        lambda: {
            "input_values": torch.randn(2, 9, 32),
            "attention_mask": mask(),
            "decoder_input_values": torch.randn(2, 7, 32),
            "use_cache": False,
        },
    ),
    "Swin v2": ("swinv2.Swinv2SelfAttention", lambda: hf.Swinv2Model(hf.Swinv2Config(**WINDOWS)), picture),
    "TAPAS": (
        "tapas.TapasSelfAttention",
        bert("Tapas", type_vocab_sizes=[2] * 7),
        lambda: {**text(), "token_type_ids": torch.zeros(2, 9, 7, dtype=torch.long)},
    ),
    "TrOCR": (
        "trocr.TrOCRAttention",
        lambda: hf.TrOCRForCausalLM(hf.TrOCRConfig(**TROCR)).model.decoder,
        encoded,
    ),
    "VisualBERT": ("visual_bert.VisualBertSelfAttention", bert("VisualBert", visual_embedding_dim=16), with_features),
    "WavLM": (
        "wavlm.WavLMAttention",
        lambda: hf.WavLMModel(hf.WavLMConfig(**WAVES)),
        lambda: {"input_values": torch.randn(2, 400), "attention_mask": mask(400)},
    ),
    "XGLM": (
        "xglm.XGLMAttention",
        lambda: hf.XGLMModel(hf.XGLMConfig(**XGLM)),
        prompt,
    ),
    "XLM": ("xlm.MultiHeadAttention", lambda: hf.XLMModel(hf.XLMConfig(**XLM)), text),
    "CLAP, audio": (
        "clap.ClapAudioSelfAttention",
        lambda: ClapAudioModel(
            hf.ClapAudioConfig(
                hidden_size=32,
                patch_embeds_hidden_size=8,
                depths=[1, 1],
                num_attention_heads=[2, 2],
                window_size=4,
                num_mel_bins=16,
                spec_size=64,
                patch_stride=[4, 4],
                enable_fusion=False,
                patch_size=4,
            )
        ),
        lambda: {"input_features": torch.randn(1, 1, 64, 16)},
    ),
}
