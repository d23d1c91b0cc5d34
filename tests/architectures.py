"""Pico models of the architectures that the installed transformers knows, and folders of random siblings of them.

`ARCHITECTURES` says of each the class, its kind, and what its config has beside the sizes that all share.
`slices` are ranges of layers that can stand one after the other.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers import load_tensors, noise, save_tensors

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # by other names
    "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_ctx": 64, "n_inner": 48,
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4, "n_layers": 3,
    "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "ffn_dim": 48, "word_embed_proj_dim": 32, "n_heads": 4,
    "embedding_size": 32, "dim": 32, "hidden_dim": 48, "emb_dim": 32,
    "max_target_positions": 64, "max_source_positions": 32, "num_mel_bins": 8,
    "feed_forward_proj_dim": 48, "type_vocab_size": 2,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_num_experts": 4,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "moe_k": 2, "num_shared_experts": 1, "moe_topk": 2,
    # low ranks
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    # state spaces
    "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "n_groups": 1,
    "mamba_expand": 2, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8,
    "chunk_size": 8, "mamba_chunk_size": 8,
    "mamba_dt_rank": 4, "time_step_rank": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "lru_width": 32, "attention_window_size": 16,
    # images
    "image_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 32, "out_hidden_size": 32, "num_channels": 3,
    "sliding_window": 16,
}  # fmt: skip
"""Sizes by the names that configs have for them; each config takes those that it knows."""


@dataclass(frozen=True)
class Architecture:
    """One architecture: its model type, its class, what it is, and what its config has beside `SIZES`."""

    model_type: str
    model: str
    kind: str
    more: dict[str, Any] = field(default_factory=dict)
    slices: tuple[tuple[int, int], ...] = ((0, 2), (1, 3))

    def config(self) -> Any:
        """The pico config."""
        from transformers import AutoConfig

        return _pico(type(AutoConfig.for_model(self.model_type)), self.more)


def _pico(kind: type, more: dict[str, Any]) -> Any:
    """A small config of a class: the sizes that it has, its parts small as well."""
    plain = kind()
    known = {**plain.to_dict(), **dict.fromkeys(getattr(plain, "attribute_map", {}))}
    parts = {name: part for name, part in vars(plain).items() if hasattr(part, "attribute_map")}
    given = {name: size for name, size in SIZES.items() if name in known and name not in parts}
    for name, part in parts.items():
        given[name] = _pico(type(part), more.get(name, {})).to_dict()
    return kind(**{**given, **{name: value for name, value in more.items() if name not in parts}})


ARCHITECTURES = (
    Architecture("apertus", "ApertusForCausalLM", "dense"),
    Architecture("arcee", "ArceeForCausalLM", "dense"),
    Architecture("bitnet", "BitNetForCausalLM", "dense"),
    Architecture("bloom", "BloomForCausalLM", "dense"),
    Architecture("cohere", "CohereForCausalLM", "dense"),
    Architecture("cohere2", "Cohere2ForCausalLM", "dense"),
    Architecture("codegen", "CodeGenForCausalLM", "dense"),
    Architecture("diffllama", "DiffLlamaForCausalLM", "dense"),
    Architecture("doge", "DogeForCausalLM", "dense"),
    Architecture("ernie4_5", "Ernie4_5ForCausalLM", "dense"),
    Architecture("exaone4", "Exaone4ForCausalLM", "dense"),
    Architecture("falcon", "FalconForCausalLM", "dense"),
    Architecture("gemma", "GemmaForCausalLM", "dense"),
    Architecture("gemma2", "Gemma2ForCausalLM", "dense"),
    Architecture("gemma3_text", "Gemma3ForCausalLM", "dense"),
    Architecture("glm", "GlmForCausalLM", "dense"),
    Architecture("glm4", "Glm4ForCausalLM", "dense"),
    Architecture("gpt2", "GPT2LMHeadModel", "dense"),
    Architecture("gpt_bigcode", "GPTBigCodeForCausalLM", "dense"),
    Architecture("gpt_neox", "GPTNeoXForCausalLM", "dense"),
    Architecture("gptj", "GPTJForCausalLM", "dense"),
    Architecture("granite", "GraniteForCausalLM", "dense"),
    Architecture("helium", "HeliumForCausalLM", "dense"),
    Architecture("internlm3", "LlamaForCausalLM", "dense"),
    Architecture("llama", "LlamaForCausalLM", "dense"),
    Architecture("ministral3", "Ministral3ForCausalLM", "dense"),
    Architecture("mistral", "MistralForCausalLM", "dense"),
    Architecture("mpt", "MptForCausalLM", "dense"),
    Architecture("nanochat", "NanoChatForCausalLM", "dense"),
    Architecture("nemotron", "NemotronForCausalLM", "dense"),
    Architecture("olmo", "OlmoForCausalLM", "dense"),
    Architecture("olmo2", "Olmo2ForCausalLM", "dense"),
    Architecture("olmo3", "Olmo3ForCausalLM", "dense"),
    Architecture("opt", "OPTForCausalLM", "dense"),
    Architecture("persimmon", "PersimmonForCausalLM", "dense"),
    Architecture("phi", "PhiForCausalLM", "dense"),
    Architecture("phi3", "Phi3ForCausalLM", "dense"),
    Architecture("qwen2", "Qwen2ForCausalLM", "dense"),
    Architecture("qwen3", "Qwen3ForCausalLM", "dense"),
    Architecture("seed_oss", "SeedOssForCausalLM", "dense"),
    Architecture("smollm3", "SmolLM3ForCausalLM", "dense"),
    Architecture("stablelm", "StableLmForCausalLM", "dense"),
    Architecture("starcoder2", "Starcoder2ForCausalLM", "dense"),
    Architecture("vaultgemma", "VaultGemmaForCausalLM", "dense"),
    Architecture("xglm", "XGLMForCausalLM", "dense"),
    Architecture("xlm", "XLMWithLMHeadModel", "dense"),
    Architecture("afmoe", "AfmoeForCausalLM", "experts"),
    Architecture("deepseek_v2", "DeepseekV2ForCausalLM", "experts"),
    Architecture("deepseek_v3", "DeepseekV3ForCausalLM", "experts", {"first_k_dense_replace": 1}),
    Architecture("deepseek_v4", "DeepseekV4ForCausalLM", "experts"),
    Architecture("dots1", "Dots1ForCausalLM", "experts"),
    Architecture("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", "experts"),
    Architecture("flex_olmo", "FlexOlmoForCausalLM", "experts"),
    Architecture("glm4_moe", "Glm4MoeForCausalLM", "experts"),
    Architecture("gpt_oss", "GptOssForCausalLM", "experts"),
    Architecture("granitemoe", "GraniteMoeForCausalLM", "experts"),
    Architecture("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", "experts"),
    Architecture("jetmoe", "JetMoeForCausalLM", "experts"),
    Architecture("llama4_text", "Llama4ForCausalLM", "experts"),
    Architecture("minimax_m2", "MiniMaxM2ForCausalLM", "experts"),
    Architecture("mixtral", "MixtralForCausalLM", "experts"),
    Architecture("olmoe", "OlmoeForCausalLM", "experts"),
    Architecture("phimoe", "PhimoeForCausalLM", "experts"),
    Architecture("qwen2_moe", "Qwen2MoeForCausalLM", "experts"),
    Architecture("qwen3_moe", "Qwen3MoeForCausalLM", "experts"),
    Architecture("bamba", "BambaForCausalLM", "hybrid"),
    Architecture("falcon_mamba", "FalconMambaForCausalLM", "hybrid"),
    Architecture("granitemoehybrid", "GraniteMoeHybridForCausalLM", "hybrid"),
    Architecture("jamba", "JambaForCausalLM", "hybrid", slices=((0, 2), (0, 2))),
    Architecture("kimi_linear", "KimiLinearForCausalLM", "hybrid"),
    Architecture("lfm2", "Lfm2ForCausalLM", "hybrid"),
    Architecture("mamba", "MambaForCausalLM", "hybrid"),
    Architecture("minimax", "MiniMaxForCausalLM", "hybrid"),
    Architecture("nemotron_h", "NemotronHForCausalLM", "hybrid"),
    Architecture("olmo_hybrid", "OlmoHybridForCausalLM", "hybrid"),
    Architecture("qwen3_5_text", "Qwen3_5ForCausalLM", "hybrid"),
    Architecture("qwen3_next", "Qwen3NextForCausalLM", "hybrid"),
    Architecture("recurrent_gemma", "RecurrentGemmaForCausalLM", "hybrid"),
    Architecture("rwkv", "RwkvForCausalLM", "hybrid"),
    Architecture("xlstm", "xLSTMForCausalLM", "hybrid"),
    Architecture("aria", "AriaForConditionalGeneration", "vision and language"),
    Architecture("aya_vision", "AyaVisionForConditionalGeneration", "vision and language"),
    Architecture("cohere2_vision", "Cohere2VisionForConditionalGeneration", "vision and language"),
    Architecture("gemma3", "Gemma3ForConditionalGeneration", "vision and language"),
    Architecture("glm4v", "Glm4vForConditionalGeneration", "vision and language"),
    Architecture("glm4v_moe", "Glm4vMoeForConditionalGeneration", "vision and language"),
    Architecture("idefics3", "Idefics3ForConditionalGeneration", "vision and language"),
    Architecture("internvl", "InternVLForConditionalGeneration", "vision and language"),
    Architecture("llava", "LlavaForConditionalGeneration", "vision and language"),
    Architecture("llava_onevision", "LlavaOnevisionForConditionalGeneration", "vision and language"),
    Architecture("mistral3", "Mistral3ForConditionalGeneration", "vision and language"),
    Architecture(
        "mllama",
        "MllamaForConditionalGeneration",
        "vision and language",
        {"text_config": {"cross_attention_layers": [1]}},
    ),
    Architecture("paligemma", "PaliGemmaForConditionalGeneration", "vision and language"),
    Architecture("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "vision and language"),
    Architecture("qwen2_vl", "Qwen2VLForConditionalGeneration", "vision and language"),
    Architecture("qwen3_5", "Qwen3_5ForConditionalGeneration", "vision and language"),
    Architecture("qwen3_vl", "Qwen3VLForConditionalGeneration", "vision and language"),
    Architecture("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", "vision and language"),
    Architecture("smolvlm", "SmolVLMForConditionalGeneration", "vision and language"),
    Architecture("qwen2_audio", "Qwen2AudioForConditionalGeneration", "audio and language"),
    Architecture("voxtral", "VoxtralForConditionalGeneration", "audio and language"),
    Architecture("glmasr", "GlmAsrForConditionalGeneration", "audio and language"),
    Architecture("bart", "BartForConditionalGeneration", "encoder and decoder"),
    Architecture("blenderbot", "BlenderbotForConditionalGeneration", "encoder and decoder"),
    Architecture("m2m_100", "M2M100ForConditionalGeneration", "encoder and decoder"),
    Architecture("marian", "MarianMTModel", "encoder and decoder"),
    Architecture("mbart", "MBartForConditionalGeneration", "encoder and decoder"),
    Architecture("mt5", "MT5ForConditionalGeneration", "encoder and decoder"),
    Architecture("pegasus", "PegasusForConditionalGeneration", "encoder and decoder"),
    Architecture("t5", "T5ForConditionalGeneration", "encoder and decoder"),
    Architecture("t5gemma", "T5GemmaForConditionalGeneration", "encoder and decoder"),
    Architecture("umt5", "UMT5ForConditionalGeneration", "encoder and decoder"),
    Architecture("whisper", "WhisperForConditionalGeneration", "encoder and decoder"),
    Architecture("albert", "AlbertForMaskedLM", "encoder", slices=()),  # one layer, used again and again
    Architecture("bert", "BertForMaskedLM", "encoder"),
    Architecture("camembert", "CamembertForMaskedLM", "encoder"),
    Architecture("deberta-v2", "DebertaV2ForMaskedLM", "encoder"),
    Architecture("distilbert", "DistilBertForMaskedLM", "encoder"),
    Architecture("electra", "ElectraForMaskedLM", "encoder"),
    Architecture("eurobert", "EuroBertForMaskedLM", "encoder"),
    Architecture("modernbert", "ModernBertForMaskedLM", "encoder"),
    Architecture("mpnet", "MPNetForMaskedLM", "encoder"),
    Architecture("nomic_bert", "NomicBertForMaskedLM", "encoder"),
    Architecture("roberta", "RobertaForMaskedLM", "encoder"),
    Architecture("xlm-roberta", "XLMRobertaForMaskedLM", "encoder"),
)


def write_siblings(architecture: Architecture, folder: Path) -> None:
    """The folders `a`, as transformers saves a random model, and `b`, the same with noise on every weight."""
    import torch
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, architecture.model)(architecture.config())
        model.save_pretrained(folder / "a")
    tensors = load_tensors(folder / "a")
    varied = {
        name: (tensor.float() + 0.05 * noise(1, name, tuple(tensor.shape))).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }
    (folder / "b").mkdir()
    save_tensors(folder / "b" / "model.safetensors", varied)
    shutil.copy(folder / "a" / "config.json", folder / "b")


def loaded(architecture: Architecture, folder: Path) -> tuple[Any, dict[str, list[str]]]:
    """The model in a folder as transformers loads it, and what it complains of."""
    import transformers

    kind = getattr(transformers, architecture.model)
    model, told = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    return model, {what: sorted(map(str, names)) for what, names in told.items() if names}
