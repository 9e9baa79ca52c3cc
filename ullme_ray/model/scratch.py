"""`base: scratch`: a small Llama-style decoder with random weights and a byte-level BPE of the job's own texts.

For machines without a model hub, and for tests. Costs seconds; the same texts and seed give the same model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ullme_ray.spec.job import ScratchSpec

END_TOKEN, BEGIN_TOKEN, PAD_TOKEN = "<|end|>", "<|begin|>", "<|pad|>"


def scratch_config(shape: ScratchSpec, *, max_tokens: int, vocab_size: int, **token_ids: Any) -> Any:
    """The transformers config of a scratch model; a small text may give fewer than `shape.vocab_size` tokens."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=-(-shape.hidden_size * 8 // 3 // 32) * 32,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=4 * max_tokens,
        tie_word_embeddings=True,
        **token_ids,
    )


def build_scratch(texts: Iterable[str], shape: ScratchSpec, *, max_tokens: int, seed: int, folder: str) -> None:
    """Writes an ordinary transformers folder (config, safetensors, fast tokenizer) to a local folder.

    Args:
        texts: what the vocabulary is learned from.
        shape: width, layers, heads and vocabulary size.
        max_tokens: `model.max_tokens`; positions reach four times as far, for prompt + passage in the generate pass.
        seed: of the random weights.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=shape.vocab_size,
            special_tokens=[PAD_TOKEN, BEGIN_TOKEN, END_TOKEN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    begin = bpe.token_to_id(BEGIN_TOKEN)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BEGIN_TOKEN} $A", special_tokens=[(BEGIN_TOKEN, begin)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BEGIN_TOKEN, eos_token=END_TOKEN, pad_token=PAD_TOKEN, model_max_length=max_tokens
    )
    config = scratch_config(
        shape,
        max_tokens=max_tokens,
        vocab_size=bpe.get_vocab_size(),
        bos_token_id=begin,
        eos_token_id=bpe.token_to_id(END_TOKEN),
        pad_token_id=bpe.token_to_id(PAD_TOKEN),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
