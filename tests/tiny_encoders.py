"""Encoder-only and encoder-decoder models of width 32 with random weights, as folders a job can name as its base."""

from __future__ import annotations

from typing import Any

import torch
from grl_reference import WORDS

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
# family: (config values, kind, longest text)
FAMILIES: dict[str, tuple[dict[str, Any], str, int | None]] = {
    "xlm-roberta": (SHAPE | {"max_position_embeddings": 132}, "encoder", 130),  # positions count from padding id + 1 = 2
    "bert": (SHAPE | {"max_position_embeddings": 128}, "encoder", 128),
    "modernbert": (SHAPE | {"max_position_embeddings": 128, "local_attention": 8}, "encoder", 128),
    "mt5": (_T5, "encoder-decoder", None),
    "t5": (_T5, "encoder-decoder", None),
}


def save_encoder(family: str, folder: str) -> str:
    """With a byte-level tokenizer that has XLM-R's special ids (<s> 0, <pad> 1, </s> 2) and frames texts as it does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([" ".join(WORDS)], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", pad_token="<pad>", eos_token="</s>")

    values, kind, _ = FAMILIES[family]
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    config = AutoConfig.for_model(family, **values, **ids, vocab_size=len(tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (AutoModelForSeq2SeqLM if kind == "encoder-decoder" else AutoModelForMaskedLM).from_config(config)
        for name, parameter in model.named_parameters():  # weights that matter: tiny ones would make all tokens alike
            if parameter.dim() == 2 and "embed" not in name and "shared" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
